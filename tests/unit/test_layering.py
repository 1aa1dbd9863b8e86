# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The house stands: rooms look downwards only, the engine knows no Ansible, and what is promised in words is complete."""

from __future__ import annotations

import ast
import os
import pathlib
import re
from collections.abc import Iterator

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import errors

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = ROOT / "plugins" / "module_utils"

# Lowest first. A room may import rooms of lower floors only, never one of its own floor: that keeps the order free of cycles and
# shows where a new room belongs. Formats turn bytes into values and back and stand below everything that does I/O.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "inodes", "progress", "erofsformat"),
    ("forked",),
    # formats
    ("automaton", "codecs", "dumpfile", "fsverity", "oci", "refs", "tarheader"),
    ("erofsinodes", "metadata", "schemas", "splitstream", "tar", "tree"),
    ("erofs", "erofsread", "selinux"),
    ("boot",),
    # ground: the host's file systems and mounts, objects, skopeo
    ("hostfs", "mountinfo", "skopeo"),
    ("imageproxy", "objects"),
    # plumbing: one layer, one repository, one conversation with a source
    ("storer",),
    ("imports", "layer", "mount", "session"),
    ("repository",),
    ("documents", "provision"),
    ("modulehelp",),
    # porcelain: the verbs
    ("assemble", "diskuse", "fetch", "images", "plan"),
    ("mounts", "publish"),
    ("exports", "mountmain", "pull"),
    ("mountunit",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}

# Only these know that there are other programs.
STARTS_PROGRAMS = {"imageproxy", "skopeo"}

ROOMS = sorted(path.stem for path in ENGINE.glob("*.py") if path.stem != "__init__")


def imports(room: str) -> Iterator[tuple[int, str]]:
    """What ``room`` imports, wherever in the file: pairs of relative level and dotted name."""
    for node in ast.walk(ast.parse((ENGINE / f"{room}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
            else:
                for alias in node.names:
                    yield node.level, alias.name


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_floor(room: str) -> None:
    assert room in FLOOR, f"give {room} a floor in FLOORS, as low as possible"


def test_no_floor_keeps_a_room_that_is_gone() -> None:
    assert sorted(set(FLOOR) - set(ROOMS)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_look_downwards_only(room: str) -> None:
    wrong = [name for level, name in imports(room) if level and FLOOR.get(name.split(".")[0], -1) >= FLOOR.get(room, len(FLOORS))]
    assert wrong == [], f"{room} may not import these"


@pytest.mark.parametrize("room", ROOMS)
def test_the_engine_imports_no_ansible_and_itself_only_relatively(room: str) -> None:
    for level, name in imports(room):
        assert level in (0, 1), name
        assert level == 1 or not name.startswith("ansible"), name


@pytest.mark.parametrize("room", ROOMS)
def test_programs_are_started_in_one_place(room: str) -> None:
    assert room in STARTS_PROGRAMS or "subprocess" not in {name for _level, name in imports(room)}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_holds_several(room: str) -> None:
    assert len((ENGINE / f"{room}.py").read_text(encoding="utf-8").splitlines()) <= 700


def sources() -> list[pathlib.Path]:
    """Every file of the project that people write; what tools leave behind lies in directories whose names begin with a dot, or in output."""
    kinds = {".py", ".yml", ".yaml", ".rst", ".md", ".toml", ".cfg", ".txt", ".sh", ".ini", ".json", ""}
    found = []
    for directory, directories, names in os.walk(ROOT):
        here = pathlib.Path(directory)
        directories[:] = [name for name in directories if name == ".ci" or not name.startswith((".", "__pycache__"))]
        if here == ROOT:
            directories[:] = [name for name in directories if name != "collections"]
        elif here == ROOT / "tests":
            directories[:] = [name for name in directories if name != "output"]
        found += [here / name for name in names if pathlib.Path(name).suffix in kinds]
    return sorted(found)


def test_every_python_file_says_whose_it_is_and_under_which_licence() -> None:
    for path in sources():
        if path.suffix != ".py" or (path.name == "__init__.py" and not path.read_text(encoding="utf-8")):
            continue
        head = "\n".join(path.read_text(encoding="utf-8").splitlines()[:4])
        licence = "BSD-2-Clause" if path.parent == ENGINE else "GPL-3.0-or-later"
        assert "# Copyright (c) composefs.oci contributors" in head, path
        # Put together here, so that it is not taken for this file's own licence.
        assert "SPDX-License-" + f"Identifier: {licence}" in head, path
        if licence.startswith("GPL"):
            assert "GNU General Public License v3.0+" in head, path


def test_no_file_names_a_place_on_the_machine_it_was_written_on() -> None:
    places = [f"{place}/" for place in (str(ROOT), str(pathlib.Path.home() / ".pyenv")) if place.count("/") > 1]
    for path in sources():
        text = path.read_bytes()
        assert [place for place in places if place.encode() in text] == [], path


def codes() -> set[str]:
    found, left = set(), [errors.EngineError]
    while left:
        kind = left.pop()
        found.add(kind.code)
        left += kind.__subclasses__()
    return found


def test_the_page_of_errors_is_complete() -> None:
    page = ROOT / "docs" / "docsite" / "rst" / "errors.rst"
    listed = re.findall(r"^ {3}\* - ``([a-z_]+)``$", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(codes())


def test_every_module_is_in_the_action_group() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    modules = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("composefs_*.py"))
    assert sorted(runtime["action_groups"]["composefs"]) == modules


def test_every_module_says_so_in_its_documentation() -> None:
    for path in (ROOT / "plugins" / "modules").glob("composefs_*.py"):
        assert "composefs.oci.attributes.actiongroup_composefs" in path.read_text(encoding="utf-8"), path
