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
from typing import Any, NamedTuple

import namespace
import pytest
from composefs_testinfra import Repository
from faultproxy import FaultProxy, Rule
from scenarios import REPOSITORY, Run, host_of, play

HOSTS = ("faults-killed", "faults-cut", "faults-full", "faults-well")
PULL = pathlib.Path(__file__).parents[1] / "pull.yml"
WATCHED = ("faults-cut", "faults-killed")
# Seconds without a sign after which a watched job gives nothing a name, and after which it ends (host/watch.py).
FRESH, PATIENCE = 15, 120
# Seconds more in which a command that came through just before the connections were cut may still give a sign, and in
# which the job, on a machine with other work, sees the last one.
LATE = 10


def pull_from(registry: str, **variables: str) -> Run:
    """Run the playbook to its end, whatever that is; what was recorded."""
    return play(PULL, fails=True, faults_registry=registry, **variables)


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


def listener_of(name: str) -> str:
    """The sshd of a host that listens, seen from outside."""
    first = namespace.ground.process_of(namespace.ground.running(name))
    (child,) = pathlib.Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return child


def jobs_of(name: str) -> list[pathlib.Path]:
    """Where jobs and their watchers meet on a host, seen from outside: without its ssh."""
    return list(pathlib.Path(f"/proc/{listener_of(name)}/root/tmp").glob("composefs-oci-*"))


def cut_connections(name: str) -> int:
    """Kill the sshd processes that serve connections of a host, not the one that listens; how many there were."""
    child = listener_of(name)
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


class Watched(NamedTuple):
    """A pull with a live line that was cut off: its run; whether the job that nobody looked after any more ended by
    itself, and whether it gave the name.
    """

    run: Run
    ended: bool
    named: bool


def looked_after(name: str) -> bool:
    return any((job / "sign").exists() for job in jobs_of(name))


@pytest.fixture(scope="module")
def watched(story: dict[str, Run], lab: dict[str, Any]) -> Iterator[Watched]:
    """A pull with a live line on two hosts: one loses its connections, and the other cannot be reached any more."""
    with FaultProxy(lab["registries"]["plain"]["address"]) as proxy, concurrent.futures.ThreadPoolExecutor(1) as pool:
        # So slow that no host is done before the other one has begun and the silence is long enough.
        slow = proxy.add(Rule("/blobs/", rate=500))
        variables = {"faults_image": "app-1", "faults_name": "watched", "composefs_progress": "always"}
        first = pool.submit(pull_from, proxy.address, faults_hosts="faults-cut,faults-killed", **variables)
        wait_for("both pulls to be jobs", lambda: all(map(looked_after, WATCHED)) or first.done())
        assert not first.done(), "the pull was over before it could be hurt"
        listener = int(listener_of("faults-killed"))
        os.kill(listener, signal.SIGSTOP)
        try:
            assert all(cut_connections(name) > 0 for name in WATCHED)
            # From here on nothing but the silence keeps the job from naming what it fetches.
            time.sleep(FRESH + LATE)
            slow.rate = None
            tag = namespace.directory_of("faults-killed") / "srv/images/streams/refs/oci/watched"
            end = time.monotonic() + PATIENCE + 60
            while jobs_of("faults-killed") and time.monotonic() < end:
                time.sleep(0.5)
            ended, named = not jobs_of("faults-killed"), tag.is_symlink()
            run = first.result()
        finally:
            os.kill(listener, signal.SIGCONT)
        yield Watched(run, ended, named)


def test_a_watched_pull_goes_on_when_its_connection_comes_back(watched: Watched, lab: dict[str, Any]) -> None:
    assert kinds(watched.run)["faults-cut"] == "ok"
    assert result(watched.run, "faults-cut")["digest"] == lab["images"]["app-1"]["digest"]
    repository = Repository(host_of("faults-cut"), REPOSITORY)
    assert repository.image("watched").digest == lab["images"]["app-1"]["digest"] and repository.damage() == []


def test_a_watched_pull_names_nothing_where_nobody_gives_a_sign_any_more(watched: Watched) -> None:
    assert not watched.named and kinds(watched.run)["faults-killed"] == "unreachable"
    assert set(Repository(host_of("faults-killed"), REPOSITORY).tags) == {"app"}


def test_a_job_that_nobody_looks_after_ends_and_leaves_nothing(watched: Watched) -> None:
    assert watched.ended
    host = host_of("faults-killed")
    assert host.run("pgrep -f experimental-image-proxy").stdout == "" and jobs_of("faults-killed") == []
