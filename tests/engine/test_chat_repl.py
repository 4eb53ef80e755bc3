"""The chat's commands, its screen, and how it reads: over a stream that says what it was told to."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_streams import FakeStream, chat_tokenizer

from engine.chat import BUILTIN, ChatTemplate, repl_input
from engine.chat.conversation import Conversation
from engine.chat.repl import COMMANDS, HELP, Repl, Screen
from engine.console import Counter
from engine.errors import EngineError
from engine.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return chat_tokenizer(tmp_path_factory.mktemp("chat"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def chat(tokenizer: Tokenizer, lines: list[Any], answers: list[Any], **options: Any) -> tuple[str, Conversation]:
    """What is written to stdout; lines may hold exceptions, which the reader raises."""
    out = options.pop("out", None) or Terminal()
    stream: Any = FakeStream(tokenizer, answers)
    conversation = Conversation(stream, ChatTemplate(BUILTIN["plain"], tokenizer))
    waiting: Iterator[Any] = iter(lines)

    def read() -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    screen = Screen(out, options.pop("hide_thinking", False))
    Repl(conversation, read, screen, options.pop("interactive", True), **options).run()
    return out.getvalue(), conversation


def test_answers_are_printed_each_with_its_newline(bpe: Tokenizer) -> None:
    out, conversation = chat(bpe, ["a", "", "  ", "b"], ["Hello", "Bye\n"])
    assert out == "Hello\nBye\n"
    assert [m["content"] for m in conversation.messages] == ["a", "Hello", "b", "Bye\n"]


def test_an_empty_answer_is_an_empty_line(bpe: Tokenizer) -> None:
    assert chat(bpe, ["a", "b"], ["", "x"], out=io.StringIO())[0] == "\nx\n"


def test_thinking_is_dim_on_a_terminal(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out, _ = chat(bpe, ["a"], ["<think>hm</think>\n\nyes"])
    assert out.replace("\x1b[0m\x1b[2m", "") == "\x1b[2mhm\x1b[0m\n\nyes\n"


@pytest.mark.parametrize("end", [KeyboardInterrupt(), EngineError("too long")])
def test_the_bar_of_a_prompt_is_gone_before_the_cursor_moves(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, end: BaseException
) -> None:
    """It is taken away from where the cursor is."""
    out = Terminal()
    stop = Counter.stop
    monkeypatch.setattr(Counter, "stop", lambda self: (out.write("[gone]"), stop(self)))
    chat(bpe, ["a"], [[end]], out=out)
    assert out.getvalue().startswith("[gone]")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_there_are_no_colours_for_who_wants_none(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert chat(bpe, ["a"], ["<think>hm</think>yes"])[0] == "hm\n\nyes\n"
    assert chat(bpe, ["a"], ["<think>hm</think>yes"], out=io.StringIO())[0] == "hm\n\nyes\n"


def test_thinking_can_be_hidden(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    answer = "<think>hm hm hm</think>yes"
    assert chat(bpe, ["a"], [answer], hide_thinking=True)[0] == "(thinking …) yes\n"
    assert chat(bpe, ["a"], [answer], hide_thinking=True, out=io.StringIO())[0] == "yes\n"
    assert chat(bpe, ["/think", "a", "/think", "b"], [answer] * 2)[0] == "(thinking …) yes\nhm hm hm\n\nyes\n"


def test_a_model_cannot_steer_the_terminal(bpe: Tokenizer) -> None:
    assert chat(bpe, ["a"], ["x\x1b[2Jy"])[0] == "x\\x1b[2Jy\n"
    assert chat(bpe, ["a"], ["x\x1b[2Jy"], out=io.StringIO())[0] == "x\x1b[2Jy\n"


def test_ctrl_c_stops_the_answer_and_not_the_program(bpe: Tokenizer) -> None:
    out, conversation = chat(bpe, ["a", "b"], [["Hel", KeyboardInterrupt()], "Bye"])
    assert out == "Hel\nBye\n"
    assert [m["content"] for m in conversation.messages] == ["a", "Hel", "b", "Bye"]


def test_a_second_ctrl_c_where_nothing_is_typed_leaves(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [KeyboardInterrupt(), "a", KeyboardInterrupt(), KeyboardInterrupt(), "b"]
    assert chat(bpe, lines, ["x", "y"])[0] == "x\n"
    assert capsys.readouterr().err == "(Ctrl-C again, Ctrl-D or /exit leaves)\n" * 2


def test_from_a_pipe_ctrl_c_and_errors_end_the_program(bpe: Tokenizer) -> None:
    with pytest.raises(KeyboardInterrupt):
        chat(bpe, ["a"], [["Hel", KeyboardInterrupt()]], interactive=False)
    with pytest.raises(EngineError, match="there is no command /nothing"):
        chat(bpe, ["/nothing"], [], interactive=False)


def test_errors_are_told_and_the_chat_goes_on(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = chat(bpe, ["/nothing", "a", "b", "c"], [[EngineError("no\x1b")], "x", ["y", EngineError("no")]])
    assert out == "x\ny\n"
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first.startswith("Error: there is no command /nothing; /help tells which there are")
    assert second == "Error: no\\x1b"


def test_ctrl_c_stops_a_command(
    bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Conversation, path: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Conversation, "save", interrupted)
    assert chat(bpe, ["/save x", "a"], ["y"])[0] == "y\n"
    assert capsys.readouterr().err == "(stopped)\n"


def test_two_slashes_begin_a_text_with_one(bpe: Tokenizer) -> None:
    _, conversation = chat(bpe, ["//exit"], ["x"])
    assert conversation.messages[0]["content"] == "/exit"


@pytest.mark.parametrize("name", ["/exit", "/quit", "/bye", "/exit now"])
def test_leaving(bpe: Tokenizer, name: str) -> None:
    assert chat(bpe, [name, "a"], ["x"])[0] == ""


def test_help_tells_every_command(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    chat(bpe, ["/help"], [])
    told = capsys.readouterr().err
    assert all(name in told and text in told for name, text in HELP.items())
    done = Repl(Conversation(FakeStream(bpe), None), input, Screen(Terminal()), True)  # type: ignore[arg-type]
    assert {*done._commands, "/exit"} == set(COMMANDS)


def test_commands_change_the_conversation(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["/undo", "/system", "/system Be brief.", "/system", "a", "b", "/undo", "/stats", "/reset", "/stats"]
    _, conversation = chat(bpe, lines, ["x", "y"])
    assert conversation.system == "Be brief." and conversation.messages == []
    told = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert told[:4] == ["(nothing to take back)", "(no instructions)", "(the next answer follows it)", "Be brief."]
    assert told[4] == "(took back: b)"
    assert told[5] == "conversation  1 exchange, 0 forgotten"
    assert re.fullmatch(r"K-cache       \d+ of 4,096 tokens, \d+\.0 KiB \(f16\)", told[8])
    assert told[-1].startswith("K-cache       0 of 4,096 tokens")


def test_a_session_that_cannot_be_kept_is_not_lost(
    bpe: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost, other = tmp_path / "nowhere" / "talk", tmp_path / "other"
    lines = ["a", EOFError(), f"/save {other}"]
    chat(bpe, lines, ["x"], session=str(lost))
    assert other.read_text() == "a session"
    told = capsys.readouterr().err
    assert told.count("Error: ") == 1 and "/save FILE keeps the conversation elsewhere" in told
    with pytest.raises(EngineError):
        chat(bpe, ["a"], ["x"], session=str(lost), interactive=False)


def test_a_session_is_kept_at_the_end_even_after_an_error(bpe: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "talk"
    with pytest.raises(EngineError):
        chat(bpe, ["a", "/nothing"], ["x"], session=str(path), interactive=False)
    assert path.read_text() == "a session"
    other = tmp_path / "other"
    chat(bpe, ["a", f"/save {other}", "/load", f"/load {other}"], ["x"], session=str(path))
    assert other.exists()
    unused = tmp_path / "unused"
    chat(bpe, [], [], session=str(unused))
    assert not unused.exists()


def test_saving_needs_a_file(bpe: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    chat(bpe, ["/save"], [])
    assert capsys.readouterr().err == "Error: no file; say /save FILE\n"


def test_the_toolbar_tells_how_full_the_context_is(bpe: Tokenizer) -> None:
    stream: Any = FakeStream(bpe, n_ctx=1000)
    told = Repl(Conversation(stream, None), input, Screen(Terminal()), True)  # type: ignore[arg-type]
    assert told.toolbar() == "░░░░░░░░░░ 0 / 1,000 tokens"
    stream.tokens = [1] * 500
    stream.stats.n_generated, stream.stats.t_generated = 11, 0.5
    told.conversation.n_forgotten = 4
    assert told.toolbar() == "█████░░░░░ 500 / 1,000 tokens │ 20.0 t/s │ 2 exchanges forgotten"


# ----------------------------------------------------------------------------------------------------------- reading


def reader(monkeypatch: pytest.MonkeyPatch, content: bytes) -> Any:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    return repl_input.pipe()


def all_of(read: Any) -> list[str]:
    found = []
    while True:
        try:
            found.append(read())
        except EOFError:
            return found


def test_each_line_of_a_pipe_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all_of(reader(monkeypatch, "Öne\r\n\ntwo".encode())) == ["Öne", "", "two"]


def test_three_quotes_hold_a_text_of_many_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    read = reader(monkeypatch, b'"""one"""\n"""\na\n\nb\n"""\n"""/x\ny"""\nz\n"""open\n')
    assert all_of(read) == ["one", "a\n\nb", "//x\ny", "z"]


def test_a_pipe_which_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match=r"standard input is not UTF-8 \(at byte 1 of a line\)"):
        reader(monkeypatch, b"a\xff\n")()


def test_commands_and_files_are_completed(tmp_path: Path) -> None:
    def made(before: str) -> list[tuple[str, int]]:
        return list(repl_input._completions(before, lambda text, start_position: (text, start_position)))

    (tmp_path / "talk.konly").touch()
    (tmp_path / "talks").mkdir()
    assert made("/s") == [("/system", -2), ("/stats", -2), ("/save", -2)]
    assert made("s") == made("say /s") == []
    assert made(f"/load {tmp_path}/ta") == [("talk.konly", -2), ("talks/", -2)]
    assert made("/load /nowhere/x") == []


def test_history_is_kept_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if sys.platform == "win32":
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = repl_input.history_path()
    assert path == tmp_path / "konly" / "chat_history"
    assert repl_input._writable(path) == path and path.exists()
    if sys.platform != "win32":
        assert path.stat().st_mode & 0o777 == 0o600
    assert repl_input._writable(path / "below a file") is None


def test_without_prompt_toolkit_input_is_plain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setattr("builtins.input", lambda prompt: prompt + "typed")
    assert repl_input.terminal(lambda: "")() == "> typed"
    assert capsys.readouterr().err.startswith("Note: pip install 'konly[chat]'")


def test_prompt_toolkit_reads_edits_and_is_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    application = pytest.importorskip("prompt_toolkit.application")
    inputs, output = pytest.importorskip("prompt_toolkit.input"), pytest.importorskip("prompt_toolkit.output")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with (
        inputs.create_pipe_input() as typed,
        application.create_app_session(input=typed, output=output.DummyOutput()),
    ):
        read = repl_input.terminal(lambda: "toolbar")
        typed.send_text("one\x1b\rtwo\r")  # Alt-Enter
        assert read() == "one\ntwo"
        typed.send_text('"""a\rb"""\r')  # Enter within quotes
        assert read() == "a\nb"
        typed.send_text("thrown away\x03kept\r")  # Ctrl-C
        assert read() == "kept"
        typed.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        typed.send_text("\x04")  # Ctrl-D
        with pytest.raises(EOFError):
            read()
    if sys.platform != "win32":
        assert "one" in (tmp_path / "konly" / "chat_history").read_text()
