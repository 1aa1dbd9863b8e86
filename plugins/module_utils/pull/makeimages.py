# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""From stored layers to EROFS images: build the tree once, write every format that the repository wants, store each as
an object.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..formats import splitstream
from ..host import processes
from ..rootfs import erofswriter
from ..errors import doing
from ..rootfs.filetree import FileSystem
from ..store.repository import Repository
from ..formats.tar import EntryReader
from ..rootfs.merge import TreeBuilder


def build_tree(repository: Repository, layers: Sequence[bytes]) -> FileSystem:
    """The file tree of the layers, given as object digests of their streams, base layer first. Raises InvalidLayer and
    FormatError.
    """
    builder = TreeBuilder()
    add = builder.add
    for number, digest in enumerate(layers):
        with doing(f"unpacking layer {number}"), repository.open_object_stream(digest, splitstream.LAYER) as stream:
            for entry, content in EntryReader.entries(stream.chunks()):
                add(entry, content)
    return builder.finish()


def write_images(
    repository: Repository, layers: Sequence[bytes], plain: Sequence[int], bootable: Sequence[int]
) -> tuple[dict[int, bytes], dict[int, bytes]]:
    """Store the images of the formats ``plain``, and those ``bootable`` of the tree prepared for boot; format -> object
    digest for both.

    Runs in a process of its own, so that the memory of a large tree is given back, and neither syncs nor names
    anything.
    """

    def work() -> list[dict[str, str]]:
        system = build_tree(repository, layers)
        answers = [{str(version): _store(repository, system, version) for version in plain}]
        if bootable:
            from ..rootfs.bootable import transform_for_boot  # late: few images are made for booting

            with doing("preparing the tree for boot"):
                transform_for_boot(system, repository.objects.read)
        answers.append({str(version): _store(repository, system, version) for version in bootable})
        return answers

    made = processes.call("makes the EROFS image", work)
    first, second = ({int(version): bytes.fromhex(digest) for version, digest in images.items()} for images in made)
    return first, second


def _store(repository: Repository, system: FileSystem, version: int) -> str:
    output = repository.objects.writer()
    try:
        with doing(f"writing the EROFS image in format {version}"):
            erofswriter.write_image(system.root, version, repository.algorithm, output.write)
            return output.commit()[0].hex()
    except BaseException:
        output.abort()
        raise
