"""A user's program under mypy --strict: every public name has its type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import engine
from engine.request import SamplingFields

SAMPLE = """
from collections.abc import Generator

from engine import Engine, EngineError, Grammar, KCacheLayout, Sampling, Stream


def answer(path: str) -> str:
    engine = Engine(path, n_ctx=4096, type_k="q8", progress=lambda done, total, name: None)
    stream: Stream = engine.stream()
    pieces: Generator[str, None, None] = stream.generate("Hello", max_tokens=5, temperature=0.5, stop=["."])
    text = "".join(pieces)
    for response in engine.stream_generate([1, 2, 3], sampling=Sampling(top_k=1), logprobs=2, context_shift=True):
        if response.logprobs is not None:
            text += f"{response.text} {response.logprobs.logprob:.2f} {response.finish_reason}"
    texts: list[str] = engine.generate_many(["a", "b"], grammar=Grammar.regex("[a-z]+"), n_parallel=2)
    logits = engine.step(engine.tokenize("x"), logits="all")
    layout: KCacheLayout = engine.cache.layout
    engine.shift(n_keep=1, n_discard=1)
    extra = engine.load("a.session")
    return text + texts[0] + str(logits.shape) + str(layout.nbytes) + str(extra.get("title"))


async def stream_it(engine: Engine) -> None:
    try:
        async for piece in engine.agenerate("x", seed=1):
            print(piece.upper())
    except EngineError as error:
        print(error)
"""
MISTAKES = """
from engine import Engine

Engine().generate("x", max_token=5)
Engine().generate("x", temperature="hot")
"""


def mypy(tmp_path: Path, code: str) -> str:
    (tmp_path / "sample.py").write_text(code, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--follow-imports=silent",
        "--cache-dir",
        str(tmp_path),
        "sample.py",
    ]
    env = {"MYPYPATH": str(Path(engine.__file__).parents[1])} if "site-packages" not in engine.__file__ else {}
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**env, "PATH": ""}).stdout


def test_a_user_s_program_passes_the_strict_check(tmp_path: Path) -> None:
    assert "Success: no issues found" in mypy(tmp_path, SAMPLE)


def test_a_misspelt_or_wrong_argument_is_found(tmp_path: Path) -> None:
    told = mypy(tmp_path, MISTAKES)
    assert 'Unexpected keyword argument "max_token"' in told and 'has incompatible type "str"; expected "float"' in told


def test_the_keywords_of_generate_are_those_of_sampling() -> None:
    assert set(SamplingFields.__annotations__) == set(engine.Sampling.__dataclass_fields__)
