"""Perplexity by llama.cpp's method, beside the formula and llama.cpp's own logits; KL against another stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from llama_cpp_peer import LlamaCpp
from synthetic import write_model

from engine import Engine, EngineError
from engine.perplexity import perplexity
from engine.stream import Stream

N_CTX = 64


@pytest.fixture(scope="module")
def model() -> Iterator[Engine]:
    engine = Engine(n_ctx=256, type_k="f16")
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tokens(model: Engine) -> list[int]:
    """Three and a half chunks, BOS at the start."""
    text = "".join(model.generate("Once upon a time there was a brave rabbit named Pip.", max_tokens=230, seed=5))
    return model.tokenize(text + " The end of the day was near, and the fox came home." * 20)[: 3 * N_CTX + N_CTX // 2]


def predictions(stream: Stream, chunk: list[int]) -> np.ndarray:
    """Log probabilities, float64, after each token of the second half but the last; in the steps that it takes."""
    first = len(chunk) // 2
    stream.clear()
    stream.step(chunk[:first])
    return exact_log_softmax(stream.step(chunk[first:-1], logits="all"))


def exact_log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: np.ndarray = x - np.log(np.exp(x).sum(axis=1, keepdims=True))
    return result


def losses(log_probs: np.ndarray, chunk: list[int]) -> list[float]:
    """Of the tokens of a chunk's second half, its first apart."""
    targets = chunk[len(chunk) // 2 + 1 :]
    return [-float(row[token]) for row, token in zip(log_probs, targets, strict=True)]


def chunks(model: Engine, tokens: list[int]) -> Iterator[list[int]]:
    """As llama-perplexity cuts them: BOS takes the place of each first token."""
    bos = model.tokenizer.bos_id
    assert bos is not None and model.tokenizer.add_bos
    for at in range(0, len(tokens) // N_CTX * N_CTX, N_CTX):
        yield [bos, *tokens[at + 1 : at + N_CTX]]


def test_it_is_the_formula_over_second_halves(model: Engine, tokens: list[int]) -> None:
    expected: list[float] = []
    for chunk in chunks(model, tokens):
        expected += losses(predictions(model, chunk), chunk)
    found = perplexity(model, tokens, n_ctx=N_CTX)
    assert (found["chunks"], found["tokens"], found["n_ctx"]) == (3, 3 * 31, N_CTX)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=1e-5)  # f32
    deviation = np.std(expected) / math.sqrt(len(expected) - 1)
    assert found["error"] == pytest.approx(found["perplexity"] * deviation, rel=1e-4)


@pytest.mark.usefixtures("llama_cpp")
def test_it_is_what_llama_cpp_finds(model: Engine, tokens: list[int]) -> None:
    expected: list[float] = []
    with LlamaCpp(model.path, n_ctx=512) as peer:
        for chunk in chunks(model, tokens):
            peer.clear()
            logits = peer.eval(chunk, 0)[N_CTX // 2 : -1]
            expected += losses(exact_log_softmax(logits), chunk)
    found = perplexity(model, tokens, n_ctx=N_CTX)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(expected)), rel=2e-2)  # both round activations to int8


def test_a_stream_agrees_with_itself(model: Engine, tokens: list[int]) -> None:
    same = model.stream()
    found = perplexity(model, tokens, n_ctx=N_CTX, against=same)
    assert found["kl"]["mean"] == found["kl"]["max"] == 0.0
    assert found["same_top"] == 1.0
    assert found["perplexity"] == found["perplexity_against"]
    assert (model.n_kv, same.n_kv) == (0, 0)


def test_another_type_of_cache_differs_a_little(model: Engine, tokens: list[int]) -> None:
    kl = perplexity(model, tokens, n_ctx=N_CTX, against=model.stream(type_k="q8"))["kl"]
    assert 1e-7 < kl["mean"] < 1e-2
    assert 0 <= kl["median"] <= kl["p99"] <= kl["max"]


def test_kl_is_of_the_other_to_the_model(model: Engine, tokens: list[int]) -> None:
    other = model.stream(type_k="q8")
    (chunk, *_) = chunks(model, tokens)
    q, p = predictions(model, chunk), predictions(other, chunk)
    found = perplexity(model, tokens, n_ctx=N_CTX, n_chunks=1, against=other)["kl"]["mean"]
    assert found == pytest.approx((np.exp(p) * (p - q)).sum(1).mean(), rel=1e-3)
    assert found != pytest.approx((np.exp(q) * (q - p)).sum(1).mean(), rel=1e-3)


def test_chunks_can_be_limited_and_are_told(model: Engine, tokens: list[int]) -> None:
    told: list[tuple[int, int, float]] = []
    found = perplexity(model, tokens, n_ctx=N_CTX, n_chunks=2, progress=lambda *so_far: told.append(so_far))
    assert [so_far[:2] for so_far in told] == [(1, 2), (2, 2)]
    assert told[-1][2] == pytest.approx(found["perplexity"])


def test_the_rest_that_fills_no_chunk_is_left_out(model: Engine, tokens: list[int]) -> None:
    whole = perplexity(model, tokens[: 3 * N_CTX], n_ctx=N_CTX)
    assert perplexity(model, tokens, n_ctx=N_CTX) == whole


def test_a_short_text_is_refused(model: Engine, tokens: list[int]) -> None:
    with pytest.raises(EngineError, match=r"the text has 127 tokens; expected two chunks of n_ctx=64 at least"):
        perplexity(model, tokens[:127], n_ctx=N_CTX)


def test_a_chunk_must_fit_the_cache(model: Engine, tokens: list[int]) -> None:
    with pytest.raises(EngineError, match="chunks of 64 tokens do not fit n_ctx=32"):
        perplexity(model.stream(n_ctx=32), tokens, n_ctx=N_CTX)


def test_another_vocabulary_is_refused(model: Engine, tokens: list[int], model_file: Path) -> None:
    other = Engine(write_model(model_file, q_lora_rank=64))
    with pytest.raises(EngineError, match="different vocabularies"):
        perplexity(model, tokens, n_ctx=N_CTX, against=other)
