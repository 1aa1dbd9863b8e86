# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures for the tests of the Molecule scenarios: what was created, what the playbook runs returned, and the
repositories on the hosts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Collection
from typing import Any

import composefs_testinfra
import pytest

REPOSITORY = "/srv/images"
# What differs between a run in check mode and the run after it without being foretold: times, and what stands in both
# forms of a difference.
UNTOLD = {
    "warnings",
    "invocation",
    "diff",
    "free_bytes",
    "free_inodes",
    "deprecations",
    "exception",
    "attempts",
    "seconds",
    "msg",
    "place",  # where a repository lies that is still to come cannot be told
}
# Of the numbers of a pull, those that the registry and the repository settle.
COUNTED = ("layers", "layers_already_present", "bytes_fetched")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a playbook."""

    name: str
    check: bool
    entries: list[dict[str, Any]]

    def of(self, host: str, task: str) -> dict[str, Any]:
        """The result of the task on the host; AssertionError unless there is exactly one."""
        found = [entry["result"] for entry in self.entries if entry["host"] == host and entry["task"].endswith(task)]
        assert len(found) == 1, f"{task} has {len(found)} results on {host} in {self.name}"
        # What check mode hands on to later tasks is no part of what a task did.
        return {key: value for key, value in found[0].items() if key != "ansible_facts"}

    def modules(self, host: str) -> list[tuple[str, dict[str, Any]]]:
        """Task name and result of every task of the collection's modules on the host, but not of those that were
        skipped.
        """
        mine = [entry for entry in self.entries if entry["host"] == host and entry["kind"] != "skipped"]
        return [
            (entry["task"], {key: value for key, value in entry["result"].items() if key != "ansible_facts"})
            for entry in mine
            # The warnings of roles are for people.
            if entry["action"].startswith("composefs.oci.") and entry["action"] != "composefs.oci.warn"
        ]


def differences(foretold: Run, done: Run, unforetold: Collection[str] = ()) -> list[str]:
    """What a run in check mode foretold wrongly, one line each; ``unforetold`` are tasks that are not held against it.

    Every task that changed something must have been foretold, handlers too, and nothing else. What the modules of the
    collection foretell must come, but None says that it cannot be known. Commands, which check mode skips, do not count.
    """
    found = []
    told, came = _by_task(foretold), _by_task(done)
    for key, result in came.items():
        before = told.get(key)
        host, task, _number = key
        if any(task.endswith(name) for name in unforetold) or (before is None and not result["changed"]):
            continue
        if before is None:
            found.append(f"{task} on {host} was not foretold")
        elif before["passed_over"] and result["kind"] != "skipped" and not result["ours"]:
            continue
        elif before["kind"] == "skipped" and result["kind"] != "skipped":
            if result["changed"]:
                found.append(f"{task} on {host} changed something, and check mode skipped it")
        else:
            # A task of another collection that changed nothing this time may have run for good before (check_mode: false).
            sure = result["ours"] or result["changed"]
            pairs = [("kind", before["kind"], result["kind"])] if result["ours"] else []
            pairs += [("changed", before["changed"], result["changed"])] if sure else []
            if result["ours"]:
                pairs += _unlike("", before["result"], result["result"])
            found += [
                f"{task} on {host}: {where} was to be {one!r} and is {two!r}" for where, one, two in pairs if one != two
            ]
    gone = [key for key, before in told.items() if before["changed"] and key not in came]
    found += [f"{task} on {host} was foretold and did not run" for host, task, _number in gone]
    return found


def _by_task(run: Run) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The results of a run by host and task; tasks that come several times are numbered."""
    found: dict[tuple[str, str, int], dict[str, Any]] = {}
    for entry in run.entries:
        number = sum(1 for host, task, _number in found if (host, task) == (entry["host"], entry["task"]))
        result = entry["result"]
        found[entry["host"], entry["task"], number] = {
            "kind": entry["kind"],
            "result": result,
            "changed": bool(result.get("changed")),
            "ours": entry["action"].startswith("composefs.oci.") and entry["action"] != "composefs.oci.warn",
            "passed_over": entry["action"].rpartition(".")[2] in ("command", "shell", "script", "raw", "unarchive"),
        }
    return found


def _unlike(where: str, foretold: Any, done: Any) -> list[tuple[str, Any, Any]]:
    """Where ``done`` is not what was foretold: the place, and both values. None foretells nothing."""
    if foretold is None:
        return []
    if isinstance(foretold, dict) and isinstance(done, dict):
        keys = COUNTED if where.endswith(".stats") else [key for key in foretold if key not in UNTOLD]
        keys = [key for key in keys if not key.startswith("_") and key != "ansible_facts"]
        return [one for key in keys for one in _unlike(f"{where}.{key}", foretold[key], done.get(key))]
    if isinstance(foretold, list) and isinstance(done, list) and len(foretold) == len(done):
        return [one for number, both in enumerate(zip(foretold, done)) for one in _unlike(f"{where}[{number}]", *both)]
    return [(where, foretold, done)] if foretold != done else []


def ephemeral() -> pathlib.Path:
    return pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])


def recorded() -> list[Run]:
    """All runs so far, in their order."""
    runs = []
    for path in sorted((ephemeral() / "results").glob("*.jsonl")):
        _number, name, mode = path.stem.split("-")
        runs.append(Run(name, mode == "check", [json.loads(line) for line in path.read_text().splitlines()]))
    return runs


def host_of(name: str) -> Any:
    """A host by its name in the inventory, for tests that run once for several."""
    import testinfra  # late: tests without hosts compare runs, too

    return testinfra.get_host(f"ansible://{name}?ansible_inventory={os.environ['MOLECULE_INVENTORY_FILE']}")


def said(command: list[str], timeout: float = 300, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the controller to its end, whatever that is; what it says is shown, and returned as one text.
    ``how`` is as for subprocess.run.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        **how,
    )
    print(done.stdout)
    return done


def play(playbook: pathlib.Path, *words: str, fails: bool = False, **variables: Any) -> Run:
    """Run a playbook to its end; what was recorded. Unless ``fails``, every host must do well."""
    command = ["ansible-playbook", "--inventory", os.environ["MOLECULE_INVENTORY_FILE"]]
    done = said([*command, "--extra-vars", json.dumps(variables), *words, str(playbook)], cwd=ephemeral())
    assert fails or done.returncode == 0, done.stdout[-3000:]
    return recorded()[-1]


def pytest_sessionfinish() -> None:
    """Tell what the tests ran on."""
    import lab
    import report

    made = created()
    try:
        hosts = lab.describe(made["instances"])
    except (RuntimeError, ValueError) as error:
        # What a test says of a host that is gone must not be lost for want of its description.
        print(f"{error}\nThe hosts are described as they were in the beginning.")
        hosts = list(made["hosts"].values())
    report.write(hosts=hosts)


def created() -> dict[str, Any]:
    """What create made: registries, files, images, instances."""
    return dict(json.loads((ephemeral() / "lab.json").read_text())["lab_made"])


@pytest.fixture(scope="session")
def lab() -> dict[str, Any]:
    return created()


@pytest.fixture(scope="session")
def runs() -> list[Run]:
    """The runs before the tests."""
    return recorded()


@pytest.fixture(scope="session")
def run(runs: list[Run]) -> Run:
    """The only run there was, but for one in check mode before it."""
    (one,) = [run for run in runs if not run.check]
    return one


@pytest.fixture(scope="session")
def played(runs: list[Run]) -> list[Run]:
    """The runs before the tests that were no check mode."""
    return [run for run in runs if not run.check]


@pytest.fixture
def name(host: Any) -> str:
    """The host's name in the inventory."""
    return str(host.backend.host)


@pytest.fixture
def repository(host: Any) -> composefs_testinfra.Repository:
    """The repository that the scenario makes on each host."""
    return composefs_testinfra.Repository(host, REPOSITORY)
