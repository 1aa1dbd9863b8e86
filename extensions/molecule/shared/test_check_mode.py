# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every scenario runs its playbook in check mode before the run itself, and what was foretold has come."""

from __future__ import annotations

from typing import Any

from scenarios import Run, differences


def test_check_mode_foretold_what_the_run_did(runs: list[Run], lab: dict[str, Any]) -> None:
    assert [run.check for run in runs[:2]] == [True, False], "test_sequence has check before converge"
    assert differences(runs[0], runs[1], lab["unforetold"]) == []
