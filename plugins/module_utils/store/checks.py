# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What the last check of a repository said, what its last maintenance did, and what repairs set aside: all of it lies
within ``.composefs-oci/``.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from typing import Any

from ..formats.digests import ObjectDigest
from ..formats import fsverity
from ..host import files
from ..errors import EngineError, doing
from . import marks
from .repository import Repository

DAMAGED = f"{marks.DIRECTORY}/damaged"
_CHECKS = f"{marks.DIRECTORY}/checks"
_LAST = "last.json"
_MAINTENANCE = "maintenance.json"
_MAX_SIZE = 1 << 20


def remember(repository: Repository, result: Mapping[str, Any]) -> None:
    """Write down the result of a check. Where this user may not write it is not kept."""
    _write(repository, _LAST, result)


def last(repository: Repository) -> dict[str, Any] | None:
    """What the last check said; None if there was none, or if it cannot be read."""
    return _read(repository, _LAST)


def remember_maintenance(repository: Repository, result: Mapping[str, Any]) -> None:
    """Write down what a maintenance did. Where this user may not write it is not kept."""
    _write(repository, _MAINTENANCE, result)


def last_maintenance(repository: Repository) -> dict[str, Any] | None:
    """What the last maintenance did; None if there was none, or if it cannot be read."""
    return _read(repository, _MAINTENANCE)


def _write(repository: Repository, name: str, result: Mapping[str, Any]) -> None:
    with contextlib.suppress(EngineError, OSError):
        repository.require_writable()
        text = json.dumps({"version": 1, **result}, indent=2, sort_keys=True) + "\n"
        with repository.root.directory(_CHECKS, os.O_PATH, make=True) as fd:
            files.write_whole(fd, name, text.encode(), sync=False)


def _read(repository: Repository, name: str) -> dict[str, Any] | None:
    try:
        document = json.loads(repository.root.read_file(f"{_CHECKS}/{name}", _MAX_SIZE))
    except (OSError, ValueError, RecursionError, EngineError):
        return None
    return document if isinstance(document, dict) and document.get("version") == 1 else None


def set_aside(repository: Repository, path: str) -> bool:
    """Move what is at ``path`` below the repository to where damaged things wait for the next collection; False if
    nothing is there.
    """
    root = repository.root
    target = f"{path.replace('/', '-')[-180:]}.{os.urandom(4).hex()}"
    with doing(f"Setting {path} aside"), root.directory(DAMAGED, os.O_PATH, make=True) as aside:
        try:
            with root.parent(path) as (fd, name):
                os.rename(name, target, src_dir_fd=fd, dst_dir_fd=aside)
        except FileNotFoundError:
            return False
    return True


def keep_copy(repository: Repository, digest: ObjectDigest) -> None:
    """Give an object a second name among the damaged things before it is replaced. The copy is only there to be looked
    at later, so a failure is ignored.
    """
    root = repository.root
    target = f"{digest.hex()}.{os.urandom(4).hex()}"
    with (
        contextlib.suppress(OSError, EngineError),
        root.directory(DAMAGED, os.O_PATH, make=True) as aside,
        root.parent(f"objects/{fsverity.object_path(digest)}") as (fd, name),
    ):
        os.link(name, target, src_dir_fd=fd, dst_dir_fd=aside, follow_symlinks=False)
