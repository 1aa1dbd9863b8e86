# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the results of other modules than composefs_image say is not taken for pulls."""

from __future__ import annotations

import pytest

pytest.importorskip("ansible.plugins.action", exc_type=ImportError)

from ansible_collections.composefs.oci.plugins.action import composefs_check, composefs_image, composefs_prune


def test_only_pulls_are_remembered_in_check_mode() -> None:
    assert composefs_image.ActionModule.foretells_names
    assert not composefs_prune.ActionModule.foretells_names and not composefs_check.ActionModule.foretells_names
