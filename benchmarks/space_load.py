"""Many clients at once against a running Space: is every request answered, and with its own text?

    cd build/space && python app.py &
    python -m benchmarks.space_load http://127.0.0.1:7860 --clients 20 --seconds 120 --pid <of app.py>

Every client sends one request after the other through ``gradio_client``, each with a seed and settings of
its own, now a continuation and now a recital, and every fiftieth with nonsense in it. Before the rush each kind of request
is asked once alone; the answer to the same seed under load must be the same, character for character, or texts
have been mixed. Prints a table, and one JSON line for whoever wants to compare runs. Exit status 1 if a
request had neither an answer nor a plain refusal, or the wrong answer.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import statistics
import sys
import threading
import time
from pathlib import Path

from gradio_client import Client

PROMPTS = ("", "Ennor:\n", "First Fisher:\n", "The", "<|endoftext|>", "<b>O</b> 🎭")


def make_requests(count: int, length: int) -> list[tuple]:
    """Different requests: (endpoint, arguments)."""
    chosen = random.Random(0)
    requests = []
    for i in range(count):
        if i % 4 == 3:
            requests.append(("/recite", (1 + 7 * i, length)))
        else:
            heat = chosen.choice((0.0, 0.8, 1.2))
            requests.append(
                ("/generate", (PROMPTS[i % len(PROMPTS)], length, heat, 0, 1.0, 1000 + i))
            )
    return requests


def outcome(endpoint: str, result: dict) -> str:
    """What must be the same whenever the same is asked."""
    return result["text"] if endpoint == "/generate" else result["recited"]


def memory_mb(pid: int | None) -> float:
    """Resident memory of a process in MB; 0 where that cannot be known."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return next(
        (int(x.split()[1]) / 1e3 for x in status.splitlines() if x.startswith("VmRSS")), 0.0
    )


def measure(address: str, clients: int, seconds: float, length: int, pid: int | None) -> dict:
    """Run the rush; returns the figures of the table."""
    requests = make_requests(24, length)
    first = Client(address, verbose=False)
    alone = [outcome(name, first.predict(*values, api_name=name)) for name, values in requests]
    times: dict[str, list[float]] = collections.defaultdict(list)
    counts: collections.Counter[str] = collections.Counter()
    strange: list[str] = []
    memory = [(0.0, memory_mb(pid))]
    lock, end = threading.Lock(), time.monotonic() + seconds

    def run(number: int) -> None:
        chosen = random.Random(number)
        client = Client(address, verbose=False)
        while time.monotonic() < end:
            i = chosen.randrange(len(requests))
            name, values = requests[i]
            nonsense = chosen.random() < 0.02
            began = time.monotonic()
            try:
                if nonsense:
                    client.predict("x" * 100_000, api_name="/generate")
                    verdict = "wrong answer"
                else:
                    result = client.predict(*values, api_name=name)
                    verdict = "answered" if outcome(name, result) == alone[i] else "wrong answer"
            except Exception as error:
                said = str(error)
                if nonsense and "characters" in said:
                    verdict = "told: too long"
                elif "queue is full" in said.lower():
                    verdict = "told: queue full"
                else:
                    verdict = "failed"
                    with lock:
                        strange.append(f"{type(error).__name__}: {said[:200]}")
            with lock:
                counts[verdict] += 1
                times[verdict].append(time.monotonic() - began)
            if verdict == "told: queue full":
                time.sleep(0.5 + chosen.random())  # as a person would, and try again
        client.close()

    threads = [threading.Thread(target=run, args=(n,), daemon=True) for n in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(min(5.0, max(0.5, seconds / 12)))
        memory.append((time.monotonic() - began, memory_mb(pid)))
        if time.monotonic() > end + 180:
            strange.append(f"{sum(t.is_alive() for t in threads)} clients still wait after 180 s")
            counts["no answer"] += sum(t.is_alive() for t in threads)
            break
    wall = time.monotonic() - began
    # By now the caches are full; what it grows from here on would be a leak.
    half = [mb for at, mb in memory if at > wall / 3]
    return {
        "clients": clients,
        "seconds": round(wall, 1),
        "length": length,
        "counts": dict(counts),
        "median_s": {k: round(statistics.median(v), 2) for k, v in times.items()},
        "slowest_s": {k: round(max(v), 2) for k, v in times.items()},
        "tokens_per_second": round(counts["answered"] * length / wall, 1),
        "memory_mb": {
            "before": round(memory[0][1]),
            "after_a_third": round(half[0]) if half else 0,
            "largest": round(max(mb for _, mb in memory)),
            "end": round(memory[-1][1]),
        },
        "strange": strange[:5],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.space_load", description=__doc__.split("\n")[0]
    )
    parser.add_argument("address", help="of the running app, such as http://127.0.0.1:7860")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--length", type=int, default=60, help="tokens in each answer (default: 60)"
    )
    parser.add_argument("--pid", type=int, help="the app's process, to watch its memory")
    args = parser.parse_args(argv)
    row = measure(args.address, args.clients, args.seconds, args.length, args.pid)
    print(f"{row['clients']} clients for {row['seconds']} s, {row['length']} tokens each")
    print(f"{'':<20}{'requests':>10}{'median s':>10}{'slowest s':>11}")
    for verdict, count in sorted(row["counts"].items()):
        median, slowest = row["median_s"].get(verdict, 0), row["slowest_s"].get(verdict, 0)
        print(f"{verdict:<20}{count:>10}{median:>10.2f}{slowest:>11.2f}")
    print(f"tokens a second, all clients together: {row['tokens_per_second']}")
    memory = row["memory_mb"]
    print(
        f"memory in MB: {memory['before']} before, {memory['after_a_third']} after a third of the time, "
        f"{memory['largest']} at most, {memory['end']} at the end"
    )
    for line in row["strange"]:
        print(line)
    print(json.dumps(row))
    bad = {"failed", "wrong answer", "no answer"} & set(row["counts"])
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
