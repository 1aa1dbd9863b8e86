# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]


def test_what_is_whole_passes(name: str, played: list[Run]) -> None:
    result = played[0].of(name, "Check a whole repository")
    assert result["findings"] == [] and not result["changed"] and result["checked"]["images"] == 2


def test_rot_is_found_only_by_reading(name: str, played: list[Run]) -> None:
    assert played[0].of(name, "Check quickly")["findings"] == []
    found = played[0].of(name, "Find what has rotted")
    assert found["error"] == "repository_damaged" and [one["code"] for one in found["findings"]] == ["object_damaged"]
    victim = played[0].of(name, "Let a byte of the largest object rot")["stdout"]
    assert victim.endswith(found["findings"][0]["path"])


def test_it_is_repaired_once_and_as_foretold(name: str, played: list[Run]) -> None:
    foretold, done = played[0].of(name, "Foretell the repair"), played[0].of(name, "Repair")
    assert foretold["changed"] and done["changed"] and done["findings"] == []
    assert [one["object"] for one in foretold["repaired"]] == [one["object"] for one in done["repaired"]]
    assert not played[0].of(name, "Repair again")["changed"]


def test_what_nobody_needs_goes_as_foretold_and_what_is_mounted_stays(name: str, played: list[Run]) -> None:
    foretold, done = played[0].of(name, "Foretell what goes"), played[0].of(name, "Remove what nobody needs")
    keys = ("names", "images", "streams", "objects", "bytes", "bytes_by_kind", "by_name", "held", "problems")
    assert {key: foretold[key] for key in keys} == {key: done[key] for key in keys}
    assert done["names"] == ["app:1"] and "app:2" in done["held"]
    assert done["objects"] > 0 and done["bytes_by_kind"]["damaged"] > 0
    assert not played[0].of(name, "Remove it again")["changed"]


def test_the_rest_is_whole(name: str, played: list[Run], repository: Repository, host: Any) -> None:
    assert played[0].of(name, "Check what is left")["findings"] == []
    info = played[0].of(name, "Look at the repository")
    assert info["bytes_unused"] == 0 and info["counts"]["manifests"] == 1 and info["last_check"]["findings"] == {}
    assert repository.damage() == [] and "app:1" not in repository.tags
    assert repository.mounted("/srv/app") and host.run("find /srv/app -type f -exec cat {} + > /dev/null").rc == 0
