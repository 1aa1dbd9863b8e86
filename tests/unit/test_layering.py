# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The house stands: rooms look downwards only, the engine knows no Ansible, and what is promised in words is
complete.
"""

from __future__ import annotations

import ast
import os
import pathlib
import re
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = ROOT / "plugins" / "module_utils"

# Which wings each wing may know. The root ("") is what everybody stands on; source and store never meet, pull joins
# them.
MAY_KNOW: dict[str, set[str]] = {
    "": set(),
    "formats": {""},
    "rootfs": {"", "formats"},
    "host": {"", "formats"},
    "source": {"", "formats", "host"},
    "store": {"", "formats", "rootfs", "host"},
    "pull": {"", "formats", "rootfs", "host", "source", "store"},
    "operations": {"", "formats", "rootfs", "host", "source", "store", "pull"},
}

# Within a wing lowest first. A room may import rooms of lower floors only, never one of its own floor: that keeps the
# order free of cycles and shows where a new room belongs.
FLOORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (("text",), ("errors", "progress")),
    "formats": (
        ("bounds", "digests", "libisal", "strictjson"),
        ("codecs", "fsverity", "tarheader"),
        ("metajson", "ocidocuments", "reference", "repolayout", "splitstream", "tar", "tardiff"),
        ("indexes", "ocischemas"),
    ),
    "rootfs": (
        ("erofs", "filetree", "lastmatch"),
        ("dumpfile", "erofslayout", "merge"),
        ("erofsreader", "erofswriter", "selinux"),
        ("bootable",),
    ),
    "host": (
        ("commands", "files", "machine", "mountinfo", "processes", "processors"),
        ("beneath", "deadman", "filesystem", "locks", "watch", "workers"),
        ("safety",),
        ("mountcalls",),
    ),
    "source": (
        ("archive", "options", "source"),
        ("layout", "peer", "policy", "realm", "skopeowords"),
        ("skopeo",),
        ("imageproxy", "push"),
        ("skopeosource",),
    ),
    "store": (
        ("objects",),
        ("marks",),
        ("repository",),
        ("create", "imagestreams", "namerecords"),
        ("checks", "graph", "proofs"),
    ),
    "pull": (
        ("feed", "limits", "local", "results", "smallobjects", "sourcefiles"),
        ("layer",),
        ("objectlayer", "sources"),
        ("fetch", "makeimages", "plan"),
        ("deltas", "foretelling", "opened", "peers", "publish"),
        ("pull",),
    ),
    "operations": (
        ("diskuse", "findings", "journal", "listing", "makedelta", "overview", "remote"),
        ("keeping", "mounting", "program", "unitfiles"),
        ("deployment", "dump"),
        ("bootmountmain",),
        ("bootmount",),
        ("checkobjects", "keepers", "lastingmount"),
        ("foreseen",),
        ("activation", "check", "mountlisting", "prune"),
        ("maintenance", "repair"),
        ("maintenancetimer",),
    ),
}
# The threshold to Ansible stands at the root and looks into the house; no room looks at it.
THRESHOLD = "module"

FLOOR = {
    f"{wing}.{room}" if wing else room: number
    for wing, floors in FLOORS.items()
    for number, rooms in enumerate(floors)
    for room in rooms
}

# Only these know that there are other programs.
STARTS_PROGRAMS = {"host.commands", "source.imageproxy", "source.skopeo"}

# These wings turn bytes into values and back, or values into values; they open nothing.
SANS_IO = ("formats", "rootfs")
OPENERS = {"open", "opendir", "scandir", "listdir"}

ROOMS = sorted(
    ".".join(path.relative_to(ENGINE).with_suffix("").parts) for path in ENGINE.rglob("*.py") if path.stem != "__init__"
)


def source_of(room: str) -> str:
    return (ENGINE / f"{room.replace('.', '/')}.py").read_text(encoding="utf-8")


def wing_of(room: str) -> str:
    return room.rpartition(".")[0]


def imports(room: str) -> Iterator[tuple[int, str]]:
    """What ``room`` imports, wherever in the file: pairs of relative level and dotted name, for relative ones from the
    engine's root.
    """
    package = room.split(".")[:-1]
    for node in ast.walk(ast.parse(source_of(room))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield 0, alias.name
        elif isinstance(node, ast.ImportFrom):
            if not node.level:
                yield 0, node.module or ""
                continue
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            if ".".join(base) in ROOMS:
                yield node.level, ".".join(base)
            else:
                for alias in node.names:
                    yield node.level, ".".join([*base, alias.name])


def rooms_known(room: str) -> list[str]:
    return [name for level, name in imports(room) if level]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_has_a_floor(room: str) -> None:
    assert room in FLOOR or room == THRESHOLD, f"give {room} a floor in FLOORS, as low as possible"


def test_no_floor_keeps_a_room_that_is_gone() -> None:
    assert sorted(set(FLOOR) - set(ROOMS)) == []


@pytest.mark.parametrize("room", ROOMS)
def test_wings_look_where_they_may(room: str) -> None:
    if room == THRESHOLD:
        return
    known = rooms_known(room)
    assert [name for name in known if name not in ROOMS] == [], "these are no rooms"
    assert [
        name for name in known if wing_of(name) not in {wing_of(room), *MAY_KNOW[wing_of(room)]} or name == THRESHOLD
    ] == []


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_look_downwards_only_within_their_wing(room: str) -> None:
    wrong = [
        name
        for name in rooms_known(room)
        if wing_of(name) == wing_of(room) and FLOOR.get(name, -1) >= FLOOR.get(room, 99)
    ]
    assert wrong == [], f"{room} may not import these"


def test_source_and_store_never_meet() -> None:
    assert "store" not in MAY_KNOW["source"] and "source" not in MAY_KNOW["store"]


@pytest.mark.parametrize("room", [room for room in ROOMS if wing_of(room) in SANS_IO])
def test_formats_and_rootfs_open_nothing(room: str) -> None:
    for node in ast.walk(ast.parse(source_of(room))):
        if isinstance(node, ast.Call):
            called = node.func
            bare = isinstance(called, ast.Name) and called.id == "open"
            of_os = (
                isinstance(called, ast.Attribute)
                and isinstance(called.value, ast.Name)
                and called.value.id == "os"
                and called.attr in OPENERS
            )
            assert not bare and not of_os, f"{room} opens something in line {node.lineno}"


@pytest.mark.parametrize("wing", [wing for wing in FLOORS if wing])
def test_the_doors_of_wings_are_empty(wing: str) -> None:
    assert (ENGINE / wing / "__init__.py").read_bytes() == b""


@pytest.mark.parametrize("room", ROOMS)
def test_the_engine_imports_no_ansible_and_itself_only_relatively(room: str) -> None:
    for level, name in imports(room):
        assert level <= 2, name
        assert level or not name.startswith("ansible"), name


@pytest.mark.parametrize("room", ROOMS)
def test_programs_are_started_in_one_place(room: str) -> None:
    assert room in STARTS_PROGRAMS or "subprocess" not in {name for _level, name in imports(room)}


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_holds_several(room: str) -> None:
    assert len(source_of(room).splitlines()) <= 700


def test_what_runs_on_hosts_without_ansible_finds_its_rooms() -> None:
    # Nothing else imports these programs, so a room that moved would be missed on a guest only.
    found = 0
    for path in [*(ROOT / "tests" / "hosts").rglob("*.py"), *(ROOT / "extensions").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plugins.module_utils"):
                base = (node.module or "")[len("plugins.module_utils") :].lstrip(".")
                for alias in node.names:
                    room = f"{base}.{alias.name}".lstrip(".")
                    assert base in ROOMS or room in ROOMS, f"{path} imports {room}"
                    found += 1
    assert found


def sources() -> list[pathlib.Path]:
    """Every file of the project that people write; what tools leave behind lies in directories whose names begin with a
    dot, or in output.
    """
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
        licence = "BSD-2-Clause" if ENGINE in path.parents else "GPL-3.0-or-later"
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


def test_every_module_is_in_the_action_group() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    modules = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("composefs_*.py"))
    assert sorted(runtime["action_groups"]["composefs"]) == modules


def test_every_module_says_so_in_its_documentation() -> None:
    for path in (ROOT / "plugins" / "modules").glob("composefs_*.py"):
        text = path.read_text(encoding="utf-8")
        assert re.search(r"composefs\.oci\.attributes\.actiongroup_(composefs|registry)", text), path


# What the unit tests may take for granted on a host's Python, which has no Ansible, and what only comes with Ansible.
OF_HOSTS = ("plugins.module_utils", "plugins.plugin_utils", "tests.")


def _imported_first(path: pathlib.Path) -> Iterator[str]:
    """What a test file imports while it is loaded, as far as it comes before it asks whether Ansible is there."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Expr) and "importorskip" in ast.dump(node) and "ansible." in ast.dump(node):
            return
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parent.rglob("test_*.py")), ids=lambda path: path.name)
def test_a_test_that_needs_ansible_asks_for_it_first(path: pathlib.Path) -> None:
    """The Pythons of hosts have none, and a file that cannot be imported there ends the whole run."""
    collection = "ansible_collections.composefs.oci."
    for name in _imported_first(path):
        if name.startswith(collection):
            assert name.removeprefix(collection).startswith(OF_HOSTS), name
        assert name.partition(".")[0] != "ansible", name


def test_modules_that_take_credentials_for_registries_are_in_the_group_for_that() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    reaching = sorted(
        path.stem
        for path in (ROOT / "plugins" / "modules").glob("composefs_*.py")
        if '"auth_file": {' in path.read_text(encoding="utf-8")
    )
    assert sorted(runtime["action_groups"]["composefs_registry"]) == reaching


def test_the_modules_of_that_group_take_the_same_options() -> None:
    """A default for the group would make a module fail that does not know the option."""
    fragment = (ROOT / "plugins" / "doc_fragments" / "registry.py").read_text(encoding="utf-8")
    options = re.findall(r"^  (\w+):$", fragment, re.MULTILINE)
    assert "password" in options and len(options) >= 10
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    runtime = yaml.safe_load((ROOT / "meta" / "runtime.yml").read_text(encoding="utf-8"))
    for module in runtime["action_groups"]["composefs_registry"]:
        text = (ROOT / "plugins" / "modules" / f"{module}.py").read_text(encoding="utf-8")
        assert "  - composefs.oci.registry\n" in text, module
        assert [option for option in options if f'"{option}": {{' not in text] == [], module


def test_every_module_but_those_that_mount_can_be_told_to_accept_an_unsafe_repository() -> None:
    for path in sorted((ROOT / "plugins" / "modules").glob("composefs_*.py")):
        text = path.read_text(encoding="utf-8")
        if "  - composefs.oci.repository\n" in text and path.stem not in ("composefs_mount", "composefs_deployment"):
            assert "  - composefs.oci.repository.unsafe\n" in text and '"unsafe_repository": {' in text, path.name
