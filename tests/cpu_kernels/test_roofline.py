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


@pytest.mark.parametrize("type_k", ["f16", "bf16", "q8"])
def test_every_kind_of_product_that_attention_uses_has_a_limit(type_k: str) -> None:
    used = {*roofline.attention_kinds(type_k, mha=False), *roofline.attention_kinds(type_k, mha=True)}
    assert used <= {kind for kind, there in roofline.KINDS.items() if there}
