# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Pull images into a repository: find out what they are, fetch what is missing, publish, and tell exactly what changed.

The order is the safety argument. Everything that can be refused is refused before the first byte is fetched; layers get
their names one by one as they are whole and synced, so that a run that fails leaves its work to the next; manifest,
configuration and tag follow after one more barrier, when everything they lead to is on the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..formats.repolayout import StreamName
from ..formats import codecs, ocidocuments
from . import publish
from ..host import processors
from ..store import imagestreams, namerecords
from . import plan as planning
from ..errors import (
    EngineError,
    ImageNotFound,
    InvalidReference,
    MissingLibrary,
    NoSpace,
    RegistryUnreachable,
    Stalled,
    TooLarge,
    doing,
    from_os_error,
)
from ..formats.digests import StreamDigest, is_digest, stream_digest
from ..formats.reference import parse_reference
from .limits import MIN_RATE, Limits
from .plan import Layer, Plan, Request
from .results import ImageResult, LayerResult, Report, Stats, about
from .opened import Sources
from ..progress import IMAGE, PLANNED, SKIPPED, Event, Progress, human
from ..store.repository import Foreseen, Repository
from ..source.source import Facts
from ..source.options import ProxyOptions

if TYPE_CHECKING:
    from .layer import LayerResult as StoredLayer
    from .feed import Feed
    from .makeimages import Ahead
    from .peers import Peers

ALWAYS = "always"
MISSING = "missing"
NEWER = "newer"


@dataclasses.dataclass(frozen=True)
class Options:
    """How to pull. ``timeout`` is the longest silence in seconds; ``parallel`` 0 means as many layers at once as
    processors; ``deltas`` are references of delta artifacts, or ``auto`` for those beside the image; ``peers`` are base
    URLs of other repositories. ``max_size`` is in bytes, None for the space that is free; ``min_rate`` in bytes a
    second; ``deadline`` in seconds from the start of the pull, None for none. ``same_reference``: whether the policy
    ``missing`` asks again for a name that is known to come from another reference.
    """

    policy: str = ALWAYS
    same_reference: bool = True
    parallel: int = 0
    timeout: float = 60.0
    retries: int = 3
    images: publish.Images = publish.Images()
    check: bool = False
    proxy: ProxyOptions = dataclasses.field(default_factory=ProxyOptions)
    deltas: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    peer_ca_file: str | None = None
    peer_headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    max_size: int | None = None
    min_rate: int = MIN_RATE
    deadline: float | None = None

    def images_of(self, request: Request) -> publish.Images:
        """Which EROFS images to make of one image."""
        return self.images._replace(
            plain=self.images.plain if request.erofs is None else request.erofs,
            bootable=self.images.bootable if request.bootable is None else request.bootable,
        )


@dataclasses.dataclass
class Outcome:
    """What became of one image. ``streams`` are the names that this run registered, or would register in check mode."""

    plan: Plan
    streams: list[StreamName]
    stats: Stats
    changed: bool
    # Layer stream -> what delivered it in the end, where that is not what the plan says.
    delivered: dict[StreamName, str] = dataclasses.field(default_factory=dict)
    # Layer stream -> the bytes that it took in the end: what is planned is wrong where another way had to serve.
    fetched: dict[StreamName, int] = dataclasses.field(default_factory=dict)
    bytes_exact: bool = True


def pull_images(
    repository: Repository,
    requests: Sequence[Request],
    options: Options,
    progress: Progress,
    permit: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Make every requested image present under its name; outcomes in the order of the requests.

    ``permit`` is called before the first name appears and may wait, or end the pull with an exception of its own.
    Raises EngineError. If that happens before the first name appears, no name is created or moved at all; layers that
    were already whole stay for the next run.
    """
    _check_names(repository, requests)
    # Every stream in a repository is compressed with zstd, so nothing goes without it: better said now than after the
    # first layer.
    codecs.require_zstd()
    for text in options.deltas:
        if text != "auto":
            with doing("Reading the option deltas"):
                parse_reference(text)
    if options.peers:
        from . import peers  # late: it brings http.client and ssl

        peers.check(options.peers, options.peer_headers, options.peer_ca_file)
    clock = _Clock()
    limits = Limits(
        options.max_size,
        min_rate=options.min_rate,
        deadline=None if options.deadline is None else time.monotonic() + options.deadline,
    )
    sources = Sources(options.proxy, options.retries, progress, limits, requests)
    try:
        plans = [_plan(repository, request, options, sources, progress) for request in requests]
        for plan in plans:
            tags, leaving = plan.request.tags, plan.request.gives_up
            plan.further = tuple(tag for tag in tags if repository.tag_digest(tag) != plan.digest)
            plan.leaving = (leaving,) if leaving and repository.tag_digest(leaving) is not None else ()
        _choose_deltas(repository, plans, options, sources)
        clock.lap("resolve")
        predictions = [publish.predict(repository, plan, options.images_of(plan.request)) for plan in plans]
        settled = not any(predictions) and not any(plan.renames for plan in plans)
        if options.check or (
            settled and not any(publish.unfinished(repository, plan, options.images_of(plan.request)) for plan in plans)
        ):
            outcomes = _untouched(plans, predictions, repository.foreseen, exact=not options.peers)
            if options.check:
                _require_space(repository, plans, limits)
            else:
                _remember_origins(repository, plans)
        else:
            repository.require_writable()
            outcomes = _carry_out(repository, plans, options, progress, permit, clock, limits)
        for outcome in outcomes:
            outcome.stats.seconds = clock.laps()
            outcome.stats.retries = sources.retried
        return outcomes
    finally:
        sources.close()


class _Clock:
    """Seconds per phase."""

    def __init__(self) -> None:
        self._last = self._start = time.monotonic()
        self._laps: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self._laps[phase] = self._laps.get(phase, 0.0) + now - self._last
        self._last = now

    def laps(self) -> dict[str, float]:
        return {
            **{phase: round(seconds, 3) for phase, seconds in self._laps.items()},
            "total": round(time.monotonic() - self._start, 3),
        }


def _check_names(repository: Repository, requests: Sequence[Request]) -> None:
    names = [name for request in requests for name in (request.name, *request.tags)]
    for name in names:
        repository.check_tag_name(name)
        if names.count(name) > 1:
            raise InvalidReference(
                f"The name {name!r} is asked for twice in one task.", "Give each image a name of its own."
            )


def _plan(repository: Repository, request: Request, options: Options, sources: Sources, progress: Progress) -> Plan:
    record = not options.check
    if request.local:
        known = planning.recall(repository, request, [], record)
        if known is None:
            raise _not_here(repository, request)
        return known
    # Outside of the block that names the reference in errors: one that cannot be understood may hold a password.
    reference = parse_reference(request.place or request.ref)
    try:
        if options.policy == MISSING:
            known = planning.recall(repository, request, [], record, same_reference=options.same_reference)
            if known is not None:
                return known
        source = sources.source(reference, request.platform, request)
        try:
            return planning.look_up(repository, request, reference, source, record)
        except (RegistryUnreachable, Stalled) as error:
            warning = f"{error.text} What is there under {request.name!r} is left as it is."
            known = (
                planning.recall(repository, request, [warning], record, same_reference=False)
                if options.policy == NEWER
                else None
            )
            if known is None:
                raise
            return known
    except EngineError as error:
        if reference.text not in error.text and request.ref not in error.text:
            error.within(f"Looking up {request.ref}")
        raise
    except OSError as error:
        raise from_os_error(error, f"Looking up {request.ref}") from error


def _not_here(repository: Repository, request: Request) -> EngineError:
    """The error for a digest or name that cannot be had from the repository itself. Raises InvalidReference for what is
    neither.
    """
    if not is_digest(request.ref) and not request.gives_up and repository.tag_digest(request.ref) is None:
        parse_reference(request.ref)
    return ImageNotFound(
        f"The repository {repository.path} has no whole image {request.ref}.",
        "Pull it by its reference, with transport and host.",
    )


def _choose_deltas(repository: Repository, plans: Sequence[Plan], options: Options, sources: Sources) -> None:
    if not options.deltas or not any(plan.missing() for plan in plans):
        return
    from . import deltas  # late: most runs lack no layer

    for plan in plans:
        deltas.choose(
            repository, plan, options.deltas, functools.partial(sources.source, platform=plan.request.platform)
        )


def _untouched(
    plans: Sequence[Plan], predictions: Sequence[list[StreamName]], foreseen: Foreseen, exact: bool
) -> list[Outcome]:
    """Outcomes of a run that writes nothing; ``exact`` unless peers may send other bytes, for they were not asked. A
    layer that several images lack is counted with the first, as a real run would fetch it, and one that an earlier
    task will have fetched is not counted at all.
    """
    outcomes = []
    claimed: set[StreamName] = set()
    for plan, predicted in zip(plans, predictions):
        come = {stream for stream in predicted if foreseen.short(stream) in foreseen.streams}
        claimed |= come
        streams = [stream for stream in predicted if stream not in claimed]
        fetched = sum(layer.to_fetch for stream, layer in plan.missing().items() if stream not in claimed)
        claimed_before = set(claimed)
        claimed.update(streams)
        stats = _stats(plan)
        stats.bytes_fetched = fetched
        if stats.layers_already_present is not None:
            stats.layers_already_present += len(come.intersection(plan.missing()))
        if any(stream not in claimed_before for stream in plan.missing()):
            # What is in a layer is not known before it is here.
            stats.objects_copied = stats.objects_already_present = stats.bytes_copied = stats.bytes_inlined = None
        changed = bool(streams) or plan.renames
        outcomes.append(Outcome(plan, streams, stats, changed, bytes_exact=exact or not fetched))
    return outcomes


def _stats(plan: Plan) -> Stats:
    """The figures of an image for which nothing was done yet."""
    different = len({layer.stream for layer in plan.layers})
    return Stats(len(plan.layers), different - len(plan.missing()), 0, 0, 0, 0, 0, [])


def _carry_out(
    repository: Repository,
    plans: Sequence[Plan],
    options: Options,
    progress: Progress,
    permit: Callable[[], None],
    clock: _Clock,
    limits: Limits,
) -> list[Outcome]:
    missing = _announced(plans, progress)
    limits = _require_space(repository, plans, limits)
    with repository.importing() as found, contextlib.ExitStack() as stack:
        plans[0].warnings += found.warnings
        begun: dict[str, Ahead] = {}
        brought = _Brought()
        if missing:
            seeds = _peers(options, repository, missing, progress)
            from .feed import feeds  # late: most runs fetch nothing

            told = stack.enter_context(feeds(sorted(missing, key=lambda stream: -missing[stream][1].to_fetch)))
            begun = _begin(repository, plans, options, processors.usable(), stack, told)
            brought = _fetch(repository, missing, seeds, begun, options, progress, limits, told if begun else {})
        clock.lap("fetch")
        outcomes = _register(repository, plans, options, progress, begun, brought)
        # Only now, when every document is in place, do the names appear: an image of this task that cannot be stored
        # leaves all names alone.
        permit()
        with publish.alone(repository, progress):
            for plan in plans:
                _set_name(repository, plan)
    clock.lap("register")
    return outcomes


@dataclasses.dataclass(frozen=True)
class _Brought:
    """What was fetched: what became of each layer, which of them something else than the plan's source ``delivered``,
    and what is told of each peer.
    """

    layers: Mapping[StreamName, StoredLayer] = dataclasses.field(default_factory=dict)
    delivered: dict[StreamName, str] = dataclasses.field(default_factory=dict)
    peers: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def _announced(plans: Sequence[Plan], progress: Progress) -> dict[StreamName, tuple[Plan, Layer]]:
    """The missing layers, each with the first image that lacks it, after all layers were told to ``progress``."""
    missing: dict[StreamName, tuple[Plan, Layer]] = {}
    for plan in plans:
        progress(Event(IMAGE, text=plan.request.name))
        for layer in plan.layers:
            if layer.stored is not None:
                progress(Event(SKIPPED, layer.diff_id, layer.blob.size, layer.blob.size))
        for stream, layer in plan.missing().items():
            missing.setdefault(stream, (plan, layer))
    for _plan, layer in missing.values():
        # All are announced before the first one starts, so that a share of the whole can be shown from the beginning.
        progress(Event(PLANNED, layer.diff_id, 0, layer.to_fetch))
    return missing


def _fetch(
    repository: Repository,
    missing: Mapping[StreamName, tuple[Plan, Layer]],
    seeds: Peers | None,
    begun: Mapping[str, Ahead],
    options: Options,
    progress: Progress,
    limits: Limits,
    told: Mapping[StreamName, Feed],
) -> _Brought:
    """Fetch what is missing, and tell what was ``begun`` beside it of every layer that is whole."""
    # Loaded here: a run that fetches nothing starts faster without the decoders and the tar splitter.
    from .fetch import DELTA, Fetcher

    def arrived(stream: StreamName, digest: StreamDigest) -> None:
        for ahead in begun.values():
            ahead.arrived(stream, digest)

    def lost(stream: StreamName) -> None:
        for ahead in begun.values():
            ahead.lost(stream)

    jobs = [_job(stream, plan, layer, seeds) for stream, (plan, layer) in missing.items()]
    fetcher = Fetcher(repository, options.parallel, options.timeout, progress, arrived, limits, told, lost)
    fetcher.run(jobs)
    if seeds is not None:
        seeds.account(fetcher)
    for job, error in fetcher.disappointments:
        plan, layer = missing[job.stream]
        if job.by == DELTA:
            plan.warnings.append(f"The delta of layer {layer.diff_id} failed: {error.text}")
        elif seeds is not None and not isinstance(error, ImageNotFound):
            plan.warnings.append(seeds.complaint(job, error))
    delivered = {stream: job.by for stream, job in fetcher.brought.items()}
    return _Brought(fetcher.results, delivered, seeds.stats if seeds is not None else [])


def _register(
    repository: Repository,
    plans: Sequence[Plan],
    options: Options,
    progress: Progress,
    begun: Mapping[str, Ahead],
    brought: _Brought,
) -> list[Outcome]:
    """Register the documents of every image. A layer that several images lacked is counted with the first."""
    stored = {stream: stream_digest(layer.stream) for stream, layer in brought.layers.items()}
    outcomes = []
    claimed: set[StreamName] = set()
    for plan in plans:
        mine = [stream for stream in plan.missing() if stream not in claimed]
        claimed.update(mine)
        images, ahead = options.images_of(plan.request), begun.get(plan.request.name)
        with doing(f"registering {plan.request.ref}"):
            documents_changed = publish.publish(repository, plan, images, stored, progress, ahead)
        got = [brought.layers[stream] for stream in mine]
        stats = _stats(plan)
        stats.objects_copied = sum(layer.objects_new for layer in got)
        stats.objects_already_present = sum(layer.objects_present for layer in got)
        stats.bytes_copied = sum(layer.bytes_new for layer in got)
        stats.bytes_inlined = sum(layer.bytes_inlined for layer in got)
        stats.bytes_fetched = sum(layer.fetched for layer in got)
        stats.peers = brought.peers
        streams = mine + [stream for stream in documents_changed if stream not in claimed]
        claimed.update(streams)
        changed = bool(streams) or plan.renames
        fetched = {stream: brought.layers[stream].fetched for stream in mine}
        outcomes.append(Outcome(plan, streams, stats, changed, brought.delivered, fetched))
    return outcomes


def _set_name(repository: Repository, plan: Plan) -> None:
    """Let the names of the request lead to the image, and remove those that it gives up."""
    name = plan.request.name
    origin = plan.origin
    for each in (name, *plan.request.tags):
        if origin is not None:
            namerecords.remember(repository, each, origin)
        repository.tag(each, plan.digest)
    for each in plan.leaving:
        repository.untag(each)
        namerecords.forget(repository, each)
    if plan.standing.name != name:
        repository.untag(plan.standing.name)
        namerecords.forget(repository, plan.standing.name)
        plan.warnings.append(f"The name {plan.standing.name!r} is now {name!r}, as other programs give it.")


def _remember_origins(repository: Repository, plans: Sequence[Plan]) -> None:
    """Bring the records of names up to date that are right already: they may lack the reference that was asked this
    time. That counts as no change of the repository, and a failure is ignored.
    """
    for plan in plans:
        origin = plan.origin
        if plan.source is not None and origin is not None:
            with contextlib.suppress(EngineError):
                for name in (plan.request.name, *plan.request.tags):
                    namerecords.remember(repository, name, origin)


def _begin(
    repository: Repository,
    plans: Sequence[Plan],
    options: Options,
    most: int,
    stack: contextlib.ExitStack,
    told: Mapping[StreamName, Feed],
) -> dict[str, Ahead]:
    """Begin to make EROFS images beside the transfer, of at most ``most`` images of the task, by name. ``stack`` ends
    what nobody waited for.
    """
    begun: dict[str, Ahead] = {}
    if most < 2:
        return begun  # a single processor has nothing to spare

    def leave() -> None:
        # A process that kept a connection open would keep its skopeo from seeing that the module is gone.
        for plan in plans:
            if plan.source is not None:
                plan.source.abandon()
            for layer in plan.layers:
                if layer.delta is not None:
                    layer.delta.source.abandon()

    seen: set[str] = set()
    free = dict(told)
    for plan in plans:
        if len(begun) < most and plan.config_digest not in seen and plan.missing():
            seen.add(plan.config_digest)
            # What is read from a feed is gone: where images share a layer, one of them follows it while it arrives.
            mine = {stream: free.pop(stream) for stream in plan.missing() if stream in free}
            ahead = publish.begin(repository, plan, options.images_of(plan.request), leave, mine)
            if ahead is not None:
                stack.callback(ahead.close)
                begun[plan.request.name] = ahead
    return begun


def _peers(
    options: Options, repository: Repository, missing: Mapping[StreamName, tuple[Plan, Layer]], progress: Progress
) -> Peers | None:
    if not options.peers:
        return None
    from ..source.peer import PeerOptions  # late: it brings http.client and ssl
    from .peers import Peers

    chosen = PeerOptions(options.peer_ca_file, options.peer_headers, options.min_rate)
    return Peers(options.peers, chosen, repository.algorithm, missing, progress)


def _job(stream: StreamName, plan: Plan, layer: Layer, seeds: Peers | None) -> Any:
    """The fetcher's job for a missing layer: by its delta if there is one, then by peers, then by itself."""
    from .fetch import DELTA, Job
    from .layer import TAR_DIFF, LayerSpec

    if plan.source is None:
        raise AssertionError("this must hold: plan.source is not None")
    spec = LayerSpec(layer.source.digest, layer.source.size, layer.diff_id, layer.compression)
    job = Job(stream, spec, plan.source, plan.reference, by=_transport(plan))
    if seeds is not None and plan.config is not None and layer.compression is not None:
        job = seeds.before(job)
    delta = layer.delta
    if delta is None:
        return job
    from ..formats.tardiff import output_limit

    blob, limit = delta.descriptor, output_limit(layer.source.size)
    spec = LayerSpec(blob.digest, blob.size, layer.diff_id, TAR_DIFF, delta.image.hex(), limit)
    return Job(stream, spec, delta.source, delta.reference, job, DELTA)


def _transport(plan: Plan) -> str:
    """What results call the place that an image itself comes from."""
    return "registry" if plan.reference.is_remote else plan.reference.transport


def _require_space(repository: Repository, plans: Sequence[Plan], limits: Limits) -> Limits:
    """Refuse before the first byte when not even the blobs as they are compressed would fit; the limits, with the space
    that is free.
    """
    layers = {stream: layer for plan in plans for stream, layer in plan.missing().items()}.values()
    needed = sum(layer.to_fetch for layer in layers)
    # Data that cannot be compressed grows a little when it is compressed all the same.
    if limits.max_size is not None and needed - (needed >> 8) > limits.max_size:
        raise TooLarge(
            f"The missing layers have {needed} bytes ({human(needed)}) even as they are compressed, and the task "
            f"allows {limits.max_size} ({human(limits.max_size)}).",
            "If the image may be so large, raise 'max_size'.",
        )
    # Every layer needs at least its splitstream, every image its documents.
    inodes = len(layers) + 2
    free, free_inodes = repository.free_space()
    if needed > free:
        raise NoSpace(
            f"The missing layers need at least {needed} bytes ({human(needed)}), and {repository.path} has {free} "
            f"bytes ({human(free)}) free.",
            "Free space on that file system or remove images, then run again.",
        )
    if free_inodes is not None and inodes > free_inodes:
        raise NoSpace(
            f"The missing layers need at least {inodes} inodes, and the file system of {repository.path} has "
            f"{free_inodes} free.",
            "Remove files there, then run again.",
        )
    return dataclasses.replace(limits, free=free)


def forget(repository: Repository, request: Request, check: bool) -> Report:
    """Remove the name of an image; what it led to is told. The data stays until the repository is pruned."""
    repository.check_tag_name(request.name)
    standing = planning.Standing.of(repository, request)
    previous = Foreseen.known(standing.digest)
    names = [standing.name] if standing.digest is not None else []
    names += [tag for tag in request.tags if repository.tag_digest(tag) is not None]
    try:
        known, previous_layers = _known(repository, previous)
    except MissingLibrary:
        known, previous_layers = ImageResult(), []  # these are only shown; a name can be removed without them
    if names and not check:
        with publish.alone(repository):
            for name in names:
                repository.untag(name)
                namerecords.forget(repository, name)
        # What is reported as removed must not come back after a power cut.
        repository.sync()
    result = dataclasses.replace(
        known,
        name=request.name,
        ref=request.ref or (standing.record.ref if standing.record else None),
        registry_digest=standing.record.registry_digest if standing.record else None,
        index_digest=standing.record.index_digest if standing.record else None,
        previous_digest=previous,
        tags=list(request.tags),
        policy=standing.record.policy if standing.record else None,
    )
    return Report(result, bool(names), standing.name, previous_layers)


def _known(repository: Repository, digest: str | None) -> tuple[ImageResult, list[str]]:
    """What the repository knows of a manifest without its layers, and their blob digests."""
    document = imagestreams.usable(repository, imagestreams.MANIFEST, digest) if digest else None
    if document is None:
        return ImageResult(), []
    manifest = ocidocuments.parse_manifest(document.raw)
    layers = [layer.digest for layer in manifest.layers]
    config = imagestreams.usable(repository, imagestreams.CONFIG, manifest.config.digest)
    if config is None:
        return ImageResult(config_digest=manifest.config.digest), layers
    container = ocidocuments.parse_config(config.raw) if ocidocuments.is_container(manifest) else None
    refs = {name: ref for name, ref in config.refs.items() if imagestreams.is_image_ref(name)} if container else {}
    result = ImageResult(
        config_digest=manifest.config.digest,
        image_id=publish.image_id(repository, refs, boot=False),
        boot_image_id=publish.image_id(repository, refs, boot=True),
        about=about(manifest, container),
    )
    return result, layers


def describe(repository: Repository, outcome: Outcome) -> Report:
    """An outcome as modules return it."""
    plan = outcome.plan
    facts = plan.source.facts() if plan.source else Facts()
    # A layer that occurs twice, or that another image of the same task lacks too, is fetched once and counted there.
    to_fetch = {
        stream: outcome.fetched.get(stream, layer.to_fetch)
        for stream, layer in plan.missing().items()
        if stream in outcome.streams
    }
    foreseen = repository.foreseen
    come = {layer.stream for layer in plan.layers if foreseen.short(layer.stream) in foreseen.streams}
    # What earlier tasks will have fetched cannot be known, so neither can whether this task fetches these layers.
    unsure = set() if foreseen.complete else set(plan.missing()).difference(come)
    if unsure:
        outcome.stats.bytes_fetched = outcome.stats.layers_already_present = None
    result = ImageResult(
        name=plan.request.name,
        ref=plan.request.ref,
        digest=plan.digest,
        registry_digest=plan.registry_digest,
        index_digest=plan.index_digest,
        config_digest=plan.config_digest,
        previous_digest=plan.previous,
        tags=list(plan.request.tags),
        image_id=publish.image_id(repository, plan.image_refs, boot=False),
        boot_image_id=publish.image_id(repository, plan.image_refs, boot=True),
        about=about(plan.manifest, plan.config),
        layers=[
            LayerResult(
                digest=layer.blob.digest,
                diff_id=layer.diff_id,
                size=layer.blob.size,
                media_type=layer.blob.media_type,
                status=None if layer.stream in unsure else planning.PRESENT if layer.stream in come else layer.status,
                bytes_to_fetch=None if layer.stream in unsure else to_fetch.pop(layer.stream, 0),
                source=None if layer.stream in unsure | come else _delivers(outcome, layer),
            )
            for layer in plan.layers
        ],
        bytes_exact=None if unsure else outcome.bytes_exact,
        streams=None if unsure else list(outcome.streams),
        stats=outcome.stats,
        policy=plan.policy,
        skopeo_version=facts.skopeo_version,
        protocol_version=facts.protocol_version,
    )
    return Report(result, outcome.changed, plan.standing.name, _known(repository, plan.previous)[1])


def _delivers(outcome: Outcome, layer: Layer) -> str | None:
    """Where a missing layer comes from, or came from; None for one that was there."""
    if layer.stored is not None:
        return None
    planned = "delta" if layer.delta else _transport(outcome.plan)
    return outcome.delivered.get(layer.stream, planned)
