"""What a device is called, which precision suits it, and the switches that are put back."""

import os
from contextlib import suppress

import pytest
import torch
from small_run import IDS, new_model

from shakespeare_gpt.speed import devices
from shakespeare_gpt.speed.devices import autocast, best_precision, default_device, device_name


@pytest.mark.parametrize("before", [False, True])
def test_bf16_on_a_cpu_is_near_fp32_and_leaves_no_trace(before):
    """Attention in parts could lose the mask; a switch of torch that stays turned changes others."""
    model, ids = new_model(), IDS[:32].view(2, 16)
    exact, allowed = model(ids), torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
    try:
        with suppress(ZeroDivisionError), autocast(torch.device("cpu"), "bf16"):
            rounded, changed_end = (model(ids), model(torch.cat((ids[:, :-1], (ids[:, -1:] + 1) % 97), 1)))
            raise ZeroDivisionError
        assert allowed() == before
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(False)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.02, rtol=0.02)
    assert torch.equal(rounded[:, :-1], changed_end[:, :-1])


def test_fp32_changes_nothing():
    """Full precision that is not quite full: nobody would find out why the numbers differ."""
    model, ids = new_model(), IDS[:32].view(2, 16)
    with autocast(torch.device("cpu"), "fp32"):
        assert torch.equal(model(ids), model(ids)) and model(ids).dtype == torch.float32


@pytest.mark.parametrize(
    "capability, expected", [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_precision_follows_the_compute_capability(monkeypatch, capability, expected):
    """A T4 says that it supports bf16, and merely emulates it: many times slower than fp16."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    precision, reason = best_precision(torch.device("cuda", 0))
    assert precision == expected and reason.startswith("this GPU has compute capability ")


def test_precision_of_other_devices():
    """The reason is printed: it must be a clause that stands after "because"."""
    assert best_precision(torch.device("mps"))[0] == "fp32"
    precision, reason = best_precision(torch.device("cpu"))
    assert precision in ("fp32", "bf16") and "this CPU" in reason
    assert best_precision(torch.device("cpu")) == (precision, reason)


def test_the_device_that_is_named(monkeypatch):
    """ "cuda" that becomes the CPU without a word is a night lost."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_device() == default_device("cpu") == torch.device("cpu")
    for name in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match=f"no device '{name}'"):
            default_device(name)
    assert "thread" in device_name(torch.device("cpu"))


def test_each_process_takes_its_own_gpu(monkeypatch):
    """Two processes on one GPU are slower than one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == default_device("cuda") == torch.device("cuda", 3)


@pytest.mark.parametrize(
    "failing", [lambda name: object(), lambda name: os.stat("/nowhere"), lambda name: len(None)]
)
def test_memory_is_kept_where_glibc_is(monkeypatch, failing):
    """Keeping memory is asked of one C library; on macOS, Windows or Alpine there is no such function."""
    monkeypatch.setattr(devices.ctypes, "CDLL", failing)
    devices.keep_freed_memory()
