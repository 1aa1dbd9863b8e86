# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Files made whole: a reader finds the old content or the new one, never a part, and a crash leaves no litter where the
file system can do without names.

Everything is relative to an open directory, so nobody who can rename or link above it can lead a write elsewhere. A new
file is a *draft* first: without a name where the file system has ``O_TMPFILE``, else with a random one that must not
exist (``O_EXCL`` follows no link). Modes are set, not requested, so the umask of the process does not matter.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from ..errors import FormatError

# What open(O_TMPFILE) answers where a file system (or a very old kernel) does not have it.
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOSYS)
TEMPORARY_PREFIX = ".tmp-"
# The name that cfsctl gives to files that are not objects yet: garbage collectors look into the 256 directories only.
OBJECT_PREFIX = ".tmp-object-"
_PIECE = 1 << 20


class Draft:
    """A file that has no final name yet: its fd, and its temporary name where the file system knows no unnamed
    files.
    """

    __slots__ = ("dir_fd", "fd", "name")

    def __init__(self, fd: int, dir_fd: int, name: str | None = None) -> None:
        self.fd = fd
        self.dir_fd = dir_fd
        self.name = name

    def link(self, name: str, dir_fd: int | None = None) -> None:
        """Give the file a name, in its own directory or in ``dir_fd``. FileExistsError if there is something; OSError
        passes.
        """
        # Works for named and unnamed files alike and cannot take another file for this one, but link() follows the link
        # in /proc only if the source directory is given, too.
        os.link(
            f"/proc/self/fd/{self.fd}",
            name,
            src_dir_fd=self.dir_fd,
            dst_dir_fd=self.dir_fd if dir_fd is None else dir_fd,
            follow_symlinks=True,
        )

    def replace(self, name: str, dir_fd: int | None = None, prefix: str = TEMPORARY_PREFIX) -> None:
        """Give the file a name in one step, also where something has it. Whoever has the old file open keeps it.

        OSError passes.
        """
        target = self.dir_fd if dir_fd is None else dir_fd
        staged = temporary_name(prefix)
        self.link(staged)
        try:
            os.rename(staged, name, src_dir_fd=self.dir_fd, dst_dir_fd=target)
        finally:
            # It is still there after a failure, and where ``name`` was this very file already: rename() does nothing
            # then.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged, dir_fd=self.dir_fd)

    def reopen_read_only(self) -> None:
        """Keep the file open for reading only: the kernel seals a file only when nothing has it open for writing.

        OSError passes.
        """
        # The new fd is opened first: a file without a name is gone when its last fd is closed.
        readable = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.close(self.fd)
        self.fd = readable

    def close(self) -> None:
        """Close the fd and drop the temporary name, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.name is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.name, dir_fd=self.dir_fd)
            self.name = None


def draft(
    dir_fd: int,
    access: int = os.O_RDWR,
    mode: int = 0o600,
    *,
    prefix: str = TEMPORARY_PREFIX,
    unnamed: bool = True,
) -> Draft:
    """A new file in the open directory ``dir_fd`` (O_PATH will do), of exactly ``mode``; close it in any case. OSError
    passes.

    ``unnamed``: try to do without a name first. A caller who makes many drafts learns from ``Draft.name`` that this
    file system cannot.
    """
    if unnamed:
        try:
            made = Draft(os.open(".", os.O_TMPFILE | access | os.O_CLOEXEC, mode, dir_fd=dir_fd), dir_fd)
        except OSError as error:
            if error.errno not in NO_TMPFILE:
                raise
            return draft(dir_fd, access, mode, prefix=prefix, unnamed=False)
    else:
        name = temporary_name(prefix)
        flags = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        made = Draft(os.open(name, flags | access, mode, dir_fd=dir_fd), dir_fd, name)
    try:
        os.fchmod(made.fd, mode)
    except BaseException:
        made.close()
        raise
    return made


def gets_mode(dir_fd: int, mode: int) -> bool:
    """Whether an unnamed file in the open directory gets exactly the mode that it is made with. OSError passes."""
    fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, mode, dir_fd=dir_fd)
    try:
        return stat.S_IMODE(os.fstat(fd).st_mode) == mode
    finally:
        os.close(fd)


def write_whole(
    dir_fd: int, name: str, data: bytes, mode: int = 0o644, *, sync: bool = True, exclusive: bool = False
) -> None:
    """Make ``name`` in the open directory ``dir_fd`` a file with exactly ``data`` and ``mode``, in one step.

    A link that has the name is replaced, not followed. ``sync``: when this returns, content and name are on the disk.
    ``exclusive``: FileExistsError instead of replacing anything. OSError passes; then nothing was changed.
    """
    made = draft(dir_fd, os.O_WRONLY, mode)
    try:
        write_all(made.fd, data)
        if sync:
            os.fsync(made.fd)
        if exclusive:
            made.link(name)
        else:
            made.replace(name)
    finally:
        made.close()
    if sync:
        sync_directory(dir_fd)


def write_all(fd: int, data: bytes | bytearray | memoryview, done: int = 0) -> None:
    """Write ``data`` from offset ``done`` on. The system takes less than asked when the disk is nearly full, or above 2
    GiB.
    """
    with memoryview(data) as view:
        while done < len(view):
            done += os.write(fd, view[done:])


def sync_directory(dir_fd: int) -> None:
    """Wait until the names in the open directory (O_PATH will do) are on the disk. OSError passes."""
    fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directory(dir_fd: int, name: str, mode: int = 0o755) -> bool:
    """Make the directory ``name`` (a single component) with exactly ``mode``; False if there is something already.

    OSError passes.
    """
    try:
        os.mkdir(name, mode, dir_fd=dir_fd)
    except FileExistsError:
        return False
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        os.fchmod(fd, mode)
    finally:
        os.close(fd)
    return True


@contextlib.contextmanager
def opened_directory(path: str, dir_fd: int | None = None) -> Iterator[int]:
    """An fd of the directory at ``path``, for the duration of a ``with``. Links on the way are followed, for the
    path is the user's own; OSError passes.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def open_regular(dir_fd: int, name: str, access: int = os.O_RDONLY) -> int:
    """An fd of the regular file ``name`` (a single component) in the open directory; never follows a link, never
    waits for a FIFO.

    FormatError if something else has the name; OSError passes.
    """
    try:
        fd = os.open(name, access | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        # ELOOP: a link. ENXIO: a socket, or a FIFO that nobody reads. EISDIR: a directory that was to be written.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise FormatError(f"{name} is not a regular file.", "Find out who put it there, then remove it.") from error
        raise
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{name} is not a regular file.", "Find out who put it there, then remove it.")
    return fd


def read_whole(dir_fd: int, name: str, limit: int) -> bytes:
    """The content of the regular file ``name`` in the open directory, opened as by ``open_regular``. FormatError if it
    has more than ``limit`` bytes; OSError passes.
    """
    fd = open_regular(dir_fd, name)
    try:
        return read_all(fd, limit, name)
    finally:
        os.close(fd)


def read_all(fd: int, limit: int, name: str) -> bytes:
    """What is left to read of ``fd``. FormatError, with ``name`` in its message, if that is more than ``limit``
    bytes.
    """
    parts: list[bytes] = []
    left = limit + 1
    while left:
        part = os.read(fd, min(left, _PIECE))
        if not part:
            return b"".join(parts)
        parts.append(part)
        left -= len(part)
    raise FormatError(f"{name} is larger than the {limit} bytes that are allowed here.", "Restore or remove it.")


def temporary_name(prefix: str = TEMPORARY_PREFIX) -> str:
    """A name that nobody can foresee."""
    return prefix + os.urandom(6).hex()
