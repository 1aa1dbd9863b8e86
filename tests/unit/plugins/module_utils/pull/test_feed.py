# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Layers that are told while they arrive: what is read is what was told, or it is known to be cut."""

from __future__ import annotations

import contextlib
import io
import os
import resource
from collections.abc import Iterator
from typing import Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import ObjectDigest
from ansible_collections.composefs.oci.plugins.module_utils.formats.fsverity import SHA256, SHA512, Algorithm
from ansible_collections.composefs.oci.plugins.module_utils.formats.splitstream import (
    LAYER,
    ExternalRef,
    Splitstream,
    Writer,
)
from ansible_collections.composefs.oci.plugins.module_utils.pull import feed

NAME = "oci-layer-sha256:" + "0" * 64
Piece = Union[bytes, int]


def joined(chunks: Iterator[bytes | ExternalRef]) -> list[bytes | ExternalRef]:
    """The chunks with inline ones that follow each other put together: where they are cut means nothing."""
    found: list[bytes | ExternalRef] = []
    for chunk in chunks:
        if found and isinstance(chunk, bytes) and isinstance(found[-1], bytes):
            found[-1] += chunk
        else:
            found.append(chunk)
    return found


def write(pieces: list[Piece], algorithm: Algorithm, tap: feed.Tap | None) -> bytes:
    writer = Writer(algorithm, LAYER, tap=tap)
    for piece in pieces:
        if isinstance(piece, bytes):
            writer.inline(piece)
        else:
            writer.external(ObjectDigest(bytes([piece]) * algorithm.size), 70 + piece)
    return b"".join(writer.finish())


pieces = st.lists(st.one_of(st.binary(max_size=2000), st.integers(0, 255)), max_size=40)


@given(pieces, st.sampled_from([SHA256, SHA512]))
@settings(deadline=None)
def test_what_is_read_is_what_the_stream_holds(given: list[Piece], algorithm: Algorithm) -> None:
    with feed.feeds([NAME]) as opened:
        tap = feed.Tap(opened[NAME].writer)
        stream = write(given, algorithm, tap)
        tap.end()
        told = joined(feed.follow(opened[NAME].reader, algorithm.size, lambda: False))
    assert told == joined(Splitstream.open(io.BytesIO(stream), algorithm).chunks())
    assert stream == write(given, algorithm, None), "a tap changes nothing"


@given(st.data())
@settings(deadline=None)
def test_a_feed_that_is_cut_anywhere_says_so_after_a_true_beginning(data: st.DataObject) -> None:
    given = data.draw(pieces)
    with feed.feeds(["whole", "cut"]) as opened:
        tap = feed.Tap(opened["whole"].writer)
        write(given, SHA256, tap)
        tap.end()
        raw = os.read(opened["whole"].reader, 1 << 20)
        os.write(opened["cut"].writer, raw[: data.draw(st.integers(0, len(raw) - 1))])
        told: list[bytes | ExternalRef] = []
        with pytest.raises(feed.Cut):
            for chunk in feed.follow(opened["cut"].reader, 32, lambda: False):
                told.append(chunk)
        os.write(opened["whole"].writer, raw)
        everything = list(feed.follow(opened["whole"].reader, 32, lambda: False))
    assert told == everything[: len(told)]


@given(st.data())
@settings(deadline=None)
def test_nothing_is_taken_from_a_frame_that_is_not_what_was_written(data: st.DataObject) -> None:
    given = [*data.draw(pieces), b"end", 3]
    with feed.feeds(["whole", "hurt"]) as opened:
        tap = feed.Tap(opened["whole"].writer)
        write(given, SHA256, tap)
        tap.end()
        raw = bytearray(os.read(opened["whole"].reader, 1 << 20))
        # A byte of the only frame's head or body: its length, its check, its content.
        raw[data.draw(st.integers(0, len(raw) - 13))] ^= data.draw(st.integers(1, 255))
        os.write(opened["hurt"].writer, raw)
        told: list[bytes | ExternalRef] = []
        with pytest.raises(feed.Cut):
            for chunk in feed.follow(opened["hurt"].reader, 32, lambda: False):
                told.append(chunk)
    assert told == []


def test_a_frame_that_somebody_else_read_is_missed() -> None:
    with feed.feeds([NAME]) as opened:
        tap = feed.Tap(opened[NAME].writer)
        for piece in (b"one", b"two", b"three"):
            tap.chunks(b"", (-len(piece)).to_bytes(8, "little", signed=True) + piece)
        os.read(opened[NAME].reader, 12 + 8 + 3)
        with pytest.raises(feed.Cut):
            next(feed.follow(opened[NAME].reader, 32, lambda: False))


def test_a_reader_waits_for_more_and_looks_again() -> None:
    with feed.feeds([NAME]) as opened:
        tap = feed.Tap(opened[NAME].writer)
        steps = iter([lambda: write([b"abc", 1], SHA256, tap), lambda: None, tap.end])

        def wait() -> bool:
            next(steps)()
            return True

        told = list(feed.follow(opened[NAME].reader, 32, wait))
    assert told == [b"abc", ExternalRef(0, ObjectDigest(b"\x01" * 32))]


def test_nobody_waits_for_a_reader_and_a_full_feed_is_cut() -> None:
    with feed.feeds([NAME]) as opened:
        tap = feed.Tap(opened[NAME].writer)
        many = [b"x" * 100_000, 7] * 600  # far more than a pipe may hold
        write(many, SHA256, tap)
        tap.end()
        held = 0
        told = feed.follow(opened[NAME].reader, 32, lambda: False)
        with contextlib.suppress(feed.Cut):
            for chunk in told:
                held += len(chunk) if isinstance(chunk, bytes) else 0
        assert 0 < held <= feed.ROOM
        tap.end()
        with pytest.raises(BlockingIOError):
            os.read(opened[NAME].reader, 1)


def test_a_run_that_leaves_memory_ends_the_feed() -> None:
    with feed.feeds([NAME]) as opened:
        tap = feed.Tap(opened[NAME].writer)
        write([b"a" * 10, 1, b"b" * (3 << 20), 2, b"c"], SHA256, tap)
        tap.end()
        with pytest.raises(feed.Cut):
            list(feed.follow(opened[NAME].reader, 32, lambda: False))


def test_there_are_only_so_many_feeds_and_they_are_closed() -> None:
    before = set(os.listdir("/proc/self/fd"))
    with feed.feeds(f"stream{number}" for number in range(9)) as opened:
        assert list(opened) == ["stream0", "stream1", "stream2", "stream3"]
        assert not any(os.get_inheritable(fd) or os.get_blocking(fd) for one in opened.values() for fd in one)
    assert set(os.listdir("/proc/self/fd")) == before


def test_without_files_to_spare_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, 64))
    with feed.feeds([NAME]) as opened:
        assert opened == {}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    with feed.feeds([NAME]) as opened:
        assert list(opened) == [NAME]


def test_a_pipe_that_cannot_be_made_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(flags: int) -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe2", fail)
    with feed.feeds([NAME]) as opened:
        assert opened == {}
