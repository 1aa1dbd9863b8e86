# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What a reference means now, what of it the repository already holds, and what a pull would therefore do. Changes
nothing.
"""

from __future__ import annotations

import dataclasses

from ..formats.repolayout import StreamName
from ..formats import ocidocuments, repolayout
from ..host import machine
from ..store import imagestreams, namerecords, proofs
from ..errors import UnexpectedDigest
from ..formats.digests import ObjectDigest, StreamDigest, is_digest
from ..formats.reference import Reference, parse_reference
from ..store.namerecords import NameRecord
from ..store.repository import Foreseen, Repository
from ..source.source import Patient

PRESENT = "present"
NEW = "new"


@dataclasses.dataclass(frozen=True)
class Request:
    """One image: the reference as the user wrote it, the name to give it, and what it must be (``sha256:<hex>``,
    ``os/arch``). ``former`` are other names under which it may stand now, and which give way to ``name``. ``username``
    and ``password``, or ``auth_file``, are for the registry of this image.

    ``tags`` are further names that it gets; ``gives_up`` is a name that is removed once the image has ``name``.
    ``local`` says that ``ref`` is no reference but a digest, or a name, in the repository itself. ``erofs`` and
    ``bootable`` say which EROFS images to make, None as the pull's options say. ``place`` is the reference of a copy
    that is read instead, empty without one.
    """

    ref: str
    name: str
    digest: str = ""
    platform: str = ""
    former: tuple[str, ...] = ()
    username: str | None = None
    password: str | None = dataclasses.field(default=None, repr=False)
    tags: tuple[str, ...] = ()
    gives_up: str = ""
    local: bool = False
    erofs: bool | None = None
    bootable: bool | None = None
    place: str = ""
    auth_file: str | None = None


@dataclasses.dataclass(frozen=True)
class LayerDelta:
    """A tar-diff that can stand in for a layer's blob: where it is, and the EROFS image (object digest) of the image
    whose files it copies from.
    """

    descriptor: ocidocuments.Descriptor
    source: Patient
    reference: Reference
    image: ObjectDigest


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of an image.

    ``blob`` is what the manifest announces; ``source`` is what the transport delivers instead where that differs
    (``containers-storage:`` delivers uncompressed tars). ``stored`` is the object digest of a layer stream that is
    there and proved. ``delta`` is tried before the source.
    """

    blob: ocidocuments.Descriptor
    diff_id: str
    stream: StreamName
    source: ocidocuments.Descriptor
    stored: StreamDigest | None
    delta: LayerDelta | None = None

    @property
    def to_fetch(self) -> int:
        """The bytes that have to cross the network if the layer is missing."""
        return self.delta.descriptor.size if self.delta else self.source.size

    @property
    def status(self) -> str:
        """``present`` or ``new``."""
        return NEW if self.stored is None else PRESENT

    @property
    def compression(self) -> str | None:
        """How the source is compressed; None for a blob that is no tar."""
        compression = ocidocuments.layer_compression(self.source.media_type)
        # docker-archive: calls its plain tars gzip. The digest does not lie: a blob that has the tar's digest is the
        # tar.
        return "none" if compression is not None and self.source.digest == self.diff_id else compression


@dataclasses.dataclass(frozen=True)
class Standing:
    """What the repository knows of a request's name: the one that it stands under now, which is of ``former`` where
    only that exists, the manifest digest and the record.
    """

    name: str
    digest: str | None = None
    record: NameRecord | None = None

    @classmethod
    def of(cls, repository: Repository, request: Request) -> Standing:
        """As the repository is now."""
        for name in (request.name, *request.former):
            digest = repository.tag_digest(name)
            if digest is not None:
                return cls(name, digest, namerecords.read(repository, name))
        return cls(request.name)


@dataclasses.dataclass
class Plan:
    """What one request amounts to."""

    request: Request
    reference: Reference
    manifest: ocidocuments.Manifest
    registry_digest: str
    index_digest: str | None
    config_raw: bytes
    config: ocidocuments.Config | None
    layers: list[Layer]
    standing: Standing
    manifest_document: imagestreams.Document | None
    config_document: imagestreams.Document | None
    source: Patient | None = None
    # What is known of where the image came from, where no source was asked.
    remembered: NameRecord | None = None
    # Names besides the request's that have to be given, and to go.
    further: tuple[str, ...] = ()
    leaving: tuple[str, ...] = ()
    image_refs: dict[str, ObjectDigest] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if self.config is not None and self.config_document is not None:
            self.image_refs = imagestreams.images_among(self.config_document.refs)

    @property
    def previous(self) -> str | None:
        """The manifest digest that the name leads to now, None also where that is not known."""
        return Foreseen.known(self.standing.digest)

    @property
    def renames(self) -> bool:
        """Whether a name is given, moved or removed."""
        moves = self.previous != self.digest or self.standing.name != self.request.name
        return moves or bool(self.further or self.leaving)

    @property
    def origin(self) -> NameRecord | None:
        """What is to be remembered of where the name comes from, None if that is not known."""
        if self.source is None:
            return self.remembered
        return NameRecord(
            ref=parse_reference(self.request.ref).text,
            manifest=self.digest,
            registry_digest=self.registry_digest,
            index_digest=self.index_digest,
            policy=self.policy,
        )

    @property
    def policy(self) -> str | None:
        """How the policy for signatures was applied: by the source just now, or when the name got its meaning."""
        if self.source is not None:
            return self.source.facts().policy
        return self.remembered.policy if self.remembered else None

    @property
    def digest(self) -> str:
        """The manifest digest under which the image is stored."""
        return self.manifest.digest

    @property
    def config_digest(self) -> str:
        return self.manifest.config.digest

    def missing(self) -> dict[StreamName, Layer]:
        """The layers to fetch, each once, by stream name."""
        return {layer.stream: layer for layer in self.layers if layer.stored is None}


def look_up(repository: Repository, request: Request, reference: Reference, source: Patient, record: bool) -> Plan:
    """Ask the source what ``request`` means and compare it with the repository.

    With ``record`` a layer stream of another tool that passed its proof is remembered, so that it is hashed only once.
    """
    warnings: list[str] = []
    resolved = source.resolve(reference)
    # From here on everything is asked for with the reference that leads to this manifest, whatever a tag does.
    reference, registry_digest, index_digest = resolved.reference, resolved.digest, resolved.index_digest
    manifest = ocidocuments.parse_manifest(resolved.raw)
    _check_digest(request, manifest.digest, registry_digest, index_digest)
    manifest_document = imagestreams.usable(repository, imagestreams.MANIFEST, manifest.digest)
    if manifest_document is None:
        _validate("manifest", resolved.raw, warnings)
    config_document = imagestreams.usable(repository, imagestreams.CONFIG, manifest.config.digest)
    config_raw = config_document.raw if config_document else source.config(resolved, manifest)
    config = None
    if ocidocuments.is_container(manifest):
        config = ocidocuments.parse_config(config_raw)
        if config_document is None:
            _validate("config", config_raw, warnings)
        _check_platform(request, config, resolved.platform, warnings)
    plan = Plan(
        request=request,
        reference=reference,
        manifest=manifest,
        registry_digest=registry_digest,
        index_digest=index_digest,
        config_raw=config_raw,
        config=config,
        layers=[],
        standing=Standing.of(repository, request),
        manifest_document=manifest_document,
        config_document=config_document,
        source=source,
        warnings=warnings,
    )
    delivered = source.layers(resolved, manifest)
    for blob, comes, diff_id in zip(manifest.layers, delivered, _diff_ids(manifest, config)):
        plan.layers.append(_stored_layer(repository, plan, blob, comes, diff_id, record, plan.warnings))
    return plan


def recall(
    repository: Repository, request: Request, warnings: list[str], record: bool, *, same_reference: bool = True
) -> Plan | None:
    """What the repository holds under the request's name, without asking anybody; None unless it is whole and is what
    was asked for. With ``same_reference`` a name that is known to come from another reference does not count.

    Layers are proved, and proofs remembered with ``record``, as look_up() does.
    """
    standing = Standing.of(repository, request)
    digest, remembered = standing.digest, standing.record
    if request.local:
        digest, remembered = _here(repository, request, standing)
    elif digest is None or not _is_asked_for(request, standing, same_reference):
        return None
    if digest is None:
        return None
    manifest_document = imagestreams.usable(repository, imagestreams.MANIFEST, digest)
    if manifest_document is None:
        return None
    manifest = ocidocuments.parse_manifest(manifest_document.raw)
    config_document = imagestreams.usable(repository, imagestreams.CONFIG, manifest.config.digest)
    if config_document is None:
        return None
    config = ocidocuments.parse_config(config_document.raw) if ocidocuments.is_container(manifest) else None
    if (
        request.platform
        and config is not None
        and not ocidocuments.parse_platform(request.platform).accepts(config.platform)
    ):
        return None
    plan = Plan(
        request=request,
        reference=Reference("", request.ref, request.ref) if request.local else parse_reference(request.ref),
        manifest=manifest,
        registry_digest=(remembered and remembered.registry_digest) or digest,
        index_digest=remembered.index_digest if remembered else None,
        remembered=remembered,
        config_raw=config_document.raw,
        config=config,
        layers=[],
        standing=standing,
        manifest_document=manifest_document,
        config_document=config_document,
        warnings=warnings,
    )
    for blob, diff_id in zip(manifest.layers, _diff_ids(manifest, config)):
        # If a layer is wrong, the look-up that follows says what is.
        layer = _stored_layer(repository, plan, blob, blob, diff_id, record, [])
        if layer.stored is None:
            return None
        plan.layers.append(layer)
    return plan


def _here(repository: Repository, request: Request, standing: Standing) -> tuple[str | None, NameRecord | None]:
    """The manifest in the repository that a ``local`` request means, and what is remembered of it; None, None if there
    is none. UnexpectedDigest if it is not the one that was asked for.
    """
    if is_digest(request.ref):
        digest = request.ref if repository.stream(repolayout.manifest_stream(request.ref)) is not None else None
        names = [name for name, manifest in repository.tags().items() if manifest == digest]
    else:
        names = [request.ref]
        digest = repository.tag_digest(request.ref)
        if digest is None and request.gives_up == request.ref:
            names, digest = [standing.name], standing.digest  # it was renamed before
    if digest is None:
        return None, None
    if request.digest and request.digest != digest:
        raise UnexpectedDigest(
            f"{request.ref!r} means {digest} in the repository, where 'digest' asks for {request.digest}.",
            "Decide which image you want and update the task.",
        )
    records = (namerecords.read(repository, name) for name in names)
    known = next((record for record in records if record is not None), None)
    # The time is that of the name which it came with.
    return digest, known and dataclasses.replace(known, since="")


def _is_asked_for(request: Request, standing: Standing, same_reference: bool) -> bool:
    """Whether what stands under the name can be what the request means, as far as can be told without the source.

    A digest, wherever it is written, is compared with what the name leads to and what is remembered of it. A tag says
    nothing of the image, so the name must come from the same reference; one without a record was given by an earlier
    version or another program, and nothing speaks against it.
    """
    reference = parse_reference(request.ref)
    record = standing.record
    known = {standing.digest, record and record.registry_digest, record and record.index_digest}
    if any(digest and digest not in known for digest in (request.digest, reference.digest)):
        return False
    return not same_reference or bool(reference.digest) or record is None or record.ref == reference.text


def _stored_layer(
    repository: Repository,
    plan: Plan,
    blob: ocidocuments.Descriptor,
    source: ocidocuments.Descriptor,
    diff_id: str,
    record: bool,
    warnings: list[str],
) -> Layer:
    stream = repolayout.layer_stream(diff_id)
    candidate = repository.stream(stream)
    if plan.config is None and plan.manifest_document is not None:
        # The stream's name may meanwhile lead to a container's split tar of the same bytes; what the artifact has is
        # still right.
        candidate = plan.manifest_document.stream_of(diff_id) or candidate
    stored = proofs.proved_layer(repository, candidate, diff_id, plan.config is not None, record, warnings)
    return Layer(blob, diff_id, stream, source, stored)


def _validate(kind: str, raw: bytes, warnings: list[str]) -> None:
    """Check a new document against its schema. Without jsonschema only the typed checks run, as they always do."""
    from ..formats import ocischemas  # late: only a document that is new needs it

    if not ocischemas.validate(kind, raw):
        warnings.append(
            "The Python library jsonschema is not installed on the host, so new documents are checked without their "
            "JSON schemas."
        )


def _diff_ids(manifest: ocidocuments.Manifest, config: ocidocuments.Config | None) -> list[str]:
    """The digests that name the layer streams: a container's diff_ids, an artifact's blob digests."""
    if config is None:
        return [layer.digest for layer in manifest.layers]
    return [diff_id for _layer, diff_id in ocidocuments.pairs(manifest, config)]


def _check_digest(request: Request, digest: str, registry_digest: str, index_digest: str | None) -> None:
    if request.digest and request.digest not in (digest, registry_digest, index_digest):
        raise UnexpectedDigest(
            f"The reference means {registry_digest} now, where 'digest' asks for {request.digest}.",
            "Somebody moved the tag, or the digest belongs to another platform: decide which image you want and "
            "update the task.",
        )


def _check_platform(
    request: Request, config: ocidocuments.Config, member: ocidocuments.Platform | None, warnings: list[str]
) -> None:
    """Refuse or warn of an image that is not for the platform it should be for; ``member`` is what an index says of it.

    The index decides for what was chosen from it: builders copy configurations, and its word is what others go by. A
    single image has nothing but its configuration.
    """
    if member is not None:
        if not member.accepts(config.platform) and not config.platform.accepts(member):
            warnings.append(
                f"The index says that {request.ref} is for {member}, and the configuration says "
                f"{str(config.platform) or 'nothing'}. The index decides."
            )
    elif request.platform:
        ocidocuments.check_platform(config, ocidocuments.parse_platform(request.platform))
    elif str(config.platform) and not machine.own_platform().accepts(config.platform):
        warnings.append(f"{request.ref} is for {config.platform}, and this host is {machine.own_platform()}.")
