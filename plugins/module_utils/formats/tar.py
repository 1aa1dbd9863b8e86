# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Layer archives: where content starts and ends, and the way back from what was stored.

``Splitter`` cuts an archive that is pushed into it into inline bytes and external contents whose concatenation is the
archive again, byte for byte (composefs repository format, tar layers): the content of a regular file of more than 64
bytes is external, everything else is inline - headers, extensions, padding, small contents, the content that entries of
other types may have, and whatever follows the end marker. ``EntryReader`` reads the entries back.

The end marker is two zero blocks. An archive may also end between two entries without any. A lone zero block that ends
the archive is taken for an end marker, as most tools do (cfsctl refuses it); before another entry it is skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from ..errors import FormatError, InvalidLayer
from .bounds import THRESHOLD
from .tarheader import BLOCK, HINT, LIGHT, NO_SIZE, PLAIN_EMPTY, PLAIN_FILES, Entry, Parser, block_sum, show

_ASSEMBLE = (
    64 * 1024
)  # contents up to this size are put together when a buffer ends within them: storing them whole is the fast way
_ZERO = bytes(BLOCK)
_ZEROS = bytes(64 * 1024)
_REGULAR = frozenset((b"0", b"\0", b"7"))


class Sink(Protocol):
    """Takes the pieces of an archive in order. What is handed over does not change afterwards."""

    def inline(self, data: memoryview, /) -> None:
        """The next inline bytes. Calls that follow each other belong together."""

    def external(self, data: memoryview, /) -> None:
        """A whole external content."""

    def begin(self, size: int, /) -> None:
        """An external content begins; ``size`` is what the archive claims. ``content`` brings it in pieces, ``end``
        follows when all of it came.
        """

    def content(self, data: memoryview, /) -> None: ...

    def end(self) -> None: ...


class Splitter:
    """Cut an archive into inline bytes and external contents (composefs repository format, tar layers).

    ``feed`` takes the archive in pieces of any size and calls the sink at once: a content that lies within one piece is
    handed over whole, without a copy. One that does not is put together if it has at most 64 KiB, and comes in pieces
    if it is larger. Nothing is
    held back but the beginning of a header, of an extension's data or of such a small content. With ``entries``, it is
    called with each entry before its content is.

    Raises InvalidLayer for what is no archive, and for what could be stored but not be made into an image: names of
    more than 255 bytes, with NUL bytes or with ``..`` on the way, links to nothing, symbolic links over 4,095 bytes,
    extended attributes over 65,535 bytes, device numbers out of range, sparse members. Members about whose end programs
    disagree (a link or directory that claims content) are refused as well. After an error the splitter is of no use.
    """

    def __init__(self, sink: Sink, entries: Callable[[Entry], None] | None = None) -> None:
        self._sink = sink
        self._entries = entries
        self._parser = Parser()
        self._carry = b""  # the beginning of a header
        self._left = 0  # bytes of the current external content still to come
        self._small: bytearray | None = None  # … and those that came, if it is to be handed over whole
        self._data: bytearray | None = None  # what came of an extension's data
        self._skip = 0  # inline bytes to come that need no look: padding and small contents
        self._zero = False  # the last block was zero
        self.size = 0
        """Bytes fed so far."""
        self.entries_seen = 0
        """Entries so far; extension headers and volume labels do not count."""
        self.ended = False
        """The end marker was seen, or a lone zero block that ended the archive."""
        self.ended_with_zeros = False
        """The end marker was seen, and only zeros since."""

    def feed(self, data: bytes) -> None:
        """Take the next bytes of the archive (other buffers than ``bytes`` are copied)."""
        if not isinstance(data, bytes):
            data = bytes(data)
        view = memoryview(data)
        end = len(data)
        before = self.size
        self.size = before + end
        run = pos = self._resume_content(view) if self._left else 0
        if self._left:
            return
        if self._data is not None:
            pos = self._resume_extension(data, pos)
        if self._skip:
            pos += self._skip
            self._skip = 0
        if pos < end:
            run, pos = self._ended(data, pos, run) if self.ended else self._split(data, view, run, pos, before)
        if pos > end:
            self._skip = pos - end
        if run < end:
            self._sink.inline(view[run:])

    def _split(self, data: bytes, view: memoryview, run: int, pos: int, before: int) -> tuple[int, int]:
        """Walk the headers of ``data`` from ``pos``; inline bytes that are still to be handed over begin at
        ``run``. Returns the new ``run`` and ``pos``.

        This is the loop that every entry of every layer passes, so it is written for speed: a usual header costs one
        match, two sums and a look into a dictionary. Nothing is decoded that the split does not need.
        """
        end = len(data)
        sink = self._sink
        parser = self._parser
        match = LIGHT.match
        known = parser.sums.get
        quick = self._entries is None
        while pos < end:
            at = pos
            if self._carry:
                block = self._carry + data[pos : pos + BLOCK - len(self._carry)]
                pos += len(block) - len(self._carry)
                at = pos - BLOCK
                if len(block) < BLOCK:
                    self._carry = block
                    return run, pos
                self._carry = b""
            elif end - pos < BLOCK:
                self._carry = data[pos:]
                return run, end
            else:
                block = data[pos : pos + BLOCK]
                pos += BLOCK

            found = match(block) if quick and not parser.pending else None
            octal, checksum, kind = found.groups() if found is not None else (b"", b"", b"")
            if (
                found is not None
                # Byte 157 begins the name that a link leads to; the type of a link is b"1" or b"2".
                and (
                    kind == b"0"
                    or (octal == NO_SIZE and kind in PLAIN_EMPTY and (block[157] or kind > b"2"))
                    or kind in PLAIN_FILES
                )
                # ".." in the name or in its prefix, if there is one, has to be looked at.
                and block.find(b"..", 0, 100) < 0
                and (not block[345] or block.find(b"..", 345, 500) < 0)
                and block_sum(block) == (known(checksum) or parser.expected_sum(checksum))
            ):
                size = int(octal, 8)
                self.entries_seen += 1
            else:
                if block == _ZERO:
                    if self._zero:
                        if parser.pending:
                            raise InvalidLayer(
                                f"The archive ends at byte {before + at}, after an extension header without its entry.",
                                HINT,
                            )
                        self.ended = self.ended_with_zeros = True
                        return self._ended(data, pos, run)
                    self._zero = True
                    continue
                entry = parser.parse(block, before + at)
                if entry is None:
                    pos = self._extension(data, pos)
                    self._zero = False
                    continue
                size = entry.size
                kind = entry.type
                if kind != b"V":
                    self.entries_seen += 1
                    if self._entries is not None:
                        self._entries(entry)
            self._zero = False

            if size > THRESHOLD and kind in _REGULAR:
                if run < pos:
                    sink.inline(view[run:pos])
                run = pos + size
                if run <= end:
                    sink.external(view[pos:run])
                    pos = run + (-size & 511)
                else:
                    self._begin_content(view[pos:], size)
                    return end, end
            elif size:
                pos += size + (-size & 511)
        return run, pos

    def _begin_content(self, start: memoryview, size: int) -> None:
        self._left = size - len(start)
        self._skip = -size & 511
        if size <= _ASSEMBLE:
            self._small = bytearray(start)
            return
        self._sink.begin(size)
        if start:
            self._sink.content(start)

    def _resume_content(self, view: memoryview) -> int:
        piece = view[: self._left]
        self._left -= len(piece)
        if self._small is None:
            self._sink.content(piece)
            if not self._left:
                self._sink.end()
        else:
            self._small += piece
            if not self._left:
                self._sink.external(memoryview(self._small))
                self._small = None
        return len(piece)

    def _extension(self, data: bytes, pos: int) -> int:
        want = self._parser.want
        if not self._parser.keep:
            return pos + want + (-want & 511)
        self._data = bytearray()
        return self._resume_extension(data, pos)

    def _resume_extension(self, data: bytes, pos: int) -> int:
        want = self._parser.want
        gathered = self._data
        if gathered is None:
            raise AssertionError("this must hold: gathered is not None")
        piece = data[pos : pos + want - len(gathered)]
        pos += len(piece)
        whole = len(piece) == want
        if not whole:
            gathered += piece
            if len(gathered) < want:
                return pos
        self._data = None
        self._parser.payload(piece if whole else bytes(gathered))
        return pos + (-want & 511)

    def _ended(self, data: bytes, pos: int, run: int) -> tuple[int, int]:
        end = len(data)
        while self.ended_with_zeros and pos < end:
            self.ended_with_zeros = data.startswith(_ZEROS[: end - pos], pos)
            pos += len(_ZEROS)
        return run, end

    def finish(self) -> None:
        """The archive ends here. Raises InvalidLayer if it must not: within a header, an extension, a content or its
        padding.
        """
        if self._left or self._data is not None or self._skip or self._carry:
            raise InvalidLayer(f"The archive is cut off after {self.size} bytes, in the middle of an entry.", HINT)
        if self._parser.pending:
            raise InvalidLayer(
                f"The archive ends after {self.size} bytes with an extension header without its entry.", HINT
            )
        if self._zero and not self.ended:
            self.ended = self.ended_with_zeros = True


class EntryReader:
    """The entries of a stored layer, from the inline bytes and external contents that a ``Splitter`` made of it."""

    @staticmethod
    def entries(chunks: Iterable[Any]) -> Iterator[tuple[Entry, Any]]:
        """Each entry with its content: None unless the entry is a regular file; ``bytes`` up to 64 bytes; the external
        reference otherwise.

        ``chunks`` gives inline ``bytes``, cut anywhere, and external references, which may be of any other type and are
        passed on as they are. It is used up, and what follows the end marker ignored. Volume labels and global headers
        are left out.

        Raises FormatError where the layer is not stored as the format wants it (a large content inline, a small one
        external, the end within an entry), and InvalidLayer for what ``Splitter`` refuses too: the layer may have been
        stored by another tool.
        """
        stored = _Stored(chunks)
        take, skip = stored.take, stored.skip
        parser = Parser()
        parse = parser.parse
        zero = False
        while True:
            # Nearly every header lies in the bytes at hand; here and below no function is called for such a one.
            pos = stored.pos
            stop = pos + BLOCK
            if stop <= len(stored.buffer):
                block = stored.buffer[pos:stop]
                stored.pos = stop
            else:
                block = take(BLOCK)
                if len(block) < BLOCK:
                    if block or parser.pending:
                        raise stored.damaged(_CUT_OFF)
                    return
            if not block[0] and block == _ZERO:
                if zero:
                    break
                zero = True
                continue
            zero = False
            entry = parse(block, stored.offset - BLOCK)
            if entry is None:
                want = parser.want
                if parser.keep:
                    parser.payload(stored.exactly(want))
                    skip(-want & 511)
                else:
                    skip(want + (-want & 511))
                continue
            size = entry.size
            if entry.type not in _REGULAR:
                if size:
                    skip(size + (-size & 511))
                if entry.type != b"V":
                    yield entry, None
            elif size > THRESHOLD:
                yield entry, stored.reference(entry)
                padding = -size & 511
                piece = next(stored.chunks, None)
                if piece.__class__ is bytes and len(piece) >= padding:
                    # Its padding begins the next run.
                    stored.buffer = piece
                    stored.pos = padding
                else:
                    stored.give_back(piece)
                    skip(padding)
            elif size:
                yield entry, stored.exactly(size)
                skip(-size & 511)
            else:
                yield entry, b""
        if parser.pending:
            raise stored.damaged(_CUT_OFF)
        for _rest in stored.chunks:
            pass


_CUT_OFF = "it ends in the middle of an entry"


class _Stored:
    """Inline bytes and external references, taken as the entries ask for them."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self.chunks = iter(chunks)
        self.buffer = b""
        self.pos = 0
        self._before = 0  # bytes of the archive before the buffer; external contents count as their entries say

    @property
    def offset(self) -> int:
        return self._before + self.pos

    def give_back(self, chunk: Any) -> None:
        """Let ``chunk``, which is None at the end, be the next one again."""
        if chunk is not None:
            self.chunks = itertools.chain((chunk,), self.chunks)

    def damaged(self, what: str) -> FormatError:
        return FormatError(
            f"The stored layer is damaged near byte {self.offset} of its archive: {what}.",
            "Check the repository, and pull the image again.",
        )

    def take(self, n: int) -> bytes:
        """The next ``n`` inline bytes, fewer only at the end."""
        pos = self.pos
        stop = pos + n
        if stop > len(self.buffer):
            self._fill(n)
            pos = 0
            stop = n
        data = self.buffer[pos:stop]
        self.pos = pos + len(data)
        return data

    def _fill(self, n: int) -> None:
        """Have ``n`` inline bytes in the buffer, if the layer goes on so far."""
        rest = self.buffer[self.pos :]
        self._before += self.pos
        self.pos = 0
        pieces = [rest] if rest else []
        have = len(rest)
        while have < n:
            piece = next(self.chunks, None)
            if piece is None:
                break
            if not isinstance(piece, (bytes, bytearray, memoryview)):
                raise self.damaged("an external content stands where the archive has none")
            if len(piece):
                pieces.append(piece if isinstance(piece, bytes) else bytes(piece))
                have += len(piece)
        self.buffer = pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def exactly(self, n: int) -> bytes:
        data = self.take(n)
        if len(data) < n:
            raise self.damaged(_CUT_OFF)
        return data

    def skip(self, n: int) -> None:
        while n > len(self.buffer) - self.pos:
            n -= len(self.buffer) - self.pos
            self.pos = len(self.buffer)
            self._fill(1)
            if not self.buffer:
                raise self.damaged(_CUT_OFF)
        self.pos += n

    def reference(self, entry: Entry) -> Any:
        reference = None
        if self.pos == len(self.buffer):
            reference = next(self.chunks, None)
            while isinstance(reference, (bytes, bytearray, memoryview)) and not len(reference):
                reference = next(self.chunks, None)
        if reference is None or isinstance(reference, (bytes, bytearray, memoryview)):
            raise self.damaged(f"the content of {show(entry.path)} is not stored as an object")
        self._before += self.pos + entry.size
        self.buffer = b""
        self.pos = 0
        return reference
