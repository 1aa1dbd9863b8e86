# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Locks (flock(2)): waiting for one has an end, and its holders can be named.

A lock lives as long as some process has the file open that took it, so a holder that dies frees it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from . import files
from ..errors import Busy

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX
_WORDS = 4
_LETTERS = 120


def acquire(fd: int, kind: int, wait: float, what: str, tell: Callable[[str], None] | None = None) -> None:
    """Lock the open file ``fd`` SHARED or EXCLUSIVE, asking again for ``wait`` seconds.

    Busy after that: ``what`` (``The repository stayed locked``), how long, and who holds it. ``tell`` is called once
    with the holders, in words, if there is something to wait for.
    """
    deadline = time.monotonic() + wait
    pause = 0.01
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        if time.monotonic() >= deadline:
            raise Busy(f"{what} for {wait:g} seconds{_held(fd)}.", "Try again later.")
        if tell is not None and pause > 0.1:
            tell(_held(fd).lstrip(": "))
            tell = None
        time.sleep(min(pause, max(deadline - time.monotonic(), 0.001)))
        pause = min(pause * 2, 0.5)


@contextlib.contextmanager
def lock_file(
    dir_fd: int, name: str, wait: float, what: str, tell: Callable[[str], None] | None = None, keep: bool = True
) -> Iterator[bool]:
    """Hold the file ``name`` in the open directory locked for the duration of a ``with``; it is made if it is missing,
    readable by its owner only, so that nobody else can lock it. See ``acquire``; OSError passes.

    Without ``keep`` the file goes when the block ends. The value tells whether there was somebody to wait for.
    """
    waited = False

    def note(holders: str) -> None:
        nonlocal waited
        waited = True
        if tell is not None:
            tell(holders)

    deadline = time.monotonic() + wait
    while True:
        fd = _open_or_make(dir_fd, name)
        try:
            acquire(fd, EXCLUSIVE, max(deadline - time.monotonic(), 0.0), what, note)
            # Whoever held it may have removed the file meanwhile: a lock on it would exclude nobody.
            if os.fstat(fd).st_nlink:
                break
        except BaseException:
            os.close(fd)
            raise
        waited = True
        os.close(fd)
    try:
        yield waited
    finally:
        # The lock is let go whatever ends the clean-up: a process that goes on must not wait for itself.
        try:
            if not keep:
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=dir_fd)
        finally:
            os.close(fd)


def _open_or_make(dir_fd: int, name: str) -> int:
    while True:
        with contextlib.suppress(FileNotFoundError):
            return files.open_regular(dir_fd, name, os.O_RDWR)
        with contextlib.suppress(FileExistsError):
            files.write_whole(dir_fd, name, b"", 0o600, sync=False, exclusive=True)


class Holder(NamedTuple):
    """A process that took a lock: its id, its command in one line (empty if it cannot be seen), and whether it holds
    the lock alone.
    """

    pid: int
    command: str
    exclusive: bool

    def __str__(self) -> str:
        return f"process {self.pid} ({self.command})" if self.command else f"process {self.pid}"


def holders(fd: int, others: bool = True) -> list[Holder]:
    """Those that hold a lock on the open file ``fd``; with ``others`` this process is left out. Empty where it cannot
    be told. See proc_locks(5).

    The kernel names who took the lock. If that process is gone while a child of it still holds the lock, the kernel
    goes on naming the process.
    """
    found = os.fstat(fd)
    holders = {}
    try:
        with open("/proc/locks", encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        words = line.split()
        # 1: FLOCK  ADVISORY  READ 4711 fe:00:1234 0 EOF; who waits for a lock has an arrow behind the number.
        if len(words) < 6 or words[1] != "FLOCK":
            continue
        # Some file systems show another device in stat() than here, so only the inode is compared.
        if words[5].rpartition(":")[2] != str(found.st_ino) or not words[4].isdigit():
            continue
        pid = int(words[4])
        if pid and not (others and pid == os.getpid()) and _has_open(pid, found):
            holders[pid] = Holder(pid, command(pid), words[3] == "WRITE")
    return sorted(holders.values())


def command(pid: int) -> str:
    """The program of a process and what it was told to do, printable and short: ``cfsctl gc``. Options and their values
    are left out, for they may hold secrets.
    """
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read(4096).decode("utf-8", "replace").split("\0")
    except OSError:
        return ""
    shown = [os.path.basename(words[0])]
    option = False
    for word in filter(None, words[1:]):
        if not option and not word.startswith("-") and not set(word) & set("@:="):
            shown.append(os.path.basename(word))
        option = word.startswith("-")
    text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(shown[:_WORDS]))
    return text[:_LETTERS]


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    """Whether a process has the file open; True also where this cannot be looked up."""
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return True
    for name in names:
        try:
            found = os.stat(f"{directory}/{name}")
        except OSError:
            continue
        if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
            return True
    return False


def _held(fd: int) -> str:
    found = holders(fd, others=False)
    return f": it is held by {', '.join(map(str, found))}" if found else ""
