# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A callback that writes every result down, one JSON document a line, so that tests can look at what the modules
returned.

Each ansible-playbook run gets a file of its own in $MOLECULE_EPHEMERAL_DIRECTORY/results, named by its number and
whether it was in check mode.
"""

from __future__ import annotations

DOCUMENTATION = r"""
name: record
type: aggregate
short_description: Write results to files
description: For the Molecule scenarios of this collection.
requirements: []
options: {}
"""

import json
import os
import pathlib
from typing import Any

from ansible import context
from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    """Write results to files."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "record"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self.file: Any = None

    def v2_playbook_on_start(self, playbook: Any) -> None:
        directory = os.environ.get("MOLECULE_EPHEMERAL_DIRECTORY")
        name = pathlib.Path(playbook._file_name).stem
        if not directory or name in ("create", "destroy"):
            return
        results = pathlib.Path(directory, "results")
        results.mkdir(parents=True, exist_ok=True)
        mode = "check" if context.CLIARGS.get("check") else "run"
        self.file = open(results / f"{len(list(results.iterdir())):03d}-{name}-{mode}.jsonl", "w")  # noqa: SIM115 - open until the process ends

    def _write(self, kind: str, result: Any) -> None:
        if self.file:
            entry = {
                "host": result._host.get_name(),
                "task": result._task.get_name(),
                "action": result._task.action,
                "kind": kind,
                "result": result._result,
            }
            self.file.write(json.dumps(entry, default=str) + "\n")
            self.file.flush()

    def v2_runner_on_ok(self, result: Any) -> None:
        self._write("ok", result)

    def v2_runner_on_failed(self, result: Any, ignore_errors: bool = False) -> None:
        self._write("ignored" if ignore_errors else "failed", result)

    def v2_runner_on_unreachable(self, result: Any) -> None:
        self._write("unreachable", result)

    def v2_runner_on_skipped(self, result: Any) -> None:
        self._write("skipped", result)
