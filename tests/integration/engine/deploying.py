# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of mounts that last have in common: an application in three versions, and a host to mount it on."""

from __future__ import annotations

import os
import pathlib
import subprocess
from typing import Any

from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    activation,
    deployment,
    journal,
    lastingmount,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations.journal import Places
from ansible_collections.composefs.oci.plugins.module_utils.operations.mounting import Wish
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout
from pulling import pull_one
from tarbytes import DIRECTORY, member, tar

VERSIONS = ("v1", "v2", "v3")


def content(version: str) -> bytes:
    """The file usr/data of a version."""
    return f"this is {version}\n".encode() * 1000


def make_versions(path: pathlib.Path) -> Layout:
    """A layout with three versions of an application."""
    made = Layout(path)
    for version in VERSIONS:
        archive = tar(member("usr/", type=DIRECTORY, mode=0o755), member("usr/data", content(version)))
        made.image([archive], version, labels={"org.opencontainers.image.version": version})
    return made


class App:
    """A host with a repository, a mount point, and journals of its own."""

    def __init__(self, place: pathlib.Path, repository: pathlib.Path, layout: Layout) -> None:
        self.repository = repository
        self.point = place / "app"
        self.layout = layout
        self.warnings: list[str] = []
        self.places = Places(str(place / "units"), str(place / "library"), str(place / "no systemd"))
        self.host = deployment.Host(self.places, warn=self.warnings.append)

    def pull(self, version: str, name: str = "app") -> str:
        return str(pull_one(self.repository, f"oci:{self.layout.path}:{version}", name)["digest"])

    def mount(self, image: str = "app", check: bool = False, **options: Any) -> lastingmount.Result:
        wish = Wish(image, str(self.point), replace=options.pop("replace", True))
        with Repository.open(str(self.repository)) as repository:
            return lastingmount.have_mounted(repository, lastingmount.MountRequest(wish, **options), self.host, check)

    def unmount(self) -> lastingmount.Result:
        return lastingmount.have_unmounted(str(self.point), self.host)

    def data(self) -> bytes:
        subprocess.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"], check=False)
        return (self.point / "usr/data").read_bytes()

    def journal(self) -> Any:
        return journal.read(str(self.point), self.places)

    def tags(self) -> set[str]:
        with Repository.open(str(self.repository)) as repository:
            return set(repository.tags())

    def links(self) -> set[str]:
        with Repository.open(str(self.repository)) as repository:
            return {name.split("/")[-1] for name in repository.image_refs("composefs-oci")}

    def activate(self, digest: str | None = None, check: bool = False, **options: Any) -> lastingmount.Result:
        wanted = activation.Deployment(str(self.point), options.pop("name", "app"), digest, **options)
        with Repository.open(str(self.repository)) as repository:
            return activation.activate(repository, wanted, self.host, check)

    def confirm(self, digest: str | None = None, **options: Any) -> lastingmount.Result:
        return activation.confirm(str(self.point), self.host, digest, **options)

    def revert(self, **options: Any) -> lastingmount.Result:
        return activation.take_back(str(self.point), self.host, **options)

    def stage(self, version: str) -> str:
        """Fetch a version under its pin; the digest."""
        digest = self.pull(version, "staging")
        with Repository.open(str(self.repository), write=True) as repository:
            repository.tag(f"app@{digest}", digest)
            repository.untag("staging")
        return digest

    def mounted(self) -> str | None:
        there = deployment.shown(str(self.point))
        return there.image_id if there is not None else None

    def clean(self) -> None:
        from ansible_collections.composefs.oci.plugins.module_utils.host import deadman

        deadman.disarm(lastingmount.timer_name(os.path.realpath(self.point)), self.host.run, False)
        for mounted in reversed(mountinfo.mounts()):
            if mounted.path.startswith(f"{os.path.realpath(self.point.parent)}/"):
                subprocess.run(["umount", "--lazy", mounted.path], check=False)
