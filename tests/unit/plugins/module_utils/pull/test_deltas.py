# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Layers that come from deltas: which are asked for and taken, what is fetched then, and that any doubt ends with the
layer itself.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import random
import shutil
import sys
from collections.abc import Callable
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    EngineError,
    ImageNotFound,
    InvalidReference,
    NoSpace,
    PolicyRejected,
    RegistryUnreachable,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs, fsverity, ocidocuments, tardiff
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import Reference, parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import makedelta
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import deltas, pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create, namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, SYMLINK, member, tar

dice = random.Random(14)
LIBRARY = dice.randbytes(200_000)
TOOL = dice.randbytes(50_000)
COMMON = tar(member("etc/", type=DIRECTORY), member("etc/common", b"c" * 3000))
OLD = tar(
    member("usr/", type=DIRECTORY),
    member("usr/lib/libx.so.1.0", LIBRARY),
    member("usr/bin/tool", TOOL),
    member("usr/link", type=SYMLINK, linkname=b"bin/tool"),
    member("usr/small", b"inline"),
)
NEW = tar(
    member("usr/", type=DIRECTORY),
    member("usr/lib/libx.so.1.1", LIBRARY[:90_000] + b"fixed" + LIBRARY[90_000:]),
    member("usr/bin/tool", TOOL),
    member("usr/new", dice.randbytes(500)),
)
APP = pull.Request(f"{REGISTRY}app", "app")


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([COMMON, OLD], "app")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    return tmp_path / "repo"


class Updated:
    """Two versions of an image, of which ``path`` has the older, and a delta between them that lies beside the image."""

    def __init__(self, world: World, path: pathlib.Path, scratch: pathlib.Path) -> None:
        self.world, self.path = world, path
        (old,) = pull_all(path, APP)
        self.old = old["digest"]
        self.new = world.layout.image([COMMON, NEW], "app")
        create.prepare(str(scratch / "maker"), fsverity.SHA256, "disabled")
        maker = scratch / "maker"
        pull_all(maker, pull.Request(f"{REGISTRY}app", "new"))
        world.layout.tag({"mediaType": ocidocuments.OCI_MANIFEST, "digest": self.old, "size": 1}, "old")
        pull_all(maker, pull.Request(f"{REGISTRY}old", "old"))
        with Repository.open(str(maker)) as repository:
            source, target = makedelta.find(repository, "old"), makedelta.find(repository, self.new)
            (scratch / "delta").mkdir()
            self.made = makedelta.make(repository, source, target, str(scratch / "delta"), 9, Progress())
        shutil.copytree(scratch / "delta" / "blobs", world.layout.path / "blobs", dirs_exist_ok=True)
        self.document = json.loads(self.made.manifest)
        self.tag = f"app:{deltas.tag(self.new, self.old)}"
        self.publish()
        world.requests.clear()

    @property
    def diff(self) -> dict[str, Any]:
        return dict(self.document["layers"][2])

    def publish(self, tag: str = "") -> str:
        """Store the document, perhaps altered, as the delta."""
        layout = self.world.layout
        descriptor = layout.descriptor(ocidocuments.OCI_MANIFEST, json.dumps(self.document).encode())
        return layout.tag(descriptor, tag or self.tag)

    def replace_diff(self, blob: bytes) -> None:
        self.document["layers"][2].update(digest=self.world.layout.blob(blob), size=len(blob))
        self.publish()

    def pull(self, *wanted: str, **others: Any) -> dict[str, Any]:
        (result,) = pull_all(self.path, APP, deltas=wanted or ("auto",), **others)
        return result

    def whole(self) -> int:
        return len(self.world.layout.read(self.blob()))

    def blob(self) -> str:
        return str(json.loads(self.world.layout.read(self.new))["layers"][1]["digest"])


@pytest.fixture
def updated(world: World, path: pathlib.Path, tmp_path: pathlib.Path) -> Updated:
    return Updated(world, path, tmp_path)


def stored(path: pathlib.Path, diff_id: str) -> bytes:
    """The tar that a stored layer stands for."""
    with (
        Repository.open(str(path)) as repository,
        repository.open_object_stream(repository.stream(f"oci-layer-{diff_id}")) as stream,
    ):
        parts = []
        for chunk in stream.chunks():
            parts.append(chunk if isinstance(chunk, bytes) else repository.objects.read(chunk.digest, 1 << 30))
        return b"".join(parts)


def frame(data: bytes) -> bytes:
    compressor = codecs.zstd_compressor()
    return compressor.compress(data) + compressor.flush()


def test_an_update_fetches_the_delta_and_stores_the_layer(updated: Updated) -> None:
    result = updated.pull()
    assert result["digest"] == updated.new and result["changed"] and result["warnings"] == []
    assert updated.world.fetched() == [updated.diff["digest"]]
    assert result["stats"]["bytes_fetched"] == updated.diff["size"] < updated.whole() / 50
    assert stored(updated.path, sha256(NEW)) == NEW
    assert [layer["source"] for layer in result["layers"]] == [None, "delta"]
    with Repository.open(str(updated.path)) as repository:
        assert repository.trusted(sha256(NEW)) == repository.stream(f"oci-layer-{sha256(NEW)}")
    again = updated.pull()
    assert not again["changed"]


def test_the_configuration_is_the_empty_one_that_artifacts_share(updated: Updated) -> None:
    # OCI image specification, "Guidance for an empty descriptor"; registries look at the media type.
    assert updated.document["config"] == {
        "mediaType": "application/vnd.oci.empty.v1+json",
        "digest": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        "size": 2,
    }


def test_the_layer_that_a_delta_makes_is_the_one_that_the_blob_makes(updated: Updated, tmp_path: pathlib.Path) -> None:
    updated.pull()
    create.prepare(str(tmp_path / "other"), fsverity.SHA256, "disabled")
    pull_all(tmp_path / "other", APP)
    with Repository.open(str(updated.path)) as one, Repository.open(str(tmp_path / "other")) as two:
        stream = f"oci-layer-{sha256(NEW)}"
        assert one.stream(stream) == two.stream(stream)
        assert one.stream(stream) is not None


def test_check_mode_foretells_what_is_fetched(updated: Updated) -> None:
    told = updated.pull(check=True)
    assert updated.world.fetched() == []
    done = updated.pull()
    assert told["stats"]["bytes_fetched"] == done["stats"]["bytes_fetched"] == updated.diff["size"]
    for key in ("bytes_to_fetch", "source"):
        assert [layer[key] for layer in told["layers"]] == [layer[key] for layer in done["layers"]]


def test_without_auto_nobody_asks_for_a_delta(updated: Updated) -> None:
    (result,) = pull_all(updated.path, APP)
    assert not [what for _method, what in updated.world.requests if "delta" in what]
    assert result["stats"]["bytes_fetched"] == updated.whole()
    assert [layer["source"] for layer in result["layers"]] == [None, "registry"]


def test_nobody_asks_for_a_delta_where_no_layer_is_missing(updated: Updated) -> None:
    updated.pull()
    updated.world.requests.clear()
    updated.pull()
    assert not [what for _method, what in updated.world.requests if "delta" in what]


def test_nobody_asks_for_a_delta_where_no_previous_image_is_known(updated: Updated, tmp_path: pathlib.Path) -> None:
    create.prepare(str(tmp_path / "fresh"), fsverity.SHA256, "disabled")
    (result,) = pull_all(tmp_path / "fresh", APP, deltas=("auto",))
    assert not [what for _method, what in updated.world.requests if "delta" in what]
    assert result["warnings"] == []


@pytest.mark.parametrize(
    "error",
    [
        ImageNotFound("manifest unknown"),
        PolicyRejected("Source image rejected"),
        AuthFailed("denied"),
    ],
)
def test_a_missing_or_refused_tag_is_silent(updated: Updated, error: EngineError, monkeypatch: Any) -> None:
    original = World.target

    def target(world: World, reference: Reference) -> dict[str, Any]:
        if "delta" in reference.text:
            raise error
        return original(world, reference)

    monkeypatch.setattr(World, "target", target)
    result = updated.pull()
    assert result["warnings"] == [] and result["stats"]["bytes_fetched"] == updated.whole()


def other_type(document: dict[str, Any]) -> None:
    document["artifactType"] = "application/x-other"


def other_target(document: dict[str, Any]) -> None:
    document["layers"][0]["digest"] = "sha256:" + "0" * 64


def other_source(document: dict[str, Any]) -> None:
    document["annotations"][deltas.SOURCE_CONFIG] = "sha256:" + "0" * 64


def no_source(document: dict[str, Any]) -> None:
    del document["annotations"][deltas.SOURCE_CONFIG]


def other_layer(document: dict[str, Any]) -> None:
    document["layers"][2]["annotations"][deltas.TO] = "sha256:" + "0" * 64


def too_large(document: dict[str, Any]) -> None:
    document["layers"][2]["size"] = 10_000_000


def plain_layer(document: dict[str, Any]) -> None:
    document["layers"][2]["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip"


UNUSABLE = [
    (other_type, "no delta"),
    (other_target, "it leads to sha256:000"),
    (other_source, "is not stored"),
    (no_source, "no delta"),
    (other_layer, "no missing layer"),
    (too_large, "no missing layer"),
    (plain_layer, "no missing layer"),
]


@pytest.mark.slow
@pytest.mark.parametrize("change, complaint", UNUSABLE)
def test_a_delta_that_cannot_serve_is_not_fetched(
    updated: Updated, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    change(updated.document)
    updated.publish()
    updated.publish("extra")
    told = updated.pull("auto", check=True)
    assert told["warnings"] == [] and told["stats"]["bytes_fetched"] == updated.whole()
    result = updated.pull(f"{REGISTRY}extra")
    assert updated.world.fetched() == [updated.blob()]
    (warning,) = result["warnings"]
    assert complaint in warning and f"{REGISTRY}extra" in warning


def test_a_named_reference_is_taken(updated: Updated) -> None:
    updated.publish("extra")
    result = updated.pull(f"{REGISTRY}extra")
    assert [layer["source"] for layer in result["layers"]] == [None, "delta"] and result["warnings"] == []


def test_a_named_reference_that_does_not_exist_is_a_warning(updated: Updated) -> None:
    result = updated.pull(f"{REGISTRY}nothing", "auto")
    assert "nothing" in result["warnings"][0] and len(result["warnings"]) == 1
    assert [layer["source"] for layer in result["layers"]] == [None, "delta"], "and the next one is looked at"


def test_a_reference_that_cannot_be_understood_fails_before_anything_is_fetched(updated: Updated) -> None:
    with pytest.raises(InvalidReference):
        updated.pull("https://registry.test/x")
    assert updated.world.fetched() == []


def test_a_delta_from_another_image_of_the_same_repository_serves(updated: Updated) -> None:
    with Repository.open(str(updated.path), write=True) as repository:
        digest = repository.tag_digest("app")
        record = namerecords.read(repository, "app")
        assert digest and record
        namerecords.remember(repository, "kept", record)
        repository.tag("kept", digest)
    updated.world.layout.image([tar(member("x", b"x" * 100))], "unrelated")
    pull_all(updated.path, pull.Request(f"{REGISTRY}unrelated", "app"))
    result = updated.pull()
    assert [layer["source"] for layer in result["layers"]] == [None, "delta"]


def test_deltas_are_named_after_the_digests_that_the_registry_knows(updated: Updated) -> None:
    other = "sha256:" + "d" * 64
    with Repository.open(str(updated.path), write=True) as repository:
        record = namerecords.read(repository, "app")
        assert record
        namerecords.remember(repository, "app", dataclasses.replace(record, registry_digest=other))
    updated.publish(f"app:{deltas.tag(updated.new, other)}")
    updated.pull()
    asked = [what for method, what in updated.world.requests if method == "Inspect" and "delta" in what]
    assert asked == [f"{REGISTRY}app:{deltas.tag(updated.new, other)}"]


# --- what goes wrong with a delta that is taken


def assert_whole(updated: Updated, result: dict[str, Any], complaint: str) -> None:
    assert result["changed"] and result["digest"] == updated.new
    assert stored(updated.path, sha256(NEW)) == NEW
    assert updated.world.fetched()[-1] == updated.blob()
    (warning,) = result["warnings"]
    assert complaint in warning and sha256(NEW) in warning
    assert [layer["source"] for layer in result["layers"]] == [None, "registry"]
    told = [layer["bytes_to_fetch"] for layer in result["layers"]]
    assert told == [0, result["stats"]["bytes_fetched"]] == [0, result["layers"][1]["size"]], "not those of the delta"


HOSTILE = {
    "another result": (tardiff.MAGIC[2] + frame(b"\0\x05hello"), "sha256:"),
    "another tar": (tardiff.MAGIC[2] + frame(b"\0" + tardiff.leb128(len(COMMON)) + COMMON), "its tar has the digest"),
    "noise": (b"noise", "not a tar-diff"),
    "a path outside": (tardiff.MAGIC[2] + frame(b"\x01\x0d../etc/passwd" + b"\x02\x01"), "no file of its source"),
    "an absolute path": (tardiff.MAGIC[2] + frame(b"\x01\x0b/etc/passwd" + b"\x02\x01"), "no file of its source"),
    "a link": (tardiff.MAGIC[2] + frame(b"\x01\x08usr/link" + b"\x02\x01"), "no file of its source"),
    "a directory": (tardiff.MAGIC[2] + frame(b"\x01\x03usr"), "no file of its source"),
    "a seek beyond": (
        tardiff.MAGIC[2] + frame(b"\x01\x09usr/small\x04\x07"),
        "SEEK to 7 leads beyond a file of 6 bytes",
    ),
    "a copy beyond": (tardiff.MAGIC[2] + frame(b"\x01\x09usr/small\x02\x07"), "7 bytes at 0 of a file of 6 bytes"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_delta_costs_a_warning_and_the_layer_itself(updated: Updated, name: str) -> None:
    blob, complaint = HOSTILE[name]
    updated.replace_diff(blob)
    assert_whole(updated, updated.pull(), complaint)


def test_endless_output_is_cut_off(updated: Updated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tardiff, "output_limit", lambda size: 1 << 20)
    copies = b"\x01\x0cusr/bin/tool" + (b"\x02" + tardiff.leb128(len(TOOL)) + b"\x04\0") * 1000
    head = OLD[:512]  # a directory, so that the tar is well-formed as far as it goes
    updated.replace_diff(tardiff.MAGIC[2] + frame(b"\0" + tardiff.leb128(512) + head + copies))
    result = updated.pull()
    assert_whole(updated, result, "")


def test_bytes_that_are_not_the_announced_ones_are_noticed(updated: Updated) -> None:
    blob = bytearray(updated.world.layout.read(updated.diff["digest"]))
    blob[len(blob) // 2] ^= 0xFF
    updated.world.blobs[updated.diff["digest"]] = [bytes(blob)]
    assert_whole(updated, updated.pull(), "where the manifest says")


def test_a_delta_that_vanishes_meanwhile_costs_a_warning(updated: Updated) -> None:
    updated.world.blobs[updated.diff["digest"]] = [ImageNotFound("skopeo says: blob unknown")]
    assert_whole(updated, updated.pull(), "blob unknown")


def test_what_skopeo_refuses_costs_a_warning(updated: Updated) -> None:
    updated.world.verdicts[updated.diff["digest"]] = [EngineError("skopeo says: unexpected EOF.")]
    assert_whole(updated, updated.pull(), "skopeo refuses the blob")


def test_a_damaged_source_image_costs_a_warning(updated: Updated) -> None:
    with Repository.open(str(updated.path)) as repository:
        objects = repository.objects.dirfd
        name = fsverity.object_path(fsverity.digest(TOOL, repository.algorithm))
    target = updated.path / "objects" / name
    assert objects >= 0
    target.chmod(0o644)
    target.write_bytes(TOOL[:-1] + b"?")
    # It is there under the right name and of the right size, so only the whole tar tells.
    result = updated.pull()
    assert result["warnings"] and result["layers"][1]["source"] == "registry"


def test_a_source_image_without_its_objects_costs_a_warning(updated: Updated) -> None:
    name = fsverity.object_path(fsverity.digest(TOOL, fsverity.SHA256))
    (updated.path / "objects" / name).unlink()
    assert_whole(updated, updated.pull(), "is missing")


def test_a_passing_fault_is_tried_again_with_the_delta(updated: Updated) -> None:
    updated.world.blobs[updated.diff["digest"]] = [RegistryUnreachable("skopeo says: 503.")]
    result = updated.pull()
    assert result["warnings"] == [] and result["layers"][1]["source"] == "delta"
    assert result["stats"]["retries"] == 1


def test_a_full_disk_is_no_reason_for_another_source(updated: Updated) -> None:
    updated.world.blobs[updated.diff["digest"]] = [NoSpace("No space left on device.")]
    with pytest.raises(NoSpace):
        updated.pull()
    assert updated.blob() not in updated.world.fetched()


def test_the_tag_names_both_images_and_fits() -> None:
    tag = deltas.tag("sha256:" + "a" * 64, "sha256:" + "b" * 64)
    assert tag == "sha256-" + "a" * 64 + ".delta-" + "b" * 24
    assert len(tag) == 102
    where = deltas.beside(parse_reference("docker://reg.test:5000/a/b:1"), "sha256:" + "a" * 64, "sha256:" + "b" * 64)
    assert where.text == f"docker://reg.test:5000/a/b:{tag}"


def test_the_empty_configuration_of_a_delta_is_the_one_that_oci_defines() -> None:
    blob = ocidocuments.Descriptor("x", "sha256:" + "1" * 64, 9)
    raw = deltas.compose(blob, blob, "sha256:" + "2" * 64, [])
    assert ocidocuments.parse_manifest(raw).config == ocidocuments.Descriptor(
        "application/vnd.oci.empty.v1+json",
        "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
        2,
    )
