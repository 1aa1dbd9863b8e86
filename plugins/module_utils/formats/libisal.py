# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""ISA-L's decoder of gzip, called in the C library ``libisal.so.2``: for hosts that have no Python binding of it.

The library writes where it is told to. So all that it gets is ours for as long as it works: a structure and a buffer
that are larger than it needs, and a copy of the input. What it says of sizes is checked before it is believed.
"""

from __future__ import annotations

import sys
import zlib
from typing import Any

AT_ONCE = 256 * 1024
"""Bytes that one call decodes at most."""

_CHECKED = 6  # ISAL_GZIP_NO_HDR_VER: deflate, then the checksum and length that end a gzip member
_FINISHED = 5  # ISAL_BLOCK_FINISH


class LibraryError(Exception):
    """The library refuses the data."""


class Library:
    """The shared library. Raises ImportError, OSError or AttributeError where it cannot be loaded."""

    def __init__(self) -> None:
        import ctypes

        class State(ctypes.Structure):  # inflate_state of igzip_lib.h (2.30, 64 bits), 87,368 bytes
            _fields_ = [
                ("next_out", ctypes.c_void_p),
                ("avail_out", ctypes.c_uint32),
                ("total_out", ctypes.c_uint32),
                ("next_in", ctypes.c_char_p),
                ("read_in", ctypes.c_uint64),
                ("avail_in", ctypes.c_uint32),
                ("read_in_length", ctypes.c_int32),
                ("tables", ctypes.c_uint8 * 21120),
                ("block_state", ctypes.c_uint32),
                ("block", ctypes.c_uint32 * 2),
                ("crc_flag", ctypes.c_uint32),
                ("crc", ctypes.c_uint32),
                ("rest", ctypes.c_uint8 * (87368 - 21180)),
                ("guard", ctypes.c_uint64),
                ("spare", ctypes.c_uint8 * 8192),
            ]

        library = ctypes.CDLL("libisal.so.2")
        self.begin: Any = library.isal_inflate_init
        self.inflate: Any = library.isal_inflate
        self.begin.argtypes = self.inflate.argtypes = [ctypes.POINTER(State)]
        self.state: Any = State
        self.buffer: Any = ctypes.c_uint8 * (AT_ONCE + 8192)
        self.address: Any = ctypes.addressof
        self.bytes_at: Any = ctypes.string_at


class Member:
    """The body of one gzip member, with those parts of zlib's ``decompressobj`` that ``codecs`` uses.

    Not for two threads at once. The interpreter lock is released while the library works.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._state = library.state()
        self._out = library.buffer()
        self.begin()

    def begin(self) -> Member:
        """Forget everything: what comes is the deflate data of a new member, without the member's header."""
        self._library.begin(self._state)
        self._state.crc_flag = _CHECKED
        self.eof = False
        self.unused_data = self.unconsumed_tail = memoryview(b"")
        return self

    def decompress(self, data: memoryview, n: int, /) -> bytes:
        """At most ``n`` bytes, and at most ``AT_ONCE``. Raises LibraryError."""
        state = self._state
        n = min(n, AT_ONCE)
        given = bytes(data[: n + 1024])  # hardly anything becomes smaller by being decoded
        state.next_in = given  # the structure holds it, too
        state.avail_in = len(given)
        state.next_out = self._library.address(self._out)
        state.avail_out = n
        result = self._library.inflate(state)
        state.next_in = None
        self.eof = state.block_state == _FINISHED
        # When it has finished, there may be whole bytes that it took and did not need.
        used = len(given) - state.avail_in - (state.read_in_length // 8 if self.eof else 0)
        made = n - state.avail_out
        if result or state.guard or not (0 <= used <= len(given) and 0 <= made <= n):
            raise LibraryError("wrong checksum or length" if result == -6 else "invalid deflate data")
        if self.eof:
            self.unused_data = data[used:]
        else:
            self.unconsumed_tail = data[used:]
        return bytes(self._library.bytes_at(self._out, made))


def load() -> Library | None:
    """The library if it is there and this Python can call it."""
    try:
        return Library() if sys.byteorder == "little" and sys.maxsize > 1 << 32 else None
    except (ImportError, OSError, AttributeError):
        return None


def sample() -> tuple[bytes, bytes]:
    """Some text, longer than the window of deflate, and its gzip member: blocks of all three kinds."""
    text = b"".join(b"%x is %d squared\n" % (number * number, number) for number in range(2200))
    blob = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
    for level, strategy in (1, zlib.Z_DEFAULT_STRATEGY), (0, zlib.Z_DEFAULT_STRATEGY), (1, zlib.Z_FIXED):
        packer = zlib.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
        blob += packer.compress(text) + packer.flush(zlib.Z_FULL_FLUSH)
    text *= 3
    return text, blob + b"\3\0" + zlib.crc32(text).to_bytes(4, "little") + len(text).to_bytes(4, "little")
