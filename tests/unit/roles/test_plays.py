# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the plays and tasks of a rollout must not rely on, for Ansible does not do what its words suggest."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[3]
PLAYBOOKS = [ROOT / "playbooks" / f"{name}.yml" for name in ("rollout", "rollback", "retire", "status")]
TASKS = sorted(path for role in ("rollout", "seed") for path in (ROOT / "roles" / role / "tasks").glob("*.yml"))


def blocks(entries: Any) -> Iterator[dict[str, Any]]:
    """Every play, block and task below ``entries``, in the order in which they run."""
    for entry in entries or ():
        yield entry
        for part in ("tasks", "block", "rescue", "always"):
            yield from blocks(entry.get(part))


def load(path: pathlib.Path) -> list[dict[str, Any]]:
    return list(blocks(yaml.safe_load(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", [*PLAYBOOKS, *TASKS], ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_nothing_but_the_gate_stops_a_rollout(path: pathlib.Path) -> None:
    """One counts no host that is out of reach, and for each batch anew; the other sends healthy hosts back."""
    for entry in load(path):
        assert not {"max_fail_percentage", "any_errors_fatal"} & set(entry), entry["name"]


@pytest.mark.parametrize("path", PLAYBOOKS, ids=lambda path: path.name)
def test_hosts_go_step_by_step_whatever_the_strategy_of_the_configuration_is(path: pathlib.Path) -> None:
    """The gate counts what became of whole waves, and what runs once runs for each host under other strategies."""
    plays = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {play["strategy"] for play in plays} == {"ansible.builtin.linear"}
    assert {play["name"] for play in plays if "serial" in play} <= {"Wave"}


@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_nobody_is_asked_who_may_not_be_there(path: pathlib.Path) -> None:
    """A question waits for nobody where the input is no terminal; approval is another run of the same command."""
    for task in load(path):
        assert set(task.get("ansible.builtin.pause", {"seconds": 0})) == {"seconds"}, task["name"]


@pytest.mark.parametrize("path", TASKS, ids=lambda path: f"{path.parent.parent.name}/{path.name}")
def test_hosts_end_a_phase_and_not_the_play_of_who_uses_the_role(path: pathlib.Path) -> None:
    metas = [task["ansible.builtin.meta"] for task in load(path) if "ansible.builtin.meta" in task]
    assert set(metas) <= {"end_role", "end_play", "reset_connection"}


def test_images_are_confirmed_over_a_connection_that_was_closed_before_without_a_condition() -> None:
    """What resets a connection takes no condition, and a broken sshd hides behind one that is open."""
    tasks = [task for task in load(ROOT / "roles/rollout/tasks/wave.yml") if not {"block", "rescue"} & set(task)]
    (at,) = [number for number, task in enumerate(tasks) if task.get("ansible.builtin.meta") == "reset_connection"]
    assert "when" not in tasks[at]
    assert tasks[at + 1]["composefs.oci.composefs_deployment"]["state"] == "confirmed"


def test_a_wave_that_is_lost_as_a_whole_is_followed_by_the_report() -> None:
    """Where all hosts of a batch fail for good, no later play runs."""
    for name in ("wave", "prefetch", "seed", "prune_seed"):
        (block,) = [entry for entry in load(ROOT / f"roles/rollout/tasks/{name}.yml") if "rescue" in entry][:1]
        assert block["ignore_unreachable"] is True, name
