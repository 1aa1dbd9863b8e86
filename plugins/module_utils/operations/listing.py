# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What images a repository holds. Reads only, and needs no right but to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..formats import ocidocuments, repolayout
from ..store import imagestreams, namerecords
from ..errors import OF_THIS_PROCESS, EngineError, FormatError, ImageNotFound
from ..store.repository import Foreseen, Repository
from ..pull.results import bounded


VERSION_LABEL = "org.opencontainers.image.version"
UNKNOWN: dict[str, Any] = dict.fromkeys(
    (
        *("ref", "records", "digest", "config_digest", "media_type", "kind", "artifact_type", "platform", "os"),
        *("architecture", "created", "labels", "annotations", "truncated", "layers", "size", "image_id"),
        *("boot_image_id", "image_ids"),
    )
)
"""An image of which nothing is known yet."""


def list_images(repository: Repository, name: str = "", digest: str = "") -> tuple[list[dict[str, Any]], list[str]]:
    """The images under a name, with a manifest digest (``sha256:<hex>``; also without a name), or all that have names.

    One entry a manifest, sorted by its first name, and a list of complaints about names whose images cannot be read. A
    name or digest that is asked for and not there gives an empty list. Of an image that is only foreseen nothing but
    names and digest is known, and of some not even that.
    """
    names: dict[str, list[str]] = {}
    for tag, manifest in sorted(repository.tags().items()):
        names.setdefault(manifest, []).append(tag)
    name = namerecords.spelled(repository, name) if name else ""
    wanted: Sequence[str]
    foreseen = {manifest for manifest in repository.foreseen.names.values() if manifest}
    foreseen = {manifest for manifest in foreseen if repository.stream(repolayout.manifest_stream(manifest)) is None}
    if digest:
        there = digest in foreseen or repository.stream(repolayout.manifest_stream(digest)) is not None
        wanted = [digest] if there else []
    else:
        wanted = [manifest for manifest, tags in names.items() if not name or name in tags]
    found, complaints = [], []
    for manifest in wanted:
        try:
            tags = names.get(manifest, [])
            if manifest in foreseen:
                found.append({"names": tags, **UNKNOWN, "digest": Foreseen.known(manifest)})
                continue
            found.append({"names": tags, **_origins(repository, tags), **describe_image(repository, manifest)})
        except OF_THIS_PROCESS:
            raise  # not the image's fault, and no other can be read either
        except EngineError as error:
            complaints.append(f"{', '.join(names.get(manifest, [])) or manifest}: {error}")
    return sorted(found, key=lambda image: (image["names"] or [""])[0]), complaints


def describe_image(repository: Repository, digest: str) -> dict[str, Any]:
    """The image with the manifest ``digest``, in plain values. Raises ImageNotFound and FormatError."""
    document = imagestreams.read(repository, imagestreams.MANIFEST, digest)
    if document is None:
        raise ImageNotFound(f"The repository {repository.path} has no manifest {digest}.", "Pull the image again.")
    manifest = ocidocuments.parse_manifest(document.raw)
    config_digest = manifest.config.digest
    stream = document.stream_of(imagestreams.CONFIG_REF + config_digest)
    if stream is None:
        raise FormatError(f"The manifest {digest} does not lead to its configuration.", "Pull the image again.")
    config_document = imagestreams.read_object(repository, imagestreams.CONFIG, config_digest, stream)
    container = ocidocuments.is_container(manifest)
    config = ocidocuments.parse_config(config_document.raw) if container else None
    diff_ids = (
        [diff_id for _layer, diff_id in ocidocuments.pairs(manifest, config)]
        if config
        else [None] * len(manifest.layers)
    )
    labels, labels_cut = bounded(config.labels if config else {})
    annotations, annotations_cut = bounded(manifest.annotations)
    image_ids = {name: ref.hex() for name, ref in config_document.refs.items() if imagestreams.is_image_ref(name)}
    return {
        "digest": digest,
        "config_digest": config_digest,
        "media_type": manifest.media_type,
        "kind": "container" if container else "artifact",
        "artifact_type": manifest.artifact_type or (None if container else manifest.config.media_type),
        "platform": (str(config.platform) or None) if config else None,
        "os": (config.os or None) if config else None,
        "architecture": (config.architecture or None) if config else None,
        "created": (config.created or None) if config else None,
        "labels": labels,
        "annotations": annotations,
        "truncated": ["labels"] * labels_cut + ["annotations"] * annotations_cut,
        "layers": [
            {"digest": layer.digest, "diff_id": diff_id, "size": layer.size, "media_type": layer.media_type}
            for layer, diff_id in zip(manifest.layers, diff_ids)
        ],
        "size": sum(layer.size for layer in manifest.layers),
        "image_id": _first(image_ids, repository, boot=False),
        "boot_image_id": _first(image_ids, repository, boot=True),
        "image_ids": image_ids,
    }


def _origins(repository: Repository, names: Sequence[str]) -> dict[str, Any]:
    """What is remembered of where the names come from: ``ref`` is that of the first one with a record."""
    if any(name in repository.foreseen.names for name in names):
        return {"ref": None, "records": None}  # a record has a time, which is still to come
    records = {name: namerecords.read(repository, name) for name in names}
    known = {name: dataclasses.asdict(record) for name, record in records.items() if record is not None}
    return {"ref": next((record["ref"] for record in known.values()), None), "records": known}


def _first(image_ids: dict[str, str], repository: Repository, boot: bool) -> str | None:
    """The image of the repository's own format."""
    for version in repository.metadata.erofs_formats:
        found = image_ids.get(imagestreams.image_ref(version, boot))
        if found:
            return found
    return None
