# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""How many bytes images occupy, for themselves alone and together with others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..formats import fsverity
from ..store import imagestreams
from ..errors import EngineError, from_os_error
from ..store.repository import Repository

_SHARED = -1


class DiskUse(NamedTuple):
    """Bytes of the objects that only this image refers to, and of those that others refer to as well; how many objects
    that are.
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
    manifests = [name[len(imagestreams.MANIFEST) :] for name in repository.streams(imagestreams.MANIFEST)]
    owner: dict[bytes, int] = {}
    walked: dict[bytes, int] = {}
    parts: dict[int, list[bytes]] = {}
    for number, digest in enumerate(manifests):
        try:
            parts[number] = list(dict.fromkeys(_parts(repository, digest)))
        except EngineError:
            continue
        for part in parts[number]:
            # A stream that a second image refers to is walked twice at most: then everything in it is shared for good.
            if walked.get(part) in (number, _SHARED):
                continue
            walked[part] = number if part not in walked else _SHARED
            for digest_of_object in _objects(repository, part):
                if owner.setdefault(digest_of_object, number) != number:
                    owner[digest_of_object] = _SHARED
    sizes: dict[bytes, int] = {}
    found = {}
    for digest in dict.fromkeys(wanted):
        number = manifests.index(digest) if digest in manifests else -1
        if number not in parts:
            continue
        mine = {one for part in parts[number] for one in _objects(repository, part)}
        own = [_size(repository, one, sizes) for one in mine if owner[one] == number]
        shared = [_size(repository, one, sizes) for one in mine if owner[one] != number]
        found[digest] = DiskUse(sum(own), sum(shared), len(own), len(shared))
    return found


def _parts(repository: Repository, digest: str) -> Iterator[bytes]:
    """The objects by which an image hangs together: the streams of manifest, configuration and layers, and the EROFS
    images.
    """
    manifest = imagestreams.read(repository, imagestreams.MANIFEST, digest)
    if manifest is None:
        return
    yield manifest.stream
    for name, stream in manifest.refs.items():
        yield stream
        if name.startswith(imagestreams.CONFIG_REF):
            yield from imagestreams.read_object(
                repository, imagestreams.CONFIG, name[len(imagestreams.CONFIG_REF) :], stream
            ).refs.values()


def _objects(repository: Repository, part: bytes) -> Iterator[bytes]:
    """A part and the objects that it refers to, if it is a splitstream. What an EROFS image refers to is that of the
    layers.
    """
    yield part
    try:
        with repository.open_object_stream(part) as stream:
            objects = stream.object_refs
    except EngineError:
        return
    yield from objects


def _size(repository: Repository, digest: bytes, sizes: dict[bytes, int]) -> int:
    if digest not in sizes:
        try:
            sizes[digest] = os.stat(
                fsverity.object_path(digest), dir_fd=repository.objects.dirfd, follow_symlinks=False
            ).st_size
        except FileNotFoundError:
            sizes[digest] = 0
        except OSError as error:
            raise from_os_error(error, f"Looking at object {digest.hex()}") from error
    return sizes[digest]
