"""konly beside llama.cpp and ik_llama.cpp, on one machine, in turns; and the table of it in the README.

    python scripts/bench_peers.py MODEL.gguf --llama-cpp PYTHON --ik PYTHON -d 0,4096,16384,32768 --out bench.json
    python scripts/bench_peers.py --table bench.json README.md

PYTHON is the interpreter of an environment that has llama-cpp-python or ik-llama-cpp-python and NumPy:

    python -m venv peer && peer/bin/pip install numpy --no-binary llama-cpp-python llama-cpp-python

Each contender runs in a process of its own, one after the other, round by round, so that a machine which changes its
pace does so for all. What a process tells is appended to the JSON at once: the same command goes on where it was
stopped, and does nothing when all is there. Several models may share one JSON; the first is the one whose every row the
table has. The limits of the machine are measured by each konly process.

Stop whatever else runs before you start: the peers' threads wait for each other in busy loops, and a step of theirs
takes ten times as long when one of them loses its core. `others` in a result is how many cores, on average, processes
outside of the bench took meanwhile (Linux); the table's footnote has the most.

First token: from the start of a process to the end of it, with the file in the page cache; five tokens in, one out.
Each process runs twice, and the second time counts, for the first one may compile kernels.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import click
import marked
from peer_table import Result, medians_of, tables

WORKER = Path(__file__).with_name("peer_worker.py")
KONLY = [sys.executable, "-c", "from engine.cli import main; main()"]
PROMPT = "a b c"  # five tokens of the synthetic vocabularies


class Contender(NamedTuple):
    engine: str
    flags: str  # as the table names them
    options: tuple[str, ...]


CONTENDERS = (  # in the order of a round
    Contender("konly", "bf16", ("-ctk", "bf16")),
    Contender("llama.cpp", "no repack", ()),
    Contender("ik_llama.cpp", "q8_0 -rtr", ("--type-k", "q8_0", "--repack")),
    Contender("konly", "q8", ("-ctk", "q8")),
    Contender("llama.cpp", "repack", ("--repack",)),
    Contender("ik_llama.cpp", "q8_0", ("--type-k", "q8_0")),
    Contender("konly", "f16", ("-ctk", "f16")),
)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("--llama-cpp", metavar="PYTHON", help="interpreter that has llama-cpp-python")
@click.option("--ik", metavar="PYTHON", help="interpreter that has ik-llama-cpp-python")
@click.option("-d", "--depths", default="0,4096,16384,32768", show_default=True)
@click.option("-pd", "--prompt-depths", help="depths to process a prompt at; else those of -d")
@click.option("-p", "--n-prompt", default=512, show_default=True)
@click.option("-n", "--n-gen", default=16, show_default=True)
@click.option("-t", "--threads", default=2, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--out", default="bench.json", show_default=True)
@click.option("--table", nargs=2, metavar="JSON DOCUMENT", help="write the table of a JSON into a document, no more")
def main(
    model: str | None, llama_cpp: str | None, ik: str | None, depths: str, prompt_depths: str | None, n_prompt: int,
    n_gen: int, threads: int, rounds: int, out: str, table: tuple[str, str] | None,
) -> None:  # fmt: skip
    if table:
        marked.replace(table[1], "bench_peers", tables(read(table[0])))
        return
    if model is None:
        raise click.UsageError("no MODEL")
    case = {
        "model": Path(model).name, "cpu": cpu(), "threads": threads, "n_prompt": n_prompt, "n_gen": n_gen,
        "depths": depths, "prompt_depths": prompt_depths or depths,
    }  # fmt: skip
    pythons = {"konly": sys.executable, "llama.cpp": llama_cpp, "ik_llama.cpp": ik}
    contenders = [c for c in CONTENDERS if pythons[c.engine]]

    def measure(contender: Contender) -> Result:
        into_page_cache(model)  # the one before may have filled the memory with a copy of its own
        if contender.engine == "konly":
            return time_konly(model, contender, case)
        return time_peer(str(pythons[contender.engine]), model, contender, case)

    go_on(Path(out), case, contenders, rounds, measure)


def go_on(
    out: Path, case: Result, contenders: Iterable[Contender], rounds: int, measure: Callable[[Contender], Result]
) -> None:
    """Measure all that `out` does not have yet, and append it, one by one."""
    results = read(out) if out.exists() else []
    for i in range(rounds):
        for contender in contenders:
            key = case | {"round": i, "engine": contender.engine, "flags": contender.flags}
            if any(key.items() <= result.items() for result in results):
                continue
            start, busy = time.perf_counter(), others_cpu_s()
            result = key | measure(contender)
            seconds = time.perf_counter() - start
            others = max(0.0, (others_cpu_s() - busy) / seconds)
            results.append(result | {"others": round(others, 3)})
            beside = out.with_name(out.name + ".new")
            beside.write_text("[\n" + ",\n".join(map(json.dumps, results)) + "\n]\n", encoding="utf-8")
            os.replace(beside, out)
            said = f"{seconds:.0f} s, others took {others:.2f} cores"
            print(f"round {i + 1}/{rounds} {contender.engine} {contender.flags}: {said}", file=sys.stderr)


def others_cpu_s() -> float:
    """Seconds of CPU time that processes other than this one and its children have taken; 0 where it is not known."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
    except OSError:
        return 0.0
    own = sum(os.times()[:4])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own


def read(path: str | Path) -> list[Result]:
    found: list[Result] = json.loads(Path(path).read_text(encoding="utf-8"))
    return found


def cpu() -> str:
    """What the kernels are compiled for: the CPU's name for LLVM. NUMBA_CPU_NAME chooses another."""
    from cpu_kernels.isa import CPU_NAME

    return CPU_NAME


# -------------------------------------------------------------------------------------------------------- measuring


def time_konly(model: str, contender: Contender, case: Result) -> Result:
    """{"decode_ms", "prefill_t_s": {depth: median}, "limits", "limit_ms": {kind: {depth: of a token}}, …}"""
    bench = [*KONLY, "bench", model, "-t", str(case["threads"]), *contender.options, "--json"]
    n, p = ["-n", str(case["n_gen"])], ["-p", str(case["n_prompt"])]
    if case["depths"] == case["prompt_depths"]:
        told = [_json([*bench, *n, *p, "-d", case["depths"]])]
    else:
        told = [
            _json([*bench, *n, "-p", "0", "-d", case["depths"]]),
            _json([*bench, "-n", "0", *p, "-d", case["prompt_depths"]]),
        ]
    decode = {str(row["depth"]): row for one in told for row in one["decode"]}
    prefill = {str(row["depth"]): row for one in told for row in one["prefill"]}
    run = [*KONLY, "run", model, "-p", PROMPT, "-n", "1", "--temp", "0", "-c", "4096", "-t", str(case["threads"])]
    return {
        "decode_ms": {depth: row["ms_per_token"] for depth, row in decode.items()},
        "prefill_t_s": {depth: row["tokens_per_s"] for depth, row in prefill.items()},
        "first_token_s": first_token(model, [*run, *contender.options]),
        "limits": medians_of([limits for one in told for limits in one["limits"].values()]),
        "decode_limit_ms": {depth: limit_ms(row) for depth, row in decode.items()},
        "prefill_limit_ms": {depth: limit_ms(row) for depth, row in prefill.items()},
        "parts": {depth: {name: part["ms"] for name, part in row["parts"].items()} for depth, row in decode.items()},
        "machine": f"{case['cpu']}, {os.cpu_count()} CPUs, {platform.system()}",
    }


def limit_ms(row: Result) -> dict[str, float]:
    """What a token would take if only DRAM, or only the products, were to be waited for."""
    shares = {"read": "of_read", "peak": "of_peak"}
    parts = row["parts"].values()
    return {name: sum(part["ms"] * (part[share] or 0) for part in parts) for name, share in shares.items()}


def time_peer(python: str, model: str, contender: Contender, case: Result) -> Result:
    """{"decode_ms", "prefill_t_s": {depth: median}, "first_token_s", "version"}"""
    worker = [python, str(WORKER), contender.engine, model, "--threads", str(case["threads"]), *contender.options]
    sizes = ["--n-gen", str(case["n_gen"]), "--n-prompt", str(case["n_prompt"])]
    told = _json([*worker, *sizes, "--depths", case["depths"], "--prompt-depths", case["prompt_depths"]])
    return {
        "decode_ms": {depth: statistics.median(ms) for depth, ms in told["decode_ms"].items()},
        "prefill_t_s": {depth: case["n_prompt"] / statistics.median(s) for depth, s in told["prefill_s"].items()},
        "first_token_s": first_token(model, [*worker, "--first-token"]),
        "version": told["version"],
    }


def first_token(model: str, command: list[str]) -> float:
    """Seconds that the process takes."""
    seconds = 0.0
    for _ in range(2):
        into_page_cache(model)
        start = time.perf_counter()
        _output(command)
        seconds = time.perf_counter() - start
    return seconds


def into_page_cache(path: str) -> None:
    with open(path, "rb", buffering=0) as file:
        buffer = bytearray(16 << 20)
        while file.readinto(buffer):
            pass


def _json(command: list[str]) -> Result:
    """What the process prints: JSON, after other lines perhaps."""
    output = _output(command)
    told: Result = json.loads(output if output.startswith("{") else output.strip().splitlines()[-1])
    return told


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout


if __name__ == "__main__":
    main()
