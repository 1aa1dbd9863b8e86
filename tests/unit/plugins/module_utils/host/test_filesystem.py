# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a file system is told to be able to do, and why not."""

from __future__ import annotations

import os
import pathlib

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.errors import VerityUnsupported
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem


@pytest.mark.parametrize(
    ("kind", "known", "message", "hint"),
    [
        ("tmpfs", True, "tmpfs never has fs-verity", "ext4, f2fs, btrfs or xfs"),
        ("ext4", False, "kernel (", "CONFIG_FS_VERITY"),
        ("ext4", True, "switched off on /dev/vdb (ext4)", "tune2fs -O verity /dev/vdb"),
    ],
)
def test_advice_about_fs_verity_tells_three_cases_apart(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, kind: str, known: bool, message: str, hint: str
) -> None:
    def refuse(*_arguments: object) -> None:
        raise VerityUnsupported("no", "no")

    feature = tmp_path / "verity"
    if known:
        feature.touch()
    monkeypatch.setattr(fsverity, "enable", refuse)
    monkeypatch.setattr(filesystem, "_mounted", lambda _fd: (kind, "/dev/vdb"))
    monkeypatch.setattr(filesystem, "_WITH_VERITY", {"ext4": ("tune2fs -O verity", str(feature))})
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        lack = filesystem.missing_ability(fd, fsverity.SHA512)
    finally:
        os.close(fd)
    assert lack is not None and message in lack.message and hint in (lack.hint or "")
    assert "does not require it" in (lack.hint or "")
