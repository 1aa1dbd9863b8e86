# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The action that watches a pull: whom it shows what, and that the result is the module's own."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
from typing import Any, NoReturn

import pytest

pytest.importorskip(
    "ansible.plugins.action", reason="ansible-core is not installed for this Python", exc_type=ImportError
)

from ansible.errors import AnsibleConnectionFailure

from ansible_collections.composefs.oci.plugins.action import composefs_image
from ansible_collections.composefs.oci.plugins.action.composefs_image import ActionModule, watched

TOKEN = "0123456789abcdef" * 2
DIRECTORY = "/tmp/composefs-oci-" + TOKEN
JOB = {"changed": False, "composefs_job": DIRECTORY}
RESULT = {"changed": True, "digest": "sha256:1"}


def state(done: int, message: str = "", name: str = "app") -> str:
    layers = [{"id": "sha256:a", "state": "done" if done == 100 else "bytes", "done": done, "total": 100}]
    return json.dumps(
        {
            "done": done,
            "total": 100,
            "rate": 10,
            "elapsed": 1.0,
            "message": message,
            "finished": False,
            "images": [name],
            "layers": layers,
        }
    )


def give_up(error: BaseException) -> NoReturn:
    raise error


class Shell:
    tmpdir: str | None = None


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
        self.environment: Any = []

    def get_ds(self) -> dict[str, Any]:
        return {}


class Host(ActionModule):
    """The action with a host that is made up: what looking at the job finds, one look after the other."""

    def __init__(
        self, task: Task, looks: list[Any], first: dict[str, Any] | None = None, result: dict[str, Any] | None = None
    ) -> None:
        self._task = task
        self._connection = Connection()
        self._templar = Templar()
        self.looks = looks
        self.first = JOB if first is None else first
        self.result = RESULT if result is None else result
        self.calls: list[tuple[Any, bool]] = []
        self.commands: list[str] = []

    def _low_level_execute_command(self, cmd: str, sudoable: bool = True, **others: Any) -> dict[str, Any]:
        self.commands.append(cmd)
        assert sudoable, "the job belongs to the user that the task became"
        if "stop" in cmd:
            return {"rc": 0, "stdout": ""}
        answer = self.looks.pop(0)
        if isinstance(answer, BaseException):
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
        assert module_args is None, "the module gets what the task says"
        self.calls.append((self._task.environment, wrap_async))
        return dict(self.first if {"COMPOSEFS_OCI_WATCH": TOKEN} in self._task.environment else self.result)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is displayed; and no time passes."""
    lines: list[str] = []
    monkeypatch.setattr(composefs_image.display, "display", lambda text, *arguments, **others: lines.append(text))
    monkeypatch.setattr(composefs_image.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(composefs_image.ActionBase, "run", lambda self, tmp=None, task_vars=None: {})
    monkeypatch.setattr(composefs_image.secrets, "token_hex", lambda count: TOKEN)
    monkeypatch.setattr(composefs_image, "on_terminal", lambda: False)
    return lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Ten seconds pass between two looks at the time."""
    now = [1000.0]

    def tick() -> float:
        now[0] += 10
        return now[0]

    monkeypatch.setattr(composefs_image.time, "monotonic", tick)
    return now


ALWAYS = {"composefs_progress": "always", "inventory_hostname": "web1"}


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
        os.dup2(write, 2)
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
    assert host.calls == [([], why == "async")]


# --- watching
# --------------------------------------------------------------------------------------------------------------------


def test_a_task_that_is_over_in_a_moment_is_not_looked_after(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), [], first=RESULT)
    host._task.environment = [{"https_proxy": "proxy.example.com"}]
    assert host.run(task_vars=ALWAYS) == RESULT and host.commands == [] and shown == []
    assert host.calls == [([{"https_proxy": "proxy.example.com"}, {"COMPOSEFS_OCI_WATCH": TOKEN}], False)]
    assert host._task.environment == [{"https_proxy": "proxy.example.com"}], "the task itself is not changed"


def test_a_line_for_each_change_and_the_modules_own_result(shown: list[str], clock: list[float]) -> None:
    composefs_image.RARELY, old = 0.0, composefs_image.RARELY
    try:
        host = Host(
            Task(ref="a.b/c"),
            [
                "busy\n",
                "busy\n" + state(10),
                "busy\n" + state(10),
                "busy\n" + state(60),
                "busy\n" + state(100, "Making the EROFS image"),
                "done\n",
            ],
        )
        assert host.run(task_vars=ALWAYS) == RESULT
    finally:
        composefs_image.RARELY = old
    assert len(shown) == 3 and all(line.startswith("web1: app: ") for line in shown)
    assert "10%" in shown[0] and "60%" in shown[1] and "EROFS" in shown[2]
    assert host.calls[-1] == ([{"COMPOSEFS_OCI_COLLECT": DIRECTORY}], False)


def test_every_look_is_a_sign_of_life(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n", "done\n"])
    host.run(task_vars=ALWAYS)
    assert len(host.commands) == 2
    assert all(f"cd {DIRECTORY}" in command and ": > sign" in command for command in host.commands)


def test_where_a_line_cannot_be_redrawn_it_is_rare(shown: list[str], clock: list[float]) -> None:
    host = Host(Task(ref="a.b/c"), [*(f"busy\n{state(done)}" for done in range(60)), "done\n"])
    host.run(task_vars=ALWAYS)
    # Twenty seconds pass between two looks in this test, and a line comes every thirty.
    assert 25 <= len(shown) <= 31


@pytest.mark.parametrize(("hosts", "in_place"), [(["web1"], True), (["web1", "web2"], False)])
def test_on_a_terminal_the_line_of_a_single_host_is_drawn_over_itself_and_goes(
    shown: list[str], monkeypatch: pytest.MonkeyPatch, hosts: list[str], in_place: bool
) -> None:
    monkeypatch.setattr(composefs_image, "on_terminal", lambda: True)
    host = Host(Task(ref="a.b/c"), ["busy\n" + state(10), "busy\n" + state(60), "done\n"])
    host.run(task_vars={**ALWAYS, "ansible_play_batch": hosts})
    assert [line.startswith("\r\x1b[2K") for line in shown] == ([True] * 3 if in_place else [False])
    if in_place:
        assert shown[-1] == "\r\x1b[2K" and "60%" in shown[1]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"done": "x"}', "7", state(10).replace("10,", "1e999,")])
def test_a_progress_that_cannot_be_read_shows_nothing(shown: list[str], content: str) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n" + content, "busy\n" + state(50), "done\n"])
    assert host.run(task_vars=ALWAYS) == RESULT
    assert len([line for line in shown if "50%" in line]) == 1


def test_what_a_host_says_cannot_steer_the_terminal_or_flood_it(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n" + state(10, name="\x1b]0;owned\x07\u202e" + "x" * 5000), "done\n"])
    host.run(task_vars=ALWAYS)
    assert len(shown) == 1 and shown[0].isprintable() and len(shown[0]) < 300


def test_a_job_that_fails_is_a_task_that_fails(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), ["done\n"], result={"failed": True, "msg": "No.", "error": "image_not_found"})
    assert host.run(task_vars=ALWAYS) == {"failed": True, "msg": "No.", "error": "image_not_found"}


def test_a_result_is_read_where_the_module_that_fetches_it_cannot_be_unpacked(shown: list[str]) -> None:
    unpacked = {"failed": True, "module_stdout": "", "module_stderr": "OSError: No space left on device", "rc": 1}
    looks = ["done\n", "\n" + json.dumps({**RESULT, "_ansible_no_log": True}) + "\n"]
    host = Host(Task(), list(looks), result=unpacked)
    result = host.run(task_vars={"composefs_progress": "always"})
    assert {key: result[key] for key in RESULT} == RESULT and not result.get("failed")
    assert "cat result" in host.commands[-1] and DIRECTORY in host.commands[-1] and "_ansible_no_log" not in result
    # Where there is none, what was said before stands.
    for nothing in ("gone\n", "[1]\n"):
        host = Host(Task(), ["done\n", nothing], result=unpacked)
        assert host.run(task_vars={"composefs_progress": "always"})["failed"]


def test_a_job_that_is_gone_ends_the_watch(shown: list[str]) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n", "gone\n"], result={"failed": True, "msg": "gone"})
    assert host.run(task_vars=ALWAYS) == {"failed": True, "msg": "gone"}


def test_another_directory_than_the_one_agreed_on_is_not_looked_at(shown: list[str]) -> None:
    odd = {"changed": False, "composefs_job": "/etc"}
    host = Host(Task(ref="a.b/c"), [], first=odd)
    assert host.run(task_vars=ALWAYS) == odd and host.commands == []


# --- interrupts
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The signals that this process sends to itself, instead of sending them."""
    sent: list[int] = []
    monkeypatch.setattr(composefs_image.os, "kill", lambda pid, number: sent.append(number))
    return sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_job_before_the_worker_ends(shown: list[str], killed: list[int], number: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    host = Host(Task(ref="a.b/c"), ["busy\n", composefs_image._Interrupted(number)])
    with pytest.raises(composefs_image._Interrupted):
        host.run(task_vars=ALWAYS)
    assert ": > stop" in host.commands[-1] and DIRECTORY in host.commands[-1] and killed == [number]
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before


def test_a_worker_without_its_playbook_ends_the_job(
    shown: list[str], killed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    parents = iter([7, 7, 1])
    monkeypatch.setattr(composefs_image.os, "getppid", lambda: next(parents))
    host = Host(Task(ref="a.b/c"), ["busy\n"] * 9)
    with pytest.raises(composefs_image._Interrupted):
        host.run(task_vars=ALWAYS)
    assert ": > stop" in host.commands[-1]


# --- a host that is out of reach
# -------------------------------------------------------------------------------------------------------------


def test_a_connection_that_breaks_for_a_moment_does_not_end_the_task(shown: list[str]) -> None:
    broken = AnsibleConnectionFailure("broken")
    host = Host(Task(ref="a.b/c"), ["busy\n", broken, {"rc": 255, "stdout": ""}, "busy\n", "done\n"])
    assert host.run(task_vars=ALWAYS) == RESULT


def test_a_host_that_stays_away_is_given_up(shown: list[str], clock: list[float]) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n"] + [AnsibleConnectionFailure("broken")] * 1000)
    with pytest.raises(AnsibleConnectionFailure):
        host.run(task_vars=ALWAYS)
    assert 1000 > len(host.looks) > 950


def test_a_host_that_answers_nonsense_for_long_is_given_up(shown: list[str], clock: list[float]) -> None:
    host = Host(Task(ref="a.b/c"), ["busy\n"] + [{"rc": 1, "stdout": "motd"}] * 1000)
    assert host.run(task_vars=ALWAYS)["failed"]


@pytest.mark.parametrize("live", [False, True])
def test_no_host_steers_the_terminal_of_the_controller(live: bool, shown: list[str]) -> None:
    evil = "\x1b]0;owned\x07\x1b[2J\u202e"
    answer = {"msg": evil * 1000, "os": evil, "images": [{"name": evil}], "warnings": [evil], "labels": {"a": evil}}
    host = Host(Task(ref="x"), [f"busy\n{state(50, evil, evil)}", "done\n"], result=answer)
    result = host.run(task_vars={"composefs_progress": "always" if live else "never", "inventory_hostname": "h"})
    assert result.pop("labels") == {"a": evil}, "what is data stays as the image has it"
    assert "\x1b" not in str(result) and r"\x1b" in result["msg"]
    assert all(line.isprintable() for line in [result["msg"], result["os"], *result["warnings"], *shown])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other users, which only root can be")
@pytest.mark.parametrize("how", ["directory", "link"])
@pytest.mark.parametrize("which", ["look", "stop"])
def test_a_directory_that_somebody_else_made_after_a_job_is_left_alone(
    tmp_path: pathlib.Path, how: str, which: str
) -> None:
    """Root would empty the file that a planted ``sign`` leads to."""
    tmp_path.chmod(0o1777)
    place = tmp_path / f"composefs-oci-{TOKEN}"
    victim = tmp_path / "victim"
    victim.mkdir()
    for name in ("precious", "result"):
        (victim / name).write_text("precious")
    if how == "link":
        place.symlink_to(victim)
    else:
        place.mkdir()
        for name in ("sign", "stop"):
            (place / name).symlink_to(victim / "precious")
        os.mkfifo(place / "progress")
        (place / "result").write_text("forged")
    os.chown(place, 12345, 12345, follow_symlinks=False)
    script = composefs_image.LOOK_SCRIPT if which == "look" else composefs_image.STOP_SCRIPT
    text = script.format(enter=composefs_image._enter(str(place)), directory=str(place), looks=1, pause=0.01)
    shells = [shell for shell in ("/bin/sh", "/bin/bash", "/bin/busybox") if os.path.exists(shell)]
    for shell in shells:
        words = [shell, "sh", "-c", text] if shell.endswith("busybox") else [shell, "-c", text]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == "gone\n"
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("precious", "result"), "precious"
    )


@pytest.mark.parametrize("linked", [False, True])
def test_the_directory_of_a_job_is_looked_at_wherever_the_place_for_temporary_things_lies(
    tmp_path: pathlib.Path, linked: bool
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "tmp").symlink_to("private") if linked else (tmp_path / "private").rename(tmp_path / "tmp")
    place = tmp_path / "tmp" / f"composefs-oci-{TOKEN}"
    place.mkdir()
    (place / "progress").write_text("far")
    for result, word in ((None, "busy"), ("x", "done")):
        if result:
            (place / "result").write_text(result)
        text = composefs_image.LOOK_SCRIPT.format(enter=composefs_image._enter(str(place)), looks=1, pause=0.01)
        done = subprocess.run(["/bin/sh", "-c", text], capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout == f"{word}\nfar" and (place / "sign").exists()
