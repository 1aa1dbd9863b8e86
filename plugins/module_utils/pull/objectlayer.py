# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A layer that comes as objects, from another repository on this host or from a peer: taken over, proved, not named.

Whoever delivers implements ``source.LayerObjects``: the bytes of the splitstream, and ``open_object(digest)`` for what
it refers to. Nothing of it is believed. The splitstream must have the fs-verity digest it was announced with; an object
must have the digest that it is asked for by, hashed in *our* file after it was cloned, linked or copied; and the tar
that splitstream and objects stand for must have the layer's diff_id, unless the deliverer's own proof may be trusted
(``LayerObjects.trusted``). Digests of another algorithm than ours mean nothing here: then every object is hashed anew,
and the splitstream is written anew with our digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO

from ..formats.digests import ObjectDigest
from ..formats import fsverity, splitstream
from ..errors import DigestMismatch, doing
from .layer import CHUNK, LayerResult, LayerSpec, counters, layer_result, spool
from ..source.source import LayerObjects
from ..store.objects import ObjectStore

# A splitstream holds inline what is small in a layer; the largest real ones have some hundred megabytes.
MAX_STREAM = 4 << 30


def import_objects(
    offer: LayerObjects, spec: LayerSpec, objects: ObjectStore, on_bytes: Callable[[int], None]
) -> LayerResult:
    """Take over the layer that ``offer`` delivers (and close it); ``spec.compression`` is None for a raw blob.

    ``on_bytes`` is told how much of the tar is done. Raises DigestMismatch if anything is not what it was announced to
    be, FormatError if the splitstream is damaged, and whatever the deliverer raises.
    """
    before = counters(objects)
    # A real file, not a spooled one: before Python 3.11, seek() of a spooled file returns nothing.
    place = f"/proc/self/fd/{objects.dirfd}"
    with contextlib.closing(offer), tempfile.TemporaryFile(dir=place) as received:
        with doing("receiving the splitstream"):
            _receive(offer, received)
            content_type = splitstream.LAYER if spec.compression is not None else None
            stream = splitstream.Splitstream.open(received, offer.algorithm, content_type)
        with contextlib.closing(spool(objects)) as rest:
            writer = splitstream.Writer(objects.algorithm, stream.content_type, rest)
            taker = _Taker(offer, objects)
            offer.expect([digest for digest in stream.object_refs if not taker.has(digest)])
            for chunk in stream.chunks():
                if isinstance(chunk, bytes):
                    writer.inline(chunk)
                    taker.saw(chunk)
                else:
                    writer.external(*taker.take(chunk.digest))
                on_bytes(writer.size)
            if writer.size != stream.size:
                raise DigestMismatch(
                    f"The layer has {writer.size} bytes, and its splitstream says {stream.size}.",
                    "The source is damaged or was tampered with; nothing was registered.",
                )
            if taker.sha256 is not None and "sha256:" + taker.sha256.hexdigest() != spec.diff_id:
                raise DigestMismatch(
                    f"What the source has as the layer {spec.diff_id} has the digest sha256:"
                    f"{taker.sha256.hexdigest()}.",
                    "The source holds a layer that nobody proved, or is damaged; nothing was registered.",
                )
            fetched = stream.size if offer.fetched is None else offer.fetched
            return layer_result(writer, objects, before, fetched=fetched, restored=0)


def _receive(offer: LayerObjects, out: BinaryIO) -> None:
    """Copy the splitstream into a file of ours and compare it with the digest it was announced with."""
    hasher = fsverity.Hasher(offer.algorithm)
    size = 0
    with offer.splitstream() as file:
        while True:
            data = file.read(CHUNK)
            if not data:
                break
            size += len(data)
            if size > MAX_STREAM:
                raise DigestMismatch(f"The splitstream has more than {MAX_STREAM} bytes.")
            hasher.update(data)
            out.write(data)
    if hasher.digest() != offer.stream:
        raise DigestMismatch(
            f"The splitstream has the fs-verity digest {hasher.digest().hex()}, not {offer.stream.hex()}.",
            "The source is damaged or was tampered with; nothing was registered.",
        )


class _Taker:
    """Takes objects over one by one, and hashes the tar that goes by if that is the proof."""

    def __init__(self, offer: LayerObjects, objects: ObjectStore) -> None:
        self.sha256: Any = None if offer.trusted else hashlib.sha256()
        self._offer = offer
        self._objects = objects
        self._same = offer.algorithm == objects.algorithm
        # What was taken over already: the digest there -> digest here and size.
        self._taken: dict[ObjectDigest, tuple[ObjectDigest, int]] = {}
        self._may_clone = True
        self._may_link = True

    def has(self, digest: ObjectDigest) -> bool:
        """Whether the object is here already, under the same digest."""
        return self._same and self._objects.contains(digest)

    def saw(self, data: bytes | memoryview) -> None:
        if self.sha256 is not None:
            self.sha256.update(data)

    def take(self, digest: ObjectDigest) -> tuple[ObjectDigest, int]:
        """Make the object ours: its digest here and its size."""
        known = self._taken.get(digest)
        if known is None and not self.has(digest):
            with doing(f"taking over object {digest.hex()}"):
                known = self._taken[digest] = self._bring(digest)
            return known
        if known is None:
            known = self._taken[digest] = digest, self._size(digest)
        self._objects.stats.present += 1
        self._objects.stats.bytes_present += known[1]
        if self.sha256 is not None:
            self._hash_ours(known[0])
        return known

    def _size(self, digest: ObjectDigest) -> int:
        fd = self._objects.open(digest)
        try:
            return os.fstat(fd).st_size
        finally:
            os.close(fd)

    def _hash_ours(self, digest: ObjectDigest) -> None:
        fd = self._objects.open(digest)
        with os.fdopen(fd, "rb", buffering=0) as file:
            self._read(file, lambda data: None)

    def _bring(self, digest: ObjectDigest) -> tuple[ObjectDigest, int]:
        expect = digest if self._same else None
        with self._offer.open_object(digest) as file:
            fd = _regular(file)
            # That the file systems cannot share is found out once, not for every object.
            if fd >= 0 and self._may_clone:
                output = self._objects.writer()
                try:
                    if output.clone(fd, self.saw if self.sha256 is not None else None):
                        return output.commit(expect=expect)
                    self._may_clone = False
                finally:
                    output.abort()
            if fd >= 0 and expect is not None and self._may_link and self._offer.linkable(fd):
                hasher = fsverity.Hasher(self._objects.algorithm)
                # Hashed before it is linked, and nobody but root and the caller can write it.
                before = None if self.sha256 is None else self.sha256.copy()
                size = self._read(file, hasher.update)
                if hasher.digest() == expect and self._objects.link_in(fd, expect, size):
                    return expect, size
                self._may_link = False
                self.sha256 = before
                file.seek(0)
            output = self._objects.writer()
            try:
                self._read(file, output.write)
                return output.commit(expect=expect)
            finally:
                output.abort()

    def _read(self, file: BinaryIO, use: Callable[[memoryview], None]) -> int:
        """Read the whole file for ``use`` and for the tar's hash; its bytes."""
        buffer = bytearray(CHUNK)
        view = memoryview(buffer)
        size = 0
        while True:
            n = file.readinto(buffer)  # type: ignore[attr-defined]
            if not n:
                return size
            size += n
            use(view[:n])
            self.saw(view[:n])


def _regular(file: BinaryIO) -> int:
    """The fd behind ``file`` if it is a regular file, else -1."""
    try:
        fd = file.fileno()
    except (OSError, AttributeError):
        return -1
    return fd if stat.S_ISREG(os.fstat(fd).st_mode) else -1
