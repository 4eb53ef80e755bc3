"""The figures of bench_peers.py by depth, for the README: python scripts/plot_bench.py bench.json docs README.md

For each model docs/MODEL-decode.svg and docs/MODEL-prefill.svg, and their place in the document: each engine at its
best flags, konly's three types of cache, and the two limits of the machine as konly's best type meets them: all bytes
from DRAM at its rate, all products at their peak. What lies beyond both lines, no program of this kind reaches.

Needs the extra bench (matplotlib).
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import click
import marked
import matplotlib
from bench_peers import CONTENDERS, read

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib import ticker
from peer_table import Result, by_depth, medians

COLOURS = {"konly": "#0b6e4f", "llama.cpp": "#c8553d", "ik_llama.cpp": "#3d5a98"}
STYLES = {"bf16": "-", "q8": "--", "f16": ":"}  # of konly's types
Curve = dict[int, float]


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("results", type=click.Path(exists=True, dir_okay=False))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.argument("document", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(results: str, folder: Path, document: Path) -> None:
    folder.mkdir(exist_ok=True)
    found = read(results)
    plt.rcParams |= {
        "svg.hashsalt": "konly",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    lines = []
    for model in dict.fromkeys(r["model"] for r in found):
        some = [r for r in found if r["model"] == model and r["cpu"] == found[0]["cpu"]]
        name = model.removesuffix(".gguf")
        for what in ("decode", "prefill"):
            path = folder / f"{name}-{what}.svg"
            if plot(some, what, name, path):
                link = path.resolve().relative_to(document.resolve().parent).as_posix()
                lines.append(f"![{name}: {what} by depth]({link})")
    marked.replace(document, "plot_bench", "\n".join(lines))


def plot(results: list[Result], what: str, name: str, path: Path) -> bool:
    """False, and no file, where there are less than two depths."""
    key, unit = {"decode": ("decode_ms", "ms a token"), "prefill": ("prefill_t_s", "tokens/s")}[what]
    best = by_depth(results, key)
    if len(best) < 2:
        return False
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for flags in (c.flags for c in CONTENDERS if c.engine == "konly"):
        draw(axes, curve(results, key, "konly", flags), f"konly {flags}", COLOURS["konly"], STYLES[flags])
    for engine in ("llama.cpp", "ik_llama.cpp"):
        draw(axes, {d: b[engine].value for d, b in best.items() if engine in b}, engine, COLOURS[engine], "-")
    flags = best[max(best)]["konly"].flags if "konly" in best[max(best)] else ""
    for limit, label in (("peak", "products at their peak"), ("read", "bytes at DRAM's rate")):
        points = limit_curve(results, what, flags, limit)
        axes.plot(*zip(*points.items()), color="#888888", linewidth=1, linestyle="-." if limit == "peak" else ":",
                  label=f"limit: {label} ({flags})")  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set(xlabel="tokens in the cache", ylabel=unit, xticks=list(best), xlim=(0, None))
    axes.tick_params(axis="x", labelrotation=30)
    axes.grid(True, which="both", axis="y", color="#eeeeee")
    prompt = f", prompts of {results[0]['n_prompt']} tokens" if what == "prefill" else ""
    axes.set_title(f"{name}: {what}{prompt}, {results[0]['threads']} threads, {results[0]['cpu']}", fontsize=9)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def draw(axes: Any, points: Curve, label: str, colour: str, style: str) -> None:
    if points:
        axes.plot(*zip(*points.items()), color=colour, linestyle=style, marker="o", markersize=3, label=label)


def curve(results: list[Result], key: str, engine: str, flags: str) -> Curve:
    values = {depth: medians(results, key, str(depth)).get((engine, flags)) for depth in by_depth(results, key)}
    return {depth: value for depth, value in values.items() if value is not None}


def limit_curve(results: list[Result], what: str, flags: str, limit: str) -> Curve:
    """In the unit of the plot: milliseconds of a token, or tokens per second."""
    found: dict[int, list[float]] = {}
    for r in results:
        if (r["engine"], r["flags"]) == ("konly", flags):
            for depth, ms in r[f"{what}_limit_ms"].items():
                found.setdefault(int(depth), []).append(ms[limit])
    points = {depth: statistics.median(ms) for depth, ms in sorted(found.items())}
    return points if what == "decode" else {depth: 1e3 / ms for depth, ms in points.items()}


if __name__ == "__main__":
    main()
