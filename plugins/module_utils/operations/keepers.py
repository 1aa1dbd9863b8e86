# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What this host needs of a repository besides its names: what is mounted now, what comes back at boot, and what the
journals of mounts keep for going back.
"""

from __future__ import annotations

import dataclasses
import os
import re

from ..formats.digests import object_digest
from ..formats import repolayout
from . import bootmount
from . import journal
from .journal import HOST, Places
from ..host import mountinfo
from ..errors import EngineError
from ..store.graph import Graph, Root
from ..store.repository import Repository

MOUNT, UNIT, JOURNAL = "mount", "unit", "journal"
_DIGEST = re.compile("(?<![0-9a-f])(?:[0-9a-f]{128}|[0-9a-f]{64})(?![0-9a-f])")
_OBJECT = re.compile("(?<![0-9a-f])([0-9a-f]{2})/([0-9a-f]{126}|[0-9a-f]{62})(?![0-9a-f])")


@dataclasses.dataclass(frozen=True)
class Keeper:
    """One reason to keep something: its kind, where it is, and what it needs: EROFS images (hex), manifests
    (``sha256:<hex>``), names.
    """

    kind: str
    place: str
    images: frozenset[str] = frozenset()
    manifests: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()


def keepers(repository: Repository, places: Places = HOST) -> list[Keeper]:
    """Everything on this host that may need something of ``repository``.

    IncompatibleJournal for a journal that cannot be understood: what it keeps is unknown then.
    """
    return [
        *_mounted(),
        *(
            Keeper(UNIT, unit.unit, frozenset([unit.image_id]))
            for unit in bootmount.persistent(places)
            if _same(unit.repository, repository)
        ),
        *_journals(repository, places),
    ]


def roots(graph: Graph, found: list[Keeper]) -> list[Root]:
    """What ``found`` keeps of a repository, as further roots of its graph; what is not there is left out."""
    repository = graph.repository
    size = 2 * repository.algorithm.size
    added = []
    for keeper in found:
        name = f"{keeper.kind} {keeper.place}"
        for manifest in sorted(keeper.manifests):
            node = graph.streams.get(repolayout.manifest_stream(manifest))
            if node is not None:
                added.append(Root(keeper.kind, name, node))
        for image in sorted(keeper.images):
            # Much that stands in the list of mounts only looks like the digest of an image: it leads nowhere then.
            if len(image) == size and (
                image in graph.images or repository.objects.stat(object_digest(image)) is not None
            ):
                added.append(Root(keeper.kind, name, object_digest(image), True))
    return added


def _mounted() -> list[Keeper]:
    """Mounts in all namespaces and loop devices whose description names something that may be an image."""
    found = []
    for place, line in (*mountinfo.everywhere(), *_loops()):
        images = _images_in(line)
        if images:
            found.append(Keeper(MOUNT, place, frozenset(images)))
    return found


def _images_in(text: str) -> set[str]:
    return {*_DIGEST.findall(text), *(first + rest for first, rest in _OBJECT.findall(text))}


def _loops() -> list[tuple[str, str]]:
    found = []
    try:
        devices = [name for name in os.listdir("/sys/block") if name.startswith("loop")]
    except OSError:
        return []
    for device in devices:
        try:
            with open(f"/sys/block/{device}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
                found.append((f"/dev/{device}", file.read().strip()))
        except OSError:
            continue  # nothing is attached to it
    return found


def _journals(repository: Repository, places: Places) -> list[Keeper]:
    found = []
    for file, one in journal.journals(places).items():
        if isinstance(one, EngineError):
            one.hint = f"What it keeps for going back is unknown until then. {one.hint}".strip()
            raise one
        pending = one.pending
        entries = [one.current, *one.previous, pending]
        # What is on trial may come from another repository than what was there before.
        if not any(
            _same(place, repository) for place in (one.repository, pending.repository if pending else "") if place
        ):
            continue
        images = {entry.image_id for entry in entries if entry} | {pending.origin if pending else None}
        manifests = {entry.digest for entry in entries if entry}
        names = {one.name, pending.name if pending else None, *one.pins}
        found.append(
            Keeper(JOURNAL, one.path or file, *(frozenset(filter(None, one)) for one in (images, manifests, names)))
        )
    return found


def _same(path: str, repository: Repository) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(repository.path)
    here = os.fstat(repository.fd)
    return (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino)
