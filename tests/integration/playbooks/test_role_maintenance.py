# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role maintenance on this machine, whose units and libraries are hidden by empty ones meanwhile."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from typing import Any

import pytest

HIDDEN = ("/etc/systemd/system", "/var/lib", "/srv")
UNIT = "/etc/systemd/system/composefs-maintenance-srv-images"
# What systemd would do: the command of the unit, as it stands there.
RUN = "eval \"exec $(sed -n 's/^ExecStart=//p' " + UNIT + '.service)"'
TASKS = """
- name: Make a repository
  composefs.oci.composefs_repository:
    path: /srv/images
    verity: disabled
- name: Fill it
  composefs.oci.composefs_image:
    repository: /srv/images
    ref: "oci:{{ layout }}:app"
    name: "{{ item }}"
    unenforced_policy: ignore
  loop: [app:1, app:2]
- name: Have it looked after
  ansible.builtin.include_role:
    name: composefs.oci.maintenance
  loop: [1, 2]
- name: Note whether the second time changed something
  ansible.builtin.set_fact:
    again: "{{ maintenance_result.changed }}"
- name: Run it as systemd would
  ansible.builtin.shell: "{{ run }}"
  register: ran
- name: Have systemd judge the units
  ansible.builtin.command: "systemd-analyze verify --man=no {{ unit }}.timer"
  register: judged
  changed_when: false
- name: Look what came of it
  composefs.oci.composefs_repository_info:
    repository: /srv/images
  register: info
- name: Have it looked after no more
  ansible.builtin.include_role:
    name: composefs.oci.maintenance
  vars:
    maintenance_state: absent
- name: See what is left
  ansible.builtin.find:
    paths: [/etc/systemd/system, /var/lib]
    patterns: ["composefs*", "*.pyz"]
    recurse: true
  register: left
- name: Tell
  ansible.builtin.copy:
    dest: "{{ told }}"
    content: "{{ {'again': again, 'ran': ran.stdout, 'judged': judged.stderr, 'info': info, 'left': left.files} | to_json }}"
    mode: "0644"
"""


@pytest.fixture
def namespaces() -> None:
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no mount namespace can be made here (not root?)")
    if not os.access("/usr/bin/systemd-analyze", os.X_OK):
        pytest.skip("systemd is not installed")


def test_a_host_looks_after_its_repository_and_tells_of_it(
    site: Any, images: Any, namespaces: None, tmp_path: pathlib.Path
) -> None:
    told = tmp_path / "told.json"
    variables = {
        "layout": str(images.path),
        "run": RUN,
        "unit": UNIT,
        "told": str(told),
        "maintenance_repository": "/srv/images",
        "maintenance_remove": ["app:*"],
        "maintenance_keep_last": 1,
        "maintenance_schedule": "Sun 03:00",
    }
    hide = "".join(f"mkdir -p {path}; mount -t tmpfs -o mode=0755 none {path}; " for path in HIDDEN)
    words = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", hide + 'exec "$@"', "sh"]
    done = subprocess.run(
        [*words, *site.command(TASKS, **variables)],
        cwd=site.directory,
        env=site.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(told.read_text())
    result = json.loads(found["ran"])
    assert (found["again"], found["left"]) == (False, [])
    assert "composefs-maintenance" not in found["judged"], found["judged"]
    assert (result["findings"], result["error"], result["names"]) == ({}, None, ["app:1"])
    assert found["info"]["last_maintenance"] == {"version": 1, **result}
    assert [one["name"] for one in found["info"]["names"]] == ["app:2"]
