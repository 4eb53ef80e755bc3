"""How much memory there is: read from the system's files, each of which may be missing or strange."""

from __future__ import annotations

from pathlib import Path

from engine import memory


def test_this_machine_has_memory() -> None:
    available = memory.available()
    assert available is not None
    assert 64 << 20 < available < 1 << 50


def test_linux_tells_what_is_available(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree:   10 kB\nMemAvailable:   40 kB\n")
    assert memory._linux(tmp_path / "meminfo") == 40 * 1024
    (tmp_path / "meminfo").write_text("MemAvailable: many kB\n")
    assert memory._linux(tmp_path / "meminfo") is None
    assert memory._linux(tmp_path / "none") is None


def test_containers_limit_counts_without_its_cached_files(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 200\nactive_file 300\ninactive_file 150\n")
    assert memory._container(tmp_path) == 750
    (tmp_path / "memory.current").write_text("1500\n")
    assert memory._container(tmp_path) == 0


def test_container_without_limit_is_no_limit(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    assert memory._container(tmp_path) is None
    assert memory._container(tmp_path / "none") is None


def test_what_this_process_has_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("VmRSS:\t  70 kB\nRssAnon:\t  30 kB\nRssFile:\t  35 kB\nRssShmem:\t   5 kB\n")
    assert memory._resident(tmp_path / "status") == (30 << 10, 40 << 10)
    (tmp_path / "status").write_text("VmRSS:\t  70 kB\n")
    assert memory._resident(tmp_path / "status") is None
    assert memory._resident(tmp_path / "none") is None
