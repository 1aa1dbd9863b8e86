# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Make a delta between two stored images: an OCI layout with a tar-diff for each layer that the source image lacks.

A tar-diff is made by walking the layer as it is stored. What stands inline is literal, a file that the source image
has under any name is copied, and one that has an older version there becomes a patch of it where that pays. Each
tar-diff is applied once and hashed before it is believed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from ..formats.digests import ObjectDigest, StreamDigest
from ..errors import (
    DigestMismatch,
    EngineError,
    FormatError,
    ImageNotFound,
    InvalidOption,
    InvalidReference,
    doing,
)
from ..formats import codecs, digests, ocidocuments, repolayout, splitstream, tar, tardiff
from ..formats.ocidocuments import Descriptor
from ..formats.reference import Reference, parse_reference
from ..progress import Progress
from ..pull import deltas
from ..pull.sourcefiles import SourceFiles
from ..rootfs.erofsreader import ErofsImage
from ..rootfs.filetree import Leaf, walk
from ..source import push
from ..source.options import ProxyOptions
from ..source.skopeo import Scratch
from ..source.source import persist
from ..store import imagestreams, namerecords
from ..store.repository import Repository

if TYPE_CHECKING:
    from ..formats.codecs import Buffer

# Files beyond this are not patched: whoever applies a patch holds its base in memory.
MAX_PATCHED = 64 << 20
MIN_PATCHED = 1 << 10
# Bytes: a large file is patched in pieces, so that whoever applies the patch needs a window of one piece only.
_PATCH = 16 << 20
_PIECE = 256 * 1024
_COMPARE_LEVEL = 3
# What skopeo can put an artifact into, and not only an image.
_PLACES = ("docker", "oci", "oci-archive", "dir")
# Levels of zstd where the task names none. A rebuilt base image becomes 5 % smaller by the thorough level, in five more
# seconds of processor. On large files it gains less for the time, and all that is not a patch gains nothing.
_QUICK = 12
_THOROUGH = 18
_THOROUGH_SIZE = 8 << 20
# Bytes that naming the base costs in the program: a path, which compresses well, and three numbers.
_NAMING = 64
LAYOUT_TAG = "delta"


class Stored(NamedTuple):
    """A stored container image: its documents, its configuration and the EROFS image (object digest) of its tree."""

    manifest: ocidocuments.Manifest
    config: ocidocuments.Config
    image: ObjectDigest
    streams: dict[str, StreamDigest]


class Made(NamedTuple):
    """What was made: the artifact's manifest, and for each layer its diff_id, blob digest and size and the tar-diff's
    size in bytes.
    """

    manifest: bytes
    layers: list[dict[str, Any]]

    @property
    def digest(self) -> str:
        return digests.digest_of(self.manifest)


def comes(repository: Repository, text: str) -> bool:
    """Whether the image under the name or with the manifest digest ``text`` is one that an earlier task of a run in
    check mode would fetch.
    """
    digest = text if digests.is_digest(text) else repository.tag_digest(namerecords.spelled(repository, text))
    if digest is None or not repository.foreseen.brings(digest):
        return False
    return repository.stream(repolayout.manifest_stream(digest)) is None


def find(repository: Repository, text: str) -> Stored:
    """The image under the name or with the manifest digest ``text``. ImageNotFound, FormatError."""
    digest = text if digests.is_digest(text) else repository.tag_digest(namerecords.spelled(repository, text))
    document = imagestreams.read(repository, imagestreams.MANIFEST, digest) if digest else None
    if document is None:
        raise ImageNotFound(f"There is no image {text} in the repository {repository.path}.", "Pull it first.")
    manifest = ocidocuments.parse_manifest(document.raw)
    if not ocidocuments.is_container(manifest):
        raise InvalidOption(f"{text} is an artifact, not a container image.", "Deltas are made between images.")
    config_document = imagestreams.read(repository, imagestreams.CONFIG, manifest.config.digest)
    image = deltas.source_image(repository, manifest.config.digest)
    if config_document is None or image is None:
        raise ImageNotFound(f"The image {text} has no EROFS image in {repository.path}.", "Pull it again.")
    config = ocidocuments.parse_config(config_document.raw)
    known = imagestreams.streams_among(config_document.refs)
    streams = {diff_id: known[diff_id] for diff_id in config.diff_ids if diff_id in known}
    if len(streams) != len(set(config.diff_ids)):
        raise FormatError(f"The image {text} does not lead to all of its layers.", "Pull it again.")
    return Stored(manifest, config, image, streams)


def make(
    repository: Repository, source: Stored, target: Stored, directory: str, level: int | None, progress: Progress
) -> Made:
    """Write the delta from ``source`` to ``target`` as an OCI layout into ``directory``, which may not
    exist yet, under LAYOUT_TAG. ``level`` is that of zstd, for everything; None chooses it by the size of each file.

    Memory grows with the number of files of the source image, and by a patch of MAX_PATCHED bytes.
    """
    require_difference(source, target)
    layout = _Layout(directory)
    known = _Known(repository, source.image)
    kept = set(source.config.diff_ids)
    done: dict[str, Descriptor] = {}
    told = []
    for blob, diff_id in _different(target):
        if diff_id in kept:
            continue
        progress.message(f"Making the delta of layer {diff_id}")
        with doing(f"Making the delta of layer {diff_id}"):
            with layout.blob() as output:
                _diff(repository, target.streams[diff_id], known, output.write, level)
            done[blob.digest] = Descriptor(tardiff.MEDIA_TYPE, output.digest, output.size)
            _prove(repository, layout.path(output.digest), source.image, diff_id, blob.size)
        told.append({"diff_id": diff_id, "digest": blob.digest, "size": blob.size, "bytes": output.size})
    documents = [
        Descriptor(media_type, layout.put(raw), len(raw))
        for media_type, raw in (
            (ocidocuments.OCI_MANIFEST, target.manifest.raw),
            (ocidocuments.OCI_CONFIG, target.config.raw),
        )
    ]
    layout.put(deltas.EMPTY_CONFIG)
    manifest = deltas.compose(documents[0], documents[1], source.manifest.config.digest, list(done.items()))
    layout.finish(manifest)
    return Made(manifest, told)


def require_difference(source: Stored, target: Stored) -> None:
    """InvalidOption if there is nothing that a delta could make."""
    if source.config.diff_ids == target.config.diff_ids:
        raise InvalidOption(
            "Source and target have the same layers, so there is nothing between them.", "Name two versions of it."
        )


def require_place(dest: Reference) -> None:
    """InvalidOption if nothing can be put at ``dest``."""
    if dest.digest:
        raise InvalidOption(
            f"{dest.text} means what is there already, by its digest, so no delta can be put there.",
            "Write 'dest' with a tag, or leave it at auto.",
        )
    if dest.transport == "composefs":
        raise InvalidOption(
            f"{dest.text} lies in a composefs repository, where no delta can be put.",
            "Write 'dest' as a place in a registry, a layout or an archive.",
        )
    if dest.transport not in _PLACES:
        raise InvalidOption(
            f"{dest.text}: {dest.transport} takes images only, and a delta is none.",
            "Write 'dest' as a place in a registry (docker://…), a layout (oci:…) or an archive (oci-archive:…).",
        )


def missing(source: Stored, target: Stored) -> list[dict[str, Any]]:
    """The layers of ``target`` that a delta from ``source`` has to make; ``bytes`` is not known yet."""
    kept = set(source.config.diff_ids)
    return [
        {"diff_id": diff_id, "digest": blob.digest, "size": blob.size, "bytes": None}
        for blob, diff_id in _different(target)
        if diff_id not in kept
    ]


def _different(target: Stored) -> list[tuple[Descriptor, str]]:
    """The layers of ``target``, each once."""
    found: dict[str, tuple[Descriptor, str]] = {}
    for blob, diff_id in ocidocuments.pairs(target.manifest, target.config):
        found.setdefault(blob.digest, (blob, diff_id))
    return list(found.values())


def there(
    options: ProxyOptions, dest: Reference, source: Stored, target: Stored, progress: Progress, retries: int = 0
) -> Made | None:
    """What lies at ``dest``, if it is a delta with this target and source; else None. Passing faults of the registry
    are met by asking again, up to ``retries`` times. InvalidOption if an image is there, which would be lost, or an
    archive with something else.
    """
    raw = persist(lambda: push.manifest_at(options, dest), retries, progress)
    if raw is None:
        if dest.transport == "oci-archive" and os.path.exists(dest.path):
            # skopeo adds nothing to an archive, it writes the file anew.
            raise InvalidOption(
                f"There is an archive {dest.path} already, and what it holds has another name. It would be lost.",
                "Write 'dest' with another file, or as a layout (oci:…), which holds several deltas.",
            )
        return None
    if _is_image(raw):
        raise InvalidOption(
            f"At {dest.text} is an image, which would give way to the delta.",
            "Write 'dest' with another tag or path, or leave it at auto.",
        )
    try:
        found = deltas.parse(ocidocuments.parse_manifest(raw))
    except EngineError:
        return None
    if found is None or found.target != target.manifest.digest:
        return None
    if found.source_config != source.manifest.config.digest:
        return None
    told = [
        {"diff_id": diff_id, "digest": blob.digest, "size": blob.size, "bytes": found.layers[blob.digest].size}
        for blob, diff_id in _different(target)
        if blob.digest in found.layers
    ]
    return Made(raw, told)


def _is_image(raw: bytes) -> bool:
    try:
        return ocidocuments.is_index(raw) or ocidocuments.is_container(ocidocuments.parse_manifest(raw))
    except EngineError:
        return False


def publish(
    repository: Repository,
    source: Stored,
    target: Stored,
    dest: Reference,
    options: ProxyOptions,
    level: int | None,
    progress: Progress,
    retries: int = 0,
) -> Made:
    """Make the delta and push it to ``dest``; see make() and source.push. Passing faults of the registry are met by
    pushing again, up to ``retries`` times.
    """
    # What skopeo leaves behind when it is killed lies there, too, and the directory goes whichever process dies first.
    with contextlib.closing(Scratch(options.tmpdir)) as scratch:
        directory = scratch.path
        with doing(f"Making the delta for {dest.text}"):
            made = make(repository, source, target, f"{directory}/layout", level, progress)
        progress.message(f"Pushing the delta to {dest.text}")
        layout = parse_reference(f"oci:{directory}/layout:{LAYOUT_TAG}")
        size = sum(layer["bytes"] for layer in made.layers)
        within = dataclasses.replace(options, tmpdir=directory)
        persist(lambda: push.push(within, layout, dest, size), retries, progress)
    raw = persist(lambda: push.manifest_at(options, dest), retries, progress)
    if raw is None or digests.digest_of(raw) != made.digest:
        raise DigestMismatch(
            f"What was pushed to {dest.text} is not what is there now.",
            "Somebody else pushes to the same place, or it changes what it stores.",
        )
    return made


def registry_digest(repository: Repository, text: str, image: Stored) -> str:
    """The digest by which the registry knows the image under the name or with the digest ``text``."""
    record = _record(repository, text, image)
    return (record.registry_digest if record else None) or image.manifest.digest


def beside(repository: Repository, names: tuple[str, str], source: Stored, target: Stored) -> Reference:
    """Where the delta belongs beside the target in its registry. ``names`` are what source and target were asked for
    by. InvalidReference if it is not known where the target came from.
    """
    record = _record(repository, names[1], target)
    reference = parse_reference(record.ref) if record else None
    if reference is None or not reference.is_remote:
        raise InvalidReference(
            f"It is not known which registry {names[1]} came from.",
            "Pull it by a docker:// reference first, or set 'dest'.",
        )
    return deltas.beside(
        reference, registry_digest(repository, names[1], target), registry_digest(repository, names[0], source)
    )


def _record(repository: Repository, text: str, image: Stored) -> namerecords.NameRecord | None:
    found = {
        name: one for name, one in namerecords.records(repository).items() if one.manifest == image.manifest.digest
    }
    # Of several names the one that was asked for counts, then one that came from a registry.
    return found.get(text) or next(
        (one for _name, one in sorted(found.items()) if one.ref.startswith("docker://")),
        next(iter(found.values()), None),
    )


class _Known:
    """The regular files of the source image: by content, by path, and by path with all numbers taken for equal."""

    def __init__(self, repository: Repository, image: ObjectDigest) -> None:
        fd = repository.objects.open(image)
        try:
            with ErofsImage.open(fd, repository.algorithm) as opened:
                root = opened.tree()
        finally:
            os.close(fd)
        self.objects = repository.objects
        self._by_digest: dict[ObjectDigest, bytes] = {}
        self._by_path: dict[bytes, Leaf] = {}
        self._alike: dict[bytes, list[bytes]] = {}
        for path, node in walk(root):
            if isinstance(node, Leaf) and node.digest is not None:
                path = path.lstrip(b"/")
                if len(path) <= tardiff.MAX_PATH:
                    self._by_digest.setdefault(node.digest, path)
                    self._by_path[path] = node
                    self._alike.setdefault(_numberless(path), []).append(path)

    def same(self, digest: ObjectDigest) -> bytes | None:
        """A path of the file with this content."""
        return self._by_digest.get(digest)

    def older(self, path: bytes) -> tuple[bytes, Leaf] | None:
        """The file at ``path``, or the only one whose path differs from it in nothing but numbers."""
        if path not in self._by_path:
            alike = self._alike.get(_numberless(path), [])
            if len(alike) != 1:
                return None
            path = alike[0]
        return path, self._by_path[path]


def _numberless(path: bytes) -> bytes:
    return re.sub(rb"[0-9]+", b"0", path)


def _normal(path: bytes) -> bytes:
    """A path of an archive as the tree has it."""
    return b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def _diff(
    repository: Repository, stream: StreamDigest, known: _Known, write: Callable[[bytes], object], level: int | None
) -> None:
    """Write the tar-diff of one stored layer."""
    writer = tardiff.Writer(write, level or _QUICK)
    with repository.open_object_stream(stream, splitstream.LAYER) as opened:
        waiting: list[bytes | splitstream.ExternalRef] = []

        def passing() -> Iterator[bytes | splitstream.ExternalRef]:
            for chunk in opened.chunks():
                waiting.append(chunk)
                yield chunk

        # The reader takes a chunk only when it needs it, so what waits when it yields an entry ends with the entry's
        # own content.
        for entry, content in tar.EntryReader.entries(passing()):
            if isinstance(content, splitstream.ExternalRef):
                waiting.pop()
            for chunk in waiting:
                writer.data(chunk)  # type: ignore[arg-type]  # a reference anywhere else is refused by the reader
            waiting.clear()
            if isinstance(content, splitstream.ExternalRef):
                _file(writer, known, _normal(entry.path), content.digest, level)
        for chunk in waiting:
            writer.data(chunk)  # type: ignore[arg-type]
    writer.finish()


def _file(writer: tardiff.Writer, known: _Known, path: bytes, digest: ObjectDigest, level: int | None) -> None:
    """The content of one file, by the cheapest means."""
    fd = known.objects.open(digest)
    try:
        size = os.fstat(fd).st_size
        same = known.same(digest)
        if same is not None:
            writer.open(same)
            writer.copy(size)
            return
        older = known.older(path) if MIN_PATCHED < size <= MAX_PATCHED else None
        if older is not None and 0 < older[1].size <= MAX_PATCHED:
            frames = _patch(known, older[1], fd, size, level or _level_of(size))
            if frames is not None:
                writer.open(older[0])
                for frame in frames:
                    writer.dict(frame)
                return
        at = 0
        while at < size:
            piece = os.pread(fd, min(_PIECE, size - at), at)
            if not piece:
                raise FormatError(f"Object {digest.hex()} became shorter.", "Check the repository.")
            writer.data(piece)
            at += len(piece)
    finally:
        os.close(fd)


def _level_of(size: int) -> int:
    """The level for a patch that makes a file of ``size`` bytes."""
    return _THOROUGH if size <= _THOROUGH_SIZE else _QUICK


def _patch(known: _Known, older: Leaf, fd: int, size: int, level: int) -> list[bytes] | None:
    """Frames that make the file ``fd`` from ``older``; None unless that is smaller than the file is alone.

    Files that are compressed already (manual pages, change logs) gain some percent only. There are so many of them in
    an image that they are the larger part of its delta, so a small gain counts.
    """
    if older.digest is None:
        return None
    base_fd = known.objects.open(older.digest)
    try:
        base = _mapped(base_fd)
    finally:
        os.close(base_fd)
    data = memoryview(_mapped(fd))
    pieces = [data[at : at + _PATCH] for at in range(0, size, _PATCH)]
    patches = codecs.PatchMaker(base, level)
    frames = [patches.make(piece) for piece in pieces]
    compressor = codecs.zstd_compressor(level=_COMPARE_LEVEL)
    alone = sum(len(compressor.compress(bytes(piece))) for piece in pieces) + len(compressor.flush())
    return frames if sum(map(len, frames)) + _NAMING < alone else None


def _mapped(fd: int) -> Buffer:
    return mmap.mmap(fd, 0, access=mmap.ACCESS_READ)


def _prove(repository: Repository, path: str, image: ObjectDigest, diff_id: str, layer_size: int) -> None:
    """Apply the tar-diff in the file ``path``; DigestMismatch unless it makes the layer."""
    sha256 = hashlib.sha256()
    with (
        open(path, "rb") as file,
        contextlib.closing(SourceFiles(repository.objects, repository.algorithm, image)) as files,
    ):
        for piece in tardiff.apply(file.read, files.open, tardiff.output_limit(layer_size)):
            sha256.update(piece)
    if "sha256:" + sha256.hexdigest() != diff_id:
        raise DigestMismatch(
            f"The delta makes a layer with the digest sha256:{sha256.hexdigest()}.",
            "One of the two images is damaged; check the repository.",
        )


class _Layout:
    """An OCI layout in the making."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(os.path.join(directory, "blobs", "sha256"))

    def path(self, digest: str) -> str:
        return os.path.join(self._directory, "blobs", "sha256", digest[7:])

    @contextlib.contextmanager
    def blob(self) -> Iterator[_Blob]:
        blob = _Blob(os.path.join(self._directory, "blobs", "new"))
        try:
            yield blob
        finally:
            blob.file.close()
        # This is no draft of host/files: nobody looks into the directory before it is handed over, and its path is
        # given away as a whole.
        os.rename(blob.file.name, self.path(blob.digest))

    def put(self, data: bytes) -> str:
        with self.blob() as blob:
            blob.write(data)
        return blob.digest

    def finish(self, manifest: bytes) -> None:
        entry = {
            "mediaType": ocidocuments.OCI_MANIFEST,
            "digest": self.put(manifest),
            "size": len(manifest),
            "annotations": {"org.opencontainers.image.ref.name": LAYOUT_TAG},
        }
        for name, document in (
            ("index.json", {"schemaVersion": 2, "mediaType": ocidocuments.OCI_INDEX, "manifests": [entry]}),
            ("oci-layout", {"imageLayoutVersion": "1.0.0"}),
        ):
            with open(os.path.join(self._directory, name), "w", encoding="ascii") as file:
                json.dump(document, file)


class _Blob:
    def __init__(self, path: str) -> None:
        self.file = open(path, "wb")  # noqa: SIM115 -- closed by who made it
        self.size = 0
        self._sha256 = hashlib.sha256()

    @property
    def digest(self) -> str:
        return "sha256:" + self._sha256.hexdigest()

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self._sha256.update(data)
        self.size += len(data)
