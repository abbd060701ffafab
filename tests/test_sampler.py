"""The sampler without a browser: its buttons are pressed, its text and its status are read."""

import re
import threading
import time
from html import unescape

import pytest
import torch

from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.notebook.sampler import Sampler
from shakespeare_gpt.tokenizer import encode

PLAY = (
    "Ennor:\nWho keeps that lamp tonight above our grey cold bay,\nand why does nobody answer?\n\n"
    "Rowse:\nAsk <i>Maddern & 'his' clever daughter instead; my pilot boat wants tar."
)
CONFIG = GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)


class Parrot(GPT):
    """Knows of each token of a text what follows its last occurrence there; after the end it begins again."""

    def __init__(self, string: str, pause: float = 0.0):
        super().__init__(CONFIG, torch.Generator().manual_seed(0))
        ids = encode(string)
        self.follows, self.pause = dict(zip(ids, ids[1:] + ids[:1], strict=True)), pause

    def hidden(self, ids, cache=None):
        time.sleep(self.pause)
        if cache is not None:
            cache.length += ids.shape[1]
        return ids[..., None].float()

    def head(self, hidden):
        ids = hidden[..., 0].long()
        logits = torch.zeros(*ids.shape, CONFIG.vocab_size)
        following = ids.clone().apply_(lambda i: self.follows.get(i, 198))
        return logits.scatter_(-1, following[..., None], 30.0)


def sampler_of(model, string=PLAY, prompt="Ennor:\n", tokens=20):
    box = Sampler(model, Text("play", string, torch.tensor(encode(string))))
    box.prompt.value, box.settings["max_new_tokens"].value = prompt, tokens
    return box


def run(box) -> str:
    """Press Generate and wait; the text on the page, without the prompt and the notes."""
    box.generate.click()
    finish(box)
    return generated(box)


def tick(box) -> None:
    """What the hidden Play does in a browser, ten times a second."""
    if box.pulse.playing:
        box.pulse.value += 1


def finish(box) -> None:
    until(box, lambda: not box.pulse.playing, 60)


def generated(box) -> str:
    inside = re.search(r'class="given">.*?</span>(.*?)</div>', box.page.value, re.DOTALL)
    return unescape(re.sub(r"<sup>\d+</sup>|<[^>]*>", "", inside[1])) if inside else ""


def until(box, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)
        tick(box)


@pytest.fixture(scope="module")
def random_model():
    return GPT(CONFIG, torch.Generator().manual_seed(0)).eval()


def test_it_recites_and_says_where_it_stands():
    box = sampler_of(Parrot(PLAY), prompt="Who keeps", tokens=10)
    box.settings["temperature"].value = 0
    assert run(box) == " that lamp tonight above our grey cold bay,\n"
    assert "Ennor, line 2" in box.page.value and "<mark" in box.page.value
    expected = r"Done: 10 tokens, [1-9]\d* of them drafted .* tokens/s .* 100% quoted"
    assert re.match(expected, box.status.value)
    assert box.stop.disabled


@pytest.mark.parametrize("use_draft", [True, False])
def test_a_draft_does_not_change_the_text(use_draft):
    box = sampler_of(Parrot(PLAY), prompt="Who keeps", tokens=10)
    box.use_draft.value = use_draft
    assert run(box) == " that lamp tonight above our grey cold bay,\n"
    assert (" 0 of them drafted" in box.status.value) != use_draft


def test_what_it_writes_and_what_one_types_is_escaped():
    box = sampler_of(Parrot(PLAY), prompt="<script>alert(1)</script>Ask", tokens=20)
    assert run(box).startswith(" <i>Maddern & 'his' clever daughter")
    assert "<script" not in box.page.value and "<i>Maddern" not in box.page.value


def test_a_seed_gives_the_same_text_twice(random_model):
    box = sampler_of(random_model)
    box.settings["seed"].value = 5
    first, again = run(box), run(box)
    box.settings["seed"].value = 6
    assert first and first == again != run(box)


def test_a_new_seed_is_shown_so_that_its_text_can_be_had_again(random_model):
    box = sampler_of(random_model)
    first = run(box)
    seed = int(re.search(r"seed (\d+)", box.status.value)[1])
    assert run(box) != first and f"seed {seed} " not in box.status.value
    box.settings["seed"].value = seed
    assert run(box) == first


def test_the_settings_reach_the_model(random_model):
    box = sampler_of(random_model, tokens=30)
    box.settings["top_k"].value = 1
    only_the_best = run(box)
    box.settings["top_k"].value, box.settings["temperature"].value = 0, 0
    assert run(box) == only_the_best
    box.settings["temperature"].value, box.settings["seed"].value = 1, 7
    everything = run(box)
    box.settings["top_p"].value, box.settings["max_new_tokens"].value = 0.05, 10
    assert not everything.startswith(run(box))
    assert "Done: 10 tokens" in box.status.value


def test_text_arrives_as_it_is_made_and_stop_stops():
    box = sampler_of(Parrot(PLAY, pause=0.02), tokens=400)
    box.use_draft.value = False
    assert box.stop.disabled
    box.generate.click()
    assert not box.stop.disabled
    until(box, lambda: generated(box))
    assert "Writing" in box.status.value and not box.stop.disabled and "caret" in box.page.value
    box.stop.click()
    finish(box)
    assert box.status.value.startswith("Stopped") and box.stop.disabled
    assert "caret" not in box.page.value
    assert 0 < int(re.search(r"(\d+) tokens", box.status.value)[1]) < 400
    box.settings["max_new_tokens"].value = 10
    assert run(box) and box.status.value.startswith("Done: 10 tokens")


def test_three_generates_in_a_row_never_mix():
    """Each click begins a page of its own: only the last one's text is on it, whole."""
    box = sampler_of(Parrot(PLAY, pause=0.02), tokens=300)
    box.use_draft.value = False
    box.generate.click()
    until(box, lambda: generated(box))
    box.prompt.value = "Rowse"
    box.generate.click()
    box.prompt.value, box.settings["max_new_tokens"].value = "Ask", 10
    pages = []
    box.page.observe(lambda change: pages.append(change["new"]), "value")
    assert run(box).startswith(" <i>Maddern & 'his'")
    assert pages and all(">Ask</span>" in page for page in pages), "a run that was cancelled has spoken"
    assert box.status.value.startswith("Done: 10 tokens")


def test_never_half_a_character():
    """An emoji takes several tokens; none of the pages on the way may show a broken one."""
    string = "sea 🐚🦑 and"
    box = sampler_of(Parrot(string, pause=0.12), string, prompt="sea", tokens=14)
    box.use_draft.value = False
    pages = []
    box.page.observe(lambda change: pages.append(change["new"]), "value")
    assert "🐚🦑" in run(box)
    assert len(pages) > 4 and not any("\ufffd" in page for page in pages)


def test_an_error_is_one_line_and_the_next_text_comes(random_model, monkeypatch):
    box = sampler_of(random_model)

    def broken(*_):
        raise RuntimeError("no <memory> left\nTraceback of many lines")

    monkeypatch.setattr(random_model, "head", broken)
    run(box)
    assert box.status.value.startswith("RuntimeError: no &lt;memory&gt; left") and box.stop.disabled
    nan = lambda hidden: torch.full((*hidden.shape[:-1], CONFIG.vocab_size), torch.nan)  # noqa: E731
    monkeypatch.setattr(random_model, "head", nan)
    run(box)
    assert "Error: the model&#x27;s logits are not finite" in box.status.value
    monkeypatch.undo()
    assert run(box) and box.status.value.startswith("Done")


@pytest.mark.parametrize("prompt", ["", "\ud83d half", "🐚", "<|endoftext|>", "word " * 5000])
def test_any_prompt_gets_an_answer(random_model, prompt):
    box = sampler_of(random_model, prompt=prompt)
    assert run(box)
    box.page.value.encode("utf-8")  # what cannot be encoded cannot be sent


def test_nothing_is_shown_but_in_answer_to_the_browser():
    """Colab shows only what is sent while it is answered: a page that a thread had drawn stayed empty."""
    box = sampler_of(Parrot(PLAY, pause=0.01), tokens=10)
    box.generate.click()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.daemon and hasattr(thread, "stats"):
            thread.join(30)
    assert box.page.value == "" and box.pulse.playing
    tick(box)
    assert generated(box) and box.status.value.startswith("Done") and not box.pulse.playing


def test_where_no_widget_is_shown_a_line_says_what_it_is(random_model):
    assert "open this notebook in Jupyter or Colab" in repr(sampler_of(random_model))
