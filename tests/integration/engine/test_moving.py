# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A tag that moves while it is looked up: what is stored is what one answer proves, or the task fails."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from movingregistry import MovingRegistry
from ociimage import Layout, architecture
from pulling import names, options, pull_all, pull_one
from tarbytes import small_tree

HERE = f"linux/{architecture()}"


@dataclasses.dataclass
class Minds:
    """Two images and two indexes over an image for this host, all different."""

    layout: Layout
    manifests: tuple[str, str]
    indexes: tuple[str, str]
    members: dict[str, str]

    def meant(self, top: str) -> str:
        """The manifest that ``top`` leads to."""
        return self.members.get(top, top)


@pytest.fixture(scope="module")
def minds(disk: pathlib.Path) -> Minds:
    layout = Layout(disk / "minds")
    first, second = (layout.image([small_tree(seed=seed)], f"m{seed}") for seed in (1, 2))
    indexes = {}
    for seed in (3, 4):
        index, members = layout.multi_platform({HERE: [small_tree(seed=seed)]}, f"i{seed}")
        indexes[index] = members[HERE]
    one, two = list(indexes)
    return Minds(layout, (first, second), (one, two), indexes)


def consistent(minds: Minds, result: dict[str, Any], answers: Sequence[str]) -> None:
    """What is told about an image came from one answer."""
    top = result["index_digest"] or result["registry_digest"]
    assert top in answers
    assert result["digest"] == minds.meant(top)


PAIRS = tuple(itertools.permutations(range(4), 2))


@pytest.mark.parametrize(
    ("pair", "mode"), [*((pair, pull.ALWAYS) for pair in PAIRS), ((0, 1), pull.NEWER), ((2, 3), pull.NEWER)]
)
def test_a_pinned_reference_that_moves_is_stored_as_the_pin_or_not_at_all(
    minds: Minds, repository_path: pathlib.Path, pair: tuple[int, int], mode: str
) -> None:
    every = (*minds.manifests, *minds.indexes)
    first, then = every[pair[0]], every[pair[1]]
    for pin in (first, then):
        for answers in ([first, then], [first, first, then], [first, then, first, then]):
            with MovingRegistry(minds.layout, {"app:v1": answers}) as registry:
                try:
                    result = pull_one(
                        repository_path, registry.reference("app:v1"), chosen=options(policy=mode), digest=pin
                    )
                except errors.UnexpectedDigest:
                    assert pin != first, "the first answer is the pin"
                    continue
            assert pin in (result["registry_digest"], result["index_digest"])
            assert result["digest"] == minds.meant(pin)
            with Repository.open(str(repository_path)) as repository:
                assert repository.tag_digest("image") == minds.meant(pin)
            consistent(minds, result, answers)


@pytest.mark.parametrize("pair", PAIRS)
def test_without_a_pin_the_index_digest_is_proved(
    minds: Minds, repository_path: pathlib.Path, pair: tuple[int, int]
) -> None:
    every = (*minds.manifests, *minds.indexes)
    answers = [every[number] for number in pair]
    with MovingRegistry(minds.layout, {"app:v1": answers}) as registry:
        predicted = pull_one(repository_path, registry.reference("app:v1"), chosen=options(check=True))
    with MovingRegistry(minds.layout, {"app:v1": answers}) as registry:
        done = pull_one(repository_path, registry.reference("app:v1"))
        asked = registry.asked
    for result in (predicted, done):
        consistent(minds, result, answers)
        assert (result["index_digest"] or result["registry_digest"]) == answers[0], "the first answer counts"
    assert asked.count("app:v1") == 1, "the tag is asked once"


def test_check_mode_refuses_a_pin_that_does_not_fit(minds: Minds, repository_path: pathlib.Path) -> None:
    first, then = minds.manifests
    with (
        MovingRegistry(minds.layout, {"app:v1": [first, then]}) as registry,
        pytest.raises(errors.UnexpectedDigest) as caught,
    ):
        pull_one(repository_path, registry.reference("app:v1"), chosen=options(check=True), digest=then)
    assert first in caught.value.message and then in caught.value.message
    assert names(repository_path) == set()


def test_several_images_of_one_moving_tag_are_each_of_one_answer(minds: Minds, repository_path: pathlib.Path) -> None:
    answers = [minds.indexes[0], minds.manifests[0], minds.indexes[1], minds.manifests[1]]
    with MovingRegistry(minds.layout, {"app:v1": answers, "other:v1": answers[::-1]}) as registry:
        requests = [
            pull.Request(registry.reference("app:v1"), "a"),
            pull.Request(registry.reference("app:v1"), "b"),
            pull.Request(registry.reference("other:v1"), "c"),
        ]
        results = pull_all(repository_path, requests)
        for result in results:
            consistent(minds, result, answers)
        assert [result["index_digest"] or result["digest"] for result in results] == [*answers[:2], answers[-1]]
    with MovingRegistry(minds.layout, {"app:v1": answers}) as registry:
        pinned = [pull.Request(registry.reference("app:v1"), name, digest=answers[0]) for name in "xy"]
        with pytest.raises(errors.UnexpectedDigest):
            pull_all(repository_path, pinned)
    with Repository.open(str(repository_path)) as repository:
        assert sorted(repository.tags()) == ["a", "b", "c"]


@pytest.mark.parametrize("what", ["manifest", "index", "member"])
def test_another_document_under_a_digest_is_corruption(minds: Minds, repository_path: pathlib.Path, what: str) -> None:
    index = minds.indexes[0]
    asked, lie = {
        "manifest": (minds.manifests[0], {minds.manifests[0]: minds.layout.read(minds.manifests[1])}),
        "index": (index, {index: minds.layout.read(minds.indexes[1])}),
        "member": (index, {minds.members[index]: minds.layout.read(minds.manifests[1])}),
    }[what]
    with MovingRegistry(minds.layout, {"app:v1": [asked]}, lie) as registry, pytest.raises(errors.DigestMismatch):
        pull_one(repository_path, registry.reference("app") + "@" + asked)
    assert names(repository_path) == set()


# ---- an index in an index --------------------------------------------------------------------------------------------


def nested(layout: Layout, depth: int, name: str) -> tuple[str, str]:
    """An image for this host under ``depth`` indexes; the digests of the outermost and of the manifest."""
    layer = layout.layer(small_tree(seed=9))
    platform = dict(zip(("os", "architecture"), HERE.split("/")))
    entry = layout.manifest(layout.config([layer]), [layer], platform=platform)
    manifest = entry["digest"]
    for _level in range(depth):
        entry = layout.index([entry])
    return layout.tag(entry, name), manifest


@pytest.mark.parametrize("depth", [2, 4])
def test_an_index_in_an_index_is_walked_and_the_outermost_told(
    disk: pathlib.Path, repository_path: pathlib.Path, each_skopeo: str, depth: int
) -> None:
    layout = Layout(disk / f"nested-{depth}")
    outer, manifest = nested(layout, depth, "n")
    with MovingRegistry(layout, {"app:v1": [outer]}) as registry:
        result = pull_one(repository_path, registry.reference("app:v1"), chosen=options(each_skopeo), digest=outer)
    assert (result["digest"], result["index_digest"]) == (manifest, outer)


def test_indexes_nested_without_end_are_refused(disk: pathlib.Path, repository_path: pathlib.Path) -> None:
    layout = Layout(disk / "nested-too-deep")
    outer, _manifest = nested(layout, 5, "n")
    with MovingRegistry(layout, {"app:v1": [outer]}) as registry, pytest.raises(errors.InvalidDocument, match="deep"):
        pull_one(repository_path, registry.reference("app:v1"))


# ---- which platform an image is for ----------------------------------------------------------------------------------


def test_the_index_decides_and_a_contradiction_is_a_warning(disk: pathlib.Path, repository_path: pathlib.Path) -> None:
    layout = Layout(disk / "contradiction")
    layer = layout.layer(small_tree(seed=5))
    config = layout.config([layer], architecture="amd64")
    entry = layout.manifest(config, [layer], platform={"os": "linux", "architecture": "arm64"})
    with MovingRegistry(layout, {"app:v1": [layout.tag(layout.index([entry]), "x")]}) as registry:
        result = pull_one(repository_path, registry.reference("app:v1"), platform="linux/arm64")
    assert result["digest"] == entry["digest"]
    (warning,) = [one for one in result["warnings"] if "index" in one]
    assert "linux/arm64" in warning and "linux/amd64" in warning


def test_v7_takes_v6_and_prefers_v7(disk: pathlib.Path, repository_path: pathlib.Path) -> None:
    layout = Layout(disk / "variants")
    six, _members = layout.multi_platform({"linux/arm/v6": [small_tree(seed=6)]}, "six")
    both, members = layout.multi_platform(
        {"linux/arm/v6": [small_tree(seed=6)], "linux/arm/v7": [small_tree(seed=7)]}, "both"
    )
    with MovingRegistry(layout, {"app:six": [six], "app:both": [both]}) as registry:
        got = pull_one(repository_path, registry.reference("app:six"), platform="linux/arm/v7")
        assert got["digest"] == members["linux/arm/v6"] and not got["warnings"]
        got = pull_one(repository_path, registry.reference("app:both"), platform="linux/arm/v7")
        assert got["digest"] == members["linux/arm/v7"]
        with pytest.raises(errors.PlatformNotFound, match="linux/arm/v6, linux/arm/v7"):
            pull_one(repository_path, registry.reference("app:both"), platform="linux/arm/v5")


def test_a_foreign_single_image_is_a_warning_and_refused_if_a_platform_was_asked_for(
    disk: pathlib.Path, repository_path: pathlib.Path
) -> None:
    layout = Layout(disk / "foreign")
    digest = layout.image([small_tree(seed=8)], "x", architecture="s390x")
    with MovingRegistry(layout, {"app:v1": [digest]}) as registry:
        result = pull_one(repository_path, registry.reference("app:v1"))
        assert any("linux/s390x" in warning and HERE in warning for warning in result["warnings"])
        with pytest.raises(errors.PlatformNotFound):
            pull_one(repository_path, registry.reference("app:v1"), "other", platform=HERE)
