"""Text on stdout as it comes, and the line about it on stderr: what `run` and `chat` share."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Generator
from typing import TYPE_CHECKING

import click

from ..console import printable, rate, size
from ..errors import EngineError

if TYPE_CHECKING:
    from ..stream import Stream


def show(pieces: Generator[str], prompt: str) -> bool:
    """Print the prompt and what follows it as it comes, ending in a newline. True: interrupted by Ctrl-C.

    The prompt waits for the first piece: until then its line may be that of a progress bar.
    """
    out = sys.stdout
    terminal = out.isatty()
    ends_line = True

    def write(piece: str) -> None:
        nonlocal ends_line
        out.write(printable(piece, keep="\n\t") if terminal else piece)
        out.flush()
        ends_line = piece.endswith("\n") if piece else ends_line

    interrupted = False
    with contextlib.closing(pieces):
        try:
            first = next(pieces, "")
            write(prompt + first)
            for piece in pieces:
                write(piece)
        except KeyboardInterrupt:
            interrupted = True
        except EngineError:  # its line comes next
            if not ends_line:
                write("\n")
            raise
    after_ctrl_c = interrupted and sys.stderr.isatty()  # it shows as ^C
    if after_ctrl_c:
        click.echo(err=True)
    if not ends_line and not (after_ctrl_c and terminal):
        write("\n")
    return interrupted


def summary(opened: Stream, n_predict: int) -> str:
    stats = opened.stats
    line = (
        f"prompt {stats.n_prompt:,} tokens, {rate(stats.n_prompt, stats.t_prompt)} | "
        f"generated {stats.n_generated:,} tokens, {rate(stats.n_generated - 1, stats.t_generated)} | "
        f"K-cache {size(opened.cache_bytes)} ({opened.type_k})"
    )
    if stats.n_drafted:
        line += f" | drafted {stats.n_drafted:,}, right {stats.n_accepted:,}"
    if stats.finish_reason == "length" and stats.n_generated != n_predict:
        line += f" | stopped: n_ctx = {opened.n_ctx:,} is full"
    return line
