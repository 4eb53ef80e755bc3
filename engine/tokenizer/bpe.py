"""Byte-level BPE: text -> pieces (pretokenizers.py) -> bytes, written in 256 printable characters -> merged tokens.

The work is done by the `tokenizers` library, imported when the first tokenizer is built. Only ordinary tokens are given
to it: special ones are cut out before (tokenizer.py), so no text can merge into one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import EngineError, ModelFormatError
from .pretokenizers import Pretokenizer


def _byte_alphabet() -> str:
    """The character that stands for each byte: printable Latin-1 for itself, the other bytes from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = (b for b in range(256) if b not in printable)
    chars = {b: chr(b) for b in printable} | {b: chr(0x100 + i) for i, b in enumerate(rest)}
    return "".join(chars[b] for b in range(256))


BYTE_ALPHABET = _byte_alphabet()
_BYTE_OF = {char: byte for byte, char in enumerate(BYTE_ALPHABET)}


class BPE:
    """Encodes fragments without special tokens. Read-only once built: threads may share it."""

    add_space_prefix = False

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[bytes], pre: Pretokenizer, where: str) -> None:
        """vocab: ordinary tokens only, in the byte alphabet; merges: b"left right", the first has the highest rank."""
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers

        self._missing_bytes = {byte for byte, char in enumerate(BYTE_ALPHABET) if char not in vocab}
        model = models.BPE(dict(vocab), _merge_pairs(vocab, merges, where), ignore_merges=pre.ignore_merges)
        self._tokenizer = Tokenizer(model)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
            + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )

    def encode(self, text: str, after_special: bool) -> list[int]:
        if self._missing_bytes and (found := self._missing_bytes.intersection(text.encode())):
            # The library would drop them without a word.
            byte = min(found)
            char = next(c for c in text if byte in c.encode())
            raise EngineError(
                f"the text holds {char!r}, but this model's vocabulary has no token for byte 0x{byte:02X}"
            )
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    @staticmethod
    def token_bytes(token: str) -> bytes:
        try:
            return bytes([_BYTE_OF[char] for char in token])
        except KeyError:  # not written in the byte alphabet: an added token that the converter took for a normal one
            return token.encode("utf-8", "surrogateescape")


def _merge_pairs(vocab: Mapping[str, int], merges: Sequence[bytes], where: str) -> list[tuple[str, str]]:
    """Merges as pairs in order of rank, without repetitions and without those of parts or results outside `vocab`."""
    pairs = []
    for merge in dict.fromkeys(merges):
        left, space, right = merge.decode("utf-8", "replace").partition(" ")
        if not space:
            raise ModelFormatError(f"{where}: merge {left!r}: expected two tokens with a space between them")
        if left in vocab and right in vocab and left + right in vocab:
            pairs.append((left, right))
    return pairs
