# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read a directory into a tree as ``cfsctl create-image --no-propagate-usr-to-root`` reads it, to compare what is
written from it.
"""

from __future__ import annotations

import os
import stat as st

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat

INLINE_LIMIT = 64


def read_stat(path: bytes) -> tuple[os.stat_result, Stat]:
    has = os.lstat(path)
    xattrs = {
        os.fsencode(name): os.getxattr(path, name, follow_symlinks=False)
        for name in os.listxattr(path, follow_symlinks=False)
    }
    return has, Stat(
        st.S_IMODE(has.st_mode),
        has.st_uid,
        has.st_gid,
        has.st_mtime_ns // 10**9,
        has.st_mtime_ns % 10**9,
        xattrs or None,
    )


def read_tree(path: str | bytes, algorithm: fsverity.Algorithm) -> Directory:
    """The tree at ``path``: files over 64 bytes external, hardlinks by device and inode number. Nothing is
    transformed.
    """
    links: dict[tuple[int, int], Leaf] = {}
    root = Directory(read_stat(os.fsencode(path))[1])
    todo = [(os.fsencode(path), root)]
    while todo:
        where, directory = todo.pop()
        for name in os.listdir(where):
            child = os.path.join(where, name)
            has, stat = read_stat(child)
            key = (has.st_dev, has.st_ino)
            if st.S_ISDIR(has.st_mode):
                below = Directory(stat)
                directory.entries[name] = below
                todo.append((child, below))
            elif key in links:
                directory.entries[name] = links[key]
            else:
                directory.entries[name] = links[key] = _leaf(child, has, stat, algorithm)
    return root


def _leaf(path: bytes, has: os.stat_result, stat: Stat, algorithm: fsverity.Algorithm) -> Leaf:
    kind = st.S_IFMT(has.st_mode)
    if kind == st.S_IFLNK:
        return Leaf(stat, kind, os.readlink(path))
    if kind in (st.S_IFCHR, st.S_IFBLK):
        return Leaf(stat, kind, rdev=has.st_rdev)
    if kind != st.S_IFREG:
        return Leaf(stat, kind)
    with open(path, "rb") as file:
        content = file.read()
    if len(content) <= INLINE_LIMIT:
        return Leaf(stat, kind, content)
    return Leaf(stat, kind, digest=fsverity.digest(content, algorithm), size=len(content))
