# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Write a file tree as a composefs EROFS image, bit for bit as the other composefs implementations do.

The image holds metadata and small files only; a larger file is an empty chunk-based inode whose
``trusted.overlay.metacopy`` and ``trusted.overlay.redirect`` xattrs name the object that overlayfs reads instead. The
name of an image is the fs-verity digest of these bytes, so every choice below (header, gap, place) is part of the
format and not a matter of taste.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO

from .erofs import (
    BLOCK,
    CHUNKED,
    COMPACT,
    COMPOSEFS_MAGIC,
    DIRENT,
    EROFS_MAGIC,
    EXTENDED,
    FEATURE_MTIME,
    FEATURE_XATTR_FILTER,
    FIRST_INODE,
    FLAG_ACL,
    HEADER,
    INLINE,
    KINDS,
    NULL_BLOCK,
    PLAIN,
    SLOT,
    SUPER,
    SUPERBLOCK,
    WHOLE_FILE_CHUNK,
    entry_bytes,
)
from .erofslayout import FORM_DATA, FORM_DEVICE, FORM_EXTERNAL, FORM_FOLDER, FORM_LINK, Folder, Inodes, Xattrs
from ..errors import InvalidLayer
from .filetree import Directory, Leaf

if TYPE_CHECKING:
    from ..formats.fsverity import Algorithm

_U64 = (1 << 64) - 1
_BATCH = 4096


class _Image:
    """One image being written: the steps of write_image() in order. Every list is indexed by inode, in the order of the
    image.
    """

    def __init__(self, root: Directory, version: int, algorithm: Algorithm) -> None:
        self.inodes = inodes = Inodes(root, version, algorithm)
        self.version = version
        self.epoch1 = version < 2
        self.nodes = inodes.nodes
        self.forms = inodes.forms
        self.min_mtime = (0, 0)
        self.headers = bytearray()
        self.icounts = array("H")
        self.nids = array("I")
        self.block_owners: list[int] = []
        self.inodes_end = 0

    def _xattrs(self) -> Iterator[Xattrs]:
        """The set of xattrs of each inode."""
        return map(self.inodes.sets.__getitem__, self.inodes.set_numbers)

    def choose_headers(self) -> None:
        """Epoch 1 uses the short header for an inode whose mtime is the smallest of all (kept in the superblock) and
        whose numbers fit.
        """
        if not self.epoch1:
            self.headers = bytearray(b"\x40") * len(self.nodes)
            return
        low: tuple[int, int] | None = None
        for node in self.nodes:
            stat = node.stat
            if low is None or stat.mtime <= low[0] or stat.mtime < 0:
                # Seconds compare unsigned: a time before 1970 is the smallest only if all are.
                when = (stat.mtime & _U64, stat.mtime_nsec)
                if low is None or when < low:
                    low = when
        if low is None:
            raise AssertionError("this must hold: low is not None")
        self.min_mtime = low
        seconds, nanoseconds = low
        for node in self.nodes:
            stat = node.stat
            short = (
                stat.mtime & _U64 == seconds
                and stat.mtime_nsec == nanoseconds
                and node.nlink <= 0xFFFF
                and not (stat.uid | stat.gid) >> 16
                and not node.size >> 32
            )
            self.headers.append(32 if short else 64)

    def _chunks(self, leaf: Leaf) -> tuple[int, int]:
        """The chunk field of an external file (log2 of the chunk size in blocks) and how many chunk addresses stand
        behind its inode.
        """
        if not self.epoch1:
            return WHOLE_FILE_CHUNK, 0 if leaf.digest is None else 1
        size = leaf.size
        bits = min(max((size - 1).bit_length() if size > 1 else 1, 12), 43)
        return bits - 12, -(-size >> bits)

    def place(self) -> None:
        """Decide where every inode stands. Data that follows an inode must not cross a block boundary; hence gaps
        before some inodes.
        """
        epoch1 = self.epoch1
        shared_digests = self.inodes.shared_digests
        icounts, nids = self.icounts, self.nids
        pointer_size = self.inodes.pointer_size
        at = FIRST_INODE
        for index, (node, form, header, xattrs) in enumerate(zip(self.nodes, self.forms, self.headers, self._xattrs())):
            xsize = xattrs.content + 12 if xattrs.parts != ((), (), ()) else 0
            tail = 0
            at = at + 31 & ~31
            if form == FORM_EXTERNAL:
                if not isinstance(node, Leaf):
                    raise AssertionError("this must hold: isinstance(node, Leaf)")
                if node.digest is not None:
                    xsize = 12 + xattrs.content + (8 if node.digest in shared_digests else pointer_size)
                tail = 4 * self._chunks(node)[1]
                if tail > 4:
                    if tail + xsize % 32 > BLOCK:
                        raise InvalidLayer(f"A file of {node.size} bytes is too large for an EROFS image.")
                    at += self._gap(at + header + xsize, tail)
            elif form == FORM_FOLDER:
                tail = node.size % BLOCK
                if node.size >= BLOCK:
                    self.block_owners.append(index)
                if tail:
                    at += self._gap(at + header + xsize, tail)
            elif form == FORM_LINK:
                size = node.size
                whole = header + xsize + size
                if not epoch1:
                    at += self._gap(at + header + xsize, size)
                    tail = size
                elif whole >= BLOCK:
                    # Too long to stand behind its inode: it moves to a block of its own, but the gap is made as if it
                    # had not.
                    self.block_owners.append(index)
                    if at // BLOCK != (at + whole - 1) // BLOCK:
                        at += -at % BLOCK
                else:
                    if at % BLOCK + whole > BLOCK:
                        at += -at % BLOCK
                    tail = size
            elif form == FORM_DATA:
                tail = self._tail_of(node.size)
                if tail < node.size:
                    self.block_owners.append(index)
                if tail:
                    at += self._gap(at + header + xsize, tail)
            icounts.append(xsize // 4 - 2 if xsize else 0)
            nids.append(at // SLOT)
            at += header + xsize + tail
        self.inodes_end = at + 31 & ~31
        if nids[0] > 0xFFFF or nids[-1] >> 32:
            raise InvalidLayer("The tree is too large for an EROFS image.")

    def _tail_of(self, size: int) -> int:
        """How much of an inline file stands behind its inode: in epoch 1 the rest after whole blocks, if at most half a
        block.
        """
        if not self.epoch1:
            return size
        return size % BLOCK if size % BLOCK <= BLOCK // 2 else 0

    def _gap(self, start: int, tail: int) -> int:
        """Bytes to leave free before an inode whose tail would begin at ``start``."""
        if self.epoch1:
            left = -start % BLOCK
            return left + 31 & ~31 if left < tail and left else 0
        # Format 2 also moves a tail that would end exactly at the boundary, and one that would begin there.
        if (start - 1) // BLOCK == (start + tail % BLOCK) // BLOCK:
            return 0
        return BLOCK - (start - 1) % BLOCK + 31 & ~31

    def emit(self, write: Callable[[bytes], object]) -> int:
        inodes = self.inodes
        inodes.refer(self.inodes_end)
        table_end = self.inodes_end + inodes.shared_size
        first_block = (table_end + BLOCK - 1) // BLOCK
        starts: dict[int, int] = {}
        blocks = first_block
        for index in self.block_owners:
            starts[index] = blocks
            node = self.nodes[index]
            blocks += (
                len(node.cuts) if isinstance(node, Folder) else -(-(node.size - self._tail_in_image(index)) // BLOCK)
            )
        if blocks >> 32:
            raise InvalidLayer("The tree is too large for an EROFS image.")
        epoch1 = self.epoch1
        flags = FLAG_ACL if epoch1 and inodes.acl else 0
        head = HEADER.pack(COMPOSEFS_MAGIC, 1, flags, self.version).ljust(SUPERBLOCK, b"\0")
        seconds, nanoseconds = self.min_mtime
        features = FEATURE_MTIME | FEATURE_XATTR_FILTER
        xattr_block = self.inodes_end // BLOCK if epoch1 else 0
        head += SUPER.pack(
            EROFS_MAGIC,
            0,
            features,
            12,
            0,
            self.nids[0],
            len(self.nodes),
            seconds,
            nanoseconds,
            blocks,
            0,
            xattr_block,
            0,
        )
        write(head)
        self._emit_inodes(write, starts)
        write(b"".join(map(entry_bytes, inodes.shared)) + bytes(first_block * BLOCK - table_end))
        for index in self.block_owners:
            self._emit_blocks(write, index)
        return blocks * BLOCK

    def _tail_in_image(self, index: int) -> int:
        return 0 if self.forms[index] == FORM_LINK else self._tail_of(self.nodes[index].size)

    def _emit_inodes(self, write: Callable[[bytes], object], starts: dict[int, int]) -> None:
        parts: list[bytes] = []
        append = parts.append
        at = FIRST_INODE
        compact, extended = COMPACT.pack, EXTENDED.pack
        epoch1 = self.epoch1
        pointing = self.inodes.pointing
        for index, (node, form, kind, header, icount, xattrs, nid) in enumerate(
            zip(self.nodes, self.forms, self.inodes.types, self.headers, self.icounts, self._xattrs(), self.nids)
        ):
            if at != nid * SLOT:
                append(bytes(nid * SLOT - at))
                at = nid * SLOT
            stat = node.stat
            size = node.size
            layout, field, tail, attributes = PLAIN, 0, b"", xattrs.plain
            if form == FORM_EXTERNAL:
                if not isinstance(node, Leaf):
                    raise AssertionError("this must hold: isinstance(node, Leaf)")
                layout = CHUNKED
                field, count = self._chunks(node)
                tail = NULL_BLOCK * count
                if node.digest is not None:
                    attributes = pointing(xattrs, node.digest)
            elif form == FORM_FOLDER:
                if not isinstance(node, Folder):
                    raise AssertionError("this must hold: isinstance(node, Folder)")
                field = starts.get(index, 0)
                if size % BLOCK:
                    layout = INLINE
                    tail = self._dirents(node, node.cuts[-1] if node.cuts else 0, len(node.names))
            elif form == FORM_LINK:
                if not isinstance(node, Leaf):
                    raise AssertionError("this must hold: isinstance(node, Leaf)")
                if index in starts:
                    field = starts[index]
                else:
                    layout, tail = INLINE, node.data
            elif form == FORM_DATA:
                if not isinstance(node, Leaf):
                    raise AssertionError("this must hold: isinstance(node, Leaf)")
                field = starts.get(index, 0)
                tail = node.data[size - self._tail_of(size) :]
                if tail:
                    layout = INLINE
            else:
                size = 0
                if form == FORM_DEVICE:
                    field = node.rdev
            mode = KINDS[kind] | stat.mode & 0o7777
            if header == 32:
                append(compact(layout, icount, mode, node.nlink, size, 0, field, index, stat.uid, stat.gid, 0))
            elif epoch1:
                append(
                    extended(
                        layout | 1,
                        icount,
                        mode,
                        0,
                        size,
                        field,
                        index,
                        stat.uid,
                        stat.gid,
                        stat.mtime & _U64,
                        stat.mtime_nsec,
                        node.nlink,
                    )
                )
            else:
                append(
                    extended(
                        layout | 1,
                        icount,
                        mode,
                        0,
                        size,
                        field,
                        nid,
                        stat.uid,
                        stat.gid,
                        stat.mtime & _U64,
                        0,
                        node.nlink,
                    )
                )
            append(attributes)
            append(tail)
            at += header + len(attributes) + len(tail)
            if len(parts) > _BATCH:
                write(b"".join(parts))
                parts.clear()
        append(bytes(self.inodes_end - at))
        write(b"".join(parts))

    def _dirents(self, folder: Folder, start: int, end: int) -> bytes:
        names = folder.names[start:end]
        children = self.inodes.children[folder.first + start : folder.first + end]
        offset = DIRENT.size * len(names)
        block = bytearray(offset)
        nids, types, pack_into = self.nids, self.inodes.types, DIRENT.pack_into
        at = 0
        for name, child in zip(names, children):
            pack_into(block, at, nids[child], offset, types[child])
            at += 12
            offset += len(name)
        return bytes(block) + b"".join(names)

    def _emit_blocks(self, write: Callable[[bytes], object], index: int) -> None:
        node = self.nodes[index]
        if isinstance(node, Folder):
            start = 0
            for end in node.cuts:
                write(self._dirents(node, start, end).ljust(BLOCK, b"\0"))
                start = end
        else:
            data = node.data[: node.size - self._tail_in_image(index)]
            write(data + bytes(-len(data) % BLOCK))


def write_image(root: Directory, version: int, algorithm: Algorithm, out: Callable[[bytes], object] | BinaryIO) -> int:
    """Write the image of the tree below ``root`` in format ``version`` (0, 1 or 2) and return its size in bytes.

    ``out`` is a binary file or a function that takes the bytes piece by piece, in order. ``algorithm`` is that of the
    repository whose digests the leaves carry. Sets ``nlink`` of the leaves and changes nothing else. Raises
    InvalidLayer, before the first piece, for what an EROFS image cannot hold: names over 255 bytes, symlink targets
    over 4095, xattr values over 65535, device numbers beyond 4095 and 1048575, hardlinked whiteouts, and numbers out of
    range.
    """
    image = _Image(root, version, algorithm)
    image.choose_headers()
    image.place()
    write: Callable[[bytes], object] = out if callable(out) else out.write
    return image.emit(write)


def image_bytes(root: Directory, version: int, algorithm: Algorithm) -> bytes:
    """The whole image as one piece; see write_image()."""
    image = bytearray()
    write_image(root, version, algorithm, image.extend)
    return bytes(image)
