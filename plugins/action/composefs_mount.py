# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_mount``; in check mode it is told what earlier tasks of the run foretold."""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import fact_of_mount
from ansible_collections.composefs.oci.plugins.plugin_utils.informed import InformedAction


class ActionModule(InformedAction):
    """The action behind ``composefs.oci.composefs_mount``."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result."""
        result = super().run(tmp, task_vars)
        if self._task.check_mode and result.get("changed") and not result.get("failed") and not self._task.no_log:
            facts = fact_of_mount(result, self._task.args)
            if facts:
                result["ansible_facts"] = facts
        return result
