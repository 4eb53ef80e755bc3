"""What the command line shows beside the text itself: tables, and the progress of compiling kernels.

rich is imported when something is shown with it, not before.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

_BIDI = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # these reorder what is shown around them


def printable(text: str, keep: str = "") -> str:
    """The text with control characters spelled out: neither a file's metadata nor a model must steer the terminal."""
    return "".join(c if c in keep or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def _steers(c: str) -> bool:
    return c < " " or "\x7f" <= c < "\xa0" or "\ud800" <= c <= "\udfff" or c in _BIDI


def note(line: str) -> None:
    """A line on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


def size(nbytes: float) -> str:
    """Bytes for people: 12.1 MiB"""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"


def rate(n: int, seconds: float) -> str:
    """Tokens per second for people: 12.3 t/s"""
    return f"{n / seconds:,.1f} t/s" if n > 0 and seconds > 0 else "- t/s"


def print_tables(description: dict[str, str], *tables: list[tuple[str, ...]]) -> None:
    """A list of names and values, then tables, whose first row is the head; columns after the first are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    out: IO[str] = sys.stdout
    console = Console(file=out, width=None if out.isatty() else 120, highlight=False)
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    for name, value in description.items():
        grid.add_row(name, Text(printable(value)))
    if description:
        console.print(grid)
    for head, *rows in filter(None, tables):
        table = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
        for i, column in enumerate(head):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        console.print()
        console.print(table)


class CompileProgress:
    """Tells on stderr that kernels are being compiled: a moving line on a terminal, else one line before and after.

    The engine calls it with the kernels done, the kernels in all, and the name of the one in work.
    """

    def __init__(self) -> None:
        self._started = 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> CompileProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, done: int, total: int, name: str) -> None:
        if not self._started and done < total:
            self._start(total)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=name.partition("-")[0])
        if self._started and done >= total:
            seconds = time.perf_counter() - self._started
            self._stop()
            note(f"compiled {total} kernels for this machine in {seconds:.1f} s")

    def _start(self, total: int) -> None:
        self._started = time.perf_counter()
        if not sys.stderr.isatty():
            note(f"compiling {total} kernels for this machine …")
            return
        self._bar = _bar("compiling kernels", total)

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._started = None, 0.0


class Counter:
    """A moving line on stderr, where that is a terminal, for what takes longer than a second; nothing elsewhere.

    Called as counter(done, total, note). It goes away when the last is done, or at the end of the `with`.
    unit: tells how many of them a second, instead of a note. patience: seconds before the line appears, by itself.
    """

    def __init__(self, what: str, unit: str = "", patience: float = 1.0) -> None:
        self._what, self._unit, self._patience = what, unit, patience
        self._lock = threading.Lock()  # of all that follows: the line appears from a thread
        self._timer: threading.Timer | None = None
        self._bar: Progress | None = None
        self._began, self._first, self._last = 0.0, 0, (0, 0, "")

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if done >= total:
            self.stop()
        elif sys.stderr.isatty():
            with self._lock:
                self._last = done, total, note
                if self._timer is None:
                    self._began, self._first = time.perf_counter(), done
                    self._timer = threading.Timer(self._patience, self._show)
                    self._timer.daemon = True
                    self._timer.start()
                self._update()

    def stop(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if self._bar is not None:
                self._bar.stop()
            self._timer = self._bar = None

    def _show(self) -> None:
        with self._lock:
            if self._timer is threading.current_thread():  # else it has been stopped in the meantime
                self._bar = _bar(self._what, self._last[1])
                self._update()

    def _update(self) -> None:
        done, total, note = self._last
        if self._unit and done > self._first:
            note = f"{(done - self._first) / (time.perf_counter() - self._began):,.0f} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, note=note)


class LoadProgress(Counter):
    """Tells on stderr, where that is a terminal, how many MiB of the weights have come to the card."""

    def __init__(self) -> None:
        super().__init__("loading weights, MiB")

    def __call__(self, done: int, total: int, note: str = "") -> None:
        super().__call__(done >> 20, total >> 20, note)


def _bar(what: str, total: int) -> Progress:
    """A running bar on stderr that leaves nothing behind."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    told = TextColumn("{task.fields[note]}", markup=False)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), told)
    console = Console(stderr=True)
    console.width -= 4  # room for ^C, which would else go to a line of its own, and the bar would be left behind
    bar = Progress(*columns, console=console, transient=True)
    bar.add_task("", total=total, note="")
    bar.start()
    return bar
