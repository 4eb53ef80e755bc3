"""`konly bench`: times, beside this machine's limits. The figures come from engine/bench.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import click

from ..console import CompileProgress, note, print_tables
from .options import DEFAULT_TYPE_K, TYPES_K, backend_options, chosen_model, json_option, model_options

PARTS = ("attention", "experts", "dense", "rest")


@click.command(short_help="Time prompts and decoding.")
@model_options
@click.option("-p", "--n-prompt", default="512", help="Prompt lengths to time.", show_default=True)
@click.option(
    "-n", "--n-gen", type=click.IntRange(0), default=32, help="Tokens to decode at each depth.", show_default=True
)
@click.option("-d", "--depth", default="0", help="Tokens in the cache beforehand.", show_default=True)
@click.option("-t", "--threads", default="0", help="0: one for each physical core.", show_default=True)
@click.option("-ctk", "--cache-type-k", "--type-k", "type_k", default=DEFAULT_TYPE_K, show_default=True)
@click.option("-ub", "--ubatch-size", type=click.IntRange(0), default=0, help="0: 512, on a card 2048.")
@backend_options
@json_option
def bench(n_prompt: str, n_gen: int, depth: str, threads: str, type_k: str, as_json: bool, **options: Any) -> None:
    """Time prompt processing and decoding. Lists are separated by commas: `-d 0,4096 -t 1,2 -ctk f16,q8`"""
    types = [name.strip() for name in type_k.split(",")]
    if unknown := set(types) - set(TYPES_K):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; expected {', '.join(TYPES_K)}", param_hint="'-ctk'")
    path = chosen_model(options)
    arguments: dict[str, Any] = {
        "n_prompt": _numbers(n_prompt, "-p"),
        "depths": _numbers(depth, "-d"),
        "threads": _numbers(threads, "-t"),
        "type_k": types,
        "n_gen": n_gen,
        "n_ubatch": options["ubatch_size"] or None,
        "backend": options["backend"],
        "experts": options["experts"],
    }
    from .. import bench as benchmark

    def tell(what: str) -> None:
        if sys.stderr.isatty():  # in lines: a bar that moves would take time from what is timed
            note(f"timing {what} …")

    with CompileProgress() as progress:
        result = benchmark.run(path, progress=progress, tell=tell, **arguments)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        head = {"model": result["model"], "backend": result["backend"]}
        print_tables(head, _limits_table(result), *_bench_tables(result))
        click.echo("\nparts: ms of a token, and the nearer of two shares: of DRAM's rate, of the peak of its products")


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 0:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"{text!r}, expected numbers like 0,4096", param_hint=repr(option)) from None
    return numbers


def _limits_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """This machine's: what of DRAM, and how many products, each with its addition."""
    kinds = {name: name.removesuffix("_gmul_s") for found in result["limits"].values() for name in found}
    kinds.pop("read_gb_s")
    rows: list[tuple[str, ...]] = [("limits", "DRAM GB/s", *(f"{kind} G/s" for kind in kinds.values()))]
    for threads, found in result["limits"].items():
        name = "1 thread" if threads == "1" else f"{threads} threads"
        rows.append((name, f"{found['read_gb_s']:.1f}", *(f"{found[kind]:,.0f}" for kind in kinds)))
    return rows


def _bench_tables(result: dict[str, Any]) -> Iterator[list[tuple[str, ...]]]:
    case = ("type_k", "threads", "depth")
    if result["decode"]:
        rows: list[tuple[str, ...]] = [("decode", *case, "ms/token (min-max)", *PARTS)]
        for row in result["decode"]:
            times = _spread(row["ms_per_token"], row)
            rows.append((f"{_three(1e3 / row['ms_per_token'])} t/s", *_bench_case(row), times, *_part_cells(row)))
        yield rows
    if result["prefill"]:
        rows = [("prompt", *case, "t/s (min-max)", *PARTS)]
        for row in result["prefill"]:
            rates = _spread(row["tokens_per_s"], row)
            rows.append((f"{row['tokens']:,} tokens", *_bench_case(row), rates, *_part_cells(row)))
        yield rows


def _spread(median: float, row: dict[str, Any]) -> str:
    return f"{_three(median)} ({_three(row['min'])}-{_three(row['max'])})"


def _part_cells(row: dict[str, Any]) -> Iterator[str]:
    """Milliseconds of a token, and the share of the limit that is nearer."""
    for name in PARTS:
        part = row["parts"][name]
        share = max(part["of_read"] or 0, part["of_peak"] or 0)
        yield _three(part["ms"]) + (f" {share:4.0%}" if share else "")


def _three(x: float) -> str:
    """To three digits, or to units."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def _bench_case(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["type_k"], str(row["threads"]), f"{row.get('depth', 0):,}"
