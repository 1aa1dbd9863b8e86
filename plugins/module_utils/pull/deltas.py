# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Delta artifacts: what they say, where they are found, and which one serves a plan.

An artifact holds, for layers of its *target* image, tar-diffs against the merged tree of its *source* image. It is an
untrusted transport like any other: what it delivers becomes a layer only if the whole tar has the diff_id. So nothing
here is a proof. The checks here only spare fetching a delta that cannot serve.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence

from ..formats.digests import ObjectDigest
from ..errors import EngineError
from ..formats import digests, ocidocuments, tardiff
from ..formats.ocidocuments import Descriptor
from ..formats.reference import Reference, parse_reference
from ..source.source import Patient
from ..store import imagestreams, namerecords
from ..store.repository import Repository
from .plan import LayerDelta, Plan

ARTIFACT_TYPE = "application/vnd.io.github.containers.oci-delta.v1"
_PREFIX = "io.github.containers.delta."
TARGET = _PREFIX + "target"
SOURCE_CONFIG = _PREFIX + "source-config"
CONTENT = _PREFIX + "content"
TO = _PREFIX + "to"
IMAGE_MANIFEST, IMAGE_CONFIG, IMAGE_LAYER = "image-manifest", "image-config", "image-layer"

AUTO = "auto"
# Other images of the same repository, beside the one under the name, whose deltas are asked for.
_RELATIVES = 3

EMPTY_CONFIG = b"{}"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A delta as its manifest tells: ``target`` is the manifest digest it leads to, ``source_config`` the configuration
    digest of the image it starts from, ``layers`` the tar-diffs by the digest of the layer's blob they stand for.
    """

    target: str
    source_config: str
    layers: Mapping[str, Descriptor]


def parse(manifest: ocidocuments.Manifest) -> Artifact | None:
    """What ``manifest`` says of a delta; None if it is none or lacks what makes one useful."""
    if manifest.artifact_type != ARTIFACT_TYPE:
        return None
    embedded = [layer.digest for layer in manifest.layers if layer.annotations.get(CONTENT) == IMAGE_MANIFEST]
    # The embedded manifest's descriptor has the target's digest, so it need not be fetched.
    target = embedded[0] if len(embedded) == 1 else manifest.annotations.get(TARGET, "")
    source_config = manifest.annotations.get(SOURCE_CONFIG, "")
    if not digests.is_digest(target) or not digests.is_digest(source_config):
        return None
    layers = {
        layer.annotations[TO]: layer
        for layer in manifest.layers
        if layer.annotations.get(CONTENT) == IMAGE_LAYER
        and layer.media_type == tardiff.MEDIA_TYPE
        and TO in layer.annotations
    }
    return Artifact(target, source_config, layers)


def compose(
    target: Descriptor, config: Descriptor, source_config: str, layers: Sequence[tuple[str, Descriptor]]
) -> bytes:
    """The manifest of a delta: ``target`` and ``config`` describe the embedded documents, ``layers`` are pairs of blob
    digest and tar-diff. The registry's referrers API lists it under its subject, the target.
    """

    def describe(descriptor: Descriptor, **annotations: str) -> dict[str, object]:
        found: dict[str, object] = {
            "mediaType": descriptor.media_type,
            "digest": descriptor.digest,
            "size": descriptor.size,
        }
        if annotations:
            found["annotations"] = {_PREFIX + key: value for key, value in annotations.items()}
        return found

    empty = Descriptor(ocidocuments.OCI_EMPTY, digests.EMPTY_DIGEST, len(EMPTY_CONFIG))
    document = {
        "schemaVersion": 2,
        "mediaType": ocidocuments.OCI_MANIFEST,
        "artifactType": ARTIFACT_TYPE,
        "config": describe(empty),
        "layers": [
            describe(target, content=IMAGE_MANIFEST),
            describe(config, content=IMAGE_CONFIG),
            *(describe(layer, content=IMAGE_LAYER, to=blob) for blob, layer in layers),
        ],
        "subject": describe(target),
        "annotations": {TARGET: target.digest, SOURCE_CONFIG: source_config},
    }
    return json.dumps(document, separators=(",", ":")).encode()


def tag(target: str, source: str) -> str:
    """The tag of the delta between two manifests, both by the digests that the registry knows (``sha256:<hex>``)."""
    return f"sha256-{target[7:]}.delta-{source[7:31]}"


def beside(reference: Reference, target: str, source: str) -> Reference:
    """Where the delta between two manifests lies beside the image ``reference`` in a registry."""
    return parse_reference(f"docker://{reference.registry}/{reference.repository}:{tag(target, source)}")


def choose(
    repository: Repository, plan: Plan, wanted: Sequence[str], open_source: Callable[[Reference], Patient]
) -> None:
    """Let missing layers of ``plan`` come from deltas, where usable ones are found in the order of ``wanted``.

    Asks nobody unless a layer is missing. Nothing is said of a delta that ``auto`` does not find or cannot use; if one
    that was named cannot be used, the plan gets a warning.
    """
    if plan.config is None or plan.source is None or not plan.missing():
        return
    for text in wanted:
        candidates = _beside(repository, plan) if text == AUTO else [parse_reference(text)]
        for reference in candidates:
            if not any(layer.delta is None for layer in plan.missing().values()):
                return
            try:
                complaint = _take(repository, plan, open_source(reference), reference)
            except EngineError as error:
                complaint = error.text
            if complaint and text != AUTO:
                plan.warnings.append(f"The delta {reference.text} is not used: {complaint}")
            if not complaint and text == AUTO:
                break


def _beside(repository: Repository, plan: Plan) -> list[Reference]:
    if not plan.reference.is_remote:
        return []
    if plan.previous is None:
        return []
    record = plan.standing.record
    known = [(record.registry_digest if record else None) or plan.previous]
    known += [digest for digest in _relatives(repository, plan) if digest not in known][:_RELATIVES]
    return [beside(plan.reference, plan.registry_digest, digest) for digest in known if digest != plan.registry_digest]


def _relatives(repository: Repository, plan: Plan) -> list[str]:
    """Digests, as the registry knows them, of other stored images of the same repository there; the newest first."""
    found = []
    for name, record in namerecords.records(repository).items():
        if (
            name != plan.standing.name
            and record.manifest != plan.digest
            and _same_repository(record.ref, plan.reference)
        ):
            found.append((record.since, record.registry_digest or record.manifest))
    return list(dict.fromkeys(digest for _since, digest in sorted(found, reverse=True)))


def _same_repository(text: str, reference: Reference) -> bool:
    try:
        other = parse_reference(text)
    except EngineError:
        return False
    return (other.registry, other.repository) == (reference.registry, reference.repository)


def _take(repository: Repository, plan: Plan, source: Patient, reference: Reference) -> str:
    """Use the delta at ``reference`` for the missing layers that it makes cheaper; return why not, empty if used."""
    resolved = source.resolve(reference)
    artifact = parse(ocidocuments.parse_manifest(resolved.raw))
    if artifact is None:
        return "it is no delta artifact."
    if artifact.target not in (plan.digest, plan.registry_digest):
        return f"it leads to {artifact.target}, not to {plan.digest}."
    image = source_image(repository, artifact.source_config)
    if image is None:
        return f"the image it starts from, with the configuration {artifact.source_config}, is not stored."
    used = False
    for number, layer in enumerate(plan.layers):
        diff = artifact.layers.get(layer.blob.digest)
        if layer.stored is not None or layer.delta is not None or layer.compression is None or diff is None:
            continue
        if diff.size < layer.source.size:
            plan.layers[number] = dataclasses.replace(layer, delta=LayerDelta(diff, source, resolved.reference, image))
            used = True
    return "" if used else "no missing layer becomes smaller by it."


def source_image(repository: Repository, config: str) -> ObjectDigest | None:
    """The EROFS image (object digest) of the stored configuration ``config``; None if there is none to read from."""
    document = imagestreams.usable(repository, imagestreams.CONFIG, config)
    for version in (2, 1):
        image = document.refs.get(imagestreams.image_ref(version)) if document else None
        if image is not None and repository.objects.contains(image):
            return image
    return None
