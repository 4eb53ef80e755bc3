"""The command `konly`: its group, and the one place where errors become a line. The commands: engine/commands/.

Text goes to stdout as it comes, everything about it to stderr.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from typing import Any

import click

from .commands.bench import bench
from .commands.chat import chat
from .commands.inspect import inspect
from .commands.perplexity import perplexity
from .commands.plan import plan
from .commands.run import run
from .commands.tokenize import tokenize
from .commands.verify import verify
from .console import note, printable
from .errors import EngineError


class _Commands(click.Group):
    """The one place where errors and warnings become a line, and Ctrl-C an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:
            raise click.ClickException("standard output is closed")
        if sys.stderr is None:  # 2>&-
            sys.stderr = open(os.devnull, "w")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console that lacks a character is no reason to stop
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: note(f"Warning: {message}")
                return super().invoke(ctx)
        except EngineError as error:
            raise click.ClickException(printable(str(error))) from None
        except OSError as error:  # of writing: whatever is read has errors of its own
            if error.errno == errno.EPIPE:  # `| head` has seen enough; click leaves without a word
                raise
            raise click.ClickException(f"cannot write: {error.strerror or error}") from None
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="konly", message="%(prog)s %(version)s")
def main() -> None:
    """Run MLA language models (DeepSeek-V2/V3 and kin, as GGUF files) from the K-cache alone, on the CPU or a GPU."""


for command in (run, chat, inspect, plan, verify, tokenize, perplexity, bench):
    main.add_command(command)
