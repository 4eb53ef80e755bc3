"""`konly verify`: whether a file is good, and whether the kernels are. The figures come from engine/verify/."""

from __future__ import annotations

import json
from typing import Any

import click

from ..console import CompileProgress, Counter, print_tables, printable
from .options import DEFAULT_TYPE_K, TYPES_K, chosen_model, json_option, model_options, prompt_options, text_of

PROMPT = "Write a story about a brave rabbit named Pip who lost a red kite.\n\nTitle: Pip and the Red Kite\n\n"


@click.command(short_help="Check a file and the kernels against float64.")
@model_options
@prompt_options
@click.option("-n", "--n-tokens", type=click.IntRange(1), default=8, help="Tokens of the prompt.", show_default=True)
@click.option("-t", "--threads", type=click.IntRange(0), default=0, help="0: one for each physical core.")
@click.option("-ctk", "--cache-type-k", type=click.Choice(TYPES_K), default=DEFAULT_TYPE_K, show_default=True)
@json_option
def verify(n_tokens: int, threads: int, cache_type_k: str, as_json: bool, **options: Any) -> None:
    """Tell a good model file from a bad one, and a kernel that computes something else from either.

    Every weight is looked at. Then some tokens go through the engine, and each layer is compared with the same in
    float64. Exit code 1 if anything is wrong. A model of 16 billion parameters takes some minutes.
    """
    text = text_of(options) or PROMPT
    import engine

    from ..verify import verify as method

    with CompileProgress() as compiling:
        opened = engine.Engine(
            chosen_model(options), type_k=cache_type_k, n_threads=threads or None, progress=compiling
        )
        tokens = opened.tokenize(text)[:n_tokens]
        with Counter("verifying") as counter:
            report = method(opened, tokens, progress=counter)
        opened.close()
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        if report["layers"]:
            print_tables({}, _table(report))
            click.echo()
        for problem in report["problems"]:
            click.echo(printable(problem))
        click.echo(_verdict(report))
    if report["problems"]:
        click.get_current_context().exit(1)


def _table(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("NMSE", "attention", "at most", "router", "feed-forward", "at most", "drift", "rerouted")
    ]
    for row in report["layers"]:
        attention, ffn = ((f"{row[part]:.1e}", f"{row['tolerance'][part]:.0e}") for part in ("attention", "ffn"))
        router = f"{row['router']:.1e}" if row["router"] else ""
        rows.append(
            (f"layer {row['layer']}", *attention, router, *ffn, f"{row['drift']:.1e}", str(row["rerouted"] or ""))
        )
    logits = report["logits"]
    rows.append(
        ("output", "", "", "", f"{logits['nmse']:.1e}", f"{logits['tolerance']:.0e}", f"{logits['drift']:.1e}", "")
    )
    return rows


def _verdict(report: dict[str, Any]) -> str:
    n = len(report["problems"])
    if report["verdict"] == "bad file":
        return f"bad file: {n} tensor{'s' * (n > 1)}; download or convert it again"
    if report["verdict"] == "bad kernels":
        return "bad kernels: the file's weights are sane, but what is computed from them is not; please report this"
    return (
        f"good: weights are sane, and over {report['tokens']} tokens every layer computes what float64 does,"
        f" to the rounding of its types; {report['logits']['same_top']:.0%} of the most probable tokens are the same"
    )
