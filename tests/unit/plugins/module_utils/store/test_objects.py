# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The object store on a real directory; fs-verity by the stand-in kernel of conftest.py."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath
from ansible_collections.composefs.oci.plugins.module_utils.store import objects
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    DigestMismatch,
    FormatError,
    IOFailed,
    NoSpace,
    VerityUnsupported,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SHA256 = fsverity.SHA256


class Place:
    """A directory for objects, and stores on it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = beneath.Root(os.open(path, os.O_RDONLY | os.O_DIRECTORY), str(path))
        self.stores: list[objects.ObjectStore] = []

    def store(self, verity: bool = False, algorithm: fsverity.Algorithm = SHA256) -> objects.ObjectStore:
        self.stores.append(objects.ObjectStore(self.root, self.root.fd, algorithm, verity=verity, try_verity=True))
        return self.stores[-1]

    def close(self) -> None:
        for store in self.stores:
            store.close()
        self.root.close()

    def file(self, digest: bytes) -> Path:
        return self.path / fsverity.object_path(digest)

    def plant(self, digest: bytes, content: bytes) -> Path:
        path = self.file(digest)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.path)) for p in self.path.rglob("*") if not p.is_dir())


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    found = Place(tmp_path)
    yield found
    found.close()


def open_files() -> int:
    """How many descriptors are open but for those of directories, which a store keeps."""
    return sum(not os.path.isdir(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("algorithm", [fsverity.SHA256, fsverity.SHA512], ids=lambda a: a.name)
@pytest.mark.parametrize("size", [0, 1, 65, 4096, 4097, 300_000])
def test_put_stores_bytes_under_their_fs_verity_digest(place: Place, algorithm: fsverity.Algorithm, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    store = place.store(algorithm=algorithm)
    before = open_files()
    digest = store.put(data)
    assert digest == fsverity.digest(data, algorithm)
    assert place.file(digest).read_bytes() == data
    assert place.files() == [fsverity.object_path(digest)]
    assert store.put(memoryview(bytearray(data))) == digest
    assert open_files() == before
    assert store.stats == objects.ObjectStats(new=1, present=1, bytes_new=size, bytes_present=size)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_modes_are_set_whatever_the_umask_is(place: Place, umask: int) -> None:
    old = os.umask(umask)
    try:
        digest = place.store().put(b"x" * 100)
    finally:
        os.umask(old)
    assert stat.S_IMODE(place.file(digest).stat().st_mode) == 0o644
    assert stat.S_IMODE(place.file(digest).parent.stat().st_mode) == 0o755


def test_a_right_object_is_never_written_again(place: Place) -> None:
    store = place.store()
    digest = store.put(b"x" * 100)
    before = place.file(digest).stat()
    store.put(b"x" * 100)
    writer = store.writer()
    writer.write(b"x" * 100)
    assert writer.commit() == (digest, 100)
    after = place.file(digest).stat()
    assert (before.st_ino, before.st_mtime_ns, before.st_ctime_ns) == (
        after.st_ino,
        after.st_mtime_ns,
        after.st_ctime_ns,
    )
    assert (store.stats.new, store.stats.present, store.stats.replaced) == (1, 2, 0)


@pytest.mark.parametrize("seal", [False, True])
def test_objects_are_not_looked_for_where_hardly_any_is_there(
    place: Place, seal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.store()
    store._seal = seal
    monkeypatch.setattr(store, "_seal_draft", lambda draft, digest: None)
    looked: list[bytes] = []
    found = store._state
    monkeypatch.setattr(store, "_state", lambda digest, size: looked.append(digest) or found(digest, size))
    data = [os.urandom(70) for _each in range(400)]
    for one in data:
        store.put(one)
    assert (len(looked) == 400) is seal, "sealing in vain would cost more than looking"
    assert seal or len(looked) < 200
    # What is there is found all the same, whatever it is, and after some of it all is looked for again.
    store.put(data[0])
    place.file(fsverity.digest(data[1], SHA256)).write_bytes(b"short")
    store.put(data[1])
    assert place.file(fsverity.digest(data[1], SHA256)).read_bytes() == data[1]
    assert (store.stats.new, store.stats.present, store.stats.replaced) == (401, 1, 1)
    looked.clear()
    for one in data:
        store.put(one)
    assert len(looked) > 390 and store.stats.present == 401


@pytest.mark.parametrize("streamed", [False, True], ids=["put", "writer"])
def test_without_verity_an_object_of_the_wrong_size_is_replaced_in_one_step(place: Place, streamed: bool) -> None:
    data = b"x" * 100
    path = place.plant(fsverity.digest(data, SHA256), b"x" * 40)
    with path.open("rb") as reader:
        store = place.store()
        if streamed:
            writer = store.writer()
            writer.write(data)
            writer.commit()
        else:
            store.put(data)
        assert reader.read() == b"x" * 40, "who had it open keeps the old file"
    assert path.read_bytes() == data
    assert place.files() == [str(path.relative_to(place.path))]
    assert (store.stats.new, store.stats.replaced) == (1, 1)


def test_a_link_in_the_place_of_an_object_is_replaced(place: Place) -> None:
    data = b"x" * 100
    digest = fsverity.digest(data, SHA256)
    elsewhere = place.plant(digest, b"").with_name("elsewhere")
    place.file(digest).unlink()
    elsewhere.write_bytes(data)
    place.file(digest).symlink_to(elsewhere)
    assert place.store().put(data) == digest
    assert not place.file(digest).is_symlink()
    assert place.file(digest).read_bytes() == data


def test_a_full_disk_in_the_middle_leaves_no_half_object(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    room = [150]

    def short(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "full")
        part = bytes(data)[: room[0]]
        room[0] -= len(part)
        return real(fd, part)

    store = place.store()
    before = open_files()
    monkeypatch.setattr(os, "write", short)
    with pytest.raises(NoSpace, match=r"No space left on device.*Free space"):
        store.put(b"x" * 200)
    room[0] = 150
    writer = store.writer()
    writer.write(b"x" * 100)
    with pytest.raises(NoSpace):
        writer.write(b"x" * 100)
    writer.abort()
    assert place.files() == []
    assert open_files() == before
    room[0] = 1 << 20
    assert place.file(store.put(b"x" * 200)).stat().st_size == 200


def test_a_file_size_limit_is_no_space_too(place: Place) -> None:
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, old[1]))
    try:
        with pytest.raises(NoSpace, match="file size limit"):
            place.store().put(b"x" * 200)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert place.files() == []


def test_short_writes_are_completed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:33]))
    data = bytes(range(200))
    store = place.store()
    assert place.file(store.put(data)).read_bytes() == data
    writer = store.writer()
    writer.write(memoryview(data + b"more"))
    assert place.file(writer.commit()[0]).read_bytes() == data + b"more"


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no unnamed files")
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", refuse)


def test_file_systems_without_unnamed_files_get_a_temporary_name_that_goes_away(
    place: Place, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.store()
    first = store.put(b"x" * 100)
    writer = store.writer()
    assert [name for name in os.listdir(place.path) if name.startswith(objects.TEMPORARY_PREFIX)]
    writer.write(b"y" * 100)
    second = writer.commit()[0]
    store.writer().abort()
    store.put(b"x" * 100)
    place.file(first).write_bytes(b"torn")
    store.put(b"x" * 100)

    def full(fd: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(NoSpace):
        store.put(b"z" * 100)
    assert place.files() == sorted(fsverity.object_path(digest) for digest in (first, second))
    assert place.file(first).read_bytes() == b"x" * 100


def test_processes_that_store_the_same_objects_do_not_disturb_each_other(place: Place) -> None:
    data = [bytes([i]) * 70 for i in range(200)]
    children = []
    for _child in range(3):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            store = place.store()
            for item in data:
                store.put(item)
            os.write(writer, f"{store.stats.new} {store.stats.present}".encode())
            os._exit(0)
        os.close(writer)
        children.append((pid, reader))
    new = present = 0
    for pid, reader in children:
        counts = os.read(reader, 100).split()
        os.close(reader)
        os.waitpid(pid, 0)
        new += int(counts[0])
        present += int(counts[1])
    assert (new, present) == (200, 400)
    assert place.files() == sorted(fsverity.object_path(fsverity.digest(item, SHA256)) for item in data)


def test_an_object_that_appears_between_the_look_and_the_link_is_someone_elses(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b"x" * 100
    digest = fsverity.digest(data, SHA256)
    real = os.link

    def late(source: str, target: str, **options: object) -> None:
        place.plant(digest, data)
        real(source, target, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", late)
    store = place.store()
    assert store.put(data) == digest
    assert (store.stats.new, store.stats.present) == (0, 1)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.binary(max_size=9000), max_size=5), secure=st.booleans(), hash_first=st.booleans())
def test_a_writer_gives_what_put_gives_however_the_content_is_cut(
    place: Place, verity_kernel: Any, pieces: list[bytes], secure: bool, hash_first: bool
) -> None:
    store = place.store(verity=secure)
    store.hash_first = hash_first
    writer = store.writer()
    for piece in pieces:
        writer.write(piece)
    digest, size = writer.commit()
    data = b"".join(pieces)
    assert (digest, size) == (fsverity.digest(data, SHA256), len(data))
    assert place.file(digest).read_bytes() == data
    assert store.put(data) == digest
    assert store.stats.present >= 1


def test_abort_leaves_nothing_and_commit_closes(place: Place) -> None:
    before = open_files()
    writer = place.store().writer()
    writer.write(b"x" * 100)
    writer.abort()
    writer.abort()
    assert place.files() == []
    writer = place.store().writer()
    writer.commit()
    writer.abort()
    assert open_files() == before
    assert len(place.files()) == 1


# --- reading
# --------------------------------------------------------------------------------------------------------------------


def test_contains_looks_at_existence_and_size(place: Place) -> None:
    store = place.store()
    digest = store.put(b"x" * 100)
    assert store.contains(digest) and store.contains(digest, 100)
    assert not store.contains(digest, 99)
    assert not store.contains(bytes(32))


def test_read_proves_the_content_and_keeps_to_the_limit(place: Place) -> None:
    store = place.store()
    digest = store.put(b"x" * 100)
    assert store.read(digest, 100) == b"x" * 100
    with pytest.raises(FormatError, match="larger than the 99 bytes"):
        store.read(digest, 99)
    place.file(digest).write_bytes(b"y" * 100)
    with pytest.raises(FormatError, match="does not have this digest"):
        store.read(digest, 100)
    place.file(digest).unlink()
    with pytest.raises(FormatError, match=r"missing.*pull the images"):
        store.read(digest, 100)
    place.file(digest).mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        store.open(digest)


def test_descriptors_are_not_inherited(place: Place) -> None:
    store = place.store()
    fd = store.open(store.put(b"x" * 100))
    try:
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


def test_verify_hashes_what_is_on_the_disk(place: Place) -> None:
    store = place.store()
    digest = store.put(b"x" * 5000)
    assert store.verify(digest)
    place.file(digest).write_bytes(bytes(5000))
    assert not store.verify(digest)
    assert not store.verify(bytes(32))


def test_names_lists_objects_and_strays(place: Place) -> None:
    store = place.store()
    digest = store.put(b"x" * 100)
    place.file(digest).with_name("stray").touch()
    (place.path / ".tmp-object-1").touch()
    (place.path / "zz").mkdir()
    assert dict(store.names()) == {fsverity.object_path(digest): digest, f"{digest.hex()[:2]}/stray": None}


# --- fs-verity
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hash_first", [False, True])
def test_a_secure_store_seals_and_measures_every_object(place: Place, verity_kernel: Any, hash_first: bool) -> None:
    store = place.store(verity=True)
    store.hash_first = hash_first
    writer = store.writer()
    writer.write(b"y" * 9000)
    for digest in (store.put(b"x" * 100), writer.commit()[0]):
        assert verity_kernel.is_sealed(str(place.file(digest)))
        os.close(store.open(digest))
        assert store.contains(digest)


def test_hashing_first_spares_sealing_what_is_there(place: Place, verity_kernel: Any) -> None:
    store = place.store(verity=True)
    store.put(b"y" * 9000)
    for hash_first in (True, False):
        store.hash_first = hash_first
        verity_kernel.calls.clear()
        writer = store.writer()
        writer.write(b"y" * 9000)
        writer.commit()
        assert (0x40806685 in verity_kernel.calls) is not hash_first
    assert store.stats.present == 2


@pytest.mark.parametrize("streamed", [False, True], ids=["put", "writer"])
@pytest.mark.parametrize("damage", ["unsealed", "other content", "other algorithm", "short"])
def test_a_secure_store_replaces_a_wrong_object_by_a_fresh_sealed_one(
    place: Place, verity_kernel: Any, damage: str, streamed: bool
) -> None:
    data = b"x" * 100
    digest = fsverity.digest(data, SHA256)
    path = place.plant(digest, {"other content": b"y" * 100, "short": b"x"}.get(damage, data))
    if damage != "unsealed":
        verity_kernel.seal(str(path), fsverity.SHA512 if damage == "other algorithm" else SHA256)
    store = place.store(verity=True)
    assert not store.contains(digest)
    if damage != "short":
        with pytest.raises(FormatError, match=r"pull the images"):
            store.open(digest)
    if streamed:
        writer = store.writer()
        writer.write(data)
        writer.commit()
    else:
        store.put(data)
    assert path.read_bytes() == data
    assert verity_kernel.is_sealed(str(path))
    assert store.stats.replaced == 1
    assert store.contains(digest)


def test_a_right_sealed_object_is_left_alone(place: Place, verity_kernel: Any) -> None:
    store = place.store(verity=True)
    inode = place.file(store.put(b"x" * 100)).stat().st_ino
    assert place.file(store.put(b"x" * 100)).stat().st_ino == inode
    assert store.stats == objects.ObjectStats(new=1, present=1, bytes_new=100, bytes_present=100)


def test_required_verity_that_the_file_system_lacks_stores_nothing(place: Place, verity_kernel: Any) -> None:
    verity_kernel.supported = False
    store = place.store(verity=True)
    before = open_files()
    with pytest.raises(VerityUnsupported):
        store.put(b"x" * 100)
    writer = store.writer()
    with pytest.raises(VerityUnsupported):
        writer.commit()
    assert place.files() == []
    assert open_files() == before


def test_preferred_verity_is_asked_for_once_where_there_is_none(place: Place, verity_kernel: Any) -> None:
    verity_kernel.supported = False
    store = place.store()
    writer = store.writer()
    writer.write(b"z" * 5000)
    assert writer.commit()[0] == fsverity.digest(b"z" * 5000, SHA256), "read back and hashed, as the kernel did not"
    for i in range(10):
        store.put(bytes([i]) * 100)
        store.put(bytes([i]) * 100)
    assert len(verity_kernel.calls) == 1


def test_preferred_verity_seals_where_it_works_and_accepts_unsealed_objects(place: Place, verity_kernel: Any) -> None:
    store = place.store()
    assert verity_kernel.is_sealed(str(place.file(store.put(b"x" * 100))))
    old = fsverity.digest(b"old" * 50, SHA256)
    path = place.plant(old, b"old" * 50)
    assert store.put(b"old" * 50) == old
    assert store.stats.present == 1 and not verity_kernel.is_sealed(str(path))
    os.close(store.open(old))


def test_etxtbsy_because_another_process_keeps_the_file_open_is_cured_by_a_copy(
    place: Place, verity_kernel: Any
) -> None:
    store = place.store(verity=True)
    before = open_files()
    verity_kernel.busy_files = 1
    digest = store.put(b"x" * 3_000_000)
    assert place.file(digest).read_bytes() == b"x" * 3_000_000
    assert verity_kernel.is_sealed(str(place.file(digest)))
    assert open_files() == before
    assert len(place.files()) == 1


def test_etxtbsy_copies_are_bounded(place: Place, verity_kernel: Any) -> None:
    verity_kernel.busy_files = 1000
    before = open_files()
    with pytest.raises(Busy, match="open for writing"):
        place.store(verity=True).put(b"x" * 100)
    assert verity_kernel.calls.count(0x40806685) <= 10
    assert place.files() == []
    assert open_files() == before


def test_etxtbsy_is_cured_without_unnamed_files_too(place: Place, verity_kernel: Any, no_tmpfile: None) -> None:
    verity_kernel.busy_files = 1
    store = place.store(verity=True)
    digest = store.put(b"x" * 100)
    assert place.files() == [fsverity.object_path(digest)]
    assert verity_kernel.is_sealed(str(place.file(digest)))


def test_a_kernel_that_measures_something_else_stops_the_import(place: Place, verity_kernel: Any) -> None:
    verity_kernel.lies = True
    with pytest.raises(DigestMismatch, match="not reliable"):
        place.store(verity=True).put(b"x" * 100)
    assert place.files() == []


def test_stats_of_workers_add_up() -> None:
    total = objects.ObjectStats(1, 2, 3, 4, 5)
    total.add(objects.ObjectStats(10, 20, 30, 40, 50))
    assert total == objects.ObjectStats(11, 22, 33, 44, 55)


def test_that_proc_is_missing_is_said(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without a name gets one through /proc: without it the system says only that there is no such file."""

    def gone(*_arguments: Any, **_options: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    real = os.path.exists
    monkeypatch.setattr(os, "link", gone)
    monkeypatch.setattr(os.path, "exists", lambda path: path != "/proc/self/fd" and real(path))
    with pytest.raises(IOFailed, match=r"through /proc, which is not mounted\. Mount it"):
        place.store().put(b"x" * 100)
