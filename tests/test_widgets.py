"""The sampler of notebook 04, without a browser: its buttons are pressed, its text and status are read."""

import re
import time
from html import unescape

import pytest
import torch

from shakespeare_gpt import plots
from shakespeare_gpt.data import Text
from shakespeare_gpt.model import GPT, GPTConfig
from shakespeare_gpt.recite import Source
from shakespeare_gpt.tokenizer import encode
from shakespeare_gpt.widgets import quoted_figure, quoted_html, quoted_share, sampler

PLAY = (
    "Ennor:\nWho keeps that lamp tonight above our grey cold bay,\nand why does nobody answer?\n\n"
    "Rowse:\nAsk <i>Maddern & 'his' clever daughter instead; my pilot boat wants tar."
)
CONFIG = GPTConfig(n_positions=32, n_embd=16, n_layer=1, n_head=2)


def text_of(string: str) -> Text:
    return Text("play", string, torch.tensor(encode(string)))


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


def box_of(model, string=PLAY, prompt="Ennor:\n", length=20):
    box = sampler(model, text_of(string))
    box.prompt.value, box.length.value = prompt, length
    return box


def run(box, seconds=30) -> str:
    """Press Generate, wait; the text of the page, without prompt and notes."""
    box.generate.click()
    assert box.wait(seconds), "still writing"
    return said(box)


def said(box) -> str:
    inside = re.search(r"opacity:.6\">.*?</span>(.*?)</div>", box.page.value, re.DOTALL)
    return unescape(re.sub(r"<sup[^>]*>\d+</sup>|<[^>]*>", "", inside[1])) if inside else ""


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def random_model():
    return GPT(CONFIG, torch.Generator().manual_seed(0)).eval()


def test_recites_and_says_where_it_stands():
    box = box_of(Parrot(PLAY), prompt="Who keeps", length=10)
    box.temperature.value = 0
    assert run(box) == " that lamp tonight above our grey cold bay,\n"
    assert "Ennor, line 2" in box.page.value and "<mark" in box.page.value
    assert re.match(
        r"Done: 10 tokens .* tokens/s .* 100% quoted .* of guesses accepted", box.status.value
    )


@pytest.mark.parametrize("guess", [True, False])
def test_guessing_does_not_change_the_text(guess):
    box = box_of(Parrot(PLAY), prompt="Who keeps", length=10)
    box.guess.value = guess
    assert run(box) == " that lamp tonight above our grey cold bay,\n"
    assert ("accepted" in box.status.value) == guess


def test_what_it_writes_and_what_one_types_is_escaped():
    """Neither a prompt nor a text that was learnt may become part of the page's markup."""
    box = box_of(Parrot(PLAY), prompt="<script>alert(1)</script>Ask", length=20)
    assert run(box).startswith(" <i>Maddern & 'his' clever daughter")
    assert "<script" not in box.page.value and "<i>Maddern" not in box.page.value
    named = text_of('Ann <i onclick="x">:\nWho keeps that lamp tonight above our grey cold bay?')
    page = quoted_html(Source(named), "Who keeps that lamp tonight above our grey cold bay?")
    assert "<i " not in page and "Ann &lt;i onclick=&quot;x&quot;&gt;, line 2" in page


def test_a_seed_gives_the_same_text_twice(random_model):
    box = box_of(random_model)
    box.fresh.value, box.seed.value = False, 5
    first, again = run(box), run(box)
    box.seed.value = 6
    assert first and first == again != run(box)


def test_a_new_seed_each_time_is_shown_so_that_its_text_can_be_had_again(random_model):
    box = box_of(random_model)
    first = run(box)
    seed = box.seed.value
    assert run(box) != first and box.seed.value != seed
    box.fresh.value, box.seed.value = False, seed
    assert run(box) == first


def test_the_settings_reach_the_model(random_model):
    box = box_of(random_model, length=30)
    box.top_k.value = 1
    only_the_best = run(box)
    box.top_k.value, box.temperature.value = 0, 0
    assert run(box) == only_the_best
    box.temperature.value, box.top_p.value = 1, 0.05
    box.length.value = 10
    run(box)
    assert "Done: 10 tokens" in box.status.value


def test_text_arrives_as_it_is_made_and_stop_stops():
    box = box_of(Parrot(PLAY, pause=0.02), length=400)
    box.guess.value = False
    assert box.stop.disabled
    box.generate.click()
    until(lambda: "Writing" in box.status.value)
    assert said(box) and not box.stop.disabled
    box.stop.click()
    assert box.wait(2), "Stop did not stop"
    assert box.status.value.startswith("Stopped") and box.stop.disabled
    tokens = int(re.search(r"(\d+) tokens", box.status.value)[1])
    assert 0 < tokens < 100
    box.length.value = 10
    assert run(box) and box.status.value.startswith("Done: 10 tokens")


def test_three_generates_in_a_row_never_mix():
    """Each click begins a page of its own: only the last one's text is on it, whole."""
    box = box_of(Parrot(PLAY, pause=0.02), length=300)
    box.guess.value = False
    box.generate.click()
    until(lambda: said(box))
    box.prompt.value = "Rowse"
    box.generate.click()
    box.prompt.value, box.length.value = "Ask", 10
    pages = []
    box.page.observe(lambda change: pages.append(change["new"]), "value")
    expected = " <i>Maddern & 'his'"
    assert run(box).startswith(expected)
    begun = next(i for i, page in enumerate(pages) if ">Ask</span>" in page)
    assert all(">Ask</span>" in page for page in pages[begun:])
    assert not any(">Rowse</span>" in page for page in pages), "a run that was cancelled has spoken"
    assert box.status.value.startswith("Done: 10 tokens")


def test_never_half_a_character():
    """An emoji takes several tokens; none of the pages on the way may show a broken one."""
    string = "sea 🐚🦑 and"
    box = box_of(Parrot(string, pause=0.12), string, prompt="sea", length=14)
    box.guess.value = False
    pages = []
    box.page.observe(lambda change: pages.append(change["new"]), "value")
    assert "🐚🦑" in run(box)
    assert len(pages) > 4 and not any("\ufffd" in page for page in pages)


def test_trouble_is_one_line_in_the_widget_and_the_next_text_comes(random_model, monkeypatch):
    box = box_of(random_model)

    def broken(*_):
        raise RuntimeError("no <memory> left\nTraceback of many lines")

    monkeypatch.setattr(random_model, "head", broken)
    run(box)
    assert box.status.value == "Error: no &lt;memory&gt; left" and box.stop.disabled
    monkeypatch.setattr(
        random_model, "head", lambda h: torch.full((*h.shape[:-1], 50257), torch.nan)
    )
    run(box)
    assert box.status.value.startswith("Error: the model&#x27;s logits are not finite")
    monkeypatch.undo()
    assert run(box) and box.status.value.startswith("Done")


@pytest.mark.parametrize("prompt", ["", "\ud83d half", "🐚", "<|endoftext|>", "word " * 5000])
def test_any_prompt_gets_an_answer(random_model, prompt):
    box = box_of(random_model, prompt=prompt)
    assert run(box)
    box.page.value.encode("utf-8")  # what cannot be encoded cannot be sent


def test_the_browser_gets_what_it_missed(random_model, monkeypatch):
    """Colab shows only what is sent while it is answered: each tick sends all again, then they end."""
    box = box_of(random_model)
    run(box)
    sent = []
    monkeypatch.setattr(type(box.page), "send_state", lambda self, *_: sent.append(self.value))
    assert box._pulse.playing
    box._pulse.value += 1
    assert box.page.value in sent and not box._pulse.playing


def test_the_picture_has_every_line_and_every_place():
    source = Source(text_of(PLAY))
    generated = "No. " + PLAY.replace("Rowse", "Lisk") + "\n" + "x$y " * 40
    figure = quoted_figure(source, generated)
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert {"Ennor, line 1", "Rowse, line 5"} <= set(shown)
    assert "".join(shown).count("x$y") == 40
    figure.canvas.draw()  # dollar signs are no formulas


def test_the_share_that_is_quoted():
    source = Source(text_of(PLAY))
    assert quoted_share(source, "") == quoted_share(source, "nothing of it") == 0
    assert quoted_share(source, PLAY) == 1
    half = "Who keeps that lamp tonight above our grey cold bay,"
    other = "q" * len(half.replace(" ", ""))
    assert quoted_share(source, f"{half}\n{other}") == pytest.approx(0.5)


def test_the_animation_shows_where_it_goes_wrong(tmp_path, monkeypatch):
    """Lines left out at the end once hid the only mistake: the picture was all green."""
    monkeypatch.setenv("SHAKESPEARE_GPT_FIGURES", str(tmp_path))
    truth = "".join(f"line {i}\n" for i in range(14))
    stills = []
    for slip in ("x", "y"):  # as many characters right, so only the slip itself differs
        plots.learning_gif([(2, f"{truth[:-3]}{slip}\n")], "So it began:\n", truth, slip)
        stills.append((tmp_path / f"{slip}.png").read_bytes())
    assert stills[0] != stills[1]
