# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is broken is mended, from the nearest place that has what it takes, and said object by object."""

from __future__ import annotations

import os
import pathlib
import sys
import tarfile
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import World, settings
from filled_repository import (
    BREAKS,
    TAGS,
    Break,
    Repo,
    copy_of,
    fill,
    lost_document,
    lost_file,
    lost_image,
    lost_layer,
    make_layout,
    rotten_file,
    rotten_image,
    wrong_image,
)

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing, prune, repair
from ansible_collections.composefs.oci.plugins.module_utils.operations.check import FULL, Wish
from ansible_collections.composefs.oci.plugins.module_utils.operations.keepers import Keeper
from ansible_collections.composefs.oci.plugins.module_utils.operations.repair import Means, Result
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import makeimages
from ansible_collections.composefs.oci.plugins.module_utils.store import graph
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

# What nobody can mend: it is only told.
HOPELESS = {"stray_file", "dangling_reference", "invalid_name", "bad_link"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """To be copied."""
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    return base / "repo"


@pytest.fixture
def world(filled: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    from ociimage import Layout

    monkeypatch.setattr(processes, "call", lambda what, function, **_more: function())
    return World(Layout(filled.parent / "layout")).install(monkeypatch)


@pytest.fixture
def repo(filled: pathlib.Path, tmp_path: pathlib.Path) -> Repo:
    return Repo(copy_of(filled, tmp_path / "repo"))


def run(
    repo: Repo, *, foretell: bool = False, source: pathlib.Path | None = None, need: list[Keeper] | None = None
) -> Result:
    with Repository.open(str(repo.path)) as repository:
        means = Means(str(source) if source else None, settings())
        return repair.repair(repository, Wish(FULL, (), 1), means, Progress(), foretell, lambda _one: list(need or []))


def everything(path: pathlib.Path) -> set[tuple[str, str]]:
    return {
        (str(one.relative_to(path)), os.readlink(one) if one.is_symlink() else one.read_bytes().hex())
        for one in path.rglob("*")
        if (one.is_symlink() or one.is_file()) and "checks" not in one.parts
    }


@pytest.mark.parametrize(
    ("code", "breaks", "level", "names"), BREAKS, ids=lambda value: getattr(value, "__name__", None)
)
def test_what_is_broken_is_whole_again(
    repo: Repo, world: World, code: str, breaks: Break, level: str, names: list[str]
) -> None:
    what = breaks(repo)
    before = everything(repo.path)
    foretold = run(repo, foretell=True)
    assert everything(repo.path) == before
    result = run(repo)
    left = {one.code for one in result.findings}
    assert left <= HOPELESS, (left, result.complaints)
    if code in HOPELESS and code == left.pop() if left else False:
        return
    told = [one for one in result.repaired if what in (one.object, one.path)]
    assert told and all(one.message and one.how for one in told), result
    assert {one.object for one in foretold.repaired} >= {one.object for one in told}
    again = run(repo)
    assert not again.repaired and [one.code for one in again.findings] == [one.code for one in result.findings]
    with Repository.open(str(repo.path)) as repository:
        assert set(repository.tags()) >= set(TAGS)


@pytest.mark.parametrize("breaks", [lost_image, rotten_image, wrong_image], ids=lambda one: one.__name__)
def test_what_is_here_is_not_fetched(repo: Repo, world: World, breaks: Break) -> None:
    breaks(repo)
    assert {one.how for one in run(repo).repaired} == {"rebuilt"} and world.requests == []


def test_streams_of_documents_are_made_anew_of_what_is_here(repo: Repo, world: World) -> None:
    for digest in (repo.manifest("a"), repo.config("b")):
        repo.flip(digest)
    result = run(repo)
    assert result.findings == [] and world.requests == [] and {one.how for one in result.repaired} == {"rebuilt"}


def images_of(repo: Repo) -> dict[str, str | None]:
    """The EROFS image of each name."""
    with Repository.open(str(repo.path)) as repository:
        return {
            name: listing.describe_image(repository, manifest)["image_id"]
            for name, manifest in repository.tags().items()
        }


@pytest.mark.parametrize("breaks", [lost_image, rotten_image, wrong_image], ids=lambda one: one.__name__)
def test_a_repair_that_is_interrupted_is_finished_by_the_next(
    repo: Repo, world: World, breaks: Break, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = images_of(repo)
    breaks(repo)

    def killed(*_anything: object, **_more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(makeimages, "write_images", killed)
        run(repo)
    result = run(repo)
    assert result.repaired and result.findings == [], result.complaints
    assert images_of(repo) == before and world.requests == []


@pytest.mark.parametrize("breaks", [lost_file, rotten_file, lost_layer, lost_document], ids=lambda one: one.__name__)
def test_only_the_layer_with_the_damaged_object_is_fetched(repo: Repo, world: World, breaks: Break) -> None:
    breaks(repo)
    result = run(repo)
    assert result.findings == [] and "fetched" in {one.how for one in result.repaired}
    blobs = [digest for kind, digest in world.requests if kind == "blob"]
    assert len(blobs) <= 1


@pytest.mark.parametrize("breaks", [lost_file, rotten_file, lost_layer], ids=lambda one: one.__name__)
def test_another_repository_serves_as_a_source(
    repo: Repo, world: World, filled: pathlib.Path, breaks: Break, tmp_path: pathlib.Path
) -> None:
    what = breaks(repo)
    other = copy_of(filled, tmp_path / "other")
    result = run(repo, source=other)
    assert result.findings == [] and world.requests == []
    assert [(one.object, one.how) for one in result.repaired] == [(what, "copied")]


def test_a_source_that_is_damaged_in_the_same_place_is_not_believed(
    repo: Repo, world: World, filled: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rotten_file(repo)
    other = Repo(copy_of(filled, tmp_path / "other"))
    rotten_file(other)
    assert {one.how for one in run(repo, source=other.path).repaired} == {"fetched"}


def test_the_damaged_object_is_kept_until_the_repository_is_pruned(repo: Repo, world: World) -> None:
    what = rotten_file(repo)
    rotten = repo.object(bytes.fromhex(what)).read_bytes()
    run(repo)
    aside = list((repo.path / ".composefs-oci/damaged").iterdir())
    assert [one.read_bytes() for one in aside] == [rotten]
    assert repo.object(bytes.fromhex(what)).read_bytes() != rotten
    with Repository.open(str(repo.path)) as repository:
        pruned = prune.prune(repository, prune.Wish(), Progress(), look=lambda _one: [])
    assert pruned.bytes_by_kind["damaged"] == len(rotten) and not list((repo.path / ".composefs-oci/damaged").iterdir())


def test_what_cannot_be_had_is_set_aside_and_told(repo: Repo, world: World) -> None:
    what = rotten_file(repo)
    world.layout = make_layout(repo.path.parent / "empty-layout")
    (repo.path.parent / "empty-layout/index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    result = run(repo)
    assert [(one.code, one.object) for one in result.findings] == [("object_missing", what)]
    assert result.complaints and not repo.object(bytes.fromhex(what)).exists()


def test_what_is_mounted_is_not_pulled_from_under_its_users(repo: Repo, world: World) -> None:
    what = rotten_file(repo)
    need = [Keeper("mount", "/srv/b", frozenset([repo.image().hex()]))]
    world.layout = make_layout(repo.path.parent / "empty-layout")
    (repo.path.parent / "empty-layout/index.json").write_text('{"schemaVersion": 2, "manifests": []}')
    result = run(repo, need=need)
    assert [(one.code, one.object) for one in result.findings if one.object == what][:1] == [("object_damaged", what)]
    assert repo.object(bytes.fromhex(what)).exists() and any("mounted" in one for one in result.complaints)


def test_an_open_file_keeps_its_content_and_the_name_never_vanishes(repo: Repo, world: World) -> None:
    what = bytes.fromhex(rotten_file(repo))
    with open(repo.object(what), "rb") as file:
        run(repo, need=[Keeper("mount", "/srv/b", frozenset([repo.image().hex()]))])
        assert file.read() != repo.object(what).read_bytes()


def test_nothing_is_told_of_a_whole_repository(repo: Repo, world: World) -> None:
    before = everything(repo.path)
    result = run(repo)
    assert not result.changed and result.findings == [] and everything(repo.path) == before


def test_a_stream_that_no_image_needs_and_that_lacks_something_is_not_left_to_the_next_pull(
    repo: Repo, world: World
) -> None:
    with repo.open() as repository:
        repository.untag("artifact")
        stream = next(
            one
            for one in (repository.stream(name) for name in repository.streams("oci-layer-"))
            if one and not any(one in found for found in reached(repository))
        )
        with repository.open_object_stream(stream) as opened:
            lost = opened.object_refs[0]
    repo.object(lost).unlink()
    repo.object(stream).unlink()
    result = run(repo)
    assert result.findings == [] and world.requests == []
    assert {one.how for one in result.repaired} == {"set_aside"}


def reached(repository: Repository) -> list[set[bytes]]:
    found = graph.Graph.read(repository)
    return [found.reaches(root) for root in found.roots]


def test_a_layout_is_a_source_for_the_images_in_it(repo: Repo, filled: pathlib.Path) -> None:
    layout = str(filled.parent / "layout")
    with repo.open() as repository:
        digests = {name: repository.tag_digest(name) or "" for name in TAGS}
        for name, digest in digests.items():
            source = repair._Source(repository, Means(layout))
            assert source.reference(repository, name, digest) == f"oci:{layout}:{name}"
            assert source.reference(repository, name, "sha256:" + "0" * 64) is None


@pytest.mark.parametrize("written", ["{}", "oci-archive:{}", "oci-archive:{}:a"])
@pytest.mark.parametrize("packed", ["w", "w:gz"])
def test_an_archive_is_a_source_for_all_the_images_in_it(
    repo: Repo, filled: pathlib.Path, tmp_path: pathlib.Path, packed: Any, written: str
) -> None:
    archive = tmp_path / "images.tar"
    with tarfile.open(archive, packed) as file:
        file.add(filled.parent / "layout", ".")
    with repo.open() as repository:
        source = repair._Source(repository, Means(written.format(archive)))
        for name in TAGS:
            digest = repository.tag_digest(name) or ""
            assert source.reference(repository, name, digest) == f"oci-archive:{archive}:{name}"
        assert source.reference(repository, name, "sha256:" + "0" * 64) is None


def test_what_is_neither_repository_nor_layout_is_no_source(repo: Repo, tmp_path: pathlib.Path) -> None:
    (tmp_path / "text").write_text("no archive")
    (tmp_path / "layout").mkdir()
    (tmp_path / "layout/oci-layout").write_text("{}")
    (tmp_path / "layout/index.json").write_text("[]")
    for name, error in (("text", "invalid"), ("layout", "repository_damaged"), ("none", "not_a_repository")):
        with repo.open() as repository, pytest.raises(EngineError) as raised:
            repair._Source(repository, Means(str(tmp_path / name)))
        assert raised.value.code.startswith(error), raised.value.code
