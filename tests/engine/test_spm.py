"""SentencePiece-BPE against the plain statement of its rule, and its spaces, bytes and unused tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import TEXTS, spm_file, spm_vocab

from engine.errors import EngineError, ModelFormatError
from engine.tokenizer.tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Tokenizer


@pytest.fixture(scope="module")
def vocab() -> tuple[list[str], list[float], list[int]]:
    return spm_vocab()


@pytest.fixture(scope="module")
def tokenizer(vocab: tuple, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_gguf(spm_file(tmp_path_factory.mktemp("spm"), *vocab))


def naive_spm(text: str, scores: dict[str, float], ids: dict[str, int]) -> list[int]:
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [a + b for a, b in zip(symbols, symbols[1:])]
        known = [(-scores[pair], i) for i, pair in enumerate(pairs) if pair in scores]
        if not known:
            break
        i = min(known)[1]
        symbols[i : i + 2] = [pairs[i]]
    return [
        token for s in symbols for token in ([ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()])
    ]


def test_the_best_score_is_merged_first_and_ties_go_left(vocab: tuple, tokenizer: Tokenizer) -> None:
    tokens, scores, types = vocab
    normal = [i for i, kind in enumerate(types) if kind == NORMAL]
    score_of, ids = {tokens[i]: scores[i] for i in normal}, {token: i for i, token in enumerate(tokens)}
    assert len(set(score_of.values())) < len(score_of) / 3  # ties
    rng = random.Random(3)
    chars = sorted(set("".join(TEXTS)))
    for text in TEXTS + ["".join(rng.choices(chars, k=20)) for _ in range(100)]:
        expected = naive_spm(" " + text, score_of, ids) if text else []
        assert tokenizer.encode(text, add_special=False) == expected


@settings(max_examples=200, derandomize=True, deadline=None, database=None)
@given(st.text() | st.text(st.sampled_from(" aA\n.\u00e9\u4e00\U0001f600<>"), max_size=12))
def test_decode_gives_back_any_text(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\u2581", "")  # which stands for a space, and comes back as one
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def _small(folder: Path, more: dict[str, tuple[float, int]], **keys: bool | int) -> Tokenizer:
    tokens = {"<unk>": (0.0, UNKNOWN), "<s>": (0.0, CONTROL), "</s>": (0.0, CONTROL)}
    tokens |= dict.fromkeys("▁abcd", (-9.0, NORMAL)) | more
    scores, types = zip(*tokens.values())
    return Tokenizer.from_gguf(spm_file(folder, [*tokens], scores, types, **keys))


def test_a_space_is_put_before_every_fragment_and_taken_from_the_start(tmp_path: Path) -> None:
    tokenizer = _small(tmp_path, {})
    unk, bos, eos, space, a, b, *_ = range(tokenizer.n_vocab)
    assert tokenizer.encode("a</s>b", parse_special=True) == [bos, space, a, eos, space, b]
    assert tokenizer.decode([bos, space, a, b]) == "ab"
    assert tokenizer.decode([bos, space, space, a]) == " a"
    assert tokenizer.decode([space, a, b], at_start=False) == " ab"
    stream = tokenizer.stream(at_start=False)
    assert [stream.push(space), stream.push(a)] == [" ", "a"]
    assert tokenizer.encode("") == [bos]


def test_no_space_is_put_where_the_file_says_so(tmp_path: Path) -> None:
    tokenizer = _small(tmp_path, {}, add_space_prefix=False, add_bos_token=False, add_eos_token=True)
    assert tokenizer.encode("a") == [4, 2]
    assert tokenizer.decode([3, 4]) == " a"


def test_defaults_of_a_file_without_the_keys(tmp_path: Path) -> None:
    tokenizer = _small(tmp_path, {})
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id) == (1, 2, None)
    assert (tokenizer.add_bos, tokenizer.add_eos, tokenizer.eog_ids) == (True, False, {2})


def test_control_tokens_are_parsed_only_where_asked(tmp_path: Path) -> None:
    spelled = dict.fromkeys("<s>/", (-9.0, NORMAL)) | {"<s": (-1.0, NORMAL)}
    tokenizer = _small(tmp_path, spelled, add_space_prefix=False)
    ids = tokenizer.encode("a<s>b", add_special=False)
    assert tokenizer.decode(ids) == "a<s>b" and not any(map(tokenizer.is_control, ids))
    assert tokenizer.encode("a<s>b", add_special=False, parse_special=True) == [4, 1, 5]


def test_user_defined_tokens_are_always_cut_out(tmp_path: Path) -> None:
    tokenizer = _small(tmp_path, {"b c": (0.0, USER_DEFINED)}, add_space_prefix=False)
    assert tokenizer.encode("ab cd", add_special=False) == [4, 8, 7]
    assert tokenizer.decode([4, 8, 7]) == "ab cd"


def test_unused_tokens_are_merged_through_but_not_emitted(tmp_path: Path) -> None:
    more = {"ab": (-1.0, UNUSED), "abc": (-2.0, NORMAL), "cd": (-3.0, NORMAL)}
    tokenizer = _small(tmp_path, more, add_space_prefix=False)
    a, b, ab, abc = (tokenizer.token_to_id(token) for token in ("a", "b", "ab", "abc"))
    assert tokenizer.encode("abc", add_special=False) == [abc]
    assert tokenizer.encode("ab", add_special=False) == [a, b]
    assert tokenizer.decode([ab, a]) == "a"


def test_characters_without_token_become_bytes_or_unknown(tmp_path: Path) -> None:
    of_bytes = {f"<0x{byte:02X}>": (0.0, BYTE) for byte in "\u00e9".encode()}
    tokenizer = _small(tmp_path, of_bytes, add_space_prefix=False)
    assert tokenizer.encode("a\u00e9\u4e00", add_special=False) == [4, 8, 9, 0]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in (4, 8, 9)] == ["a", "", "\u00e9"]


def test_a_character_without_token_bytes_and_unknown_is_an_error(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_gguf(
        spm_file(tmp_path, ["a", "b"], [0.0, 0.0], [NORMAL, NORMAL], add_space_prefix=False)
    )
    with pytest.raises(EngineError, match="'z', for which this model's vocabulary has neither token nor bytes"):
        tokenizer.encode("z")


@pytest.mark.parametrize(("scores", "message"), [([0.0] * 2, "has 2 values"), ([0.0, float("nan"), 0.0], "not finite")])
def test_wrong_scores_are_refused(tmp_path: Path, scores: list[float], message: str) -> None:
    with pytest.raises(ModelFormatError, match=rf"tokenizer\.ggml\.scores' .*{message}"):
        Tokenizer.from_gguf(spm_file(tmp_path, ["<unk>", "<s>", "</s>"], scores, [2, 3, 3]))


def test_a_long_text_takes_no_quadratic_time(tokenizer: Tokenizer) -> None:
    text = "the little girl said " * 5000
    assert tokenizer.decode(tokenizer.encode(text)) == text
