# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What an EROFS image of composefs is made of: magic numbers, structures, xattr names. Shared by its writer and its
reader.

There are three formats. V0 and V1 ("epoch 1") order inodes breadth first, use the short inode header where they can,
hide the object directories behind 256 whiteouts in the root and escape the user's own whiteouts; V2 ("epoch 2") orders
depth first, uses long headers only, and does none of the rest.

On disk (all little endian): composefs header at 0, EROFS superblock at 1024, inodes from 1152, each at a multiple of 32
(its number, the *nid*, is the position / 32), the table of shared xattrs, then from the next 4096-byte boundary the
data blocks in inode order. On EROFS itself see the kernel's Documentation/filesystems/erofs.rst and
fs/erofs/erofs_fs.h.
"""

from __future__ import annotations

import functools
import stat as st
import struct

VERSIONS = (0, 1, 2)
BLOCK = 4096
SLOT = 32
SUPERBLOCK = 1024
FIRST_INODE = 1152
COMPOSEFS_MAGIC = 0xD078629A
EROFS_MAGIC = 0xE0F5E1E2
FEATURE_MTIME = 2
FEATURE_XATTR_FILTER = 4
FLAG_ACL = 1

PLAIN, INLINE, CHUNKED = 0, 4, 8
"""The data layout, as it stands in the format field of an inode; bit 0 of that field says that the header is the long
one.
"""

NULL_BLOCK = b"\xff\xff\xff\xff"
WHOLE_FILE_CHUNK = 31

KINDS = (0, st.S_IFREG, st.S_IFDIR, st.S_IFCHR, st.S_IFBLK, st.S_IFIFO, st.S_IFSOCK, st.S_IFLNK)
"""File type bits of the mode, by file type in directory entries."""

HEADER = struct.Struct("<IIII")
SUPER = struct.Struct("<IIIBBHQQIIII32xI44x")
COMPACT = struct.Struct("<HHHHIIIIHHI")
EXTENDED = struct.Struct("<HHHHQIIIIQII16x")
DIRENT = struct.Struct("<QHBx")
XATTR_HEADER = struct.Struct("<IB7x")
XATTR_ENTRY = struct.Struct("<BBH")

PREFIXES = (
    b"",
    b"user.",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
    b"trusted.",
    b"lustre.",
    b"security.",
)
"""What an xattr's name index stands for. Index 5 is written by V2 only."""
XI_TRUSTED = 4
METACOPY = b"overlay.metacopy"
REDIRECT = b"overlay.redirect"
OVERLAY = b"trusted.overlay."
ESCAPED = b"trusted.overlay.overlay."

MAX_XATTR_SUFFIX = 255
MAX_XATTR_ICOUNT = 0xFFFF
MAX_SHARED = 255

Entry = tuple[int, bytes, bytes]
"""An xattr: name index, name without that prefix, value."""


def xxh32(data: bytes, seed: int) -> int:
    """XXH32 of ``data``; the kernel uses it for the xattr name filter."""
    p1, p2, p3, p4, p5, m = 2654435761, 2246822519, 3266489917, 668265263, 374761393, 0xFFFFFFFF
    length, at = len(data), 0
    if length >= 16:
        lanes = [seed + p1 + p2 & m, seed + p2 & m, seed, seed - p1 & m]
        while at + 16 <= length:
            for lane, word in enumerate(struct.unpack_from("<IIII", data, at)):
                value = lanes[lane] + word * p2 & m
                lanes[lane] = (value << 13 | value >> 19) * p1 & m
            at += 16
        total = sum((value << turn | value >> 32 - turn) & m for value, turn in zip(lanes, (1, 7, 12, 18)))
    else:
        total = seed + p5
    total = total + length & m
    while at + 4 <= length:
        total = total + int.from_bytes(data[at : at + 4], "little") * p3 & m
        total = (total << 17 | total >> 15) * p4 & m
        at += 4
    for byte in data[at:]:
        total = total + byte * p5 & m
        total = (total << 11 | total >> 21) * p1 & m
    total = (total ^ total >> 15) * p2 & m
    total = (total ^ total >> 13) * p3 & m
    return total ^ total >> 16


@functools.lru_cache(maxsize=4096)
def filter_bit(index: int, suffix: bytes) -> int:
    """The bit that an xattr of this name sets in the (inverted) name filter of its inode."""
    return 1 << xxh32(suffix, 0x25BBE08F + index) % 32


def entry_bytes(entry: Entry) -> bytes:
    """An xattr as it stands behind an inode or in the shared table."""
    index, suffix, value = entry
    data = XATTR_ENTRY.pack(len(suffix), index, len(value)) + suffix + value
    return data + bytes(-len(data) % 4)


def epoch1_key(entry: Entry) -> tuple[bytes, int, bytes]:
    """The sort key of the shared table of epoch 1, whose largest key comes first: full name, then length of the value,
    then value.
    """
    return PREFIXES[entry[0]] + entry[1], len(entry[2]), entry[2]
