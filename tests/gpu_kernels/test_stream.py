"""Run: what the driver is handed for a launch, and in which order; with stand-ins for CuPy's kernels and streams."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_kernels import _compile, device, driver
from gpu_kernels.device import CARDS
from gpu_kernels.driver import packed, wide
from gpu_kernels.stream import Call, Cancelled, Copy, Queue, Run, Tape, between_calls, name_of


def test_arguments_are_packed_as_c_lays_out_what_kernels_declare() -> None:
    array = np.zeros(4, np.float32)
    on_device = SimpleNamespace(data=SimpleNamespace(ptr=1 << 40))
    found = packed([5, wide(1 << 40), 0.5, None, 7, array[1:], on_device])
    expected = struct.pack("=i4xqf4xQi4xQQ", 5, 1 << 40, 0.5, 0, 7, array.ctypes.data + 4, 1 << 40)
    assert found == expected
    with pytest.raises(struct.error):
        packed([1 << 40])


@pytest.mark.parametrize("sm, n_attributes", [(80, 0), (90, 1)])
def test_a_launch_has_grid_threads_shared_memory_and_arguments(
    monkeypatch: pytest.MonkeyPatch, sm: int, n_attributes: int
) -> None:
    seen = []

    def launch_kernel(config: Any, function: Any, parameters: None, extra: Any) -> int:
        c = config._obj
        size = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t))[0]
        arguments = ctypes.string_at(extra[1], size)
        seen.append((function.value, [*c.grid], [*c.block], c.shared, c.stream, c.n_attributes, arguments))
        return 0

    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=launch_kernel))
    run = Run.__new__(Run)
    Queue.__init__(run, CARDS[sm])
    run.stream = SimpleNamespace(ptr=33)
    run.launch(SimpleNamespace(function=lambda shared: 1000 + shared), (7, 2), 256, 96, (3,))
    assert not seen  # it waits in the queue
    (job,) = run.take().jobs
    run._execute(job)
    assert seen == [(1096, [7, 2, 1], [256, 1, 1], 96, 33, n_attributes, struct.pack("=i", 3))]


def test_what_the_driver_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_library", lambda: SimpleNamespace(cuLaunchKernelEx=lambda *_: 700))
    with pytest.raises(RuntimeError, match="error 700"):
        driver.launch(1, (1,), 32, 0, 0, (), False)


def test_shared_memory_above_the_usual_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Function:
        kernel = SimpleNamespace(ptr=5)

        def __setattr__(self, name: str, value: int) -> None:
            asked.append((name, value))

    monkeypatch.setattr(_compile, "_module", lambda k: SimpleNamespace(get_function=lambda name: Function()))
    kernel = _compile.kernel("some.cu", "some")
    assert [kernel.function(shared) for shared in (0, 48 << 10, 100_000, 60_000)] == [5] * 4
    assert asked == [("max_dynamic_shared_size_bytes", 100_000)]


def test_every_kernel_begins_by_waiting_for_the_one_before_it() -> None:
    for path in _compile.CUDA.glob("*.cu"):
        text = _compile.source(path.name)
        assert len(_compile.kernel_names(path.name)) == text.count("\nKERNEL(") == text.count("  AFTER_PREVIOUS;") > 0


def test_without_a_card_a_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise device.GpuError("CuPy is not installed")

    monkeypatch.setattr(device, "limits", missing)
    with pytest.raises(device.GpuError, match="CuPy is not installed"):
        Run()


class Stream:
    """As CuPy's, writing down what it was asked for."""

    def __init__(self, log: list[str]):
        self.log = log

    def synchronize(self) -> None:
        self.log.append("wait")

    def begin_capture(self) -> None:
        self.log.append("capture")

    def end_capture(self) -> Any:
        self.log.append("end")
        return SimpleNamespace(launch=lambda stream: self.log.append("graph"))


class Logging(Run):
    """A run whose jobs do nothing but tell their names."""

    def __init__(self) -> None:
        Queue.__init__(self, CARDS[90])
        self.log: list[str] = []
        self.enter = lambda: None
        self._feeder = None
        self.stream = Stream(self.log)

    def _execute(self, job: Any) -> None:
        self.log.append(name_of(job))

    def _one_by_one(self, tape: Tape, tell: object) -> None:
        for job in tape.jobs:
            self._look()
            self._execute(job)


def tape_of(run: Run, *kinds: str) -> Tape:
    a = np.zeros(4, np.uint8)
    for kind in kinds:
        if kind == "launch":
            run.launch(SimpleNamespace(file="some.cu", name="kernel"), (1,), 32, 0, ())
        elif kind == "copy":
            run.copy(a, a)
        else:
            run.call(lambda: None)
    return run.take()


def test_a_tape_is_executed_job_by_job_at_first_then_captured_then_replayed() -> None:
    run = Logging()
    tape = tape_of(run, "copy", "launch", "call", "launch")
    run.replay(tape)
    assert run.log == ["copy", "some.kernel", "call", "some.kernel", "wait"]
    run.log.clear()
    run.replay(tape)
    captured = ["capture", "copy", "some.kernel", "end", "capture", "some.kernel", "end"]
    assert run.log == [*captured, "graph", "call", "graph", "wait"]
    run.log.clear()
    run.replay(tape)
    assert run.log == ["graph", "call", "graph", "wait"]


def test_a_cancelled_replay_waits_for_what_is_under_way() -> None:
    run = Logging()
    tape = tape_of(run, "launch", "call")
    run.cancel[0] = 1
    for _ in range(2):
        with pytest.raises(Cancelled):
            run.replay(tape)
        assert run.log[-1] == "wait"


def test_calls_of_the_host_lie_between_graphs() -> None:
    run = Logging()
    tape = tape_of(run, "call", "copy", "launch", "call", "call")
    assert [(is_call, len(jobs)) for is_call, jobs in between_calls(tape.jobs)] == [(True, 1), (False, 2), (True, 2)]
    assert [type(job) for job in tape.jobs][:2] == [Call, Copy]
