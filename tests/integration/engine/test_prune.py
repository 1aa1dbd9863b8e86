# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pruning, beside the reference implementation and under real mounts."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator

import pytest
from conftest import ROOT, needed
from pulling import pull_one

from ansible_collections.composefs.oci.plugins.module_utils.errors import VerityUnsupported
from ansible_collections.composefs.oci.plugins.module_utils.operations import prune
from ansible_collections.composefs.oci.plugins.module_utils.operations.mounting import (
    Wish as MountWish,
    ensure_mounted,
    ensure_unmounted,
)
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import graph
from ansible_collections.composefs.oci.plugins.module_utils.store.create import REQUIRED, prepare
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout

Cfsctl = Callable[..., str]


def run(path: pathlib.Path, check: bool = False, **wish: object) -> prune.Pruned:
    with Repository.open(str(path)) as repository:
        return prune.prune(repository, prune.Wish(**{"timeout": 5.0, **wish}), Progress(), check)  # type: ignore[arg-type]


def objects(path: pathlib.Path) -> set[str]:
    return {f"{one.parent.name}/{one.name}" for one in (path / "objects").glob("??/*")}


def links(path: pathlib.Path) -> set[str]:
    found = set()
    for kind in ("streams", "images"):
        for directory, _folders, files in os.walk(path / kind):
            found |= {os.path.relpath(os.path.join(directory, file), path) for file in files}
    return found


def both_ways(path: pathlib.Path, cfsctl: Cfsctl) -> prune.Pruned:
    """Prune one copy with us and one with cfsctl: the same must go. The result of ours, done on ``path``."""
    copy = path.with_name(path.name + "-copy")
    subprocess.run(["cp", "-a", str(path), str(copy)], check=True)
    try:
        foretold = run(path, check=True)
        told = re.search(r"Objects: (\d+) removed \((\d+) bytes\)", cfsctl("--repo", copy, "gc"))
        result = run(path)
        assert result == foretold
        assert told and (result.objects, result.bytes) == (int(told[1]), int(told[2]))
        assert objects(path) == objects(copy) and links(path) == links(copy)
    finally:
        shutil.rmtree(copy)
    assert "status: ok" in cfsctl("--repo", path, "fsck")
    return result


@pytest.fixture(params=["sha256", "sha512"])
def filled(
    request: pytest.FixtureRequest,
    place: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    images: Layout,
    cfsctl: Cfsctl,
    skopeo: str,
) -> pathlib.Path:
    """A repository in which we and cfsctl have pulled by turns."""
    path = new_repository(place / "repository", request.param)
    pull_one(path, f"oci:{images.path}:gzip", "ours")
    cfsctl("--repo", path, "oci", "pull", f"oci:{images.path}:zstd", "theirs")
    pull_one(path, f"oci:{images.path}:artifact", "artifact")
    cfsctl("--repo", path, "oci", "pull", f"oci:{images.path}:none", "plain")
    pull_one(path, f"oci:{images.path}:platforms", "platform")
    return path


def test_the_same_goes_as_with_cfsctl_whoever_removed_which_name(filled: pathlib.Path, cfsctl: Cfsctl) -> None:
    # cfsctl leaves the streams from before it named the EROFS images.
    assert both_ways(filled, cfsctl).objects > 0
    for name in ("ours", "artifact", "plain", "platform", "theirs"):
        with Repository.open(str(filled), write=True) as repository:
            repository.untag(name)
        result = both_ways(filled, cfsctl)
        assert not run(filled, check=True).changed and (result.changed or name in ("ours", "plain"))
    assert objects(filled) == set()


def test_a_name_that_leads_to_an_image_keeps_it_as_with_cfsctl(filled: pathlib.Path, cfsctl: Cfsctl) -> None:
    with Repository.open(str(filled), write=True) as repository:
        found = graph.Graph.read(repository)
        image = sorted(found.images)[0]
        os.makedirs(filled / "images/refs/deep")
        os.symlink(f"../../{image}", filled / "images/refs/deep/kept")
        for name in repository.tags():
            repository.untag(name)
    both_ways(filled, cfsctl)
    assert {link for link in links(filled) if link.startswith("images/")} == {
        f"images/{image}",
        "images/refs/deep/kept",
    }


def test_after_an_interrupted_pull_of_cfsctl_we_lose_nothing(
    place: pathlib.Path, new_repository: Callable[..., pathlib.Path], images: Layout, cfsctl: Cfsctl
) -> None:
    """cfsctl moves the configuration before the manifest. Cut off in between, its own gc loses the configuration's
    document; ours follows the manifest by object.
    """
    path = new_repository(place / "repository")
    digest = pull_one(path, f"oci:{images.path}:gzip", "image")["digest"]
    with Repository.open(str(path), write=True) as repository:
        config = repository.streams("oci-config-")[0]
        layer = repository.stream(repository.streams("oci-layer-")[0])
        assert layer
        # The name leads to another object, as in that instant.
        repository.register(config, layer)
    run(path)
    with Repository.open(str(path)) as repository:
        found = graph.Graph.read(repository, prove=True)
        (root,) = found.roots
        assert root.name == "image" and all(repository.objects.verify(one) for one in found.reaches(root))
    assert digest


@pytest.fixture
def mounted(filled: pathlib.Path, place: pathlib.Path) -> Iterator[pathlib.Path]:
    if os.geteuid():
        pytest.skip("mounting needs root")
    target = place / "target"
    with Repository.open(str(filled)) as repository:
        ensure_mounted(repository, MountWish("ours", str(target)))
    yield target
    ensure_unmounted(str(target))


def test_what_is_mounted_is_kept_and_can_be_read(filled: pathlib.Path, mounted: pathlib.Path) -> None:
    result = run(filled, remove=["*"])
    assert "ours" in result.held and "artifact" in result.names
    with Repository.open(str(filled), write=True) as repository:
        repository.untag("ours")
    run(filled)
    read = [path.read_bytes() for path in mounted.rglob("*") if path.is_file() and not path.is_symlink()]
    assert any(read) and objects(filled)
    ensure_unmounted(str(mounted))
    run(filled, remove=["*"])
    assert objects(filled) == set()


def test_what_is_mounted_in_another_namespace_is_kept(filled: pathlib.Path, place: pathlib.Path) -> None:
    if os.geteuid():
        pytest.skip("mounting needs root")
    needed("unshare", "util-linux")
    target = place / "elsewhere"
    with Repository.open(str(filled)) as repository:
        ensure_mounted(repository, MountWish("ours", str(target)))
    try:
        with subprocess.Popen(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo ok; read x"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout and other.stdout.readline() == b"ok\n"
            ensure_unmounted(str(target))
            assert "ours" in run(filled, remove=["*"]).held
            other.communicate(b"\n")
    finally:
        ensure_unmounted(str(target))
    assert "ours" in run(filled, remove=["*"]).names


def test_in_a_secure_repository_the_same_goes_as_with_cfsctl(
    small_fs: Callable[..., pathlib.Path], images: Layout, cfsctl: Cfsctl, skopeo: str
) -> None:
    path = small_fs("64M", "verity") / "repository"
    try:
        prepare(str(path), fsverity.SHA512, REQUIRED)
    except VerityUnsupported as error:
        pytest.skip(str(error))
    pull_one(path, f"oci:{images.path}:gzip", "ours")
    cfsctl("--repo", path, "oci", "pull", f"oci:{images.path}:artifact", "theirs")
    with Repository.open(str(path), write=True) as repository:
        repository.untag("ours")
    # cp would lose the seals, so only the numbers are compared.
    told = re.search(r"Objects: (\d+) removed \((\d+) bytes\)", cfsctl("--repo", path, "gc", "--dry-run"))
    result = run(path)
    assert told and (result.objects, result.bytes) == (int(told[1]), int(told[2]))
    assert "status: ok" in cfsctl("--repo", path, "fsck") and "status: ok" in cfsctl("--repo", path, "oci", "fsck")


def test_repositories_of_earlier_times_lose_nothing_that_has_a_name(place: pathlib.Path) -> None:
    from ansible_collections.composefs.oci.plugins.module_utils.store import create

    for name in ("cfsctl", "older", "collection"):
        with tarfile.open(ROOT / f"extensions/molecule/upgrade/files/{name}.tgz") as archive:
            archive.extractall(place / name, filter="fully_trusted")
        (path,) = [one.parent for one in (place / name).rglob("objects")]
        if not (path / "meta.json").exists():
            create.prepare(str(path), fsverity.SHA512, create.DISABLED)
        with Repository.open(str(path)) as repository:
            found = graph.Graph.read(repository)
            live = {fsverity.object_path(one) for root in found.roots for one in found.reaches(root)}
        assert live
        run(path)
        assert objects(path) == live
