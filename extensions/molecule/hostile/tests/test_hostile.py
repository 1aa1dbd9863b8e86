# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]

ATTACKER = "setpriv --reuid=4243 --regid=4243 --clear-groups"


def test_planted_links_lead_root_nowhere(host: Any) -> None:
    assert sorted(host.file("/srv/victim").listdir()) == ["0123456789abcdef", "precious"]
    for name in ("0123456789abcdef", "precious"):
        assert host.file(f"/srv/victim/{name}").content_string == "precious\n"


def test_a_repository_of_somebody_else_is_refused(name: str, played: list[Run]) -> None:
    for run in played:
        assert run.of(name, "Pull into the repository of the attacker")["error"] == "unsafe_repository"
        assert "attacker" in run.of(name, "Pull into the repository of the attacker")["msg"]
        assert run.of(name, "Make a repository and give it to the attacker")["unsafe"] is True


def test_links_are_not_followed_where_the_repository_is_accepted(name: str, played: list[Run]) -> None:
    for run in played:
        result = run.of(name, "Pull into it all the same")
        assert result["error"] == "unsafe_repository" and "symbolic link" in result["msg"]


def test_nothing_is_mounted_from_a_repository_of_somebody_else(host: Any, name: str, played: list[Run]) -> None:
    assert played[0].of(name, "Mount from it")["error"] == "unsafe_repository"
    assert not host.mount_point("/srv/mounted").exists
    # This one is whole, and may be pulled into: its owner would change what every user of the host then runs.
    for run in played:
        assert not run.of(name, "Pull into that one all the same").get("failed")
        assert run.of(name, "Mount what the attacker can change")["error"] == "unsafe_repository"
    assert not host.mount_point("/srv/given-mounted").exists


def test_no_changes_are_mounted_that_somebody_else_can_make(host: Any, name: str, played: list[Run]) -> None:
    for run in played:
        assert run.of(name, "Mount with changes that the attacker could make, too")["error"] == "unsafe_repository"
    assert not host.mount_point("/srv/changes").exists


def test_a_fifo_is_not_waited_for(name: str, played: list[Run]) -> None:
    result = played[0].of(name, "List what the FIFO holds")
    assert result["error"] == "repository_damaged" and "not a regular file" in result["msg"]


def test_files_in_tmp_replace_planted_links(host: Any) -> None:
    for name in ("app.dump", "app.json"):
        file = host.file(f"/tmp/{name}")
        assert not file.is_symlink and file.user == "root" and file.size > 100


def test_others_can_neither_read_nor_lock_the_repository_of_root(host: Any) -> None:
    assert oct(host.file("/srv/images").mode) == "0o700"
    assert host.run(f"{ATTACKER} ls /srv/images").rc != 0
    assert host.run(f"{ATTACKER} flock -n /srv/images true").rc != 0


@pytest.mark.parametrize("image", ["app-1"])
def test_root_works_on_undisturbed(host: Any, lab: dict[str, Any], name: str, played: list[Run], image: str) -> None:
    own = Repository(host, "/srv/images")
    assert own.tags == {"app": lab["images"][image]["digest"]}
    assert own.damage() == []
    assert played[0].of(name, "Pull")["changed"] and not played[1].of(name, "Pull")["changed"]
