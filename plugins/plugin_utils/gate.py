# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The gate on the controller: whatever a host says, its words cannot steer the operator's terminal, or flood it.

Modules let their own results through the same gate. But a host need not be honest, and what is shown in the end is what
it sends. So every module of the collection has an action, and each of them ends here.

In check mode the actions tell their modules what earlier tasks of the run foretold.
"""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase

from ansible_collections.composefs.oci.plugins.module_utils.text import DATA, printable_values
from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import left, told

# What is data of the image, and a traceback, whose lines Ansible shows as they are.
SPARED = DATA | {"exception"}


def shown(result: dict[str, t.Any]) -> dict[str, t.Any]:
    """A result whose texts can be shown."""
    found: dict[str, t.Any] = printable_values(result, SPARED)
    return found


class GatedAction(ActionBase):
    """Runs the module of the same name."""

    _supports_async = True
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result, as it can be shown."""
        result = super().run(tmp, task_vars)
        before = self._task.environment
        if self._task.check_mode:
            self._task.environment = told(before, self._task, task_vars)
        try:
            result.update(self.execute(task_vars or {}))
        finally:
            self._task.environment = before
        if not self._task.no_log:
            facts = left(self.facts, result, self._task, task_vars)
            if facts:
                result["ansible_facts"] = facts
        return shown(result)

    def execute(self, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """The module's own result."""
        found: dict[str, t.Any] = self._execute_module(task_vars=task_vars, wrap_async=bool(self._task.async_val))
        return found

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """What a result of check mode leaves for later tasks of the run."""
        return {}
