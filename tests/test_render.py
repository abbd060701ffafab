"""A generated text as HTML: what is marked, what stands below, and that nothing escapes the escaping."""

import re
from html.parser import HTMLParser

import pytest
import torch

from shakespeare_gpt.data import Text
from shakespeare_gpt.publish.quotations import STYLE, QuotationIndex, quoted_html, quoted_share, speech_html

PLAY = (
    "Ennor:\nWho keeps that lamp tonight above our grey cold bay,\nand why does nobody answer?\n\n"
    "Rowse <i class=\"x\">:\nAsk <i>Maddern & 'his' clever daughter instead; my pilot boat wants tar."
)


@pytest.fixture(scope="module")
def index():
    return QuotationIndex(Text("play", PLAY, torch.empty(0, dtype=torch.int64)))


class Page(HTMLParser):
    """The tags and attributes of a page, and its text; every tag that is opened must be closed."""

    def __init__(self, markup: str):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], "", []
        self.feed(markup)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


NASTY = [
    "<script>alert(1)</script>",
    "</div><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "${alert(1)} {{7*7}} {% raw %}",
    "\0\t",
    "Ennor:\n\n" * 200,
    PLAY,
    "🐚\n\n<b>:\n",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_everything_is_shown_and_nothing_becomes_markup(text, index):
    """As a prompt, as a continuation, as a title and as a speaker's name."""
    quotation = "that lamp tonight above our grey cold bay"
    for prompt, generated in ((text, "I come."), (quotation, text), (text, text + quotation)):
        for done in (True, False):
            page = Page(quoted_html(index, generated, prompt, title=text, done=done))
            assert set(page.tags) <= {"div", "span", "b", "mark", "sup", "p", "ol", "li"}
            assert {name for name, _ in page.attributes} <= {"class", "title"}
            assert page.text.startswith(prompt + generated[:3])
            assert "mark" in page.tags or page.text.startswith(prompt + generated)


def test_quotations_are_marked_numbered_and_placed(index):
    generated = "No: that lamp tonight above our grey cold bay, nor my pilot boat wants tar. Then she left."
    markup = quoted_html(index, generated, "Lisk:\n", title="<W>")
    assert (
        '<mark title="Ennor, line 2">that lamp tonight above our grey cold bay</mark><sup>1</sup>' in markup
    )
    assert "my pilot boat wants tar</mark><sup>2</sup>. Then" in markup
    assert "Word for word in &lt;W&gt;" in markup
    place = "Rowse &lt;i class=&quot;x&quot;&gt;, line 6"
    assert re.findall("<li>(.*?)</li>", markup) == [
        "<b>Ennor, line 2</b> <span>· 8 words</span>",
        f"<b>{place}</b> <span>· 5 words</span>",
    ]
    assert f'<mark title="{place}">' in markup


def test_a_lack_of_quotations_is_said_once_the_text_is_complete(index):
    growing = quoted_html(index, "the moon is a wheel of cheese", title="The Warden", done=False)
    assert "caret" in growing and "quoted" not in growing
    complete = quoted_html(index, "the moon is a wheel of cheese", title="The Warden")
    assert "caret" not in complete
    assert "Nothing here is quoted: no run of 5 words stands in The Warden." in complete


def names(text: str, start: int = 0, end: int | None = None) -> list[str]:
    return re.findall('<b class="who">(.*?)</b>', speech_html(text, start, end))


def test_names_of_speakers_are_set_apart():
    """Twenty-six lines of a play that end in a colon were once shown as names."""
    text = "Nobody:\nI come\nwith three:\nOne.\n\nA stranger:\nFirst Fisher:\nNo.\n\nEnnor:"
    assert names(text) == ["Nobody:", "A stranger:", "Ennor:"]
    assert names(text, text.index("with three")) == ["A stranger:", "Ennor:"]
    assert names(text, 4, 12) == ["dy:"]
    assert names(text, 4, 6) == ["dy"]
    assert names("") == []
    parts = (speech_html(text, 0, 30), speech_html(text, 30))
    assert re.sub("<.*?>", "", "".join(parts)) == text


def test_a_name_that_begins_in_the_prompt_is_one_name(index):
    markup = quoted_html(index, "nor:\nCome.\n\nLisk:\nNo.", "En")
    assert re.findall('<b class="who">(.*?)</b>', markup) == ["En", "nor:", "Lisk:"]
    assert "who" not in quoted_html(index, "three:\nCome.", "Well,\nI come with ")


def test_a_page_searches_for_quotations_once():
    """It once searched twice at each update: for the marks and for their share."""
    searched = []

    class Counting(QuotationIndex):
        def find(self, generated):
            searched.append(generated)
            return super().find(generated)

    index = Counting(Text("play", PLAY, torch.empty(0, dtype=torch.int64)))
    for generated in (PLAY[:60], PLAY[:90]):
        quoted_html(index, generated, done=False), quoted_share(index, generated)
    assert searched == [PLAY[:60], PLAY[:90]]


def test_the_style_of_a_notebook_covers_what_is_rendered(index):
    """A class that was renamed on one side only would lose its look without a word."""
    markup = quoted_html(index, PLAY, "Lisk:\n\nEnnor:\n")
    for selector in (".leaf", ".given", ".who", ".places", ".places-head"):
        assert selector in STYLE and f'class="{selector[1:]}"' in markup
