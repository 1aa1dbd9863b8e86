# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tests run in their order: each begins with what the one before has confirmed."""

from __future__ import annotations

import json
import os
import random
import time
from typing import Any

import guests
import pytest
from composefs_testinfra import Repository

testinfra_hosts = ["ansible://hosts"]

GUEST = "confirm-trixie"
TIMER = "composefs-oci-revert-srv-app.timer"
ROUNDS = range(20 if os.environ.get("COMPOSEFS_OCI_LONG") else 1)


def deploy(host: Any, **values: Any) -> dict[str, Any]:
    result: dict[str, Any] = host.ansible(
        "composefs.oci.composefs_deployment",
        json.dumps({"path": "/srv/app", "repository": "/srv/ext4/images", **values}),
        check=False,
    )
    return result


def journal(host: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.run("cat /var/lib/composefs-oci/deployments/srv-app.json").stdout)
    return found


def mounted(host: Any) -> str | None:
    """The version that is mounted, by what is in it."""
    return {"data/201": "small", "data/301": "cut"}.get(host.run("cd /srv/app && echo data/?01").stdout.strip())


def wait_for(host: Any, version: str, seconds: float) -> None:
    end = time.monotonic() + seconds
    while mounted(host) != version:
        assert time.monotonic() < end, f"{version} is not mounted"
        time.sleep(1)


def reboot(host: Any) -> None:
    guests.cut_power(GUEST)
    guests.boot(GUEST)


def test_the_first_version_is_mounted_by_a_unit(host: Any) -> None:
    assert mounted(host) == "small"
    assert "verity=require" in host.run("findmnt -n -o OPTIONS /srv/app").stdout
    assert {"nodev", "nosuid"} <= set(host.run("findmnt -n -o VFS-OPTIONS /srv/app").stdout.strip().split(","))
    assert host.run("systemctl is-enabled composefs-oci-srv-app.service").stdout.strip() == "enabled"


TO_THE_EARLIER_ONE = """
import json, pathlib, shutil
unit = pathlib.Path("/etc/systemd/system/composefs-oci-srv-app.service")
library = pathlib.Path("/var/lib/composefs-oci/deployments")
image = json.loads((library / "srv-app.json").read_text())["current"]["image_id"]
text = unit.read_text().replace('"boot" "--', f'"mount" "--image" "{image}" "--')
assert text != unit.read_text()
unit.write_text(text + f"Image={image}\\n")
shutil.rmtree(library)
shutil.rmtree("/srv/ext4/images/images/refs/composefs-oci")
"""


def test_a_unit_of_version_0_1_0_is_taken_over_without_an_interruption(host: Any, lab: dict[str, Any]) -> None:
    """It names the image, and there is neither a journal nor a link. Later tests boot with what it became."""
    assert host.run("python3 -c %s && systemctl daemon-reload", TO_THE_EARLIER_ONE).rc == 0
    before = host.run("findmnt -n -o ID /srv/app").stdout
    result: dict[str, Any] = host.ansible(
        "composefs.oci.composefs_mount",
        json.dumps({"path": "/srv/app", "repository": "/srv/ext4/images", "image": "app", "persistent": True}),
        check=False,
    )
    assert result["unit"] == "composefs-oci-srv-app.service", result
    assert host.run("findmnt -n -o ID /srv/app").stdout == before and mounted(host) == "small"
    assert '"boot" "--' in host.file("/etc/systemd/system/composefs-oci-srv-app.service").content_string
    assert journal(host)["current"]["digest"] == lab["images"]["small"]["digest"]


def test_what_nobody_confirms_is_taken_back_by_a_timer_of_systemd(host: Any, lab: dict[str, Any]) -> None:
    told = deploy(host, digest=lab["images"]["cut"]["digest"], rollout="r1", confirm_within=45)
    assert told["state"] == "activated" and mounted(host) == "cut"
    assert host.run(f"systemctl is-active {TIMER}").stdout.strip() == "active"
    wait_for(host, "small", 180)
    end = time.monotonic() + 120
    while journal(host)["pending"] is not None:
        assert time.monotonic() < end
        time.sleep(1)
    assert [journal(host)["history"][-1][key] for key in ("result", "rollout", "reason")] == [
        "reverted",
        "r1",
        "not confirmed in time",
    ]
    # What the timer started ends a moment after it has written the journal, and the timer with it.
    while host.run(f"systemctl is-active {TIMER}").stdout.strip() == "active":
        assert time.monotonic() < end
        time.sleep(1)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_power_cut_while_an_image_is_on_trial_ends_the_trial(host: Any, lab: dict[str, Any], number: int) -> None:
    deploy(host, digest=lab["images"]["cut"]["digest"], rollout=f"cut {number}", confirm_within=900)
    assert mounted(host) == "cut"
    time.sleep(random.Random(number).uniform(0, 3))
    reboot(host)
    assert mounted(host) == "small"
    assert [journal(host)["history"][-1][key] for key in ("result", "rollout", "reason")] == [
        "reverted",
        f"cut {number}",
        "reboot",
    ]
    assert journal(host)["pending"] is None and host.run("systemctl --failed --no-legend").stdout == ""


def test_a_power_cut_right_after_the_commit_boots_the_new_version(host: Any, lab: dict[str, Any]) -> None:
    deploy(host, digest=lab["images"]["cut"]["digest"], rollout="r2", confirm_within=900)
    told = deploy(host, digest=lab["images"]["cut"]["digest"], rollout="r2", state="confirmed")
    assert told["changed"] and told["state"] == "confirmed"
    reboot(host)
    assert mounted(host) == "cut" and journal(host)["current"]["rollout"] == "r2"
    assert host.run("systemctl --failed --no-legend").stdout == ""
    assert host.run(f"systemctl is-active {TIMER}").stdout.strip() != "active"
    # The journal decides what is mounted. The name follows it, and any later verb mends it.
    assert Repository(host, "/srv/ext4/images").mounted("/srv/app") == journal(host)["current"]["image_id"]


def test_absent_leaves_nothing(host: Any) -> None:
    assert deploy(host, state="absent")["changed"]
    left = host.run("ls -d /var/lib/composefs-oci /etc/systemd/system/composefs-oci-*; findmnt -n /srv/app").stdout
    assert left == "" and host.run("ls /srv/ext4/images/images/refs/composefs-oci").stdout == ""
