# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_prune`` and show a live line per host while it works, as for a pull."""

from __future__ import annotations

import typing as t

from ansible_collections.composefs.oci.plugins.action import composefs_image
from ansible_collections.composefs.oci.plugins.plugin_utils.foretold import facts_of_removal


class ActionModule(composefs_image.ActionModule):
    """The action behind ``composefs.oci.composefs_prune``."""

    def facts(self, result: dict[str, t.Any]) -> dict[str, t.Any]:
        """The names that would go."""
        return facts_of_removal(result)
