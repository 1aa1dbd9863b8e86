# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The last step of a pull: EROFS images, configuration and manifest of an image whose layers are all there.

``predict`` takes the same decisions as ``publish`` without the bytes; what it says is what ``publish`` then returns.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from ..formats import repolayout
from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest
from ..store import imagestreams, proofs
from ..errors import Busy, FormatError
from .plan import Layer, Plan
from ..progress import Progress
from ..store.repository import Repository

if TYPE_CHECKING:
    from .feed import Feed
    from .makeimages import Ahead

T = TypeVar("T")

# How often to decide anew because cfsctl published meanwhile; each round takes milliseconds.
_ATTEMPTS = 8
_SUPERBLOCK = 1024
_MAGIC = bytes.fromhex("e2e1f5e0")


class Images(NamedTuple):
    """Which EROFS images to make of a container: ``plain`` ones to mount, ``bootable`` ones to boot from. If a
    configuration leads to one of the ``distrusted`` images, that one is made anew.
    """

    plain: bool = True
    bootable: bool = False
    distrusted: frozenset[ObjectDigest] = frozenset()


def predict(repository: Repository, plan: Plan, images: Images) -> list[StreamName]:
    """The names under ``streams/`` that publish() would register, after those of the missing layers."""
    streams = list(plan.missing())
    layers = {layer.diff_id: _expected(repository, plan, layer) for layer in plan.layers}
    config = plan.config_document
    if (
        config is not None
        and _leads_to(plan, config.refs, layers)
        and all(image in config.refs for image in _wanted(repository, plan, images))
        and images.distrusted.isdisjoint(config.refs.values())
    ):
        # An image whose object is gone comes back the same: making images is deterministic.
        manifest = plan.manifest_document
        if manifest is None or manifest.refs != _manifest_refs(plan, config.stream, layers):
            streams.append(repolayout.manifest_stream(plan.digest))
        return streams
    holders = imagestreams.manifests_of_config(repository, plan.config_digest)
    coming = _coming_config(repository, plan, images, layers, holders)
    lead = imagestreams.CONFIG_REF + plan.config_digest
    manifests = [
        digest for digest, document in holders.items() if digest != plan.digest and document.refs[lead] != coming
    ]
    if plan.manifest_document is None or plan.manifest_document.refs != _manifest_refs(plan, coming, layers):
        manifests.insert(0, plan.digest)
    return [
        *streams,
        repolayout.config_stream(plan.config_digest),
        *(repolayout.manifest_stream(digest) for digest in manifests),
    ]


def unfinished(repository: Repository, plan: Plan, images: Images) -> bool:
    """Whether publish() has something to repair that no stream shows: an image without its object or link, or what a
    crash left behind.
    """
    if repository.stream(repolayout.stream_name(imagestreams.PENDING, plan.config_digest)) is not None:
        return True
    wanted = _wanted(repository, plan, images)
    return any(
        name in wanted and not (_is_whole(repository, digest) and repository.image(digest))
        for name, digest in plan.image_refs.items()
    )


def begin(
    repository: Repository,
    plan: Plan,
    images: Images,
    leave: Callable[[], None],
    feeds: Mapping[StreamName, Feed],
) -> Ahead | None:
    """Begin to make the EROFS images of an image that is not stored yet while its layers are fetched; None where there
    is nothing to begin with. ``leave`` and ``feeds`` as in `Ahead`.
    """
    wanted = list(_wanted(repository, plan, images).values()) if plan.config_document is None else []
    if not wanted:
        return None
    from .makeimages import Ahead  # late: most runs make none

    layers = [(layer.stream, layer.stored) for layer in plan.layers]
    return Ahead(repository, layers, *_by_tree(wanted), leave, feeds)


def publish(
    repository: Repository,
    plan: Plan,
    images: Images,
    fetched: Mapping[StreamName, StreamDigest],
    progress: Progress,
    ahead: Ahead | None = None,
) -> list[StreamName]:
    """Store and name what ``plan`` still lacks; the names under ``streams/`` that were given. ``fetched``: layer stream
    -> object digest. ``ahead`` is what `begin` returned for this plan.

    The final streams are written at once, so nothing is left over for a collector.

    Another pull of the same image may want other EROFS images of it, and both put theirs into one configuration. So
    what to publish is decided by what is there under a lock that publishers share, never by what was read while
    planning: the later one would take away what the earlier one had added. The images themselves take long to make, so
    they are made before.
    """
    tree = [layer.stored or fetched[layer.stream] for layer in plan.layers]
    layers = {layer.diff_id: digest for layer, digest in zip(plan.layers, tree)}
    made: dict[str, ObjectDigest] = {}
    _read_again(repository, plan)
    _make_missing(repository, plan, images, tree, layers, made, progress, ahead)
    with alone(repository, progress):
        for _attempt in range(_ATTEMPTS):
            _read_again(repository, plan)
            _make_missing(repository, plan, images, tree, layers, made, progress)
            decision = _decide(repository, plan, images, layers, made)
            if made or decision.manifests or decision.moves:
                # The barrier: what the names below lead to, directly or through others, is on the disk before they
                # exist.
                repository.sync()
            # cfsctl knows nothing of the lock. What it did meanwhile counts, too.
            if _streams(repository, plan) == decision.based_on:
                break
        else:
            raise Busy(
                f"The documents of {plan.request.name} change again and again while they are being stored.",
                "Let one program at a time pull this image.",
            )
        plan.image_refs = decision.images
        for image in decision.images.values():
            if repository.objects.contains(image):
                repository.link_image(image)
        imagestreams.replace(repository, plan.config_digest, decision.config, decision.manifests)
    return [
        *([repolayout.config_stream(plan.config_digest)] if decision.moves else []),
        *(repolayout.manifest_stream(digest) for digest in decision.manifests),
    ]


@contextlib.contextmanager
def alone(repository: Repository, progress: Progress | None = None) -> Iterator[None]:
    """Keep every other pull into this repository from publishing, for the duration of a ``with``."""

    def tell(holders: str) -> None:
        if progress is not None:
            progress.message(f"Waiting for another pull that is publishing ({holders})")

    with repository.lock("publish", tell=tell):
        yield


class _Decision(NamedTuple):
    """What to publish: the configuration's stream, those of manifests by digest, whether the configuration moves, the
    EROFS images, and the streams on which all that was decided.
    """

    config: StreamDigest
    manifests: dict[str, StreamDigest]
    moves: bool
    images: dict[str, ObjectDigest]
    based_on: tuple[StreamDigest | None, StreamDigest | None]


def _streams(repository: Repository, plan: Plan) -> tuple[StreamDigest | None, StreamDigest | None]:
    return (
        repository.stream(repolayout.config_stream(plan.config_digest)),
        repository.stream(repolayout.manifest_stream(plan.digest)),
    )


def _read_again(repository: Repository, plan: Plan) -> None:
    plan.manifest_document = imagestreams.usable(repository, imagestreams.MANIFEST, plan.digest)
    plan.config_document = imagestreams.usable(repository, imagestreams.CONFIG, plan.config_digest)


def _make_missing(
    repository: Repository,
    plan: Plan,
    images: Images,
    tree: Sequence[StreamDigest],
    layers: Mapping[str, StreamDigest],
    made: dict[str, ObjectDigest],
    progress: Progress,
    ahead: Ahead | None = None,
) -> None:
    """Make the EROFS images that are wanted and neither stored nor in ``made``, and note them there."""
    there = {**_true_images(repository, plan, images, layers), **made}
    missing = [
        format_
        for name, format_ in _wanted(repository, plan, images).items()
        if name not in there or not _is_whole(repository, there[name])
    ]
    if not missing:
        return
    progress.message(f"Making the EROFS image of {plan.request.name}")
    from .makeimages import write_images  # late: most runs make none

    formats = _by_tree(missing)
    ready = ahead.images(tree, *formats) if ahead is not None else None
    plain, bootable = ready or write_images(repository, tree, *formats)
    made.update({imagestreams.image_ref(version): digest for version, digest in plain.items()})
    made.update({imagestreams.image_ref(version, boot=True): digest for version, digest in bootable.items()})


def _decide(
    repository: Repository,
    plan: Plan,
    images: Images,
    layers: Mapping[str, StreamDigest],
    made: Mapping[str, ObjectDigest],
) -> _Decision:
    """Store the documents as they have to be now, by what the repository holds."""
    based_on = _streams(repository, plan)
    before = plan.config_document
    kept = _true_images(repository, plan, images, layers)
    # An image that was made here because it was missing may be there by now. It is the same: making is deterministic.
    image_refs = {**kept, **{name: digest for name, digest in made.items() if kept.get(name) != digest}}
    config_refs = {**layers, **image_refs}
    if before is not None and (plan.config is None or before.refs == config_refs):
        config_stream = before.stream
    else:
        config_stream = imagestreams.store(repository, imagestreams.CONFIG, plan.config_raw, config_refs)
    refs = _manifest_refs(plan, config_stream, layers)
    manifests = {}
    if plan.manifest_document is None or plan.manifest_document.refs != refs:
        manifests[plan.digest] = imagestreams.store(repository, imagestreams.MANIFEST, plan.manifest.raw, refs)
    moves = before is None or before.stream != config_stream
    if moves:
        # Other manifests with the same configuration follow it, or a collector would find theirs without a name.
        for digest, document in imagestreams.manifests_of_config(repository, plan.config_digest, config_stream).items():
            if digest != plan.digest:
                moved = {**document.refs, imagestreams.CONFIG_REF + plan.config_digest: config_stream}
                manifests[digest] = imagestreams.store(repository, imagestreams.MANIFEST, document.raw, moved)
    return _Decision(config_stream, manifests, moves, image_refs, based_on)


def _true_images(
    repository: Repository, plan: Plan, wanted: Images, layers: Mapping[str, StreamDigest | None]
) -> dict[str, ObjectDigest]:
    """The EROFS images that the stored configuration leads to and that stay: those made of the same layers.

    Two programs that fetch a layer at once give it two streams of the same tar. An image made of the other one is as
    right as ours, if its layers are proved.
    """
    before = plan.config_document
    if before is None or plan.config is None:
        return {}
    images = {
        name: image for name, image in imagestreams.images_among(before.refs).items() if image not in wanted.distrusted
    }
    others = imagestreams.streams_among(before.refs)
    if not images or others.keys() != layers.keys():
        return {}
    for diff_id, stream in others.items():
        if stream != layers[diff_id] and proofs.proved_layer(repository, stream, diff_id, True, False, []) is None:
            return {}
    return images


def _is_whole(repository: Repository, image: ObjectDigest) -> bool:
    """Whether an EROFS image is there and begins like one: a file system that went down may have kept its name only."""
    if not repository.objects.contains(image):
        return False
    found = repository.objects.stat(image)
    if found is None or found.st_size < _SUPERBLOCK + len(_MAGIC):
        return False
    try:
        fd = repository.objects.open(image)
    except FormatError:
        return False
    try:
        return os.pread(fd, len(_MAGIC), _SUPERBLOCK) == _MAGIC
    except OSError:
        return False
    finally:
        os.close(fd)


def _by_tree(formats: Sequence[tuple[int, bool]]) -> tuple[list[int], list[int]]:
    """The formats that are made of the tree as it is, and those of the tree that is prepared for boot."""
    return [version for version, boot in formats if not boot], [version for version, boot in formats if boot]


def image_id(repository: Repository, refs: Mapping[str, ObjectDigest], boot: bool) -> str | None:
    """The EROFS image (hex) in the repository's own format among the named ``refs`` of a configuration, None if there
    is none.
    """
    for version in repository.metadata.erofs_formats:
        digest = refs.get(imagestreams.image_ref(version, boot))
        if digest is not None:
            return digest.hex()
    return None


def _wanted(repository: Repository, plan: Plan, images: Images) -> dict[str, tuple[int, bool]]:
    """The images that the configuration shall lead to: key -> format, and whether it is the one to boot from."""
    if plan.config is None:
        return {}
    formats = repository.metadata.erofs_formats
    # A configuration has one place for formats 0 and 1: where both are wanted, 1 takes it, and none is left for 0.
    chosen = [
        (version, boot)
        for boot, yes in ((False, images.plain), (True, images.bootable))
        if yes
        for version in formats
        if version or 1 not in formats
    ]
    return {imagestreams.image_ref(version, boot): (version, boot) for version, boot in chosen}


def _expected(repository: Repository, plan: Plan, layer: Layer) -> StreamDigest | None:
    """The stream object a layer has, or will most likely get: an import is deterministic, so one that vanished comes
    back the same.
    """
    if layer.stored is not None:
        return layer.stored
    proved = repository.trusted(layer.diff_id) if plan.config is not None else None
    if proved is not None:
        return proved
    document = plan.config_document if plan.config is not None else plan.manifest_document
    known = document.stream_of(layer.diff_id) if document else None
    there = repository.stream(layer.stream)
    # A stream that is there although its layer counts as missing will be replaced by another one.
    return None if known == there and there is not None and repository.objects.contains(there) else known


def _coming_config(
    repository: Repository,
    plan: Plan,
    images: Images,
    layers: Mapping[str, StreamDigest | None],
    holders: Mapping[str, imagestreams.Document],
) -> StreamDigest | None:
    """The stream that publish() will give to the configuration, if it is stored already.

    It is stored where its name or the document is gone, and where a run died between moving the manifests, ``holders``,
    and the configuration.
    """
    config = plan.config_document
    keys = set(_wanted(repository, plan, images))
    if config is not None:
        keys |= _true_images(repository, plan, images, layers).keys()
    candidates = [repository.stream(repolayout.config_stream(plan.config_digest))]
    candidates += [document.stream_of(imagestreams.CONFIG_REF + plan.config_digest) for document in holders.values()]
    for stream in dict.fromkeys(candidates):
        refs = imagestreams.refs_of(repository, imagestreams.CONFIG, stream) if stream else None
        if stream and refs is not None and refs.keys() == keys | layers.keys() and _leads_to(plan, refs, layers):
            return stream
    return None


def _leads_to(plan: Plan, refs: Mapping[str, ObjectDigest], layers: Mapping[str, StreamDigest | None]) -> bool:
    """Whether a stored configuration has exactly these layers."""
    if plan.config is None:
        # The empty configuration is shared by many artifacts and cannot lead to the layers of all: their manifests do.
        return True
    return imagestreams.streams_among(refs) == layers


def _manifest_refs(plan: Plan, config: T, layers: Mapping[str, T]) -> dict[str, T]:
    return {imagestreams.CONFIG_REF + plan.config_digest: config, **layers}
