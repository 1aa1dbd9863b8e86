# Copyright (c) composefs.oci contributors
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
   long as any of them. Only the owner of the file and root can open it, so nobody else can make a dead one seem alive.
3. A mark whose owner is gone, and that was made since this boot and through this very mount of the file system, means
   that a process was killed. What it wrote is whole, for objects are linked only when complete, and the page cache
   survives a process: one barrier makes it durable, and the mark can go.
4. A mark of another boot means a power cut, a crash of the kernel or a reset. One of another mount means that the file
   system may have gone down and come back, with what had reached the disk. Every object that is not older than the mark
   is read and hashed, and removed if it is not what its name says. A barrier makes the removals durable before the mark
   goes: they could be lost where the removal of the mark is not. Should the recovery itself be cut off, the mark is
   still there.
5. Nobody imports while someone recovers: whoever finds marks takes the lock for recoveries first, and waits for it
   while someone else recovers.

"Not older" is judged by the change time of the inode, which only the clock of the host sets and which linking sets
anew. Clocks get adjusted, so a day of tolerance is allowed across boots, and as much as it was adjusted within one. A
mark from the future says that the clock cannot be relied on: then every object is hashed.

A mount is told from the next by its unique number (statx(2), since Linux 6.8). Where there is none, every mark of a
dead import counts as one of another mount, which costs reading what the import had stored.

Only a real mark is removed as one: it has the name of a mark, it is a regular file with one link that root or the
caller made, and it has a mark's content. Anything else in the directory is left alone, reported as a warning, and
blocks nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import stat
import time
from typing import NamedTuple

from ..host import beneath, files, filesystem, locks
from ..errors import FormatError, TooLarge, doing
from .objects import ObjectStore

DIRECTORY = ".composefs-oci"
IMPORTS = f"{DIRECTORY}/imports"
LOCKS = f"{DIRECTORY}/locks"
RECOVERY_LOCK = "recovery"
LOCK_WAIT = 600.0
DAY = 24 * 3600.0
_TOLERANCE = DAY
_MINUTE = 60.0
_MAX_MARK = 4096
_SHARING = 4  # times as much as it holds may lie on a file system where files share blocks
_NAME = re.compile("[0-9a-f]{16}")
# Names that this engine gives to what is not whole yet, by the directory: left over only where a process was killed.
_LITTER = {
    "objects": re.compile(re.escape(files.OBJECT_PREFIX) + "[0-9a-f]{12}"),
    "": re.compile(r"\.symlink-[0-9a-f]{12}|\.tmp-meta\.json-[0-9a-f]{12}"),
    IMPORTS: re.compile(r"\.[0-9a-f]{12}"),
}


class Recovery(NamedTuple):
    """What was found: marks of dead imports, objects hashed because of them, objects removed because they were torn,
    what is wrong but blocks nobody, and unfinished files removed.
    """

    marks: int = 0
    checked: int = 0
    removed: int = 0
    warnings: tuple[str, ...] = ()
    litter: int = 0


class _Mark(NamedTuple):
    """What a mark says: the boot and the mount it was made in (empty if unknown), and when, in seconds since the epoch
    and since that boot.
    """

    boot: str
    mount: str
    started: float
    uptime: float | None


def boot_id() -> str:
    """The id of this boot of the kernel, which no other boot has; empty if there is none. See random(4)."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


class ImportMark:
    """The mark of one import of this process: made and made durable on creation, removed by ``remove``, left in place
    if we die.
    """

    def __init__(self, root: beneath.Root) -> None:
        """``root`` is the repository's directory. NoSpace and other EngineErrors when the system refuses."""
        with doing("Marking the import as begun"):
            document = {
                "boot_id": boot_id(),
                "mount": filesystem.mount_id(root.fd),
                "pid": os.getpid(),
                "started": time.time(),
                "uptime": time.clock_gettime(time.CLOCK_BOOTTIME),
            }
            self._name = os.urandom(8).hex()
            self._directory = root.open_directory(IMPORTS, make=True)
            self._fd = -1
            try:
                self._fd = self._create(json.dumps(document).encode("ascii") + b"\n")
                os.fsync(self._directory)
                with root.directory(DIRECTORY) as above:
                    os.fsync(above)
                os.fsync(root.fd)
            except BaseException:
                self.remove()
                self.abandon()
                raise

    def _create(self, content: bytes) -> int:
        # Locked before it has a name that others look at, so that nobody can take it for a dead one.
        draft = files.draft(self._directory, prefix=".")
        try:
            fcntl.flock(draft.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            files.write_all(draft.fd, content)
            os.fsync(draft.fd)
            draft.link(self._name)
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
                os.unlink(self._name, dir_fd=self._directory)
            self.abandon()

    def abandon(self) -> None:
        """Leave the mark for the next import to find, as if this process had been killed."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def recover(root: beneath.Root, objects: ObjectStore, wait: float = LOCK_WAIT) -> Recovery:
    """Deal with every mark whose import died: see the argument above. ``root`` is the repository's directory.

    Waits up to ``wait`` seconds for another process's recovery, Busy then. EngineError if a damaged object cannot be
    removed; the mark stays then.
    """
    with doing("Looking after unfinished imports"):
        now = time.time()
        names = [name for name in sorted(root.list(IMPORTS)) if not name.startswith(".")]
        warnings = [_stray(root, name, "has no mark's name") for name in names if not _NAME.fullmatch(name)]
        names = [name for name in names if _NAME.fullmatch(name)]
        done, living = Recovery(), [now]
        if names:
            directory = root.open_directory(LOCKS, os.O_PATH, make=True)
            try:
                with locks.lock_file(directory, RECOVERY_LOCK, wait, f"Someone else repairs {root.path}"):
                    done = _recover(root, objects, names, living, warnings, wait)
            finally:
                os.close(directory)
        return done._replace(warnings=tuple(warnings), litter=tidy(root, min(living)))


def tidy(root: beneath.Root, before: float) -> int:
    """Remove what killed processes left of files that were not whole yet; return how many there were.

    Only what has such a name, belongs to root or the caller, and is older than ``before`` (seconds since the epoch), so
    that no living process can be at work on it. What cannot be removed stays: it harms nobody.
    """
    removed = 0
    for path, pattern in _LITTER.items():
        with contextlib.suppress(FileNotFoundError), root.directory(path) as directory:
            for name in filter(pattern.fullmatch, os.listdir(directory)):
                with contextlib.suppress(OSError):
                    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                    right = stat.S_ISREG(found.st_mode) or (stat.S_ISLNK(found.st_mode) and ".symlink-" in name)
                    if right and root.is_ours(found) and max(found.st_ctime, found.st_mtime) < before:
                        os.unlink(name, dir_fd=directory)
                        removed += 1
    return removed


def _recover(
    root: beneath.Root,
    objects: ObjectStore,
    names: list[str],
    living: list[float],
    warnings: list[str],
    wait: float,
) -> Recovery:
    """The same for marks, under the lock for that. ``living`` gets the starts of imports that live, ``warnings`` what
    is no mark.
    """
    marks = checked = removed = 0
    boot, mount = boot_id(), filesystem.mount_id(root.fd)
    with root.directory(IMPORTS) as directory:
        for name in names:
            fd = _open(root, directory, name, warnings)
            if fd < 0:
                continue
            try:
                mark = _read(fd)
                if not _lock_dead(fd, root, mark, boot, living, wait):
                    continue
                marks += 1
                if mark is None or not boot or mark.boot != boot:
                    since = mark.started - _TOLERANCE if mark else 0.0
                    found = _remove_torn(root, objects, since, mark.started if mark else 0.0)
                elif not mount or mark.mount != mount:
                    found = _remove_torn(root, objects, mark.started - _MINUTE - _adjusted(mark), mark.started)
                else:
                    found = (0, 0)
                checked += found[0]
                removed += found[1]
                filesystem.sync(root.fd)
                if mark is None:
                    # The file may be torn, or may be something precious, so it is not removed. It was treated as a mark
                    # of another boot; under its new name it does not count as a mark any more.
                    os.rename(name, f".damaged-{name}", src_dir_fd=directory, dst_dir_fd=directory)
                    warnings.append(_stray(root, f".damaged-{name}", "has a mark's name but not its content"))
                else:
                    os.unlink(name, dir_fd=directory)
            finally:
                os.close(fd)
    return Recovery(marks, checked, removed)


def _open(root: beneath.Root, directory: int, name: str, warnings: list[str]) -> int:
    """An fd of what seems to be a mark, -1 if it is gone or is no mark. OSError passes."""
    try:
        fd = files.open_regular(directory, name, os.O_RDWR)
    except FileNotFoundError:
        return -1
    except FormatError:
        warnings.append(_stray(root, name, "is not a regular file"))
        return -1
    found = os.fstat(fd)
    why = ""
    if not root.is_ours(found):
        why = f"belongs to user {found.st_uid}"
    elif found.st_nlink > 1:
        why = "has other names, too"
    elif found.st_size > _MAX_MARK:
        why = "is too large for a mark"
    if why:
        warnings.append(_stray(root, name, why))
    if why or not found.st_nlink:
        os.close(fd)
        return -1
    return fd


def _lock_dead(fd: int, root: beneath.Root, mark: _Mark | None, boot: str, living: list[float], wait: float) -> bool:
    """Lock a mark whose owner is gone; False if the owner lives, or the mark went meanwhile."""
    if mark is not None and mark.boot == boot != "":
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            living.append(mark.started)
            return False
    else:
        # It cannot have a running owner on this host: version 0.1.0 of this collection is recovering from it, and its
        # objects must not be relied on until that is done.
        locks.acquire(fd, locks.EXCLUSIVE, wait, f"Someone else repairs {root.path}")
    return os.fstat(fd).st_nlink > 0


def _read(fd: int) -> _Mark | None:
    """What the mark says; None if it is damaged."""
    try:
        document = json.loads(os.pread(fd, _MAX_MARK, 0))
        boot, started = document["boot_id"], document["started"]
        mount, uptime = document.get("mount", ""), document.get("uptime")
        if (
            isinstance(boot, str)
            and isinstance(mount, str)
            and isinstance(started, (int, float))
            and isinstance(uptime, (int, float, type(None)))
        ):
            return _Mark(boot, mount, float(started), uptime)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return None


def _adjusted(mark: _Mark) -> float:
    """By how many seconds the clock was adjusted since the mark of this boot was made."""
    if mark.uptime is None:
        return _TOLERANCE
    return abs((time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)) - (mark.started - mark.uptime))


def _stray(root: beneath.Root, name: str, why: str) -> str:
    return (
        f"{root.path}/{IMPORTS}/{name} {why}: this collection did not make it and leaves it alone. Find out who put it "
        f"there, then remove it."
    )


def _remove_torn(root: beneath.Root, objects: ObjectStore, oldest: float, started: float) -> tuple[int, int]:
    """Hash every object not older than ``oldest`` (every one if ``started`` lies in the future) and remove those that
    are not what their name says; numbers of both.

    Holes cost nothing. Beyond that the file system bounds what there is to read, unless somebody shares few blocks
    among many files: TooLarge then, and the mark stays.
    """
    checked = removed = 0
    left = _SHARING * filesystem.size(root.fd)
    if started > time.time():
        oldest = 0.0
    for _name, digest in objects.names():
        found = objects.stat(digest) if digest is not None else None
        if digest is None or found is None or not stat.S_ISREG(found.st_mode):
            continue
        if max(found.st_ctime, found.st_mtime) < oldest:
            continue
        checked += 1
        left -= min(found.st_size, found.st_blocks * 512)
        if left < 0:
            raise TooLarge(
                f"The objects that an unfinished import may have left in {root.path} claim more bytes than their file "
                f"system holds.",
                "Find out who put them there; the module composefs_check looks at all of them.",
            )
        if not objects.verify(digest):
            removed += objects.remove(digest)
    return checked, removed
