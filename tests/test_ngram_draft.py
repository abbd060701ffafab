"""The n-gram draft against its definition, and how many tokens it is asked for."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from shakespeare_gpt.speed.ngram_draft import DraftLength, NgramDraft


def slow_proposal(text, context, length):
    """The definition: the longest match, then the most frequent next token (the smallest of equals)."""
    matches = {}
    for start in range(2, len(text)):
        match = 0
        most = min(start, len(context), 32)
        while match < most and text[start - 1 - match] == context[-1 - match]:
            match += 1
        matches.setdefault(match, []).append(start)
    longest = max(matches, default=0)
    if longest < 2:
        return []
    following = [text[start] for start in matches[longest]]
    token = min(set(following), key=lambda t: (-following.count(t), t))
    start = matches[longest][following.index(token)]
    return text[start : start + length]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), max_size=40), st.integers(0, 70))
def test_a_draft_proposes_what_follows_the_longest_match(text, context, length):
    """Guards against matches that wrap round the start of the text, and shorter ones that win."""
    expected = slow_proposal(text, context, length) if length else []
    assert NgramDraft(text).propose(context, length) == expected


def test_drafts_grow_while_they_are_accepted_and_shrink_to_what_was():
    """Guards against drafts without an upper limit, and long ones after most of one was rejected."""
    length = DraftLength()
    asked = []
    for _ in range(3):
        asked.append(length.next())
        length.update(asked[-1], asked[-1])
    assert asked == [32, 63, 63]
    length.update(63, 5)
    assert length.next() == 5
    length.update(5, 1)
    assert length.next() == 2


def test_rejected_drafts_are_followed_by_longer_and_longer_pauses():
    """Guards against a draft that costs time at every token of a text it does not know."""
    length, asked = DraftLength(), []
    for _ in range(60):
        asked.append(length.next())
        length.update(asked[-1], 0)
    assert [n for n in asked if n] == [32, 2, 2, 2, 2, 2, 2]
    drafted = [i for i, n in enumerate(asked) if n]
    assert [b - a - 1 for a, b in pairwise(drafted)] == [1, 2, 4, 8, 16, 16]
    while not length.next():
        length.update(0, 0)
    length.update(2, 2)
    length.update(4, 0)
    assert [length.next(), length.next()] == [0, 2]  # after a success the pauses start again
