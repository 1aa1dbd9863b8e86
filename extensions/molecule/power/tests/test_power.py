# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import os
import random
import subprocess
import time
from typing import Any

import guests
import pytest
from composefs_testinfra import Repository
from scenarios import ephemeral

testinfra_hosts = ["ansible://hosts"]

GUEST = "power-trixie"
# The power goes at a random moment of a pull, and in some rounds as soon as the pull has said that it is done: then all
# of it must be there.
ROUNDS = ["random"] * 20 + ["done"] * 4 if os.environ.get("COMPOSEFS_OCI_LONG") else ["random", "done"]
# With fs-verity, where the kernel knows what is whole, and without, where the collection has to find out.
PLACES = {"/srv/ext4": "required", "/srv/plain": "disabled"}

# The journal is written every second, not every five: more of what is not finished outlives the cut.
OFTEN = "; ".join(f"mount -o remount,commit=1 {place}" for place in PLACES)


def command(registry: str, number: int) -> str:
    """Pull into a repository in each place at the same time; the shell fails if one of them does."""
    pulls = [
        f"python3 pull_in_guest.py {place}/{number} {verity} docker://{registry}/cut:latest app"
        for place, verity in PLACES.items()
    ]
    return f"cd /opt/tests; {pulls[0]} & one=$!; {pulls[1]} && wait $one"


@pytest.fixture(scope="module")
def registry(lab: dict[str, Any]) -> str:
    return str(lab["registries"]["plain"]["guest_address"])


@pytest.fixture(scope="module")
def engine() -> None:
    """Lay the engine into the guest. Compiled once, it starts much faster on that slow processor than within a module,
    many times over.
    """
    collection = f"{os.environ['ANSIBLE_COLLECTIONS_PATH']}/ansible_collections/composefs/oci"
    files = ["-C", collection, "plugins/module_utils", "-C", str(guests.ground.HERE / "inside")]
    files += ["pull_in_guest.py", "life_in_guest.py"]
    packed = subprocess.run(["tar", "--exclude=__pycache__", "-c", *files], stdout=subprocess.PIPE, check=True).stdout
    address = guests.address(GUEST)
    unpack = "mkdir -p /opt/tests && cd /opt/tests && tar -x --no-same-owner && python3 -m compileall -q . && sync"
    subprocess.run(guests.ground.ssh_command(address["address"], address["port"], unpack), input=packed, check=True)


def begin(script: str) -> subprocess.Popen[str]:
    """Start a script in the guest, and wait until the first that it starts has begun: before that nothing happens on
    the disks.
    """
    address = guests.address(GUEST)
    words = guests.ground.ssh_command(address["address"], address["port"], script)
    process = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    first = process.stdout.readline()
    assert first == "begun\n", first + process.stdout.read()
    return process


def told(text: str) -> None:
    """Show what a cut did, and keep it."""
    print(text)
    with open(ephemeral() / "power-cuts", "a") as file:
        file.write(text + "\n")


@pytest.fixture(scope="module")
def seconds(engine: None, registry: str) -> float:
    """How long the pulls take from there on when nothing is in their way."""
    process = begin(command(registry, 999))
    started = time.monotonic()
    assert process.wait(240) == 0
    return time.monotonic() - started


@pytest.mark.parametrize(("number", "when"), enumerate(ROUNDS))
def test_nothing_that_has_a_name_is_damaged_by_a_power_cut(
    host: Any, registry: str, seconds: float, number: int, when: str, lab: dict[str, Any]
) -> None:
    # A guest that has just booted takes longer than one from the freezer.
    moment = random.uniform(0, 1.4) * seconds
    guests.ssh(GUEST, f"{OFTEN}; sync")
    process = begin(command(registry, number))
    if when == "done":
        assert process.wait(240) == 0
    else:
        time.sleep(moment)
    guests.cut_power(GUEST)
    finished = process.wait(60) == 0
    guests.boot(GUEST)

    left = {}
    for place in PLACES:
        repository = Repository(host, f"{place}/{number}")
        damage = repository.damage()
        if repository.exists:
            left[place] = (
                f"{repository.objects} objects, {len(repository.streams)} streams, {repository.unfinished} unfinished"
            )
            assert damage == []
            if finished:
                # The pull had said that it was done, so it must be there. (ssh told us so before the power went.)
                assert repository.tags == {"app": lab["images"]["cut"]["digest"]}
        else:
            left[place] = "no repository"
            assert not finished
    told(
        f"cut {'as soon as it was done' if when == 'done' else f'after {moment:.1f} of {seconds:.1f} s'}, "
        f"{'finished' if finished else 'unfinished'}: {left}"
    )

    guests.ssh(GUEST, command(registry, number))
    for place, verity in PLACES.items():
        repository = Repository(host, f"{place}/{number}")
        assert repository.damage() == []
        assert repository.protected is (verity == "required")
        assert repository.image("app").digest == lab["images"]["cut"]["digest"]
        # A mark may be back whose removal the cut undid. It is harmless, and goes with the next pull that stores
        # something.
        assert repository.unfinished <= 1
    guests.ssh(GUEST, f"rm -r {' '.join(f'{place}/{number}' for place in PLACES)}")
