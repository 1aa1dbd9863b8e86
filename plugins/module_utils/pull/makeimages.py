# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""From stored layers to EROFS images: build the tree once, write every format that the repository wants, store each as
an object.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest, object_digest, stream_digest
from ..formats import splitstream
from ..host import processes
from ..rootfs import erofswriter
from ..errors import doing
from ..rootfs.filetree import FileSystem
from ..store.repository import Repository
from ..formats.tar import EntryReader
from ..formats.tarheader import Entry
from ..rootfs.merge import TreeBuilder
from .feed import Cut, Feed, follow


Entries = Iterable[tuple[Entry, Any]]
"""What a layer consists of, as EntryReader tells it."""


def build_tree(repository: Repository, layers: Iterable[StreamDigest]) -> FileSystem:
    """The file tree of the layers, given as object digests of their streams, base layer first. Raises InvalidLayer,
    TooLarge and FormatError.
    """
    return _tree(_stored(repository, digest) for digest in layers)


def _tree(layers: Iterable[Entries]) -> FileSystem:
    builder = TreeBuilder(xattrs="allowlist-only")
    add = builder.add
    for number, entries in enumerate(layers):
        with doing(f"unpacking layer {number}"):
            for entry, content in entries:
                add(entry, content)
    return builder.finish()


def _stored(repository: Repository, digest: StreamDigest) -> Iterator[tuple[Entry, Any]]:
    """The entries of a stored layer."""
    with repository.open_object_stream(digest, splitstream.LAYER) as stream:
        yield from EntryReader.entries(stream.chunks())


def write_images(
    repository: Repository, layers: Sequence[StreamDigest], plain: Sequence[int], bootable: Sequence[int]
) -> tuple[dict[int, ObjectDigest], dict[int, ObjectDigest]]:
    """Store the images of the formats ``plain``, and those ``bootable`` of the tree prepared for boot; format -> object
    digest for both.

    Runs in a process of its own, so that the memory of a large tree is given back, and neither syncs nor names
    anything.
    """

    return _made(processes.call(_WORK, lambda: _make(repository, build_tree(repository, layers), plain, bootable)))


_WORK = "makes the EROFS image"


class Ahead:
    """EROFS images that are being made while layers still arrive: the tree grows from the lowest layer up, by layers
    that are there, by one that is told while it arrives, and by others as soon as they are named.

    ``layers`` are the streams of the image, lowest first, each with its object digest or None as long as it is missing.
    ``feeds`` are those that may tell a missing one, and nobody else reads them. ``leave`` runs in the process that does
    it, before anything else. Make it before any thread is started.

    What a feed tells is not proved yet. Nothing comes of it unless the very attempt that told it succeeds: `lost` ends
    the work otherwise, and the images are made of what is stored then.
    """

    def __init__(
        self,
        repository: Repository,
        layers: Sequence[tuple[StreamName, StreamDigest | None]],
        plain: Sequence[int],
        bootable: Sequence[int],
        leave: Callable[[], None],
        feeds: Mapping[StreamName, Feed] | None = None,
    ) -> None:
        self._layers = dict(layers)
        self._order = [stream for stream, _digest in layers]
        self._formats = (list(plain), list(bootable))
        self._lost = False

        def work(hear: processes.Hear) -> list[dict[str, str]]:
            coming = _Coming(repository, dict(self._layers), hear, feeds or {})
            return _make(repository, _tree(map(coming.entries, self._order)), plain, bootable)

        self._task = processes.Task(_WORK, work, leave)

    def arrived(self, stream: StreamName, digest: StreamDigest) -> None:
        """Say that a layer is there now, under this object digest."""
        if stream in self._layers:
            self._layers[stream] = digest
            self._task.tell([stream, digest.hex()])

    def lost(self, stream: StreamName) -> None:
        """Say that the attempt failed which may have told this layer."""
        if stream in self._layers:
            self._lost = True
            self._task.close()

    def images(
        self, layers: Sequence[StreamDigest], plain: Sequence[int], bootable: Sequence[int]
    ) -> tuple[dict[int, ObjectDigest], dict[int, ObjectDigest]] | None:
        """What `write_images` returns for the same arguments; None if it is not what was made here."""
        if [self._layers[stream] for stream in self._order] != list(layers):
            return None
        if self._lost or self._formats != (list(plain), list(bootable)):
            return None
        return _made(self._task.result())

    def close(self) -> None:
        """End the work if nobody took its result."""
        self._task.close()


class _Coming:
    """The layers of an image as they come, in the process that waits for them."""

    def __init__(
        self,
        repository: Repository,
        known: dict[StreamName, StreamDigest | None],
        hear: processes.Hear,
        feeds: Mapping[StreamName, Feed],
    ) -> None:
        self._repository = repository
        self._known = known
        self._hear = hear
        self._feeds = feeds

    def entries(self, stream: StreamName) -> Iterator[tuple[Entry, Any]]:
        """The entries of a layer, from its feed as far as that goes."""
        told = 0
        feed = self._feeds.get(stream) if self._known[stream] is None else None
        if feed is not None:
            fd = feed.reader
            chunks = follow(fd, self._repository.algorithm.size, lambda: self._listen(stream, fd))
            try:
                for pair in EntryReader.entries(chunks):
                    told += 1
                    yield pair
            except Cut:
                pass  # the stored layer begins with the same entries, for one attempt wrote both
            else:
                return
        while (digest := self._known[stream]) is None:
            self._listen(stream)
        yield from itertools.islice(_stored(self._repository, digest), told, None)

    def _listen(self, stream: StreamName, beside: int = -1) -> bool:
        """Wait for word of a layer, or for something to read from ``beside``; False if this layer is there already."""
        if self._known[stream] is not None:
            return False
        told = self._hear(beside)
        if told is not None:
            name, digest = told
            self._known[name] = stream_digest(digest)
        return True


def _make(
    repository: Repository, system: FileSystem, plain: Sequence[int], bootable: Sequence[int]
) -> list[dict[str, str]]:
    answers = [{str(version): _store(repository, system, version) for version in plain}]
    if bootable:
        from ..rootfs.bootable import transform_for_boot  # late: few images are made for booting

        with doing("preparing the tree for boot"):
            transform_for_boot(system, repository.objects.read)
    answers.append({str(version): _store(repository, system, version) for version in bootable})
    return answers


def _made(answers: Any) -> tuple[dict[int, ObjectDigest], dict[int, ObjectDigest]]:
    first, second = ({int(version): object_digest(digest) for version, digest in images.items()} for images in answers)
    return first, second


def _store(repository: Repository, system: FileSystem, version: int) -> str:
    output = repository.objects.writer()
    try:
        with doing(f"writing the EROFS image in format {version}"):
            erofswriter.write_image(system.root, version, repository.algorithm, output.write)
            # Proved: it may be made again because the one that is there turned out to be torn.
            return output.commit(prove=True)[0].hex()
    except BaseException:
        output.abort()
        raise
