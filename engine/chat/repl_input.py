"""How the chat reads: with prompt_toolkit on a terminal, plainly where that is missing, line by line from a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..console import note
from ..errors import EngineError
from .repl import COMMANDS, Reader, colours

if TYPE_CHECKING:
    from prompt_toolkit.key_binding import KeyBindings

QUOTES = '"""'
PROMPT = "> "


def history_path() -> Path:
    """Where lines are remembered: below $XDG_STATE_HOME, or what the system has for that."""
    if os.name == "nt":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return base / "konly" / "chat_history"


def terminal(toolbar: Callable[[], str]) -> Reader:
    """The best there is. toolbar: the line below."""
    if os.environ.get("TERM") == "dumb":
        return _unquoted(_plain)
    try:
        import prompt_toolkit  # noqa: F401
    except ImportError:
        note("Note: pip install 'konly[chat]' brings completion, history and lines that can be edited")
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # input() edits with it
        return _unquoted(_plain)
    return _unquoted(_prompt_toolkit(toolbar))


def pipe() -> Reader:
    """One message a line; UTF-8, whatever the locale."""
    lines = sys.stdin.buffer

    def read() -> str:
        line = lines.readline()
        if not line:
            raise EOFError
        try:
            return line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise EngineError(f"standard input is not UTF-8 (at byte {error.start} of a line)") from None

    return _unquoted(read)


def _plain() -> str:
    return input(PROMPT)


def _unquoted(read: Reader) -> Reader:
    '''What a reader reads, and where that begins with """, all up to the next """.'''

    def quoted() -> str:
        text = read()
        if not text.lstrip().startswith(QUOTES):
            return text
        text = text.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + read()
        text = text.rstrip().removesuffix(QUOTES).strip("\n")
        return "/" + text if text.startswith("/") else text  # it is no command

    return quoted


def _prompt_toolkit(toolbar: Callable[[], str]) -> Reader:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.application import get_app
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.history import FileHistory, History, InMemoryHistory
    from prompt_toolkit.output import ColorDepth
    from prompt_toolkit.styles import Style

    class Commands(Completer):
        def get_completions(self, document: Any, _: Any) -> Iterable[Completion]:
            return _completions(document.text_before_cursor, Completion)

    @Condition
    def inside_quotes() -> bool:
        text = get_app().current_buffer.text.strip()
        return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))

    history: History = FileHistory(str(path)) if (path := _writable(history_path())) else InMemoryHistory()
    session: PromptSession[str] = PromptSession(
        history=history,
        completer=Commands(),
        complete_while_typing=True,
        key_bindings=_keys(),
        multiline=inside_quotes,
        prompt_continuation="  ",
        bottom_toolbar=toolbar,
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}),
        color_depth=None if colours() else ColorDepth.DEPTH_1_BIT,
        enable_open_in_editor=False,
    )

    def read() -> str:
        return session.prompt(PROMPT)

    return read


def _completions(before: str, make: Callable[..., Any]) -> Iterator[Any]:
    """Commands at the beginning of a line; file names after /save and /load."""
    name, space, rest = before.partition(" ")
    if not space and before.startswith("/"):
        yield from (make(command, start_position=-len(before)) for command in COMMANDS if command.startswith(before))
    elif name in ("/save", "/load"):
        folder = Path(rest).expanduser() if rest.endswith("/") else Path(rest).expanduser().parent
        with contextlib.suppress(OSError):
            for path in sorted(folder.iterdir()):
                if path.name.startswith(rest.rpartition("/")[2]) and not path.name.startswith("."):
                    text = path.name + ("/" if path.is_dir() else "")
                    yield make(text, start_position=-len(rest.rpartition("/")[2]))


def _keys() -> KeyBindings:
    """Alt-Enter begins a new line. Ctrl-C throws away what was typed; where nothing was, it is KeyboardInterrupt."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def new_line(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def interrupt(event: Any) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys


def _writable(path: Path) -> Path | None:
    """The path as a file that only this user reads; None where that cannot be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600))
    except OSError:
        return None
    return path
