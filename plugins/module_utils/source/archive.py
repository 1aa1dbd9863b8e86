# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Files within a tar archive, plain or compressed, read in place: nothing is unpacked.

An archive is walked once, which tells where each file lies in the (decompressed) tar. From a plain one any file is then
read at its place; of a compressed one the beginning is decoded again up to it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from ..formats import codecs, tarheader
from ..errors import EngineError, ImageNotFound, InvalidDocument, InvalidLayer, from_exception

MAX_MEMBERS = 100_000
_PIECE = 256 * 1024
_MAGICS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"))


class Place(NamedTuple):
    """Where a file lies in the tar."""

    offset: int
    size: int


class Archive:
    """An archive that is open as ``fd``, a regular file, which stays the caller's. Raises InvalidDocument where it is
    damaged.
    """

    def __init__(self, fd: int, path: str) -> None:
        self.path = path
        self._fd = fd
        head = os.pread(fd, 8, 0)
        self.compression = next((name for magic, name in _MAGICS if head.startswith(magic)), "none")
        self._places = self._walk()

    def find(self, name: str) -> Place | None:
        """Where the file ``name`` lies; the last one if there are several, as when the archive is unpacked."""
        return self._places.get(os.fsencode(name))

    def read(self, name: str, limit: int) -> bytes:
        """The whole file. ImageNotFound if it is not there, InvalidDocument if it has more than ``limit`` bytes."""
        place = self.find(name)
        if place is None:
            raise ImageNotFound(f"The archive {self.path} holds no {name}.", "Check that it is an OCI archive.")
        if place.size > limit:
            raise InvalidDocument(f"{name} in the archive {self.path} has {place.size} bytes; at most {limit} fit.")
        if self.compression == "none":
            data = os.pread(self._fd, place.size, place.offset)
        else:
            reader = _Reader(self._fd, self.compression)
            reader.skip(place.offset)
            data = reader.exactly(place.size)
        if len(data) != place.size:
            raise self._damaged("it ends within " + name)
        return data

    def open(self, name: str) -> tuple[int, int]:
        """An fd that gives the file's bytes from its beginning (and perhaps more after its end), the caller's to
        close, and its size. ImageNotFound if it is not there.
        """
        place = self.find(name)
        if place is None:
            raise ImageNotFound(
                f"The archive {self.path} holds no {name}.", "The archive is incomplete: copy it again."
            )
        if self.compression != "none":
            return self._pipe(place), place.size
        # Opened anew, since duplicated fds would share one position.
        fd = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        os.lseek(fd, place.offset, os.SEEK_SET)
        return fd, place.size

    def _pipe(self, place: Place) -> int:
        """The read end of a pipe into which a thread decodes the file; it just ends if the archive does, or is
        damaged.
        """
        readable, writable = os.pipe()
        source = os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

        def copy() -> None:
            try:
                reader = _Reader(source, self.compression)
                reader.skip(place.offset)
                left = place.size
                while left:
                    data = memoryview(reader.some(left))
                    if not data:
                        break
                    left -= len(data)
                    while data:
                        data = data[os.write(writable, data) :]
            except (OSError, EngineError, EOFError, ValueError):
                pass  # whoever reads the pipe sees that bytes are missing
            finally:
                os.close(writable)
                os.close(source)

        try:
            threading.Thread(target=copy, name="archive", daemon=True).start()
        except RuntimeError as error:
            for fd in (readable, writable, source):
                os.close(fd)
            raise from_exception(error, f"Reading the archive {self.path}") from error
        return readable

    def _walk(self) -> dict[bytes, Place]:
        reader = _Reader(self._fd, self.compression)
        parser = tarheader.Parser()
        places: dict[bytes, Place] = {}
        zero = False
        try:
            while True:
                block = reader.exactly(tarheader.BLOCK)
                if len(block) < tarheader.BLOCK:
                    raise self._damaged("it ends without an end marker")
                if not any(block):
                    if zero:
                        return places
                    zero = True
                    continue
                zero = False
                entry = parser.parse(block, reader.offset - tarheader.BLOCK)
                size = parser.want if entry is None else entry.size
                if entry is None and parser.keep:
                    parser.payload(reader.exactly(size))
                    reader.skip(-size % tarheader.BLOCK)
                    continue
                if entry is not None:
                    name = _normal(entry.path)
                    if entry.type in (b"0", b"\0", b"7"):
                        places[name] = Place(reader.offset, size)
                    elif entry.type == b"1" and _normal(entry.linkname) in places:
                        places[name] = places[_normal(entry.linkname)]
                    else:
                        places.pop(name, None)
                    if len(places) > MAX_MEMBERS:
                        raise self._damaged(f"it holds more than {MAX_MEMBERS} files")
                reader.skip(size + -size % tarheader.BLOCK)
        except InvalidLayer as error:
            raise self._damaged(error.text.rstrip(".")) from error
        except (EOFError, OSError, ValueError) as error:
            raise self._damaged(str(error).rstrip(".")) from error

    def _damaged(self, why: str) -> InvalidDocument:
        return InvalidDocument(f"The archive {self.path} is damaged: {why}.", "Copy or make it again.")


def _normal(name: bytes) -> bytes:
    """A member's name without the dots and slashes that mean nothing."""
    return b"/".join(part for part in name.split(b"/") if part not in (b"", b"."))


class _File:
    """Reads a file by its own position, whatever else uses the fd."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.offset = 0

    def read(self, n: int = _PIECE) -> bytes:
        data = os.pread(self._fd, n, self.offset)
        self.offset += len(data)
        return data


class _Reader:
    """The decompressed tar from its beginning."""

    def __init__(self, fd: int, compression: str) -> None:
        self.offset = 0
        self._plain = _File(fd) if compression == "none" else None
        self._size = os.fstat(fd).st_size
        self._buffer = b""
        source = _File(fd)
        if compression in ("bzip2", "xz"):
            self._read = _standard(source, compression)
        elif self._plain is None:
            self._read = codecs.open_decoder(compression, source).read

    def some(self, n: int) -> bytes:
        """At least one byte and at most ``n``; empty at the end."""
        if self._plain is not None:
            data = self._plain.read(min(n, _PIECE))
        else:
            if not self._buffer:
                self._buffer = self._read(_PIECE)
            data, self._buffer = self._buffer[:n], self._buffer[n:]
        self.offset += len(data)
        return data

    def exactly(self, n: int) -> bytes:
        """``n`` bytes, fewer at the end."""
        parts = []
        while n:
            data = self.some(n)
            if not data:
                break
            parts.append(data)
            n -= len(data)
        return b"".join(parts)

    def skip(self, n: int) -> None:
        """Pass over ``n`` bytes. EOFError if there are fewer."""
        if self._plain is not None:
            if self.offset + n > self._size:
                raise EOFError("it ends in the middle of a file")
            self._plain.offset += n
            self.offset += n
            return
        while n:
            data = self.some(n)
            if not data:
                raise EOFError("it ends in the middle of a file")
            n -= len(data)


def _standard(source: _File, compression: str) -> Callable[[int], bytes]:
    try:
        if compression == "bzip2":
            import bz2

            opener: Any = bz2.BZ2File
        else:
            import lzma

            opener = lzma.LZMAFile
    except ImportError as error:  # a Python built without the one or the other
        raise from_exception(error, f"Reading an archive compressed with {compression}") from error

    class Whole:
        """What the standard library wants of a file."""

        def read(self, n: int = -1) -> bytes:
            return source.read(n if n >= 0 else _PIECE)

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return False

    file: Any = Whole()
    read: Callable[[int], bytes] = opener(file).read
    return read
