# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Compare every object of a repository with the digest in its name, at the speed of the disk or of all processors."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..formats.digests import ObjectDigest, object_digest
from ..formats import fsverity
from ..host import files, workers
from ..errors import OF_THIS_PROCESS, DigestMismatch, FormatError, VerityUnsupported, doing, from_os_error
from ..progress import Countdown, Progress
from ..store.objects import hash_file
from ..store.repository import Repository
from .findings import OBJECT_DAMAGED, OBJECT_UNREADABLE, OBJECT_UNSEALED, STRAY_FILE, Finding

# Bytes read at once, always into the same memory, which therefore stays in the processor's cache. Most objects are
# smaller; larger ones are read in pieces of this size.
_PIECE = 1 << 18
# Seconds between two reports of a worker on how far it is.
_TOLD = 0.25
_LIST = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY
_WORK = "checks objects"
_READ_ERRORS = (errno.EIO, getattr(errno, "EUCLEAN", errno.EIO), errno.EBADMSG)


class Counted:
    """How many objects and bytes were read."""

    def __init__(self) -> None:
        self.objects = 0
        self.bytes = 0


def list_names(repository: Repository, strays: bool = True) -> tuple[int, list[Finding]]:
    """The number of objects by name alone, and what lies among them without being one. Without ``strays`` only what
    lies beside their directories is reported: reading the objects finds the rest.
    """
    count = 0
    findings: list[Finding] = []
    if not _exists(repository):
        return count, findings
    for name in sorted(_listing(repository, ".")):
        path = f"objects/{name}"
        if len(name) == 2 and not name.strip(_HEX):
            try:
                entries = _listing(repository, name)
            except FormatError:
                findings.append(_stray(path))
                continue
            count += len(entries)
            if not strays:
                continue
            is_name = _names_of(repository)
            for entry in sorted(entry for entry in entries if not is_name(entry)):
                count -= 1
                findings.append(_stray(f"{path}/{entry}"))
        elif not name.startswith(".tmp-object-"):
            findings.append(_stray(path))
    return count, findings


@contextlib.contextmanager
def checking_objects(
    repository: Repository, processors: int
) -> Iterator[Callable[[int, Progress], tuple[Counted, list[Finding]]]]:
    """Read every object and compare it with its name; memory grows only with the number of damaged ones.

    Worker processes begin at once, so that this process can do something else meanwhile; with one processor the work is
    done here, when the result is asked for. The block gets a function; called with the number of objects and where to
    show progress, it waits for the end of the work and returns what was counted and found.
    """
    buffer = fsverity.Buffer(repository.algorithm, _PIECE)

    def work(number: int, tell: Callable[[Any], None]) -> None:
        _check_directory(repository, f"{number:02x}", buffer, tell)

    # _exists() opens the directory, which must happen before processes are forked.
    tasks, begun = 256 if _exists(repository) else 0, time.monotonic()
    with workers.begin(_WORK, tasks, work, processors) as finish:

        def told(total: int, progress: Progress) -> tuple[Counted, list[Finding]]:
            return _collect(finish, total, progress, begun if processors > 1 else None)

        yield told


def check_some(
    repository: Repository, digests: Iterable[ObjectDigest], processors: int, progress: Progress
) -> tuple[Counted, list[Finding]]:
    """The same for these objects; missing ones are reported elsewhere."""
    groups: list[list[ObjectDigest]] = [[] for _first in range(256)]
    for digest in digests:
        groups[digest[0]].append(digest)

    buffer = fsverity.Buffer(repository.algorithm, _PIECE)

    def work(number: int, tell: Callable[[Any], None]) -> None:
        first = f"{number:02x}"
        with doing(f"Checking {repository.path}/objects/{first}"):
            try:
                fd = _open_directory(repository, first)
            except FileNotFoundError:
                return
            try:
                for digest in sorted(groups[number]):
                    name = digest.hex()[2:]
                    fault, length = _fault(repository, fd, name, digest, buffer)
                    if fault:
                        tell([fault[0], digest.hex(), f"objects/{first}/{name}", fault[1]])
                    tell([1, length])
            finally:
                os.close(fd)

    tasks, total = 256 if _exists(repository) else 0, sum(map(len, groups))
    with workers.begin(_WORK, tasks, work, processors) as finish:
        return _collect(finish, total, progress)


def _collect(
    finish: Callable[[Callable[[Any], None]], None], total: int, progress: Progress, begun: float | None = None
) -> tuple[Counted, list[Finding]]:
    counted = Counted()
    findings: list[Finding] = []
    left = Countdown(progress, "Checking objects", total, begun=begun)

    def take(value: list[Any]) -> None:
        if len(value) > 2:
            findings.append(Finding(*value))
            return
        counted.objects += value[0]
        counted.bytes += value[1]
        left.reached(counted.objects)

    finish(take)
    return counted, findings


def _open_directory(repository: Repository, name: str) -> int:
    """A directory of objects by the rules of ``beneath``: it might be somebody else's, who changes it as we look."""
    return repository.root.open_directory(name, under=(repository.objects.dirfd, "objects"))


def _exists(repository: Repository) -> bool:
    # Where there are no objects at all the store stands on the repository's own directory, which holds other things.
    return repository.objects.dirfd != repository.fd


def _listing(repository: Repository, name: str) -> list[str]:
    with doing(f"Listing {repository.path}/objects/{name}"):
        try:
            fd = (
                os.open(".", _LIST, dir_fd=repository.objects.dirfd)
                if name == "."
                else _open_directory(repository, name)
            )
        except FileNotFoundError:
            return []
        try:
            return os.listdir(fd)
        finally:
            os.close(fd)


_HEX = "0123456789abcdef"


def _names_of(repository: Repository) -> Callable[[str], object]:
    """Whether the name of a file is that of an object, below the directory of its first two digits."""
    return re.compile(f"[0-9a-f]{{{2 * repository.algorithm.size - 2}}}").fullmatch


def _stray(path: str) -> Finding:
    return Finding(STRAY_FILE, None, path, f"{path} does not belong into a repository.")


def _check_directory(repository: Repository, first: str, buffer: fsverity.Buffer, tell: Callable[[Any], None]) -> None:
    """Check one of the 256 directories; ``tell`` gets findings as lists, and at times the objects and bytes since."""
    algorithm, secure = repository.algorithm, repository.secure
    is_name = _names_of(repository)
    rooms, digest_of = [buffer.room], buffer.digest
    open_file, read_into, close = os.open, os.readv, os.close
    objects = size = 0
    due = time.monotonic() + _TOLD
    with doing(f"Checking {repository.path}/objects/{first}"):
        try:
            fd = _open_directory(repository, first)
        except (FileNotFoundError, FormatError):
            return  # it was reported already
        try:
            for entry in os.scandir(fd):
                name = entry.name
                found = None
                if not secure and entry.is_file(follow_symlinks=False):
                    # Nearly every object is read here, in as few steps as possible. If anything is not as it should be,
                    # _fault() looks at the object closely.
                    try:
                        object_fd = open_file(name, _OPEN, dir_fd=fd)
                        try:
                            length = read_into(object_fd, rooms)
                            if length == _PIECE:
                                begun = fsverity.Hasher(algorithm)
                                begun.update(buffer.room)
                                found, length = hash_file(object_fd, algorithm, begun)
                            else:
                                found = digest_of(length)
                        finally:
                            close(object_fd)
                    except OSError:
                        found = None
                if found is None or found.hex() != first + name:
                    if not is_name(name):
                        tell(list(vars(_stray(f"objects/{first}/{name}")).values()))
                        continue
                    fault, length = _fault(repository, fd, name, object_digest(first + name), buffer)
                    if fault:
                        tell([fault[0], first + name, f"objects/{first}/{name}", fault[1]])
                objects += 1
                size += length
                if not objects % 64 and time.monotonic() > due:
                    tell([objects, size])
                    objects = size = 0
                    due = time.monotonic() + _TOLD
        finally:
            os.close(fd)
    tell([objects, size])


def _fault(
    repository: Repository, dirfd: int, name: str, digest: ObjectDigest, buffer: fsverity.Buffer
) -> tuple[tuple[str, str] | None, int]:
    """Code and message of what is wrong with one object, None if nothing is, and its bytes."""
    try:
        fd = files.open_regular(dirfd, name)
    except FileNotFoundError:
        return None, 0  # it went meanwhile
    except FormatError:
        return (OBJECT_DAMAGED, f"The object {digest.hex()} is not a regular file."), 0
    except OSError as error:
        # That this user or this process may not open it says nothing about the object.
        if error.errno in (errno.EACCES, errno.EPERM) or isinstance(from_os_error(error, ""), OF_THIS_PROCESS):
            raise
        return (OBJECT_UNREADABLE, f"The object {digest.hex()} cannot be opened: {os.strerror(error.errno or 0)}."), 0
    try:
        if repository.secure:
            return _sealed_fault(repository, fd, digest, buffer.room)
        found, size = hash_file(fd, repository.algorithm)
        if found != digest:
            return (
                OBJECT_DAMAGED,
                f"The object {digest.hex()} has content with the fs-verity digest {found.hex()}.",
            ), size
    except OSError as error:
        if error.errno not in _READ_ERRORS:
            raise
        return (OBJECT_UNREADABLE, f"The object {digest.hex()} cannot be read: {os.strerror(error.errno or 0)}."), 0
    else:
        return None, size
    finally:
        os.close(fd)


def _sealed_fault(
    repository: Repository, fd: int, digest: ObjectDigest, buffer: bytearray
) -> tuple[tuple[str, str] | None, int]:
    """The same where the kernel vouches for what it reads: it is asked for the digest, and made to read everything."""
    text = digest.hex()
    try:
        measured = fsverity.measure(fd, repository.algorithm)
    except (DigestMismatch, VerityUnsupported) as error:
        return (OBJECT_DAMAGED, f"The object {text}: {error.message}"), 0
    if measured is None:
        # Perhaps only the seal is missing: then a copy mends it.
        code = OBJECT_UNSEALED if hash_file(fd, repository.algorithm)[0] == digest else OBJECT_DAMAGED
        return (code, f"The object {text} is not protected by fs-verity, which this repository requires."), 0
    if measured != digest:
        return (OBJECT_DAMAGED, f"The object {text} has the fs-verity digest {measured.hex()}."), 0
    # What is in memory was checked when it was read; the disk below may have changed since.
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    size = 0
    while True:
        length = os.readv(fd, [buffer])
        if not length:
            return None, size
        size += length
