# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Documents in a repository, and that no instant of re-pointing them loses an image."""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofsreader import ErofsImage
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, FormatError
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

RAW = b'{"a document": true}'
DIGEST = sha256(RAW)
FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))
SECOND = tar(member("usr/two", b"2" * 300))


@pytest.fixture
def repo(tmp_path: pathlib.Path) -> Iterator[Repository]:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    with Repository.open(str(tmp_path / "repo"), write=True) as found:
        yield found


# --- one document
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [imagestreams.MANIFEST, imagestreams.CONFIG])
def test_a_document_is_one_external_object_with_its_exact_bytes(repo: Repository, kind: str) -> None:
    refs = {"config:" + DIGEST: bytes(range(32)), DIGEST: bytes(32)}
    stream = imagestreams.store(repo, kind, RAW, refs)
    assert imagestreams.read(repo, kind, DIGEST) is None, "storing names nothing"
    repo.register(kind + DIGEST, stream)
    assert imagestreams.read(repo, kind, DIGEST) == (RAW, refs, stream)
    with repo.open_object_stream(
        stream, splitstream.MANIFEST if kind == imagestreams.MANIFEST else splitstream.CONFIG
    ) as opened:
        (chunk,) = opened.chunks()
        assert not isinstance(chunk, bytes) and repo.objects.read(chunk.digest, 100) == RAW


def stream_of(repo: Repository, content_type: bytes, *parts: bytes, inline: bool = False) -> bytes:
    writer = splitstream.Writer(repo.algorithm, content_type)
    for part in parts:
        if inline:
            writer.inline(part)
        else:
            writer.external(repo.objects.put(part), len(part))
    return repo.objects.put_pieces(writer.finish())


@pytest.mark.parametrize(
    "wrong",
    [
        "inline",
        "two objects",
        "no object",
        "other document",
        "other type",
        "a manifest",
        "object gone",
        "not a splitstream",
        "stream gone",
    ],
)
def test_what_is_not_the_document_is_an_error_to_read_and_missing_to_a_pull(repo: Repository, wrong: str) -> None:
    stream = {
        "inline": lambda: stream_of(repo, splitstream.CONFIG, RAW, inline=True),
        "two objects": lambda: stream_of(repo, splitstream.CONFIG, RAW, RAW),
        "no object": lambda: stream_of(repo, splitstream.CONFIG),
        "other document": lambda: stream_of(repo, splitstream.CONFIG, b"{}"),
        "other type": lambda: stream_of(repo, splitstream.LAYER, RAW),
        "a manifest": lambda: stream_of(repo, splitstream.MANIFEST, RAW),
        "object gone": lambda: stream_of(repo, splitstream.CONFIG, RAW),
        "not a splitstream": lambda: repo.objects.put(b"x" * 500),
        "stream gone": lambda: bytes(32),
    }[wrong]()
    if wrong == "object gone":
        os.unlink(fsverity.object_path(fsverity.digest(RAW, repo.algorithm)), dir_fd=repo.objects.dirfd)
    repo.register(imagestreams.CONFIG + DIGEST, stream)
    with pytest.raises(FormatError):
        imagestreams.read(repo, imagestreams.CONFIG, DIGEST)
    assert imagestreams.usable(repo, imagestreams.CONFIG, DIGEST) is None


def test_a_document_larger_than_any_is_not_read(repo: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    repo.register(imagestreams.CONFIG + DIGEST, imagestreams.store(repo, imagestreams.CONFIG, RAW, {}))
    monkeypatch.setattr(imagestreams.ocidocuments, "MAX_CONFIG", len(RAW) - 1)
    with pytest.raises(FormatError, match="at most"):
        imagestreams.read(repo, imagestreams.CONFIG, DIGEST)


def test_a_damaged_document_is_replaced_by_storing_it_again(repo: Repository, tmp_path: pathlib.Path) -> None:
    stream = imagestreams.store(repo, imagestreams.CONFIG, RAW, {})
    repo.register(imagestreams.CONFIG + DIGEST, stream)
    for digest in (fsverity.digest(RAW, repo.algorithm), stream):
        path = tmp_path / "repo/objects" / fsverity.object_path(digest)
        path.write_bytes(b"x" * path.stat().st_size)
        assert imagestreams.usable(repo, imagestreams.CONFIG, DIGEST) is None
        assert imagestreams.store(repo, imagestreams.CONFIG, RAW, {}) == stream
        assert imagestreams.read(repo, imagestreams.CONFIG, DIGEST)


@pytest.mark.parametrize(
    ("version", "boot", "key"),
    [
        (2, False, "composefs.image"),
        (1, False, "composefs.image.v1"),
        (0, False, "composefs.image.v1"),
        (2, True, "composefs.image.boot"),
        (1, True, "composefs.image.boot.v1"),
    ],
)
def test_keys_of_images(version: int, boot: bool, key: str) -> None:
    assert imagestreams.image_ref(version, boot) == key and imagestreams.is_image_ref(key)


def test_layers_and_unknown_keys_are_no_images() -> None:
    assert not any(map(imagestreams.is_image_ref, (DIGEST, "composefs.image.v2", "composefs.imagexyz", "")))
    assert imagestreams.is_image_ref("composefs.image.boot.v1.xattrs=keep-user-xattrs")


# --- a layer that gives its name away
# --------------------------------------------------------------------------------------------------------


def test_a_layer_stream_that_gives_its_name_away_keeps_one(repo: Repository) -> None:
    old, new = stream_of(repo, splitstream.BLOB, FIRST), stream_of(repo, splitstream.LAYER, FIRST)
    imagestreams.name_layer(repo, "oci-layer-x", old)
    assert repo.streams() == ["oci-layer-x"]
    imagestreams.name_layer(repo, "oci-layer-x", new)
    imagestreams.name_layer(repo, "oci-layer-x", new)
    assert repo.stream("oci-layer-x") == new
    assert [repo.stream(name) for name in repo.streams(imagestreams.KEPT)] == [old]


def test_a_layer_stream_that_is_gone_needs_no_other_name(repo: Repository) -> None:
    repo.register("oci-layer-x", bytes(32))
    imagestreams.name_layer(repo, "oci-layer-x", stream_of(repo, splitstream.LAYER, FIRST))
    assert repo.streams() == ["oci-layer-x"]


# --- the crash window
# --------------------------------------------------------------------------------------------------------------------


def collected(path: pathlib.Path) -> set[bytes]:
    """The objects that a collector would remove: those that cannot be reached from a tag.

    A model of its own: roots are what the links below streams/refs lead to; a stream keeps its objects and everything
    it names, and walks on where that is itself a stream with a name. It looks at no code that writes.
    """
    streams = {entry.name: os.readlink(entry.path) for entry in os.scandir(path / "streams") if entry.is_symlink()}

    def object_of(target: str) -> bytes:
        return bytes.fromhex(target.replace("/", "")[-64:])

    name_of = {object_of(target): name for name, target in streams.items()}
    live: set[bytes] = set()
    walked: set[str] = set()
    todo = []
    for directory, _directories, files in os.walk(path / "streams/refs"):
        todo += [os.readlink(os.path.join(directory, file)).rsplit("/", 1)[-1] for file in files]
    while todo:
        name = todo.pop()
        if name in walked:
            continue
        walked.add(name)
        digest = object_of(streams[name])
        live.add(digest)
        with open(path / "objects" / fsverity.object_path(digest), "rb") as file:
            stream = splitstream.Splitstream.open(file, fsverity.SHA256)
            live.update(bytes(one) for one in stream.object_refs)
            for one in stream.named_refs.values():
                live.add(one)
                if one in name_of:
                    todo.append(name_of[one])
    everything = {bytes.fromhex(found.parent.name + found.name) for found in (path / "objects").glob("*/*")}
    return everything - live


def needed(path: pathlib.Path) -> dict[str, set[bytes]]:
    """What each tagged image consists of: its documents, its layers with all their files, and its EROFS images with all
    of theirs.
    """
    found: dict[str, set[bytes]] = {}
    with Repository.open(str(path)) as repository:

        def of_stream(digest: bytes) -> set[bytes]:
            with repository.open_object_stream(digest) as stream:
                return {digest, *(bytes(one) for one in stream.object_refs)}

        for tag, digest in repository.tags().items():
            manifest = imagestreams.read(repository, imagestreams.MANIFEST, digest)
            assert manifest, f"{tag} leads to no manifest"
            parts = of_stream(manifest.stream)
            for name, ref in manifest.refs.items():
                if name.startswith(imagestreams.CONFIG_REF):
                    config = imagestreams.read_object(
                        repository, imagestreams.CONFIG, name[len(imagestreams.CONFIG_REF) :], ref
                    )
                    parts |= of_stream(ref)
                    for key, image in config.refs.items():
                        if imagestreams.is_image_ref(key):
                            with ErofsImage(repository.objects.read(image, 1 << 30), repository.algorithm) as opened:
                                parts |= {image, *opened.objects()}
                else:
                    parts |= of_stream(ref)
            found[tag] = parts
    return found


class Killed(BaseException):
    """The process dies here."""


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layers = [layout.layer(FIRST), layout.layer(SECOND)]
    config = layout.config(layers)
    layout.tag(layout.manifest(config, layers), "app")
    layout.tag(layout.manifest(config, [layout.layer(FIRST, "none"), layout.layer(SECOND, "none")]), "twin")
    layout.artifact([("application/x-tar", FIRST)], "artifact")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


OPERATIONS = ("symlink", "rename", "unlink", "link", "mkdir")


def killed_after(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> bool:
    """Whether ``action`` was killed right after its ``number``-th change of a name in the repository, all in this
    process.
    """
    left = [number]

    def deadly(real: Any) -> Any:
        def change(*arguments: Any, **others: Any) -> Any:
            if left[0] <= 0:
                raise Killed  # what is dead does nothing more, cleaning up included
            result = real(*arguments, **others)
            left[0] -= 1
            if not left[0]:
                raise Killed
            return result

        return change

    with monkeypatch.context() as patch:
        for name in OPERATIONS:
            patch.setattr(os, name, deadly(getattr(os, name)))
        try:
            action()
        except (Killed, EngineError):
            # Of a worker process or a thread of the pull it is heard as an error.
            return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize(
    "situation", ["gains an image", "shares its configuration", "replaces an artifact's blob", "moves a tag"]
)
def test_no_instant_of_a_pull_loses_a_tagged_image_to_a_collector(
    tmp_path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch, situation: str
) -> None:
    start = tmp_path / "start"
    create.prepare(str(start), fsverity.SHA256, "disabled")
    tag, name = "app", "app"
    if situation == "gains an image":
        pull_all(start, pull.Request(REGISTRY + "app", "app"), erofs=False)
    elif situation == "shares its configuration":
        pull_all(start, pull.Request(REGISTRY + "app", "app"), pull.Request(REGISTRY + "twin", "twin"), erofs=False)
    elif situation == "replaces an artifact's blob":
        pull_all(start, pull.Request(REGISTRY + "artifact", "artifact"))
    else:
        pull_all(start, pull.Request(REGISTRY + "artifact", "app"))
        world.layout.image([FIRST], "other")
        pull_all(start, pull.Request(REGISTRY + "other", "other"))
    images = set(needed(start))
    for number in range(1, 200):
        path = tmp_path / "repo"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(start, path, symlinks=True)
        dead = killed_after(monkeypatch, number, lambda path=path: pull_all(path, pull.Request(REGISTRY + tag, name)))
        found = needed(path)
        assert set(found) >= images
        lost = collected(path)
        for image, parts in found.items():
            assert not parts & lost, (
                f"killed after step {number}, a collector would take {len(parts & lost)} objects of {image}"
            )
        if not dead:
            assert not list((path / "streams").glob(imagestreams.PENDING + "*"))
            break
        # Whatever is left behind, the next run completes it, also after a collection, and nothing is lost by then
        # either.
        for digest in lost:
            (path / "objects" / fsverity.object_path(digest)).unlink()
        for link in (path / "streams").iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        pull_all(path, pull.Request(REGISTRY + tag, name))
        assert not pull_all(path, pull.Request(REGISTRY + tag, name))[0]["changed"]
        done = needed(path)
        assert set(done) == images | {name}
        assert not any(parts & collected(path) for parts in done.values())
        assert not list((path / "streams").glob(imagestreams.PENDING + "*"))
    else:
        raise AssertionError("the pull never came to its end")
    assert number > 3, "nothing was killed"


def test_the_collector_of_this_test_finds_the_window_that_it_is_about(tmp_path: pathlib.Path, world: World) -> None:
    """Without the care that is taken, in the plain order configuration then manifest, it sees the loss."""
    path = tmp_path / "repo"
    create.prepare(str(path), fsverity.SHA256, "disabled")
    (done,) = pull_all(path, pull.Request(REGISTRY + "app", "app"))
    with Repository.open(str(path), write=True) as repository:
        config = imagestreams.read(repository, imagestreams.CONFIG, done["config_digest"])
        assert config
        refs = {**config.refs, "composefs.image.boot.v1": bytes(32)}
        repository.register(
            imagestreams.CONFIG + done["config_digest"],
            imagestreams.store(repository, imagestreams.CONFIG, config.raw, refs),
        )
    assert needed(path)["app"] & collected(path)


def test_a_fresh_pull_leaves_nothing_for_a_collector(tmp_path: pathlib.Path, world: World) -> None:
    path = tmp_path / "repo"
    create.prepare(str(path), fsverity.SHA256, "disabled")
    pull_all(path, pull.Request(REGISTRY + "app", "app"), pull.Request(REGISTRY + "artifact", "artifact"))
    assert collected(path) == set()
