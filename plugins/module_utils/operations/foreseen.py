# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A repository and its host as they will be when the earlier tasks of a run in check mode have done what they
foretold: what is kept then, so that a prune after them foretells what it will remove.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

from . import bootmount, journal, keepers, keeping
from .journal import HOST, Places
from .keepers import Keeper
from ..errors import EngineError
from ..formats import repolayout
from ..formats.digests import ObjectDigest
from ..store import graph as graphs
from ..store.graph import Graph, Root


@dataclasses.dataclass(frozen=True)
class Mount:
    """What an earlier task will have mounted at ``path`` (real): by its name, with the manifest ``digest`` and the
    EROFS image ``image_id`` (hex), each None if unknown, and how many images before it are kept. ``absent``: nothing.
    """

    path: str
    name: str | None = None
    digest: str | None = None
    image_id: str | None = None
    keep_previous: int = 1
    absent: bool = False


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What earlier tasks foretold for one repository: the manifest (``sha256:<hex>``) that each name will mean, None if
    it will be gone, and what will be mounted.
    """

    names: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    mounts: Sequence[Mount] = ()
    places: Places = HOST

    def certain(self, graph: Graph) -> bool:
        """Whether every image that was foretold is in the repository already: only then its parts are known, and what
        it shares with others.
        """
        wanted = [*self.names.values(), *(mount.digest for mount in self.mounts if not mount.absent)]
        return all(digest is None or _node(graph, digest) is not None for digest in wanted)

    def coming(self, graph: Graph) -> dict[str, str]:
        """The names, pins of mounts among them, of images that are not in the repository yet, so that ``graph`` has
        none of them; and their manifests.
        """
        wanted = {name: digest for name, digest in self.names.items() if digest is not None}
        wanted.update(
            (f"{mount.name}@{mount.digest}", mount.digest)
            for mount in self.mounts
            if not mount.absent and mount.name and mount.digest
        )
        return {name: digest for name, digest in wanted.items() if _node(graph, digest) is None}

    def apply(self, graph: Graph, found: Sequence[Keeper]) -> list[Keeper]:
        """Change the roots of ``graph`` to what they will be; return what the host will need instead of ``found``."""
        tags = {root.name: root.node for root in graph.roots if root.kind == graphs.TAG}
        for name, digest in self.names.items():
            node = _node(graph, digest) if digest is not None else None
            tags.pop(name, None)
            if node is not None:
                tags[name] = node
                graph.times[name] = time.time()
        links: set[str] = set()
        for mount in self.mounts:
            found = self._moved(graph, mount, found, tags, links)
        others = [
            root
            for root in graph.roots
            if root.kind != graphs.TAG and not (root.kind == graphs.IMAGE_REF and root.name in links)
        ]
        graph.roots[:] = [*others, *(Root(graphs.TAG, name, node) for name, node in sorted(tags.items()))]
        return list(found)

    def _moved(
        self,
        graph: Graph,
        mount: Mount,
        found: Sequence[Keeper],
        tags: dict[str, ObjectDigest],
        links: set[str],
    ) -> list[Keeper]:
        """``found`` when ``mount`` is done. Pins that go are taken out of ``tags``, links that go are put into
        ``links``.
        """
        try:
            before = journal.read(mount.path, self.places)
        except EngineError:
            return list(found)  # nobody knows what it keeps; the prune itself complains
        old = list(before.images()) if before is not None else []
        kept = [] if mount.absent else [image for image in old if not _is(image, mount)][: max(0, mount.keep_previous)]
        images = {image.image_id for image in kept} | ({mount.image_id} if mount.image_id else set())
        manifests = {image.digest for image in kept if image.digest} | ({mount.digest} if mount.digest else set())
        # The unit brings back what the journal says.
        replaced = {(keepers.JOURNAL, mount.path), (keepers.UNIT, bootmount.unit_name(mount.path))}
        rest = [keeper for keeper in found if (keeper.kind, keeper.place) not in replaced]
        used = frozenset().union(*(keeper.names for keeper in rest))
        for pin in before.pins if before is not None else ():
            if keeping.split_pin(pin)[1] not in manifests and pin not in used:
                tags.pop(pin, None)
        base = f"{repolayout.IMAGE_REFS}/{keeping.DIRECTORY}/{journal.stem(mount.path)}/"
        for root in graph.roots:
            if root.kind == graphs.IMAGE_REF and root.name.startswith(base) and root.name[len(base) :] not in images:
                links.add(root.name)
        gone = {image.image_id for image in old} - images
        elsewhere = frozenset().union(
            *(one.images for one in rest if one.kind == keepers.MOUNT and not _of_path(one, mount.path))
        )
        rest = [one for one in rest if not (one.kind == keepers.MOUNT and _lets_go(one, mount.path, gone - elsewhere))]
        if not mount.absent:
            node = _node(graph, mount.digest) if mount.digest else None
            if node is not None and mount.name:
                tags.setdefault(f"{mount.name}@{mount.digest}", node)
                graph.times.setdefault(f"{mount.name}@{mount.digest}", time.time())
            names = {pin for pin in tags if keeping.split_pin(pin)[1] in manifests}
            names |= {mount.name, f"{mount.name}@{mount.digest}"} if mount.name else set()
            rest.append(Keeper(keepers.JOURNAL, mount.path, frozenset(images), frozenset(manifests), frozenset(names)))
        return rest


def _node(graph: Graph, digest: str) -> ObjectDigest | None:
    return graph.streams.get(repolayout.manifest_stream(digest))


def _is(image: journal.Image, mount: Mount) -> bool:
    """Whether an image of a journal is the one that will be mounted."""
    return image.image_id == mount.image_id or (mount.digest is not None and image.digest == mount.digest)


def _of_path(keeper: Keeper, path: str) -> bool:
    """Whether a mount is that at ``path``, or the loop device of a mount, which goes with it."""
    return keeper.place == path or keeper.place.startswith("/dev/loop")


def _lets_go(keeper: Keeper, path: str, gone: set[str] | frozenset[str]) -> bool:
    return keeper.place == path or (keeper.place.startswith("/dev/loop") and bool(keeper.images & gone))
