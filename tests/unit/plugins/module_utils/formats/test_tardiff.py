# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import importlib
import io
import random
import tracemalloc

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, FormatError, InvalidLayer
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs, tardiff
from ansible_collections.composefs.oci.plugins.module_utils.formats.tardiff import (
    ADD,
    COPY,
    DATA,
    DICT,
    MAGIC,
    OPEN,
    SEEK,
    leb128,
)
from hypothesis import given, settings
from hypothesis import strategies as st

LIMIT = 1 << 30


def installed(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


ZSTD = [name for name, module in codecs.ZSTD_BACKENDS.items() if installed(module)]
pytestmark = pytest.mark.skipif(not ZSTD, reason="no zstd library")
every_zstd = pytest.mark.parametrize("backend", ZSTD)

# Whole programs of both versions. The patch in the second was made by ``zstd --patch-from`` 1.5.4.
FOX = b"The quick brown fox jumps over the lazy dog\n"
GOLDEN_FILES: dict[bytes, bytes | Memory] = {b"usr/bin/tool": FOX * 4, b"a": b"abcdefgh"}
GOLDEN_OUTPUT = b"head\n" + FOX + b"vudcl" + b"abcdefgh"
GOLDEN = {
    "tardf1": (
        "7461726466310a0028b52ffd00585901000005686561640a010c7573722f62696e2f746f6f6c022c040403050500fb00010101610408"
        "040002080000",
        GOLDEN_OUTPUT,
    ),
    "tardf2": (
        "7461726466320a0028b52ffd0058ad0200d4040005686561640a010c7573722f62696e2f746f6f6c022c040403050500fb0001010161"
        "0408040002080000052028b52ffd24b49d000038636174656e640a0300f5352800a0c9931410dbef01d101003bb22a03",
        GOLDEN_OUTPUT + FOX + FOX.replace(b"fox", b"cat") + FOX * 2 + b"end\n",
    ),
}


class Memory:
    """A file of the source tree in memory, which knows whether it was closed."""

    def __init__(self, data: bytes, claims: int | None = None) -> None:
        self.data = data
        self.size = len(data) if claims is None else claims
        self.closed = False

    def pread(self, n: int, offset: int) -> bytes:
        return self.data[offset : offset + n]

    def whole(self) -> bytes:
        return self.data

    def close(self) -> None:
        self.closed = True


class Tree:
    def __init__(self, files: dict[bytes, bytes | Memory]) -> None:
        self.files = files
        self.opened: list[Memory] = []

    def open(self, path: bytes) -> Memory | None:
        found = self.files.get(path)
        if found is None:
            return None
        self.opened.append(found if isinstance(found, Memory) else Memory(found))
        return self.opened[-1]


def op(operation: int, number: int, data: bytes = b"") -> bytes:
    return bytes([operation]) + leb128(number) + data


def patch_of(base: bytes, data: bytes, backend: str | None = None) -> bytes:
    return codecs.PatchMaker(base, backend=backend).make(data)


def frame(data: bytes) -> bytes:
    compressor = codecs.zstd_compressor()
    return compressor.compress(data) + compressor.flush()


def program(*operations: bytes, version: int = 2) -> bytes:
    return MAGIC[version] + frame(b"".join(operations))


def output(blob: bytes, files: dict[bytes, bytes | Memory] | None = None, limit: int = LIMIT, step: int = 0) -> bytes:
    file = io.BytesIO(blob)
    tree = Tree(files or {})
    try:
        return b"".join(tardiff.apply(lambda n: file.read(min(n, step or n)), tree.open, limit))
    finally:
        assert all(opened.closed for opened in tree.opened)


FILES: dict[bytes, bytes | Memory] = {b"etc/one": bytes(range(256)) * 4, b"two": b"0123456789"}


@pytest.mark.parametrize("version", [1, 2])
def test_each_operation_does_what_the_format_says(version: int) -> None:
    blob = program(
        op(DATA, 3, b"abc"),
        op(OPEN, 3, b"two"),
        op(COPY, 4),
        op(SEEK, 8),
        op(COPY, 2),
        op(SEEK, 2),
        op(ADD, 3, b"\x01\xff\x00"),
        op(COPY, 1),
        op(OPEN, 7, b"etc/one"),
        op(SEEK, 255),
        op(ADD, 2, b"\x01\x02"),
        version=version,
    )
    assert output(blob, FILES) == b"abc" + b"0123" + b"89" + b"324" + b"5" + b"\x00\x02"
    assert output(blob, FILES, step=1) == output(blob, FILES)


def test_a_patch_decodes_against_the_whole_file_and_leaves_the_position_at_its_end() -> None:
    base = random.Random(1).randbytes(50_000)
    wanted = base[100:20_000] + b"new" + base[:400]
    patch = patch_of(base, wanted)
    assert len(patch) < 200
    blob = program(op(OPEN, 1, b"f"), op(SEEK, 77), op(DICT, len(patch), patch), op(DATA, 1, b"."))
    assert output(blob, {b"f": base}) == wanted + b"."
    after = program(op(OPEN, 1, b"f"), op(DICT, len(patch), patch), op(COPY, 1))
    with pytest.raises(InvalidLayer, match="1 bytes at 50000"):
        output(after, {b"f": base})


def test_several_patches_share_one_open_file() -> None:
    base = random.Random(2).randbytes(50_000)
    one, two = patch_of(base, base[:30_000]), patch_of(base, base[20_000:])
    blob = program(op(OPEN, 1, b"f"), op(DICT, len(one), one), op(DICT, len(two) + 7, two + b"padding"))
    with pytest.raises(InvalidLayer, match="Garbage follows"):
        output(blob, {b"f": base})
    blob = program(op(OPEN, 1, b"f"), op(DICT, len(one), one), op(DICT, len(two) + 7, two + bytes(7)))
    assert output(blob, {b"f": base}) == base[:30_000] + base[20_000:]


def test_a_patch_is_no_operation_of_version_1() -> None:
    patch = patch_of(b"base", b"data")
    blob = program(op(OPEN, 3, b"two"), op(DICT, len(patch), patch), version=1)
    with pytest.raises(InvalidLayer, match="no operation 5"):
        output(blob, FILES)


@every_zstd
@pytest.mark.parametrize("other", ZSTD)
def test_frames_with_a_prefix_are_read_by_every_library(backend: str, other: str) -> None:
    base = random.Random(3).randbytes(3_000_000)
    wanted = base[1_000_000:] + b"x" * 100_000 + base[:900_000]
    patch = patch_of(base, wanted, backend=backend)
    assert len(patch) < 3_000
    decoder = codecs.Patches(base, backend=other).open(io.BytesIO(patch))
    found = bytearray()
    while piece := decoder.read(100_000):
        assert len(piece) <= 100_000
        found += piece
    assert bytes(found) == wanted


@every_zstd
def test_a_patch_that_ends_early_or_has_another_base_is_an_error(backend: str) -> None:
    base = random.Random(4).randbytes(100_000)
    patch = patch_of(base, base[50_000:] + b"more", backend=backend)
    cut = codecs.Patches(base, backend=backend).open(io.BytesIO(patch[:-3]))
    with pytest.raises(InvalidLayer):
        while cut.read(1 << 20):
            pass
    short = codecs.Patches(base[:10_000], backend=backend).open(io.BytesIO(patch))
    with pytest.raises(InvalidLayer):
        while short.read(1 << 20):
            pass


@pytest.mark.parametrize(
    "operations, complaint",
    [
        ([op(OPEN, 4097, b"a" * 4097)], "a path of 4097 bytes"),
        ([op(OPEN, 7, b"missing")], "'missing', which is no file"),
        ([op(OPEN, 3, b"two"), op(COPY, 11)], "11 bytes at 0 of a file of 10 bytes"),
        ([op(OPEN, 3, b"two"), op(SEEK, 11)], "SEEK to 11 leads beyond a file of 10 bytes"),
        ([op(OPEN, 3, b"two"), op(SEEK, 8), op(ADD, 3, b"abc")], "3 bytes at 8 of a file of 10 bytes"),
        ([op(COPY, 1)], "operation 2 comes without an open file"),
        ([op(SEEK, 0)], "operation 4 comes without an open file"),
        ([op(ADD, 0)], "operation 3 comes without an open file"),
        ([op(6, 0)], "no operation 6"),
        ([op(255, 0)], "no operation 255"),
        ([b"\x00" + b"\x80" * 10 + b"\x01"], "a number of more than 10 bytes"),
        ([b"\x00\x80"], "ends inside of an operation"),
        ([b"\x00"], "ends inside of an operation"),
        ([op(DATA, 5, b"abcd")], "ends inside of an operation"),
        ([op(OPEN, 5, b"tw")], "ends inside of an operation"),
        ([op(OPEN, 3, b"two"), op(ADD, 5, b"abcd")], "ends inside of an operation"),
        ([op(OPEN, 3, b"two"), op(DICT, 5, b"")], "ends inside of an operation"),
        ([op(OPEN, 3, b"two"), op(DICT, 5, b"nonse")], "not zstd data"),
        ([op(OPEN, 3, b"two"), op(DICT, 0)], "empty instead of zstd data"),
        ([op(OPEN, 3, b"two"), op(COPY, 2**63)], "9223372036854775808 bytes at 0"),
    ],
)
def test_a_malformed_program_is_refused(operations: list[bytes], complaint: str) -> None:
    with pytest.raises(InvalidLayer, match=complaint):
        output(program(*operations), FILES)


@pytest.mark.parametrize(
    "blob", [b"", b"tardf", b"tardf3\n\0" + frame(b""), b"tardf1\n\0", MAGIC[2] + b"no frame at all"]
)
def test_what_is_no_tar_diff_is_refused(blob: bytes) -> None:
    with pytest.raises(InvalidLayer):
        output(blob)


def test_a_program_that_is_cut_is_refused_wherever_it_is_cut() -> None:
    blob = program(op(OPEN, 3, b"two"), op(COPY, 4), op(DATA, 300, random.Random(5).randbytes(300)))
    assert len(output(blob, FILES)) == 304
    for length in range(len(blob)):
        with pytest.raises(InvalidLayer):
            output(blob[:length], FILES)


def test_output_is_bounded() -> None:
    blob = program(op(OPEN, 7, b"etc/one"), op(COPY, 1024), op(SEEK, 0), op(COPY, 1024))
    assert len(output(blob, FILES, limit=2048)) == 2048
    with pytest.raises(InvalidLayer, match="more than 2047 bytes"):
        output(blob, FILES, limit=2047)


def test_bases_of_patches_count_as_output() -> None:
    patch = patch_of(FILES[b"etc/one"], b"x")
    one = op(OPEN, 7, b"etc/one") + op(DICT, len(patch), patch)
    with pytest.raises(InvalidLayer, match="more than 10000 bytes"):
        output(program(one * 10), FILES, limit=10_000)


def test_operations_without_output_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tardiff, "_FREE_OPERATIONS", 1000)
    assert output(program(op(OPEN, 3, b"two"), op(SEEK, 1) * 999), FILES) == b""
    with pytest.raises(InvalidLayer, match="0 bytes in 1001 operations"):
        output(program(op(OPEN, 3, b"two"), op(SEEK, 1) * 1000), FILES)
    assert len(output(program(op(DATA, 16, bytes(16)) * 5000), FILES)) == 80_000


def test_bases_and_results_of_patches_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tardiff, "MAX_BASE", 1000)
    patch = patch_of(b"base", bytes(1001))
    with pytest.raises(InvalidLayer, match="decodes to more than 1000"):
        output(program(op(OPEN, 3, b"two"), op(DICT, len(patch), patch)), FILES)
    with pytest.raises(InvalidLayer, match="a patch for a file of 1024 bytes"):
        output(program(op(OPEN, 7, b"etc/one"), op(DICT, len(patch), patch)), FILES)


@pytest.mark.parametrize("operation", [op(COPY, 20), op(ADD, 20, bytes(20)), op(DICT, 1, b"x")])
def test_a_source_file_that_is_shorter_than_it_claims_ends_the_program(operation: bytes) -> None:
    with pytest.raises(InvalidLayer, match="shorter"):
        output(program(op(OPEN, 1, b"f"), operation), {b"f": Memory(b"ten bytes.", claims=20)})


def test_errors_of_source_files_pass() -> None:
    class Damaged(Memory):
        def pread(self, n: int, offset: int) -> bytes:
            raise FormatError("damaged")

    with pytest.raises(FormatError, match="damaged"):
        output(program(op(OPEN, 1, b"f"), op(COPY, 1)), {b"f": Damaged(b"x")})


def test_memory_stays_flat_whatever_a_program_says() -> None:
    files: dict[bytes, bytes | Memory] = {b"f": bytes(1 << 20)}
    blob = program(op(OPEN, 1, b"f"), (op(COPY, 1 << 20) + op(SEEK, 0)) * 200, op(DATA, 100 << 20, bytes(100 << 20)))
    file = io.BytesIO(blob)
    tracemalloc.start()
    total = sum(len(piece) for piece in tardiff.apply(file.read, Tree(files).open, LIMIT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 300 << 20
    assert peak < 8 << 20


@given(st.binary(max_size=5000), st.integers(0, 2**32))
def test_sums_are_bytewise_and_wrap(one: bytes, seed: int) -> None:
    two = random.Random(seed).randbytes(len(one))
    assert tardiff.add(one, two) == bytes((a + b) & 255 for a, b in zip(one, two))


@given(st.integers(0, 2**70 - 1))
def test_numbers_are_leb128(number: int) -> None:
    encoded = leb128(number)
    assert encoded[-1] < 0x80 and sum((byte & 0x7F) << 7 * i for i, byte in enumerate(encoded)) == number


STEP = st.one_of(
    st.tuples(st.just("data"), st.binary(max_size=300)),
    st.tuples(st.just("open"), st.sampled_from(sorted(FILES))),
    st.tuples(st.just("copy"), st.integers(0, 2000)),
    st.tuples(st.just("seek"), st.integers(0, 2000)),
    st.tuples(st.just("add"), st.binary(max_size=300)),
    st.tuples(st.just("dict"), st.binary(max_size=300)),
)


@given(st.lists(STEP, max_size=40))
def test_what_the_writer_wrote_the_reader_follows(steps: list[tuple[str, object]]) -> None:
    written: list[bytes] = []
    writer = tardiff.Writer(written.append, 3)
    expected, file, at = bytearray(), b"", -1
    for kind, value in steps:
        if kind == "data":
            writer.data(value)
            expected += value
        elif kind == "open":
            writer.open(value)
            file, at = FILES[value], 0
        elif at < 0:
            continue
        elif kind == "copy":
            n = min(value, len(file) - at)
            writer.copy(n)
            expected += file[at : at + n]
            at += n
        elif kind == "seek":
            at = min(value, len(file))
            writer.seek(at)
        elif kind == "add":
            data = value[: len(file) - at]
            writer.add(data)
            expected += bytes((a + b) & 255 for a, b in zip(data, file[at:]))
            at += len(data)
        else:
            writer.dict(patch_of(file, value))
            expected += value
            at = len(file)
    writer.finish()
    assert output(b"".join(written), FILES) == bytes(expected)


@settings(max_examples=300)
@given(st.binary(max_size=400), st.sampled_from([1, 2]))
def test_nothing_but_the_engines_errors_comes_out_of_noise(noise: bytes, version: int) -> None:
    with contextlib.suppress(EngineError):
        output(MAGIC[version] + frame(noise), FILES, limit=1 << 24)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_golden_programs_are_read_as_ever(name: str) -> None:
    blob, expected = GOLDEN[name]
    assert output(bytes.fromhex(blob), dict(GOLDEN_FILES)) == expected
