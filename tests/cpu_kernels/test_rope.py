"""RoPE against the float64 reference, both orders of pairs."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close

from cpu_kernels.rope import rope
from cpu_kernels.threads import Run
from engine import reference

POSITIONS = np.array([0, 1, 4095])


def turned(neox: bool, n_rot: int) -> tuple[np.ndarray, np.ndarray]:
    """(kernel's, the input) for random heads that lie in wider rows."""
    rng = np.random.default_rng(n_rot)
    q = rng.standard_normal((3, 4, 16 + n_rot), dtype=np.float32)
    angle = POSITIONS[:, None] * inv_freq(n_rot)
    cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)
    x = q[:, :, 16:].copy()
    run = Run(1)
    rope(run, q[:, :, 16:], cos_sin, q[:, :, 16:], neox=neox)
    run.sync()
    return q[:, :, 16:], x


def inv_freq(n_rot: int) -> np.ndarray:
    return 10000.0 ** -(np.arange(0, n_rot, 2) / n_rot)


@pytest.mark.parametrize("n_rot", [32, 64])
@pytest.mark.parametrize("neox", [False, True])
def test_rope_is_the_reference_s(neox: bool, n_rot: int) -> None:
    out, x = turned(neox, n_rot)
    style = "neox" if neox else "norm"
    assert_close(out, reference.rope(x.astype(np.float64), POSITIONS, inv_freq(n_rot), style=style), atol=1e-6)


def test_the_other_order_of_pairs_is_told_apart() -> None:
    out, x = turned(False, 64)
    expected = reference.rope(x.astype(np.float64), POSITIONS, inv_freq(64), style="neox")
    with pytest.raises(AssertionError, match="elements differ"):
        assert_close(out, expected, atol=1e-2)
