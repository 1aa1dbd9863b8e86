# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host for modules that mount: a repository with two images, journals and units of its own, and a stand-in for the
kernel's mounts and for systemd.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils import basic

from ansible_collections.composefs.oci.plugins.module_utils.errors import MountFailed
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.host import commands, mountcalls, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, journal, mounting
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


class Host:
    """What is mounted, and where units lie."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.there: dict[str, mountinfo.Mounted] = {}
        self.repository = str(tmp_path / "repo")
        self.path = str(tmp_path / "app")
        self.places = bootmount.Places(str(tmp_path / "units"), str(tmp_path / "library"), str(tmp_path / "running"))
        self.told: list[str] = []
        self.warnings: list[str] = []
        self.digests: list[str] = []
        self.refuses = False
        (tmp_path / "running").mkdir()
        create.prepare(self.repository, fsverity.SHA256, create.DISABLED)
        with Repository.open(self.repository, write=True) as opened:
            self.images = [opened.objects.put(text).hex() for text in (b"one", b"two")]
            for image in self.images:
                opened.link_image(bytes.fromhex(image))
        monkeypatch.setattr(mountinfo, "at", self.there.get)
        monkeypatch.setattr(mountinfo, "hidden_at", lambda _path: [])
        monkeypatch.setattr(mountinfo, "children", lambda _of: [])
        monkeypatch.setattr(mounting, "require_capability", lambda _what: None)
        monkeypatch.setattr(mountcalls, "mount", self.mount)
        monkeypatch.setattr(mountcalls, "replace", self.mount)
        monkeypatch.setattr(mountcalls, "unmount", self.there.pop)
        monkeypatch.setattr(bootmount, "HOST", self.places)
        monkeypatch.setattr(commands, "run", self.run_command)
        monkeypatch.setattr(basic.AnsibleModule, "warn", lambda _module, text, **_options: self.warnings.append(text))

    def mount(self, request: mountcalls.Request, path: str) -> None:
        if self.refuses:
            raise MountFailed("The kernel refused.")
        settings = {"ro": "", **({"verity": "require"} if request.verity else {})}
        self.there[path] = mountinfo.Mounted(
            1,
            0,
            path,
            "overlay",
            f"composefs:{request.image_id}",
            frozenset(("ro", "relatime", *request.options)),
            settings,
        )

    def unit(self) -> str | None:
        return bootmount.current(self.path, self.places)

    def journal(self) -> Any:
        return journal.read(self.path, self.places)

    def run_command(self, words: list[str], **_options: Any) -> tuple[int, str, str]:
        self.told.append(" ".join(words))
        return 0, "", ""


def put(repository: Repository, image: str) -> str:
    """A manifest whose configuration leads to the image; its digest, which gets the name ``app@DIGEST``."""
    config = json.dumps(
        {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []}, "x": image}
    )
    stream = imagestreams.store(
        repository, imagestreams.CONFIG, config.encode(), {imagestreams.image_ref(1): bytes.fromhex(image)}
    )
    digest = digests.digest_of(config.encode())
    repository.register(imagestreams.CONFIG + digest, stream)
    descriptor = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest, "size": len(config)}
    raw = json.dumps(
        {"schemaVersion": 2, "mediaType": ocidocuments.OCI_MANIFEST, "config": descriptor, "layers": []}
    ).encode()
    refs = {imagestreams.CONFIG_REF + digest: stream}
    manifest = digests.digest_of(raw)
    repository.register(
        imagestreams.MANIFEST + manifest, imagestreams.store(repository, imagestreams.MANIFEST, raw, refs)
    )
    repository.tag(f"app@{manifest}", manifest)
    return manifest
