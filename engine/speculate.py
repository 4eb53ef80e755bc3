"""Lookup: guesses the next tokens from what came before, and guesses only as long as it pays.

The last tokens of a text are looked up in the text itself (three of them, else two); what followed them there is the
draft. Code that is edited, quoted or corrected repeats itself; a story does not. How many tokens to draft follows from
what was measured: a step of n rows takes time[n], a drafted token is right with probability p, so the step gives
1 + p + … + p^(n - 1) tokens. Where none beats a step of one row, nothing is drafted, and once in a while one draft
looks whether that has changed. Only speed hangs on it: a verified text is that of one token at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from .prefixes import common

GRAMS = (3, 2)  # tokens that must be equal for a guess
ROWS = (1, 2, 4, 8, 16)  # of a step: one, and the drafted ones
COST_OF_ROW = 0.15  # of a step of one row: what another is thought to cost until it is measured
PROBE = 32  # steps without a draft after which one is tried
MEMORY = 0.8  # of what was measured before, when something new is
TRUST = 0.5  # p at first


class Lookup:
    """Of one text; ids: its prompt."""

    def __init__(self, ids: Sequence[int]):
        self._next: list[dict[tuple[int, ...], int]] = [{} for _ in GRAMS]  # where the last such gram ended
        self._seen = 0
        self._p = TRUST
        self._seconds: dict[int, float] = {}  # of a step, by rows
        self._quiet = 0  # steps without a draft
        self._drafted: list[int] = []
        self._index(ids)

    def draft(self, ids: Sequence[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow the text so far, which has grown by what became of the last draft."""
        right = common(ids[self._seen :], self._drafted)
        for i in range(min(right + 1, len(self._drafted))):
            self._p = MEMORY * self._p + (1 - MEMORY) * (i < right)
        self._index(ids)
        n, at = min(self._size(), room), self._find(ids)
        self._drafted = list(ids[at : at + n]) if at is not None and n > 0 else []
        self._quiet = 0 if self._drafted else self._quiet + 1
        return self._drafted

    def timed(self, rows: int, seconds: float) -> None:
        """What a step of so many rows has taken."""
        self._seconds[rows] = MEMORY * self._seconds.get(rows, seconds) + (1 - MEMORY) * seconds

    def _size(self) -> int:
        best = max(ROWS, key=lambda rows: sum(self._p**i for i in range(rows)) / self._expected(rows))
        return best - 1 or (ROWS[2] - 1 if self._quiet >= PROBE else 0)

    def _expected(self, rows: int) -> float:
        """Seconds of a step: measured, or by the nearest that was."""
        if rows in self._seconds:
            return self._seconds[rows]
        if not self._seconds:
            return 1 + COST_OF_ROW * (rows - 1)
        near = min(self._seconds, key=lambda n: abs(n - rows))
        return self._seconds[near] * (1 + COST_OF_ROW * (rows - 1)) / (1 + COST_OF_ROW * (near - 1))

    def _index(self, ids: Sequence[int]) -> None:
        """All grams but the one that ends the text, which is what will be looked up."""
        for table, n in zip(self._next, GRAMS):
            for end in range(max(n, self._seen), len(ids)):
                table[tuple(ids[end - n : end])] = end
        self._seen = max(self._seen, len(ids))

    def _find(self, ids: Sequence[int]) -> int | None:
        for table, n in zip(self._next, GRAMS):
            at = table.get(tuple(ids[-n:]))
            if at is not None and at < len(ids):
                return at
        return None
