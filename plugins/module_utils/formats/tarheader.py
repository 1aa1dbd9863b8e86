# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What the header blocks of an archive say: checksums, numbers, PAX and GNU extensions, and what no image can hold.

``Parser`` takes 512-byte headers and the data of extension headers, and gives entries. It follows POSIX pax (IEEE Std
1003.1, "pax Interchange Format") and the manual of GNU tar; where these leave a choice it decides as the composefs
repository format does, for the image depends on it:

- a number is octal, in spaces and up to a NUL, perhaps after one ``+``, or base 256; the checksum is that of unsigned
  bytes;
- extension headers (``L``, ``K``, ``x``) count only with the magic of ustar or GNU tar; each may come once before an
  entry, with 1 MiB of data in all;
- a global header (``g``) changes nothing, except that what was pending before it is lost;
- PAX ``size`` overrides the header's for every type; of several records of a key the last counts, but the first for the
  fraction of ``mtime``.

Where the readers of archives differ, what one of them sees another does not, so such members are refused: a link,
directory, device or FIFO with a size (some skip so many bytes, others find the next header there), a link to nothing,
and ``..`` in the middle of a name. A file of the type NUL whose name ends in a slash is a directory, as it was in Unix
version 7.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from zlib import adler32

from ..errors import InvalidLayer
from .bounds import MAX_MAJOR, MAX_MINOR, MAX_NAME, MAX_SYMLINK, MAX_XATTR

BLOCK = 512
MAX_EXTENSION = 1 << 20
"""Bytes of extension data that one entry, or one global header, may have."""

HINT = "The archive is damaged or holds what no composefs image can hold: have the image rebuilt."

PLAIN_FILES = frozenset((b"0", b"7"))
"""Types whose header says all there is to say, unless an extension header precedes it."""
PLAIN_EMPTY = frozenset((b"1", b"2", b"5", b"6"))
"""Types of which that is true as long as they claim no content."""
NO_SIZE = b"0" * 11
"""How an empty member states its size."""
_LINKS = frozenset((b"1", b"2"))
_WITHOUT_CONTENT = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a directory",
    b"6": "a FIFO",
}
_MAGICS = frozenset((b"ustar\x0000", b"ustar  \0"))
_EXTENSIONS = frozenset((b"x", b"L", b"K", b"g"))
_U32 = (1 << 32) - 1
_U64 = (1 << 64) - 1
_MAX_SIZE = (1 << 63) - 1 - BLOCK


class Entry(NamedTuple):
    """One member of an archive, extensions applied.

    ``path`` and ``linkname`` are as in the archive (not normalised), ``type`` is the type byte (that of a directory
    where an old archive says it with a slash), ``mode`` the header's
    mode with whatever type bits it has, ``uid`` and ``gid`` are the low 32 bits, ``mtime`` is in seconds (signed, 64
    bits), ``size`` is that of the content in bytes, ``xattrs`` holds the ``SCHILY.xattr.*`` records only. The device
    numbers are 0 unless the entry is a device.
    """

    path: bytes
    type: bytes
    mode: int
    uid: int
    gid: int
    mtime: int
    mtime_nsec: int
    size: int
    linkname: bytes
    devmajor: int
    devminor: int
    xattrs: dict[bytes, bytes]


def show(name: bytes) -> str:
    """A name from an archive, fit for a message: quoted, shortened, control characters escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return repr(text if len(text) <= 200 else text[:120] + "…" + text[-70:])


# What nearly all headers look like; the others are read field by field, by the same rules.
_FULL = re.compile(
    rb"(?s)(?=([^\0]{1,100})).{100}([0-7]{6}[0-7 ])[\0 ]([0-7]{6}[0-7 ])[\0 ]([0-7]{6}[0-7 ])[\0 ]([0-7]{11})[\0 "
    rb"]([0-7]{11})[\0 ]"
    rb"([0-7]{6}[\0 ]{2})(.)(?=([^\0]{0,100})).{100}(ustar\x0000|ustar  \0).{64}"
    rb"([0-7]{6}[0-7 ]|\0{7})[\0 ]([0-7]{6}[0-7 ]|\0{7})[\0 ](?=([^\0]{0,155}))"
)
# The same for a splitter, which needs no more than size, checksum and type.
LIGHT = re.compile(
    rb"(?s)[^\0].{99}[0-7]{6}[0-7 ][\0 ][0-7]{6}[0-7 ][\0 ][0-7]{6}[0-7 ][\0 ]([0-7]{11})[\0 ][0-7]{11}[\0 ]"
    rb"([0-7]{6}[\0 ]{2})(.).{100}(?:ustar\x0000|ustar  \0).{64}"
    rb"(?:[0-7]{6}[0-7 ]|\0{7})[\0 ](?:[0-7]{6}[0-7 ]|\0{7})[\0 ]"
)


def block_sum(block: bytes) -> int:
    """The sum of the 512 bytes, plus 2. The low half of Adler-32 is 1 + the sum modulo 65521, which 256 bytes cannot
    reach.
    """
    return (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF)


def _octal(field: bytes, what: str) -> int:
    text = field.partition(b"\0")[0].strip()
    digits = text[1:] if text[:1] == b"+" else text
    if not text:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise InvalidLayer(f"the header's {what} is {show(text)}, not an octal number.", HINT)
    return int(digits, 8)


def _number(field: bytes, what: str) -> int:
    """An octal number, or one in base 256 if the first bit is set, of which the low 64 bits count."""
    if field[0] & 0x80:
        return int.from_bytes(bytes((field[0] & 0x7F,)) + field[1:], "big") & _U64
    return _octal(field, what)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# name, mode, uid, gid, size, mtime, type, linkname, devmajor, devminor and magic, which is empty in headers older than
# ustar
_Fields = tuple[bytes, int, int, int, int, int, bytes, bytes, int, int, bytes]


def _fields(block: bytes) -> _Fields:
    """Decode a header that may be of any kind, field by field."""
    magic = block[257:265]
    if magic not in _MAGICS:
        magic = b""
    name = block[:100].partition(b"\0")[0]
    if magic == b"ustar\x0000" and block[345]:
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return (
        name,
        _number(block[100:108], "mode"),
        _number(block[108:116], "uid"),
        _number(block[116:124], "gid"),
        _number(block[124:136], "size"),
        _number(block[136:148], "mtime"),
        block[156:157],
        block[157:257].partition(b"\0")[0],
        _octal(block[329:337], "devmajor") if magic else 0,
        _octal(block[337:345], "devminor") if magic else 0,
        magic,
    )


_UNSIGNED = re.compile(rb"\+?0*([0-9]{1,20})")
_LENGTH = re.compile(rb"\+?0*([0-9]{1,20}) ")
_USUAL_TIME = re.compile(rb"([0-9]{1,18})(?:\.([0-9]{0,9})[0-9]*)?")
_LONG_NAME = re.compile(rb"[^/]{%d,}" % (MAX_NAME + 1))
_XATTR = b"SCHILY.xattr."
_SPARSE = b"GNU.sparse."
_SPARSE_KEYS = (b"offset", b"numbytes", b"size", b"realsize", b"major", b"minor")
_UNSIGNED_KEYS = frozenset((b"uid", b"gid", b"size", *(_SPARSE + key for key in _SPARSE_KEYS)))


def _unsigned(value: bytes, key: bytes) -> int:
    match = _UNSIGNED.fullmatch(value)
    number = int(match.group(1)) if match else _U64 + 1
    if number > _U64:
        raise InvalidLayer(f"its PAX record {show(key)} is {show(value)}, not a number of 64 bits.", HINT)
    return number


def _records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The records ``<length> <key>=<value>\\n`` of a PAX header, in order. Anything that does not begin with a length
    ends them.
    """
    records: list[tuple[bytes, bytes]] = []
    pos = 0
    while True:
        match = _LENGTH.match(data, pos)
        length = int(match.group(1)) if match else _U64 + 1
        if match is None or length > _U64:
            return records
        space = match.end()
        stop = pos + length
        equals = data.find(b"=", space, stop - 1) if space < stop <= len(data) else -1
        if equals < 0 or data[stop - 1] != 0x0A:
            raise InvalidLayer(f"its PAX header is damaged at record {len(records) + 1}.", HINT)
        key = data[space:equals]
        if not key.isascii():
            try:
                key.decode()
            except UnicodeDecodeError:
                raise InvalidLayer(f"its PAX header has a key that is not UTF-8, {show(key)}.", HINT) from None
        records.append((key, data[equals + 1 : stop - 1]))
        pos = stop


def _nanoseconds(fraction: bytes) -> int:
    """Nine digits count, missing ones are zeros; a fraction that is no number counts as 0."""
    match = _UNSIGNED.fullmatch(fraction[:9].ljust(9, b"0"))
    return int(match.group(1)) if match else 0


def _time(values: list[bytes]) -> tuple[int, int]:
    """Seconds and nanoseconds of the ``mtime`` records of one header: the seconds of the last, the fraction of the
    first.

    A time before 1970 is rounded down to the second, so that the nanoseconds stay positive.
    """
    usual = _USUAL_TIME.fullmatch(values[0])
    if usual is not None and len(values) == 1:
        return int(usual.group(1)), int((usual.group(2) or b"").ljust(9, b"0"))
    seconds = 0
    for value in values:
        whole, _point, fraction = value.partition(b".")
        if whole[:1] == b"-":
            seconds = -_unsigned(whole[1:], b"mtime") - (_nanoseconds(fraction) > 0)
            if seconds < -(1 << 63) or whole[1:2] == b"+":
                raise InvalidLayer(f"its PAX record 'mtime' is {show(value)}, not a time.", HINT)
        else:
            seconds = _signed(_unsigned(whole, b"mtime"))
        try:
            fraction.decode()
        except UnicodeDecodeError:
            raise InvalidLayer(f"its PAX record 'mtime' is {show(value)}, not a time.", HINT) from None
    nsec = _nanoseconds(values[0].partition(b".")[2])
    return seconds, 1_000_000_000 - nsec if nsec and values[0][:1] == b"-" else nsec


def _check_sparse(records: list[tuple[bytes, bytes]], values: dict[bytes, bytes]) -> None:
    """Refuse the three ways in which PAX headers describe sparse files, whose stored bytes are not their content."""
    version = [
        _unsigned(values[key], key) if key in values else None for key in (b"GNU.sparse.major", b"GNU.sparse.minor")
    ]
    sparse = version == [1, 0] or b"GNU.sparse.map" in values
    offset = False
    for key, _value in records:
        if key == b"GNU.sparse.offset":
            offset = True
        elif key == b"GNU.sparse.numbytes" and offset:
            sparse = True
    if sparse:
        raise _sparse()


def _no_header() -> InvalidLayer:
    return InvalidLayer(
        "there is no tar header where one must be, or it is damaged (its checksum does not match).", HINT
    )


def _sparse() -> InvalidLayer:
    return InvalidLayer(
        "it is a sparse member, which container layers must not have.",
        "Have the image rebuilt without sparse files (tar without -S).",
    )


def _check_name(path: bytes) -> None:
    if not path:
        raise InvalidLayer("it has no name.", HINT)
    if b".." in path and _goes_up(path):
        raise InvalidLayer("its name contains '..' as a directory.", HINT)
    if b"\0" in path:
        raise InvalidLayer("its name holds a NUL byte.", HINT)
    if len(path) > MAX_NAME:
        head, slash, last = path.rstrip(b"/").rpartition(b"/")
        if last.startswith(b".wh."):  # a whiteout's own name is never stored
            last = last[4:]
        long = _LONG_NAME.search(head + slash + last)
        if long is not None:
            raise InvalidLayer(
                f"its name has a component of {len(long.group())} bytes, and file systems hold {MAX_NAME}.", HINT
            )


def _goes_up(path: bytes) -> bool:
    """Whether ``..`` stands before the last component. As the last one it means the root and is no harm."""
    parts = [part for part in path.split(b"/") if part and part != b"."]
    return b".." in parts[:-1]


def _check_size(kind: bytes, size: int) -> None:
    what = _WITHOUT_CONTENT.get(kind)
    if size and what is not None:
        raise InvalidLayer(
            f"it is {what}, which has no content, but its header claims {size} bytes: programs disagree about where "
            "the next member begins.",
            HINT,
        )


def _check_link(kind: bytes, linkname: bytes) -> None:
    if not linkname:
        raise InvalidLayer("it is a link to nothing: the name it links to is empty.", HINT)
    if b"\0" in linkname:
        raise InvalidLayer("the name it links to holds a NUL byte.", HINT)
    if kind == b"2" and len(linkname) > MAX_SYMLINK:
        raise InvalidLayer(f"it is a symbolic link of {len(linkname)} bytes, and images hold {MAX_SYMLINK}.", HINT)


def _check_device(major: int, minor: int, magic: bytes) -> None:
    if not magic:
        raise InvalidLayer("it is a device, but its header is of a kind without device numbers.", HINT)
    if major > MAX_MAJOR or minor > MAX_MINOR:
        raise InvalidLayer(f"its device number {major}:{minor} is beyond the largest, {MAX_MAJOR}:{MAX_MINOR}.", HINT)


class Parser:
    """Header blocks in, entries out. Errors name the entry and its place."""

    def __init__(self) -> None:
        self.pending = False
        """An extension header awaits its entry."""
        self.want = 0
        """Bytes of data that follow the extension header just parsed."""
        self.keep = False
        """… and whether they are for ``payload``."""
        self.sums: dict[bytes, int] = {}
        """What ``expected_sum`` gave; a layer has some thousand different checksums."""
        self._kind = b""
        self._name: bytes | None = None  # of the entry that is being looked at
        self._offset = 0
        self._reset()

    def _reset(self) -> None:
        self.pending = False
        self._seen = b""
        self._total = 0
        self._path: bytes | None = None
        self._linkname: bytes | None = None
        self._pax = b""

    def _located(self, error: InvalidLayer) -> InvalidLayer:
        if self._name:
            error.within(f"Entry {show(self._name)} at byte {self._offset} of the archive cannot be taken")
        else:
            error.within(f"The archive cannot be taken, at byte {self._offset}")
        return error

    def expected_sum(self, field: bytes) -> int:
        """What ``block_sum`` must give for a header with this checksum field (bytes 148 to 155), which the checksum
        itself counts as spaces.
        """
        total = _octal(field, "checksum") + sum(field) - 8 * 0x20 + 2
        if len(self.sums) > 20_000:
            self.sums.clear()
        self.sums[field] = total
        return total

    def parse(self, block: bytes, offset: int) -> Entry | None:
        """The entry that ``block``, at ``offset`` of the archive, completes; None if it is an extension header, whose
        data follows.

        Volume labels (type ``V``) come out as entries too. Raises InvalidLayer.
        """
        self._name = None
        self._offset = offset
        try:
            match = _FULL.match(block)
            if match is None:
                if block_sum(block) != self.expected_sum(block[148:156]):
                    raise _no_header()
                self._name = block[:100].partition(b"\0")[0]
                kind = block[156:157]
                if kind == b"g" or (kind in _EXTENSIONS and block[257:265] in _MAGICS):
                    self._extension(
                        kind, _number(block[124:136], "size")
                    )  # the other fields of such a header may hold anything
                    return None
                return self._special(*_fields(block))
            name, mode, uid, gid, size, mtime, checksum, kind, linkname, magic, major, minor, prefix = match.groups()
            if block_sum(block) != (self.sums.get(checksum) or self.expected_sum(checksum)):
                raise _no_header()
            if prefix and magic == b"ustar\x0000":
                name = prefix + b"/" + name
            if (
                not self.pending
                and (
                    kind == b"0"
                    or (size == NO_SIZE and kind in PLAIN_EMPTY and (linkname or kind not in _LINKS))
                    or kind in PLAIN_FILES
                )
                and b".." not in name
            ):
                return tuple.__new__(
                    Entry,
                    (
                        name,
                        kind,
                        int(mode, 8),
                        int(uid, 8),
                        int(gid, 8),
                        int(mtime, 8),
                        0,
                        int(size, 8),
                        linkname,
                        0,
                        0,
                        {},
                    ),
                )
            self._name = name
            if kind in _EXTENSIONS:
                self._extension(kind, int(size, 8))
                return None
            numbers = int(mode, 8), int(uid, 8), int(gid, 8), int(size, 8), int(mtime, 8)
            return self._special(
                name,
                *numbers,
                kind,
                linkname,
                int(major.rstrip(b"\0") or b"0", 8),
                int(minor.rstrip(b"\0") or b"0", 8),
                magic,
            )
        except InvalidLayer as error:
            raise self._located(error) from None

    def payload(self, data: bytes) -> None:
        """The data of the extension header just parsed. It is checked together with the entry that it is for: if a
        global header drops it, its errors do not matter.
        """
        if self._kind == b"x":
            self._pax = data
        elif self._kind == b"L":
            self._path = data[:-1] if data[-1:] == b"\0" else data
        else:
            self._linkname = data[:-1] if data[-1:] == b"\0" else data

    def _special(
        self,
        name: bytes,
        mode: int,
        uid: int,
        gid: int,
        size: int,
        mtime: int,
        kind: bytes,
        linkname: bytes,
        major: int,
        minor: int,
        magic: bytes,
    ) -> Entry:
        """The entry of a header that is not plain, or that extensions precede."""
        if magic and kind == b"S":
            raise _sparse()
        path = name if self._path is None else self._path
        if self._linkname is not None:
            linkname = self._linkname
        mtime, nsec = _signed(mtime), 0
        xattrs: dict[bytes, bytes] = {}
        if self._pax:
            records = _records(self._pax)
            values = dict(records)
            path = values.get(b"GNU.sparse.name", values.get(b"path", path))
            self._name = path
            times: list[bytes] = []
            sparse = False
            for key, value in records:
                if key.startswith(_XATTR):
                    xattrs[key[13:]] = value
                elif key == b"mtime":
                    times.append(value)
                elif key in _UNSIGNED_KEYS:
                    _unsigned(value, key)
                sparse = sparse or key.startswith(_SPARSE)
            if sparse:
                _check_sparse(records, values)
            linkname = values.get(b"linkpath", linkname)
            if b"size" in values:
                size = _unsigned(values[b"size"], b"size")
            if b"uid" in values:
                uid = _unsigned(values[b"uid"], b"uid")
            if b"gid" in values:
                gid = _unsigned(values[b"gid"], b"gid")
            if times:
                mtime, nsec = _time(times)
        self._name = path
        if kind == b"\0" and path.endswith(b"/"):
            kind = b"5"
        _check_size(kind, size)
        if kind == b"3" or kind == b"4":
            _check_device(major, minor, magic)
        else:
            major = minor = 0
        if kind != b"V":
            if not path or len(path) > MAX_NAME or b"\0" in path or b".." in path:
                _check_name(path)
            if kind in _LINKS:
                _check_link(kind, linkname)
            for key, value in xattrs.items():
                if len(value) > MAX_XATTR:
                    raise InvalidLayer(
                        f"its extended attribute {show(key)} has {len(value)} bytes, and images hold {MAX_XATTR}.", HINT
                    )
        if size > _MAX_SIZE:
            raise InvalidLayer(f"its size of {size} bytes is impossible.", HINT)
        self._reset()
        return tuple.__new__(
            Entry, (path, kind, mode & _U32, uid & _U32, gid & _U32, mtime, nsec, size, linkname, major, minor, xattrs)
        )

    def _extension(self, kind: bytes, size: int) -> None:
        self._kind = kind
        self.want = size
        self.keep = kind != b"g"
        if kind == b"g":
            self._reset()
            total = size
        else:
            if kind in self._seen:
                raise InvalidLayer(f"it has two extension headers of type {kind.decode()}.", HINT)
            self.pending = True
            self._seen += kind
            self._total += size
            total = self._total
        if total > MAX_EXTENSION:
            raise InvalidLayer(
                f"it has {total} bytes of extension headers, more than the {MAX_EXTENSION} that are allowed.", HINT
            )
