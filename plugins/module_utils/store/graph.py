# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Who keeps what alive: roots lead to streams and EROFS images, these to further ones, and all of them to objects.

A root is whatever must not be lost: a name under ``streams/refs`` or ``images/refs``, or what the caller adds (a mount,
a unit of systemd, a journal). Streams are followed by object, not by name: a manifest that leads to a configuration
keeps it, whether or not a link under ``streams/`` leads there, too.

The nodes of the graph (streams and images) are few and are kept; objects may be many millions. Of an object only the
first eight bytes of its digest are remembered, with the number of the root that keeps it: 12 bytes. If two digests
ever begin alike, an object that nobody keeps is taken for one that is kept, which does no harm.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..formats.splitstream import DigestTable
from ..formats.repolayout import StreamName
from ..formats.digests import ObjectDigest, StreamDigest
from ..formats import digests, fsverity, repolayout
from ..errors import OF_THIS_PROCESS, EngineError, FormatError, doing
from .repository import MAX_DEPTH, Repository, too_deep

TAG, REFERRER, REF, IMAGE_REF = "tag", "referrer", "ref", "image_ref"
SHARED = -1

Broken = Callable[[ObjectDigest, EngineError], None]
"""Is told of a stream or image that cannot be read, and why."""

_REFERRERS = "streams/refs/oci-referrers"
_FIRST_COMPACTION = 4096


class Link(NamedTuple):
    """An entry of a directory of the repository: its path, and the text of the symbolic link, None if it is none."""

    path: str
    text: str | None
    time: float = 0.0


class Root(NamedTuple):
    """Something that keeps the stream or EROFS image in the object ``node`` alive. ``name`` is for people: the name of
    an image, the path of a link, a mount point.
    """

    kind: str
    name: str
    node: ObjectDigest
    image: bool = False


class Problem(NamedTuple):
    """Something in the repository that is not understood: a stable code, and the path it was found at."""

    code: str
    path: str


class Graph:
    """The names of a repository as they are now, and what they lead to. Holds no lock: that is the caller's part."""

    def __init__(self, repository: Repository, prove: bool = False) -> None:
        self.repository = repository
        self._prove = prove
        self.streams: dict[StreamName, StreamDigest] = {}
        """Names under ``streams/`` and the objects that they lead to."""
        self.images: dict[str, ObjectDigest] = {}
        """The same under ``images/``."""
        self.roots: list[Root] = []
        self.times: dict[str, float] = {}
        """When each image got its name, in seconds since the epoch."""
        self.problems: list[Problem] = []
        self._next: dict[ObjectDigest, tuple[ObjectDigest, ...]] = {}

    @classmethod
    def read(cls, repository: Repository, prove: bool = False, before: Graph | None = None) -> Graph:
        """Read all names. Streams that ``before`` has read need no second reading, for an object never changes.

        ``prove``: hash each stream, unless the kernel vouches for it, before believing what it refers to.
        """
        self = cls(repository, prove)
        if before is not None:
            self._next = before._next
        self.streams = {StreamName(name): StreamDigest(digest) for name, digest in self._listed("streams")}
        self.images = dict(self._listed("images"))
        streams: dict[str, ObjectDigest] = {str(name): digest for name, digest in self.streams.items()}
        for link in list_links(repository, "streams/refs"):
            self._add_ref(link, streams)
        for link in list_links(repository, "images/refs"):
            self._add_ref(link, self.images)
        return self

    def names(self) -> object:
        """What was read, in a form that is equal for two readings that found the same names."""
        return self.streams, self.images, sorted(self.roots)

    # --- questions
    # ----------------------------------------------------------------------------------------------------------------

    def nodes(self, root: Root, broken: Broken | None = None) -> list[ObjectDigest]:
        """The streams and images that ``root`` reaches, itself first. What cannot be read goes to ``broken``, or ends
        in FormatError.
        """
        seen = {root.node: None}
        todo = [root.node]
        while todo:
            for child in self._children(todo.pop(), broken):
                if child not in seen:
                    seen[child] = None
                    todo.append(child)
        return list(seen)

    def reaches(self, root: Root, broken: Broken | None = None) -> set[ObjectDigest]:
        """Every object that ``root`` keeps alive, streams and images included."""
        found: set[ObjectDigest] = set()
        for node in self.nodes(root, broken):
            found.add(node)
            table = self._table(node, follow_image=root.image and node == root.node, broken=broken)
            size = self.repository.algorithm.size
            found.update(DigestTable(table, size))
        return found

    def reached_by(
        self, objects: Iterable[ObjectDigest], roots: Sequence[Root] | None = None
    ) -> dict[ObjectDigest, list[Root]]:
        """The roots that keep each of these objects alive; for few objects, whatever the size of the repository."""
        wanted = set(objects)
        found: dict[ObjectDigest, list[Root]] = {digest: [] for digest in wanted}
        if not wanted:
            return found
        hits: dict[tuple[ObjectDigest, bool], set[ObjectDigest]] = {}
        for root in self.roots if roots is None else roots:
            reached: set[ObjectDigest] = set()
            for node in self.nodes(root, _ignore):
                key = (node, root.image and node == root.node)
                if key not in hits:
                    table = self._table(node, follow_image=key[1], broken=_ignore)
                    size = self.repository.algorithm.size
                    # A table may be as long as the repository is large: no set is made of it.
                    hits[key] = wanted.intersection([node]).union(
                        digest for digest in DigestTable(table, size) if digest in wanted
                    )
                reached |= hits[key]
            for digest in reached:
                found[digest].append(root)
        return found

    def owners(self, roots: Sequence[Root], broken: Broken | None = None) -> Owners:
        """Which of ``roots`` keeps each object: the number of the root, or SHARED if several do."""
        return self.owners_of_groups([[root] for root in roots], broken)

    def owners_of_groups(self, groups: Sequence[Sequence[Root]], broken: Broken | None = None) -> Owners:
        """The same for roots that count as one, such as two images of one mount point."""
        found: dict[ObjectDigest, int] = {}
        walked: dict[ObjectDigest, int] = {}
        for number, group in enumerate(groups):
            todo = [root.node for root in group]
            for root in group:
                if root.image:
                    walked[root.node] = number if walked.get(root.node, number) == number else SHARED
            while todo:
                node = todo.pop()
                owner = found.get(node)
                # A node that several roots reach was walked twice by then, and all below it stays SHARED.
                if owner in (number, SHARED):
                    continue
                found[node] = number if owner is None else SHARED
                todo += self._children(node, broken)
        owners = Owners(self.repository.algorithm.size)
        for node, owner in found.items():
            owners.add(node, owner)
            # The table of an image counts only for the roots that lead to the image itself.
            owner = walked.get(node, owner)
            owners.add(self._table(node, follow_image=node in walked, broken=broken), owner)
        return owners

    # --- how
    # ----------------------------------------------------------------------------------------------------------------

    def _listed(self, directory: str) -> Iterator[tuple[str, ObjectDigest]]:
        for link in list_links(self.repository, directory, recursive=False):
            digest = self._object_of(link)
            if digest is not None:
                yield link.path[len(directory) + 1 :], digest

    def _object_of(self, link: Link) -> ObjectDigest | None:
        if link.text is None:
            self.problems.append(Problem("stray_file", link.path))
            return None
        try:
            if link.text.startswith("../"):
                return fsverity.parse_object_path(link.text, self.repository.algorithm)
        except FormatError:
            pass
        self.problems.append(Problem("bad_link", link.path))
        return None

    def _add_ref(self, link: Link, targets: Mapping[str, ObjectDigest]) -> None:
        if link.text is None:
            self.problems.append(Problem("stray_file", link.path))
            return
        # Only the last component of the text counts, for every composefs tool.
        last = link.text.rsplit("/", 1)[-1]
        node = targets.get(last)
        if node is None:
            self.problems.append(Problem("dangling_reference", link.path))
            # The names of early 2026 lead to the digest of the configuration, whose stream is called otherwise.
            node = targets.get(repolayout.config_stream(last)) if digests.is_oci_digest(last) else None
            if node is None:
                return
        if link.path.startswith("images/"):
            self.roots.append(Root(IMAGE_REF, link.path, node, True))
        elif link.path.startswith(f"{repolayout.TAGS}/"):
            name = repolayout.decode_tag(link.path[len(repolayout.TAGS) + 1 :])
            self.roots.append(Root(TAG, name, node))
            self.times[name] = link.time
        else:
            kind = REFERRER if link.path.startswith(f"{_REFERRERS}/") else REF
            self.roots.append(Root(kind, link.path, node))

    def _children(self, node: ObjectDigest, broken: Broken | None) -> tuple[ObjectDigest, ...]:
        if node not in self._next:
            try:
                self._next[node] = self._read_node(node)
            except EngineError as error:
                if broken is None or isinstance(error, OF_THIS_PROCESS):
                    raise
                broken(node, error)
                return ()
        return self._next[node]

    def _read_node(self, node: ObjectDigest) -> tuple[ObjectDigest, ...]:
        """The nodes that a stream or image leads to. FormatError unless it is whole."""
        repository = self.repository
        with doing(f"Following the stream or image {node.hex()}"):
            if self._prove and not repository.secure and not repository.objects.verify(node):
                # A table with a flipped bit would name another object than the one that is needed.
                os.close(repository.objects.open(node))  # says so if it is missing
                raise FormatError(f"Object {node.hex()} does not have the content that its name says.", _REPAIR)
            if self.is_image(node):
                return ()
            with repository.open_object_stream(StreamDigest(node)) as stream:
                return tuple(dict.fromkeys(stream.named_refs.values()))

    def is_image(self, node: ObjectDigest) -> bool:
        """Whether an object begins as an EROFS image of composefs. FormatError if it is missing."""
        from ..rootfs import erofs

        with os.fdopen(self.repository.objects.open(node), "rb") as file, doing(f"Reading object {node.hex()}"):
            head = file.read(erofs.HEADER.size)
            return len(head) == erofs.HEADER.size and erofs.HEADER.unpack(head)[0] == erofs.COMPOSEFS_MAGIC

    def _table(self, node: ObjectDigest, follow_image: bool, broken: Broken | None) -> bytes:
        """The digests that a node refers to, one after the other. What an image of a configuration refers to is what
        its layers do, so an image is read only where it is a root itself.
        """
        if node not in self._next:
            return b""  # it could not be read, and the caller has been told
        try:
            if self.is_image(node):
                return b"".join(image_objects(self.repository, node)) if follow_image else b""
            with self.repository.open_object_stream(StreamDigest(node)) as stream:
                return stream.object_refs.data
        except EngineError as error:
            if broken is None or isinstance(error, OF_THIS_PROCESS):
                raise
            broken(node, error)
            return b""


def image_objects(repository: Repository, digest: ObjectDigest) -> set[ObjectDigest]:
    """The objects that the EROFS image in the object ``digest`` refers to. FormatError if it is damaged."""
    from ..rootfs.erofsreader import ErofsImage  # late: most questions are about streams

    fd = repository.objects.open(digest)
    try:
        with doing(f"Reading the EROFS image {digest.hex()}"), ErofsImage.open(fd, repository.algorithm) as image:
            return image.objects()
    finally:
        os.close(fd)


class Owners:
    """For each of very many objects the number of its owner, or SHARED: 12 bytes an object, and one of 256 parts at a
    time as a dictionary.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._keys = [array("Q") for _first in range(256)]
        self._numbers = [array("i") for _first in range(256)]
        self._limits = [_FIRST_COMPACTION] * 256

    def add(self, digests: bytes, owner: int) -> None:
        """Give every one of these digests (one after the other) to ``owner``; who has two owners is SHARED."""
        found, numbers = self._keys, self._numbers
        for first, key in zip(digests[:: self._size], keys(digests, self._size)):
            found[first].append(key)
            numbers[first].append(owner)
        for first, limit in enumerate(self._limits):
            if len(found[first]) > limit:
                self._compact(first)

    def part(self, first: int) -> dict[int, int]:
        """The owners of the objects whose digest begins with the byte ``first``, by ``key``."""
        found: dict[int, int] = {}
        for key, owner in zip(self._keys[first], self._numbers[first]):
            if found.setdefault(key, owner) != owner:
                found[key] = SHARED
        return found

    def _compact(self, first: int) -> None:
        part = self.part(first)
        self._keys[first] = array("Q", part.keys())
        self._numbers[first] = array("i", part.values())
        self._limits[first] = max(2 * len(part), _FIRST_COMPACTION)


def key(digest: ObjectDigest) -> int:
    """The number under which ``Owners.part`` lists an object."""
    return int.from_bytes(digest[:8], sys.byteorder)


def keys(digests: bytes, size: int) -> Sequence[int]:
    """The same for digests of ``size`` bytes that stand one after the other."""
    words = array("Q")
    words.frombytes(digests)
    return words[:: size // 8]


def list_links(repository: Repository, directory: str, recursive: bool = True) -> Iterator[Link]:
    """Every entry below ``directory`` (``streams``, ``streams/refs``, ...), sorted within each directory.

    Directories are entered if ``recursive``; else they count as entries, but for ``refs``. No link is followed.
    """
    try:
        with doing(f"Listing {repository.path}/{directory}"):
            fd = repository.root.open_directory(directory)
    except EngineError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return
        raise
    try:
        yield from _links_in(repository, fd, directory, recursive)
    finally:
        os.close(fd)


def _links_in(
    repository: Repository, fd: int, directory: str, recursive: bool, depth: int = MAX_DEPTH
) -> Iterator[Link]:
    if not depth:
        raise too_deep(f"{repository.path}/{directory}")
    with doing(f"Listing {repository.path}/{directory}"):
        names = sorted(os.listdir(fd))
    for name in names:
        path = f"{directory}/{name}"
        with doing(f"Looking at {repository.path}/{path}"):
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
                text = os.readlink(name, dir_fd=fd) if stat.S_ISLNK(found.st_mode) else None
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.EINVAL):
                    continue  # it went, or changed, meanwhile
                raise
        if not stat.S_ISDIR(found.st_mode):
            yield Link(path, text, found.st_mtime)
        elif recursive:
            with doing(f"Listing {repository.path}/{path}"):
                inner = repository.root.open_directory(name, under=(fd, directory))
            try:
                yield from _links_in(repository, inner, path, recursive, depth - 1)
            finally:
                os.close(inner)
        elif name != "refs":
            yield Link(path, None, found.st_mtime)


def _ignore(_node: bytes, _error: EngineError) -> None:
    """For callers who need not know what cannot be read."""


_REPAIR = "Find out more with the module composefs_check, which can repair it, too."
