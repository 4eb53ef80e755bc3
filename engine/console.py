"""What the command line shows beside the text itself: tables, and the progress of compiling kernels.

rich is imported when something is shown with it, not before.
"""

from __future__ import annotations

import sys
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


def size(nbytes: float) -> str:
    """Bytes for people: 12.1 MiB"""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.1f} GiB"


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
            self._bar.update(self._bar.task_ids[0], completed=done, total=total, kernel=name)
        if self._started and done >= total:
            seconds = time.perf_counter() - self._started
            self._stop()
            _note(f"compiled {total} kernels for this CPU in {seconds:.1f} s")

    def _start(self, total: int) -> None:
        self._started = time.perf_counter()
        if not sys.stderr.isatty():
            _note(f"compiling {total} kernels for this CPU …")
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (
            TextColumn("compiling kernels"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[kernel]}", markup=False),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.add_task("", total=total, kernel="")
        self._bar.start()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar, self._started = None, 0.0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
