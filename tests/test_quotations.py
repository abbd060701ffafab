"""What a generated text quotes: found by words, with speaker and line, and counted."""

import unicodedata

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shakespeare_gpt.data import SHIPPED, Text
from shakespeare_gpt.publish.quotations import Quotation, QuotationIndex, quoted_share, speaker_names

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


def index_of(text: str, min_words: int = 5) -> QuotationIndex:
    return QuotationIndex(Text("play", text, torch.empty(0, dtype=torch.int64)), min_words)


@pytest.fixture(scope="module")
def index():
    return index_of(PLAY)


def check(index: QuotationIndex, generated: str) -> list[Quotation]:
    """The quotations, after a look at what must hold of any."""
    quotations, at = index.find(generated), 0
    for quotation in quotations:
        quoted = generated[quotation.start : quotation.end]
        assert at <= quotation.start and quoted == quoted.strip() != ""
        assert index.text[quotation.offset :].startswith(quoted)
        assert quotation.words >= index.min_words
        at = quotation.end
    pieces = index.segments(generated)
    assert "".join(piece for piece, _ in pieces) == generated
    assert [quotation for _, quotation in pieces if quotation] == quotations
    assert all(piece for piece, _ in pieces)
    return quotations


def quoted(index: QuotationIndex, generated: str) -> list[str]:
    return [generated[quotation.start : quotation.end] for quotation in check(index, generated)]


def test_a_quotation_has_its_speaker_line_and_words(index):
    generated = (
        "He sat beneath it, beside our gate, and then it said:\nGood morrow, good my neighbour who wept."
    )
    (quotation,) = check(index, generated)
    assert quotation.offset == PLAY.index("beside our gate")
    assert (quotation.speaker, quotation.line, quotation.words) == ("OLD TOBIAS", 7, 12)
    assert quotation.place == "OLD TOBIAS, line 7"
    assert quoted(index, generated) == ["beside our gate, and then it said:\nGood morrow, good my neighbour"]


def test_a_place_is_written_for_a_reader():
    assert Quotation(0, 9, 0, "HAMLET", 1234, 5).place == "HAMLET, line 1,234"
    assert Quotation(0, 9, 0, "", 12, 5).place == "line 12"


def test_names_and_punctuation_do_not_count(index):
    """A full stop, a blank line, a name and a word were once a quotation of eight tokens."""
    assert quoted(index, "So put it out.\n\nOLD TOBIAS:\nI came.") == []
    assert quoted(index, "and no one put it out.\n\nOLD TOBIAS:\nWe came.") == ["and no one put it out"]
    assert quoted(index, "put it out.\n\nOLD TOBIAS:\nI heard it") == ["put it out.\n\nOLD TOBIAS:\nI heard"]


def test_what_stands_between_the_words_must_agree(index):
    assert quoted(index, "So put it out.\n\nMARGERY:\nI heard it") == []  # another name
    assert quoted(index, "So put it out.\nI heard it") == []  # no name
    assert quoted(index, "You dreamt it, father; drink your tea") == []  # punctuation and case
    assert quoted(index, "The wind has turned.\nThe boats were gone") == []  # a line end
    assert quoted(index, "The wind has turned. The boats were gone") == ["The wind has turned. The boats"]
    assert quoted(index, "the lantern that you left it") == []  # case
    assert quoted(index, "the lantern that you left upon it") == ["lantern that you left upon"]


def test_a_name_belongs_to_a_quotation_only_from_the_start_of_the_text_on(index):
    generated = "\n\nSECOND SAILOR:\nThe wind has turned. The boats are sinking"
    (quotation,) = check(index, generated)
    assert (quotation.start, quotation.speaker, quotation.line) == (2, "SECOND SAILOR", 14)
    assert generated[: quotation.end].endswith("The boats are")
    assert quoted(index, generated[6:])[0].startswith("ND SAILOR:\nThe wind")
    (quotation,) = check(index, f"He left.{generated}")
    assert quotation.start == len("He left.\n\nSECOND SAILOR:\n")


def test_quotations_of_whole_words(index):
    """Guards against "the" marked in "thunder", and against half a word with an apostrophe."""
    generated = "Nay, brought down the lane;\nit stopped beside our gate, and thunder"
    assert quoted(index, generated) == ["down the lane;\nit stopped beside our gate, and"]
    assert quoted(index_of("We know't, we know't, say all of us."), "we know, say all of us") == []


def test_words_cut_at_the_ends_of_the_generated_text_are_marked_but_not_counted(index):
    cut = PLAY[PLAY.index("antern that") : PLAY.index("ut it out")]
    (quotation,) = check(index, cut)
    assert (quotation.start, quotation.end, quotation.words) == (0, len(cut), 13)
    assert quoted(index, "antern that you left upon th") == []  # four whole words
    assert quoted(index, "ERY:\nThe lantern that you left upon the st") == [
        "ERY:\nThe lantern that you left upon the st"
    ]
    blank = PLAY[PLAY.index("Has burned") : PLAY.index("OLD TOBIAS")]
    assert quoted(index, blank) == [blank.rstrip()]
    assert quoted(index, "Good morrow, good my neigh") == []


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
        "MARGERY:\n\nMARGERY:",
    ],
)
def test_what_is_not_quoted_is_not_marked(generated, index):
    assert check(index, generated) == []
    assert quoted_share(index, generated) == 0


def test_short_texts_quote_and_are_quoted_nothing():
    assert check(index_of("So short."), PLAY) == []
    assert check(index_of(""), PLAY) == check(index_of(""), "") == []
    assert check(index_of(".\n" * 40), ".\n" * 30) == []
    assert quoted(index_of("So short.", min_words=2), "All so short? So short.") == ["So short."]


def test_a_run_has_at_least_a_word():
    """A run of no words stands everywhere: the search for the end of it had no end."""
    assert quoted(index_of(PLAY, min_words=0), "No wind.") == ["wind"]


def test_the_whole_text_is_one_quotation(index):
    (quotation,) = check(index, PLAY)
    assert (quotation.start, quotation.end, quotation.line) == (0, len(PLAY) - 1, 2)
    assert quoted_share(index, PLAY) == 1


def test_the_longest_agreement_wins_then_the_earliest():
    text = "A:\nto be or not to go\n\nB:\nto be or not to be here\n\nC:\nto be or not to be here"
    index = index_of(text)
    for generated, speaker, words in (
        ("and to be or not to sit", "A", 5),
        ("and to be or not to be late", "B", 6),
        ("and to be or not to be here", "B", 7),
    ):
        (quotation,) = check(index, generated)
        assert (quotation.speaker, quotation.words) == (speaker, words)


def test_one_quotation_can_follow_another_but_not_overlap_it():
    """What the first leaves of the second counts only if it is long enough by itself."""
    index = index_of("one two three four five six\n\nfour five six seven eight nine ten eleven")
    assert quoted(index, "one two three four five six seven eight nine ten eleven") == [
        "one two three four five six",
        "seven eight nine ten eleven",
    ]
    assert quoted(index, "one two three four five six seven eight nine ten") == [
        "one two three four five six"
    ]


def test_characters_of_several_bytes_do_not_shift_the_offsets(index):
    generated = "🎭 naïve – You dreamt it, father. Drink your tea – it's cold! 東京"
    assert quoted(index, generated) == ["You dreamt it, father. Drink your tea – it's cold"]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_other_alphabets(form):
    """A letter whose accent is a character of its own is one letter: no quotation begins after it."""
    text = "Être là où l’été naît. Ὦ ξεῖν’, ἀγγέλλειν Λακεδαιμονίοις ὅτι τῇδε. Ёлка стоит в самом углу."
    index = index_of(unicodedata.normalize(form, text), min_words=4)
    for generated, expected in (
        ("Naître là où l’été naît!", ["là où l’été naît"]),
        ("ὦ ἀγγέλλειν Λακεδαιμονίοις ὅτι τῇδε;", ["ἀγγέλλειν Λακεδαιμονίοις ὅτι τῇδε"]),
        ("Белка стоит в самом дому", []),
        ("Ёлка стоит в самом углу", ["Ёлка стоит в самом углу"]),
    ):
        expected = [unicodedata.normalize(form, part) for part in expected]
        assert quoted(index, unicodedata.normalize(form, generated)) == expected


def test_other_scripts():
    """Where words are not told apart by spaces, what stands between two marks is one word."""
    index = index_of(
        "मैं तुम से बहुत प्यार करता हूँ।\n\nわたしは猫である。名前はまだ無い。春は、あけぼの。夏は、夜。", 3
    )
    assert quoted(index, "हम तुम से बहुत प्यार करता हूँ") == ["तुम से बहुत प्यार करता हूँ"]
    assert quoted(index, "夜。春は、あけぼの。夏は") == ["春は、あけぼの。夏は"]
    assert quoted(index, "猫である。名前はまだ無い") == []


def test_speakers_and_speeches(index):
    """A line of verse that ends in a colon is no name, and an empty speech is no speech."""
    assert [(speaker, line) for speaker, line, _ in index.speeches] == [
        ("MARGERY", 2),
        ("OLD TOBIAS", 6),
        ("MARGERY", 11),
        ("SECOND SAILOR", 14),
    ]
    lines = PLAY.split("\n")
    assert all(lines[line - 1] == first for _, line, first in index.speeches)
    odd = "\n\n  ANN :\n\n  Alas.\n \nBEN:\n\nCARL:  \n--\nYes: no\n\nDORA:"
    assert index_of(odd).speeches == [("ANN", 5, "Alas."), ("CARL", 11, "Yes: no")]
    assert [odd[a:b] for a, b in speaker_names(odd)] == ["ANN :", "BEN:", "CARL:", "DORA:"]
    prose = index_of("One day.\n\nAnother day came, and went: so did a third one.\n")
    assert prose.speeches == []
    (quotation,) = check(prose, "and went: so did a third time")
    assert quotation.place == "line 3"


def test_where_names_stand():
    text = "Nobody:\nI come\nwith three:\nOne.\n\nA stranger:\nFirst Fisher:\n\nEnnor:"
    assert [text[a:b] for a, b in speaker_names(text)] == ["Nobody:", "A stranger:", "Ennor:"]
    assert speaker_names("I come with three:") == [(0, 18)]  # at the start nothing tells them apart
    assert speaker_names("I say: come\n\nYou say:\tgo\n\n" + 70 * "x" + ":\n") == []


def test_the_share_is_of_characters_without_white_space(index):
    half = "The lantern that you left upon the stair"
    other = "q" * len(half.replace(" ", ""))
    assert quoted_share(index, f"{other}\n\n{half}") == pytest.approx(0.5)
    assert quoted_share(index, f"{other} {half}" + " \n" * 50) == pytest.approx(0.5)
    assert quoted_share(index, half) == 1


def test_a_growing_text_keeps_its_quotations(index):
    """Marks that come and go while one reads are a nuisance. The last may still grow or move."""
    generated = f"No. {PLAY[60:200]} But then again: {PLAY[230:]} So it ended."
    final = check(index, generated)
    assert len(final) == 2
    for end in range(len(generated)):
        growing = check(index, generated[:end])
        assert growing[:-1] == final[: max(0, len(growing) - 1)]


def test_the_quotations_of_a_text_are_searched_once():
    """The page asks for marks, share and list at each update; each searched anew."""
    searched = []

    class Counting(QuotationIndex):
        def find(self, generated):
            searched.append(generated)
            return super().find(generated)

    index = Counting(Text("play", PLAY, torch.empty(0, dtype=torch.int64)))
    for end in (100, 150, 200):
        index.segments(PLAY[:end]), quoted_share(index, PLAY[:end]), index.find(PLAY[:end])
    assert searched == [PLAY[:100], PLAY[:150], PLAY[:200]]


SEPARATORS = [" ", ", ", "\n", "\n\n", "\n\nA:\n", "\n\nB:\n"]
UNITS = st.lists(
    st.tuples(st.sampled_from(["a", "ab", "b"]), st.sampled_from(SEPARATORS)), min_size=1, max_size=30
)


def joined(units: list[tuple[str, str]]) -> tuple[str, list[int]]:
    """The text of (word, what follows it) and where each word begins."""
    starts, text = [], ""
    for word, after in units:
        starts.append(len(text))
        text += word + after
    return text, starts


@given(UNITS, UNITS, st.integers(1, 6))
def test_find_does_what_its_definition_says(known, told, least):
    """Against the definition in plain Python, where nothing is looked up and every place is tried."""
    text, places = joined(known)
    generated, starts = joined(told)
    expected, i = [], 0
    while i < len(told):
        length, place = 0, 0
        for p in range(len(known)):
            n = 0
            while (
                i + n < len(told)
                and p + n < len(known)
                and told[i + n][0] == known[p + n][0]
                and (n == 0 or told[i + n - 1][1] == known[p + n - 1][1])
            ):
                n += 1
            if n > length:
                length, place = n, p
        if length < least:
            i += 1
            continue
        start, end = starts[i], starts[i + length - 1] + len(told[i + length - 1][0])
        offset = places[place]
        i += length
        if not expected and text[:offset].endswith(generated[:start]):
            offset, start = offset - start, 0
        if text[offset + end - start :].startswith(generated[end:]):
            end, i = len(generated.rstrip()), len(told)
        before = text[: places[place]].split("\n\n")[1:]
        speaker = next((part[0] for part in reversed(before) if part[1:3] == ":\n"), "")
        line = text[: places[place]].count("\n") + 1
        expected.append(Quotation(start, end, offset, speaker, line, length))
    assert check(index_of(text, least), generated) == expected


def test_how_much_is_quoted_by_chance(tiny_shakespeare_path):
    """A share means something only beside the share of a text that the model has not seen."""
    shakespeare = tiny_shakespeare_path.read_text(encoding="utf-8")
    half = len(shakespeare) // 2
    index = index_of(shakespeare[:half])
    assert 0 < quoted_share(index, shakespeare[half:]) < 0.002  # by the same author, 0.14 %
    assert quoted_share(index, (SHIPPED / "input.txt").read_text(encoding="utf-8")) < 0.001
