# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Check whether everything in a repository is what it says it is.

``quick`` looks at names, links, documents and tables: whether all that something leads to is there, in the right size.
``objects`` also reads every object. ``full`` also proves layers by their tars and makes every EROFS image once more.
Nothing is changed, and only the lock is held that everyone shares.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest, object_digest
from . import checkobjects, keepers
from .findings import (
    BAD_LINK,
    DANGLING_REFERENCE,
    DOCUMENT_DAMAGED,
    IMAGE_DAMAGED,
    IMAGE_UNLISTED,
    IMAGE_WRONG,
    INVALID_NAME,
    LAYER_POISONED,
    LOCAL,
    MOUNT_LOST,
    NO,
    OBJECT_MISSING,
    OBJECT_UNSEALED,
    PROOF_WRONG,
    SOURCE,
    STRAY_FILE,
    STREAM_DAMAGED,
    STREAM_UNNAMED,
    Finding,
)
from ..formats import fsverity, ocidocuments, repolayout
from ..host import locks, processors, workers
from ..errors import OF_THIS_PROCESS, EngineError, FormatError, ImageNotFound, InvalidDocument, doing
from ..progress import Progress
from ..store import checks, imagestreams, proofs
from ..store import graph as graphs
from ..store.graph import Graph, Root
from ..store.repository import Repository

QUICK, OBJECTS, FULL = "quick", "objects", "full"
LEVELS = (QUICK, OBJECTS, FULL)
# How often to look again at what others may be moving just now, and the seconds in between.
_LOOKS, _PAUSE = 10, 0.05


@dataclasses.dataclass(frozen=True)
class Wish:
    """How thoroughly to check, which images (by name; all without any), and with how many processes (0: as many as
    there are processors).
    """

    level: str = QUICK
    images: Sequence[str] = ()
    parallel: int = 0


@dataclasses.dataclass
class Report:
    """What was found, and how much was looked at."""

    findings: list[Finding] = dataclasses.field(default_factory=list)
    checked: dict[str, Any] = dataclasses.field(default_factory=dict)


def check(
    repository: Repository,
    wish: Wish,
    progress: Progress,
    look: Callable[[Repository], list[keepers.Keeper]] = keepers.keepers,
    remember: bool = True,
) -> Report:
    """Check the repository. ImageNotFound if a name of ``wish.images`` does not exist; other EngineErrors if looking
    itself fails. ``remember``: write down the result where this user may.
    """
    begun = time.time()
    run = _Check(repository, wish, progress, look)
    report = run.run()
    report.checked["seconds"] = round(time.time() - begun, 2)
    if remember and not wish.images:
        codes: dict[str, int] = {}
        for finding in report.findings:
            codes[finding.code] = codes.get(finding.code, 0) + 1
        checks.remember(repository, {"level": wish.level, "time": begun, "findings": codes, "checked": report.checked})
    return report


class _Check:
    """One run: what it has found so far, and what it looked at already."""

    def __init__(
        self,
        repository: Repository,
        wish: Wish,
        progress: Progress,
        look: Callable[[Repository], list[keepers.Keeper]],
    ) -> None:
        self.repository = repository
        self.wish = wish
        self.progress = progress
        self.graph = Graph.read(repository)
        self.findings: list[Finding] = []
        self.seen: set[ObjectDigest] = set()
        self.missing: set[ObjectDigest] = set()
        self.unreadable: set[ObjectDigest] = set()
        self.configs: dict[StreamDigest, tuple[str, list[str]]] = {}
        """The configuration streams of containers: the digest of the document, and its diff_ids."""
        try:
            found = look(repository)
        except FormatError:
            found = []  # a journal that cannot be read is no fault of the repository
        self.held = keepers.roots(self.graph, found)
        self.roots = [*self.graph.roots, *self.held]
        if wish.images:
            tags = {root.name: root for root in self.graph.roots if root.kind == graphs.TAG}
            absent = [name for name in wish.images if name not in tags]
            if absent:
                raise ImageNotFound(
                    f"The repository {repository.path} has no image named {absent[0]!r}.", "Correct the name."
                )
            self.roots = [tags[name] for name in dict.fromkeys(wish.images)]

    def run(self) -> Report:
        if self.wish.level == QUICK or self.wish.images:
            return self._run(None)
        # What stands in names, streams and images is looked at here while other processes read the objects.
        with checkobjects.checking_objects(self.repository, self._parallel()) as objects:
            return self._run(objects)

    def _parallel(self) -> int:
        return self.wish.parallel or processors.usable()

    def _run(self, objects: Callable[[int, Progress], tuple[checkobjects.Counted, list[Finding]]] | None) -> Report:
        repository, wish = self.repository, self.wish
        checked: dict[str, Any] = {"level": wish.level, "names": len(self.roots)}
        self.progress.message("Checking names, streams and images")
        nodes = self._nodes()
        if not wish.images:
            self._check_names()
        for node in nodes:
            self._check_node(node)
        self._check_documents(set(nodes))
        checked["streams"] = len(set(nodes).difference(self.graph.images.values()))
        checked["images"] = len(nodes) - checked["streams"]
        count = 0
        if not wish.images:
            count, strays = checkobjects.list_names(repository, wish.level == QUICK)
            self.findings += strays
        if wish.level != QUICK:
            parallel = self._parallel()
            if objects is None:
                counted, found = checkobjects.check_some(repository, self._reached(), parallel, self.progress)
            else:
                counted, found = objects(count, self.progress)
            self.findings += found
            checked.update(objects=counted.objects, bytes=counted.bytes)
            if wish.level == FULL:
                self._check_layers(nodes, parallel)
                self._check_images(parallel)
                self._check_mounts()
        self._judge()
        order = {code: number for number, code in enumerate(dict.fromkeys(one.code for one in self.findings))}
        self.findings.sort(key=lambda one: (order[one.code], one.path))
        return Report(self.findings, checked)

    def add(self, code: str, object_: ObjectDigest | None, path: str, message: str, repairable: str = NO) -> None:
        self.findings.append(Finding(code, object_.hex() if object_ else None, path, message, repairable=repairable))

    # --- names, links, tables
    # ----------------------------------------------------------------------------------------------------------------

    def _nodes(self) -> list[ObjectDigest]:
        """The streams and images to look at: all, or those of the images that were asked for."""
        found: dict[ObjectDigest, None] = {}
        for root in self.roots:
            for node in self.graph.nodes(root, lambda _node, _error: None):
                found[node] = None
        if not self.wish.images:
            for node in (*self.graph.streams.values(), *self.graph.images.values()):
                found[node] = None
                for below in self.graph.nodes(Root("", "", node), lambda _node, _error: None):
                    found[below] = None
        return list(found)

    def _check_names(self) -> None:
        words = {
            "stray_file": (STRAY_FILE, "{} is not a symbolic link."),
            "bad_link": (BAD_LINK, "{} does not lead to an object of this repository."),
            "dangling_reference": (DANGLING_REFERENCE, "{} leads to something that is not there."),
        }
        for problem in self.graph.problems:
            code, text = words[problem.code]
            if code == DANGLING_REFERENCE and not self._still(partial(self._dangles, problem.path)):
                continue
            self.add(code, None, problem.path, text.format(problem.path))
            if code == DANGLING_REFERENCE:
                name = _name_of(problem.path)
                self.findings[-1].names = [name]
                if name != problem.path and name in self.repository.tags():
                    self.findings[-1].repairable = SOURCE
        for name, digest in self.graph.images.items():
            if name != digest.hex():
                self.add(BAD_LINK, digest, f"images/{name}", f"images/{name} leads to another image.", LOCAL)
        for root in self.graph.roots:
            if root.kind == graphs.TAG and root.name.startswith("@"):
                self.add(
                    INVALID_NAME,
                    None,
                    f"{repolayout.TAGS}/{repolayout.encode_tag(root.name)}",
                    f"The name {root.name!r} begins with '@', which is kept for digests.",
                )
                self.findings[-1].names = [root.name]

    def _check_node(self, node: ObjectDigest) -> None:
        """One stream or image: whether it is there and whole, and whether everything is there that it leads to."""
        if self._absent(node, "a stream or image"):
            return
        path = f"objects/{fsverity.object_path(node)}"
        try:
            if self.graph.is_image(node):
                for digest in graphs.image_objects(self.repository, node):
                    self._absent(digest, f"the EROFS image {node.hex()}")
                return
        except OF_THIS_PROCESS:
            raise
        except EngineError as error:
            self.unreadable.add(node)
            code = IMAGE_DAMAGED if node in self.graph.images.values() else STREAM_DAMAGED
            self.add(code, node, path, error.text)
            return
        try:
            with self.repository.open_object_stream(StreamDigest(node)) as stream:
                lost: list[ObjectDigest] = []
                look, is_file = self.repository.objects.stat, stat.S_ISREG

                def size_of(digest: ObjectDigest) -> int:
                    found = look(digest)
                    if found is None or not is_file(found.st_mode):
                        lost.append(digest)
                        return 0
                    return found.st_size

                for digest in stream.named_refs.values():
                    self._absent(digest, f"the stream {node.hex()}")
                try:
                    for _chunk in stream.chunks(size_of):
                        pass
                except FormatError as error:
                    if not lost:
                        self.unreadable.add(node)
                        self.add(STREAM_DAMAGED, node, path, f"The stream {node.hex()}: {error.text}")
                if lost or node in self.unreadable:
                    for digest in (*lost, *stream.object_refs):
                        self._absent(digest, f"the stream {node.hex()}")
        except OF_THIS_PROCESS:
            raise
        except EngineError as error:
            self.unreadable.add(node)
            if node in self.graph.images.values():
                self.add(IMAGE_DAMAGED, node, path, f"What is listed as an EROFS image is not one: {error.text}")
            else:
                self.add(STREAM_DAMAGED, node, path, f"The stream {node.hex()}: {error.text}")

    def _size(self, digest: ObjectDigest) -> int | None:
        """The bytes of an object, None if it is not there."""
        found = self.repository.objects.stat(digest)
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None

    def _absent(self, digest: ObjectDigest, needed_by: str) -> bool:
        """Whether an object is missing; each one is reported once."""
        if digest in self.missing:
            return True
        if self._size(digest) is not None:
            return False
        self.missing.add(digest)
        self.add(
            OBJECT_MISSING,
            digest,
            f"objects/{fsverity.object_path(digest)}",
            f"The object {digest.hex()} is missing, which {needed_by} needs.",
        )
        return True

    # --- documents
    # ----------------------------------------------------------------------------------------------------------------

    def _check_documents(self, nodes: set[ObjectDigest]) -> None:
        for name, node in self.graph.streams.items():
            if node not in nodes or node in self.missing or node in self.unreadable:
                continue
            if name.startswith(imagestreams.MANIFEST):
                self._check_manifest(name, node)
            elif name.startswith(imagestreams.CONFIG):
                self._read(imagestreams.CONFIG, name[len(imagestreams.CONFIG) :], node, f"streams/{name}")

    def _check_manifest(self, name: StreamName, node: StreamDigest) -> None:
        path = f"streams/{name}"
        document = self._read(imagestreams.MANIFEST, name[len(imagestreams.MANIFEST) :], node, path)
        if document is None:
            return
        try:
            manifest = ocidocuments.parse_manifest(document.raw)
        except OF_THIS_PROCESS:
            raise
        except EngineError as error:
            self.add(DOCUMENT_DAMAGED, node, path, f"The manifest {name}: {error.text}")
            return
        digest = manifest.config.digest
        stream = document.stream_of(imagestreams.CONFIG_REF + digest)
        if stream is None:
            self.add(DOCUMENT_DAMAGED, node, path, f"The manifest {name} does not lead to its configuration.")
            return
        # A replacement that was cut off may have left the configuration under its interim name only.
        names = (repolayout.config_stream(digest), repolayout.stream_name(imagestreams.PENDING, digest))
        if all(self.graph.streams.get(one) != stream for one in names) and self._still(
            lambda: self.repository.stream(name) == node and all(self.repository.stream(one) != stream for one in names)
        ):
            self._unnamed(repolayout.config_stream(digest), stream)
        if stream in self.missing or stream in self.unreadable:
            return
        config = self._read(imagestreams.CONFIG, digest, stream, f"streams/{imagestreams.CONFIG}{digest}")
        if config is None:
            return
        layers = [layer.digest for layer in manifest.layers]
        holder, place = document, path
        if ocidocuments.is_container(manifest):
            try:
                layers = [
                    diff_id for _layer, diff_id in ocidocuments.pairs(manifest, ocidocuments.parse_config(config.raw))
                ]
            except OF_THIS_PROCESS:
                raise
            except EngineError as error:
                self.add(DOCUMENT_DAMAGED, stream, path, f"The configuration {digest}: {error.text}")
                return
            holder, place = config, f"streams/{imagestreams.CONFIG}{digest}"
            self.configs[stream] = (digest, layers)
            for key, image in config.refs.items():
                listed = self.graph.images.get(image.hex()) == image
                if imagestreams.is_image_ref(key) and not listed and image not in self.missing:
                    text = f"The EROFS image {image.hex()} of {name} is not listed, so it cannot be mounted."
                    self.add(IMAGE_UNLISTED, image, f"images/{image.hex()}", text, LOCAL)
        for layer in dict.fromkeys(layers):
            target = holder.stream_of(layer)
            if target is None:
                self.add(DOCUMENT_DAMAGED, holder.stream, place, f"{place} does not lead to the layer {layer}.")
                continue
            named = repolayout.layer_stream(layer)
            if named not in self.graph.streams and self._still(partial(self._lacks, named)):
                self._unnamed(named, target)

    def _dangles(self, path: str) -> bool:
        """Whether the reference at ``path`` is there and leads to no name; the last component of its text counts."""
        root = self.repository.root
        try:
            with root.parent(path) as (fd, name):
                last = os.readlink(name, dir_fd=fd).rpartition("/")[2]
        except FileNotFoundError:
            return False
        except (OSError, EngineError):
            return True
        try:
            with root.parent(f"{path.partition('/')[0]}/{last}") as (fd, name):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
        except (OSError, EngineError):
            return True
        return False

    def _lacks(self, name: StreamName) -> bool:
        return self.repository.stream(name) is None

    def _still(self, wrong: Callable[[], bool]) -> bool:
        """Whether something that the listing shows is really so: names are not listed in one instant, and others may
        have moved some of them meanwhile, or be about to.
        """
        for _look in range(_LOOKS):
            if not wrong():
                return False
            if not locks.holders(self.repository.fd):
                break
            time.sleep(_PAUSE)
        return True

    def _unnamed(self, name: StreamName, stream: StreamDigest) -> None:
        path = f"streams/{name}"
        if not any(finding.code == STREAM_UNNAMED and finding.path == path for finding in self.findings):
            self.add(STREAM_UNNAMED, stream, path, f"The stream {name} of an image lacks its name.", LOCAL)

    def _read(self, kind: str, digest: str, node: StreamDigest, path: str) -> imagestreams.Document | None:
        """The document, None if it is damaged; each one is reported once."""
        if node in self.unreadable:
            return None
        try:
            return imagestreams.read_object(self.repository, kind, digest, node)
        except (FormatError, InvalidDocument) as error:
            self.unreadable.add(node)
            # A missing object was reported already.
            with _found_elsewhere(f"Reading {path}"), self.repository.open_object_stream(node) as stream:
                if self.missing.intersection(stream.object_refs):
                    return None
            self.add(DOCUMENT_DAMAGED, node, path, error.text)
            return None

    # --- content
    # ----------------------------------------------------------------------------------------------------------------

    def _reached(self) -> set[ObjectDigest]:
        """The objects of the images that were asked for."""
        wanted: set[ObjectDigest] = set()
        for root in self.roots:
            wanted |= self.graph.reaches(root, lambda _node, _error: None)
        return wanted - self.missing

    def _check_layers(self, nodes: Iterable[ObjectDigest], processors: int) -> None:
        """Prove every layer by its tar."""
        wanted = set(nodes)
        layers = [
            (name[len(imagestreams.LAYER) :], node)
            for name, node in self.graph.streams.items()
            if name.startswith(imagestreams.LAYER) and node in wanted and node not in self.unreadable | self.missing
        ]
        done = 0

        def work(number: int, tell: Callable[[Any], None]) -> None:
            diff_id, node = layers[number]
            found = None
            with _found_elsewhere(f"Proving the layer {diff_id}"), self.repository.open_object_stream(node) as stream:
                found = "sha256:" + proofs.tar_sha256(stream, self.repository.objects)
            tell([number, found])

        def take(value: list[Any]) -> None:
            nonlocal done
            done += 1
            self.progress.message(f"Proving layers: {done} of {len(layers)}")
            diff_id, node = layers[value[0]]
            if value[1] is None or value[1] == diff_id:
                return
            broken = self.damaged()
            with _found_elsewhere(f"Reading the layer {diff_id}"), self.repository.open_object_stream(node) as stream:
                if broken.intersection(stream.object_refs):
                    return
            path = f"streams/{imagestreams.LAYER}{diff_id}"
            self.add(LAYER_POISONED, node, path, f"The layer {diff_id} holds a tar with the digest {value[1]}.")
            if self.repository.trusted(diff_id) == node:
                self.add(PROOF_WRONG, node, path, f"The layer {diff_id} is remembered as proved, and is not.", LOCAL)

        workers.spread("proves layers", len(layers), work, take, processors)

    def _check_images(self, processors: int) -> None:
        """Make every EROFS image once more, in memory, and compare its digest; equal digests are equal bytes."""
        bad = self.damaged()
        configs = [
            (stream, layers)
            for stream, (_digest, layers) in self.configs.items()
            if not bad.intersection(self.graph.reaches(Root("", "", stream), lambda _node, _error: None))
        ]
        done = 0

        def work(number: int, tell: Callable[[Any], None]) -> None:
            tell([number, *_wrong_images(self.repository, *configs[number])])

        def take(value: list[Any]) -> None:
            nonlocal done
            done += 1
            self.progress.message(f"Making EROFS images for comparison: {done} of {len(configs)}")
            for key, has, wants in value[1:]:
                self.add(
                    IMAGE_WRONG,
                    object_digest(has),
                    f"images/{has}",
                    f"The EROFS image {has} ({key}) is not what its layers make, which is {wants}.",
                    LOCAL,
                )

        workers.spread("makes EROFS images", len(configs), work, take, processors)

    def _check_mounts(self) -> None:
        bad = self.damaged()
        for root in self.held:
            if root.kind == keepers.MOUNT and root.node in bad:
                self.add(
                    MOUNT_LOST,
                    root.node,
                    f"images/{root.node.hex()}",
                    f"The {root.name} shows the image {root.node.hex()}, which is missing or damaged here: what the "
                    f"kernel has read of it is served on, and it cannot be mounted again.",
                )

    def damaged(self) -> set[ObjectDigest]:
        """Every object that something was found about."""
        return {object_digest(one.object) for one in self.findings if one.object}

    # --- what that means
    # ----------------------------------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Find out which names each finding concerns, and whether it can be mended here."""
        bad = self.damaged()
        reached = self.graph.reached_by(bad, self.roots)
        local = _mendable(self.repository, self.graph, bad, self.configs)
        # What such a stream holds are digests that can be looked up again, as long as its document is there.
        local |= {
            node
            for name, node in self.graph.streams.items()
            if name.startswith((imagestreams.MANIFEST, imagestreams.CONFIG))
        }
        for finding in self.findings:
            if not finding.object:
                continue
            digest = object_digest(finding.object)
            names = {root.name for root in reached[digest]}
            finding.names = sorted({*finding.names, *names})
            if finding.repairable == NO and finding.code != MOUNT_LOST:
                finding.repairable = (
                    LOCAL if digest in local or not names or finding.code == OBJECT_UNSEALED else SOURCE
                )


def _mendable(
    repository: Repository, graph: Graph, bad: set[ObjectDigest], configs: dict[StreamDigest, tuple[str, list[str]]]
) -> set[ObjectDigest]:
    """Those of the ``bad`` objects that can be made anew of what is here."""
    found = set()
    for stream in configs:
        images = {node for node in graph.nodes(Root("", "", stream), lambda _node, _error: None)[1:] if node in bad}
        with _found_elsewhere("Reading a configuration"), repository.open_object_stream(stream) as opened:
            made = set(imagestreams.images_among(opened.named_refs).values())
            layers = set(imagestreams.streams_among(opened.named_refs).values())
            below: set[ObjectDigest] = set()
            for layer in layers:
                below |= graph.reaches(Root("", "", layer), lambda _node, _error: None)
            if not bad.intersection(below):
                found |= made & (bad | images)
    return found


def _wrong_images(repository: Repository, stream: StreamDigest, layers: Sequence[str]) -> list[list[str]]:
    """The EROFS images of a configuration that are not what its layers make: key, digest, and what it should be."""
    from ..pull import makeimages
    from ..rootfs import erofswriter

    with repository.open_object_stream(stream) as opened:
        refs = dict(opened.named_refs)
    kinds = {imagestreams.image_ref(version, boot): (version, boot) for version in (1, 2) for boot in (False, True)}
    wanted = {key: kinds[key] for key in refs if key in kinds}
    if not wanted or any(layer not in refs for layer in layers):
        return []
    wrong: list[list[str]] = []
    # Layers of which no tree can be made are findings of their own.
    with _found_elsewhere("Making EROFS images anew"):
        system = makeimages.build_tree(repository, [StreamDigest(refs[layer]) for layer in layers])
        for boot in (False, True):
            keys = [key for key, (_version, for_boot) in wanted.items() if for_boot == boot]
            if boot and keys:
                from ..rootfs.bootable import transform_for_boot

                transform_for_boot(system, repository.objects.read)
            for key in keys:
                hasher = fsverity.Hasher(repository.algorithm)
                erofswriter.write_image(system.root, wanted[key][0], repository.algorithm, hasher.update)
                if hasher.digest() != refs[key]:
                    wrong.append([key, refs[key].hex(), hasher.digest().hex()])
        return wrong
    return []


@contextlib.contextmanager
def _found_elsewhere(what: str) -> Iterator[None]:
    """Ignore errors of a block that reads what may be damaged: the damage is a finding of its own. An error of this
    process says nothing about what was read, and ends the check: it must not pass for a proof.
    """
    try:
        with doing(what):
            yield
    except OF_THIS_PROCESS:
        raise
    except EngineError:
        pass


def _name_of(path: str) -> str:
    """The name of an image whose link is at ``path``, or the path."""
    tags = f"{repolayout.TAGS}/"
    return repolayout.decode_tag(path[len(tags) :]) if path.startswith(tags) else path
