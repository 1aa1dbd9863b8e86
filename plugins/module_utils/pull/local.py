# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Another composefs repository on this host as a source of images: ``composefs:/path#NAME`` or ``#sha256:<manifest>``.

That repository may belong to anybody, so it is read as any source is: documents are checked against their digests, and
layers come as objects that ``objectlayer`` proves. It stands here and not among the sources because it reads a store.

What it says of its own proofs (``.composefs-oci/trusted``) counts only if root or the caller wrote it, where nobody
else can: then a layer's tar need not be hashed again. Every object is hashed all the same, in our own file.
"""

from __future__ import annotations

import os
import stat
from typing import BinaryIO, cast

from ..formats.digests import ObjectDigest, StreamDigest
from ..formats import ocidocuments, repolayout, splitstream
from ..host import beneath
from ..store import imagestreams
from ..errors import FormatError, ImageNotFound, doing
from ..formats.ocidocuments import Descriptor, Manifest
from ..formats.reference import Reference
from ..source.source import Facts, LayerObjects, Resolved, Source
from ..store.repository import Repository

_TAR = "application/vnd.oci.image.layer.v1.tar"
_BLOB = "application/octet-stream"


class LocalLayer(LayerObjects):
    """A layer in another repository."""

    def __init__(self, repository: Repository, stream: StreamDigest, trusted: bool) -> None:
        self.algorithm = repository.algorithm
        self.stream = stream
        self.trusted = trusted
        self._objects = repository.objects

    def splitstream(self) -> BinaryIO:
        return self.open_object(self.stream)

    def open_object(self, digest: ObjectDigest) -> BinaryIO:
        return cast(BinaryIO, os.fdopen(self._objects.open(digest), "rb", buffering=0))

    def linkable(self, fd: int) -> bool:
        found = os.fstat(fd)
        # With another mode than objects have the file would be one that others cannot read, or can write.
        return found.st_uid in (0, os.geteuid()) and stat.S_IMODE(found.st_mode) in (0o444, 0o644)


class LocalSource(Source):
    """One repository, open for reading as long as this is."""

    name = "the other repository"
    delivers_objects = True

    def __init__(self, policy: str) -> None:
        """``policy``: how the policy for signatures was applied."""
        self._policy = policy
        self._opened: dict[str, Repository] = {}

    def _repository(self, reference: Reference) -> Repository:
        path = reference.path
        if path not in self._opened:
            self._opened[path] = Repository.open(path, unsafe=beneath.ACCEPT)
        return self._opened[path]

    def resolve(self, reference: Reference) -> Resolved:
        """See Source.resolve. What else that repository remembers of a name, such as a registry's digest, proves
        nothing here.
        """
        repository = self._repository(reference)
        digest = reference.digest or repository.tag_digest(reference.tag)
        if digest is None:
            raise ImageNotFound(
                f"There is no image {reference.tag!r} in the repository {reference.path}.",
                "Choose a name that composefs_image_info lists for it.",
            )
        with doing(f"Reading {reference.original}"):
            document = imagestreams.read(repository, imagestreams.MANIFEST, digest)
        if document is None:
            raise ImageNotFound(f"There is no manifest {digest} in the repository {reference.path}.", "Pull it first.")
        return Resolved(reference.pinned(digest), digest, document.raw)

    def config(self, resolved: Resolved, manifest: Manifest) -> bytes:
        with doing(f"Reading {resolved.reference.original}"):
            return self._config(resolved.reference, manifest).raw

    def _config(self, reference: Reference, manifest: Manifest) -> imagestreams.Document:
        repository = self._repository(reference)
        document = imagestreams.read(repository, imagestreams.CONFIG, manifest.config.digest)
        if document is None:
            raise FormatError(
                f"The configuration {manifest.config.digest} is missing from the repository {reference.path}.",
                "Pull the image there again.",
            )
        return document

    def layers(self, resolved: Resolved, manifest: Manifest) -> list[Descriptor]:
        """What is there instead of the manifest's blobs: whole tars, whose size the splitstreams tell."""
        repository = self._repository(resolved.reference)
        diff_ids = [layer.digest for layer in manifest.layers]
        container = ocidocuments.is_container(manifest)
        if container:
            config = ocidocuments.parse_config(self._config(resolved.reference, manifest).raw)
            diff_ids = [diff_id for _layer, diff_id in ocidocuments.pairs(manifest, config)]
        sizes = {}
        for diff_id in dict.fromkeys(diff_ids):
            with (
                doing(f"Reading {resolved.reference.original}"),
                repository.open_object_stream(
                    self._stream(resolved.reference, diff_id), splitstream.LAYER if container else None
                ) as stream,
            ):
                sizes[diff_id] = stream.size
        kind = _TAR if container else _BLOB
        return [Descriptor(kind, diff_id, sizes[diff_id]) for diff_id in diff_ids]

    def _stream(self, reference: Reference, diff_id: str) -> StreamDigest:
        repository = self._repository(reference)
        # The stream that the image was made of: the layer's name may by now lead to the same tar, stored otherwise.
        manifest = imagestreams.usable(repository, imagestreams.MANIFEST, reference.digest)
        stream = manifest.stream_of(diff_id) if manifest is not None else None
        stream = stream or repository.stream(repolayout.layer_stream(diff_id))
        if stream is None:
            raise FormatError(
                f"The layer {diff_id} is missing from the repository {reference.path}.", "Pull the image there again."
            )
        return stream

    def layer_objects(self, reference: Reference, diff_id: str) -> LocalLayer:
        repository = self._repository(reference)
        stream = self._stream(reference, diff_id)
        # A proof that counts there is one that root or the caller made where nobody else can write: see trusted().
        return LocalLayer(repository, stream, repository.trusted(diff_id) == stream)

    def facts(self) -> Facts:
        return Facts(policy=self._policy)

    def close(self) -> None:
        while self._opened:
            self._opened.popitem()[1].close()
