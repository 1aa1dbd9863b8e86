# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the actions have in common whose modules look at names: in check mode these are told what earlier tasks of the
run foretold.
"""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase

from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import environment


class InformedAction(ActionBase):
    """Runs the module of the same name."""

    _supports_async = True
    _supports_check_mode = True
    _supports_diff = True

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result."""
        result = super().run(tmp, task_vars)
        task_vars = task_vars or {}
        before = self._task.environment
        known = environment(task_vars) if self._task.check_mode else {}
        if known:
            both = before if isinstance(before, list) else [before] if before else []
            self._task.environment = [*both, known]
        try:
            result.update(self._execute_module(task_vars=task_vars, wrap_async=bool(self._task.async_val)))
        finally:
            self._task.environment = before
        return result
