# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import ctypes
import gzip
import hashlib
import importlib
import io
import random
import struct
import sys
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs, libisal
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    EngineError,
    FormatError,
    InvalidLayer,
    MissingLibrary,
)
from hypothesis import given, settings
from hypothesis import strategies as st


def installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


# The C library without a Python module counts as installed if it can be loaded, whatever the engine thinks of it.
GZIP = [name for name, module in codecs.GZIP_BACKENDS.items() if (installed(module) if module else libisal.load())]
ZSTD = [name for name, module in codecs.ZSTD_BACKENDS.items() if installed(module)]
EVERY = [("gzip", name) for name in GZIP] + [("zstd", name) for name in ZSTD]

every_backend = pytest.mark.parametrize("compression, backend", EVERY)
every_gzip = pytest.mark.parametrize("backend", GZIP)
every_zstd = pytest.mark.parametrize("backend", ZSTD)
needs_zstd = pytest.mark.skipif(not ZSTD, reason="no zstd library")

TEXT = b"".join(b"line %d of something that repeats\n" % number for number in range(3000))
NOISE = random.Random(7).randbytes(300_000)
EMPTY_FRAME = bytes.fromhex("28b52ffd2000010000")
SKIPPABLE = struct.pack("<II", 0x184D2A50, 5) + b"TOC.."


class Dribble:
    """A source that returns fewer bytes than it is asked for."""

    def __init__(self, data: bytes, step: int) -> None:
        self.file = io.BytesIO(data)
        self.step = step
        self.asked = 0

    def read(self, n: int) -> bytes:
        self.asked = max(self.asked, n)
        return self.file.read(min(n, self.step))


class Endless:
    """A source that repeats a piece for ever and counts what was taken."""

    def __init__(self, head: bytes, piece: bytes) -> None:
        self.data = head
        self.piece = piece * (65536 // len(piece))
        self.taken = 0

    def read(self, n: int) -> bytes:
        if not self.data:
            self.data = self.piece
        out, self.data = self.data[:n], self.data[n:]
        self.taken += len(out)
        return out


def zstd_frame(data: bytes, pieces: int = 1) -> bytes:
    compressor = codecs.zstd_compressor()
    step = len(data) // pieces + 1
    return b"".join(compressor.compress(data[at : at + step]) for at in range(0, len(data), step)) + compressor.flush()


def pack(compression: str, data: bytes) -> bytes:
    return gzip.compress(data, 6) if compression == "gzip" else zstd_frame(data)


def unpack(compression: str, backend: str, data: bytes, n: int = 1 << 20, step: int = 1 << 20) -> bytes:
    decoder = codecs.open_decoder(compression, Dribble(data, step), backend=backend)
    out = []
    while True:
        piece = decoder.read(n)
        assert len(piece) <= n
        if not piece:
            assert decoder.read(n) == b""
            return b"".join(out)
        out.append(piece)


def test_there_is_always_a_gzip_backend() -> None:
    assert codecs.gzip_backend() == GZIP[0]
    assert "zlib" in GZIP


needs_libisal = pytest.mark.skipif("libisal" not in GZIP, reason="there is no libisal.so.2 here (Debian: libisal2)")


@pytest.fixture
def no_binding(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python with the standard library only, which has not looked for the C library yet."""
    real = codecs._module
    monkeypatch.setattr(codecs, "_module", lambda name: real(name) if name == "zlib" else None)
    codecs._libisal.cache_clear()
    yield
    codecs._libisal.cache_clear()


@needs_libisal
@pytest.mark.usefixtures("no_binding")
def test_the_c_library_serves_where_python_has_no_binding() -> None:
    assert codecs.gzip_backend() == "libisal"


@pytest.mark.usefixtures("no_binding")
@pytest.mark.parametrize("lacking", ["ctypes", "the library", "a function", "this kind of processor"])
def test_without_the_c_library_the_standard_library_decodes(lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lacking == "ctypes":
        monkeypatch.setitem(sys.modules, "ctypes", None)
    elif lacking == "this kind of processor":
        monkeypatch.setattr(sys, "byteorder", "big")
    else:
        # A name that is not there, or a library that is and has other functions.
        monkeypatch.setattr(
            ctypes, "CDLL", lambda name, load=ctypes.CDLL: load(name[:-1] + "99" if lacking == "the library" else None)
        )
    assert codecs.gzip_backend() == "zlib"
    assert unpack("gzip", codecs.gzip_backend(), gzip.compress(TEXT)) == TEXT


class Pretender:
    """The C library, as it seems; ``answer`` changes what its structure holds after each call."""

    def __init__(self, answer: Callable[[Any], int | None]) -> None:
        self.library = libisal.Library()
        inflate = self.library.inflate

        def pretend(state: Any) -> int:
            result = inflate(state)
            other = answer(state)
            return int(result if other is None else other)

        self.library.inflate = pretend


@needs_libisal
@pytest.mark.usefixtures("no_binding")
@pytest.mark.parametrize(
    "field, value",
    [
        ("block_state", 5),
        ("block_state", 0),
        ("avail_out", 1 << 31),
        ("avail_in", 1 << 31),
        ("guard", 1),
        ("avail_out", 0),
    ],
)
def test_a_c_library_that_behaves_otherwise_is_not_used(
    field: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Pretender(lambda state: setattr(state, field, value)).library
    monkeypatch.setattr(libisal, "load", lambda: library)
    assert codecs.gzip_backend() == "zlib"


@needs_libisal
@pytest.mark.usefixtures("no_binding")
def test_a_c_library_that_takes_wrong_checksums_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Pretender(lambda state: 0).library
    monkeypatch.setattr(libisal, "load", lambda: library)
    assert codecs.gzip_backend() == "zlib"


@needs_libisal
@pytest.mark.parametrize("field, value", [("avail_out", 1 << 31), ("avail_in", 1 << 31), ("guard", 1)])
def test_sizes_that_cannot_be_are_not_believed(field: str, value: int) -> None:
    member = libisal.Member(Pretender(lambda state: setattr(state, field, value)).library)
    with pytest.raises(libisal.LibraryError):
        member.decompress(memoryview(gzip.compress(TEXT)[10:]), 1000)


def test_the_sample_has_blocks_of_every_kind_and_reaches_beyond_the_window() -> None:
    text, blob = libisal.sample()
    assert gzip.decompress(blob) == text and len(text) > 3 * 32768
    kinds = {blob[10] >> 1 & 3}  # the first block's, and of those that begin at a byte because all was flushed before
    for at in range(len(blob) - 4):
        if blob[at : at + 4] == b"\0\0\xff\xff":
            kinds.add(blob[at + 4] >> 1 & 3)
    assert kinds == {0, 1, 2}


def test_the_zstd_backend_is_the_first_that_is_installed() -> None:
    assert codecs.zstd_backend() == (ZSTD[0] if ZSTD else None)


def test_without_a_zstd_library_the_user_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codecs, "_module", lambda name: None)
    assert codecs.zstd_backend() is None
    for call in (
        codecs.zstd_compressor,
        lambda: codecs.zstd_reader(io.BytesIO()),
        lambda: codecs.open_decoder("zstd", io.BytesIO()),
    ):
        with pytest.raises(MissingLibrary, match="zstandard"):
            call()


def test_plain_data_passes_untouched() -> None:
    decoder = codecs.open_decoder("none", io.BytesIO(b"abc"))
    assert [decoder.read(2), decoder.read(2), decoder.read(2)] == [b"ab", b"c", b""]


def test_an_unknown_compression_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="bzip2"):
        codecs.open_decoder("bzip2", io.BytesIO())


@every_backend
@pytest.mark.parametrize(
    "data", [b"", b"x", TEXT, NOISE, bytes(1 << 20)], ids=["empty", "byte", "text", "noise", "zeros"]
)
def test_one_member_is_decoded(compression: str, backend: str, data: bytes) -> None:
    assert unpack(compression, backend, pack(compression, data)) == data


@every_backend
@pytest.mark.parametrize("n, step", [(1, 1 << 20), (511, 3), (1 << 20, 1), (70_000, 4097)])
def test_neither_the_size_of_reads_nor_of_the_source_pieces_matters(
    compression: str, backend: str, n: int, step: int
) -> None:
    data = TEXT[:9000] + NOISE[:3000]
    assert (
        unpack(compression, backend, pack(compression, data[:5000]) + pack(compression, data[5000:]), n, step) == data
    )


@every_backend
def test_every_member_is_decoded_and_not_only_the_first(compression: str, backend: str) -> None:
    parts = [TEXT, b"", b"a", NOISE, b"", TEXT[:700], b""]
    assert unpack(compression, backend, b"".join(pack(compression, part) for part in parts)) == b"".join(parts)


@every_backend
def test_thousands_of_small_members_are_decoded_and_gathered(compression: str, backend: str) -> None:
    parts = [TEXT[at : at + 37] for at in range(0, 37_000, 37)]
    blob = b"".join(pack(compression, part) for part in parts)
    decoder = codecs.open_decoder(compression, io.BytesIO(blob), backend=backend)
    assert len(decoder.read(1 << 20)) > 30_000  # not one read a member
    assert unpack(compression, backend, blob) == b"".join(parts)


@every_backend
def test_nothing_at_all_is_not_an_archive(compression: str, backend: str) -> None:
    with pytest.raises(InvalidLayer, match="empty"):
        unpack(compression, backend, b"")


@every_backend
@pytest.mark.parametrize("junk", [b"a", b"<html>not found</html>", b"\0" * 600])
def test_other_data_is_named_as_such(compression: str, backend: str, junk: bytes) -> None:
    with pytest.raises(InvalidLayer, match=f"not {compression} data|middle of a frame header"):
        unpack(compression, backend, junk)


@every_backend
@pytest.mark.parametrize("zeros", [1, 2, 3, 512, 300_000])
def test_zero_padding_after_the_last_member_is_forgiven(compression: str, backend: str, zeros: int) -> None:
    blob = pack(compression, TEXT)
    assert unpack(compression, backend, blob + bytes(zeros)) == TEXT
    assert unpack(compression, backend, blob + bytes(zeros), step=7 if zeros < 1000 else 1000) == TEXT


@every_backend
@pytest.mark.parametrize(
    "garbage",
    [b"x", b"garbage after the end", b"\0\0\0garbage", bytes(300_000) + b"x", b"\x1f\x1f", b"\x28\xb5\x2f\xfc\0\0"],
)
def test_garbage_after_the_last_member_is_an_error(compression: str, backend: str, garbage: bytes) -> None:
    with pytest.raises(InvalidLayer, match="[Gg]arbage follows the last|in the middle of a frame header"):
        unpack(compression, backend, pack(compression, TEXT) + garbage)


@every_backend
def test_a_member_after_padding_is_garbage(compression: str, backend: str) -> None:
    blob = pack(compression, TEXT)
    with pytest.raises(InvalidLayer, match="Garbage follows"):
        unpack(compression, backend, blob + bytes(16) + blob)


@every_backend
def test_truncation_anywhere_is_an_error(compression: str, backend: str) -> None:
    first = pack(compression, TEXT[:600])
    blob = first + pack(compression, NOISE[:400])
    for cut in [*range(1, 40), *range(40, len(blob), 23), *range(len(blob) - 20, len(blob))]:
        if cut == len(first):
            continue
        with pytest.raises(InvalidLayer, match=r"middle of a|Garbage follows|not gzip data"):
            unpack(compression, backend, blob[:cut])


@every_backend
def test_damage_never_goes_unnoticed_where_there_is_a_checksum(compression: str, backend: str) -> None:
    blob = bytearray(pack("gzip", TEXT) if compression == "gzip" else with_checksum(TEXT))
    rng = random.Random(3)
    for _unused in range(60):
        at = rng.randrange(10, len(blob))
        damaged = bytearray(blob)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            got = unpack(compression, backend, bytes(damaged))
        except InvalidLayer:
            continue
        assert got == TEXT


def with_checksum(data: bytes) -> bytes:
    """A zstd frame with checksum, whichever library is there."""
    backend = ZSTD[0]
    module = importlib.import_module(codecs.ZSTD_BACKENDS[backend])
    if backend == "zstandard":
        return module.ZstdCompressor(level=3, write_checksum=True).compress(data)
    return module.compress(data, options={module.CompressionParameter.checksum_flag: 1})


@every_gzip
@pytest.mark.parametrize("field", ["checksum", "length"])
def test_a_wrong_gzip_trailer_is_an_error(backend: str, field: str) -> None:
    blob = bytearray(gzip.compress(TEXT))
    blob[-8 if field == "checksum" else -4] ^= 1
    with pytest.raises(InvalidLayer, match="damaged"):
        unpack("gzip", backend, bytes(blob))
    with pytest.raises(InvalidLayer, match="damaged"):  # also of a later member
        unpack("gzip", backend, gzip.compress(NOISE) + bytes(blob))


def gzip_member(data: bytes, flags: int, fields: bytes) -> bytes:
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    head = b"\x1f\x8b\x08" + bytes([flags]) + bytes(4) + b"\0\xff" + fields
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    return head + body.compress(data) + body.flush() + struct.pack("<II", zlib.crc32(data), len(data))


@every_gzip
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_optional_gzip_header_fields_are_read(
    backend: str, step: int
) -> None:  # ISA-L by itself fails when they arrive in pieces
    extra = struct.pack("<H", 26) + b"SG\x16\0" + b"0000000000000000STARGZ"
    members = [
        gzip_member(b"one", 4, extra),
        gzip_member(b"two", 8, b"name\0"),
        gzip_member(b"three", 16, b"comment\0"),
        gzip_member(b"four", 4 | 8 | 16 | 2, extra + b"name\0comment\0"),
        gzip_member(b"", 4, extra),  # the footer of eStargz
    ]
    assert unpack("gzip", backend, b"".join(members), step=step) == b"onetwothreefour"


@every_gzip
@pytest.mark.parametrize("at, value", [(2, 7), (3, 0x20), (3, 0x80)], ids=["method", "reserved", "encrypted"])
def test_an_unknown_gzip_method_or_flag_is_an_error(backend: str, at: int, value: int) -> None:
    blob = bytearray(gzip.compress(TEXT))
    blob[at] = value
    with pytest.raises(InvalidLayer, match="damaged"):
        unpack("gzip", backend, bytes(blob))


@every_gzip
def test_a_wrong_gzip_header_checksum_is_an_error(backend: str) -> None:
    blob = bytearray(gzip_member(b"text", 2 | 8, b"name\0"))
    blob[12] ^= 1
    with pytest.raises(InvalidLayer, match="header has a wrong checksum"):
        unpack("gzip", backend, bytes(blob))


@every_gzip
def test_a_gzip_header_cannot_grow_for_ever(backend: str) -> None:
    source = Endless(b"\x1f\x8b\x08\x08" + bytes(6), b"x")
    with pytest.raises(InvalidLayer, match="header does not end"):
        codecs.open_decoder("gzip", source, backend=backend).read(1)
    assert source.taken < 1 << 20
    long = gzip_member(b"text", 4 | 8, b"\xff\xff" + NOISE[:65535] + b"n" * 30_000 + b"\0")
    assert unpack("gzip", backend, long, step=5000) == b"text"


@every_zstd
@pytest.mark.parametrize("step", [1, 6, 1 << 20])
def test_skippable_frames_are_left_out_wherever_they_stand(backend: str, step: int) -> None:
    blob = SKIPPABLE + zstd_frame(b"one") + SKIPPABLE + SKIPPABLE + zstd_frame(b"two") + EMPTY_FRAME + SKIPPABLE
    assert unpack("zstd", backend, blob, step=step) == b"onetwo"
    assert unpack("zstd", backend, blob + bytes(9), step=step) == b"onetwo"


@every_zstd
def test_a_skippable_frame_may_be_larger_than_the_input_buffer(backend: str) -> None:
    large = struct.pack("<II", 0x184D2A5F, 700_000) + NOISE + NOISE + NOISE[:100_000]
    assert unpack("zstd", backend, zstd_frame(b"one") + large + zstd_frame(b"two")) == b"onetwo"
    with pytest.raises(InvalidLayer, match="middle of a frame"):
        unpack("zstd", backend, zstd_frame(b"one") + large[:-1])


@every_zstd
def test_frames_with_content_size_checksum_and_single_segment_are_read(backend: str) -> None:
    assert unpack("zstd", backend, with_checksum(b"abc") + with_checksum(TEXT) + with_checksum(b"")) == b"abc" + TEXT


@every_zstd
def test_a_wrong_zstd_checksum_is_an_error(backend: str) -> None:
    blob = bytearray(with_checksum(TEXT))
    blob[-1] ^= 1
    with pytest.raises(InvalidLayer, match="damaged"):
        unpack("zstd", backend, bytes(blob))


@every_zstd
def test_runs_and_raw_blocks_are_walked_by_their_stored_size(backend: str) -> None:
    raw = struct.pack("<I", 5 << 3)[:3] + b"hello"
    run = struct.pack("<I", 1000 << 3 | 1 << 1)[:3] + b"z"
    last = struct.pack("<I", 0 << 3 | 1)[:3]
    blob = bytes.fromhex("28b52ffd0058") + raw + run + last
    for step in (1, 1 << 20):
        assert unpack("zstd", backend, blob + blob, step=step) == (b"hello" + b"z" * 1000) * 2


@every_zstd
@pytest.mark.parametrize(
    "head", [bytes.fromhex("28b52ffd00a0"), bytes.fromhex("28b52ffde0") + struct.pack("<Q", 1 << 40)]
)
def test_a_frame_that_wants_too_much_memory_is_refused(backend: str, head: bytes) -> None:
    with pytest.raises(InvalidLayer, match="MiB of memory"):
        unpack("zstd", backend, head + struct.pack("<I", 1 << 3 | 1)[:3] + b"x")


@every_zstd
def test_frames_of_obsolete_formats_are_refused(backend: str) -> None:
    with pytest.raises(InvalidLayer, match="not zstd data"):
        unpack("zstd", backend, bytes.fromhex("27b52ffd0058") + bytes(50))


@every_zstd
def test_a_frame_that_needs_a_dictionary_is_refused(backend: str) -> None:
    with pytest.raises(InvalidLayer, match="damaged"):
        unpack("zstd", backend, bytes.fromhex("28b52ffd010058") + b"\x07" + struct.pack("<I", 1 << 3 | 1)[:3] + b"x")


@every_backend
def test_a_bomb_costs_no_memory(compression: str, backend: str) -> None:
    if compression == "gzip":
        squeezer = zlib.compressobj(9, zlib.DEFLATED, 31)
        blob = b"".join(squeezer.compress(bytes(1 << 20)) for _unused in range(16)) + squeezer.flush()
        source: Endless = Endless(blob, blob)
        bound = 3 << 20
    else:  # a run of 128 KiB in four bytes: a chunk of input is worth 8 GiB
        source = Endless(bytes.fromhex("28b52ffd0058"), struct.pack("<I", 131072 << 3 | 1 << 1)[:3] + b"\0")
        bound = 12 << 20
    decoder = codecs.open_decoder(compression, source, backend=backend)
    tracemalloc.start()
    try:
        for _unused in range(12):
            assert 0 < len(decoder.read(1 << 20)) <= 1 << 20
        assert tracemalloc.get_traced_memory()[1] < bound
    finally:
        tracemalloc.stop()
    assert source.taken <= 4 * codecs.CHUNK


@every_backend
def test_the_source_is_asked_for_bounded_pieces(compression: str, backend: str) -> None:
    source = Dribble(pack(compression, NOISE), 1 << 30)
    decoder = codecs.open_decoder(compression, source, backend=backend)
    while decoder.read(1 << 24):
        pass
    assert source.asked == codecs.CHUNK


@every_backend
def test_errors_of_the_source_pass_through(compression: str, backend: str) -> None:
    class Failing(Dribble):
        def read(self, n: int) -> bytes:
            data = super().read(n)
            if not data:
                raise TimeoutError("the pipe went silent")
            return data

    decoder = codecs.open_decoder(compression, Failing(pack(compression, NOISE)[:100_000], 50_000), backend=backend)
    with pytest.raises(TimeoutError, match="silent"):
        while decoder.read(1 << 16):
            pass


@every_backend
def test_a_decoder_works_in_a_thread_beside_its_reader(compression: str, backend: str) -> None:
    data = NOISE * 4
    blob = pack(compression, data)
    results: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: results.append(hashlib.sha256(unpack(compression, backend, blob)).digest()))
        for _unused in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [hashlib.sha256(data).digest()] * 2


@needs_zstd
def test_sections_of_repository_files_fail_as_repository_damage() -> None:
    assert codecs.zstd_reader(io.BytesIO(SKIPPABLE + zstd_frame(b"one") + zstd_frame(b"two"))).read(99) == b"onetwo"
    for section in (b"", zstd_frame(TEXT)[:-1], zstd_frame(TEXT) + b"\0", zstd_frame(TEXT) + b"x", b"hello world"):
        decoder = codecs.zstd_reader(io.BytesIO(section))
        with pytest.raises(FormatError):
            while decoder.read(1 << 16):
                pass


@every_zstd
def test_the_compressor_writes_the_frame_of_the_format(backend: str) -> None:
    compressor = codecs.zstd_compressor(backend=backend)
    assert compressor.flush() == EMPTY_FRAME
    compressor = codecs.zstd_compressor(backend=backend)
    assert compressor.compress(b"") + compressor.compress(b"") + compressor.flush() == EMPTY_FRAME
    compressor = codecs.zstd_compressor(backend=backend)  # the stream of a blob: external object 0
    assert (compressor.compress(bytes(8)) + compressor.flush()).hex() == "28b52ffd0058410000" + "00" * 8


@every_zstd
def test_the_compressor_ignores_how_the_input_is_cut(backend: str) -> None:
    data = TEXT + NOISE[:50_000] + TEXT

    def compressed(step: int) -> bytes:
        compressor = codecs.zstd_compressor(backend=backend)
        return (
            b"".join(compressor.compress(data[at : at + step]) for at in range(0, len(data), step)) + compressor.flush()
        )

    assert compressed(1 << 20) == compressed(977) == compressed(8)
    assert compressed(977)[:6] == bytes.fromhex("28b52ffd0058")
    assert unpack("zstd", backend, compressed(977)) == data


@pytest.mark.skipif(len(ZSTD) < 2, reason="one zstd library only")
def test_all_packages_with_the_same_libzstd_write_the_same_bytes() -> None:
    versions = {}
    for backend in ZSTD:
        module = importlib.import_module(codecs.ZSTD_BACKENDS[backend])
        versions[backend] = tuple(module.ZSTD_VERSION) if backend == "zstandard" else tuple(module.zstd_version_info)
    if len(set(versions.values())) > 1:
        pytest.skip("the packages bring different versions of libzstd")
    results = set()
    for backend in ZSTD:
        compressor = codecs.zstd_compressor(backend=backend)
        results.add(b"".join(compressor.compress(part) for part in (TEXT, NOISE, TEXT)) + compressor.flush())
    assert len(results) == 1


PARTS = st.lists(
    st.one_of(
        st.binary(max_size=3000), st.integers(0, 200_000).map(bytes), st.integers(1, 3000).map(lambda size: TEXT[:size])
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("compression", ["gzip", "zstd"] if ZSTD else ["gzip"])
@given(parts=PARTS, n=st.integers(1, 300_000), step=st.integers(1, 9000), padding=st.integers(0, 600))
@settings(max_examples=20, deadline=None)
def test_any_members_read_in_any_way_give_the_data(
    compression: str, parts: list[bytes], n: int, step: int, padding: int
) -> None:
    blob = b"".join(pack(compression, part) for part in parts) + bytes(padding)
    n = max(n, sum(map(len, parts)) // 500)
    for backend in GZIP if compression == "gzip" else ZSTD:
        assert unpack(compression, backend, blob, n, step) == b"".join(parts)


@pytest.mark.parametrize("compression", ["gzip", "zstd"] if ZSTD else ["gzip"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_hostile_bytes_only_raise_engine_errors_and_alike_in_all_backends(
    compression: str, data: st.DataObject
) -> None:
    blob = bytearray(pack(compression, TEXT[:2000]) + pack(compression, NOISE[:200]))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(blob) - 1), st.integers(0, 255)), max_size=4)):
        blob[at] = value
    blob = blob[: data.draw(st.integers(0, len(blob)))] + data.draw(st.binary(max_size=20))
    step = data.draw(st.sampled_from([1, 7, 100, 1 << 20]))
    outcomes = set()
    for backend in GZIP if compression == "gzip" else ZSTD:
        try:
            outcomes.add(unpack(compression, backend, bytes(blob), 1000, step))
        except EngineError as error:
            assert isinstance(error, InvalidLayer)
            outcomes.add(None)
    assert len(outcomes) == 1
