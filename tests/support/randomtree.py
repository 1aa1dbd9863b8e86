# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make directory trees on disk that are hard to write an EROFS image of: odd names and sizes, hardlinks, devices,
whiteouts, xattrs.

As root everything can be made; as anybody else devices, owners and ``trusted.`` and ``security.`` xattrs are left out.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import stat as st

NAMES = (
    b"+",
    b"-",
    b" x",
    b"!",
    b".a",
    b"..a",
    b".-",
    b"...",
    b"0",
    b"ab",
    b"00",
    b"ff",
    b"A" * 255,
    b"\xff\xfe",
    b"\xc3\xa9",
    b"=",
    b"a\nb",
    b"a\\b",
    b"-x",
)
CONTENTS = (b"", b"x", b"y" * 64, b"z" * 65, b"q" * 5000, b"same" * 100, b"w" * 4096)
TARGETS = (1, 5, 60, 255, 1023, 2047, 3000, 3900, 4030, 4060, 4095)
SECONDS = (0, 0, 0, 5, 1_000_000_000, 1_700_000_000)
NANOSECONDS = (0, 0, 0, 1, 999_999_999)
MODES = (0o755, 0o644, 0o4755, 0o1777, 0o2750, 0)
OWNERS = (0, 1, 1000, 65535, 65536, 0xFFFFFFFE)
DEVICES = ((0, 1), (1, 3), (7, 255), (255, 256), (4095, 1048575), (8, 0))
XATTR_NAMES = (
    *(
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.overlay.x",
        "trusted.a",
        "trusted.foo",
        "trusted.lustre",
    ),
    *("security.selinux", "security.zz", "user.foo", "user.z", "user.overlay.opaque"),
)
XATTR_VALUES = (
    b"",
    b"v",
    b"vv",
    b"b",
    b"aa",
    b"x",
    b"system_u:object_r:usr_t:s0\0",
    b"\xff\x00\n= -",
    b"-",
    b"L" * 100,
    b"M" * 1000,
)


def build(path: str | pathlib.Path, seed: int, size: int) -> None:
    """Make about ``size`` random inodes below the directory ``path``, which must not exist."""
    dice = random.Random(seed)
    top = os.fsencode(path)
    os.mkdir(top)
    folders, files = [top], [top]
    for _unused in range(size):
        name = (
            dice.choice(NAMES)
            if dice.random() < 0.3
            else bytes(dice.choices(b"abcXYZ019_.-", k=dice.choice((1, 2, 3, 8, 30, 200))))
        )
        where = os.path.join(dice.choice(folders), name)
        if name in (b".", b"..") or len(where) > 3500 or os.path.lexists(where):
            continue
        _make(where, dice, folders, files)
        _decorate(where, dice)
    for folder, subfolders, others in os.walk(top, topdown=False):
        for name in [*subfolders, *others]:
            _finish(os.path.join(folder, name), dice)
    _decorate(top, dice)
    _finish(top, dice)


def _make(where: bytes, dice: random.Random, folders: list[bytes], files: list[bytes]) -> None:
    root = os.geteuid() == 0
    kind = dice.choice("dddfffffllphhdD" + ("ccwws" if root else ""))
    if kind == "d":
        os.mkdir(where)
        folders.append(where)
        return
    if kind == "D":
        os.mkdir(where)
        folders.append(where)
        prefix = dice.choice((b"f", b"a-file-with-a-longer-name-"))
        for number in range(dice.choice((5, 90, 150, 400))):
            _write(os.path.join(where, b"%s%03d" % (prefix, number)), dice)
        return
    if kind == "l":
        os.symlink(bytes(dice.choices(b"abc/.", k=dice.choice(TARGETS))), where)
    elif kind == "p":
        os.mkfifo(where)
    elif kind == "s":
        os.mknod(where, 0o755 | st.S_IFSOCK)
    elif kind == "c":
        os.mknod(where, 0o600 | dice.choice((st.S_IFCHR, st.S_IFBLK)), os.makedev(*dice.choice(DEVICES)))
    elif kind == "w":
        os.mknod(where, 0o644 | st.S_IFCHR, 0)
        return  # a whiteout of several names is refused
    elif kind == "h" and len(files) > 1:
        os.link(dice.choice(files[1:]), where, follow_symlinks=False)
    else:
        _write(where, dice)
    files.append(where)


def _write(where: bytes, dice: random.Random) -> None:
    with open(where, "wb") as file:
        file.write(dice.choice(CONTENTS) if dice.random() < 0.8 else dice.getrandbits(8000).to_bytes(1000, "little"))


def _decorate(where: bytes, dice: random.Random) -> None:
    if dice.random() < 0.4:
        for _unused in range(dice.choice((1, 1, 2, 4))):
            with contextlib.suppress(OSError):  # not every file system and user may set every one
                os.setxattr(where, dice.choice(XATTR_NAMES), dice.choice(XATTR_VALUES), follow_symlinks=False)


def _finish(where: bytes, dice: random.Random) -> None:
    if os.geteuid() == 0:
        if dice.random() < 0.3:
            os.chown(where, dice.choice(OWNERS), dice.choice(OWNERS), follow_symlinks=False)
        if not os.path.islink(where) and dice.random() < 0.5:
            os.chmod(where, dice.choice(MODES))
    seconds = dice.choice(SECONDS)
    os.utime(where, ns=(0, seconds * 10**9 + dice.choice(NANOSECONDS)), follow_symlinks=False)
