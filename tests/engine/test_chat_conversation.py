"""Conversations: what becomes of answers, thinking and old exchanges in the next prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_streams import FakeStream, chat_tokenizer

from engine import Engine, Sampling
from engine.chat import BUILTIN, ChatTemplate
from engine.chat.conversation import Conversation, Piece, ThinkSplitter
from engine.errors import ContextFullError, SessionError
from engine.tokenizer.tokenizer import CONTROL, USER_DEFINED, Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
CHATML = (FOLDER / "MiniCPM3-4B.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=[USER_DEFINED, CONTROL], ids=["think is text", "think is control"])
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"), request.param)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


def talk(tokenizer: Tokenizer, *answers: Any, source: str = CHATML, **options: Any) -> Conversation:
    n_ctx = options.pop("n_ctx", 4096)
    return Conversation(FakeStream(tokenizer, answers, n_ctx), ChatTemplate(source, tokenizer), **options)  # type: ignore[arg-type]


def said(pieces: Any) -> tuple[str, str]:
    """(answer, thinking)"""
    found = list(pieces)
    assert all(isinstance(piece, Piece) and piece.text for piece in found)
    return "".join(p.text for p in found if not p.thinking), "".join(p.text for p in found if p.thinking)


def prompt(conversation: Conversation, i: int = -1) -> str:
    stream: Any = conversation.stream
    return str(stream.tokenizer.decode(stream.prompts[i][1:], skip_special=False))


def test_the_next_prompt_begins_with_what_the_cache_holds(bpe: Tokenizer) -> None:
    conversation = talk(bpe, ["Hel", "lo"], "Bye")  # tokens that a tokenizer would not make of "Hello"
    stream: Any = conversation.stream
    assert said(conversation.answer("Hi")) == ("Hello", "")
    held = list(stream.tokens)
    assert said(conversation.answer("And?")) == ("Bye", "")
    assert stream.prompts[1][: len(held)] == held
    assert prompt(conversation) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_real_engine_computes_only_what_is_new() -> None:
    engine = Engine(n_ctx=256)
    conversation = Conversation(engine, ChatTemplate(BUILTIN["plain"], engine.tokenizer), max_tokens=20)
    said(conversation.answer("Once upon a time there was a cat named"))
    held = engine.tokens
    said(conversation.answer("Then the dog"))
    assert engine.stats.n_reused == len(held)
    assert engine.tokens[: len(held)] == held
    engine.close()


def test_the_real_engine_goes_on_when_the_context_is_full() -> None:
    engine = Engine(n_ctx=160)
    sampling = Sampling(seed=1, ignore_eos=True)
    conversation = Conversation(engine, ChatTemplate(BUILTIN["plain"], engine.tokenizer), sampling, max_tokens=30)
    for i in range(8):
        said(conversation.answer(f"And then {i} cats came"))
        assert engine.n_kv <= 160
    assert 0 < conversation.n_forgotten < len(conversation.messages) == 16
    assert engine.first_position > 0 and engine.stats.n_reused > engine.stats.n_prompt // 2
    said(conversation.answer("x " * 70))  # alone with its answer in the cache, which has to forget as it goes
    assert engine.stats.n_generated == 30
    engine.close()


@pytest.mark.parametrize("opened", ["<think>", ""])
def test_thinking_is_told_apart_and_is_not_in_the_next_prompt(thinker: Tokenizer, opened: str) -> None:
    source = "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}" + opened
    begin = "" if opened else "<think>"
    conversation = talk(thinker, begin + "Let me\nsee</think>\n\nIt is 4.", "Yes", source=source)
    assert said(conversation.answer("2+2?")) == ("It is 4.", "Let me\nsee")
    message = conversation.messages[-1]
    assert message["reasoning_content"] == "Let me\nsee"
    assert thinker.decode(message["tokens"], at_start=False) == message["content"] == "It is 4."
    said(conversation.answer("Sure?"))
    assert prompt(conversation) == (
        "<|im_start|>user 2+2?<|im_start|>assistant It is 4.<|im_start|>user Sure?" + opened
    )


def test_an_answer_that_ends_while_thinking_is_not_kept(bpe: Tokenizer) -> None:
    conversation = talk(bpe, "<think>hm", "x")
    assert said(conversation.answer("a")) == ("", "hm")
    assert conversation.messages == []
    said(conversation.answer("b"))
    assert "a" not in prompt(conversation).replace("assistant", "").replace("start", "")


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(bpe: Tokenizer) -> None:
    conversation = talk(bpe, ["Hello", KeyboardInterrupt()], "x")
    pieces = conversation.answer("a")
    with pytest.raises(KeyboardInterrupt):
        list(pieces)
    assert [m["content"] for m in conversation.messages] == ["a", "Hello"]
    pieces = conversation.answer("b")
    next(pieces)
    pieces.close()
    assert len(conversation.messages) == 4


def test_system_comes_first_and_is_what_a_shift_keeps(bpe: Tokenizer) -> None:
    conversation = talk(bpe, "x", system="Be brief.", max_tokens=7)
    said(conversation.answer("1 a"))
    assert prompt(conversation).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 a")
    arguments = conversation.stream.arguments  # type: ignore[attr-defined]
    assert arguments["context_shift"] is True and arguments["max_tokens"] == 7
    kept = bpe.decode(conversation.stream.prompts[0][1 : arguments["n_keep"]], skip_special=False)  # type: ignore[attr-defined]
    assert kept == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"


def test_the_oldest_exchanges_are_forgotten_and_their_rows_shifted_out(bpe: Tokenizer) -> None:
    long = "".join(f"word{i} " for i in range(30))
    conversation = talk(bpe, *[long] * 8, n_ctx=600, system="Be brief.")
    stream: Any = conversation.stream
    for i in range(6):
        said(conversation.answer(f"question {i}"))
        assert len(stream.prompts[-1]) <= 450
    assert conversation.n_forgotten > 0 and stream.shifts
    assert len(conversation.messages) == 12
    assert prompt(conversation).startswith("<|im_start|>system\nBe brief.")
    assert "question 0" not in prompt(conversation) and "question 5" in prompt(conversation)
    assert stream.stats.n_reused > len(stream.prompts[-1]) - 40  # what was left of the cache was not computed again


def test_a_message_that_is_too_long_leaves_everything_as_it_was(bpe: Tokenizer) -> None:
    conversation = talk(bpe, "x", n_ctx=100)
    said(conversation.answer("a"))
    with pytest.raises(ContextFullError, match=r"a message of \d+ tokens does not fit n_ctx=100; raise n_ctx"):
        conversation.answer("1 2 " * 200).send(None)
    assert len(conversation.messages) == 2 and conversation.n_forgotten == 0


def test_undo_and_reset(bpe: Tokenizer) -> None:
    conversation = talk(bpe, "x", "y", "z")
    said(conversation.answer("a"))
    said(conversation.answer("b"))
    assert conversation.undo() == "b"
    said(conversation.answer("c"))
    assert [m["content"] for m in conversation.messages] == ["a", "x", "c", "z"]
    conversation.reset()
    assert conversation.messages == [] and conversation.undo() is None and conversation.stream.tokens == []


def test_a_conversation_goes_on_from_a_file(bpe: Tokenizer, tmp_path: Path) -> None:
    first = talk(bpe, ["Hel", "lo"], system="Be brief.")
    said(first.answer("Hi"))
    first.save(tmp_path / "talk")
    second = talk(bpe, "y")
    second.stream.saved = first.stream.saved  # type: ignore[attr-defined]
    second.load(tmp_path / "talk")
    assert (second.messages, second.system) == (first.messages, "Be brief.")


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"chat": 3},
        {"chat": {"messages": [], "system": None}},
        {"chat": {"messages": [{"role": "user", "content": "x"}], "system": None, "n_forgotten": 0}},
        {"chat": {"messages": [], "system": 3, "n_forgotten": 0}},
        {"chat": {"messages": [], "system": None, "n_forgotten": 2}},
        {"chat": {"messages": "x", "system": None, "n_forgotten": 0}},
    ],
)
def test_a_session_of_something_else_is_refused(bpe: Tokenizer, extra: dict[str, Any]) -> None:
    conversation = talk(bpe)
    conversation.stream.saved = extra  # type: ignore[attr-defined]
    with pytest.raises(SessionError, match="talk: is not a conversation that `konly chat` saved"):
        conversation.load("talk")


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("Hello <think> x", False, ("Hello <think> x", "")),
        ("<think>a<b</th</think>c</think>", False, ("c</think>", "a<b</th")),
        (" \n<think>a</think>b", False, ("b", "a")),
        ("a</think>b", True, ("b", "a")),
        ("<thin", False, ("<thin", "")),
        ("  ", False, ("  ", "")),
        ("a</thi", True, ("", "a</thi")),
        ("", True, ("", "")),
    ],
)
def test_tags_are_found_however_the_text_is_cut(text: str, begun: bool, expected: tuple[str, str], size: int) -> None:
    split = ThinkSplitter(begun)
    found = [one for i in range(0, len(text), size) for one in split.push(text[i : i + size])] + list(split.flush())
    assert "".join(t for thinking, t in found if not thinking) == expected[0]
    assert "".join(t for thinking, t in found if thinking) == expected[1]
