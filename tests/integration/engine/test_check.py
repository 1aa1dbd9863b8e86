# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Checks and repairs of repositories that we and the reference implementation wrote, with a real registry as source."""

from __future__ import annotations

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from typing import Any

import pytest
from conftest import ROOT
from ociimage import Layout
from pulling import options, pull_one
from registry import Registry

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, prune, repair
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import create, graph
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

Cfsctl = Callable[..., str]
LEVELS = (check.QUICK, check.OBJECTS, check.FULL)


def findings(path: pathlib.Path, level: str = check.FULL) -> list[tuple[str, str]]:
    with Repository.open(str(path)) as repository:
        report = check.check(repository, check.Wish(level), Progress())
    return [(one.code, one.object or one.path) for one in report.findings]


def mend(path: pathlib.Path, source: pathlib.Path | None = None) -> repair.Result:
    with Repository.open(str(path)) as repository:
        means = repair.Means(str(source) if source else None, options())
        return repair.repair(repository, check.Wish(check.FULL), means, Progress())


def complaints(cfsctl: Cfsctl, path: pathlib.Path) -> str:
    """What both checkers of cfsctl have to say; empty if nothing."""
    said = cfsctl("--repo", path, "fsck", check=False) + cfsctl("--repo", path, "oci", "fsck", check=False)
    return "" if said.count("status: ok") == 2 else said


@pytest.fixture(params=["sha256", "sha512"])
def filled(
    request: pytest.FixtureRequest,
    place: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    images: Layout,
    registry: Registry,
    cfsctl: Cfsctl,
    skopeo: str,
) -> pathlib.Path:
    """A repository with an image that we pulled from a registry, and one that cfsctl pulled."""
    path = new_repository(place / "repository", request.param)
    pull_one(path, registry.push(f"{images.path}:gzip", "life:app"), "app")
    cfsctl("--repo", path, "oci", "pull", f"oci:{images.path}:platforms", "theirs")
    return path


def test_what_either_of_us_wrote_is_whole(filled: pathlib.Path, cfsctl: Cfsctl) -> None:
    for level in LEVELS:
        assert findings(filled, level) == []
    assert complaints(cfsctl, filled) == ""


def reached(path: pathlib.Path, name: str) -> list[bytes]:
    with Repository.open(str(path)) as repository:
        found = graph.Graph.read(repository)
        return sorted(found.reaches(next(root for root in found.roots if root.name == name)))


def test_every_object_is_missed_and_brought_back(filled: pathlib.Path, cfsctl: Cfsctl) -> None:
    """Whichever object of an image is lost or rots: found, mended, and both checkers are content again."""
    wanted = reached(filled, "app")
    for number, digest in enumerate(wanted[:: max(1, len(wanted) // 12)]):
        victim = filled / "objects" / fsverity.object_path(digest)
        if number % 2:
            victim.unlink()
        else:
            raw = bytearray(victim.read_bytes())
            raw[len(raw) // 2] ^= 4
            victim.write_bytes(raw)
        assert digest.hex() in [what for _code, what in findings(filled)]
        result = mend(filled)
        assert result.findings == [] and result.changed, (digest.hex(), result)
        assert complaints(cfsctl, filled) == ""


def test_a_poisoned_layer_of_cfsctl_is_found_and_replaced(filled: pathlib.Path, images: Layout, cfsctl: Cfsctl) -> None:
    with Repository.open(str(filled), write=True) as repository:
        name = repository.streams("oci-layer-")[0]
        repository.unregister(name)
    cfsctl("--repo", filled, "oci", "import-layer", name[len("oci-layer-") :], stdin=bytes(1024), check=False)
    if not os.path.lexists(filled / "streams" / name):
        pytest.skip("this cfsctl does not import layers that way")
    assert complaints(cfsctl, filled) == "", "cfsctl does not notice"
    assert "layer_poisoned" in {code for code, _what in findings(filled)}


def test_another_repository_of_the_host_is_a_source(filled: pathlib.Path, place: pathlib.Path, cfsctl: Cfsctl) -> None:
    other = place / "other"
    subprocess.run(["cp", "-a", str(filled), str(other)], check=True)
    for digest in reached(filled, "theirs")[:5]:
        (filled / "objects" / fsverity.object_path(digest)).unlink()
    result = mend(filled, other)
    assert result.findings == [] and {one.how for one in result.repaired} == {"copied"}
    assert complaints(cfsctl, filled) == ""


@pytest.mark.parametrize("packed", ["w", "w:gz"])
def test_an_archive_is_a_source_for_whatever_image_of_it_is_damaged(
    filled: pathlib.Path, images: Layout, place: pathlib.Path, cfsctl: Cfsctl, packed: Any
) -> None:
    archive = place / "images.tar"
    with tarfile.open(archive, packed) as file:
        file.add(images.path, ".")
    for name in ("app", "theirs"):
        for digest in reached(filled, name)[:5]:
            (filled / "objects" / fsverity.object_path(digest)).unlink(missing_ok=True)
        result = mend(filled, archive)
        assert result.findings == [] and result.complaints == []
        assert "fetched" in {one.how for one in result.repaired}
        assert complaints(cfsctl, filled) == ""


def table() -> dict[str, set[str]]:
    """Which codes of ours cover each kind of finding of cfsctl, as the guide has it."""
    page = (ROOT / "docs/docsite/rst/living.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^   \* - ``([a-z_]+)``\n((?:     .*\n)+)", page, re.MULTILINE)
    found: dict[str, set[str]] = {}
    for code, rest in rows:
        for kind in re.findall(r"``([a-z-]+)``", rest.rpartition("     - ")[2]):
            found.setdefault(kind, set()).add(code)
    return found


def test_the_guide_says_what_covers_each_finding_of_cfsctl(
    filled: pathlib.Path, place: pathlib.Path, cfsctl: Cfsctl
) -> None:
    """One thing broken for nearly every kind of finding that cfsctl knows."""
    covers = table()
    assert "object-digest-mismatch" in covers
    with Repository.open(str(filled)) as repository:
        found = graph.Graph.read(repository)
        manifest = next(name for name in found.streams if name.startswith("oci-manifest-"))
        layer = next(name for name in found.streams if name.startswith("oci-layer-"))
        config = next(name for name in found.streams if name.startswith("oci-config-"))
        image, erofs = next(iter(found.images.items()))
        file = max(
            found.reaches(found.roots[0]),
            key=lambda one: (filled / "objects" / fsverity.object_path(one)).stat().st_size,
        )

    def objects(path: pathlib.Path, digest: bytes) -> pathlib.Path:
        return path / "objects" / fsverity.object_path(graph.ObjectDigest(digest))

    def cut(path: pathlib.Path) -> None:
        path.write_bytes(path.read_bytes()[:10])

    breaks: dict[str, Callable[[pathlib.Path], object]] = {
        "a stream that is no link": lambda path: (path / "streams/stray").write_text("x"),
        "a file among the names": lambda path: (path / "streams/refs/stray").write_text("x"),
        "a file among the objects": lambda path: (
            (path / "objects/00").mkdir(exist_ok=True) or (path / "objects/00/stray").write_text("x")
        ),
        "a link to nothing": lambda path: (path / "streams/nothing").symlink_to("../objects/00/00"),
        "a name for nothing": lambda path: (path / "streams/refs/oci/nothing").symlink_to(
            "../../oci-manifest-sha256:0"
        ),
        "a lost file": lambda path: objects(path, file).unlink(),
        "an altered file": lambda path: objects(path, file).write_bytes(b"altered"),
        "a lost layer": lambda path: objects(path, found.streams[layer]).unlink(),
        "a cut layer": lambda path: cut(objects(path, found.streams[layer])),
        "a cut manifest": lambda path: cut(objects(path, found.streams[manifest])),
        "a cut configuration": lambda path: cut(objects(path, found.streams[config])),
        "a layer without its name": lambda path: (path / "streams" / layer).unlink(),
        "a lost image": lambda path: objects(path, erofs).unlink(),
        "a cut image": lambda path: cut(objects(path, erofs)),
        "a manifest that is another": lambda path: (
            (path / "streams" / manifest).unlink()
            or (path / "streams" / manifest).symlink_to(os.readlink(path / "streams" / config))
        ),
    }
    assert image
    seen = set()
    wrong = []
    for number, (what, break_it) in enumerate(breaks.items()):
        copy = place / f"kind{number}"
        subprocess.run(["cp", "-a", str(filled), str(copy)], check=True)
        break_it(copy)
        said = complaints(cfsctl, copy)
        kinds = set(re.findall(r"fsck: ([a-z-]+):", said))
        ours = {code for code, _object in findings(copy)}
        assert ours, what
        assert kinds <= set(covers), what
        for kind in kinds:
            if not ours & covers[kind]:
                wrong.append((what, kind, sorted(ours)))
        seen |= kinds
        shutil.rmtree(copy)
    assert wrong == [] and len(seen) >= 12, (wrong, seen)


def test_what_cfsctl_finds_we_find(filled: pathlib.Path, place: pathlib.Path, cfsctl: Cfsctl) -> None:
    """At random, one thing broken at a time."""
    chance = random.Random(7)
    choices = [one for one in filled.rglob("*") if one.is_symlink() or (one.is_file() and "objects" in one.parts)]
    choices = [one for one in choices if ".composefs-oci" not in one.parts]
    for number, victim in enumerate(chance.sample(sorted(choices), 24)):
        copy = place / f"copy{number}"
        subprocess.run(["cp", "-a", str(filled), str(copy)], check=True)
        broken = copy / victim.relative_to(filled)
        how = chance.choice(["remove", "replace", "flip"])
        if how == "remove" or (broken.is_symlink() and how == "flip"):
            broken.unlink()
        elif how == "replace" or not broken.stat().st_size:
            broken.unlink()
            broken.write_bytes(b"something else")
        else:
            raw = bytearray(broken.read_bytes())
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
            broken.write_bytes(raw)
        theirs = complaints(cfsctl, copy)
        ours = findings(copy)
        assert ours or not theirs, (how, str(victim), theirs)
        shutil.rmtree(copy)


@pytest.mark.parametrize("name", ["cfsctl", "older", "collection"])
def test_repositories_of_earlier_times_pass_and_keep_their_images(
    name: str, place: pathlib.Path, cfsctl: Cfsctl
) -> None:
    with tarfile.open(ROOT / f"extensions/molecule/upgrade/files/{name}.tgz") as archive:
        archive.extractall(place, filter="fully_trusted")
    (path,) = [one.parent for one in place.rglob("objects")]
    if not (path / "meta.json").exists():
        create.prepare(str(path), fsverity.SHA512, create.DISABLED)
    for level in LEVELS:
        assert findings(path, level) == []
    with Repository.open(str(path)) as repository:
        prune.prune(repository, prune.Wish(), Progress())
        assert repository.tags()
    assert findings(path) == [] and complaints(cfsctl, path) == ""


def test_a_name_of_early_2026_keeps_its_image_and_is_told(
    place: pathlib.Path, new_repository: Callable[..., pathlib.Path], images: Layout, skopeo: str
) -> None:
    """Then a configuration kept its document inline, there were no manifests, and the name led to nowhere."""
    from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
    from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams

    path = new_repository(place / "seed", "sha256")
    pulled = pull_one(path, f"oci:{images.path}:gzip", "app")
    digest = pulled["config_digest"]
    with Repository.open(str(path), write=True) as repository:
        config = imagestreams.read(repository, imagestreams.CONFIG, digest)
        assert config
        layers = {key: one for key, one in config.refs.items() if not imagestreams.is_image_ref(key)}
        writer = splitstream.Writer(repository.algorithm, splitstream.CONFIG)
        writer.inline(config.raw)
        for key, one in layers.items():
            writer.named_ref(key, one)
        repository.register(imagestreams.CONFIG + digest, repository.objects.put_pieces(writer.finish()))
        repository.unregister(imagestreams.MANIFEST + pulled["digest"])
        repository.untag("app")
        os.symlink(f"../{digest}", path / "streams/refs/app")
        result = prune.prune(repository, prune.Wish(), Progress())
        assert [(one.code, one.path) for one in result.problems] == [("dangling_reference", "streams/refs/app")]
        for one in layers.values():
            with repository.open_object_stream(one) as stream:
                assert all(repository.objects.verify(digest) for digest in stream.object_refs)
    codes = {code for code, _what in findings(path)}
    assert codes == {"dangling_reference", "document_damaged"}
    # A pull replaces what it left.
    pull_one(path, f"oci:{images.path}:gzip", "app")
    assert {code for code, _what in findings(path)} == {"dangling_reference"}


KILLED = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from pulling import options
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, prune, repair
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
with Repository.open(sys.argv[3]) as repository:
    print("begun", flush=True)
    if sys.argv[2] == "prune":
        prune.prune(repository, prune.Wish(remove=["theirs"]), Progress())
    else:
        repair.repair(repository, check.Wish(check.FULL), repair.Means(None, options()), Progress())
"""


@pytest.mark.parametrize("verb", ["prune", "repair"])
def test_killed_at_any_instant_the_next_run_finishes(
    verb: str, filled: pathlib.Path, place: pathlib.Path, cfsctl: Cfsctl
) -> None:
    chance = random.Random(verb)
    wanted = reached(filled, "app")
    for number in range(int(os.environ.get("COMPOSEFS_OCI_KILLS", "6"))):
        copy = place / f"copy{number}"
        subprocess.run(["cp", "-a", str(filled), str(copy)], check=True)
        if verb == "repair":
            for digest in chance.sample(wanted, 3):
                (copy / "objects" / fsverity.object_path(digest)).unlink()
        command = [sys.executable, "-c", KILLED, str(pathlib.Path(__file__).parent), verb, str(copy)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout and child.stdout.readline() == b"begun\n"
            time.sleep(chance.random() * (0.15 if verb == "prune" else 1.5))
            child.send_signal(signal.SIGKILL)
        if verb == "prune":
            assert findings(copy) == []
            with Repository.open(str(copy)) as repository:
                prune.prune(repository, prune.Wish(remove=["theirs"], timeout=30), Progress())
                assert list(repository.tags()) == ["app"]
            assert not list((copy / "streams").glob(".symlink-*"))
        else:
            assert mend(copy).findings == []
        assert findings(copy) == [] and complaints(cfsctl, copy) == ""
        shutil.rmtree(copy)
