# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_maintenance through AnsibleModule; what the timer does is tested with the engine."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.operations import maintenancetimer
from ansible_collections.composefs.oci.plugins.modules import composefs_maintenance
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the module asks the engine for."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr(maintenancetimer, "ensure", lambda *words, check: found.append((*words, check)) or True)
    monkeypatch.setattr(maintenancetimer, "remove", lambda *words, check: found.append((*words, check)) or True)
    return found


def call(capsys: pytest.CaptureFixture[str], **values: Any) -> dict[str, Any]:
    with arguments({"_ansible_remote_tmp": "/tmp", **values}), pytest.raises(SystemExit):
        composefs_maintenance.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_the_timer_is_as_the_task_says(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    result = call(
        capsys,
        repository="/srv/images/",
        schedule="weekly",
        spread=7,
        level="objects",
        remove=["a*"],
        keep=["ab"],
        keep_last=2,
        older_than="2d",
        timeout=9,
    )
    assert (result["changed"], result["repository"]) == (True, "/srv/images")
    assert result["unit"] == "composefs-maintenance-srv-images.timer"
    ((path, wish, schedule, check),) = asked
    assert (path, schedule, check) == ("/srv/images", maintenancetimer.Schedule("weekly", 7), False)
    assert (wish.level, wish.prune.remove, wish.prune.keep) == ("objects", ["a*"], ["ab"])
    assert (wish.prune.keep_last, wish.prune.older_than, wish.prune.timeout) == (2, 172800.0, 9)


def test_check_mode_and_absence_are_passed_on(asked: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, repository="/srv", prune=False, _ansible_check_mode=True)["changed"]
    assert call(capsys, repository="/srv", state="absent")["changed"]
    assert asked[0][1].prune is None and asked[0][3] is True and asked[1] == ("/srv", False)


@pytest.mark.parametrize(
    "values, told",
    [
        ({"keep_last": 2}, "keep_last says nothing"),
        ({"remove": ["a*"], "prune": False}, "'remove' says nothing"),
        ({"remove": ["a*"], "keep_last": 2}, ""),
    ],
)
def test_options_that_say_nothing_are_told(
    values: dict[str, Any], told: str, asked: list[Any], warned: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, repository="/srv", **values)["changed"]
    assert len(warned) == bool(told) and told in str(warned)


@pytest.mark.parametrize("option", [{"keep_last": -1}, {"timeout": -1}, {"spread": -1}, {"older_than": "soon"}])
def test_what_means_nothing_is_refused(
    option: dict[str, Any], asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = call(capsys, repository="/srv", **option)
    assert (result["failed"], result["error"], asked) == (True, "invalid_option", [])


def test_the_role_passes_every_option_on() -> None:
    options = set(yaml.safe_load(composefs_maintenance.DOCUMENTATION)["options"])
    role = composefs_maintenance.__file__.partition("plugins")[0] + "roles/maintenance/"
    with open(role + "tasks/main.yml", encoding="utf-8") as file:
        (task,) = yaml.safe_load(file)
    assert set(task["composefs.oci.composefs_maintenance"]) == {*options, "repository", "unsafe_repository"}
    with open(role + "meta/argument_specs.yml", encoding="utf-8") as file:
        variables = yaml.safe_load(file)["argument_specs"]["main"]["options"]
    assert set(variables) == {f"maintenance_{option}" for option in (*options, "repository", "unsafe_repository")}
