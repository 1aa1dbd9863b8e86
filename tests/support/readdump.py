# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read a composefs dumpfile into a tree."""

from __future__ import annotations

import re
import stat as st

from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat

_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)")
_NAMED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"\\": b"\\"}


def _plain(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda match: _NAMED.get(match[1]) or bytes((int(match[1][1:], 16),)), text)


def _optional(text: bytes) -> bytes:
    return b"" if text == b"-" else _plain(text)


def read_dump(text: bytes) -> Directory:
    """The tree that the lines of a dumpfile describe."""
    folders: dict[bytes, Directory] = {}
    leaves: dict[bytes, Leaf] = {}
    for line in text.splitlines():
        path, size, mode, _nlink, uid, gid, rdev, mtime, payload, content, digest, *xattrs = line.split(b" ")
        path = _plain(path)
        node: Directory | Leaf
        if mode.startswith(b"@"):
            node = leaves[_plain(payload)]
        else:
            bits = int(mode, 8)
            seconds, nanoseconds = mtime.split(b".")
            pairs: dict[bytes, bytes] = {}
            for pair in xattrs:
                key, _equals, value = pair.partition(b"=")
                pairs[_plain(key)] = _plain(value)
            stat = Stat(st.S_IMODE(bits), int(uid), int(gid), int(seconds), int(nanoseconds), pairs or None)
            kind = st.S_IFMT(bits)
            if kind == st.S_IFDIR:
                node = folders[path] = Directory(stat)
            else:
                data = _optional(payload if kind == st.S_IFLNK else content)
                found = bytes.fromhex(digest.decode()) if digest != b"-" else None
                node = leaves[path] = Leaf(stat, kind, data, found, int(size), int(rdev))
        if path != b"/":
            parent, name = path.rsplit(b"/", 1)
            folders[parent or b"/"].entries[name] = node
    return folders[b"/"]
