"""Token ids equal llama.cpp's, for every pre-tokenizer name and for SPM, on text of many scripts.

Where llama.cpp departs from a model's own regexes (pretokenizers.py names the places), text that holds such a place is
left out here; test_tokenizer.py holds it to pieces cut by hand.
"""

from __future__ import annotations

import itertools
import unicodedata
from pathlib import Path

import pytest
from llama_cpp_peer import require_xllamacpp
from llama_cpp_vocab import LlamaCppVocab
from tokenizer_files import TEXTS, bpe_file, random_texts, spm_file, spm_vocab, trained_bpe

from engine.gguf_file import GGUFFile
from engine.tokenizer.bpe import BYTE_ALPHABET
from engine.tokenizer.pretokenizers import PRETOKENIZERS
from engine.tokenizer.tokenizer import CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer


@pytest.fixture(autouse=True)
def _peer() -> None:
    require_xllamacpp()


def spaces_beyond_ascii(text: str) -> bool:
    return any(char.isspace() for char in text if not char.isascii())


def cases_beyond_ascii(text: str) -> bool:
    """A run of letters and marks with a capital, a modifier or a mark, or with ASCII and other letters."""
    return any(
        not run.isascii()
        and (any(char.isascii() or unicodedata.category(char) in ("Lu", "Lt", "Lm", "Mn", "Mc", "Me") for char in run))
        for run in _letter_runs(text)
    )


def cases(text: str) -> bool:
    return cases_beyond_ascii(text) or any(
        a.islower() and b.isupper() for run in _letter_runs(text) for a, b in itertools.pairwise(run)
    )


def _letter_runs(text: str) -> list[str]:
    runs = itertools.groupby(text, lambda char: unicodedata.category(char)[0] in "LM")
    return ["".join(run) for is_letter, run in runs if is_letter]


DEPARTURES = {
    **dict.fromkeys(("deepseek-llm", "deepseek-coder"), spaces_beyond_ascii),
    **dict.fromkeys(("kimi-k2", "youtu"), cases),
    **dict.fromkeys(("gpt-4o", "kanana2", "llama4", "tekken"), cases_beyond_ascii),
}


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_bpe_ids_are_those_of_llama_cpp(tmp_path: Path, pre: str) -> None:
    file = bpe_file(tmp_path, *trained_bpe(), pre=pre, bos_token_id=1)
    departs = DEPARTURES.get(pre, lambda text: False)
    texts = [text for text in TEXTS + random_texts() if not departs(text)]
    assert len(texts) > 250
    ours = Tokenizer.from_gguf(file)
    with LlamaCppVocab(file.path) as theirs:
        assert (ours.add_bos, ours.add_eos) == (theirs.add_bos, theirs.add_eos)
        for text in texts:
            assert ours.encode(text) == theirs.encode(text), ascii(text)


@pytest.mark.parametrize("pre", PRETOKENIZERS)
def test_merges_are_ignored_where_llama_cpp_ignores_them(tmp_path: Path, pre: str) -> None:
    file = bpe_file(tmp_path, [*BYTE_ALPHABET, "abc"], ["a b"], pre=pre)
    with LlamaCppVocab(file.path) as theirs:
        assert Tokenizer.from_gguf(file).encode("abc", add_special=False) == theirs.encode("abc", add_special=False)


SPECIALS = {
    "<|bos|>": CONTROL,
    "<|im_end|>": NORMAL,
    "</s>": CONTROL,
    "<tool>": USER_DEFINED,
    "<too": CONTROL,
    "[UNK]": UNKNOWN,
    "[PAD0]": UNUSED,
    "l>": CONTROL,
}
SPECIAL_TEXTS = [
    "",
    "<|bos|>a<|im_end|>b</s>",
    "x<tool>y<too<tool>> <tool <tool>l>",
    " <tool> </s> x [UNK] [PAD0]",
    "sm\u00f8r br\u00f8d",
    "<u1><ctl>x a <ctl>b<u1> <s> <s>",
]


def bpe_with_specials(folder: Path) -> GGUFFile:
    tokens = [*BYTE_ALPHABET, *SPECIALS, "ab"]
    types = [NORMAL] * 256 + [*SPECIALS.values(), NORMAL]
    types[0xF8] = USER_DEFINED  # as in DeepSeek-V2: a byte that is in no UTF-8 text; its token is taken for the letter
    keys = {"bos_token_id": 256, "eos_token_id": 258, "add_bos_token": True, "add_eos_token": True}
    return bpe_file(folder, tokens, ["a b"], types, **keys)


def spm_with_prefix(folder: Path) -> GGUFFile:
    return spm_file(folder, *spm_vocab())


def spm_without_prefix(folder: Path) -> GGUFFile:
    return spm_file(folder, *spm_vocab(), add_space_prefix=False, add_bos_token=False, add_eos_token=True)


@pytest.mark.parametrize("make", [bpe_with_specials, spm_with_prefix, spm_without_prefix])
def test_special_tokens_are_those_of_llama_cpp(tmp_path: Path, make) -> None:
    file = make(tmp_path)
    ours = Tokenizer.from_gguf(file)
    with LlamaCppVocab(file.path) as theirs:
        assert (ours.n_vocab, ours.bos_id, ours.eos_id) == (theirs.n_vocab, theirs.bos_id, theirs.eos_id)
        assert (ours.add_bos, ours.add_eos, ours.eog_ids) == (theirs.add_bos, theirs.add_eos, theirs.eog_ids())
        assert all(ours.is_control(i) == theirs.is_control(i) for i in range(ours.n_vocab))
        for text, add_special, parse_special in itertools.product(SPECIAL_TEXTS, (False, True), (False, True)):
            how = {"add_special": add_special, "parse_special": parse_special}
            assert ours.encode(text, **how) == theirs.encode(text, **how), (ascii(text), how)


@pytest.mark.parametrize("make", [spm_with_prefix, spm_without_prefix])
def test_spm_ids_and_texts_are_those_of_llama_cpp(tmp_path: Path, make) -> None:
    file = make(tmp_path)
    ours = Tokenizer.from_gguf(file)
    with LlamaCppVocab(file.path) as theirs:
        for text in TEXTS + random_texts():
            ids = ours.encode(text)
            assert ids == theirs.encode(text), ascii(text)
            ids = ours.encode(text, add_special=False)  # after a BOS llama.cpp leaves the first space where it is
            assert ours.decode(ids) == theirs.decode(ids) == text


def test_bpe_texts_are_those_of_llama_cpp(tmp_path: Path) -> None:
    file = bpe_file(tmp_path, *trained_bpe(), pre="deepseek-v3")
    ours = Tokenizer.from_gguf(file)
    with LlamaCppVocab(file.path) as theirs:
        for text in TEXTS + random_texts():
            ids = ours.encode(text)
            assert ours.decode(ids) == theirs.decode(ids) == text
