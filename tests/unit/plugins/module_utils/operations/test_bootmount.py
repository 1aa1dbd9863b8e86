# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Mounts that come back at boot: the unit, its links, and the program that all units run."""

from __future__ import annotations

import ast
import io
import os
import pathlib
import subprocess
import sys
import zipfile
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, journal
from ansible_collections.composefs.oci.plugins.module_utils.errors import IOFailed, MountFailed, UnsafeRepository
from ansible_collections.composefs.oci.plugins.module_utils.operations.mounting import Target
from ansible_collections.composefs.oci.plugins.module_utils.operations.bootmount import LOCAL, REMOTE, Places

IMAGE = "ab" * 32


class Systemd:
    """Stands for systemctl and notes what it is told."""

    def __init__(self, status: int = 0) -> None:
        self.told: list[str] = []
        self.status = status

    def __call__(self, words: list[str]) -> tuple[int, str, str]:
        assert words[:2] == ["systemctl", "--no-ask-password"]
        self.told.append(" ".join(words[2:]))
        return self.status, "", "refused\n" if self.status else ""


@pytest.fixture
def places(tmp_path: pathlib.Path) -> Places:
    """A host where systemd runs."""
    (tmp_path / "running").mkdir()
    return Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))


def target(path: str = "/srv/app", **changes: Any) -> Target:
    return Target(**{"image_id": IMAGE, "path": path, "verity": True, **changes})


def fields(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))


# ---- the unit --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/srv/app", "srv-app"),
        ("/srv//app/", "srv-app"),
        ("/", "-"),
        ("/srv/my-app", r"srv-my\x2dapp"),
        ("/.hidden/x", r"\x2ehidden-x"),
        ("/srv/a b", r"srv-a\x20b"),
        ("/srv/ü", r"srv-\xc3\xbc"),
        ("/srv/a_b:c.d", "srv-a_b:c.d"),
    ],
)
def test_units_are_named_as_systemd_escapes_paths(path: str, name: str) -> None:
    assert bootmount.unit_name(path) == f"composefs-oci-{name}.service"


def test_a_path_that_is_too_long_for_a_unit_is_refused() -> None:
    with pytest.raises(MountFailed, match="too long"):
        bootmount.unit_name("/" + "ü" * 60)


def test_the_unit_mounts_what_the_journal_calls_current(places: Places) -> None:
    text = bootmount.unit_text(
        target(upperdir="/var/u", workdir="/var/w", options=("nodev",)), "/srv/repo", places, "/usr/bin/python3"
    )
    found = fields(text)
    assert found["ExecStart"] == (
        f'"/usr/bin/python3" "-I" "{places.application}" "boot" "--library" "{places.library}" "--" "/srv/app"'
    )
    usual = fields(bootmount.unit_text(target(), "/srv/repo"))["ExecStart"]
    assert usual.endswith('/var/lib/composefs-oci/mount.pyz" "boot" "--" "/srv/app"')
    assert found["ExecStop"] == f'"/usr/bin/python3" "-I" "{places.application}" "unmount" "--" "/srv/app"'
    assert found["RequiresMountsFor"] == f'"/srv/repo" "/srv" "{places.library}" "/usr/bin" "/var/u" "/var/w"'
    assert (found["WantedBy"], found["Before"]) == (LOCAL, f"{LOCAL} umount.target")
    assert IMAGE not in text, "the journal says which image, so the unit stays from version to version"


def test_characters_that_mean_something_to_systemd_are_escaped(places: Places) -> None:
    found = fields(bootmount.unit_text(target('/srv/50%"$x\\y z'), "/srv/repo", places))
    assert found["ExecStart"].endswith(' "--" "/srv/50%%\\"$$x\\\\y z"')
    assert found["Description"].endswith('/srv/50%%"$x\\y z')


@pytest.mark.parametrize("path", ["/srv/line\nbreak", "/srv/tab\t", "/srv/\udcff"])
def test_what_no_unit_can_hold_is_refused(places: Places, path: str) -> None:
    with pytest.raises(MountFailed, match="cannot hold"):
        bootmount.unit_text(target(path), "/srv/repo", places)


def test_a_repository_on_the_network_waits_for_it(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(*mounts: tuple[str, str]) -> None:
        rows = [
            mountinfo.Mounted(number, 0, path, kind, "x", frozenset(), {}) for number, (path, kind) in enumerate(mounts)
        ]
        monkeypatch.setattr(mountinfo, "mounts", lambda: rows)

    shown(("/", "ext4"), ("/srv/repo", "nfs4"))
    assert fields(bootmount.unit_text(target("/data/app"), "/srv/repo", places))["WantedBy"] == REMOTE
    shown(("/", "nfs"), ("/srv", "ext4"), ("/srv/repository", "nfs4"))
    assert not bootmount.is_remote("/srv/repo")
    assert bootmount.is_remote("/var")
    shown(("/", "ext4"), ("/", "nfs"))
    assert bootmount.is_remote("/srv"), "of two mounts at one place the last counts"
    shown(("/", "ext4"), ("/srv", "ext4"))
    monkeypatch.setattr(
        bootmount.unitfiles,
        "read_text",
        lambda path: "# x\nUUID=1 /srv ext4 defaults,_netdev 0 2\n" if path == "/etc/fstab" else None,
    )
    assert bootmount.is_remote("/srv/repo") and not bootmount.is_remote("/var")


# ---- what root runs at boot ------------------------------------------------------------------------------------------


def test_the_platforms_python_is_preferred_over_a_virtual_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def run(words: list[str]) -> tuple[int, str, str]:
        tried.append(words[0])
        return int(words[0] != "/usr/libexec/platform-python"), "", ""

    platform = ("/usr/bin/python3", "/usr/libexec/platform-python")
    monkeypatch.setattr(os.path, "exists", lambda path: path in platform)
    monkeypatch.setattr(bootmount.safety, "fault", lambda _path: "")
    monkeypatch.setattr(sys, "executable", "/opt/venv/bin/python")
    monkeypatch.setattr(sys, "prefix", "/opt/venv")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    assert bootmount.interpreter_to_run(run) == "/usr/libexec/platform-python" and tried == list(platform)
    assert bootmount.interpreter_to_run(lambda _words: (1, "", "")) == "/opt/venv/bin/python"
    monkeypatch.setattr(sys, "prefix", "/usr")
    assert bootmount.interpreter_to_run(run) == "/opt/venv/bin/python", "then it is none"


def test_an_interpreter_that_others_can_change_is_not_run_at_boot(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.touch(mode=0o777)
    python.chmod(0o777)
    monkeypatch.setattr(sys, "executable", str(python))
    assert bootmount.interpreter_to_run(lambda _words: (0, "", "")) in bootmount._PLATFORM_PYTHONS
    with pytest.raises(MountFailed, match="can be written by others"):
        bootmount.interpreter_to_run(lambda _words: (1, "", ""))


@pytest.mark.parametrize("which", ["repository", "library"])
def test_a_place_that_others_can_change_is_not_relied_on_at_boot(
    places: Places, tmp_path: pathlib.Path, which: str
) -> None:
    repository = tmp_path / "shared/repo"
    repository.mkdir(parents=True)
    os.mkdir(places.library)
    bootmount.require_safe(str(repository), places)
    os.chmod(repository.parent if which == "repository" else places.library, 0o777)
    with pytest.raises((UnsafeRepository, MountFailed), match="can be written by others") as refused:
        bootmount.require_safe(str(repository), places)
    assert refused.value.code == ("unsafe_repository" if which == "repository" else "mount_failed")


# ---- on the host -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_unit_is_written_enabled_and_made_known_once(places: Places) -> None:
    systemd = Systemd()
    unit = pathlib.Path(places.units, "composefs-oci-srv-app.service")
    link = pathlib.Path(places.units, f"{LOCAL}.wants", unit.name)
    assert bootmount.ensure(target(), "/srv/repo", systemd, check=True, places=places)
    assert not os.path.exists(places.units) and systemd.told == []
    assert bootmount.ensure(target(), "/srv/repo", systemd, places=places)
    assert os.readlink(link) == str(unit) and unit.stat().st_mode & 0o777 == 0o644
    assert bootmount.current("/srv/app", places) == unit.read_text()
    assert systemd.told == ["daemon-reload", f"start --no-block {unit.name}"]
    for check in (True, False):
        assert not bootmount.ensure(target(), "/srv/repo", systemd, check=check, places=places)
    assert len(systemd.told) == 2
    assert bootmount.persistent(places) == [], "without a journal nothing says which image"
    journal.make_directories(places)
    journal.write(journal.Journal("/srv/app", current=journal.Image(IMAGE)), places)
    assert bootmount.persistent(places) == [bootmount.Persistent(unit.name, "/srv/app", "/srv/repo", IMAGE)]
    assert bootmount.units(places) == {"/srv/app": unit.name}


@pytest.mark.slow
def test_everybody_may_read_units_and_what_they_lie_in_whatever_the_umask_is(
    places: Places, tmp_path: pathlib.Path
) -> None:
    old = os.umask(0o077)
    try:
        bootmount.ensure(target(), "/srv/repo", Systemd(), places=places)
    finally:
        os.umask(old)
    units, library = pathlib.Path(places.units), pathlib.Path(places.library)
    made = [units, units / f"{LOCAL}.wants", library]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o755}
    assert {path.stat().st_mode & 0o777 for path in units.glob("*.service")} == {0o644}
    assert os.stat(places.application).st_mode & 0o777 == 0o644


@pytest.mark.slow
@pytest.mark.parametrize("broken", ["unit", "link", "program", "directory"])
def test_what_is_wrong_is_put_right(places: Places, broken: str) -> None:
    systemd = Systemd()
    bootmount.ensure(target(), "/srv/repo", systemd, places=places)
    unit = pathlib.Path(places.units, "composefs-oci-srv-app.service")
    link = pathlib.Path(places.units, f"{LOCAL}.wants", unit.name)
    wanted = target(upperdir="/var/u", workdir="/var/w") if broken == "directory" else target()
    if broken == "link":
        link.unlink()
        (link.parent.parent / f"{REMOTE}.wants").mkdir()
        (link.parent.parent / f"{REMOTE}.wants" / unit.name).symlink_to(unit)
    elif broken != "directory":
        pathlib.Path(unit if broken == "unit" else places.application).write_bytes(b"old")
    assert bootmount.ensure(wanted, "/srv/repo", systemd, check=True, places=places)
    assert bootmount.ensure(wanted, "/srv/repo", systemd, places=places)
    assert not bootmount.ensure(wanted, "/srv/repo", systemd, places=places)
    assert link.is_symlink() and not os.path.lexists(f"{places.units}/{REMOTE}.wants/{unit.name}")
    assert [name for name in os.listdir(places.units) if name.startswith(".")] == []


def test_the_last_unit_takes_the_program_along(places: Places) -> None:
    systemd = Systemd()
    for path in ("/srv/app", "/srv/other"):
        bootmount.ensure(target(path), "/srv/repo", systemd, places=places)
    systemd.told.clear()
    assert bootmount.remove("/srv/app", systemd, check=True, places=places) and bootmount.current("/srv/app", places)
    assert bootmount.remove("/srv/app", systemd, stop=True, places=places)
    assert systemd.told == ["stop composefs-oci-srv-app.service", "daemon-reload"]
    assert os.path.exists(places.application)
    assert not bootmount.remove("/srv/app", systemd, places=places)
    assert bootmount.remove("/srv/other", systemd, places=places)
    assert systemd.told[2:] == ["daemon-reload"], "what is mounted stays unless stopping is asked for"
    assert not os.path.exists(places.library) and os.listdir(places.units) == []


def test_where_systemd_does_not_run_files_are_enough(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "not running"))
    systemd = Systemd()
    monkeypatch.setattr(
        os.path, "exists", lambda path, really=os.path.exists: path == "/usr/lib/systemd/systemd" or really(path)
    )
    assert bootmount.ensure(target(), "/srv/repo", systemd, places=places)
    assert bootmount.remove("/srv/app", systemd, stop=True, places=places)
    assert systemd.told == []


def test_a_host_without_systemd_is_told_so(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "not running"))
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    with pytest.raises(MountFailed, match="no systemd"):
        bootmount.ensure(target(), "/srv/repo", Systemd(), places=places)
    assert os.listdir(tmp_path) == []


def test_a_refusal_of_systemd_is_said(places: Places) -> None:
    with pytest.raises(IOFailed, match="daemon-reload failed: refused"):
        bootmount.ensure(target(), "/srv/repo", Systemd(status=1), places=places)


# ---- the program -----------------------------------------------------------------------------------------------------


def test_the_program_is_the_same_bytes_for_the_same_sources() -> None:
    first = bootmount.application()
    assert first == bootmount.application()
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.testzip() is None
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert "__main__.py" in archive.namelist()


def test_the_program_has_every_part_that_its_parts_import_at_once() -> None:
    with zipfile.ZipFile(io.BytesIO(bootmount.application())) as archive:
        names = set(archive.namelist())
        for name in names:
            for node in ast.parse(archive.read(name)).body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    base = "/".join([*name.split("/")[: -node.level], *(node.module or "").split(".")]).rstrip("/")
                    wanted = (
                        {f"{base}.py"} if f"{base}.py" in names else {f"{base}/{alias.name}.py" for alias in node.names}
                    )
                    assert wanted <= names, name


@pytest.mark.slow
def test_the_program_runs_in_an_isolated_interpreter(tmp_path: pathlib.Path) -> None:
    program = tmp_path / "mount.pyz"
    program.write_bytes(bootmount.application())
    command = [
        sys.executable,
        "-I",
        str(program),
        "mount",
        "--repository",
        str(tmp_path),
        "--image",
        IMAGE,
        "--",
        "/srv/app",
    ]
    done = subprocess.run(command, env={}, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("not_a_repository: ")
    bare = subprocess.run(command[:3], env={}, capture_output=True, text=True, check=False)
    assert bare.returncode == 2 and "usage: mount.pyz" in bare.stderr
