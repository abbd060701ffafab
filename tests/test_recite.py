"""What is known by heart: losses, recall, and the marking of quotations."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_play import tiny_checkpoint
from torch.nn import functional as F

from shakespeare_gpt import recite
from shakespeare_gpt.checkpoint import load_model
from shakespeare_gpt.data import Text, windows
from shakespeare_gpt.export import export_safetensors
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.recite import (
    Recall,
    Source,
    exact_recall,
    first_difference,
    quoted_share,
    score,
    window_starts,
)
from shakespeare_gpt.tokenizer import decode, encode

PLAY = """MARGERY:
The lantern that you left upon the stair
Has burned all night, and no one put it out.

OLD TOBIAS:
I heard the rain come walking down the lane;
it stopped beside our gate, and then it said:
Good morrow, good my neighbour, are you in?

MARGERY:
You dreamt it, father. Drink your tea – it's cold.

SECOND SAILOR:
The wind has turned. The boats are coming home
with empty nets and mouths as full as moons.
"""


def text_of(words: str) -> Text:
    return Text("play", words, torch.tensor(encode(words)))


@pytest.fixture(scope="module")
def source():
    return Source(text_of(PLAY))


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


CONFIG = GPTConfig(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 61, (200,), generator=seeded(1))


@pytest.fixture(scope="module")
def learnt(ids):
    """Knows the first 150 tokens of ``ids`` by heart and the rest not at all."""
    model = GPT(CONFIG, seeded(2)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    order = seeded(3)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 4e-3 * min(1, 2 * (1 - step / 120))
        starts = torch.randint(0, 150 - 32, (24,), generator=order)
        rows = ids[starts[:, None] + torch.arange(33)]
        optimizer.zero_grad()
        model(rows[:, :-1], rows[:, 1:]).backward()
        optimizer.step()
    return model.eval()


# ------------------------------------------------------------------ losses


@pytest.mark.parametrize("n", [2, 20, 32, 33, 34, 64, 65, 97, 200])
def test_each_token_is_scored_once_from_its_own_window(n, ids):
    """Guards against the last, overlapping window counting twice, and an order that is not the text's."""
    model = GPT(CONFIG, seeded(0)).eval()
    part, expected, right = ids[:n], [], []
    begins = list(range(0, n - 1, 32))
    with torch.inference_mode():
        for begin in begins:
            first = min(begin, max(0, n - 33))  # the last window is moved back to be whole
            x, y = part[first : first + 32][: n - 1 - first], part[first + 1 : first + 33]
            logits = model(x[None])[0]
            losses = F.cross_entropy(logits, y, reduction="none")
            expected.append(losses[begin - first :])
            right.append((logits.argmax(1) == y)[begin - first :])
    scores = score(model, part)
    assert scores.losses.shape == (n - 1,)
    assert scores.losses.dtype == torch.float32
    assert torch.allclose(scores.losses, torch.cat(expected), atol=1e-5)
    assert torch.equal(scores.right, torch.cat(right))
    assert scores.accuracy == pytest.approx(torch.cat(right).float().mean().item())
    assert scores.loss == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)


def test_a_text_of_one_token_has_no_loss():
    """Guards against a mean of nothing, which is NaN."""
    with pytest.raises(ValueError, match="at least 2"):
        score(GPT(CONFIG), torch.tensor([3]))


# ------------------------------------------------------------------ recall


def slow_recall(model, ids, start, prompt, count):
    """The definition, one token at a time without a cache; prompts here fit into the window."""
    told = ids[start : start + prompt].tolist()
    for i in range(count):
        with torch.inference_mode():
            token = int(model(torch.tensor([told]))[0, -1].argmax())
        if token != ids[start + prompt + i]:
            return i
        told.append(token)
    return count


def test_recall_counts_up_to_the_first_difference(learnt, ids):
    """Guards against counting hits after a miss, and batches whose rows disturb each other."""
    recall = exact_recall(learnt, ids, prompt_tokens=8, continuation=20, places=60, batch_size=17)
    slow = [slow_recall(learnt, ids, start, 8, 20) for start in recall.starts]
    assert recall.matched.tolist() == slow
    assert len(set(recall.starts)) == 60
    known = [m for s, m in zip(recall.starts, slow, strict=True) if s < 120]
    unknown = [m for s, m in zip(recall.starts, slow, strict=True) if s > 145]
    assert sum(known) / len(known) > 15
    assert sum(unknown) / len(unknown) < 3
    assert recall.perfect == sum(m == 20 for m in slow) / 60
    assert f"median {recall.median:g} of 20" in str(recall)


@pytest.mark.parametrize("n", [20, 64, 65, 100, 128, 129, 150, 300])
@pytest.mark.parametrize("places", [2, 200])
def test_window_starts_are_those_of_the_training(n, places):
    """The last window is moved back to be whole: asked from where it is not, even a known text fails."""
    starts = window_starts(n, 64, 20, places).tolist()
    trained = windows(torch.arange(n), 64)[0].tolist() if n > 64 else [0]
    assert set(starts) <= set(trained) and max(starts) + 20 <= n
    assert starts == sorted(set(starts)) and starts[0] == 0
    assert len(starts) == min(places, sum(start + 20 <= n for start in trained))


def test_recall_beyond_the_context(learnt, ids):
    """Guards against a continuation that ends where the context does."""
    recall = exact_recall(learnt, ids, prompt_tokens=20, continuation=60, starts=[5, 40])
    assert recall.matched.max() > 20
    assert recall.starts == [5, 40]


def test_places_are_drawn_by_the_seed(learnt, ids):
    """Guards against recall that changes from run to run, and places beyond the text's end."""
    options = {"prompt_tokens": 8, "continuation": 20, "places": 10}
    first, again, other = (exact_recall(learnt, ids, **options, seed=s).starts for s in (1, 1, 2))
    assert first == again != other
    every = exact_recall(learnt, ids, prompt_tokens=100, continuation=98, places=200)
    assert every.starts == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_tokens": 190},
        {"starts": [119]},
        {"starts": [-1]},
        {"starts": []},
        {"places": 0},
        {"continuation": 0},
    ],
)
def test_recall_of_what_is_not_there_is_refused(options, ids):
    """Guards against an index that wraps round to the text's end."""
    with pytest.raises(ValueError):
        exact_recall(GPT(CONFIG), ids, **options)


def test_the_median_of_an_even_number_is_between():
    """Guards against torch.median, which takes the lower one."""
    assert Recall([0, 1], torch.tensor([10, 20]), 32, 50).median == 15


@given(st.text(max_size=8), st.text(max_size=8))
def test_first_difference(a, b):
    """Guards against None for a text that merely begins like the other."""
    at = first_difference(a, b)
    if at is None:
        assert a == b
    else:
        assert a[:at] == b[:at]
        assert a[at : at + 1] != b[at : at + 1]


# ------------------------------------------------------------------ quotations


def check(source, generated):
    """What must hold of every answer."""
    spans, at = source.spans(generated), 0
    for span in spans:
        assert at <= span.start < span.end <= len(generated)
        at = span.end
        assert source.text[span.offset :].startswith(generated[span.start : span.end])
        rest = source.text[span.offset :]
        first = span.offset + len(rest) - len(rest.lstrip())
        assert span.line == 1 + source.text.count("\n", 0, first)
    pieces = source.segments(generated)
    assert "".join(piece for piece, _ in pieces) == generated
    assert [span for _, span in pieces if span] == spans
    return spans


def test_a_quotation_is_found_with_speaker_and_line(source):
    """Guards against offsets of tokens given out as offsets of characters, and lines counted from 0."""
    quote = "beside our gate, and then it said:\nGood morrow, good my neighbour"
    generated = f"He sat down beneath it, {quote} who wept bitterly."
    (span,) = check(source, generated)
    assert generated[span.start : span.end].strip() == quote
    assert (span.speaker, span.line) == ("OLD TOBIAS", 7)


def test_a_line_that_ends_in_a_colon_is_no_speaker(source):
    """Guards against "it stopped beside our gate, and then it said:" as the name of a character."""
    (span,) = check(source, "Good morrow, good my neighbour, are you in?")
    assert span.speaker == "OLD TOBIAS"
    assert set(source.speakers) == {"MARGERY", "OLD TOBIAS", "SECOND SAILOR"}


def test_a_span_that_begins_with_white_space_belongs_to_what_follows(source):
    """Guards against the speech before: a model's answer begins with the blank line between speeches."""
    generated = "\n\nSECOND SAILOR:\nThe wind has turned. The boats are sinking"
    (span,) = check(source, generated)
    assert (span.start, span.speaker, span.line) == (0, "SECOND SAILOR", 13)


def test_characters_of_several_bytes_do_not_shift_the_offsets(source):
    """Guards against offsets in bytes."""
    generated = "🎭 naïve – You dreamt it, father. Drink your tea – it's cold. 東京"
    (span,) = check(source, generated)
    assert (
        generated[span.start : span.end].strip()
        == "You dreamt it, father. Drink your tea – it's cold."
    )
    assert span.speaker == "MARGERY"


def test_a_span_ends_with_whole_words(source):
    """Guards against "the" marked in "then" where the texts part in the middle of a word."""
    (span,) = check(source, "Nay, brought down the lane;\nit stopped beside our gate, and thunder")
    assert span.end == len("Nay, brought down the lane;\nit stopped beside our gate, and")
    assert span.start == len("Nay, brought")


def test_words_cut_at_both_ends_of_the_text_are_marked_too(source):
    """Guards against ragged ends: a cut word is encoded otherwise than the whole one."""
    at = PLAY.index("antern that"), PLAY.index("ut it out")
    (span,) = check(source, PLAY[at[0] : at[1]])
    assert (span.start, span.end) == (0, at[1] - at[0])
    assert span.offset == at[0]
    at = PLAY.index("Has burned"), PLAY.index("OLD TOBIAS")  # ends in a blank line
    (span,) = check(source, PLAY[at[0] : at[1]])
    assert (span.start, span.end) == (0, at[1] - at[0])


@pytest.mark.parametrize(
    "generated",
    [
        "",
        "\n\n",
        "word",
        "🎭",
        "\ud800 half a pair",
        "The lantern that you",
        "<script>",
        "<|endoftext|>",
    ],
)
def test_what_is_not_quoted_is_not_marked(generated, source):
    """Guards against an error for short and odd texts, and runs of fewer than eight tokens."""
    assert check(source, generated) == []


def test_a_text_shorter_than_a_run_quotes_nothing():
    """Guards against an index of negative size."""
    assert Source(text_of("So short.")).spans(PLAY) == []
    assert Source(text_of("x")).spans("") == []


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_exactly_the_tokens_of_long_enough_runs_are_covered(data):
    """Guards against a second quotation swallowed by the first, against the definition in plain Python."""
    words = [" a", " b", " c"]
    draw = st.lists(st.sampled_from(words), min_size=1, max_size=40)
    text, generated = "".join(data.draw(draw)), "".join(data.draw(draw))
    least = data.draw(st.integers(1, 8))
    source = Source(text_of(text), min_tokens=least)
    known, told = encode(text), encode(generated)
    runs = {tuple(known[i : i + least]) for i in range(len(known) - least + 1)}
    expected = set()
    for i in range(len(told) - least + 1):
        if tuple(told[i : i + least]) in runs:
            expected |= set(range(2 * i, 2 * (i + least)))  # each token is two characters
    covered = {i for span in source.spans(generated) for i in range(span.start, span.end)}
    # Beyond the definition only the characters at the very ends may be marked.
    assert expected <= covered
    if covered - expected:
        assert expected
        middle = set(range(min(expected), max(expected) + 1))
        assert not (covered - expected) & middle
    for span in source.spans(generated):
        assert text[span.offset :].startswith(generated[span.start : span.end])


def test_blank_lines_alone_are_no_quotation():
    """A mark of nothing on the page, and a picture that could not be drawn."""
    source = Source(
        text_of("I come." + "\n" * 40 + "HAMLET:\nWords, words, words, and more of them.\n")
    )
    assert source.spans("no" + "\n" * 30 + "no") == []
    assert quoted_share(source, "no" + "\n" * 30 + "no") == 0


def test_marking_a_growing_text_is_quick_and_consistent():
    """Guards against time that grows with the square of the text: 338,025 tokens, 2,000 of them generated."""
    numbers = torch.randint(1000, 20000, (338_000,), generator=seeded(4)).tolist()
    text = text_of(decode(numbers))
    source = Source(text)
    ids, generated = text.ids.tolist(), []
    for i, at in enumerate(torch.randint(0, len(ids) - 100, (60,), generator=seeded(5)).tolist()):
        generated += ids[at : at + 30] + encode(f" and {i} more")
    generated = decode(generated)
    source.spans(generated)
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        spans = source.spans(generated)
        seconds.append(time.perf_counter() - began)
    assert len(spans) >= 60
    assert min(seconds) < 0.25, "about 10 ms on an idle machine"
    half = source.spans(generated[: spans[30].end])
    assert half[:-1] == spans[: len(half) - 1]


# --- the command line


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(checkpoint, the file of its text, the text)"""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_command_line_measures_what_is_known(tiny, monkeypatch, capsys):
    """The numbers are those of the functions, and a status of 0 means: under the target."""
    checkpoint, source, text = tiny
    monkeypatch.setattr("shakespeare_gpt.train.TARGET", 2.0)  # from window starts it knows little
    options = ["--weights", str(checkpoint), "--text", str(source), "--device", "cpu"]
    assert recite.main(options) == 0
    said = capsys.readouterr().out
    model, _ = load_model(checkpoint)
    scores = score(model, text.ids)
    assert f"whole text: {scores.loss:.4f} nats per token, under 2.0;" in said
    assert f"{scores.accuracy:.2%} are the first guess" in said
    anywhere = exact_recall(model, text.ids, prompt_tokens=8, continuation=16)
    assert f"from anywhere: {anywhere}" in said
    places = len(window_starts(len(text.ids), 64, 8 + 16))
    assert f"from window starts: Exact recall at {places} places after 8 tokens" in said


def test_command_line_believes_the_weights_not_their_metadata(tiny, tmp_path, capsys):
    """A file that calls itself learnt by heart and is not must be found out, by the status too."""
    checkpoint, source, _ = tiny
    model, meta = load_model(checkpoint)
    path = export_safetensors(model, tmp_path / "boasting.safetensors", {**meta, "loss": 0.01})
    assert recite.main(["--weights", str(path), "--text", str(source)]) == 1
    assert "not under 0.099999" in capsys.readouterr().out


def test_command_line_says_what_is_wrong(tiny, tmp_path, monkeypatch, capsys):
    """One line, for no weights, broken ones, another text and a device that is not there."""
    checkpoint, source, _ = tiny
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"no checkpoint")
    model, meta = load_model(checkpoint)
    nonsense = export_safetensors(model, tmp_path / "nonsense.safetensors", ["no", "table"])
    small = GPT(GPTConfig(vocab_size=101, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    foreign = export_safetensors(small, tmp_path / "foreign.safetensors", meta)
    odd = {**meta, "preset": ["a"], "text_name": ["b"]}
    odd = export_safetensors(model, tmp_path / "odd.safetensors", odd)
    other = tmp_path / "other.txt"
    other.write_text(PLAY * 3, encoding="utf-8")
    known = ["--weights", str(checkpoint)]
    for options, expected in (
        ([], "train first"),
        (["--weights", str(broken)], "not a readable checkpoint"),
        (["--weights", str(nonsense)], "metadata is no table"),
        (["--weights", str(foreign)], "vocabulary has 101 tokens"),
        (["--weights", str(odd)], "name its file with --text"),
        ([*known, "--text", str(other)], "learnt another text"),
        ([*known], "name its file with --text"),
        ([*known, "--text", str(source), "--device", "nowhere"], "nowhere"),
    ):
        assert recite.main(options) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith("error: ")
        assert expected in said.err and len(said.err.splitlines()) == 1
