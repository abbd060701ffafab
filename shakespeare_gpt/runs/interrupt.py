"""Stopping a run between two steps: a step cut in half would leave half-updated weights."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import closing

import torch.distributed as dist

from shakespeare_gpt.speed.processes import gather
from shakespeare_gpt.train import Step


def run_to_end(steps: Iterator[Step], show: Callable[[Step], None]) -> Step:
    """Run a training generator to its end and return the last step; ``show`` is called with each.

    Ctrl-C, a notebook's stop button and SIGTERM wait for the step in hand and then raise KeyboardInterrupt.
    A second one acts at once, except under torchrun, which passes on each Ctrl-C that the processes have
    already had. It reaches each of several processes at another moment, and all stop as one.
    """
    interrupted, previous = threading.Event(), {}

    def handler(number, frame):
        if interrupted.is_set() and not dist.is_initialized():
            raise KeyboardInterrupt
        interrupted.set()

    if threading.current_thread() is threading.main_thread():  # no other may handle signals
        previous = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with closing(steps):
            for step in steps:
                show(step)
                if not step.done and any(gather(interrupted.is_set())):
                    raise KeyboardInterrupt("Interrupted. Run it again, without restart, to go on.")
        return step
    finally:
        for number, old in previous.items():
            signal.signal(number, old)
