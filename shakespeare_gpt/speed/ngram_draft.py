"""N-gram draft: guess the next tokens from a known text, for the model to check in one pass.

A step reads all the weights from memory, whether it checks one token or thirty (speculative decoding:
Leviathan et al., 2023; Chen et al., 2023). The model decides every token, with the same random number as
without a draft. Only rounding differs: it can decide between two nearly tied tokens.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor


class NgramDraft:
    """Proposes how a context goes on, from the positions in a known text where its last tokens occur.

    ``ids`` (n,) is the known text. The index is one sort, about 50 ms for 338,025 tokens.
    """

    MIN_MATCH = 2  # tokens that must agree before anything is proposed
    MAX_MATCH = 32  # agreement beyond this makes no difference

    def __init__(self, ids: Tensor | Sequence[int]):
        self._ids = ids = np.asarray(ids, dtype=np.int64)
        pairs = (ids[:-1] << 32) | ids[1:]
        self._order = np.argsort(pairs, kind="stable")
        self._pairs = pairs[self._order]

    def propose(self, context_ids: Sequence[int], length: int) -> list[int]:
        """At most ``length`` tokens that may follow ``context_ids``; none where nothing matches.

        The positions with the longest match count. Among them, the most frequent next token decides.
        """
        if length < 1 or len(context_ids) < self.MIN_MATCH:
            return []
        ids, recent = self._ids, context_ids[-self.MAX_MATCH :]
        pair = (recent[-2] << 32) | recent[-1]
        low, high = np.searchsorted(self._pairs, [pair, pair + 1])
        starts = self._order[low:high] + 2  # where the proposal would begin
        starts = starts[starts < len(ids)]  # nothing follows the end of the text
        if not len(starts):
            return []
        for back in range(self.MIN_MATCH + 1, len(recent) + 1):
            # A start before ``back`` would wrap round to the end of the text.
            longer = starts[(ids[starts - back] == recent[-back]) & (starts >= back)]
            if not len(longer):
                break
            starts = longer
        following = ids[starts]
        tokens, counts = np.unique(following, return_counts=True)
        start = starts[np.argmax(following == tokens[counts.argmax()])]
        return ids[start : start + length].tolist()


class DraftLength:
    """How many tokens to draft. After one with none accepted, drafting pauses for 1, 2, 4, ... tokens."""

    FIRST, SHORTEST, LONGEST, LONGEST_PAUSE = 32, 2, 63, 16  # longer drafts gain nothing

    def __init__(self):
        self._length, self._pause, self._skip = self.FIRST, 1, 0

    def next(self) -> int:
        """The length of the next draft, 0 during a pause."""
        self._skip -= 1
        return 0 if self._skip >= 0 else self._length

    def update(self, proposed: int, accepted: int) -> None:
        """Adapt to a draft of ``proposed`` tokens, of which the model accepted ``accepted``."""
        if accepted:
            length = 2 * self._length if accepted == proposed else accepted
            self._length, self._pause = min(max(length, self.SHORTEST), self.LONGEST), 1
        elif proposed:
            self._length, self._skip = self.SHORTEST, self._pause
            self._pause = min(2 * self._pause, self.LONGEST_PAUSE)
