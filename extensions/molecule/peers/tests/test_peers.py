# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
from typing import Any

import lab as lab_program
import pytest
from composefs_testinfra import Repository
from scenarios import Run, created, host_of

testinfra_hosts = ["ansible://hosts"]

CLIENTS = ("peers-first", "peers-warned", "peers-bereft", "peers-alone", "peers-updated")
OBJECTS = 251


def pulled(run: Run, name: str) -> dict[str, Any]:
    return run.of(name, "Pull the image")


def peer_of(result: dict[str, Any], number: int) -> dict[str, Any]:
    return dict(result["stats"]["peers"][number])


def test_every_host_has_the_image_and_nothing_is_damaged(
    repository: Repository, name: str, run: Run, lab: dict[str, Any]
) -> None:
    assert repository.tags["library"] == lab["images"]["library-2"]["digest"]
    assert repository.damage() == []
    if name in CLIENTS:
        assert pulled(run, name)["image_id"] == run.of("peers-honest", "Pull the image from its registry")["image_id"]
        assert not run.of(name, "Pull the image again")["changed"]


@pytest.mark.parametrize("name", CLIENTS)
def test_check_mode_tells_the_bytes_of_the_registry_and_that_peers_may_change_them(
    name: str, run: Run, lab: dict[str, Any]
) -> None:
    foretold = run.of(name, "Foretell the image")
    assert foretold["changed"] and not foretold["bytes_exact"]
    assert foretold["stats"]["bytes_fetched"] == lab["images"]["library-2"]["size"]


def test_a_first_image_comes_from_a_peer_alone(run: Run) -> None:
    result = pulled(run, "peers-first")
    assert [layer["source"] for layer in result["layers"]] == ["peer"] and result.get("warnings", []) == []
    assert peer_of(result, 0)["objects"] == OBJECTS


def test_an_update_takes_only_what_changed_from_a_peer(run: Run) -> None:
    result = pulled(run, "peers-updated")
    assert [layer["source"] for layer in result["layers"]] == ["peer"]
    assert 1 < peer_of(result, 0)["objects"] <= 30
    assert result["stats"]["objects_already_present"] >= OBJECTS - 30


def test_a_peer_that_lies_is_named_and_the_next_one_serves(run: Run) -> None:
    result = pulled(run, "peers-warned")
    assert [layer["source"] for layer in result["layers"]] == ["peer"]
    assert any("lied" in warning for warning in result["warnings"])
    assert peer_of(result, 0)["error"] and peer_of(result, 1)["objects"] == OBJECTS


def test_a_peer_that_dies_is_left_out_and_what_it_sent_is_used(run: Run) -> None:
    result = pulled(run, "peers-bereft")
    assert [layer["source"] for layer in result["layers"]] == ["peer"]
    assert peer_of(result, 0)["error"] and peer_of(result, 1)["layers"] == 1
    assert any("left out" in warning for warning in result["warnings"])


def test_a_host_whose_peers_all_fail_takes_the_layer_from_the_registry(run: Run) -> None:
    result = pulled(run, "peers-alone")
    assert [layer["source"] for layer in result["layers"]] == ["registry"]
    assert peer_of(result, 0)["error"] and peer_of(result, 1)["error"] and len(result["warnings"]) >= 2


def test_the_seed_died_in_the_middle_of_a_file() -> None:
    assert "dies in the middle of objects/" in host_of("peers-mortal").file("/var/tmp/seed.log").content_string


def origin_sent() -> dict[str, int]:
    """How often each blob left the origin, by the digest of the blob."""
    log = (lab_program.services("peers") / "plain" / "log").read_text()
    found: dict[str, int] = {}
    for digest in re.findall(r'"GET /v2/library-2/blobs/(sha256:[0-9a-f]{64}) HTTP[^"]*" 200', log):
        found[digest] = found.get(digest, 0) + 1
    return found


def test_the_origin_sent_the_layer_to_the_seeds_and_to_the_host_without_a_peer_only() -> None:
    """Of eight hosts four had to ask it: the three seeds, one by one, and the one that was left alone."""
    (layer,) = created()["images"]["library-2"]["layers"]
    assert origin_sent()[layer] == 4
