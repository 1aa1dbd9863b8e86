# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The model of a fleet (benchmarks/fleet_model.py) says what the log of a registry counted."""

from __future__ import annotations

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import fleet_model

# The rollout of the Molecule scenario of that name in its long form: twenty hosts, two sites with a seed each. The
# origin's log has each layer twice, and 43 manifests and 23 configurations.
LAYERS, COUNTED = 237_850, 514_264
FLEET = fleet_model.Fleet(20, 2, 2, 1000, 1000, 1000, documents=0.002)


def test_the_bytes_at_the_origin_are_those_that_were_counted() -> None:
    found = fleet_model.by_seeds(FLEET, LAYERS / 1e6, 0.0, 1, 0.0)
    assert found.megabytes * 1e6 == pytest.approx(COUNTED, rel=0.01)


def test_without_seeds_every_host_fetches_all_of_it() -> None:
    assert fleet_model.direct(FLEET, LAYERS / 1e6, 0.0).megabytes == pytest.approx(20 * (LAYERS / 1e6 + 0.002))


def test_what_is_on_the_way_decides() -> None:
    """A hundred hosts of one site share its link to the registry; a seed spares it."""
    fleet = fleet_model.Fleet(100, 1, 1, 10_000, 100, 1000)
    assert fleet_model.direct(fleet, 50, 0).seconds == pytest.approx(400)
    assert fleet_model.by_seeds(fleet, 50, 50, 1, 0).seconds == pytest.approx(4 + 99 * 50 * 8 / 1000)
