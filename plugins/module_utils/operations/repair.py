# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Mend what a check found: from what is here, from another repository, or from where each image came from.

An object is never missing for the sake of its repair: a damaged one stays where it is, with a second name among the
damaged things, until a good one is renamed over it. Whoever has the old file open, such as a mount, goes on with it.
Whatever was mended, the check is made once more in the end, and what it still finds is told.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ..formats.repolayout import StreamName
from . import check, keepers
from .findings import (
    BAD_LINK,
    IMAGE_DAMAGED,
    IMAGE_UNLISTED,
    IMAGE_WRONG,
    LAYER_POISONED,
    LOCAL,
    MOUNT_LOST,
    NO,
    OBJECT_DAMAGED,
    OBJECT_MISSING,
    OBJECT_UNREADABLE,
    OBJECT_UNSEALED,
    PROOF_WRONG,
    STREAM_DAMAGED,
    STREAM_UNNAMED,
    Finding,
)
from ..formats import fsverity, ocidocuments, repolayout
from ..formats.reference import parse_reference
from ..formats.digests import ObjectDigest, StreamDigest, digest_of, is_oci_digest, object_digest
from ..errors import OF_THIS_PROCESS, EngineError, FormatError, InvalidOption, doing
from ..host import files
from ..progress import Progress
from ..pull import plan as planning
from ..pull import publish, pull
from ..pull.plan import Request
from ..source.archive import Archive
from ..source.options import registry_to_log_in
from ..store import checks, imagestreams, marks, namerecords
from ..store import graph as graphs
from ..store.graph import Root
from ..store.repository import Repository

_PIECE = 1 << 20
_ROUNDS = 4


@dataclasses.dataclass(frozen=True)
class Repaired:
    """What was done about one finding, or would be. ``how``: ``set_aside``, ``rebuilt`` from what is here, ``copied``
    from another repository, ``fetched`` from where the image came from.
    """

    code: str
    object: str | None
    path: str
    how: str
    message: str


@dataclasses.dataclass(frozen=True)
class Means:
    """Where to get what is not here: ``source``, the path of another repository, of an OCI layout or of an archive, and
    how to reach registries.
    """

    source: str | None = None
    options: pull.Options = dataclasses.field(default_factory=pull.Options)


@dataclasses.dataclass
class Result:
    """``findings``: what is still wrong, or, foretold, what is wrong now. ``complaints``: why something could not be
    mended, in words.
    """

    findings: list[Finding]
    repaired: list[Repaired]
    complaints: list[str]
    checked: dict[str, object]

    @property
    def changed(self) -> bool:
        return bool(self.repaired)


def repair(
    repository: Repository,
    wish: check.Wish,
    means: Means,
    progress: Progress,
    foretell: bool = False,
    look: Callable[[Repository], list[keepers.Keeper]] = keepers.keepers,
) -> Result:
    """Check, mend and check again; with ``foretell`` only check and tell what would be mended how."""
    source = _Source(repository, means)
    try:
        _require_one_registry(repository, wish, means, source)
        report = check.check(repository, wish, progress, look, remember=False)
        if foretell or not report.findings:
            told = [_foretold(repository, finding, source) for finding in report.findings]
            return Result(report.findings, [one for one in told if one], [], report.checked)
        repository.require_writable()
        repaired: list[Repaired] = []
        complaints: list[str] = []
        # What was hidden behind the first findings, such as the objects of a layer that was missing itself, shows when
        # these are mended.
        for _round in range(_ROUNDS):
            before = {(one.code, one.object, one.path) for one in report.findings}
            work = _Repair(repository, report.findings, source, means, progress, look)
            work.run()
            repository.objects.suspects = set()
            report = check.check(repository, wish, progress, look)
            repaired += work.told(report.findings)
            complaints += [one for one in work.complaints if one not in complaints]
            if not {(one.code, one.object, one.path) for one in report.findings if one.repairable != NO} - before:
                break
        done = {(one.code, one.object, one.path): one for one in repaired}
        return Result(report.findings, list(done.values()), complaints, report.checked)
    finally:
        source.close()


def _require_one_registry(repository: Repository, wish: check.Wish, means: Means, source: _Source) -> None:
    """InvalidOption if a user name and a password are given and the images come from several registries, because the
    password would go to each that asks.
    """
    tags = repository.tags() if means.options.proxy.username is not None else {}
    names = [name for name in wish.images if name in tags] or list(tags)
    known = (source.reference(repository, name, tags[name]) for name in names)
    registry_to_log_in(
        means.options.proxy,
        (parse_reference(one) for one in known if one is not None),
        "Choose images of one registry with 'images', or name an auth_file.",
    )


def _path_of(source: str) -> str:
    """The path that a source names, also where it is written as a reference; only digests matter, not its tag."""
    if source.startswith(("oci:", "oci-archive:")):
        source = parse_reference(source).path
    return os.path.abspath(source)


class _Source:
    """Another repository, a layout or an archive to take things from."""

    def __init__(self, repository: Repository, means: Means) -> None:
        self.path = _path_of(means.source) if means.source else None
        self.other: Repository | None = None
        self.references: dict[str, str] = {}
        if self.path is None:
            return
        if os.path.exists(f"{self.path}/oci-layout") or os.path.isfile(self.path):
            self.references = _references(self.path)
            return
        self.other = Repository.open(self.path)
        if self.other.algorithm != repository.algorithm:
            raise InvalidOption(
                f"{self.path} names its objects by {self.other.algorithm.name}, {repository.path} by "
                f"{repository.algorithm.name}.",
                "Choose another 'source'.",
            )

    def has(self, digest: ObjectDigest) -> bool:
        """Whether the other repository has a good object of this digest."""
        return self.other is not None and self.other.objects.verify(digest)

    def reference(self, repository: Repository, name: str, manifest: str) -> str | None:
        """The reference by which to fetch the image ``name``, None if nothing is known of it."""
        if self.path is not None and self.other is None:
            return self.references.get(manifest)
        record = namerecords.read(repository, name)
        if record is not None:
            return record.ref
        # Names that earlier versions and cfsctl gave are references themselves, most of the time.
        base = name.partition("@sha256:")[0]
        return base if "://" in base and base.partition("://")[0] == "docker" else None

    def close(self) -> None:
        if self.other is not None:
            self.other.close()


def _references(path: str) -> dict[str, str]:
    """The references of the manifests in the OCI layout or archive at ``path``, by digest."""
    found: dict[str, str] = {}
    with doing(f"Reading {path}"), contextlib.ExitStack() as stack:
        if os.path.isfile(path):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            archive = Archive(fd, path)
            read, transport = archive.read, "oci-archive"
        else:
            directory = stack.enter_context(files.opened_directory(path))
            read, transport = partial(files.read_whole, directory), "oci"
        entries = _entries(read, "index.json", path)
        for entry in entries:
            digest = str(entry.get("digest"))
            within = [digest]
            if entry.get("mediaType") in (ocidocuments.OCI_INDEX, ocidocuments.DOCKER_LIST) and is_oci_digest(digest):
                inner = _entries(read, f"blobs/{digest.replace(':', '/')}", path)
                within += [str(one.get("digest")) for one in inner]
            tag = (entry.get("annotations") or {}).get("org.opencontainers.image.ref.name")
            if tag or len(entries) == 1:
                for one in within:
                    found.setdefault(one, f"{transport}:{path}:{tag}" if tag else f"{transport}:{path}")
    return found


def _entries(read: Callable[[str, int], bytes], file: str, path: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(read(file, ocidocuments.MAX_MANIFEST))["manifests"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FormatError(f"{file} in {path} is no index.", "Choose another 'source'.") from error
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _foretold(repository: Repository, finding: Finding, source: _Source) -> Repaired | None:
    """What would be done about a finding, None if nothing can be."""
    if finding.repairable == NO:
        return None
    digest = object_digest(finding.object) if finding.object else None
    if finding.repairable == LOCAL:
        how = "rebuilt" if finding.names else "set_aside"
    elif digest is not None and source.has(digest):
        how = "copied"
    else:
        tags = repository.tags()
        if not any(name in tags and source.reference(repository, name, tags[name]) for name in finding.names):
            return None
        how = "fetched"
    return Repaired(finding.code, finding.object, finding.path, how, f"{finding.path} would be {_way(how, source)}.")


def _way(how: str, source: _Source) -> str:
    """What is done about a finding, in words that follow ``was`` or ``would be``."""
    return {
        "set_aside": "set aside",
        "rebuilt": "made anew of what is here",
        "copied": f"copied from {source.path}",
        "fetched": "fetched again",
    }[how]


class _Repair:
    """One repair: what it did about which object."""

    def __init__(
        self,
        repository: Repository,
        findings: Sequence[Finding],
        source: _Source,
        means: Means,
        progress: Progress,
        look: Callable[[Repository], list[keepers.Keeper]],
    ) -> None:
        self.repository = repository
        self.findings = findings
        self.source = source
        self.means = means
        self.progress = progress
        self.look = look
        self.complaints: list[str] = []
        self.how: dict[int, str] = {}
        """What was done about the finding of this number."""
        self.names: list[str] = []
        self.by_image: dict[str, str] = {}
        """How each image was mended."""

    def run(self) -> None:
        repository = self.repository
        bad = {object_digest(one.object) for one in self.findings if one.object and one.code != IMAGE_UNLISTED}
        repository.objects.suspects = set(bad)
        affected = {name for one in self.findings for name in one.names}
        tags = repository.tags()
        self.names = [name for name in tags if name in affected]
        with repository.importing():
            for digest in sorted(bad):
                checks.keep_copy(repository, digest)
            for number, finding in enumerate(self.findings):
                with self._told(finding.path):
                    self._mend_here(number, finding)
            repository.sync()
        for name in self.names:
            self.progress.message(f"Mending {name}")
            with self._told(name):
                self._mend_image(name, tags[name])
        self._drop_what_is_left()

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OF_THIS_PROCESS:
            raise
        except EngineError as error:
            self.complaints.append(f"{what}: {error}")

    def _mend_here(self, number: int, finding: Finding) -> None:
        """Links, proofs, seals, and what the other repository has."""
        repository, code = self.repository, finding.code
        digest = object_digest(finding.object) if finding.object else None
        if code == STREAM_UNNAMED and digest is not None and repository.objects.contains(digest):
            repository.register(StreamName(finding.path[len("streams/") :]), StreamDigest(digest))
            self.how[number] = "rebuilt"
        elif code == IMAGE_UNLISTED and digest is not None and repository.objects.contains(digest):
            repository.link_image(digest)
            self.how[number] = "rebuilt"
        elif code == BAD_LINK and finding.repairable == LOCAL:
            checks.set_aside(repository, finding.path)
            self.how[number] = "set_aside"
        elif code == PROOF_WRONG:
            diff_id = finding.path.rpartition(imagestreams.LAYER)[2]
            checks.set_aside(repository, f"{marks.DIRECTORY}/trusted/{diff_id}")
            self.how[number] = "set_aside"
        elif code == OBJECT_UNSEALED and digest is not None:
            # Written anew, the copy is sealed and takes the place of the other.
            with os.fdopen(repository.root.open_file(f"objects/{fsverity.object_path(digest)}"), "rb") as file:
                repository.objects.put_pieces(iter(lambda: file.read(_PIECE), b""))
            self.how[number] = "rebuilt"
        elif code in (LAYER_POISONED, STREAM_DAMAGED, IMAGE_DAMAGED) and digest is not None:
            # The object is what its name says, but that is not what the links that lead to it stand for.
            if repository.objects.contains(digest):
                for path in self._links_to(digest, finding):
                    checks.set_aside(repository, path)
                    self.how[number] = "set_aside"
        elif code == OBJECT_MISSING and digest is not None and not finding.names and not self.source.has(digest):
            # No image needs it, but a stream that lacks it must not be taken for whole by the next pull.
            for path in self._links_needing(digest):
                checks.set_aside(repository, path)
                self.how[number] = "set_aside"
        elif digest is not None and self.source.has(digest) and not repository.objects.contains(digest):
            self._copy(digest)
            self.how[number] = "copied"

    def _links_to(self, digest: ObjectDigest, finding: Finding) -> list[str]:
        if finding.path.startswith("streams/"):
            return [finding.path]
        graph = graphs.Graph.read(self.repository)
        links = (("streams", graph.streams), ("images", graph.images))
        return [f"{kind}/{name}" for kind, found in links for name, one in found.items() if one == digest]

    def _links_needing(self, digest: ObjectDigest) -> list[str]:
        """The links of streams and images that lead to the object, or to something that refers to it."""
        graph = graphs.Graph.read(self.repository)
        found = []
        for kind, links in (("streams", graph.streams), ("images", graph.images)):
            for name, node in links.items():
                root = Root("", "", node, kind == "images")
                if digest == node or digest in graph.reaches(root, lambda _node, _error: None):
                    found.append(f"{kind}/{name}")
        return found

    def _copy(self, digest: ObjectDigest) -> None:
        other = self.source.other
        if other is None:
            return
        with doing(f"Copying object {digest.hex()} from {other.path}"):
            with os.fdopen(other.objects.open(digest), "rb") as file:
                found = self.repository.objects.put_pieces(iter(lambda: file.read(_PIECE), b""))
            if found != digest:
                raise FormatError(f"It has the digest {found.hex()} there.", "Check that repository, too.")

    # --- images
    # ----------------------------------------------------------------------------------------------------------------

    def _mend_image(self, name: str, manifest: str) -> None:
        """Have the image under ``name`` whole again, with the same manifest: from what is here if that suffices."""
        repository = self.repository
        wrong = {
            object_digest(one.object)
            for one in self.findings
            if one.code in (IMAGE_WRONG, IMAGE_DAMAGED) and one.object
        }
        # The configuration leads to them until the new ones are there: a repair that is interrupted is done again.
        images = self._wanted_images(manifest)._replace(distrusted=frozenset(wrong))
        for attempt in (False, True):
            if attempt and not self._rebuild_documents(manifest):
                break
            request = Request(f"docker://invalid.invalid/x@{manifest}", name)
            plan = planning.recall(repository, request, [], True, same_reference=False)
            if plan is not None:
                with repository.importing():
                    publish.publish(repository, plan, images, {}, self.progress)
                self.by_image[name] = "rebuilt"
                return
        ref = self.source.reference(repository, name, manifest)
        if ref is None:
            raise FormatError(
                f"Nothing is remembered of where {name} came from.",
                "Pull it once more, or set 'source' to a repository or layout that has it.",
            )
        options = dataclasses.replace(self.means.options, images=images)
        pull.pull_images(repository, [Request(ref, name, digest=self._asked(name, manifest))], options, self.progress)
        self.by_image[name] = "fetched"
        if repository.tag_digest(name) != manifest:
            raise FormatError(f"{ref} is another image now.", "Pull the image by its digest.")

    def _asked(self, name: str, manifest: str) -> str:
        record = namerecords.read(self.repository, name)
        return (record.registry_digest if record and self.source.path is None else None) or manifest

    def _wanted_images(self, manifest: str) -> publish.Images:
        """The EROFS images that the configuration had, as far as that can be read."""
        there = self.repository.stream(repolayout.manifest_stream(manifest))
        document = imagestreams.refs_of(self.repository, imagestreams.MANIFEST, there) if there else None
        for key, stream in imagestreams.streams_among(document or {}).items():
            if key.startswith(imagestreams.CONFIG_REF):
                refs = imagestreams.refs_of(self.repository, imagestreams.CONFIG, stream)
                if refs is not None:
                    keys = [one for one in refs if imagestreams.is_image_ref(one)]
                    boot = any(one.startswith(imagestreams.BOOT_REF) for one in keys)
                    return publish.Images(any(not one.startswith(imagestreams.BOOT_REF) for one in keys), boot)
        return publish.Images()

    def _rebuild_documents(self, manifest: str) -> bool:
        """Write the streams of manifest and configuration anew, if their documents are among the objects and all layers
        are there; whether that was so.
        """
        repository = self.repository
        raw = self._find_document(manifest)
        if raw is None:
            return False
        parsed = ocidocuments.parse_manifest(raw)
        config_raw = self._find_document(parsed.config.digest, parsed.config.size)
        if config_raw is None:
            return False
        container = ocidocuments.is_container(parsed)
        layers = [layer.digest for layer in parsed.layers]
        if container:
            layers = [one for _layer, one in ocidocuments.pairs(parsed, ocidocuments.parse_config(config_raw))]
        refs = {}
        for layer in layers:
            stream = repository.stream(repolayout.layer_stream(layer))
            if stream is None or not repository.objects.contains(stream):
                return False
            refs[layer] = stream
        with repository.importing():
            config = imagestreams.store(repository, imagestreams.CONFIG, config_raw, refs if container else {})
            lead = {imagestreams.CONFIG_REF + parsed.config.digest: config}
            stream = imagestreams.store(repository, imagestreams.MANIFEST, raw, {**lead, **refs})
            # Others that lead to the same configuration follow it.
            moved = {
                one: imagestreams.store(repository, imagestreams.MANIFEST, other.raw, {**other.refs, **lead})
                for one, other in imagestreams.manifests_of_config(repository, parsed.config.digest, config).items()
            }
            repository.sync()
            imagestreams.replace(repository, parsed.config.digest, config, {**moved, manifest: stream})
        return True

    def _find_document(self, digest: str, size: int | None = None) -> bytes | None:
        """The document with the OCI digest ``digest`` among all objects; None if it is not there."""
        repository = self.repository
        for kind in (imagestreams.MANIFEST, imagestreams.CONFIG):
            known = imagestreams.usable(repository, kind, digest)
            if known is not None:
                return known.raw
        for _name, one in repository.objects.names():
            if one is None:
                continue
            with contextlib.suppress(EngineError, OSError):
                found = repository.objects.stat(one)
                if found is None or found.st_size > ocidocuments.MAX_CONFIG or found.st_size != (size or found.st_size):
                    continue
                raw = repository.objects.read(one, ocidocuments.MAX_CONFIG)
                if digest_of(raw) == digest:
                    return raw
        return None

    # --- the end
    # ----------------------------------------------------------------------------------------------------------------

    def _drop_what_is_left(self) -> None:
        """Set aside the damaged objects that could not be mended, so that nobody takes them for present; also those
        that nobody needs. What is mounted keeps what it has.
        """
        repository = self.repository
        graph = graphs.Graph.read(repository)
        with self._told("mounts"):
            mounted = [root for root in keepers.roots(graph, self.look(repository)) if root.kind == keepers.MOUNT]
            damaged = {
                object_digest(one.object): number
                for number, one in enumerate(self.findings)
                if one.object and one.code in (OBJECT_DAMAGED, OBJECT_UNREADABLE)
            }
            left = {digest for digest in damaged if not repository.objects.contains(digest)}
            held = {digest for digest, roots in graph.reached_by(left, mounted).items() if roots}
            for digest in left - held:
                if checks.set_aside(repository, f"objects/{fsverity.object_path(digest)}"):
                    self.how[damaged[digest]] = "set_aside"
            for digest in sorted(held):
                self.complaints.append(f"The damaged object {digest.hex()} was left in place, for it is mounted.")

    def told(self, still: Iterable[Finding]) -> list[Repaired]:
        """What was done, by finding; what the new check still finds was not mended."""
        left = {(one.object or one.path) for one in still}
        done = []
        in_use = "A mount of this image may show the old content until it is made anew."
        for number, finding in enumerate(self.findings):
            how = self.how.get(number)
            if (finding.object or finding.path) in left and how != "set_aside":
                continue
            if how is None:
                if finding.repairable == NO or finding.code == MOUNT_LOST:
                    continue
                hows = {self.by_image.get(name) for name in finding.names}
                how = "fetched" if "fetched" in hows and finding.repairable != LOCAL else "rebuilt"
            text = f"{finding.path} was {_way(how, self.source)}."
            if any(name.startswith(f"{keepers.MOUNT} ") for name in finding.names):
                text += f" {in_use}"
            done.append(Repaired(finding.code, finding.object, finding.path, how, text))
        return done
