# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]

TASKS = {
    "oci": "Pull from an OCI layout",
    "oci-archive": "Pull from an OCI archive",
    "docker-archive": "Pull from a Docker archive",
    "dir": "Pull from a directory",
}


def test_the_host_has_no_way_out(host: Any) -> None:
    assert host.run("ip route show default").stdout == ""


def test_every_transport_brought_the_image(repository: Repository, lab: dict[str, Any]) -> None:
    assert set(repository.tags) == set(TASKS)
    for name, image in {"oci": "app-1", "oci-archive": "zstd", "dir": "zstd"}.items():
        assert repository.image(name).digest == lab["images"][image]["digest"]
    assert repository.damage() == [] and repository.algorithm == "sha256"


def test_a_docker_archive_has_the_same_layers(name: str, runs: list[Run], lab: dict[str, Any]) -> None:
    result = runs[0].of(name, TASKS["docker-archive"])
    assert [layer["diff_id"] for layer in result["layers"]] == lab["images"]["app-1"]["diff_ids"]
    # They were all there already from the OCI layout, compressed in another way.
    assert {layer["status"] for layer in result["layers"]} == {"present"} and result["stats"]["bytes_fetched"] == 0


@pytest.mark.parametrize("task", TASKS.values())
def test_a_second_run_fetches_nothing(name: str, runs: list[Run], task: str) -> None:
    first, second = runs[0].of(name, task), runs[1].of(name, task)
    assert (
        first["changed"]
        and not second["changed"]
        and second["stats"]["bytes_fetched"] == 0
        and second["digest"] == first["digest"]
    )


@pytest.mark.parametrize(
    ("task", "error"),
    [("Pull from the registry", "registry_unreachable"), ("Pull from an archive that is not there", "image_not_found")],
)
def test_what_cannot_be_reached_has_its_code(name: str, runs: list[Run], task: str, error: str) -> None:
    for run in runs:
        assert run.of(name, task)["error"] == error
