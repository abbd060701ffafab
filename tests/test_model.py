"""The model: GPT-2's sizes and numbers, causality, the cache, the first weights."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shakespeare_gpt.model import GPT, GPTConfig, KVCache
from shakespeare_gpt.runs.weights import from_openai, to_openai

TINY = GPTConfig(vocab_size=211, n_positions=24, n_embd=48, n_layer=3, n_head=4)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def lively(config: GPTConfig = TINY, seed: int = 0) -> GPT:
    """Random weights in which every parameter matters: a bias of 0 or a gain of 1 would hide a mistake."""
    model = GPT(config, seeded(seed)).eval()
    generator = seeded(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.15)
    return model


def some_ids(*shape: int, seed: int = 5, config: GPTConfig = TINY) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, shape, generator=seeded(seed))


# --- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "expected"), [(1024, 124_439_808), (256, 123_849_984)])
def test_parameter_count(positions, expected):
    """An untied head, a missing bias or another width: not the 124M model that the README claims."""
    with torch.device("meta"):
        model = GPT(GPTConfig(n_positions=positions))
    assert model.num_parameters() == expected


def test_names_are_openais():
    """Other names, and no library reads the exported weights."""
    with torch.device("meta"):
        names = set(GPT(GPTConfig()).state_dict())
    layer = {
        f"{part}.{kind}"
        for part in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
        for kind in ("weight", "bias")
    }
    expected = {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
    expected |= {f"h.{i}.{name}" for i in range(12) for name in layer}
    assert names == expected


@pytest.mark.parametrize(
    ("sizes", "word"),
    [
        ({"n_embd": 50, "n_head": 4}, "multiple"),
        ({"n_layer": 0}, "at least 1"),
        ({"n_head": 0}, "at least 1"),
        ({"n_positions": -1}, "at least 1"),
        ({"vocab_size": 0}, "at least 1"),
        ({"window": 257}, "window"),
        ({"window": -1}, "window"),
    ],
)
def test_impossible_sizes(sizes, word):
    """An impossible size would fail deep inside a reshape, or divide by zero."""
    with pytest.raises(ValueError, match=word):
        GPTConfig(**sizes)


def test_config_cannot_be_changed():
    """A config changed after the model was built would describe another model in the checkpoint."""
    with pytest.raises(AttributeError):
        TINY.n_layer = 5


# --- against transformers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """Our model and transformers' GPT2LMHeadModel with the same lively weights."""
    transformers = pytest.importorskip("transformers")
    ours = lively()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=TINY.vocab_size,
            n_positions=TINY.n_positions,
            n_embd=TINY.n_embd,
            n_layer=TINY.n_layer,
            n_head=TINY.n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    missing, unexpected = theirs.load_state_dict(to_openai(ours.state_dict()), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    theirs.tie_weights()
    return ours, theirs


def test_logits_are_transformers(reference):
    """Post- instead of pre-LayerNorm, exact GELU, a wrong epsilon, a transposed matrix: all land here."""
    ours, theirs = reference
    ids = some_ids(3, TINY.n_positions)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.std() > 1  # the comparison would say little about a flat output
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=1e-5)


def test_loss_and_gradients_are_transformers(reference):
    """The loss's own backward pass, and the tied matrix that is trained from both of its ends."""
    ours, theirs = reference
    ids = some_ids(3, TINY.n_positions, seed=6)
    ours.zero_grad()
    theirs.zero_grad()
    loss = ours(ids[:, :-1], ids[:, 1:])
    expected = theirs(ids, labels=ids).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.backward()
    gradients = from_openai({n: p.grad for n, p in theirs.named_parameters()})
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], atol=1e-5, rtol=1e-4, msg=name)


# --- causality and the cache ------------------------------------------------------------------------


@pytest.mark.parametrize("place", [1, 7, 23])
def test_a_later_token_changes_nothing_before(place):
    """A mask off by one lets the model read the answer: the loss falls to zero and it cannot recite."""
    model = lively()
    ids = some_ids(2, 24)
    changed = ids.clone()
    changed[:, place] = (changed[:, place] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :place], after[:, :place], atol=1e-6, rtol=0)
    assert (before[:, place:] - after[:, place:]).abs().amax(-1).min() > 1e-4


@settings(max_examples=40)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_cached_equals_uncached(pieces):
    """A wrong position or mask behind a cache: text that turns to nonsense after the first tokens."""
    total = min(sum(pieces), TINY.n_positions)
    model, ids = lively(), some_ids(2, total)
    cache = KVCache(TINY, batch_size=2)
    parts, done = [], 0
    with torch.no_grad():
        for size in pieces:
            if done < total:
                parts.append(model(ids[:, done : done + size], cache=cache))
                done = min(done + size, total)
                assert cache.length == done
        torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-5, rtol=1e-5)


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(0, 20))
def test_a_shorter_cache_forgets_a_rejected_draft(length, keep):
    """Entries of a rejected draft that are still seen poison everything after them."""
    keep = min(keep, length)
    model, ids, other = lively(), some_ids(1, 24), some_ids(1, 24, seed=8)
    cache = KVCache(TINY)
    with torch.no_grad():
        model(ids[:, :keep], cache=cache) if keep else None
        model(other[:, keep:length], cache=cache) if length > keep else None
        cache.length = keep
        rest = model(ids[:, keep:], cache=cache)
        torch.testing.assert_close(rest, model(ids)[:, keep:], atol=1e-5, rtol=1e-5)


def test_cache_limits():
    """Writing past the end must not pass silently."""
    model, cache = lively(), KVCache(TINY)
    with torch.no_grad():
        model(some_ids(1, 20), cache=cache)
        with pytest.raises(ValueError, match="context of 24"):
            model(some_ids(1, 5), cache=cache)
        assert cache.length == 20  # the refused tokens left no trace
        cache.length = 0
        torch.testing.assert_close(
            model(some_ids(1, 9), cache=cache), model(some_ids(1, 9)), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("positions", [None, 9])
def test_a_cache_is_as_large_as_it_must_be(positions):
    """200 texts of 82 tokens took a cache for 256: 3.8 GB for the 124M model."""
    model, ids = lively(), some_ids(2, 9)
    cache = KVCache(TINY, 2, positions)
    assert cache.keys.shape == cache.values.shape == (3, 2, 4, positions or 24, 12)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, cache=cache), model(ids), atol=1e-5, rtol=1e-5)


def test_too_long_for_the_context():
    """Positions that do not exist: an index error that names no cause."""
    with pytest.raises(ValueError, match="context of 24"):
        lively()(some_ids(1, 25))


# --- the first weights ------------------------------------------------------------------------------


def test_init_statistics():
    """Without GPT-2's scaled init learning by heart takes twice as long."""
    config = GPTConfig(vocab_size=5000, n_embd=256, n_head=4, n_layer=6, n_positions=128)
    model = GPT(config, seeded(3))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(12) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(p.mean().item()) < 0.001, name


def test_first_loss_is_that_of_guessing():
    """A first loss above ln V says that the untrained model is sure of something wrong."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=64, n_positions=64)
    ids = some_ids(4, 65, config=config)
    with torch.no_grad():
        loss = GPT(config, seeded(0))(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(math.log(50257), abs=0.1)


def test_weights_come_from_the_generator_alone():
    """A draw from the global generator makes a run depend on what was run before it."""
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = GPT(TINY, seeded(7))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    second, other = GPT(TINY, seeded(7)), GPT(TINY, seeded(8))
    assert torch.equal(first.wte.weight, second.wte.weight)
    assert not torch.equal(first.wte.weight, other.wte.weight)
    assert torch.equal(GPT(TINY).wte.weight, GPT(TINY).wte.weight)
