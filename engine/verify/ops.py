"""One op at a time: Watched(ops, watch) executes each op as it is queued, and can compare it with float64.

A model's forward() on a Step whose ops are Watched goes through the same kernels as a recorded step, but stops after
each. So a Watch sees the hidden state at every norm, knows by the norm's weight which layer it is in, and compares what
an op writes with what engine/reference.py makes of the very inputs that it had: an error is the op's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

from .. import reference
from ..reference import Array
from ..tensor import QuantTensor

# NMSE: sum of squared errors over sum of squares. Measured of all weight types and type_k: exact ops 1e-13, float
# weights up to 1e-5 (bf16 products), quantised ones with int8 activations up to 2e-4; a broken kernel is far beyond.
EXACT, FLOAT, ROUNDED = 1e-9, 1e-4, 2e-3
FLOATS = ("F32", "F16", "BF16")

Args = tuple[Any, ...]
Compared = tuple[str, Any, Any, float]  # what of the op, found, expected, tolerance
Seen = tuple[str, float, float]  # op and tensor, NMSE, tolerance


class Watched:
    """A backend's ops (engine/backend.py), each executed at once; `watch` is told before and after."""

    def __init__(self, ops: ModuleType, watch: Watch):
        self._ops, self._watch = ops, watch

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._ops, name)
        if name not in CHECKS:
            return op

        def execute(run: Any, *args: Any) -> None:
            self._watch.meets(name, args)
            checked = self._watch.checks_here
            before = tuple(map(_copied, args)) if checked or name == "route" else ()
            op(run, *args)
            run.sync()
            if name == "route":
                self._watch.routes(before, args)
            if checked:
                self._watch.compare(name, before, args)

        def keywords(run: Any, *args: Any, accumulate: bool = False) -> None:
            """matmul's keyword as a position, so that checks see all arguments alike."""
            execute(run, *args, accumulate)

        return keywords if name == "matmul" else execute


class Watch:
    """What is seen of a model's forward passes, each of some tokens that follow those of the one before.

    check   layers whose ops are compared; -1 is what comes before and after the layers
    seen    {il: [(op, NMSE, tolerance)]} of these
    """

    def __init__(self, weights: Any, check: Iterable[int] = ()):
        self._norms = {id(layer.norm): (il, "in") for il, layer in enumerate(weights.attention)}
        self._norms |= {id(norm): (il, "mid") for il, norm in enumerate(weights.ffn_norm)}
        self._norms[id(weights.output_norm)] = (len(weights.ffn_norm), "in")
        self._n_layer = len(weights.ffn_norm)
        self._il = -1
        self._states: dict[tuple[int, str], list[np.ndarray]] = {}
        self._routes: dict[int, list[tuple[np.ndarray, np.ndarray, float]]] = {}
        self.seen: dict[int, list[Seen]] = {il: [] for il in check}

    def state(self, il: int, place: str) -> np.ndarray:
        """(n_tok, n_embd) f32: 'in' before the attention of layer il, 'mid' before its feed-forward, 'out' after it."""
        key = (il + 1, "in") if place == "out" else (il, place)
        return np.concatenate(self._states[key])

    def routing(self, il: int) -> tuple[np.ndarray, np.ndarray, float] | None:
        """(router's logits (n_tok, n_expert), chosen experts, NMSE of the choice itself); None in a dense layer."""
        if il not in self._routes:
            return None
        logits, ids, off = zip(*self._routes[il])
        return np.concatenate(logits), np.concatenate(ids), max(off)

    @property
    def checks_here(self) -> bool:
        return self._il in self.seen

    def meets(self, name: str, args: Args) -> None:
        """An op is about to be executed: find out the layer, keep the hidden state."""
        if name == "embed_rows":
            self._il = -1
        if name == "rms_norm" and id(args[1]) in self._norms:
            il, place = self._norms[id(args[1])]
            self._states.setdefault((il, place), []).append(args[0].copy())
            self._il = il if il < self._n_layer else -1

    def routes(self, before: Args, after: Args) -> None:
        ((_, found, expected, _),) = CHECKS["route"](before, after)
        self._routes.setdefault(self._il, []).append((before[0], after[7].copy(), nmse(found, expected)))

    def compare(self, name: str, before: Args, after: Args) -> None:
        for what, found, expected, tolerance in CHECKS[name](before, after):
            self.seen[self._il].append((f"{name}{what}", nmse(found, expected), tolerance))


def nmse(found: Any, expected: Any) -> float:
    """Sum of squared errors over the sum of squares; inf where something found is not finite and should be."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if not np.isfinite(found).all():
        return float("inf")
    squares, errors = float(np.square(expected).sum()), float(np.square(found - expected).sum())
    return errors / squares if squares else (0.0 if errors == 0.0 else float("inf"))


def tolerance_of(*weights: QuantTensor) -> float:
    """What products with these may be off by."""
    return FLOAT if all(w.type.name in FLOATS for w in weights) else ROUNDED


def _copied(arg: Any) -> Any:
    if isinstance(arg, list):
        return [_copied(one) for one in arg]
    return arg.copy() if isinstance(arg, np.ndarray) else arg


# ------------------------------------------------------------------------------------- what each op should have done
# Each takes the op's arguments after `run`, as they were before it and as they are after it.


def _embed_rows(before: Args, after: Args) -> Iterator[Compared]:
    weight, tokens, _ = before
    yield _of(weight), after[2], reference.dequantise(weight, np.asarray(tokens, np.int64)), EXACT


def _rms_norm(before: Args, after: Args) -> Iterator[Compared]:
    x, weight, eps, _ = before
    yield "", after[3], reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), eps), EXACT


def _matmul(before: Args, after: Args) -> Iterator[Compared]:
    weights, x, outs, accumulate = before
    several = isinstance(weights, list)
    for w, out, found in zip(*((weights, outs, after[2]) if several else ([weights], [outs], [after[2]]))):
        product = x.astype(np.float64) @ reference.dequantise(w).T
        added = found.astype(np.float64) - out if accumulate else found  # what was there must not hide an error
        yield _of(w), added, product, tolerance_of(w)


def _matmul_heads(before: Args, after: Args) -> Iterator[Compared]:
    weight, x, _ = before
    yield (
        _of(weight),
        after[2],
        np.einsum("thk,hmk->thm", x, reference.dequantise(weight), dtype=np.float64, optimize=True),
        tolerance_of(weight),
    )


def _rope(before: Args, after: Args) -> Iterator[Compared]:
    x, cos_sin, _ = before
    yield "", after[2], _turned(x, cos_sin), EXACT


def _turned(x: np.ndarray, cos_sin: np.ndarray) -> Array:
    """x (n_tok, …, n_rot) with its pairs (2j, 2j + 1) turned by [cos | sin] (n_tok, n_rot)."""
    x = x.astype(np.float64)
    shape = (len(x), *(1,) * (x.ndim - 2), x.shape[-1] // 2)
    cos, sin = (part.astype(np.float64).reshape(shape) for part in np.split(cos_sin, 2, axis=1))
    out = np.empty_like(x)
    out[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    out[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    return out


def _k_store(before: Args, after: Args) -> Iterator[Compared]:
    kv_a, weight, eps, cos_sin, positions, _, type_k, rank, n_rot = before
    g = weight.astype(np.float64)
    latent = reference.rms_norm(kv_a[:, :rank].astype(np.float64), g, eps)
    expected = np.concatenate([latent, _turned(kv_a[:, rank:], cos_sin)], axis=1)
    found = _latent_rows(after[5][positions], type_k, rank, n_rot, g)
    yield f" ({type_k})", found, expected, ROUNDED if type_k == "q8" else FLOAT


def _rotate_query(before: Args, after: Args) -> Iterator[Compared]:
    q, weight, rank = before
    yield "", after[0][..., :rank], _hadamard(q[..., :rank] * weight.astype(np.float64)), EXACT


def _unrotate_output(before: Args, after: Args) -> Iterator[Compared]:
    x, weight = before
    yield "", after[0], _hadamard(x) * weight.astype(np.float64), EXACT


def _mla_decode(before: Args, after: Args) -> Iterator[Compared]:
    q, rows, type_k, n_kv, rank, n_rot, kq_scale, _ = before
    stored = _stored_rows(rows[: int(n_kv.max())], type_k, rank, n_rot)
    expected = reference.mla_attention_from_rows(q, stored, n_kv, rank, kq_scale)
    yield f" ({type_k})", after[7], expected, ROUNDED if type_k == "q8" else FLOAT


def _mla_prefill(before: Args, after: Args) -> Iterator[Compared]:
    q, rows, type_k, n_past, rank, n_rot, kq_scale, w_uk, w_uv, weight, _ = before
    n_kv = n_past + 1 + np.arange(len(q))
    latent_rows = _latent_rows(rows[: n_kv[-1]], type_k, rank, n_rot, weight.astype(np.float64))
    k, v = reference.expand(latent_rows, reference.dequantise(w_uk).transpose(0, 2, 1), reference.dequantise(w_uv))
    expected = reference.attention(q.astype(np.float64), k, v, n_kv, kq_scale)
    tolerance = ROUNDED if type_k == "q8" else tolerance_of(w_uk, w_uv)
    yield f" ({type_k}){_of(w_uk)}", after[10], expected, tolerance


def _swiglu(before: Args, after: Args) -> Iterator[Compared]:
    gate, up = before[0].astype(np.float64), before[1].astype(np.float64)
    yield "", after[2], gate * reference.sigmoid(gate) * up, EXACT


def _route(before: Args, after: Args) -> Iterator[Compared]:
    logits, bias, gating, n_groups, n_group_used, norm, scale, ids, _ = before
    _, expected = reference.route(
        logits.astype(np.float64), ids.shape[1], gating=gating, bias=bias, n_groups=n_groups, n_group_used=n_group_used,
        norm=norm, scale=scale,
    )  # fmt: skip
    yield "", np.sort(after[8], axis=1), np.sort(expected, axis=1), EXACT


def _experts(before: Args, after: Args) -> Iterator[Compared]:
    x, ids, weights, gate, up, down, out = before

    def expert(e: int) -> tuple[Array, Array, Array]:
        gate_e, up_e, down_e = (reference.dequantise(w, e) for w in (gate, up, down))
        return gate_e, up_e, down_e

    expected = reference.moe(x.astype(np.float64), ids, weights.astype(np.float64), expert)
    yield _of(gate), after[6].astype(np.float64) - out, expected, tolerance_of(gate, up, down)


CHECKS: dict[str, Callable[[Args, Args], Iterator[Compared]]] = {
    "embed_rows": _embed_rows,
    "rms_norm": _rms_norm,
    "matmul": _matmul,
    "matmul_heads": _matmul_heads,
    "rope": _rope,
    "k_store": _k_store,
    "rotate_query": _rotate_query,
    "unrotate_output": _unrotate_output,
    "mla_decode": _mla_decode,
    "mla_prefill": _mla_prefill,
    "swiglu": _swiglu,
    "route": _route,
    "experts": _experts,
}


def _of(weight: QuantTensor) -> str:
    return f" {weight.name} ({weight.type.name})"


def _stored_rows(rows: np.ndarray, type_k: str, rank: int, n_rot: int) -> Array:
    """K rows (n, row_stride) u8 -> (n, rank + n_rot): what mla_decode reads in them, for q8 still rotated."""
    if type_k == "q8":
        scale = np.ascontiguousarray(rows[:, rank + 2 * n_rot : rank + 2 * n_rot + 4]).view("<f4").astype(np.float64)
        latent = (rows[:, :rank].astype(np.float64) - 128.0) * scale
        return np.concatenate([latent, _halves(rows[:, rank : rank + 2 * n_rot], "bf16")], axis=1)
    return _halves(rows[:, : 2 * (rank + n_rot)], type_k)


def _latent_rows(rows: np.ndarray, type_k: str, rank: int, n_rot: int, weight: Array) -> Array:
    """The same with the latent itself."""
    stored = _stored_rows(rows, type_k, rank, n_rot)
    if type_k == "q8":
        stored[:, :rank] = _hadamard(stored[:, :rank]) * weight
    return stored


def _halves(data: np.ndarray, kind: str) -> Array:
    data = np.ascontiguousarray(data)
    if kind == "f16":
        return data.view("<f2").astype(np.float64)
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _hadamard(x: np.ndarray) -> Array:
    """Of the last axis, in blocks of the largest power of two that divides it; orthonormal."""
    n = x.shape[-1]
    block = n & -n
    y = x.astype(np.float64).reshape(*x.shape[:-1], -1, block)
    h = 1
    while h < block:
        pairs = y.reshape(*y.shape[:-1], block // (2 * h), 2, h)
        y = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2).reshape(
            y.shape
        )
        h *= 2
    return np.asarray(y * block**-0.5).reshape(x.shape)
