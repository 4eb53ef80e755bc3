"""How well a model predicts a text, by llama.cpp's method, so that figures can be compared with `llama-perplexity`.

    text ─ tokens ─ chunks of n_ctx ─► each from an empty cache, its first token replaced by BOS (if the model has one)
                    │ first half: context, not scored │ second half: the probability of each next token │

Perplexity is exp of the mean negative log-likelihood over all scored tokens; its standard error is that of the mean,
carried through the exp. A rest that fills no chunk is left out.

Beside a second stream, `against` (another file of the same tokenizer, or another type_k), the same tokens give
KL(against ‖ model) of the whole distributions in nats, and how often the most probable token is the same. The two are
computed chunk by chunk, a few hundred rows at a time: no file of logits is needed.

Source: llama.cpp tools/perplexity/perplexity.cpp, `perplexity` and `kl_divergence`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import EngineError
from .stream import Stream

N_CTX = 512  # llama-perplexity's default
PIECE = 256  # rows of logits at a time: (256, 160,000) f32 are 164 MB

Progress = Callable[[int, int, float], None]  # chunks done, chunks in all, perplexity so far


def perplexity(
    stream: Stream,
    tokens: Sequence[int],
    *,
    n_ctx: int = N_CTX,
    n_chunks: int | None = None,
    against: Stream | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Plain data, ready for JSON.

    {"perplexity", "error", "n_ctx", "chunks", "tokens": how many were scored}
    and with `against`: {"kl": {"mean", "error", "median", "p99", "max"}, "same_top", "same_top_error",
                         "perplexity_against", "error_against"}
    tokens   with BOS at the start, as encode() gives them
    """
    total = _n_chunks(tokens, n_ctx, n_chunks)
    for one in filter(None, (stream, against)):
        if one.n_ctx < n_ctx:
            raise EngineError(f"chunks of {n_ctx:,} tokens do not fit n_ctx={one.n_ctx:,}; open the engine with more")
    if against is not None:
        _check_same_vocabulary(stream, against)
    losses: list[np.ndarray] = []
    others: list[np.ndarray] = []
    kl: list[np.ndarray] = []
    same: list[np.ndarray] = []
    for i in range(total):
        chunk = np.array(tokens[i * n_ctx : (i + 1) * n_ctx])
        if stream.tokenizer.add_bos and stream.tokenizer.bos_id is not None:
            chunk[0] = stream.tokenizer.bos_id
        pairs = zip(_log_probs(stream, chunk), _log_probs(against, chunk)) if against is not None else None
        for targets, q, p in _pieces(chunk, pairs, stream):
            rows = np.arange(len(targets))
            losses.append(-q[rows, targets])
            if p is not None:
                others.append(-p[rows, targets])
                kl.append(np.einsum("tv,tv->t", np.exp(p), p - q, dtype=np.float64))
                same.append(p.argmax(1) == q.argmax(1))
        if progress is not None:
            progress(i + 1, total, math.exp(float(np.mean(np.concatenate(losses)))))
    stream.clear()
    ppl, error = _exp_of_mean(np.concatenate(losses))
    result = {"perplexity": ppl, "error": error, "n_ctx": n_ctx, "chunks": total, "tokens": sum(map(len, losses))}
    if against is None:
        return result
    against.clear()
    return result | _divergence(np.concatenate(kl), np.concatenate(same), np.concatenate(others))


def _n_chunks(tokens: Sequence[int], n_ctx: int, n_chunks: int | None) -> int:
    if n_ctx < 4:
        raise EngineError(f"n_ctx is {n_ctx!r}; expected 4 or more: the second half of a chunk is what is scored")
    if len(tokens) < 2 * n_ctx:
        raise EngineError(
            f"the text has {len(tokens):,} tokens; expected two chunks of n_ctx={n_ctx:,} at least:"
            " give a longer text, or a smaller -c"
        )
    return min(len(tokens) // n_ctx, n_chunks or len(tokens))


def _check_same_vocabulary(stream: Stream, against: Stream) -> None:
    ours, theirs = stream.tokenizer, against.tokenizer
    n = ours.n_vocab
    if n != theirs.n_vocab or any(ours.token_bytes(i) != theirs.token_bytes(i) for i in range(n)):
        raise EngineError(
            f"the two models have different vocabularies ({n:,} and {theirs.n_vocab:,} tokens); KL needs the same one"
        )


def _log_probs(stream: Stream, chunk: np.ndarray) -> Iterator[np.ndarray]:
    """Log probabilities (n, n_vocab) f32 after tokens n_ctx / 2 … n_ctx - 2 of a chunk, piece by piece."""
    n_text = min(stream.hparams.n_vocab, stream.tokenizer.n_vocab)
    first = len(chunk) // 2
    stream.clear()
    stream.step(chunk[:first])
    for start in range(first, len(chunk) - 1, PIECE):
        yield log_softmax(stream.step(chunk[start : min(start + PIECE, len(chunk) - 1)], logits="all")[:, :n_text])


def _pieces(
    chunk: np.ndarray, pairs: Iterator[tuple[np.ndarray, np.ndarray]] | None, stream: Stream
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray | None]]:
    """(tokens to predict, log probabilities of the stream, of the other)"""
    at = len(chunk) // 2 + 1
    for q, p in pairs if pairs is not None else ((q, None) for q in _log_probs(stream, chunk)):
        yield chunk[at : at + len(q)], q, p
        at += len(q)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Of each row, in place; the sum in float64."""
    logits -= logits.max(axis=1, keepdims=True)
    sums = np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)
    logits -= np.log(sums).astype(np.float32)
    return logits


def _exp_of_mean(losses: np.ndarray) -> tuple[float, float]:
    """Perplexity and its standard error."""
    ppl = math.exp(float(losses.mean(dtype=np.float64)))
    return ppl, ppl * _error(losses)


def _error(x: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(x.std(dtype=np.float64)) / math.sqrt(max(1, len(x) - 1))


def _divergence(kl: np.ndarray, same: np.ndarray, losses: np.ndarray) -> dict[str, Any]:
    ppl, error = _exp_of_mean(losses)
    return {
        "kl": {
            "mean": float(kl.mean()),
            "error": _error(kl),
            "median": float(np.median(kl)),
            "p99": float(np.percentile(kl, 99)),
            "max": float(kl.max()),
        },
        "same_top": float(same.mean()),
        "same_top_error": _error(same),
        "perplexity_against": ppl,
        "error_against": error,
    }
