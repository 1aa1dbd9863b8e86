# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""How many bytes images occupy, for themselves alone and together with others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ..formats.digests import ObjectDigest
from ..store import imagestreams
from ..store import graph as graphs
from ..errors import EngineError
from ..store.graph import Graph, Root
from ..store.repository import Repository


class DiskUse(NamedTuple):
    """Bytes of the objects that only this image refers to, and of those that others refer to as well; and the
    numbers of these objects.
    """

    own: int
    shared: int
    own_objects: int
    shared_objects: int


def disk_use(repository: Repository, wanted: Iterable[str]) -> dict[str, DiskUse]:
    """The use of each manifest (``sha256:<hex>``) in ``wanted``; those that cannot be read are left out.

    Every stored manifest counts as another image, also one without a name: its objects are there until garbage is
    collected. Reads all manifests, configurations and layers of the repository, but no content.
    """
    graph = Graph.read(repository)
    roots = {}
    for name, node in graph.streams.items():
        if name.startswith(imagestreams.MANIFEST):
            root = Root("manifest", name[len(imagestreams.MANIFEST) :], node)
            if _readable(graph, root):
                roots[root.name] = root
    owners = graph.owners(list(roots.values()), lambda _node, _error: None)
    parts = [owners.part(first) for first in range(256)]
    numbers = {name: number for number, name in enumerate(roots)}
    sizes: dict[ObjectDigest, int] = {}
    found = {}
    for digest in dict.fromkeys(wanted):
        if digest not in roots:
            continue
        own = shared = own_objects = shared_objects = 0
        for one in graph.reaches(roots[digest], lambda _node, _error: None):
            size = _size(repository, one, sizes)
            if parts[one[0]].get(graphs.key(one)) == numbers[digest]:
                own, own_objects = own + size, own_objects + 1
            else:
                shared, shared_objects = shared + size, shared_objects + 1
        found[digest] = DiskUse(own, shared, own_objects, shared_objects)
    return found


def _readable(graph: Graph, root: Root) -> bool:
    """Whether the documents of an image are whole; a layer that is not counts as nothing but its own stream."""
    try:
        manifest = imagestreams.read(graph.repository, imagestreams.MANIFEST, root.name)
        for name, stream in imagestreams.streams_among(manifest.refs).items() if manifest else ():
            if name.startswith(imagestreams.CONFIG_REF):
                digest = name[len(imagestreams.CONFIG_REF) :]
                imagestreams.read_object(graph.repository, imagestreams.CONFIG, digest, stream)
    except EngineError:
        return False
    return manifest is not None


def _size(repository: Repository, digest: ObjectDigest, sizes: dict[ObjectDigest, int]) -> int:
    if digest not in sizes:
        found = repository.objects.stat(digest)
        sizes[digest] = found.st_size if found is not None else 0
    return sizes[digest]
