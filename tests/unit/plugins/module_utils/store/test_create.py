# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Making and upgrading repositories."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    FormatError,
    IncompatibleRepository,
    IOFailed,
    NotARepository,
    PermissionDenied,
    ReadOnly,
    VerityUnsupported,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.metajson import Metadata
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

SHA256, SHA512 = fsverity.SHA256, fsverity.SHA512


def legacy(path: Path, algorithm: fsverity.Algorithm, *contents: bytes) -> list[Path]:
    files = []
    for content in contents:
        file = path / "objects" / fsverity.object_path(fsverity.digest(content, algorithm))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        files.append(file)
    return files


def test_a_new_repository_is_private_and_holds_nothing_but_its_description(tmp_path: Path) -> None:
    path = tmp_path / "a/b/repo"
    made = create.prepare(str(path), SHA512, "disabled")
    assert made == create.Preparation(True, False, False, Metadata.new(SHA512))
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    assert os.listdir(path) == ["meta.json"]
    assert (path / "meta.json").read_bytes() == Metadata.new(SHA512).to_bytes()
    assert stat.S_IMODE((path / "meta.json").stat().st_mode) == 0o644


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    create.prepare(str(path), SHA256, "disabled")
    before = (path / "meta.json").stat()
    again = create.prepare(str(path), SHA256, "disabled")
    assert (again.created, again.upgraded) == (False, False)
    assert (path / "meta.json").stat() == before


def test_check_predicts_and_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a/repo"
    assert create.prepare(str(path), SHA256, "preferred", check=True).created is True
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("verity", "secure"), [("required", True), ("preferred", True), ("disabled", False)])
def test_verity_where_it_works(tmp_path: Path, verity_kernel: Any, verity: str, secure: bool) -> None:
    path = str(tmp_path / "repo")
    assert create.prepare(path, SHA256, verity, check=True).secure is secure
    assert create.prepare(path, SHA256, verity).secure is secure
    assert verity_kernel.is_sealed(path + "/meta.json") is secure
    with Repository.open(path) as found:
        assert found.secure is secure


@pytest.mark.parametrize("check", [False, True])
def test_required_verity_that_is_missing_is_said_before_anything_is_made(
    tmp_path: Path, verity_kernel: Any, check: bool
) -> None:
    verity_kernel.supported = False
    # What is said depends on the kernel and the file system of the machine that runs the test.
    said = "does not support fs-verity with sha256|has no fs-verity for|fs-verity with sha256 is switched off|never has"
    with pytest.raises(VerityUnsupported, match=rf"^Preparing the repository .*({said})"):
        create.prepare(str(tmp_path / "a/b"), SHA256, "required", check=check)
    assert list(tmp_path.iterdir()) == []
    assert create.prepare(str(tmp_path / "a/b"), SHA256, "preferred", check=check).secure is False


def test_an_empty_directory_becomes_a_repository_that_others_cannot_enter(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    path.mkdir(mode=0o755)
    (path / "lost+found").mkdir()
    assert create.prepare(str(path), SHA256, "disabled").created
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    create.prepare(str(path), SHA256, "disabled")
    assert stat.S_IMODE(path.stat().st_mode) == 0o755, "what is a repository already is left alone"


def test_a_directory_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "important").touch()
    with pytest.raises(NotARepository, match="important"):
        create.prepare(str(tmp_path), SHA256, "disabled")
    with pytest.raises(IOFailed, match="not a directory"):
        create.prepare(str(tmp_path / "important/repo"), SHA256, "disabled")
    with pytest.raises(IOFailed, match="than a directory"):
        create.prepare(str(tmp_path / "important"), SHA256, "disabled")
    assert [p.name for p in tmp_path.iterdir()] == ["important"]


def test_a_repository_of_another_algorithm_is_incompatible_and_says_so(tmp_path: Path) -> None:
    path = str(tmp_path / "repo")
    create.prepare(path, SHA256, "disabled")
    with pytest.raises(IncompatibleRepository, match=r"uses sha256, but sha512 is asked for.*Ask for sha256"):
        create.prepare(path, SHA512, "disabled")


def test_a_repository_is_not_made_more_or_less_secure_behind_ones_back(tmp_path: Path, verity_kernel: Any) -> None:
    create.prepare(str(tmp_path / "loose"), SHA256, "disabled")
    with pytest.raises(IncompatibleRepository, match="verity=required"):
        create.prepare(str(tmp_path / "loose"), SHA256, "required")
    create.prepare(str(tmp_path / "strict"), SHA256, "required")
    with pytest.raises(IncompatibleRepository, match="verity=disabled"):
        create.prepare(str(tmp_path / "strict"), SHA256, "disabled")
    assert create.prepare(str(tmp_path / "loose"), SHA256, "preferred").secure is False
    assert create.prepare(str(tmp_path / "strict"), SHA256, "preferred").secure is True


def test_other_formats_than_the_default_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_bytes(Metadata.new(SHA256, 2, (1,)).to_bytes())
    assert create.prepare(str(tmp_path), SHA256, "disabled").metadata.erofs_formats == (2, 1)


def test_two_at_the_same_time_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "repo"
    real = os.link

    def late(*args: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "link", real)
        create.prepare(str(path), SHA256, "disabled")
        real(*args, **options)

    monkeypatch.setattr(os, "link", late)
    assert create.prepare(str(path), SHA256, "disabled").created is False
    assert os.listdir(path) == ["meta.json"]


def test_a_failure_leaves_no_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(Exception, match="No space left"):
        create.prepare(str(tmp_path / "a/b"), SHA256, "disabled")
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_or_forbidden_parent_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Frozen:
        f_flag = os.ST_RDONLY

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstatvfs", lambda fd: Frozen)
        with pytest.raises(ReadOnly):
            create.prepare(str(tmp_path / "x"), SHA256, "disabled")
    monkeypatch.setattr(os, "access", lambda *args, **options: False)
    monkeypatch.setattr(os, "supports_effective_ids", {os.access})
    with pytest.raises(PermissionDenied):
        create.prepare(str(tmp_path / "x"), SHA256, "disabled")


def test_a_file_system_without_links_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, "no unnamed files")
        return real(path, flags, mode, dir_fd=dir_fd)

    def no_links(*args: Any, **options: Any) -> None:
        raise OSError(errno.EPERM, "no links")

    monkeypatch.setattr(os, "open", refuse)
    fd = real(tmp_path, os.O_RDONLY)
    filesystem.require_links(fd, "x")
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", no_links)
        with pytest.raises(IOFailed, match="has no links"):
            create.prepare(str(tmp_path / "x"), SHA256, "disabled")
    assert list(tmp_path.iterdir()) == []
    create.prepare(str(tmp_path / "x"), SHA256, "disabled")
    assert os.listdir(tmp_path / "x") == ["meta.json"]
    os.close(fd)


# --- repositories older than meta.json
# -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [SHA256, SHA512], ids=lambda a: a.name)
def test_a_legacy_repository_is_upgraded_to_what_cfsctl_would_write(
    tmp_path: Path, algorithm: fsverity.Algorithm
) -> None:
    legacy(tmp_path, algorithm, b"x" * 100)
    (tmp_path / "streams").mkdir()
    predicted = create.prepare(str(tmp_path), algorithm, "preferred", check=True)
    assert not (tmp_path / "meta.json").exists()
    made = create.prepare(str(tmp_path), algorithm, "preferred")
    assert made == predicted == create.Preparation(False, True, False, Metadata.new(algorithm))
    assert (tmp_path / "meta.json").read_bytes() == Metadata.new(algorithm).to_bytes()
    assert create.prepare(str(tmp_path), algorithm, "preferred").upgraded is False


def test_a_legacy_repository_is_secure_only_if_every_object_is_sealed(tmp_path: Path, verity_kernel: Any) -> None:
    files = legacy(tmp_path, SHA256, b"x" * 100, b"y" * 100)
    verity_kernel.seal(str(files[0]), SHA256)
    with pytest.raises(IncompatibleRepository, match="verity=required"):
        create.prepare(str(tmp_path), SHA256, "required")
    assert create.prepare(str(tmp_path), SHA256, "preferred", check=True).secure is False
    verity_kernel.seal(str(files[1]), SHA256)
    assert create.prepare(str(tmp_path), SHA256, "required").secure is True
    assert verity_kernel.is_sealed(str(tmp_path / "meta.json"))


def test_a_legacy_repository_of_another_algorithm_says_which(tmp_path: Path) -> None:
    legacy(tmp_path, SHA256, b"x" * 100)
    with pytest.raises(IncompatibleRepository, match="its objects use sha256"):
        create.prepare(str(tmp_path), SHA512, "preferred")


def test_objects_that_tell_no_algorithm_are_not_guessed_at(tmp_path: Path) -> None:
    legacy(tmp_path, SHA256, b"x" * 100)
    legacy(tmp_path, SHA512, b"x" * 100)
    with pytest.raises(FormatError, match="do not tell one digest algorithm"):
        create.prepare(str(tmp_path), SHA512, "preferred")


def test_empty_objects_are_a_new_repository(tmp_path: Path) -> None:
    (tmp_path / "objects/ab").mkdir(parents=True)
    assert create.prepare(str(tmp_path), SHA512, "disabled").created is True
