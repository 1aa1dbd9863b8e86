# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_repository``; in check mode it leaves word of what the repository would become."""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import fact_of_repository
from ansible_collections.composefs.oci.plugins.plugin_utils.gate import GatedAction


class ActionModule(GatedAction):
    """The action behind ``composefs.oci.composefs_repository``."""

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """What the repository would become."""
        return fact_of_repository(result, self._task.args)
