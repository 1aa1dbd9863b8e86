# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One repository, two writers: whatever this collection and cfsctl do in turn or at once, both find all of it whole."""

from __future__ import annotations

import json
import os
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pulling import options, pull_one

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing, prune
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout
from tarbytes import small_tree

Cfsctl = Callable[..., str]
TAGS = ("one", "two", "three")
NAMES = ("app", "web", "x/y:1", "docker://a.example/z:2")


@pytest.fixture(scope="session")
def shared(disk: pathlib.Path) -> Layout:
    """Three images that share their first layer."""
    layout = Layout(disk / "interoperation")
    base = small_tree(files=30, seed=11)
    for seed, tag in enumerate(TAGS, 12):
        layout.image([base, small_tree(files=12, seed=seed, prefix=f"usr/share/{tag}")], tag)
    return layout


class Ours:
    """What this collection does."""

    def __init__(self, path: pathlib.Path, layout: Layout) -> None:
        self.path, self.layout = path, layout

    def pull(self, tag: str, name: str) -> None:
        pull_one(self.path, f"oci:{self.layout.path}:{tag}", name)

    def untag(self, name: str) -> None:
        with Repository.open(str(self.path), write=True) as repository:
            repository.untag(name)

    def tag(self, digest: str, name: str) -> None:
        with Repository.open(str(self.path), write=True) as repository:
            repository.tag(name, digest)

    def collect(self) -> None:
        with Repository.open(str(self.path)) as repository:
            prune.prune(repository, prune.Wish(timeout=30.0), Progress(), False)

    def listed(self) -> dict[str, str]:
        with Repository.open(str(self.path)) as repository:
            images, warnings = listing.list_images(repository)
        assert warnings == []
        return {name: image["digest"] for image in images for name in image["names"]}


class Theirs:
    """What cfsctl does."""

    def __init__(self, path: pathlib.Path, layout: Layout, cfsctl: Cfsctl) -> None:
        self.path, self.layout, self.cfsctl = path, layout, cfsctl

    def pull(self, tag: str, name: str) -> None:
        self.cfsctl("--repo", self.path, "oci", "pull", f"oci:{self.layout.path}:{tag}", name)

    def untag(self, name: str) -> None:
        self.cfsctl("--repo", self.path, "oci", "untag", name)

    def tag(self, digest: str, name: str) -> None:
        self.cfsctl("--repo", self.path, "oci", "tag", digest, name)

    def collect(self) -> None:
        self.cfsctl("--repo", self.path, "gc")

    def listed(self) -> dict[str, str]:
        answer = json.loads(self.cfsctl("--repo", self.path, "oci", "images", "--json"))
        rows = answer["images"] if isinstance(answer, dict) else answer
        return {row["name"]: row.get("manifest_digest") or row["digest"] for row in rows}


def whole(path: pathlib.Path, cfsctl: Cfsctl) -> None:
    """Both checks of cfsctl are content."""
    assert not re.search(r"corrupt|error", cfsctl("--repo", path, "fsck").replace("errors=0", ""), re.IGNORECASE)
    cfsctl("--repo", path, "oci", "fsck")


@pytest.mark.parametrize("seed", range(3))
def test_writers_that_take_turns_find_each_others_work_whole(
    seed: int, shared: Layout, repository_path: pathlib.Path, cfsctl: Cfsctl
) -> None:
    chance = random.Random(seed)
    writers: tuple[Any, ...] = (Ours(repository_path, shared), Theirs(repository_path, shared, cfsctl))
    expected: dict[str, str] = {}
    told = []
    for _step in range(14):
        writer = chance.choice(writers)
        verb = chance.choice(("pull", "pull", "pull", "tag", "untag", "collect"))
        told.append((type(writer).__name__, verb))
        if verb == "pull" or not expected:
            tag, name = chance.choice(TAGS), chance.choice(NAMES)
            writer.pull(tag, name)
            expected[name] = writers[0].listed()[name]
        elif verb == "tag":
            name = chance.choice(NAMES)
            expected[name] = chance.choice(sorted(expected.values()))
            writer.tag(expected[name], name)
        elif verb == "untag":
            name = chance.choice(sorted(expected))
            writer.untag(name)
            del expected[name]
        else:
            writer.collect()
        for reader in writers:
            assert reader.listed() == expected, (type(reader).__name__, told)
        whole(repository_path, cfsctl)
    for name in expected:
        # A second pull of what is there changes nothing, whoever stored it.
        digests = {tag: digest for tag, digest in _digests(shared).items() if digest == expected[name]}
        assert not pull_one(repository_path, f"oci:{shared.path}:{next(iter(digests))}", name)["changed"], told


def test_either_inspects_what_the_other_pulled(shared: Layout, repository_path: pathlib.Path, cfsctl: Cfsctl) -> None:
    writers: tuple[Any, ...] = (Ours(repository_path, shared), Theirs(repository_path, shared, cfsctl))
    for writer, tag in zip(writers, TAGS):
        writer.pull(tag, tag)
        said = json.loads(cfsctl("--repo", repository_path, "oci", "inspect", tag))
        with Repository.open(str(repository_path)) as repository:
            (image,) = listing.list_images(repository, tag)[0]
        assert said["manifest"] == shared.read(image["digest"]).decode()


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_a_repository_of_earlier_times_is_brought_up_to_date_in_place_and_used_by_both(
    first: str, shared: Layout, repository_path: pathlib.Path, cfsctl: Cfsctl
) -> None:
    """No ``meta.json``, and images that have no EROFS image yet."""
    ours, theirs = Ours(repository_path, shared), Theirs(repository_path, shared, cfsctl)
    for tag in TAGS:
        pull_one(repository_path, f"oci:{shared.path}:{tag}", tag, options(erofs=False))
    expected = ours.listed()
    (repository_path / "meta.json").unlink()
    done = create.prepare(str(repository_path), fsverity.SHA256, create.DISABLED)
    assert done.upgraded and ours.listed() == theirs.listed() == expected
    (ours if first == "ours" else theirs).pull("one", "one")
    with Repository.open(str(repository_path)) as repository:
        images = {one["names"][0]: one["image_id"] for one in listing.list_images(repository)[0]}
    assert images["one"] and not images["two"]
    for writer in (theirs, ours):
        writer.collect()
        whole(repository_path, cfsctl)
        assert ours.listed() == theirs.listed() == expected
    if first == "ours":
        return
    assert not pull_one(repository_path, f"oci:{shared.path}:one", "one")["changed"]


def _digests(layout: Layout) -> dict[str, str]:
    index = json.loads((layout.path / "index.json").read_text())
    return {entry["annotations"]["org.opencontainers.image.ref.name"]: entry["digest"] for entry in index["manifests"]}


def test_writers_at_once_do_not_harm_each_other(shared: Layout, repository_path: pathlib.Path, cfsctl: Cfsctl) -> None:
    """Both pull and remove names at once, for some seconds, each under names of its own."""
    ours, theirs = Ours(repository_path, shared), Theirs(repository_path, shared, cfsctl)
    end = time.monotonic() + 8
    failures: list[BaseException] = []

    def work(writer: Any, prefix: str) -> None:
        chance = random.Random(prefix)
        try:
            while time.monotonic() < end:
                name = f"{prefix}-{chance.randrange(3)}"
                writer.pull(chance.choice(TAGS), name)
                if chance.random() < 0.3:
                    writer.untag(name)
        except BaseException as error:
            failures.append(error)

    threads = [
        threading.Thread(target=work, args=(theirs, "theirs")),
        # Engine errors of ours are not made up by a second copy in the same process: it runs in another one.
        threading.Thread(target=_run_ours, args=(shared, repository_path, end, failures)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    whole(repository_path, cfsctl)
    assert ours.listed() == theirs.listed()


def _run_ours(layout: Layout, path: pathlib.Path, end: float, failures: list[BaseException]) -> None:
    script = f"""
import pathlib, random, sys, time
sys.path[:0] = {[str(pathlib.Path(__file__).parent), *sys.path]!r}
import conftest, test_interoperation
class Here:
    path = pathlib.Path({str(layout.path)!r})
ours = test_interoperation.Ours(pathlib.Path({str(path)!r}), Here)
chance, end = random.Random(1), time.monotonic() + {end - time.monotonic()!r}
while time.monotonic() < end:
    name = f"ours-{{chance.randrange(3)}}"
    ours.pull(chance.choice(test_interoperation.TAGS), name)
    if chance.random() < 0.3:
        ours.untag(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    if done.returncode:
        failures.append(AssertionError(done.stderr[-2000:]))
