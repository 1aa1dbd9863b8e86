# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever is broken in a repository is found, under its code, with the names that it concerns."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from filled_repository import copy_of, fill, make_layout, tree

from ansible_collections.composefs.oci.plugins.module_utils.errors import ImageNotFound
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, listing
from ansible_collections.composefs.oci.plugins.module_utils.operations.check import FULL, OBJECTS, QUICK, Report, Wish
from ansible_collections.composefs.oci.plugins.module_utils.operations.findings import Finding
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofswriter import write_image
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.store import checks, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import sha256


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


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """To be copied."""
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    return base / "repo"


@pytest.fixture
def repo(filled: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repo]:
    monkeypatch.setattr(processes, "call", lambda what, function, **_more: function())
    yield Repo(copy_of(filled, tmp_path / "repo"))


def run(repo: Repo, level: str = QUICK, *images: str, parallel: int = 1) -> Report:
    with Repository.open(str(repo.path)) as repository:
        return check.check(repository, Wish(level, images, parallel), Progress(), lambda _repository: [])


def short(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.code, finding.object or finding.path) for finding in findings]


@pytest.mark.parametrize("level", [QUICK, OBJECTS, FULL])
@pytest.mark.parametrize("parallel", [1, 2])
def test_nothing_is_found_where_nothing_is_wrong(repo: Repo, level: str, parallel: int) -> None:
    report = run(repo, level, parallel=parallel)
    assert report.findings == [] and report.checked["streams"] == 13 and report.checked["images"] == 3
    if level != QUICK:
        objects = list((repo.path / "objects").glob("??/*"))
        assert report.checked["objects"] == len(objects)
        assert report.checked["bytes"] == sum(one.stat().st_size for one in objects)


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


@pytest.mark.parametrize(
    ("code", "breaks", "level", "names"), BREAKS, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_is_broken_is_found(repo: Repo, code: str, breaks: Break, level: str, names: list[str]) -> None:
    what = breaks(repo)
    levels = (QUICK, OBJECTS, FULL)
    for one in levels[levels.index(level) :]:
        found = run(repo, one).findings
        mine = [finding for finding in found if finding.code == code and what in (finding.object, finding.path)]
        assert len(mine) == 1 and mine[0].names == names, (one, short(found))
        assert all(finding.message and finding.repairable in ("local", "source", "no") for finding in found)
    for one in levels[: levels.index(level)]:
        assert code not in [finding.code for finding in run(repo, one).findings], one


@pytest.mark.parametrize(
    ("breaks", "repairable"),
    [
        (lost_file, "source"),
        (rotten_file, "source"),
        (lost_image, "local"),
        (rotten_image, "local"),
        (wrong_image, "local"),
        (layer_without_name, "local"),
        (image_without_name, "local"),
        (directory_for_object, "local"),
        (dangling, "no"),
        (stray, "no"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_it_is_told_where_a_repair_would_get_it(repo: Repo, breaks: Break, repairable: str) -> None:
    what = breaks(repo)
    assert {one.repairable for one in run(repo, FULL).findings if what in (one.object, one.path)} == {repairable}


def test_only_the_images_asked_for_are_checked(repo: Repo) -> None:
    stray(repo)
    repo.flip(repo.file("a0"))
    assert run(repo, FULL, "b").findings == []
    assert short(run(repo, OBJECTS, "a", "b").findings) == [("object_damaged", repo.file("a0").hex())]
    with pytest.raises(ImageNotFound, match="'nobody'"):
        run(repo, QUICK, "nobody")


def test_many_processes_find_the_same_as_one(repo: Repo) -> None:
    for digest in (repo.file("a0"), repo.file("b1"), repo.file("c2"), repo.layer("base")):
        repo.flip(digest)
    assert short(run(repo, OBJECTS, parallel=1).findings) == short(run(repo, OBJECTS, parallel=4).findings)


def test_an_object_that_cannot_be_read_is_told_and_the_rest_is_checked(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.readv
    victim = repo.object(repo.file()).stat().st_ino

    def readv(fd: int, buffers: list[bytearray]) -> int:
        if os.fstat(fd).st_ino == victim:
            raise OSError(5, "Input/output error")
        return real(fd, buffers)

    monkeypatch.setattr(os, "readv", readv)
    repo.flip(repo.file("a0"))
    assert sorted(short(run(repo, OBJECTS).findings)) == [
        ("object_damaged", repo.file("a0").hex()),
        ("object_unreadable", repo.file().hex()),
    ]


def test_the_result_of_the_last_check_is_remembered(repo: Repo) -> None:
    repo.flip(repo.file())
    run(repo, OBJECTS)
    with Repository.open(str(repo.path)) as repository:
        last = checks.last(repository)
    assert last and last["level"] == OBJECTS and last["findings"] == {"object_damaged": 1}
    assert json.loads((repo.path / ".composefs-oci/checks/last.json").read_text()) == last
    run(repo, QUICK, "a")
    with Repository.open(str(repo.path)) as repository:
        assert checks.last(repository) == last, "a check of some images says nothing about the whole"
