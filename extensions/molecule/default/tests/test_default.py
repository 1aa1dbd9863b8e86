# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]

NAMES = {"debian": "debian", "app/one": "app-1", "app/two": "app-2"}
PULLS = ("Pull one image", "Pull several images")
# What check mode cannot know: what objects there will be, how long it takes, the ids of images that are not made yet.
UNKNOWN = {"stats", "image_id", "boot_image_id", "warnings", "invocation", "diff", "free_bytes", "free_inodes"}
# Ansible itself adds these to the result of a module with a path, once that exists.
UNKNOWN |= {"owner", "group", "uid", "gid", "mode", "size", "state", "secontext"}


# Python 3.14 brings zstd itself.
LIBRARIES = """python3 -c '
import jsonschema
try:
    import compression.zstd
except ImportError:
    import zstandard'"""


def foretold(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that check mode has to get right."""
    kept = {key: value for key, value in result.items() if key not in UNKNOWN and not key.startswith("_")}
    if "images" in kept:
        kept["images"] = [foretold(image) for image in kept["images"]]
    if "stats" in result:
        kept["stats"] = {key: result["stats"][key] for key in ("layers", "layers_already_present", "bytes_fetched")}
    return kept


def test_the_role_brought_what_is_needed(host: Any) -> None:
    assert host.package("skopeo").is_installed
    assert host.run(LIBRARIES).rc == 0
    # Nothing is installed that is not needed.
    assert host.package("python3-zstandard").is_installed is (host.run("python3 -c 'import compression.zstd'").rc != 0)


def test_the_repository_holds_the_images_and_nothing_is_damaged(repository: Repository, lab: dict[str, Any]) -> None:
    assert repository.exists and repository.algorithm == "sha512"
    for name, image in NAMES.items():
        assert repository.image(name).digest == lab["images"][image]["digest"]
    (bare,) = set(repository.tags) - set(NAMES)
    assert bare.endswith("/zstd:latest") and repository.tags[bare] == lab["images"]["zstd"]["digest"]
    assert repository.damage() == [] and repository.unfinished == 0


def test_every_layer_is_named_once(repository: Repository, lab: dict[str, Any]) -> None:
    expected = {f"oci-layer-{layer}" for image in lab["images"].values() for layer in image["diff_ids"]}
    assert {name for name in repository.streams if name.startswith("oci-layer-")} == expected


def test_the_listing_tells_the_truth(name: str, runs: list[Run], lab: dict[str, Any]) -> None:
    listed = {image["names"][0]: image for image in runs[1].of(name, "List them")["images"]}
    for tag, image in NAMES.items():
        facts = lab["images"][image]
        found = listed[tag]
        assert (
            found["config_digest"] == facts["config_digest"]
            and found["labels"] == facts["labels"]
            and found["size"] == facts["size"]
        )
        assert [layer["diff_id"] for layer in found["layers"]] == facts["diff_ids"]


def test_the_pulls_are_in_the_system_log(host: Any, lab: dict[str, Any]) -> None:
    log = host.file("/var/log/syslog").content_string
    for name, image in NAMES.items():
        assert f"{name} in /srv/images is now {lab['images'][image]['digest']}" in log


def test_four_runs_were_recorded(runs: list[Run]) -> None:
    assert [(run.name, run.check) for run in runs] == [
        ("converge", True),
        ("converge", False),
        ("converge", False),
        ("converge", True),
    ]


@pytest.mark.parametrize("run", [2, 3], ids=["second run", "check mode after it"])
def test_a_further_run_changes_nothing(name: str, runs: list[Run], run: int) -> None:
    results = runs[run].modules(name)
    assert len(results) == 4
    assert [task for task, result in results if result["changed"]] == []
    for pull in PULLS:
        result = runs[run].of(name, pull)
        for image in result.get("images", [result]):
            assert image["stats"]["bytes_fetched"] == 0 and image["digest"] == image["previous_digest"]


def test_check_mode_after_it_tells_just_what_the_run_told(name: str, runs: list[Run]) -> None:
    assert [(task, foretold(result)) for task, result in runs[3].modules(name)] == [
        (task, foretold(result)) for task, result in runs[2].modules(name)
    ]


def test_check_mode_on_a_fresh_host_foretells_what_changes(name: str, runs: list[Run]) -> None:
    before, after = runs[0].modules(name), runs[1].modules(name)
    assert [(task, result["changed"]) for task, result in before] == [
        (task, result["changed"]) for task, result in after
    ]
    assert [task for task, result in after if result["changed"]] == [after[0][0], *PULLS]
    assert foretold(before[0][1]) == foretold(after[0][1])


def test_where_skopeo_is_there_check_mode_on_a_fresh_host_foretells_everything(
    host: Any, name: str, runs: list[Run], lab: dict[str, Any]
) -> None:
    bare = name != "default-ready"
    for pull in PULLS:
        before, after = runs[0].of(name, pull), runs[1].of(name, pull)
        if bare:
            assert "skopeo" in before["warnings"][-1]
            continue
        for one, other in zip(before.get("images", [before]), after.get("images", [after])):
            # In the same task a run knows what the image before it fetched; check mode must know that, too.
            told, came = foretold(one), foretold(other)
            # A repository that is only foretold has no file system yet that could be asked for fs-verity.
            assert told.pop("verity", None) in (None, came.pop("verity", None))
            assert told == came
            assert one["digest"] in {image["digest"] for image in lab["images"].values()}
