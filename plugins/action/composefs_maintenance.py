# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the module ``composefs_maintenance``, and let what the host answers through the gate."""

from __future__ import annotations

from ansible_collections.composefs.oci.plugins.plugin_utils.gate import GatedAction


class ActionModule(GatedAction):
    """The action behind ``composefs.oci.composefs_maintenance``."""
