# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
from typing import Any

import lab as lab_program
from composefs_testinfra import Repository
from scenarios import Run, host_of

testinfra_hosts = ["ansible://hosts"]

MAKER, TAKER = "deltas-bookworm", "deltas-trixie"
SEEDS = ("deltas-liar", "deltas-mortal")
# The tasks by which hosts got the newer image; the others did so by "Update".
HOW = {
    MAKER: "Pull the newer image beside it",
    TAKER: "Update by the delta",
    **dict.fromkeys(SEEDS, "Pull the newer image from its registry"),
}


def update_of(run: Run, name: str) -> dict[str, Any]:
    result = run.of(name, HOW.get(name, "Update"))
    return result["images"][0] if "images" in result else result


def test_every_host_has_the_same_newer_image_and_nothing_is_damaged(
    repository: Repository, name: str, run: Run, lab: dict[str, Any]
) -> None:
    newer = repository.tags["newer" if name == MAKER else "library"]
    assert newer == lab["images"]["library-2"]["digest"]
    assert update_of(run, name)["image_id"] == update_of(run, MAKER)["image_id"]
    assert repository.damage() == []


def test_the_delta_is_made_once(run: Run) -> None:
    foretold, made, again = (
        run.of(MAKER, task) for task in ("Foretell the delta", "Make the delta", "Make the delta again")
    )
    assert foretold["changed"] and made["changed"] and not again["changed"]
    assert foretold["digest"] is None and again["digest"] == made["digest"] and again["bytes"] == made["bytes"]
    assert made["layers"][0]["bytes"] < made["layers"][0]["size"] / 20


def test_an_update_costs_the_bytes_of_the_delta_as_foretold(run: Run) -> None:
    made = run.of(MAKER, "Make the delta")
    foretold, real, again = (
        run.of(TAKER, task) for task in ("Foretell the update", "Update by the delta", "Update again")
    )
    assert [layer["source"] for layer in foretold["layers"]] == ["delta"]
    assert [layer["source"] for layer in real["layers"]] == ["delta"]
    assert real["stats"]["bytes_fetched"] == foretold["stats"]["bytes_fetched"] == made["bytes"]
    assert foretold["changed"] and real["changed"] and not again["changed"] and real.get("warnings", []) == []


def test_a_delta_that_is_named_is_taken(run: Run) -> None:
    result = run.of("deltas-given", "Update")
    assert [layer["source"] for layer in result["layers"]] == ["delta"] and result.get("warnings", []) == []
    assert result["stats"]["bytes_fetched"] == run.of(MAKER, "Make the delta")["bytes"]


def test_a_delta_that_does_not_fit_is_a_warning_and_the_layer_comes_whole(run: Run) -> None:
    result = run.of("deltas-wrong", "Update")
    assert [layer["source"] for layer in result["layers"]] == ["registry"]
    assert any("delta" in warning for warning in result["warnings"])


def test_a_host_with_a_delta_needs_no_seed(run: Run) -> None:
    result = run.of("deltas-served", "Update")
    assert [layer["source"] for layer in result["layers"]] == ["delta"] and result.get("warnings", []) == []
    assert [(peer["objects"], peer["error"]) for peer in result["stats"]["peers"]] == [(0, None)] * 2


def test_a_host_that_everybody_fails_says_who_and_takes_the_layer_from_the_registry(run: Run) -> None:
    result = run.of("deltas-forsaken", "Update")
    assert [layer["source"] for layer in result["layers"]] == ["registry"]
    assert all(peer["error"] for peer in result["stats"]["peers"])
    for word in ("delta", "lied", "left out"):
        assert any(word in warning for warning in result["warnings"]), (word, result["warnings"])


def test_one_seed_died_in_the_middle_of_a_file() -> None:
    assert "dies in the middle of objects/" in host_of("deltas-mortal").file("/var/tmp/seed.log").content_string


def test_the_origin_sent_the_newer_layer_only_to_those_without_a_delta(lab: dict[str, Any]) -> None:
    log = (lab_program.services("deltas") / "plain" / "log").read_text()
    (layer,) = lab["images"]["library-2"]["layers"]
    asked = re.findall(rf'"GET /v2/library-2/blobs/{layer} HTTP', log)
    assert len(asked) == 5, "the maker, both seeds, the host with a wrong delta and the one that everybody failed"
