# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files within an archive, read in place."""

from __future__ import annotations

import io
import os
import pathlib
import sys
import tarfile
from collections.abc import Callable, Iterator

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    ImageNotFound,
    InvalidDocument,
    MissingLibrary,
)
from ansible_collections.composefs.oci.plugins.module_utils.source import archive as archives
from ansible_collections.composefs.oci.plugins.module_utils.source.archive import Archive

LARGE = os.urandom(300_000)
FILES = {"index.json": b"{}", "blobs/sha256/aa": LARGE, "blobs/sha256/bb": b"b" * 1000, "empty": b""}


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> Iterator[Callable[..., Archive]]:
    fds: list[int] = []

    def make(mode: str = "w", prefix: str = "./", cut: float = 1.0, **more: bytes) -> Archive:
        path = tmp_path / "a.tar"
        with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
            for name, data in [*FILES.items(), *more.items()]:
                info = tarfile.TarInfo(prefix + name)
                info.size = len(data)
                out.addfile(info, io.BytesIO(data))
            link = tarfile.TarInfo("linked")
            link.type, link.linkname = tarfile.LNKTYPE, prefix + "blobs/sha256/bb"
            out.addfile(link)
        os.truncate(path, int(path.stat().st_size * cut))
        fds.append(os.open(path, os.O_RDONLY))
        return Archive(fds[-1], str(path))

    yield make
    for fd in fds:
        os.close(fd)


def drained(fd: int) -> bytes:
    with os.fdopen(fd, "rb") as file:
        return file.read(len(LARGE))


@pytest.mark.parametrize("prefix", ["", "./", "/", ".//"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_file_is_found_and_read(opened: Callable[..., Archive], mode: str, prefix: str) -> None:
    archive = opened(mode, prefix)
    for name, data in FILES.items():
        assert archive.read(name, 1 << 20) == data
        fd, size = archive.open(name)
        assert size == len(data) and drained(fd)[:size] == data
    assert archive.read("linked", 1 << 20) == FILES["blobs/sha256/bb"]


def test_of_several_with_one_name_the_last_counts(opened: Callable[..., Archive]) -> None:
    assert opened(**{"index.json": b"[]"}).read("index.json", 100) == b"[]"


def test_what_is_not_there_or_too_large_is_told(opened: Callable[..., Archive]) -> None:
    archive = opened()
    for ask in (lambda: archive.read("nothing", 100), lambda: archive.open("nothing")):
        with pytest.raises(ImageNotFound, match="holds no nothing"):
            ask()
    with pytest.raises(InvalidDocument, match="at most 100"):
        archive.read("blobs/sha256/bb", 100)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("cut", [0.2, 0.8])
def test_a_cut_archive_is_damaged(opened: Callable[..., Archive], mode: str, cut: float) -> None:
    with pytest.raises(InvalidDocument, match="damaged"):
        opened(mode, cut=cut)


@pytest.mark.parametrize(("mode", "module", "other"), [("w:bz2", "bz2", "lzma"), ("w:xz", "lzma", "bz2")])
def test_a_python_without_a_compression_says_so_and_reads_the_others(
    opened: Callable[..., Archive], monkeypatch: pytest.MonkeyPatch, mode: str, module: str, other: str
) -> None:
    path = opened(mode).path
    with open(path, "rb") as file:
        monkeypatch.setitem(sys.modules, other, None)
        assert Archive(file.fileno(), path).read("index.json", 100) == b"{}"
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingLibrary, match=f"built without its module {module}. Set ansible_python_interpreter"):
            Archive(file.fileno(), path)


def test_what_is_no_archive_is_damaged(tmp_path: pathlib.Path) -> None:
    for content in (b"", b"x" * 2000, b"\x1f\x8b" + b"x" * 2000, b"\x28\xb5\x2f\xfd" + b"x" * 2000, b"BZh" + b"x" * 99):
        (tmp_path / "x").write_bytes(content)
        fd = os.open(tmp_path / "x", os.O_RDONLY)
        try:
            with pytest.raises(InvalidDocument, match="damaged"):
                Archive(fd, "x")
        finally:
            os.close(fd)


def test_an_archive_of_very_many_files_is_refused(
    opened: Callable[..., Archive], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 3)
    with pytest.raises(InvalidDocument, match="more than 3 files"):
        opened()
