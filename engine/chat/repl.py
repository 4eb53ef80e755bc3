"""The chat in a terminal, or over pipes: reads lines, does commands, prints answers as they come.

    reader (repl_input.py) ─► line ─► /command, or a question ─► Conversation.answer ─► pieces ─► screen

Ctrl-C stops an answer, not the program. Answers go to stdout, everything about them to stderr.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Protocol

from ..console import CompileProgress, Counter, note, printable, rate, size
from ..errors import EngineError
from .conversation import Conversation, Piece

HELP = {
    "/help": "this list",
    "/system TEXT": "give the model other instructions; without TEXT: tell them",
    "/undo": "take the last question and its answer back",
    "/reset": "begin a new conversation with the same instructions",
    "/think": "hide thinking, or show it again",
    "/stats": "tokens, speed and memory",
    "/save FILE": "keep the conversation, with its K-cache",
    "/load FILE": "go on with one that was kept",
    "/exit": "leave; so does Ctrl-D",
}
COMMANDS = tuple(line.split()[0] for line in HELP)
ALIASES = {"/quit": "/exit", "/bye": "/exit", "/clear": "/reset", "/?": "/help"}


class Reader(Protocol):
    def __call__(self) -> str:
        """The next message or command. EOFError at the end, KeyboardInterrupt for Ctrl-C where nothing was typed."""


class Screen:
    """Where answers go. On a terminal, thinking is dim, and nothing that a model says steers the terminal."""

    def __init__(self, out: IO[str] | None = None, hide_thinking: bool = False) -> None:
        self._out = out or sys.stdout
        self.terminal = self._out.isatty()
        self.hide_thinking = hide_thinking
        self._colours = self.terminal and colours()
        self._thinking, self._line_ends, self._blank = False, True, True

    def show(self, piece: Piece) -> None:
        if piece.thinking and self.hide_thinking:
            if not self._thinking and self.terminal:
                self._write("(thinking …) ", dim=True)
        else:
            if self._thinking and not piece.thinking and not self.hide_thinking:
                self._write("\n\n" if not self._line_ends else "\n")
            self._write(piece.text, dim=piece.thinking)
        self._thinking = piece.thinking

    def end(self, failed: bool = False) -> None:
        """The answer is over: the cursor goes to the next line."""
        if not self._line_ends or (self._blank and not failed):
            self._write("\n")
        self._thinking, self._line_ends, self._blank = False, True, True

    def _write(self, text: str, dim: bool = False) -> None:
        shown = printable(text, keep="\n\t") if self.terminal else text
        self._out.write(f"\x1b[2m{shown}\x1b[0m" if dim and self._colours else shown)
        self._out.flush()
        self._line_ends, self._blank = text.endswith("\n"), False


def colours() -> bool:
    """Whether this user wants any: https://no-color.org"""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Repl:
    """session: a file that the conversation is kept in at the end."""

    def __init__(
        self, conversation: Conversation, read: Reader, screen: Screen, interactive: bool, session: str | None = None
    ) -> None:
        self.conversation, self.screen = conversation, screen
        self._read, self._interactive, self._session = read, interactive, session
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/undo": self._undo,
            "/reset": self._reset,
            "/think": self._think,
            "/stats": self._stats,
            "/save": self._save,
            "/load": self._load,
        }

    def run(self) -> None:
        """Until /exit, the end of the input, or a second Ctrl-C where nothing is typed."""
        try:
            self._run()
        finally:
            kept = self._keep()
        if not kept:
            self._session = None
            self.run()

    def _keep(self) -> bool:
        """Save the session. False: that failed, but somebody is there who may have another place for it."""
        try:
            if self._session and self.conversation.messages:
                self.conversation.save(self._session)
        except EngineError as error:
            if not self._interactive:
                raise
            note(f"Error: {printable(str(error))}")
            note("(/save FILE keeps the conversation elsewhere, /exit leaves without it)")
            return False
        return True

    def _run(self) -> None:
        warned = False
        while True:
            try:
                line = self._read()
            except EOFError:
                return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                if warned:
                    return
                warned = True
                note("(Ctrl-C again, Ctrl-D or /exit leaves)")
                continue
            warned = False
            try:
                if not self._do(line):
                    return
            except KeyboardInterrupt:
                if not self._interactive:
                    raise
                note("(stopped)")
            except EngineError as error:
                if not self._interactive:
                    raise
                note(f"Error: {printable(str(error))}")

    def _do(self, line: str) -> bool:
        """One line; False: it was /exit."""
        if not line.strip():
            return True
        if not line.startswith("/") or line.startswith("//"):
            self._ask(line.removeprefix("/") if line.startswith("//") else line)
            return True
        name, _, rest = line.partition(" ")
        name = ALIASES.get(name.strip(), name.strip())
        if name == "/exit":
            return False
        if command := self._commands.get(name):
            command(rest.strip())
        else:
            raise EngineError(f"there is no command {name}; /help tells which there are, and // begins a text with /")
        return True

    def _ask(self, text: str) -> None:
        screen = self.screen
        with Counter("reading", unit="t", patience=0.3) as counter:
            pieces = self.conversation.answer(text, progress=counter)
            with contextlib.closing(pieces):
                try:
                    for piece in pieces:
                        screen.show(piece)
                except KeyboardInterrupt:
                    if not self._interactive:
                        raise
                    counter.stop()  # before anything is written: it takes its line away from where the cursor is
                    if isinstance(progress := self.conversation.stream.model.progress, CompileProgress):
                        progress.__exit__()  # its line would go on moving
                except EngineError:
                    counter.stop()
                    screen.end(failed=True)
                    raise
            screen.end()

    # ------------------------------------------------------------------------------------------------------- commands

    def _help(self, _: str) -> None:
        for name, text in HELP.items():
            note(f"  {name:14}{text}")
        note('  Alt-Enter begins a new line; """ begins and ends a text of many lines')

    def _system(self, text: str) -> None:
        if text:
            self.conversation.system = text
            note("(the next answer follows it)")
        else:
            note(printable(self.conversation.system or "(no instructions)", keep="\n"))

    def _undo(self, _: str) -> None:
        asked = self.conversation.undo()
        note("(nothing to take back)" if asked is None else f"(took back: {_short(asked)})")

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        note("(a new conversation)")

    def _think(self, _: str) -> None:
        self.screen.hide_thinking = not self.screen.hide_thinking
        note(f"(thinking is {'hidden' if self.screen.hide_thinking else 'shown'})")

    def _stats(self, _: str) -> None:
        conversation, stream = self.conversation, self.conversation.stream
        stats = stream.stats
        computed = rate(stats.n_prompt - stats.n_reused, stats.t_prompt)
        n, forgotten = _exchanges(len(conversation.messages)), conversation.n_forgotten // 2
        held, room, kept = f"{stream.n_kv:,}", f"{stream.n_ctx:,}", size(stream.cache_bytes)
        note(f"  conversation  {n}, {forgotten} forgotten")
        note(f"  prompt        {stats.n_prompt:,} tokens, {stats.n_reused:,} were there, {computed}")
        note(f"  answer        {stats.n_generated:,} tokens, {rate(stats.n_generated - 1, stats.t_generated)}")
        if stats.n_drafted:
            note(f"  drafted       {stats.n_drafted:,} tokens, {stats.n_accepted:,} right")
        note(f"  K-cache       {held} of {room} tokens, {kept} ({stream.type_k})")

    def _save(self, path: str) -> None:
        path = self._path(path)
        self.conversation.save(path)
        note(f"(saved {_exchanges(len(self.conversation.messages))} to {printable(path)})")

    def _load(self, path: str) -> None:
        self.conversation.load(self._path(path))
        self.welcome_back()

    def _path(self, path: str) -> str:
        if not path and not self._session:
            raise EngineError("no file; say /save FILE")
        return os.fspath(Path(path).expanduser()) if path else str(self._session)

    def welcome_back(self) -> None:
        """Where a loaded conversation was."""
        messages = self.conversation.messages
        n_kv = self.conversation.stream.n_kv
        note(f"(going on with {_exchanges(len(messages))}, {n_kv:,} tokens in the K-cache)")
        if messages and self._interactive:
            note(f"  > {_short(messages[-2]['content'])}")
            note(f"  {_short(messages[-1]['content'])}")

    def toolbar(self) -> str:
        """How full the context is, and how fast the last answer came."""
        stream = self.conversation.stream
        share = stream.n_kv / stream.n_ctx
        gauge = "█" * round(10 * share) + "░" * (10 - round(10 * share))
        told = [f"{gauge} {stream.n_kv:,} / {stream.n_ctx:,} tokens"]
        if stream.stats.n_generated > 1:
            told.append(rate(stream.stats.n_generated - 1, stream.stats.t_generated))
        if self.conversation.n_forgotten:
            told.append(f"{_exchanges(self.conversation.n_forgotten)} forgotten")
        return " │ ".join(told)


def _exchanges(n_messages: int) -> str:
    return "1 exchange" if n_messages == 2 else f"{n_messages // 2} exchanges"


def _short(text: str) -> str:
    line = " ".join(printable(text, keep="\n\t").split())
    return line if len(line) <= 72 else line[:71] + "…"
