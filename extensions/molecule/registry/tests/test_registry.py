# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from composefs_testinfra import Repository
from scenarios import Run, ephemeral

testinfra_hosts = ["ansible://hosts"]

ERRORS = {
    "Pull with a wrong password": "auth_failed",
    "Pull without a password": "auth_failed",
    "Pull without knowing the authority": "tls_failed",
    "Pull an image that is not there": "image_not_found",
    "Pull an image for other platforms only": "platform_not_found",
    "Pull for a platform that the index lacks": "platform_not_found",
    "Pull from a registry that does not answer": "registry_unreachable",
}


@pytest.fixture(scope="module")
def secrets(lab: dict[str, Any]) -> list[str]:
    """The password in every form in which it travels."""
    locked = lab["registries"]["locked"]
    user, password = locked["user"], locked["password"]
    return [
        password,
        base64.b64encode(f"{user}:{password}".encode()).decode(),
        base64.b64encode(f"{user}:{password}-not".encode()).decode(),
    ]


def test_both_ways_to_give_the_password_work(repository: Repository, lab: dict[str, Any]) -> None:
    assert repository.tags == {
        "by-file": lab["images"]["app-1"]["digest"],
        "by-option": lab["images"]["multi"]["digest"],
    }
    assert repository.damage() == []


def test_of_an_index_the_hosts_own_platform_is_taken_and_the_index_is_told(
    name: str, played: list[Run], lab: dict[str, Any]
) -> None:
    result = played[0].of(name, "Pull with options")
    assert (
        result["index_digest"] == lab["images"]["multi"]["index_digest"]
        and result["digest"] == lab["images"]["multi"]["digest"]
    )


@pytest.mark.parametrize("task", ERRORS)
def test_what_goes_wrong_has_its_code(name: str, played: list[Run], task: str) -> None:
    result = played[0].of(name, task)
    assert result["error"] == ERRORS[task], result["msg"]
    assert not result["changed"] and "Traceback" not in json.dumps(result)


def test_no_process_showed_the_password(host: Any, secrets: list[str]) -> None:
    seen = host.file("/var/tmp/seen").content_string
    # The watch was awake: it saw skopeo at work for several of the tasks.
    assert "experimental-image-proxy" in seen
    assert [secret for secret in secrets if secret in seen] == []


def test_the_password_is_in_no_result_log_or_diff(runs: list[Run], secrets: list[str]) -> None:
    log = (ephemeral() / "ansible.log").read_text()
    assert "Pull with options" in log and len(runs) == 3
    everything = log + json.dumps([run.entries for run in runs])
    assert [secret for secret in secrets if secret in everything] == []


def test_the_password_is_not_in_the_system_log(host: Any, secrets: list[str]) -> None:
    log = host.file("/var/log/syslog").content_string
    assert "by-option in /srv/images is now" in log
    assert [secret for secret in secrets if secret in log] == []


def test_the_password_was_left_in_no_file(host: Any, secrets: list[str]) -> None:
    patterns = " ".join(f"-e '{secret}'" for secret in secrets)
    found = host.run(
        f"grep -rlF {patterns} /root /home /run /tmp /var/tmp /var/lib /srv /dev/shm /etc 2>/dev/null"
    ).stdout.split()
    assert found == ["/etc/tests/auth.json"]  # which the scenario put there
