# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role skopeo on this machine: what it says, what it would do, and what it does where nothing can be installed.

A host that is image-based is made in a mount namespace of its own, in which /usr is read-only or the mark of ostree is
there.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
PLAYBOOK = pathlib.Path(sys.executable).parent / "ansible-playbook"
SYSTEM_PYTHON = "/usr/bin/python3"
PLAY = """
- name: Run the role
  hosts: all
  gather_facts: false
  roles:
    - composefs.oci.skopeo
  post_tasks:
    - name: Tell the facts
      ansible.builtin.copy:
        dest: "{{ test_facts }}"
        content: >-
          {{ {'version': skopeo_version, 'policy': skopeo_enforces_policy, 'image': skopeo_image_based_host, 'libraries': skopeo_python_libraries} | to_json }}
        mode: "0644"
      when: skopeo_python_libraries is defined
"""

pytestmark = [
    pytest.mark.skipif(not PLAYBOOK.exists(), reason="ansible-core is not installed beside this Python"),
    pytest.mark.skipif(not os.access(SYSTEM_PYTHON, os.X_OK), reason="this machine has no /usr/bin/python3"),
    pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="this machine is no Debian"),
]


class Outcome:
    def __init__(self, code: int, text: str, facts: dict[str, Any]) -> None:
        self.code, self.text, self.facts = code, " ".join(text.split()), facts

    @property
    def changed(self) -> int:
        return int(re.findall(r"changed=(\d+)", self.text)[-1])


class Host:
    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        tree = directory / "collections" / "ansible_collections" / "composefs"
        tree.mkdir(parents=True)
        (tree / "oci").symlink_to(ROOT)
        (directory / "play.yml").write_text(PLAY)

    def run(self, *arguments: str, prepare: str = "", interpreter: str = SYSTEM_PYTHON, **variables: Any) -> Outcome:
        """Run the role with ``variables``; ``prepare`` is shell for the mount namespace in which that happens."""
        facts = self.directory / "facts.json"
        facts.unlink(missing_ok=True)
        every = {"ansible_python_interpreter": interpreter, "test_facts": str(facts), **variables}
        command = [
            str(PLAYBOOK),
            "--inventory",
            "localhost,",
            "--connection",
            "local",
            "--extra-vars",
            json.dumps(every),
            *arguments,
        ]
        command.append(str(self.directory / "play.yml"))
        if prepare:
            command = [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                prepare + '\nexec "$@"',
                "sh",
                *command,
            ]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        environment.update(
            ANSIBLE_COLLECTIONS_PATH=str(self.directory / "collections"),
            ANSIBLE_HOME=str(self.directory / "home"),
            ANSIBLE_NOCOLOR="1",
            ANSIBLE_PIPELINING="1",
            LC_ALL="C.UTF-8",
        )
        environment.pop("ANSIBLE_CONFIG", None)
        done = subprocess.run(
            command,
            cwd=self.directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, json.loads(facts.read_text()) if facts.exists() else {})


@pytest.fixture
def host(tmp_path: pathlib.Path) -> Host:
    return Host(tmp_path)


@pytest.fixture
def namespaces() -> None:
    if subprocess.run(["unshare", "--mount", "true"], stderr=subprocess.DEVNULL, check=False).returncode:
        pytest.skip("no mount namespace can be made here (not root?)")


def system_has_zstandard() -> bool:
    return (
        subprocess.run([SYSTEM_PYTHON, "-c", "import zstandard"], stderr=subprocess.DEVNULL, check=False).returncode
        == 0
    )


def test_check_mode_tells_what_would_be_installed_and_installs_nothing(host: Host) -> None:
    if shutil.which("hello"):
        pytest.skip("the package hello, which stands for a missing one, is installed here")
    outcome = host.run("--check", skopeo_library_packages=["hello"])
    assert outcome.code == 0, outcome.text
    if "Would install" not in outcome.text:
        pytest.skip("apt knows no package hello here")
    assert "hello" in outcome.text.partition("Would install")[2][:60]
    assert outcome.changed == 1
    assert shutil.which("hello") is None


# No package list, and a source that cannot even be read, so that apt fails.
NO_PACKAGES = """
cp -a /etc/apt {directory}/apt
rm -rf {directory}/apt/sources.list.d/* {directory}/apt/sources.list
echo 'deb http://127.0.0.1:9/debian' > {directory}/apt/sources.list
mount --bind {directory}/apt /etc/apt
mount -t tmpfs none /var/lib/apt
mount -t tmpfs none /var/cache/apt
mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial
"""


@pytest.mark.usefixtures("namespaces")
def test_a_host_that_reaches_no_packages_does_without_what_only_makes_pulls_faster(host: Host) -> None:
    if not shutil.which("skopeo") or not system_has_zstandard():
        pytest.skip("skopeo or python3-zstandard is not installed here")
    if shutil.which("hello"):
        pytest.skip("the package hello, which stands for a missing one, is installed here")
    prepare = NO_PACKAGES.format(directory=host.directory)
    outcome = host.run(prepare=prepare, skopeo_accelerator_packages=["hello"])
    assert outcome.code == 0 and outcome.changed == 1, outcome.text  # the file that tells the facts
    shutil.rmtree(host.directory / "apt")
    outcome = host.run(prepare=prepare, skopeo_executable="no-skopeo-here", skopeo_package="hello")
    failed_at = outcome.text.partition("fatal: ")[0].rpartition("TASK [")[2]
    assert outcome.code != 0 and "Refresh the package lists" in failed_at, outcome.text  # what is needed has to come


def test_a_host_that_has_everything_is_not_changed_and_its_facts_are_told(host: Host) -> None:
    if not shutil.which("skopeo") or not system_has_zstandard():
        pytest.skip("skopeo or python3-zstandard is not installed here")
    outcome = host.run(skopeo_install="never")
    assert outcome.code == 0, outcome.text
    assert outcome.changed <= 1  # the file with the facts
    assert re.fullmatch(r"\d+\.\d+\.\d+", outcome.facts["version"])
    assert outcome.facts["policy"] == (tuple(map(int, outcome.facts["version"].split("."))) >= (1, 13))
    assert outcome.facts["libraries"]["zstandard"]


def test_debian_12_gets_the_library_that_decodes_gzip_unless_that_is_not_wanted(host: Host) -> None:
    if not pathlib.Path("/etc/debian_version").read_text().startswith("12"):
        pytest.skip("this is not Debian 12")
    if subprocess.run(["dpkg", "--status", "libisal2"], capture_output=True, check=False).returncode == 0:
        pytest.skip("libisal2 is installed here")
    outcome = host.run("--check", skopeo_library_packages=["hello"])
    assert outcome.code == 0 and "libisal2" in outcome.text.partition("Would install")[2][:80], outcome.text
    outcome = host.run("--check", skopeo_library_packages=["hello"], skopeo_accelerators=False)
    assert outcome.code == 0 and "libisal2" not in outcome.text, outcome.text


@pytest.mark.usefixtures("namespaces")
@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        ("mount --bind /usr /usr\nmount -o remount,bind,ro /usr", "its /usr is read-only"),
        ("mount -t tmpfs tmpfs /run\n: > /run/ostree-booted", "it was booted from an image"),
    ],
)
def test_an_image_based_host_is_told_what_its_image_lacks(host: Host, prepare: str, why: str) -> None:
    outcome = host.run(prepare=prepare, skopeo_executable="skopeo-that-is-not-there", skopeo_library_packages=["hello"])
    assert outcome.code != 0
    assert "This host lacks skopeo (skopeo-that-is-not-there)" in outcome.text
    assert why in outcome.text
    assert "Add skopeo, hello to the image that the host is booted from" in outcome.text
    assert outcome.changed == 0


@pytest.mark.usefixtures("namespaces")
def test_an_image_based_host_that_has_everything_is_fine(host: Host) -> None:
    if not shutil.which("skopeo") or not system_has_zstandard():
        pytest.skip("skopeo or python3-zstandard is not installed here")
    outcome = host.run(prepare="mount --bind /usr /usr\nmount -o remount,bind,ro /usr")
    assert outcome.code == 0, outcome.text
    assert outcome.facts["image"] is True


def test_an_interpreter_that_does_not_see_the_packages_is_named_and_pip_helps_if_it_may(
    host: Host, tmp_path: pathlib.Path
) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed here")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    interpreter = str(tmp_path / "venv" / "bin" / "python")
    refused = host.run(interpreter=interpreter, skopeo_library_packages=[], skopeo_accelerator_packages=[])
    assert refused.code != 0
    assert f"This host lacks zstandard for {interpreter}" in refused.text
    assert "set skopeo_use_pip" in refused.text
    helped = host.run(
        interpreter=interpreter,
        skopeo_library_packages=[],
        skopeo_accelerator_packages=[],
        skopeo_accelerators=False,
        skopeo_use_pip=True,
    )
    assert helped.code == 0, helped.text
    lists = pathlib.Path(__file__).resolve().parents[3] / "roles/skopeo/files/pip"
    for name in ("zstandard", "jsonschema"):
        pinned = re.findall(rf"^{name}==([^ ]+)", (lists / f"{name}.txt").read_text(), re.MULTILINE)
        assert helped.facts["libraries"][name] in pinned


def test_pip_takes_nothing_whose_digest_is_not_known(host: Host, tmp_path: pathlib.Path) -> None:
    """An index that serves something else under the right name and version is refused, and that is said."""
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed here")
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    interpreter = str(tmp_path / "venv" / "bin" / "python")
    lists = tmp_path / "lists"
    shutil.copytree(pathlib.Path(__file__).resolve().parents[3] / "roles/skopeo/files/pip", lists)
    text = (lists / "zstandard.txt").read_text()
    (lists / "zstandard.txt").write_text(re.sub("sha256:[0-9a-f]{8}", "sha256:00000000", text))
    refused = host.run(
        interpreter=interpreter,
        skopeo_library_packages=[],
        skopeo_accelerator_packages=[],
        skopeo_accelerators=False,
        skopeo_use_pip=True,
        skopeo_pip_lists=str(lists),
    )
    assert refused.code != 0 and "DO NOT MATCH THE HASHES" in refused.text
    listed = subprocess.run([interpreter, "-m", "pip", "list"], capture_output=True, text=True, check=True)
    assert "zstandard" not in listed.stdout


def test_an_old_skopeo_is_warned_about_or_refused_as_asked(host: Host) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed here")
    warned = host.run(interpreter=sys.executable, skopeo_install="never", skopeo_minimum_version="99.0")
    assert warned.code == 0
    assert re.search(r"\[WARNING\]: skopeo \S+ is older than 99.0", warned.text), "as Ansible warns"
    refused = host.run(
        interpreter=sys.executable, skopeo_install="never", skopeo_minimum_version="99.0", skopeo_below_minimum="fail"
    )
    assert refused.code != 0
    assert "is older than 99.0, which skopeo_minimum_version asks for" in refused.text
    silent = host.run(
        interpreter=sys.executable, skopeo_install="never", skopeo_minimum_version="99.0", skopeo_below_minimum="ignore"
    )
    assert silent.code == 0
    assert "WARNING" not in silent.text


def test_what_several_hosts_have_to_warn_of_is_said_once(host: Host) -> None:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed here")
    warned = host.run(
        "--inventory", "other,", interpreter=sys.executable, skopeo_install="never", skopeo_minimum_version="99.0"
    )
    assert warned.code == 0 and "other" in warned.text
    assert warned.text.count("is older than 99.0") == 1


@pytest.mark.usefixtures("namespaces")
def test_a_host_with_skopeo_and_without_package_lists_is_installed_all_the_same(host: Host) -> None:
    """As every image for clouds is: apt then knows skopeo, which is installed, and nothing else."""
    if not shutil.which("skopeo") or shutil.which("hello"):
        pytest.skip("this needs skopeo, and the package hello, which stands for a missing one, not to be installed")
    outcome = host.run("--check", prepare="mount -t tmpfs tmpfs /var/lib/apt/lists", skopeo_library_packages=["hello"])
    assert outcome.code == 0, outcome.text
    assert "hello" in outcome.text.partition("Would install")[2][:60]


def test_a_skopeo_that_cannot_be_used_at_all_is_refused(host: Host, tmp_path: pathlib.Path) -> None:
    if not system_has_zstandard():
        pytest.skip("python3-zstandard is not installed here")
    old = tmp_path / "skopeo"
    old.write_text("#!/bin/sh\necho skopeo version 1.2.2\n")
    old.chmod(0o755)
    outcome = host.run(skopeo_install="never", skopeo_executable=str(old), skopeo_below_minimum="ignore")
    assert outcome.code != 0
    assert "skopeo 1.2.2 is too old" in outcome.text
