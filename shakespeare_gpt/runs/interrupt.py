"""Stopping a run between two steps: a step cut in half would leave half-updated weights."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import torch.distributed as dist

from shakespeare_gpt.speed.processes import OneProcess
from shakespeare_gpt.train import Step


def run_to_end(
    steps: Iterator[Step], show: Callable[[Step], None], processes: OneProcess | None = None
) -> Step:
    """Run a training generator to its end and return the last step; ``show`` is called with each.

    Ctrl-C, a notebook's stop button and SIGTERM wait for the step in hand and then raise KeyboardInterrupt.
    It reaches each of several processes at another moment, and all stop as one.
    """
    processes = processes or OneProcess()
    with interruptible() as interrupted, closing(steps):
        for step in steps:
            show(step)
            if not step.done and any(processes.gather(interrupted())):
                raise KeyboardInterrupt("Interrupted. Run it again, without restart, to go on.")
    return step


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C and SIGTERM set a flag; yields a function that reads it.

    A second signal acts at once, except under torchrun, which passes on each Ctrl-C that the processes have
    already had. Signal handlers belong to the main thread; elsewhere the flag simply never rises.
    """
    flag = threading.Event()
    previous = {}

    def handler(number, frame):
        if flag.is_set() and not dist.is_initialized():
            raise KeyboardInterrupt
        flag.set()

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, handler)
    try:
        yield flag.is_set
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
