# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_mount``; in check mode it leaves word of what it would mount."""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import fact_of_mount
from ansible_collections.composefs.oci.plugins.plugin_utils.gate import GatedAction


class ActionModule(GatedAction):
    """The action behind ``composefs.oci.composefs_mount``."""

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """What would be mounted at the path."""
        return fact_of_mount(result, self._task.args)
