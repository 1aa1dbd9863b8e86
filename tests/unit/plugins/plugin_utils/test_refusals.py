# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who cannot take part in a rollout, from values alone."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.plugin_utils import refusals

PATH = "/srv/app"
FINE: dict[str, Any] = {
    "rollout_before": {"deployments": [{"path": PATH, "name": "app"}, {"path": "/srv/db", "name": "db"}]},
    "rollout_mounted": {"mounts": [{"path": PATH}]},
    "rollout_systemd": {"stat": {"exists": True}},
    "rollout_planned": {"changed": True, "verity": True},
}
WANTED = {"path": PATH, "name": "app", "verity": "required", "persistent": True, "adopt": False}


def test_a_host_that_can_take_part_has_no_reason_not_to() -> None:
    for told in (
        FINE,
        {},
        {**FINE, "rollout_before": {"deployments": [{"path": PATH, "name": None}]}},
        {**FINE, "rollout_systemd": {"skipped": True}},
        {**FINE, "rollout_systemd": {"failed": True, "msg": "It was not allowed."}},
        {**FINE, "rollout_planned": {"failed": True, "msg": "It is not there."}},
    ):
        assert refusals.refusals(told, WANTED) == []


@pytest.mark.parametrize(
    ("told", "reason", "way"),
    [
        ({"rollout_before": {"deployments": [{"path": PATH, "name": "db"}]}}, "belongs to db", {"adopt": "yes"}),
        ({"rollout_before": {"deployments": []}}, "somebody else mounted", {"adopt": True}),
        ({"rollout_systemd": {"stat": {"exists": False}}}, "it has no systemd", {"persistent": "false"}),
        ({"rollout_planned": {"verity": False}}, "its repository has no fs-verity", {"verity": "disabled"}),
    ],
)
def test_each_reason_is_told_with_the_variable_that_does_without(
    told: dict[str, Any], reason: str, way: dict[str, Any]
) -> None:
    (said,) = refusals.refusals({**FINE, **told}, WANTED)
    assert reason in said and f"rollout_{next(iter(way))}: " in said
    assert refusals.refusals({**FINE, **told}, {**WANTED, **way}) == []


def test_hosts_are_judged_by_their_own_variables_where_they_have_some() -> None:
    pytest.importorskip("ansible.errors", reason="ansible-core is not installed for this Python", exc_type=ImportError)
    from ansible_collections.composefs.oci.plugins.filter.rollout import rollout_refusals

    without = {**FINE, "rollout_planned": {"verity": False}}
    hosts = {"one": FINE, "two": without, "three": {**without, "rollout_verity": "disabled"}}
    found = rollout_refusals(list(hosts), hosts, PATH, "app", "required", True, False)
    assert found == ["two: its repository has no fs-verity (rollout_verity: disabled does without)"]
