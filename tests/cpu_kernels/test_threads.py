"""The pool: order, cancellation, forks, two queues at once, exit without farewell."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from cpu_kernels._jit import kernel
from cpu_kernels.threads import ASLEEP, Cancelled, Run, _cpu_list, _pool, physical_cores, prepare


@kernel
def add_one():
    from cpu_kernels.simd import ld_i64, st_i64

    def body(tile, scratch, x):
        st_i64(x + 8 * tile, ld_i64(x + 8 * tile) + 1)

    return body


@kernel
def sum_into():
    """out[0] = sum of x, on one tile: sees a half-finished job before it."""
    from cpu_kernels.simd import ld_i64, st_i64

    def body(tile, scratch, x, n, out):
        total = 0
        for i in range(n):
            total += ld_i64(x + 8 * i)
        st_i64(out, total)

    return body


@kernel
def count_to():
    """Busy for n steps."""
    from cpu_kernels.simd import atomic_add

    def body(tile, scratch, x, n):
        for _ in range(n):
            atomic_add(x, 1)

    return body


@pytest.mark.parametrize("n_threads", [1, 2, 3, 8])
def test_a_job_sees_all_of_the_job_before_it(n_threads: int) -> None:
    run = Run(n_threads)
    x, out = np.zeros(1000, np.int64), np.zeros(50, np.int64)
    for i in range(50):
        run.launch(add_one(), 1000, (x,))
        run.launch(sum_into(), 1, (x, 1000, out[i:]))
    run.sync()
    assert out.tolist() == [1000 * (i + 1) for i in range(50)]


def test_a_tape_can_be_replayed() -> None:
    run = Run(2)
    x = np.zeros(10, np.int64)
    run.launch(add_one(), 10, (x,))
    tape = run.take()
    for _ in range(5):
        run.replay(tape)
    assert x.tolist() == [5] * 10


def test_the_number_of_tiles_may_be_read_when_the_job_starts() -> None:
    run = Run(2)
    x, n = np.zeros(10, np.int64), np.zeros(1, np.int64)
    run.launch(add_one(), n, (x,))
    tape = run.take()
    n[0] = 3
    run.replay(tape)
    n[0] = 7
    run.replay(tape)
    assert x.tolist() == [2] * 3 + [1] * 4 + [0] * 3


def test_jobs_without_a_barrier_are_finished_at_the_next_one() -> None:
    run = Run(2)
    x, out = np.zeros(200, np.int64), np.zeros(1, np.int64)
    run.launch(add_one(), 100, (x,), barrier=False)
    run.launch(add_one(), 100, (x[100:],))
    run.launch(sum_into(), 1, (x, 200, out))
    run.sync()
    assert out[0] == 200


def test_sleeping_workers_wake() -> None:
    run = Run(2)
    x = np.zeros(100, np.int64)
    run.launch(add_one(), 100, (x,))
    tape = run.take()
    run.replay(tape)
    time.sleep(0.05)  # more than they spin
    run.replay(tape)
    assert x.tolist() == [2] * 100


def test_cancel_stops_within_a_tile_of_each_thread() -> None:
    run = Run(2)
    x = np.zeros(1, np.int64)
    run.launch(count_to(), 100_000, (x, 10_000))
    tape = run.take()
    prepare([tape])
    timer = threading.Timer(0.05, lambda: run.cancel.__setitem__(0, 1))
    timer.start()
    with pytest.raises(Cancelled):
        run.replay(tape)
    timer.join()
    done = int(x[0])
    time.sleep(0.01)
    assert 0 < done < 100_000 * 10_000
    assert x[0] == done  # nobody goes on in the background


def test_a_cancelled_run_works_again() -> None:
    run = Run(2)
    x = np.zeros(10, np.int64)
    run.launch(add_one(), 10, (x,))
    tape = run.take()
    run.cancel[0] = 1
    with pytest.raises(Cancelled):
        run.replay(tape)
    run.cancel[0] = 0
    run.replay(tape)
    assert x.tolist() == [1] * 10


def test_queues_of_several_threads_take_turns() -> None:
    arrays = [np.zeros(50, np.int64) for _ in range(4)]

    def work(x: np.ndarray) -> None:
        run = Run(2)
        for _ in range(100):
            run.launch(add_one(), 50, (x,))
            run.sync()

    threads = [threading.Thread(target=work, args=(x,)) for x in arrays]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(x.tolist() == [100] * 50 for x in arrays)


def test_the_gil_is_free_while_jobs_run() -> None:
    run = Run(1)
    x = np.zeros(1, np.int64)
    run.launch(count_to(), 40, (x, 1_000_000))
    tape = run.take()
    run.replay(tape)
    ticks = 0
    worker = threading.Thread(target=run.replay, args=(tape,))
    worker.start()
    while worker.is_alive():
        ticks += 1
        time.sleep(0.001)
    assert ticks > 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_a_pool_of_its_own() -> None:
    run = Run(2)
    x = np.zeros(10, np.int64)
    run.launch(add_one(), 10, (x,))
    tape = run.take()
    run.replay(tape)
    child = os.fork()
    if child == 0:
        run.replay(tape)
        os._exit(0 if x.tolist() == [2] * 10 else 1)
    assert os.waitpid(child, 0)[1] == 0
    run.replay(tape)
    assert x.tolist() == [2] * 10


def test_the_interpreter_exits_without_being_told() -> None:
    code = (
        "import numpy as np\nfrom cpu_kernels.threads import BASE, Run, load, _pool\nload(BASE)\n"
        "_pool()._start_workers(3)\nprint('bye')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "bye\n"), done.stderr


def test_a_number_of_tiles_may_not_lie_where_a_later_op_writes() -> None:
    """A thread that is late reads it again when the job is long finished: in the workspace it made such a thread run
    tiles that do not exist."""
    run = Run(2)
    with pytest.raises(AssertionError):
        run.launch(add_one(), run.workspace(64)[:8].view(np.int64), (np.zeros(10, np.int64),))


def test_a_profile_tells_the_time_of_each_job() -> None:
    run = Run(2)
    x = np.zeros(1, np.int64)
    for n, barrier in ((10, True), (1_000_000, True), (10, False), (10, True)):
        run.launch(count_to(), 2, (x, n), barrier)
    tape = run.take()
    parts = run.profile(tape)
    assert [name for name, _ in parts] == ["cpu_kernels.test_threads.count_to"] * 3 or len(parts) == 3
    assert parts[1][1] > parts[0][1] and all(t >= 0 for _, t in parts)
    run.replay(tape)  # as before
    assert x[0] == 2 * 2 * (10 + 1_000_000 + 10 + 10)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sched_getaffinity")
def test_workers_may_run_on_every_core_that_the_process_may() -> None:
    run = Run(3)
    x = np.zeros(1, np.int64)
    for _ in range(3):
        run.launch(count_to(), 6, (x, 100_000))
        run.sync()
        deadline = time.monotonic() + 10
        while _pool().state[ASLEEP + 8 : ASLEEP + 24 : 8].sum() < 2 and time.monotonic() < deadline:
            pass
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("konly-")]
    assert {frozenset(os.sched_getaffinity(thread.native_id or 0)) for thread in workers} == {
        frozenset(os.sched_getaffinity(0))
    }


def test_lists_of_processors_are_read_as_linux_writes_them() -> None:
    assert _cpu_list("0,4-6") == {0, 4, 5, 6}
    assert physical_cores() >= 1
