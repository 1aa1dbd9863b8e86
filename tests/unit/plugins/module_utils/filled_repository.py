# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository with a few images in it, to prune, check and repair, and all the ways to break it."""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import pytest
from fake_source import REGISTRY, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing
from ansible_collections.composefs.oci.plugins.module_utils.operations.check import FULL, OBJECTS, QUICK
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofswriter import write_image
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

TAGS = ("a", "b", "c", "artifact")


def tree(name: str) -> bytes:
    """The tar of the layer ``name``: four files of which each becomes an object."""
    return tar(
        member("usr/", type=DIRECTORY), *(member(f"usr/{name}{n}", f"{name}{n}".encode() * 90) for n in range(4))
    )


def make_layout(path: pathlib.Path) -> Layout:
    """Three images, of which each shares a layer with the next, and an artifact."""
    layout = Layout(path)
    layout.image([tree("base"), tree("a")], "a")
    layout.image([tree("base"), tree("b")], "b")
    layout.image([tree("b"), tree("c")], "c")
    layout.artifact([("text/plain", b"an artifact " * 30)], "artifact")
    return layout


def fill(path: pathlib.Path, layout: Layout) -> None:
    """Make a repository with all of the layout at ``path``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "call", lambda what, function, **_more: function())
        World(layout).install(patch)
        create.prepare(str(path), fsverity.SHA256, create.DISABLED)
        pull_all(path, *(pull.Request(REGISTRY + tag, tag) for tag in TAGS))


def copy_of(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(source, target, symlinks=True)
    return target


class Repo(NamedTuple):
    """A repository to break, and what is where in it."""

    path: pathlib.Path

    def open(self) -> Repository:
        return Repository.open(str(self.path), write=True)

    def manifest(self, name: str = "b") -> bytes:
        with self.open() as repository:
            return repository.stream(imagestreams.MANIFEST + (repository.tag_digest(name) or "")) or b""

    def refs(self, stream: bytes) -> dict[str, bytes]:
        with self.open() as repository, repository.open_object_stream(stream) as opened:
            return dict(opened.named_refs)

    def config(self, name: str = "b") -> bytes:
        return next(one for key, one in self.refs(self.manifest(name)).items() if key.startswith("config:"))

    def layer(self, which: str = "b") -> bytes:
        with self.open() as repository:
            return repository.stream(imagestreams.LAYER + sha256(tree(which))) or b""

    def image(self, name: str = "b") -> bytes:
        with self.open() as repository:
            return bytes.fromhex(listing.list_images(repository, name)[0][0]["image_id"])

    def file(self, which: str = "b0") -> bytes:
        return fsverity.digest(which.encode() * 90, fsverity.SHA256)

    def document(self, stream: bytes) -> bytes:
        with self.open() as repository, repository.open_object_stream(stream) as opened:
            return opened.object_refs[0]

    def object(self, digest: bytes) -> pathlib.Path:
        return self.path / "objects" / fsverity.object_path(digest)

    def flip(self, digest: bytes) -> None:
        path = self.object(digest)
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    def put(self, data: bytes) -> bytes:
        with self.open() as repository:
            return repository.objects.put(data)


Break = Callable[[Repo], str]
"""Breaks something; the object or path to be named."""


def lost_file(repo: Repo) -> str:
    repo.object(repo.file()).unlink()
    return repo.file().hex()


def grown_file(repo: Repo) -> str:
    with open(repo.object(repo.file()), "ab") as file:
        file.write(b"more")
    return repo.layer().hex()


def lost_layer(repo: Repo) -> str:
    layer = repo.layer()
    repo.object(layer).unlink()
    return layer.hex()


def lost_image(repo: Repo) -> str:
    image = repo.image()
    repo.object(image).unlink()
    return image.hex()


def lost_document(repo: Repo) -> str:
    document = repo.document(repo.config())
    repo.object(document).unlink()
    return document.hex()


def layer_without_name(repo: Repo) -> str:
    layer = repo.layer()
    (repo.path / f"streams/oci-layer-{sha256(tree('b'))}").unlink()
    return layer.hex()


def image_without_name(repo: Repo) -> str:
    image = repo.image()
    (repo.path / f"images/{image.hex()}").unlink()
    return image.hex()


def image_name_to_another(repo: Repo) -> str:
    image = repo.image().hex()
    os.symlink(f"../objects/{image[:2]}/{image[2:]}", repo.path / "images" / ("0" * 64))
    return image


def manifest_of_another_digest(repo: Repo) -> str:
    with repo.open() as repository:
        stream = repository.stream(imagestreams.MANIFEST + (repository.tag_digest("a") or "")) or b""
        repository.register(imagestreams.MANIFEST + (repository.tag_digest("b") or ""), stream)
    return stream.hex()


def no_stream(repo: Repo) -> str:
    digest = repo.put(b"this is no splitstream" * 9)
    with repo.open() as repository:
        repository.register(f"oci-layer-{sha256(tree('b'))}", digest)
    return digest.hex()


def no_image(repo: Repo) -> str:
    digest = repo.put(b"this is no image" * 9)
    with repo.open() as repository:
        repository.link_image(digest)
    return digest.hex()


def dangling(repo: Repo) -> str:
    os.symlink("../../oci-manifest-sha256:" + "0" * 64, repo.path / "streams/refs/oci/gone")
    return "streams/refs/oci/gone"


def stray(repo: Repo) -> str:
    (repo.path / "objects/00").mkdir(exist_ok=True)
    (repo.path / "objects/00/stray").write_text("x")
    return "objects/00/stray"


def stray_stream(repo: Repo) -> str:
    (repo.path / "streams/stray").write_text("x")
    return "streams/stray"


def elsewhere(repo: Repo) -> str:
    os.symlink("/etc/passwd", repo.path / "streams/elsewhere")
    return "streams/elsewhere"


def bad_name(repo: Repo) -> str:
    os.symlink(os.readlink(repo.path / "streams/refs/oci/b"), repo.path / "streams/refs/oci/@b")
    return "streams/refs/oci/@b"


def rotten_file(repo: Repo) -> str:
    repo.flip(repo.file())
    return repo.file().hex()


def rotten_image(repo: Repo) -> str:
    repo.flip(repo.image())
    return repo.image().hex()


def directory_for_object(repo: Repo) -> str:
    digest = repo.put(b"nobody needs this" * 9)
    repo.object(digest).unlink()
    repo.object(digest).mkdir()
    return digest.hex()


def poisoned(repo: Repo) -> str:
    with repo.open() as repository:
        writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
        writer.inline(tree("other"))
        digest = repository.objects.put_pieces(writer.finish())
        repository.register(imagestreams.LAYER + sha256(tree("b")), digest)
    return digest.hex()


def wrongly_proved(repo: Repo) -> str:
    digest = poisoned(repo)
    with repo.open() as repository:
        repository.trust(sha256(tree("b")), bytes.fromhex(digest))
    return digest


def wrong_image(repo: Repo) -> str:
    with repo.open() as repository:
        image = bytearray()
        write_image(
            Directory(Stat(0o755), {b"evil": Leaf(Stat(0o644), data=b"x")}), 1, repository.algorithm, image.extend
        )
        digest = repository.objects.put(bytes(image))
        repository.link_image(digest)
        manifest = repository.tag_digest("b") or ""
        document = imagestreams.read(repository, imagestreams.MANIFEST, manifest)
        assert document
        key, stream = next((key, one) for key, one in document.refs.items() if key.startswith("config:"))
        config = imagestreams.read_object(repository, imagestreams.CONFIG, key[7:], stream)
        changed = imagestreams.store(
            repository, imagestreams.CONFIG, config.raw, {**config.refs, imagestreams.image_ref(1): digest}
        )
        moved = imagestreams.store(repository, imagestreams.MANIFEST, document.raw, {**document.refs, key: changed})
        imagestreams.replace(repository, key[7:], changed, {manifest: moved})
    return digest.hex()


BREAKS: list[tuple[str, Break, str, list[str]]] = [
    # What quick finds, then objects, then full.
    ("object_missing", lost_file, QUICK, ["b", "c"]),
    ("stream_damaged", grown_file, QUICK, ["b", "c"]),
    ("object_missing", lost_layer, QUICK, ["b", "c"]),
    ("object_missing", lost_image, QUICK, ["b"]),
    ("object_missing", lost_document, QUICK, ["b"]),
    ("stream_unnamed", layer_without_name, QUICK, ["b", "c"]),
    ("image_unlisted", image_without_name, QUICK, ["b"]),
    ("bad_link", image_name_to_another, QUICK, ["b"]),
    ("document_damaged", manifest_of_another_digest, QUICK, ["a", "b"]),
    ("stream_damaged", no_stream, QUICK, []),
    ("image_damaged", no_image, QUICK, []),
    ("dangling_reference", dangling, QUICK, ["gone"]),
    ("stray_file", stray, QUICK, []),
    ("stray_file", stray_stream, QUICK, []),
    ("bad_link", elsewhere, QUICK, []),
    ("invalid_name", bad_name, QUICK, ["@b"]),
    ("object_damaged", rotten_file, OBJECTS, ["b", "c"]),
    ("object_damaged", rotten_image, OBJECTS, ["b"]),
    ("object_damaged", directory_for_object, OBJECTS, []),
    ("layer_poisoned", poisoned, FULL, []),
    ("proof_wrong", wrongly_proved, FULL, []),
    ("image_wrong", wrong_image, FULL, ["b"]),
]
