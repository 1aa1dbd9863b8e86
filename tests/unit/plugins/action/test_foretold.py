# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a pull in check mode leaves for the tasks after it, and only for those of the same run."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest

pytest.importorskip(
    "ansible.plugins.action", reason="ansible-core is not installed for this Python", exc_type=ImportError
)

from ansible import context
from ansible.plugins.action import ActionBase

from ansible_collections.composefs.oci.plugins.action import (
    composefs_check,
    composefs_delta,
    composefs_deployment,
    composefs_deployment_info,
    composefs_image,
    composefs_image_info,
    composefs_mount,
    composefs_mount_info,
    composefs_prune,
    composefs_repository,
    composefs_repository_info,
)
from ansible_collections.composefs.oci.plugins.plugin_utils import foretold

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
PULLED = {"changed": True, "repository": "/r", "name": "app", "digest": TWO, "previous_digest": ONE}


class Task:
    def __init__(self, check_mode: bool = True, **args: Any) -> None:
        self.args = args
        self.async_val = 0
        self.check_mode = check_mode
        self.no_log = False
        self.environment: Any = [{"LANG": "C"}]
        self.written: dict[str, Any] = {}

    def get_ds(self) -> dict[str, Any]:
        return self.written


def run(
    monkeypatch: pytest.MonkeyPatch, action: Any, task: Task, result: dict[str, Any], task_vars: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """The result of an action whose module returns ``result``, and the environment the module had."""
    seen: list[dict[str, str]] = []

    def execute(self: Any, **_options: Any) -> dict[str, Any]:
        seen.extend(self._task.environment)
        return dict(result)

    monkeypatch.setattr(ActionBase, "run", lambda *_arguments, **_options: {})
    monkeypatch.setattr(action.ActionModule, "_execute_module", execute)
    made = action.ActionModule.__new__(action.ActionModule)
    made._task = task
    made._templar = types.SimpleNamespace(template=lambda _value: "never")
    answer = made.run(task_vars=task_vars)
    assert task.environment == [{"LANG": "C"}]
    return answer, seen


@pytest.mark.parametrize("action", [composefs_mount, composefs_deployment])
def test_a_pull_in_check_mode_is_known_to_the_tasks_after_it(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    answer, _seen = run(monkeypatch, composefs_image, Task(name="app"), PULLED, {})
    facts = answer["ansible_facts"]
    _answer, seen = run(monkeypatch, action, Task(), {}, {"ansible_facts": {**facts, "hostname": "x"}})
    assert json.loads(seen[1][foretold.VARIABLE]) == [
        {"repository": "/r", "name": "app", "digest": TWO, "absent": False, "streams": None}
    ]
    # In a real run nothing is told, and what another run left, for example in a cache of facts, does not count.
    assert len(run(monkeypatch, action, Task(check_mode=False), {}, {"ansible_facts": facts})[1]) == 1
    monkeypatch.setattr(foretold, "run_id", lambda: "another")
    assert len(run(monkeypatch, action, Task(), {}, {"ansible_facts": facts})[1]) == 1


def test_a_mount_in_check_mode_is_known_to_a_prune_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"changed": True, "path": "/srv/app", "repository": "/r", "mounted": True, "name": "app", "digest": TWO}
    for mounted, task in ((True, Task(keep_previous="2")), (False, Task(state="unmounted"))):
        answer, _seen = run(monkeypatch, composefs_mount, task, {**result, "mounted": mounted}, {})
        facts = answer["ansible_facts"]
        _answer, seen = run(monkeypatch, composefs_prune, Task(), {}, {"ansible_facts": facts})
        (known,) = json.loads(seen[1][foretold.VARIABLE])
        assert (known["path"], known["digest"], known["absent"]) == ("/srv/app", TWO, not mounted)
        assert known["keep_previous"] == (2 if mounted else 1)
    for task, answer in ((Task(check_mode=False), result), (Task(), {**result, "changed": False})):
        assert "ansible_facts" not in run(monkeypatch, composefs_mount, task, answer, {})[0]


def test_a_run_that_is_real_or_changes_nothing_leaves_no_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    for task, result in (
        (Task(check_mode=False, state="absent"), PULLED),
        (Task(), {**PULLED, "changed": False}),
        (Task(), {"failed": True, "msg": "x"}),
    ):
        assert "ansible_facts" not in run(monkeypatch, composefs_image, task, result, {})[0]


@pytest.mark.parametrize("action", [composefs_image, composefs_prune, composefs_mount, composefs_repository])
def test_a_task_that_only_asks_what_would_be_leaves_no_facts(monkeypatch: pytest.MonkeyPatch, action: Any) -> None:
    """Nobody goes on to do it: another question after it must get the same answer, and so must a run in check mode."""
    result = {**PULLED, "path": "/r", "mounted": True, "created": True, "names": ["app"]}
    task = Task(path="/r")
    assert run(monkeypatch, action, task, result, {})[0]["ansible_facts"]
    task.written = {"composefs.oci.some": {}, "check_mode": True}
    answer, seen = run(monkeypatch, action, task, result, {})
    assert "ansible_facts" not in answer and {foretold.ASKS: "1"} in seen
    # Within a run in check mode what is not there may still come.
    monkeypatch.setattr(context, "CLIARGS", {"check": True})
    assert {foretold.ASKS: "1"} not in run(monkeypatch, action, task, result, {})[1]


def test_each_name_has_a_fact_of_its_own() -> None:
    images = [{**PULLED, "name": name} for name in ("a", "b")] + [{**PULLED, "name": "same", "digest": ONE}]
    facts = foretold.facts_of({"changed": True, "repository": "/r", "images": images}, {"images": ["a", "b", "same"]})
    assert sorted(fact["name"] for fact in facts.values()) == ["a", "b"]
    elsewhere = foretold.facts_of({**PULLED, "repository": "/other"}, {})
    assert set(foretold.facts_of(PULLED, {})) & set(elsewhere) == set()


def test_further_names_and_names_that_are_left_have_facts_too() -> None:
    result = {**PULLED, "tags": ["stage"], "streams": ["oci-layer-" + ONE]}
    facts = list(foretold.facts_of(result, {"name": "app", "rename_from": "was", "tags": ["stage"]}).values())
    told = {fact["name"]: (fact["absent"], fact["digest"]) for fact in facts}
    assert told == {"app": (False, TWO), "stage": (False, TWO), "was": (True, None)}
    assert [stream for fact in facts for stream in fact["streams"]] == ["oci-layer-sha256:" + "1" * 16]
    assert {fact["absent"] for fact in foretold.facts_of(result, {"state": "absent"}).values()} == {True}


def test_what_is_foretold_never_grows_beyond_what_the_kernel_takes_as_one_variable() -> None:
    images = [
        {**PULLED, "name": f"app{number}", "streams": [f"oci-layer-sha256:{'1' * 64}"] * 100} for number in range(100)
    ]
    facts = foretold.facts_of({"changed": True, "repository": "/r", "images": images}, {})
    text = foretold.environment({"ansible_facts": facts})[foretold.VARIABLE]
    assert len(text) < 100_000 and len(json.loads(text)) == 100


@pytest.mark.parametrize(
    "action",
    [
        composefs_check,
        composefs_delta,
        composefs_deployment_info,
        composefs_image,
        composefs_image_info,
        composefs_mount_info,
        composefs_prune,
        composefs_repository_info,
    ],
)
def test_a_repository_that_is_only_foretold_is_known_to_every_task_after_it(
    monkeypatch: pytest.MonkeyPatch, action: Any
) -> None:
    result = {"changed": True, "path": "/r", "upgraded": True, "algorithm": "sha512", "verity": "required"}
    facts = run(monkeypatch, composefs_repository, Task(), result, {})[0]["ansible_facts"]
    _answer, seen = run(monkeypatch, action, Task(), {}, {"ansible_facts": facts})
    (known,) = json.loads(seen[1][foretold.VARIABLE])
    assert (known["repository"], known["upgraded"], known["secure"], known["unsafe"]) == ("/r", True, True, False)
    assert "ansible_facts" not in run(monkeypatch, composefs_repository, Task(check_mode=False), result, {})[0]


def test_a_deployment_in_check_mode_is_known_to_the_tasks_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"changed": True, "path": "/srv/app", "repository": "/r", "name": "app", "digest": TWO, "image_id": None}
    for state, absent, kept in (
        ("activated", False, foretold.EVERYTHING),
        ("confirmed", False, 1),
        ("absent", True, 1),
    ):
        answer, _seen = run(monkeypatch, composefs_deployment, Task(), {**result, "state": state}, {})
        (fact,) = answer["ansible_facts"].values()
        assert (fact["absent"], fact["keep_previous"], fact["state"]) == (absent, kept, state)


@pytest.mark.parametrize(
    ("action", "result"),
    [
        (composefs_image, PULLED),
        (composefs_prune, {"changed": True, "repository": "/r", "names": ["app"]}),
        (composefs_mount, {"changed": True, "path": "/srv/app", "repository": "/r", "mounted": True}),
        (composefs_repository, {"changed": True, "path": "/r", "created": True}),
    ],
)
def test_what_was_foretold_and_then_done_is_not_foretold_any_more(
    monkeypatch: pytest.MonkeyPatch, action: Any, result: dict[str, Any]
) -> None:
    facts = run(monkeypatch, action, Task(), result, {})[0]["ansible_facts"]
    known = {"ansible_facts": facts}
    done = run(monkeypatch, action, Task(check_mode=False), result, known)[0]["ansible_facts"]
    assert done == dict.fromkeys(facts, {})
    _answer, seen = run(monkeypatch, composefs_image, Task(), {}, {"ansible_facts": {**facts, **done}})
    assert seen == [{"LANG": "C"}]
