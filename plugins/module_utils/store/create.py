# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Make a composefs repository, or bring an old one up to date: everything is checked and tried out before anything is
made.

``meta.json`` comes out to the byte as from ``cfsctl init``; sealing that file with fs-verity is what makes a repository
require it of every object.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from ..formats import fsverity
from ..host import files, filesystem
from ..errors import (
    DigestMismatch,
    FormatError,
    IncompatibleRepository,
    IOFailed,
    NotARepository,
    VerityUnsupported,
    doing,
)
from ..formats.metajson import NAME, Metadata
from .objects import ObjectStore
from .repository import Repository

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


def prepare(path: str, algorithm: fsverity.Algorithm, verity: str, *, check: bool = False) -> Preparation:
    """See to it that ``path`` (absolute) is a repository for ``algorithm``; with ``check`` only tell what would be
    done.

    ``verity``: REQUIRED wants fs-verity or fails, PREFERRED takes it where it works, DISABLED does without. A
    repository that exists is never converted: IncompatibleRepository if it is not what is asked for. VerityUnsupported,
    ReadOnly, PermissionDenied, NoSpace or IOFailed if the file system cannot do it; then nothing was made.
    """
    with doing(f"Preparing the repository {path}"):
        if not os.path.lexists(path):
            return _create(path, algorithm, verity, check)
        if os.path.lexists(f"{path}/{NAME}"):
            return _existing(path, algorithm, verity)
        if not os.path.isdir(path):
            raise IOFailed("There is something else than a directory.", "Choose another path.")
        foreign = sorted(set(os.listdir(path)) - _OWN_NAMES)
        if foreign:
            raise NotARepository(
                f"The directory is not empty ({foreign[0]!r} is in it) and no repository.",
                "Choose another path, or empty it.",
            )
        if _has_objects(path):
            return _upgrade(path, algorithm, verity, check)
        return _create(path, algorithm, verity, check)


def create(path: str, algorithm: fsverity.Algorithm, verity: str = REQUIRED) -> Repository:
    """Prepare a repository and open it for writing."""
    prepare(os.path.abspath(path), algorithm, verity)
    return Repository.open(path, write=True)


def _existing(path: str, algorithm: fsverity.Algorithm, verity: str) -> Preparation:
    with Repository.open(path) as repository:
        repository.metadata.check_writable()
        found = repository.algorithm
        if found is not algorithm:
            raise IncompatibleRepository(
                f"The repository exists and uses {found.name}, but {algorithm.name} is asked for; a repository cannot "
                f"be converted.",
                f"Ask for {found.name}, or choose another path.",
            )
        _check_security(repository.secure, verity)
        return Preparation(False, False, repository.secure, repository.metadata)


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


def _create(path: str, algorithm: fsverity.Algorithm, verity: str, check: bool) -> Preparation:
    secure = _try_out(filesystem.nearest_directory(path), algorithm, verity)
    metadata = Metadata.new(algorithm)
    if not check:
        made = _make_directories(path)
        try:
            _write_metadata(path, metadata, secure)
        except FileExistsError:
            # Someone else made it at the same time. Theirs counts, if it is what is asked for.
            return _existing(path, algorithm, verity)
        except BaseException:
            for directory in reversed(made):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            raise
    return Preparation(True, False, secure, metadata)


def _try_out(directory: str, algorithm: fsverity.Algorithm, verity: str) -> bool:
    """Whether a repository in ``directory``, which exists, will be secure; raises if it cannot be made as asked."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        filesystem.require_writable(fd, directory)
        filesystem.require_links(fd, directory)
        if verity == DISABLED:
            return False
        lack = filesystem.missing_ability(fd, algorithm)
        if lack is not None and verity == REQUIRED:
            raise VerityUnsupported(f"{directory} ({filesystem.type_of(fd)}): {lack.text}", lack.hint)
        return lack is None
    finally:
        os.close(fd)


def _make_directories(path: str) -> list[str]:
    """Make ``path`` and its missing parents; what was made, outermost first."""
    missing = []
    parent = path
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = os.path.dirname(parent)
    made = []
    for directory in reversed(missing):
        parent, name = os.path.split(directory)
        with files.opened_directory(parent) as parent_fd:
            if files.make_directory(parent_fd, name, DIRECTORY_MODE if directory == path else _PARENT_MODE):
                made.append(directory)
                files.sync_directory(parent_fd)
    return made


def _write_metadata(path: str, metadata: Metadata, secure: bool) -> None:
    """Write, sync, seal and only then link meta.json: it exists whole or not at all. FileExistsError if there is one;
    never replaces it.
    """
    content = metadata.to_bytes()
    with files.opened_directory(path) as root:
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


def _has_objects(path: str) -> bool:
    return any(True for _name in _object_names(path))


def _object_names(path: str) -> list[str]:
    """Up to a few names per directory would do, but an old repository is read once in its life."""
    names = []
    for first in range(256):
        with contextlib.suppress(FileNotFoundError):
            names += [f"{first:02x}/{rest}" for rest in os.listdir(f"{path}/objects/{first:02x}")]
    return names


def _upgrade(path: str, algorithm: fsverity.Algorithm, verity: str, check: bool) -> Preparation:
    """Give a repository without meta.json what cfsctl would give it: its objects' algorithm, and V1 images.

    It becomes secure only if every object is sealed. (cfsctl looks at one object, after which the others may turn out
    to be unreadable.)
    """
    lengths = {len(name) - 1 for name in _object_names(path)}
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
    _try_out(path, algorithm, PREFERRED)
    secure = verity != DISABLED and _all_sealed(path, algorithm)
    _check_security(secure, verity)
    metadata = Metadata.new(algorithm)
    if not check:
        try:
            _write_metadata(path, metadata, secure)
        except FileExistsError:
            return _existing(path, algorithm, verity)
    return Preparation(False, True, secure, metadata)


def _all_sealed(path: str, algorithm: fsverity.Algorithm) -> bool:
    dirfd = os.open(f"{path}/objects", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        store = ObjectStore(dirfd, algorithm, verity=True, try_verity=True)
        return all(digest is not None and store.contains(digest) for _name, digest in store.names())
    except VerityUnsupported:
        return False
    finally:
        os.close(dirfd)
