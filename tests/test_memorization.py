"""What is known by heart: the loss of every token, and exact recall."""

import pytest
import torch
from torch.nn import functional as F

from shakespeare_gpt.memorization import Recall, exact_recall, line_starts, report, score
from shakespeare_gpt.model import GPT, GPTConfig, KVCache
from shakespeare_gpt.tokenizer import decode


def seeded(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


CONFIG = GPTConfig(vocab_size=61, n_positions=32, n_embd=48, n_layer=2, n_head=3)
IDS = torch.randint(0, 61, (200,), generator=seeded(1))

# --- losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 20, 32, 33, 34, 64, 65, 97, 200])
def test_each_token_is_scored_once_from_its_own_window(n):
    """The last, overlapping window counted twice, and an order that is not the text's."""
    model = GPT(CONFIG, seeded(0)).eval()
    part, expected, right = IDS[:n], [], []
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
    assert scores.right.float().mean().item() == pytest.approx(torch.cat(right).float().mean().item())
    assert scores.loss == pytest.approx(torch.cat(expected).mean().item(), abs=1e-5)


def test_blocks_of_rows_do_not_show(monkeypatch):
    """A long text is scored in batches, and those in blocks: a row lost at an edge shifts all after it."""
    model = GPT(CONFIG, seeded(0)).eval()
    expected = score(model, IDS)
    monkeypatch.setattr("shakespeare_gpt.memorization.BATCH_TOKENS", 64)
    monkeypatch.setattr("shakespeare_gpt.memorization.CHUNK_ROWS", 7)
    blocks = score(model, IDS)
    torch.testing.assert_close(blocks.losses, expected.losses, atol=1e-5, rtol=1e-5)
    assert torch.equal(blocks.right, expected.right)


def test_a_sure_and_wrong_model_has_a_large_loss_and_no_infinite_one():
    """A mean with one infinite loss in it says nothing about the rest of the text."""
    model = GPT(CONFIG, seeded(0)).eval()
    with torch.no_grad():
        model.wte.weight.mul_(2000.0)
    losses = score(model, IDS).losses
    assert losses.isfinite().all() and losses.max() > 100


def test_scoring_leaves_the_model_as_it_was():
    """Measured in the middle of a run: a mode or a gradient that stays changes the training."""
    model = GPT(CONFIG, seeded(0)).train()
    loss = score(model, IDS).loss
    assert model.training and all(p.grad is None and p.requires_grad for p in model.parameters())
    assert score(model, IDS.tolist()).loss == loss


def test_a_text_of_one_token_has_no_loss():
    """A mean of nothing is NaN."""
    with pytest.raises(ValueError, match="at least 2"):
        score(GPT(CONFIG), torch.tensor([3]))


# --- recall -----------------------------------------------------------------------------------------


@torch.inference_mode()
def slow_recall(model, ids, start, prompt, count) -> int:
    """The definition, one token at a time without a cache; prompts here fit into the window."""
    said = ids[start : start + prompt].tolist()
    for i in range(count):
        token = int(model.head(model.hidden(torch.tensor([said]))[:, -1]).argmax())
        if token != ids[start + prompt + i]:
            return i
        said.append(token)
    return count


def test_recall_counts_up_to_the_first_difference(tiny):
    """Hits counted after a miss, and batches whose rows disturb each other."""
    known = tiny.text.ids
    unknown = known[torch.randperm(len(known), generator=seeded(3))]
    ids = torch.cat((known, unknown))
    recall = exact_recall(tiny.model, ids, prompt_tokens=8, continuation=20, places=40)
    slow = [slow_recall(tiny.model, ids, start, 8, 20) for start in recall.starts]
    assert recall.matched.tolist() == slow
    assert len(set(recall.starts)) == 40
    before = [m for s, m in zip(recall.starts, slow, strict=True) if s + 28 <= len(known)]
    after = [m for s, m in zip(recall.starts, slow, strict=True) if s >= len(known)]
    assert sum(before) / len(before) > 15
    assert sum(after) / len(after) < 3
    assert recall.perfect == sum(m == 20 for m in slow) / 40
    assert recall.mean == sum(slow) / 40
    assert f"median {recall.median:g} of 20" in str(recall)


def test_recall_beyond_the_context(tiny):
    """A continuation that stops where the context of 64 tokens ends."""
    recall = exact_recall(tiny.model, tiny.text.ids, prompt_tokens=20, continuation=120, starts=[5, 40])
    assert recall.matched.max() > 64
    assert recall.starts == [5, 40]


def test_recall_takes_little_memory(monkeypatch):
    """200 places at a time took a cache of 3.8 GB for a 124M model that looks back 256 tokens."""
    made, original = [], KVCache.__init__

    def record(cache, *arguments, **options):
        original(cache, *arguments, **options)
        made.append(tuple(cache.keys.shape))

    monkeypatch.setattr(KVCache, "__init__", record)
    recall = exact_recall(GPT(CONFIG), IDS, prompt_tokens=8, continuation=16, places=150)
    assert len(recall.matched) == sum(shape[1] for shape in made) == 150
    assert max(shape[1] for shape in made) <= 64


def test_places_are_drawn_by_the_seed():
    """Recall that changes from run to run, and places beyond the text's end."""
    model, options = GPT(CONFIG), {"prompt_tokens": 8, "continuation": 20, "places": 10}
    first, again, other = (exact_recall(model, IDS, **options, seed=s).starts for s in (1, 1, 2))
    assert first == again != other
    every = exact_recall(model, IDS, prompt_tokens=100, continuation=98, places=200)
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
    ids=str,
)
def test_recall_of_what_is_not_there_is_refused(options):
    """An index that wraps round to the text's end."""
    with pytest.raises(ValueError):
        exact_recall(GPT(CONFIG), IDS, **options)


def test_the_median_of_an_even_number_is_between():
    """torch.median takes the lower one."""
    assert Recall([0, 1], torch.tensor([10, 20]), 32, 50).median == 15


# --- the report -------------------------------------------------------------------------------------


def test_lines_start_after_a_line_end(tiny):
    """Blank lines are no lines that anybody types; the first line of a text has nothing before it."""
    ids = tiny.text.ids
    starts = line_starts(ids).tolist()
    for at in starts:
        assert decode(ids[:at]).endswith("\n") and not decode(ids[at : at + 1]).startswith("\n")
    assert len(starts) == len([line for line in tiny.text.text.split("\n")[1:] if line])


def test_the_report_measures_what_people_ask(tiny):
    """What stands in every log: the whole text, anywhere, lines as they are typed."""
    found = list(report(tiny.model, tiny.text.ids, places=20))
    assert [what.partition(" (")[0] for what, _ in found] == [
        "whole text",
        "from anywhere",
        *["from lines' starts"] * 3,
    ]
    assert found[0][1].loss == pytest.approx(score(tiny.model, tiny.text.ids).loss)
    assert [result.prompt_tokens for _, result in found[1:]] == [32, 8, 16, 32]
    assert found[1][1].mean > 40
    assert f"median {found[1][1].median:g} of 50" in str(found[1][1])


def test_the_report_says_which_prompts_are_not_unique():
    """A line that stands twice in the text cannot be continued for certain; a long text is asked for more."""
    line = torch.tensor([198, *range(300, 312)])
    ids = torch.cat([*[line] * 4, torch.arange(1000, 2200)])
    found = dict(report(GPT(GPTConfig(n_positions=16, n_embd=8, n_layer=1, n_head=1)), ids, places=4))
    assert "from lines' starts (4 of these prompts stand in the text several times)" in found
    assert found["a long passage"].continuation == 200


@pytest.mark.parametrize("n", [2, 3, 17, 120])
def test_the_report_of_a_short_text_without_lines(n):
    """The end of a run is no place for an error: what cannot be asked is left out."""
    model = GPT(GPTConfig(n_positions=16, window=6, n_embd=8, n_layer=1, n_head=1))
    found = list(report(model, torch.arange(300, 300 + n)))
    assert [what for what, _ in found] == ["whole text", "from anywhere"]
    assert len(found[0][1].losses) == n - 1
    assert len(found[1][1].starts) == n - found[1][1].prompt_tokens - found[1][1].continuation + 1
