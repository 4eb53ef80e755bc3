"""Options that several commands share: decorators, and functions that turn what click parsed into the engine's words.

    @click.command()
    @model_options
    @engine_options
    def command(**options): …  open_engine(options)

Options are named as llama.cpp's users know them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import CompileProgress, LoadProgress, note, size

if TYPE_CHECKING:
    from ..engine import Engine

TYPES_K = ("f16", "bf16", "q8")  # as k_cache.py has them; a test compares
BACKENDS = ("cpu", "gpu", "auto")  # as backend.py has them; likewise
DEFAULT_TYPE_K = "q8"

Command = Callable[..., Any]

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def options_in_order(*decorators: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """All of them, shown by --help in this order."""

    def decorate(command: Command) -> Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_options = options_in_order(  # MODEL, or -m MODEL, or neither: the default model
    click.argument("model", required=False),
    click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as the argument MODEL."),
)

prompt_options = options_in_order(
    click.option("-p", "--prompt", help="The text; - reads it from standard input."),
    click.option("-f", "--file", type=click.Path(dir_okay=False, path_type=Path), help="Read the text from a file."),
)

backend_options = options_in_order(
    click.option(
        "--backend",
        type=click.Choice(BACKENDS),
        default="cpu",
        help="auto: an NVIDIA card if there is one that the model fits.",
        show_default=True,
    ),
    click.option(
        "--experts",
        type=click.Choice(("cpu", "gpu")),
        help="Where routed experts are computed: cpu keeps them in RAM, for models larger than the card.",
    ),
)

engine_options = options_in_order(
    click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(0),
        default=0,
        help="Tokens the K-cache can hold; 0: as trained, at most 4096.",
        show_default=True,
    ),
    click.option(
        "-t", "--threads", type=click.IntRange(0), default=0, help="0: one for each physical core.", show_default=True
    ),
    click.option(
        "-ub",
        "--ubatch-size",
        type=click.IntRange(0),
        default=0,
        help="Prompt tokens computed at once; 0: 512, on a card 2048.",
        show_default=True,
    ),
    click.option(
        "-ctk",
        "--cache-type-k",
        type=click.Choice(TYPES_K),
        default=DEFAULT_TYPE_K,
        help="How the K-cache keeps its rows; q8 takes 0.57 of f16's memory.",
        show_default=True,
    ),
    backend_options,
)


def chosen_model(options: dict[str, Any]) -> str | None:
    """Path of the model; None: the default model."""
    model, model_option = options["model"], options["model_option"]
    if model and model_option and model != model_option:
        raise click.UsageError(f"two models: {model} and -m {model_option}; give one")
    return model or model_option


@contextlib.contextmanager
def open_engine(options: dict[str, Any]) -> Iterator[Engine]:
    """The Engine of model_options and engine_options, with what a user should know about it on stderr."""
    path = chosen_model(options)
    import engine

    with CompileProgress() as progress, LoadProgress() as loading:
        opened = engine.Engine(
            path,
            n_ctx=options["ctx_size"] or None,
            type_k=options["cache_type_k"],
            n_threads=options["threads"] or None,
            n_ubatch=options["ubatch_size"] or None,
            backend=options["backend"],
            experts=options["experts"],
            progress=progress,
            loading=loading,
        )
        with contextlib.closing(opened):
            if options["backend"] == "auto":
                note(f"Note: runs on the {opened.backend}")
            for remark in _remarks(opened):
                note(remark)
            yield opened


def _remarks(opened: Engine) -> Iterator[str]:
    """What a user should know before waiting."""
    from .. import memory

    n_ctx, trained = opened.n_ctx, opened.hparams.n_ctx_train
    if n_ctx > trained:
        yield f"Note: n_ctx = {n_ctx:,} is more than the {trained:,} tokens that the model was trained for"
    full, available = opened.cache.layout.nbytes, memory.available() if opened.backend == "cpu" else None
    if available is not None and full > available:
        yield f"Note: {n_ctx:,} tokens in the K-cache take {size(full)}; {size(available)} of memory are available"


def prompt_of(options: dict[str, Any]) -> str:
    """The text of prompt_options, from wherever it is to come; there must be one."""
    text = text_of(options)
    if text is None and sys.stdin is not None and not sys.stdin.isatty():
        text = _stdin()
    if not text:
        what = "no prompt" if text is None else "the prompt is empty"
        raise click.UsageError(f'{what}; give one by -p "TEXT", -f FILE or on standard input')
    return text


def text_of(options: dict[str, Any]) -> str | None:
    """The text that -p or -f gives; None without either."""
    prompt, file = options["prompt"], options["file"]
    if prompt is not None and file is not None:
        raise click.UsageError("two prompts: -p and -f; give one")
    if file is not None:
        return read_text(file)
    if prompt == "-":
        return None if sys.stdin is None else _stdin()
    if prompt is None:
        return None
    return prompt if _is_text(prompt) else _decode(os.fsencode(prompt), "the prompt")


def read_text(file: Path) -> str:
    """A UTF-8 file without the newline that ends its last line."""
    try:
        return _decode(file.read_bytes(), str(file))
    except OSError as error:
        raise click.UsageError(f"{file}: cannot be read ({error.strerror})") from None


def _stdin() -> str:
    return _decode(sys.stdin.buffer.read(), "standard input")


def _is_text(argument: str) -> bool:
    """False: in an ASCII locale, say, Python could not decode all bytes of the argument."""
    return not any("\ud800" <= c <= "\udfff" for c in argument)


def _decode(content: bytes, source: str) -> str:
    """UTF-8 without the newline that ends the last line."""
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{source} is not UTF-8 (at byte {error.start})") from None
