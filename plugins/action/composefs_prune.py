# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_prune`` and show a live line per host while it works, as for a pull."""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.action import composefs_image
from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import environment


class ActionModule(composefs_image.ActionModule):
    """The action behind ``composefs.oci.composefs_prune``."""

    foretells_names = False

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; in check mode it is told what earlier tasks of the run foretold."""
        before = self._task.environment
        known = environment(task_vars or {}) if self._task.check_mode else {}
        if known:
            both = before if isinstance(before, list) else [before] if before else []
            self._task.environment = [*both, known]
        try:
            return super().run(tmp, task_vars)
        finally:
            self._task.environment = before
