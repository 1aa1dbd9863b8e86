# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import gzip
import io
import json
import os
import pathlib
import shutil
import stat as st
import subprocess
import sys

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import dumpfile, erofswriter
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from hypothesis import given, settings
from hypothesis import strategies as some

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[4] / "support"))

import randomtree
from readdump import read_dump
from readtree import read_tree

DATA = pathlib.Path(__file__).resolve().parents[3] / "data" / "erofs"
NAMES = sorted(json.loads((DATA / "digests.json").read_text(encoding="utf-8")))


def lines(root: Directory) -> list[bytes]:
    return dumpfile.dumpfile_bytes(root).splitlines()


def one(leaf: Leaf, name: bytes = b"f") -> bytes:
    return lines(Directory(Stat(), {name: leaf}))[1]


@pytest.mark.parametrize("name", NAMES)
def test_dumpfiles_of_cfsctl_come_out_as_they_were(name: str) -> None:
    text = gzip.decompress((DATA / f"{name}.dump.gz").read_bytes())
    assert dumpfile.dumpfile_bytes(read_dump(text)) == text


def test_every_kind_of_inode_has_its_line() -> None:
    stat = Stat(0o4755, 1, 2, 3, 4)
    digest = bytes(range(32))
    assert (
        lines(Directory(Stat(0o755, mtime=-5), {b"d": Directory(Stat()), b"f": Leaf(Stat())}))[0]
        == b"/ 0 40755 3 0 0 0 -5.0 - - -"
    )
    assert one(Leaf(stat, st.S_IFREG, b"hi\n")) == b"/f 3 104755 1 1 2 0 3.4 - hi\\n -"
    assert one(Leaf(stat, st.S_IFREG, digest=digest, size=99)) == b"/f 99 104755 1 1 2 0 3.4 %b/%b - %b" % (
        b"00",
        digest.hex()[2:].encode(),
        digest.hex().encode(),
    )
    assert one(Leaf(stat, st.S_IFREG)) == b"/f 0 104755 1 1 2 0 3.4 - - -"
    assert one(Leaf(stat, st.S_IFREG, size=7)) == b"/f 7 104755 1 1 2 0 3.4 - - -"
    assert one(Leaf(stat, st.S_IFLNK, b"a b")) == b"/f 3 124755 1 1 2 0 3.4 a\\x20b - -"
    assert one(Leaf(stat, st.S_IFCHR, rdev=os.makedev(4, 64))) == b"/f 0 24755 1 1 2 1088 3.4 - - -"
    assert one(Leaf(stat, st.S_IFBLK)) == b"/f 0 64755 1 1 2 0 3.4 - - -"
    assert one(Leaf(stat, st.S_IFIFO)) == b"/f 0 14755 1 1 2 0 3.4 - - -"
    assert one(Leaf(stat, st.S_IFSOCK)) == b"/f 0 144755 1 1 2 0 3.4 - - -"


def test_a_lone_dash_is_told_from_nothing() -> None:
    assert one(Leaf(Stat(), st.S_IFLNK, b"-")).split(b" ")[8] == b"\\x2d"
    assert one(Leaf(Stat(), st.S_IFREG, b"-")).split(b" ")[9] == b"\\x2d"
    assert one(Leaf(Stat(), st.S_IFREG, b"--")).split(b" ")[9] == b"--"


def test_odd_bytes_are_escaped_and_equal_signs_in_xattrs_only() -> None:
    assert (
        one(Leaf(Stat(xattrs={b"user.a=b": b"=", b"user.-": b"-", b"user.": b""})), b"a=\\ \xff").split(b" ")[0]
        == b"/a=\\\\\\x20\\xff"
    )
    assert one(Leaf(Stat(xattrs={b"user.a=b": b"=", b"user.-": b"-", b"user.": b""}))).split(b" ")[11:] == [
        b"user.=",
        b"user.-=-",
        b"user.a\\x3db=\\x3d",
    ]
    assert one(Leaf(Stat(), st.S_IFREG, b"\r\t\n\\\0")).split(b" ")[9] == b"\\r\\t\\n\\\\\\x00"


def test_further_names_refer_to_the_first() -> None:
    leaf = Leaf(Stat(0o644), st.S_IFREG, b"x")
    root = Directory(Stat(), {b"z": leaf, b"d": Directory(Stat(), {b"n n": leaf}), b"e": leaf})
    assert lines(root)[2:] == [
        b"/d/n\\x20n 1 100644 3 0 0 0 0.0 - x -",
        b"/e 0 @120000 - - - - 0.0 /d/n\\x20n - -",
        b"/z 0 @120000 - - - - 0.0 /d/n\\x20n - -",
    ]


def test_it_is_written_in_pieces_and_counted() -> None:
    root = Directory(Stat(), {b"%d" % number: Leaf(Stat()) for number in range(3000)})
    file = io.BytesIO()
    pieces: list[bytes] = []
    assert dumpfile.write_dumpfile(root, file) == dumpfile.write_dumpfile(root, pieces.append) == 3001
    assert file.getvalue() == b"".join(pieces) and file.getvalue().count(b"\n") == 3001
    assert len(pieces) > 2


odd_names = (
    some.binary(min_size=1, max_size=6)
    .map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"~"))
    .filter(lambda name: name not in (b".", b".."))
)


@settings(max_examples=60, deadline=None)
@given(
    some.dictionaries(odd_names, some.binary(max_size=12), max_size=4),
    some.dictionaries(some.binary(min_size=1, max_size=6), some.binary(max_size=6), max_size=3),
)
def test_what_is_written_can_be_read(files: dict[bytes, bytes], xattrs: dict[bytes, bytes]) -> None:
    root = Directory(
        Stat(0o711, xattrs=xattrs or None), {name: Leaf(Stat(), st.S_IFREG, data) for name, data in files.items()}
    )
    text = dumpfile.dumpfile_bytes(root)
    again = read_dump(text)
    assert again.stat == root.stat
    assert {name: leaf.data for name, leaf in again.entries.items() if isinstance(leaf, Leaf)} == files


@pytest.mark.skipif(not shutil.which("cfsctl"), reason="cfsctl is not on PATH")
def test_random_directories_have_the_dumpfile_that_cfsctl_writes(tmp_path: pathlib.Path) -> None:
    randomtree.build(tmp_path / "tree", 77, 150)
    command = [
        "cfsctl",
        "--no-repo",
        "--hash",
        "sha256",
        "create-dumpfile",
        "--no-propagate-usr-to-root",
        str(tmp_path / "tree"),
    ]
    expected = subprocess.run(command, check=True, capture_output=True).stdout
    assert dumpfile.dumpfile_bytes(read_tree(str(tmp_path / "tree"), fsverity.SHA256)) == expected


@pytest.mark.skipif(not shutil.which("composefs-info"), reason="composefs-info is not on PATH")
def test_composefs_info_tells_the_same_objects(tmp_path: pathlib.Path) -> None:
    tree = read_dump(gzip.decompress((DATA / "contents.dump.gz").read_bytes()))
    (tmp_path / "image").write_bytes(erofswriter.image_bytes(tree, 1, fsverity.SHA256))
    output = subprocess.run(
        ["composefs-info", "objects", str(tmp_path / "image")], check=True, capture_output=True, text=True
    ).stdout
    digests = {leaf.digest.hex() for leaf in tree.entries.values() if isinstance(leaf, Leaf) and leaf.digest}
    assert {line.replace("/", "") for line in output.split()} == digests
