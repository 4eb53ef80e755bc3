"""assert_close finds every kind of difference, and says where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from compare import assert_close, assert_relative_rms

ONES = np.ones((2, 3), np.float32)


def test_equal_arrays_with_inf_and_nan_pass() -> None:
    strange = np.array([1.0, np.nan, np.inf, -np.inf], np.float32)
    assert_close(strange, strange.copy())


def test_an_element_within_either_tolerance_passes() -> None:
    assert_close(np.array([1e-9, 101.0]), np.array([0.0, 100.0]), atol=1e-8, rtol=0.011)


def test_float32_is_accepted_against_the_float64_oracle() -> None:
    assert_close(ONES, ONES.astype(np.float64))


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        (ONES[0], ONES, r"shape \(3,\), expected \(2, 3\)"),
        (ONES.astype(np.float64), ONES, "dtype float64, expected float32"),
        (ONES.astype(np.float16), ONES.astype(np.float64), "dtype float16, expected float32 or float64"),
        (np.array([1.0, np.nan]), np.array([1.0, 1.0]), r"inf or nan: 1 of 2 differ; at \(1,\): nan, expected 1"),
        (np.array([1.0, 1.0]), np.array([1.0, -np.inf]), r"at \(1,\): 1, expected -inf"),
        (np.array([np.inf]), np.array([-np.inf]), "inf or nan"),
        (np.array([[1.0, 1.1], [1.5, 1.0]]), np.ones((2, 2)), r"2 of 4 .*worst: at \(1, 0\): 1\.5, expected 1 "),
    ],
)
def test_a_difference_is_found_and_shown(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(actual, expected, atol=1e-3, rtol=1e-3)


def test_nmse_finds_an_error_which_every_element_hides() -> None:
    expected = np.linspace(-1.0, 1.0, 1001)
    with pytest.raises(AssertionError, match=r"nmse 0\.000299, expected at most 1e-06"):
        assert_close(expected + 0.01, expected, atol=0.02, nmse=1e-6)


def test_nmse_of_zeros_is_zero_or_infinite() -> None:
    assert_close(np.zeros(3), np.zeros(3), nmse=0.0)
    with pytest.raises(AssertionError, match="nmse inf"):
        assert_close(np.full(3, 1e-9), np.zeros(3), atol=1e-6, nmse=1.0)


def test_relative_rms_is_of_the_whole() -> None:
    expected = np.array([3.0, -4.0], np.float32)  # rms 3.54
    assert_relative_rms(expected * 1.01, expected, 0.0101)
    with pytest.raises(AssertionError, match=r"nmse 0\.0001, expected at most 9\.8"):
        assert_relative_rms(expected * 1.01, expected, 0.0099)
