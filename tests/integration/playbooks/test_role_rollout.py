# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the role rollout does that needs no fleet."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

JUDGE = """
- name: Judge
  ansible.builtin.include_role:
    name: composefs.oci.rollout
    tasks_from: health
"""


def test_a_command_that_judges_and_never_ends_is_a_verdict(site: Site) -> None:
    begun = time.monotonic()
    done = site.run(JUDGE, rollout_health_command="sleep 600", rollout_health_retries=1, rollout_confirm_within=2)
    assert done.returncode == 2 and "Run the command that judges" in done.stdout, done.stdout + done.stderr
    assert time.monotonic() - begun < 300, "it ended by its own limit"
    fine = site.run(JUDGE, rollout_health_command="true", rollout_confirm_within=60)
    assert fine.returncode == 0, fine.stdout + fine.stderr
