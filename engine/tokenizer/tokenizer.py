"""Text to token ids and back, from the metadata of a GGUF file.

    text ─ cut out special tokens ─ fragments ─ BPE or SPM ─► ids          encode
    ids ─ bytes of each token ─ joined ─ UTF-8 ─► text                     decode, stream

Special tokens never reach BPE or SPM. User-defined ones are cut out of every text; control ones (turn markers, end of
text) only where parse_special asks for it, and otherwise are spelled out in ordinary tokens like any text: what a user
types cannot pose as a turn of somebody else.

Source: llama.cpp src/llama-vocab.cpp for the keys, defaults and the order of cutting.
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..errors import EngineError, ModelFormatError, UnsupportedModelError
from .bpe import BPE
from .pretokenizers import PRETOKENIZERS, Pretokenizer
from .spm import SPM

if TYPE_CHECKING:
    from ..gguf_file import GGUFFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type

# A model that emits one of these is done, whichever ids the file names; it is control whatever its type says.
END_OF_GENERATION = frozenset(
    (
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>"),
        *("[EOT]", "[EOS]", "<|end_of_text|>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    )
)


class Tokenizer:
    """Built by from_gguf; read-only from then on, so that threads may share it.

    bos_id, eos_id, eot_id    None where the file has none
    eog_ids                   ids that end a generation: eos, eot, eom and the tokens spelled like one
    add_bos, add_eos          what encode(add_special=True) does
    """

    @classmethod
    def from_gguf(cls, f: GGUFFile) -> Tokenizer:
        return cls(f)

    def __init__(self, f: GGUFFile) -> None:
        model = f.get("tokenizer.ggml.model", str)
        if model not in ("gpt2", "llama"):
            raise UnsupportedModelError(f"{f.path}: tokenizer model {model!r} is not supported; supported: gpt2, llama")
        spm = model == "llama"
        self._texts = _token_texts(f)
        self.n_vocab = len(self._texts)
        self._types = _token_types(f, self._texts)
        self._ids = {text: i for i, text in enumerate(self._texts)}
        pre = Pretokenizer(()) if spm else _pretokenizer(f)
        self.bos_id = _special_id(f, "bos", self.n_vocab, 1 if spm else None)
        self.eos_id = _special_id(f, "eos", self.n_vocab, 2 if spm else None)
        self.eot_id = _special_id(f, "eot", self.n_vocab)
        eom_id = _special_id(f, "eom", self.n_vocab)
        spelled = [i for i, text in enumerate(self._texts) if text in END_OF_GENERATION]
        self.eog_ids = frozenset(i for i in (self.eos_id, self.eot_id, eom_id, *spelled) if i is not None)
        self.add_bos = f.get("tokenizer.ggml.add_bos_token", bool, spm or pre.add_bos)
        self.add_eos = f.get("tokenizer.ggml.add_eos_token", bool, False)
        self._specials = self._longest_first(USER_DEFINED, CONTROL, UNKNOWN)
        self._user_defined = self._longest_first(USER_DEFINED)
        self._model = self._spm(f) if spm else self._bpe(f, pre)

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """add_special: BOS and EOS as the file wants; parse_special: text that spells a control token becomes it."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise EngineError(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        after_special = True
        for part in self._cut(text, self._specials if parse_special else self._user_defined):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(part, after_special)
            after_special = isinstance(part, int)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, at_start: bool = True) -> str:
        """Bytes that are not UTF-8 become U+FFFD. skip_special leaves out control, unknown and unused tokens.

        at_start: the ids begin a text, so the space which SPM put before it is taken off again.
        """
        stream = self.stream(skip_special=skip_special, at_start=at_start)
        return stream.push_all(ids) + stream.flush()

    def stream(self, *, skip_special: bool = True, at_start: bool = True) -> TokenStream:
        """A decoder for tokens as they come; for a model's answer to a prompt, at_start is False."""
        return TokenStream(self, skip_special, at_start and self._model.add_space_prefix)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for; of a special token its name."""
        self._check(token)
        text, kind = self._texts[token], self._types[token]
        if kind in (NORMAL, UNUSED):
            return self._model.token_bytes(text)
        if kind == BYTE and (byte := _byte_value(text)) is not None:
            return bytes([byte])
        return text.encode("utf-8", "surrogateescape")

    def token_to_id(self, text: str) -> int | None:
        """The id of a token as the file spells it (in the byte alphabet, or with U+2581 for a space)."""
        return self._ids.get(text)

    def is_control(self, token: int) -> bool:
        self._check(token)
        return self._types[token] == CONTROL

    def is_skipped(self, token: int) -> bool:
        """Whether decode(skip_special=True) leaves the token out."""
        self._check(token)
        return self._types[token] in (UNKNOWN, CONTROL, UNUSED)

    def _check(self, token: int) -> None:
        if not 0 <= token < self.n_vocab:
            raise EngineError(f"token id {token} is not in the vocabulary, expected 0 to {self.n_vocab - 1}")

    def _cut(self, text: str, specials: list[tuple[str, int]]) -> Iterator[str | int]:
        """The text as fragments and ids of the special tokens between them. A longer token wins over an earlier one."""
        parts: list[str | int] = [text]
        for special, token in specials:
            if special in text:
                parts = [
                    p for part in parts for p in (_replace(part, special, token) if isinstance(part, str) else (part,))
                ]
        return (part for part in parts if part != "")

    def _longest_first(self, *kinds: int) -> list[tuple[str, int]]:
        return sorted(
            self._tokens_of(*kinds).items(),
            key=lambda item: (-len(item[0].encode("utf-8", "surrogateescape")), item[1]),
        )

    def _tokens_of(self, *kinds: int) -> dict[str, int]:
        return {text: i for i, (text, kind) in enumerate(zip(self._texts, self._types)) if kind in kinds and text}

    def _bpe(self, f: GGUFFile, pre: Pretokenizer) -> BPE:
        key = "tokenizer.ggml.merges"
        if key not in f.metadata:
            raise ModelFormatError(
                f"{f.path}: key {key!r} is missing, and a gpt2 tokenizer is nothing without it "
                "(some early kimi-k2 conversions lack it); convert the model again"
            )
        vocab = {text: i for text, i in self._tokens_of(NORMAL).items() if text.isascii() or _is_unicode(text)}
        return BPE(vocab, f.get(key, list), pre, str(f.path))

    def _spm(self, f: GGUFFile) -> SPM:
        scores = f.get("tokenizer.ggml.scores", np.ndarray)
        _check_length(f, "tokenizer.ggml.scores", len(scores), self.n_vocab)
        if not np.isfinite(scores).all():
            raise ModelFormatError(f"{f.path}: key 'tokenizer.ggml.scores' holds values that are not finite")
        vocab = self._tokens_of(NORMAL, UNUSED)
        unknown_id = _special_id(f, "unknown", self.n_vocab, 0)
        if unknown_id is not None and self._types[unknown_id] != UNKNOWN:
            unknown_id = None  # an ordinary token that happens to have the id of the default
        bytes_of = {i: _byte_value(self._texts[i]) for i, kind in enumerate(self._types) if kind == BYTE}
        return SPM(
            vocab,
            scores.tolist(),
            {i for i in vocab.values() if self._types[i] == UNUSED},
            {byte: i for i, byte in bytes_of.items() if byte is not None},
            unknown_id,
            f.get("tokenizer.ggml.add_space_prefix", bool, True),
        )


class TokenStream:
    """Tokens in, text out, never a part of a character: what is incomplete waits for the tokens that complete it."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._drop_space = drop_space  # of the first bytes to come
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self.push_all((token,))

    def push_all(self, tokens: Iterable[int]) -> str:
        t = self._tokenizer
        raw = b"".join(t.token_bytes(i) for i in tokens if not (self._skip_special and t.is_skipped(i)))
        if raw and self._drop_space:
            raw = raw.removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(raw)

    def flush(self) -> str:
        """The end of the text: a character which was never completed comes out as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _replace(fragment: str, special: str, token: int) -> Iterator[str | int]:
    """The fragment with `token` in the place of each `special`."""
    for i, piece in enumerate(fragment.split(special)):
        if i:
            yield token
        yield piece


def _token_texts(f: GGUFFile) -> list[str]:
    """Tokens as the file spells them; bytes that are not UTF-8 as lone surrogates."""
    tokens: list[bytes] = f.get("tokenizer.ggml.tokens", list)
    if not tokens:
        raise ModelFormatError(f"{f.path}: key 'tokenizer.ggml.tokens' is empty")
    return [token.decode("utf-8", "surrogateescape") for token in tokens]


def _token_types(f: GGUFFile, texts: list[str]) -> list[int]:
    key = "tokenizer.ggml.token_type"
    array = f.get(key, np.ndarray, None)
    if array is None:
        types = [NORMAL] * len(texts)
    else:
        _check_length(f, key, len(array), len(texts))
        if array.dtype.kind not in "iu" or array.min() < NORMAL or array.max() > BYTE:
            raise ModelFormatError(f"{f.path}: key {key!r} holds other values than the integers {NORMAL} to {BYTE}")
        types = array[: len(texts)].tolist()
    return [CONTROL if text in END_OF_GENERATION else kind for text, kind in zip(texts, types)]


def _check_length(f: GGUFFile, key: str, found: int, n_vocab: int) -> None:
    if found < n_vocab:
        raise ModelFormatError(
            f"{f.path}: key {key!r} has {found:,} values, expected one for each of {n_vocab:,} tokens"
        )


def _special_id(f: GGUFFile, name: str, n_vocab: int, default: int | None = None) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token = f.get(key, int, None)
    if token is None:
        return default if default is not None and default < n_vocab else None
    if not 0 <= token < n_vocab:
        raise ModelFormatError(f"{f.path}: key {key!r} is {token}, expected a token id from 0 to {n_vocab - 1}")
    return token


def _pretokenizer(f: GGUFFile) -> Pretokenizer:
    key = "tokenizer.ggml.pre"
    name = f.get(key, str, None)
    if name is None:
        warnings.warn(
            f"{f.path}: key {key!r} is missing: text may become other tokens than in training; convert the model again",
            stacklevel=4,
        )
        name = "default"
    if name not in PRETOKENIZERS:
        raise UnsupportedModelError(
            f"{f.path}: pre-tokenizer {name!r} is not supported; supported: {', '.join(PRETOKENIZERS)}"
        )
    return PRETOKENIZERS[name]


def _byte_value(text: str) -> int | None:
    """'<0x0A>' -> 10"""
    match = re.fullmatch("<0x([0-9A-F]{2})>", text)
    return int(match[1], 16) if match else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
