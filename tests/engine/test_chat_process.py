"""`konly chat` in a process of its own, with the real engine: over pipes, in a terminal, and with a session file."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import write_model

from engine import Engine
from engine.chat import ChatTemplate

COMMAND = [sys.executable, "-P", "-c", "from engine.cli import main; main(prog_name='konly')", "chat"]
QUICK = ("-n", "12", "--temp", "0")


def konly(*arguments: str, stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], input=stdin, capture_output=True, encoding="utf-8", timeout=120)


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What the default model says to two messages."""
    engine = Engine()
    template = engine.model.template
    assert isinstance(template, ChatTemplate)
    messages = [{"role": "user", "content": "Once upon a time"}]
    first = "".join(engine.generate(template.tokens(messages), max_tokens=12, temperature=0))
    ids = engine.tokens[len(template.tokens(messages)) :]
    ids += engine.tokenize(first, add_special=False)[len(ids) :]
    messages += [{"role": "assistant", "content": first, "tokens": ids}, {"role": "user", "content": "And then?"}]
    second = "".join(engine.generate(template.tokens(messages), max_tokens=12, temperature=0))
    engine.close()
    return [first, second]


def test_over_pipes_each_line_gets_an_answer(answers: list[str]) -> None:
    done = konly(*QUICK, stdin="Once upon a time\nAnd then?\n")
    assert done.stdout == "".join(answer.removesuffix("\n") + "\n" for answer in answers)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_conversation_goes_on_in_another_process(answers: list[str], tmp_path: Path) -> None:
    session = ("--session", str(tmp_path / "talk"))
    assert konly(*QUICK, *session, stdin="Once upon a time\n").returncode == 0
    done = konly(*QUICK, *session, stdin="And then?\n/stats\n")
    assert done.stdout == answers[1].removesuffix("\n") + "\n"
    welcome, exchanges, prompt, *_ = done.stderr.splitlines()
    held = re.fullmatch(r"\(going on with 1 exchange, (\d+) tokens in the K-cache\)", welcome)
    assert held is not None
    assert exchanges.split() == ["conversation", "2", "exchanges,", "0", "forgotten"]
    assert f" {held[1]} were there, " in prompt


def test_a_session_that_could_not_be_kept_is_refused_before_a_word_is_said(tmp_path: Path) -> None:
    done = konly(*QUICK, "--session", str(tmp_path / "nowhere" / "talk"), stdin="Once upon a time\n")
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{tmp_path / 'nowhere'} is missing, or no folder that you may write to" in done.stderr


def test_a_model_without_a_template_needs_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "base.gguf", q_lora_rank=64)
    done = konly(str(path), stdin="x\n")
    assert done.returncode == 1
    assert done.stderr == (
        f"Error: {path}: has no chat template: it may be a base model, for `konly run`; "
        "else give its template by --chat-template FILE, or 'plain' to go on with what you type\n"
    )
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}{{ raise_exception('no\x1b') }}")
    done = konly(str(path), "--chat-template", str(template), stdin="x\n")
    assert (done.returncode, done.stderr) == (1, "Error: the chat template failed: no\\x1b\n")
    assert konly(str(path), "--chat-template", "plain", *QUICK, stdin="x\n").returncode == 0


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_in_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    import pty

    main, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "dumb", "XDG_STATE_HOME": str(tmp_path)}
    process = subprocess.Popen(
        [*COMMAND, "-c", "100000", "--ignore-eos"], stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
        start_new_session=True, preexec_fn=lambda: _controlled_by(0),
    )  # fmt: skip
    os.close(terminal)
    try:
        shown = _read_until(main, "\n> ")
        assert "/help tells the commands" in shown
        os.write(main, b"Once upon a time\n")
        _read_until(main, "\n", "\n", "\n")
        os.write(main, b"\x03")
        _read_until(main, "> ")  # after a line's end, or after ^C if no text has come yet
        os.write(main, b"/stats\n")
        assert "conversation  1 exchange," in _read_until(main, "K-cache", "\n> ")
        os.write(main, b"\x04")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def _controlled_by(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def _read_until(main: int, *texts: str) -> str:
    """What the terminal shows up to these, one after the other."""
    import select

    shown, at, deadline = "", 0, time.monotonic() + 60
    for text in texts:
        while (found := shown.find(text, at)) < 0:
            ready = select.select([main], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"{text!r} did not come; there is {shown!r}"
            shown = (shown + os.read(main, 4096).decode("utf-8", "replace")).replace("\r", "")
        at = found + len(text)
    return shown
