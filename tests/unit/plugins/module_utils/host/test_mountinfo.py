# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The kernel's list of mounts, understood."""

from __future__ import annotations

import os
import string

import pytest
from hypothesis import given, settings, strategies
from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError

IMAGE = "c83d777cdf410c3f403096973a3484053a0cb6a8bc9abc51acb13478f5b1ed0b"
LINE = f"46 27 0:40 / /srv/app ro,relatime shared:3 - overlay composefs:{IMAGE} ro,lowerdir+=/,datadir+=/r/objects,redirect_dir=on,metacopy=on"


def test_a_composefs_mount_is_known_by_its_source() -> None:
    mounted = mountinfo.parse(LINE)
    assert (mounted.mount_id, mounted.parent_id, mounted.path, mounted.kind) == (46, 27, "/srv/app", "overlay")
    assert (mounted.image_id, mounted.verity, mounted.read_only) == (IMAGE, False, True)
    assert mounted.settings["datadir+"] == "/r/objects"
    assert mountinfo.parse(LINE.replace(IMAGE, IMAGE * 2)).image_id == IMAGE * 2
    assert mountinfo.parse(f"{LINE},verity=require").verity


@pytest.mark.parametrize(
    "source",
    ["overlay", "composefs", "composefs:app", f"composefs:{IMAGE}0", f"composefs:{IMAGE.upper()}", f"x{IMAGE}"],
)
def test_other_overlays_are_foreign(source: str) -> None:
    assert mountinfo.parse(LINE.replace(f"composefs:{IMAGE}", source)).image_id is None


def test_another_kind_of_file_system_is_foreign_whatever_its_source() -> None:
    assert mountinfo.parse(LINE.replace(" overlay ", " tmpfs ")).image_id is None


def test_octal_escapes_stand_for_bytes() -> None:
    line = LINE.replace("/srv/app", r"/a\040b\011c\012d\134e\043").replace(
        "datadir+=/r/objects", r"upperdir=/u\054p\134\134x,workdir=/w=\040k"
    )
    mounted = mountinfo.parse(line)
    assert mounted.path == "/a b\tc\nd\\e#"
    assert (mounted.directory("upperdir"), mounted.directory("workdir"), mounted.directory("lower")) == (
        "/u,p\\x",
        "/w= k",
        None,
    )


def test_bytes_that_are_no_text_survive() -> None:
    name = os.fsdecode(b"/a\xffb")
    assert mountinfo.parse(LINE.replace("/srv/app", name)).path == name


def test_a_context_with_commas_is_one_setting() -> None:
    mounted = mountinfo.parse(
        LINE.replace(" ro,lowerdir+", ' ro,context="system_u:object_r:container_file_t:s0:c1,c2",lowerdir+')
    )
    assert mounted.settings["context"] == "system_u:object_r:container_file_t:s0:c1,c2"
    assert mounted.settings["metacopy"] == "on"


def test_a_file_system_without_a_source_is_parsed() -> None:
    mounted = mountinfo.parse("1 0 0:1 / / rw - rootfs  rw")
    assert (mounted.source, mounted.settings, mounted.read_only) == ("", {"rw": ""}, False)


@given(strategies.text(string.printable.replace("/", ""), min_size=1).filter(lambda name: name not in (".", "..")))
@settings(max_examples=50)
def test_every_name_comes_back(name: str) -> None:
    escaped = "".join(f"\\{ord(c):03o}" if c in " \t\n\\#" else c for c in name)
    assert mountinfo.parse(LINE.replace("/srv/app", f"/{escaped}")).path == f"/{name}"


def test_the_list_of_this_host_is_understood() -> None:
    found = mountinfo.mounts()
    assert any(mounted.path == "/proc" for mounted in found)
    assert mountinfo.at("/proc") is not None and mountinfo.at("/proc").kind == "proc"  # type: ignore[union-attr]
    assert mountinfo.children(mountinfo.at("/")) if mountinfo.at("/") else True  # type: ignore[arg-type]


def test_a_directory_or_nothing_is_no_mount_point(tmp_path: os.PathLike[str]) -> None:
    assert mountinfo.at(os.fspath(tmp_path)) is None
    assert mountinfo.at(os.path.join(tmp_path, "missing")) is None
    assert mountinfo.hidden_at(os.fspath(tmp_path)) == []


def test_a_list_that_cannot_be_read_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountinfo, "_PATH", "/nowhere/mountinfo")
    with pytest.raises(EngineError, match="Listing what is mounted"):
        mountinfo.mounts()
