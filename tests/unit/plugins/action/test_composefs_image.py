# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The action that watches a pull: whom it shows what, and that the result is the module's own."""

from __future__ import annotations

import json
import os
from typing import Any, NoReturn

import pytest

pytest.importorskip(
    "ansible.plugins.action", reason="ansible-core is not installed for this Python", exc_type=ImportError
)

from ansible.errors import AnsibleConnectionFailure

from ansible_collections.composefs.oci.plugins.action import composefs_image
from ansible_collections.composefs.oci.plugins.action.composefs_image import ActionModule, watched

JOB = {"ansible_job_id": "j1", "started": 1, "finished": 0, "results_file": "/r/j1", "changed": True}
RUNNING = {"started": 1, "finished": 0, "ansible_job_id": "j1"}
DONE = {
    "started": 1,
    "finished": 1,
    "ansible_job_id": "j1",
    "results_file": "/r/j1",
    "stdout": "",
    "stderr": "",
    "changed": True,
    "digest": "sha256:1",
}
RESULT = {"changed": True, "digest": "sha256:1"}


def state(done: int, message: str = "", finished: bool = False) -> str:
    layers = [{"id": "sha256:a", "state": "done" if done == 100 else "bytes", "done": done, "total": 100}]
    return json.dumps(
        {
            "done": done,
            "total": 100,
            "rate": 10,
            "elapsed": 1.0,
            "message": message,
            "finished": finished,
            "layers": layers,
        }
    )


def give_up(error: Exception) -> NoReturn:
    raise error


class Shell:
    tmpdir: str | None = None

    def join_path(self, *parts: str) -> str:
        return "/".join(parts)

    def quote(self, text: str) -> str:
        return f"'{text}'"


class Connection:
    def __init__(self) -> None:
        self._shell = Shell()


class Templar:
    def template(self, text: str) -> str:
        return "never" if text == "{{ no }}" else text


class Task:
    def __init__(self, **args: Any) -> None:
        self.args = args
        self.async_val = 0
        self.check_mode = False
        self.no_log = False


class Host(ActionModule):
    """The action with a host that is made up: ``answers`` to async_status, one after the other, and what the progress
    file says meanwhile.
    """

    def __init__(
        self, task: Task, answers: list[Any], progress: list[Any] | None = None, job: dict[str, Any] | None = None
    ) -> None:
        self._task = task
        self._connection = Connection()
        self._templar = Templar()
        self.answers = answers
        self.progress = progress or []
        self.job = JOB if job is None else job
        self.calls: list[tuple[str, dict[str, Any], bool]] = []
        self.removed: list[str] = []
        self.commands: list[str] = []

    def _make_tmp_path(self, remote_user: Any = None) -> str:
        self._connection._shell.tmpdir = "/remote/tmp"
        return "/remote/tmp"

    def _remove_tmp_path(self, tmp_path: str, force: bool = False) -> None:
        self.removed.append(tmp_path)
        self._connection._shell.tmpdir = None

    def _remote_expand_user(self, path: str, sudoable: bool = True, pathsep: Any = None) -> str:
        return path.replace("~", "/home/u")

    def get_shell_option(self, option: str, default: Any = None) -> Any:
        return default

    def _low_level_execute_command(self, cmd: str, sudoable: bool = True, **others: Any) -> dict[str, Any]:
        self.commands.append(cmd)
        answer = self.progress.pop(0) if self.progress else {"rc": 1, "stdout": ""}
        if isinstance(answer, Exception):
            give_up(answer)
        return answer if isinstance(answer, dict) else {"rc": 0, "stdout": answer}

    def _execute_module(
        self,
        module_name: Any = None,
        module_args: Any = None,
        task_vars: Any = None,
        wrap_async: bool = False,
        **others: Any,
    ) -> dict[str, Any]:
        self.calls.append((module_name or "", module_args or {}, wrap_async))
        if module_name is None:
            if wrap_async and module_args is not None:
                assert self._task.async_val, "only then a module is run as a job"
                self._connection._shell.tmpdir = None  # the job's own from now on
                return dict(self.job)
            return dict(RESULT)
        self._connection._shell.tmpdir = "/remote/another"
        answer = self.answers.pop(0) if self.answers or module_args.get("mode") != "cleanup" else {}
        if isinstance(answer, Exception):
            give_up(answer)
        return dict(answer)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is displayed; and no time passes."""
    lines: list[str] = []
    monkeypatch.setattr(composefs_image.display, "display", lambda text, *arguments, **others: lines.append(text))
    monkeypatch.setattr(composefs_image.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(composefs_image.ActionBase, "run", lambda self, tmp=None, task_vars=None: {})
    return lines


ALWAYS = {"composefs_progress": "always", "inventory_hostname": "web1"}


def statuses(host: Host) -> list[str]:
    return [args.get("mode", "status") for name, args, _async in host.calls if name == "ansible.legacy.async_status"]


# --- whether anybody looks
# -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wish", "ci", "terminal", "expected"),
    [
        ("auto", "", True, True),
        ("auto", "", False, False),
        ("auto", "true", True, False),
        ("anything", "", True, True),
        ("always", "true", False, True),
        ("never", "", True, False),
    ],
)
def test_progress_is_for_people_at_a_terminal(
    monkeypatch: pytest.MonkeyPatch, wish: str, ci: str, terminal: bool, expected: bool
) -> None:
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(composefs_image, "_is_terminal", lambda pid: terminal)
    assert watched(wish) is expected


def test_a_process_whose_output_is_no_terminal_or_that_is_gone_is_not_looked_at() -> None:
    assert not composefs_image._is_terminal(2**22 + 1)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1)
        os.read(read, 1)
        os._exit(0)
    try:
        descriptors = sorted(os.listdir("/proc/self/fd"))
        assert not composefs_image._is_terminal(child)
        assert sorted(os.listdir("/proc/self/fd")) == descriptors
    finally:
        os.write(write, b"x")
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


@pytest.mark.parametrize("why", ["nobody", "template", "check mode", "async", "no_log", "absent"])
def test_where_nothing_is_shown_the_module_just_runs(
    shown: list[str], monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    task = Task(ref="a.b/c", **({"state": "absent"} if why == "absent" else {}))
    task.check_mode, task.no_log, task.async_val = why == "check mode", why == "no_log", 60 if why == "async" else 0
    host = Host(task, [])
    wish = {"nobody": "never", "template": "{{ no }}"}.get(why, "always")
    result = host.run(task_vars={**ALWAYS, "composefs_progress": wish})
    assert result == RESULT and shown == []
    assert host.calls == [("", {}, why == "async")]


# --- watching
# --------------------------------------------------------------------------------------------------------------------


def test_a_line_for_each_change_and_the_modules_own_result(shown: list[str]) -> None:
    host = Host(
        Task(ref="a.b/c"),
        [RUNNING, RUNNING, RUNNING, DONE],
        [state(10), state(10), state(60), state(100, "Making the EROFS image of app")],
    )
    assert host.run(task_vars=ALWAYS) == RESULT
    assert len(shown) == 3 and all(line.startswith("web1: ") for line in shown)
    assert "10%" in shown[0] and "60%" in shown[1] and "EROFS" in shown[2]
    assert statuses(host) == ["status"] * 4 + ["cleanup"]
    assert host.removed == ["/remote/tmp"] and host._task.async_val == 0
    assert host._connection._shell.tmpdir == "/remote/another", "which is removed after every task"


def test_the_job_gets_a_file_of_its_own_for_its_progress(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), [DONE])
    host.run(task_vars=ALWAYS)
    assert host.calls[0] == ("", {"ref": "a.b/c", "progress_file": "/remote/tmp/progress.json"}, True)
    assert host.commands == ["cat '/remote/tmp/progress.json'"]
    assert host._task.args == {"ref": "a.b/c"}, "the task itself is not changed"


def test_a_file_that_the_task_names_is_the_one_that_is_looked_at(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c", progress_file="/var/p q"), [DONE])
    host.run(task_vars=ALWAYS)
    assert host.calls[0][1]["progress_file"] == "/var/p q" and host.commands == ["cat '/var/p q'"]


@pytest.mark.parametrize("content", [{"rc": 1, "stdout": "cat: no such file"}, "", "{", "[]", "{}", '{"done": "x"}'])
def test_a_progress_that_cannot_be_read_shows_nothing(shown: list[str], content: Any) -> None:
    host = Host(Task(ref="a.b/c"), [RUNNING, DONE], [content, state(100)])
    assert host.run(task_vars=ALWAYS) == RESULT
    assert len(shown) == 1


def test_a_job_that_fails_is_a_task_that_fails(shown: list[str]) -> None:
    failed = {**DONE, "failed": True, "msg": "No such image.", "error": "image_not_found"}
    host = Host(Task(ref="a.b/c"), [failed])
    result = host.run(task_vars=ALWAYS)
    assert result["failed"] and result["error"] == "image_not_found" and statuses(host) == ["status", "cleanup"]


@pytest.mark.parametrize("job", [{"failed": True, "msg": "no python"}, {"msg": "odd"}])
def test_a_job_that_does_not_start_is_told_and_not_watched(shown: list[str], job: dict[str, Any]) -> None:
    host = Host(Task(ref="a.b/c"), [], job=job)
    assert host.run(task_vars=ALWAYS) == job and statuses(host) == [] and host._task.async_val == 0


def test_a_job_that_is_gone_ends_the_watch(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), [RUNNING, {"failed": True, "msg": "could not find job"}])
    assert host.run(task_vars=ALWAYS) == {"failed": True, "msg": "could not find job"}


# --- a host that is out of reach
# -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["raised", "returned", "while reading"])
def test_a_connection_that_breaks_for_a_moment_does_not_end_the_task(shown: list[str], way: str) -> None:
    broken: Any = {"unreachable": True, "msg": "broken"} if way == "returned" else AnsibleConnectionFailure("broken")
    answers = [RUNNING, broken, broken, DONE] if way != "while reading" else [RUNNING, DONE]
    progress = [state(10), broken, state(100)] if way == "while reading" else []
    host = Host(Task(ref="a.b/c"), answers, progress)
    assert host.run(task_vars=ALWAYS) == RESULT and statuses(host)[-1] == "cleanup"


@pytest.mark.parametrize("way", ["raised", "returned"])
def test_a_host_that_stays_away_is_given_up(shown: list[str], monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    now = [0.0]

    def clock() -> float:
        now[0] += 10
        return now[0]

    monkeypatch.setattr(composefs_image.time, "monotonic", clock)
    broken: Any = {"unreachable": True, "msg": "broken"} if way == "returned" else AnsibleConnectionFailure("broken")
    host = Host(Task(ref="a.b/c"), [RUNNING] + [broken] * 1000)
    if way == "raised":
        with pytest.raises(AnsibleConnectionFailure):
            host.run(task_vars=ALWAYS)
    else:
        assert host.run(task_vars=ALWAYS)["unreachable"]
    assert 1000 > len(host.answers) > 950 and host.removed == ["/remote/tmp"]


def test_a_connection_that_breaks_after_the_result_does_not_spoil_it(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), [DONE, AnsibleConnectionFailure("broken")])
    assert host.run(task_vars=ALWAYS) == RESULT


def test_looks_are_frequent_in_the_beginning_and_rarer_later(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(composefs_image.time, "sleep", slept.append)
    Host(Task(ref="a.b/c"), [RUNNING] * 9 + [DONE]).run(task_vars=ALWAYS)
    assert slept == sorted(slept) and slept[0] <= 0.2 and slept[-1] == composefs_image.POLL
