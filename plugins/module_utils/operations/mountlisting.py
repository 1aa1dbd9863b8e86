# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What is mounted on this host, and what becomes of it: for people and reports. Reads only."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from typing import Any

from ..errors import EngineError
from ..host import mountinfo
from ..host.mountinfo import Mounted
from ..store.repository import Repository
from . import bootmount, deployment, journal, keeping, listing
from .deployment import Host
from .journal import Journal

# Nobody who only looks waits long for a collection.
_LOCK_WAIT = 10.0


def mounts(host: Host, only: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every composefs mount, unit and journal of this host, or of the path ``only``, in plain values sorted by path;
    and complaints about what could not be read.
    """
    complaints: list[str] = []
    journals = _journals(host, complaints)
    units = bootmount.units(host.places)
    mounted = {there.path: there for there in mountinfo.composefs_mounts() if _is_shown(there)}
    paths = {*mounted, *units, *(path for path, found in journals.items() if found.current or found.pending)}
    wanted = sorted(path for path in paths if only is None or path == os.path.realpath(only))
    return [_mount(path, mounted.get(path), journals.get(path), units.get(path), host) for path in wanted], complaints


def deployments(host: Host, only: str | None = None) -> tuple[list[dict[str, Any]], list[str]]:
    """Every journal of this host, or that of the path ``only``, with its own keys and ``state``,
    ``mounted_image_id`` and ``staged``; and complaints about what could not be read.
    """
    complaints: list[str] = []
    journals = _journals(host, complaints)
    wanted = sorted(path for path in journals if only is None or path == os.path.realpath(only))
    return [_deployment(journals[path]) for path in wanted], complaints


def place(host: Host, repository: str) -> str | None:
    """A word (hex) that is the same wherever the journals of this host and the directory ``repository``, which need not
    exist yet, are reached on this boot, and nowhere else. None where the kernel does not tell its boot.

    The id of a machine would not do: machines that were made as copies of one share it. The id of a boot alone would
    not either, for containers share that of their kernel; but they have journals of their own.
    """
    try:
        boot = journal.boot_id()
    except EngineError:
        return None
    parts = (boot, *_where(host.places.journals), *_where(repository))
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()


def _where(path: str) -> tuple[str, ...]:
    """The device and the inode of the deepest directory on the way to ``path`` that is there, and the rest of it."""
    rest: list[str] = []
    path = os.path.realpath(path)
    while True:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            return (f"{found.st_dev}:{found.st_ino}", *rest)
        path, name = os.path.split(path)
        if not name:
            return ("", *rest)
        rest.insert(0, name)


def foresee(found: list[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ``mounts`` found, as it will be when earlier tasks of a run in check mode have mounted what they foretold:
    ``path``, ``name``, ``digest``, ``image_id``, ``repository`` and ``absent``. What nobody can know yet is None.
    """
    told = {one["path"]: one for one in found}
    keys = ("version", "verity", "writable", "persistent", "unit", "unit_state", "keeps")
    for one in known:
        told.pop(one["path"], None)
        if not one["absent"]:
            same = {key: one[key] for key in ("path", "name", "digest", "image_id", "repository")}
            told[one["path"]] = {**dict.fromkeys(keys), **same}
    return [told[path] for path in sorted(told)]


# What a journal says before anything was confirmed.
NAMELESS = {"name": None, "repository": ""}


def foresee_deployments(found: list[dict[str, Any]], known: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for what ``deployments`` found; ``state`` is that which a deployment would be left in."""
    told = {one["path"]: one for one in found}
    for one in known:
        before = told.pop(one["path"], None)
        if one["absent"]:
            continue
        image = {key: one[key] for key in ("image_id", "digest")}
        on_trial = one["state"] == "activated"
        told[one["path"]] = {
            **dict.fromkeys(before or ()),
            "path": one["path"],
            # As in a journal, to which what is on trial gives its name and repository when it is confirmed.
            **{key: (before or {}).get(key, empty) if on_trial else one[key] for key, empty in NAMELESS.items()},
            "current": (before or {}).get("current") if on_trial else image,
            "pending": {**image, "name": one["name"], "repository": one["repository"]} if on_trial else None,
            "state": "activated" if on_trial else "current",
            "mounted_image_id": one["image_id"],
            "staged": None,
        }
    return [told[path] for path in sorted(told)]


def state_of(found: Journal, shown: Mounted | None) -> str:
    """``activated``, ``revert_failed``, ``current``, ``drifted`` (something else, or nothing, is mounted), or
    ``reverted`` (nothing was ever confirmed).
    """
    mounted = shown.image_id if shown is not None else None
    if found.pending is not None:
        last = found.history[-1] if found.history else None
        if last is not None and last.result == deployment.REVERT_FAILED and last.time >= found.pending.since:
            return deployment.REVERT_FAILED
        return "activated" if mounted == found.pending.image_id else "drifted"
    if found.current is None:
        return deployment.REVERTED
    return "current" if mounted == found.current.image_id else "drifted"


def _journals(host: Host, complaints: list[str]) -> dict[str, Journal]:
    found = {}
    for one in journal.journals(host.places).values():
        if isinstance(one, EngineError):
            complaints.append(str(one))
        else:
            found[one.path] = one
    return found


def _is_shown(there: Mounted) -> bool:
    """Whether this mount is the one that its path shows, and not one below another."""
    try:
        shown = mountinfo.at(there.path)
    except EngineError:
        return False
    return shown is not None and shown.mount_id == there.mount_id


def _mount(path: str, there: Mounted | None, found: Journal | None, unit: str | None, host: Host) -> dict[str, Any]:
    image_id = there.image_id if there is not None else None
    known = None
    if found is not None:
        known = next((one for one in (found.pending, found.current) if one and one.image_id == image_id), None)
    where = (found.repository if found is not None else "") or _repository_of(there)
    told: dict[str, Any] = {
        "path": path,
        "name": found.name if found is not None and (known is not None or image_id is None) else None,
        "digest": known.digest if known is not None else None,
        "image_id": image_id,
        "version": None,
        "verity": there.verity if there is not None else None,
        "writable": not there.read_only if there is not None else None,
        "persistent": unit is not None,
        "unit": unit,
        "unit_state": bootmount.state_of(unit, host.run, host.places) if unit is not None else None,
        "repository": where,
        "keeps": [],
    }
    if where is not None and image_id is not None:
        try:
            with Repository.open(where, wait=_LOCK_WAIT) as repository:
                _look_up(repository, told)
        except EngineError:
            pass  # what the mount itself tells is true all the same
    return told


def _look_up(repository: Repository, told: dict[str, Any]) -> None:
    """Complete what the repository knows of the mounted image."""
    if told["digest"] is None:
        for image in listing.list_images(repository)[0]:
            if told["image_id"] in image["image_ids"].values():
                names = sorted(keeping.split_pin(name)[0] for name in image["names"])
                told.update(digest=image["digest"], name=names[0] if names else None)
                break
    told["keeps"] = keeping.there(repository, told["path"], told["image_id"], told["name"], told["digest"])
    if told["digest"] is not None:
        labels = listing.describe_image(repository, told["digest"])["labels"]
        told["version"] = labels.get(listing.VERSION_LABEL)


def _repository_of(there: Mounted | None) -> str | None:
    """The repository that a mount reads from, where the kernel shows it."""
    objects = there.settings.get("datadir+", "") if there is not None else ""
    path, name = os.path.split(objects)
    return path if name == "objects" and os.path.isdir(objects) else None


def _deployment(found: Journal) -> dict[str, Any]:
    shown = deployment.shown(found.path)
    told = journal.to_values(found)
    told["state"] = state_of(found, shown)
    told["mounted_image_id"] = shown.image_id if shown is not None else None
    told["staged"] = []
    if found.pending is not None:
        # Whoever may read the result must not be able to end the trial with it.
        told["pending"].pop("token")
    where = found.repository or (found.pending.repository if found.pending is not None else "")
    name = found.name or (found.pending.name if found.pending is not None else None)
    if where and name is not None:
        try:
            with Repository.open(where, wait=_LOCK_WAIT) as repository:
                told["staged"] = _staged(repository, found, name)
        except EngineError:
            pass
    return told


def _staged(repository: Repository, found: Journal, name: str) -> list[dict[str, str]]:
    """Pins of the name whose image is neither current, nor kept, nor on trial: fetched ahead."""
    used = {image.digest for image in (*found.images(), *((found.pending,) if found.pending else ()))}
    staged = []
    for tag, manifest in repository.tags().items():
        base, digest = keeping.split_pin(tag)
        if base == name and digest is not None and manifest not in used:
            staged.append({"name": tag, "digest": manifest})
    return staged
