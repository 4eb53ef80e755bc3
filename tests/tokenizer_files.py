"""GGUF files that hold a tokenizer and nothing else, and text that tells one pre-tokenizer from another.

tokens, merges = trained_bpe()
f = bpe_file(tmp_path, tokens, merges, pre="deepseek-v3", add_bos_token=True)
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from pathlib import Path

from gguf_bytes import ARRAY, F32, I32, STRING, Value, array, gguf_bytes, key, raw_key

from engine.gguf_file import GGUFFile, read
from engine.tokenizer.bpe import BYTE_ALPHABET

TEXTS = [
    "Hello World! HelloWorld HTTPServer camelCase I'm don't WE'LL they'Ve x's",
    "1 12 123 1234 12345 3.14159 1,000,000 2026-11-24 \u0661\u0662\u0663\u0664 \u00bd\u00b2",
    "line\nline\n\nline\r\n\r\n  indented\n\ttab\n   \n  \n",
    "trailing   ",
    "   leading",
    " ",
    "\n",
    "\n\n\n",
    "  \n  ",
    "a  b   c    d",
    "",
    'def f(x: int) -> str:\n    return f"{x!r}"  # comment\n\n\nclass A(B):\n\tpass\n',
    "https://example.com/a/b?c=d&e=f#g user@host.org $x = <y> + ^z | ~w `q` //! /* */",
    "!!!???...,,,;;; ---===+++ ((([[[{{{ !hello ?world #tag @me .net  ?world",
    # Chinese with fullwidth punctuation, Japanese, Korean, all without spaces between the scripts
    "\u4f60\u597d\uff0c\u4e16\u754c\uff01\u6d4b\u8bd5123abc\u6d4b "
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u3002\u300c\u62ec\u300d",
    "\ud55c\uad6d\uc5b4 \ud14d\uc2a4\ud2b8 2026\ub144 x\u4e00\u3042\u30a2\uac00y1\u4e0012",
    # Russian, Greek (polytonic), Arabic, Hebrew, Hindi, Thai
    "\u0420\u0443\u0441\u0441\u043a\u0438\u0439 \u041f\u0440\u0438\u0432\u0435\u0442, "
    "\u043c\u0438\u0440! \u0395\u03bb\u03bb\u03b7 \u1f00\u03c1\u03c7\u03ae",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u0e20\u0e32",
    # emoji: with a skin tone, joined by U+200D, with a variation selector, a flag
    "\U0001f600\U0001f44d\U0001f3fd \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f flag \U0001f1e9\U0001f1ea!",
    # accents, a titlecase letter, Georgian, Armenian, mathematical letters
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u00c6r\u00f8 e\u0301 "
    "\u01c5 \u10d2\u10d0 \u0561\u0580 \U0001d400\U0001d41b",
    "\u201cquotes\u201d \u2018single\u2019 \u2014 dash \u2026 \u20ac5 \u00a9\u2122 don\u2019t 'tis 'S 'LL it'S'd",
    "A\u0300B  \u0301 x\u20dd \u00a0nbsp\u2003em\u3000ideo a\u2028b\u2029c\x0bd\x0ce\x85f\x00g\x1bh\u200bi\ufeffj",
]


@functools.cache
def random_texts(n: int = 400) -> list[str]:
    """Short strings of the characters of TEXTS and of blanks, digits and letters: the seams between classes."""
    rng = random.Random(5)
    pool = sorted(set("".join(TEXTS))) + list("aAbB019 \n\t.,!'  ") * 8
    return ["".join(rng.choices(pool, k=rng.randrange(1, 9))) for _ in range(n)]


@functools.cache
def trained_bpe(more: tuple[str, ...] = ()) -> tuple[list[str], list[str]]:
    """(tokens, merges) trained on all these texts uncut, until each is a single token: then every cut shows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=50_000, min_frequency=1, initial_alphabet=sorted(BYTE_ALPHABET), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *random_texts(), *more], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


@functools.cache
def spm_vocab() -> tuple[list[str], list[float], list[int]]:
    """(tokens, scores, types): half of the short strings in TEXTS, with scores of which many are equal."""
    rng = random.Random(1)
    found = set()
    for text in (f" {text}".replace(" ", "\u2581") for text in TEXTS):
        for n in range(1, 6):
            # llama.cpp reads tokens as C strings: none with a NUL
            found |= {t for i in range(len(text) - n + 1) if rng.random() < 0.5 and "\0" not in (t := text[i : i + n])}
    tokens = sorted(found)
    scores = [-float(rng.randrange(len(tokens) // 4)) for _ in tokens]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    last = ["<u1>", "<ctl>", "<ctl>x", "<|im_end|>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(tokens) + [4, 3, 4, 3]
    return [*first, *tokens, *last], [0.0] * len(first) + scores + [0.0] * len(last), types


def bpe_file(
    folder: Path,
    tokens: Sequence[str | bytes] = tuple(BYTE_ALPHABET),
    merges: Sequence[str] | None = (),
    types: Sequence[int] | None = None,
    pre: str | None = "gpt-2",
    **keys: Value,
) -> GGUFFile:
    """A file of byte-level BPE; None leaves a key out; `keys` are put below `tokenizer.ggml.`."""
    made = [_strings("merges", merges)] if merges is not None else []
    if pre is not None:
        made.append(key("tokenizer.ggml.pre", pre))
    return _file(folder, "gpt2", tokens, types, made, keys)


def spm_file(
    folder: Path, tokens: Sequence[str | bytes], scores: Sequence[float], types: Sequence[int], **keys: Value
) -> GGUFFile:
    return _file(folder, "llama", tokens, types, [key("tokenizer.ggml.scores", scores, F32)], keys)


def _file(
    folder: Path,
    model: str,
    tokens: Sequence[str | bytes],
    types: Sequence[int] | None,
    made: list[bytes],
    keys: dict[str, Value],
) -> GGUFFile:
    path = folder / "tokenizer.gguf"
    made += [key("general.architecture", "deepseek2"), key("tokenizer.ggml.model", model), _strings("tokens", tokens)]
    if types is not None:
        made.append(key("tokenizer.ggml.token_type", types, I32))
    made += [key(f"tokenizer.ggml.{name}", value) for name, value in keys.items()]
    path.write_bytes(gguf_bytes(made))
    return read(path)


def _strings(name: str, values: Sequence[str | bytes]) -> bytes:
    if values:
        return key(f"tokenizer.ggml.{name}", values)
    return raw_key(f"tokenizer.ggml.{name}", ARRAY, array(STRING, 0, b""))
