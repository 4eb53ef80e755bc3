"""`konly perplexity`: how well a model predicts a text, alone or beside another. The figures: engine/perplexity.py."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import click

from ..console import CompileProgress, Counter, print_tables
from .options import (
    DEFAULT_TYPE_K,
    TYPES_K,
    backend_options,
    chosen_model,
    json_option,
    model_options,
    prompt_of,
    prompt_options,
)


@click.command(short_help="Measure how well a model predicts a text.")
@model_options
@prompt_options
@click.option("-c", "--ctx-size", type=click.IntRange(4), default=512, help="Tokens of a chunk.", show_default=True)
@click.option("--chunks", type=click.IntRange(1), help="Stop after so many; else the whole text is read.")
@click.option("-t", "--threads", type=click.IntRange(0), default=0, help="0: one for each physical core.")
@click.option("-ctk", "--cache-type-k", type=click.Choice(TYPES_K), default=DEFAULT_TYPE_K, show_default=True)
@click.option("--kl-against", metavar="OTHER", help="Compare with this model, which is taken to be the right one.")
@click.option(
    "--against-cache-type-k", type=click.Choice(TYPES_K), help="Compare with a K-cache of this type, of OTHER or MODEL."
)
@backend_options
@json_option
def perplexity(
    ctx_size: int,
    chunks: int | None,
    threads: int,
    cache_type_k: str,
    kl_against: str | None,
    against_cache_type_k: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how well a model predicts a text: `konly perplexity model.gguf -f text.txt`

    The method is that of llama-perplexity, and so are the figures: chunks of n_ctx tokens, each from an empty cache,
    the second half of each is scored. With --kl-against the whole predictions are compared, too.
    """
    path, text = chosen_model(options), prompt_of(options)
    import engine

    from .. import perplexity as method

    n_threads = threads or None
    with CompileProgress() as compiling, contextlib.ExitStack() as stack:

        def opened(path: str | None, type_k: str) -> engine.Engine:
            one = engine.Engine(
                path,
                n_ctx=ctx_size,
                type_k=type_k,
                n_threads=n_threads,
                backend=options["backend"],
                experts=options["experts"],
                progress=compiling,
            )
            stack.callback(one.close)
            return one

        model = opened(path, cache_type_k)
        against: engine.Stream | None = None
        if kl_against is not None:
            against = opened(kl_against, against_cache_type_k or cache_type_k)
        elif against_cache_type_k is not None:
            against = model.stream(type_k=against_cache_type_k)
            stack.callback(against.close)
        with Counter("chunks") as counter:
            result = method.perplexity(
                model,
                model.tokenize(text),
                n_ctx=ctx_size,
                n_chunks=chunks,
                against=against,
                progress=lambda done, total, ppl: counter(done, total, f"perplexity {ppl:.4f}"),
            )
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_tables(_rows(result))


def _rows(result: dict[str, Any]) -> dict[str, str]:
    rows = {
        "perplexity": f"{result['perplexity']:.4f} ± {result['error']:.5f}",
        "scored": f"{result['tokens']:,} tokens: the second halves of {result['chunks']:,} × {result['n_ctx']:,}",
    }
    if "kl" not in result:
        return rows
    kl = result["kl"]
    return rows | {
        "perplexity of the other": f"{result['perplexity_against']:.4f} ± {result['error_against']:.5f}",
        "KL(other ‖ model), mean": f"{kl['mean']:.6f} ± {kl['error']:.6f} nats",
        "median, 99th percentile, maximum": f"{kl['median']:.6f}, {kl['p99']:.6f}, {kl['max']:.6f}",
        "same most probable token": f"{result['same_top']:.3%} ± {result['same_top_error']:.3%}",
    }
