"""Byte-level BPE, special tokens, decoding, and what happens to files that are wrong.

The oracle is a BPE of ten lines over pieces cut by hand. test_tokenizer_against_llama_cpp.py has the peer.
"""

from __future__ import annotations

import subprocess
import sys
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import TEXTS, bpe_file, random_texts, trained_bpe

import engine
from engine.errors import EngineError, ModelFormatError, UnsupportedModelError
from engine.gguf_file import read
from engine.tokenizer.bpe import BYTE_ALPHABET
from engine.tokenizer.pretokenizers import PRETOKENIZERS
from engine.tokenizer.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer

PIECES = {  # pre-tokenizer: texts, cut as it must cut them
    "deepseek-llm": [
        ["Hello", " World", "'", "s", " ", "12345", "\n", "\n", " ", " x"],
        ["\u4f60\u597d", "\uff0c", "\u4e16\u754c", "ab", "\u3042\u30a2"],
        ["\u0531", "\u0561", " (", "x", ")", "  "],  # Armenian: the list of cased letters has capitals alone
        ["\u05d0", "   ", "\n", "  \u05d0", "  "],
        ["\u3000", "B"],  # first cut out as one, then in two by the CJK class, which begins at U+0800
    ],
    "deepseek-coder": [["f", " (", "x", ")", " ", "1", "2", "\n", "\u0561", "\u4f60"]],
    "deepseek-v3": [
        ["Hello", " World", "'s", " ", "123", "45", ".\n\n", " ", " x", "\u4e2d\u6587", "abc", " +="],
        ["a", "_b", "\t", "\tc", "\r\n", " ", "12"],
    ],
    "kimi-k2": [
        ["Hello", "World's", " HTTPServer", "\u4e2d\u6587", "abc", "123", "4", " ?!\n", "it'LL", "\t", "\tx"],
        ["\u0441\u043b", "\u0421\u043b", "A\u0300B", "\u3042", "  ", " b"],
    ],
    "glm4": [["I", "'m", " HelloWorld", " ", "123", "45", "?!\n\n", "x", "'LL", "  \n", "  "]],
    "llama-bpe": [["I", "'m", " HelloWorld", " ", "123", "45", "?!\n\n", "x", "(y"]],
    "qwen2": [["I", "'m", " HelloWorld", " ", "1", "2", "?!\n\n", "x"]],
    "smollm": [["It", "'s", " ", "1", "2", " ok", "\n\n", " x"], ["IT", "'", "S"]],
    "gpt-2": [["It", "'s", " 12345", " ok", "\n\n", " x"], ["IT", "'", "S", "  "]],
    "default": [["a", "$", "b", " ", " ", "123", "45", " c"]],
    "gpt-4o": [
        ["Hello", "World's", " ", "123", "4", " a", "/b", " ://\n/", "x"],
        ["\u0441\u043b", "\u0421\u043b", "A\u0300", "BC", " \u01c5a"],
    ],
    "tekken": [["Hello", "World", "'s", " ", "1", "2", " HTTPServer", " ://\n/", "x"]],
    "youtu": [["Hello", "World's", " ", "1", "2", "\uac00", "\u4e2d", "\uff0c", "x", "\u3105", "y"]],
}


@pytest.fixture(scope="module")
def of_bytes(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """256 tokens, one for each byte, whose ids are the bytes."""
    return Tokenizer.from_gguf(bpe_file(tmp_path_factory.mktemp("bytes")))


def naive_bpe(piece: str, tokens: dict[str, int], ranks: dict[str, int], ignore_merges: bool) -> list[int]:
    symbols = [BYTE_ALPHABET[byte] for byte in piece.encode()]
    if ignore_merges and "".join(symbols) in tokens:
        return [tokens["".join(symbols)]]
    while True:
        known = [(ranks[pair], i) for i, pair in enumerate(map(" ".join, zip(symbols, symbols[1:]))) if pair in ranks]
        if not known:
            return [tokens[symbol] for symbol in symbols]
        i = min(known)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@pytest.mark.parametrize("pre", PIECES)
def test_text_is_cut_and_merged_as_by_hand(tmp_path: Path, pre: str) -> None:
    tokens, merges = trained_bpe(tuple("".join(pieces) for pieces in PIECES[pre]))
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, tokens, merges, pre=pre))
    ids, ranks = {token: i for i, token in enumerate(tokens)}, {merge: i for i, merge in enumerate(merges)}
    for pieces in PIECES[pre]:
        expected = [i for p in pieces for i in naive_bpe(p, ids, ranks, PRETOKENIZERS[pre].ignore_merges)]
        found = tokenizer.encode("".join(pieces), add_special=False)
        assert [tokenizer.token_bytes(i) for i in found] == [tokenizer.token_bytes(i) for i in expected]
        assert found == expected


def test_every_kind_of_pretokenizer_is_cut_by_hand() -> None:
    assert {PRETOKENIZERS[pre] for pre in PIECES} | {PRETOKENIZERS["chatglm-bpe"]} == set(PRETOKENIZERS.values())


def test_the_cased_letters_are_those_of_the_model() -> None:
    from tokenizers import Regex, pre_tokenizers

    from engine.tokenizer.pretokenizers import CASED

    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    split = pre_tokenizers.Split(Regex(f"[{CASED}]+"), "removed", invert=True)
    cased = "".join(piece for piece, _ in split.pre_tokenize_str(every))
    assert len(cased) == 2729
    assert {unicodedata.category(char) for char in cased} == {"Lu", "Ll", "Lt"}


def test_a_token_is_taken_whole_only_where_merges_are_ignored(tmp_path: Path) -> None:
    tokens = [*BYTE_ALPHABET, "abc"]
    for pre, expected in (("llama-bpe", [256]), ("gpt-2", [*b"abc"])):
        assert Tokenizer.from_gguf(bpe_file(tmp_path, tokens, pre=pre)).encode("abc", add_special=False) == expected


def test_a_long_run_of_spaces_takes_linear_time(tmp_path: Path) -> None:
    """In the model's own form `\\s+$` 100,000 spaces before a digit take 40 s, far beyond the limit of a test."""
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, pre="deepseek-llm"))
    text = " " * 100_000 + "5"
    assert tokenizer.decode(tokenizer.encode(text)) == text


DEFAULT_MODEL = next((Path(engine.__file__).parent / "data").glob("*.gguf"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'Once upon a time, there was a little girl named Lily.\n\n"I\'m 7!" she said.',
            [470, 553, 260, 438, 13, 409, 281, 260, 415, 443, 352, 507, 15, 200, 200, 3, 42, 1459, 222, 24, 394, 349]
            + [303, 15],
        ),
        ("HelloWorld 12345", [1241, 56, 293, 321, 222, 18, 19, 20, 21, 22]),
        (
            "caf\u00e9 \u4f60\u597d \U0001f600",
            [68, 1573, 129, 104, 222, 162, 123, 256, 163, 100, 123, 222, 174, 255, 248, 224],
        ),
        ("def f(x):\n    return x", [2402, 71, 274, 9, 89, 10, 27, 200, 222, 222, 222, 2676, 222, 89]),
    ],
)
def test_the_default_model_tokenises_as_it_was_trained(text: str, expected: list[int]) -> None:
    """The ids are those of the tokenizer.json with which the model was trained."""
    tokenizer = Tokenizer.from_gguf(read(DEFAULT_MODEL))
    assert tokenizer.encode(text) == [0, *expected]
    assert tokenizer.decode([0, *expected, 1]) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.eog_ids) == (0, 1, None, {1})


@pytest.mark.parametrize("pre", PIECES)
def test_decode_gives_back_any_text(tmp_path: Path, pre: str) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, *trained_bpe(), pre=pre))

    @settings(max_examples=100, derandomize=True, deadline=None, database=None)
    @given(st.text() | st.text(st.sampled_from("aA1 '\n\r\t.\u3000\u00e9\u4e00\u0301\U0001f600"), max_size=12))
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == text

    check()


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(0, 255) | st.sampled_from([*"\u00e9\u4e00\U0001f600".encode(), 0xC0, 0xFF])))
def test_a_stream_of_any_bytes_equals_decode(of_bytes: Tokenizer, ids: list[int]) -> None:
    stream = of_bytes.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == of_bytes.decode(ids)
    assert of_bytes.decode(ids) == bytes(ids).decode(errors="replace")


def test_a_stream_never_breaks_a_character(of_bytes: Tokenizer) -> None:
    stream = of_bytes.stream()
    assert [stream.push(byte) for byte in "\u00e9\U0001f600!".encode()] == ["", "\u00e9", "", "", "", "\U0001f600", "!"]
    assert stream.flush() == ""
    stream.push("\u00e9".encode()[0])
    assert stream.flush() == "\ufffd"


SPECIALS = {  # token: type; the ids follow the 256 bytes
    "<|bos|>": CONTROL,
    "<|im_end|>": NORMAL,  # ends a generation by its name, and is control for that
    "<tool>": USER_DEFINED,
    "<too": CONTROL,
    "[UNK]": UNKNOWN,
    "[PAD0]": UNUSED,
    "<0x41>": BYTE,
    "\u00f8": USER_DEFINED,  # as in DeepSeek-V2: what the byte alphabet calls 0xF8, which is in no UTF-8 text
    "l>": CONTROL,
}
BOS, IM_END, TOOL, TOO, UNK, PAD, BYTE_A, O_STROKE, L_GT = range(256, 265)


@pytest.fixture(scope="module")
def special(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """With merges and a pre-tokenizer that would make control and unused tokens of text, were they not kept apart."""
    tokens, types = [*BYTE_ALPHABET, *SPECIALS], [NORMAL] * 256 + [*SPECIALS.values()]
    merges = ["l >", "< t", "o o", "<t oo"]
    keys = {"pre": "llama-bpe", "bos_token_id": BOS, "add_bos_token": True}
    return Tokenizer.from_gguf(bpe_file(tmp_path_factory.mktemp("special"), tokens, merges, types, **keys))


def test_control_tokens_are_parsed_only_where_asked(special: Tokenizer) -> None:
    text = "a<|bos|>b<|im_end|>[UNK][PAD0]"
    plain = special.encode(text)
    assert plain == [BOS, *text.encode()]
    parsed = special.encode(text, parse_special=True)
    assert parsed == [BOS, ord("a"), BOS, ord("b"), IM_END, UNK, *b"[PAD0]"]
    assert special.decode(plain) == text
    assert special.decode(parsed) == "ab[PAD0]"
    assert special.decode(parsed[1:], skip_special=False) == text


def test_user_defined_tokens_are_always_cut_out(special: Tokenizer) -> None:
    for text, ids in (("x<tool>y", [ord("x"), TOOL, ord("y")]), ("\u00f8", [O_STROKE]), ("<tool><tool>", [TOOL] * 2)):
        assert special.encode(text, add_special=False) == ids
        assert special.decode(ids) == text


def test_the_longest_special_token_wins(special: Tokenizer) -> None:
    assert special.encode("<tool>", add_special=False, parse_special=True) == [TOOL]
    assert special.encode("<tool", add_special=False, parse_special=True) == [TOO, ord("l")]
    assert special.encode("<tool<tool>>", add_special=False, parse_special=True) == [TOO, ord("l"), TOOL, ord(">")]


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from([*SPECIALS, "<", "|", "bos", "|>", "\u2581", " ", "a"])).map("".join))
def test_no_text_makes_a_control_token_and_no_character_vanishes(special: Tokenizer, text: str) -> None:
    ids = special.encode(text, add_special=False)
    assert not any(special.is_control(i) or special.is_skipped(i) for i in ids)
    assert special.decode(ids) == text


def test_bos_and_eos_are_added_as_the_file_says(tmp_path: Path) -> None:
    def encode(**keys: int | bool) -> list[int]:
        return Tokenizer.from_gguf(bpe_file(tmp_path, **keys)).encode("a")

    a = ord("a")
    assert encode(bos_token_id=7, eos_token_id=8) == [a]
    assert encode(bos_token_id=7, eos_token_id=8, add_bos_token=True, add_eos_token=True) == [7, a, 8]
    assert encode(add_bos_token=True, add_eos_token=True) == [a]
    assert Tokenizer.from_gguf(bpe_file(tmp_path, pre="llama-bpe", bos_token_id=7)).encode("a") == [7, a]
    assert Tokenizer.from_gguf(bpe_file(tmp_path, bos_token_id=7, add_bos_token=True)).encode("") == [7]


def test_eog_ids_hold_the_ids_of_the_keys_and_the_spelled_ones(tmp_path: Path) -> None:
    tokens = [
        *BYTE_ALPHABET,
        "<|user|>",
        "<|end|>",
        "</s>",
        "<\uff5cend\u2581of\u2581sentence\uff5c>",
        "<|observation|>",
    ]
    file = bpe_file(tmp_path, tokens, eos_token_id=259, eot_token_id=256, eom_token_id=260)
    tokenizer = Tokenizer.from_gguf(file)
    assert tokenizer.eog_ids == {256, 257, 258, 259, 260}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (None, 259, 256)
    assert tokenizer.is_control(258) and not tokenizer.is_control(256)


def test_token_bytes_and_token_to_id(special: Tokenizer) -> None:
    assert special.n_vocab == 265
    assert special.token_bytes(0xF8) == b"\xf8" and special.token_bytes(O_STROKE) == "\u00f8".encode()
    assert special.token_bytes(BYTE_A) == b"A" and special.token_bytes(BOS) == b"<|bos|>"
    assert special.token_to_id("<tool>") == TOOL and special.token_to_id("nothing") is None


def test_strange_tokens_are_kept_apart(tmp_path: Path) -> None:
    """Equal, empty, not UTF-8, outside the byte alphabet: no text becomes one of them, but each has its bytes."""
    tokens = [*BYTE_ALPHABET, "", "", b"\xff\xfe", "<|x y|>", "ab", "ab"]
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, tokens, ["a b"]))
    assert [tokenizer.token_bytes(i) for i in range(256, 262)] == [b"", b"", b"\xff\xfe", b"<|x y|>", b"ab", b"ab"]
    assert tokenizer.decode([258, 97]) == "\ufffd\ufffda"
    assert tokenizer.encode("ab") in ([260], [261])
    assert tokenizer.encode("<|x y|>") == [*b"<|x y|>"]


def test_a_byte_without_token_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, [*BYTE_ALPHABET.replace("z", "")]))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    with pytest.raises(EngineError, match="'z'.*no token for byte 0x7A"):
        tokenizer.encode("abcz")


def test_a_lone_surrogate_is_an_error(of_bytes: Tokenizer) -> None:
    with pytest.raises(EngineError, match="lone surrogate at character 2"):
        of_bytes.encode("ab\ud800")


@pytest.mark.parametrize("token", [-1, 256])
def test_an_id_outside_the_vocabulary_is_an_error(of_bytes: Tokenizer, token: int) -> None:
    for use in (of_bytes.token_bytes, of_bytes.is_control, lambda i: of_bytes.decode([i]), of_bytes.stream().push):
        with pytest.raises(EngineError, match=rf"token id {token} is not in the vocabulary, expected 0 to 255"):
            use(token)


def test_an_unknown_pretokenizer_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"pre-tokenizer 'viking' .* supported: deepseek-llm, .*youtu"):
        Tokenizer.from_gguf(bpe_file(tmp_path, pre="viking"))


def test_a_missing_pretokenizer_is_warned_of(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre' is missing"):
        Tokenizer.from_gguf(bpe_file(tmp_path, pre=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": []}, "tokens' is empty"),
        ({"merges": None}, "merges' is missing.*convert the model again"),
        ({"merges": ["ab"]}, "merge 'ab': expected two tokens"),
        ({"types": [1] * 255}, "token_type' has 255 values, expected one for each of 256"),
        ({"types": [1] * 255 + [7]}, "token_type' holds other values than the integers 1 to 6"),
        ({"types": [1] * 255 + [0]}, "token_type' holds other values"),
        ({"bos_token_id": 256}, "bos_token_id' is 256, expected a token id from 0 to 255"),
        ({"eos_token_id": 2**32 - 1}, "eos_token_id' is 4294967295"),
        ({"eot_token_id": "x"}, "eot_token_id' has type string, expected an integer"),
        ({"add_bos_token": 1}, "add_bos_token' has type u32, expected a bool"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"tokenizer\.gguf: .*{message}"):
        Tokenizer.from_gguf(bpe_file(tmp_path, **change))


def test_an_unknown_tokenizer_model_is_refused_by_name(tmp_path: Path) -> None:
    file = bpe_file(tmp_path)
    file.metadata["tokenizer.ggml.model"] = "rwkv"
    with pytest.raises(UnsupportedModelError, match="tokenizer model 'rwkv' is not supported; supported: gpt2, llama"):
        Tokenizer.from_gguf(file)


def test_threads_share_a_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(bpe_file(tmp_path, *trained_bpe(), pre="deepseek-v3"))
    texts = TEXTS + random_texts()
    expected = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: [tokenizer.encode(text) for text in texts], range(8)):
            assert found == expected


def test_import_of_the_module_leaves_the_library_out() -> None:
    code = "import engine.tokenizer, sys; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
