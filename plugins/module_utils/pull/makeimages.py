# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""From stored layers to EROFS images: build the tree once, write every format that the repository wants, store each as
an object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from ..rootfs.merge import TreeBuilder


def build_tree(repository: Repository, layers: Iterable[StreamDigest]) -> FileSystem:
    """The file tree of the layers, given as object digests of their streams, base layer first. Raises InvalidLayer,
    TooLarge and FormatError.
    """
    builder = TreeBuilder(xattrs="allowlist-only")
    add = builder.add
    for number, digest in enumerate(layers):
        with doing(f"unpacking layer {number}"), repository.open_object_stream(digest, splitstream.LAYER) as stream:
            for entry, content in EntryReader.entries(stream.chunks()):
                add(entry, content)
    return builder.finish()


def write_images(
    repository: Repository, layers: Sequence[StreamDigest], plain: Sequence[int], bootable: Sequence[int]
) -> tuple[dict[int, ObjectDigest], dict[int, ObjectDigest]]:
    """Store the images of the formats ``plain``, and those ``bootable`` of the tree prepared for boot; format -> object
    digest for both.

    Runs in a process of its own, so that the memory of a large tree is given back, and neither syncs nor names
    anything.
    """

    return _made(processes.call(_WORK, lambda: _make(repository, layers, plain, bootable)))


_WORK = "makes the EROFS image"


class Ahead:
    """EROFS images that are being made while layers still arrive: the tree of those that are there, from the lowest up
    to the first that is missing, grows beside the transfer, and the rest follows as soon as it is named.

    ``layers`` are the streams of the image, lowest first, each with its object digest or None as long as it is missing.
    ``leave`` runs in the process that does it, before anything else. Make it before any thread is started.
    """

    def __init__(
        self,
        repository: Repository,
        layers: Sequence[tuple[StreamName, StreamDigest | None]],
        plain: Sequence[int],
        bootable: Sequence[int],
        leave: Callable[[], None],
    ) -> None:
        self._layers = dict(layers)
        self._order = [stream for stream, _digest in layers]
        self._formats = (list(plain), list(bootable))

        def work(hear: Callable[[], Any]) -> list[dict[str, str]]:
            return _make(repository, _as_they_come(self._order, dict(self._layers), hear), plain, bootable)

        self._task = processes.Task(_WORK, work, leave)

    def arrived(self, stream: StreamName, digest: StreamDigest) -> None:
        """Say that a layer is there now, under this object digest."""
        if stream in self._layers:
            self._layers[stream] = digest
            self._task.tell([stream, digest.hex()])

    def images(
        self, layers: Sequence[StreamDigest], plain: Sequence[int], bootable: Sequence[int]
    ) -> tuple[dict[int, ObjectDigest], dict[int, ObjectDigest]] | None:
        """What `write_images` returns for the same arguments; None if it is not what was made here."""
        if [self._layers[stream] for stream in self._order] != list(layers):
            return None
        if self._formats != (list(plain), list(bootable)):
            return None
        return _made(self._task.result())

    def close(self) -> None:
        """End the work if nobody took its result."""
        self._task.close()


def _as_they_come(
    order: Sequence[StreamName], known: dict[StreamName, StreamDigest | None], hear: Callable[[], Any]
) -> Iterator[StreamDigest]:
    for stream in order:
        while (digest := known[stream]) is None:
            name, text = hear()
            known[name] = stream_digest(text)
        yield digest


def _make(
    repository: Repository, layers: Iterable[StreamDigest], plain: Sequence[int], bootable: Sequence[int]
) -> list[dict[str, str]]:
    system = build_tree(repository, layers)
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
