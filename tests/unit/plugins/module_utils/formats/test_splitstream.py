# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import io
import pathlib
import re
import runpy
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, FormatError
from ansible_collections.composefs.oci.plugins.module_utils.formats.bounds import THRESHOLD
from ansible_collections.composefs.oci.plugins.module_utils.formats.fsverity import (
    ALGORITHMS,
    SHA256,
    SHA512,
    Algorithm,
    digest,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.splitstream import (
    BLOB,
    CONFIG,
    LAYER,
    MANIFEST,
    ExternalRef,
    Splitstream,
    Writer,
)

zstandard = pytest.importorskip(
    "zstandard", reason="splitstreams are zstd inside, and the tests make damaged ones with the package zstandard"
)

DATA = pathlib.Path(__file__).resolve().parents[3] / "data" / "cfsctl"
HELLO = digest(b"hello world", SHA256)
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
same_libzstd = pytest.mark.skipif(
    zstandard.ZSTD_VERSION != (1, 5, 7),
    reason="the compressed bytes are those of libzstd 1.5.7, which cfsctl 0.9.4 is built with; here it is another version",
)

Chunk = Union[bytes, ExternalRef]


def frame(data: bytes, **options: Any) -> bytes:
    stream = zstandard.ZstdCompressor(**{"level": 3, "write_content_size": False, **options}).compressobj()
    result: bytes = stream.compress(data) + stream.flush()
    return result


def unframe(data: bytes) -> bytes:
    result: bytes = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return result


def written(writer: Writer) -> bytes:
    out = io.BytesIO()
    assert writer.write_to(out) == len(out.getvalue())
    return out.getvalue()


def opened(data: bytes, algorithm: Algorithm = SHA256, expect: bytes | None = None) -> Splitstream:
    return Splitstream.open(io.BytesIO(data), algorithm, expect)


def merged(chunks: Iterator[Chunk]) -> list[Chunk]:
    """The chunks with adjacent inline pieces joined."""
    result: list[Chunk] = []
    for chunk in chunks:
        if isinstance(chunk, bytes) and result and isinstance(result[-1], bytes):
            result[-1] += chunk
        else:
            result.append(chunk)
    return result


def sections(data: bytes) -> dict[str, bytes]:
    numbers = struct.unpack_from("<8Q", data, 32)
    return {
        name: data[numbers[2 * i] : numbers[2 * i + 1]]
        for i, name in enumerate(("streams", "objects", "chunks", "names"))
    }


def build(
    streams: bytes = b"",
    objects: bytes = HELLO,
    chunks: bytes | None = None,
    names: bytes | None = None,
    *,
    size: int = 11,
    content_type: bytes = BLOB,
    old_header: bool = False,
    info_extra: bytes = b"",
    algorithm: int = 1,
    version: int = 0,
    block: int = 12,
    order: str = "sonc",
    gap: bytes = b"",
) -> bytes:
    """A splitstream put together without any of the checks: by default the blob ``hello world``."""
    parts = {
        "s": streams,
        "o": objects,
        "n": frame(b"") if names is None else names,
        "c": frame(bytes(8)) if chunks is None else chunks,
    }
    info_end = 112 + len(info_extra)
    ranges = {}
    body = b""
    for name in order:
        body += gap
        ranges[name] = (info_end + len(body), info_end + len(body) + len(parts[name]))
        body += parts[name]
    info = (
        struct.pack("<8Q", *[number for name in "socn" for number in ranges[name]])
        + content_type
        + struct.pack("<Q", size)
        + info_extra
    )
    if old_header:
        header = struct.pack("<QQH", 32, info_end, 0) + b"SplitStream" + bytes((version, algorithm, block))
    else:
        header = b"SplitStream" + struct.pack("<BHBBQQ", version, 0, algorithm, block, 32, info_end)
    return header + info + body


def poked(data: bytes, at: int, value: int) -> bytes:
    """``data`` with the 64-bit number at ``at`` replaced."""
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


# --- writing
# --------------------------------------------------------------------------------------------------------------------


def test_a_blob_stream_is_written_to_the_byte() -> None:
    writer = Writer(SHA256, BLOB)
    writer.external(HELLO, 11)
    expected = bytes.fromhex(
        "53706c697453747265616d000000010c20000000000000007000000000000000"
        "70000000000000007000000000000000"
        "70000000000000009000000000000000"
        "9900000000000000aa00000000000000"
        "90000000000000009900000000000000"
        "6f63695f626c6f620b00000000000000"
    )
    expected += HELLO + EMPTY_FRAME + bytes.fromhex("28b52ffd0058410000") + bytes(8)
    assert written(writer) == expected
    assert digest(expected, SHA256).hex() == "275c3f3d11d83d2c131a0bf4cb9e57825282c1d96eab4194f835fa83e9f5a89e"


def test_a_stream_with_names_and_inline_data_is_written_to_the_byte() -> None:
    writer = Writer(SHA256, CONFIG)
    writer.named_ref("sha256:" + "a" * 64, b"\x11" * 32)
    writer.inline(b"abc")
    writer.inline(b"")
    writer.inline(memoryview(b"xdefx")[1:-1])
    writer.external(HELLO, 11)
    writer.inline(bytearray(b"tail"))
    assert writer.size == 21
    assert writer._objects.count == 1
    data = written(writer)
    assert len(data) == 235
    assert (
        unframe(sections(data)["chunks"])
        == struct.pack("<q", -6) + b"abcdef" + bytes(8) + struct.pack("<q", -4) + b"tail"
    )
    assert unframe(sections(data)["names"]) == b"0:sha256:" + b"a" * 64 + b"\0"
    assert digest(data, SHA256).hex() == "32eb3d072b6ef0380a3283f1b3aeea36133d80b890f522f885755a860d2c3883"


@pytest.mark.skipif(
    zstandard.ZSTD_VERSION < (1, 5, 5), reason="older versions of libzstd compress these streams to other bytes"
)
def test_the_config_stream_that_cfsctl_pins_has_its_digest() -> None:
    diff_ids, layers = [], []
    for name, size in ((b"alpha", 1000), (b"beta", 2000), (b"gamma", 3000)):
        fields = (
            name,
            b"0000700\0",
            b"0000000\0",
            b"0000000\0",
            b"%011o\0" % size,
            b"00000000000\0",
            b" " * 8,
            b"0",
            b"",
            b"ustar\00000",
        )
        header = struct.pack("100s8s8s8s12s12s8s1s100s8s247x", *fields)
        header = header[:148] + b"%07o\0" % sum(header) + header[156:]
        rest = bytes(-size % 512)
        diff_ids.append("sha256:" + hashlib.sha256(header + bytes(size) + rest + bytes(1024)).hexdigest())
        writer = Writer(SHA256, LAYER)
        writer.inline(header)
        writer.external(digest(bytes(size), SHA256), size)
        writer.inline(rest)
        writer.inline(bytes(1024))
        layers.append(digest(written(writer), SHA256))
    quoted = ",".join(f'"{diff_id}"' for diff_id in diff_ids)
    config = f'{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":[{quoted}]}}}}'.encode()
    writer = Writer(SHA256, CONFIG)
    writer.external(digest(config, SHA256), len(config))
    for diff_id, layer in zip(diff_ids, layers):
        writer.named_ref(diff_id, layer)
    assert digest(written(writer), SHA256).hex() == "4839518dea22749f8ff233e7f7baec65f23dd5336462f46ad6884769af84bf95"


def test_content_types_have_eight_bytes() -> None:
    assert (LAYER, CONFIG, MANIFEST, BLOB) == (b"ocilayer", b"ociconfg", b"ocimanif", b"oci_blob")
    with pytest.raises(FormatError):
        Writer(SHA256, b"ociconfig")


def test_an_empty_stream_has_no_chunks_but_two_empty_frames() -> None:
    data = written(Writer(SHA512, LAYER))
    assert data[112:] == EMPTY_FRAME * 2
    assert list(opened(data, SHA512).chunks()) == []


def test_names_come_before_chunks_in_the_file() -> None:
    writer = Writer(SHA256, BLOB)
    writer.external(HELLO, 11)
    writer.named_ref("x", HELLO)
    numbers = struct.unpack_from("<8Q", written(writer), 32)
    assert numbers[7] == numbers[4]
    assert numbers[6] == numbers[3]


def test_adjacent_inline_data_becomes_one_chunk() -> None:
    writer = Writer(SHA256, LAYER)
    for i in range(3000):
        writer.inline(b"%d" % i * 100)
    writer.external(HELLO, 11)
    text = b"".join(b"%d" % i * 100 for i in range(3000))
    assert unframe(sections(written(writer))["chunks"]) == struct.pack("<q", -len(text)) + text + bytes(8)


def test_inline_data_is_copied_before_the_call_returns() -> None:
    buffer = bytearray(b"first")
    writer = Writer(SHA256, LAYER)
    writer.inline(memoryview(buffer))
    buffer[:] = b"later"
    assert list(opened(written(writer)).chunks()) == [b"first"]


def test_each_object_is_listed_once_in_order_of_first_appearance() -> None:
    digests = [hashlib.sha256(b"%d" % i).digest() for i in range(5000)]
    writer = Writer(SHA256, LAYER)
    for value in digests + digests[::-7] + digests[:3]:
        writer.external(value, 1)
    assert writer._objects.count == 5000
    stream = opened(written(writer))
    assert list(stream.object_refs) == digests
    assert [chunk.digest for chunk in stream.chunks() if isinstance(chunk, ExternalRef)] == digests + digests[
        ::-7
    ] + digests[:3]


def test_names_are_sorted_by_bytes_and_may_share_a_stream() -> None:
    writer = Writer(SHA256, MANIFEST)
    one, two = b"\1" * 32, b"\2" * 32
    for name, value in (
        ("z", two),
        ("a", one),
        ("config:sha256:x", two),
        ("\U0001f600", one),
        ("\uffff", one),
        ("Z", two),
        ("a", two),
    ):
        writer.named_ref(name, value)
    data = written(writer)
    assert (
        unframe(sections(data)["names"])
        == "0:Z\x000:a\x000:config:sha256:x\x000:z\x001:\uffff\x001:\U0001f600\x00".encode()
    )
    stream = opened(data)
    assert stream.stream_refs == [two, one]
    assert stream.named_refs == {"z": two, "a": two, "config:sha256:x": two, "\U0001f600": one, "\uffff": one, "Z": two}


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_the_format_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Writer(SHA256, BLOB).named_ref(name, HELLO)


def test_a_digest_of_the_other_algorithm_is_refused() -> None:
    writer = Writer(SHA512, BLOB)
    with pytest.raises(FormatError):
        writer.external(HELLO, 11)
    with pytest.raises(FormatError):
        writer.named_ref("x", HELLO)


def test_a_stream_is_finished_once() -> None:
    writer = Writer(SHA256, BLOB)
    written(writer)
    with pytest.raises(FormatError):
        writer.finish()


def test_a_spool_makes_no_difference_to_the_file_and_keeps_what_is_before_it() -> None:
    files = []
    for spool in (None, io.BytesIO(b"")):
        writer = Writer(SHA256, LAYER, spool)
        for i in range(3000):
            writer.inline(hashlib.sha512(b"%d" % i).digest() * 2)
            writer.external(hashlib.sha256(b"%d" % i).digest(), 100)
        files.append(written(writer))
    assert files[0] == files[1]
    spool = io.BytesIO(b"before")
    spool.seek(6)
    writer = Writer(SHA256, LAYER, spool)
    writer.inline(b"x")
    assert list(opened(written(writer)).chunks()) == [b"x"]
    assert spool.getvalue().startswith(b"before\x28\xb5\x2f\xfd")


def test_a_spool_that_was_cut_short_is_noticed() -> None:
    spool = io.BytesIO()
    writer = Writer(SHA256, LAYER, spool)
    writer.inline(b"x")
    pieces = writer.finish()
    spool.truncate(5)
    with pytest.raises(FormatError):
        list(pieces)


@pytest.mark.parametrize("end", ["more", "external", "external, more", "nothing"])
@pytest.mark.parametrize("start", [True, False])
def test_a_very_long_inline_run_is_one_chunk_and_leaves_memory(start: bool, end: str) -> None:
    scratch: list[io.BytesIO] = []

    def make() -> io.BytesIO:
        scratch.append(io.BytesIO())
        return scratch[-1]

    piece = hashlib.sha512(b"x").digest() * 1024
    writer = Writer(SHA256, LAYER, io.BytesIO(), make)
    if start:
        writer.external(HELLO, 11)
    expected = bytes(8) if start else b""
    for _i in range(80):
        writer.inline(piece)
        assert len(writer._out) < 1200000
    assert len(scratch) == 1
    run = piece * 80
    if end == "more":
        run += b"!"
        writer.inline(b"!")
    expected += struct.pack("<q", -len(run)) + run
    if end.startswith("external"):
        writer.external(HELLO, 11)
        expected += bytes(8)
    if end == "external, more":
        writer.inline(run)
        expected += struct.pack("<q", -len(run)) + run
    data = written(writer)
    assert unframe(sections(data)["chunks"]) == expected
    assert sections(data)["chunks"] == frame(expected)  # however it was cut and wherever it lay meanwhile
    assert all(file.closed for file in scratch)
    assert writer.size == struct.unpack_from("<Q", data, 104)[0]


def test_a_gigabyte_of_trailing_zeros_takes_neither_memory_nor_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitstream, "_PIECE", 1 << 14)  # a sixteenth of everything
    monkeypatch.setattr(splitstream, "_LONG_RUN", 1 << 16)
    scratch = io.BytesIO()
    scratch.close = lambda: None  # type: ignore[method-assign]
    spool = io.BytesIO()
    writer = Writer(SHA256, LAYER, spool, lambda: scratch)
    zeros = bytes(10240)
    tracemalloc.start()
    for _i in range((1 << 26) // len(zeros)):
        writer.inline(zeros)
    stream = b"".join(writer.finish())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
    assert len(scratch.getvalue()) < 20_000
    assert sum(len(piece) for piece in opened(stream).chunks() if isinstance(piece, bytes)) == writer.size


def test_an_abandoned_writer_gives_its_temporary_file_back() -> None:
    scratch = io.BytesIO()
    writer = Writer(SHA256, LAYER, scratch=lambda: scratch)
    writer.inline(bytes(2 << 20))
    assert not scratch.closed
    writer.close()
    writer.close()
    assert scratch.closed


def test_the_default_temporary_file_works() -> None:
    writer = Writer(SHA256, LAYER)
    writer.inline(bytes(2 << 20))
    assert b"".join(opened(written(writer)).chunks()) == bytes(2 << 20)  # type: ignore[arg-type]


def test_memory_grows_by_little_more_than_a_digest_an_object() -> None:
    count = 11_000  # just grown: the table of slots is as empty as it gets
    tracemalloc.start()
    writer = Writer(SHA256, LAYER, io.BytesIO())
    for i in range(count):
        writer.external(i.to_bytes(4, "big") * 8, 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 * count + 300_000  # a dict of digests would take 200 each
    data = io.BytesIO(b"".join(writer.finish()))
    tracemalloc.start()
    stream = Splitstream.open(data, SHA256)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(stream.object_refs) == count
    assert held < 33 * count and peak < 33 * count + 1_000_000


# --- reading
# --------------------------------------------------------------------------------------------------------------------


def test_what_is_built_by_hand_is_read() -> None:
    stream = opened(build())
    assert (stream.content_type, stream.size, stream.stream_refs, stream.named_refs) == (BLOB, 11, [], {})
    assert list(stream.object_refs) == [HELLO]
    assert list(stream.chunks()) == [ExternalRef(0, HELLO)]
    assert list(stream.chunks(lambda _digest: 11)) == [ExternalRef(0, HELLO)]  # and it can be read again


def test_the_old_header_layout_is_read() -> None:
    data = build(old_header=True)
    assert data[18:29] == b"SplitStream"
    assert list(opened(data).chunks()) == [ExternalRef(0, HELLO)]


@pytest.mark.parametrize("old", [False, True])
def test_flags_are_ignored(old: bool) -> None:
    data = bytearray(build(old_header=old))
    data[16 if old else 12] = 7
    assert opened(bytes(data)).size == 11


def test_a_longer_info_section_is_read() -> None:
    assert list(opened(build(info_extra=b"the future" * 10)).chunks()) == [ExternalRef(0, HELLO)]


def test_a_shorter_info_section_is_refused() -> None:
    with pytest.raises(FormatError, match="info section"):
        opened(poked(build(), 24, 111))


@pytest.mark.parametrize("order", ["sonc", "cnos", "ncso"])
def test_sections_may_lie_in_any_order_with_gaps(order: str) -> None:
    data = build(streams=b"\1" * 32, names=frame(b"0:x\0"), order=order, gap=b"gap")
    stream = opened(data)
    assert stream.named_refs == {"x": b"\1" * 32}
    assert list(stream.chunks()) == [ExternalRef(0, HELLO)]


@pytest.mark.parametrize("options", [{"level": 19}, {"write_checksum": True}, {"level": 1}], ids=str)
def test_any_zstd_frame_is_read(options: dict[str, Any]) -> None:
    assert list(opened(build(chunks=frame(bytes(8), **options))).chunks()) == [ExternalRef(0, HELLO)]


def test_frames_with_a_size_several_frames_and_skippable_frames_are_read() -> None:
    one = zstandard.ZstdCompressor().compress(bytes(4))
    chunks = b"\x50\x2a\x4d\x18\3\0\0\0abc" + one + one
    assert list(opened(build(chunks=chunks)).chunks()) == [ExternalRef(0, HELLO)]


def test_an_empty_table_may_begin_anywhere() -> None:
    data = poked(poked(build(), 32, 1 << 60), 40, 1 << 60)
    assert opened(data).stream_refs == []


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"SplitStream",
        bytes(32),
        b"splitstream" + build()[11:],
        build(version=1),
        build(version=1, old_header=True),
        build(algorithm=2),
        build(algorithm=0, old_header=True),
        build(block=16),
        build()[:100],
    ],
    ids=[
        "empty",
        "short",
        "zeros",
        "magic",
        "version",
        "old version",
        "algorithm",
        "old algorithm",
        "block size",
        "cut",
    ],
)
def test_bad_headers_are_refused(data: bytes) -> None:
    with pytest.raises(FormatError):
        opened(data)


@pytest.mark.parametrize("section", range(4))
def test_a_section_beyond_the_end_is_refused(section: int) -> None:
    data = build(streams=bytes(32))
    for end in (len(data) + 32, 1 << 63, (1 << 64) - 1):
        with pytest.raises(FormatError, match="section"):
            opened(poked(poked(data, 32 + 16 * section, end - 32), 40 + 16 * section, end))


@pytest.mark.parametrize("at", [16, 32, 48, 64, 80])
def test_a_section_that_ends_before_it_starts_is_refused(at: int) -> None:
    data = build(streams=bytes(32))
    with pytest.raises(FormatError):
        opened(poked(data, at, struct.unpack_from("<Q", data, at + 8)[0] + 1))


def test_sections_over_each_other_are_refused() -> None:
    with pytest.raises(FormatError, match="over"):
        opened(poked(poked(build(), 32, 112), 40, 144))


def test_an_empty_section_is_no_zstd_frame() -> None:
    for part in ({"chunks": b""}, {"names": b""}):
        with pytest.raises(FormatError, match="empty"):
            opened(build(**part))  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [{"streams": bytes(33)}, {"objects": bytes(31)}, {"objects": bytes(48)}], ids=str)
def test_a_table_that_is_not_made_of_whole_digests_is_refused(part: dict[str, bytes]) -> None:
    with pytest.raises(FormatError, match="multiple"):
        opened(build(**part))  # type: ignore[arg-type]


def test_a_table_that_would_fill_memory_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitstream, "_MAX_OBJECT_TABLE", 32)
    opened(build())
    with pytest.raises(FormatError, match="allowed"):
        opened(build(objects=HELLO * 2))
    monkeypatch.setattr(splitstream, "_MAX_STREAM_TABLE", 32)
    with pytest.raises(FormatError, match="allowed"):
        opened(build(streams=HELLO * 2))


def test_another_content_type_than_expected_is_refused() -> None:
    assert opened(build(), expect=BLOB).content_type == BLOB
    assert opened(build(content_type=b"whatever")).content_type == b"whatever"
    with pytest.raises(FormatError, match="content type"):
        opened(build(), expect=LAYER)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (b"", {}),
        (b"0:config:sha256:abc\0", {"config:sha256:abc": 0}),
        (b"+1:a\0" + b"0" * 5000 + b"1:b\0+000:c\0", {"a": 1, "b": 1, "c": 0}),
        (b"0:a\0001:b\0001:a\0", {"a": 1, "b": 1}),
        (b"1:z\0000:a\0", {"a": 0, "z": 1}),
        (b"0:\0", {"": 0}),
        ("1:\u00e9\n\0".encode(), {"\u00e9\n": 1}),
    ],
    ids=["none", "colons", "plus and zeros", "last wins", "any order", "empty", "utf-8"],
)
def test_names_that_are_accepted(text: bytes, names: dict[str, int]) -> None:
    streams = [b"\1" * 32, b"\2" * 32]
    stream = opened(build(streams=b"".join(streams), names=frame(text)))
    assert stream.named_refs == {name: streams[index] for name, index in names.items()}


@pytest.mark.parametrize(
    "text",
    [
        b"0:a",
        b"0:a\0x",
        b"\0",
        b"a\0",
        b":a\0",
        b"x:a\0",
        b"-0:a\0",
        b" 0:a\0",
        b"++0:a\0",
        b"+:a\0",
        b"2:a\0",
        b"1_0:a\0",
        b"9" * 5000 + b":a\0",
        b"0:\xff\0",
    ]
    + [b"18446744073709551616:a\0", "\u0660:a\0".encode()],
)
def test_names_that_are_refused(text: bytes) -> None:
    with pytest.raises(FormatError, match="names"):
        opened(build(streams=bytes(64), names=frame(text)))


def test_trailing_junk_in_the_names_is_refused() -> None:
    with pytest.raises(FormatError, match="junk"):
        opened(build(streams=bytes(32), names=frame(b"0:a\0000:b")))


def test_names_that_expand_without_end_are_refused() -> None:
    bomb = frame(b"0:a\0" * (8 << 20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(FormatError, match="allowed"):
        opened(build(streams=bytes(32), names=bomb))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.parametrize("section", ["chunks", "names"])
@pytest.mark.parametrize("damage", ["not zstd", "cut", "garbage after"])
def test_damaged_zstd_is_refused(section: str, damage: str) -> None:
    good = frame(
        b"0:x\0" * 100 if section == "names" else struct.pack("<q", -800) + bytes(range(100)) * 8, write_checksum=True
    )
    bad = {"not zstd": b"0:x\0", "cut": good[:-3], "garbage after": good + b"x"}[damage]
    with pytest.raises(FormatError):
        list(opened(build(streams=bytes(32), size=800, **{section: bad})).chunks())  # type: ignore[arg-type]


def read_chunks(chunks: bytes, size: int, object_size: int | None = None) -> list[Chunk]:
    stream = opened(build(chunks=frame(chunks), size=size))
    return list(stream.chunks(None if object_size is None else lambda _digest: object_size or 0))


@pytest.mark.parametrize("value", [1, 2, 1 << 32, (1 << 63) - 1])
def test_a_reference_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(FormatError, match="object number"):
        read_chunks(struct.pack("<q", value), 11)


@pytest.mark.parametrize(
    "chunks",
    [
        b"\0",
        bytes(7),
        bytes(15),
        b"\xff" * 7,
        struct.pack("<q", -5) + b"abcd",
        struct.pack("<q", -5),
        bytes(8) + b"\xff" * 8,
    ],
)
def test_a_chunk_cut_short_is_refused(chunks: bytes) -> None:
    with pytest.raises(FormatError, match="cut short"):
        read_chunks(chunks, 11)


@pytest.mark.parametrize("value", [-(1 << 63), -(1 << 62), -12])
def test_an_absurd_inline_size_is_refused_before_it_is_decoded(value: int) -> None:
    with pytest.raises(FormatError, match="longer"):
        read_chunks(struct.pack("<q", value) + bytes(100), 11)


def test_an_absurd_size_of_the_whole_stream_does_not_help() -> None:
    with pytest.raises(FormatError, match="cut short"):
        read_chunks(struct.pack("<q", -(1 << 63)) + bytes(100), (1 << 64) - 1)


def test_an_inline_bomb_is_stopped_at_the_size_of_the_stream() -> None:
    chunks = (struct.pack("<q", -1000) + bytes(1000)) * 2000
    seen = 0
    with pytest.raises(FormatError, match="longer"):
        for piece in opened(build(chunks=frame(chunks), size=5000)).chunks():
            assert isinstance(piece, bytes)
            seen += len(piece)
    assert seen == 5000


def test_a_bomb_of_references_is_stopped() -> None:
    with pytest.raises(FormatError, match="longer"):
        read_chunks(bytes(8) * 100_000, 1000)
    with pytest.raises(FormatError, match="longer"):
        read_chunks(bytes(8) * 100_000, 1000, 0)
    chunks = opened(build(chunks=frame(bytes(8) * 100_000), size=25)).chunks(lambda _digest: 11)
    assert [next(chunks), next(chunks)] == [ExternalRef(0, HELLO)] * 2
    with pytest.raises(FormatError, match="longer"):
        next(chunks)


@pytest.mark.parametrize("size", [0, 10, 12, 1 << 40])
def test_a_stream_that_is_not_as_long_as_it_says_is_refused(size: int) -> None:
    with pytest.raises(FormatError):
        read_chunks(struct.pack("<q", -11) + b"hello world", size)
    with pytest.raises(FormatError):
        read_chunks(bytes(8), size, 11)
    assert read_chunks(bytes(8), 11, 11) == [ExternalRef(0, HELLO)]


def test_an_empty_object_may_be_a_stream() -> None:
    assert read_chunks(bytes(8), 0, 0) == [ExternalRef(0, HELLO)]


def test_any_chunking_is_read() -> None:
    chunks = b"".join(struct.pack("<q", -1) + bytes((65 + i,)) for i in range(20))
    assert b"".join(read_chunks(chunks, 20)) == b"ABCDEFGHIJKLMNOPQRST"  # type: ignore[arg-type]


def test_inline_pieces_are_bounded_and_short_runs_come_whole() -> None:
    writer = Writer(SHA256, LAYER)
    sizes = [1, 255, 100_000, 262_144, 262_145, 700_001, 3, 200_000]
    for size in sizes:
        writer.inline(b"x" * size)
        writer.external(HELLO, 11)
    pieces: list[list[int]] = [[]]
    for chunk in opened(written(writer)).chunks():
        if isinstance(chunk, bytes):
            pieces[-1].append(len(chunk))
        else:
            pieces.append([])
    assert [sum(run) for run in pieces] == [*sizes, 0]
    assert max(max(run, default=0) for run in pieces) <= 262_144
    assert [len(run) for run, size in zip(pieces, sizes) if size <= 262_144] == [1] * 6


def test_chunks_can_be_read_while_something_else_moves_the_file() -> None:
    writer = Writer(SHA256, LAYER)
    for i in range(5000):
        writer.inline(hashlib.sha512(b"%d" % i).digest() * 2)
        writer.external(hashlib.sha256(b"%d" % i).digest(), 1)
    file = io.BytesIO(written(writer))
    stream = Splitstream.open(file, SHA256)
    other = stream.chunks()
    for count, chunk in enumerate(stream.chunks()):
        if count % 100 == 0:
            file.seek(count)
        assert chunk == next(other)


def test_the_table_of_objects_is_a_sequence() -> None:
    digests = [bytes((i,)) * 64 for i in range(5)]
    table = splitstream.DigestTable(b"".join(digests), 64)
    assert list(table) == digests
    assert (table[0], table[-1], len(table)) == (digests[0], digests[4], 5)
    assert list(table[1:4]) == digests[1:4]
    assert table == splitstream.DigestTable(b"".join(digests), 64)
    assert digests[3] in table
    assert table.index(digests[3]) == 3
    for index in (5, -6):
        with pytest.raises(IndexError):
            table[index]


# --- golden files of cfsctl (tests/unit/data/cfsctl/make.sh)
# -----------------------------------------------------------------------------------

LAYERS: list[bytes] = runpy.run_path(str(DATA / "make_image.py"))["layers"]()


def golden(name: str, expect: bytes) -> tuple[bytes, Splitstream]:
    data = (DATA / f"{name}.splitstream").read_bytes()
    return data, opened(data, ALGORITHMS[name[:6]], expect)


def split(tar: bytes, algorithm: Algorithm, writer: Writer) -> dict[bytes, bytes]:
    """The tar split rule for archives without extensions that concern sizes; returns the objects."""
    objects = {}
    at = 0
    while tar[at : at + 512].strip(b"\0"):
        size = int(tar[at + 124 : at + 135], 8)
        writer.inline(tar[at : at + 512])
        content = tar[at + 512 : at + 512 + size]
        if tar[at + 156 : at + 157] == b"0" and size > THRESHOLD:
            objects[digest(content, algorithm)] = content
            writer.external(digest(content, algorithm), size)
        else:
            writer.inline(content)
        writer.inline(tar[at + 512 + size : at + 512 + (size + 511) // 512 * 512])
        at += 512 + (size + 511) // 512 * 512
    writer.inline(tar[at:])
    return objects


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_layers_that_cfsctl_stored_are_read_back_whole(name: str, number: int) -> None:
    _data, stream = golden(f"{name}-layer-{number}", LAYER)
    tar = LAYERS[number - 1]
    objects = split(tar, ALGORITHMS[name], Writer(ALGORITHMS[name], LAYER))
    assert sorted(stream.object_refs) == sorted(objects)
    assert (
        b"".join(c if isinstance(c, bytes) else objects[c.digest] for c in stream.chunks(lambda d: len(objects[d])))
        == tar
    )
    assert (stream.size, stream.named_refs) == (len(tar), {})


@same_libzstd
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_layers_are_written_as_cfsctl_writes_them(name: str, number: int) -> None:
    data, _stream = golden(f"{name}-layer-{number}", LAYER)
    writer = Writer(ALGORITHMS[name], LAYER)
    split(LAYERS[number - 1], ALGORITHMS[name], writer)
    assert written(writer) == data


@pytest.mark.parametrize("kind", ["config", "manifest"])
@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_documents_that_cfsctl_stored_are_read_with_their_names(name: str, kind: str) -> None:
    _data, stream = golden(f"{name}-{kind}", CONFIG if kind == "config" else MANIFEST)
    diff_ids = {f"sha256:{hashlib.sha256(tar).hexdigest()}" for tar in LAYERS}
    layers = {digest((DATA / f"{name}-layer-{number}.splitstream").read_bytes(), ALGORITHMS[name]) for number in (1, 2)}
    assert diff_ids <= set(stream.named_refs)
    assert {stream.named_refs[diff_id] for diff_id in diff_ids} == layers
    others = set(stream.named_refs) - diff_ids
    if kind == "manifest":
        config = digest((DATA / f"{name}-config.splitstream").read_bytes(), ALGORITHMS[name])
        (key,) = (key for key in others if re.fullmatch("config:sha256:[0-9a-f]{64}", key))
        assert stream.named_refs[key] == config
        others.remove(key)
    assert all(key.startswith("composefs.image") for key in others)
    assert [chunk for chunk in stream.chunks() if isinstance(chunk, bytes)] == []
    assert len(stream.object_refs) == 1


@same_libzstd
@pytest.mark.parametrize("kind", ["config", "manifest"])
@pytest.mark.parametrize("name", ["sha256", "sha512"])
def test_documents_are_written_as_cfsctl_writes_them(name: str, kind: str) -> None:
    data, stream = golden(f"{name}-{kind}", CONFIG if kind == "config" else MANIFEST)
    writer = Writer(ALGORITHMS[name], stream.content_type)
    for chunk in stream.chunks():
        assert isinstance(chunk, ExternalRef)
        writer.external(chunk.digest, stream.size)
    for key, value in sorted(stream.named_refs.items(), key=lambda item: stream.stream_refs.index(item[1])):
        writer.named_ref(key, value)
    assert written(writer) == data


# --- properties
# --------------------------------------------------------------------------------------------------------------------

DIGESTS = st.integers(0, 300).map(lambda number: hashlib.sha512(b"%d" % number).digest())
PIECES = st.lists(st.one_of(st.binary(max_size=200), st.tuples(DIGESTS, st.integers(1, 1 << 40))), max_size=60)
NAMES = st.dictionaries(
    st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=20), DIGESTS, max_size=8
)


@settings(max_examples=80, deadline=None)
@given(PIECES, NAMES, st.sampled_from([SHA256, SHA512]))
def test_what_is_written_is_read_back(
    pieces: list[bytes | tuple[bytes, int]], names: dict[str, bytes], algorithm: Algorithm
) -> None:
    writer = Writer(algorithm, LAYER)
    expected: list[Chunk] = []
    indexes: dict[bytes, int] = {}
    for piece in pieces:
        if isinstance(piece, tuple):
            value = piece[0][: algorithm.size]
            writer.external(value, piece[1])
            expected.append(ExternalRef(indexes.setdefault(value, len(indexes)), value))
        else:
            writer.inline(piece)
            if piece:
                expected.append(piece)
    for name, value in names.items():
        writer.named_ref(name, value[: algorithm.size])
    data = written(writer)
    stream = opened(data, algorithm, LAYER)
    assert list(stream.chunks()) == merged(iter(expected))
    assert list(stream.object_refs) == list(indexes)
    assert stream.named_refs == {name: value[: algorithm.size] for name, value in names.items()}
    assert stream.size == writer.size == sum(len(piece) if isinstance(piece, bytes) else piece[1] for piece in pieces)
    if expected:
        assert sections(data)["chunks"] == frame(unframe(sections(data)["chunks"]))


def consume(data: bytes, algorithm: Algorithm = SHA256) -> None:
    """Read everything; only engine errors may come out, and not much memory be used."""
    try:
        stream = opened(data, algorithm)
        for count, chunk in enumerate(stream.chunks()):
            assert isinstance(chunk, ExternalRef) or 0 < len(chunk) <= 262_144
            if count > 5000:
                break
    except EngineError as error:
        assert error.code == "repository_damaged"


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([b"", b"SplitStream\0\0\0\1\x0c", b"SplitStream\0\0\0\1\x0c\x20" + bytes(7) + b"\x70" + bytes(7)]),
)
def test_random_bytes_raise_engine_errors_only(data: bytes, start: bytes) -> None:
    consume(start + data)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_streams_raise_engine_errors_only(draw: st.DataObject) -> None:
    names = draw.draw(st.sampled_from(["sha256-layer-1", "sha512-config", "sha256-manifest"]))
    data = bytearray((DATA / f"{names}.splitstream").read_bytes())
    for _i in range(draw.draw(st.integers(1, 6))):
        at = draw.draw(st.integers(0, len(data) - 1) | st.integers(0, 111))
        data[at] = draw.draw(st.integers(0, 255))
    if draw.draw(st.booleans()):
        del data[draw.draw(st.integers(0, len(data))) :]
    consume(bytes(data), ALGORITHMS[names[:6]])


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-300, 3) | st.integers(-(1 << 63), (1 << 63) - 1) | st.binary(max_size=300), max_size=10),
    st.binary(max_size=60),
    st.integers(0, 2000),
)
def test_random_chunks_and_names_raise_engine_errors_only(chunks: list[int | bytes], names: bytes, size: int) -> None:
    encoded = b"".join(chunk if isinstance(chunk, bytes) else struct.pack("<q", chunk) for chunk in chunks)
    consume(build(streams=bytes(64), chunks=frame(encoded), size=size))
    consume(build(streams=bytes(64), names=frame(names), size=size))
