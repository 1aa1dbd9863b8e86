# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Where each name came from: ``.composefs-oci/names/<encoded tag>.json`` beside the tag.

A tag leads to a manifest and says nothing of the reference that it was pulled from. The record does, so that a task
with another reference is not content with it, and a repair knows whom to ask. Other programs move tags without knowing
of records: a record counts only while its tag leads to the manifest that it names.

Order of writing: record first, tag second. The record keeps the one that it replaces for as long as the tag may still
lead to the older manifest, so whichever of the two writes a crash falls between, the tag has a record that is true.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
from typing import Any

from ..errors import EngineError, doing
from ..formats import digests, reference, repolayout
from ..formats.bounds import MAX_NAME
from ..host import files
from .marks import DIRECTORY
from .repository import Repository

NAMES = f"{DIRECTORY}/names"
_SUFFIX = ".json"
_MAX_RECORD = 64 * 1024


@dataclasses.dataclass(frozen=True)
class NameRecord:
    """What is remembered of a name.

    ``ref`` is the reference with its transport, which never holds credentials; ``manifest`` is the digest that the name
    leads to; ``registry_digest`` that by which the source knows it, ``index_digest`` that of the index, both None if
    unknown. ``policy`` says what became of the signature policy (``enforced``, ``ignored``, ``accept_anything``).
    ``since`` is when the name was made to mean the manifest, in UTC as RFC 3339 writes it. All digests are
    ``sha256:<hex>``.
    """

    ref: str
    manifest: str
    registry_digest: str | None = None
    index_digest: str | None = None
    policy: str | None = None
    since: str = ""


def time_text(seconds: float) -> str:
    """Seconds since the epoch as ``2026-11-27T14:40:07Z``."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def spelled(repository: Repository, name: str) -> str:
    """``name`` as the repository has it: its other spelling if only that is there (``docker://x`` and ``x`` are one
    default name), else ``name`` itself.
    """
    if repository.tag_digest(name) is not None:
        return name
    return next((form for form in reference.other_names(name) if repository.tag_digest(form) is not None), name)


def read(repository: Repository, name: str) -> NameRecord | None:
    """The record of ``name``; None if there is none that counts. It is only a help, so a damaged one counts as none."""
    manifest = repository.tag_digest(name)
    if manifest is None:
        return None
    return next((record for record in _load(repository, name) if record.manifest == manifest), None)


def remember(repository: Repository, name: str, record: NameRecord) -> None:
    """Write the record of ``name`` before the tag is set. Without ``since`` it gets the time of the tag if that leads
    to the manifest already, else the present one. EngineError if it cannot be written.
    """
    standing = read(repository, name)
    if not record.since:
        since = standing.since if standing and standing.manifest == record.manifest else ""
        record = dataclasses.replace(record, since=since or time_text(repository.tag_time(name, record.manifest)))
    if standing == record:
        return
    document: dict[str, Any] = dataclasses.asdict(record)
    if standing is not None and standing.manifest != record.manifest:
        document["before"] = dataclasses.asdict(standing)
    with doing(f"Remembering where the name {name!r} in {repository.path} comes from"):
        repository.require_writable()
        # Not synced: whoever sets the tag makes both durable with one barrier.
        with repository.root.directory(NAMES, os.O_PATH, make=True) as directory:
            files.write_whole(directory, _file_name(name), json.dumps(document, indent=1).encode() + b"\n", sync=False)


def forget(repository: Repository, name: str) -> None:
    """Remove the record of ``name``, after the tag. What cannot be removed does no harm, for it counts no more."""
    with contextlib.suppress(OSError, EngineError), repository.root.directory(NAMES, os.O_PATH) as directory:
        os.unlink(_file_name(name), dir_fd=directory)


def records(repository: Repository) -> dict[str, NameRecord]:
    """The records of all names that have one that counts, by name."""
    found = {name: read(repository, name) for name in repository.tags()}
    return {name: record for name, record in found.items() if record is not None}


def strays(repository: Repository) -> list[str]:
    """The names whose tag is gone although a record, or a file in its place, is left; for a clean-up."""
    try:
        found = repository.root.list(NAMES)
    except (OSError, EngineError):
        return []
    tags = {_file_name(name) for name in repository.tags()}
    return sorted(
        repolayout.decode_tag(file[: -len(_SUFFIX)]) for file in found if file.endswith(_SUFFIX) and file not in tags
    )


def _file_name(name: str) -> str:
    encoded = repolayout.encode_tag(name)
    if len(os.fsencode(encoded)) + len(_SUFFIX) > MAX_NAME:
        # No room for the suffix. No encoded tag begins so, for every % in one is followed by 25 or 2F.
        encoded = "%sha256-" + hashlib.sha256(os.fsencode(encoded)).hexdigest()
    return encoded + _SUFFIX


def _load(repository: Repository, name: str) -> list[NameRecord]:
    """The record in the file and the one that it replaced, if it tells."""
    try:
        document = json.loads(repository.root.read_file(f"{NAMES}/{_file_name(name)}", _MAX_RECORD))
    except (OSError, ValueError, RecursionError, EngineError):
        return []
    if not isinstance(document, dict):
        return []
    return [record for record in (_parse(document), _parse(document.get("before"))) if record is not None]


def _parse(values: object) -> NameRecord | None:
    if not isinstance(values, dict):
        return None
    fields = {field.name: values.get(field.name) for field in dataclasses.fields(NameRecord)}
    if any(value is not None and not isinstance(value, str) for value in fields.values()):
        return None
    if not fields["ref"] or not digests.is_oci_digest(fields["manifest"] or ""):
        return None
    return NameRecord(**{**fields, "since": fields["since"] or ""})  # type: ignore[arg-type]
