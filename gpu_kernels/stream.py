"""Run: the place that kernels are queued on, and the one seam between the wrappers and CuPy.

A wrapper checks its arrays, chooses a kernel and a grid, and calls

    run.launch(kernel, grid, threads, shared, args)        args as driver.py packs them
    run.workspace(nbytes)                                  (nbytes,) u8 on the device, for the op that is being queued
    run.limits                                             device.Limits

and uses nothing else of CuPy. As on the CPU, jobs wait in a queue. take() makes a tape of it, replay() executes one: at
first job by job, so that it can be cancelled between them; from the second time on as CUDA graphs, one launch for all
that lies between two calls of the host. Queue is all of that but the execution, so a test puts another Run in its
place, which runs the same kernels on the CPU (tests/gpu_kernels/shim.py), and a plan counts memory on a machine without
a card (dry.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import arrays, device
from ._compile import Kernel
from .check import address
from .driver import OVERLAPS, launch
from .driver import wide as wide

CHUNK = 64  # jobs between two looks at the flag that cancels; two chunks are under way


class Cancelled(Exception):
    """The run's cancel flag was set. Arrays that were to be written hold anything."""


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    grid: tuple[int, ...]
    threads: int
    shared: int
    args: tuple[Any, ...]
    within: str = ""  # the op that it is a part of, where the kernel's file does not tell


@dataclass(frozen=True)
class Copy:
    """Bytes of one array to another of the same size: on the device, or in pinned memory."""

    to: Any
    start: Any


@dataclass(frozen=True)
class Call:
    """A function of the host, called when all before it is done."""

    function: Callable[[], None]


@dataclass(frozen=True)
class Feed:
    """fill(pinned) on the host, then pinned -> to beside the stream, which waits for it.

    slot: 0 or 1, by turns: while one is filled and copied, kernels read the other.
    """

    to: Any
    pinned: np.ndarray
    fill: Callable[[np.ndarray], None]
    slot: int


Job = Launch | Copy | Call | Feed


@dataclass
class Tape:
    """Jobs in order. parts: once captured, what replays them: graphs and calls."""

    jobs: tuple[Job, ...]
    replayed: bool = False
    parts: list[Callable[[], None]] | None = field(default=None, repr=False)


class Queue:
    """Jobs that wait. cancel (1,) int64: set it to 1 from any thread, and replay raises Cancelled."""

    def __init__(self, limits: device.Limits, n_threads: int | None = None):
        self.limits = limits
        self.n_threads = n_threads or os.cpu_count() or 1  # of the host, for what it does beside
        self.cancel = np.zeros(1, np.int64)
        self.staging: dict[Any, Any] = {}  # of streamed.py
        self._within = ""
        self._jobs: list[Job] = []

    def launch(self, kernel: Kernel, grid: tuple[int, ...], threads: int, shared: int, args: Sequence[Any]) -> None:
        """Queue a kernel on grid blocks of so many threads with so many bytes of dynamic shared memory."""
        self._jobs.append(Launch(kernel, grid, threads, shared, tuple(args), self._within))

    @contextlib.contextmanager
    def within(self, op: str) -> Iterator[None]:
        """What is launched meanwhile is a part of this op, for profiles."""
        before, self._within = self._within, op
        try:
            yield
        finally:
            self._within = before

    def copy(self, to: Any, start: Any) -> None:
        """Queue a copy of one contiguous array to another of the same bytes; host memory has to be pinned."""
        assert to.nbytes == start.nbytes
        self._jobs.append(Copy(to, start))

    def call(self, function: Callable[[], None]) -> None:
        """Queue a function of the host."""
        self._jobs.append(Call(function))

    def feed(self, to: Any, pinned: np.ndarray, fill: Callable[[np.ndarray], None], slot: int) -> None:
        """Queue what Feed says."""
        self._jobs.append(Feed(to, pinned, fill, slot))

    def take(self) -> Tape:
        """The queue as a tape; the queue is empty afterwards."""
        jobs, self._jobs = self._jobs, []
        return Tape(tuple(jobs))

    def sync(self) -> None:
        """Execute the queue; wait until it is done."""
        self.replay(self.take())

    def replay(self, tape: Tape, tell: Callable[[float], None] | None = None) -> None:
        raise NotImplementedError

    def workspace(self, nbytes: int) -> Any:
        """(nbytes,) u8 for an op's inner results; the next op may overwrite it."""
        raise NotImplementedError

    def empty(self, nbytes: int) -> Any:
        """(nbytes,) u8 on the device, to keep."""
        raise NotImplementedError

    def pinned(self, nbytes: int) -> np.ndarray:
        """(nbytes,) u8 of main memory that copies to the device can be queued from."""
        raise NotImplementedError

    def put(self, to: Any, values: np.ndarray) -> None:
        """Bytes of the host to an array of as many, at once."""
        raise NotImplementedError

    def upload(self, a: np.ndarray) -> Any:
        """A copy on the device, at once."""
        raise NotImplementedError


class Run(Queue):
    """Executes on one CUDA stream of the current device; a new stream by default. GpuError if there is no device."""

    profile_is_slower = True  # than replay: an event at each job, and no graph

    def __init__(self, n_threads: int | None = None, stream: Any = None):
        super().__init__(device.limits(), n_threads)
        import cupy

        self.device = int(cupy.cuda.Device().id)
        self.stream = cupy.cuda.Stream(non_blocking=True) if stream is None else stream
        self._workspace = cupy.empty(0, np.uint8)
        self._feeder: Feeder | None = None

    def workspace(self, nbytes: int) -> Any:
        if self._workspace.size < nbytes:
            import cupy

            self._workspace = cupy.empty(nbytes, np.uint8)  # tapes recorded before keep the old one
        return self._workspace[:nbytes]

    def empty(self, nbytes: int) -> Any:
        import cupy

        return cupy.empty(nbytes, np.uint8)

    def pinned(self, nbytes: int) -> np.ndarray:
        return arrays.mirror((nbytes,), np.uint8).host

    def put(self, to: Any, values: np.ndarray) -> None:
        arrays.put(to, values)

    def upload(self, a: np.ndarray) -> Any:
        return arrays.upload(a)

    def replay(self, tape: Tape, tell: Callable[[float], None] | None = None) -> None:
        """Execute a tape and wait for it. Cancelled: raised some ten kernels after the flag was set.

        tell: called now and then with the share of the tape that has been queued, if it is its first time
        """
        self.enter()
        try:
            if not tape.replayed:
                self._one_by_one(tape, tell)
                tape.replayed = True
            else:
                if tape.parts is None:
                    tape.parts = self._captured(tape)
                for part in tape.parts:
                    self._look()
                    part()
            self.stream.synchronize()
        except BaseException:  # nothing of it goes on while the caller believes that it has ended
            if self._feeder is not None:
                self._feeder.stream.synchronize()
            self.stream.synchronize()
            raise

    def profile(self, tape: Tape) -> list[tuple[str, float]]:
        """Execute a tape job by job; (kernel, seconds) in order, by the device's clock."""
        import cupy

        self.enter()
        events = [cupy.cuda.Event() for _ in range(len(tape.jobs) + 1)]
        events[0].record(self.stream)
        for job, event in zip(tape.jobs, events[1:]):
            self._execute(job)
            event.record(self.stream)
        self.stream.synchronize()
        times = [cupy.cuda.get_elapsed_time(a, b) / 1e3 for a, b in zip(events, events[1:])]
        return [(name_of(job), t) for job, t in zip(tape.jobs, times)]

    def enter(self) -> None:
        """Have this thread work on the run's device: the driver wants that of every thread."""
        import cupy

        cupy.cuda.runtime.setDevice(self.device)

    def _look(self) -> None:
        if self.cancel[0]:
            raise Cancelled

    def _one_by_one(self, tape: Tape, tell: Callable[[float], None] | None) -> None:
        import cupy

        under_way: list[Any] = []
        for start in range(0, len(tape.jobs), CHUNK):
            if len(under_way) == 2:
                under_way.pop(0).synchronize()
            self._look()
            if tell is not None:
                tell(start / len(tape.jobs))
            for job in tape.jobs[start : start + CHUNK]:
                self._execute(job)
            under_way.append(cupy.cuda.Event(disable_timing=True))
            under_way[-1].record(self.stream)

    def _captured(self, tape: Tape) -> list[Callable[[], None]]:
        """Each run of jobs between two calls as a graph."""
        parts: list[Callable[[], None]] = []
        for is_call, jobs in between_calls(tape.jobs):
            if is_call:
                parts += [lambda job=job: self._execute(job) for job in jobs]
                continue
            self.stream.begin_capture()
            try:
                for job in jobs:
                    self._execute(job)
            finally:
                graph = self.stream.end_capture()
            parts.append(lambda graph=graph: graph.launch(self.stream))
        return parts

    def _execute(self, job: Job) -> None:
        if isinstance(job, Call):
            self.stream.synchronize()
            job.function()
        elif isinstance(job, Feed):
            self._feeder = self._feeder or Feeder()
            self._feeder.execute(job, self.stream)
        elif isinstance(job, Copy):
            import cupy

            cupy.cuda.runtime.memcpyAsync(address(job.to), address(job.start), job.to.nbytes, 4, self.stream.ptr)
        else:
            function, stream = job.kernel.function(job.shared), self.stream.ptr
            overlaps = self.limits.sm >= OVERLAPS
            launch(function, job.grid, job.threads, job.shared, stream, job.args, overlaps)


class Feeder:
    """A stream for copies beside another, and for each slot the events that its copy and its readers are done."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._copied, self._read = ([cupy.cuda.Event(disable_timing=True) for _ in range(2)] for _ in range(2))

    def execute(self, job: Feed, stream: Any) -> None:
        import cupy

        self._read[1 - job.slot].record(stream)  # all that reads the other slot has been queued by now
        self._read[job.slot].synchronize()
        job.fill(job.pinned)
        cupy.cuda.runtime.memcpyAsync(address(job.to), address(job.pinned), job.to.nbytes, 4, self.stream.ptr)
        self._copied[job.slot].record(self.stream)
        stream.wait_event(self._copied[job.slot])


def between_calls(jobs: Sequence[Job]) -> list[tuple[bool, list[Job]]]:
    """Jobs in order, cut into runs of what the host does (True) and of what a graph can hold."""
    runs: list[tuple[bool, list[Job]]] = []
    for job in jobs:
        is_call = isinstance(job, Call | Feed)
        if not runs or runs[-1][0] != is_call:
            runs.append((is_call, []))
        runs[-1][1].append(job)
    return runs


def name_of(job: Job) -> str:
    """'op.kernel' or 'file.kernel', 'copy', 'call' or 'feed'."""
    if isinstance(job, Launch):
        return f"{job.within or job.kernel.file.removesuffix('.cu')}.{job.kernel.name}"
    return type(job).__name__.lower()


def prepare(tapes: Sequence[Tape], progress: Callable[[int, int, str], None] | None = None) -> int:
    """Have all kernels of these tapes compiled and loaded; how many were not. progress(done, total, name)."""
    kernels = dict.fromkeys(job.kernel for tape in tapes for job in tape.jobs if isinstance(job, Launch))
    units: dict[Any, list[Kernel]] = {}
    for kernel in kernels:
        if not kernel.is_loaded:
            units.setdefault(kernel.unit, []).append(kernel)
    if not units:
        return 0
    import cupy

    here = cupy.cuda.Device().id

    def load(of_unit: list[Kernel]) -> None:
        with cupy.cuda.Device(here):
            for kernel in of_unit:
                kernel.function(0)

    tell = progress if progress is not None else lambda done, total, name: None
    tell(0, len(units), "")
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NVRTC lets go of Python
        for done, ((file, _), _) in enumerate(zip(units, pool.map(load, units.values())), 1):
            tell(done, len(units), file)
    return len(units)
