"""Sampling: the parameters, the window and its cache, seeds, the draft, and the stream of text."""

import math
import time
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shakespeare_gpt import sample
from shakespeare_gpt.memorization import exact_recall
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.sample import (
    CachedReader,
    GenerationStats,
    draw,
    generate,
    next_token_probs,
    stream_text,
    window_start,
)
from shakespeare_gpt.speed.ngram_draft import DraftLength, NgramDraft
from shakespeare_gpt.speed.sampling_weights import for_sampling
from shakespeare_gpt.tokenizer import END_OF_TEXT, VOCAB_SIZE, encode

SMALL = GPTConfig(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def random_model(config=SMALL, scale=6.0, seed=0) -> GPT:
    """Random weights, enlarged so that the predictions are far from uniform."""
    model = GPT(config, seeded(seed)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model


def uncached(model, ids: list[int]) -> torch.Tensor:
    """The logits after ``ids``, by the window's definition and nothing else."""
    window = ids[window_start(len(ids), model.config.window or model.config.n_positions) :]
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


def partial_sums(logits, temperature, top_k):
    best = (logits / temperature).sort(descending=True).values[: top_k or len(logits)]
    return best.softmax(0).cumsum(0).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 50), st.floats(0.05, 5.0), st.integers(0, 60), st.floats(0.01, 1.0), st.integers(0, 10**6)
)
def test_probs_follow_the_definition(V, temperature, top_k, top_p, seed):
    """Guards against parameters in the wrong order, off by one token, or not renormalised."""
    logits = torch.randn(V, generator=seeded(seed)) * 3
    probs = next_token_probs(logits, temperature, top_k, top_p)
    expected = reference_probs(logits.tolist(), temperature, top_k, top_p)
    assert probs.sum().item() == pytest.approx(1.0, abs=1e-5)
    # A sum that meets top_p to the last digit may fall on either side.
    if (probs > 0).sum() == (expected > 0).sum():
        assert torch.allclose(probs, expected, atol=1e-5)
    else:
        assert min(abs(p - top_p) for p in partial_sums(logits, temperature, top_k)) < 1e-5


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
    "parameters",
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
def test_parameters_out_of_range_are_refused_in_one_line(parameters):
    """Guards against an error that comes only with the first token, or a value that is silently bent."""
    whole = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **parameters}
    for call in (
        lambda: sample.check_sampling(**whole),
        lambda: next_token_probs(torch.zeros(5), **parameters),
        lambda: generate(random_model(), [1], **parameters),  # before anything is drawn from it
        lambda: stream_text(random_model(), "", **parameters),
    ):
        with pytest.raises(ValueError, match=next(iter(parameters))) as error:
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
    numbers = (0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53, 1.0)
    assert [draw(probs, u) for u in numbers] == [1, 1, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("changes", [{"prompt_ids": [61]}, {"prompt_ids": [-1]}, {"max_new_tokens": -1}])
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


@pytest.mark.parametrize(("positions", "n"), [(1, 1), (2, 2), (5, 5), (32, 32), (32, 1), (32, 9)])
def test_cached_logits_equal_uncached_across_the_windows_edge(positions, n):
    """Guards against stale keys, wrong positions or a lost token when the window moves."""
    window = n if n < positions else 0
    sizes = {"vocab_size": 61, "n_positions": positions, "n_embd": 48, "n_layer": 2, "n_head": 3}
    model = random_model(GPTConfig(**sizes, window=window))
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


@pytest.mark.parametrize("tokens", [1, 12, 32, 33, 100])
def test_a_reader_of_several_texts_reads_each_as_if_alone(tokens):
    """Guards against rows that see each other, and a window that moves too early."""
    model = random_model()
    rows = torch.randint(0, 61, (3, tokens), generator=seeded(4))
    reader = CachedReader(model, 3)
    with torch.inference_mode():
        for piece in rows.split(7, dim=1):
            logits = reader.read(piece)
        for row, last in zip(rows.tolist(), logits[:, -1], strict=True):
            assert torch.allclose(last, uncached(model, row), atol=1e-4)
    assert reader.length == tokens


@pytest.mark.parametrize("prompt_length", [0, 1, 31, 32, 33, 200])
def test_generation_past_the_context_follows_the_definition(prompt_length):
    """Guards against a crash where the context ends, and long prompts that are cut by another rule."""
    model = random_model()
    prompt = torch.randint(0, 61, (prompt_length,), generator=seeded(7)).tolist()
    generated = list(generate(model, prompt, max_new_tokens=70, temperature=0))
    assert generated == greedy_uncached(model, prompt or [60], 70)  # 198 is beyond this vocabulary


@settings(max_examples=30)
@given(st.integers(1, 32), st.integers(0, 80), st.integers(0, 2**63 - 1))
def test_a_model_of_short_windows_is_read_through_its_window_everywhere(window, length, seed):
    """Guards against any place that reads further than the training's short windows: there it is lost.

    With ``window`` it must do what a model with so many positions does, whatever stands at the others.
    """
    small = random_model(replace(SMALL, n_positions=window))
    model = GPT(replace(SMALL, window=window)).eval()
    table = torch.full_like(model.wpe.weight, torch.nan)
    table[:window] = small.wpe.weight.detach()
    model.load_state_dict({**small.state_dict(), "wpe.weight": table})
    ids = torch.randint(0, 61, (length + 60,), generator=seeded(seed % 1000))
    draft, ways = NgramDraft(ids.roll(7)), []
    for each in (small, model, for_sampling(model, "fp32")[0]):
        options = {"max_new_tokens": 30, "seed": seed}
        ways.append(
            (
                list(generate(each, ids[:length], **options)),
                list(generate(each, ids[:length], **options, draft=draft)),
                exact_recall(
                    each, ids, prompt_tokens=length or 1, continuation=40, places=5
                ).matched.tolist(),
                CachedReader(each).room(length),
            )
        )
    assert ways[0] == ways[1] == ways[2]


def test_the_head_works_for_the_wanted_positions_only(monkeypatch):
    """Guards against a prompt whose 50,257 logits a token are computed and thrown away."""
    model, seen = random_model(), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: seen.append(hidden.shape[1]) or head(hidden))
    list(generate(model, list(range(20)), max_new_tokens=5))
    assert seen == [1] * 5


def test_a_seed_gives_the_same_text_and_leaves_the_global_generator_alone():
    """Guards against sampling from the global generator: a demonstration would change a training run."""
    model = random_model()
    state = torch.get_rng_state()
    runs = [list(generate(model, [1], seed=seed, max_new_tokens=40)) for seed in (4, 4, 5)]
    assert runs[0] == runs[1] != runs[2]
    fresh = [list(generate(model, [1], max_new_tokens=40)) for _ in range(2)]
    assert fresh[0] != fresh[1]
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 2**31, 2**53 + 1, 2**63 - 1])
def test_every_seed_in_range_works(seed):
    """Guards against a seed that only some of the ways to set it accept."""
    model = random_model()
    assert len(list(generate(model, [1], seed=seed, max_new_tokens=5))) == 5


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 0.5, float("nan"), float("inf")])
def test_a_seed_out_of_range_is_refused_in_one_line(seed):
    """Guards against an overflow in the random generator, and -1 as another name of 2**64 - 1."""
    with pytest.raises(ValueError, match=r"^seed must be a whole number from 0 to 2\*\*63 - 1, not"):
        generate(random_model(), [1], seed=seed)


def test_closing_stops_at_once_and_the_caller_keeps_its_gradient_mode(monkeypatch):
    """Guards against a stop button that waits for the end, and inference mode leaking out of the loop."""
    model, passes = random_model(), []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda *a: passes.append(torch.is_inference_mode_enabled()) or hidden(*a)
    )
    stream = generate(model, [1], max_new_tokens=10**9)
    for _ in range(3):
        next(stream)
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    stream.close()
    assert passes == [True] * 3
    assert list(stream) == []


def test_stats_count_tokens_and_passes_and_not_the_callers_time(monkeypatch):
    """Guards against tokens/s that a slow page, not the model, has determined."""
    now = [0.0]  # a clock that the model and the caller move on
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    model, stats = random_model(), GenerationStats()
    hidden = model.hidden

    def slow_hidden(*arguments):
        now[0] += 2.0
        return hidden(*arguments)

    monkeypatch.setattr(model, "hidden", slow_hidden)
    for _ in generate(model, [1], max_new_tokens=6, stats=stats):
        now[0] += 1000.0
    assert (stats.tokens, stats.passes, stats.proposed, stats.accepted) == (6, 6, 0, 0)
    assert stats.seconds == 12.0
    assert stats.tokens_per_second == 0.5
    list(generate(model, [1], max_new_tokens=2, stats=stats))
    assert (stats.tokens, stats.seconds) == (8, 16.0)
    assert GenerationStats().tokens_per_second == GenerationStats().acceptance_rate == 0


# ------------------------------------------------------------------ the draft


def test_greedy_with_a_draft_is_greedy_without(tiny):
    """Guards against a guess that is believed, or kept one token too long: 30 prompts, past the window."""
    ids, total = tiny.text.ids, GenerationStats()
    altered = ids.clone()
    altered[::23] = ids.roll(1)[::23]  # so that some guesses are wrong
    draft = NgramDraft(altered)
    for i in range(30):
        prompt = ids[10 * i : 12 * i + 3].tolist()
        options = {"max_new_tokens": 40, "temperature": 0}
        plain = list(generate(tiny.model, prompt, **options))
        assert list(generate(tiny.model, prompt, **options, draft=draft, stats=total)) == plain
    assert 0.3 < total.acceptance_rate < 0.95, "some of the guesses should be right, some wrong"
    assert total.passes < total.tokens / 2
    assert total.tokens == 1200 == total.accepted + total.passes


def test_a_draft_changes_nothing_for_a_model_that_knows_nothing():
    """Guards against an order of random numbers that depends on what was guessed."""
    model = random_model(scale=3.0).double()  # no near-ties in double precision
    ids = torch.randint(0, 61, (400,), generator=seeded(1))
    draft, stats = NgramDraft(ids), GenerationStats()
    for seed in range(8):
        prompt = ids[seed * 7 : seed * 7 + 5].tolist()
        for chosen in ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}):
            options = {"max_new_tokens": 50, "seed": seed, **chosen}
            plain = list(generate(model, prompt, **options))
            assert list(generate(model, prompt, **options, draft=draft, stats=stats)) == plain
    assert stats.proposed > 20


def test_a_draft_that_is_always_wrong_is_asked_ever_less():
    """Guards against a model that writes something new at half its speed, for guesses never accepted."""

    class Wrong:
        def propose(self, context_ids, length):
            ids = [*prompt, *plain]
            return [(ids[len(context_ids)] + 1) % 61] * length

    model, prompt, stats = random_model(), [1, 2, 3], GenerationStats()
    options = {"max_new_tokens": 120, "temperature": 0}
    plain = list(generate(model, prompt, **options))
    assert list(generate(model, prompt, **options, draft=Wrong(), stats=stats)) == plain
    assert stats.accepted == 0
    first = DraftLength.FIRST
    assert first <= stats.proposed < first + 20  # one long guess, and a few of the shortest


class FixedDraft:
    """Proposes the same tokens whatever the context."""

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
                p = next_token_probs(model(torch.tensor([[0, a, b]]))[0], 1.5, 0, top_p)
                for c in range(V):
                    expected[a, b, c] = (p[0, a] * p[1, b] * p[2, c]).item() * runs
    counts, stats = dict.fromkeys(expected, 0), GenerationStats()
    options = {"max_new_tokens": 3, "temperature": 1.5, "top_p": top_p}
    for seed in range(runs):
        triple = generate(model, [0], **options, seed=seed, draft=draft, stats=stats)
        counts[tuple(triple)] += 1
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
    """Stands in for ``generate``: gives the tokens of a text and notes how it ended."""

    def __init__(self, ids):
        self.ids, self.given, self.closed = [int(token) for token in ids], 0, False

    def __call__(self, *args, **kwargs):
        self.tokens = self.play()  # held here, so that only ``stream_text`` can close it
        return self.tokens

    def play(self):
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
        monkeypatch.setattr(sample, "generate", made)
        return made

    return install


def test_pieces_are_whole_characters(script):
    """Guards against an emoji that arrives as two replacement characters."""
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
        text = "".join(stream_text(model, prompt, **options, stats=stats))
        assert text == "".join(stream_text(model, prompt, **options))
        assert "<|endoftext|>" not in text
    assert stats.tokens
    with pytest.raises(TypeError, match="heat"):
        stream_text(model, "ROMEO:", heat=1.0)
