# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An open repository: lock, streams, images, tags, proofs."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.store import create, repository
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    InvalidReference,
    IOFailed,
    NotARepository,
    PermissionDenied,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

MANIFEST = "sha256:" + "a" * 64
OTHER = "sha256:" + "b" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return tmp_path / "repo"


@pytest.fixture
def repo(path: Path) -> Iterator[Repository]:
    with Repository.open(str(path), write=True) as found:
        yield found


def tree(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


# --- opening
# --------------------------------------------------------------------------------------------------------------------


def test_opening_creates_nothing_and_reading_needs_no_directories(path: Path) -> None:
    with Repository.open(str(path)) as found:
        assert (found.algorithm, found.secure, found.path) == (fsverity.SHA256, False, str(path))
        assert found.tags() == {} and found.streams() == []
        assert found.stream("oci-layer-x") is None and found.tag_digest("x") is None and found.trusted(MANIFEST) is None
        assert not found.objects.contains(bytes(32))
    assert tree(path) == ["meta.json"]


@pytest.mark.parametrize("kind", ["nothing", "file", "empty directory"])
def test_a_path_that_is_no_repository_says_what_to_do(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "file":
        path.touch()
    elif kind == "empty directory":
        path.mkdir()
    with pytest.raises(NotARepository, match=r"composefs_repository"):
        Repository.open(str(path))


def test_a_repository_older_than_meta_json_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "objects").mkdir()
    with pytest.raises(NotARepository, match=r"no meta.json.*upgrades it"):
        Repository.open(str(tmp_path))


def test_unknown_features_refuse_reading_or_writing(path: Path) -> None:
    meta = path / "meta.json"
    text = meta.read_text()
    meta.write_text(text.replace('"v1_erofs"', '"v1_erofs", "later"'))
    with Repository.open(str(path)) as found, pytest.raises(IncompatibleRepository, match="later"):
        found.register("x", bytes(32))
    with pytest.raises(IncompatibleRepository, match="later"):
        Repository.open(str(path), write=True)
    meta.write_text(text.replace('"incompatible": []', '"incompatible": ["later"]'))
    with pytest.raises(IncompatibleRepository, match="later"):
        Repository.open(str(path))
    meta.write_text("{")
    with pytest.raises(FormatError, match=r"Opening the repository .*meta.json"):
        Repository.open(str(path))


def test_secure_is_what_has_a_sealed_meta_json(path: Path, verity_kernel: Any) -> None:
    with Repository.open(str(path)) as found:
        assert not found.secure and not found.objects.verity
    verity_kernel.seal(str(path / "meta.json"), fsverity.SHA256)
    with Repository.open(str(path)) as found:
        assert found.secure and found.objects.verity
    verity_kernel.seal(str(path / "meta.json"), fsverity.SHA512)
    with pytest.raises(IncompatibleRepository, match="another algorithm"):
        Repository.open(str(path))


def test_the_writability_precheck_speaks_before_any_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with pytest.raises(PermissionDenied, match="become"):
        Repository.open(str(path), write=True)


def test_all_descriptors_are_closed_on_exec_and_by_close(path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    found = Repository.open(str(path), write=True)
    found.objects.put(b"x" * 100)
    found.begin_import()
    ours = set(os.listdir("/proc/self/fd")) - before
    assert len(ours) >= 3
    for fd in ours:
        try:
            assert not os.get_inheritable(int(fd))
        except OSError as error:  # the descriptor that listed them
            assert error.errno == errno.EBADF
    found.close()
    found.close()
    assert set(os.listdir("/proc/self/fd")) == before


# --- the lock
# --------------------------------------------------------------------------------------------------------------------


def test_readers_and_writers_share_the_lock_and_only_a_collection_excludes(path: Path) -> None:
    collector = os.open(path, os.O_RDONLY)
    try:
        with Repository.open(str(path), write=True), Repository.open(str(path)), pytest.raises(BlockingIOError):
            fcntl.flock(collector, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(collector, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(Busy, match=r"garbage is being collected"):
            Repository.open(str(path), wait=0.05)
    finally:
        os.close(collector)


def test_exclusive_goes_back_to_shared(repo: Repository) -> None:
    with Repository.open(repo.path) as other:
        with pytest.raises(Busy), repo.exclusive(wait=0.0):
            pass
        assert other.streams() == []
    with repo.exclusive(), pytest.raises(Busy):
        Repository.open(repo.path, wait=0.0)
    with Repository.open(repo.path, wait=0.0):
        pass


# --- links
# --------------------------------------------------------------------------------------------------------------------


def test_register_writes_the_exact_link_and_tells_whether_it_changed(repo: Repository) -> None:
    digest = repo.objects.put(b"x" * 100)
    other = repo.objects.put(b"y" * 100)
    name = "oci-layer-" + MANIFEST
    assert repo.register(name, digest) is True
    assert os.readlink(f"{repo.path}/streams/{name}") == f"../objects/{fsverity.object_path(digest)}"
    assert repo.register(name, digest) is False
    assert repo.register(name, other) is True
    assert repo.stream(name) == other
    assert repo.streams() == [name] and repo.streams("oci-layer-") == [name] and repo.streams("oci-config-") == []
    assert repo.unregister(name) is True and repo.unregister(name) is False
    assert not [entry for entry in os.listdir(repo.path) if entry.startswith(".symlink")]


def test_an_unchanged_link_is_not_written_again(repo: Repository) -> None:
    digest = repo.objects.put(b"x" * 100)
    repo.register("s", digest)
    inode = os.lstat(f"{repo.path}/streams/s").st_ino
    repo.register("s", digest)
    assert os.lstat(f"{repo.path}/streams/s").st_ino == inode


def test_a_link_is_replaced_by_renaming_so_that_the_name_is_never_missing(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = repo.objects.put(b"x" * 100), repo.objects.put(b"y" * 100)
    repo.register("s", first)

    def crash(source: str, target: str, **options: Any) -> None:
        assert "/" not in source and source.startswith(".symlink-"), (
            "the temporary link lies in the repository's own directory"
        )
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", crash)
        with pytest.raises(IOFailed):
            repo.register("s", second)
    assert repo.stream("s") == first
    assert sorted(os.listdir(repo.path)) == ["meta.json", "objects", "streams"]


@pytest.mark.parametrize("name", ["", ".", "..", "refs", "a/b", "x" * 256, "a\0"])
def test_streams_need_proper_names(repo: Repository, name: str) -> None:
    with pytest.raises(InvalidReference):
        repo.register(name, bytes(32))


def test_links_that_lead_elsewhere_are_damage(repo: Repository) -> None:
    streams = Path(repo.path, "streams")
    streams.mkdir()
    (streams / "away").symlink_to("/etc/passwd")
    (streams / "short").symlink_to("../objects/ab/cd")
    (streams / "file").touch()
    for name in ("away", "short", "file"):
        with pytest.raises(FormatError, match=name):
            repo.stream(name)
    assert repo.register("away", bytes(32)) is True
    with pytest.raises(FormatError, match="not a symbolic link"):
        repo.register("file", bytes(32))


def test_images_link_to_their_objects(repo: Repository) -> None:
    digest = repo.objects.put(b"x" * 100)
    assert not repo.image(digest)
    assert repo.link_image(digest) is True
    assert repo.link_image(digest) is False
    assert repo.image(digest)
    assert os.readlink(f"{repo.path}/images/{digest.hex()}") == f"../objects/{fsverity.object_path(digest)}"


# --- tags
# --------------------------------------------------------------------------------------------------------------------


def test_tags_are_links_to_manifest_streams_under_encoded_names(repo: Repository) -> None:
    repo.register("oci-manifest-" + MANIFEST, bytes(32))
    repo.register("oci-manifest-" + OTHER, bytes(32))
    assert repo.tag("quay.io/x:1%", MANIFEST) is None
    assert os.readlink(f"{repo.path}/streams/refs/oci/quay.io%2Fx:1%25") == f"../../oci-manifest-{MANIFEST}"
    assert repo.tag("quay.io/x:1%", OTHER) == MANIFEST
    assert repo.tag("quay.io/x:1%", OTHER) == OTHER
    repo.tag("a", MANIFEST)
    assert repo.tags() == {"a": MANIFEST, "quay.io/x:1%": OTHER}
    assert repo.untag("a") is True and repo.untag("a") is False
    assert repo.streams() == ["oci-manifest-" + MANIFEST, "oci-manifest-" + OTHER], "the data stays"


def test_a_tag_needs_its_manifest(repo: Repository) -> None:
    with pytest.raises(ImageNotFound):
        repo.tag("x", MANIFEST)
    with pytest.raises(ImageNotFound):
        repo.tag("x", "../../etc/passwd")


@pytest.mark.parametrize("name", ["@x", "", ".", "..", "x" * 256])
def test_names_that_cannot_be_given_are_refused_before_anything_happens(repo: Repository, name: str) -> None:
    repo.register("oci-manifest-" + MANIFEST, bytes(32))
    with pytest.raises(InvalidReference):
        repo.tag(name, MANIFEST)
    with pytest.raises(InvalidReference):
        repo.check_tag_name(name)
    assert not Path(repo.path, "streams/refs").exists()


def test_listing_tolerates_dangling_refs_strange_targets_and_other_files(repo: Repository) -> None:
    tags = Path(repo.path, "streams/refs/oci")
    (tags / "deep").mkdir(parents=True)
    (tags / "dangling").symlink_to(f"../../oci-manifest-{MANIFEST}")
    (tags / "deep/inner").symlink_to(f"../../../oci-manifest-{OTHER}")
    (tags / "old").symlink_to(f"../sha256:{'a' * 64}")
    (tags / "file").touch()
    (tags / "@x").symlink_to(f"../../oci-manifest-{MANIFEST}")
    os.symlink("x", os.fsencode(tags) + b"/\xff")
    assert repo.tags() == {"@x": MANIFEST, "dangling": MANIFEST, "deep/inner": OTHER}
    assert repo.stream("oci-manifest-" + MANIFEST) is None
    assert repo.untag("@x") is True, "what another program named can be removed"
    assert repo.tag_digest("old") is None


# --- proofs, place, barrier
# ------------------------------------------------------------------------------------------------------------------


def test_proofs_name_the_object_they_are_about(repo: Repository) -> None:
    digest, other = repo.objects.put(b"x" * 100), repo.objects.put(b"y" * 100)
    repo.trust(MANIFEST, digest)
    assert repo.trusted(MANIFEST) == digest
    assert os.readlink(f"{repo.path}/.composefs-oci/trusted/{MANIFEST}") == digest.hex()
    repo.trust(MANIFEST, other)
    assert repo.trusted(MANIFEST) == other
    assert repo.trusted("sha256:../../x") is None
    repo.trust("../../x", digest)
    os.unlink(f"{repo.path}/.composefs-oci/trusted/{MANIFEST}")
    os.symlink("junk", f"{repo.path}/.composefs-oci/trusted/{MANIFEST}")
    assert repo.trusted(MANIFEST) is None


def test_a_proof_is_not_kept_where_one_may_not_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with Repository.open(str(path)) as found:
        found.trust(MANIFEST, bytes(32))
    assert tree(path) == ["meta.json"]


def test_the_place_describes_itself(repo: Repository) -> None:
    free, inodes = repo.free_space()
    assert free > 0 and (inodes is None or inodes > 0)
    assert repo.filesystem() != "unknown"


def test_verity_support_is_found_out_by_trying_and_leaves_nothing(repo: Repository, verity_kernel: Any) -> None:
    assert filesystem.missing_ability(repo.fd, repo.algorithm) is None
    verity_kernel.supported = False
    assert filesystem.missing_ability(repo.fd, repo.algorithm) is not None
    assert tree(Path(repo.path)) == ["meta.json"]


def test_a_barrier_that_fails_is_an_error(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        @staticmethod
        def syncfs(fd: int) -> int:
            ctypes.set_errno(errno.EIO)
            return -1

    repo.sync()
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **options: Library)
    with pytest.raises(IOFailed, match="to the disk: Input/output error"):
        repo.sync()


def test_the_barrier_covers_objects_on_a_file_system_of_their_own(
    repo: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.objects.put(b"x" * 100)
    synced: list[str] = []
    monkeypatch.setattr(filesystem, "sync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    repo.sync()
    assert synced == [repo.path]
    real = os.fstat

    class Elsewhere:
        st_dev = -1

    monkeypatch.setattr(os, "fstat", lambda fd: Elsewhere if fd == repo._objects_fd else real(fd))
    repo.sync()
    assert synced[1:] == [repo.path, repo.path + "/objects"]


def test_default_paths_are_those_of_cfsctl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert repository.default_path() == "/sysroot/composefs"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/u")
    assert repository.default_path() == "/home/u/.var/lib/composefs"


def test_streams_are_opened_for_the_length_of_a_with(repo: Repository) -> None:
    pytest.importorskip("zstandard")
    from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream

    writer = splitstream.Writer(repo.algorithm, splitstream.BLOB)
    writer.external(repo.objects.put(b"hello world"), 11)
    digest = repo.objects.put(b"".join(writer.finish()))
    repo.register("oci-blob-x", digest)
    assert repo.stream("oci-blob-x") == digest and repo.stream("nothing") is None
    with repo.open_object_stream(digest, splitstream.BLOB) as stream:
        assert stream.size == 11
    with pytest.raises(FormatError), repo.open_object_stream(digest, splitstream.LAYER):
        pass
