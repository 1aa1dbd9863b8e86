# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_image``, show a live line per host while it works, and end it when the playbook is ended.

A module cannot print. So a pull that is watched becomes a job on the host if it takes longer than a moment (see
``module_utils/host/watch.py``), and this plugin looks after it: it touches a file as a sign that somebody is there,
reads how far the job is, and collects its result. Where nobody looks (no terminal, CI, check mode, a task that is
asynchronous already) the module just runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
import types
import typing as t

from ansible.errors import AnsibleConnectionFailure, AnsibleError
from ansible.module_utils.parsing.convert_bool import boolean
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.host.watch import (
    COLLECT,
    PATIENCE,
    PLACES,
    WATCH,
    directory_of,
)
from ansible_collections.composefs.oci.plugins.module_utils.progress import summary
from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import facts_of, left, told
from ansible_collections.composefs.oci.plugins.plugin_utils.gate import shown

display = Display()

ARCHIVES = ("oci-archive:", "docker-archive:")
# How often the host is looked at from within one command there, and how many times, before the command comes back.
LOOK = 0.25
LOOKS = 4
# Seconds between two lines where a line cannot be drawn over the one before.
RARELY = 30.0
# Seconds that ending a job may take after an interrupt.
STOPPING = 10

# One look: a sign that somebody is there, then wait a moment for the result, then tell what there is.
# The directory is left alone unless it is the user's own and no link: when a job has removed it, anybody can make
# another one of that name, and what is written there would go wherever planted links lead.
_ENTER = """\
here=$(cd {place} 2>/dev/null && pwd -P) || here=/
cd {directory} 2>/dev/null && [ "$(pwd -P)" = "$here/{name}" ] && [ -O . ] || {{ echo gone; exit 0; }}
"""
LOOK_SCRIPT = """\
{enter}\
: > sign
n=0
while [ $n -lt {looks} ] && [ ! -e result ]; do sleep {pause} || sleep 1; n=$((n + 1)); done
if [ -e result ]; then echo done; else echo busy; fi
cat progress 2>/dev/null || :
"""
# The way to a result where no module can be unpacked, because the place that modules are unpacked in is full.
READ_SCRIPT = """\
{enter}\
cat result && cd / && rm -rf {directory}
"""
STOP_SCRIPT = """\
{enter}\
: > stop
n=0
while [ $n -lt 20 ] && [ -d {directory} ]; do sleep {pause} || sleep 1; n=$((n + 1)); done
"""


class _Interrupted(BaseException):
    """Ansible told this worker to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def watched(wish: str) -> bool:
    """Whether progress is wanted: by ``wish``, the variable ``composefs_progress`` (``always``, ``never``), else if a
    person looks at a terminal.
    """
    if wish in ("always", "never"):
        return wish == "always"
    if os.environ.get("CI"):
        return False
    return on_terminal()


def on_terminal() -> bool:
    """Whether standard error, where the line is shown, is a terminal."""
    # Since ansible-core 2.19 a worker is cut off from the terminal; its parent is the process that prints.
    return any(_is_terminal(pid) for pid in (os.getpid(), os.getppid()))


def _is_terminal(pid: int) -> bool:
    try:
        fd = os.open(f"/proc/{pid}/fd/2", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)


class Line:
    """The live line of one host. It is drawn over itself where only one host is at work and a person looks; elsewhere
    it comes seldom. It goes to standard error, so that the output of a callback for machines stays whole.
    """

    def __init__(self, host: str, in_place: bool) -> None:
        self._host = host
        self._in_place = in_place
        self._shown = ""
        self._when = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if not text or text == self._shown or (not self._in_place and self._shown and now - self._when < RARELY):
            return
        self._shown, self._when = text, now
        if self._in_place:
            width = _columns()
            display.display(
                f"\r\x1b[2K{f'{self._host}: {text}'[: width - 1]}", stderr=True, screen_only=True, newline=False
            )
        else:
            display.display(f"{self._host}: {text}", stderr=True)

    def close(self) -> None:
        if self._in_place and self._shown:
            display.display("\r\x1b[2K", stderr=True, screen_only=True, newline=False)


def _listed(environment: t.Any) -> list[t.Any]:
    return environment if isinstance(environment, list) else [environment] if environment else []


def _columns() -> int:
    return max(20, getattr(display, "columns", 80) or 80)


class ActionModule(ActionBase):
    """The action behind ``composefs.oci.composefs_image``."""

    _supports_async = True
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result. The host need not be honest, so its texts go through the gate here as well."""
        before = self._task.environment
        if self._task.check_mode:
            self._task.environment = told(before, self._task, task_vars)
        try:
            result = self._copied() or self._run(tmp, task_vars)
            if not self._task.no_log:
                facts = left(self.facts, result, self._task, task_vars)
                if facts:
                    result["ansible_facts"] = facts
        finally:
            self._task.environment = before
            if self._copies:
                with contextlib.suppress(AnsibleConnectionFailure):
                    self._remove_tmp_path(self._copies)
        return shown(result)

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """What a result of check mode leaves for later tasks of the run."""
        return facts_of(result, self._task.args)

    # The directory on the host with copies of archives.
    _copies = ""

    def _copied(self) -> dict[str, t.Any]:
        """Copy the archives that lie on the controller to the host; a failure as a result, else nothing."""
        arguments = self._task.args
        if boolean(arguments.get("remote_src", True), strict=False) or arguments.get("state") == "absent":
            return {}
        if self._task.async_val:
            return {"failed": True, "msg": "With remote_src: false a task cannot be async.", "error": "invalid_option"}
        images = arguments.get("images") or [arguments]
        places: dict[str, str] = {}
        try:
            for image in images:
                text = str(image if isinstance(image, str) else image.get("ref") or "")
                if not text.startswith(ARCHIVES):
                    continue
                reference = parse_reference(text)
                if reference.path in places:
                    continue
                found = self._find_needle("files", reference.path)
                if not self._copies:
                    self._copies = self._make_tmp_path()
                there = self._connection._shell.join_path(self._copies, f"archive-{len(places)}.tar")
                places[reference.path] = self._transfer_file(self._loader.get_real_file(found), there) or there
        except EngineError as error:
            return {"failed": True, "msg": str(error), "error": error.code}
        except AnsibleError as error:
            return {"failed": True, "msg": str(error), "error": "image_not_found"}
        if places:
            self._fixup_perms2([self._copies, *places.values()])
            self._task.environment = [*_listed(self._task.environment), {PLACES: json.dumps(places)}]
        return {}

    def _run(self, tmp: str | None, task_vars: dict[str, t.Any] | None) -> dict[str, t.Any]:
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        quiet = (
            self._task.async_val
            or self._task.check_mode
            or self._task.no_log
            or self._task.args.get("state") == "absent"
        )
        if quiet or not watched(str(self._templar.template(task_vars.get("composefs_progress", "auto")))):
            result.update(self._execute_module(task_vars=task_vars, wrap_async=bool(self._task.async_val)))
            return result
        token = secrets.token_hex(16)
        directory = directory_of(token)
        try:
            with _signals_raise():
                result.update(self._run_watched(token, directory, task_vars))
        except _Interrupted as interrupt:
            self._stop(directory)
            # As without this plugin, the worker and what it started end now.
            os.kill(os.getpid(), interrupt.number)
            raise
        return result

    def _run_watched(self, token: str, directory: str, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        answer = self._execute_with(WATCH, token, task_vars)
        if answer.get("composefs_job") == directory:
            hosts = task_vars.get("ansible_play_batch") or task_vars.get("ansible_play_hosts") or [None]
            line = Line(task_vars.get("inventory_hostname", "?"), on_terminal() and len(hosts) == 1)
            try:
                answer = self._watch(directory, line, task_vars)
            finally:
                line.close()
        return answer

    def _execute_with(self, variable: str, value: str, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """Run the module with one more variable in its environment. It is no option, because it is not for users."""
        before = self._task.environment
        self._task.environment = [*_listed(before), {variable: value}]
        try:
            return self._execute_module(task_vars=task_vars)
        finally:
            self._task.environment = before

    def _watch(self, directory: str, line: Line, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        parent = os.getppid()
        script = LOOK_SCRIPT.format(enter=_enter(directory), looks=LOOKS, pause=LOOK)
        heard = time.monotonic()
        while True:
            if os.getppid() != parent:
                raise _Interrupted(signal.SIGTERM)  # the playbook is gone, and nobody is there to send a signal
            try:
                answer = self._low_level_execute_command(script, sudoable=True)
                word, _newline, state = answer.get("stdout", "").partition("\n")
                if word.strip() in ("done", "gone"):
                    collected = self._execute_with(COLLECT, directory, task_vars)
                    if not collected.get("unreachable"):
                        return self._read(directory) or collected if "module_stdout" in collected else collected
                elif word.strip() == "busy":
                    heard = time.monotonic()
                    line.show(_text(state))
                    continue
                problem = None
            except AnsibleConnectionFailure as error:
                problem = error
            # A connection that breaks for a moment does not end the job, only a long silence does.
            if time.monotonic() - heard >= PATIENCE:
                if problem:
                    raise problem
                return {"failed": True, "msg": "The host did not answer any more.", "error": "failed"}
            time.sleep(1)

    def _read(self, directory: str) -> dict[str, t.Any]:
        """The result of a job without the help of a module; empty if there is none."""
        script = READ_SCRIPT.format(enter=_enter(directory), directory=directory)
        for line in self._low_level_execute_command(script, sudoable=True).get("stdout", "").splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict):
                    # As of every result, the host says nothing of what Ansible keeps for itself.
                    return {key: value for key, value in found.items() if not key.startswith("_ansible")}
        return {}

    def _stop(self, directory: str) -> None:
        """End the job of an interrupted task, if the host can be reached."""
        old = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
        old.append((signal.SIGALRM, signal.signal(signal.SIGALRM, _raise)))
        signal.alarm(STOPPING)
        try:
            self._low_level_execute_command(
                STOP_SCRIPT.format(enter=_enter(directory), directory=directory, pause=LOOK), sudoable=True
            )
        except (Exception, _Interrupted) as error:
            # Then the job ends because nobody gives it a sign any more.
            display.vvv(f"composefs: the job could not be told to end: {type(error).__name__}")
        finally:
            signal.alarm(0)
            for number, handler in old:
                signal.signal(number, handler)


def _enter(directory: str) -> str:
    place, name = os.path.split(directory)
    return _ENTER.format(place=place, directory=directory, name=name)


def _text(state: str) -> str:
    try:
        return summary(json.loads(state))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""


def _raise(number: int, frame: types.FrameType | None) -> None:
    raise _Interrupted(number)


@contextlib.contextmanager
def _signals_raise() -> t.Iterator[None]:
    """Have SIGINT and SIGTERM raise _Interrupted within the ``with``."""
    if threading.current_thread() is not threading.main_thread():
        yield  # a strategy that runs tasks in threads of its own gets no signals there
        return
    old = [(number, signal.signal(number, _raise)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in old:
            signal.signal(number, handler)
