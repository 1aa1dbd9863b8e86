# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""EROFS images that are made while layers still arrive."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable, Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import processors
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer
from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
from ansible_collections.composefs.oci.plugins.module_utils.pull import feed, makeimages, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(processors, "usable", lambda: 2)
    layout = Layout(tmp_path / "layout")
    layers = [tar(member("usr/", type=DIRECTORY), member(f"usr/{n}", bytes([n]) * 300 * n)) for n in range(1, 5)]
    layout.image(layers, "app")
    return World(layout).install(monkeypatch)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return tmp_path / "repo"


@pytest.fixture
def stored(world: World, path: pathlib.Path) -> Iterator[tuple[Repository, list[tuple[str, bytes]]]]:
    """A repository with an image of several layers, and these."""
    pull_all(path, pull.Request(REGISTRY + "app", "app"))
    with Repository.open(str(path), write=True) as repository:
        streams = sorted(name for name in os.listdir(path / "streams") if name.startswith("oci-layer-"))
        yield repository, [(name, repository.stream(name) or b"") for name in streams]


def test_it_makes_what_is_made_afterwards(stored: tuple[Repository, list[tuple[str, bytes]]]) -> None:
    repository, layers = stored
    digests = [digest for _name, digest in layers]
    ahead = makeimages.Ahead(repository, [(name, None) for name, _digest in layers], [1], [], lambda: None)
    try:
        # Whatever the order in which they arrive.
        for name, digest in reversed(layers):
            ahead.arrived(name, digest)
        assert ahead.images(digests, [1], []) == makeimages.write_images(repository, digests, [1], [])
    finally:
        ahead.close()


def test_what_was_made_of_other_layers_or_in_other_formats_is_not_taken(
    stored: tuple[Repository, list[tuple[str, bytes]]],
) -> None:
    repository, layers = stored
    ahead = makeimages.Ahead(repository, layers, [1], [], lambda: None)
    try:
        assert ahead.images([bytes(32), *(digest for _name, digest in layers[1:])], [1], []) is None
        assert ahead.images([digest for _name, digest in layers], [0], []) is None
    finally:
        ahead.close()


def test_nothing_runs_on_where_a_layer_never_arrives(
    stored: tuple[Repository, list[tuple[str, bytes]]],
) -> None:
    repository, layers = stored
    ahead = makeimages.Ahead(repository, [*layers, ("oci-layer-sha256:" + "0" * 64, None)], [1], [], lambda: None)
    child = ahead._task._child.pid
    ahead.close()
    ahead.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_a_pull_takes_what_was_begun(world: World, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makeimages, "write_images", None)
    (done,) = pull_all(path, pull.Request(REGISTRY + "app", "app"))
    assert done["image_id"]


def tell(repository: Repository, digest: bytes, tap: feed.Tap, count: int | None = None) -> None:
    """Tell a stored layer once more, or only its first ``count`` chunks."""
    writer = splitstream.Writer(repository.algorithm, splitstream.LAYER, tap=tap)
    with repository.open_object_stream(digest, splitstream.LAYER) as stream:
        for chunk in list(stream.chunks())[:count]:
            if isinstance(chunk, bytes):
                writer.inline(chunk)
            else:
                writer.external(chunk.digest, 100)
    list(writer.finish())
    if count is None:
        tap.end()


@pytest.mark.parametrize("count", [None, 0, 1, 2])
def test_a_layer_that_is_told_is_the_layer_that_is_stored(
    stored: tuple[Repository, list[tuple[str, bytes]]], count: int | None
) -> None:
    repository, layers = stored
    digests = [digest for _name, digest in layers]
    wanted = makeimages.write_images(repository, digests, [1], [])
    names = [name for name, _digest in layers]
    with feed.feeds(names) as feeds:
        ahead = makeimages.Ahead(repository, [(name, None) for name in names], [1], [], lambda: None, feeds)
        try:
            for name, digest in layers:
                tell(repository, digest, feed.Tap(feeds[name].writer), count)
            for name, digest in reversed(layers):
                ahead.arrived(name, digest)
            assert ahead.images(digests, [1], []) == wanted
        finally:
            ahead.close()


def test_nothing_is_made_of_a_layer_whose_attempt_failed(
    stored: tuple[Repository, list[tuple[str, bytes]]],
) -> None:
    repository, layers = stored
    digests = [digest for _name, digest in layers]
    name = layers[0][0]
    with feed.feeds([name]) as feeds:
        ahead = makeimages.Ahead(repository, [(name, None), *layers[1:]], [1], [], lambda: None, feeds)
        try:
            tell(repository, digests[1], feed.Tap(feeds[name].writer))  # what the attempt told was another layer
            ahead.lost("oci-layer-sha256:" + "0" * 64)  # another image's
            ahead.lost(name)
            ahead.arrived(name, digests[0])
            assert ahead.images(digests, [1], []) is None
        finally:
            ahead.close()


def test_a_second_attempt_after_other_bytes_gives_the_same_image(
    world: World, path: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # More than one frame of a feed takes, so that some of it is told before the transfer breaks off.
    def many(kind: bytes) -> bytes:
        return tar(*(member(f"{n}", kind + os.urandom(8) + bytes(64)) for n in range(1500)))

    true, other = many(b"true"), many(b"false")
    descriptor = world.layout.layer(true).descriptor
    world.layout.image([true, tar(member("top", b"x" * 100))], "app")
    monkeypatch.setattr(processors, "usable", lambda: 1)  # nothing is made beside the transfer
    (wanted,) = pull_all(path, pull.Request(REGISTRY + "app", "app"))
    monkeypatch.setattr(processors, "usable", lambda: 2)
    create.prepare(str(tmp_path / "other"), fsverity.SHA256, "disabled")
    world.blobs[descriptor["digest"]] = [
        world.layout.read(world.layout.layer(other).descriptor["digest"])[: descriptor["size"] - 2000]
    ]
    lost: list[str] = []
    monkeypatch.setattr(makeimages.Ahead, "lost", record(lost, makeimages.Ahead.lost))
    (found,) = pull_all(tmp_path / "other", pull.Request(REGISTRY + "app", "app"), retries=2)
    assert lost == ["oci-layer-" + world.layout.layer(true).diff_id]
    assert found["image_id"] == wanted["image_id"]


def test_images_that_share_layers_and_a_layer_that_occurs_twice_are_what_they_would_be_alone(
    world: World, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (
        tar(*(member(f"{kind}{n}", os.urandom(100)) for n in range(3000))) for kind in ("a", "b", "c")
    )
    world.layout.image([first, second], "one")
    world.layout.image([first, third, second], "two")
    world.layout.image([second, first, second], "three")
    names = ("one", "two", "three")
    monkeypatch.setattr(processors, "usable", lambda: 3)
    found = pull_all(path, *(pull.Request(REGISTRY + name, name) for name in names))
    with Repository.open(str(path), write=True) as repository:
        for image in found:
            digests = [repository.stream("oci-layer-" + one["diff_id"]) for one in image["layers"]]
            made, _bootable = makeimages.write_images(repository, digests, [1], [])
            assert image["image_id"] == made[1].hex(), image["name"]


def record(calls: list[str], method: Callable[[makeimages.Ahead, str], None]) -> Callable[..., None]:
    """The method, which notes its argument."""

    def noting(self: makeimages.Ahead, stream: str) -> None:
        calls.append(stream)
        method(self, stream)

    return noting


def test_what_is_wrong_with_a_layer_is_told_though_others_arrive_later(world: World, path: pathlib.Path) -> None:
    layers = [tar(member("usr/", type=DIRECTORY), member("usr/x", type=b"1", linkname="usr/missing"))]
    layers += [tar(member(f"usr/{n}", bytes([n]) * 90)) for n in range(1, 4)]
    world.layout.image(layers, "app")
    with pytest.raises(InvalidLayer, match="usr/missing"):
        pull_all(path, pull.Request(REGISTRY + "app", "app"))
