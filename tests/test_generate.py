"""Sampling: the knobs, the cache, the window, the draft, the stream, and the copies in fewer bytes."""

import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from shakespeare_gpt import generate as g
from shakespeare_gpt.checkpoint import load_model
from shakespeare_gpt.export import export_safetensors
from shakespeare_gpt.generate import (
    FIRST_GUESS,
    CachedReader,
    Draft,
    GenerationStats,
    draw,
    fast_copy,
    generate,
    next_token_probs,
    stream_text,
    window_start,
)
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode

ROOT = Path(__file__).resolve().parent.parent
TINY = GPTConfig(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_model(config=TINY, scale=6.0, seed=0) -> GPT:
    """Random weights, enlarged so that the predictions are far from uniform."""
    model = GPT(config, seeded(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model


@pytest.fixture(scope="module")
def text_ids():
    """A text of 400 tokens with passages that come again, so that a draft can guess wrong."""
    ids = torch.randint(0, 61, (400,), generator=seeded(1))
    ids[200:230] = ids[100:130]
    ids[350:370] = ids[110:130]
    return ids


@pytest.fixture(scope="module")
def learnt(text_ids):
    """A model that knows most of ``text_ids`` by heart, from a window that starts anywhere."""
    model = GPT(TINY, seeded(2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    order = seeded(3)
    steps = 160
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 2 * (1 - step / steps))
        starts = torch.randint(0, len(text_ids) - 32, (32,), generator=order)
        rows = text_ids[starts[:, None] + torch.arange(33)]
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    return model.eval()


def uncached(model, ids: list[int]) -> torch.Tensor:
    """The logits after ``ids``, by the window's definition and nothing else."""
    window = ids[window_start(len(ids), model.config.n_positions) :]
    with torch.inference_mode():
        return model(torch.tensor([window]))[0, -1]


def greedy_uncached(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(uncached(model, ids).argmax()))
    return ids[len(prompt) :]


# ------------------------------------------------------------------ the sampler


def reference_probs(logits, temperature, top_k, top_p):
    """The definition in plain Python."""
    V = len(logits)
    order = sorted(range(V), key=lambda i: -logits[i])[: top_k or V]
    top = logits[order[0]]
    weights = [math.exp((logits[i] - top) / temperature) for i in order]
    weights = [w / sum(weights) for w in weights]
    kept, mass = [], 0.0
    for i, w in zip(order, weights, strict=True):
        if mass >= top_p and top_p < 1:
            break
        kept.append((i, w))
        mass += w
    probs = [0.0] * V
    for i, w in kept:
        probs[i] = w / sum(w for _, w in kept)
    return torch.tensor(probs)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50),
    st.floats(0.05, 5.0),
    st.integers(0, 60),
    st.floats(0.01, 1.0),
    st.integers(0, 10**6),
)
def test_probs_follow_the_definition(V, temperature, top_k, top_p, seed):
    """Guards against knobs in the wrong order, off by one token, or not renormalised."""
    logits = torch.randn(V, generator=seeded(seed)) * 3
    probs = next_token_probs(logits, temperature, top_k, top_p)
    expected = reference_probs(logits.tolist(), temperature, top_k, top_p)
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5)
    # A sum that meets top_p to the last digit may fall on either side.
    if (probs > 0).sum() == (expected > 0).sum():
        assert torch.allclose(probs, expected, atol=1e-5)
    else:
        lost = (probs - expected).abs().max()
        assert min(abs(p - top_p) for p in _partial_sums(logits, temperature, top_k)) < 1e-5, lost


def _partial_sums(logits, temperature, top_k):
    best = (logits / temperature).sort(descending=True).values[: top_k or len(logits)]
    return best.softmax(0).cumsum(0).tolist()


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999, 0.9999999])
def test_top_p_short_cut_equals_a_full_sort(top_p):
    """Guards against a nucleus that ends with the first thousand tokens although it reaches further."""
    for scale in (0.1, 1.0, 5.0):
        logits = torch.randn(3, 5000, generator=seeded(0)) * scale
        kept, index = logits.softmax(-1).sort(-1, descending=True)
        kept = kept * (kept.cumsum(-1) - kept < top_p)
        expected = torch.zeros_like(kept).scatter(-1, index, kept / kept.sum(-1, keepdim=True))
        probs = next_token_probs(logits, 1.0, 0, top_p)
        assert torch.allclose(probs, expected, atol=1e-6)


def test_temperature_zero_is_greedy_and_tiny_temperatures_do_not_overflow():
    """Guards against a division by zero at temperature 0 and NaN just above it."""
    logits = torch.tensor([[1.0, 3.0, 2.0], [900.0, -900.0, 0.0]])
    for temperature in (0, 0.0, 5e-324, 1e-46, 1e-30, 1e-6):
        assert next_token_probs(logits, temperature).tolist() == [[0, 1, 0], [1, 0, 0]]


@pytest.mark.parametrize(
    "knobs",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": float("nan")},
    ],
)
def test_settings_out_of_range_are_refused_in_one_line(knobs):
    """Guards against an error that comes only with the first token, or a setting that is silently bent."""
    for call in (
        lambda: next_token_probs(torch.zeros(5), **knobs),
        lambda: generate(random_model(), [1], **knobs),  # before anything is drawn from it
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_logits_that_are_not_numbers_are_an_error(bad, temperature):
    """Guards against NaN weights that greedy decoding turns into a plausible stream of one token."""
    model = random_model()
    with torch.no_grad():
        model.wte.weight[7] = bad
    with pytest.raises(ValueError, match="not finite"):
        next_token_probs(torch.tensor([0.0, bad, 1.0]), temperature)
    with pytest.raises(ValueError, match="not finite"):
        list(generate(model, [1, 2], temperature=temperature, max_new_tokens=3))


def test_draw_inverts_the_sum_and_never_gives_an_impossible_token():
    """Guards against an off-by-one at the edges of the sum, where a token of probability 0 slips in."""
    probs = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0])
    assert [draw(probs, u) for u in (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0)] == [
        *(1, 1, 3, 3, 4, 4),
        4,
    ]


@pytest.mark.parametrize(
    "changes",
    [{"prompt_ids": [61]}, {"prompt_ids": [-1]}, {"max_new_tokens": -1}],
)
def test_a_prompt_of_another_vocabulary_is_refused(changes):
    """Guards against an IndexError from inside the embedding."""
    with pytest.raises(ValueError, match="must"):
        generate(random_model(), **{"prompt_ids": [1], **changes})


# ------------------------------------------------------------------ the window and the cache


@given(st.integers(1, 40), st.integers(1, 500))
def test_the_window_holds_more_than_half_and_never_too_much(n, length):
    """Guards against a window that overflows, or that forgets more than the last half."""
    start = window_start(length, n)
    assert 1 <= length - start <= n
    if length > n:
        assert length - start > n // 2
        assert window_start(length - 1, n) <= start


@pytest.mark.parametrize("n", [1, 2, 5, 32])
def test_cached_logits_equal_uncached_across_the_windows_edge(n):
    """Guards against stale keys, wrong positions or a lost token when the window moves."""
    model = random_model(GPTConfig(vocab_size=61, n_positions=n, n_embd=48, n_layer=2, n_head=3))
    ids = torch.randint(0, 61, (3 * n + 7,), generator=seeded(5)).tolist()
    with torch.inference_mode():
        for first in {1, n, min(2 * n + 1, len(ids))}:
            reader = CachedReader(model)
            logits = reader.read(torch.tensor([ids[:first]]))
            for length in range(first, len(ids)):
                assert torch.allclose(logits[0, -1], uncached(model, ids[:length]), atol=1e-4)
                logits = reader.read(torch.tensor([[ids[length]]]))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 8)), min_size=5, max_size=15))
def test_a_reader_can_undo(moves):
    """Guards against a rejected guess that stays in the cache."""
    model = random_model(GPTConfig(vocab_size=61, n_positions=12, n_embd=24, n_layer=1, n_head=2))
    reader, ids, random = CachedReader(model), [], seeded(6)
    with torch.inference_mode():
        for read, undo in moves:
            start = window_start(len(ids) + read, 12)
            new = torch.randint(0, 61, (read,), generator=random).tolist()
            logits = reader.read(torch.tensor([new]))
            ids += new
            assert torch.allclose(logits[0, -1], uncached(model, ids), atol=1e-4)
            undo = min(undo, read - 1)
            if undo and window_start(len(ids) - undo, 12) == start:
                reader.undo(undo)
                del ids[-undo:]
            assert reader.length == len(ids)


@pytest.mark.parametrize("prompt_length", [0, 1, 31, 32, 33, 200])
def test_generation_past_the_context_follows_the_definition(prompt_length):
    """Guards against a crash at position 256, and long prompts that are cut by another rule."""
    model = random_model()
    prompt = torch.randint(0, 61, (prompt_length,), generator=seeded(7)).tolist()
    told = list(generate(model, prompt, max_new_tokens=70, temperature=0))
    assert told == greedy_uncached(model, prompt or [60], 70)  # 198 is beyond this vocabulary


def test_the_head_works_for_the_wanted_positions_only(monkeypatch):
    """Guards against a prompt whose 50,257 logits a token are computed and thrown away."""
    model, seen = random_model(), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: seen.append(hidden.shape[1]) or head(hidden))
    list(generate(model, list(range(20)), max_new_tokens=5))
    assert seen == [1] * 5


def test_a_seed_gives_the_same_text_and_leaves_the_global_generator_alone():
    """Guards against sampling from the global generator: a demonstration would then change a training run."""
    model = random_model()
    state = torch.get_rng_state()
    runs = [list(generate(model, [1], seed=seed, max_new_tokens=40)) for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    assert list(generate(model, [1], max_new_tokens=40)) != list(
        generate(model, [1], max_new_tokens=40)
    )
    assert torch.equal(state, torch.get_rng_state())


def test_closing_stops_at_once_and_the_caller_keeps_its_gradient_mode(monkeypatch):
    """Guards against a stop button that waits for the end, and inference mode leaking out of the loop."""
    model, passes = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda *a: passes.append(1) or hidden(*a))
    stream = generate(model, [1], max_new_tokens=10**9)
    for _ in range(3):
        next(stream)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    stream.close()
    assert len(passes) == 3
    assert list(stream) == []


def test_stats_count_tokens_and_passes_and_not_the_readers_time():
    """Guards against tokens/s that a slow page, not the model, has determined."""
    stats = GenerationStats()
    began = time.perf_counter()
    for _ in generate(random_model(), [1], max_new_tokens=6, stats=stats):
        time.sleep(0.02)
    assert (stats.tokens, stats.passes, stats.proposed, stats.accepted) == (6, 6, 0, 0)
    assert 0 < stats.first_token_seconds <= stats.seconds < time.perf_counter() - began - 0.1
    assert stats.tokens_per_second == pytest.approx(6 / stats.seconds)
    assert GenerationStats().tokens_per_second == GenerationStats().acceptance_rate == 0


# ------------------------------------------------------------------ the draft


def slow_proposal(text, context, length):
    """The definition: the longest agreement, then the most frequent next token (the smallest of equals)."""
    agreeing = {}
    for place in range(2, len(text)):
        match = 0
        while (
            match < min(place, len(context), 32) and text[place - 1 - match] == context[-1 - match]
        ):
            match += 1
        agreeing.setdefault(match, []).append(place)
    best = max(agreeing, default=0)
    if best < 2:
        return []
    follows = [text[place] for place in agreeing[best]]
    token = min(set(follows), key=lambda t: (-follows.count(t), t))
    place = agreeing[best][follows.index(token)]
    return text[place : place + length]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 3), max_size=60),
    st.lists(st.integers(0, 3), max_size=40),
    st.integers(0, 70),
)
def test_a_draft_proposes_what_follows_the_longest_agreement(text, context, length):
    """Guards against matches that wrap round the start of the text, and shorter ones that win."""
    expected = slow_proposal(text, context, length) if length else []
    assert Draft(text).propose(context, length) == expected


def test_greedy_with_a_draft_is_greedy_without(learnt, text_ids):
    """Guards against a guess that is believed, or kept one token too long: 100 prompts, past the window."""
    draft, total = Draft(text_ids), GenerationStats()
    starts = torch.randint(0, 360, (100,), generator=seeded(8)).tolist()
    for i, start in enumerate(starts):
        prompt = text_ids[start : start + 3 + i % 30].tolist()
        plain = list(generate(learnt, prompt, max_new_tokens=40, temperature=0))
        fast = list(
            generate(learnt, prompt, max_new_tokens=40, temperature=0, draft=draft, stats=total)
        )
        assert fast == plain
    assert total.acceptance_rate > 0.5, "the fixture should know its text"
    assert total.passes < total.tokens / 2
    assert total.tokens == 4000 == total.accepted + total.passes


def test_a_draft_changes_nothing_for_a_model_that_knows_nothing(text_ids):
    """Guards against an order of random numbers that depends on what was guessed."""
    model = random_model(scale=3.0).double()  # no near-ties in double precision
    draft, stats = Draft(text_ids), GenerationStats()
    for seed in range(8):
        prompt = text_ids[seed * 7 : seed * 7 + 5].tolist()
        for knobs in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}):
            options = {"max_new_tokens": 50, "seed": seed, **knobs}
            plain = list(generate(model, prompt, **options))
            assert list(generate(model, prompt, **options, draft=draft, stats=stats)) == plain
    assert stats.proposed > 20


def test_a_draft_that_is_always_wrong_is_asked_ever_less():
    """Guards against a model that writes something new at half its speed, for guesses that never come true."""

    class Wrong:
        def propose(self, context_ids, length):
            ids = [*prompt, *plain]
            return [(ids[len(context_ids)] + 1) % 61] * length

    model, prompt, stats = random_model(), [1, 2, 3], GenerationStats()
    plain = list(generate(model, prompt, max_new_tokens=120, temperature=0))
    told = generate(model, prompt, max_new_tokens=120, temperature=0, draft=Wrong(), stats=stats)
    assert list(told) == plain
    assert stats.accepted == 0
    assert (
        FIRST_GUESS <= stats.proposed < FIRST_GUESS + 20
    )  # one long guess, and a few of the shortest


class FixedDraft:
    """Proposes the same tokens whatever has been said."""

    def __init__(self, tokens):
        self.tokens = tokens

    def propose(self, context_ids, length):
        return self.tokens[:length]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_with_a_draft_the_distribution_stays_the_models(top_p):
    """Guards against speculative sampling that favours (or avoids) the proposal: chi-square over triples."""
    V, runs = 6, 1500
    config = GPTConfig(vocab_size=V, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = random_model(config, scale=12.0, seed=1)
    best = list(generate(model, [0], max_new_tokens=3, temperature=0))
    draft = FixedDraft([best[0], best[1], (best[2] + 1) % V])  # likely, likely, unlikely
    expected = {}
    with torch.inference_mode():
        for a in range(V):
            for b in range(V):
                logits = model(torch.tensor([[0, a, b]]))[0]
                p = next_token_probs(logits, 1.5, 0, top_p)
                for c in range(V):
                    expected[a, b, c] = (p[0, a] * p[1, b] * p[2, c]).item() * runs
    counts, stats = dict.fromkeys(expected, 0), GenerationStats()
    for seed in range(runs):
        told = generate(
            model,
            [0],
            max_new_tokens=3,
            temperature=1.5,
            top_p=top_p,
            seed=seed,
            draft=draft,
            stats=stats,
        )
        counts[tuple(told)] += 1
    assert 0.1 < stats.acceptance_rate < 0.95
    assert all(counts[k] == 0 for k, e in expected.items() if e == 0)
    # Rare outcomes are put together, so that each cell expects at least five.
    cells = [(counts[k], e) for k, e in expected.items() if e >= 5]
    rest = [(counts[k], e) for k, e in expected.items() if e < 5]
    cells.append((sum(c for c, _ in rest), max(1e-9, sum(e for _, e in rest))))
    square = sum((c - e) ** 2 / e for c, e in cells if e > 1)
    freedom = len(cells) - 1
    assert freedom > 5
    # Wilson and Hilferty: the cube root is nearly normal. 3.3 standard deviations: one in two thousand.
    z = ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.3, (square, freedom)


# ------------------------------------------------------------------ the stream


class Script:
    """Stands in for ``generate``: gives out the tokens of a text and notes how it ended."""

    def __init__(self, ids):
        self.ids, self.given, self.closed = ids, 0, False

    def __call__(self, *args, **kwargs):
        try:
            for token in self.ids:
                self.given += 1
                yield token
        finally:
            self.closed = True


@pytest.fixture
def script(monkeypatch):
    def install(ids):
        made = Script(ids)
        monkeypatch.setattr(g, "generate", made)
        return made

    return install


def test_pieces_are_whole_characters(script):
    """Guards against an emoji that arrives as two replacement signs."""
    text = "Soft! 🎭 what light — naïve 東京?"
    made = script(encode(text))
    pieces = list(stream_text(None, ""))
    assert "".join(pieces) == text
    assert all(pieces)
    assert "\ufffd" not in "".join(pieces)
    assert len(pieces) > 8
    assert made.closed


def test_an_unfinished_character_comes_at_the_end(script):
    """Guards against bytes that vanish when the last token ends inside a character."""
    script(encode("ok 🎭")[:-1])
    assert "".join(stream_text(None, "")) == "ok \ufffd"


@settings(max_examples=80, deadline=None)
@given(
    st.text(alphabet="ab\n🎭", max_size=30),
    st.lists(st.text(alphabet="ab\n🎭", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_never_emitted(text, stops):
    """Guards against the first half of a stop string shown before the second half arrives."""
    expected = text
    for end in range(len(text) + 1):  # the first one to be complete counts
        places = [text[:end].find(s) for s in stops if s in text[:end]]
        if places:
            expected = text[: min(places)]
            break
    told = list(g._stream(Script([int(b) for t in text for b in encode(t)])(), stops))
    assert "".join(told) == expected
    assert all(told)


@pytest.mark.parametrize(("stops", "shown"), [(["the", "h"], " t"), (["he", "the", "e"], " ")])
def test_stop_strings_do_not_depend_on_the_tokens(stops, shown):
    """Both stop strings may come with one token: what is complete first still decides, as letter by letter."""
    for pieces in ([" the"], [" t", "he"], list(" the")):
        ids = [int(b) for t in pieces for b in encode(t)]
        assert "".join(g._stream(Script(ids)(), stops)) == shown


def test_a_stop_string_stops_the_model(script):
    """Guards against tokens computed after the text is over; a lone string is one stop, not its letters."""
    made = script(encode("Speak, speak.\n\nROMEO: no"))
    assert "".join(stream_text(None, "", stop="\n\n")) == "Speak, speak."
    assert made.given < len(made.ids)
    assert made.closed
    with pytest.raises(ValueError, match="stop"):
        stream_text(None, "", stop=["a", ""])


def test_end_of_text_ends_the_text(script):
    """Guards against the special token shown as thirteen characters."""
    script([*encode("Exeunt."), END_OF_TEXT, *encode("more")])
    assert "".join(stream_text(None, "")) == "Exeunt."


def test_closing_the_stream_closes_the_model(script):
    """Guards against a stop button that stops the text but not the computation."""
    made = script(encode("a b c d e"))
    stream = stream_text(None, "")
    next(stream)
    stream.close()
    assert made.closed
    assert made.given == 1


def test_stream_text_with_a_real_model():
    """Guards against arguments lost on the way from the stream to the loop."""
    config = GPTConfig(vocab_size=VOCAB_SIZE, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model, stats = random_model(config), GenerationStats()
    options = {"max_new_tokens": 30, "seed": 3, "top_k": 50, "temperature": 0.9}
    for prompt in ("ROMEO:", "", "<|endoftext|> 🎭 <script>", "word " * 500):
        told = "".join(stream_text(model, prompt, **options, stats=stats))
        assert told == "".join(stream_text(model, prompt, **options))
        assert "<|endoftext|>" not in told
    assert stats.tokens


# ------------------------------------------------------------------ fewer bytes


def available(kind):
    model = random_model()
    try:
        return fast_copy(model, kind)[0]
    except ValueError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("kind", "most"), [("fp32", 0.0), ("fp16", 2e-3), ("bf16", 0.08), ("int8", 0.15)]
)
def test_a_copy_says_nearly_the_same(kind, most, learnt, text_ids):
    """Guards against a wrong scale, a forgotten bias, a transposed matrix, or a copy that changes its original."""
    available(kind)
    before = {name: p.clone() for name, p in learnt.state_dict().items()}
    copy, reason = fast_copy(learnt, kind)
    ids = text_ids[:128].view(4, 32)
    with torch.inference_mode():
        expected, logits = learnt(ids), copy(ids).float()
        assert (logits - expected).abs().max() <= most * expected.abs().max()
        loss = copy(ids[:, :-1], ids[:, 1:]).float()
        each = copy(ids[:, :-1], ids[:, 1:], reduction="none").float()
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(expected.item(), abs=0.02 if kind == "bf16" else 1e-4)
    assert each.shape == (4, 31)
    assert each.mean().item() == pytest.approx(loss.item(), abs=0.02 if kind == "bf16" else 1e-4)
    assert kind in reason
    assert copy.num_parameters() == learnt.num_parameters()
    assert copy.config == learnt.config
    assert copy.device == learnt.device
    assert all(torch.equal(before[name], p) for name, p in learnt.state_dict().items())


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_a_packed_row_does_not_depend_on_its_neighbours(kind):
    """Guards against one scale for a whole batch: a guess would then change what the model says before it."""
    available(kind)
    layer = {"fp16": g.HalfLinear, "int8": g.Int8Linear}[kind](
        torch.randn(70, 96, generator=seeded(0)), torch.randn(70, generator=seeded(1))
    )
    x = torch.randn(40, 96, generator=seeded(2)) * torch.logspace(-3, 3, 40)[:, None]
    x[7] = 0
    assert torch.equal(layer(x)[:9], layer(x[:9]))
    assert torch.equal(layer(x)[7:8], layer(x[7:8]))
    assert torch.isfinite(layer(x)).all()


@pytest.mark.parametrize("kind", ["fp16", "bf16", "int8"])
def test_copies_generate_with_a_draft_as_without(kind, learnt, text_ids):
    """Guards against a cache of another dtype than the copy's stream."""
    available(kind)
    copy, _ = fast_copy(learnt, kind)
    draft, same = Draft(text_ids), 0
    for start in range(0, 300, 30):
        prompt = text_ids[start : start + 16].tolist()
        plain = list(generate(copy, prompt, max_new_tokens=40, temperature=0))
        same += plain == list(generate(copy, prompt, max_new_tokens=40, temperature=0, draft=draft))
    assert same == 10 if kind == "fp16" else same >= 8  # coarser numbers have nearer ties


def test_auto_measures_and_says_so(learnt):
    """Guards against a choice by name instead of by measurement, and int8 chosen without being asked for."""
    copy, reason = fast_copy(learnt)
    assert "\n" not in reason
    assert reason.endswith(".")
    kind = reason.split()[2].rstrip(",")
    assert kind in ("fp32", "fp16", "bf16")
    times = dict(part.split() for part in reason.rstrip(".").split(", ")[2:])
    assert set(times) <= {"fp32", "fp16", "bf16"}
    assert list(generate(copy, [1], max_new_tokens=3))
    with pytest.raises(ValueError, match="fp64"):
        fast_copy(learnt, "fp64")


def test_auto_takes_the_fastest(monkeypatch, learnt):
    """Guards against a sign error in the comparison."""
    for fastest in ("fp32", "bf16"):
        available("fp16")
        monkeypatch.setattr(g, "_convert", lambda model, kind: kind)
        monkeypatch.setattr(g, "_step_seconds", lambda kind, best=fastest: 1.0 + (kind != best))
        assert f"Weights in {fastest}" in fast_copy(learnt)[1]
        monkeypatch.undo()


def test_a_kind_that_this_machine_lacks_is_refused_in_one_line(monkeypatch, learnt):
    """Guards against a page of C++ where PyTorch has dropped a kernel; auto goes on without it."""

    def missing(*args):
        raise NotImplementedError("no kernel\nand a long list")

    monkeypatch.setattr(g.HalfLinear, "__init__", missing)
    with pytest.raises(ValueError, match=r"^fp16 weights do not work on this machine: no kernel$"):
        fast_copy(learnt, "fp16")
    assert "fp16" not in fast_copy(learnt)[1]


# --- the command line -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    config = GPTConfig(n_positions=16, n_embd=16, n_layer=1, n_head=2)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    meta = {"preset": "smoke", "text_name": "input", "steps": 7, "loss": 0.5}
    return export_safetensors(random_model(config), path, meta)


def test_command_line_continues_the_prompt(weights, capsys):
    """What it prints is the prompt and its continuation and nothing else: people redirect it into files."""
    line = ["KING:\\nNow", "--weights", str(weights), "--max-new-tokens", "12", "--seed", "3"]
    assert g.main(line) == 0
    printed, about = capsys.readouterr()
    model, _ = load_model(weights)
    expected = "".join(stream_text(model, "KING:\nNow", max_new_tokens=12, seed=3))
    assert expected and printed == f"KING:\nNow{expected}\n"
    assert "text_name=input steps=7 loss=0.5" in about and "seed=3" in about


def test_command_line_stops_where_the_reader_does(weights):
    """`| head -1` ended in a traceback."""
    line = [sys.executable, "-m", "shakespeare_gpt.generate", "O", "--weights", str(weights)]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        run.stdout.close()
        error = run.stderr.read().decode()
    assert run.returncode == 1 and error.count("\n") == 1 and error.startswith("# preset=smoke")


def test_command_line_says_what_is_wrong(weights, tmp_path, monkeypatch, capsys):
    """One line and exit status 1, no traceback; and never random weights."""
    monkeypatch.chdir(tmp_path)
    small = random_model(GPTConfig(vocab_size=101, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    foreign = export_safetensors(small, tmp_path / "foreign.safetensors", {})
    named = ["O", "--weights", str(weights)]
    for line, reason in (
        (["O"], "train first"),
        (["O", "--weights", "nowhere.pt"], "nowhere.pt"),
        (["O", "--weights", str(foreign)], "vocabulary has 101 tokens"),
        ([*named, "--temperature", "-1"], "temperature must be 0 or more"),
        ([*named, "--max-new-tokens", "-5"], "max_new_tokens must be 0 or more"),
    ):
        assert g.main(line) == 1
        printed, error = capsys.readouterr()
        assert printed == "" and reason in error.splitlines()[-1]
        assert error.splitlines()[-1].startswith("error: ")
