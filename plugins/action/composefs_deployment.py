# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_deployment``; in check mode it leaves word of what it would mount.

In a rollout it shows one line for each change of a host, so that whoever watches sees more than ``changed``.
"""

from __future__ import annotations

import typing as t

from ansible.utils.display import Display

from ansible_collections.composefs.oci.plugins.module_utils.text import printable_values
from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import fact_of_mount
from ansible_collections.composefs.oci.plugins.plugin_utils.gate import GatedAction
from ansible_collections.composefs.oci.plugins.plugin_utils.rollout import change

display = Display()


class ActionModule(GatedAction):
    """The action behind ``composefs.oci.composefs_deployment``."""

    def run(self, tmp: str | None = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Run the module; its result."""
        result = super().run(tmp, task_vars)
        line = change(printable_values(result)) if self._task.args.get("rollout") and not self._task.check_mode else ""
        if line:
            display.display(f"{(task_vars or {}).get('inventory_hostname', '')}: {line}")
        return result

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """What would be mounted at the path."""
        return fact_of_mount(result, self._task.args)
