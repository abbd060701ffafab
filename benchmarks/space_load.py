"""Many clients at once against a running Space: is every request answered, and with its own text?

    python build/space/app.py &
    python -m benchmarks.space_load http://127.0.0.1:7860 --clients 20 --pid <of app.py>     # or --quick

Every client sends one request after the other, some to generate and some to recite, and one in fifty with a
prompt that is far too long. Each kind of request is first sent once alone. The same seed must give the same
text under load, or texts have been mixed. The exit code is 1 if a request had neither an answer nor a plain
refusal, or a wrong answer.
"""

from __future__ import annotations

import argparse
import collections
import random
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from gradio_client import Client

PROMPTS = ("", "Ennor:\n", "First Fisher:\n", "The", "<|endoftext|>", "<b>O</b> 🎭")
GOOD = ("answered", "refused: too long", "refused: queue full")


def make_requests(count: int, length: int) -> list[tuple[str, tuple]]:
    """Different requests: (endpoint, arguments)."""
    chosen, requests = random.Random(0), []
    for i in range(count):
        temperature = chosen.choice((0.0, 0.8, 1.2))
        arguments = (PROMPTS[i % len(PROMPTS)], length, temperature, 0, 1.0, 1000 + i)
        requests.append(("/recite", (1 + 7 * i, length)) if i % 4 == 3 else ("/generate", arguments))
    return requests


def ask(client: Client, request: tuple[str, tuple]) -> str:
    """What must be the same whenever the same is asked."""
    endpoint, arguments = request
    result = client.predict(*arguments, api_name=endpoint)
    return result["text" if endpoint == "/generate" else "recited"]


def verdict(client: Client, request: tuple[str, tuple] | None, expected: str) -> str:
    """Send a request, or a prompt that is too long where it is None, and judge the answer."""
    try:
        if request is None:
            client.predict("x" * 100_000, api_name="/generate")
            return "accepted a prompt that is too long"
        return "answered" if ask(client, request) == expected else "wrong answer"
    except Exception as error:
        message = str(error)
        if request is None and "characters" in message:
            return "refused: too long"
        if "queue is full" in message.lower():
            return "refused: queue full"
        return f"failed: {type(error).__name__}: {message[:200]}"


def memory_mb(pid: int | None) -> float:
    """Resident memory of a process in MB; 0 where that cannot be known."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1e3 for x in status.splitlines() if x.startswith("VmRSS")), 0.0)


def measure(
    address: str, clients: int, seconds: float, length: int, pid: int | None = None
) -> dict[str, Any]:
    """Send requests from many clients for some seconds.

    Returns "seconds", "memory" (a list of MB) and "times": the seconds of each request by its verdict.
    """
    requests, first = make_requests(24, length), Client(address, verbose=False)
    say(f"sending {len(requests)} requests alone")
    alone = [ask(first, request) for request in requests]
    times: dict[str, list[float]] = collections.defaultdict(list)
    memory, lock = [memory_mb(pid)], threading.Lock()
    began = time.monotonic()

    def send(number: int) -> None:
        chosen, client = random.Random(number), Client(address, verbose=False)
        while time.monotonic() - began < seconds:
            i, too_long = chosen.randrange(len(requests)), chosen.random() < 0.02
            sent = time.monotonic()
            what = verdict(client, None if too_long else requests[i], alone[i])
            with lock:
                times[what].append(time.monotonic() - sent)
            if what == "refused: queue full":
                time.sleep(0.5 + chosen.random())  # as a person would, and try again
        client.close()

    threads = [threading.Thread(target=send, args=(n,), daemon=True) for n in range(clients)]
    for thread in threads:
        thread.start()
    try:
        while waiting := sum(thread.is_alive() for thread in threads):
            time.sleep(min(5.0, max(0.5, seconds / 12)))
            memory.append(memory_mb(pid))
            with lock:
                say(f"{time.monotonic() - began:.0f} s: {sum(map(len, times.values()))} requests")
            if time.monotonic() - began > seconds + 180:
                times["no answer"] += [seconds] * waiting
                break
    except KeyboardInterrupt:
        say("interrupted")
    with lock:
        return {"seconds": time.monotonic() - began, "memory": memory, "times": dict(times)}


def say(line: str) -> None:
    """What goes on, apart from the table."""
    print(line, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.space_load", description=about)
    parser.add_argument("address", help="of the running app, such as http://127.0.0.1:7860")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--length", type=int, default=60, help="tokens in each answer (default: 60)")
    parser.add_argument("--pid", type=int, help="the app's process, to watch its memory")
    parser.add_argument("--quick", action="store_true", help="5 clients for 20 seconds")
    args = parser.parse_args(argv)
    if args.quick:
        args.clients, args.seconds = 5, 20.0
    found = measure(args.address, args.clients, args.seconds, args.length, args.pid)
    times, memory = found["times"], found["memory"]
    speed = len(times.get("answered", ())) * args.length / found["seconds"]
    print(
        f"{args.clients} clients, {found['seconds']:.0f} s, {args.length} tokens each: {speed:.1f} tokens/s"
    )
    print("| | requests | median s | slowest s |\n|---|--:|--:|--:|")
    for what, values in sorted(times.items()):
        print(f"| {what} | {len(values)} | {statistics.median(values):.2f} | {max(values):.2f} |")
    if args.pid:
        third = memory[len(memory) // 3]  # by now caches are full; further growth would be a leak
        print(f"memory in MB: {memory[0]:.0f} before, {third:.0f} after a third, {memory[-1]:.0f} at the end")
    return 0 if set(times) <= set(GOOD) else 1


if __name__ == "__main__":
    sys.exit(main())
