"""A file that is replaced is the old one or the new one, whoever is killed, and nothing piles up beside it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.atomic_file import replacing

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals, locks or modes")


def write(path: Path, data: bytes) -> None:
    with replacing(path) as file:
        file.write(data)


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_new_file_and_its_replacement(tmp_path: Path) -> None:
    for data in (b"first", b"second, longer", b""):
        write(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    write(tmp_path / "file", b"old")
    with pytest.raises(error), replacing(tmp_path / "file") as file:
        file.write(b"new")
        raise error
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_old_file_is_there_until_the_block_ends(tmp_path: Path) -> None:
    write(tmp_path / "file", b"old")
    with replacing(tmp_path / "file") as file:
        file.write(b"new")
        assert (tmp_path / "file").read_bytes() == b"old"


def test_bytes_are_on_the_disk_before_the_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), rename(*paths)))
    write(tmp_path / "file", b"data")
    assert calls == ["file", "rename", "folder"][: 3 if hasattr(os, "O_DIRECTORY") else 2]


@posix
@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_it_has_the_mode_of_a_new_file(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "file", b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


@posix
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "file").read_bytes() == b"data"
    assert names(tmp_path / "folder") == ["file"]


def test_a_long_name_has_room_for_the_temporary_one(tmp_path: Path) -> None:
    name = "ü" * 127
    write(tmp_path / name, b"data")
    assert names(tmp_path) == [name]


def test_folders_and_devices_are_refused_before_writing(tmp_path: Path) -> None:
    with pytest.raises(OSError), replacing(tmp_path):
        raise AssertionError("not reached")
    if os.path.exists("/dev/null"):
        with pytest.raises(OSError), replacing("/dev/null"):
            raise AssertionError("not reached")


def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for leftover in (".file.0123abcd.tmp", ".file.ffffffff.tmp"):
        (tmp_path / leftover).write_bytes(b"x")
    others = [".file.0123abcd", ".file.longer-name.0123abcd.tmp", ".other.0123abcd.tmp", "file.0123abcd.tmp"]
    for other in others:
        (tmp_path / other).write_bytes(b"x")
    write(tmp_path / "file", b"data")
    assert names(tmp_path) == sorted(["file", *others])


@posix
def test_a_leftover_that_is_a_link_or_a_pipe_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"x")
    (tmp_path / ".file.00000000.tmp").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / ".file.11111111.tmp")
    write(tmp_path / "file", b"data")
    assert len(names(tmp_path)) == 4


@posix
def test_a_writer_at_work_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as slow:
        slow.write(b"slow ")
        write(tmp_path / "file", b"fast")
        assert (tmp_path / "file").read_bytes() == b"fast"
        slow.write(b"but last")
    assert (tmp_path / "file").read_bytes() == b"slow but last"
    assert names(tmp_path) == ["file"]


def test_without_locks_in_a_file_system_it_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def flock(descriptor: int, how: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".file.0123abcd.tmp").write_bytes(b"somebody's, perhaps")
    write(tmp_path / "file", b"data")
    assert (tmp_path / "file").read_bytes() == b"data"
    assert names(tmp_path) == [".file.0123abcd.tmp", "file"]


WRITER = """if True:
    import sys
    from engine.atomic_file import replacing
    path, letter, rounds = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
    print("ready", flush=True)
    for i in range(rounds):
        with replacing(path) as file:
            for _ in range(64):
                file.write(letter * 16384)
"""


def start(path: Path, letter: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), letter, str(rounds)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    )


def check_whole(path: Path, letters: str) -> None:
    data = path.read_bytes()
    assert len(data) == 1 << 20
    assert data in {letter.encode() * (1 << 20) for letter in letters}


@posix
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write(path, b"a" * (1 << 20))
    for i in range(12):
        process = start(path, "ab"[i % 2], 1_000_000)
        with process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(0.003 * i)  # the moment is what varies
            process.send_signal(signal.SIGKILL)
        check_whole(path, "ab")
        assert len(names(tmp_path)) <= 2  # one of this process; those of earlier ones are gone
    write(path, b"c" * (1 << 20))
    assert names(tmp_path) == ["file"]


def test_of_writers_at_the_same_time_one_wins_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    writers = [start(path, letter, 30) for letter in "xyz"]
    for process in writers:
        with process:
            while process.poll() is None:
                if path.exists():
                    check_whole(path, "xyz")
            assert process.returncode == 0
    check_whole(path, "xyz")
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_private_file_stays_private(tmp_path: Path) -> None:
    path = tmp_path / "talk.session"
    path.write_bytes(b"old")
    path.chmod(0o600)
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o600
