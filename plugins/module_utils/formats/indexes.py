# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Which manifest an index means for a platform; indexes may list further indexes. No I/O: documents come from a
function of the caller.

Follows the OCI image specification, "Image Index", for the documents, and containers/image for the choice where the
specification leaves it open: the most capable variant wins, an entry without a platform is taken when no other fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import DigestMismatch, InvalidDocument, PlatformNotFound
from .digests import digest_of
from .ocidocuments import DOCKER_LIST, Descriptor, OCI_INDEX, Platform, parse_index

# How deep indexes may list indexes, and how many of them are read for one image. Real images need two
# levels and a handful of indexes.
MAX_DEPTH = 4
MAX_INDEXES = 32


class Chosen(NamedTuple):
    """A manifest that was chosen from an index; ``platform`` is what the index says it is for, None if it says
    nothing.
    """

    descriptor: Descriptor
    platform: Platform | None


def choose(raw: bytes, wanted: Platform, read: Callable[[Descriptor], bytes]) -> Chosen:
    """The manifest for ``wanted`` in the index ``raw`` or in indexes that it lists, which ``read`` fetches.

    Their bytes are proved against the descriptors here. Raises PlatformNotFound if nothing fits, InvalidDocument and
    UnsupportedMediaType for documents out of bounds, DigestMismatch.
    """
    return among(_Walk(wanted, read).leaves(raw), wanted)


def among(leaves: Sequence[Chosen], wanted: Platform) -> Chosen:
    """The manifest for ``wanted`` among several. Raises PlatformNotFound."""
    for platform in wanted.candidates():
        for leaf in leaves:
            if platform == leaf.platform:
                return leaf
    for leaf in leaves:
        if leaf.platform is None:
            return leaf
    offered = sorted({str(leaf.platform) for leaf in leaves if leaf.platform and leaf.platform.os != "unknown"})
    raise PlatformNotFound(
        f"There is no image for {wanted} in the index"
        f"{', which offers ' + ', '.join(offered)[:500] if offered else ''}.",
        "Choose one of the platforms that the image has, with the option platform.",
    )


class _Walk:
    """One walk through an index and what it lists, within bounds over the whole walk."""

    def __init__(self, wanted: Platform, read: Callable[[Descriptor], bytes]) -> None:
        self._wanted = wanted
        self._read = read
        self._count = 0

    def leaves(self, raw: bytes, outer: Platform | None = None, depth: int = 1) -> list[Chosen]:
        """The manifests that ``raw`` lists, in order, each with the platform of the nearest entry that names one."""
        self._count += 1
        if depth > MAX_DEPTH or self._count > MAX_INDEXES:
            raise InvalidDocument(
                f"The index lists indexes more than {MAX_DEPTH} levels deep, or more than {MAX_INDEXES} of them.",
                "The image is damaged or made to do harm; ask its publisher.",
            )
        found = []
        for entry in parse_index(raw).manifests:
            platform = entry.platform or outer
            if entry.media_type not in (OCI_INDEX, DOCKER_LIST):
                found.append(Chosen(entry, platform))
            elif platform is None or self._wanted.accepts(platform):
                found += self.leaves(proved(self._read(entry), entry, "index"), platform, depth + 1)
        return found


def proved(raw: bytes, descriptor: Descriptor, what: str) -> bytes:
    """``raw``, if it has the digest and size of ``descriptor``; else DigestMismatch."""
    if len(raw) != descriptor.size or digest_of(raw) != descriptor.digest:
        raise mismatch(
            f"The {what} has {len(raw)} bytes with the digest {digest_of(raw)}; {descriptor.size} bytes with "
            f"{descriptor.digest} were announced."
        )
    return raw


def mismatch(message: str) -> DigestMismatch:
    """The error for a part of an image that is not what was announced."""
    return DigestMismatch(message, "The image is damaged; ask its publisher.")
