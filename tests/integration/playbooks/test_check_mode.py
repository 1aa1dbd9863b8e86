# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A whole pipeline in check mode foretells what the run then does: on a fresh host, for a new version, and for none."""

from __future__ import annotations

import contextlib
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
sys.path[:0] = [str(ROOT / "tests/support"), str(ROOT / "plugins/plugin_utils")]

import scenarios
from ociimage import Layout
from registry import Registry
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

# Every task meets what others before it foretold: on a repository without meta.json, as old programs made them.
CHAIN = """
- name: The chain
  hosts: all
  gather_facts: false
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ place }}/repository"
    composefs.oci.composefs_image:
      unenforced_policy: ignore
      repository: "{{ place }}/repository"
  tasks:
    - name: Upgrade
      composefs.oci.composefs_repository:
        verity: disabled
        owner: root
        mode: "0755"
    - name: Upgrade again
      composefs.oci.composefs_repository: {verity: disabled, mode: "0755"}
    - name: Close it
      composefs.oci.composefs_repository: {verity: disabled, mode: "0700"}
    - name: Pull
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v2", name: app}
    - name: Pull it again
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v2", name: app}
    - name: Pull it again if it is missing
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v2", name: app, pull: missing}
    - name: Pull what shares a layer
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v3", name: next, tags: [stage]}
    - name: Name it once more
      composefs.oci.composefs_image: {ref: app, name: same}
    - name: Name it once more by its digest
      composefs.oci.composefs_image: {ref: "{{ digests.v2 }}", name: bydigest}
    - name: Rename
      composefs.oci.composefs_image: {name: renamed, rename_from: same}
    - name: Remove what was renamed
      composefs.oci.composefs_image: {name: same, state: absent}
    - name: Remove a name that has just come
      composefs.oci.composefs_image: {name: bydigest, state: absent}
    - name: Pull what an earlier task removed
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v2", name: bydigest}
    - name: Remove the name of old
      composefs.oci.composefs_image: {name: old, state: absent}
    - name: Give the name of old again
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v1", name: old}
    - name: Make another repository
      composefs.oci.composefs_repository: {path: "{{ place }}/copies", repository: "{{ omit }}", verity: disabled}
    - name: Pull from the first one
      composefs.oci.composefs_image:
        repository: "{{ place }}/copies"
        images:
          - {ref: "composefs:{{ place }}/repository#next", name: copy}
          - {ref: "oci:{{ place }}/layout:v2", name: more}
    - name: List
      composefs.oci.composefs_image_info: {disk_use: true}
    - name: List one
      composefs.oci.composefs_image_info: {name: stage}
    - name: Look at the repository
      composefs.oci.composefs_repository_info:
    - name: Check
      composefs.oci.composefs_check: {images: [app]}
    - name: Check all
      composefs.oci.composefs_check:
    - name: Mount
      composefs.oci.composefs_mount: {image: stage, path: "{{ place }}/app"}
    - name: Mount it again
      composefs.oci.composefs_mount: {image: stage, path: "{{ place }}/app"}
    - name: Mount it by another name
      composefs.oci.composefs_mount: {image: next, path: "{{ place }}/app"}
    - name: Mount another one
      composefs.oci.composefs_mount: {image: app, path: "{{ place }}/app", state: remounted}
    - name: See what is mounted
      composefs.oci.composefs_mount_info: {path: "{{ place }}/app"}
    - name: Unmount
      composefs.oci.composefs_mount: {path: "{{ place }}/app", state: unmounted}
    - name: Unmount again
      composefs.oci.composefs_mount: {path: "{{ place }}/app", state: unmounted}
    - name: See what is mounted now
      composefs.oci.composefs_mount_info: {path: "{{ place }}/app"}
    - name: Mount the first one
      composefs.oci.composefs_mount: {image: renamed, path: "{{ place }}/app"}
    - name: Deploy
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", name: next, confirm_within: 0}
    - name: See what is deployed
      composefs.oci.composefs_deployment_info: {path: "{{ place }}/service"}
    - name: Retire
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", state: absent}
    - name: Prune
      composefs.oci.composefs_prune: {remove: [app, renamed, "next*", bydigest]}
    - name: Look at the repository again
      composefs.oci.composefs_repository_info:
"""
# Nothing is there: no repository, and not even skopeo, so that no digest is known before the run.
FRESH = """
- name: A fresh host
  hosts: all
  gather_facts: false
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ place }}/repository"
    group/composefs.oci.composefs_registry:
      unenforced_policy: ignore
      validate_certs: false
      executable: "{{ place }}/bin/skopeo"
  tasks:
    - name: Install skopeo
      ansible.builtin.file: {src: "{{ skopeo }}", dest: "{{ place }}/bin/skopeo", state: link, force: true}
    - name: Make the repository
      composefs.oci.composefs_repository: {verity: disabled}
    - name: Pull
      composefs.oci.composefs_image:
        images:
          - {ref: "docker://{{ registry }}/app:v1", name: old}
          - {ref: "docker://{{ registry }}/app:v2", name: new, tags: [stage]}
    - name: Pull what the controller has
      composefs.oci.composefs_image:
        {ref: "docker-archive:{{ place }}/v3.tar", name: carried, remote_src: false}
    - name: Pull it again
      composefs.oci.composefs_image: {ref: "docker://{{ registry }}/app:v1", name: old, pull: missing}
    - name: Pull a digest
      composefs.oci.composefs_image: {ref: "docker://{{ registry }}/app:v3", name: pinned, digest: "{{ digests.v3 }}"}
    - name: Ask what is there
      composefs.oci.composefs_remote_info: {ref: "docker://{{ registry }}/app:v1"}
    - name: Make a delta
      composefs.oci.composefs_delta: {source: old, target: new, dest: "oci-archive:{{ place }}/delta.tar"}
    - name: Make a delta by digests
      composefs.oci.composefs_delta:
        source: "{{ digests.v2 }}"
        target: "{{ digests.v3 }}"
        dest: "oci-archive:{{ place }}/delta2.tar"
    - name: Name it once more
      composefs.oci.composefs_image: {ref: new, name: same}
    - name: Rename
      composefs.oci.composefs_image: {name: renamed, rename_from: same}
    - name: Remove a name that has just come
      composefs.oci.composefs_image: {name: carried, state: absent}
    - name: Make another repository
      composefs.oci.composefs_repository: {path: "{{ place }}/copies", repository: "{{ omit }}", verity: disabled}
    - name: Pull from the first one
      composefs.oci.composefs_image:
        repository: "{{ place }}/copies"
        images: [{ref: "composefs:{{ place }}/repository#new", name: copy}]
    - name: List
      composefs.oci.composefs_image_info: {disk_use: true}
    - name: List one
      composefs.oci.composefs_image_info: {name: stage}
    - name: Write down one
      composefs.oci.composefs_image_info: {name: stage, dumpfile: "{{ place }}/dump"}
    - name: Look at the repository
      composefs.oci.composefs_repository_info:
    - name: Check
      composefs.oci.composefs_check: {images: [new]}
    - name: Check all
      composefs.oci.composefs_check:
    - name: Repair
      composefs.oci.composefs_check: {images: [new], repair: true}
    - name: Repair all
      composefs.oci.composefs_check: {repair: true}
    - name: Mount
      composefs.oci.composefs_mount: {image: stage, path: "{{ place }}/app"}
    - name: Mount another one
      composefs.oci.composefs_mount: {image: old, path: "{{ place }}/app", state: remounted}
    - name: See what is mounted
      composefs.oci.composefs_mount_info: {path: "{{ place }}/app"}
    - name: Deploy
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", name: new, confirm_within: 600}
    - name: See what is deployed
      composefs.oci.composefs_deployment_info: {path: "{{ place }}/service"}
    - name: Confirm
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", state: confirmed}
    - name: Retire
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", state: absent}
    - name: Unmount
      composefs.oci.composefs_mount: {path: "{{ place }}/app", state: unmounted}
    - name: Prune
      composefs.oci.composefs_prune: {remove: [old]}
    - name: Prune all
      composefs.oci.composefs_prune: {remove: ["*"]}
"""
BEFORE = """
- name: A repository with one image
  hosts: all
  gather_facts: false
  tasks:
    - name: Make it
      composefs.oci.composefs_repository: {path: "{{ place }}/repository", verity: disabled}
    - name: Pull
      composefs.oci.composefs_image:
        ref: "oci:{{ place }}/layout:v1"
        name: old
        repository: "{{ place }}/repository"
        unenforced_policy: ignore
"""
MOUNTED = """
- name: A mount of it
  hosts: all
  gather_facts: false
  tasks:
    - name: Mount it
      composefs.oci.composefs_mount:
        {image: old, path: "{{ place }}/old", repository: "{{ place }}/repository", verity: disabled}
"""
LOST = """
- name: A host with images that has lost its skopeo
  hosts: all
  gather_facts: false
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ place }}/repository"
    group/composefs.oci.composefs_registry:
      unenforced_policy: ignore
      validate_certs: false
      executable: "{{ place }}/bin/skopeo"
  tasks:
    - name: Install skopeo
      ansible.builtin.file: {src: "{{ skopeo }}", dest: "{{ place }}/bin/skopeo", state: link, force: true}
    - name: Pull a digest
      composefs.oci.composefs_image: {ref: "docker://{{ registry }}/app:any", name: old, digest: "{{ digests.v1 }}"}
    - name: Mount it
      composefs.oci.composefs_mount: {image: old, path: "{{ place }}/old", verity: disabled}
    - name: Pull what is there under the same name
      composefs.oci.composefs_image: {ref: "docker://{{ registry }}/app:v1", name: old}
    - name: Mount it once more
      composefs.oci.composefs_mount: {image: old, path: "{{ place }}/old", verity: disabled}
    - name: Pull several
      composefs.oci.composefs_image:
        images:
          - {ref: "docker://{{ registry }}/app:v2", name: old}
          - {ref: "docker://{{ registry }}/app:v3", name: new}
          - {ref: "oci:{{ place }}/layout:v3", name: read}
    - name: Mount the new version
      composefs.oci.composefs_mount: {image: old, path: "{{ place }}/old", state: remounted, verity: disabled}
    - name: Ask what is there
      composefs.oci.composefs_image_info:
    - name: Prune
      composefs.oci.composefs_prune:
    - name: Unmount
      composefs.oci.composefs_mount: {path: "{{ place }}/old", state: unmounted}
"""
# An earlier task would install the library that reads images: what stands in its place cannot be imported yet.
UNREADABLE = """
- name: A host with images and without a library to read them
  hosts: all
  gather_facts: false
  environment:
    PYTHONPATH: "{{ hidden }}"
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ place }}/repository"
  tasks:
    - name: List
      composefs.oci.composefs_image_info: {disk_use: true}
    - name: Look at the repository
      composefs.oci.composefs_repository_info:
    - name: Check
      composefs.oci.composefs_check:
    - name: Pull another
      composefs.oci.composefs_image: {ref: "oci:{{ place }}/layout:v2", name: spare, unenforced_policy: ignore}
    - name: Mount
      composefs.oci.composefs_mount: {image: old, path: "{{ place }}/old", verity: disabled}
    - name: See what is mounted
      composefs.oci.composefs_mount_info: {path: "{{ place }}/old"}
    - name: Deploy
      composefs.oci.composefs_deployment: {path: "{{ place }}/service", name: old, verity: disabled, confirm_within: 0}
    - name: See what is deployed
      composefs.oci.composefs_deployment_info: {path: "{{ place }}/service"}
    - name: Prune
      composefs.oci.composefs_prune: {remove: [spare]}
"""
UNCHANGED = [
    "Upgrade again",
    "Pull it again",
    "Pull it again if it is missing",
    "Remove what was renamed",
    "List",
    "List one",
    "Look at the repository",
    "Check",
    "Check all",
    "Mount it again",
    "See what is mounted",
    "Unmount again",
    "See what is mounted now",
    "See what is deployed",
    "Look at the repository again",
]
UNCHANGED_FRESH = [
    "Pull it again",
    "Ask what is there",
    "List",
    "List one",
    "Look at the repository",
    "Check",
    "Check all",
    "Repair",
    "Repair all",
    "See what is mounted",
    "See what is deployed",
]
# Whether names are given to one image, and whether that moves, is not known before anybody can be asked.
UNSURE = ["Pull it again", "List", "List one", "Write down one"]
CALLBACKS = ROOT / "extensions/molecule/shared/callback_plugins"

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
            # It stays where somebody else has begun to use it meanwhile, such as tests from another checkout.
            with contextlib.suppress(OSError):
                LIBRARY.rmdir()


def play(place: pathlib.Path, script: list[str]) -> None:
    """Run the lines in one mount namespace, where the journals are nobody else's and every mount ends with it."""
    tree = place / "collections/ansible_collections/composefs"
    tree.mkdir(parents=True)
    (tree / "oci").symlink_to(ROOT)
    (place / "library").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment.update(
        ANSIBLE_CALLBACK_PLUGINS=str(CALLBACKS),
        ANSIBLE_CALLBACKS_ENABLED="record",
        ANSIBLE_COLLECTIONS_PATH=str(place / "collections"),
        ANSIBLE_HOME=str(place / "home"),
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_CACHE_PLUGIN="ansible.builtin.jsonfile",  # facts outlive a run, what was foretold must not
        ANSIBLE_CACHE_PLUGIN_CONNECTION=str(place / "facts"),
        LC_ALL="C.UTF-8",
        MOLECULE_EPHEMERAL_DIRECTORY=str(place),
    )
    done = subprocess.run(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-ec"),
            "\n".join([f"mount --bind {place}/library {LIBRARY}", *script]),
        ],
        env=environment,
        cwd=place,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]


def line(place: pathlib.Path, name: str, values: dict[str, Any], flags: str = "") -> str:
    """The line that runs the playbook ``name``.yml with these variables."""
    interpreter = "/usr/bin/python3" if os.path.exists("/usr/bin/python3") else sys.executable
    number = len(list(place.glob("vars*.json")))
    (place / f"vars{number}.json").write_text(
        json.dumps({"ansible_python_interpreter": interpreter, "place": str(place), **values})
    )
    return (
        f"{PLAYBOOK} -i localhost, -c local -e @{place}/vars{number}.json {flags} {place}/{name}.yml"
        f" > {place}/text{number} 2>&1 || {{ cat {place}/text{number}; exit 1; }}"
    )


def runs_of(place: pathlib.Path, name: str) -> list[scenarios.Run]:
    """What the runs of the playbook ``name``.yml returned, in their order."""
    runs = []
    for path in sorted((place / "results").glob(f"*-{name}-*.jsonl")):
        entries = [json.loads(text) for text in path.read_text().splitlines()]
        runs.append(scenarios.Run(name, path.stem.endswith("check"), entries))
    return runs


def make_images(place: pathlib.Path, versions: tuple[str, ...]) -> dict[str, str]:
    """Images that share their first layer; the manifest digest of each version."""
    layout, digests = Layout(place / "layout"), {}
    base = tar(member("usr/", type=DIRECTORY, mode=0o755), member("usr/base", b"base" * 500))
    for version in versions:
        layout.image([base, tar(member("usr/data", version.encode() * 500))], version)
        digests[version] = json.loads((place / "layout/index.json").read_text())["manifests"][-1]["digest"]
    return digests


def test_check_mode_foretells_the_whole_pipeline(place: pathlib.Path) -> None:
    digests = make_images(place, ("v2", "v3"))
    (place / "play.yml").write_text(PLAY)
    steps = [("v2", "--check"), ("v2", ""), ("v3", "--check"), ("v3", ""), ("v3", "--check"), ("v3", "")]
    play(
        place,
        [
            line(
                place,
                "play",
                {"version": version, "digest": digests[version], "out": str(place / f"out{number}")},
                flags,
            )
            for number, (version, flags) in enumerate(steps)
        ],
    )
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


def test_check_mode_knows_what_its_earlier_tasks_foretold(place: pathlib.Path) -> None:
    digests = make_images(place, ("v1", "v2", "v3"))
    (place / "chain.yml").write_text(CHAIN)
    (place / "before.yml").write_text(BEFORE)
    values = {"digests": digests}
    old = [line(place, "before", values), f"rm {place}/repository/meta.json", f"chmod 0777 {place}/repository"]
    play(place, [*old, *(line(place, "chain", values, flags) for flags in ("--check", ""))])
    foretold, done = runs_of(place, "chain")
    assert (foretold.check, done.check) == (True, False)
    assert scenarios.differences(foretold, done) == []
    # The real run is what it should be, and none of it was passed over.
    changes = {entry["task"]: entry["result"].get("changed") for entry in done.entries}
    assert [task for task, changed in changes.items() if not changed] == UNCHANGED
    assert done.of("localhost", "Upgrade")["upgraded"] is True


def test_check_mode_on_a_host_without_skopeo_fails_nowhere(place: pathlib.Path) -> None:
    digests = make_images(place, ("v1", "v2", "v3"))
    (place / "bin").mkdir()
    archive = ["skopeo", "copy", "-q", f"oci:{place}/layout:v3", f"docker-archive:{place}/v3.tar:app:v3"]
    subprocess.run(archive, check=True)
    (place / "fresh.yml").write_text(FRESH)
    with Registry(place / "registry") as registry:
        for version in digests:
            registry.push(f"{place}/layout:{version}", f"app:{version}")
        values = {"digests": digests, "skopeo": shutil.which("skopeo"), "registry": registry.address}
        play(place, [line(place, "fresh", values, flags) for flags in ("--check", "")])
    foretold, done = runs_of(place, "fresh")
    assert (foretold.check, done.check) == (True, False)
    assert scenarios.differences(foretold, done, UNSURE) == []
    assert not [entry["task"] for entry in foretold.entries if entry["kind"] != "ok"]
    assert [entry["task"] for entry in done.entries if not entry["result"].get("changed")] == UNCHANGED_FRESH
    delta = foretold.of("localhost", "Make a delta")
    assert delta["changed"] and [delta[key] for key in ("digest", "bytes", "layers")] == [None] * 3
    assert delta["ref"] == f"oci-archive:{place}/delta.tar"


def test_check_mode_on_a_host_that_lost_its_skopeo_fails_nowhere(place: pathlib.Path) -> None:
    digests = make_images(place, ("v1", "v2", "v3"))
    (place / "bin").mkdir()
    (place / "lost.yml").write_text(LOST)
    (place / "before.yml").write_text(BEFORE)
    (place / "mounted.yml").write_text(MOUNTED)
    with Registry(place / "registry") as registry:
        for version in digests:
            registry.push(f"{place}/layout:{version}", f"app:{version}")
        registry.push(f"{place}/layout:v1", "app:any")
        values = {"digests": digests, "skopeo": shutil.which("skopeo"), "registry": registry.address}
        before = [line(place, name, values) for name in ("before", "mounted")]
        play(place, [*before, *(line(place, "lost", values, flags) for flags in ("--check", ""))])
    foretold, done = runs_of(place, "lost")
    assert (foretold.check, done.check) == (True, False)
    assert not [entry["task"] for entry in (*foretold.entries, *done.entries) if entry["kind"] != "ok"]
    # What a tag means now is not known, so a change is foretold that does not come.
    unsure = "Pull what is there under the same name"
    assert scenarios.differences(foretold, done, [unsure, "Ask what is there"]) == [], foretold.entries
    told, came = (run.of("localhost", unsure) for run in (foretold, done))
    assert told["changed"] and not came["changed"] and told["digest"] is None
    assert told["previous_digest"] == came["digest"] == digests["v1"]
    assert any("whether old would be another image" in text for text in told["warnings"])
    pinned = foretold.of("localhost", "Pull a digest")
    assert not pinned["changed"] and pinned["digest"] == digests["v1"]
    several = foretold.of("localhost", "Pull several")
    assert [image["digest"] for image in several["images"]] == [None, None, digests["v3"]]


def test_check_mode_on_a_host_without_a_library_to_read_images_fails_nowhere(place: pathlib.Path) -> None:
    make_images(place, ("v1", "v2"))
    for package, module in (("compression", "zstd.py"), ("backports", "zstd.py"), ("zstandard", "__init__.py")):
        (place / "hidden" / package).mkdir(parents=True)
        # Python's own package of that name goes on behind it.
        path = "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n"
        (place / "hidden" / package / "__init__.py").write_text(path)
        (place / "hidden" / package / module).write_text("raise ImportError\n")
    (place / "unreadable.yml").write_text(UNREADABLE)
    (place / "before.yml").write_text(BEFORE)
    runs = [
        line(place, "unreadable", {"hidden": str(place / "hidden")}, "--check"),
        line(place, "unreadable", {"hidden": ""}),
    ]
    play(place, [line(place, "before", {}), *runs])
    foretold, done = runs_of(place, "unreadable")
    assert (foretold.check, done.check) == (True, False)
    assert not [entry["task"] for entry in (*foretold.entries, *done.entries) if entry["kind"] != "ok"]
    assert scenarios.differences(foretold, done) == [], foretold.entries
    assert foretold.of("localhost", "List")["images"] is None and done.of("localhost", "List")["images"]
    for task in ("List", "Look at the repository", "Check", "Mount", "Deploy", "Prune"):
        assert any("zstd" in text for text in foretold.of("localhost", task)["warnings"]), task
