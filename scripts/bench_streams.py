"""What an application that embeds konly feels: texts side by side, guessed tokens, stopping, and its own threads.

    python scripts/bench_streams.py [MODEL.gguf] [-ctk q8] [-t 2]

batch        tokens per second of 1, 2, 4, 8 and 16 streams in a step, against one
speculation  seconds of a text that repeats its prompt, and of one that does not, with and without; what was accepted
cancel       milliseconds from cancel() in another thread to the end of the step, at random moments of a long prompt
host         milliseconds that a thread of the host waits for its turn, beside sleep(1 ms), during a long prompt
"""

from __future__ import annotations

import json
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import click
import numpy as np

from engine import Cancelled, Engine
from engine.batch import Batch
from engine.generation import Text
from engine.request import Request

ROWS = (1, 2, 4, 8, 16)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("model", type=click.Path(exists=True, dir_okay=False), required=False)
@click.option("-ctk", "--type-k", default="q8", show_default=True)
@click.option("-t", "--threads", default=0, help="0: one for each physical core.", show_default=True)
@click.option("-n", "--n-gen", default=24, help="Steps to time.", show_default=True)
@click.option("-p", "--n-prompt", default=2048, help="Tokens of the long prompt.", show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(model: str | None, type_k: str, threads: int, n_gen: int, n_prompt: int, as_json: bool) -> None:
    engine = Engine(model, n_ctx=n_prompt + 1024, type_k=type_k, n_threads=threads or None)
    result = {
        "batch": batch(engine, n_gen),
        "speculation": speculation(engine),
        "cancel_ms": spread(cancel(engine, n_prompt)),
        "host_ms": spread(host(engine, n_prompt)),
    }
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    one = result["batch"][1]
    for n, rate in result["batch"].items():
        click.echo(f"batch of {n:2}: {rate:8.1f} t/s, {rate / one:.2f} x")
    for name, (plain, fast, drafted, accepted) in result["speculation"].items():
        click.echo(f"{name}: {plain:.2f} s, guessing {fast:.2f} s: {plain / fast:.2f} x; {accepted} of {drafted} right")
    for name in ("cancel_ms", "host_ms"):
        click.echo(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in result[name].items()))


def batch(engine: Engine, n_gen: int) -> dict[int, float]:
    """Tokens per second by number of streams, in turns, so that all see the same machine."""
    rng = np.random.default_rng(1)
    steps: dict[int, Callable[[], None]] = {}
    for n in ROWS:
        steps[n] = stepper(Batch(engine, n), rng)
        steps[n]()
    times: dict[int, list[float]] = {n: [] for n in ROWS}
    for _ in range(n_gen):
        for n, step in steps.items():
            start = time.perf_counter()
            step()
            times[n].append(time.perf_counter() - start)
    return {n: n / statistics.median(found) for n, found in times.items()}


def stepper(batch: Batch, rng: np.random.Generator) -> Callable[[], None]:
    """One step of a batch's streams, each with a random token: experts are chosen independently."""
    texts = []
    for stream in list(batch._idle):
        ids = rng.integers(0, stream.tokenizer.n_vocab, 8).tolist()
        text = Text(stream, ids, Request())
        text.prepare()
        text.prompt()
        texts.append(text)

    def step() -> None:
        for text in texts:
            text.history.append(int(rng.integers(0, text.n_vocab)))
        batch._step(texts)

    return step


def speculation(engine: Engine, n: int = 96) -> dict[str, tuple[float, float, int, int]]:
    """(seconds without, with, tokens guessed, right) by kind of text. The model is made to follow a text: whether
    guesses are right depends on that text alone, so a file of random weights will do."""
    rng = np.random.default_rng(2)
    code = rng.integers(10, engine.tokenizer.n_vocab, 120).tolist()
    edited = [*code[:50], *rng.integers(10, engine.tokenizer.n_vocab, 3).tolist(), *code[52:]][:n]
    story = rng.integers(10, engine.tokenizer.n_vocab, n).tolist()
    found = {}
    for name, text in (("edited code", edited), ("a story", story)):
        plain, fast = (timed(engine, code, text, speculate) for speculate in (False, True))
        found[name] = plain, fast, engine.stats.n_drafted, engine.stats.n_accepted
    return found


def timed(engine: Engine, prompt: list[int], text: list[int], speculate: bool) -> float:
    def follow(history: list[int], logits: np.ndarray) -> None:
        logits[text[len(history) - len(prompt)]] = 1e4

    list(
        engine.generate(
            prompt, max_tokens=len(text), temperature=0, ignore_eos=True, logits_processor=follow, speculate=speculate
        )
    )
    return engine.stats.t_generated


def cancel(engine: Engine, n_prompt: int, times: int = 20) -> Iterator[float]:
    """Milliseconds from the flag to the end of the step."""
    tokens = np.random.default_rng(3).integers(0, engine.tokenizer.n_vocab, n_prompt)
    engine.clear()
    start = time.perf_counter()
    engine.step(tokens)
    whole = time.perf_counter() - start
    for i in range(times):
        asked = [0.0]

        def ask(asked: list[float] = asked) -> None:
            asked[0] = time.perf_counter()
            engine.cancel()

        engine.clear()
        timer = threading.Timer(whole * (i + 0.5) / times * 0.8, ask)
        timer.start()
        try:
            engine.step(tokens)
        except Cancelled:
            yield (time.perf_counter() - asked[0]) * 1e3
        timer.join()


def host(engine: Engine, n_prompt: int) -> list[float]:
    """Milliseconds of each sleep(1 ms) of a thread of the host."""
    tokens = np.random.default_rng(4).integers(0, engine.tokenizer.n_vocab, n_prompt)
    waits: list[float] = []
    over = threading.Event()

    def live() -> None:
        while not over.is_set():
            start = time.perf_counter()
            time.sleep(0.001)
            waits.append((time.perf_counter() - start) * 1e3)

    thread = threading.Thread(target=live)
    engine.clear()
    thread.start()
    engine.step(tokens)
    over.set()
    thread.join()
    return waits


def spread(values: Iterator[float] | list[float]) -> dict[str, float]:
    found = sorted(values)
    return {"median": statistics.median(found), "p99": found[int(0.99 * (len(found) - 1))], "max": found[-1]}


if __name__ == "__main__":
    main()
