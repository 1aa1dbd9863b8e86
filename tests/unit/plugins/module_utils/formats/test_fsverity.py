# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import os
import random
import shutil
import struct
import subprocess
import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    FormatError,
    IncompatibleRepository,
    VerityUnsupported,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.fsverity import SHA256, SHA512, Algorithm

both = pytest.mark.parametrize("algorithm", [SHA256, SHA512], ids=lambda a: a.name)

EMPTY = {
    "sha256": "3d248ca542a24fc62d1c43b916eae5016878e2533c88238480b26128a1f1af95",
    "sha512": "ccf9e5aea1c2a64efa2f2354a6024b90dffde6bbc017825045dce374474e13d10adb9dadcc6ca8e17a3c075fbd31336e8f266ae6fa93a6c3bed66f9e784e5abf",
}
HELLO = {
    "sha256": "1e2eaa4202d750a41174ee454970b92c1bc2f925b1e35076d8c7d5f56362ba64",
    "sha512": "18430270729d162d4e469daca123ae61893db4b0583d8f7081e3bf4f92b88ba514e7982f10733fb6aa895195c5ae8fd2eb2c47a8be05513ce5a0c51a6f570409",
}
# Of bytes(i % 251 for i in range(n)); the SHA-512 ones are their first 16 bytes.
PATTERN = {
    1: ("b803429503d95915829b29fdbc8bbad142f3abfd11b1cadf5526582e685c0551", "9fcf5172b085b1c8f9365eecb37a1869"),
    4095: ("5f4953aad672b0188023d6cd6fbce9d09508eb7dad165b6298ce0086bc1e72db", "1f4a9ea21af349cae1d1aa1ce4e560ce"),
    4096: ("13e9b8848ae484a36acb3f3cac0ceb2f7601e96633d15c92f9bd3dd44e492157", "7bf994782b368ecc4e20ce9144701b1a"),
    4097: ("b0d074abef4d544404facfab6ba242f6a8ccbde90f1325cd286f3c8aa8d0f8aa", "97a1e45daaa69bd7b31908cf835318ba"),
    262144: ("879749b06517756efddf41c469e4b6411861a48729b345e0bee05590bdf54b94", "f3d1adb48d9e641487f0674034e494b8"),
    262145: ("3a184208d2025273795779ebbea5a31c8edecdb33646aaad46c66d089f8b9eed", "db774f463acc1e672e4da91d045eb146"),
    524288: ("d82861203d50ae9b60948504a704f35f5118bd229aeb1a22d6dae47b1767c4c4", "7b3d245f9dc3169e2f721fa32f735149"),
    524289: ("4dc6905041c9c4ee73e13b53f63f5d289c46da359b664a965ead7f8cc4d799d4", "60b58fe0f1e5198627ffb6be091eef60"),
}
CYCLE = bytes(i % 251 for i in range(251 * 64))


def pattern(size: int) -> bytes:
    return (CYCLE * (size // len(CYCLE) + 1))[:size]


def streamed(data: bytes, algorithm: Algorithm) -> bytes:
    hasher = fsverity.Hasher(algorithm)
    hasher.update(data)
    return hasher.digest()


def textbook(data: bytes, algorithm: Algorithm) -> bytes:
    """The definition, level by level over the whole file, in its plainest form."""

    def level(blocks: bytes) -> list[bytes]:
        return [
            hashlib.new(algorithm.name, blocks[i : i + 4096].ljust(4096, b"\0")).digest()
            for i in range(0, len(blocks), 4096)
        ]

    hashes = level(data)
    while len(hashes) > 1:
        hashes = level(b"".join(hashes))
    root = hashes[0] if hashes else bytes(algorithm.size)
    descriptor = struct.pack("<BBBBIQ64s32s144s", 1, algorithm.id, 12, 0, 0, len(data), root, b"", b"")
    return hashlib.new(algorithm.name, descriptor).digest()


# --- digests
# --------------------------------------------------------------------------------------------------------------------


@both
def test_an_empty_file_has_a_zero_root_not_the_hash_of_a_zero_block(algorithm: Algorithm) -> None:
    assert fsverity.digest(b"", algorithm).hex() == EMPTY[algorithm.name]
    assert fsverity.Hasher(algorithm).digest().hex() == EMPTY[algorithm.name]


@both
def test_hello_world(algorithm: Algorithm) -> None:
    assert fsverity.digest(b"hello world", algorithm).hex() == HELLO[algorithm.name]


@pytest.mark.parametrize("size", PATTERN)
def test_pinned_digests_around_every_boundary(size: int) -> None:
    data = pattern(size)
    assert fsverity.digest(data, SHA256).hex() == PATTERN[size][0]
    assert fsverity.digest(data, SHA512).hex().startswith(PATTERN[size][1])
    assert [streamed(data, algorithm) for algorithm in (SHA256, SHA512)] == [
        fsverity.digest(data, algorithm) for algorithm in (SHA256, SHA512)
    ]


def test_a_third_level_begins_one_byte_after_128_times_128_blocks() -> None:
    full = memoryview(CYCLE * 67)[: 251 * 4096]
    hashers = [fsverity.Hasher(SHA256), fsverity.Hasher(SHA512)]
    left = 67108865
    while left:
        piece = full[: min(left, len(full))]
        for hasher in hashers:
            hasher.update(piece)
        left -= len(piece)
    assert hashers[0].digest().hex() == "acba6554fbff4e8b2fc0361086b9e8ed6afbbd3196ade159c0f3e2bf9ecb2ed1"
    assert hashers[1].digest().hex().startswith("8fedd4f06e533c604401fab2dd3cb545")


@both
@pytest.mark.parametrize("blocks", [1, 2, 63, 64, 65, 127, 128, 129, 64 * 3, 128 * 3])
def test_exactly_full_levels_do_not_add_a_level(algorithm: Algorithm, blocks: int) -> None:
    data = pattern(blocks * 4096)
    assert fsverity.digest(data, algorithm) == streamed(data, algorithm) == textbook(data, algorithm)


@pytest.mark.parametrize("blocks", [64 * 64 - 1, 64 * 64, 64 * 64 + 1, 64 * 65])
def test_two_full_levels_do_not_add_a_third(blocks: int) -> None:
    data = pattern(blocks * 4096)
    assert fsverity.digest(data, SHA512) == streamed(data, SHA512) == textbook(data, SHA512)


@both
def test_any_kind_of_bytes_gives_the_same_digest(algorithm: Algorithm) -> None:
    for size in (5, 4096, 10000):
        data = pattern(size)
        padded = memoryview(b"xyz" + data + b"xyz")[3:-3]
        assert {
            fsverity.digest(form, algorithm) for form in (data, bytearray(data), padded, memoryview(bytearray(data)))
        } == {textbook(data, algorithm)}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([SHA256, SHA512]), st.binary(min_size=1, max_size=50), st.lists(st.integers(0, 40000), max_size=12)
)
def test_streaming_does_not_depend_on_how_the_input_is_cut(algorithm: Algorithm, seed: bytes, sizes: list[int]) -> None:
    data = (seed * (sum(sizes) // len(seed) + 1))[: sum(sizes)]
    hasher = fsverity.Hasher(algorithm)
    for end, size in zip(itertools.accumulate(sizes), sizes):
        hasher.update(memoryview(data)[end - size : end])
        assert hasher.length == end
    assert hasher.digest() == textbook(data, algorithm) == fsverity.digest(data, algorithm)


@both
def test_asking_for_the_digest_does_not_end_the_stream(algorithm: Algorithm) -> None:
    data = pattern(600000)
    hasher = fsverity.Hasher(algorithm)
    for at in range(0, len(data), 70000):
        hasher.update(data[at : at + 70000])
        assert hasher.digest() == textbook(data[: at + 70000], algorithm)


def test_the_hasher_does_not_hold_on_to_the_buffer_it_was_fed_from() -> None:
    buffer = bytearray(b"a" * 5000)
    hasher = fsverity.Hasher(SHA256)
    hasher.update(buffer)
    buffer[:] = b"b" * 5000
    buffer.clear()  # would raise BufferError if a view of it were left
    assert hasher.digest() == textbook(b"a" * 5000, SHA256)


def test_memory_does_not_grow_with_the_file() -> None:
    class Counting:
        """Stands for a hash, so that the tree of 10 GiB can be grown in no time: the leaves are what is skipped."""

        def __init__(self, data: bytes = b"") -> None:
            pass

        def digest(self) -> bytes:
            return bytes(32)

    hasher = fsverity.Hasher(SHA256._replace(new=Counting))
    hashes = bytes(32 * 256)
    tracemalloc.start()
    for _run in range(10 << 10):
        fsverity._push(hasher._levels, 0, hashes, hasher.algorithm)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(hasher._levels) == 4
    assert peak < 200_000


@both
@pytest.mark.parametrize("size", [0, 1, 4096, 4097, 300001, 128 * 4096, 128 * 4096 + 1, 64 * 4096, 64 * 4096 + 1])
def test_the_fsverity_program_agrees(algorithm: Algorithm, size: int, tmp_path: os.PathLike[str]) -> None:
    program = shutil.which("fsverity")
    if program is None:
        pytest.skip("the fsverity program (package fsverity or fsverity-utils) is not installed")
    path = os.path.join(tmp_path, "file")
    with open(path, "wb") as file:
        file.write(pattern(size))
    command = [program, "digest", "--compact", f"--hash-alg={algorithm.name}", "--block-size=4096", path]
    assert (
        subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode().strip()
        == fsverity.digest(pattern(size), algorithm).hex()
    )


# --- names
# --------------------------------------------------------------------------------------------------------------------


@both
def test_meta_json_names(algorithm: Algorithm) -> None:
    assert algorithm.meta_name == f"fsverity-{algorithm.name}-12"
    assert fsverity.algorithm_from_meta(algorithm.meta_name) is algorithm
    assert fsverity.algorithm_from_meta(f"fsverity-{algorithm.name}-+012") is algorithm


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256",
        "sha256-12",
        "fsverity-sha256",
        "fsverity-sha256-",
        "fsverity-sha256-x",
        "fsverity-sha256-12 ",
        "fsverity-12",
    ],
)
def test_a_malformed_algorithm_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        fsverity.algorithm_from_meta(text)


@pytest.mark.parametrize(
    "text",
    [
        "fsverity-sha384-12",
        "fsverity-sha256-16",
        "fsverity-sha256-120",
        "fsverity--12",
        "fsverity-sha256-1-12",
        "fsverity-SHA256-12",
    ],
)
def test_an_unknown_algorithm_or_block_size_is_incompatible(text: str) -> None:
    with pytest.raises(IncompatibleRepository):
        fsverity.algorithm_from_meta(text)


@both
def test_object_paths_go_both_ways_and_only_their_end_counts(algorithm: Algorithm) -> None:
    digest = bytes(range(100, 100 + algorithm.size))
    path = fsverity.object_path(digest)
    assert path == f"64/{digest[1:].hex()}"
    for prefix in ("", "objects/", "../objects/", "../../anything/", "zz"):
        assert fsverity.parse_object_path(prefix + path, algorithm) == digest
    assert fsverity.parse_object_path(path.upper(), algorithm) == digest


@both
def test_what_is_not_an_object_path_is_refused(algorithm: Algorithm) -> None:
    good = fsverity.object_path(bytes(algorithm.size))
    bad = [
        "",
        "/",
        good[1:],
        good + "/",
        good.replace("/", "0"),
        good[:-2] + "  ",
        good[:-1] + "g",
        "0" + good[:-1],
        good[:-1] + "\u0661",
        good[:-1] + "\n",
    ]
    for text in bad:
        with pytest.raises(FormatError):
            fsverity.parse_object_path(text, algorithm)


@both
def test_hex_is_exactly_two_digits_a_byte(algorithm: Algorithm) -> None:
    digest = bytes(range(160, 160 + algorithm.size))
    assert fsverity.parse_hex(digest.hex(), algorithm) == fsverity.parse_hex(digest.hex().upper(), algorithm) == digest
    for text in (
        "",
        digest.hex()[:-2],
        digest.hex() + "00",
        " " + digest.hex()[:-1],
        digest.hex()[:-3] + " 00",
        "sha256:" + digest.hex(),
    ):
        with pytest.raises(FormatError):
            fsverity.parse_hex(text, algorithm)


# --- the kernel, played
# ----------------------------------------------------------------------------------------------------------------------


class Kernel:
    """Stands for fcntl.ioctl: answers each call with the next of ``answers`` (an errno, or bytes to fill the buffer
    with) and keeps the requests.
    """

    def __init__(self, *answers: object) -> None:
        self.answers = list(answers)
        self.calls: list[tuple[int, int, bytes]] = []

    def __call__(self, fd: int, request: int, argument: bytes | bytearray, mutate: bool = True) -> int:
        self.calls.append((fd, request, bytes(argument)))
        answer = self.answers.pop(0)
        if isinstance(answer, int) and answer:
            raise OSError(answer, os.strerror(answer))
        if isinstance(answer, bytes):
            assert isinstance(argument, bytearray) and mutate
            assert len(answer) <= len(argument)
            argument[: len(answer)] = answer
        return 0


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    played = Kernel()
    monkeypatch.setattr(fcntl, "ioctl", played)
    monkeypatch.setattr(fsverity.time, "sleep", lambda _seconds: None)
    return played


@both
def test_enable_asks_for_4096_byte_blocks_without_salt_or_signature(kernel: Kernel, algorithm: Algorithm) -> None:
    kernel.answers = [0]
    assert fsverity.enable(7, algorithm) is True
    assert kernel.calls == [
        (7, fsverity._ENABLE, struct.pack("=IIIIQIIQ88s", 1, algorithm.id, 4096, 0, 0, 0, 0, 0, b""))
    ]


def test_the_request_numbers_follow_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine, enable in (
        ("x86_64", 0x40806685),
        ("aarch64", 0x40806685),
        ("s390x", 0x40806685),
        ("riscv64", 0x40806685),
        ("ppc64le", 0x80806685),
    ):
        monkeypatch.setattr(os, "uname", lambda machine=machine: os.uname_result(("Linux", "", "", "", machine)))
        assert fsverity._request(False, True, 133, 128) == enable
        assert fsverity._request(True, True, 134, 4) == 0xC0046686


def test_a_file_that_is_sealed_already_counts_as_sealed(kernel: Kernel) -> None:
    kernel.answers = [errno.EEXIST]
    assert fsverity.enable(7, SHA256) is True


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EOPNOTSUPP, errno.ENOPKG])
def test_enable_says_when_the_file_system_has_no_verity(kernel: Kernel, number: int) -> None:
    kernel.answers = [number]
    with pytest.raises(VerityUnsupported):
        fsverity.enable(7, SHA256)


def test_a_file_still_open_for_writing_for_a_moment_is_tried_again(kernel: Kernel) -> None:
    kernel.answers = [errno.ETXTBSY, errno.ETXTBSY, 0]
    assert fsverity.enable(7, SHA256) is True
    assert len(kernel.calls) == 3


def test_a_file_that_stays_open_for_writing_ends_the_tries(kernel: Kernel) -> None:
    kernel.answers = [errno.ETXTBSY] * 100
    with pytest.raises(OSError) as caught:
        fsverity.enable(7, SHA256)
    assert caught.value.errno == errno.ETXTBSY
    assert 3 <= len(kernel.calls) <= 10


@pytest.mark.parametrize("number", [errno.EKEYREJECTED, errno.EIO, errno.ENOSPC, errno.EROFS])
def test_other_errors_of_enable_are_not_tried_again(kernel: Kernel, number: int) -> None:
    kernel.answers = [number]
    with pytest.raises(OSError) as caught:
        fsverity.enable(7, SHA256)
    assert caught.value.errno == number


@both
def test_measure_returns_what_the_kernel_enforces(kernel: Kernel, algorithm: Algorithm) -> None:
    digest = bytes(range(algorithm.size))
    kernel.answers = [struct.pack("=HH", algorithm.id, algorithm.size) + digest]
    assert fsverity.measure(9, algorithm) == digest
    (call,) = kernel.calls
    assert call[:2] == (9, 0xC0046686)
    assert struct.unpack_from("=HH", call[2])[1] == algorithm.size == len(call[2]) - 4


def test_measure_says_none_for_a_file_without_verity(kernel: Kernel) -> None:
    kernel.answers = [errno.ENODATA]
    assert fsverity.measure(9, SHA256) is None


@pytest.mark.parametrize("number", [errno.ENOTTY, errno.EOPNOTSUPP])
def test_measure_says_when_the_file_system_has_no_verity(kernel: Kernel, number: int) -> None:
    kernel.answers = [number]
    with pytest.raises(VerityUnsupported):
        fsverity.measure(9, SHA256)


def test_a_sha512_file_in_a_sha256_repository_is_a_mismatch_not_missing(kernel: Kernel) -> None:
    kernel.answers = [errno.EOVERFLOW]
    with pytest.raises(DigestMismatch):
        fsverity.measure(9, SHA256)


def test_a_sha256_file_in_a_sha512_repository_is_a_mismatch_not_missing(kernel: Kernel) -> None:
    kernel.answers = [struct.pack("=HH", 1, 32) + bytes(32)]
    with pytest.raises(DigestMismatch):
        fsverity.measure(9, SHA512)


# --- the kernel, real
# --------------------------------------------------------------------------------------------------------------------


@both
def test_the_real_kernel_seals_and_measures_or_says_that_it_cannot(
    algorithm: Algorithm, tmp_path: os.PathLike[str]
) -> None:
    path = os.path.join(tmp_path, "file")
    with open(path, "wb") as file:
        file.write(b"hello world")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            assert fsverity.measure(fd, algorithm) is None
            assert fsverity.enable(fd, algorithm) is True
        except VerityUnsupported:
            pytest.skip("the file system of the temporary directory has no fs-verity")
        assert fsverity.enable(fd, algorithm) is True
        assert fsverity.measure(fd, algorithm) == fsverity.digest(b"hello world", algorithm)
        with pytest.raises(DigestMismatch):
            fsverity.measure(fd, SHA512 if algorithm is SHA256 else SHA256)
    finally:
        os.close(fd)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [fsverity.SHA256, fsverity.SHA512], ids=lambda one: one.name)
def test_zeros_count_as_if_they_had_been_given(algorithm: fsverity.Algorithm) -> None:
    dice = random.Random(5)
    block = fsverity.BLOCK
    sizes = [0, 1, block - 1, block, block + 1, 63 * block, 64 * block, 65 * block, 128 * block, 129 * block + 7]
    for _round in range(60):
        short, plain = fsverity.Hasher(algorithm), fsverity.Hasher(algorithm)
        for _piece in range(dice.randrange(1, 6)):
            size = dice.choice(sizes) + dice.choice((0, 0, 8192 * block))
            if dice.random() < 0.6:
                short.zeros(size)
                plain.update(bytes(size))
            else:
                data = dice.randbytes(size % 70_000)
                short.update(data)
                plain.update(data)
        assert short.digest() == plain.digest() and short.length == plain.length


def test_a_hole_larger_than_any_disk_takes_no_time() -> None:
    hasher = fsverity.Hasher(fsverity.SHA256)
    started = time.process_time()
    hasher.zeros(1 << 60)
    hasher.update(b"x")
    assert len(hasher.digest()) == 32 and hasher.length == (1 << 60) + 1
    assert time.process_time() - started < 5
