"""`konly tokenize`: how a model's tokenizer cuts a text."""

from __future__ import annotations

import json
from typing import Any

import click

from ..console import printable
from .options import chosen_model, json_option, model_options, prompt_of, prompt_options


@click.command(short_help="Show how a text is cut into tokens.")
@model_options
@prompt_options
@click.option("--ids", "only_ids", is_flag=True, help="Print only the ids, as [1, 2, 3].")
@click.option("--no-bos", is_flag=True, help="Add neither BOS nor EOS, whatever the file says.")
@click.option("--parse-special", is_flag=True, help="Text that spells a control token becomes that token.")
@json_option
def tokenize(only_ids: bool, no_bos: bool, parse_special: bool, as_json: bool, **options: Any) -> None:
    """Show how a text is cut into tokens: `konly tokenize model.gguf -p "Once upon a time"`

    A token that ends inside a character is shown by its bytes.
    """
    text = prompt_of(options)
    from ..engine import default_model
    from ..gguf_file import read
    from ..tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(read(chosen_model(options) or default_model()))
    ids = tokenizer.encode(text, add_special=not no_bos, parse_special=parse_special)
    if only_ids:
        click.echo(json.dumps(ids))
        return
    rows = [{"id": i, "text": _text(tokenizer.token_bytes(i)), "control": tokenizer.is_control(i)} for i in ids]
    if as_json:
        for row, i in zip(rows, ids):
            row["bytes"] = tokenizer.token_bytes(i).hex()
        click.echo(json.dumps({"n_tokens": len(ids), "tokens": rows}, indent=2, ensure_ascii=False))
        return
    for row, i in zip(rows, ids):
        shown = repr(tokenizer.token_bytes(i) if row["text"] is None else row["text"])
        click.echo(f"{i:>7}  {printable(shown)}{'  control' if row['control'] else ''}")
    click.echo(f"{len(ids):,} tokens", err=True)


def _text(piece: bytes) -> str | None:
    """None: it begins or ends inside a character."""
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return None
