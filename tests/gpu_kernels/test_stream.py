"""Run: what CuPy is handed for a launch, with stand-ins for its kernels and streams."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_kernels import device
from gpu_kernels.stream import Run, _argument, wide


class Function:
    """As CuPy's RawKernel."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def launched(shared: int, *args: Any) -> Function:
    function, run = Function(), Run.__new__(Run)
    run.stream = contextlib.nullcontext()
    run.launch(SimpleNamespace(function=lambda: function), (7, 2), 256, shared, args)
    return function


def test_a_launch_has_grid_threads_arguments_and_shared_memory() -> None:
    (call,) = launched(96, 3).calls
    assert call == (((7, 2), (256,), (np.int32(3),)), {"shared_mem": 96})


@pytest.mark.parametrize("shared, asked", [(0, 48 << 10), (48 << 10, 48 << 10), (100_000, 100_000)])
def test_shared_memory_above_the_usual_is_asked_for(shared: int, asked: int) -> None:
    assert launched(shared).max_dynamic_shared_size_bytes == asked


def test_arguments_have_the_width_that_kernels_declare() -> None:
    array = np.zeros(4, np.float32)
    on_device = SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))
    found = [_argument(a) for a in (None, 5, wide(1 << 40), 0.5, array[1:], on_device)]
    assert [type(v) for v in found] == [np.uintp, np.int32, np.int64, np.float32, np.uintp, np.uintp]
    assert [int(v) for v in found[:3]] == [0, 5, 1 << 40] and found[4] == array.ctypes.data + 4 and found[5] == 1 << 40
    with pytest.raises(OverflowError):
        _argument(1 << 40)


def test_without_a_card_a_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise device.GpuError("CuPy is not installed")

    monkeypatch.setattr(device, "limits", missing)
    with pytest.raises(device.GpuError, match="CuPy is not installed"):
        Run()
