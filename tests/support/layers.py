# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From layer archives in memory to a tree, by the engine and by cfsctl, to compare the two.

``tree(*tars)`` splits the archives, reads them back and merges them as a pull does, only without a repository.
``Cfsctl(directory).ask("dump", tars)`` has cfsctl pull an OCI layout of the same archives and tell what it makes of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.bootable import transform_for_boot
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import FileSystem
from ansible_collections.composefs.oci.plugins.module_utils.formats.tar import EntryReader, Splitter
from ansible_collections.composefs.oci.plugins.module_utils.formats.tarheader import Entry
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.merge import TreeBuilder
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member


class External(NamedTuple):
    """What stands for an object in a stored layer."""

    digest: bytes


class Objects:
    """An object store in a dictionary, and the sink of a splitter."""

    def __init__(self, algorithm: fsverity.Algorithm = fsverity.SHA256) -> None:
        self.algorithm = algorithm
        self.contents: dict[bytes, bytes] = {}
        self.chunks: list[Any] = []
        self._pieces: list[bytes] = []

    def inline(self, data: bytes | memoryview) -> None:
        self.chunks.append(bytes(data))

    def external(self, data: bytes | memoryview) -> None:
        content = bytes(data)
        digest = fsverity.digest(content, self.algorithm)
        self.contents[digest] = content
        self.chunks.append(External(digest))

    def begin(self, size: int) -> None:
        self._pieces = []

    def content(self, data: bytes | memoryview) -> None:
        self._pieces.append(bytes(data))

    def end(self) -> None:
        self.external(b"".join(self._pieces))

    def read(self, digest: bytes, limit: int) -> bytes:
        content = self.contents[digest]
        assert len(content) <= limit
        return content

    def entries(self, tar: bytes) -> Iterator[tuple[Entry, Any]]:
        """Store one layer and read its entries back."""
        self.chunks = []
        splitter = Splitter(self)
        splitter.feed(tar)
        splitter.finish()
        return EntryReader.entries(self.chunks)


def tree(
    *tars: bytes,
    xattrs: str = "allowlist-only",
    bootable: bool = False,
    algorithm: fsverity.Algorithm = fsverity.SHA256,
) -> FileSystem:
    """The tree that a pull makes of the layers."""
    objects = Objects(algorithm)
    builder = TreeBuilder()
    for tar in tars:
        for entry, content in objects.entries(tar):
            builder.add(entry, content)
    filesystem = builder.finish(xattrs)
    if bootable:
        transform_for_boot(filesystem, objects.read)
    return filesystem


def base(*names: str) -> list[bytes]:
    """The directories without which cfsctl takes no image, and more of them."""
    return [member(name.rstrip("/") + "/", type=DIRECTORY, mtime=77) for name in ("usr", "boot", "sysroot", *names)]


def write_layout(directory: pathlib.Path, tars: Sequence[bytes]) -> str:
    """An OCI layout of plain layers with one image called ``x``; returns the reference for cfsctl and skopeo."""
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(content: bytes, kind: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        (blobs / digest).write_bytes(content)
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    layers = [put(tar, "layer.v1.tar") for tar in tars]
    rootfs = {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]}
    config = put(
        json.dumps({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": rootfs}).encode(), "config.v1+json"
    )
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config,
        "layers": layers,
    }
    descriptor = {
        **put(json.dumps(manifest).encode(), "manifest.v1+json"),
        "annotations": {"org.opencontainers.image.ref.name": "x"},
    }
    (directory / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [descriptor]}))
    return f"oci:{directory}:x"


class Cfsctl:
    """The reference implementation, with a repository of its own. ``available()`` says whether there is one."""

    def __init__(self, directory: pathlib.Path, algorithm: str = "sha256") -> None:
        self._directory = directory
        self._algorithm = algorithm

    @staticmethod
    def available() -> bool:
        return shutil.which("cfsctl") is not None

    def pull(self, tars: Sequence[bytes]) -> None:
        if not (self._directory / "repository").exists():
            self._run("init", "--insecure", "--algorithm", f"fsverity-{self._algorithm}-12", check=True)
        shutil.rmtree(self._directory / "layout", ignore_errors=True)
        reference = write_layout(self._directory / "layout", tars)
        # The image of an unusable tree is refused here already; what was stored of it is still there to be asked.
        self._run("oci", "pull", reference, "x")

    def ask(self, verb: str, *options: str, version: int = 1) -> bytes | None:
        """What ``cfsctl oci VERB`` prints about the image; None when it fails."""
        answer = self._run("--erofs-version", str(version), "oci", verb, "x", *options)
        return answer.stdout if answer.returncode == 0 else None

    def _run(self, *arguments: str, check: bool = False) -> subprocess.CompletedProcess[bytes]:
        command = ("cfsctl", "--repo", str(self._directory / "repository"), *arguments)
        # Finding names for its backtraces would take most of its time.
        environment = {**os.environ, "RUST_BACKTRACE": "0", "RUST_LIB_BACKTRACE": "0"}
        return subprocess.run(command, check=check, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
