"""The copies with smaller weights, and the rule that chooses among them."""

import pytest
import torch
from torch.nn import functional as F

from shakespeare_gpt import sample
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.sample import generate
from shakespeare_gpt.speed.ngram_draft import NgramDraft
from shakespeare_gpt.speed.sampling_weights import Fp16Linear, for_sampling

CONFIG = GPTConfig(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def copy_of(model, kind):
    try:
        return for_sampling(model, kind)
    except (RuntimeError, AttributeError):
        if kind != "fp16":
            raise
        pytest.skip("this PyTorch lacks the kernel for this CPU")


@pytest.mark.parametrize(("kind", "most"), [("fp32", 0.0), ("fp16", 2e-3), ("bf16", 0.08)])
def test_a_copy_says_nearly_the_same(kind, most, tiny):
    """Guards against a forgotten bias, a transposed matrix, or a copy that changes its original."""
    before = {name: p.clone() for name, p in tiny.model.state_dict().items()}
    copy, reason = copy_of(tiny.model, kind)
    ids = tiny.text.ids[:128].view(2, 64)
    with torch.inference_mode():
        expected, logits = tiny.model(ids), copy(ids).float()
        loss = copy(ids[:, :-1], ids[:, 1:]).float()
    assert (logits - expected).abs().max() <= most * expected.abs().max()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=0.02 if kind == "bf16" else 1e-3)
    assert reason == f"Weights in {kind}: as asked."
    assert not copy.training
    assert copy.config == tiny.model.config
    assert copy.device == tiny.model.device
    assert all(torch.equal(before[name], p) for name, p in tiny.model.state_dict().items())


def test_fp32_shares_its_weights_with_the_model():
    """Guards against 500 MB for nothing."""
    model = GPT(CONFIG, seeded(0))
    copy, _ = for_sampling(model, "fp32")
    assert copy is not model
    for (name, p), (_, q) in zip(model.named_parameters(), copy.named_parameters(), strict=True):
        assert p.data_ptr() == q.data_ptr(), name


def test_a_packed_row_does_not_depend_on_its_neighbours():
    """Guards against a draft that changes what the model says before it."""
    copy_of(GPT(CONFIG), "fp16")
    layer = Fp16Linear(torch.randn(70, 96, generator=seeded(0)), torch.randn(70, generator=seeded(1)))
    x = torch.randn(40, 96, generator=seeded(2)) * torch.logspace(-3, 3, 40)[:, None]
    x[7] = 0
    assert torch.equal(layer(x)[:9], layer(x[:9]))
    assert torch.equal(layer(x)[7:8], layer(x[7:8]))
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize(("kind", "dtype"), [("fp16", torch.float32), ("bf16", torch.bfloat16)])
def test_copies_generate_with_a_draft_as_without(kind, dtype, tiny, monkeypatch):
    """Guards against a cache of another dtype than the copy's activations."""
    copy, _ = copy_of(tiny.model, kind)
    caches, make = [], sample.KVCache
    monkeypatch.setattr(sample, "KVCache", lambda *a, **k: caches.append(make(*a, **k)) or caches[-1])
    draft, same = NgramDraft(tiny.text.ids), 0
    for start in range(0, 300, 30):
        prompt = tiny.text.ids[start : start + 16].tolist()
        plain = list(generate(copy, prompt, max_new_tokens=60, temperature=0))
        same += plain == list(generate(copy, prompt, max_new_tokens=60, temperature=0, draft=draft))
    assert {cache.keys.dtype for cache in caches} == {dtype}
    assert same == 10 if kind == "fp16" else same >= 8  # coarser numbers have nearer ties


class Elsewhere(GPT):
    """A model on the CPU that says it is on another device."""

    device = torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "kind"),
    [((10, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "fp32")],
)
def test_auto_follows_the_gpus_compute_capability(capability, kind, monkeypatch):
    """Guards against bf16 on a T4, which only emulates it, and against a choice by a stopwatch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    copy, reason = for_sampling(Elsewhere(CONFIG))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]
    assert {p.dtype for p in copy.parameters()} == {dtype}
    assert reason == f"Weights in {kind}: this GPU has compute capability {capability[0]}.{capability[1]}."


def test_auto_takes_fp32_on_a_device_it_does_not_know(monkeypatch):
    """Guards against formats that nobody has tried."""
    monkeypatch.setattr(Elsewhere, "device", torch.device("mps"))
    copy, reason = for_sampling(Elsewhere(CONFIG))
    assert {p.dtype for p in copy.parameters()} == {torch.float32}
    assert reason.startswith("Weights in fp32: ")


def test_auto_gives_the_same_text_again(tiny):
    """Guards against the same seed telling another text after a restart."""
    (first, reason), (second, again) = for_sampling(tiny.model), for_sampling(tiny.model)
    assert reason == again
    assert reason.startswith(("Weights in fp16: ", "Weights in fp32: "))
    assert "\n" not in reason
    options = {"max_new_tokens": 40, "temperature": 1.5, "seed": 9}
    assert list(generate(first, [198], **options)) == list(generate(second, [198], **options))


def test_a_machine_without_the_kernel_samples_in_fp32(monkeypatch):
    """Guards against a page of C++ where PyTorch has dropped a kernel."""

    def missing(*args):
        raise NotImplementedError("no kernel\nand a long list")

    monkeypatch.setattr(Fp16Linear, "__init__", missing)
    copy, reason = for_sampling(GPT(CONFIG))
    assert reason.startswith("Weights in fp32: ")
    assert list(generate(copy, [1], max_new_tokens=3))
