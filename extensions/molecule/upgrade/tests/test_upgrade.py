# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]

REPOSITORIES = ("cfsctl", "older", "collection")


def of(run: Run, host: str, task: str, repository: str) -> dict[str, Any]:
    """The result of a task with a loop for one of the repositories."""
    return next(result for result in run.of(host, task)["results"] if result["item"] == repository)


@pytest.fixture(params=REPOSITORIES)
def which(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_nothing_that_was_there_is_changed_or_gone(host: Any, which: str) -> None:
    # For every file: its path, kind, mode and content, or where it leads. Times and link counts do not matter.
    listing = (
        "cd {} && find . -type f -exec sha256sum {{}} + -exec stat -c '%n %a %s' {{}} + | sort; cd {} && find . -type "
        "l -printf '%p -> %l\\n' | sort"
    )
    before = host.run(listing.format(f"/srv/before/{which}", f"/srv/before/{which}")).stdout.splitlines()
    after = host.run(listing.format(f"/srv/{which}", f"/srv/{which}")).stdout.splitlines()
    assert len(before) > 60
    assert sorted(set(before) - set(after)) == []


def test_both_images_are_whole(host: Any, which: str) -> None:
    repository = Repository(host, f"/srv/{which}")
    assert set(repository.tags) == {"one", "two"}
    assert repository.damage() == []


def test_only_the_old_format_is_upgraded(name: str, played: list[Run], which: str) -> None:
    result = of(played[0], name, "Prepare the repositories", which)
    assert result["upgraded"] is result["changed"] is (which == "older") and not result["created"]
    assert result["algorithm"] == "sha512"


def test_what_was_there_is_not_pulled_again(name: str, played: list[Run], which: str) -> None:
    result = of(played[0], name, "Pull what is there already", which)
    assert result["stats"]["bytes_fetched"] == 0 and {layer["status"] for layer in result["layers"]} == {"present"}
    assert result["previous_digest"] == result["digest"]
    assert not result["changed"], result["streams"]


def test_a_shared_layer_is_not_fetched(name: str, played: list[Run], which: str) -> None:
    result = of(played[0], name, "Pull something that shares a layer", which)
    assert [layer["status"] for layer in result["layers"]] == ["present", "new"] and result["changed"]


def test_a_second_run_changes_nothing(name: str, played: list[Run], which: str) -> None:
    for task in ("Prepare the repositories", "Pull what is there already", "Pull something that shares a layer"):
        assert not of(played[1], name, task, which)["changed"]


def test_the_images_have_the_same_ids_whoever_wrote_them(name: str, played: list[Run]) -> None:
    ids = {
        which: [image["image_id"] for image in of(played[0], name, "List", which)["images"]] for which in REPOSITORIES
    }
    assert ids["cfsctl"] == ids["older"] == ids["collection"] and None not in ids["cfsctl"]
