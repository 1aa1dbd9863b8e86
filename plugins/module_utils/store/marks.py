# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Marks of unfinished imports, by which objects that a power cut tore are found again.

Objects are linked long before they are synced; the one barrier comes before their names are published. After a power
cut an object may therefore have its name and its size but not its bytes. In a repository whose objects are sealed by
fs-verity that cannot go unnoticed: sealing writes the data out, and every object is measured before it is taken for
present. Without seals presence is judged by size, so the next pull would build on the torn object. Hence the marks,
files in ``.composefs-oci/imports/``. Why they suffice:

1. A mark is on the disk (its data and all directories above it are synced) before its import links the first object,
   and it is removed only after a barrier that came after the last. So an object that this engine linked and that is not
   durable is younger than some mark.
2. Its owner holds a lock (flock) on the mark as long as it lives; worker processes inherit the lock, so it lives as
   long as any of them.
3. A mark whose owner is gone and that was made since this boot means that a process was killed. What it wrote is whole,
   for objects are linked only when complete, and the page cache survives a process: one barrier makes it durable, and
   the mark can go.
4. A mark of another boot means a power cut, a crash of the kernel or a reset. Every object that is not older than the
   mark is read and hashed, and removed if it is not what its name says. A barrier makes the removals durable before the
   mark goes: they could be lost where the removal of the mark is not. Should the recovery itself be cut off, the mark
   is still there.
5. Nobody imports while a mark of another boot exists: whoever finds one takes its lock, waiting for someone else's
   recovery if need be.

"Not older" is judged by the change time of the inode, which only the clock of the host sets and which linking sets
anew. Clocks get adjusted, so a day of tolerance is allowed, and a mark from the future says that the clock cannot be
relied on: then every object is hashed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import time
from typing import NamedTuple

from ..host import files, filesystem
from ..errors import doing
from .objects import ObjectStore

DIRECTORY = ".composefs-oci"
IMPORTS = f"{DIRECTORY}/imports"
_TOLERANCE = 24 * 3600.0
_MAX_MARK = 4096


class Recovery(NamedTuple):
    """What was found: marks of dead imports, objects hashed because of them, and objects removed because they were
    torn.
    """

    marks: int = 0
    checked: int = 0
    removed: int = 0


def boot_id() -> str:
    """What tells this boot of the kernel from any other; empty if that cannot be told. See random(4)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class ImportMark:
    """The mark of one import of this process: made and made durable on creation, removed by ``remove``, left in place
    if we die.
    """

    def __init__(self, root: int) -> None:
        """``root`` is the repository's directory, open for reading. NoSpace and other EngineErrors when the system
        refuses.
        """
        with doing("Marking the import as begun"):
            for path in (DIRECTORY, IMPORTS):
                files.make_directory(root, path)
            content = (
                json.dumps({"boot_id": boot_id(), "pid": os.getpid(), "started": time.time()}).encode("ascii") + b"\n"
            )
            self._root = root
            self._name = f"{IMPORTS}/{os.urandom(8).hex()}"
            self._fd = self._create(content)
            try:
                for path in (IMPORTS, DIRECTORY, "."):
                    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
                    try:
                        os.fsync(directory)
                    finally:
                        os.close(directory)
            except BaseException:
                self.remove()
                raise

    def _create(self, content: bytes) -> int:
        # Locked before it has a name that others look at, so that nobody can take it for a dead one.
        with files.opened_directory(IMPORTS, self._root) as directory:
            draft = files.draft(directory, mode=0o644, prefix=".")
            try:
                fcntl.flock(draft.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                files.write_all(draft.fd, content)
                os.fsync(draft.fd)
                draft.link(os.path.basename(self._name))
                fd, draft.fd = draft.fd, -1
                return fd
            finally:
                draft.close()

    def remove(self) -> None:
        """Take the mark away; only after a barrier. It need not be durable: a mark that comes back costs a check,
        nothing more.
        """
        if self._fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._name, dir_fd=self._root)
            self.abandon()

    def abandon(self) -> None:
        """Leave the mark for the next import to find, as if this process had been killed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def recover(root: int, objects: ObjectStore) -> Recovery:
    """Deal with every mark whose import died: see the argument above. ``root`` is the repository's directory, open for
    reading.

    Waits for another process's recovery. EngineError if a damaged object cannot be removed; the mark stays then.
    """
    marks = checked = removed = 0
    with doing("Looking after unfinished imports"):
        try:
            directory = os.open(IMPORTS, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        except FileNotFoundError:
            return Recovery()
        try:
            # Names that begin with a dot are not marks yet.
            names = [name for name in sorted(os.listdir(directory)) if not name.startswith(".")]
        finally:
            os.close(directory)
        for name in names:
            fd = _dead(root, name)
            if fd is None:
                continue
            try:
                marks += 1
                boot, started = _read(fd)
                if not boot or boot != boot_id():
                    found = _remove_torn(objects, started)
                    checked += found[0]
                    removed += found[1]
                filesystem.sync(root)
                os.unlink(f"{IMPORTS}/{name}", dir_fd=root)
            finally:
                os.close(fd)
    return Recovery(marks, checked, removed)


def _dead(root: int, name: str) -> int | None:
    """The locked mark ``name`` if its owner is gone, else None. Waits if someone else is just recovering from it."""
    try:
        fd = os.open(f"{IMPORTS}/{name}", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
    except FileNotFoundError:
        return None
    try:
        # A mark of this boot that is locked belongs to a running import, or to someone who just syncs: nothing to wait
        # for in either case. One of another boot cannot have a running owner on this host: it is being recovered from,
        # and its objects must not be relied on until that is done.
        same_boot = _read(fd)[0] == boot_id() != ""
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB if same_boot else fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _read(fd: int) -> tuple[str, float]:
    """Boot id and start (seconds since the epoch) in a mark; of the unknown boot and from the beginning of time if it
    is damaged.
    """
    try:
        document = json.loads(os.pread(fd, _MAX_MARK, 0))
        boot, started = document["boot_id"], document["started"]
        if isinstance(boot, str) and isinstance(started, (int, float)):
            return boot, float(started)
    except (ValueError, KeyError, TypeError):
        pass
    return "", 0.0


def _remove_torn(objects: ObjectStore, started: float) -> tuple[int, int]:
    """Hash every object not older than ``started`` and remove those that are not what their name says;
    numbers of both.
    """
    checked = removed = 0
    oldest = started - _TOLERANCE if started <= time.time() else 0.0
    for name, digest in objects.names():
        if digest is None:
            continue
        try:
            found = os.stat(name, dir_fd=objects.dirfd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        if max(found.st_ctime, found.st_mtime) < oldest:
            continue
        checked += 1
        if not objects.verify(digest):
            try:
                os.unlink(name, dir_fd=objects.dirfd)
                removed += 1
            except OSError as error:
                if error.errno != errno.ENOENT:
                    raise
    return checked, removed
