"""Run: what CuPy is handed for a launch, with stand-ins for its kernels and streams."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gpu_kernels import device
from gpu_kernels.device import CARDS
from gpu_kernels.stream import Call, Cancelled, Copy, Queue, Run, Tape, _argument, between_calls, name_of, wide


class Function:
    """As CuPy's RawKernel."""

    max_dynamic_shared_size_bytes = 48 << 10

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append((args, kwargs))


def launched(shared: int, *args: Any) -> Function:
    function, run = Function(), Run.__new__(Run)
    Queue.__init__(run, CARDS[90])
    run.stream = contextlib.nullcontext()
    run.launch(SimpleNamespace(function=lambda: function), (7, 2), 256, shared, args)
    assert not function.calls  # it waits in the queue
    (job,) = run.take().jobs
    run._execute(job)
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
        self.stream = Stream(self.log)

    def _execute(self, job: Any) -> None:
        self.log.append(name_of(job))

    def _one_by_one(self, tape: Tape) -> None:
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
