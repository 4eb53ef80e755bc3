"""The command `konly`: run, inspect, bench. It parses, calls the engine package and prints; nothing else.

Text goes to stdout as it comes, everything about it to stderr. Options are named as llama.cpp's users know them. Only
click is imported at the top, so that `konly --help` answers at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import CompileProgress, print_tables, printable, size
from .errors import EngineError

if TYPE_CHECKING:
    from .engine import Engine

TYPES_K = ("f16", "bf16", "q8")
PARTS = ("attention", "experts", "dense", "rest")


class _Commands(click.Group):
    """The one place where errors and warnings become a line, and Ctrl-C an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stdout is None:
            raise click.ClickException("standard output is closed")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a console that lacks a character is no reason to stop
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_: _note(f"Warning: {message}")
                return super().invoke(ctx)
        except EngineError as error:
            raise click.ClickException(printable(str(error))) from None
        except OSError as error:  # of writing: whatever is read has errors of its own
            if error.errno == errno.EPIPE:  # `| head` has seen enough; click leaves without a word
                raise
            raise click.ClickException(f"cannot write: {error.strerror or error}") from None
        except KeyboardInterrupt:
            click.echo(err=True)
            ctx.exit(130)


def _note(line: str) -> None:
    click.echo(printable(line), err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="konly", message="%(prog)s %(version)s")
def main() -> None:
    """Run MLA language models (DeepSeek-V2/V3 and kin, as GGUF files) on the CPU, from the K-cache alone."""


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """MODEL, or -m MODEL, or neither: the default model."""
    command = click.option("-m", "--model", "model_option", metavar="MODEL", help="The same as the argument MODEL.")(
        command
    )
    return click.argument("model", required=False)(command)


def _model(model: str | None, model_option: str | None) -> str | None:
    if model and model_option and model != model_option:
        raise click.UsageError(f"two models: {model} and -m {model_option}; give one")
    return model or model_option


@main.command(short_help="Continue a text.")
@_model_options
@click.option("-p", "--prompt", help="The text to continue; - reads it from standard input.")
@click.option("-f", "--file", type=click.Path(dir_okay=False, path_type=Path), help="Read the prompt from a file.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(-1),
    default=-1,
    help="Tokens to generate; -1: to the end of the text.",
    show_default=True,
)
@click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    default=0,
    help="Tokens the K-cache can hold; 0: as trained, at most 4096.",
    show_default=True,
)
@click.option(
    "-t", "--threads", type=click.IntRange(0), default=0, help="0: one for each physical core.", show_default=True
)
@click.option(
    "-ub",
    "--ubatch-size",
    type=click.IntRange(1),
    default=512,
    help="Prompt tokens computed at once.",
    show_default=True,
)
@click.option(
    "-ctk",
    "--cache-type-k",
    type=click.Choice(TYPES_K),
    default="f16",
    help="How the K-cache keeps its rows; q8 takes 0.57 of f16's memory.",
    show_default=True,
)
@click.option("--temp", default=0.8, help="0: always the most probable token.", show_default=True)
@click.option("--top-k", default=40, help="0: off.", show_default=True)
@click.option("--top-p", default=0.95, help="1: off.", show_default=True)
@click.option("--min-p", default=0.05, help="0: off.", show_default=True)
@click.option("--repeat-penalty", default=1.0, help="1: off.", show_default=True)
@click.option("--repeat-last-n", default=64, help="Tokens the penalty looks at; -1: all.", show_default=True)
@click.option(
    "-s",
    "--seed",
    type=click.IntRange(-1),
    default=-1,
    help="Same seed, same text; -1: another each time.",
    show_default=True,
)
@click.option("--no-display-prompt", is_flag=True, help="Print only what is generated.")
def run(
    model: str | None,
    model_option: str | None,
    prompt: str | None,
    file: Path | None,
    n_predict: int,
    ctx_size: int,
    threads: int,
    ubatch_size: int,
    cache_type_k: str,
    no_display_prompt: bool,
    **options: Any,
) -> None:
    """Continue a text: `konly run model.gguf -p "Once upon a time" -n 64 --temp 0`

    Without MODEL the small default model tells a story. The prompt may also be piped in.
    """
    path = _model(model, model_option)
    prompt = _prompt(prompt, file)
    sampling = {
        "temperature": options["temp"],
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "min_p": options["min_p"],
        "repeat_penalty": options["repeat_penalty"],
        "repeat_last_n": options["repeat_last_n"],
        "seed": None if options["seed"] == -1 else options["seed"],
    }
    import engine

    with CompileProgress() as progress, contextlib.ExitStack() as stack:
        opened = engine.Engine(
            path,
            n_ctx=ctx_size or None,
            type_k=cache_type_k,
            n_threads=threads or None,
            n_ubatch=ubatch_size,
            progress=progress,
        )
        stack.callback(opened.close)
        for remark in _remarks(opened):
            _note(remark)
        pieces = opened.generate(
            prompt, max_tokens=None if n_predict < 0 else n_predict, sampling=engine.Sampling(**sampling)
        )
        interrupted = _stream(pieces, "" if no_display_prompt else prompt)
        click.echo(_summary(opened, n_predict), err=True)
    if interrupted:
        click.get_current_context().exit(130)


def _prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt, from wherever it is to come."""
    if prompt is not None and file is not None:
        raise click.UsageError("two prompts: -p and -f; give one")
    if file is not None:
        try:
            text = _decode(file.read_bytes(), str(file))
        except OSError as error:
            raise click.UsageError(f"{file}: cannot be read ({error.strerror})") from None
    elif prompt is not None and prompt != "-":
        text = prompt if _is_text(prompt) else _decode(os.fsencode(prompt), "the prompt")
    elif sys.stdin is not None and (prompt == "-" or not sys.stdin.isatty()):
        text = _decode(sys.stdin.buffer.read(), "standard input")
    else:
        text = ""
    if not text:
        raise click.UsageError('no prompt; give one by -p "TEXT", -f FILE or on standard input')
    return text


def _is_text(argument: str) -> bool:
    """False: in an ASCII locale, say, Python could not decode all bytes of the argument."""
    return not any("\ud800" <= c <= "\udfff" for c in argument)


def _decode(content: bytes, source: str) -> str:
    """UTF-8 without the newline that ends the last line."""
    try:
        return content.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise click.UsageError(f"{source} is not UTF-8 (at byte {error.start})") from None


def _remarks(opened: Engine) -> Iterator[str]:
    """What a user should know before waiting for the text."""
    from . import memory

    n_ctx, trained = opened.n_ctx, opened.hparams.n_ctx_train
    if n_ctx > trained:
        yield f"Note: n_ctx = {n_ctx:,} is more than the {trained:,} tokens that the model was trained for"
    full, available = opened.cache.layout.nbytes, memory.available()
    if available is not None and full > available:
        yield f"Note: {n_ctx:,} tokens in the K-cache take {size(full)}; {size(available)} of memory are available"


def _stream(pieces: Generator[str], prompt: str) -> bool:
    """Print the prompt and what follows it as it comes, ending in a newline. True: interrupted by Ctrl-C."""
    out = sys.stdout
    terminal = out.isatty()
    ends_line = True

    def write(piece: str) -> None:
        nonlocal ends_line
        out.write(printable(piece, keep="\n\t") if terminal else piece)
        out.flush()
        ends_line = piece.endswith("\n") if piece else ends_line

    interrupted = False
    with contextlib.closing(pieces):
        try:
            write(prompt)
            for piece in pieces:
                write(piece)
        except KeyboardInterrupt:
            interrupted = True
        except EngineError:  # its line comes next
            if not ends_line:
                write("\n")
            raise
    after_ctrl_c = interrupted and sys.stderr.isatty()  # it shows as ^C
    if after_ctrl_c:
        click.echo(err=True)
    if not ends_line and not (after_ctrl_c and terminal):
        write("\n")
    return interrupted


def _summary(opened: Engine, n_predict: int) -> str:
    stats = opened.stats
    line = (
        f"prompt {stats.n_prompt:,} tokens, {_rate(stats.n_prompt, stats.t_prompt)} | "
        f"generated {stats.n_generated:,} tokens, {_rate(stats.n_generated - 1, stats.t_generated)} | "
        f"K-cache {size(opened.cache_bytes)} ({opened.type_k})"
    )
    if stats.finish_reason == "length" and stats.n_generated != n_predict:
        line += f" | stopped: n_ctx = {opened.n_ctx:,} is full"
    return line


def _rate(n: int, seconds: float) -> str:
    return f"{n / seconds:,.1f} t/s" if n > 0 and seconds > 0 else "- t/s"


@main.command(short_help="Tell what a GGUF file holds, and what context fits.")
@_model_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str | None, model_option: str | None, as_json: bool) -> None:
    """Tell what a GGUF file holds, what its K-cache costs, and what context fits this machine's memory."""
    from .describe import describe
    from .engine import default_model

    told = describe(_model(model, model_option) or default_model())
    if as_json:
        click.echo(json.dumps(told, indent=2))
    else:
        print_tables(_description(told), _types_table(told), _cache_table(told))
        for problem in told["problems"]:
            click.echo(printable(f"cannot run: {problem}"))


def _description(told: dict[str, Any]) -> dict[str, str]:
    rows = {
        "file": f"{told['path']}, {size(told['nbytes'])}",
        "name": told["name"] or "-",
        "architecture": told["arch"] or "-",
        "parameters": f"{told['n_params']:,}",
    }
    if "hparams" not in told:
        return rows
    h = told["hparams"]
    rows["parameters"] += f", {told['n_params_active']:,} active per token"
    rows["form"] = f"{told['form']}: {told['form_note']}"
    rows["layers"] = f"{h['n_layer']}, {h['n_layer_dense_lead']} of them dense"
    if h["n_layer_nextn"]:
        rows["layers"] += f"; {h['n_layer_nextn']} MTP blocks are skipped ({size(told['mtp_nbytes'])})"
    rows["embedding"] = f"{h['n_embd']}, vocabulary {h['n_vocab']:,}"
    rows["attention"] = (
        f"{h['n_head']} heads, nope {h['n_embd_head_nope']} + rope {h['n_rot']}, v {h['n_embd_head_v']}, "
        f"kv_lora_rank {h['kv_lora_rank']}, q_lora_rank {h['q_lora_rank'] or '-'}"
    )
    if h["n_expert"]:
        rows["experts"] = (
            f"{h['n_expert_used']} of {h['n_expert']}, {h['n_expert_shared']} shared, width {h['n_ff_exp']}, "
            f"{h['expert_gating']} routing"
        )
    scaling = "" if h["rope_scaling"] == "none" else f", {h['rope_scaling']} ×{h['rope_factor']:g}"
    rows["trained context"] = f"{h['n_ctx_train']:,} tokens (rope base {h['rope_freq_base']:g}{scaling})"
    rows["K-cache row"] = f"{h['kv_lora_rank']} latent + {h['n_rot']} rope, in each layer; no V"
    return rows


def _types_table(told: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("tensor type", "tensors", "size", "")]
    for name, entry in told["tensor_types"].items():
        rows.append((name, f"{entry['count']:,}", size(entry["nbytes"]), "" if entry["runs"] else "no kernel"))
    return rows


def _cache_table(told: dict[str, Any]) -> list[tuple[str, ...]]:
    if "k_cache" not in told:
        return []
    available = told["memory_available"]
    fits = f"n_ctx that fits {size(available)} available" if available is not None else "n_ctx that fits"
    rows: list[tuple[str, ...]] = [("type_k", "bytes per token", f"at {told['hparams']['n_ctx_train']:,} tokens", fits)]
    for type_k, entry in told["k_cache"].items():
        n_ctx = entry["n_ctx_fits"]
        shown = "unknown" if n_ctx is None else f"{n_ctx:,}"
        if n_ctx == told["hparams"]["n_ctx_train"]:
            shown += " (as trained)"
        rows.append((type_k, f"{entry['bytes_per_token']:,}", size(entry["n_ctx_train_nbytes"]), shown))
    return rows


@main.command()
@_model_options
@click.option("-p", "--n-prompt", default="512", help="Prompt lengths to time.", show_default=True)
@click.option(
    "-n", "--n-gen", type=click.IntRange(0), default=32, help="Tokens to decode at each depth.", show_default=True
)
@click.option("-d", "--depth", default="0", help="Tokens in the cache beforehand.", show_default=True)
@click.option("-t", "--threads", default="0", help="0: one for each physical core.", show_default=True)
@click.option("-ctk", "--cache-type-k", "--type-k", "type_k", default="f16", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    model: str | None,
    model_option: str | None,
    n_prompt: str,
    n_gen: int,
    depth: str,
    threads: str,
    type_k: str,
    as_json: bool,
) -> None:
    """Time prompt processing and decoding. Lists are separated by commas: `-d 0,4096 -t 1,2 -ctk f16,q8`"""
    types = [name.strip() for name in type_k.split(",")]
    if unknown := set(types) - set(TYPES_K):
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; expected {', '.join(TYPES_K)}", param_hint="'-ctk'")
    path = _model(model, model_option)
    lists = {"n_prompt": _numbers(n_prompt, "-p"), "depths": _numbers(depth, "-d"), "threads": _numbers(threads, "-t")}
    from . import bench as benchmark

    with CompileProgress() as progress:
        result = benchmark.run(path, n_gen=n_gen, type_k=types, progress=progress, **lists)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        print_tables({"model": result["model"]}, _limits_table(result), *_bench_tables(result))
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
