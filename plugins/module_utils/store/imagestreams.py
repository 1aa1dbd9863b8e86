# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Manifests and configurations as splitstreams of a repository: reading, storing, and re-pointing them so that no
instant loses an image.

A document is one external object (its exact bytes, which have the OCI digest) in a splitstream whose named refs lead
on: a manifest to its configuration and layers, a configuration to its layers and to the EROFS images made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest
from ..formats import digests, ocidocuments, repolayout, splitstream
from ..errors import FormatError
from .repository import Repository

MANIFEST = repolayout.MANIFEST_PREFIX
CONFIG = repolayout.CONFIG_PREFIX
LAYER = repolayout.LAYER_PREFIX
CONFIG_REF = "config:"
IMAGE_REF = "composefs.image"
BOOT_REF = "composefs.image.boot"
# While a configuration is re-pointed its new stream also stands under this name; see replace().
PENDING = "composefs-oci-pending-"
# A layer stream that had to give its name to another one, and to which images may still lead; see name_layer().
KEPT = "composefs-oci-kept-"


class Document(NamedTuple):
    """A stored document: its bytes, its named refs (name -> object digest), and the object digest of its
    splitstream.
    """

    raw: bytes
    refs: dict[str, ObjectDigest]
    stream: StreamDigest

    def stream_of(self, key: str) -> StreamDigest | None:
        """The stream that the named ref ``key`` leads to: the diff_id of a layer, or CONFIG_REF and a digest."""
        digest = self.refs.get(key)
        return None if digest is None else StreamDigest(digest)


def image_ref(version: int, boot: bool = False) -> str:
    """The key under which a configuration names its EROFS image of format ``version`` (1 or 2)."""
    key = BOOT_REF if boot else IMAGE_REF
    return key if version == 2 else f"{key}.v1"


def streams_among(refs: Mapping[str, ObjectDigest]) -> dict[str, StreamDigest]:
    """Those of a document's named refs that lead to streams."""
    return {key: StreamDigest(digest) for key, digest in refs.items() if not is_image_ref(key)}


def images_among(refs: Mapping[str, ObjectDigest]) -> dict[str, ObjectDigest]:
    """Those of a configuration's named refs that lead to EROFS images."""
    return {key: digest for key, digest in refs.items() if is_image_ref(key)}


def is_image_ref(key: str) -> bool:
    """Whether a configuration's named ref leads to an EROFS image rather than to a layer."""
    return key in (IMAGE_REF, f"{IMAGE_REF}.v1") or key.startswith(BOOT_REF)


def read(repository: Repository, kind: str, digest: str) -> Document | None:
    """The document ``digest`` (``sha256:<hex>``) of ``kind`` (MANIFEST or CONFIG); None if it is not stored.

    Raises FormatError if what is stored is not that document: then a pull replaces it.
    """
    stream = repository.stream(repolayout.stream_name(kind, digest))
    return None if stream is None else read_object(repository, kind, digest, stream)


def read_object(repository: Repository, kind: str, digest: str, stream: StreamDigest) -> Document:
    """The document ``digest`` from the splitstream object ``stream``; FormatError if it is another one or damaged."""
    content_type, limit = (
        (splitstream.MANIFEST, ocidocuments.MAX_MANIFEST)
        if kind == MANIFEST
        else (splitstream.CONFIG, ocidocuments.MAX_CONFIG)
    )
    what = f"{kind}{digest}"
    with repository.open_object_stream(stream, content_type) as opened:
        chunks = list(opened.chunks()) if opened.size <= limit else []
        if len(chunks) != 1 or isinstance(chunks[0], bytes):
            # Writers before February 2026 kept the JSON inline, which current readers refuse.
            raise FormatError(
                f"The stream {what} does not hold exactly one document of at most {limit} bytes as an object.",
                "Pull the image again.",
            )
        raw = repository.objects.read(chunks[0].digest, limit)
        refs = dict(opened.named_refs)
    if digests.digest_of(raw) != digest:
        raise FormatError(
            f"The stream {what} holds a document with the digest {digests.digest_of(raw)}.", "Pull the image again."
        )
    return Document(raw, refs, stream)


def refs_of(repository: Repository, kind: str, stream: StreamDigest) -> dict[str, ObjectDigest] | None:
    """The named refs of the document in the splitstream object ``stream``, whatever became of the document itself; None
    if it cannot be read.
    """
    try:
        with repository.open_object_stream(
            stream, splitstream.MANIFEST if kind == MANIFEST else splitstream.CONFIG
        ) as opened:
            return dict(opened.named_refs)
    except FormatError:
        return None


def usable(repository: Repository, kind: str, digest: str) -> Document | None:
    """Like read(), but a damaged document counts as missing: the pull that asks is about to replace it."""
    try:
        return read(repository, kind, digest)
    except FormatError:
        return None


def store(repository: Repository, kind: str, raw: bytes, refs: Mapping[str, ObjectDigest]) -> StreamDigest:
    """Store a document and its splitstream as objects, without a name; the splitstream's object digest."""
    writer = splitstream.Writer(repository.algorithm, splitstream.MANIFEST if kind == MANIFEST else splitstream.CONFIG)
    writer.external(repository.objects.put(raw, prove=True), len(raw))
    for name, digest in refs.items():
        writer.named_ref(name, digest)
    return StreamDigest(repository.objects.put_pieces(writer.finish()))


def replace(
    repository: Repository, config: str, config_stream: StreamDigest, manifests: Mapping[str, StreamDigest]
) -> None:
    """Point ``oci-config-<config>`` at ``config_stream`` and each manifest (digest -> stream) at its own.

    The caller has synced all objects. A collector follows a manifest's ref to its configuration by object, and walks on
    only if some name under ``streams/`` leads to that object. So whichever of the two links moves first, there would be
    an instant at which the manifest leads to a configuration without a name, and a crash followed by a collection would
    lose the configuration's JSON and images. Hence the new configuration gets a name of its own first, the manifests
    move, the configuration moves, and the extra name goes: at every instant every manifest leads to a named
    configuration. A crash leaves at worst the extra name, which the next pull removes.
    """
    pending = repolayout.stream_name(PENDING, config)
    if repository.stream(repolayout.config_stream(config)) not in (None, config_stream):
        repository.register(pending, config_stream)
    else:
        repository.register(repolayout.config_stream(config), config_stream)
    for digest, stream in manifests.items():
        repository.register(repolayout.manifest_stream(digest), stream)
    repository.register(repolayout.config_stream(config), config_stream)
    repository.unregister(pending)


def name_layer(repository: Repository, stream: StreamName, digest: StreamDigest) -> None:
    """Make the layer stream ``stream`` lead to the object ``digest``; the caller has synced what it leads to.

    If the name led elsewhere, that object gets another name first, for images may lead to it by its digest: an artifact
    to a raw blob whose bytes are this layer's tar. Without a name a collector would keep the stream and lose what it
    refers to. With it, both go when no image needs them.
    """
    before = repository.stream(stream)
    if before is not None and before != digest and repository.objects.contains(before):
        repository.register(repolayout.stream_name(KEPT, before.hex()), before)
    repository.register(stream, digest)


def manifests_of_config(
    repository: Repository, config: str, except_stream: StreamDigest | None = None
) -> dict[str, Document]:
    """Stored manifests (digest -> document) that lead to the configuration ``config``, through another stream than
    ``except_stream``.

    Several manifests may share one configuration (the same layers compressed in two ways); when it moves, all of them
    must follow.
    """
    found = {}
    for name in repository.streams(MANIFEST):
        digest = name[len(MANIFEST) :]
        document = usable(repository, MANIFEST, digest)
        if document is not None and document.refs.get(CONFIG_REF + config, except_stream) != except_stream:
            found[digest] = document
    return found
