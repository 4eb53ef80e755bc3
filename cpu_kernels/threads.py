"""The thread pool, and Run: a queue of jobs that a step fills and one native call executes.

A job is a kernel, its arguments and a number of tiles. Ops queue jobs on a Run; `sync()` executes them in order on
all threads without the GIL; `take()` hands the queue out as a Tape, which `replay()` executes again and again.

    threads   caller + workers take tiles of a job from an atomic counter; a job is finished when its tiles are
              (not when every thread has arrived: a worker that the system has put aside holds up nobody)
    order     a job starts when all earlier ones are finished, unless the one before it was queued with barrier=False
    idle      a worker without work spins for about a millisecond, then returns to Python and sleeps on a lock
    cores     not pinned; a worker is woken on another core than the caller's
    cancel    a flag read at every tile; the caller also returns to Python every 20 ms, so that Ctrl-C is seen
    results   tiles have fixed sizes and write disjoint memory: the same bits for any number of threads

One pool a process, one tape at a time, first come first served; after a fork the child starts a new pool. A region of
Numba's `prange` costs 35-60 us on its `workqueue` layer, which also aborts when two threads enter it; a barrier here
costs 0.1-0.3 us.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import mmap
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ._jit import SCRATCH_BYTES, Code, kernel, load
from .isa import ISA

# int64 words of the pool's state; each group that one thread writes and others read has a cache line of its own
EPOCH, OPEN, ACTIVE, PROGRAM, ASLEEP = 0, 8, 16, 24, 32
JOBS, N_JOBS, CANCEL, N_THREADS, TIMES = PROGRAM, PROGRAM + 1, PROGRAM + 2, PROGRAM + 3, PROGRAM + 4
# int64 words of a job
ENTRY, ARGS, N_TILES, BARRIER, NEXT, DONE, JOB_WORDS = 0, 1, 2, 3, 8, 9, 16

SPINS = 20_000  # of `pause` (40-140 cycles each) before a worker sleeps
SPINS_BEFORE_YIELD = 2_000
SLICE = 60_000_000 if ISA.x86 else 20_000  # ticks after which the caller looks in on Python
FINISHED, TIME_IS_UP, CANCELLED = 0, 1, 2


class Cancelled(Exception):
    """The run's cancel flag was set; what its queue had written is undefined."""


# --------------------------------------------------------------------------------------------------- compiled loops


def _execute():
    """Code shared by caller and workers: go through the jobs, take tiles, wait at barriers."""
    from .simd import atomic_add, atomic_load, call_kernel, device, ld_i64, pause, st_i64, ticks, yield_thread

    @device
    def execute(state, scratch, until):
        """until: tick at which to return TIME_IS_UP; 0 for a worker, which also leaves before the last barrier."""
        jobs, n_jobs = ld_i64(state + 8 * JOBS), ld_i64(state + 8 * N_JOBS)
        cancel = ld_i64(state + 8 * CANCEL)
        times = ld_i64(state + 8 * TIMES) if until != 0 else 0
        if times != 0 and ld_i64(times) == 0:
            st_i64(times, ticks())
        unfinished = 0  # the first job that is not known to be finished
        for j in range(n_jobs):
            job = jobs + 8 * JOB_WORDS * j
            n_tiles = ld_i64(ld_i64(job + 8 * N_TILES))
            if atomic_load(job + 8 * NEXT) < n_tiles:
                entry, args = ld_i64(job + 8 * ENTRY), ld_i64(job + 8 * ARGS)
                while True:
                    if ld_i64(cancel) != 0:
                        return CANCELLED
                    if until != 0 and ticks() > until:
                        return TIME_IS_UP
                    tile = atomic_add(job + 8 * NEXT, 1)
                    if tile >= n_tiles:
                        break
                    call_kernel(entry, args, tile, scratch)
                    atomic_add(job + 8 * DONE, 1)
            last = j + 1 == n_jobs
            if ld_i64(job + 8 * BARRIER) == 0 and not last:
                continue
            if last and until == 0:
                break
            while unfinished <= j:
                waited = jobs + 8 * JOB_WORDS * unfinished
                n_tiles = ld_i64(ld_i64(waited + 8 * N_TILES))
                spins = 0
                while atomic_load(waited + 8 * DONE) < n_tiles:
                    pause()
                    spins += 1
                    if spins >= SPINS_BEFORE_YIELD:
                        if atomic_load(cancel) != 0:
                            return CANCELLED
                        if until != 0 and ticks() > until:
                            return TIME_IS_UP
                        yield_thread()
                        spins = 0
                unfinished += 1
            if times != 0 and ld_i64(times + 8 * (j + 1)) == 0:
                st_i64(times + 8 * (j + 1), ticks())
        return FINISHED

    return execute, st_i64


@kernel
def drive():
    """The caller's part. args: state, address of the status to write."""
    from .simd import ticks

    execute, st_i64 = _execute()

    def body(tile, scratch, state, status):
        st_i64(status, execute(state, scratch, ticks() + SLICE))

    return body


@kernel
def publish():
    """Open a program for the workers. Adds those that sleep and must be woken to a bit mask."""
    from .simd import atomic_exchange, atomic_load, atomic_store, ld_i64, st_i64

    def body(tile, scratch, state, wake):
        jobs = ld_i64(state + 8 * JOBS)
        for j in range(ld_i64(state + 8 * N_JOBS)):
            st_i64(jobs + 8 * (JOB_WORDS * j + NEXT), 0)
            st_i64(jobs + 8 * (JOB_WORDS * j + DONE), 0)
        epoch = atomic_load(state + 8 * EPOCH) + 1
        atomic_store(state + 8 * OPEN, epoch)
        atomic_store(state + 8 * EPOCH, epoch)
        mask = ld_i64(wake)
        for i in range(1, ld_i64(state + 8 * N_THREADS)):
            if atomic_exchange(state + 8 * (ASLEEP + 8 * i), 0) == 1:
                mask |= 1 << i
        st_i64(wake, mask)

    return body


@kernel
def close():
    """No worker may enter any more; wait until those inside have left, so that the program can be reused."""
    from .simd import atomic_load, atomic_store, pause, yield_thread

    def body(tile, scratch, state):
        atomic_store(state + 8 * OPEN, 0)
        spins = 0
        while atomic_load(state + 8 * ACTIVE) != 0:
            pause()
            spins += 1
            if spins >= SPINS_BEFORE_YIELD:
                yield_thread()
                spins = 0

    return body


@kernel
def work():
    """A worker's loop until it has been idle for SPINS; tile is its index, `seen` where it keeps the last epoch."""
    from .simd import atomic_add, atomic_exchange, atomic_load, atomic_store, ld_i64, pause

    execute, st_i64 = _execute()

    def body(tile, scratch, state, seen):
        spins = 0
        while True:
            epoch = atomic_load(state + 8 * EPOCH)
            if epoch != ld_i64(seen):
                st_i64(seen, epoch)
                spins = 0
                atomic_add(state + 8 * ACTIVE, 1)
                if atomic_load(state + 8 * OPEN) == epoch and tile < ld_i64(state + 8 * N_THREADS):
                    execute(state, scratch, 0)
                atomic_add(state + 8 * ACTIVE, -1)
                continue
            pause()
            spins += 1
            if spins > SPINS:
                asleep = state + 8 * (ASLEEP + 8 * tile)
                atomic_store(asleep, 1)
                if atomic_load(state + 8 * EPOCH) == epoch or atomic_exchange(asleep, 0) == 0:
                    return  # to Python's lock; if a publisher saw the flag first, it releases that at once
                spins = 0

    return body


BASE = (drive(), publish(), close(), work())
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)  # releases the GIL


def _native(code: Code, *args: int) -> Callable[[int, int], None]:
    """A function (tile, scratch) that calls a kernel with fixed int64 arguments.

    No Python code stands before the call, so an interrupt cannot come between the two.
    """
    block, out = np.array(args, np.int64), np.zeros(2, np.int64)
    run = functools.partial(_KERNEL(code.address), out.ctypes.data, out.ctypes.data + 8, block.ctypes.data)
    run.alive = block, out  # type: ignore[attr-defined]
    return run


# ------------------------------------------------------------------------------------------------------------- pool


class _Turnstile:
    """A lock that serves in the order of arrival. A thread that Ctrl-C has taken out of it half way may enter again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None  # a thread
        self._queue: deque[tuple[threading.Lock, int]] = deque()

    def __enter__(self) -> None:
        me = threading.get_ident()
        with self._lock:
            if self._owner in (None, me):  # me: an interrupt came before it was given back
                self._owner = me
                return
            mine = threading.Lock()
            mine.acquire()
            self._queue.append((mine, me))
        try:
            mine.acquire()
        except BaseException:  # Ctrl-C while waiting: step out, or pass the turn on if it has just come
            with self._lock:
                waiting = (mine, me) in self._queue
                if waiting:
                    self._queue.remove((mine, me))
            if not waiting:
                self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._queue:
                turn, self._owner = self._queue.popleft()
                turn.release()
            else:
                self._owner = None


class _Pool:
    MAX_THREADS = 64  # bits of the wake mask, less the sign

    def __init__(self) -> None:
        words = ASLEEP + 8 * self.MAX_THREADS
        memory = np.zeros(words + 8, np.int64)
        start = -(memory.ctypes.data // 8) % 8
        self.state = memory[start : start + words]
        self._address = self.state.ctypes.data
        self._scratch_map = mmap.mmap(-1, self.MAX_THREADS * SCRATCH_BYTES)  # touched only by threads that exist
        self._scratch = np.frombuffer(self._scratch_map, np.uint8).ctypes.data
        self._out = np.zeros(2, np.int64)
        self._turn = _Turnstile()
        self._telling: int | None = None  # a thread
        self._wake = [threading.Lock()]  # of worker i at index i, held while it sleeps; the caller is thread 0
        self._threads = [threading.main_thread()]
        out = self._out.ctypes.data
        self._drive = _native(drive(), self._address, out)
        self._publish = _native(publish(), self._address, out + 8)
        self._close = _native(close(), self._address)

    def _start_workers(self, n_threads: int) -> None:
        for i in range(len(self._wake), n_threads):
            self._wake.append(threading.Lock())
            self._wake[i].acquire()
            self._threads.append(threading.Thread(target=self._worker, args=(i,), name=f"konly-{i}", daemon=True))
            self._threads[i].start()

    def _worker(self, i: int) -> None:
        seen = np.array([self.state[EPOCH]], np.int64)
        loop = _native(work(), self._address, seen.ctypes.data)
        while True:
            loop(i, self._scratch + i * SCRATCH_BYTES)
            self._wake[i].acquire()
            _allow_all_cores()

    def _wake_sleepers(self) -> None:
        """Those of publish's mask, and whom an interrupt left in it; one woken for nothing goes to sleep again."""
        mask = int(self._out[1])
        for i in range(1, len(self._wake)):
            if mask >> i & 1:
                _keep_off_this_core(self._threads[i], i)
                if self._wake[i].locked():
                    self._wake[i].release()
        self._out[1] = 0

    def execute(
        self, tape: Tape, n_threads: int, cancel: np.ndarray,
        tell: Callable[[float], None] | None = None, times: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """times: (n_jobs + 1,) int64 zeros, for the ticks of the start and of each barrier."""
        if self._telling == threading.get_ident():
            raise RuntimeError("a step was begun in the progress callback of another, which is not finished")
        with self._turn:
            self._start_workers(n_threads)
            self.state[PROGRAM : PROGRAM + 4] = (tape.address, tape.n_jobs, cancel.ctypes.data, n_threads)
            self.state[TIMES] = 0 if times is None else times.ctypes.data
            try:
                self._publish(0, 0)
                self._wake_sleepers()
                status = TIME_IS_UP
                while status == TIME_IS_UP:
                    self._drive(0, self._scratch)
                    status = int(self._out[0])
                    if status == TIME_IS_UP and tell is not None:
                        self._telling = threading.get_ident()
                        tell(tape.share)
                        self._telling = None
            except BaseException:
                cancel[0] = 1
                raise
            finally:
                self._telling = None
                self._close(0, 0)
        if status == CANCELLED:
            raise Cancelled


@functools.cache
def _pool() -> _Pool:
    return _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def physical_cores() -> int:
    """Cores this process may run on; threads of one core count once (Linux; elsewhere: logical processors)."""
    return len(_cores()) or os.cpu_count() or 1


@functools.cache
def _cores() -> list[set[int]]:
    """The logical processors of each core that this process may run on; none where the system does not tell."""
    try:
        allowed = os.sched_getaffinity(0)
        found = set()
        for cpu in allowed:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") as file:
                found.add(file.read().strip())
    except (AttributeError, OSError):
        return []
    return [cpus & allowed for cpus in map(_cpu_list, sorted(found))]


def _cpu_list(text: str) -> set[int]:
    """0,4-6 -> {0, 4, 5, 6}"""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return {cpu for first, *last in ends for cpu in range(first, (last or [first])[0] + 1)}


@functools.cache
def _getcpu() -> Callable[[], int] | None:
    function = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None
    return function if len(_cores()) > 1 else None


def _keep_off_this_core(thread: threading.Thread, worker: int) -> None:
    """Let a worker that is about to be woken start on another core than the caller's; it then frees itself.

    Linux often wakes a thread where its waker runs, and there it waits until the waker's time is up: a step of 1.5 ms
    on one thread took 2.2 ms on two. Threads are not tied down, for other programs have cores to use as well.
    """
    if (getcpu := _getcpu()) is None:
        return
    cpu = getcpu()
    others = [core for core in _cores() if cpu not in core]
    try:
        os.sched_setaffinity(thread.native_id or 0, others[(worker - 1) % len(others)])
    except (OSError, ZeroDivisionError):  # the set of processors has changed
        pass


def _allow_all_cores() -> None:
    if _getcpu() is not None:
        try:
            os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))  # the main thread's, which a user may change
        except OSError:
            pass


# -------------------------------------------------------------------------------------------------------------- run


class Tape:
    """A recorded queue, to be executed as often as wanted; it keeps the arrays that it names alive."""

    def __init__(self, jobs: list[tuple[Code, int | np.ndarray, Sequence[object], bool]]):
        self.n_jobs = len(jobs)
        self.codes = list(dict.fromkeys(code for code, *_ in jobs))
        self.names = [code.name for code, *_ in jobs]
        self._jobs = jobs  # keeps codes and arrays alive
        self._program: np.ndarray | None = None

    @property
    def address(self) -> int:
        if self._program is None:
            self._program = self._assemble()
        return self._program.ctypes.data

    def progress(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """By job, of its last execution: tiles that were asked for (up to a thread too many), finished, and in all."""
        assert self._program is not None
        words = self._program[: JOB_WORDS * self.n_jobs].reshape(self.n_jobs, JOB_WORDS)
        tiles = [int(n[0]) if isinstance(n, np.ndarray) else n for _, n, _, _ in self._jobs]
        return words[:, NEXT].copy(), words[:, DONE].copy(), np.array(tiles, np.int64)

    @property
    def share(self) -> float:
        """Of its jobs, those that are finished, in the execution that is under way."""
        _, done, tiles = self.progress()
        return float(np.mean(done >= tiles))

    def _assemble(self) -> np.ndarray:
        n_args = sum(len(args) + 1 for _, _, args, _ in self._jobs)
        memory = np.zeros(JOB_WORDS * self.n_jobs + n_args + 8, np.int64)
        start = -(memory.ctypes.data // 8) % 8
        program = memory[start:]
        base, at = program.ctypes.data, JOB_WORDS * self.n_jobs
        for j, (code, n_tiles, args, barrier) in enumerate(self._jobs):
            job = JOB_WORDS * j
            if isinstance(n_tiles, np.ndarray):
                tiles_address = n_tiles.ctypes.data
            else:
                program[at] = n_tiles
                tiles_address = base + 8 * at
                at += 1
            program[job : job + 4] = (code.address, base + 8 * at, tiles_address, int(barrier))
            for arg in args:
                program[at] = _word(arg)
                at += 1
        return program


def _word(arg: object) -> int:
    """What a kernel receives for an argument: an array's address, an int, the bits of an f32."""
    if isinstance(arg, np.ndarray):
        return int(arg.ctypes.data)
    if isinstance(arg, float):
        return int(np.float32(arg).view(np.uint32))
    return int(arg)  # type: ignore[call-overload]


class Run:
    """Where ops run: queue jobs with `launch`, execute with `sync`. The CPU's counterpart of a CUDA stream.

    n_threads   how many threads execute; physical cores by default
    cancel      (1,) int64, set it to 1 from any thread: `sync` and `replay` raise Cancelled at the next tile
    profile_is_slower   than replay
    """

    profile_is_slower = False

    def __init__(self, n_threads: int | None = None):
        self.n_threads = min(n_threads or physical_cores(), _Pool.MAX_THREADS)
        self.cancel = np.zeros(1, np.int64)
        self._jobs: list[tuple[Code, int | np.ndarray, Sequence[object], bool]] = []
        self._workspace = np.zeros(0, np.uint8)

    def workspace(self, n_bytes: int) -> np.ndarray:
        """(n_bytes,) u8, 64-byte aligned: memory for the op that is being queued, which the next op reuses.

        Its contents are undefined at the start of an op. An op asks once and cuts it up itself.
        """
        if self._workspace.size < n_bytes:
            memory = np.empty(n_bytes + 64, np.uint8)
            start = -memory.ctypes.data % 64
            self._workspace = memory[start : start + n_bytes]  # tapes recorded before keep the old one
        return self._workspace[:n_bytes]

    @property
    def workspace_nbytes(self) -> int:
        """What the ops that were queued have asked for."""
        return self._workspace.nbytes

    def launch(self, code: Code, n_tiles: int | np.ndarray, args: Sequence[object], barrier: bool = True) -> None:
        """Queue a job.

        n_tiles   int, or (1,) int64 that is read when the job starts, and later by threads that are late: it must
                  keep its value to the end of the tape, so it cannot be in the workspace
        args      arrays (passed as addresses and kept alive), ints, floats, in the order of the body's parameters
        barrier   False: the next job may start before this one is finished
        """
        assert not isinstance(n_tiles, np.ndarray) or not np.shares_memory(n_tiles, self._workspace)
        self._jobs.append((code, n_tiles, args, barrier))

    def take(self) -> Tape:
        """The queue as a tape; the queue is empty afterwards."""
        jobs, self._jobs = self._jobs, []
        return Tape(jobs)

    def replay(self, tape: Tape, tell: Callable[[float], None] | None = None) -> None:
        """Execute a tape. Cancelled: raised at most a tile after the flag was set.

        tell: called some forty times a second with the share of the tape that is done; the caller's thread waits for it
        """
        if tape.n_jobs:
            _pool().execute(tape, self.n_threads, self.cancel, tell)

    def profile(self, tape: Tape) -> list[tuple[str, float]]:
        """Execute a tape; (kernel, seconds) in order. Jobs without a barrier between them count as their last."""
        times = np.zeros(tape.n_jobs + 1, np.int64)
        start = time.perf_counter()
        _pool().execute(tape, self.n_threads, self.cancel, times=times)
        seconds = time.perf_counter() - start
        at = np.flatnonzero(times)
        parts = np.diff(times[at]) * (seconds / max(1, times[at[-1]] - times[0]))
        return [(tape.names[i - 1], float(t)) for i, t in zip(at[1:], parts)]

    def sync(self) -> None:
        """Execute the queue."""
        self.replay(self.take())


def prepare(tapes: Sequence[Tape], progress: Callable[[int, int, str], None] | None = None) -> int:
    """Load or compile all kernels of some tapes (see _jit.load), the pool's own included."""
    return load(itertools.chain(BASE, *(tape.codes for tape in tapes)), progress)
