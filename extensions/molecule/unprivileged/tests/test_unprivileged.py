# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run

testinfra_hosts = ["ansible://hosts"]

HOME = "/home/puller"


@pytest.fixture
def own(host: Any) -> Repository:
    return Repository(host, f"{HOME}/.var/lib/composefs")


def test_the_images_are_in_the_users_own_repository(own: Repository, lab: dict[str, Any]) -> None:
    assert own.tags == {"one": lab["images"]["app-1"]["digest"], "two": lab["images"]["app-2"]["digest"]}
    assert own.damage() == []


def test_all_of_it_belongs_to_the_user_and_nobody_else_gets_in(host: Any, own: Repository) -> None:
    assert host.run(f"find {HOME} ! -user puller").stdout == ""
    assert oct(host.file(own.path).mode) == "0o700"


def test_nothing_was_made_elsewhere(host: Any) -> None:
    assert not host.file("/sysroot/composefs").exists
    assert (
        host.run("find / -xdev -user puller -type f").stdout.strip() == ""
        or host.run(f"find / -xdev -user puller -type f ! -path '{HOME}/*'").stdout == ""
    )


def test_the_user_sees_both_images(name: str, played: list[Run]) -> None:
    for run in played:
        assert [image["names"] for image in run.of(name, "List")["images"]] == [["one"], ["two"]]


def test_a_second_run_changes_nothing(name: str, played: list[Run]) -> None:
    assert played[0].of(name, "Pull")["changed"] and not played[1].of(name, "Pull")["changed"]


def test_what_is_not_allowed_is_said(name: str, played: list[Run]) -> None:
    assert played[0].of(name, "Pull into a repository of root")["error"] == "permission_denied"
    assert played[0].of(name, "Mount")["error"] in ("permission_denied", "mount_failed")
    assert "root" in played[0].of(name, "Mount")["msg"]
