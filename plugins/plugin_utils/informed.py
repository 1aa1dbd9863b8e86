# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the actions have in common whose modules look at names: in check mode these are told what earlier tasks of the
run foretold.
"""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import environment
from ansible_collections.composefs.oci.plugins.plugin_utils.gate import GatedAction


class InformedAction(GatedAction):
    """Runs the module of the same name."""

    def execute(self, task_vars: dict[str, t.Any]) -> dict[str, t.Any]:
        """The module's own result."""
        before = self._task.environment
        known = environment(task_vars) if self._task.check_mode else {}
        if known:
            both = before if isinstance(before, list) else [before] if before else []
            self._task.environment = [*both, known]
        try:
            return super().execute(task_vars)
        finally:
            self._task.environment = before
