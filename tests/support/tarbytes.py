# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tar streams made block by block, so that tests can write what no archiver would.

``tar(member("usr/", type=b"5"), member("usr/bin/x", b"..."))`` is a well-formed archive; every field of a header can be
forced.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

BLOCK = 512
RECORD = 10240
END = bytes(2 * BLOCK)

REGULAR, HARDLINK, SYMLINK, CHARDEV, BLOCKDEV, DIRECTORY, FIFO = b"0", b"1", b"2", b"3", b"4", b"5", b"6"


def _number(value: int, width: int) -> bytes:
    """Octal if it fits, else base-256 as GNU tar writes it (negative numbers too)."""
    if 0 <= value < 8 ** (width - 1):
        return b"%0*o\0" % (width - 1, value)
    return (((1 << (8 * width)) + value if value < 0 else value) | (1 << (8 * width - 1))).to_bytes(width, "big")


def padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def header(
    name: bytes,
    size: int = 0,
    type: bytes = REGULAR,  # noqa: A002 -- the name of the tar field
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_700_000_000,
    linkname: bytes = b"",
    device: tuple[int, int] = (0, 0),
    magic: bytes = b"ustar\x0000",
    prefix: bytes = b"",
    checksum: int | None = None,
) -> bytes:
    """One 512-byte header.  ``magic`` is ``ustar\\0`` + ``00`` (POSIX), ``ustar  \\0`` (GNU) or eight zero
    bytes (V7).
    """
    fields = (
        name[:100],
        _number(mode, 8),
        _number(uid, 8),
        _number(gid, 8),
        _number(size, 12),
        _number(mtime, 12),
        b" " * 8,
        type,
        linkname[:100],
        magic,
        b"",
        b"",
        _number(device[0], 8) if magic.strip(b"\0") else b"",
        _number(device[1], 8) if magic.strip(b"\0") else b"",
        prefix,
    )
    raw = struct.pack("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x", *fields)
    return raw[:148] + b"%06o\0 " % (sum(raw) if checksum is None else checksum) + raw[156:]


def pax_records(records: Mapping[str, str | bytes]) -> bytes:
    """PAX records, each prefixed with its own length."""
    out = b""
    for key, value in records.items():
        body = b" " + key.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
        length = len(body)
        while len(b"%d" % length) + len(body) != length:
            length = len(b"%d" % length) + len(body)
        out += b"%d" % length + body
    return out


def extension(type: bytes, payload: bytes, *, name: bytes = b"././@PaxHeader", magic: bytes = b"ustar\x0000") -> bytes:  # noqa: A002
    """An extension header with its payload: type ``x``/``g`` (PAX) or ``L``/``K`` (GNU long name or link; use the GNU
    magic).
    """
    return header(name, len(payload), type, magic=magic) + payload + padding(len(payload))


def member(
    name: str | bytes,
    data: bytes = b"",
    type: bytes = REGULAR,  # noqa: A002
    *,
    mode: int | None = None,
    uid: int = 0,
    gid: int = 0,
    mtime: int = 1_700_000_000,
    linkname: str | bytes = b"",
    device: tuple[int, int] = (0, 0),
    pax: Mapping[str, str | bytes] | None = None,
    xattrs: Mapping[str, bytes] | None = None,
    size: int | None = None,
) -> bytes:
    """A whole entry: extension headers as needed, header, data and padding.  ``size`` lies about ``data``."""
    raw_name, raw_link = (text if isinstance(text, bytes) else text.encode() for text in (name, linkname))
    records: dict[str, str | bytes] = {}
    if len(raw_name) > 100:
        records["path"] = raw_name
    if len(raw_link) > 100:
        records["linkpath"] = raw_link
    records.update({f"SCHILY.xattr.{key}": value for key, value in (xattrs or {}).items()})
    records.update(pax or {})
    default = 0o755 if type == DIRECTORY else 0o777 if type == SYMLINK else 0o644
    length = len(data) if size is None else size
    main = header(
        raw_name,
        length,
        type,
        mode=default if mode is None else mode,
        uid=uid,
        gid=gid,
        mtime=mtime,
        linkname=raw_link,
        device=device,
    )
    return (extension(b"x", pax_records(records)) if records else b"") + main + data + padding(len(data))


def gnu_member(
    name: bytes,
    data: bytes = b"",
    type: bytes = REGULAR,  # noqa: A002
    *,
    linkname: bytes = b"",
    mode: int = 0o644,  # noqa: A002
) -> bytes:
    """An entry in GNU format: long names by ``L`` and ``K`` entries."""
    magic = b"ustar  \0"
    out = b""
    for letter, text in ((b"K", linkname), (b"L", name)):
        if len(text) > 100:
            out += extension(letter, text + b"\0", name=b"././@LongLink", magic=magic)
    return out + header(name, len(data), type, linkname=linkname, mode=mode, magic=magic) + data + padding(len(data))


def tar(*members: bytes | Iterable[bytes], end: bytes = END, record: bool = True) -> bytes:
    """Join members, add the end marker and (``record``) zeros up to a multiple of 10,240 bytes as archivers do."""
    body = b"".join(part if isinstance(part, bytes) else b"".join(part) for part in members) + end
    return body + bytes(-len(body) % RECORD) if record else body


def small_tree(*, files: int = 20, seed: int = 1, size: int = 3000, prefix: str = "usr/share/data") -> bytes:
    """A well-formed archive with one of everything that a real layer holds, and ``files`` files of various sizes."""
    import random  # noqa: PLC0415

    chance = random.Random(seed)
    parts = [member(name, type=DIRECTORY) for name in ("usr/", "usr/bin/", "usr/lib/", "run/", "etc/")]
    above = ""
    for part in prefix.split("/"):
        above += part + "/"
        if above != "usr/":
            parts.append(member(above, type=DIRECTORY))
    for length in (0, 1, 63, 64, 65, 511, 512, 513, 4095, 4096, 4097, 70_000):
        parts.append(
            member(
                f"{prefix}/size-{length}",
                chance.getrandbits(8 * length).to_bytes(length, "big") if length else b"",
                uid=1000,
                gid=100,
            )
        )
    for number in range(files):
        data = (b"%d %d\n" % (seed, number)) * chance.randrange(1, max(2, size // 6))
        parts.append(member(f"{prefix}/file-{number:04}", data, mtime=1_600_000_000 + number))
    parts += [
        member(
            "usr/bin/tool",
            b"#!/bin/sh\necho tool\n" * 20,
            mode=0o755,
            xattrs={"security.capability": bytes.fromhex("0100000200200000000000000000000000000000")},
        ),
        member("usr/bin/alias", type=HARDLINK, linkname="usr/bin/tool"),
        member("usr/bin/link", type=SYMLINK, linkname="../bin/tool"),
        member(
            "usr/lib/" + "long-name-" * 12,
            b"beyond one hundred bytes" * 9,
            mtime=1_600_000_000,
            pax={"mtime": "1600000000.123456789"},
        ),
        member("usr/lib/ünïcode", "content ü".encode() * 30),
        member("usr/lib/null", type=CHARDEV, device=(1, 3)),
        member("usr/lib/pipe", type=FIFO),
    ]
    return tar(*parts)
