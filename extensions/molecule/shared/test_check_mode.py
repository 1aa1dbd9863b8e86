# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""For every scenario that runs its playbook in check mode before the run itself: what was foretold has come."""

from __future__ import annotations

from typing import Any

import pytest
from scenarios import Run, differences


def test_check_mode_foretold_what_the_run_did(runs: list[Run], lab: dict[str, Any]) -> None:
    if [run.check for run in runs[:2]] != [True, False]:
        assert lab["unchecked"], "the playbook did not run in check mode first, and nothing says why"
        pytest.skip(f"the playbook does not run in check mode first: {lab['unchecked']}")
    assert differences(runs[0], runs[1], lab["unforetold"]) == []
