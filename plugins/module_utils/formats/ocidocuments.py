# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""OCI platforms, descriptors, manifests, indexes and configurations as typed, bounded values. No I/O.

Documents come from strangers. Whatever the bytes are, the functions here either return a value that keeps every promise
of its type or raise an engine error; nothing in a document decides how much memory or time is spent beyond the bounds
below. The bytes are kept as they came, since only they have the digest that names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import InvalidDocument, InvalidPlatform, PlatformNotFound, UnsupportedMediaType
from .digests import ANY_DIGEST, digest_of, is_digest
from .strictjson import load_json

# containers/image and the distribution registry take manifests of at most 4 MiB; configurations are bounded likewise,
# with room for what a conversion from Docker's format adds.
MAX_MANIFEST = 4 * 1024 * 1024
MAX_CONFIG = 8 * 1024 * 1024
MAX_LAYERS = 4096
MAX_INDEX = 4096
MAX_SIZE = 2**53 - 1  # the largest integer that every JSON implementation keeps exact
MAX_TEXT = 4096
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
_COMPRESSION = {
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.oci.image.layer.nondistributable.v1.tar": "none",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
    "application/vnd.docker.image.rootfs.foreign.diff.tar": "none",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd": "zstd",
}

_MEDIA_TYPE = re.compile(r"[!-~]{1,255}\Z")
_PLATFORM_PART = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_ARCHITECTURES = {
    "x86_64": ("amd64", ""),
    "x86-64": ("amd64", ""),
    "aarch64": ("arm64", ""),
    "armhf": ("arm", "v7"),
    "armel": ("arm", "v6"),
    "i386": ("386", ""),
    "i686": ("386", ""),
}
# The variants of an architecture, most capable first: each runs what was built for those after it.
_VARIANTS = {"arm": ("v8", "v7", "v6", "v5"), "arm64": ("v9", "v8"), "amd64": ("v4", "v3", "v2", "v1")}


@dataclass(frozen=True)
class Platform:
    """Operating system, processor architecture and variant in Go's words: ``linux``, ``arm64``, ``v8`` (the variant may
    be empty).
    """

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def candidates(self) -> tuple[Platform, ...]:
        """The platforms whose images run here, best first: the variant itself, lesser ones, none named.

        Where no variant was asked for, an image without one comes first, then any.
        """
        order = _VARIANTS.get(self.architecture, ())
        if not self.variant:
            # skopeo's order for arm; for the others the variant that asks least of the processor.
            variants = ("", *(order if self.architecture == "arm" else order[::-1]))
        elif self.variant in order:
            variants = (*order[order.index(self.variant) :], "")
        else:
            variants = (self.variant, "")
        return tuple(replace(self, variant=variant) for variant in variants)

    def accepts(self, other: Platform) -> bool:
        """Whether an image built for ``other`` is what was asked for: v7 of arm takes v6, too, but never v8."""
        if not self.variant:
            return (self.os, self.architecture) == (other.os, other.architecture)
        return other in self.candidates()


def parse_platform(text: str) -> Platform:
    """The platform behind ``os/architecture[/variant]``; the kernel's names (``x86_64``, ``aarch64``) are taken too.

    Raises InvalidPlatform, whose message shows the form, for anything else.
    """
    parts = text.split("/") if isinstance(text, str) else []
    if not 2 <= len(parts) <= 3 or not all(_PLATFORM_PART.match(part) for part in parts):
        raise InvalidPlatform(
            f"The platform {text!r:.200} cannot be understood.",
            "Write it as os/architecture[/variant], for example linux/amd64 or linux/arm64/v8.",
        )
    architecture, variant = _ARCHITECTURES.get(parts[1], (parts[1], ""))
    return Platform(parts[0], architecture, parts[2] if len(parts) == 3 else variant)


@dataclass(frozen=True)
class Descriptor:
    """What names a piece of content: media type, digest as ``sha256:<hex>`` and size in bytes (OCI image spec, "Content
    Descriptors").
    """

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)
    platform: Platform | None = None
    artifact_type: str = ""


@dataclass(frozen=True)
class Manifest:
    """One image's or artifact's manifest. ``raw`` are the bytes as they came, ``digest`` is their ``sha256:<hex>``."""

    raw: bytes = field(repr=False)
    digest: str
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    artifact_type: str = ""
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)
    subject: Descriptor | None = None


@dataclass(frozen=True)
class Index:
    """A list of manifests for several platforms (OCI image index, Docker manifest list)."""

    raw: bytes = field(repr=False)
    digest: str
    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Config:
    """A container image's configuration; ``created`` is the text as it came, empty where there is none."""

    raw: bytes = field(repr=False)
    digest: str
    diff_ids: tuple[str, ...]
    architecture: str
    os: str
    variant: str
    created: str
    labels: Mapping[str, str] = field(default_factory=dict, compare=False)

    @property
    def platform(self) -> Platform:
        return Platform(self.os, self.architecture, self.variant)


def layer_compression(media_type: str) -> str | None:
    """``none``, ``gzip`` or ``zstd`` for the tar layers of OCI and Docker images; None means that the content is no tar
    layer.
    """
    return _COMPRESSION.get(media_type)


def is_container(manifest: Manifest) -> bool:
    """Whether the manifest describes a container image; everything else is an artifact whose layers are plain blobs."""
    return manifest.config.media_type in (OCI_CONFIG, DOCKER_CONFIG)


def pairs(manifest: Manifest, config: Config) -> list[tuple[Descriptor, str]]:
    """A container's layers with their diff_ids, lowest first. Raises InvalidDocument and UnsupportedMediaType.

    A layer that is no tar is refused: stored as a blob it would stand where another image expects the tar with that
    diff_id.
    """
    if len(manifest.layers) != len(config.diff_ids):
        raise InvalidDocument(
            f"The manifest {manifest.digest} lists {len(manifest.layers)} layers, its configuration "
            f"{len(config.diff_ids)}.",
            "The image is damaged; ask its publisher.",
        )
    for layer in manifest.layers:
        if layer_compression(layer.media_type) is None:
            raise UnsupportedMediaType(
                f"The layer {layer.digest} of the container image {manifest.digest} has the media type "
                f"{layer.media_type}.",
                "Only tar layers, plain or compressed with gzip or zstd, can be unpacked; encrypted layers must be "
                "decrypted first.",
            )
    return list(zip(manifest.layers, config.diff_ids))


def check_platform(config: Config, wanted: Platform) -> None:
    """Raise PlatformNotFound if the image is for another platform than ``wanted``.

    skopeo chooses a platform only within an index: a single manifest is handed out whatever was asked for.
    """
    if not wanted.accepts(config.platform):
        raise PlatformNotFound(
            f"The image is for {str(config.platform) or 'no platform'}, not for {wanted}.",
            "Choose an image or a platform that fit each other.",
        )


def parse_manifest(raw: bytes) -> Manifest:
    """The manifest in ``raw`` (OCI image manifest or Docker schema 2). Raises InvalidDocument and
    UnsupportedMediaType.
    """
    what = "manifest"
    document = _load(
        raw,
        MAX_MANIFEST,
        what,
        ("schemaVersion", "mediaType", "config", "layers", "artifactType", "annotations", "subject"),
    )
    media_type = _kind(document, what, (OCI_MANIFEST, DOCKER_MANIFEST), OCI_MANIFEST)
    if document.get("manifests") is not None:
        raise InvalidDocument(
            "The manifest has a list of manifests too, so that different programs would read different images."
        )
    layers = _list(document.get("layers"), MAX_LAYERS, "layers of the manifest")
    subject = document.get("subject")
    return Manifest(
        raw=raw,
        digest=digest_of(raw),
        media_type=media_type,
        config=_descriptor(document.get("config"), "config of the manifest"),
        layers=tuple(_descriptor(layer, f"layer {number} of the manifest") for number, layer in enumerate(layers)),
        artifact_type=_text(document.get("artifactType"), "artifactType of the manifest"),
        annotations=_texts(document.get("annotations"), "annotations of the manifest"),
        subject=None if subject is None else _descriptor(subject, "subject of the manifest"),
    )


def parse_index(raw: bytes) -> Index:
    """The list of manifests in ``raw`` (OCI image index or Docker manifest list). Raises InvalidDocument and
    UnsupportedMediaType.
    """
    what = "index"
    document = _load(
        raw, MAX_MANIFEST, what, ("schemaVersion", "mediaType", "manifests", "artifactType", "annotations", "subject")
    )
    media_type = _kind(document, what, (OCI_INDEX, DOCKER_LIST), OCI_INDEX)
    if document.get("layers") is not None or document.get("config") is not None:
        raise InvalidDocument(
            "The index has layers or a configuration too, so that different programs would read different images."
        )
    manifests = _list(document.get("manifests"), MAX_INDEX, "manifests of the index")
    if document.get("subject") is not None:
        _descriptor(document["subject"], "subject of the index")
    return Index(
        raw=raw,
        digest=digest_of(raw),
        media_type=media_type,
        manifests=tuple(_descriptor(item, f"entry {number} of the index") for number, item in enumerate(manifests)),
        annotations=_texts(document.get("annotations"), "annotations of the index"),
    )


def is_index(raw: bytes) -> bool:
    """Whether ``raw`` claims to be an index rather than a manifest; raises InvalidDocument if it is no JSON object."""
    document = _load(raw, MAX_MANIFEST, "document", ())
    kind = document.get("mediaType")
    if isinstance(kind, str) and kind:
        return kind in (OCI_INDEX, DOCKER_LIST)
    # A list that is null is none, unless nothing else tells what it is.
    return document.get("manifests") is not None or ("manifests" in document and document.get("config") is None)


def parse_config(raw: bytes) -> Config:
    """The configuration of a container image (OCI image configuration, Docker image JSON). Raises InvalidDocument and
    UnsupportedMediaType.
    """
    document = _load(raw, MAX_CONFIG, "configuration", ("architecture", "os", "variant", "created", "config", "rootfs"))
    rootfs = _object(document.get("rootfs"), "rootfs of the configuration")
    if rootfs.get("type") != "layers":
        raise InvalidDocument("The rootfs of the configuration is not of the type layers.")
    diff_ids = _list(rootfs.get("diff_ids"), MAX_LAYERS, "diff_ids of the configuration")
    settings = document.get("config")
    labels = None if settings is None else _object(settings, "config member of the configuration").get("Labels")
    return Config(
        raw=raw,
        digest=digest_of(raw),
        diff_ids=tuple(_digest(item, f"diff_id {number} of the configuration") for number, item in enumerate(diff_ids)),
        architecture=_text(document.get("architecture"), "architecture of the configuration"),
        os=_text(document.get("os"), "os of the configuration"),
        variant=_text(document.get("variant"), "variant of the configuration"),
        created=_text(document.get("created"), "created of the configuration"),
        labels=_texts(labels, "labels of the configuration"),
    )


def _load(raw: bytes, limit: int, what: str, known: Sequence[str]) -> dict[str, Any]:
    document = _object(load_json(raw, limit, what), what)
    if known:
        # Go's decoder, and so skopeo, takes "Layers" for "layers": a document that uses that means different things to
        # different readers.
        folded = {name.casefold(): name for name in known}
        for key in document:
            if folded.get(key.casefold(), key) != key:
                raise InvalidDocument(
                    f"The {what} writes {folded[key.casefold()]!r} as {key!r:.80}.",
                    "The image is damaged or made to deceive; ask its publisher.",
                )
    return document


def _kind(document: dict[str, Any], what: str, kinds: tuple[str, ...], default: str) -> str:
    version = document.get("schemaVersion")
    media_type = _text(document.get("mediaType"), f"mediaType of the {what}") or default
    if version == 1 and version.__class__ is int:
        raise UnsupportedMediaType(
            f"The {what} has Docker's old schema 1.", "Push the image again with a current tool."
        )
    if version != 2 or version.__class__ is not int:
        raise InvalidDocument(f"The {what} has the schemaVersion {version!r:.50} instead of 2.")
    if media_type not in kinds:
        raise UnsupportedMediaType(
            f"The {what} has the media type {media_type!r:.300}.", f"Known are {' and '.join(kinds)}."
        )
    return media_type


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidDocument(f"The {what} is missing or not a JSON object.")
    return value


def _list(value: Any, limit: int, what: str) -> list[Any]:
    """A list; null and nothing at all stand for an empty one, as Go reads and writes them."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidDocument(f"The {what} are not a JSON array.")
    if len(value) > limit:
        raise InvalidDocument(f"There are {len(value)} {what}; at most {limit} are taken.")
    return value


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise InvalidDocument(f"The {what} is not a text of at most {MAX_TEXT} characters.")
    return value


def _texts(value: Any, what: str) -> dict[str, str]:
    """A map of texts; null stands for the empty text and the empty map, as Go writes them."""
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(item is None or isinstance(item, str) for item in value.values()):
        raise InvalidDocument(f"The {what} are not a JSON object of texts.")
    return {key: item or "" for key, item in value.items()}


def _digest(value: Any, what: str) -> str:
    if isinstance(value, str) and is_digest(value):
        return value
    if isinstance(value, str) and len(value) < 300 and ANY_DIGEST.match(value) and not value.startswith("sha256:"):
        raise UnsupportedMediaType(f"The {what} has the digest {value}.", "Only sha256 digests can be stored.")
    raise InvalidDocument(f"The {what} has no valid digest: {value!r:.200}.")


def _descriptor(value: Any, what: str) -> Descriptor:
    members = _object(value, what)
    media_type = members.get("mediaType")
    if not isinstance(media_type, str) or not _MEDIA_TYPE.match(media_type):
        raise InvalidDocument(f"The {what} has no valid media type: {media_type!r:.200}.")
    size = members.get("size")
    if size.__class__ is not int or not 0 <= size <= MAX_SIZE:
        raise InvalidDocument(f"The {what} has no valid size: {size!r:.100}.")
    platform = members.get("platform")
    return Descriptor(
        media_type=media_type,
        digest=_digest(members.get("digest"), what),
        size=size,
        annotations=_texts(members.get("annotations"), f"annotations of the {what}"),
        platform=None if platform is None else _platform(platform, what),
        artifact_type=_text(members.get("artifactType"), f"artifactType of the {what}"),
    )


def _platform(value: Any, what: str) -> Platform:
    members = _object(value, f"platform of the {what}")
    return Platform(
        os=_text(members.get("os"), f"os of the {what}"),
        architecture=_text(members.get("architecture"), f"architecture of the {what}"),
        variant=_text(members.get("variant"), f"variant of the {what}"),
    )
