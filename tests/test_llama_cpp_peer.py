"""Without the pinned wheel the comparisons skip at home and fail in CI; what compares distributions is right."""

from __future__ import annotations

import importlib.metadata

import llama_cpp_peer
import numpy as np
import pytest


@pytest.mark.parametrize(("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
@pytest.mark.parametrize("version", [None, "2025.1.1"])
def test_another_wheel_skips_and_in_ci_fails(
    monkeypatch: pytest.MonkeyPatch, version: str | None, ci: str, outcome: type[BaseException]
) -> None:
    def found(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=f"needs xllamacpp==.*, found {version or 'none'}"):
        llama_cpp_peer.require_xllamacpp()


def test_kl_of_known_distributions() -> None:
    peer, ours = np.log([[0.5, 0.5], [0.25, 0.75]]), np.log([[0.5, 0.5], [0.75, 0.25]]) + 7
    assert llama_cpp_peer.mean_kl(ours, peer) == pytest.approx((0 + 0.5 * np.log(3)) / 2)


def test_top1_counts_clear_tokens_alone() -> None:
    peer, ours = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.0]]), np.array([[2.0, 1.0], [2.0, 1.0], [0.0, 1.0]])
    assert llama_cpp_peer.top1_agreement(ours, peer) == 0.5
