"""Writing a file that takes the place of another all at once, or not at all.

The bytes go into a temporary file beside it, onto the disk (fsync), and are renamed; then the folder is synced, too.
Whoever is killed, or finds the disk full, leaves the old file as it was.

A killed process leaves its temporary file. The next one that writes the same file removes it: a writer holds a lock on
its temporary file, and locks end with their process. (On Windows a file that somebody has open cannot be removed, which
says the same.) Temporary names differ, so two writers do not meet; the last one to rename wins.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SUFFIX = ".tmp"
N_RANDOM = 8  # hexadecimal digits in a temporary name
_BINARY = getattr(os, "O_BINARY", 0)
_LOCKS = os.name == "posix"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A new file, open for writing without a buffer, that becomes `path` at the end of the block; removed on any error.

    It has the mode of the file that it replaces, or that of any new one. A link is followed, and what it points to is
    replaced. OSError.
    """
    target = Path(os.path.realpath(path))
    _check_replaceable(target)
    _sweep(target)
    descriptor, temporary = _create(target)
    try:
        with suppress(OSError, AttributeError):  # there is none; Windows
            os.fchmod(descriptor, stat.S_IMODE(os.stat(target).st_mode))
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            yield file
            os.fsync(file.fileno())
            if _LOCKS:
                os.replace(temporary, target)  # still locked: nobody takes it for a leftover
        if not _LOCKS:
            os.replace(temporary, target)  # Windows renames no open file
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def _check_replaceable(target: Path) -> None:
    """OSError for a folder or a device, before anything is written."""
    with suppress(FileNotFoundError):
        mode = os.stat(target).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(None, "is a folder")
        if not stat.S_ISREG(mode):
            raise OSError(None, "is not a plain file")


def _create(target: Path) -> tuple[int, Path]:
    """(descriptor, path) of a new temporary file, locked."""
    while True:
        temporary = target.with_name(_prefix(target) + secrets.token_hex(N_RANDOM // 2) + SUFFIX)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
        except FileExistsError:
            continue
        if not _LOCKS or _lock(descriptor, wait=True) is None or _names(temporary, descriptor):
            return descriptor, temporary
        os.close(descriptor)  # another writer swept it away between open and lock


def _sweep(target: Path) -> None:
    """Remove the temporary files of writers that are no more."""
    prefix = _prefix(target)
    with os.scandir(target.parent) as entries:
        names = [e.name for e in entries if e.name.startswith(prefix) and e.name.endswith(SUFFIX)]
    for name in names:
        if len(name) == len(prefix) + N_RANDOM + len(SUFFIX):
            with suppress(OSError):  # it has gone, or is in use, or somebody else's
                _remove_unless_in_use(target.with_name(name))


def _remove_unless_in_use(path: Path) -> None:
    if not stat.S_ISREG(os.lstat(path).st_mode):
        return
    if not _LOCKS:
        os.unlink(path)
        return
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        if _lock(descriptor, wait=False) and _names(path, descriptor):
            os.unlink(path)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool | None:
    """Whether the file is locked now; None if this file system has no locks."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _names(path: Path, descriptor: int) -> bool:
    """Whether the path is still this open file's."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _prefix(target: Path) -> str:
    return f".{target.name[:50]}."  # names have at most 255 bytes


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where folders can be synced."""
    if hasattr(os, "O_DIRECTORY"):
        with suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
