"""`konly plan`: what running a model takes, before it is run. The figures come from engine/plan.py."""

from __future__ import annotations

import json
import re
from typing import Any

import click

from ..console import CompileProgress, print_tables, size
from .options import chosen_model, engine_options, json_option, model_options

UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
NAMES = {
    "weights": "weights, mapped from the file",
    "libraries": "libraries, mapped",
    "uploaded": "weights, on the card",
    "copied": "weights, copied at load",
    "k_cache": "K-cache",
    "prefixes": "prompts to come back to",
    "buffers": "buffers of a step",
    "workspace": "workspace of ops",
    "scratch": "scratch of threads",
    "logits": "logits and sampling",
    "tokens": "token ids",
    "python": "Python and kernels",
    "slack": "slack",
}


class Size(click.ParamType):
    """8GiB, 8G and 8192MiB alike (1024 each), 8GB (1000 each), or bytes; a lone 8 is no size, but somebody's GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)(i?b?)", str(value).strip().lower())
        if match is None or re.fullmatch(r"[0-9]{1,3}(\.[0-9]+)?", str(value).strip()) and float(value):
            self.fail(f"{value!r}, expected a size like 8GiB", param, ctx)
        number, unit, rest = match.groups()
        each = UNITS[unit] if rest == "b" else 1024 ** "kmgt".find(unit) * 1024 if unit else 1
        return int(float(number) * each)


@click.command(short_help="Tell what a run would take: memory by part, the longest context, times.")
@model_options
@click.option(
    "--ram", type=Size(), help="Memory to keep to, of the card or the machine, like 8GiB. [default: what is available]"
)
@engine_options
@click.option("--prefixes", type=Size(), default=0, help="Memory for prompts that an application comes back to.")
@click.option("--no-probe", is_flag=True, help="Estimate no times.")
@json_option
def plan(ram: int | None, prefixes: int, no_probe: bool, as_json: bool, **options: Any) -> None:
    """Tell what a run would take, before it is run: `konly plan model.gguf --ram 8GiB -c 32768 -ctk q8`

    Memory by part, exactly; the longest context for each type of K-cache; the time to the first token and of each
    token after it, from a probe of two seconds. Exit code 1 if the run does not fit. With --backend gpu the memory is
    that of the card, and no times are told.
    """
    path, n_ctx, n_ubatch = chosen_model(options), options["ctx_size"] or None, options["ubatch_size"] or None
    type_k, told = options["cache_type_k"], None
    if options["backend"] != "cpu":
        from ..plan_card import plan_card

        told = plan_card(path, options["backend"], options["experts"], ram, n_ctx, type_k, n_ubatch)
    if told is None:
        from ..plan import plan as method

        with CompileProgress() as progress:
            told = method(
                path,
                ram=ram,
                n_ctx=n_ctx,
                type_k=type_k,
                n_threads=options["threads"] or None,
                n_ubatch=n_ubatch,
                prefix_bytes=prefixes,
                probe=not no_probe,
                progress=progress,
            )
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        print_tables(_head(told), _memory(told), _contexts(told), *_times(told))
    if not told["fits"]:
        click.get_current_context().exit(1)


def _head(told: dict[str, Any]) -> dict[str, str]:
    over = told["total"] - told["ram"]
    verdict = "fits" if over <= 0 else f"does not fit: {size(over)} too much"
    where = {"backend": f"{told['backend']}: {told['card']}"} if "card" in told else {}
    return where | {
        "model": told["model"],
        "n_ctx": f"{told['n_ctx']:,} tokens, type_k {told['type_k']}",
        "memory": f"{size(told['total'])} of {size(told['ram'])}: {verdict}",
    }


def _memory(told: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("part", "size", "bytes")]
    if "card" in told:
        parts = [("uploaded" if name == "weights" else name, n) for name, n in told["on_card"].items()]
    else:
        parts = [*told["mapped"].items()]
        parts += [("copied" if name == "weights" else name, n) for name, n in told["anonymous"].items()]
    rows += [(NAMES[name], size(n), f"{n:,}") for name, n in parts if n]
    rows.append(("total", size(told["total"]), f"{told['total']:,}"))
    if told.get("experts"):
        rows.append(("experts, mapped from the file", size(told["experts"]), f"{told['experts']:,}"))
    return rows


def _contexts(told: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("type_k", "longest context")]
    for type_k, n in told["largest_n_ctx"].items():
        trained = " (as trained)" if n == told["n_ctx_train"] else ""
        rows.append((type_k, f"{n:,}{trained}" if n else "none fits"))
    return rows


def _times(told: dict[str, Any]) -> list[list[tuple[str, ...]]]:
    if told["times"] is None:
        return []
    first: list[tuple[str, ...]] = [("prompt of", "first token after about", "t/s")]
    first += [(f"{n:,} tokens", f"{s:.3g} s", f"{n / s:,.0f}") for n, s in told["times"]["first_token_s"].items()]
    each: list[tuple[str, ...]] = [("in the cache", "each token about", "t/s")]
    each += [(f"{n:,} tokens", f"{ms:.3g} ms", f"{1e3 / ms:,.1f}") for n, ms in told["times"]["decode_ms"].items()]
    return [first, each]
