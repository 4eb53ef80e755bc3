"""The limits are measured, not asserted: that they come out as rates is all that holds on every machine."""

from __future__ import annotations

import pytest

from cpu_kernels import roofline
from cpu_kernels.threads import Run


@pytest.mark.parametrize("kind", list(roofline.PRODUCTS))
def test_a_peak_is_a_rate(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "TILES", 1)
    assert 1e6 < roofline.peak(Run(1), kind) < 1e15


def test_dram_read_is_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "READ_BYTES", 8 << 20)
    assert 1e6 < roofline.dram_read(Run(1)) < 1e14
