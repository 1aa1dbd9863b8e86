# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The last step of a pull: EROFS images, configuration and manifest of an image whose layers are all there.

``predict`` takes the same decisions as ``publish`` without the bytes; what it says is what ``publish`` then returns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from . import documents
from .plan import Layer, Plan
from .progress import Progress
from .repository import Repository

T = TypeVar("T")


class Images(NamedTuple):
    """Which EROFS images to make of a container: ``plain`` ones to mount, ``bootable`` ones to boot from."""

    plain: bool = True
    bootable: bool = False


def predict(repository: Repository, plan: Plan, images: Images) -> list[str]:
    """The names under ``streams/`` that publish() would register, after those of the missing layers."""
    streams = list(plan.missing())
    layers = {layer.diff_id: _expected(repository, plan, layer) for layer in plan.layers}
    config = plan.config_document
    if config is None or not _leads_to(plan, config, layers) or _missing_images(repository, plan, images, config.refs):
        return [*streams, documents.CONFIG + plan.config_digest, documents.MANIFEST + plan.digest]
    manifest = plan.manifest_document
    if manifest is None or manifest.refs != _manifest_refs(plan, config.stream, layers):
        streams.append(documents.MANIFEST + plan.digest)
    return streams


def publish(repository: Repository, plan: Plan, images: Images, fetched: Mapping[str, bytes], progress: Progress) -> list[str]:
    """Store and name what ``plan`` still lacks; the names under ``streams/`` that changed. ``fetched``: layer stream -> object digest.

    The final streams are written at once, so nothing is left over for a collector.
    """
    tree = [layer.stored or fetched[layer.stream] for layer in plan.layers]
    layers = {layer.diff_id: digest for layer, digest in zip(plan.layers, tree)}
    before = plan.config_document
    current = before is not None and _leads_to(plan, before, layers)
    # Images stay true as long as the layers they were made of do.
    image_refs = {name: digest for name, digest in before.refs.items() if documents.is_image_ref(name)} if before and current and plan.config else {}
    missing = _missing_images(repository, plan, images, image_refs)
    if missing:
        progress.message(f"Making the EROFS image of {plan.request.name}")
        from .assemble import write_images  # late: most runs make none

        plain, bootable = write_images(
            repository,
            tree,
            [version for version, boot in missing if not boot],
            [version for version, boot in missing if boot],
        )
        image_refs.update({documents.image_ref(version): digest for version, digest in plain.items()})
        image_refs.update({documents.image_ref(version, boot=True): digest for version, digest in bootable.items()})
    if before is not None and current and not missing:
        config_stream = before.stream
    else:
        config_stream = documents.store(repository, documents.CONFIG, plan.config_raw, {**layers, **image_refs})
    refs = _manifest_refs(plan, config_stream, layers)
    manifests = {}
    if plan.manifest_document is None or plan.manifest_document.refs != refs:
        manifests[plan.digest] = documents.store(repository, documents.MANIFEST, plan.manifest.raw, refs)
    if before is not None and before.stream != config_stream:
        # Other manifests with the same configuration follow it, or a collector would find theirs without a name.
        for digest, document in documents.manifests_of_config(repository, plan.config_digest, config_stream).items():
            if digest != plan.digest:
                moved = {**document.refs, documents.CONFIG_REF + plan.config_digest: config_stream}
                manifests[digest] = documents.store(repository, documents.MANIFEST, document.raw, moved)
    plan.image_refs = image_refs
    settled = before is not None and before.stream == config_stream and not manifests
    if not settled:
        # The barrier: what the names below lead to, directly or through others, is on the disk before they exist.
        repository.sync()
    for image in image_refs.values():
        repository.link_image(image)
    return [] if settled else documents.replace(repository, plan.config_digest, config_stream, manifests)


def image_id(repository: Repository, plan: Plan, boot: bool) -> str | None:
    """The EROFS image (hex) in the repository's own format, None if the image has none."""
    for version in repository.metadata.erofs_formats:
        digest = plan.image_refs.get(documents.image_ref(version, boot))
        if digest is not None:
            return digest.hex()
    return None


def _missing_images(repository: Repository, plan: Plan, images: Images, refs: Mapping[str, bytes]) -> list[tuple[int, bool]]:
    """Format and kind of every image that is wanted and not there."""
    if plan.config is None:
        return []
    formats = repository.metadata.erofs_formats
    # A configuration has one place for formats 0 and 1: where both are wanted, 1 takes it, and 0 would be nobody's.
    wanted = [(version, boot) for boot, yes in ((False, images.plain), (True, images.bootable)) if yes for version in formats if version or 1 not in formats]
    missing = []
    for version, boot in wanted:
        digest = refs.get(documents.image_ref(version, boot))
        if digest is None or not repository.objects.contains(digest):
            missing.append((version, boot))
    return missing


def _expected(repository: Repository, plan: Plan, layer: Layer) -> bytes | None:
    """The stream object a layer has, or will most likely get: an import is deterministic, so one that vanished comes back the same."""
    if layer.stored is not None:
        return layer.stored
    if repository.stream(layer.stream) is not None:
        return None  # a wrong one that is replaced
    return plan.config_document.refs.get(layer.diff_id) if plan.config_document else None


def _leads_to(plan: Plan, document: documents.Document, layers: Mapping[str, bytes | None]) -> bool:
    """Whether a stored configuration has exactly these layers."""
    if plan.config is None:
        # The empty configuration is shared by many artifacts and cannot lead to the layers of all: their manifests do.
        return True
    return {name: digest for name, digest in document.refs.items() if not documents.is_image_ref(name)} == layers


def _manifest_refs(plan: Plan, config: bytes, layers: Mapping[str, T]) -> dict[str, bytes | T]:
    return {documents.CONFIG_REF + plan.config_digest: config, **layers}
