# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Read composefs EROFS images: which objects one needs, and the file tree it was written from.

An image may come from anybody, so nothing in it is believed. In an image that a composefs tool wrote, no byte belongs
to two inodes, directory blocks or shared xattrs. So a walk pays for every byte that it looks at out of a purse that
holds as many as the image has, and ends with FormatError when the purse is empty. That bounds time and memory whatever
the bytes say: loops, overlaps, absurd sizes and depths.
"""

from __future__ import annotations

import mmap
import stat as st
import struct
from binascii import unhexlify
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, NoReturn

from ..formats.bounds import MAX_NAME
from ..formats.digests import ObjectDigest
from .erofs import (
    BLOCK,
    CHUNKED,
    COMPACT,
    COMPOSEFS_MAGIC,
    DIRENT,
    EROFS_MAGIC,
    ESCAPED,
    EXTENDED,
    FIRST_INODE,
    HEADER,
    INLINE,
    METACOPY,
    OVERLAY,
    PLAIN,
    PREFIXES,
    REDIRECT,
    SLOT,
    SUPER,
    SUPERBLOCK,
    VERSIONS,
    XATTR_ENTRY,
    XI_TRUSTED,
    Entry,
)
from ..errors import FormatError
from .filetree import Directory, Leaf, Stat

if TYPE_CHECKING:
    from ..formats.fsverity import Algorithm

_KNOWN_COMPAT = 7  # superblock checksum, mtime, xattr filter
_KNOWN_INCOMPAT = 4  # chunked files
_SUPER_REST = struct.Struct("<IHHHBB4xQB23x")  # from feature_incompat on
_LEAF_KINDS = (st.S_IFREG, st.S_IFLNK, st.S_IFCHR, st.S_IFBLK, st.S_IFIFO, st.S_IFSOCK)
_SIZES = {1: 32, 2: 64}

_WHITEOUT = ESCAPED + b"whiteout"
_MARKERS = frozenset(
    prefix + name
    for prefix, names in (
        (ESCAPED, (b"whiteout", b"whiteouts", b"opaque")),
        (b"user.overlay.", (b"whiteout", b"whiteouts", b"opaque")),
    )
    for name in names
)


class _Inode(NamedTuple):
    nid: int
    xattrs: int  # position of the xattrs
    tail: int  # position behind them
    layout: int
    mode: int
    nlink: int
    size: int
    field: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int


class ErofsImage:
    """A composefs image, in memory or mapped. FormatError from every method (and the constructor) if the image is
    damaged.

    ``version`` is 0, 1 or 2. ``algorithm`` is that of the repository; without it digests of either algorithm are
    recognised.
    """

    def __init__(self, data: bytes | bytearray | memoryview | mmap.mmap, algorithm: Algorithm | None = None) -> None:
        self._data = data if isinstance(data, (bytes, mmap.mmap)) else bytes(data)
        self._sizes = _SIZES if algorithm is None else {algorithm.id: algorithm.size}
        self._length = len(data)
        self._purse = 0
        self._shared: dict[int, Entry] = {}
        self._last: tuple[bytes, _Inode | None] = (b"", None)
        self._read_superblock()

    @classmethod
    def open(cls, file: BinaryIO | int, algorithm: Algorithm | None = None) -> ErofsImage:
        """Map the image in an open file (or fd), which may be closed afterwards; its bytes are read as they are
        needed.
        """
        try:
            data = mmap.mmap(file if isinstance(file, int) else file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise FormatError("The EROFS image is empty.", "Make the image again.") from error
        return cls(data, algorithm)

    def close(self) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def __enter__(self) -> ErofsImage:
        return self

    def __exit__(self, *_args: object) -> None:
        self.close()

    def objects(self) -> set[ObjectDigest]:
        """The digests of all objects that the image refers to. What is no valid reference is skipped, as other
        composefs tools do.
        """
        self._start()
        objects: set[ObjectDigest] = set()
        visited = bytearray(self._length // SLOT + 1)
        self._within(self.root_nid * SLOT, SLOT, "inode")
        visited[self.root_nid] = 1
        todo = [self.root_nid]
        while todo:
            nid = todo.pop()
            inode = self._inode(nid)
            for index, suffix, value in self._xattrs(inode):
                if index == XI_TRUSTED and suffix == METACOPY:
                    digest = self._metacopy_digest(value)
                elif index == XI_TRUSTED and suffix == REDIRECT:
                    digest = self._redirect_digest(value)
                else:
                    continue
                if digest is not None:
                    objects.add(digest)
            if st.S_ISDIR(inode.mode):
                for name, child, _kind in self._entries(inode):
                    self._within(child * SLOT, SLOT, "inode")
                    if not visited[child] and name not in (b".", b".."):
                        visited[child] = 1
                        todo.append(child)
        return objects

    def tree(self) -> Directory:
        """The tree that the image was written from.

        What the writer adds is taken away again: whiteouts that hide the object directories, metacopy and redirect, and
        the marks of escaped whiteouts, which become character devices 0:0. In formats 0 and 1 a user's own xattrs of
        these names cannot be told from the marks and go too; format 2 has no marks and keeps them.
        """
        self._start()
        visited = bytearray(self._length // SLOT + 1)
        linked: dict[int, tuple[Leaf, int]] = {}
        interned: dict[tuple[tuple[bytes, bytes], ...], dict[bytes, bytes]] = {}
        top = self._inode(self.root_nid)
        if not st.S_ISDIR(top.mode):
            self._damaged("the root is not a directory")
        visited[self.root_nid] = 1
        root = Directory(self._stat(top, self._full_xattrs(top), interned))
        todo = [(root, top, self.root_nid)]
        while todo:
            directory, inode, parent_nid = todo.pop()
            entries = directory.entries
            dots = {}
            subdirectories = 0
            for name, nid, _kind in self._entries(inode):
                if name in entries or name in dots:
                    self._damaged(f"directory {inode.nid} has two entries of the same name")
                if name in (b".", b".."):
                    dots[name] = nid
                    continue
                self._within(nid * SLOT, SLOT, "inode")
                if visited[nid]:
                    if nid not in linked:
                        self._damaged(
                            f"inode {nid} has more names than its link count, or is a directory of several names"
                        )
                    leaf, _links = linked[nid]
                    leaf.nlink += 1
                    entries[name] = leaf
                    continue
                visited[nid] = 1
                child = self._inode(nid)
                xattrs = self._full_xattrs(child)
                if st.S_ISDIR(child.mode):
                    subdirectories += 1
                    entries[name] = below = Directory(self._stat(child, xattrs, interned))
                    todo.append((below, child, inode.nid))
                elif not self._is_stub(name, child, inode):
                    leaf = self._leaf(child, xattrs, self._stat(child, xattrs, interned))
                    entries[name] = leaf
                    if child.nlink > 1:
                        linked[nid] = (leaf, child.nlink)
                    elif child.nlink < 1:
                        self._damaged(f"inode {nid} has no link")
            if dots != {b".": inode.nid, b"..": parent_nid}:
                self._damaged(f"directory {inode.nid} does not name itself and its parent")
            if inode.nlink != 2 + subdirectories:
                self._damaged(
                    f"directory {inode.nid} has {subdirectories} subdirectories and a link count of {inode.nlink}"
                )
        for nid, (leaf, links) in linked.items():
            if leaf.nlink != links:
                self._damaged(f"inode {nid} has {leaf.nlink} names and a link count of {links}")
        return root

    def find(self, path: bytes) -> Leaf | None:
        """The regular file at ``path`` (no leading slash), which carries its content or digest; None if there is none.

        No symbolic link is followed. Directories are sorted, so this reads a few blocks for each directory on the way,
        and memory does not grow with the tree.
        """
        if path.startswith(b"/"):
            return None
        parent, _slash, name = path.rpartition(b"/")
        if self._last[0] != parent or self._last[1] is None:
            self._last = (parent, self._directory(parent))
        directory = self._last[1]
        if directory is None:
            return None
        self._start()
        nid = self._search(directory, name)
        if nid is None:
            return None
        inode = self._inode_at(nid)
        if not st.S_ISREG(inode.mode):
            return None
        xattrs = self._full_xattrs(inode)
        leaf = self._leaf(inode, xattrs, self._stat(inode, xattrs, {}))
        # A hole has a size and no content, and an escaped whiteout is a regular file only on the disk.
        whole = leaf.digest is not None or len(leaf.data) == leaf.size
        return leaf if leaf.kind == st.S_IFREG and whole else None

    def _directory(self, path: bytes) -> _Inode | None:
        self._start()
        inode = self._inode_at(self.root_nid)
        for name in path.split(b"/") if path else ():
            nid = self._search(inode, name) if st.S_ISDIR(inode.mode) else None
            if nid is None:
                return None
            inode = self._inode_at(nid)
        return inode if st.S_ISDIR(inode.mode) else None

    def _inode_at(self, nid: int) -> _Inode:
        self._within(nid * SLOT, SLOT, "inode")
        return self._inode(nid)

    def _search(self, directory: _Inode, name: bytes) -> int | None:
        """The inode number of an entry. In an unsorted directory some are not found, which is the only harm."""
        if name in (b"", b".", b".."):
            return None
        # The last block whose first name is not behind the one that is looked for, and then the same within the block.
        low, high = 0, (directory.size + BLOCK - 1) // BLOCK
        while low < high:
            middle = (low + high) // 2
            if self._entry(directory, self._block(directory, middle), 0)[0] <= name:
                low = middle + 1
            else:
                high = middle
        if not low:
            return None
        block = self._block(directory, low - 1)
        low, high = 0, self._count(directory, block)
        while low < high:
            middle = (low + high) // 2
            found, nid = self._entry(directory, block, middle)
            if found == name:
                return nid
            if found < name:
                low = middle + 1
            else:
                high = middle
        return None

    def _block(self, directory: _Inode, number: int) -> bytes:
        """One block of a directory's entries, the last of which may be short and stand behind the inode."""
        at, size = number * BLOCK, min(BLOCK, directory.size - number * BLOCK)
        if directory.layout == CHUNKED:
            self._damaged(f"inode {directory.nid} should have its content in the image")
        start = directory.tail if directory.layout == INLINE and size < BLOCK else directory.field * BLOCK + at
        self._within(start, size, "the entries of a directory")
        self._spend(size)
        return self._data[start : start + size]

    def _damaged(self, what: str) -> NoReturn:
        raise FormatError(
            f"The EROFS image is damaged: {what}.", "Make the image again, for example by pulling it once more."
        )

    def _within(self, start: int, length: int, what: str) -> None:
        if start + length > self._length:
            self._damaged(f"{what} at {start} reaches beyond the end of the image ({self._length} bytes)")

    def _start(self) -> None:
        self._purse = self._length
        self._shared.clear()

    def _spend(self, count: int) -> None:
        self._purse -= count
        if self._purse < 0:
            self._damaged("parts of it overlap")

    def _read_superblock(self) -> None:
        self._within(0, FIRST_INODE, "the superblock")
        magic, version, _flags, composefs_version = HEADER.unpack_from(self._data, 0)
        if magic != COMPOSEFS_MAGIC or version != 1 or composefs_version not in VERSIONS:
            self._damaged("it does not begin with a composefs header of a known version")
        self.version = composefs_version
        fields = SUPER.unpack_from(self._data, SUPERBLOCK)
        (
            magic,
            _checksum,
            compat,
            block_bits,
            ext_slots,
            self.root_nid,
            _inodes,
            self._time,
            self._time_nsec,
            blocks,
            meta,
            xattr_block,
            incompat,
        ) = fields
        if magic != EROFS_MAGIC:
            self._damaged("it has no EROFS superblock")
        _incompat, algorithms, devices, _slot, dir_bits, prefix_count, packed, _reserved = _SUPER_REST.unpack_from(
            self._data, SUPERBLOCK + 80
        )
        unusual = compat & ~_KNOWN_COMPAT or incompat & ~_KNOWN_INCOMPAT or block_bits != 12 or ext_slots or meta
        if unusual or algorithms or devices or dir_bits or prefix_count or packed:
            self._damaged("it uses features of EROFS that composefs images do not have")
        self._within(0, blocks * BLOCK, "the last block")
        self._xattr_base = xattr_block * BLOCK if composefs_version < 2 else 0

    def _inode(self, nid: int) -> _Inode:
        data = self._data
        at = nid * SLOT
        self._within(at, SLOT, "inode")
        if data[at] & 1:
            self._within(at, 2 * SLOT, "inode")
            form, icount, mode, _reserved, size, field, _number, uid, gid, mtime, mtime_nsec, nlink = (
                EXTENDED.unpack_from(data, at)
            )
            header = 64
        else:
            form, icount, mode, nlink, size, _reserved, field, _number, uid, gid, _reserved2 = COMPACT.unpack_from(
                data, at
            )
            mtime, mtime_nsec = self._time, self._time_nsec
            header = 32
        layout = form & ~1
        if layout not in (PLAIN, INLINE, CHUNKED):
            self._damaged(f"inode {nid} has the unknown format {form}")
        xattrs = at + header
        xsize = 8 + 4 * icount if icount else 0
        self._within(xattrs, xsize, "the xattrs")
        self._spend(header + xsize)
        mtime -= (mtime >> 63) << 64
        return _Inode(nid, xattrs, xattrs + xsize, layout, mode, nlink, size, field, uid, gid, mtime, mtime_nsec)

    def _xattr(self, at: int, end: int) -> tuple[Entry, int]:
        if at + 4 <= end:
            name_length, index, value_length = XATTR_ENTRY.unpack_from(self._data, at)
            start = at + 4 + name_length
            stop = start + value_length
            if stop <= end:
                return (index, self._data[at + 4 : start], self._data[start:stop]), stop + 3 & ~3
        self._damaged(f"the xattr at {at} is cut")

    def _xattrs(self, inode: _Inode) -> Iterator[Entry]:
        at, end = inode.xattrs, inode.tail
        if at == end:
            return
        count = self._data[at + 4]
        at += 12
        if at + 4 * count > end:
            self._damaged(f"inode {inode.nid} has more shared xattrs than room for them")
        for reference in struct.unpack_from(f"<{count}I", self._data, at):
            entry = self._shared.get(reference)
            if entry is None:
                place = self._xattr_base + 4 * reference
                entry, behind = self._xattr(place, self._length)
                self._spend(behind - place)
                self._shared[reference] = entry
            yield entry
        at += 4 * count
        while at < end:
            entry, at = self._xattr(at, end)
            yield entry

    def _full_xattrs(self, inode: _Inode) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for index, suffix, value in self._xattrs(inode):
            if index >= len(PREFIXES):
                self._damaged(f"inode {inode.nid} has an xattr with the unknown prefix {index}")
            found[PREFIXES[index] + suffix] = value
        return found

    def _pieces(self, inode: _Inode) -> Iterator[bytes]:
        """The content of an inode that stands in the image, in pieces of at most a block."""
        size = inode.size
        if inode.layout == CHUNKED:
            self._damaged(f"inode {inode.nid} should have its content in the image")
        # Format 2 keeps a whole inline file or symlink behind its inode, whatever its size; only directories have
        # blocks there.
        whole = inode.layout == INLINE and self.version == 2 and not st.S_ISDIR(inode.mode)
        tail = 0 if inode.layout == PLAIN else size if whole else size % BLOCK
        start = inode.field * BLOCK
        if size - tail:
            self._within(start, size - tail, "the blocks of an inode")
        if tail:
            self._within(inode.tail, tail, "the data behind an inode")
        self._spend(size)
        for at in range(start, start + size - tail, BLOCK):
            yield self._data[at : min(at + BLOCK, start + size - tail)]
        if tail:
            yield self._data[inode.tail : inode.tail + tail]

    def _entries(self, inode: _Inode) -> Iterator[tuple[bytes, int, int]]:
        for block in self._pieces(inode):
            yield from self._block_entries(inode, block)

    def _block_entries(self, inode: _Inode, block: bytes) -> Iterator[tuple[bytes, int, int]]:
        length = len(block)
        dirents = list(DIRENT.iter_unpack(block[: DIRENT.size * self._count(inode, block)]))
        last = len(dirents) - 1
        for number, (nid, start, kind) in enumerate(dirents):
            if number < last:
                end = dirents[number + 1][1]
            else:
                # Only the last name of a block may be followed by zeros.
                end = block.find(b"\0", start)
                end = length if end < 0 else end
            name = block[start:end]
            if not 0 < end - start <= MAX_NAME or end > length or b"\0" in name or b"/" in name:
                self._damaged(f"directory {inode.nid} has an impossible name")
            yield name, nid, kind

    def _count(self, inode: _Inode, block: bytes) -> int:
        first = block[8] | block[9] << 8 if len(block) >= DIRENT.size else 0
        if first < DIRENT.size or first % DIRENT.size or first > len(block):
            self._damaged(f"directory {inode.nid} has a block without entries")
        return first // DIRENT.size

    def _entry(self, inode: _Inode, block: bytes, number: int) -> tuple[bytes, int]:
        """One name of a block, whatever bytes it has, and its inode number."""
        last = self._count(inode, block) - 1
        nid, start, _kind = DIRENT.unpack_from(block, DIRENT.size * number)
        if number < last:
            return block[start : DIRENT.unpack_from(block, DIRENT.size * (number + 1))[1]], nid
        return block[start:].partition(b"\0")[0], nid

    def _stat(
        self,
        inode: _Inode,
        xattrs: dict[bytes, bytes],
        interned: dict[tuple[tuple[bytes, bytes], ...], dict[bytes, bytes]],
    ) -> Stat:
        own: dict[bytes, bytes] = {}
        for name, value in xattrs.items():
            if self.version < 2 and name in _MARKERS:
                continue
            if name.startswith(ESCAPED):
                own[OVERLAY + name[len(ESCAPED) :]] = value
            elif not name.startswith(OVERLAY):
                own[name] = value
        # Labels repeat from inode to inode: keep one dict of each.
        shared = interned.setdefault(tuple(sorted(own.items())), own) if own else None
        return Stat(inode.mode & 0o7777, inode.uid, inode.gid, inode.mtime, inode.mtime_nsec, shared)

    def _is_stub(self, name: bytes, child: _Inode, parent: _Inode) -> bool:
        """Whether it is one of the whiteouts that formats 0 and 1 put into the root."""
        if self.version == 2 or parent.nid != self.root_nid or len(name) != 2 or name.strip(b"0123456789abcdef"):
            return False
        return st.S_ISCHR(child.mode) and not child.field

    def _leaf(self, inode: _Inode, xattrs: dict[bytes, bytes], stat: Stat) -> Leaf:
        kind = st.S_IFMT(inode.mode)
        if kind not in _LEAF_KINDS:
            self._damaged(f"inode {inode.nid} is of no known file type")
        if kind in (st.S_IFCHR, st.S_IFBLK):
            return Leaf(stat, kind, rdev=inode.field)
        if kind == st.S_IFLNK:
            return Leaf(stat, kind, b"".join(self._pieces(inode)))
        if kind != st.S_IFREG:
            return Leaf(stat, kind)
        if self.version < 2 and not inode.size and _WHITEOUT in xattrs:
            return Leaf(stat, st.S_IFCHR)
        metacopy, redirect = xattrs.get(OVERLAY + b"metacopy"), xattrs.get(OVERLAY + b"redirect")
        if metacopy:
            digest = self._metacopy_digest(metacopy)
            if digest is None:
                self._damaged(f"inode {inode.nid} has a malformed {OVERLAY.decode()}metacopy")
            return Leaf(stat, kind, digest=digest, size=inode.size)
        if redirect:
            # An external file that overlayfs does not check: the path is all that names its object.
            digest = self._redirect_digest(redirect)
            if digest is None:
                self._damaged(f"inode {inode.nid} refers to a file outside the object store")
            return Leaf(stat, kind, digest=digest, size=inode.size)
        if inode.layout == CHUNKED:
            return Leaf(stat, kind, size=inode.size)  # a hole
        return Leaf(stat, kind, b"".join(self._pieces(inode)))

    def _metacopy_digest(self, value: bytes) -> ObjectDigest | None:
        if (
            len(value) < 4
            or value[0]
            or value[1] != len(value)
            or value[2]
            or self._sizes.get(value[3]) != len(value) - 4
        ):
            return None
        return ObjectDigest(value[4:])

    def _redirect_digest(self, value: bytes) -> ObjectDigest | None:
        """The digest at the end of an object path, ``xx/`` and the rest in hex, whatever stands before."""
        for size in sorted(self._sizes.values(), reverse=True):
            text = value[-2 * size - 1 :]
            if len(text) == 2 * size + 1 and text[2:3] == b"/" and b"/" not in text[3:]:
                try:
                    return ObjectDigest(unhexlify(text[:2] + text[3:]))
                except ValueError:
                    continue
        return None
