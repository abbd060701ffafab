"""What a device is called, which precision suits it, and how a CPU is kept quick."""

import ctypes
import functools
import os
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def default_device(name: str | None = None) -> torch.device:
    """The device called ``name``; without one a CUDA GPU where there is one, else the CPU.

    "cuda" is this process's own GPU under torchrun. Raises ValueError for a device that is not there.
    """
    if name in (None, "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    try:
        device = torch.device(name or "cpu")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"There is no device {name!r} here: leave the choice to us.") from None
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


def best_precision(device: torch.device) -> tuple[str, str]:
    """("bf16" | "fp16" | "fp32", the reason) for the large matrix products of training on ``device``.

    GPUs go by compute capability, since ``is_bf16_supported`` says yes where bf16 is merely emulated.
    """
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = f"compute capability {major}.{minor}"
        if major >= 8:
            return "bf16", f"{capability} computes bf16 natively"
        if major >= 7:
            return "fp16", f"{capability} is below 8.0: fp16 with a gradient scaler"
        return "fp32", f"{capability} has no tensor cores"
    if device.type != "cpu":
        return "fp32", f"nothing faster was tried on {device.type}"
    if _bf16_is_fast_on_cpu():
        return "bf16", "bf16 is much faster on this CPU"
    return "fp32", "bf16 is no faster on this CPU"


@functools.cache
def _bf16_is_fast_on_cpu() -> bool:
    """Measured: some CPUs have bf16 instructions, on the others bf16 is many times slower than fp32."""
    seconds = {}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 768, generator=generator).to(dtype)
        b = torch.randn(768, 768, generator=generator).to(dtype)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    # A clear margin: near a tie the exact one is the better choice.
    return seconds[torch.float32] > 1.5 * seconds[torch.bfloat16]


@contextmanager
def autocast(device: torch.device, precision: str):
    """The context in which matrix products run in ``precision``: "bf16", "fp16" or "fp32".

    A CPU's fused attention takes twice as long in bf16 as its three parts, two products and a softmax, so
    there the parts do it.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if dtype is None:
        yield
        return
    parts = device.type == "cpu" and precision == "bf16"
    # Despite its place this switch acts on CPUs too: without it the parts run in fp32.
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # No cache of cast weights: each is used once a step, and a CUDA graph must not reuse old ones.
    with torch.autocast(device.type, dtype=dtype, cache_enabled=False):
        if not parts:
            yield
            return
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        try:
            with sdpa_kernel(SDPBackend.MATH):
                yield
        finally:
            torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


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
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    mallopt(M_TRIM_THRESHOLD, -1)
    mallopt(M_MMAP_MAX, 0)
