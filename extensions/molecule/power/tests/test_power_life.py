# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The power goes while a repository is pruned or repaired, with fs-verity and without."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import time
from typing import Any

import guests
import pytest
import test_power
from test_power import GUEST, OFTEN, PLACES, begin, told

testinfra_hosts = ["ansible://hosts"]
# The fixtures of that file serve this one, too.
engine, registry = test_power.engine, test_power.registry

ROUNDS = range(10 if os.environ.get("COMPOSEFS_OCI_LONG") else 1)
# How long each verb takes when nothing is in its way, in seconds; one that ends before its cut tells it anew.
TAKES = {"prune": 1.5, "repair": 25.0}
PROGRAM = "cd /opt/tests && python3 life_in_guest.py"


def run(verb: str, *words: str) -> dict[str, list[str]]:
    """The verb in both places, one after the other; what each says."""
    return {
        place: guests.ssh(GUEST, f"{PROGRAM} {verb} {place}/life {' '.join(words)}").splitlines() for place in PLACES
    }


def begin_in_both(verb: str) -> subprocess.Popen[str]:
    """Start the verb in both places at once, and wait until the first has begun."""
    both = " & ".join(f"python3 life_in_guest.py {verb} {place}/life" for place in PLACES)
    return begin(f"cd /opt/tests; {both}; wait")


@pytest.fixture(scope="module")
def images(engine: None, registry: str) -> list[str]:  # noqa: F811
    """What it takes to fill the repositories."""
    return [f"app=docker://{registry}/cut:latest", f"kept=docker://{registry}/small:latest"]


def fill(images: list[str]) -> None:
    for place, verity in PLACES.items():
        guests.ssh(GUEST, f"{PROGRAM} fill {place}/life {verity} {' '.join(images)}")


@pytest.mark.parametrize("number", ROUNDS)
@pytest.mark.parametrize("verb", ["prune", "repair"])
def test_a_power_cut_during_prune_or_repair_costs_nothing_that_has_a_name(
    host: Any, images: list[str], verb: str, number: int
) -> None:
    fill(images)
    if verb == "repair":
        run("spoil")
    guests.ssh(GUEST, f"{OFTEN}; sync")
    moment = random.uniform(0, 1.2) * TAKES[verb]
    process = begin_in_both(verb)
    begun, takes = time.monotonic(), TAKES[verb]
    with contextlib.suppress(subprocess.TimeoutExpired):
        assert process.wait(moment) == 0
        TAKES[verb] = time.monotonic() - begun
    guests.cut_power(GUEST)
    process.wait(60)
    guests.boot(GUEST)

    after = run("check")
    told(
        f"{verb} cut after {moment:.1f} of {takes:.1f} s: "
        + ", ".join(f"{place}: {lines[-1]}" for place, lines in after.items())
    )
    if verb == "prune":
        assert {place: lines[:-1] for place, lines in after.items()} == dict.fromkeys(PLACES, [])
    # The next run finishes the work, and all that has a name is whole.
    run(verb)
    assert {place: lines[:-1] for place, lines in run("check").items()} == dict.fromkeys(PLACES, [])
    for place in PLACES:
        names = set(host.run(f"ls {place}/life/streams/refs/oci").stdout.split())
        assert names == ({"kept"} if verb == "prune" else {"app", "kept"})


def test_a_byte_that_changed_below_the_file_system_is_found(images: list[str]) -> None:
    fill(images)
    rotten = {place: lines[0] for place, lines in run("rot").items()}
    codes = {"required": "object_unreadable", "disabled": "object_damaged"}
    for place, lines in run("check").items():
        assert [line.split()[:2] for line in lines[:-1]] == [[codes[PLACES[place]], rotten[place]]]
