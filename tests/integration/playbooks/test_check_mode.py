# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A whole pipeline in check mode foretells what the run then does: on a fresh host, for a new version, and for none."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/support"))

from ociimage import Layout
from tarbytes import DIRECTORY, member, tar

PLAYBOOK = pathlib.Path(sys.executable).parent / "ansible-playbook"
LIBRARY = pathlib.Path("/var/lib/composefs-oci")
PLAY = """
- name: The pipeline
  hosts: all
  gather_facts: false
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ place }}/repository"
  tasks:
    - name: Repository
      composefs.oci.composefs_repository:
        path: "{{ place }}/repository"
        repository: "{{ omit }}"
        verity: disabled
      register: repository
    - name: Pull
      composefs.oci.composefs_image:
        ref: "oci:{{ place }}/layout:{{ version }}"
        name: app
        unenforced_policy: ignore
      register: image
    - name: Mount
      composefs.oci.composefs_mount:
        image: app
        path: "{{ place }}/app"
        state: remounted
      register: mounted
      notify: Restart
    - name: Fetch ahead
      composefs.oci.composefs_image:
        ref: "oci:{{ place }}/layout:{{ version }}"
        name: "service@{{ digest }}"
        unenforced_policy: ignore
    - name: Deploy
      composefs.oci.composefs_deployment:
        path: "{{ place }}/service"
        name: service
        digest: "{{ digest }}"
        confirm_within: 0
      register: deployed
    - name: Tell
      ansible.builtin.copy:
        dest: "{{ out }}"
        content: "{{ {'repository': repository, 'image': image, 'mounted': mounted, 'deployed': deployed} | to_json }}"
        mode: "0644"
      check_mode: false
      changed_when: false
  handlers:
    - name: Restart
      ansible.builtin.debug:
        msg: restarted
"""

pytestmark = [
    pytest.mark.skipif(not PLAYBOOK.exists(), reason="ansible-core is not installed beside this Python"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.skipif(shutil.which("skopeo") is None, reason="skopeo is not installed"),
]


@pytest.fixture
def place(disk: pathlib.Path) -> Iterator[pathlib.Path]:
    """A place on a disk for everything, and a directory for journals to be mounted over."""
    made = not LIBRARY.exists()
    LIBRARY.mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=disk) as directory:
            yield pathlib.Path(directory)
    finally:
        if made:
            LIBRARY.rmdir()


def test_check_mode_foretells_the_whole_pipeline(place: pathlib.Path) -> None:
    layout = Layout(place / "layout")
    digests = {}
    for version in ("v2", "v3"):
        archive = tar(member("usr/", type=DIRECTORY, mode=0o755), member("usr/data", version.encode() * 500))
        layout.image([archive], version)
        digests[version] = json.loads((place / "layout/index.json").read_text())["manifests"][-1]["digest"]
    tree = place / "collections/ansible_collections/composefs"
    tree.mkdir(parents=True)
    (tree / "oci").symlink_to(ROOT)
    (place / "play.yml").write_text(PLAY)
    steps = [("v2", "--check"), ("v2", ""), ("v3", "--check"), ("v3", ""), ("v3", "--check"), ("v3", "")]
    # All of it in one mount namespace, where the journals are nobody else's and every mount ends with it.
    (place / "library").mkdir()
    script = [f"mount --bind {place}/library {LIBRARY}"]
    for number, (version, flags) in enumerate(steps):
        values = {
            "ansible_python_interpreter": "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable,
            "place": str(place),
            "version": version,
            "digest": digests[version],
            "out": str(place / f"out{number}"),
        }
        (place / f"vars{number}.json").write_text(json.dumps(values))
        script.append(
            f"{PLAYBOOK} -i localhost, -c local -e @{place}/vars{number}.json {flags} {place}/play.yml"
            f" > {place}/text{number} 2>&1 || {{ cat {place}/text{number}; exit 1; }}"
        )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment.update(
        ANSIBLE_COLLECTIONS_PATH=str(place / "collections"),
        ANSIBLE_HOME=str(place / "home"),
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_CACHE_PLUGIN="ansible.builtin.jsonfile",  # facts outlive a run, what was foretold must not
        ANSIBLE_CACHE_PLUGIN_CONNECTION=str(place / "facts"),
        LC_ALL="C.UTF-8",
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", "\n".join(script)],
        env=environment,
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    told: list[dict[str, Any]] = [json.loads((place / f"out{number}").read_text()) for number in range(len(steps))]
    texts = [(place / f"text{number}").read_text() for number in range(len(steps))]
    for number in (0, 2, 4):
        foretold, real = told[number], told[number + 1]
        for task in real:
            assert foretold[task]["changed"] == real[task]["changed"], (number, task)
        for task, key in (("image", "digest"), ("mounted", "digest"), ("mounted", "name"), ("deployed", "digest")):
            assert foretold[task][key] in (real[task][key], None), (number, task, key)
        assert ("RUNNING HANDLER" in texts[number]) == ("RUNNING HANDLER" in texts[number + 1])
    assert [one["mounted"]["changed"] for one in told] == [True, True, True, True, False, False]
    assert [one["deployed"]["changed"] for one in told] == [True, True, True, True, False, False]
    assert told[2]["mounted"]["digest"] == digests["v3"] and told[2]["mounted"]["image_id"] is None
    assert told[3]["mounted"]["previous_image_id"] == told[2]["mounted"]["previous_image_id"]
