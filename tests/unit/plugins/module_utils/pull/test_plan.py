# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a reference means, and what of it a repository holds and may believe."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import sys
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, ocischemas, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import plan, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, proofs as store_proofs
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    InvalidDocument,
    PlatformNotFound,
    UnexpectedDigest,
    UnsupportedMediaType,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.ocidocuments import (
    Descriptor,
    Platform,
    parse_config,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

FIRST = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))
SECOND = tar(member("usr/two", b"2" * 300))
DIFF_ID = sha256(FIRST)


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([FIRST, SECOND], "app")
    layout.image([FIRST], "first")
    layout.artifact([("application/x-tar", FIRST)], "artifact")
    layout.multi_platform(
        {name: [tar(member("c", name.encode() * 20))] for name in ("linux/amd64", "linux/arm64")}, "index"
    )
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return tmp_path / "repo"


def put_layer(
    path: pathlib.Path, content: bytes, content_type: bytes = splitstream.LAYER, name: str = DIFF_ID
) -> bytes:
    """Register a layer stream as another tool would: without any proof."""
    with Repository.open(str(path), write=True) as repository:
        writer = splitstream.Writer(repository.algorithm, content_type)
        if content_type == splitstream.BLOB:
            writer.external(repository.objects.put(content), len(content))
        else:
            writer.inline(content)
        digest = repository.objects.put_pieces(writer.finish())
        repository.register(f"oci-layer-{name}", digest)
        return digest


def layer_of_another_tool(path: pathlib.Path) -> None:
    """The first layer in a repository with nothing else: right, but nobody ever proved it here."""
    pull_all(path, app("first"))
    for name in (
        *(path / "streams").glob("oci-[cm]*"),
        *(path / "streams/refs/oci").iterdir(),
        *(path / "images").iterdir(),
    ):
        name.unlink()
    shutil.rmtree(path / ".composefs-oci")


def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows whenever a stored tar is hashed."""
    found: list[str] = []
    real = store_proofs.tar_sha256

    def count(*arguments: Any) -> str:
        found.append(real(*arguments))
        return found[-1]

    monkeypatch.setattr(store_proofs, "tar_sha256", count)
    return found


def app(tag: str = "app", name: str = "", **others: str) -> pull.Request:
    return pull.Request(REGISTRY + tag, name or tag, **others)


# --- whom a layer stream is believed
# ---------------------------------------------------------------------------------------------------------


def test_mistake_26_a_layer_of_another_tool_is_hashed_once_and_then_trusted(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = proofs(monkeypatch)
    layer_of_another_tool(path)
    (done,) = pull_all(path, app())
    assert [one["status"] for one in done["layers"]] == ["present", "new"] and hashed == [DIFF_ID[7:]]
    pull_all(path, app())
    pull_all(path, app("first"))
    assert len(hashed) == 1


def test_mistake_26_a_poisoned_layer_is_told_and_replaced(path: pathlib.Path, world: World) -> None:
    put_layer(path, SECOND)
    (predicted,) = pull_all(path, app(), check=True)
    (done,) = pull_all(path, app())
    for result in (predicted, done):
        assert [one["status"] for one in result["layers"]] == ["new", "new"]
        (warning,) = result["warnings"]
        assert f"oci-layer-{DIFF_ID} holds {sha256(SECOND)}" in warning and "replaced" in warning
    assert not pull_all(path, app())[0]["warnings"]


def test_check_mode_remembers_no_proof(path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = proofs(monkeypatch)
    layer_of_another_tool(path)
    for _time in range(2):
        pull_all(path, app(), check=True)
    assert len(hashed) == 2 and not (path / ".composefs-oci").exists()


def test_a_trusted_layer_that_was_replaced_since_is_hashed_again(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull_all(path, app())
    hashed = proofs(monkeypatch)
    put_layer(path, SECOND)
    assert pull_all(path, app())[0]["warnings"] and len(hashed) == 1


def test_a_raw_blob_in_the_place_of_a_layer_is_replaced(path: pathlib.Path, world: World) -> None:
    put_layer(path, FIRST, splitstream.BLOB)
    (done,) = pull_all(path, app("first"))
    assert done["layers"][0]["status"] == "new" and "not usable and is replaced" in done["warnings"][0]


def test_an_artifact_takes_a_stored_layer_for_its_blob(path: pathlib.Path, world: World) -> None:
    pull_all(path, app("first"))
    (done,) = pull_all(path, app("artifact"))
    assert done["layers"][0]["status"] == "present" and not done["warnings"]


def test_a_layer_that_another_user_may_read_but_not_trust_is_no_error(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_layer(path, FIRST)
    put_layer(path, SECOND, name=sha256(SECOND))

    def refuse(repository: Repository) -> None:
        from ansible_collections.composefs.oci.plugins.module_utils.errors import ReadOnly

        raise ReadOnly("It is read-only.")

    monkeypatch.setattr(Repository, "require_writable", refuse)
    with Repository.open(str(path)) as repository:
        assert store_proofs.proved_layer(repository, repository.stream(f"oci-layer-{DIFF_ID}"), DIFF_ID, True, True, [])


@pytest.mark.parametrize("damage", ["object gone", "not a stream", "content gone"])
def test_a_damaged_layer_is_told_and_fetched_again(path: pathlib.Path, world: World, damage: str) -> None:
    (done,) = pull_all(path, app("first"))
    with Repository.open(str(path)) as repository:
        stream = repository.stream(f"oci-layer-{DIFF_ID}")
    assert stream
    if damage == "object gone":
        (path / "objects" / fsverity.object_path(stream)).unlink()
    elif damage == "not a stream":
        file = path / "objects" / fsverity.object_path(stream)
        file.write_bytes(b"x" * file.stat().st_size)
    else:
        (path / "objects" / fsverity.object_path(fsverity.digest(b"1" * 300, fsverity.SHA256))).unlink()
        for proof in (path / ".composefs-oci/trusted").iterdir():
            proof.unlink()
    (again,) = pull_all(path, app("first"))
    assert again["layers"][0]["status"] == "new" and again["digest"] == done["digest"]
    assert bool(again["warnings"]) == (damage != "object gone")
    assert not pull_all(path, app("first"))[0]["changed"]


# --- without asking anybody
# ------------------------------------------------------------------------------------------------------------------


def test_missing_is_content_with_what_has_the_name(path: pathlib.Path, world: World) -> None:
    (first,) = pull_all(path, app())
    world.requests.clear()
    (again,) = pull_all(path, app(), policy=pull.MISSING)
    assert world.requests == [] and not again["changed"]
    assert again["digest"] == first["digest"] and again["image_id"] == first["image_id"] and again["layers"]
    assert again["index_digest"] is None and again["skopeo_version"] is None


def test_missing_makes_the_image_that_is_lacking_without_any_network(path: pathlib.Path, world: World) -> None:
    pull_all(path, app(), erofs=False)
    world.requests.clear()
    (done,) = pull_all(path, app(), policy=pull.MISSING)
    assert done["changed"] and done["image_id"] and world.requests == []


@pytest.mark.parametrize("damage", ["manifest", "config", "layer", "poison"])
def test_missing_asks_when_what_has_the_name_is_not_whole(path: pathlib.Path, world: World, damage: str) -> None:
    (done,) = pull_all(path, app("first"))
    if damage == "poison":
        put_layer(path, SECOND)
    else:
        name = {
            "manifest": "oci-manifest-" + done["digest"],
            "config": "oci-config-" + done["config_digest"],
            "layer": f"oci-layer-{DIFF_ID}",
        }[damage]
        (path / "streams" / name).unlink()
    (again,) = pull_all(path, app("first"), policy=pull.MISSING)
    assert again["changed"] and again["digest"] == done["digest"]
    assert not pull_all(path, app("first"))[0]["changed"]


def test_missing_with_a_digest_that_differs_asks(path: pathlib.Path, world: World) -> None:
    (old,) = pull_all(path, app("first", "x"))
    new = world.target(pull.parse_reference(REGISTRY + "app"))["digest"]
    (done,) = pull_all(path, app("app", "x", digest=new), policy=pull.MISSING)
    assert (done["changed"], done["digest"], done["previous_digest"]) == (True, new, old["digest"])
    with pytest.raises(UnexpectedDigest, match="where 'digest' asks for"):
        pull_all(path, app("app", "x", digest=old["digest"]), policy=pull.MISSING)


def test_missing_with_another_platform_asks(path: pathlib.Path, world: World) -> None:
    (arm,) = pull_all(path, app("index", platform="linux/arm64"))
    world.requests.clear()
    assert (
        not pull_all(path, app("index", platform="linux/arm64"), policy=pull.MISSING)[0]["changed"]
        and world.requests == []
    )
    (amd,) = pull_all(path, app("index", platform="linux/amd64"), policy=pull.MISSING)
    assert amd["digest"] != arm["digest"] and amd["previous_digest"] == arm["digest"]


def test_missing_proves_what_another_tool_pulled_and_remembers(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pull_all(path, app("first"))
    for proof in (path / ".composefs-oci/trusted").iterdir():
        proof.unlink()
    hashed = proofs(monkeypatch)
    for _time in range(2):
        assert not pull_all(path, app("first"), policy=pull.MISSING)[0]["changed"]
    assert len(hashed) == 1


def test_an_artifact_whose_blob_gave_its_name_away_is_whole_for_every_policy(path: pathlib.Path, world: World) -> None:
    pull_all(path, app("artifact"))
    pull_all(path, app("first"))
    for policy in (pull.ALWAYS, pull.MISSING, pull.NEWER):
        assert not pull_all(path, app("artifact"), policy=policy)[0]["changed"]


# --- what the source says
# --------------------------------------------------------------------------------------------------------------------


def test_digests_that_are_accepted(path: pathlib.Path, world: World) -> None:
    index = world.target(pull.parse_reference(REGISTRY + "index"))["digest"]
    (done,) = pull_all(path, app("index", platform="linux/arm64", digest=index))
    assert done["index_digest"] == index != done["digest"]
    assert not pull_all(path, app("index", platform="linux/arm64", digest=done["digest"]))[0]["changed"]
    with pytest.raises(UnexpectedDigest, match="decide which image you want"):
        pull_all(path, app("index", platform="linux/amd64", digest=done["digest"]))


def test_an_image_for_another_platform_is_refused(path: pathlib.Path, world: World) -> None:
    with pytest.raises(PlatformNotFound):
        pull_all(path, app(platform="linux/s390x"))


def test_a_configuration_without_a_platform_is_said_to_name_nothing() -> None:
    raw = json.dumps({"architecture": "", "os": "", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    warnings: list[str] = []
    request = plan.Request("example.org/a", "a")
    plan._check_platform(request, parse_config(raw), Platform("linux", "amd64"), warnings)
    assert "is for linux/amd64, and the configuration says nothing." in warnings[0]


def test_documents_are_held_against_their_schemas_only_when_they_are_new(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[str] = []
    monkeypatch.setattr(ocischemas, "validate", lambda kind, raw: validated.append(kind) or True)
    for _time in range(2):
        pull_all(path, app())
    assert validated == ["manifest", "config"]


def test_without_jsonschema_there_is_a_warning_where_something_is_new(
    path: pathlib.Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocischemas, "available", lambda: False)
    (done,) = pull_all(path, app())
    assert len(set(done["warnings"])) == 1 and "jsonschema" in done["warnings"][0]
    assert not pull_all(path, app())[0]["warnings"]


def test_a_configuration_that_does_not_fit_its_manifest_is_refused(path: pathlib.Path, world: World) -> None:
    layout = world.layout
    layers = [layout.layer(FIRST), layout.layer(SECOND)]
    layout.tag(layout.manifest(layout.config(layers[:1]), layers), "odd")
    with pytest.raises(InvalidDocument):
        pull_all(path, app("odd"))
    assert not (path / "streams").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("count", "fits"), [(4096, True), (4097, False)])
def test_the_number_of_layers_is_bounded(path: pathlib.Path, world: World, count: int, fits: bool) -> None:
    one = world.layout.layer(FIRST)
    world.layout.tag(world.layout.manifest(world.layout.config([one] * count, history=[]), [one] * count), "many")
    if fits:
        (done,) = pull_all(path, app("many"), check=True)
        assert len(done["layers"]) == count and done["stats"]["bytes_fetched"] == one.descriptor["size"]
    else:
        with pytest.raises(InvalidDocument, match="at most 4096"):
            pull_all(path, app("many"), check=True)


def test_a_layer_of_an_unknown_type_in_a_container_is_refused_before_anything_is_fetched(
    path: pathlib.Path, world: World
) -> None:
    world.layout.image([world.layout.layer(FIRST, media_type="application/x-unknown")], "odd")
    with pytest.raises(UnsupportedMediaType):
        pull_all(path, app("odd"))
    assert world.fetched() == []


def test_a_plain_tar_that_is_called_gzip_is_taken_for_what_its_digest_says() -> None:
    blob = Descriptor("application/vnd.oci.image.layer.v1.tar+gzip", DIFF_ID, len(FIRST))
    assert plan.Layer(blob, DIFF_ID, "", blob, None).compression == "none"
    assert plan.Layer(blob, "sha256:" + "0" * 64, "", blob, None).compression == "gzip"
    raw = Descriptor("application/x-tar", DIFF_ID, len(FIRST))
    assert plan.Layer(raw, DIFF_ID, "", raw, None).compression is None


def test_planning_touches_nothing(path: pathlib.Path, world: World) -> None:
    pull_all(path, app(), check=True)
    assert sorted(os.listdir(path)) == ["meta.json"]
    assert json.loads((path / "meta.json").read_text())["version"] == 1
