# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the results of other modules than composefs_image say is not taken for pulls."""

from __future__ import annotations

import pytest

pytest.importorskip("ansible.plugins.action", exc_type=ImportError)

from ansible_collections.composefs.oci.plugins.action import composefs_check, composefs_prune


def test_what_a_prune_or_a_repair_changes_is_not_taken_for_a_pull() -> None:
    digest = "sha256:" + "1" * 64
    result = {"changed": True, "repository": "/r", "names": ["app"], "name": "other", "digest": digest}
    prune = composefs_prune.ActionModule.__new__(composefs_prune.ActionModule)
    [fact] = list(prune.facts(result).values())
    assert (fact["name"], fact["absent"], fact["digest"]) == ("app", True, None)
    assert prune.facts({**result, "names": []}) == {}
    assert composefs_check.ActionModule.__new__(composefs_check.ActionModule).facts(result) == {}
