# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever is broken in a repository is found, under its code, with the names that it concerns."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import re
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from filled_repository import (
    BREAKS,
    Break,
    Repo,
    copy_of,
    dangling,
    directory_for_object,
    fill,
    image_without_name,
    layer_without_name,
    lost_file,
    lost_image,
    make_layout,
    rotten_file,
    rotten_image,
    sha256,
    stray,
    tree,
    wrong_image,
)

from ansible_collections.composefs.oci.plugins.module_utils.errors import OF_THIS_PROCESS, ImageNotFound
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, checkobjects, keepers
from ansible_collections.composefs.oci.plugins.module_utils.operations.check import FULL, OBJECTS, QUICK, Report, Wish
from ansible_collections.composefs.oci.plugins.module_utils.operations import findings as all_findings
from ansible_collections.composefs.oci.plugins.module_utils.operations.findings import Finding
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import makeimages
from ansible_collections.composefs.oci.plugins.module_utils.store import checks, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.graph import Problem
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


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
        (dangling, "source"),
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


def test_objects_of_every_length_are_read_to_their_end(repo: Repo) -> None:
    """Also those that are longer than what is read at once, and those that end with it."""
    piece = checkobjects._PIECE
    lengths = [0, 1, 4095, 4096, 4097, piece - 1, piece, piece + 1, 2 * piece, 3 * piece + 4096, 3 * piece + 5000]
    with Repository.open(str(repo.path), write=True) as repository:
        digests = [repository.objects.put(os.urandom(length)) for length in lengths]
        holes = b"x" * 5 + bytes(piece - 5) + bytes(5 * piece + 10) + b"y" * 4096
        digests.append(repository.objects.put(holes))
    sparse = repo.object(digests[-1])
    sparse.unlink()
    with sparse.open("wb") as file:
        file.write(b"x" * 5)
        file.seek(len(holes) - 4096)
        file.write(b"y" * 4096)
    assert sparse.stat().st_blocks * 512 < len(holes)
    report = run(repo, OBJECTS)
    assert report.findings == []
    assert report.checked["bytes"] == sum(one.stat().st_size for one in (repo.path / "objects").glob("??/*"))
    for digest in digests[1:]:
        path = repo.object(digest)
        with path.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    assert sorted(short(run(repo, OBJECTS).findings)) == sorted(("object_damaged", one.hex()) for one in digests[1:])


def test_objects_are_read_while_names_and_streams_are_looked_at(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    real = checkobjects._check_directory

    def reading(*arguments: Any) -> None:
        os.write(writer, b"x")
        real(*arguments)

    def nodes(self: Any) -> Any:
        assert select.select([reader], [], [], 60)[0], "nobody reads yet"
        return listed(self)

    listed = check._Check._nodes
    monkeypatch.setattr(checkobjects, "_check_directory", reading)
    monkeypatch.setattr(check._Check, "_nodes", nodes)
    repo.flip(repo.file("a0"))
    try:
        assert short(run(repo, OBJECTS, parallel=2).findings) == [("object_damaged", repo.file("a0").hex())]
    finally:
        os.close(reader)
        os.close(writer)


def test_an_object_that_cannot_be_read_is_told_and_the_rest_is_checked(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = repo.object(repo.file()).stat().st_ino

    def failing(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(fd: int, *arguments: Any) -> Any:
            if os.fstat(fd).st_ino == victim:
                raise OSError(5, "Input/output error")
            return real(fd, *arguments)

        return read

    for call in ("readv", "preadv"):
        monkeypatch.setattr(os, call, failing(getattr(os, call)))
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


def test_the_guide_lists_every_code() -> None:
    page = (pathlib.Path(__file__).parents[5] / "docs/docsite/rst/living.rst").read_text(encoding="utf-8")
    listed = set(re.findall(r"^   \* - ``([a-z_]+)``$", page, re.MULTILINE))
    codes = {value for name, value in vars(all_findings).items() if name.isupper() and isinstance(value, str)}
    assert listed == codes - {all_findings.LOCAL, all_findings.SOURCE, all_findings.NO}


def test_a_mount_of_what_is_lost_is_told(repo: Repo) -> None:
    image = repo.image().hex()
    mounted = keepers.Keeper(keepers.MOUNT, "mount at /srv/app", images=frozenset([image]))

    def found() -> list[Finding]:
        with Repository.open(str(repo.path)) as repository:
            return check.check(repository, Wish(FULL), Progress(), lambda _repository: [mounted]).findings

    assert found() == []
    lost_image(repo)
    (lost,) = [one for one in found() if one.code == "mount_lost"]
    assert lost.object == image and "/srv/app" in lost.message and lost.repairable == "no"


@pytest.mark.parametrize("calls", range(4))
def test_a_replacement_of_documents_that_was_cut_off_is_no_finding(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """At every instant of one: what leads to a configuration leads to one that has a name."""
    left = iter(range(calls))

    def register(self: Repository, *words: Any) -> bool:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return bool(real(self, *words))

    with repo.open() as repository:
        digest = repository.tag_digest("b") or ""
        manifest = imagestreams.read(repository, imagestreams.MANIFEST, digest)
        assert manifest is not None
        (key,) = [key for key in manifest.refs if key.startswith(imagestreams.CONFIG_REF)]
        of_config = key[len(imagestreams.CONFIG_REF) :]
        config = imagestreams.read(repository, imagestreams.CONFIG, of_config)
        assert config is not None
        # The same configuration, but for the EROFS image.
        refs = {name: one for name, one in config.refs.items() if not imagestreams.is_image_ref(name)}
        stream = imagestreams.store(repository, imagestreams.CONFIG, config.raw, refs)
        leading = imagestreams.store(repository, imagestreams.MANIFEST, manifest.raw, {**manifest.refs, key: stream})
        real = Repository.register
        monkeypatch.setattr(Repository, "register", register)
        with contextlib.suppress(KeyboardInterrupt):
            imagestreams.replace(repository, of_config, stream, {digest: leading})
    assert run(repo, FULL).findings == []


def test_names_that_move_while_they_are_listed_are_no_finding(repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where another pull replaces a configuration, or brings an image, between the reading of two names."""
    listed = check.Graph.read

    def read(*words: Any, **more: Any) -> Any:
        graph = listed(*words, **more)
        for name in [one for one in graph.streams if one.startswith((imagestreams.CONFIG, imagestreams.LAYER))]:
            del graph.streams[name]
        # Names that somebody gave after the streams were listed; one of them is gone again.
        for name in ("streams/refs/oci/a", "streams/refs/oci/gone"):
            graph.problems.append(Problem("dangling_reference", name))
        return graph

    monkeypatch.setattr(check.Graph, "read", read)
    assert run(repo, FULL).findings == []


def test_while_others_are_there_it_is_looked_again_before_a_name_is_missed(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = f"streams/oci-layer-{sha256(tree('b'))}"
    target = os.readlink(repo.path / layer)
    (repo.path / layer).unlink()
    others = [1, 1, 0]
    monkeypatch.setattr(check.locks, "holders", lambda _fd: [1] * (others.pop(0) if others else 0))
    monkeypatch.setattr(check, "_PAUSE", 0.0)
    assert [one.path for one in run(repo, FULL).findings] == [layer] and others == []
    others += [1, 1, 1]
    monkeypatch.setattr(check.time, "sleep", lambda _seconds: os.symlink(target, repo.path / layer))
    assert run(repo, FULL).findings == [] and others == [1, 1]


def test_an_object_that_the_kernel_does_not_give_back_ends_no_full_check(
    repo: Repo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where fs-verity refuses what a disk has made of it: the other levels tell of it, and the layers go on."""

    def refuse(*_words: Any) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(check.proofs, "tar_sha256", refuse)
    assert run(repo, FULL).findings == []


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("step", ["proofs.tar_sha256", "makeimages.build_tree"])
def test_a_process_that_cannot_look_has_proved_nothing(
    repo: Repo, monkeypatch: pytest.MonkeyPatch, number: int, step: str
) -> None:
    """Taken for damage that was found elsewhere, it would be a full check without findings."""

    def fail(*_words: Any) -> str:
        raise OSError(number, os.strerror(number))

    module, _dot, name = step.partition(".")
    monkeypatch.setattr({"proofs": check.proofs, "makeimages": makeimages}[module], name, fail)
    with pytest.raises(OF_THIS_PROCESS):
        run(repo, FULL)
