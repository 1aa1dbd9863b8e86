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
from typing import Any

import composefs_testinfra
import pytest

REPOSITORY = "/srv/images"


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


def ephemeral() -> pathlib.Path:
    return pathlib.Path(os.environ["MOLECULE_EPHEMERAL_DIRECTORY"])


def recorded() -> list[Run]:
    """All runs so far, in their order."""
    runs = []
    for path in sorted((ephemeral() / "results").glob("*.jsonl")):
        _number, name, mode = path.stem.split("-")
        runs.append(Run(name, mode == "check", [json.loads(line) for line in path.read_text().splitlines()]))
    return runs


def pytest_sessionfinish() -> None:
    """Tell what the tests ran on."""
    import lab
    import report

    report.write(hosts=lab.describe(created()["instances"]))


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


@pytest.fixture
def name(host: Any) -> str:
    """The host's name in the inventory."""
    return str(host.backend.host)


@pytest.fixture
def repository(host: Any) -> composefs_testinfra.Repository:
    """The repository that the scenario makes on each host."""
    return composefs_testinfra.Repository(host, REPOSITORY)
