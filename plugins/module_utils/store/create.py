# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Make a composefs repository, or bring an old one up to date: everything is checked and tried out before anything is
made.

``meta.json`` comes out to the byte as from ``cfsctl init``; sealing that file with fs-verity is what makes a repository
require it of every object.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import NamedTuple

from ..formats import fsverity
from ..host import beneath, files, filesystem
from . import marks
from ..errors import (
    DigestMismatch,
    FormatError,
    IncompatibleRepository,
    IOFailed,
    NotARepository,
    UnsafeRepository,
    VerityUnsupported,
    doing,
)
from ..formats.metajson import NAME, Metadata
from .objects import ObjectStore
from .repository import Repository, read_metadata

REQUIRED = "required"
PREFERRED = "preferred"
DISABLED = "disabled"

DIRECTORY_MODE = 0o700
_PARENT_MODE = 0o755
_FILE_MODE = 0o644
# What may lie in a directory that becomes a repository: its own parts, and what mkfs leaves at the root of a file
# system.
_OWN_NAMES = frozenset(("objects", "streams", "images", "lost+found", ".composefs-oci"))


class Preparation(NamedTuple):
    """What ``prepare`` did, or would do. ``secure``: every object must be sealed with fs-verity."""

    created: bool
    upgraded: bool
    secure: bool
    metadata: Metadata


class Place:
    """Where a repository is or shall be: everything is done through one fd of the directory, so that nobody who
    may rename above it leads us elsewhere. ``root`` is None as long as nothing is there. Use as a context manager.
    """

    def __init__(self, path: str) -> None:
        """``path`` is absolute. UnsafeRepository if a link on the way to it belongs to somebody else."""
        self.path = path
        self.root: beneath.Root | None = None
        with doing(f"Preparing the repository {path}"), contextlib.suppress(FileNotFoundError):
            try:
                self.root = beneath.open_root(path, accept=True)
            except NotADirectoryError:
                if os.path.lexists(path):
                    raise IOFailed("There is something else than a directory.", "Choose another path.") from None
                nearest = filesystem.nearest_directory(path)
                raise IOFailed(f"{nearest} is not a directory.", "Choose another path.") from None

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.root is not None:
            self.root.close()
            self.root = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[int]:
        """The directory, or the nearest one above it that exists, open for reading."""
        if self.root is not None:
            yield self.root.fd
        else:
            with beneath.opened_path(filesystem.nearest_directory(self.path)) as fd:
                yield fd

    @property
    def state(self) -> str:
        """What is there, in words for a difference: ``present``, ``directory`` or ``absent``."""
        if self.root is None:
            return "absent"
        return "present" if _has(self.root, NAME) else "directory"

    def unsafe(self, uid: int | None = None, mode: int | None = None) -> str:
        """Why the repository is unsafe for root and the user that runs this, in words; empty if it is not. With ``uid``
        and ``mode``: once it has that owner and that mode.
        """
        if self.root is None:
            fault = beneath.fault_of(os.geteuid() if uid is None else uid, DIRECTORY_MODE if mode is None else mode)
            return f"{self.path} {fault}." if fault else ""
        # Looked at anew: owner and mode may just have been set.
        fresh = beneath.Root(os.dup(self.root.fd), self.path)
        try:
            if uid is not None or mode is not None:
                found = os.fstat(fresh.fd)
                fresh.assume(found.st_uid if uid is None else uid, found.st_mode if mode is None else mode)
            fresh.require_safe()
            for path in ("objects", "images", "streams/refs/oci", f"{marks.DIRECTORY}/imports"):
                with contextlib.suppress(FileNotFoundError), fresh.directory(path, os.O_PATH):
                    pass
        except (UnsafeRepository, FormatError) as error:
            return error.message
        finally:
            fresh.close()
        return ""


def prepare(path: str, algorithm: fsverity.Algorithm, verity: str, *, check: bool = False) -> Preparation:
    """See to it that ``path`` (absolute) is a repository for ``algorithm``; see ``prepare_place``."""
    with Place(path) as place:
        return prepare_place(place, algorithm, verity, check=check)


def prepare_place(
    place: Place, algorithm: fsverity.Algorithm, verity: str, *, check: bool = False, private: bool = True
) -> Preparation:
    """See to it that the place is a repository for ``algorithm``; with ``check`` only tell what would be done.

    ``verity``: REQUIRED wants fs-verity or fails, PREFERRED takes it where it works, DISABLED does without. A
    repository that exists is never converted: IncompatibleRepository if it is not what is asked for. VerityUnsupported,
    ReadOnly, PermissionDenied, NoSpace or IOFailed if the file system cannot do it; then nothing was made. ``private``:
    an empty directory that becomes a repository is closed to everybody but its owner.
    """
    with doing(f"Preparing the repository {place.path}"):
        if place.root is None:
            return _create(place, algorithm, verity, check)
        if _has(place.root, NAME):
            return _existing(place, algorithm, verity)
        foreign = sorted(set(os.listdir(place.root.fd)) - _OWN_NAMES)
        if foreign:
            raise NotARepository(
                f"The directory is not empty ({foreign[0]!r} is in it) and no repository.",
                "Choose another path, or empty it.",
            )
        if _object_names(place.root):
            return _upgrade(place, algorithm, verity, check)
        made = _create(place, algorithm, verity, check)
        if private and made.created and not check:
            os.fchmod(place.root.fd, stat.S_IMODE(os.fstat(place.root.fd).st_mode) & DIRECTORY_MODE)
        return made


def create(path: str, algorithm: fsverity.Algorithm, verity: str = REQUIRED) -> Repository:
    """Prepare a repository and open it for writing."""
    prepare(os.path.abspath(path), algorithm, verity)
    return Repository.open(path, write=True)


def _has(root: beneath.Root, name: str) -> bool:
    try:
        os.stat(name, dir_fd=root.fd, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _existing(place: Place, algorithm: fsverity.Algorithm, verity: str) -> Preparation:
    if place.root is None:
        raise AssertionError("this must hold: place.root is not None")
    metadata, secure = read_metadata(place.root)
    metadata.check_readable()
    metadata.check_writable()
    if metadata.algorithm is not algorithm:
        raise IncompatibleRepository(
            f"The repository exists and uses {metadata.algorithm.name}, but {algorithm.name} is asked for; none can "
            f"be converted.",
            f"Ask for {metadata.algorithm.name}, or choose another path.",
        )
    _check_security(secure, verity)
    return Preparation(False, False, secure, metadata)


def _check_security(secure: bool, verity: str) -> None:
    if verity == REQUIRED and not secure:
        raise IncompatibleRepository(
            "The repository exists and does not require fs-verity of its objects, but verity=required is asked for.",
            "Choose another path, or accept it as it is with verity=preferred.",
        )
    if verity == DISABLED and secure:
        raise IncompatibleRepository(
            "The repository exists and requires fs-verity of its objects, but verity=disabled is asked for.",
            "Choose another path, or accept it as it is with verity=preferred.",
        )


def _create(place: Place, algorithm: fsverity.Algorithm, verity: str, check: bool) -> Preparation:
    with place.opened() as fd:
        secure = _try_out(fd, place.path if place.root else filesystem.nearest_directory(place.path), algorithm, verity)
    metadata = Metadata.new(algorithm)
    if not check:
        with _directories(place):
            try:
                _write_metadata(place, metadata, secure)
            except FileExistsError:
                # Someone else made it at the same time. Theirs counts, if it is what is asked for.
                return _existing(place, algorithm, verity)
    return Preparation(True, False, secure, metadata)


def _try_out(fd: int, path: str, algorithm: fsverity.Algorithm, verity: str) -> bool:
    """Whether a repository in the open directory will be secure; raises if it cannot be made as asked. ``path`` is for
    messages.
    """
    filesystem.require_writable(fd, path)
    filesystem.require_links(fd, path)
    if verity == DISABLED:
        return False
    lack = filesystem.missing_ability(fd, algorithm)
    if lack is not None and verity == REQUIRED:
        raise VerityUnsupported(f"{path} ({filesystem.type_of(fd)}): {lack.message}", lack.hint)
    return lack is None


@contextlib.contextmanager
def _directories(place: Place) -> Iterator[None]:
    """Make the place's directory and its missing parents; they go again if the block fails, as far as they are
    empty.
    """
    if place.root is not None:
        yield
        return
    nearest = filesystem.nearest_directory(place.path)
    missing = [name for name in os.path.relpath(place.path, nearest).split("/") if name != "."]
    made: list[tuple[int, str]] = []
    opened = [beneath.open_path(nearest)]
    try:
        for number, name in enumerate(missing, 1):
            mode = DIRECTORY_MODE if number == len(missing) else _PARENT_MODE
            if files.make_directory(opened[-1], name, mode):
                made.append((opened[-1], name))
                files.sync_directory(opened[-1])
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            opened.append(os.open(name, flags, dir_fd=opened[-1]))
        place.root = beneath.Root(os.dup(opened[-1]), place.path, accept=True)
        yield
    except BaseException:
        for parent, name in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)
        raise
    finally:
        for fd in opened:
            os.close(fd)


def _write_metadata(place: Place, metadata: Metadata, secure: bool) -> None:
    """Write, sync, seal and only then link meta.json: it exists whole or not at all. FileExistsError if there is one;
    never replaces it.
    """
    content = metadata.to_bytes()
    if place.root is None:
        raise AssertionError("this must hold: place.root is not None")
    root = place.root.fd
    draft = files.draft(root, os.O_WRONLY, _FILE_MODE, prefix=f".tmp-{NAME}-")
    try:
        files.write_all(draft.fd, content)
        os.fsync(draft.fd)
        draft.reopen_read_only()
        if secure:
            fsverity.enable(draft.fd, metadata.algorithm)
            if fsverity.measure(draft.fd, metadata.algorithm) != fsverity.digest(content, metadata.algorithm):
                raise DigestMismatch(
                    f"The kernel measured another digest of {NAME} than was computed.", "Report this as a bug."
                )
        draft.link(NAME)
        os.fsync(root)
    finally:
        draft.close()


# --- repositories older than meta.json
# -------------------------------------------------------------------------------------------------------


def _object_names(root: beneath.Root) -> list[str]:
    """The names of all objects. A few of each directory would do, but an old repository is read only once."""
    names: list[str] = []
    for first in range(256):
        names += [f"{first:02x}/{rest}" for rest in root.list(f"objects/{first:02x}")]
    return names


def _upgrade(place: Place, algorithm: fsverity.Algorithm, verity: str, check: bool) -> Preparation:
    """Give a repository without meta.json what cfsctl would give it: its objects' algorithm, and V1 images.

    It becomes secure only if every object is sealed. (cfsctl looks at one object, after which the others may turn out
    to be unreadable.)
    """
    if place.root is None:
        raise AssertionError("this must hold: place.root is not None")
    lengths = {len(name) - 1 for name in _object_names(place.root)}
    found = [known for known in fsverity.ALGORITHMS.values() if 2 * known.size in lengths]
    if len(found) != 1 or len(lengths) != 1:
        raise FormatError(
            f"The repository has no {NAME}, and its objects do not tell one digest algorithm.",
            "Move it away and make a new one, or write the file by hand.",
        )
    if found[0] is not algorithm:
        raise IncompatibleRepository(
            f"The repository is an old one without {NAME}; its objects use {found[0].name}, but {algorithm.name} is "
            f"asked for.",
            f"Ask for {found[0].name}, or choose another path.",
        )
    _try_out(place.root.fd, place.path, algorithm, PREFERRED)
    secure = verity != DISABLED and _all_sealed(place.root, algorithm)
    _check_security(secure, verity)
    metadata = Metadata.new(algorithm)
    if not check:
        try:
            _write_metadata(place, metadata, secure)
        except FileExistsError:
            return _existing(place, algorithm, verity)
    return Preparation(False, True, secure, metadata)


def _all_sealed(root: beneath.Root, algorithm: fsverity.Algorithm) -> bool:
    with root.directory("objects", os.O_PATH) as dirfd:
        store = ObjectStore(root, dirfd, algorithm, verity=True, try_verity=True)
        try:
            return all(digest is not None and store.contains(digest) for _name, digest in store.names())
        except VerityUnsupported:
            return False
        finally:
            store.close()
