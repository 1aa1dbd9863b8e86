# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let cfsctl describe and digest trees that are hard to get right; run as root with cfsctl on PATH.

    python tests/support/make_erofs_goldens.py tests/unit/data/erofs

Writes NAME.dump.gz (``cfsctl create-dumpfile``) for each tree and digests.json with what ``cfsctl compute-id`` says of
them.
"""

from __future__ import annotations

import gzip
import json
import os
import pathlib
import stat as st
import subprocess
import sys
import tempfile

import randomtree


def dots(top: pathlib.Path) -> None:
    for name in ("+", "-", "!", " ", ".", ".-", "...", "a", "~"):
        if name != ".":
            (top / name).write_bytes(b"")
    (top / "below").mkdir()
    (top / "below" / "+").mkdir()


def labels(top: pathlib.Path) -> None:
    label = b"system_u:object_r:usr_t:s0\0"
    os.setxattr(top, "security.selinux", label)
    (top / "file").write_bytes(b"unlike the root")
    os.setxattr(top / "file", "security.selinux", b"system_u:object_r:etc_t:s0\0")
    (top / "ab").mkdir()


def links(top: pathlib.Path) -> None:
    """The first name in depth-first order lies deeper than another that a breadth-first walk meets earlier."""
    (top / "a" / "b" / "c").mkdir(parents=True)
    (top / "a" / "b" / "c" / "deep").write_bytes(b"one file")
    os.link(top / "a" / "b" / "c" / "deep", top / "shallow")
    os.link(top / "a" / "b" / "c" / "deep", top / "a" / "again")
    os.link(top / "a" / "b" / "c" / "deep", top / "a" / "other")
    (top / "z").write_bytes(b"x" * 70)
    os.link(top / "z", top / "b")
    os.symlink("nowhere", top / "link")
    os.link(top / "link", top / "a" / "link", follow_symlinks=False)


def symlinks(top: pathlib.Path) -> None:
    """Targets about the length where a symlink moves to a block, with xattrs that are shared or not."""
    for length in (*range(3880, 4096, 8), 4094, 4095):
        os.symlink("x" * length, top / f"l{length}")
    for number in range(2):
        os.symlink("y" * 3900, top / f"shared{number}")
        os.setxattr(top / f"shared{number}", "trusted.big", b"s" * 200, follow_symlinks=False)
    os.symlink("y" * 3900, top / "local")
    os.setxattr(top / "local", "trusted.big", b"l" * 200, follow_symlinks=False)


def directories(top: pathlib.Path) -> None:
    """Directories whose last block is as full as half a block, one byte less and one more; the same for whole
    blocks.
    """
    for total in (2047, 2048, 2049, 4095, 4096, 4097, 6143, 6144, 6145, 8192):
        folder = top / f"d{total}"
        folder.mkdir()
        left = total - 12 - 1 - 12 - 2
        number = 0
        while left:
            cost = left if left <= 200 else min(112, left - 20)
            (folder / f"{number:03d}".ljust(cost - 12, "n")).mkdir()
            left -= cost
            number += 1


def xattrs(top: pathlib.Path) -> None:
    values = (b"b", b"aa", b"", b"b\0", b"ab")
    for number, value in enumerate((*values, *values)):
        (top / f"f{number}").write_bytes(b"")
        os.setxattr(top / f"f{number}", "user.same", value)
        os.setxattr(top / f"f{number}", "trusted.same", value)
    # The three prefixes sort otherwise by name than by index; the unshared ones keep their order in the inode.
    for name in ("user.z", "trusted.z", "security.z", "user.a", "trusted.a", "security.a"):
        os.setxattr(top / "f0", name, b"local " + name.encode())
    (top / "big").write_bytes(b"z" * 100)
    for name in (
        "security.capability",
        "trusted.overlay.opaque",
        "trusted.overlay.a",
        "trusted.overlay.overlay.b",
        "user.u",
        "trusted.p",
    ):
        value = bytes.fromhex("0100000200040000000000000000000000000000") if name == "security.capability" else b"v"
        os.setxattr(top / "big", name, value)


def acls(top: pathlib.Path) -> None:
    access = bytes.fromhex("0200000001000600ffffffff02000600e803000004000400ffffffff10000600ffffffff20000400ffffffff")
    (top / "folder").mkdir()
    os.setxattr(top / "folder", "system.posix_acl_access", access)
    os.setxattr(top / "folder", "system.posix_acl_default", access)


def whiteouts(top: pathlib.Path) -> None:
    (top / "d" / "e").mkdir(parents=True)
    for name in ("w", "d/gone", "d/gone too", "d/e/last"):
        os.mknod(top / name, 0o644 | st.S_IFCHR, 0)
        os.chmod(top / name, 0o640)
    os.mknod(top / "ab", 0o644 | st.S_IFCHR, 0)  # not to be told from a stub
    os.chmod(top / "ab", 0o644)
    os.mknod(top / "cd", 0o600 | st.S_IFCHR, 0)
    os.setxattr(top / "d", "trusted.mine", b"1")
    os.mknod(top / "real", 0o600 | st.S_IFCHR, os.makedev(4095, 1048575))


def contents(top: pathlib.Path) -> None:
    """Files of the same content (so shared metacopy), inline files of every length, and sizes about powers of two."""
    for number in range(65):
        (top / f"inline{number}").write_bytes(b"i" * number)
    for size in (65, 4095, 4096, 4097, 8192, 8193, 1 << 20, (1 << 20) + 1):
        for copy in range(2 if size % 2 else 1):
            (top / f"file{size}.{copy}").write_bytes(b"c" * size)


def times(top: pathlib.Path) -> None:
    for number, (seconds, nanoseconds) in enumerate(((5, 0), (5, 1), (4, 999_999_999), (6, 0))):
        (top / f"t{number}").write_bytes(b"")
        os.utime(top / f"t{number}", ns=(0, seconds * 10**9 + nanoseconds))
    (top / "owner").write_bytes(b"")
    os.chown(top / "owner", 65536, 65535)
    os.utime(top / "owner", ns=(0, 4_999_999_999))


LICENSE = "SPDX-FileCopyrightText: composefs.oci contributors\nSPDX-License-Identifier: GPL-3.0-or-later\n"
TREES = (dots, labels, links, symlinks, directories, xattrs, acls, whiteouts, contents, times)


def settle(top: pathlib.Path, keep: bool) -> None:
    for folder, subfolders, others in os.walk(top, topdown=False):
        for name in (*subfolders, *others):
            if not keep:
                os.utime(os.path.join(folder, name), (0, 0), follow_symlinks=False)
    os.utime(top, ns=(0, 5_000_000_000 if keep else 0))
    os.chmod(top, 0o755)


def main(target: pathlib.Path) -> None:
    digests: dict[str, dict[str, str]] = {}
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        trees = []
        for make in TREES:
            top = pathlib.Path(scratch, make.__name__)
            top.mkdir()
            make(top)
            settle(top, make is times)
            trees.append(top)
        for seed in range(3):
            trees.append(pathlib.Path(scratch, f"random{seed}"))
            randomtree.build(trees[-1], seed, 60 + 40 * seed)
        for top in trees:
            for algorithm in ("sha256", "sha512"):
                if algorithm == "sha512" and top.name not in ("contents", "random0"):
                    continue
                command = ["cfsctl", "--no-repo", "--hash", algorithm]
                name = top.name if algorithm == "sha256" else f"{top.name}-{algorithm}"
                dump = subprocess.run(
                    [*command, "create-dumpfile", "--no-propagate-usr-to-root", str(top)],
                    check=True,
                    capture_output=True,
                ).stdout
                (target / f"{name}.dump.gz").write_bytes(gzip.compress(dump, mtime=0))
                digests[name] = {}
                for version in "012":
                    options = ["--erofs-version", version, "compute-id", "--no-propagate-usr-to-root", str(top)]
                    output = subprocess.run([*command, *options], check=True, capture_output=True, text=True).stdout
                    digests[name][version] = output.strip().split(":")[-1]
    (target / "digests.json").write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    for path in (*target.glob("*.dump.gz"), target / "digests.json"):
        pathlib.Path(f"{path}.license").write_text(LICENSE, encoding="utf-8")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
