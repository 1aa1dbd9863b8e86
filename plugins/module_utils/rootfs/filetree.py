# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause
"""The file tree of an image: what the layers are merged into and what an EROFS image is written from.

A tree may hold hundreds of thousands of inodes and ten thousand nested directories, so the classes are slotted and
nothing here recurses. Stat objects and xattr dicts are shared between inodes: treat both as frozen and replace them
instead of changing them.
"""

from __future__ import annotations

import stat as st
from collections.abc import Callable, Iterator
from typing import Union

from ..errors import InvalidLayer
from ..formats.digests import ObjectDigest
from ..formats.tarheader import show

ReadObject = Callable[[ObjectDigest, int], bytes]
"""What reads an external file: (digest, limit in bytes) -> content; it raises an EngineError for a longer one."""


class Stat:
    """Metadata of one inode.

    ``mode`` is the mode field of the tar header as it stood there (the EROFS writer masks it with 0o7777 and adds the
    type), ``mtime`` whole seconds (signed 64 bits), ``mtime_nsec`` 0..999999999, ``xattrs`` full name to value, or None
    for no xattrs.
    """

    __slots__ = ("mode", "uid", "gid", "mtime", "mtime_nsec", "xattrs")

    def __init__(
        self,
        mode: int = 0,
        uid: int = 0,
        gid: int = 0,
        mtime: int = 0,
        mtime_nsec: int = 0,
        xattrs: dict[bytes, bytes] | None = None,
    ) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime = mtime
        self.mtime_nsec = mtime_nsec
        self.xattrs = xattrs

    def replaced(self, *, mtime: tuple[int, int] | None = None, xattrs: dict[bytes, bytes] | None = None) -> Stat:
        """A copy with another modification time (seconds, nanoseconds) and these xattrs (None or empty: none)."""
        seconds, nanoseconds = (self.mtime, self.mtime_nsec) if mtime is None else mtime
        return Stat(self.mode, self.uid, self.gid, seconds, nanoseconds, xattrs or None)

    def key(self) -> tuple[int, int, int, int, int, tuple[tuple[bytes, bytes], ...]]:
        """All fields as one comparable, hashable value."""
        return (self.mode, self.uid, self.gid, self.mtime, self.mtime_nsec, tuple(sorted((self.xattrs or {}).items())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stat) and self.key() == other.key()

    def __hash__(self) -> int:
        return hash(self.key())

    def __repr__(self) -> str:
        return (
            f"Stat(mode={self.mode:#o}, uid={self.uid}, gid={self.gid}, mtime={self.mtime}, "
            f"mtime_nsec={self.mtime_nsec}, xattrs={self.xattrs!r})"
        )


class Leaf:
    """Anything that is not a directory. One Leaf under several names is one inode with several hardlinks.

    ``kind`` is a file type of the stat module (S_IFREG, S_IFLNK, S_IFCHR, S_IFBLK, S_IFIFO, S_IFSOCK). ``data`` is the
    content of an inline regular file or the target of a symlink, ``digest`` the raw fs-verity digest of an external one
    (else None), ``size`` the length of the content either way, ``rdev`` a Linux device number (os.makedev), ``nlink``
    what count_links() found.
    """

    __slots__ = ("stat", "kind", "data", "digest", "size", "rdev", "nlink")

    def __init__(
        self,
        stat: Stat,
        kind: int = st.S_IFREG,
        data: bytes = b"",
        digest: ObjectDigest | None = None,
        size: int | None = None,
        rdev: int = 0,
    ) -> None:
        self.stat = stat
        self.kind = kind
        self.data = data
        self.digest = digest
        self.size = len(data) if size is None else size
        self.rdev = rdev
        self.nlink = 1

    def clone(self, stat: Stat) -> Leaf:
        """A separate inode with the same content and other metadata."""
        return Leaf(stat, self.kind, self.data, self.digest, self.size, self.rdev)

    def __repr__(self) -> str:
        return f"Leaf({self.stat!r}, kind={self.kind:#o}, size={self.size}, nlink={self.nlink})"


class Directory:
    """A directory: metadata and a map from name (any bytes but ``/`` and NUL) to child, in no particular order."""

    __slots__ = ("stat", "entries")

    def __init__(self, stat: Stat, entries: dict[bytes, Node] | None = None) -> None:
        self.stat = stat
        self.entries: dict[bytes, Node] = {} if entries is None else entries

    def __repr__(self) -> str:
        return f"Directory({self.stat!r}, {len(self.entries)} entries)"


Node = Union[Directory, Leaf]


class FileSystem:
    """A whole tree."""

    __slots__ = ("root",)

    def __init__(self, root: Directory) -> None:
        self.root = root

    def __repr__(self) -> str:
        return f"FileSystem({self.root!r})"


def directories(root: Directory) -> Iterator[Directory]:
    """Every directory once, the root first, in no particular order otherwise."""
    stack = [root]
    while stack:
        directory = stack.pop()
        yield directory
        for child in directory.entries.values():
            if child.__class__ is Directory:
                stack.append(child)


def walk(root: Directory) -> Iterator[tuple[bytes, Node]]:
    """Every path (``b"/"`` for the root) with its inode, depth first, names in the order of their bytes; hardlinks once
    per name.
    """
    yield b"/", root
    path = bytearray()
    # One growing path serves all: a stack of whole paths would need memory in proportion to the square of the depth.
    stack: list[tuple[int, dict[bytes, Node], Iterator[bytes]]] = [(0, root.entries, iter(sorted(root.entries)))]
    while stack:
        length, entries, names = stack[-1]
        del path[length:]
        for name in names:
            node = entries[name]
            path += b"/"
            path += name
            yield bytes(path), node
            if isinstance(node, Directory):
                stack.append((len(path), node.entries, iter(sorted(node.entries))))
                break
            del path[length:]
        else:
            stack.pop()


def count_links(root: Directory) -> tuple[int, int]:
    """Set ``nlink`` of every leaf to the number of names it has below ``root``; return (directories, distinct
    leaves).
    """
    stack = [root]
    folders = 0
    leaves: list[Leaf] = []
    while stack:
        folders += 1
        for child in stack.pop().entries.values():
            if isinstance(child, Directory):
                stack.append(child)
            else:
                child.nlink = 0
                leaves.append(child)
    distinct = 0
    for leaf in leaves:
        if not leaf.nlink:
            distinct += 1
        leaf.nlink += 1
    return folders, distinct


def find(root: Directory, path: bytes) -> Node | None:
    """The inode at ``path`` (relative or absolute), None when it or one of its parents is missing; never through a
    symlink.

    Raises InvalidLayer when a parent is no directory or the path contains ``..``.
    """
    node: Node = root
    for part in path.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            raise InvalidLayer(f"The path {show(path)} contains '..'.")
        if not isinstance(node, Directory):
            raise InvalidLayer(f"A part of {show(path)} is not a directory in the image.")
        child = node.entries.get(part)
        if child is None:
            return None
        node = child
    return node


def find_directory(root: Directory, path: bytes) -> Directory | None:
    """As find(), for a directory: anything else there is an InvalidLayer."""
    node = find(root, path)
    if node is not None and not isinstance(node, Directory):
        raise InvalidLayer(f"{show(path)} of the image is not a directory.")
    return node


def read_file(node: Node, path: bytes, read_object: ReadObject, limit: int) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; InvalidLayer when it is longer or not a
    regular file.
    """
    if not isinstance(node, Leaf) or node.kind != st.S_IFREG:
        raise InvalidLayer(f"{show(path)} of the image is not a regular file.")
    if node.size > limit:
        raise InvalidLayer(f"{show(path)} of the image has {node.size} bytes; at most {limit} are read.")
    return node.data if node.digest is None else read_object(node.digest, limit)
