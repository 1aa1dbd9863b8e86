# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""EROFS images that are made while layers still arrive."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import processors
from ansible_collections.composefs.oci.plugins.module_utils.pull import makeimages, pull
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
