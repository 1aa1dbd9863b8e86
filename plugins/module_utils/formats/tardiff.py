# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""tar-diff: a program that writes a tar out of literal bytes and of files of another tree (media type
``application/vnd.tar-diff``, versions ``tardf1`` and ``tardf2``).

After eight bytes of magic comes one zstd frame with operations. Each is a byte and a number (unsigned LEB128); OPEN,
DATA, ADD and DICT are followed by as many bytes:

| 0 DATA | write the bytes |
| 1 OPEN | the bytes are the path of a file; its position becomes 0 |
| 2 COPY | write so many bytes of the file |
| 3 ADD | add the bytes to as many of the file, modulo 256 each, and write the sums |
| 4 SEEK | go to that position of the file |
| 5 DICT | the bytes are a zstd frame whose raw prefix is the whole file: write what it decodes to (``tardf2`` only) |

A program may come from anybody. Nobody may trust its output before its hash is proved. What it may cost is bounded
here: output and bases of patches together, and the number of operations in proportion to the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

from . import codecs
from ..errors import InvalidLayer

if TYPE_CHECKING:
    from .codecs import Buffer

MEDIA_TYPE = "application/vnd.tar-diff"
MAGIC = {1: b"tardf1\n\0", 2: b"tardf2\n\0"}

DATA, OPEN, COPY, ADD, SEEK, DICT = range(6)

MAX_PATH = 4096
MAX_NUMBER = 10  # bytes of a number
MAX_BASE = 128 << 20  # of a DICT, and what its frame may decode to
# An honest program has a few operations for each file, and a file has at least a header of 512 bytes in the tar.
_FREE_OPERATIONS = 1 << 20
_BYTES_AN_OPERATION = 16
_PIECE = 64 * 1024
_JOIN = 1 << 20  # adjacent literal bytes become one DATA of at most about this size

_LOW = int.from_bytes(b"\x7f" * _PIECE, "little")
_HIGH = int.from_bytes(b"\x80" * _PIECE, "little")


class File(Protocol):
    """A file of the source tree: its ``size`` in bytes and its content."""

    size: int

    def pread(self, n: int, offset: int, /) -> bytes:
        """Up to ``n`` bytes from ``offset`` on; fewer only where the file is shorter than it was said to be."""

    def whole(self) -> Buffer:
        """All of it; asked only of files of at most MAX_BASE bytes, for as short a time as possible."""

    def close(self) -> None: ...


def output_limit(layer_size: int) -> int:
    """The most bytes that a program in the place of a layer of ``layer_size`` bytes may write: 1 GiB + 200 × that."""
    return (1 << 30) + 200 * layer_size


def apply(
    read: Callable[[int], bytes], open_file: Callable[[bytes], File | None], limit: int, *, backend: str | None = None
) -> Iterator[bytes]:
    """The output of the program that ``read`` delivers (as ``codecs.Source.read``), in pieces of at most 256 KiB.

    ``open_file`` gets a path without a leading slash and returns the regular file of the source tree, or None.
    InvalidLayer if the program is malformed, reaches outside of a file, or writes more than ``limit`` bytes
    (bases of patches counted in); errors of ``read`` and of the files pass. MissingLibrary without zstd.
    """
    program = _Program(_Blob(read), backend)
    file: File | None = None
    patches: codecs.Patches | None = None
    position = operations = written = bases = 0
    try:
        while True:
            operation = program.operation()
            if operation < 0:
                return
            operations += 1
            if operations > _FREE_OPERATIONS + written // _BYTES_AN_OPERATION:
                raise _malformed(f"it writes {written} bytes in {operations} operations")
            number = program.number()
            if operation == OPEN:
                if file is not None:
                    file.close()
                file, patches, position = None, None, 0
                file = _open(program, number, open_file)
                continue
            if operation == DATA:
                pieces = program.pieces(number, codecs.CHUNK)
            elif operation > program.last_operation:
                raise _malformed(f"there is no operation {operation}")
            elif file is None:
                raise _malformed(f"its operation {operation} comes without an open file")
            elif operation == SEEK:
                if number > file.size:
                    raise _malformed(f"its SEEK to {number} leads beyond a file of {file.size} bytes")
                position = number
                continue
            elif operation == DICT:
                if patches is None:
                    patches = _patches(file, backend)
                    bases += file.size
                pieces = _patched(program, number, patches)
                position = file.size
            else:
                if number > file.size - position:
                    raise _malformed(f"it takes {number} bytes at {position} of a file of {file.size} bytes")
                pieces = (_copy if operation == COPY else _add)(program, number, file, position)
                position += number
            for piece in pieces:
                written += len(piece)
                if written + bases > limit:
                    raise _malformed(f"it reads and writes more than {limit} bytes")
                yield piece
    finally:
        if file is not None:
            file.close()


def _open(program: _Program, number: int, open_file: Callable[[bytes], File | None]) -> File:
    if number > MAX_PATH:
        raise _malformed(f"it has a path of {number} bytes")
    path = b"".join(program.pieces(number, MAX_PATH))
    file = open_file(path)
    if file is None:
        raise InvalidLayer(
            f"The tar-diff needs {path.decode(errors='backslashreplace')!r}, which is no file of its source image.",
            "It was made from another image, or by a tool that follows links.",
        )
    return file


def _copy(_program: _Program, number: int, file: File, position: int) -> Iterator[bytes]:
    while number:
        piece = _exactly(file, min(number, codecs.CHUNK), position)
        yield piece
        number -= len(piece)
        position += len(piece)


def _add(program: _Program, number: int, file: File, position: int) -> Iterator[bytes]:
    for piece in program.pieces(number, _PIECE):
        yield add(_exactly(file, len(piece), position), piece)
        position += len(piece)


def add(one: bytes, two: bytes) -> bytes:
    """Bytewise sums modulo 256 of two strings of the same length, at most 64 KiB."""
    # As one big number each: the low seven bits of all bytes are added at once, where no carry leaves its byte, and
    # the high bits are put in without a carry.
    a, b = int.from_bytes(one, "little"), int.from_bytes(two, "little")
    return (((a & _LOW) + (b & _LOW)) ^ ((a ^ b) & _HIGH)).to_bytes(len(one), "little")


def _patches(file: File, backend: str | None) -> codecs.Patches:
    if file.size > MAX_BASE:
        raise _malformed(f"it has a patch for a file of {file.size} bytes, where {MAX_BASE} are allowed")
    base = file.whole()
    if len(base) != file.size:
        raise InvalidLayer("A file of the source image is shorter than it should be.")
    return codecs.Patches(base, backend=backend)


def _patched(program: _Program, number: int, patches: codecs.Patches) -> Iterator[bytes]:
    frame = _Span(program, number)
    decoder = patches.open(frame)
    left = MAX_BASE
    while True:
        piece = decoder.read(codecs.CHUNK)
        if not piece:
            break
        left -= len(piece)
        if left < 0:
            raise _malformed(f"it has a patch that decodes to more than {MAX_BASE} bytes")
        yield piece
    while frame.read(codecs.CHUNK):
        pass


def _exactly(file: File, n: int, offset: int) -> bytes:
    data = file.pread(n, offset)
    while len(data) < n:
        more = file.pread(n - len(data), offset + len(data))
        if not more:
            raise InvalidLayer("A file of the source image is shorter than it should be.")
        data += more
    return data


def _malformed(what: str) -> InvalidLayer:
    return InvalidLayer(f"The tar-diff is malformed or beyond bounds: {what}.", "Have it made again.")


class _Blob:
    """The blob behind its magic, as a source for the decoder of the frame."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        magic = b""
        while len(magic) < 8:
            more = read(8 - len(magic))
            if not more:
                break
            magic += more
        versions = [version for version, known in MAGIC.items() if known == magic]
        if not versions:
            raise InvalidLayer("It is not a tar-diff of version 1 or 2.", "Have it made again.")
        self.version = versions[0]
        self.read = read


class _Program:
    """The operations as bytes. The end is allowed before an operation only: everywhere else it is an error, never a
    short answer, so no caller can wait for more in vain.
    """

    def __init__(self, blob: _Blob, backend: str | None) -> None:
        self.last_operation = DICT if blob.version == 2 else SEEK
        self._decoder = codecs.open_decoder("zstd", blob, backend=backend)
        self._data = b""
        self._at = 0

    def _more(self) -> bool:
        self._data = self._decoder.read(codecs.CHUNK)
        self._at = 0
        return bool(self._data)

    def operation(self) -> int:
        """The next operation, -1 at the end."""
        if self._at == len(self._data) and not self._more():
            return -1
        self._at += 1
        return self._data[self._at - 1]

    def number(self) -> int:
        value = 0
        for place in range(MAX_NUMBER):
            if self._at == len(self._data) and not self._more():
                raise _malformed("it ends inside of an operation")
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise _malformed(f"it has a number of more than {MAX_NUMBER} bytes")

    def pieces(self, n: int, most: int) -> Iterator[bytes]:
        """Exactly ``n`` bytes, in pieces of up to ``most``."""
        while n:
            if self._at == len(self._data) and not self._more():
                raise _malformed("it ends inside of an operation")
            piece = self._data[self._at : self._at + min(n, most)]
            self._at += len(piece)
            n -= len(piece)
            yield piece


class _Span:
    """The next ``n`` bytes of a program as a source."""

    def __init__(self, program: _Program, n: int) -> None:
        self._pieces = program.pieces(n, codecs.CHUNK)

    def read(self, _n: int, /) -> bytes:
        return next(self._pieces, b"")


class Writer:
    """Writes a ``tardf2``: operations in order, then ``finish``. What it makes goes to ``write`` piece by piece.

    Adjacent literal bytes are joined, and a SEEK that changes nothing is the caller's to leave out. MissingLibrary.
    """

    def __init__(self, write: Callable[[bytes], object], level: int = 12, *, backend: str | None = None) -> None:
        self._write = write
        self._compressor = codecs.zstd_compressor(level=level, backend=backend)
        self._literal = bytearray()
        write(MAGIC[2])

    def data(self, data: Buffer) -> None:
        self._literal += data
        if len(self._literal) >= _JOIN:
            self._end_literal()

    def open(self, path: bytes) -> None:
        self._operation(OPEN, len(path), path)

    def copy(self, n: int) -> None:
        self._operation(COPY, n)

    def add(self, data: bytes) -> None:
        self._operation(ADD, len(data), data)

    def seek(self, position: int) -> None:
        self._operation(SEEK, position)

    def dict(self, frame: bytes) -> None:
        self._operation(DICT, len(frame), frame)

    def finish(self) -> None:
        """Write what is left; nothing may follow."""
        self._end_literal()
        self._write(self._compressor.flush())

    def _operation(self, operation: int, number: int, data: Buffer = b"") -> None:
        self._end_literal()
        self._emit(bytes((operation,)) + leb128(number) + data)

    def _end_literal(self) -> None:
        if self._literal:
            self._emit(bytes((DATA,)) + leb128(len(self._literal)) + self._literal)
            self._literal.clear()

    def _emit(self, data: bytes) -> None:
        compressed = self._compressor.compress(data)
        if compressed:
            self._write(compressed)


def leb128(number: int) -> bytes:
    """An unsigned number in LEB128."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)
