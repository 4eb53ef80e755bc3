"""`konly run`: continue a text."""

from __future__ import annotations

from typing import Any

import click

from ..console import Counter
from .options import engine_options, model_options, open_engine, prompt_of, prompt_options
from .sampling import sampling_of, sampling_options, text_arguments, text_options
from .text import show, summary


@click.command(short_help="Continue a text.")
@model_options
@prompt_options
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(-1),
    default=-1,
    help="Tokens to generate; -1: to the end of the text.",
    show_default=True,
)
@engine_options
@text_options
@sampling_options
@click.option("--no-display-prompt", is_flag=True, help="Print only what is generated.")
def run(n_predict: int, no_display_prompt: bool, **options: Any) -> None:
    """Continue a text: `konly run model.gguf -p "Once upon a time" -n 64 --temp 0`

    Without MODEL the small default model tells a story. The prompt may also be piped in.
    """
    prompt = prompt_of(options)
    arguments = text_arguments(options) | {"sampling": sampling_of(options)}
    with open_engine(options) as opened, Counter("reading the prompt", unit="t") as counter:
        if options["keep"] == -1:
            arguments["n_keep"] = len(opened.tokenize(prompt))
        max_tokens = None if n_predict < 0 else n_predict
        pieces = opened.generate(prompt, max_tokens=max_tokens, progress=counter, **arguments)
        interrupted = show(pieces, "" if no_display_prompt else prompt)
        counter.stop()
        click.echo(summary(opened, n_predict), err=True)
    if interrupted:
        click.get_current_context().exit(130)
