# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_image`` and show a live line per host while it works, where somebody looks at a terminal.

A module cannot print. So the module runs as an asynchronous job that keeps a progress file up to date, and this plugin
polls both. Where nobody looks (no terminal, CI, check mode, a task that is asynchronous already) the module just runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import typing as t

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

from ansible_collections.composefs.oci.plugins.module_utils.progress import summary

display = Display()

# Seconds between two looks at the job: a short task is not to wait for its end, a long one not to cause work.
POLL_FIRST, POLL = 0.2, 1.0
# How long the host may be out of reach before the task gives up. The job goes on meanwhile.
UNREACHABLE_LIMIT = 120.0
# The job is ended by the module's own timeouts; this only bounds how long a forgotten one may live.
JOB_LIMIT = 24 * 60 * 60
JOB_KEYS = (
    "started",
    "finished",
    "ansible_job_id",
    "results_file",
    "ansible_async_watchdog_pid",
    "stdout",
    "stderr",
    "stdout_lines",
    "stderr_lines",
)


def watched(wish: str) -> bool:
    """Whether progress is wanted: by ``wish``, the variable ``composefs_progress`` (``always``, ``never``), else if a
    person looks at a terminal.
    """
    if wish in ("always", "never"):
        return wish == "always"
    if os.environ.get("CI"):
        return False
    # Since ansible-core 2.19 a worker is cut off from the terminal; its parent is the process that prints.
    return any(_is_terminal(pid) for pid in (os.getpid(), os.getppid()))


def _is_terminal(pid: int) -> bool:
    try:
        fd = os.open(f"/proc/{pid}/fd/1", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return os.isatty(fd)
    finally:
        os.close(fd)


class ActionModule(ActionBase):
    """The action behind ``composefs.oci.composefs_image``."""

    _supports_async = True
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result."""
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
        result.update(self._run_watched(task_vars))
        return result

    def _run_watched(self, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        if self._connection._shell.tmpdir is None:
            self._make_tmp_path()
        tmpdir = self._connection._shell.tmpdir
        progress_file = self._task.args.get("progress_file") or self._connection._shell.join_path(
            tmpdir, "progress.json"
        )
        self._task.async_val = JOB_LIMIT
        try:
            job = self._execute_module(
                module_args=dict(self._task.args, progress_file=progress_file), task_vars=task_vars, wrap_async=True
            )
        finally:
            self._task.async_val = 0
        if job.get("failed") or "ansible_job_id" not in job:
            return job
        try:
            return self._watch(job["ansible_job_id"], progress_file, task_vars)
        finally:
            # The job's own directory, and not the one that looking after it needed since: that goes in the end as after
            # every task.
            since = self._connection._shell.tmpdir
            with contextlib.suppress(AnsibleConnectionFailure):
                self._remove_tmp_path(tmpdir)
            self._connection._shell.tmpdir = since

    def _watch(self, jid: str, progress_file: str, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        host = task_vars.get("inventory_hostname", "?")
        async_dir = self._remote_expand_user(self.get_shell_option("async_dir", default="~/.ansible_async"))
        job = {"jid": jid, "_async_dir": async_dir}
        shown = None
        pause = POLL_FIRST
        heard = time.monotonic()
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, POLL)
            try:
                line = self._progress_line(progress_file)
                if line and line != shown:
                    shown = line
                    display.display(f"{host}: {line}")
                status = self._execute_module(
                    module_name="ansible.legacy.async_status", module_args=job, task_vars=task_vars
                )
            except AnsibleConnectionFailure:
                # A connection that breaks for a moment is no end of the job; only the job's own word is.
                if time.monotonic() - heard >= UNREACHABLE_LIMIT:
                    raise
                continue
            if status.get("unreachable") and time.monotonic() - heard < UNREACHABLE_LIMIT:
                continue
            heard = time.monotonic()
            if status.get("finished") or "started" not in status:
                break
        with contextlib.suppress(AnsibleConnectionFailure):
            self._execute_module(
                module_name="ansible.legacy.async_status", module_args=dict(job, mode="cleanup"), task_vars=task_vars
            )
        return {key: value for key, value in status.items() if key not in JOB_KEYS}

    def _progress_line(self, path: str) -> str:
        command = f"cat {self._connection._shell.quote(path)}"
        answer = self._low_level_execute_command(command, sudoable=True)
        if answer.get("rc"):
            return ""
        try:
            return summary(json.loads(answer["stdout"]))
        except (ValueError, KeyError, TypeError):
            return ""
