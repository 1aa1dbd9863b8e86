# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Playbooks that are run on this machine, with the collection as it stands in the checkout."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/support"))

from aptroot import Unavailable, cache_directory
from faultproxy import FaultProxy
from ociimage import Layout
from registry import Registry
from tarbytes import DIRECTORY, member, small_tree, tar

PLAYBOOK = pathlib.Path(sys.executable).parent / "ansible-playbook"


class Site:
    """A directory with a tree of collections, a repository and playbooks."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.repository = directory / "repository"
        tree = directory / "collections" / "ansible_collections" / "composefs"
        tree.mkdir(parents=True)
        (tree / "oci").symlink_to(ROOT)

    def environment(self, **more: str) -> dict[str, str]:
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "CI"))}
        kept.update(
            ANSIBLE_COLLECTIONS_PATH=str(self.directory / "collections"),
            ANSIBLE_HOME=str(self.directory / "home"),
            ANSIBLE_REMOTE_TMP=str(self.directory / "remote"),
            ANSIBLE_NOCOLOR="1",
            ANSIBLE_PIPELINING="1",
            ANSIBLE_LOCALHOST_WARNING="0",
            ANSIBLE_INVENTORY_UNPARSED_WARNING="0",
            LC_ALL="C.UTF-8",
        )
        return {**kept, **more}

    def command(self, tasks: str, *arguments: str, **variables: Any) -> list[str]:
        """The command that runs ``tasks`` (YAML, as in a play) on this machine."""
        play = self.directory / "play.yml"
        body = "".join(f"    {line}\n" if line else "\n" for line in tasks.strip("\n").splitlines())
        play.write_text(f"- name: Test\n  hosts: all\n  gather_facts: false\n  tasks:\n{body}")
        every = {"ansible_python_interpreter": sys.executable, "repository": str(self.repository), **variables}
        return [
            str(PLAYBOOK),
            "--inventory",
            "localhost,",
            "--connection",
            "local",
            "--extra-vars",
            json.dumps(every),
            *arguments,
            str(play),
        ]

    def run(
        self, tasks: str, *arguments: str, env: dict[str, str] | None = None, **variables: Any
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(tasks, *arguments, **variables),
            cwd=self.directory,
            env=self.environment(**(env or {})),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A directory on a file system that can hold a repository."""
    for choice in (os.environ.get("COMPOSEFS_OCI_DISK"), str(tmp_path_factory.getbasetemp()), str(cache_directory())):
        kind = subprocess.run(["stat", "-f", "-c", "%T", choice or "/"], stdout=subprocess.PIPE, text=True, check=False)
        if choice and kind.returncode == 0 and "overlay" not in kind.stdout and os.access(choice, os.W_OK):
            with tempfile.TemporaryDirectory(prefix="composefs-oci-", dir=choice) as directory:
                yield pathlib.Path(directory)
                return
    pytest.skip("no writable directory outside an overlay file system (set COMPOSEFS_OCI_DISK to one)")


@pytest.fixture
def site(disk: pathlib.Path) -> Iterator[Site]:
    if not PLAYBOOK.exists():
        pytest.skip("ansible-core is not installed beside this Python")
    with tempfile.TemporaryDirectory(dir=disk) as directory:
        yield Site(pathlib.Path(directory))


@pytest.fixture(scope="session")
def images(disk: pathlib.Path) -> Layout:
    """A layout with the image ``app`` of two layers, the larger one of which does not compress."""
    layout = Layout(disk / "images")
    noise = random.Random(3).randbytes(1_600_000)
    layout.image([tar(member("usr/", type=DIRECTORY), member("usr/noise", noise)), small_tree(seed=4, files=3)], "app")
    return layout


@pytest.fixture(scope="session")
def registry(disk: pathlib.Path, images: Layout) -> Iterator[Registry]:
    """A registry without TLS that has ``app:1``."""
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(Registry(disk / "registry"))
        except Unavailable as error:
            pytest.skip(str(error))
        running.push(f"{images.path}:app", "app:1")
        yield running


@pytest.fixture
def faults(registry: Registry) -> Iterator[FaultProxy]:
    """A proxy in front of ``registry`` that misbehaves on demand."""
    with FaultProxy(registry.address) as proxy:
        yield proxy
