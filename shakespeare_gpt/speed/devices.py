"""What a device is called, which precision suits it, and how a CPU is kept quick."""

import ctypes
import functools
import os
import platform
import timeit
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shakespeare_gpt import UsageError


def default_device(name: str | torch.device | None = None) -> torch.device:
    """The device ``name``; without one a CUDA GPU where there is one, else the CPU.

    "cuda" is this process's own GPU under torchrun. Raises UsageError for a device that is not there.
    """
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"There is no device {name!r} here: name another, or none.") from None
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's and how many threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line for line in lines if line.startswith("model name")).split(":", 1)[1].strip()
    count = torch.get_num_threads()
    return f"{name}, {count} thread{'s' * (count != 1)}"


def best_precision(device: torch.device, asked: str = "auto") -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason) for the large matrix products on ``device``.

    GPUs go by compute capability, since ``is_bf16_supported`` says yes where bf16 is merely emulated.
    """
    if asked != "auto":
        return asked, "it was asked for"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        precision = "bf16" if major >= 8 else "fp16" if major >= 7 else "fp32"
        return precision, f"this GPU has compute capability {major}.{minor}"
    if device.type != "cpu":
        return "fp32", f"nothing faster was tried on {device.type}"
    if _bf16_is_fast_on_cpu():
        return "bf16", "bf16 is much faster on this CPU"
    return "fp32", "bf16 is no faster on this CPU"


@functools.cache
def _bf16_is_fast_on_cpu() -> bool:
    """Measured: some CPUs have bf16 instructions, on the others bf16 is many times slower than fp32."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 768, dtype=dtype), torch.ones(768, 768, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(lambda a=a, b=b: a @ b, number=1, repeat=5))
    # A clear margin: near a tie the exact one is the better choice.
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


@contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which matrix products run in ``precision``: "bf16", "fp16" or "fp32".

    A CPU's fused attention takes twice as long in bf16 as its three parts, two products and a softmax, so
    there the parts do it.
    """
    cuda = torch.backends.cuda  # despite its place the switch for reductions acts on CPUs too
    with ExitStack() as stack:
        if precision != "fp32":
            dtype = torch.bfloat16 if precision == "bf16" else torch.float16
            # No cache of cast weights: each is used once a step, and a CUDA graph must not reuse old ones.
            stack.enter_context(torch.autocast(device.type, dtype=dtype, cache_enabled=False))
        if device.type == "cpu" and precision == "bf16":
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            before = cuda.fp16_bf16_reduction_math_sdp_allowed()
            stack.callback(cuda.allow_fp16_bf16_reduction_math_sdp, before)
            cuda.allow_fp16_bf16_reduction_math_sdp(True)  # without it the parts run in fp32
        yield


def keep_freed_memory() -> None:
    """Have the C library (glibc) keep freed memory for the next step instead of giving it back.

    A step frees and takes gigabytes of activations, and the system clears each page that it hands out: about
    a quarter of the step's time. It lasts as long as the process, so only a program that owns its process
    calls this. See mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc: it goes without
        return
    mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
    mallopt(-4, 0)  # M_MMAP_MAX: none
