# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Write a file tree as a composefs dumpfile (composefs-dump(5)), the text that ``mkcomposefs --from-file`` makes an
image from.

One line per name, parents first, names in the order of their bytes, fields separated by one space::

    PATH SIZE MODE NLINK UID GID RDEV MTIME PAYLOAD CONTENT DIGEST [KEY=VALUE ...]

MODE is octal and holds the file type, MTIME is seconds, a dot and nanoseconds (a plain number, not a fraction), PAYLOAD
is the target of a symlink or the path of an external file below the object store, ``-`` stands for nothing, and bytes
outside printable ASCII are escaped. A further name of a file is a line whose MODE begins with ``@`` and whose PAYLOAD
is the first name.
"""

from __future__ import annotations

import re
import stat as st
from collections.abc import Callable
from typing import BinaryIO

from .filetree import Directory, Leaf, count_links, walk

_NAMED = {b"\\": b"\\\\", b"\n": b"\\n", b"\r": b"\\r", b"\t": b"\\t"}
_ODD = re.compile(rb"[^!-~]|\\")
_ODD_IN_XATTR = re.compile(rb"[^!-~]|[\\=]")


def _replacement(match: re.Match[bytes]) -> bytes:
    byte: bytes = match[0]
    return _NAMED.get(byte) or b"\\x%02x" % ord(byte)


def _field(data: bytes) -> bytes:
    if data in (b"", b"-"):
        return b"\\x2d" if data else b"-"
    return _ODD.sub(_replacement, data)


def _xattrs(xattrs: dict[bytes, bytes] | None) -> bytes:
    if not xattrs:
        return b""
    # Here an empty value and a lone dash stand for themselves.
    return b"".join(
        b" %b=%b" % tuple(_ODD_IN_XATTR.sub(_replacement, part) for part in item) for item in sorted(xattrs.items())
    )


def _line(path: bytes, node: Directory | Leaf) -> bytes:
    stat = node.stat
    size, rdev, payload, content, digest = 0, 0, b"-", b"-", b"-"
    if isinstance(node, Directory):
        kind = st.S_IFDIR
        nlink = 2 + sum(isinstance(child, Directory) for child in node.entries.values())
    else:
        kind, nlink, rdev = node.kind, node.nlink, node.rdev
        if kind == st.S_IFREG:
            size = node.size
            if node.digest is not None:
                digest = node.digest.hex().encode()
                payload = digest[:2] + b"/" + digest[2:]
            else:
                content = _field(node.data)
        elif kind == st.S_IFLNK:
            size = node.size
            payload = _field(node.data)
    numbers = b"%d %o %d %d %d %d %d.%d" % (
        size,
        kind | stat.mode & 0o7777,
        nlink,
        stat.uid,
        stat.gid,
        rdev,
        stat.mtime,
        stat.mtime_nsec,
    )
    return b"%b %b %b %b %b%b\n" % (_field(path), numbers, payload, content, digest, _xattrs(stat.xattrs))


def write_dumpfile(root: Directory, out: Callable[[bytes], object] | BinaryIO) -> int:
    """Write the dumpfile of the tree below ``root`` and return the number of its lines.

    ``out`` is a binary file or a function that takes the text piece by piece, in order. Sets ``nlink`` of the leaves
    and changes nothing else.
    """
    write: Callable[[bytes], object] = out if callable(out) else out.write
    count_links(root)
    first: dict[int, bytes] = {}
    lines: list[bytes] = []
    written = 0
    for path, node in walk(root):
        if isinstance(node, Leaf) and node.nlink > 1:
            target = first.setdefault(id(node), path)
            if target is not path:
                lines.append(b"%b 0 @120000 - - - - 0.0 %b - -\n" % (_field(path), _field(target)))
                continue
        lines.append(_line(path, node))
        if len(lines) >= 1024:
            write(b"".join(lines))
            written += len(lines)
            lines.clear()
    write(b"".join(lines))
    return written + len(lines)


def dumpfile_bytes(root: Directory) -> bytes:
    """The whole dumpfile as one piece; see write_dumpfile()."""
    text = bytearray()
    write_dumpfile(root, text.extend)
    return bytes(text)
