# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Deltas between real tools: through a registry and a directory, made here and applied by cfsctl, made by tar-diff and
applied here.
"""

from __future__ import annotations

import json
import os
import pathlib
import random
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from ociimage import Layout, sha256
from pulling import layer_tar, options, pull_one
from registry import Registry
from tarbytes import DIRECTORY, SYMLINK, member, tar

from ansible_collections.composefs.oci.plugins.module_utils.errors import ImageNotFound
from ansible_collections.composefs.oci.plugins.module_utils.formats import ocidocuments, tardiff
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing, makedelta
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import deltas
from ansible_collections.composefs.oci.plugins.module_utils.source import push
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

dice = random.Random(4)
BASE = tar(member("etc/", type=DIRECTORY), member("etc/base", dice.randbytes(3000)))
PROGRAM = dice.randbytes(3_000_000)
OLD = tar(
    member("usr/", type=DIRECTORY),
    member("usr/program", PROGRAM),
    *(member(f"usr/data{number}", dice.randbytes(3000 + number)) for number in range(50)),
    member("usr/link", type=SYMLINK, linkname=b"program"),
    member("usr/tiny", b"tiny"),
)
dice = random.Random(4)
dice.randbytes(3000)
dice.randbytes(3_000_000)
NEW = tar(
    member("usr/", type=DIRECTORY),
    member("usr/program", PROGRAM[:1_000_000] + b"security fix" + PROGRAM[1_000_000:]),
    *(member(f"usr/moved{number}", dice.randbytes(3000 + number)) for number in range(50)),
    member("usr/tiny", b"tinier"),
)
SKOPEO = ProxyOptions(tls_verify=False)


@pytest.fixture(scope="module")
def layout(disk: pathlib.Path) -> Layout:
    layout = Layout(disk / "delta-images")
    layout.image([BASE, OLD], "old")
    layout.image([BASE, NEW], "new")
    return layout


class Seed:
    """A repository that pulled both images from the registry, and makes their delta."""

    def __init__(self, path: pathlib.Path, ref: Callable[[str], str]) -> None:
        self.path = path
        for tag in ("old", "new"):
            pull_one(path, ref(tag), tag)

    def publish(self, dest: str = "") -> tuple[str, makedelta.Made]:
        with Repository.open(str(self.path)) as repository:
            old, new = makedelta.find(repository, "old"), makedelta.find(repository, "new")
            place = parse_reference(dest) if dest else makedelta.beside(repository, ("old", "new"), old, new)
            assert makedelta.there(SKOPEO, place, old, new, Progress()) is None
            made = makedelta.publish(repository, old, new, place, SKOPEO, 12, Progress())
            again = makedelta.there(SKOPEO, place, old, new, Progress())
            assert again is not None and again == made
            return place.text, made


@pytest.fixture
def pushed(registry: Registry, layout: Layout, place: pathlib.Path) -> Callable[[str], str]:
    """Both images in a repository of the registry that no other test uses; their references by tag."""
    name = f"delta-{place.name.lower()}".replace("_", "-").strip("-")
    for tag in ("old", "new"):
        registry.push(f"{layout.path}:{tag}", f"{name}:{tag}")
    return lambda tag: registry.reference(f"{name}:{tag}")


@pytest.fixture
def seed(place: pathlib.Path, pushed: Callable[[str], str], new_repository: Callable[..., pathlib.Path]) -> Seed:
    return Seed(new_repository(place / "seed"), pushed)


def image_id(path: pathlib.Path, name: str) -> str:
    with Repository.open(str(path)) as repository:
        images, complaints = listing.list_images(repository, name)
        assert complaints == []
        return str(images[0]["image_id"])


def test_a_host_finds_the_delta_beside_the_image(
    seed: Seed, pushed: Callable[[str], str], repository_path: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    where, made = seed.publish()
    assert where == pushed("new").rpartition(":")[0] + ":" + where.rpartition(":")[2]
    pull_one(repository_path, pushed("old"), "app")
    told = pull_one(repository_path, pushed("new"), "app", options(deltas=("auto",), check=True))
    done = pull_one(repository_path, pushed("new"), "app", options(deltas=("auto",)))
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == [None, "delta"]
    size = made.layers[0]["bytes"]
    assert told["stats"]["bytes_fetched"] == done["stats"]["bytes_fetched"] == size < 20_000
    assert layer_tar(repository_path, sha256(NEW)) == NEW
    assert image_id(repository_path, "app") == image_id(seed.path, "new")
    cfsctl("--repo", repository_path, "fsck")
    cfsctl("--repo", repository_path, "oci", "fsck")


def test_a_delta_that_was_deleted_meanwhile_costs_a_warning(
    seed: Seed, pushed: Callable[[str], str], registry: Registry, repository_path: pathlib.Path
) -> None:
    _where, made = seed.publish()
    pull_one(repository_path, pushed("old"), "app")
    diff = json.loads(made.manifest)["layers"][2]["digest"]
    registry.blob_file(diff).unlink()
    done = pull_one(repository_path, pushed("new"), "app", options(deltas=("auto",)))
    assert [layer["source"] for layer in done["layers"]] == [None, "registry"] and len(done["warnings"]) == 1
    assert layer_tar(repository_path, sha256(NEW)) == NEW


def test_a_policy_that_rejects_the_delta_is_no_delta(
    seed: Seed, pushed: Callable[[str], str], place: pathlib.Path, repository_path: pathlib.Path, newer_skopeo: str
) -> None:
    where, _made = seed.publish()
    pull_one(repository_path, pushed("old"), "app")
    policy = place / "policy.json"
    accept, reject = [{"type": "insecureAcceptAnything"}], [{"type": "reject"}]
    scopes = {where.partition("://")[2]: reject, "": accept}
    policy.write_text(json.dumps({"default": accept, "transports": {"docker": scopes}}))
    chosen = options(newer_skopeo, deltas=("auto",), proxy={"policy": str(policy)})
    done = pull_one(repository_path, pushed("new"), "app", chosen)
    assert done["layers"][1]["source"] == "registry" and done["warnings"] == []
    assert layer_tar(repository_path, sha256(NEW)) == NEW


@pytest.mark.parametrize("transport", ["oci", "oci-archive"])
def test_a_delta_travels_on_a_stick(
    seed: Seed, pushed: Callable[[str], str], place: pathlib.Path, repository_path: pathlib.Path, transport: str
) -> None:
    where, made = seed.publish(f"{transport}:{place}/stick:update")
    assert where == f"{transport}:{place}/stick:update"
    pull_one(repository_path, pushed("old"), "app")
    done = pull_one(repository_path, pushed("new"), "app", options(deltas=(where,)))
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == [None, "delta"]
    assert done["stats"]["bytes_fetched"] == made.layers[0]["bytes"]


def test_cfsctl_applies_what_is_made_here(
    seed: Seed, layout: Layout, place: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    where, _made = seed.publish(f"oci:{place}/delta:update")
    theirs = place / "theirs"
    cfsctl("--repo", theirs, "init", "--insecure", "--algorithm", "fsverity-sha256-12")
    cfsctl("--repo", theirs, "oci", "pull", f"oci:{layout.path}:old", "old")
    cfsctl("--repo", theirs, "oci", "pull", where.rpartition(":")[0], "new")
    assert layer_tar(theirs, sha256(NEW)) == NEW
    assert image_id(theirs, "new") == image_id(seed.path, "new")
    cfsctl("--repo", theirs, "fsck")


def test_what_tar_diff_made_is_applied_here(
    layout: Layout, place: pathlib.Path, repository_path: pathlib.Path, pushed: Callable[[str], str]
) -> None:
    program = shutil.which("tar-diff")
    if not program:
        pytest.skip("tar-diff is not on the PATH")
    for name, data in (("old", OLD), ("new", NEW)):
        (place / name).write_bytes(data)
    subprocess.run([program, place / "old", place / "new", place / "diff"], check=True)
    blob = (place / "diff").read_bytes()
    assert blob.startswith((tardiff.MAGIC[1], tardiff.MAGIC[2]))
    pulled = pull_one(repository_path, pushed("old"), "app")
    new = ocidocuments.parse_manifest(layout.read(layout.image([BASE, NEW], "new")))
    theirs = Layout(place / "theirs")
    described = [
        ocidocuments.Descriptor(media_type, theirs.blob(data), len(data))
        for media_type, data in (
            (ocidocuments.OCI_MANIFEST, new.raw),
            (ocidocuments.OCI_CONFIG, layout.read(new.config.digest)),
            (tardiff.MEDIA_TYPE, blob),
        )
    ]
    theirs.blob(b"{}")
    document = deltas.compose(
        described[0], described[1], pulled["config_digest"], [(new.layers[1].digest, described[2])]
    )
    theirs.tag(theirs.descriptor(ocidocuments.OCI_MANIFEST, document), "delta")
    done = pull_one(repository_path, pushed("new"), "app", options(deltas=(f"oci:{theirs.path}:delta",)))
    assert done["warnings"] == [] and [layer["source"] for layer in done["layers"]] == [None, "delta"]
    assert layer_tar(repository_path, sha256(NEW)) == NEW


def test_nothing_stays_in_the_temporary_directory(seed: Seed, place: pathlib.Path, monkeypatch: Any) -> None:
    scratch = place / "tmp"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    seed.publish()
    assert os.listdir(scratch) == []


def test_what_is_not_there_is_told_apart_from_what_cannot_be_reached(registry: Registry, place: pathlib.Path) -> None:
    assert push.manifest_at(SKOPEO, parse_reference(registry.reference("nothing-here:at-all"))) is None
    assert push.manifest_at(SKOPEO, parse_reference(f"oci:{place}/nothing:tag")) is None
    Layout(place / "some")
    assert push.manifest_at(SKOPEO, parse_reference(f"oci:{place}/some:tag")) is None
    with pytest.raises(Exception) as found:
        push.manifest_at(SKOPEO, parse_reference("docker://127.0.0.1:1/nobody:listens"))
    assert not isinstance(found.value, ImageNotFound)
