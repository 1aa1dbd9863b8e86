# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What a layer consists of, told while it is still being stored: by the process that imports it to the one that builds
the file tree of its image.

A feed is a pipe with one reader, and nobody ever waits for that one: an importer that finds it full tells no more. Then
the reader takes the rest from the stored layer, as it does for a layer without a feed. A feed carries the chunks of a
splitstream (formats.splitstream) as they are before they are compressed, in frames: how many bytes of digests and how
many of chunks follow and the CRC-32 of both, begun with the number of the frame; the digests of the objects that these
chunks name for the first time; and the chunks. A frame without chunks is the end, and is written only after the tar has
proved to be the one that the configuration names.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from ..formats.digests import ObjectDigest
from ..formats.repolayout import StreamName
from ..formats.splitstream import CHUNK, Chunk, ExternalRef

# Feeds at a time, and bytes that all of them may hold. An unprivileged user gets less, which is as good as a full one.
MAX_FEEDS = 4
ROOM = 32 << 20
# A process that may open so few files has none to spare.
_FEW_FILES = 256
_FRAME = struct.Struct("<III")
_AT_ONCE = 1 << 20


class Feed(NamedTuple):
    """The two ends of the pipe, both of which never block."""

    reader: int
    writer: int


@contextlib.contextmanager
def feeds(streams: Iterable[StreamName]) -> Iterator[dict[StreamName, Feed]]:
    """A feed for each of the ``streams``, the first of them if there are too many, open until the block ends. Processes
    that are forked within inherit them. Without a pipe to spare there are fewer feeds, and nothing fails.
    """
    opened: dict[StreamName, Feed] = {}
    try:
        with contextlib.suppress(OSError):
            few = 0 <= resource.getrlimit(resource.RLIMIT_NOFILE)[0] < _FEW_FILES
            for stream in [] if few else list(streams)[:MAX_FEEDS]:
                opened[stream] = Feed(*os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK))
        for feed in opened.values():
            _widen(feed.writer, ROOM // len(opened))
        yield opened
    finally:
        for feed in opened.values():
            os.close(feed.reader)
            os.close(feed.writer)


def _widen(fd: int, size: int) -> None:
    """Let a pipe hold ``size`` bytes, or as many as the user may have."""
    for room in (size, 1 << 20):
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), room)
            return


class Tap:
    """The importer's end of the feed behind ``fd``; what is told goes nowhere after the first time that there was no
    room for it, and after ``stop``.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._frames = 0

    def chunks(self, digests: bytes, chunks: bytes) -> None:
        """Tell whole chunks, and the digests of objects that they are the first to name."""
        if self._fd < 0:
            return
        size = _FRAME.size + len(digests) + len(chunks)
        head = _FRAME.pack(len(digests), len(chunks), _check(self._frames, digests, chunks))
        self._frames += 1
        try:
            told = os.writev(self._fd, (head, digests, chunks))
        except OSError:
            told = 0
        if told < size:
            # A part of a frame is no harm: the reader sees that its end never comes.
            self.stop()

    def stop(self) -> None:
        """Tell nothing more: the rest does not fit into a feed."""
        self._fd = -1

    def end(self) -> None:
        """Say that this was all of a layer that is proved."""
        self.chunks(b"", b"")


def _check(number: int, digests: bytes, chunks: bytes) -> int:
    return zlib.crc32(chunks, zlib.crc32(digests, number))


class Cut(Exception):
    """A feed ended before its layer did, or does not tell what was written into it."""


def follow(fd: int, width: int, wait: Callable[[], bool]) -> Iterator[Chunk]:
    """The chunks of a layer, from the reader's end of its feed. ``width`` is the size of a digest in bytes.

    ``wait`` is called when nothing is there to be read; it returns False if nothing will come any more, else True as
    soon as it is worth looking again. Raises Cut if the feed ends before the layer does, or if a frame is not the one
    that was written: whatever is wrong then, nothing may be made of it.
    """

    def exactly(size: int) -> bytes:
        gathered: list[bytes] = []
        while size:
            try:
                piece = os.read(fd, min(size, _AT_ONCE))
            except BlockingIOError:
                if not wait():
                    raise Cut from None
                continue
            if not piece:
                raise Cut
            gathered.append(piece)
            size -= len(piece)
        return b"".join(gathered)

    digests = bytearray()
    unpack = CHUNK.unpack_from
    for number in itertools.count():
        named, size, check = _FRAME.unpack(exactly(_FRAME.size))
        new, data = exactly(named), exactly(size)
        if _check(number, new, data) != check:
            raise Cut
        if not size:
            return
        digests += new
        at = 0
        while at < size:
            (value,) = unpack(data, at)
            at += CHUNK.size
            if value >= 0:
                yield ExternalRef(value, ObjectDigest(bytes(digests[value * width : (value + 1) * width])))
            else:
                yield data[at : at - value]
                at -= value
