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
WITHOUT_SKOPEO = ("oci", "oci-archive")
COPY, REHASHED = "Pull from another repository on the host", "Pull into a repository with another algorithm"


def names_on(host: Any) -> set[str]:
    """The images that the host can have."""
    return set(TASKS if host.exists("skopeo") else WITHOUT_SKOPEO)


def test_the_host_has_no_way_out(host: Any) -> None:
    assert host.run("ip route show default").stdout == ""


def test_every_transport_brought_the_image(host: Any, repository: Repository, lab: dict[str, Any]) -> None:
    assert set(repository.tags) == names_on(host)
    for name, image in {"oci": "app-1", "oci-archive": "zstd", "dir": "zstd"}.items():
        if name in names_on(host):
            assert repository.image(name).digest == lab["images"][image]["digest"]
    assert repository.damage() == [] and repository.algorithm == "sha256"


def test_the_air_gapped_host_has_no_skopeo_and_needs_none(host: Any, name: str, played: list[Run]) -> None:
    assert host.exists("skopeo") == ("airgapped" not in name)
    for run in played:
        for task in WITHOUT_SKOPEO:
            result = run.of(name, TASKS[task])
            assert result["skopeo_version"] is None and result["policy"] == "accept_anything"


def test_images_come_from_another_repository(name: str, played: list[Run], lab: dict[str, Any]) -> None:
    first, second = played[0].of(name, COPY), played[1].of(name, COPY)
    assert first["changed"] and not second["changed"] and first["skopeo_version"] is None
    assert [image["name"] for image in first["images"]] == ["oci", "other name"]
    for image, wanted in zip(first["images"], ("app-1", "zstd")):
        assert image["digest"] == lab["images"][wanted]["digest"] and image["image_id"]
    source = played[0].of(name, TASKS["oci"])
    assert first["images"][0]["image_id"] == source["image_id"]


def test_another_algorithm_is_hashed_anew(name: str, played: list[Run], lab: dict[str, Any]) -> None:
    first, second = played[0].of(name, REHASHED), played[1].of(name, REHASHED)
    assert first["changed"] and not second["changed"]
    assert first["digest"] == lab["images"]["app-1"]["digest"] and len(first["image_id"]) == 128


def test_a_docker_archive_has_the_same_layers(host: Any, name: str, played: list[Run], lab: dict[str, Any]) -> None:
    if not host.exists("skopeo"):
        pytest.skip("the host has no skopeo")
    result = played[0].of(name, TASKS["docker-archive"])
    assert [layer["diff_id"] for layer in result["layers"]] == lab["images"]["app-1"]["diff_ids"]
    # They were all there already from the OCI layout, compressed in another way.
    assert {layer["status"] for layer in result["layers"]} == {"present"} and result["stats"]["bytes_fetched"] == 0


@pytest.mark.parametrize("task", TASKS.values())
def test_a_second_run_fetches_nothing(host: Any, name: str, played: list[Run], task: str) -> None:
    if task not in {TASKS[image] for image in names_on(host)}:
        pytest.skip("the host has no skopeo")
    first, second = played[0].of(name, task), played[1].of(name, task)
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
def test_what_cannot_be_reached_has_its_code(host: Any, name: str, played: list[Run], task: str, error: str) -> None:
    if "registry" in task and not host.exists("skopeo"):
        error = "skopeo_missing"
    for run in played:
        assert run.of(name, task)["error"] == error
