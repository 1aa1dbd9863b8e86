# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One layer from a pipe: what is stored, and what is refused and why."""

from __future__ import annotations

import gzip
import hashlib
import os
import pathlib
import random
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.pull import layer
from ansible_collections.composefs.oci.plugins.module_utils.pull.limits import Budget, Limits, Tally
from ansible_collections.composefs.oci.plugins.module_utils.store import create, proofs
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    FormatError,
    InvalidLayer,
    NoSpace,
    RegistryUnreachable,
    Stalled,
    TooLarge,
)
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import LayerResult, LayerSpec
from ansible_collections.composefs.oci.plugins.module_utils.store.objects import ObjectStore
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, END, header, member, small_tree, tar

TREE = small_tree(seed=3)


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def spec_of(blob: bytes, archive: bytes, compression: str | None = "gzip", **changes: Any) -> LayerSpec:
    return LayerSpec(sha256(blob), len(blob), sha256(archive), compression)._replace(**changes)


@pytest.fixture
def repo(tmp_path: pathlib.Path) -> Iterator[Repository]:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    with Repository.open(str(tmp_path / "repo"), write=True) as found:
        yield found


class Told:
    """What an import tells its caller."""

    def __init__(self) -> None:
        self.bytes: list[int] = []
        self.calls: list[str] = []


def run(
    repo: Repository,
    pieces: bytes | Iterable[bytes],
    spec: LayerSpec,
    *,
    timeout: float = 60.0,
    stay_open: bool = True,
    told: Told | None = None,
    budget: Budget | None = None,
) -> LayerResult:
    """Import what a writer sends; as from skopeo, the pipe stays open after the last byte unless told otherwise."""
    readable, writable = os.pipe()
    done = threading.Event()

    def write() -> None:
        try:
            for piece in [pieces] if isinstance(pieces, bytes) else pieces:
                view = memoryview(piece)
                while view:
                    view = view[os.write(writable, view) :]
            if stay_open:
                done.wait()
        except BrokenPipeError:
            pass
        finally:
            os.close(writable)

    told = told or Told()
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    try:
        return layer.import_layer(
            readable,
            spec,
            repo.objects,
            repo.algorithm,
            timeout,
            told.bytes.append,
            lambda: told.calls.append("silent"),
            lambda: told.calls.append("drained"),
            budget=budget,
        )
    finally:
        done.set()
        thread.join()
        with pytest.raises(OSError):
            os.fstat(readable)  # closed, whatever happened
        assert not [thread for thread in threading.enumerate() if thread.name == "decoder"], (
            "no decoder is left running"
        )


def stored(repo: Repository, result: LayerResult, expect: bytes = splitstream.LAYER) -> bytes:
    with repo.open_object_stream(bytes.fromhex(result.stream), expect) as stream:
        return b"".join(
            chunk if isinstance(chunk, bytes) else repo.objects.read(chunk.digest, 1 << 30) for chunk in stream.chunks()
        )


# --- what is right
# --------------------------------------------------------------------------------------------------------------------


def encoded(archive: bytes, compression: str) -> bytes:
    if compression == "zstd":
        return bytes(pytest.importorskip("zstandard").ZstdCompressor().compress(archive))
    return gzip.compress(archive) if compression == "gzip" else archive


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd"])
def test_a_layer_gives_back_its_exact_tar(repo: Repository, compression: str) -> None:
    blob = encoded(TREE, compression)
    told = Told()
    result = run(repo, blob, spec_of(blob, TREE, compression), told=told)
    assert stored(repo, result) == TREE
    assert (result.fetched, result.tar_size, result.restored_padding) == (len(blob), len(TREE), 0)
    assert result.bytes_new + result.bytes_present + result.bytes_inlined == len(TREE)
    assert told.calls == ["drained"] and told.bytes[-1] == len(blob) and told.bytes == sorted(told.bytes)


def test_what_is_there_is_counted_and_not_written_again(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    first = run(repo, blob, spec_of(blob, TREE))
    second = run(repo, blob, spec_of(blob, TREE))
    assert (first.stream, first.objects_new + first.objects_present) == (second.stream, second.objects_present)
    assert (second.objects_new, second.bytes_new) == (0, 0)


def test_every_cut_of_the_transfer_gives_the_same_stream(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    whole = run(repo, blob, spec_of(blob, TREE))
    chance = random.Random(7)
    cuts = sorted(chance.sample(range(len(blob)), 40))
    pieces = [blob[a:b] for a, b in zip([0, *cuts], [*cuts, len(blob)])]
    assert run(repo, pieces, spec_of(blob, TREE)).stream == whole.stream


def test_an_empty_layer_of_no_bytes_at_all(repo: Repository) -> None:
    result = run(repo, b"", spec_of(b"", b"", "none"))
    assert stored(repo, result) == b"" and result.fetched == 0


@pytest.mark.parametrize("archive", [b"", END, tar()], ids=["nothing", "end marker", "record"])
def test_layers_without_entries(repo: Repository, archive: bytes) -> None:
    blob = gzip.compress(archive)
    assert stored(repo, run(repo, blob, spec_of(blob, archive))) == archive


def test_what_follows_the_end_marker_is_kept(repo: Repository) -> None:
    archive = tar(member("a", b"x" * 100), record=False) + b"anything\0after" * 50
    blob = gzip.compress(archive)
    assert stored(repo, run(repo, blob, spec_of(blob, archive))) == archive


def test_a_raw_blob_is_one_object_in_a_stream_of_its_own_type(repo: Repository) -> None:
    blob = random.Random(1).randbytes(300_000)
    result = run(repo, blob, LayerSpec(sha256(blob), len(blob), sha256(blob), None))
    assert stored(repo, result, splitstream.BLOB) == blob
    assert (result.objects_new, result.bytes_new, result.bytes_inlined) == (1, len(blob), 0)


def test_a_small_raw_blob_is_an_object_too(repo: Repository) -> None:
    result = run(repo, b"{}", LayerSpec(sha256(b"{}"), 2, sha256(b"{}"), None))
    with repo.open_object_stream(bytes.fromhex(result.stream), splitstream.BLOB) as stream:
        (chunk,) = stream.chunks()
        assert not isinstance(chunk, bytes)


def test_a_secure_repository_seals_every_object_of_a_layer(tmp_path: pathlib.Path, verity_kernel: Any) -> None:
    create.prepare(str(tmp_path / "secure"), fsverity.SHA512, "required")
    blob = gzip.compress(TREE)
    with Repository.open(str(tmp_path / "secure"), write=True) as repo:
        assert repo.secure
        for hash_first in (False, True):
            repo.objects.hash_first = hash_first
            assert stored(repo, run(repo, blob, spec_of(blob, TREE))) == TREE
    objects = list((tmp_path / "secure/objects").glob("*/*"))
    assert objects and all(verity_kernel.is_sealed(str(path)) for path in objects)


# --- what is wrong, and who is blamed
# --------------------------------------------------------------------------------------------------------


def test_a_wrong_blob_digest_is_named(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    with pytest.raises(DigestMismatch, match="digest sha256:[0-9a-f]{64} where the manifest says sha256:0000"):
        run(repo, blob, spec_of(blob, TREE, digest="sha256:" + "0" * 64))


def test_a_wrong_diff_id_is_named(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    with pytest.raises(DigestMismatch, match=f"as announced.*{sha256(TREE)}.*configuration says sha256:1111"):
        run(repo, blob, spec_of(blob, TREE, diff_id="sha256:" + "1" * 64))


def test_a_decode_error_in_a_blob_with_the_wrong_digest_blames_the_digest(repo: Repository) -> None:
    blob = bytearray(gzip.compress(TREE))
    spec = spec_of(bytes(blob), TREE)
    blob[len(blob) // 2] ^= 0xFF
    with pytest.raises(DigestMismatch, match="where the manifest says") as caught:
        run(repo, bytes(blob), spec)
    assert "(" in caught.value.message, "what was found inside is told as well"


def test_a_decode_error_in_the_announced_blob_is_the_layers_fault(repo: Repository) -> None:
    blob = bytearray(gzip.compress(TREE))
    blob[len(blob) // 2] ^= 0xFF
    with pytest.raises(InvalidLayer):
        run(repo, bytes(blob), spec_of(bytes(blob), TREE))


def test_an_announced_size_that_is_too_small_blames_the_digest(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    with pytest.raises(DigestMismatch, match="where the manifest says"):
        run(repo, blob, spec_of(blob, TREE, size=len(blob) - 10))


def test_a_pipe_that_ends_early_says_how_far_it_came(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    with pytest.raises(RegistryUnreachable, match=f"ended after {len(blob)} of {len(blob) + 5} bytes"):
        run(repo, blob, spec_of(blob, TREE, size=len(blob) + 5), stay_open=False)


def test_a_broken_tar_in_a_good_blob_is_refused(repo: Repository) -> None:
    archive = tar(member("a", b"x" * 1000))[:1200]
    blob = gzip.compress(archive)
    with pytest.raises(InvalidLayer, match="cut off"):
        run(repo, blob, spec_of(blob, archive))


def test_a_broken_end_of_the_blob_after_a_good_tar_is_refused(repo: Repository) -> None:
    blob = gzip.compress(TREE) + b"garbage"
    with pytest.raises(InvalidLayer):
        run(repo, blob, spec_of(blob, TREE))


def test_the_decoder_is_stopped_when_the_archive_is_bad_long_before_its_end(repo: Repository) -> None:
    """Also where the rest of the blob does not come: the thread must not outlive the import (see run())."""
    archive = header(b"x", 10, b"S") + bytes(512) + small_tree(seed=9) * 50
    blob = gzip.compress(archive)
    start = time.monotonic()
    with pytest.raises((InvalidLayer, Stalled)):
        run(repo, blob[: len(blob) // 2], spec_of(blob, archive), timeout=1.0)
    assert time.monotonic() - start < 60


def test_a_full_disk_stops_the_import_at_once(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> Any:
        raise NoSpace("Storing an object: No space left on device.")

    monkeypatch.setattr(ObjectStore, "_draft", full)
    blob = gzip.compress(TREE)
    # The rest never comes, and nobody waits for it: there is no doubt whose fault it is.
    start = time.monotonic()
    with pytest.raises(NoSpace):
        run(repo, [zlib_half(TREE)], spec_of(blob, TREE, size=10 * len(blob)), timeout=120.0)
    assert time.monotonic() - start < 100


def zlib_half(data: bytes) -> bytes:
    """The beginning of a gzip member that already decodes to all of ``data``."""
    deflate = zlib.compressobj(wbits=31)
    return deflate.compress(data) + deflate.flush(zlib.Z_SYNC_FLUSH)


def test_no_object_is_left_open_after_an_error(repo: Repository) -> None:
    assert repo.objects
    before = sorted(os.listdir("/proc/self/fd"))
    archive = tar(member("big", bytes(200_000)))[:100_000]
    blob = gzip.compress(archive)
    for _time in range(3):
        with pytest.raises(InvalidLayer):
            run(repo, blob, spec_of(blob, archive))
    assert sorted(os.listdir("/proc/self/fd")) == before


# --- silence
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0.0, 0.5])
@pytest.mark.parametrize("compression", ["gzip", None])
def test_silence_is_given_up_after_the_timeout(repo: Repository, sent: float, compression: str | None) -> None:
    blob = gzip.compress(TREE)
    start = time.monotonic()
    with pytest.raises(Stalled, match=r"No data arrived for 0.4 seconds after \d+ of \d+ bytes"):
        run(repo, blob[: int(len(blob) * sent)], spec_of(blob, TREE, compression), timeout=0.4)
    assert time.monotonic() - start < 60


def test_a_silence_is_told_once_so_that_skopeo_can_be_asked(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer, "PROBE_AFTER", 0.0)
    blob = gzip.compress(TREE)

    def slowly() -> Iterator[bytes]:
        yield blob[:100]
        time.sleep(1.2)
        yield blob[100:]

    told = Told()
    assert stored(repo, run(repo, slowly(), spec_of(blob, TREE), told=told)) == TREE
    assert told.calls == ["silent", "drained"]


# --- zeros that were lost
# --------------------------------------------------------------------------------------------------------------------


def test_mistake_27_padding_that_a_recompression_lost_is_restored(repo: Repository) -> None:
    short = TREE[: len(TREE) - 4096]
    assert not any(TREE[-4096:])
    blob = gzip.compress(short)
    result = run(repo, blob, spec_of(blob, TREE))
    assert result.restored_padding == 4096 and stored(repo, result) == TREE
    assert result.tar_size == len(TREE)


@pytest.mark.parametrize("lost", [100, layer.PADDING_LIMIT + 512])
def test_padding_is_restored_in_blocks_and_up_to_a_limit_only(repo: Repository, lost: int) -> None:
    archive = tar(member("a", b"x" * 100), record=False)
    blob = gzip.compress(archive)
    with pytest.raises(DigestMismatch):
        run(repo, blob, spec_of(blob, archive + bytes(lost)))


def test_padding_is_not_tried_where_the_archive_did_not_end_with_zeros(repo: Repository) -> None:
    archive = tar(member("a", b"x" * 100), record=False) + b"x" * 512
    blob = gzip.compress(archive)
    with pytest.raises(DigestMismatch):
        run(repo, blob, spec_of(blob, archive + bytes(512)))


# --- proofs of what is stored
# ----------------------------------------------------------------------------------------------------------------


def test_the_digest_of_a_stored_layer_is_that_of_its_tar(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    result = run(repo, blob, spec_of(blob, TREE))
    with repo.open_object_stream(bytes.fromhex(result.stream)) as stream:
        assert "sha256:" + proofs.tar_sha256(stream, repo.objects) == sha256(TREE)


def test_the_digest_of_a_stored_layer_without_one_of_its_objects_is_an_error(repo: Repository) -> None:
    blob = gzip.compress(TREE)
    result = run(repo, blob, spec_of(blob, TREE))
    victim = fsverity.object_path(fsverity.digest(b"#!/bin/sh\necho tool\n" * 20, fsverity.SHA256))
    os.unlink(victim, dir_fd=repo.objects.dirfd)
    with repo.open_object_stream(bytes.fromhex(result.stream)) as stream, pytest.raises(FormatError, match="missing"):
        proofs.tar_sha256(stream, repo.objects)


def test_a_damaged_stream_object_is_written_anew_by_an_import(repo: Repository, tmp_path: pathlib.Path) -> None:
    blob = gzip.compress(TREE)
    result = run(repo, blob, spec_of(blob, TREE))
    path = tmp_path / "repo/objects" / fsverity.object_path(bytes.fromhex(result.stream))
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(damaged)
    assert run(repo, blob, spec_of(blob, TREE)).stream == result.stream
    assert stored(repo, result) == TREE


# --- memory
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_stays_flat_whatever_the_size_of_a_file(repo: Repository) -> None:
    """300 MB of zeros in one file: a megabyte as a blob, and never more than a few megabytes at once on the way."""
    size = 300_000_000
    deflate = zlib.compressobj(1, wbits=31)
    digest = hashlib.sha256()
    parts = []
    piece = bytes(1 << 20)

    def add(data: bytes) -> None:
        digest.update(data)
        parts.append(deflate.compress(data))

    add(header(b"zeros", size))
    for _number in range(size >> 20):
        add(piece)
    add(bytes(size & ((1 << 20) - 1)) + bytes(-size % 512) + END)
    blob = b"".join(parts) + deflate.flush()
    spec = LayerSpec(sha256(blob), len(blob), "sha256:" + digest.hexdigest(), "gzip")
    parts.clear()
    tracemalloc.start()
    try:
        result = run(repo, blob, spec, timeout=30.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.bytes_new == size
    assert peak < 24_000_000, f"{peak} bytes were in use"


@pytest.mark.slow
def test_memory_stays_flat_whatever_the_number_of_files(tmp_path: pathlib.Path) -> None:
    """In a process of its own, whose largest size the kernel knows; many files that all have one content."""
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    script = """
import hashlib, os, resource, sys, threading, zlib
sys.path[:0] = %r
import conftest
from ansible_collections.composefs.oci.plugins.module_utils.pull import layer
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import END, header
data = b"a" * 512
deflate, digest, parts = zlib.compressobj(1, wbits=31), hashlib.sha256(), []
for number in range(int(sys.argv[2])):
    entry = header(b"f%%d" %% number, 512) + data
    digest.update(entry)
    parts.append(deflate.compress(entry))
digest.update(END)
blob = b"".join([*parts, deflate.compress(END), deflate.flush()])
spec = layer.LayerSpec("sha256:" + hashlib.sha256(blob).hexdigest(), len(blob), "sha256:" + digest.hexdigest(), "gzip")
r, w = os.pipe()
def write(rest=memoryview(blob)):
    while rest:
        rest = rest[os.write(w, rest):]
threading.Thread(target=write, daemon=True).start()
with Repository.open(sys.argv[1], write=True) as repo:
    objects = repo.objects
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layer.import_layer(r, spec, objects, repo.algorithm, 20.0, lambda n: None, lambda: None, lambda: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    places = [str(pathlib.Path(__file__).resolve().parents[3]), *(path for path in sys.path if path)]

    def growth(files: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", script % places, str(tmp_path / "repo"), str(files)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    small, large = growth(1000), growth(20_000)
    assert large - small < 12_000, f"{small} KiB for 1,000 files, {large} KiB for 20,000"


def test_directories_and_links_need_no_objects(repo: Repository) -> None:
    archive = tar(*(member(f"d{number}/", type=DIRECTORY) for number in range(50)))
    blob = gzip.compress(archive)
    result = run(repo, blob, spec_of(blob, archive))
    assert (result.objects_new, result.objects_present, result.bytes_inlined) == (0, 0, len(archive))


# --- bounds
# --------------------------------------------------------------------------------------------------------------------

LARGE = os.urandom(3_000_000)


def bounded(**values: Any) -> Budget:
    return Budget(Limits(**values), Tally(1))


def layer_of(archive: bytes) -> tuple[bytes, LayerSpec]:
    blob = encoded(archive, "gzip")
    return blob, spec_of(blob, archive)


@pytest.mark.slow
def test_a_layer_that_unpacks_to_more_than_is_allowed_is_refused_on_the_way(repo: Repository) -> None:
    archive = tar(member("usr/zeros", bytes(200 << 20)))
    told = Told()
    with pytest.raises(TooLarge, match="1048576 bytes"):
        run(repo, *layer_of(archive), budget=bounded(max_size=1 << 20), told=told)
    assert repo.objects.stats.bytes_new < 1 << 20


def test_a_layer_needs_the_room_of_what_is_new_in_it(repo: Repository) -> None:
    archive = tar(member("usr/large", LARGE), *(member(f"usr/{n}", LARGE[: 100_000 + n]) for n in range(20)))
    with pytest.raises(NoSpace, match="were free"):
        run(repo, *layer_of(archive), budget=bounded(free=1_000_000))
    with pytest.raises(NoSpace, match="were free"):
        run(repo, *layer_of(archive), budget=bounded(free=4_000_000))
    run(repo, *layer_of(archive), budget=bounded(free=6_000_000))
    small = tar(*(member(f"usr/{n}", LARGE[: 100_000 + n]) for n in range(20)))
    run(repo, *layer_of(small), budget=bounded(free=200_000))


def test_a_layer_of_too_many_members_is_refused(repo: Repository) -> None:
    archive = tar(*(member(f"usr/{n}") for n in range(2000)))
    with pytest.raises(TooLarge, match="1000 members"):
        run(repo, *layer_of(archive), budget=bounded(max_entries=1000))


def test_a_raw_blob_has_the_same_bounds(repo: Repository) -> None:
    with pytest.raises(TooLarge):
        run(repo, LARGE, spec_of(LARGE, LARGE, None), budget=bounded(max_size=1 << 20))
