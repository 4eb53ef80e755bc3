"""What bench_peers.py has measured, as the README's table: medians over the rounds, each engine at its best flags."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Result = dict[str, Any]  # of one process: what it was asked, and what time_konly or time_peer of bench_peers.py tells
ENGINES = ("konly", "llama.cpp", "ik_llama.cpp")


class Cell(NamedTuple):
    value: float
    flags: str


class Row(NamedTuple):
    name: str
    best: dict[str, Cell]  # by engine
    smaller_is_better: bool


def tables(results: list[Result]) -> str:
    """Markdown: a table for each CPU that kernels were compiled for."""
    return "\n\n".join(_table([r for r in results if r["cpu"] == name]) for name in dict.fromkeys(
        r["cpu"] for r in results))  # fmt: skip


def _table(results: list[Result]) -> str:
    lines = [
        "| | konly | llama.cpp | ik_llama.cpp | against llama.cpp | against ik_llama.cpp |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows_of(results):
        cells = [f"{_three(row.best[e].value)} ({row.best[e].flags})" if e in row.best else "" for e in ENGINES]
        ratios = [_ratio(row, peer) for peer in ENGINES[1:]]
        lines.append(f"| {' | '.join([row.name, *cells, *ratios])} |")
    return "\n".join([*lines, "", _footnote(results)])


def rows_of(results: list[Result]) -> Iterator[Row]:
    """Of the first model all; of others, smaller feed-forwards around the same attention, what tells of it."""
    for i, model in enumerate(dict.fromkeys(r["model"] for r in results)):
        name = model.removesuffix(".gguf")
        some = [r for r in results if r["model"] == model]
        decode, prefill = by_depth(some, "decode_ms"), by_depth(some, "prefill_t_s")
        prompt = some[0]["n_prompt"]
        if not i:
            for depth, best in decode.items():
                yield Row(f"{name}: decode at depth {depth:,}, ms/token", best, True)
        elif 0 in decode and max(decode):
            yield Row(f"{name}: decode, µs per cached token", slope(some), True)
        for depth, best in prefill.items():
            yield Row(f"{name}: {prompt} prompt tokens at depth {depth:,}, t/s", best, False)
        if not i:
            yield Row("file in the page cache to the first token, whole process, s", best_of(
                medians(some, "first_token_s"), min), True)  # fmt: skip


def by_depth(results: list[Result], key: str) -> dict[int, dict[str, Cell]]:
    """The best flags of each engine at each depth."""
    depths = sorted({int(depth) for r in results for depth in r[key]})
    better = min if key == "decode_ms" else max
    return {depth: best_of(medians(results, key, str(depth)), better) for depth in depths}


def slope(results: list[Result]) -> dict[str, Cell]:
    """Microseconds that a token in the cache adds to a decode step, from depth 0 to the greatest."""
    deepest = max(int(depth) for r in results for depth in r["decode_ms"])
    start, end = medians(results, "decode_ms", "0"), medians(results, "decode_ms", str(deepest))
    return best_of({c: (end[c] - start[c]) / deepest * 1e3 for c in end.keys() & start.keys()}, min)


def medians(results: list[Result], key: str, depth: str | None = None) -> dict[tuple[str, str], float]:
    """Medians over the rounds by (engine, flags)."""
    found: dict[tuple[str, str], list[float]] = {}
    for r in results:
        value = r[key] if depth is None else r[key].get(depth)
        if value is not None:
            found.setdefault((r["engine"], r["flags"]), []).append(value)
    return {contender: statistics.median(values) for contender, values in found.items()}


def best_of(values: Mapping[tuple[str, str], float], better: Callable[..., Any]) -> dict[str, Cell]:
    """konly's best is that of bf16 and q8, which others' attention is compared with; f16 computes in f32."""
    cells: dict[str, list[Cell]] = {}
    for (engine, flags), value in values.items():
        if (engine, flags) != ("konly", "f16"):
            cells.setdefault(engine, []).append(Cell(value, flags))
    return {engine: better(some, key=lambda cell: cell.value) for engine, some in cells.items()}


def _ratio(row: Row, peer: str) -> str:
    if "konly" not in row.best or peer not in row.best:
        return ""
    ours, theirs = row.best["konly"].value, row.best[peer].value
    return f"{theirs / ours if row.smaller_is_better else ours / theirs:.2f} ×"


def _footnote(results: list[Result]) -> str:
    limits = medians_of([r["limits"] for r in results if "limits" in r])
    kinds = ", ".join(f"{k.removesuffix('_gmul_s')} {v:,.0f}" for k, v in limits.items() if k.endswith("_gmul_s"))
    versions = sorted({r["version"] for r in results if "version" in r})
    machine = " / ".join(sorted({r["machine"] for r in results if "machine" in r}))
    others = max(r["others"] for r in results)
    return (
        f"{machine}; {results[0]['threads']} threads; medians of {_rounds(results)}, each engine at its best flags, in"
        f" brackets; {', '.join(versions)}. Limits in the same run: DRAM {limits['read_gb_s']:.1f} GB/s;"
        f" 10⁹ products/s, each with its addition: {kinds}. Other processes took at most {others:.2f} cores."
    )


def _rounds(results: list[Result]) -> str:
    """How many: 5 rounds, or, where models differ, 5 rounds (a) and 2 rounds (b)."""
    found: dict[str, set[int]] = {}
    for r in results:
        found.setdefault(r["model"].removesuffix(".gguf"), set()).add(r["round"])
    said = {model: f"{len(rounds)} round{'s' * (len(rounds) > 1)}" for model, rounds in found.items()}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return " and ".join(f"{rounds} ({model})" for model, rounds in said.items())


def medians_of(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def _three(x: float) -> str:
    """To three digits, or to units."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
