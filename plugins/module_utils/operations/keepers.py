# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What this host needs of a repository besides its names: what is mounted now, what comes back at boot, and what the
journals of mounts keep for going back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re

from ..formats.digests import object_digest
from ..formats import repolayout
from . import bootmount, deployment, journal, keeping
from .journal import HOST, Journal, Places
from ..host import mountinfo
from ..errors import EngineError
from ..store.graph import Graph, Root
from ..store.repository import Repository

MOUNT, UNIT, JOURNAL = "mount", "unit", "journal"
ENDED = "ended"
"""A keeper of this kind keeps nothing: it names what a mount or trial of an earlier boot left and nobody needs."""
_DIGEST = re.compile("(?<![0-9a-f])(?:[0-9a-f]{128}|[0-9a-f]{64})(?![0-9a-f])")
_OBJECT = re.compile("(?<![0-9a-f])([0-9a-f]{2})/([0-9a-f]{126}|[0-9a-f]{62})(?![0-9a-f])")


@dataclasses.dataclass(frozen=True)
class Keeper:
    """One reason to keep something: its kind, where it is, and what it needs: EROFS images (hex), manifests
    (``sha256:<hex>``), names.

    Of the kind ENDED it is a reason to let go: of the ``names`` and of the ``links`` (below ``images/refs``).
    """

    kind: str
    place: str
    images: frozenset[str] = frozenset()
    manifests: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    links: frozenset[str] = frozenset()


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
    """What each journal needs of this repository, and what it only kept until this boot."""
    known: list[tuple[str, Journal]] = []
    for file, one in journal.journals(places).items():
        if isinstance(one, EngineError):
            one.hint = f"What it keeps for going back is unknown until then. {one.hint}".strip()
            raise one
        known.append((one.path or file, one))
    found = []
    for place, one in known:
        trial = one.pending
        if not any(_same(path, repository) for path in {one.repository, trial.repository if trial else ""} - {""}):
            continue
        after = deployment.settled(one, journal.boot_id(), deployment.shown(one.path) is not None)
        # Each image counts in the repository that it lies in: one on trial may come from another than the others.
        here = [kept for kept in journal.kept_by(after) if _same(kept.repository, repository)]
        images = frozenset(kept.image_id for kept in here)
        manifests = frozenset(kept.digest for kept in here if kept.digest)
        if here:
            names = {kept.name for kept in here if kept.name} | set(after.pins)
            if after != one:
                names -= set(keeping.surplus(repository, one.path, images, after.pins, manifests)[1])
            found.append(Keeper(JOURNAL, place, images, manifests, frozenset(names)))
        if after != one:
            others = {pin for path, other in known if path != place for pin in other.pins}
            links, pins = keeping.surplus(repository, one.path, images, after.pins, manifests)
            gone = frozenset(pins).intersection(repository.tags()) - others
            if links or gone:
                found.append(Keeper(ENDED, place, names=gone, links=frozenset(links)))
    return found


def settle(ended: list[Keeper], places: Places = HOST) -> None:
    """Bring the journals up to date, after all is gone that a mount or trial of an earlier boot has left.

    A journal whose lock is held is passed over: its holder settles it as well.
    """
    for keeper in ended:
        with contextlib.suppress(EngineError), journal.locked(keeper.place, places, wait=0.0):
            one = journal.read(keeper.place, places)
            if one is None:
                continue
            after = deployment.settled(one, journal.boot_id(), deployment.shown(one.path) is not None)
            if deployment.is_empty(after):
                journal.remove(one.path, places)
            elif after != one:
                pins = tuple(pin for pin in after.pins if pin not in keeper.names)
                journal.write(dataclasses.replace(after, pins=pins), places)


def _same(path: str, repository: Repository) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return os.path.realpath(path) == os.path.realpath(repository.path)
    here = os.fstat(repository.fd)
    return (found.st_dev, found.st_ino) == (here.st_dev, here.st_ino)
