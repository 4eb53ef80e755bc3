"""available(): bytes of memory that this process can still take without the machine swapping or being killed.
resident(): bytes that it has now, its own ones and those of mapped files, which the system can take back.

Linux    MemAvailable (free, and what the page cache would give back), and a container's limit if that is lower
Windows  available physical memory
macOS    all physical memory: how much of it is reclaimable has no simple answer there
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def available() -> int | None:
    """Bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return _windows()
    if sys.platform == "linux":
        known = [n for n in (_linux(Path("/proc/meminfo")), _container(_CGROUP)) if n is not None]
        if known:
            return min(known)
    return _physical()


def resident() -> tuple[int, int] | None:
    """(anonymous, mapped from files) bytes of this process; None where the system does not tell them apart."""
    return _resident(Path("/proc/self/status")) if sys.platform == "linux" else None


def _resident(status: Path) -> tuple[int, int] | None:
    try:
        rows = dict(line.split(":", 1) for line in status.read_text().splitlines() if line.startswith("Rss"))
        anonymous, *mapped = (int(rows[name].split()[0]) << 10 for name in ("RssAnon", "RssFile", "RssShmem"))
    except (OSError, ValueError, KeyError):
        return None
    return anonymous, sum(mapped)


def _linux(meminfo: Path) -> int | None:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return None


def _container(folder: Path) -> int | None:
    """What is left of the cgroup's limit (version 2); its cached files are given back when memory is short."""
    try:
        limit = int((folder / "memory.max").read_text())  # "max": none
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        cached = int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None
    return max(0, limit - used + cached)


def _physical() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _windows() -> int | None:
    import ctypes

    class MemoryStatusEx(ctypes.Structure):
        _fields_ = [
            ("length", ctypes.c_uint32),
            ("load", ctypes.c_uint32),
            ("total_physical", ctypes.c_uint64),
            ("available_physical", ctypes.c_uint64),
            ("total_page_file", ctypes.c_uint64),
            ("available_page_file", ctypes.c_uint64),
            ("total_virtual", ctypes.c_uint64),
            ("available_virtual", ctypes.c_uint64),
            ("available_extended_virtual", ctypes.c_uint64),
        ]

    status = MemoryStatusEx(length=ctypes.sizeof(MemoryStatusEx))
    done = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))  # type: ignore[attr-defined]
    return status.available_physical if done else None
