# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import namespace
import pytest
from composefs_testinfra import Repository
from faultproxy import FaultProxy, Rule
from scenarios import REPOSITORY, Run, host_of, play

HOSTS = ("faults-killed", "faults-cut", "faults-full", "faults-well")
PULL = pathlib.Path(__file__).parents[1] / "pull.yml"


def pull_from(registry: str) -> Run:
    """Run the playbook to its end, whatever that is; what was recorded."""
    return play(PULL, fails=True, faults_registry=registry)


def kinds(run: Run) -> dict[str, str]:
    return {entry["host"]: entry["kind"] for entry in run.entries}


def result(run: Run, host: str) -> dict[str, Any]:
    return run.of(host, "Pull")


def wait_for(what: str, condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def objects_of(name: str) -> int:
    """How many objects a host has, seen from outside: without its ssh."""
    return sum(
        len(files) for _directory, _directories, files in os.walk(namespace.directory_of(name) / "srv/images/objects")
    )


def cut_connections(name: str) -> int:
    """Kill the sshd processes that serve connections of a host, not the one that listens; how many there were."""
    first = namespace.ground.process_of(namespace.ground.running(name))
    (child,) = pathlib.Path(f"/proc/{first}/task/{first}/children").read_text().split()
    space = os.readlink(f"/proc/{child}/ns/pid")
    cut = 0
    for process in (entry for entry in os.listdir("/proc") if entry.isdigit() and entry != child):
        with contextlib.suppress(OSError):
            if (
                os.readlink(f"/proc/{process}/ns/pid") == space
                and b"sshd" in pathlib.Path(f"/proc/{process}/comm").read_bytes()
            ):
                os.kill(int(process), signal.SIGKILL)
                cut += 1
    return cut


@pytest.fixture(scope="module")
def story(lab: dict[str, Any]) -> Iterator[dict[str, Run]]:
    """The three runs: with faults, the one that finishes, one more."""
    with FaultProxy(lab["registries"]["plain"]["address"]) as proxy, concurrent.futures.ThreadPoolExecutor(1) as pool:
        # Slow enough that there is time to do harm in the middle of a pull.
        slow = proxy.add(Rule("/blobs/", rate=1_200_000))
        first = pool.submit(pull_from, proxy.address)
        wait_for(
            "both victims to pull",
            lambda: min(objects_of("faults-killed"), objects_of("faults-cut")) >= 3 or first.done(),
        )
        assert not first.done(), "the pull was over before it could be hurt"
        assert cut_connections("faults-cut") > 0
        namespace.end("faults-killed")
        runs = {"faults": first.result()}
        slow.rate = None
        namespace.again("faults-killed")
        assert host_of("faults-full").run(f"mount -o remount,size=80M {REPOSITORY}").rc == 0
        runs["next"] = pull_from(proxy.address)
        runs["after"] = pull_from(proxy.address)
        yield runs


def test_the_play_reports_each_host_by_itself(story: dict[str, Run]) -> None:
    assert kinds(story["faults"]) == {
        "faults-killed": "unreachable",
        "faults-cut": "unreachable",
        "faults-full": "failed",
        "faults-well": "ok",
    }


def test_a_full_disk_is_told_as_such(story: dict[str, Run]) -> None:
    found = result(story["faults"], "faults-full")
    assert found["error"] == "no_space" and not found["changed"], found


def test_the_host_that_was_well_did_not_notice(story: dict[str, Run], lab: dict[str, Any]) -> None:
    assert result(story["faults"], "faults-well")["digest"] == lab["images"]["big"]["digest"]
    assert not result(story["next"], "faults-well")["changed"]


def test_the_next_run_finishes_on_every_host(story: dict[str, Run]) -> None:
    assert set(kinds(story["next"]).values()) == {"ok"}
    for name in ("faults-killed", "faults-full"):
        assert result(story["next"], name)["changed"]
    assert {entry["host"]: entry["result"]["changed"] for entry in story["after"].entries} == dict.fromkeys(
        HOSTS, False
    )


@pytest.mark.parametrize("name", HOSTS)
def test_everything_is_whole_in_the_end(story: dict[str, Run], name: str, lab: dict[str, Any]) -> None:
    repository = Repository(host_of(name), REPOSITORY)
    image = lab["images"]["puffy" if name == "faults-full" else "big"]
    assert repository.image("app").digest == image["digest"]
    assert repository.damage() == [] and repository.unfinished == 0


@pytest.mark.parametrize("name", HOSTS)
def test_no_temporary_file_and_no_process_is_left(story: dict[str, Run], name: str) -> None:
    host = host_of(name)
    assert host.run("pgrep -f experimental-image-proxy").stdout == ""
    assert host.run(f"find {REPOSITORY} -name '.*' -type f -o -name '*.tmp'").stdout == ""
