# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The same layers, unpacked by umoci and merged by the engine: where the two may differ, the engine refuses."""

from __future__ import annotations

import os
import pathlib
import shutil
import stat as st
import subprocess

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import filetree
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory
from ansible_collections.composefs.oci.tests.support import layers
from ansible_collections.composefs.oci.tests.support.tarbytes import (
    DIRECTORY,
    FIFO,
    HARDLINK,
    SYMLINK,
    header,
    member,
    tar,
)

pytestmark = pytest.mark.skipif(
    shutil.which("umoci") is None or os.geteuid() != 0, reason="umoci is not on the PATH, or the user is not root"
)


def folder(name: str) -> bytes:
    return member(f"{name}/", type=DIRECTORY)


def link(name: str, target: str) -> bytes:
    return member(name, type=SYMLINK, linkname=target)


def ours(tars: list[bytes]) -> set[str]:
    """Every path with its kind and target or content."""
    found = set()
    for path, node in filetree.walk(layers.tree(*tars).root):
        name = path.decode()
        if isinstance(node, Directory):
            found.add(name.rstrip("/") + "/")
        elif node.kind == st.S_IFLNK:
            found.add(f"{name} -> {node.data.decode()}")
        else:
            found.add(f"{name} {node.data.decode()} {node.nlink}")
    return found


def theirs(tars: list[bytes], directory: pathlib.Path) -> set[str] | None:
    layers.write_layout(directory / "oci", tars)
    command = ("umoci", "unpack", "--image", f"{directory}/oci:x", str(directory / "bundle"))
    if subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode:
        return None
    root = directory / "bundle" / "rootfs"
    found = {"/"}
    for where, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = pathlib.Path(where, name)
            shown = f"/{path.relative_to(root)}"
            info = path.lstat()
            if path.is_symlink():
                found.add(f"{shown} -> {os.readlink(path)}")
            elif path.is_dir():
                found.add(f"{shown}/")
            else:
                found.add(f"{shown} {path.read_text() if path.is_file() else ''} {info.st_nlink}")
    return found


BASE = [folder("usr"), folder("usr/bin"), member("usr/bin/sh", b"sh"), link("bin", "usr/bin")]
SAME: dict[str, list[list[bytes]]] = {
    "below a link": [BASE, [member("bin/tool", b"t")]],
    "below a link of the same layer": [[*BASE, member("bin/tool", b"t")]],
    "below a link to nothing": [[*BASE, folder("var"), link("var/lock", "/lock")], [member("var/lock/x", b"1")]],
    "out of the root": [[*BASE, link("up", "../../.."), link("up2", "/../etc")], [member("up/x"), member("up2/y")]],
    "past what is missing": [[*BASE, link("l", "missing/../x"), link("m", "usr/../new/deep")], [member("l/f")]],
    "up from where a link leads": [
        [*BASE, folder("p"), folder("p/q"), link("q", "p/q"), link("r", "q/../new"), member("r/f")]
    ],
    "hard links": [BASE, [member("sh2", type=HARDLINK, linkname="bin/sh"), member("bin/sh3", b"3")]],
    "hard link to a link": [[*BASE, link("t", "usr"), member("t2", type=HARDLINK, linkname="t")]],
    "whiteouts": [BASE, [member("bin/.wh.sh"), member("bin/new", b"n")]],
    "opaque": [BASE, [member("bin/.wh..wh..opq"), member("bin/new", b"n")]],
    "a link whose target is whited out through it": [[folder("usr"), folder("b"), link("a", "/b"), member("a/.wh.a")]],
    "a directory over a link": [BASE, [folder("bin"), member("bin/tool", b"t")]],
    "old directories": [[folder("usr"), header(b"usr/d/", 0, b"\0", magic=bytes(8)), member("usr/d/f", b"f")]],
    "files whose names end in a slash": [[folder("usr"), member("usr/f/", b"f"), member("usr/p/", type=FIFO)]],
}
REFUSED: dict[str, list[list[bytes]]] = {
    "circle": [[*BASE, link("l", "m"), link("m", "l"), member("l/x")]],
    "below a link to a file": [[*BASE, link("f", "usr/bin/sh"), member("f/x")]],
    "empty link": [[*BASE, link("l", "")]],
    "empty hard link": [[*BASE, member("l", type=HARDLINK)]],
    "hard link below a link to nothing": [[*BASE, link("d", "/nope"), member("t", type=HARDLINK, linkname="d/x")]],
    "content of a link": [[*BASE, header(b"l", 512, SYMLINK, linkname=b"a") + b"y" * 512, member("z")]],
}
OURS_ALONE: dict[str, list[list[bytes]]] = {
    "size of a link": [[*BASE, header(b"l", 512, SYMLINK, linkname=b"a"), member("z")]],
    "size of a directory": [[*BASE, header(b"l/", 512, DIRECTORY), member("z")]],
    "a name that goes up": [[*BASE, member("usr/../b")]],
    "whiteout of the directory itself": [[*BASE, member("usr/.wh..")]],
}


@pytest.mark.parametrize("name", SAME)
def test_umoci_makes_the_same_tree(name: str, tmp_path: pathlib.Path) -> None:
    tars = [tar(*members) for members in SAME[name]]
    assert ours(tars) == theirs(tars, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_umoci_refuses_is_refused(name: str, tmp_path: pathlib.Path) -> None:
    tars = [tar(*members) for members in REFUSED[name]]
    assert theirs(tars, tmp_path) is None
    with pytest.raises(InvalidLayer):
        ours(tars)


@pytest.mark.parametrize("name", OURS_ALONE)
def test_where_readers_differ_the_engine_refuses_although_umoci_goes_on(name: str, tmp_path: pathlib.Path) -> None:
    tars = [tar(*members) for members in OURS_ALONE[name]]
    assert theirs(tars, tmp_path) is not None
    with pytest.raises(InvalidLayer):
        ours(tars)
