# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Why a host cannot take part in a rollout, from what it told while the plan was made. Values in, values out.

The controller judges all hosts at once, for a task that does so costs it some 30 ms of processor for each host.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ansible_collections.composefs.oci.plugins.plugin_utils.rollout import Host, deployment, result, succeeded


def is_true(value: Any) -> bool:
    """A yes or a no as Ansible takes it from the command line."""
    return str(value).strip().lower() in ("1", "1.0", "on", "t", "true", "y", "yes")


def refusals(host: Host, wanted: Mapping[str, Any]) -> list[str]:
    """The reasons, none if ``host`` can take part. ``wanted`` has ``path``, ``name``, ``verity``, ``persistent`` and
    ``adopt`` as they hold for this host.
    """
    path, mine = wanted["path"], deployment(host, wanted["path"])
    there, systemd = result(host, "rollout_mounted").get("mounts"), result(host, "rollout_systemd")
    reasons = []
    if not is_true(wanted["adopt"]):
        if mine and mine.get("name") not in (wanted["name"], None):
            reasons.append(f"its mount at {path} belongs to {mine.get('name')} (rollout_adopt: true takes it over)")
        if there and not mine:
            reasons.append(f"somebody else mounted a composefs image at {path} (rollout_adopt: true takes it over)")
    if is_true(wanted["persistent"]) and succeeded(systemd) and not systemd.get("stat", {}).get("exists"):
        reasons.append(
            "it has no systemd, so its mount cannot come back at boot (rollout_persistent: false does without)"
        )
    if wanted["verity"] == "required" and result(host, "rollout_planned").get("verity") is False:
        reasons.append("its repository has no fs-verity (rollout_verity: disabled does without)")
    return reasons
