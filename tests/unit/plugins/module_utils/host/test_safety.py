# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who could change what root relies on: real directories, links and owners."""

from __future__ import annotations

import os
import pathlib

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.host import safety

root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def place(tmp_path: pathlib.Path) -> pathlib.Path:
    """A directory with a program in it, below a sticky one that everybody may write to."""
    open_to_all = tmp_path / "tmp"
    open_to_all.mkdir()
    open_to_all.chmod(0o1777)
    inner = open_to_all / "inner"
    inner.mkdir(mode=0o755)
    (inner / "program").touch(mode=0o755)
    return inner


def test_what_only_root_and_this_user_can_change_has_no_fault(place: pathlib.Path) -> None:
    for path in (place, place / "program", place / "missing", place / "missing/deeper"):
        assert safety.fault(str(path)) == ""
    (place / "link").symlink_to("../inner/./program")
    assert safety.fault(str(place / "link")) == ""
    (place / "absolute").symlink_to(place / "link")
    assert safety.fault(str(place / "absolute")) == ""


@pytest.mark.parametrize("mode", [0o777, 0o757])
def test_a_directory_that_others_can_write_is_a_fault_wherever_it_stands(place: pathlib.Path, mode: int) -> None:
    place.chmod(mode)
    for path in (place, place / "program", place / "missing"):
        assert safety.fault(str(path)) == f"{place} can be written by others (mode {mode:04o})"
    place.chmod(0o755)
    (place / "program").chmod(mode)
    assert "program can be written by others" in safety.fault(str(place / "program"))


def test_the_sticky_directory_itself_is_no_place_to_run_from(place: pathlib.Path) -> None:
    assert "can be written by others" in safety.fault(str(place.parent))


@root
def test_what_belongs_to_somebody_else_is_a_fault(place: pathlib.Path) -> None:
    os.chown(place / "program", 65534, 65534)
    assert "program belongs to " in safety.fault(str(place / "program"))
    os.chown(place / "program", 0, 0)
    (place / "link").symlink_to("program")
    os.chown(place / "link", 65534, 65534, follow_symlinks=False)
    assert "link belongs to " in safety.fault(str(place / "link"))
    os.chown(place.parent, 65534, 65534)
    assert "tmp belongs to " in safety.fault(str(place / "program"))


@root
def test_the_group_of_root_may_write_and_no_other(place: pathlib.Path) -> None:
    place.chmod(0o775)
    os.chown(place, 0, 50)
    assert "can be written by others (mode 0775)" in safety.fault(str(place / "program"))
    os.chown(place, 0, 0)
    assert safety.fault(str(place / "program")) == ""


def test_links_that_lead_in_a_circle_end(place: pathlib.Path) -> None:
    (place / "one").symlink_to("two")
    (place / "two").symlink_to("one")
    assert "circle" in safety.fault(str(place / "one"))
