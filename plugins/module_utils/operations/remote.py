# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What a reference means now, wherever the image is, without a repository. Fetches documents, and no layer."""

from __future__ import annotations

from typing import Any

from ..errors import doing
from ..formats import ocidocuments
from ..formats.ocidocuments import Descriptor
from ..formats.reference import Reference, parse_reference
from ..progress import Progress
from ..pull.sources import open_source
from ..source.options import ProxyOptions
from ..source.source import Patient


def look_up(ref: str, options: ProxyOptions, retries: int, progress: Progress) -> dict[str, Any]:
    """The image that ``ref`` means for ``options.platform`` (None: this host's), in plain values.

    ``manifests`` is what the outermost index lists, None if there is none or if the image is not in a registry. Raises
    InvalidReference and whatever the source says.
    """
    # Outside of the block that names the reference in errors: one that cannot be understood may hold a password.
    reference = parse_reference(ref)
    with doing(f"Looking up {reference.original}"):
        source = Patient(open_source(options, reference), retries, progress)
        try:
            resolved = source.resolve(reference)
            manifest = ocidocuments.parse_manifest(resolved.raw)
            config = None
            if ocidocuments.is_container(manifest):
                config = ocidocuments.parse_config(source.config(resolved, manifest))
            listed = _listed(source, options, reference, resolved.index_digest)
            facts = source.facts()
        finally:
            source.close()
    platform = resolved.platform or (config.platform if config else None)
    return {
        "ref": reference.original,
        "pinned": reference.pinned(resolved.digest).text if reference.is_remote else None,
        "digest": manifest.digest,
        "registry_digest": resolved.digest,
        "index_digest": resolved.index_digest,
        "config_digest": manifest.config.digest,
        "media_type": manifest.media_type,
        "kind": "container" if config else "artifact",
        "artifact_type": manifest.artifact_type or (None if config else manifest.config.media_type),
        "platform": (str(platform) or None) if platform else None,
        "created": (config.created or None) if config else None,
        "labels": dict(config.labels) if config else {},
        "annotations": dict(manifest.annotations),
        "layers": [_plain(layer) for layer in manifest.layers],
        "size": sum(layer.size for layer in manifest.layers),
        "manifests": listed,
        "policy": facts.policy,
        "skopeo_version": facts.skopeo_version,
    }


def _listed(
    source: Patient, options: ProxyOptions, reference: Reference, index: str | None
) -> list[dict[str, Any]] | None:
    if index is None or not reference.is_remote:
        return None
    from ..source.skopeo import top_digest  # late: an image that has no index is looked up without

    raw = source.again(lambda: top_digest(options, reference.pinned(index))[1])
    return [
        {**_plain(entry), "platform": (str(entry.platform) or None) if entry.platform else None}
        for entry in ocidocuments.parse_index(raw).manifests
    ]


def _plain(descriptor: Descriptor) -> dict[str, Any]:
    return {"digest": descriptor.digest, "size": descriptor.size, "media_type": descriptor.media_type}
