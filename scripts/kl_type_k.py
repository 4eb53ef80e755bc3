"""How far each type_k takes the default model's predictions, for the README's table of types.

    python scripts/kl_type_k.py --out kl.json
    python scripts/kl_type_k.py --table kl.json README.md

The text: documents of the default model's own grammar, of a seed that it was not trained on, one after the other with
BOS and EOS between, cut into chunks of 1,000 tokens; each chunk is read from an empty cache. Predictions are compared
with those of engine/reference.py, which computes the same weights in float64 by the long way, and with those of
type_k f16, whose attention computes in f32 from rows in f16. The first is what all of the engine's arithmetic costs,
products with int8 activations among it. The second is no part of the first: any change moves some of those roundings.
KL is the mean over tokens of sum p · log(p / q), in nats.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import click
import marked
import numpy as np

from engine.engine import Engine
from engine.gguf_file import read
from engine.k_cache import TYPES_K, KCacheLayout
from engine.reference import forward

SEED = 20_261
CHUNK = 1000
LATENT = {"f16": "f16, f16", "bf16": "bf16, bf16", "q8": "int8, bf16"}
WAYS = ("prompt", "token")  # in steps of 512, or one by one
Sums = dict[str, float]


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--tokens", default=24_000, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--table", nargs=2, metavar="JSON DOCUMENT", help="write the table of a JSON into a document, no more")
def main(tokens: int, out: Path | None, table: tuple[str, str] | None) -> None:
    if table:
        marked.replace(table[1], "kl_type_k", markdown(json.loads(Path(table[0]).read_text(encoding="utf-8"))))
        return
    engines = {type_k: Engine(type_k=type_k) for type_k in TYPES_K}
    some = next(iter(engines.values()))
    file = read(some.path)
    cases = [(type_k, way) for type_k in TYPES_K for way in WAYS]
    sums: dict[tuple[str, str], Sums] = {case: {"kl": 0.0, "kl_f16": 0.0, "changes": 0} for case in cases}
    n = 0
    start = time.perf_counter()
    for ids in chunks(some, -(-tokens // CHUNK)):
        exact = log_softmax(forward(some.hparams, file.tensors, ids))
        for way in WAYS:
            f16 = exact
            for type_k, engine in engines.items():
                found = log_softmax(predictions(engine, ids, way))
                f16 = found if type_k == "f16" else f16
                add(sums[type_k, way], exact, f16, found)
        n += len(ids)
        print(f"\r{n:,} tokens, {time.perf_counter() - start:.0f} s ", end="", file=sys.stderr, flush=True)
    result = {
        "model": Path(some.path).name, "tokens": n, "chunk": CHUNK, "seed": SEED,
        "rows": [{"type_k": k, "way": w} | {name: x / n for name, x in sums[k, w].items()} for k, w in cases],
    }  # fmt: skip
    if out:
        out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(markdown(result))


def chunks(engine: Engine, n: int) -> Iterator[np.ndarray]:
    """n times CHUNK token ids."""
    sys.path.append(str(Path(__file__).with_name("default_model")))
    from gen_corpus import _documents

    ids: list[int] = []
    (end,) = engine.tokenize("<|endoftext|>", add_special=False, parse_special=True)
    for text in _documents(10**9, Random(SEED)):
        ids += [*engine.tokenize(text), end]
        while len(ids) >= CHUNK:
            yield np.array(ids[:CHUNK])
            ids, n = ids[CHUNK:], n - 1
            if not n:
                return


def predictions(engine: Engine, ids: np.ndarray, way: str) -> np.ndarray:
    """Logits (n, n_vocab) after each token."""
    engine.clear()
    if way == "prompt":
        return engine.step(ids, logits="all")
    return np.stack([engine.step(ids[i : i + 1]) for i in range(len(ids))])


def add(sums: Sums, exact: np.ndarray, f16: np.ndarray, found: np.ndarray) -> None:
    sums["kl"] += float((np.exp(exact) * (exact - found)).sum())
    sums["kl_f16"] += float((np.exp(f16) * (f16 - found)).sum())
    sums["changes"] += int((exact.argmax(-1) != found.argmax(-1)).sum())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    result: np.ndarray = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return result


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "| type_k | latent, rope | bytes of a row (512 + 64) | mean KL to float64, prompt and token by token"
        " | to f16 | most probable token differs from float64's |",
        "|---|---|---|---|---|---|",
    ]
    for type_k in TYPES_K:
        prompt, token = (next(r for r in result["rows"] if (r["type_k"], r["way"]) == (type_k, way)) for way in WAYS)
        nbytes = KCacheLayout(1, 1, 512, 64, type_k).row_stride
        to_f16 = "" if type_k == "f16" else f"{prompt['kl_f16']:.1e}, {token['kl_f16']:.1e}"
        to_exact = f"{prompt['kl']:.1e}, {token['kl']:.1e}"
        changes = f"{prompt['changes']:.2%}, {token['changes']:.2%}"
        lines.append(f"| `{type_k}` | {LATENT[type_k]} | {nbytes:,} | {to_exact} | {to_f16} | {changes} |")
    note = (
        f"{result['model']}, {result['tokens']:,} tokens of its own grammar in chunks of {result['chunk']:,}, in nats;"
        " `python scripts/kl_type_k.py`."
    )
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    main()
