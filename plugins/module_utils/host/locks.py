# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Who holds a lock (flock) on a file, as far as the kernel shows it (proc_locks(5))."""

from __future__ import annotations

import os
from typing import NamedTuple


class Holder(NamedTuple):
    """A process that took a lock: its id, its command in one line (empty if it cannot be seen), and whether it holds
    the lock alone.
    """

    pid: int
    command: str
    exclusive: bool

    def __str__(self) -> str:
        return f"{self.pid} ({self.command})" if self.command else str(self.pid)


def holders(fd: int) -> list[Holder]:
    """Those that hold a lock on the open file ``fd``, without this process; empty where it cannot be told.

    The kernel names who took the lock. Should that process be gone and a child of it hold the lock on, it is named
    all the same.
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
        # Some file systems show another device in stat() than here, so only the inode is held against it.
        if words[5].rpartition(":")[2] != str(found.st_ino) or not words[4].isdigit():
            continue
        pid = int(words[4])
        if pid not in (0, os.getpid()) and _has_open(pid, found):
            holders[pid] = Holder(pid, _command(pid), words[3] == "WRITE")
    return sorted(holders.values())


def _has_open(pid: int, wanted: os.stat_result) -> bool:
    """Whether a process has the file open; also True where one may not look."""
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


def _command(pid: int) -> str:
    """The beginning of the program's name: its arguments may hold secrets."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = file.read().strip()
        return name if name.isprintable() else ""
    except OSError:
        return ""
