# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_deployment and composefs_deployment_info through AnsibleModule, with a stand-in for the kernel's mounts and
for systemd. What they do to a real host is in the integration tests.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, deployment, journal
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_deployment, composefs_deployment_info
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape
from ansible_collections.composefs.oci.tests.support.mounthost import Host, put

SHAPE = set(yaml.safe_load(composefs_deployment.RETURN)) - {"error"} | {"changed"}


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path, monkeypatch)
    with Repository.open(made.repository, write=True) as repository:
        made.digests = [put(repository, image) for image in made.images]
    return made


@pytest.fixture
def run(host: Host, capsys: pytest.CaptureFixture[str]) -> Any:
    def task(module: Any = composefs_deployment, check: bool = False, **values: Any) -> dict[str, Any]:
        common = {"_ansible_remote_tmp": "/tmp", "_ansible_diff": True, "_ansible_check_mode": check}
        values = {"path": host.path, "repository": host.repository, **values}
        with arguments({**common, **values}), pytest.raises(SystemExit):
            module.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        if module is composefs_deployment:
            require_shape(result, SHAPE)
        return result

    return task


def test_to_confirm_at_once_holds_for_what_is_on_trial_already(host: Host, run: Any) -> None:
    one, two = host.digests
    run(name="app", digest=one, confirm_within=0)
    run(digest=two, rollout="r1")
    # That of somebody else is left alone.
    assert run(digest=two, rollout="r2", confirm_within=0)["error"] == "busy"
    foretold = run(check=True, digest=two, rollout="r1", confirm_within=0)
    assert host.journal().pending is not None
    result = run(digest=two, rollout="r1", confirm_within=0)
    for told in (foretold, result):
        assert (told["changed"], told["state"], told["digest"], told["deadline"]) == (True, "confirmed", two, None)
    assert host.journal().pending is None and host.journal().current.digest == two
    assert not run(digest=two, rollout="r1", confirm_within=0)["changed"]


def test_check_mode_foretells_all_that_is_left_after_a_removal(host: Host, run: Any) -> None:
    run(name="app", digest=host.digests[0], confirm_within=0)
    foretold, result = run(check=True, state="absent"), run(state="absent")
    for told in (foretold, result):
        told.pop("took"), told.pop("time")
    assert foretold == result and result["name"] is None


@pytest.mark.slow
def test_activate_and_confirm_with_a_timer_of_systemd(host: Host, run: Any) -> None:
    one, two = host.digests
    assert run(name="app", digest=one, confirm_within=0)["state"] == "confirmed"
    foretold = run(check=True, name="app", digest=two, rollout="r1")
    result = run(digest=two, rollout="r1", reload=["systemctl", "try-restart", "app"], who="anna@control")
    for told in (foretold, result):
        assert (told["changed"], told["state"], told["digest"], told["image_id"]) == (
            True,
            "activated",
            two,
            host.images[1],
        )
        assert (told["previous_digest"], told["previous_image_id"]) == (one, host.images[0])
        assert told["diff"]["before"]["digest"] == one and told["diff"]["after"]["digest"] == two
    assert result["deadline"] and result["rollout"] == "r1" and f"app@{two}" in result["pins"]
    (timer,) = [words for words in host.told if words.startswith("systemd-run")]
    stem = journal.stem(host.path)
    assert (
        f"--on-active=300 --timer-property=AccuracySec=1s --unit=composefs-oci-revert-{stem} --property=Type=exec"
        in timer
    )
    token = host.journal().pending.token
    assert timer.endswith(f"revert --token {token} --library {host.places.library} -- {host.path}")
    assert host.told[-1] == "systemctl try-restart app"
    busy = run(digest=one, rollout="r2")
    assert busy["error"] == "busy" and "r1" in busy["msg"] and "anna@control" in busy["msg"]
    info = run(composefs_deployment_info)["deployments"][0]
    assert info["state"] == "activated" and info["pending"]["digest"] == two and "token" not in info["pending"]
    foretold = run(check=True, state="confirmed", digest=two, rollout="r1")
    assert foretold["changed"] and foretold["state"] == "confirmed" and host.journal().pending is not None
    result = run(state="confirmed", digest=two, rollout="r1", persistent=True)
    assert (result["changed"], result["state"], result["deadline"]) == (True, "confirmed", None)
    assert f"systemctl --no-ask-password stop composefs-oci-revert-{stem}.timer" in host.told
    assert not run(state="confirmed", digest=two)["changed"]
    info = run(composefs_deployment_info)["deployments"][0]
    assert (info["state"], info["current"]["digest"], info["previous"][0]["digest"]) == ("current", two, one)
    assert set(info) >= set(yaml.safe_load(composefs_deployment_info.RETURN)["deployments"]["contains"])


def test_check_mode_tells_what_earlier_tasks_would_have_left_there(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = host.digests
    run(name="app", digest=one, confirm_within=0)
    mount = {"path": host.path, "repository": host.repository, "name": "app", "digest": two, "keep_previous": 1}
    for state, previous in (("activated", one), ("confirmed", two)):
        told = {**mount, "image_id": host.images[1], "absent": False, "state": state}
        monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([told]))
        found = run(check=True, state="confirmed", name="app", digest=two)
        assert (found["previous_image_id"], found["previous_digest"]) == (host.images[1], previous)
    # An index has a digest of its own, and stands for the manifest of the host's platform.
    index = "sha256:" + "7" * 64
    told = {**mount, "asked": index, "image_id": host.images[1], "absent": False, "state": "activated"}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([told]))
    found = run(check=True, state="confirmed", name="app", digest=index)
    assert (found["changed"], found["state"], found["digest"]) == (True, "confirmed", two)
    assert run(check=True, state="confirmed", name="app", digest="sha256:" + "8" * 64)["failed"]
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([{**told, "absent": True, "state": "absent"}]))
    found = run(check=True, name="app", digest=two, confirm_within=0)
    assert (found["previous_image_id"], found["previous_digest"]) == (None, None)


def test_a_host_has_one_place_for_a_repository_on_a_boot(
    host: Host, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of a machine share its id, and containers share the boot of their kernel."""

    def place(**given: Any) -> Any:
        return run(composefs_deployment_info, **given)["place"]

    one = place()
    os.symlink(host.repository, tmp_path / "link")
    assert one == place(repository=str(tmp_path / "link")) and len(one) == 64
    assert place(repository=str(tmp_path / "none")) not in (one, place(repository=str(tmp_path / "other")))
    copy, container = tmp_path / "boot_id", tmp_path / "container"
    container.mkdir()
    monkeypatch.setattr(bootmount, "HOST", host.places._replace(library=str(container)))
    assert place() != one, "a container with journals of its own"
    monkeypatch.setattr(bootmount, "HOST", host.places)
    monkeypatch.setattr(journal, "_BOOT_ID", str(copy))
    assert place() is None
    copy.write_text("another boot\n")
    assert place() not in (one, None)


def test_a_boot_mounts_what_was_confirmed_and_not_what_is_on_trial(
    host: Host, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = host.digests
    run(name="app", digest=one, confirm_within=0)
    run(digest=two, rollout="r1")
    assert host.there[host.path].image_id == host.images[1]
    host.there.clear()
    (tmp_path / "boot_id").write_text("the next boot\n")
    monkeypatch.setattr(journal, "_BOOT_ID", str(tmp_path / "boot_id"))
    deployment.boot(host.path, deployment.Host(host.places))
    assert host.there[host.path].image_id == host.images[0]
    assert host.journal().pending is None
    assert (host.journal().history[-1].result, host.journal().history[-1].reason) == ("reverted", "reboot")


def test_reverted_and_absent(host: Host, run: Any) -> None:
    one, two = host.digests
    run(name="app", digest=one, confirm_within=0)
    run(digest=two, rollout="r1")
    assert not run(state="reverted", rollout="r2")["changed"]
    for check in (True, False):
        result = run(check=check, state="reverted", rollout="r1", reason="health")
        assert (result["changed"], result["state"], result["reason"], result["digest"]) == (
            True,
            "reverted",
            "health",
            one,
        )
    assert result["seconds"] is not None
    late = run(state="confirmed", digest=two, rollout="r1")
    assert late["error"] == "reverted" and "health" in late["msg"]
    for check in (True, False):
        result = run(check=check, state="absent")
        assert (result["changed"], result["state"], result["image_id"]) == (True, "absent", None)
    assert host.there == {} and not os.path.exists(host.places.library)
    assert not run(state="absent")["changed"] and run(composefs_deployment_info)["deployments"] == []


def test_persistent_writes_the_unit_when_it_is_confirmed(host: Host, run: Any) -> None:
    one, _two = host.digests
    refused = run(name="app", digest=one, persistent=True)
    assert refused["error"] == "verity_unsupported" and host.there == {}
    activated = run(name="app", digest=one, persistent=True, verity="disabled", rollout="r1")
    assert activated["state"] == "activated" and host.unit() is None and os.path.exists(host.places.application)
    assert run(state="confirmed")["unit"] and '"boot"' in str(host.unit())
    assert host.journal().boot is None and host.journal().mount.persistent


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"name": "app"}, "image_not_found"),
        ({"name": "app", "digest": "sha256:" + "0" * 64}, "image_not_found"),
        ({"name": "app", "digest": "latest"}, "invalid_option"),
        ({}, "invalid_option"),
        ({"name": "app", "confirm_within": -1}, "invalid_option"),
        ({"state": "confirmed"}, "reverted"),
    ],
)
def test_what_goes_wrong_has_its_code_and_changes_nothing(
    host: Host, run: Any, values: dict[str, Any], error: str
) -> None:
    for check in (True, False):
        result = run(check=check, **values)
        assert result["failed"] and result["error"] == error and not result["changed"]
    assert host.there == {} and not os.path.exists(host.places.library)


@pytest.mark.parametrize("module", [composefs_deployment, composefs_deployment_info])
def test_the_documentation_has_the_options_of_the_code(module: Any) -> None:
    options = yaml.safe_load(module.DOCUMENTATION)["options"]
    keys = ("type", "default", "choices", "elements", "required")
    spec = {name: {key: option[key] for key in keys if key in option} for name, option in options.items()}
    assert spec == module.ARGUMENT_SPEC


@pytest.mark.parametrize("path", ["", "app", "./app"])
def test_a_mount_point_is_never_below_where_the_task_happens_to_run(host: Host, run: Any, path: str) -> None:
    result = run(path=path, name="app")
    assert result["error"] == "invalid_option" and "no absolute path" in result["msg"] and not host.there


def test_check_mode_foretells_an_activation_before_there_is_a_library_to_read_images(
    host: Host, run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    values = {"name": "app", "digest": host.digests[0], "verity": "disabled"}
    hide_zstd()
    assert run(**values)["error"] == "missing_library"
    told = run(check=True, **values)
    assert (told["changed"], told["state"], told["name"], told["digest"]) == (True, "activated", "app", host.digests[0])
    assert (told["image_id"], told["pins"]) == (None, None)
    assert "zstd" in host.warnings[-1] and host.there == {}
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(check=True, **values)["error"] == "missing_library"
