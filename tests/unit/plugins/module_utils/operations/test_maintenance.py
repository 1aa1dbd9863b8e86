# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host that looks after its repository: what is done, what is remembered of it, and the timer that has it done."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from filled_repository import copy_of, fill, make_layout

from ansible_collections.composefs.oci.plugins.module_utils.errors import IOFailed, InvalidOption, UnsafeRepository
from ansible_collections.composefs.oci.plugins.module_utils.operations import maintenance, maintenancetimer, prune
from ansible_collections.composefs.oci.plugins.module_utils.operations.journal import Places
from ansible_collections.composefs.oci.plugins.module_utils.operations.maintenance import Wish
from ansible_collections.composefs.oci.plugins.module_utils.operations.maintenancetimer import Schedule
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import checks
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


class Systemd:
    """Stands for systemctl and systemd-analyze, and notes what it is told."""

    def __init__(self, status: int = 0) -> None:
        self.told: list[str] = []
        self.status = status

    def __call__(self, words: list[str]) -> tuple[int, str, str]:
        if words[0] == "systemd-analyze":
            return (1, "", "Failed to parse calendar specification\n") if words[-1] == "never" else (0, "", "")
        self.told.append(" ".join(words[2:]))
        return self.status, "", "refused\n" if self.status else ""


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A repository with four names. To be copied."""
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    return base / "repo"


@pytest.fixture
def repository(filled: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return copy_of(filled, tmp_path / "repo")


@pytest.fixture
def places(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Places:
    """A host where systemd runs, and where nobody else can change what root runs."""
    (tmp_path / "running").mkdir()
    monkeypatch.setattr(maintenancetimer.safety, "fault", lambda _path: "")
    monkeypatch.setattr(maintenancetimer.bootmount, "interpreter_to_run", lambda: sys.executable)
    return Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))


def maintained(path: pathlib.Path, wish: Wish) -> dict[str, object]:
    with Repository.open(str(path), write=True) as opened:
        result = maintenance.maintain(opened, wish, Progress())
        assert checks.last_maintenance(opened) == {"version": 1, **result}
        return result


def test_it_checks_and_frees_and_remembers_what_came_of_it(repository: pathlib.Path) -> None:
    with Repository.open(str(repository)) as opened:
        names = opened.tags()
        assert checks.last_maintenance(opened) is None
    result = maintained(repository, Wish())
    assert (result["findings"], result["names"], result["error"]) == ({}, [], None)
    result = maintained(repository, Wish(prune=prune.Wish(remove=["*"], keep_last=1)))
    assert len(result["names"]) == len(names) - 1 and result["objects"] and result["bytes"]  # type: ignore[arg-type]
    with Repository.open(str(repository)) as opened:
        assert checks.last(opened)["findings"] == {}  # type: ignore[index]


def test_what_the_check_finds_is_told_and_an_error_is_remembered(repository: pathlib.Path) -> None:
    victim = max((repository / "objects").glob("??/*"), key=lambda one: one.stat().st_size)
    victim.unlink()
    result = maintained(repository, Wish(prune=None))
    assert list(result["findings"]) == ["object_missing"] and result["error"] is None  # type: ignore[call-overload]
    streams = sorted((repository / "streams").glob("oci-manifest-*"))
    (repository / "streams" / os.readlink(streams[0])).unlink()
    result = maintained(repository, Wish())
    assert result["findings"] and result["error"]["code"] == "repository_damaged"  # type: ignore[index]


@pytest.mark.slow
def test_the_timer_is_written_once_and_started(repository: pathlib.Path, places: Places) -> None:
    systemd, path = Systemd(), str(repository)
    assert maintenancetimer.ensure(path, Wish(), Schedule(), systemd, check=True, places=places)
    assert not os.path.exists(places.units) and not systemd.told
    assert maintenancetimer.ensure(path, Wish(), Schedule(), systemd, places=places)
    name = maintenancetimer.unit_name(path)
    assert systemd.told == ["daemon-reload", f"restart {name}.timer"]
    assert os.readlink(f"{places.units}/timers.target.wants/{name}.timer") == f"{places.units}/{name}.timer"
    assert not maintenancetimer.ensure(path, Wish(), Schedule(), systemd, places=places)
    assert maintenancetimer.ensure(path, Wish(), Schedule("Sun 03:00", 5), systemd, places=places)
    timer = pathlib.Path(places.units, f"{name}.timer").read_text()
    assert "OnCalendar=Sun 03:00\nRandomizedDelaySec=5\nPersistent=true\n" in timer


@pytest.mark.slow
def test_the_program_does_what_the_wish_says_in_an_isolated_interpreter(
    repository: pathlib.Path, places: Places
) -> None:
    wish = Wish("objects", prune.Wish(keep=["--odd %i $x"], remove=["*"], keep_last=1, older_than=0.0, timeout=5))
    maintenancetimer.ensure(str(repository), wish, Schedule(), Systemd(), places=places)
    unit = pathlib.Path(places.units, f"{maintenancetimer.unit_name(str(repository))}.service").read_text()
    line = next(one[len("ExecStart=") :] for one in unit.splitlines() if one.startswith("ExecStart="))
    words = shlex.split(line.replace("$$", "$").replace("%%", "%"))
    assert "--keep=--odd %i $x" in words
    done = subprocess.run(words, env={}, cwd="/", capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["level"] == "objects" and result["names"] and result["objects"]
    with Repository.open(str(repository)) as opened:
        assert checks.last_maintenance(opened) == {"version": 1, **result}
        assert len(opened.tags()) == 1
    max((repository / "objects").glob("??/*"), key=lambda one: one.stat().st_size).unlink()
    done = subprocess.run(words, env={}, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "The check found: " in done.stderr and "Traceback" not in done.stderr
    done = subprocess.run([*words[:-1], "/nonexistent"], env={}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("not_a_repository: ")


@pytest.mark.parametrize(
    "wish", [Wish(), Wish("objects", None, "accept"), Wish("quick", prune.Wish(["a"], ["-b"], 2, 3.0, 4.0))]
)
def test_the_command_line_means_the_wish(wish: Wish, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[object] = []

    @contextlib.contextmanager
    def opened(_path: str, **_options: object) -> Iterator[None]:
        yield None

    monkeypatch.setattr(
        maintenance, "maintain", lambda _one, wish, _progress: found.append(wish) or {"error": None, "findings": {}}
    )
    assert maintenance.main(maintenance.words(wish, "/srv"), opened) == 0
    (meant,) = found
    assert isinstance(meant, Wish) and meant.level == wish.level
    for key in ("keep", "remove", "keep_last", "older_than", "timeout") if wish.prune else ():
        mine, theirs = getattr(meant.prune, key), getattr(wish.prune, key)
        assert list(mine) == list(theirs) if isinstance(mine, list) else mine == theirs
    assert (meant.prune is None) == (wish.prune is None) and meant.unsafe == wish.unsafe


def test_everybody_may_read_what_a_timer_lies_in_whatever_the_umask_is(places: Places) -> None:
    """The journals of mounts lie there, too: a timer that comes first must not hide them from other users."""
    old = os.umask(0o077)
    try:
        maintenancetimer.ensure("/srv/one", Wish(), Schedule(), Systemd(), places=places)
    finally:
        os.umask(old)
    made = [places.units, places.library, f"{places.units}/timers.target.wants"]
    assert {os.stat(path).st_mode & 0o777 for path in made} == {0o755}


def test_the_program_goes_with_the_last_timer(places: Places) -> None:
    systemd = Systemd()
    for path in ("/srv/one", "/srv/two"):
        maintenancetimer.ensure(path, Wish(), Schedule(), systemd, places=places)
    assert maintenancetimer.remove("/srv/one", systemd, check=True, places=places)
    assert maintenancetimer.remove("/srv/one", systemd, places=places) and os.path.exists(places.maintenance)
    assert not maintenancetimer.remove("/srv/one", systemd, places=places)
    assert maintenancetimer.remove("/srv/two", systemd, places=places)
    assert not os.path.exists(places.library) and os.listdir(f"{places.units}/timers.target.wants") == []
    assert systemd.told[-2:] == ["stop composefs-maintenance-srv-two.timer", "daemon-reload"]


def test_what_cannot_be_done_is_said(places: Places, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    systemd = Systemd()
    for calendar in ("never", " ", "daily\nX=1"):
        with pytest.raises(InvalidOption, match="no time for a timer"):
            maintenancetimer.ensure("/srv", Wish(), Schedule(calendar), systemd, places=places)
    with pytest.raises(InvalidOption, match="too long"):
        maintenancetimer.unit_name("/srv/" + "x" * 250)
    with pytest.raises(InvalidOption, match="cannot hold"):
        maintenancetimer.ensure("/srv", Wish(prune=prune.Wish(keep=["a\nb"])), Schedule(), systemd, places=places)
    with pytest.raises(IOFailed, match="refused"):
        maintenancetimer.ensure("/srv", Wish(), Schedule(), Systemd(1), places=places)
    monkeypatch.setattr(maintenancetimer.safety, "fault", lambda _path: "everybody may write")
    with pytest.raises(UnsafeRepository, match="everybody may write"):
        maintenancetimer.ensure("/srv", Wish(), Schedule(), systemd, places=places)
    monkeypatch.setattr(os.path, "exists", lambda _path: False)
    with pytest.raises(InvalidOption, match="no systemd"):
        maintenancetimer.ensure("/srv", Wish(), Schedule(), systemd, places=places)
