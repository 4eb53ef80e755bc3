"""assert_close: compare an array with the oracle's, in steps, and say which element is worst.

Shape and dtype, then the positions of inf and nan, then every element (absolute *or* relative), then the whole (NMSE).
assert_relative_rms: the whole alone, which is how logits are compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def assert_close(
    actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0, nmse: float | None = None, dtype: Any = None
) -> None:
    """Fail unless `actual` is `expected` within atol or rtol · |expected| for each element, and within nmse as a whole.

    dtype  of `actual`; by default that of `expected`, or float32 as well where `expected` is the float64 oracle's
    nmse   sum((actual - expected)²) / sum(expected²), at most
    """
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    allowed = {np.dtype(dtype)} if dtype is not None else {expected.dtype}
    if dtype is None and expected.dtype == np.float64:
        allowed.add(np.dtype(np.float32))
    assert actual.dtype in allowed, f"dtype {actual.dtype}, expected {' or '.join(sorted(map(str, allowed)))}"

    a, e = actual.astype(np.float64), expected.astype(np.float64)
    strange = ~np.isfinite(a) | ~np.isfinite(e)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    wrong = strange & ~same
    assert not wrong.any(), f"inf or nan: {wrong.sum()} of {wrong.size} differ; {_element(a, e, wrong)}"

    a, e = np.where(strange, 0.0, a), np.where(strange, 0.0, e)
    error = np.abs(a - e)
    excess = error - np.maximum(atol, rtol * np.abs(e))
    wrong = excess > 0
    assert not wrong.any(), (
        f"{wrong.sum()} of {wrong.size} elements differ by more than atol={atol:g} and rtol={rtol:g}; "
        f"worst: {_element(a, e, excess)}; nmse {_nmse(a, e):.3g}"
    )
    if nmse is not None:
        found = _nmse(a, e)
        assert found <= nmse, f"nmse {found:.3g}, expected at most {nmse:g}; worst: {_element(a, e, error)}"


def assert_relative_rms(actual: Any, expected: Any, tolerance: float) -> None:
    """Fail unless rms(actual - expected) is within tolerance * rms(expected), over all elements; f32 or f64."""
    assert_close(actual, np.asarray(expected, np.float64), atol=np.inf, nmse=tolerance**2)


def _nmse(a: np.ndarray, e: np.ndarray) -> float:
    squares, errors = float((e * e).sum()), float(((a - e) ** 2).sum())
    return errors / squares if squares else (0.0 if errors == 0.0 else np.inf)


def _element(a: np.ndarray, e: np.ndarray, badness: np.ndarray) -> str:
    index = np.unravel_index(int(np.argmax(badness)), badness.shape)
    where = tuple(int(i) for i in index)
    with np.errstate(all="ignore"):
        error = np.abs(a[index] - e[index])
        relative = error / np.abs(e[index])
    return f"at {where}: {a[index]:.9g}, expected {e[index]:.9g} (off by {error:.3g}, relative {relative:.3g})"
