"""Angles of rotary position embedding, in float64: at position 100,000 an f32 product is off by a hundredth."""

from __future__ import annotations

import numpy as np


def fill_cos_sin(positions: np.ndarray, inv_freq: np.ndarray, magnitude: float, out: np.ndarray) -> None:
    """out (n_tok, n_rot) f32 = [cos | sin] of positions (n_tok,) times inv_freq (n_rot / 2,) f64, times magnitude."""
    angle = positions[:, None].astype(np.float64) * inv_freq
    half = len(inv_freq)
    out[:, :half] = np.cos(angle) * magnitude
    out[:, half:] = np.sin(angle) * magnitude
