# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What the last check of a repository said, and what repairs set aside: both lie within ``.composefs-oci/``."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from ..formats import fsverity
from ..host import files
from ..errors import EngineError, doing
from . import marks
from .repository import Repository

DAMAGED = f"{marks.DIRECTORY}/damaged"
_CHECKS = f"{marks.DIRECTORY}/checks"
_LAST = "last.json"
_MAX_SIZE = 1 << 20


def remember(repository: Repository, result: Mapping[str, Any]) -> None:
    """Write down the result of a check. Where this user may not write it is not kept."""
    with contextlib.suppress(EngineError, OSError):
        repository.require_writable()
        fd = _directory(repository, _CHECKS)
        try:
            text = json.dumps({"version": 1, **result}, indent=2, sort_keys=True) + "\n"
            files.write_whole(fd, _LAST, text.encode(), sync=False)
        finally:
            os.close(fd)


def last(repository: Repository) -> dict[str, Any] | None:
    """What the last check said; None if there was none, or if it cannot be read."""
    try:
        fd = os.open(f"{_CHECKS}/{_LAST}", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=repository.fd)
    except OSError:
        return None
    try:
        document = json.loads(os.read(fd, _MAX_SIZE))
    except (OSError, ValueError):
        return None
    finally:
        os.close(fd)
    return document if isinstance(document, dict) and document.get("version") == 1 else None


def set_aside(repository: Repository, path: str) -> bool:
    """Move what is at ``path`` below the repository to where damaged things wait for the next collection; False if
    nothing is there.
    """
    fd = _directory(repository, DAMAGED)
    try:
        with doing(f"Setting {path} aside"):
            target = f"{path.replace('/', '-')[-180:]}.{os.urandom(4).hex()}"
            try:
                os.rename(path, target, src_dir_fd=repository.fd, dst_dir_fd=fd)
            except FileNotFoundError:
                return False
    finally:
        os.close(fd)
    return True


def set_object_aside(repository: Repository, digest: bytes) -> bool:
    """The same for an object."""
    return set_aside(repository, f"objects/{fsverity.object_path(digest)}")


def _directory(repository: Repository, path: str) -> int:
    """A directory of ours, made if need be."""
    with doing(f"Opening {repository.path}/{path}"):
        fd = os.dup(repository.fd)
        for part in path.split("/"):
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=fd)
                inner = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            finally:
                os.close(fd)
            fd = inner
        return fd
