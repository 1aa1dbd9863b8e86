# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A directory that may belong to somebody else, and everything below it, opened so that nobody leads us elsewhere.

Root works in directories of other users. Whoever can write there can put a link in the place of any directory, and what
root would write, replace or remove below it happens wherever the link leads. Hence three rules:

1. Below the opened directory no link is followed. Every component of a path is opened by itself, relative to the one
   before and with O_NOFOLLOW. (openat2(2) with RESOLVE_NO_SYMLINKS would do two or three components in one call, but
   each of them has to be looked at anyway, and there is one way for every kernel and every seccomp filter.)
2. Every directory belongs to the caller or to root, and nobody else can write to it. Otherwise what is read may change
   between two looks. A user who wants to work there all the same accepts that by an option; rule 1 stays in force.
3. Files are opened without following and without waiting, and must be regular: a FIFO would hang the reader for ever.

On the way *to* the directory links are followed if root or the caller made them: administrators make such links.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator

from . import files
from ..errors import FormatError, UnsafeRepository

REFUSE, ACCEPT = "refuse", "accept"
_MAX_LINKS = 40
_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_HINT = (
    "Correct the owner and the mode (chown, chmod go-w), run as the owner, or accept the risk with "
    "'unsafe_repository: accept'; mounts never accept it."
)
_LINK_HINT = "Find out who put it there. Links below a repository are never followed; a bind mount does the same."


class Root:
    """An open directory and the rules for what lies below it. Paths are relative to it, without ``.`` and ``..``.

    ``fd`` is open for reading and becomes this object's: ``close`` it. ``path`` is its name in messages. With
    ``accept`` owners and modes do not matter. ``fault`` says in words why the directory itself is unsafe, empty if it
    is not.
    """

    def __init__(self, fd: int, path: str, accept: bool = False) -> None:
        self.fd = fd
        self.path = path
        self.accept = accept
        found = os.fstat(fd)
        self._owners = owners()
        self.assume(found.st_uid, found.st_mode)

    def assume(self, uid: int, mode: int) -> None:
        """Judge as if the directory itself had this owner and mode."""
        self.fault = _judged(uid, mode, self._owners, 0o022)
        # What others may do in inner directories matters only if they get that far.
        self._forbidden = (0o020 if mode & 0o010 else 0) | (0o002 if mode & 0o001 else 0)

    def close(self) -> None:
        """Close the fd, once."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def require_safe(self) -> None:
        """Raise UnsafeRepository if the directory itself is unsafe and that was not accepted."""
        if self.fault and not self.accept:
            raise UnsafeRepository(f"{self.path} {self.fault}.", _HINT)

    def open_directory(
        self,
        path: str,
        access: int = os.O_RDONLY,
        *,
        make: bool = False,
        strict: bool = False,
        under: tuple[int, str] | None = None,
    ) -> int:
        """An fd of the directory ``path`` (``access`` may be O_PATH), the caller's to close; with ``make`` missing
        directories are made, mode 0755.

        UnsafeRepository for a link, and for owners and modes unless they are accepted (``strict``: in any case).
        FormatError if something else is there. OSError passes, so FileNotFoundError if there is nothing. ``under``:
        an open directory below this one that ``path`` is relative to, and its path.
        """
        names = path.split("/")
        start, above = (self.fd, self.path) if under is None else (under[0], f"{self.path}/{under[1]}")
        current = start
        try:
            for number, name in enumerate(names):
                here = f"{above}/{'/'.join(names[: number + 1])}"
                wanted = _DIRECTORY | (access if number == len(names) - 1 else os.O_PATH)
                try:
                    inner = os.open(name, wanted, dir_fd=current)
                except FileNotFoundError:
                    if not make:
                        raise
                    files.make_directory(current, name)
                    inner = _open(current, name, wanted, here)
                except OSError as error:
                    raise _explained(error, current, name, here) from error
                if current != start:
                    os.close(current)
                current = inner
                fault = "" if self.accept and not strict else _fault(os.fstat(current), self._owners, self._forbidden)
                if fault:
                    raise UnsafeRepository(f"{here} {fault}.", _HINT)
        except BaseException:
            if current != start:
                os.close(current)
            raise
        return current

    @contextlib.contextmanager
    def directory(
        self, path: str, access: int = os.O_RDONLY, *, make: bool = False, strict: bool = False
    ) -> Iterator[int]:
        """``open_directory`` for the duration of a ``with``; an empty path is the directory itself."""
        if not path:
            yield self.fd
            return
        fd = self.open_directory(path, access, make=make, strict=strict)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextlib.contextmanager
    def parent(self, path: str, *, make: bool = False, strict: bool = False) -> Iterator[tuple[int, str]]:
        """The directory (O_PATH) that ``path`` lies in, and the last component, for a system call on just that."""
        directory, _slash, name = path.rpartition("/")
        with self.directory(directory, os.O_PATH, make=make, strict=strict) as fd:
            yield fd, name

    def open_file(self, path: str, access: int = os.O_RDONLY) -> int:
        """An fd of the regular file ``path``, the caller's to close; see ``files.open_regular``."""
        with self.parent(path) as (fd, name):
            return files.open_regular(fd, name, access)

    def read_file(self, path: str, limit: int) -> bytes:
        """The content of the regular file ``path``, of at most ``limit`` bytes; see ``files.read_whole``."""
        with self.parent(path) as (fd, name):
            return files.read_whole(fd, name, limit)

    def list(self, path: str) -> list[str]:
        """The names in the directory ``path``, unsorted; none if it does not exist. OSError passes."""
        try:
            with self.directory(path) as fd:
                return os.listdir(fd)
        except FileNotFoundError:
            return []

    def is_ours(self, found: os.stat_result) -> bool:
        """Whether root or the caller made the file that was looked at."""
        return found.st_uid in self._owners


def owners() -> frozenset[int]:
    """The users whose files this process relies on: root and itself."""
    return frozenset((0, os.geteuid()))


def open_root(path: str, accept: bool = False) -> Root:
    """The directory at ``path`` (absolute). Whether it is safe is not judged: see ``require_safe``.

    UnsafeRepository if a link on the way belongs to somebody else, whether accepted or not: its owner would choose
    where the work is done. OSError passes.
    """
    fd = open_path(path)
    try:
        return Root(os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd), path, accept)
    finally:
        os.close(fd)


def check_way(path: str) -> None:
    """Raise UnsafeRepository if a link on the way to ``path`` (absolute), as far as that exists, belongs to somebody
    else than root and the caller. OSError passes.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.close(open_path(path))


@contextlib.contextmanager
def opened_path(path: str) -> Iterator[int]:
    """``open_path`` for the duration of a ``with``, open for reading."""
    root = open_root(path)
    try:
        yield root.fd
    finally:
        root.close()


def open_path(path: str, *, links: bool = True, make: bool = False) -> int:
    """An fd (O_PATH) of the directory at ``path`` (absolute), reached by links of root and the caller only, or
    without ``links`` by none; with ``make`` missing directories are made, mode 0755.

    UnsafeRepository for a link of somebody else; OSError passes.
    """
    trusted = owners() if links else frozenset()

    def look(here: str, found: os.stat_result, _more: bool) -> None:
        if stat.S_ISLNK(found.st_mode) and found.st_uid not in trusted:
            raise UnsafeRepository(
                f"On the way to {path} the symbolic link {os.path.basename(here)} "
                f"{_fault(found, owners(), 0) or 'has just appeared'}.",
                "Name the directory that it leads to, if that is the one you mean.",
            )

    fd = walk(path, look, make=make)
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        os.close(fd)
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    return fd


def walk(path: str, look: Callable[[str, os.stat_result, bool], None], *, make: bool = False) -> int:
    """An fd (O_PATH) of what lies at ``path`` (absolute), reached component by component, so that each is looked
    at and none can be exchanged between the look and the step; with ``make`` missing directories are made, mode 0755.

    ``look`` gets the path of every directory and link on the way and of what lies at its end, what the system says of
    it, and whether more follows. It raises an error for what it refuses. OSError passes, with the component's path in
    it.
    """
    left = [name for name in path.split("/") if name not in ("", ".")]
    followed = 0
    here = "/"
    fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        look(here, os.fstat(fd), bool(left))
        while left:
            name = left.pop(0)
            there = os.path.dirname(here) if name == ".." else os.path.join(here, name)
            try:
                inner = _step(fd, name)
            except FileNotFoundError:
                if not make:
                    raise
                files.make_directory(fd, name)
                inner = _step(fd, name)
            except OSError as error:
                error.filename = there
                raise
            try:
                found = os.fstat(inner)
                look(there, found, bool(left))
                if not stat.S_ISLNK(found.st_mode):
                    fd, inner, here = inner, fd, there
                    continue
                followed += 1
                if followed > _MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), there)
                text = os.readlink("", dir_fd=inner)
            finally:
                os.close(inner)
            if text.startswith("/"):
                os.close(fd)
                fd, here = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), "/"
            left = [name for name in text.split("/") if name not in ("", ".")] + left
        return fd
    except BaseException:
        os.close(fd)
        raise


def _step(dir_fd: int, name: str) -> int:
    # It is opened as a directory first: that makes the kernel mount what it mounts on demand.
    try:
        return os.open(name, os.O_PATH | _DIRECTORY, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
    return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=dir_fd)


def _open(dir_fd: int, name: str, flags: int, path: str) -> int:
    try:
        return os.open(name, flags, dir_fd=dir_fd)
    except OSError as error:
        raise _explained(error, dir_fd, name, path) from error


def _explained(error: OSError, dir_fd: int, name: str, path: str) -> Exception:
    if error.errno not in (errno.ENOTDIR, errno.ELOOP):
        return error
    with contextlib.suppress(OSError):
        if stat.S_ISLNK(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            return UnsafeRepository(f"{path} is a symbolic link where a directory should be.", _LINK_HINT)
    return FormatError(f"{path} is not a directory.", "Find out who put it there, then remove it.")


def fault_of(uid: int, mode: int) -> str:
    """Why a repository's own directory with this owner and mode would be unsafe, in words that continue its name; empty
    if it would be safe.
    """
    return _judged(uid, mode, owners(), 0o022)


def _fault(found: os.stat_result, trusted: frozenset[int], forbidden: int) -> str:
    return _judged(found.st_uid, found.st_mode, trusted, forbidden)


def _judged(uid: int, mode: int, trusted: frozenset[int], forbidden: int) -> str:
    """Why a file with this owner and mode cannot be relied on, in words that continue its name; empty if it can."""
    if uid not in trusted:
        return f"belongs to {user(uid)}, who is neither root nor the user that runs this"
    if mode & forbidden:
        return f"can be written by others than its owner (mode {stat.S_IMODE(mode):04o})"
    return ""


def user(uid: int) -> str:
    """A user for messages: by name, if there is one, and number."""
    import pwd  # late: only a refusal needs it

    try:
        return f"{pwd.getpwuid(uid).pw_name} (user {uid})"
    except KeyError:
        return f"user {uid}"
