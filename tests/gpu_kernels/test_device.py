"""device.check(): one sentence for everything that can be missing, with a stand-in for CuPy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from gpu_kernels import device
from gpu_kernels.device import CARDS, GpuError, Limits, check


def cupy(n_devices: Any = 1, sm: str = "90", nvrtc: Exception | None = None) -> SimpleNamespace:
    """As much of CuPy as check() asks."""

    def answer(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    shared = {"MaxSharedMemoryPerBlockOptin": 232_448, "MaxSharedMemoryPerMultiprocessor": 233_472}
    card = SimpleNamespace(id=0, compute_capability=sm, attributes={"MultiProcessorCount": 132, **shared})
    runtime = SimpleNamespace(
        getDeviceCount=lambda: answer(n_devices), getDeviceProperties=lambda i: {"name": b"Some Card"}
    )
    compiler = SimpleNamespace(getVersion=lambda: answer(nvrtc or (13, 0)))
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, nvrtc=compiler, Device=lambda: card))


def found(stand_in: Any, wheels: tuple[str, ...] = ("cupy-cuda13x 14.2.0",)) -> Limits:
    def load() -> Any:
        if isinstance(stand_in, Exception):
            raise stand_in
        return stand_in

    return check(lambda: list(wheels), load)


def test_a_card_is_described() -> None:
    assert found(cupy()) == Limits("Some Card", 90, 132, 232_448, 233_472)


@pytest.mark.parametrize(
    "stand_in, wheels, message",
    [
        (ModuleNotFoundError("cupy"), (), "CuPy is not installed; pip install"),
        (
            ImportError("libcuda.so.1: no file"),
            None,
            r"cupy-cuda13x 14.2.0 is installed, but cannot be imported \(libcuda",
        ),
        (cupy(), ("cupy-cuda12x 14.2.0", "cupy-cuda13x 14.2.0"), "are both installed, and break each other; uninstall"),
        (
            cupy(RuntimeError("cudaErrorInsufficientDriver: x")),
            None,
            r"no device \(cudaErrorInsufficientDriver.*driver$",
        ),
        (cupy(0), None, "CuPy found no device; check CUDA_VISIBLE_DEVICES"),
        (
            cupy(nvrtc=RuntimeError("libnvrtc.so not found\nSearched in …")),
            None,
            r"no NVRTC.*\(libnvrtc.so not found\)",
        ),
        (cupy(sm="61"), None, r"Some Card has compute capability 6.1; expected 7.5 \(Turing\) or newer; use the CPU"),
    ],
    ids=["no CuPy", "broken CuPy", "two wheels", "no driver", "no card", "no NVRTC", "too old"],
)
def test_what_is_missing_is_said_in_one_sentence(stand_in: Any, wheels: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(GpuError, match=message) as error:
        found(stand_in, *([] if wheels is None else [wheels]))
    assert "\n" not in str(error.value) and not str(error.value).endswith(".")


def test_this_machine_gets_limits_or_one_sentence() -> None:
    try:
        assert device.check().sm >= device.OLDEST
    except GpuError as error:
        assert "\n" not in str(error)


def test_cards_have_no_more_shared_memory_a_block_than_a_multiprocessor() -> None:
    for sm, card in CARDS.items():
        assert card.sm == sm and 48 << 10 < card.shared_per_block <= card.shared_per_sm
        assert card.has_bf16 == (sm >= 80)
