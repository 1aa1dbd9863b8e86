# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Splitstreams: a byte stream whose large pieces are objects of the repository and whose small ones are kept inline.

One immutable file (composefs repository format; all integers little endian): a 32-byte header that points to an 80-byte
info section, which points to four sections – the digests of other streams that this one names, the digests of the
objects it consists of, the names themselves, and the chunks. Names and chunks are zstd frames. A chunk is a signed
64-bit number: negative, so many inline bytes follow; otherwise, the whole content of the object with that index. The
size of objects is not stored, only the size of everything together.

Writer and reader keep memory flat: what grows with a layer is the table of its objects' digests alone, 32 or 64 bytes
each.
"""

from __future__ import annotations

import re
import struct
from array import array
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Callable, NamedTuple, Protocol, Union, overload

from . import codecs
from ..errors import FormatError
from .digests import ObjectDigest
from .fsverity import Algorithm

Bytes = Union[bytes, bytearray, memoryview]

LAYER = b"ocilayer"
CONFIG = b"ociconfg"
MANIFEST = b"ocimanif"
BLOB = b"oci_blob"
"""Content types."""

_MAGIC = b"SplitStream"
_INFO = struct.Struct("<8Q8sQ")
CHUNK = struct.Struct("<q")
"""What every chunk begins with."""
_PLACEHOLDER = bytes(CHUNK.size)

_PIECE = 256 * 1024  # bytes compressed, decompressed, copied and handed out at a time
_LONG_RUN = 1 << 20  # inline runs that grow beyond this leave memory

# What a reader holds in memory is bounded, for a damaged file may claim anything: far above what any image needs.
_MAX_OBJECT_TABLE = 512 << 20
_MAX_STREAM_TABLE = 4 << 20
_MAX_NAMES = 4 << 20


class ExternalRef(NamedTuple):
    """A chunk that is the whole content of the object ``digest``, which is number ``index`` of the table."""

    index: int  # type: ignore[assignment]  # the field's name hides tuple.index, which nobody misses
    digest: ObjectDigest


Chunk = Union[bytes, ExternalRef]


# --- writing
# --------------------------------------------------------------------------------------------------------------------


class _IndexTable:
    """Digests in order of first appearance, each once, with the index of each: a hash table in two flat buffers.

    A dict of bytes would take about 200 bytes a digest; this takes its size and 6 to 24 bytes more.
    """

    __slots__ = ("_mask", "_size", "_slots", "count", "digests")

    def __init__(self, size: int) -> None:
        self._size = size
        self.count = 0
        self.digests = bytearray()
        self._mask = 255
        self._slots = array("I", [0]) * 256  # index + 1 of the digest that landed there, 0 for a free slot

    def index(self, digest: bytes) -> int:
        size = self._size
        slots = self._slots
        slot = hash(digest) & self._mask
        while True:
            number = slots[slot]
            if not number:
                return self._add(digest, slot)
            if self.digests[(number - 1) * size : number * size] == digest:
                return number - 1
            slot = (slot + 1) & self._mask

    def _add(self, digest: bytes, slot: int) -> int:
        if len(digest) != self._size:
            raise FormatError(
                f"A digest of {len(digest)} bytes cannot be stored in a splitstream whose digests have {self._size}."
            )
        number = self.count
        self.digests += digest
        self.count = number + 1
        self._slots[slot] = number + 1
        if 3 * number > 2 * self._mask:
            self._grow()
        return number

    def _grow(self) -> None:
        size = self._size
        mask = self._mask = 4 * self._mask + 3
        slots = self._slots = array("I", [0]) * (mask + 1)
        with memoryview(self.digests) as digests:
            for number in range(self.count):
                slot = hash(bytes(digests[number * size : (number + 1) * size])) & mask
                while slots[slot]:
                    slot = (slot + 1) & mask
                slots[slot] = number + 1


def _temporary_file() -> BinaryIO:
    import tempfile  # late: hardly any layer needs it

    return tempfile.TemporaryFile()


class Tap(Protocol):
    """Hears what a stream consists of while it is written."""

    def chunks(self, digests: bytes, chunks: bytes, /) -> None:
        """Whole chunks, as they are before they are compressed, and the digests that they are the first to name."""

    def stop(self) -> None:
        """What follows cannot be told."""


class Writer:
    """Builds one splitstream: chunks by ``inline`` and ``external`` in stream order, names by ``named_ref``, then
    ``finish`` or ``write_to``, once.

    The result is to the byte what cfsctl 0.9 writes for the same chunks, given the same version of libzstd. The
    compressed chunks go to ``spool`` (a file, written from where it stands and read back) if there is one, and are kept
    in memory otherwise. ``scratch`` makes the temporary file that a very long inline run is set aside in. ``tap`` hears
    the chunks as well.
    MissingLibrary if there is no zstd; errors of the two files pass.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        content_type: bytes,
        spool: BinaryIO | None = None,
        scratch: Callable[[], BinaryIO] = _temporary_file,
        tap: Tap | None = None,
    ) -> None:
        if len(content_type) != 8:
            raise FormatError(f"The content type of a splitstream has eight bytes, not {content_type!r}.")
        self.size = 0
        self._algorithm = algorithm
        self._content_type = content_type
        self._objects = _IndexTable(algorithm.size)
        self._streams = _IndexTable(algorithm.size)
        self._names: dict[bytes, int] = {}
        self._compressor = codecs.zstd_compressor()
        self._spool = spool
        self._spool_start = spool.tell() if spool is not None else 0
        self._compressed: list[bytes] = []
        self._compressed_size = 0
        self._scratch_factory = scratch
        self._tap = tap
        self._tapped = 0  # bytes of digests that the tap has heard
        self._run: _LongRun | None = None
        # Chunks that have not been compressed yet. An inline run stays open (adjacent inline data must become one
        # chunk: readers of version 0.9 want a tar header within one) from its placeholder at _open until the next
        # external chunk, when its length is filled in; -1: none is open.
        self._out = bytearray()
        self._open = -1
        self._done = False

    def inline(self, data: Bytes) -> None:
        """Append ``data`` itself; it is copied before the call returns. Adjacent inline data become one chunk."""
        size = len(data)
        if size:
            out = self._out
            if self._open < 0:
                self._open = len(out)
                out += _PLACEHOLDER
            out += data
            self.size += size
            if len(out) > _PIECE:
                self._drain()

    def external(self, digest: ObjectDigest, size: int) -> None:
        """Append the object with this fs-verity ``digest`` (bytes), whose content has ``size`` bytes."""
        index = self._objects.index(digest)
        out = self._out
        start = self._open
        if start >= 0:
            if self._run is not None:
                self._end_run()
            else:
                CHUNK.pack_into(out, start, start + 8 - len(out))
            self._open = -1
        out += CHUNK.pack(index)
        self.size += size
        if len(out) > _PIECE:
            self._drain()

    def named_ref(self, name: str, digest: ObjectDigest) -> None:
        """Name another splitstream or image, given by its fs-verity ``digest`` (bytes); a name that was there already
        gets the new meaning.
        """
        try:
            encoded = name.encode("utf-8")
        except UnicodeEncodeError:
            encoded = b"\0"
        if b"\0" in encoded:
            raise FormatError(f"A splitstream cannot hold the name {name[:200]!r}: it must be UTF-8 without NUL.")
        self._names[encoded] = self._streams.index(digest)

    def finish(self) -> Iterator[bytes]:
        """The complete file, piece by piece; nothing can be appended afterwards."""
        if self._done:
            raise FormatError("A splitstream can be finished only once.")
        self._done = True
        if self._run is not None:
            self._end_run()
        elif self._open >= 0:
            CHUNK.pack_into(self._out, self._open, self._open + 8 - len(self._out))
        self._open = -1
        self._drain()
        self._store(self._compressor.flush())
        compressor = codecs.zstd_compressor()
        # Sorted by the bytes of the name; a frame is written even for no names at all.
        text = b"".join([b"%d:%s\0" % (index, name) for name, index in sorted(self._names.items())])
        names = compressor.compress(text) + compressor.flush()
        return self._sections(names)

    def write_to(self, out: BinaryIO) -> int:
        """Write the complete file to ``out``; returns its length."""
        total = 0
        for piece in self.finish():
            out.write(piece)
            total += len(piece)
        return total

    def close(self) -> None:
        """Give up what an unfinished stream may hold in a temporary file."""
        if self._run is not None:
            self._run.close()
            self._run = None

    def _sections(self, names: bytes) -> Iterator[bytes]:
        streams, objects = self._streams.digests, self._objects.digests
        at = [32 + _INFO.size]
        for size in (len(streams), len(objects), len(names), self._compressed_size):
            at.append(at[-1] + size)
        # The names lie before the chunks, though the info section lists them last.
        ranges = (at[0], at[1], at[1], at[2], at[3], at[4], at[2], at[3])
        header = struct.pack("<11sBHBBQQ", _MAGIC, 0, 0, self._algorithm.id, 12, 32, at[0])
        yield header + _INFO.pack(*ranges, self._content_type, self.size) + streams
        with memoryview(objects) as view:
            for start in range(0, len(view), _PIECE):
                yield bytes(view[start : start + _PIECE])
        yield names
        if self._spool is None:
            yield from self._compressed
            return
        self._spool.seek(self._spool_start)
        left = self._compressed_size
        while left:
            piece = self._spool.read(min(left, _PIECE))
            if not piece:
                raise FormatError(
                    "The temporary file that holds a splitstream's chunks was cut short.",
                    "Something else wrote to it: run again.",
                )
            left -= len(piece)
            yield piece

    def _store(self, compressed: bytes) -> None:
        if compressed:
            self._compressed_size += len(compressed)
            if self._spool is None:
                self._compressed.append(compressed)
            else:
                self._spool.write(compressed)

    def _compress(self, chunks: bytes) -> None:
        if self._tap is not None and chunks:
            digests = self._objects.digests
            self._tap.chunks(bytes(digests[self._tapped :]), chunks)
            self._tapped = len(digests)
        self._store(self._compressor.compress(chunks))

    def _drain(self) -> None:
        """Compress what is complete, and see to it that an open inline run does not fill memory."""
        out = self._out
        start = self._open
        if start < 0:
            self._compress(bytes(out))
            out.clear()
            return
        if start:
            self._compress(bytes(memoryview(out)[:start]))
            del out[:start]
            self._open = 0
        if len(out) > _LONG_RUN or (self._run is not None and len(out) > _PIECE):
            # The length stands before the bytes, and it is not known yet: set them aside.
            if self._run is None:
                self._run = _LongRun(self._scratch_factory())
                if self._tap is not None:
                    self._tap.stop()
            self._run.write(bytes(memoryview(out)[8:]))
            del out[8:]

    def _end_run(self) -> None:
        """Compress the run that was set aside, its length first, and what came after it."""
        run = self._run
        if run is None:
            raise AssertionError("this must hold: run is not None")
        self._run = None
        rest = bytes(memoryview(self._out)[8:])
        self._out.clear()
        self._open = -1
        try:
            self._store(self._compressor.compress(CHUNK.pack(-(run.size + len(rest)))))
            for piece in run.read_back():
                self._store(self._compressor.compress(piece))
            self._store(self._compressor.compress(rest))
        finally:
            run.close()


class _LongRun:
    """Inline bytes in a temporary file. They are compressed, because an archive that has gigabytes outside of its files
    has mostly zeros there.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file = file
        self._start = file.tell()
        self._compressor = codecs.zstd_compressor()

    def write(self, data: bytes) -> None:
        self.size += len(data)
        self._file.write(self._compressor.compress(data))

    def read_back(self) -> Iterator[bytes]:
        self._file.write(self._compressor.flush())
        end = self._file.tell()
        decoder = codecs.zstd_reader(_Range(self._file, self._start, end))
        while True:
            piece = decoder.read(_PIECE)
            if not piece:
                return
            yield piece

    def close(self) -> None:
        self._file.close()


# --- reading
# --------------------------------------------------------------------------------------------------------------------


class _Range:
    """Bytes ``start`` to ``end`` of a file as a source, whoever else moves the file's position in between."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file = file
        self._at = start
        self._end = end

    def read(self, n: int, /) -> bytes:
        self._file.seek(self._at)
        data = self._file.read(min(n, self._end - self._at))
        self._at += len(data)
        return data


class DigestTable(Sequence[ObjectDigest]):
    """Digests of ``size`` bytes each, kept as one bytes object."""

    __slots__ = ("data", "size")

    def __init__(self, data: bytes, size: int) -> None:
        self.data = data
        self.size = size

    def __len__(self) -> int:
        return len(self.data) // self.size

    @overload
    def __getitem__(self, index: int) -> ObjectDigest: ...

    @overload
    def __getitem__(self, index: slice) -> DigestTable: ...

    def __getitem__(self, index: int | slice) -> ObjectDigest | DigestTable:
        if isinstance(index, slice):
            return DigestTable(b"".join([self[i] for i in range(*index.indices(len(self)))]), self.size)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError("no such digest")
        return ObjectDigest(self.data[index * self.size : (index + 1) * self.size])

    def __iter__(self) -> Iterator[ObjectDigest]:
        size = self.size
        return (ObjectDigest(self.data[at : at + size]) for at in range(0, len(self.data), size))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DigestTable) and (self.data, self.size) == (other.data, other.size)

    __hash__ = None  # type: ignore[assignment]


def _damaged(message: str) -> FormatError:
    return FormatError(
        f"The splitstream is damaged: {message}.",
        "Check the repository; a pull writes a layer anew when its stream is gone.",
    )


class Splitstream:
    """An opened splitstream. Everything but the chunks has been read and checked; the file must stay open while
    ``chunks`` is used.
    """

    def __init__(self, file: BinaryIO, algorithm: Algorithm, content_type: bytes, size: int) -> None:
        self.content_type = content_type
        self.size = size
        """Bytes of the whole stream, those of its objects included, as the writer put it down."""
        self.stream_refs: list[ObjectDigest] = []
        self.object_refs = DigestTable(b"", algorithm.size)
        self.named_refs: dict[str, ObjectDigest] = {}
        self._file = file
        self._chunks = (0, 0)

    @classmethod
    def open(cls, file: BinaryIO, algorithm: Algorithm, expect: bytes | None = None) -> Splitstream:
        """Read a splitstream from the seekable ``file``, which is all of it; ``expect`` is the content type it must
        have.

        FormatError if it is damaged, of another algorithm or another content type; MissingLibrary if there is no zstd;
        OSErrors pass.
        """
        length = file.seek(0, 2)
        file.seek(0)
        info_start, info_end = _parse_header(file.read(32), algorithm)
        if info_end - info_start < _INFO.size:
            raise _damaged(f"its info section has {info_end - info_start} bytes instead of {_INFO.size}")
        info = _read(
            file, info_start, info_start + _INFO.size, length, "info"
        )  # a later format may write a longer section: what follows is not for us
        *numbers, content_type, size = _INFO.unpack(info)
        ranges = {
            "stream table": (numbers[0], numbers[1]),
            "object table": (numbers[2], numbers[3]),
            "chunks": (numbers[4], numbers[5]),
            "names": (numbers[6], numbers[7]),
        }
        _check_ranges({"header": (0, 32), "info": (info_start, info_end), **ranges}, length)
        if expect is not None and content_type != expect:
            raise FormatError(
                f"The splitstream has content type {_printable(content_type)} where {_printable(expect)} is expected.",
                "Something registered it under a name that is not its own: check the repository.",
            )
        self = cls(file, algorithm, content_type, size)
        self._chunks = ranges["chunks"]
        self.stream_refs = list(
            _read_table(file, ranges["stream table"], length, algorithm, _MAX_STREAM_TABLE, "stream table")
        )
        self.object_refs = _read_table(
            file, ranges["object table"], length, algorithm, _MAX_OBJECT_TABLE, "object table"
        )
        self.named_refs = _parse_names(_read_names(_Range(file, *ranges["names"])), self.stream_refs)
        return self

    def chunks(self, object_size: Callable[[ObjectDigest], int] | None = None) -> Iterator[Chunk]:
        """The stream in order: inline bytes in pieces of at most 256 KiB, and references to objects.

        ``object_size`` tells the size of an object by its digest; with it the sizes of all pieces are held against the
        stream's size as they come, without it only the inline ones are. FormatError for whatever is wrong, before more
        than a piece of it has been decoded.
        """
        size = self.size
        count = len(self.object_refs)
        digests = self.object_refs.data
        width = self.object_refs.size
        decoder = codecs.zstd_reader(_Range(self._file, *self._chunks))
        total = 0  # bytes so far, as far as known
        # Each reference stands for at least a byte, save those to an empty object, of which there is one: no writer has
        # a reason to repeat it.
        references_left = size + 1
        unpack, new = CHUNK.unpack_from, tuple.__new__
        buffer = b""
        at = have = 0
        while True:
            if have - at < 8:
                buffer, at = buffer[at:] + _at_least(decoder, 8 - (have - at)), 0
                have = len(buffer)
                if have < 8:
                    break
            (value,) = unpack(buffer, at)
            at += 8
            if value >= 0:
                if value >= count:
                    raise _damaged(f"a chunk refers to object number {value} of {count}")
                digest = ObjectDigest(digests[value * width : (value + 1) * width])
                references_left -= 1
                if object_size is not None:
                    total += object_size(digest)
                if total > size or references_left < 0:
                    raise _damaged(f"its chunks are longer than the {size} bytes they should have together")
                yield new(ExternalRef, (value, digest))
                continue
            left = -value
            total += left
            if total > size:
                raise _damaged(f"its chunks are longer than the {size} bytes they should have together")
            if left <= _PIECE and left <= have - at:
                # Nearly every run ends here.
                start = at
                at += left
                yield buffer[start:at]
                continue
            while left:
                if at == have or (have - at < left <= _PIECE):
                    # A run that fits is handed out in one piece.
                    buffer, at = buffer[at:] + _at_least(decoder, min(left, _PIECE) - (have - at)), 0
                    have = len(buffer)
                piece = buffer[at : at + min(left, _PIECE)]
                if not piece or (len(piece) < left <= _PIECE):
                    raise _damaged("its last chunk is cut short")
                at += len(piece)
                left -= len(piece)
                yield piece
        if buffer:
            raise _damaged("its last chunk is cut short")
        if total != size and (object_size is not None or references_left == size + 1):
            raise _damaged(f"its chunks have {total} bytes together instead of {size}")


def _at_least(decoder: Any, n: int) -> bytes:
    """At least ``n`` decoded bytes and at most a piece more, fewer only at the end."""
    data: bytes = decoder.read(max(n, _PIECE))
    while len(data) < n:
        more = decoder.read(_PIECE)
        if not more:
            break
        data += more
    return data


def _parse_header(header: bytes, algorithm: Algorithm) -> tuple[int, int]:
    """Where the info section lies; both layouts of the header are read."""
    if len(header) < 32:
        raise _damaged(f"it has only {len(header)} bytes")
    if header.startswith(_MAGIC):
        version, _flags, number, block = struct.unpack_from("<BHBB", header, 11)
        start, end = struct.unpack_from("<QQ", header, 16)
    elif header[18:29] == _MAGIC:  # what was written before March 2026, and by bootc up to 1.15
        start, end, _flags = struct.unpack_from("<QQH", header)
        version, number, block = header[29:32]
    else:
        raise _damaged("it does not begin like one")
    if version != 0:
        raise FormatError(
            f"The splitstream has format version {version}, and only version 0 is known.",
            "A newer release may know it.",
        )
    if (number, block) != (algorithm.id, 12):
        raise _damaged(
            f"its digests are of algorithm {number} with block size 2^{block}, where the repository has "
            f"{algorithm.id} with 2^12"
        )
    return start, end


def _check_ranges(ranges: dict[str, tuple[int, int]], length: int) -> None:
    """Sections may lie anywhere, with gaps between them, but within the file and not over each other."""
    last, last_end = "", 0
    for name, (start, end) in sorted(ranges.items(), key=lambda item: item[1]):
        if end < start:
            raise _damaged(f"its {name} section ends before it starts")
        if start == end:
            if name in ("chunks", "names"):  # a frame has bytes even if it holds nothing
                raise _damaged(f"its {name} section is empty")
            continue
        if end > length:
            raise _damaged(f"its {name} section goes beyond the end of the file")
        if start < last_end:
            raise _damaged(f"its {name} section lies over its {last} section")
        last, last_end = name, end


def _read(file: BinaryIO, start: int, end: int, length: int, name: str) -> bytes:
    if start == end:
        return b""
    if end > length:
        raise _damaged(f"its {name} section goes beyond the end of the file")
    file.seek(start)
    data = file.read(end - start)
    if len(data) != end - start:
        raise _damaged(f"its {name} section is cut short")
    return data


def _read_table(
    file: BinaryIO, section: tuple[int, int], length: int, algorithm: Algorithm, limit: int, name: str
) -> DigestTable:
    start, end = section
    if (end - start) % algorithm.size:
        raise _damaged(f"its {name} section has {end - start} bytes, which is not a multiple of {algorithm.size}")
    if end - start > limit:
        raise _damaged(f"its {name} section has {end - start} bytes, more than the {limit} that are allowed")
    return DigestTable(_read(file, start, end, length, name), algorithm.size)


def _read_names(source: codecs.Source) -> bytes:
    decoder = codecs.zstd_reader(source)
    text = bytearray()
    while True:
        piece = decoder.read(_PIECE)
        if not piece:
            return bytes(text)
        text += piece
        if len(text) > _MAX_NAMES:
            raise _damaged(f"its names take more than the {_MAX_NAMES} bytes that are allowed")


_NAME = re.compile(rb"\+?0*([0-9]{1,20}):(.*)", re.DOTALL)


def _parse_names(text: bytes, streams: list[ObjectDigest]) -> dict[str, ObjectDigest]:
    """``index:name`` entries, each ended by NUL; the name may contain colons itself, and the last of several entries
    for a name counts.
    """
    *entries, rest = text.split(b"\0")
    if rest:
        raise _damaged("its names end in trailing junk")
    names: dict[str, ObjectDigest] = {}
    for entry in entries:
        match = _NAME.fullmatch(entry)
        index = int(match[1]) if match else len(streams)
        if match is None or index >= len(streams):
            raise _damaged(
                f"its names contain {entry[:100]!r}, which is not a name for one of its {len(streams)} streams"
            )
        try:
            names[match[2].decode("utf-8")] = streams[index]
        except UnicodeDecodeError:
            raise _damaged(f"its names contain {entry[:100]!r}, which is not UTF-8") from None
    return names


def _printable(content_type: bytes) -> str:
    return repr(content_type)[1:]
