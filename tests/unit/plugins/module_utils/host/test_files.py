# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files made whole, on a real file system, with and without unnamed files."""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import FormatError
from ansible_collections.composefs.oci.plugins.module_utils.host import files


@pytest.fixture(params=[True, False], ids=["unnamed", "named"])
def place(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A directory, on a file system that has O_TMPFILE or seems not to."""
    fd = os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)
    if not request.param:
        real = os.open

        def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if flags & os.O_TMPFILE == os.O_TMPFILE:
                raise OSError(errno.EOPNOTSUPP, "no unnamed files")
            return real(path, flags, mode, dir_fd=dir_fd)

        monkeypatch.setattr(os, "open", refuse)
    yield fd
    os.close(fd)


def test_a_file_is_made_and_replaced_and_nothing_else_stays(place: int, tmp_path: Path) -> None:
    for content in (b"one", b"", b"x" * 3_000_000):
        files.write_whole(place, "name", content)
        assert (tmp_path / "name").read_bytes() == content
        assert os.listdir(tmp_path) == ["name"]


def test_whoever_has_the_old_file_open_keeps_it(place: int, tmp_path: Path) -> None:
    files.write_whole(place, "name", b"old")
    with (tmp_path / "name").open("rb") as reader:
        files.write_whole(place, "name", b"new")
        assert reader.read() == b"old"


@pytest.mark.parametrize("mode", [0o600, 0o644, 0o666])
def test_the_mode_is_what_was_asked_for_whatever_the_umask_is(place: int, tmp_path: Path, mode: int) -> None:
    old = os.umask(0o077)
    try:
        files.write_whole(place, "name", b"x", mode)
        assert files.make_directory(place, "directory", mode | 0o111)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "name").stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "directory").stat().st_mode) == mode | 0o111


def test_a_link_that_has_the_name_is_replaced_and_not_followed(place: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "name").symlink_to("victim")
    files.write_whole(place, "name", b"x")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "name").is_symlink()


def test_exclusive_replaces_nothing(place: int, tmp_path: Path) -> None:
    files.write_whole(place, "name", b"first", exclusive=True)
    with pytest.raises(FileExistsError):
        files.write_whole(place, "name", b"second", exclusive=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"first"]


@pytest.mark.parametrize("step", ["link", "rename", "fsync"])
def test_what_fails_leaves_the_old_file_and_no_litter(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    files.write_whole(place, "name", b"old")

    def fail(*_args: Any, **_options: Any) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="gone"):
            files.write_whole(place, "name", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_content_is_synced_before_it_gets_the_name_and_the_name_after(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    story: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (story.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"), fsync(fd)),
    )
    monkeypatch.setattr(os, "rename", lambda *names, **fds: (story.append("name"), rename(*names, **fds)))
    files.write_whole(place, "name", b"x")
    assert story == ["file", "name", "directory"]


def test_a_draft_that_is_not_linked_leaves_nothing(place: int, tmp_path: Path) -> None:
    made = files.draft(place)
    os.write(made.fd, b"x")
    made.close()
    made.close()
    assert os.listdir(tmp_path) == []


def test_a_draft_can_be_linked_into_another_directory(place: int, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    with files.opened_directory(str(tmp_path / "inner")) as inner:
        made = files.draft(place)
        os.write(made.fd, b"x")
        made.reopen_read_only()
        made.link("name", inner)
        with pytest.raises(FileExistsError):
            made.link("name", inner)
        made.replace("name", inner)
        made.close()
    assert os.listdir(tmp_path) == ["inner"]
    assert (tmp_path / "inner/name").read_bytes() == b"x"


def test_only_regular_files_are_opened_and_nothing_is_waited_for(place: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100)
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"/proc/self/fd/{place}/socket")
    assert files.read_whole(place, "file", 100) == b"x" * 100
    for name in ("link", "directory", "fifo", "socket"):
        with pytest.raises(FormatError, match="not a regular file"):
            files.read_whole(place, name, 100)
    for name in ("link", "directory", "fifo"):
        with pytest.raises(FormatError, match="not a regular file"):
            files.open_regular(place, name, os.O_WRONLY)
    with pytest.raises(FileNotFoundError):
        files.read_whole(place, "absent", 100)


def test_a_file_that_is_too_large_is_not_read_to_its_end(place: int, tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(FormatError, match="larger than the 1000 bytes"):
        files.read_whole(place, "large", 1000)
