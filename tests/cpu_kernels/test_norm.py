"""RMS norm against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from compare import assert_close

from cpu_kernels.norm import rms_norm
from cpu_kernels.threads import Run
from engine import reference


@pytest.mark.parametrize("n", [16, 37, 512, 2048])
@pytest.mark.parametrize("n_tok", [1, 3])
def test_rms_norm_is_the_reference_s(n: int, n_tok: int) -> None:
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n_tok, n + 5), dtype=np.float32)[:, :n]  # rows with a stride of their own
    weight = rng.standard_normal(n, dtype=np.float32)
    out = np.empty((n_tok, n), np.float32)
    run = Run(1)
    rms_norm(run, x, weight, 1e-6, out)
    run.sync()
    expected = reference.rms_norm(x.astype(np.float64), weight.astype(np.float64), 1e-6)
    assert_close(out, expected, rtol=3e-6)  # f32 sums over 16 lanes


def test_rms_norm_works_in_place() -> None:
    x = np.random.default_rng(0).standard_normal((2, 64), dtype=np.float32)
    expected = reference.rms_norm(x.astype(np.float64), np.ones(64), 0.1)
    run = Run(1)
    rms_norm(run, x, np.ones(64, np.float32), 0.1, x)
    run.sync()
    assert_close(x, expected, rtol=3e-6)


def test_rms_norm_refuses_a_weight_of_another_length() -> None:
    with pytest.raises(ValueError, match="weight"):
        rms_norm(Run(1), np.ones((1, 32), np.float32), np.ones(16, np.float32), 1e-6, np.ones((1, 32), np.float32))
