# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What is told of an image that was pulled, would be pulled, or lost its name.

The default instance of each class is one of which nothing is known; what cannot be known is None, never 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..formats import ocidocuments

TEXTS_LIMIT = 64 * 1024
"""Bytes of labels, or of annotations, that a result shows of one image: its author may have put megabytes there."""
VERSION_LABEL = "org.opencontainers.image.version"


@dataclasses.dataclass
class Stats:
    """Figures of a run. Bytes are bytes, ``seconds`` are those of each phase and their ``total``."""

    layers: int | None = None
    layers_already_present: int | None = None
    objects_copied: int | None = None
    objects_already_present: int | None = None
    bytes_copied: int | None = None
    bytes_inlined: int | None = None
    bytes_fetched: int | None = None
    peers: list[dict[str, Any]] | None = None
    retries: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: {"total": 0.0})


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One layer: digests as ``sha256:<hex>``, bytes, ``present`` or ``new``, and where it comes from;
    None where check mode cannot know.
    """

    digest: str
    diff_id: str
    size: int
    media_type: str
    status: str | None
    bytes_to_fetch: int | None
    source: str | None


@dataclasses.dataclass(frozen=True)
class About:
    """What an image says of itself."""

    kind: str | None = None
    platform: str | None = None
    version: str | None = None
    created: str | None = None
    labels: dict[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class ImageResult:
    """What modules return of an image. Digests are ``sha256:<hex>``, image ids hexadecimal object digests."""

    name: str | None = None
    ref: str | None = None
    digest: str | None = None
    registry_digest: str | None = None
    index_digest: str | None = None
    config_digest: str | None = None
    previous_digest: str | None = None
    tags: list[str] = dataclasses.field(default_factory=list)
    image_id: str | None = None
    boot_image_id: str | None = None
    about: About = About()
    layers: list[LayerResult] | None = None
    bytes_exact: bool | None = None
    streams: list[str] | None = None
    stats: Stats = dataclasses.field(default_factory=Stats)
    policy: str | None = None
    skopeo_version: str | None = None
    protocol_version: str | None = None

    def values(self) -> dict[str, Any]:
        """As plain values, all on one level but ``layers`` and ``stats``."""
        found = dataclasses.asdict(self)
        found.update(found.pop("about"))
        return found


@dataclasses.dataclass(frozen=True)
class Report:
    """A result and what a module makes of it: whether anything changed, and what the name was and led to before."""

    result: ImageResult
    changed: bool
    previous_name: str | None = None
    previous_layers: list[str] = dataclasses.field(default_factory=list)


def about(manifest: ocidocuments.Manifest, config: ocidocuments.Config | None) -> About:
    """What the documents of an image say of it; an artifact has a kind only."""
    if config is None:
        return About(kind="artifact", labels={})
    labels = bounded(config.labels)[0]
    return About(
        kind="container",
        platform=str(config.platform) or None,
        version=labels.get(VERSION_LABEL),
        created=config.created or None,
        labels=labels,
    )


def bounded(texts: Mapping[str, str]) -> tuple[dict[str, str], bool]:
    """The texts as far as the limit allows, the last one cut, and whether something is missing."""
    kept: dict[str, str] = {}
    left = TEXTS_LIMIT
    for key, value in texts.items():
        left -= len(key.encode("utf-8", "replace"))
        if left < 0:
            return kept, True
        raw = value.encode("utf-8", "replace")
        if len(raw) > left:
            kept[key] = raw[:left].decode("utf-8", "ignore")
            return kept, True
        kept[key] = value
        left -= len(raw)
    return kept, False
