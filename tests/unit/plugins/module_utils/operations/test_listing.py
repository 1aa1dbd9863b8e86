# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of the images in a repository."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull, results
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.errors import FormatError, ImageNotFound, MissingLibrary
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([FIRST], "app", labels={"a": "1"}, variant="v8")
    layout.artifact([("text/plain", b"an artifact " * 30)], "artifact")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


@pytest.fixture
def path(tmp_path: pathlib.Path, world: World) -> pathlib.Path:
    """``app`` has two names, and there is an artifact."""
    found = tmp_path / "repo"
    create.prepare(str(found), fsverity.SHA256, "disabled")
    pull_all(
        found,
        *(pull.Request(REGISTRY + tag, name) for tag, name in (("app", "z/app:1"), ("app", "b"), ("artifact", "m"))),
    )
    return found


def listed(path: pathlib.Path, **which: str) -> tuple[list[dict[str, Any]], list[str]]:
    with Repository.open(str(path)) as repository:
        return listing.list_images(repository, **which)


def test_one_entry_a_manifest_sorted_by_its_first_name(path: pathlib.Path) -> None:
    found, complaints = listed(path)
    assert [image["names"] for image in found] == [["b", "z/app:1"], ["m"]] and complaints == []


def test_a_container_is_described(path: pathlib.Path, world: World) -> None:
    ((image,), _complaints) = listed(path, name="b")
    raw = world.layout.read(image["digest"])
    manifest = json.loads(raw)
    assert (
        image["kind"] == "container" and image["artifact_type"] is None and image["media_type"] == manifest["mediaType"]
    )
    assert image["config_digest"] == manifest["config"]["digest"]
    assert (
        image["labels"] == {"a": "1"}
        and image["platform"].count("/") == 2
        and image["platform"].startswith("linux/")
        and image["platform"].endswith("/v8")
    )
    assert image["created"] and image["size"] == manifest["layers"][0]["size"] == image["layers"][0]["size"]
    assert image["image_ids"] == {"composefs.image.v1": image["image_id"]} and image["boot_image_id"] is None
    assert os.path.exists(path / "images" / image["image_id"])


def test_an_artifact_is_described(path: pathlib.Path) -> None:
    ((image,), _complaints) = listed(path, name="m")
    assert image["kind"] == "artifact" and image["artifact_type"] == "application/x-test"
    assert image["layers"][0]["diff_id"] is None and image["layers"][0]["media_type"] == "text/plain"
    assert [image[key] for key in ("platform", "os", "architecture", "created", "image_id")] == [None] * 5 and image[
        "labels"
    ] == {}


def test_a_container_that_names_no_platform_has_none(path: pathlib.Path, world: World) -> None:
    world.layout.image([FIRST], "nowhere", os="", architecture="")
    pull_all(path, pull.Request(REGISTRY + "nowhere", "n"))
    ((image,), _complaints) = listed(path, name="n")
    assert image["kind"] == "container"
    assert [image[key] for key in ("platform", "os", "architecture")] == [None] * 3


def test_by_name_and_by_digest(path: pathlib.Path) -> None:
    ((image,), _complaints) = listed(path, name="z/app:1")
    assert listed(path, digest=image["digest"])[0] == [image] == listed(path, name="b")[0]
    assert listed(path, name="never") == ([], []) == listed(path, digest="sha256:" + "0" * 64)


def test_by_digest_also_without_a_name(path: pathlib.Path) -> None:
    ((image,), _complaints) = listed(path, name="m")
    with Repository.open(str(path), write=True) as repository:
        repository.untag("m")
    ((again,), complaints) = listed(path, digest=image["digest"])
    assert again == {**image, "names": [], "ref": None, "records": {}} and complaints == []
    assert [one["names"] for one in listed(path)[0]] == [["b", "z/app:1"]]


def test_where_names_come_from_is_told(path: pathlib.Path) -> None:
    with Repository.open(str(path), write=True) as repository:
        repository.tag("by another program", repository.tag_digest("b") or "")
    ((image,), _complaints) = listed(path, name="b")
    assert image["ref"] == REGISTRY + "app" and set(image["records"]) == {"b", "z/app:1"}
    told = image["records"]["b"]
    assert told["ref"] == REGISTRY + "app" and told["manifest"] == told["registry_digest"] == image["digest"]
    assert told["since"].endswith("Z") and told["index_digest"] is None


@pytest.mark.parametrize("gone", ["manifest", "configuration's object", "manifest's object"])
def test_an_image_that_cannot_be_read_is_a_complaint_and_the_others_are_told(path: pathlib.Path, gone: str) -> None:
    ((image,), _complaints) = listed(path, name="b")
    with Repository.open(str(path)) as repository:
        if gone == "manifest":
            victim = path / "streams" / (imagestreams.MANIFEST + image["digest"])
        else:
            kind, digest = (
                (imagestreams.MANIFEST, image["digest"])
                if "manifest" in gone
                else (imagestreams.CONFIG, image["config_digest"])
            )
            document = imagestreams.read(repository, kind, digest)
            assert document
            victim = path / "objects" / fsverity.object_path(fsverity.digest(document.raw, repository.algorithm))
    victim.unlink()
    found, complaints = listed(path)
    assert [one["names"] for one in found] == [["m"]]
    assert (
        len(complaints) == 1
        and complaints[0].startswith("b, z/app:1: ")
        and "Pull the image" in complaints[0]
        or "pull the image" in complaints[0]
    )


def test_one_image_that_is_not_there_is_an_error_of_its_own(path: pathlib.Path) -> None:
    with Repository.open(str(path)) as repository:
        with pytest.raises(ImageNotFound):
            listing.describe_image(repository, "sha256:" + "0" * 64)
        ((image,), _complaints) = listing.list_images(repository, name="m")
        raw = imagestreams.read(repository, imagestreams.MANIFEST, image["digest"])
    assert raw
    with Repository.open(str(path), write=True) as repository:
        repository.register(
            imagestreams.MANIFEST + image["digest"], imagestreams.store(repository, imagestreams.MANIFEST, raw.raw, {})
        )
        with pytest.raises(FormatError, match="does not lead to its configuration"):
            listing.describe_image(repository, image["digest"])


def test_a_configuration_that_lost_its_name_is_still_read(path: pathlib.Path) -> None:
    """The manifest leads to it by its digest, as for cfsctl."""
    ((image,), _complaints) = listed(path, name="b")
    (path / "streams" / (imagestreams.CONFIG + image["config_digest"])).unlink()
    assert listed(path, name="b") == ([image], [])


def test_the_lack_of_a_library_is_no_fault_of_the_images(path: pathlib.Path, hide_zstd: Any) -> None:
    hide_zstd()
    with pytest.raises(MissingLibrary, match=r"composefs\.oci\.skopeo"):
        listed(path)


def test_reading_changes_nothing_and_needs_no_right_to_write(path: pathlib.Path) -> None:
    before = {str(one): one.lstat().st_mtime_ns for one in path.rglob("*")}
    for one in [path, *path.rglob("*")]:
        if not one.is_symlink():
            one.chmod(0o555 if one.is_dir() else 0o444)
    try:
        assert len(listed(path)[0]) == 2
    finally:
        for one in [path, *path.rglob("*")]:
            if one.is_dir() and not one.is_symlink():
                one.chmod(0o755)
    assert {str(one): one.lstat().st_mtime_ns for one in path.rglob("*")} == before


def test_an_empty_repository_holds_nothing(tmp_path: pathlib.Path) -> None:
    create.prepare(str(tmp_path / "empty"), fsverity.SHA256, "disabled")
    assert listed(tmp_path / "empty") == ([], [])


@pytest.mark.parametrize("labels", [{"a": "ü" * 100_000, "b": "x"}, {f"k{n}": "v" * 1000 for n in range(200)}])
def test_labels_and_annotations_are_cut_and_that_is_said(
    tmp_path: pathlib.Path, world: World, labels: dict[str, str]
) -> None:
    world.layout.image([FIRST], "long", labels=labels)
    create.prepare(str(tmp_path / "r"), fsverity.SHA256, "disabled")
    pull_all(tmp_path / "r", pull.Request(REGISTRY + "long", "long"))
    ((image,), complaints) = listed(tmp_path / "r")
    assert image["truncated"] == ["labels"] and complaints == []
    size = sum(len((key + value).encode()) for key, value in image["labels"].items())
    assert 60 * 1024 < size <= results.TEXTS_LIMIT
    assert all(labels[key].startswith(value) for key, value in image["labels"].items())
