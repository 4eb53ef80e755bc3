"""SentencePiece-BPE ("SPM"): the adjacent pair which makes the token of the highest score is merged first.

A space is written U+2581. Characters that no token covers fall back to one `<0xXX>` token per byte. No normalisation:
the converters put none into the file that llama.cpp would apply.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence

from ..errors import EngineError

SPACE = "\u2581"


class SPM:
    """Encodes fragments without special tokens. Read-only once built: threads may share it."""

    def __init__(
        self,
        vocab: Mapping[str, int],
        scores: Sequence[float],
        unused: Collection[int],
        byte_ids: Mapping[int, int],
        unknown_id: int | None,
        add_space_prefix: bool,
    ) -> None:
        """vocab: ordinary tokens; scores by id; unused: ids in vocab to merge through, but not to emit."""
        self.add_space_prefix = add_space_prefix
        self._vocab = vocab
        self._scores = scores
        self._unused = unused
        self._byte_ids = byte_ids
        self._unknown_id = unknown_id

    def encode(self, text: str, after_special: bool) -> list[int]:
        """A space is put before a fragment at the start of the text, or after a special token, if the file says so."""
        if after_special and self.add_space_prefix:
            text = " " + text
        ids: list[int] = []
        parts_of: dict[str, tuple[str, str]] = {}
        for symbol in self._merge(text.replace(" ", SPACE), parts_of):
            todo = [symbol]
            while todo:
                piece = todo.pop()
                token = self._vocab.get(piece)
                if token is not None and token not in self._unused:
                    ids.append(token)
                elif piece in parts_of:
                    left, right = parts_of[piece]
                    todo += (right, left)
                else:
                    ids += self._fall_back(piece)
        return ids

    def _merge(self, text: str, parts_of: dict[str, tuple[str, str]]) -> list[str]:
        """The symbols left when nothing more merges; parts_of gets the two halves of each unused token on the way."""
        symbols = list(text)  # merged into the left one; the right one becomes ""
        after = list(range(1, len(symbols) + 1))
        before = list(range(-1, len(symbols) - 1))
        heap: list[tuple[float, int, int, str]] = []  # (-score, left, right, merged): ties go to the leftmost

        def offer(left: int, right: int) -> None:
            if left < 0 or right >= len(symbols):
                return
            merged = symbols[left] + symbols[right]
            token = self._vocab.get(merged)
            if token is None:
                return
            heapq.heappush(heap, (-self._scores[token], left, right, merged))
            if token in self._unused:
                parts_of[merged] = symbols[left], symbols[right]

        for left in range(len(symbols) - 1):
            offer(left, left + 1)
        while heap:
            _, left, right, merged = heapq.heappop(heap)
            stale = not symbols[left] or not symbols[right] or len(symbols[left]) + len(symbols[right]) != len(merged)
            if stale:
                continue
            symbols[left], symbols[right] = merged, ""
            after[left] = after[right]
            if after[right] < len(symbols):
                before[after[right]] = left
            offer(before[left], left)
            offer(left, after[left])
        return [symbol for symbol in symbols if symbol]

    def _fall_back(self, piece: str) -> list[int]:
        raw = piece.encode()
        if all(byte in self._byte_ids for byte in raw):
            return [self._byte_ids[byte] for byte in raw]
        if self._unknown_id is None:
            raise EngineError(
                f"the text holds {piece!r}, for which this model's vocabulary has neither token nor bytes"
            )
        return [self._unknown_id]

    @staticmethod
    def token_bytes(token: str) -> bytes:
        return token.replace(SPACE, " ").encode("utf-8", "surrogateescape")
