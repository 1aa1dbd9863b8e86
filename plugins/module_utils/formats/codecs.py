# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""gzip, zstd and plain data behind one pull interface.

A decoder reads compressed bytes from a *source* and hands out decoded bytes. What every decoder promises, whichever
library does the work:

- all gzip members (RFC 1952) and all zstd frames (RFC 8878) are decoded, skippable frames are left out wherever they
  stand;
- after the last member only zero padding is forgiven: other bytes, truncation and wrong checksums are errors, never a
  short result;
- a read returns at most what was asked for, so that a few bytes that expand to gigabytes cost time but no memory;
- at most ``CHUNK`` bytes of input (and what the library holds of it) are buffered.

All libraries release the interpreter lock while they work, so a decoder may run in a thread beside its reader.
"""

from __future__ import annotations

import functools
import importlib
import io
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, Union

from . import libisal
from ..errors import (
    MEMORY,
    EngineError,
    FormatError,
    InvalidLayer,
    MissingLibrary,
    exhausted,
    from_import_error,
    lacks_room,
)

if TYPE_CHECKING:
    from mmap import mmap

    Buffer = Union[bytes, bytearray, memoryview, mmap]

CHUNK = 256 * 1024
"""Bytes asked of a source at a time."""

_ENOUGH = (
    64 * 1024
)  # short pieces (one gzip member a file, as eStargz writes) are gathered until a read can return this much
_FIRST_SLICE = (
    16 * 1024
)  # what a new member is offered first: the libraries copy what they do not use, and a member may be tiny
_MAX_WINDOW = 1 << 27  # the largest window that zstd decoders accept unless told otherwise
_MAX_HEADER = (
    1 << 18
)  # bytes of a gzip header: room for an extra field of 64 KiB and for names longer than any real one
_FETCH_AGAIN = (
    "It was damaged on the way or built wrongly: pull it again, and if that does not help, have the image rebuilt."
)

GZIP_BACKENDS = {"isal": "isal.isal_zlib", "zlib-ng": "zlib_ng.zlib_ng", "libisal": "", "zlib": "zlib"}
"""Names of the gzip libraries, most preferred first, and the Python modules that bind them. ``libisal`` has none: it is
as fast as ``isal``, and comes after what was compiled against its library.
"""

ZSTD_BACKENDS = {"compression.zstd": "compression.zstd", "zstandard": "zstandard", "backports.zstd": "backports.zstd"}
"""Names of the zstd libraries and the Python modules that bind them, most preferred first."""


class Source(Protocol):
    """Where compressed bytes come from: ``read(n)`` returns at most ``n`` bytes, fewer if it likes, ``b""`` only at the
    end.
    """

    def read(self, n: int, /) -> bytes: ...


class Decoder(Protocol):
    """Decoded bytes: ``read(n)`` returns at most ``n`` bytes, fewer if it likes, ``b""`` only at the very end (and for
    ``n`` < 1).
    """

    def read(self, n: int, /) -> bytes: ...


class Compressor(Protocol):
    """A streaming compressor: everything returned by ``compress`` calls and one final ``flush`` makes up the frame."""

    def compress(self, data: bytes, /) -> bytes: ...

    def flush(self) -> bytes: ...


# ----------------------------------------------------------------------------------------------------------------
# libraries


@functools.cache
def _module(name: str) -> Any:
    """The module, or None where it is not installed or does not load. Raises LimitReached and OutOfMemory."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        reached = from_import_error(error, f"Loading {name}")
        if reached is None:
            return None
        raise reached from error


@functools.cache
def _libisal() -> libisal.Library | None:
    """The C library if it is there and decodes a sample as it should."""
    library = libisal.load()
    if library is None:
        return None
    text, blob = libisal.sample()
    for data, expected in (blob * 2, text * 2), (blob[:-8] + bytes(8), b""):
        try:
            read = _Gzip(io.BytesIO(data), library).read
            decoded = b"".join(iter(functools.partial(read, 5000), b""))
        except InvalidLayer:
            decoded = b""
        if decoded != expected:
            return None
    return library


def _gzip_library(name: str) -> Any:
    """The module or the library of ``GZIP_BACKENDS``, or None where it is not there."""
    return _module(GZIP_BACKENDS[name]) if GZIP_BACKENDS[name] else _libisal()


def gzip_backend() -> str:
    """The gzip library that is used: ``isal``, ``zlib-ng``, ``libisal`` or ``zlib``."""
    return next(name for name in GZIP_BACKENDS if _gzip_library(name) is not None)


def zstd_backend() -> str | None:
    """The zstd library that is used: ``compression.zstd`` (Python 3.14), ``zstandard``, ``backports.zstd``, or None if
    there is none.
    """
    return next((name for name, module in ZSTD_BACKENDS.items() if _module(module) is not None), None)


def require_zstd() -> None:
    """Raise MissingLibrary unless there is a zstd library."""
    _zstd_module(None)


def _zstd_module(backend: str | None) -> tuple[str, Any]:
    name = backend or zstd_backend()
    module = _module(ZSTD_BACKENDS[name]) if name else None
    if name is None or module is None:
        if lacks_room():
            raise exhausted(MEMORY, "Loading a zstd library")
        raise MissingLibrary(
            "A zstd library for Python is needed, and none is installed on the host.",
            "Let the role composefs.oci.skopeo install it, or install python3-zstandard (Debian, Fedora, EPEL), or "
            "run pip install zstandard for the Python "
            "that runs the module; Python 3.14 brings one.",
        )
    return name, module


# -----------------------------------------------------------------------------------------------------------------
# decoding


def open_decoder(compression: str, source: Source, *, backend: str | None = None) -> Decoder:
    """A decoder for ``source``; ``compression`` is ``none``, ``gzip`` or ``zstd``.

    ``backend`` names one of ``GZIP_BACKENDS`` or ``ZSTD_BACKENDS``; the best at hand is taken without it.
    Raises MissingLibrary; the decoder's reads raise InvalidLayer for damaged data and let the source's own errors pass.
    """
    if compression == "none":
        return source
    if compression == "gzip":
        return _Gzip(source, _gzip_library(backend or gzip_backend()))
    if compression == "zstd":
        return _zstd(_Frames(source, InvalidLayer, padded=True), *_zstd_module(backend))
    raise ValueError(f"unknown compression {compression!r}")


def zstd_reader(source: Source, *, backend: str | None = None) -> Decoder:
    """A decoder for the zstd sections of repository files: as ``open_decoder``, but nothing at all may follow the last
    frame.

    Raises MissingLibrary; the decoder's reads raise FormatError for damaged data.
    """
    return _zstd(_Frames(source, FormatError, padded=False), *_zstd_module(backend))


class _Input:
    """The source's bytes, one chunk at a time, with a position for error messages."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._before = 0  # bytes of all earlier chunks
        self.data = b""
        self.pos = 0

    @property
    def offset(self) -> int:
        return self._before + self.pos

    def more(self) -> bool:
        """Append the next chunk to what is not used yet (a few bytes); False at the end."""
        chunk = self._source.read(CHUNK)
        self._before += self.pos
        self.data = self.data[self.pos :] + chunk if self.pos < len(self.data) else chunk
        self.pos = 0
        return bool(chunk)

    def only_zeros(self) -> bool:
        """Use up everything that is left; False as soon as a byte of it is not zero."""
        while True:
            rest = len(self.data) - self.pos
            if self.data.count(0, self.pos) != rest:
                return False
            self.pos += rest
            if not self.more():
                return True


class _Members:
    """Members that follow each other, each decoded by an object of its own: what gzip and the zstd of the standard
    library share.
    """

    def __init__(self, new: Callable[[], Any]) -> None:
        self._new = new
        self._member: Any = None

    def _begin(self) -> bool:
        """Go to the start of the next member; False if the last one has been read."""
        raise NotImplementedError

    def _piece(self, n: int) -> bytes:
        """Up to ``n`` bytes of the current member; sets ``_member`` to None when it has ended."""
        raise NotImplementedError

    def read(self, n: int, /) -> bytes:
        if n < 1:
            return b""
        enough = min(n, _ENOUGH)
        pieces: list[bytes] = []
        total = 0
        while total < enough:
            if self._member is None:
                if not self._begin():
                    break
                self._member = self._new()
            piece = self._piece(n - total)
            if piece:
                pieces.append(piece)
                total += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class _Gzip(_Members):
    """Any module with the interface of zlib's ``decompressobj``, or libisal."""

    def __init__(self, source: Source, module: Any) -> None:
        self._errors: tuple[type[Exception], ...]
        if isinstance(module, libisal.Library):
            super().__init__(libisal.Member(module).begin)
            self._errors = (libisal.LibraryError,)
        else:
            super().__init__(self._start)
            self._errors = (zlib.error, module.error)
        self._module = module
        self._input = _Input(source)
        self._members = 0
        self._slice = _FIRST_SLICE

    def _start(self) -> Any:
        # Headers are read here, for ISA-L loses its way in a header with optional fields that arrives in pieces; the
        # library gets a plain one. It verifies checksum and length of the data (wbits 31).
        member = self._module.decompressobj(wbits=31)
        member.decompress(b"\x1f\x8b\x08\0\0\0\0\0\0\xff")
        return member

    def _begin(self) -> bool:
        given = self._input
        while len(given.data) - given.pos < 2 and given.more():
            pass
        start = given.offset
        magic = given.data[given.pos : given.pos + 2]
        if magic == b"\x1f\x8b":
            size = self._header(given.data[given.pos : given.pos + 512]) or self._header(given.data[given.pos :])
            while not size:
                if len(given.data) - given.pos > _MAX_HEADER:
                    raise InvalidLayer(
                        f"The gzip data is damaged near byte {start}: the header does not end.", _FETCH_AGAIN
                    )
                if not given.more():
                    raise InvalidLayer(
                        f"The gzip data ends in the middle of a member, at byte {start + len(given.data) - given.pos}.",
                        _FETCH_AGAIN,
                    )
                size = self._header(given.data[given.pos :])
            given.pos += size
            self._members += 1
            self._slice = _FIRST_SLICE
            return True
        if self._members == 0:
            raise InvalidLayer("It is not gzip data." if magic else "It is empty instead of gzip data.", _FETCH_AGAIN)
        if magic and not (magic[0] == 0 and given.only_zeros()):
            raise InvalidLayer(f"Garbage follows the last gzip member at byte {start}.", _FETCH_AGAIN)
        return False

    def _header(self, data: bytes) -> int:
        """Length of the member header that ``data`` begins with, 0 if it is not all there (RFC 1952, section 2.3)."""
        if len(data) < 10:
            return 0
        flags = data[3]
        if data[2] != 8 or flags & 0xE0:
            raise InvalidLayer(
                f"The gzip data is damaged near byte {self._input.offset}: unknown method or flags.", _FETCH_AGAIN
            )
        size = 10
        if flags & 4:  # extra field
            size += 2 + int.from_bytes(data[10:12], "little")
        for text in (8, 16):  # file name, comment
            if flags & text:
                size = data.find(0, size) + 1
                if not size:
                    return 0
        if flags & 2:  # checksum of the header
            size += 2
            if (
                len(data) >= size
                and int.from_bytes(data[size - 2 : size], "little") != zlib.crc32(data[: size - 2]) & 0xFFFF
            ):
                raise InvalidLayer(
                    f"The gzip data is damaged near byte {self._input.offset}: the header has a wrong checksum.",
                    _FETCH_AGAIN,
                )
        return size if len(data) >= size else 0

    def _piece(self, n: int) -> bytes:
        given = self._input
        member = self._member
        # A library may hold decoded bytes back once it has returned n, so it is asked again until it returns nothing.
        offer = memoryview(given.data)[given.pos : given.pos + self._slice]
        try:
            piece: bytes = member.decompress(offer, n)
        except self._errors as error:
            _require_memory(error)
            raise InvalidLayer(f"The gzip data is damaged near byte {given.offset}: {error}.", _FETCH_AGAIN) from error
        if member.eof:
            given.pos += len(offer) - len(member.unused_data)
            self._member = None
            return piece
        used = len(offer) - len(member.unconsumed_tail)
        given.pos += used
        self._slice = min(4 * self._slice, CHUNK)
        if not piece and not used and (offer or not given.more()):
            raise InvalidLayer(f"The gzip data ends in the middle of a member, at byte {given.offset}.", _FETCH_AGAIN)
        return piece


def _require_memory(error: Exception) -> None:
    """Raise MemoryError if a library says that memory ran out: the data may be all right."""
    if "not enough memory" in str(error) or str(error).startswith("Error -4 "):  # zlib's words for it
        raise MemoryError from error


_BETWEEN, _BLOCK, _PADDING = range(3)


class _Frames:
    """The zstd frames of a source, and nothing else: skippable frames are dropped, structure and end are checked.

    The walk over frame and block headers (RFC 8878, section 3.1) costs about a microsecond per 128 KiB of output. It is
    what makes all libraries alike: some take the end of input in the middle of a frame for its end, stop at skippable
    frames, or know obsolete formats.
    """

    def __init__(self, source: Source, error: type[EngineError], padded: bool) -> None:
        self._source = source
        self._error = error
        self._padded = padded
        self._state = _BETWEEN
        self._carry = b""  # the beginning of a header that the next chunk completes
        self._skip = 0  # bytes of the current block, or skippable frame, that are still to come
        self._drop = False  # … and whether they are a skippable frame's
        self._checksum = 0  # bytes of the checksum that end the current frame
        self._frames = 0
        self._offset = 0

    def fail(self, message: str, at: int | None = None) -> EngineError:
        place = f", near byte {self._offset if at is None else at}" if self._offset else ""
        return self._error(message + place + ".", _FETCH_AGAIN if self._error is InvalidLayer else "")

    def read(self, n: int = -1, /) -> bytes:
        """Bytes of frames, ``b""`` at the end. How many is the source's choice."""
        while True:
            chunk = self._source.read(CHUNK)
            if not chunk:
                break
            kept = self._walk(chunk)
            self._offset += len(chunk)
            if kept:
                return kept
        if self._state == _BLOCK or self._skip:
            raise self.fail("The zstd data ends in the middle of a frame")
        if self._carry:
            raise self.fail("The zstd data ends in the middle of a frame header")
        if not self._frames:
            raise self.fail("It is empty instead of zstd data")
        return b""

    def _walk(self, chunk: bytes) -> bytes:
        """Follow the headers through ``chunk``; return it without what is not part of a frame."""
        data = self._carry + chunk if self._carry else chunk
        base = self._offset - len(self._carry)
        self._carry = b""
        end = len(data)
        pos = self._skip
        start = min(pos, end) if self._drop else 0  # where the bytes begin that are to be kept
        pieces: list[bytes] = []
        while pos < end:
            if self._state == _BLOCK:
                if end - pos < 3:
                    break
                header = data[pos] | data[pos + 1] << 8 | data[pos + 2] << 16
                pos += 4 if header & 6 == 2 else 3 + (header >> 3)  # a run holds one byte, whatever its length
                if header & 1:
                    pos += self._checksum
                    self._state = _BETWEEN
                self._drop = False
                continue
            if self._state == _PADDING or (self._padded and self._frames and data[pos] == 0):
                self._state = _PADDING
                pieces.append(data[start:pos])
                if data.count(0, pos) != end - pos:
                    raise self.fail("Garbage follows the last zstd frame", base + pos)
                start = pos = end
                break
            if end - pos < 5:
                break
            if data[pos : pos + 4] == b"\x28\xb5\x2f\xfd":
                size = self._frame_header(data, pos)
                if end - pos < size:
                    break
                self._state = _BLOCK
                self._drop = False
                pos += size
            elif data[pos + 1 : pos + 4] == b"\x2a\x4d\x18" and data[pos] & 0xF0 == 0x50:
                if end - pos < 8:
                    break
                pieces.append(data[start:pos])
                pos += 8 + int.from_bytes(data[pos + 4 : pos + 8], "little")
                start = min(pos, end)
                self._drop = True
            else:
                raise self.fail(
                    "Garbage follows the last zstd frame" if self._frames else "It is not zstd data", base + pos
                )
            self._frames += 1
        if pos < end:
            self._carry = data[pos:]
            end = pos
        self._skip = max(pos - end, 0)
        if not pieces and start == 0 and end == len(data):
            return data
        pieces.append(data[start:end])
        return b"".join(pieces)

    def _frame_header(self, data: bytes, pos: int) -> int:
        """Length of the frame header at ``pos``, whose first five bytes are there; checks the window if all
        of it is.
        """
        flags = data[pos + 4]
        single = flags >> 5 & 1
        content_size = (1 if single else 0, 2, 4, 8)[flags >> 6]
        before = (0 if single else 1) + (0, 1, 2, 4)[flags & 3]
        size = 5 + before + content_size
        if len(data) - pos >= size:
            if single:
                window = int.from_bytes(data[pos + 5 + before : pos + size], "little")
            else:
                exponent, mantissa = divmod(data[pos + 5], 8)
                window = (8 + mantissa) << (7 + exponent)
            if window > _MAX_WINDOW:
                raise self.fail(
                    f"A zstd frame needs {window >> 20} MiB of memory to decode, more than the {_MAX_WINDOW >> 20} "
                    f"MiB that decoders grant"
                )
            self._checksum = flags & 4
        return size


def _zstd(frames: _Frames, name: str, module: Any) -> Decoder:
    return _Zstandard(frames, module) if name == "zstandard" else _StandardZstd(frames, module)


class _Zstandard:
    """Package ``zstandard``: its stream reader goes on from frame to frame and never returns more than asked for."""

    def __init__(self, frames: _Frames, module: Any, reader: Any = None) -> None:
        self._frames = frames
        self._error = module.ZstdError
        self._reader = reader or module.ZstdDecompressor().stream_reader(
            frames, read_size=CHUNK, read_across_frames=True
        )

    def read(self, n: int, /) -> bytes:
        if n < 1:
            return b""
        try:
            data: bytes = self._reader.read(n)
        except self._error as error:
            _require_memory(error)
            raise self._frames.fail(f"The zstd data is damaged ({error})") from error
        return data


class _StandardZstd(_Members):
    """Module ``compression.zstd`` of Python 3.14, and ``backports.zstd``: one object per frame."""

    def __init__(self, frames: _Frames, module: Any, prefix: Any = None) -> None:
        super().__init__(lambda: module.ZstdDecompressor(zstd_dict=prefix))
        self._frames = frames
        self._error = module.ZstdError
        self._data = memoryview(b"")
        self._pos = 0
        self._slice = _FIRST_SLICE

    def _more(self) -> bool:
        if self._pos == len(self._data):
            self._data = memoryview(self._frames.read())
            self._pos = 0
        return len(self._data) > 0

    def _begin(self) -> bool:
        self._slice = _FIRST_SLICE
        return self._more()

    def _piece(self, n: int) -> bytes:
        member = self._member
        offer = self._data[:0]
        if member.needs_input:
            if not self._more():  # the walk found the frame whole: the library must have seen its end
                raise self._frames.fail("The zstd data is damaged (a frame does not end)")
            offer = self._data[self._pos : self._pos + self._slice]
            self._pos += len(offer)
            self._slice = min(4 * self._slice, CHUNK)
        try:
            piece: bytes = member.decompress(offer, n)
        except self._error as error:
            _require_memory(error)
            raise self._frames.fail(f"The zstd data is damaged ({error})") from error
        if member.eof:
            self._pos -= len(
                member.unused_data
            )  # never more than the last offer: the next is made only when all of it is used
            self._member = None
        return piece


# --------------------------------------------------------------------------------------------------------------
# compressing


def zstd_compressor(*, level: int = 3, backend: str | None = None) -> Compressor:
    """A compressor for the sections of a splitstream and for tar-diffs: one frame without content size and checksum.

    Splitstreams are written at level 3. No input at all gives the nine bytes ``28 b5 2f fd 20 00 01 00 00``. How the
    input is cut makes no difference to the result. The bytes depend on the version of libzstd, not on the Python
    package. Raises MissingLibrary.
    """
    name, module = _zstd_module(backend)
    # The one-shot functions would store the content size: the sections are defined by what the streaming interface
    # writes.
    compressor = module.ZstdCompressor(level=level)
    return _ZstdCompressor(compressor.compressobj() if name == "zstandard" else compressor, module.ZstdError)


class _ZstdCompressor:
    def __init__(self, stream: Any, error: type[Exception]) -> None:
        self._compress: Callable[[Any], bytes] = stream.compress
        self._flush: Callable[[], bytes] = stream.flush
        self._error = error

    def compress(self, data: bytes, /) -> bytes:
        try:
            # An empty first call would start a frame with a window, and the empty frame has none.
            return self._compress(data) if data else b""
        except self._error as error:
            _require_memory(error)
            raise

    def flush(self) -> bytes:
        try:
            return self._flush()
        except self._error as error:
            _require_memory(error)
            raise


# --------------------------------------------------------------------------------------------------------------
# patches: frames whose raw prefix is another file


# From this size of the base on, long distance matching pays: below, the search of the level itself reaches all of it
# and finds more (real programs of 2 to 5 MB became 1 to 11 percent larger by it).
_LONG_DISTANCE = 16 << 20


class PatchMaker:
    """Makes frames that may refer to every byte of ``base`` (``zstd --patch-from``). Raises MissingLibrary."""

    def __init__(self, base: Buffer, level: int = 12, *, backend: str | None = None) -> None:
        self._level = level
        self._base_size = len(base)
        self._name, self._module = _zstd_module(backend)
        if self._name == "zstandard":
            self._dict = self._module.ZstdCompressionDict(base, dict_type=self._module.DICT_TYPE_RAWCONTENT)
        else:
            self._dict = self._module.ZstdDict(base, is_raw=True)

    def make(self, data: Buffer) -> bytes:
        """``data`` as one frame. A reader needs the same base, and a window of the size of ``data`` rounded up to
        a power of two. The window need not hold the base.
        """
        module = self._module
        window = max((len(data) - 1).bit_length(), 10)
        if self._name == "zstandard":
            parameters = module.ZstdCompressionParameters.from_level(
                self._level,
                source_size=len(data),
                dict_size=self._base_size,
                window_log=window,
                enable_ldm=self._base_size > _LONG_DISTANCE,
            )
            compressor = module.ZstdCompressor(dict_data=self._dict, compression_params=parameters)
            return self._made(compressor.compress, data)
        options = {
            module.CompressionParameter.compression_level: self._level,
            module.CompressionParameter.window_log: window,
            module.CompressionParameter.enable_long_distance_matching: int(self._base_size > _LONG_DISTANCE),
        }
        compressor = module.ZstdCompressor(options=options, zstd_dict=self._dict.as_prefix)
        return self._made(compressor.compress, data, module.ZstdCompressor.FLUSH_FRAME)

    def _made(self, compress: Callable[..., bytes], *arguments: Any) -> bytes:
        try:
            return compress(*arguments)
        except self._module.ZstdError as error:
            _require_memory(error)
            raise


class Patches:
    """Decodes any number of frames that have the raw prefix ``base``; holds one copy of it. Raises MissingLibrary."""

    def __init__(self, base: Buffer, *, backend: str | None = None) -> None:
        self._name, self._module = _zstd_module(backend)
        if self._name == "zstandard":
            self._dict = self._module.ZstdCompressionDict(base, dict_type=self._module.DICT_TYPE_RAWCONTENT)
        else:
            self._dict = self._module.ZstdDict(base, is_raw=True)

    def open(self, source: Source) -> Decoder:
        """A decoder of the one frame that ``source`` begins with; its reads raise InvalidLayer for damaged data."""
        module = self._module
        frames = _Frames(source, InvalidLayer, padded=True)
        if self._name == "zstandard":
            reader = module.ZstdDecompressor(dict_data=self._dict, max_window_size=_MAX_WINDOW).stream_reader(
                frames, read_size=CHUNK
            )
            return _Zstandard(frames, module, reader)
        return _StandardZstd(frames, module, self._dict.as_prefix)
