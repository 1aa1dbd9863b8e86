# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

from typing import Any

import pytest
from composefs_testinfra import Repository

testinfra_hosts = ["ansible://edge"]


@pytest.fixture
def variables(host: Any) -> dict[str, Any]:
    """The variables of the host in the inventory."""
    return dict(host.ansible.get_variables())


@pytest.fixture
def repository(host: Any, variables: dict[str, Any]) -> Repository:
    return Repository(host, variables["rollout_repository"])


def test_the_repository_is_what_was_asked_for(repository: Repository, variables: dict[str, Any]) -> None:
    assert repository.exists
    assert repository.protected or variables["rollout_verity"] != "required"


def test_every_image_is_there_and_whole(repository: Repository, variables: dict[str, Any]) -> None:
    for image in variables["rollout_images"]:
        found = repository.image(image["name"])
        assert found.damaged == []
        # An image that the inventory pins must be just that one.
        assert image.get("digest") in (None, found.digest)
    assert repository.unfinished == 0


def test_every_image_is_mounted_where_it_belongs(repository: Repository, variables: dict[str, Any]) -> None:
    for name, path in variables["rollout_mounts"].items():
        assert repository.mounted(path) == repository.image(name).image_id


def test_the_mounts_can_be_read_and_not_written(host: Any, variables: dict[str, Any]) -> None:
    for path in variables["rollout_mounts"].values():
        assert host.run(f"ls {path}").stdout.strip()
        assert host.run(f"touch {path}/written").rc != 0
