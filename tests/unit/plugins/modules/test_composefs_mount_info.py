# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_mount_info through AnsibleModule; real mounts are in the integration tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.modules import composefs_mount, composefs_mount_info
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments
from ansible_collections.composefs.oci.tests.support.mounthost import Host


def call(capsys: pytest.CaptureFixture[str], module: Any, **values: Any) -> dict[str, Any]:
    with arguments({"_ansible_remote_tmp": "/tmp", **values}), pytest.raises(SystemExit):
        module.main()
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_a_mount_and_its_unit_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    host = Host(tmp_path, monkeypatch)
    monkeypatch.setattr(mountinfo, "composefs_mounts", lambda: list(host.there.values()))
    assert call(capsys, composefs_mount_info)["mounts"] == []
    values = {"image": host.images[0], "persistent": True, "verity": "disabled"}
    mounted = call(capsys, composefs_mount, path=host.path, repository=host.repository, **values)
    (found,) = call(capsys, composefs_mount_info, repository="/set/for/the/whole/group")["mounts"]
    assert set(found) == set(yaml.safe_load(composefs_mount_info.RETURN)["mounts"]["contains"])
    assert (found["path"], found["image_id"], found["keeps"]) == (host.path, host.images[0], mounted["keeps"])
    assert (found["persistent"], found["unit"], found["writable"]) == (True, mounted["unit"], False)
    assert found["repository"] == host.repository and found["unit_state"] == "unknown"
    assert call(capsys, composefs_mount_info, path="/elsewhere")["mounts"] == []
    # The unit is told also while nothing is mounted.
    host.there.clear()
    (found,) = call(capsys, composefs_mount_info, path=host.path)["mounts"]
    assert (found["image_id"], found["unit"]) == (None, mounted["unit"])


def test_the_documentation_has_the_options_of_the_code() -> None:
    options = yaml.safe_load(composefs_mount_info.DOCUMENTATION)["options"]
    assert {name: {"type": option["type"]} for name, option in options.items()} == composefs_mount_info.ARGUMENT_SPEC
