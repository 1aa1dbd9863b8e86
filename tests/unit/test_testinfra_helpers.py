# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The helpers for testinfra that users import (plugins/plugin_utils/composefs_testinfra.py), with this machine as the host."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [
    str(ROOT / "plugins/plugin_utils"),
    str(ROOT / "tests/support"),
    str(ROOT / "tests/unit/plugins/module_utils"),
]

from composefs_testinfra import Repository
from fake_source import REGISTRY, Layout, World, pull_all
from tarbytes import DIRECTORY, member, tar

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository as Engine

BIG = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300_000), member("usr/two", b"2" * 5000))
SMALL = tar(member("usr/three", b"3" * 500))


class Host:
    """The part of a host of testinfra that the helpers use; it counts what is run."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, command: str) -> Any:
        self.runs += 1
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
        return SimpleNamespace(rc=done.returncode, stdout=done.stdout, stderr=done.stderr)

    def file(self, path: str) -> Any:
        return SimpleNamespace(exists=pathlib.Path(path).exists())


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture(params=["sha256", "sha512"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A repository with the images ``team/app`` and ``check``, written by the engine."""
    layout = Layout(tmp_path / "layout")
    layout.image([BIG, SMALL], "app")
    layout.image([SMALL], "small")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    World(layout).install(monkeypatch)
    found = tmp_path / "a repository"
    create.prepare(str(found), fsverity.ALGORITHMS[request.param], "disabled")
    pull_all(found, pull.Request(REGISTRY + "app", "team/app"), pull.Request(REGISTRY + "small", "check"))
    return found


def object_with(path: pathlib.Path, content: bytes) -> pathlib.Path:
    (found,) = [file for file in path.glob("objects/*/*") if file.read_bytes() == content]
    return found


def test_what_is_there_is_told(host: Host, path: pathlib.Path) -> None:
    repository = Repository(host, str(path))
    assert repository.exists and not repository.protected and repository.unfinished == 0
    with Engine.open(str(path)) as engine:
        assert repository.algorithm == engine.algorithm.name
        assert repository.tags == {name: engine.tag_digest(name) for name in ("team/app", "check")}
    assert repository.objects == len(list(path.glob("objects/*/*")))
    assert sorted(name.partition("sha256:")[0] for name in repository.streams) == sorted(
        2 * [imagestreams.MANIFEST.partition("sha256:")[0]]
        + 2 * [imagestreams.CONFIG.partition("sha256:")[0]]
        + 2 * ["oci-layer-"]
    )


def test_an_image_is_told_with_its_digest_and_its_erofs_image(host: Host, path: pathlib.Path) -> None:
    image = Repository(host, str(path)).image("team/app")
    with Engine.open(str(path)) as engine:
        assert image.digest == engine.tag_digest("team/app")
    assert image.image_id and (path / "images" / image.image_id).exists()
    assert image.damaged == [] and image.objects >= 6


def test_who_looked_at_everything_need_not_look_again(host: Host, path: pathlib.Path) -> None:
    one, other = Repository(host, str(path)), Repository(host, str(path))
    assert one.damage() == []
    images = {name: vars(one.image(name)) for name in one.tags}
    assert one.exists and one.objects and one.unfinished == 0 and host.runs == 1
    assert images == {name: vars(other.image(name)) for name in other.tags}


def test_every_kind_of_damage_is_found(host: Host, path: pathlib.Path) -> None:
    changed, short, gone = (
        object_with(path, b"1" * 300_000),
        object_with(path, b"2" * 5000),
        object_with(path, b"3" * 500),
    )
    with open(changed, "r+b") as file:
        file.seek(200_000)
        file.write(b"x")
    with open(short, "r+b") as file:
        file.truncate(0)
    gone.unlink()
    names = [str(file.relative_to(path)) for file in (changed, short, gone)]
    told = {f"{names[0]}: has another content", f"{names[1]}: has another content", f"{names[2]}: missing"}
    repository = Repository(host, str(path))
    assert set(repository.damage()) == set(repository.image("team/app").damaged) == told
    assert repository.fresh().image("check").damaged == [f"{names[2]}: missing"]


def test_a_name_that_leads_nowhere_is_damage(host: Host, path: pathlib.Path) -> None:
    with Engine.open(str(path)) as engine:
        manifest = path / "streams" / (imagestreams.MANIFEST + str(engine.tag_digest("check")))
    manifest.unlink()
    assert any("its manifest is missing" in line for line in Repository(host, str(path)).damage())


def test_what_is_seen_is_remembered_until_fresh(host: Host, path: pathlib.Path) -> None:
    repository = Repository(host, str(path))
    assert repository.damage() == []
    object_with(path, b"3" * 500).unlink()
    assert repository.damage() == [] and len(repository.fresh().damage()) == 1


def test_where_there_is_no_repository_it_is_said(host: Host, tmp_path: pathlib.Path) -> None:
    for place in (tmp_path, tmp_path / "nothing"):
        repository = Repository(host, str(place))
        assert not repository.exists and repository.tags == {}
        assert repository.damage() == [f"{place}: there is no repository"]
        with pytest.raises(AssertionError, match="no image called app, but none at all"):
            repository.image("app")


def test_an_image_that_is_not_there_fails_with_those_that_are(host: Host, path: pathlib.Path) -> None:
    with pytest.raises(AssertionError, match="no image called other, but check, team/app"):
        Repository(host, str(path)).image("other")


def test_nothing_is_mounted_where_nothing_is(host: Host, path: pathlib.Path) -> None:
    assert Repository(host, str(path)).mounted("/proc") is None
    assert Repository(host, str(path)).mounted(str(path)) is None
