# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real images through the real skopeo into a real repository: every transport and encoding, what changes and what does
not.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing as image_list
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.progress import SKIPPED
from ansible_collections.composefs.oci.plugins.module_utils.pull.publish import Images
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
import tarbytes
from ociimage import Layout, docker_directory, sha256
from pulling import Recorder, layer_tar, names, options, pull_all, pull_one, replaced
from registry import Registry
from tarbytes import DIRECTORY, member, small_tree

ENCODINGS = ("none", "gzip", "gzip-multi", "estargz", "zstd", "zstd-frames", "zstd-skippable", "zstd-chunked")
FIRST, SECOND = small_tree(seed=1), small_tree(seed=2, files=5, prefix="usr/share/more")


def tagged(layout: Layout, tag: str) -> str:
    """The manifest digest behind a tag of a layout, or skip if the layout could not be given it."""
    for entry in json.loads((layout.path / "index.json").read_text())["manifests"]:
        if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
            return str(entry["digest"])
    pytest.skip(f"the image {tag} cannot be made here (is zstd installed?)")


# ---- every encoding and transport ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_gives_back_the_exact_tar(
    images: Layout, repository_path: pathlib.Path, encoding: str, each_skopeo: str
) -> None:
    digest = tagged(images, encoding)
    result = pull_one(repository_path, f"oci:{images.path}:{encoding}", chosen=options(each_skopeo))
    assert result["changed"] and result["digest"] == digest
    assert [layer["status"] for layer in result["layers"]] == ["new", "new"]
    for layer, tar in zip(result["layers"], (FIRST, SECOND)):
        assert layer["diff_id"] == sha256(tar)
        assert layer_tar(repository_path, layer["diff_id"]) == tar


def test_mistake_27_zstd_chunked_without_padding_is_restored(
    repository_path: pathlib.Path, place: pathlib.Path
) -> None:
    layout = Layout(place / "layout")
    layout.image([layout.chunked_layer(FIRST)])
    result = pull_one(repository_path, f"oci:{layout.path}:latest")
    assert layer_tar(repository_path, result["layers"][0]["diff_id"]) == FIRST


@pytest.mark.parametrize("transport", ["docker", "oci-archive", "docker-archive", "dir", "bare"])
def test_every_transport(
    images: Layout, registry: Registry, repository_path: pathlib.Path, place: pathlib.Path, skopeo: str, transport: str
) -> None:
    source = f"oci:{images.path}:gzip"
    if transport in ("docker", "bare"):
        registry.push(f"{images.path}:gzip", "pull:transport")
        reference = registry.reference("pull:transport")
        reference = reference if transport == "docker" else reference[len("docker://") :]
    else:
        target = {"oci-archive": "a.tar:x", "docker-archive": "d.tar:localhost/x:y", "dir": "d"}[transport]
        subprocess.run([skopeo, "--insecure-policy", "copy", "-q", source, f"{transport}:{place}/{target}"], check=True)
        reference = f"{transport}:{place}/{target}"
    result = pull_one(repository_path, reference)
    for layer, tar in zip(result["layers"], (FIRST, SECOND)):
        assert layer_tar(repository_path, layer["diff_id"]) == tar
    assert not pull_one(repository_path, reference)["changed"]


def test_containers_storage(
    images: Layout, repository_path: pathlib.Path, place: pathlib.Path, newer_skopeo: str
) -> None:
    if os.geteuid() != 0:
        pytest.skip("a container storage of one's own needs podman unshare")
    store = f"containers-storage:[vfs@{place}/storage+{place}/run]localhost/app:1"
    done = subprocess.run(
        [newer_skopeo, "--insecure-policy", "copy", "-q", f"oci:{images.path}:gzip", store],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"no container storage can be made here: {done.stderr.strip()[-200:]}")
    result = pull_one(repository_path, store, chosen=options(newer_skopeo))
    for layer, tar in zip(result["layers"], (FIRST, SECOND)):
        assert layer_tar(repository_path, layer["diff_id"]) == tar


def test_containers_storage_with_an_old_skopeo_names_the_version_needed(
    repository_path: pathlib.Path, skopeo: str
) -> None:
    with pytest.raises(errors.EngineError) as caught:
        pull_one(repository_path, "containers-storage:localhost/none")
    assert caught.value.code in ("skopeo_too_old", "image_not_found", "permission_denied", "proxy_failed")


# ---- what changes ----------------------------------------------------------------------------------------------------


def test_second_pull_changes_nothing_on_disk(images: Layout, repository_path: pathlib.Path) -> None:
    pull_one(repository_path, f"oci:{images.path}:gzip")
    before = names(repository_path)
    result = pull_one(repository_path, f"oci:{images.path}:gzip")
    assert not result["changed"] and result["streams"] == [] and result["stats"]["bytes_fetched"] == 0
    assert [layer["status"] for layer in result["layers"]] == ["present", "present"]
    assert names(repository_path) == before


@pytest.mark.parametrize(
    "situation",
    ["fresh", "other-name", "moved", "one-layer-there", "same-layers-other-encoding", "without-erofs", "nothing"],
)
def test_check_mode_predicts_exactly_what_a_run_then_does(
    images: Layout, repository_path: pathlib.Path, situation: str
) -> None:
    reference = f"oci:{images.path}:gzip"
    if situation in ("other-name", "nothing"):
        pull_one(repository_path, reference, "image" if situation == "nothing" else "other")
    elif situation == "moved":
        pull_one(repository_path, f"oci:{images.path}:artifact")
    elif situation == "one-layer-there":
        layout = Layout(images.path.parent / "single")
        layout.image([FIRST])
        pull_one(repository_path, f"oci:{layout.path}:latest", "single")
    elif situation == "same-layers-other-encoding":
        pull_one(repository_path, f"oci:{images.path}:none", "other")
    elif situation == "without-erofs":
        pull_one(repository_path, reference, chosen=options(erofs=False))
    before = names(repository_path)
    predicted = pull_one(repository_path, reference, chosen=options(check=True))
    assert names(repository_path) == before
    done = pull_one(repository_path, reference)
    for key in ("changed", "streams", "digest", "config_digest", "previous_digest", "layers"):
        assert predicted[key] == done[key], key
    assert predicted["stats"]["bytes_fetched"] == done["stats"]["bytes_fetched"]
    assert predicted["changed"] == (situation != "nothing")
    assert not pull_one(repository_path, reference, chosen=options(check=True))["changed"]


def test_several_images_fetch_shared_layers_once(images: Layout, repository_path: pathlib.Path) -> None:
    single = Layout(images.path.parent / "shared")
    single.image([FIRST])
    requests = [pull.Request(f"oci:{single.path}:latest", "base"), pull.Request(f"oci:{images.path}:gzip", "app")]
    predicted = pull_all(repository_path, requests, options(check=True))
    done = pull_all(repository_path, requests)
    for one, other in zip(predicted, done):
        assert one["streams"] == other["streams"] and one["stats"]["bytes_fetched"] == other["stats"]["bytes_fetched"]
    first = f"oci-layer-{sha256(FIRST)}"
    assert first in done[0]["streams"] and first not in done[1]["streams"]
    with Repository.open(str(repository_path)) as repository:
        assert repository.tags() == {"app": done[1]["digest"], "base": done[0]["digest"]}


def test_no_name_appears_when_one_of_several_images_fails(
    images: Layout, repository_path: pathlib.Path, place: pathlib.Path
) -> None:
    layout = Layout(place / "bad")
    layout.image([layout.broken_layer(small_tree(seed=77), cut=100)])
    requests = [pull.Request(f"oci:{images.path}:gzip", "good"), pull.Request(f"oci:{layout.path}:latest", "bad")]
    with pytest.raises(errors.EngineError):
        pull_all(repository_path, requests)
    with Repository.open(str(repository_path)) as repository:
        assert repository.tags() == {}


def test_a_moved_tag_reports_what_it_meant_before(images: Layout, repository_path: pathlib.Path) -> None:
    old = pull_one(repository_path, f"oci:{images.path}:gzip")
    new = pull_one(repository_path, f"oci:{images.path}:none")
    assert new["changed"] and new["previous_digest"] == old["digest"] != new["digest"]
    assert new["stats"]["bytes_fetched"] == 0


def test_an_image_pulled_without_erofs_gains_it_on_the_next_run(images: Layout, repository_path: pathlib.Path) -> None:
    first = pull_one(repository_path, f"oci:{images.path}:gzip", chosen=options(erofs=False))
    assert first["image_id"] is None
    second = pull_one(repository_path, f"oci:{images.path}:gzip")
    assert second["changed"] and second["image_id"]
    assert os.path.exists(repository_path / "images" / second["image_id"])
    assert not pull_one(repository_path, f"oci:{images.path}:gzip")["changed"]


def test_a_pull_without_erofs_keeps_an_image_that_is_there(images: Layout, repository_path: pathlib.Path) -> None:
    first = pull_one(repository_path, f"oci:{images.path}:gzip")
    second = pull_one(repository_path, f"oci:{images.path}:gzip", chosen=options(erofs=False))
    assert not second["changed"] and second["image_id"] == first["image_id"]


def test_pull_missing_needs_no_skopeo_when_the_name_is_there(images: Layout, repository_path: pathlib.Path) -> None:
    reference = f"oci:{images.path}:gzip"
    first = pull_one(repository_path, reference)
    offline = replaced(options("/nonexistent/skopeo"), policy=pull.MISSING)
    again = pull_one(repository_path, reference, chosen=offline)
    assert not again["changed"] and again["digest"] == first["digest"] and again["skopeo_version"] is None
    with pytest.raises(errors.SkopeoMissing):
        pull_one(repository_path, f"dir:{images.path}", "another", chosen=offline)


def test_pull_newer_leaves_what_is_there_when_the_registry_is_gone(
    images: Layout, repository_path: pathlib.Path, place: pathlib.Path, skopeo: str
) -> None:
    with Registry(place / "gone") as gone:
        gone.push(f"{images.path}:gzip", "app:1")
        reference = gone.reference("app:1")
        first = pull_one(repository_path, reference)
    newer = replaced(options(), policy=pull.NEWER)
    again = pull_one(repository_path, reference, chosen=newer)
    assert not again["changed"] and again["digest"] == first["digest"] and "left as it is" in again["warnings"][0]
    with pytest.raises(errors.RegistryUnreachable):
        pull_one(repository_path, reference)
    with pytest.raises(errors.RegistryUnreachable):
        pull_one(repository_path, reference, "another", chosen=newer)


def test_forgetting_a_name_keeps_the_data(images: Layout, repository_path: pathlib.Path) -> None:
    first = pull_one(repository_path, f"oci:{images.path}:gzip")
    with Repository.open(str(repository_path)) as repository:
        request = pull.Request("", "image")
        predicted = pull.forget(repository, request, check=True)
        done = pull.forget(repository, request, check=False)
        again = pull.forget(repository, request, check=False)
        assert repository.tags() == {} and repository.stream(f"oci-manifest-{first['digest']}")
    assert predicted.changed and done.changed and not again.changed
    assert done.result.previous_digest == first["digest"] and again.result.previous_digest is None
    assert pull_one(repository_path, f"oci:{images.path}:gzip")["stats"]["bytes_fetched"] == 0


# ---- what a reference means ------------------------------------------------------------------------------------------


def test_digest_option_accepts_manifest_and_index_and_refuses_all_else(
    images: Layout, registry: Registry, repository_path: pathlib.Path
) -> None:
    registry.push(f"{images.path}:platforms", "pull:platforms", "--all")
    reference = registry.reference("pull:platforms")
    result = pull_one(repository_path, reference, platform="linux/arm64")
    assert result["index_digest"] == tagged(images, "platforms")
    for digest in (result["digest"], result["index_digest"]):
        assert not pull_one(repository_path, reference, platform="linux/arm64", digest=digest)["changed"]
    with pytest.raises(errors.UnexpectedDigest, match="means"):
        pull_one(repository_path, reference, platform="linux/arm64", digest="sha256:" + "0" * 64)


def test_platform_chooses_within_an_index_and_holds_on_the_second_run(
    images: Layout, registry: Registry, repository_path: pathlib.Path
) -> None:
    registry.push(f"{images.path}:platforms", "pull:platforms", "--all")
    reference = registry.reference("pull:platforms")
    arm64 = pull_one(repository_path, reference, platform="linux/arm64")
    armv7 = pull_one(repository_path, reference, "v7", platform="linux/arm/v7")
    assert arm64["digest"] != armv7["digest"]
    assert not pull_one(repository_path, reference, platform="linux/arm64")["changed"]
    with pytest.raises(errors.PlatformNotFound):
        pull_one(repository_path, reference, platform="linux/s390x")


def test_a_single_manifest_for_another_platform_is_refused(images: Layout, repository_path: pathlib.Path) -> None:
    with pytest.raises(errors.PlatformNotFound):
        pull_one(repository_path, f"oci:{images.path}:gzip", platform="linux/s390x")


def test_tag_and_digest_together_mean_the_digest(
    images: Layout, registry: Registry, repository_path: pathlib.Path
) -> None:
    registry.push(f"{images.path}:gzip", "pull:both")
    digest = tagged(images, "gzip")
    registry.push(f"{images.path}:none", "pull:both")
    result = pull_one(repository_path, registry.reference("pull:both") + "@" + digest)
    assert result["digest"] == digest and result["index_digest"] is None


def test_missing_image_and_bad_names_have_their_codes(registry: Registry, repository_path: pathlib.Path) -> None:
    with pytest.raises(errors.ImageNotFound):
        pull_one(repository_path, registry.reference("pull:never"))
    for name in ("@x", "", "n" * 256, "nul\0"):
        with pytest.raises(errors.InvalidReference):
            pull_one(repository_path, "oci:/nowhere", name)
    with pytest.raises(errors.InvalidReference):
        pull_one(repository_path, "docker:without/slashes")


def test_the_same_name_twice_in_one_task_is_refused(images: Layout, repository_path: pathlib.Path) -> None:
    with pytest.raises(errors.InvalidReference, match="twice"):
        pull_all(
            repository_path,
            [pull.Request(f"oci:{images.path}:gzip", "a"), pull.Request(f"oci:{images.path}:none", "a")],
        )


# ---- odd images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["the same layer twice", "no layers", "an empty layer", "one layer in two encodings"])
def test_odd_images_are_pulled_whole_and_come_to_rest(
    repository_path: pathlib.Path, place: pathlib.Path, each_skopeo: str, kind: str
) -> None:
    layout = Layout(place / "layout")
    tars = {
        "the same layer twice": [FIRST, SECOND, FIRST],
        "no layers": [],
        "an empty layer": [FIRST, b""],
        "one layer in two encodings": [FIRST, FIRST],
    }[kind]
    encodings = ["gzip", "none"] if "encodings" in kind else ["gzip"] * 3
    layout.image([layout.layer(one, "none" if not one else encoding) for one, encoding in zip(tars, encodings)])
    predicted = pull_one(repository_path, f"oci:{layout.path}:latest", chosen=options(each_skopeo, check=True))
    result = pull_one(repository_path, f"oci:{layout.path}:latest", chosen=options(each_skopeo))
    assert predicted["streams"] == result["streams"] and result["image_id"]
    assert (
        predicted["stats"]["bytes_fetched"]
        == result["stats"]["bytes_fetched"]
        == sum(layer["bytes_to_fetch"] for layer in result["layers"])
    )
    for layer, tar in zip(result["layers"], tars):
        assert layer_tar(repository_path, layer["diff_id"]) == tar
    assert not pull_one(repository_path, f"oci:{layout.path}:latest", chosen=options(each_skopeo))["changed"]


def test_nothing_of_a_pull_is_left_in_the_process(images: Layout, repository_path: pathlib.Path) -> None:
    """Neither descriptors nor children, living or dead, whether it went well or not."""

    def left() -> tuple[int, list[str]]:
        children = [
            child for task in pathlib.Path("/proc/self/task").glob("*/children") for child in task.read_text().split()
        ]
        return len(os.listdir("/proc/self/fd")), [
            child for child in children if pathlib.Path(f"/proc/{child}/comm").read_text().strip() != "registry"
        ]

    before = left()
    for _time in range(2):
        pull_one(repository_path, f"oci:{images.path}:gzip")
        with pytest.raises(errors.ImageNotFound):
            pull_one(repository_path, f"oci:{images.path}:nowhere")
    assert left() == before


def test_errors_name_the_image_once_and_skopeos_words_once(registry: Registry, repository_path: pathlib.Path) -> None:
    reference = registry.reference("pull:never")
    with pytest.raises(errors.ImageNotFound) as caught:
        pull_one(repository_path, reference)
    message = str(caught.value)
    assert message.startswith(f"Opening {reference}: skopeo says: ") and message.endswith(
        " Check the name, the tag and the path."
    )
    assert message.count(reference) == 1 and message.lower().count("manifest unknown") <= 1


# ---- documents -------------------------------------------------------------------------------------------------------


def test_documents_are_stored_byte_for_byte_as_one_external_object(
    images: Layout, repository_path: pathlib.Path
) -> None:
    result = pull_one(repository_path, f"oci:{images.path}:gzip")
    with Repository.open(str(repository_path)) as repository:
        manifest = imagestreams.read(repository, imagestreams.MANIFEST, result["digest"])
        config = imagestreams.read(repository, imagestreams.CONFIG, result["config_digest"])
    assert manifest and config
    assert manifest.raw == images.read(result["digest"]) and config.raw == images.read(result["config_digest"])
    assert set(manifest.refs) == {
        f"config:{result['config_digest']}",
        *(layer["diff_id"] for layer in result["layers"]),
    }
    assert set(config.refs) == {"composefs.image.v1", *(layer["diff_id"] for layer in result["layers"])}
    assert config.refs["composefs.image.v1"].hex() == result["image_id"]


@pytest.mark.parametrize("where", ["dir", "registry"])
def test_docker_schema2_is_stored_under_the_digest_of_its_bytes(
    registry: Registry, repository_path: pathlib.Path, place: pathlib.Path, where: str
) -> None:
    docker = docker_directory(place / "docker", [FIRST, SECOND])
    reference = f"dir:{place}/docker"
    if where == "registry":
        subprocess.run(
            [
                "skopeo",
                "--insecure-policy",
                "copy",
                "-q",
                "--dest-tls-verify=false",
                "--preserve-digests",
                reference,
                registry.reference("pull:docker"),
            ],
            check=True,
        )
        reference = registry.reference("pull:docker")
    result = pull_one(repository_path, reference)
    assert result["registry_digest"] == docker != result["digest"]
    with Repository.open(str(repository_path)) as repository:
        manifest = imagestreams.read(repository, imagestreams.MANIFEST, result["digest"])
        assert manifest and sha256(manifest.raw) == result["digest"]
        assert imagestreams.read(repository, imagestreams.CONFIG, result["config_digest"])
    assert not pull_one(repository_path, reference)["changed"]
    assert not pull_one(repository_path, reference, digest=docker)["changed"]


def test_several_artifacts_share_the_empty_configuration(repository_path: pathlib.Path, place: pathlib.Path) -> None:
    layout = Layout(place / "artifacts")
    results = []
    for number in range(3):
        layout.artifact([("text/plain", b"artifact %d\n" % number * 50)], f"a{number}")
        results.append(pull_one(repository_path, f"oci:{layout.path}:a{number}", f"a{number}"))
    assert len({result["config_digest"] for result in results}) == 1
    for number, result in enumerate(results):
        assert result["image_id"] is None
        assert not pull_one(repository_path, f"oci:{layout.path}:a{number}", f"a{number}")["changed"]
        with (
            Repository.open(str(repository_path)) as repository,
            repository.open_object_stream(
                repository.stream(f"oci-layer-{result['layers'][0]['digest']}"), splitstream.BLOB
            ) as stream,
        ):
            (chunk,) = stream.chunks()
            assert repository.objects.read(chunk.digest, 1 << 20) == b"artifact %d\n" % number * 50  # type: ignore[union-attr]


def test_images_with_the_same_configuration_stay_whole_when_it_moves(
    images: Layout, repository_path: pathlib.Path
) -> None:
    layout = Layout(images.path.parent / "twins")
    layers = [layout.layer(FIRST, "gzip")], [layout.layer(FIRST, "none")]
    config = layout.config(layers[0])
    for name, chosen in zip(("one", "two"), layers):
        layout.tag(layout.manifest(config, chosen), name)
    pull_one(repository_path, f"oci:{layout.path}:one", "one", chosen=options(erofs=False))
    pull_one(repository_path, f"oci:{layout.path}:two", "two", chosen=options(erofs=False))
    result = pull_one(repository_path, f"oci:{layout.path}:one", "one")
    # The configuration moved for the sake of "one"; the manifest of "two" must lead to its new stream too.
    with Repository.open(str(repository_path)) as repository:
        now = repository.stream(f"oci-config-{result['config_digest']}")
        for name in ("one", "two"):
            manifest = imagestreams.read(repository, imagestreams.MANIFEST, repository.tags()[name])
            assert manifest and manifest.refs[f"config:{result['config_digest']}"] == now
        assert not repository.streams(imagestreams.PENDING)


def test_listing_tells_names_digests_platform_and_layers(images: Layout, repository_path: pathlib.Path) -> None:
    result = pull_one(repository_path, f"oci:{images.path}:gzip", "a")
    pull_one(repository_path, f"oci:{images.path}:gzip", "b/c:d")
    pull_one(repository_path, f"oci:{images.path}:artifact", "art")
    with Repository.open(str(repository_path)) as repository:
        found, complaints = image_list.list_images(repository)
        assert not complaints
        assert [image["names"] for image in found] == [["a", "b/c:d"], ["art"]]
        assert (
            found[0]["digest"] == result["digest"]
            and found[0]["labels"] == {"encoding": "gzip"}
            and found[0]["platform"].startswith("linux/")
        )
        assert (
            found[1]["kind"] == "artifact"
            and found[1]["artifact_type"] == "application/x-test"
            and found[1]["platform"] is None
        )
        assert image_list.list_images(repository, name="b/c:d")[0] == [found[0]]
        assert image_list.list_images(repository, digest=result["digest"])[0] == [found[0]]
        assert image_list.list_images(repository, name="none") == ([], [])


# ---- trust -----------------------------------------------------------------------------------------------------------


def poison(repository_path: pathlib.Path, cfsctl: Callable[..., str], diff_id: str, tar: bytes) -> None:
    """Register a tar under a diff_id that is not its own, as cfsctl does without a word."""
    cfsctl("--repo", repository_path, "oci", "import-layer", diff_id, stdin=tar)


def test_mistake_26_a_poisoned_layer_is_reported_and_replaced(
    images: Layout, repository_path: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    poison(repository_path, cfsctl, sha256(FIRST), small_tree(seed=99))
    reference = f"oci:{images.path}:gzip"
    predicted = pull_one(repository_path, reference, chosen=options(check=True))
    result = pull_one(repository_path, reference)
    assert predicted["streams"] == result["streams"] and f"oci-layer-{sha256(FIRST)}" in result["streams"]
    assert any("lied" in warning for warning in result["warnings"])
    assert layer_tar(repository_path, sha256(FIRST)) == FIRST


def test_a_layer_of_another_tool_is_proved_once_and_then_trusted(
    images: Layout, repository_path: pathlib.Path, cfsctl: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ansible_collections.composefs.oci.plugins.module_utils.store import proofs

    proved: list[Any] = []
    real = proofs.tar_sha256
    monkeypatch.setattr(proofs, "tar_sha256", lambda *arguments: proved.append(1) or real(*arguments))
    poison(repository_path, cfsctl, sha256(FIRST), FIRST)
    result = pull_one(repository_path, f"oci:{images.path}:gzip")
    assert [one["status"] for one in result["layers"]] == ["present", "new"]
    pull_one(repository_path, f"oci:{images.path}:gzip")
    assert len(proved) == 1


def test_a_raw_blob_under_a_diff_id_does_not_block_an_honest_pull(
    repository_path: pathlib.Path, place: pathlib.Path
) -> None:
    layout = Layout(place / "layout")
    layout.artifact([("application/x-tar", FIRST)], "artifact")
    layout.image([FIRST], "image")
    artifact = pull_one(repository_path, f"oci:{layout.path}:artifact", "artifact")
    image = pull_one(repository_path, f"oci:{layout.path}:image", "image")
    assert image["layers"][0]["diff_id"] == artifact["layers"][0]["digest"]
    assert layer_tar(repository_path, sha256(FIRST)) == FIRST
    for name in ("artifact", "image"):
        assert not pull_one(repository_path, f"oci:{layout.path}:{name}", name)["changed"]


def test_a_wrong_diff_id_registers_nothing_and_is_named(repository_path: pathlib.Path, place: pathlib.Path) -> None:
    layout = Layout(place / "layout")
    layout.image([layout.layer(FIRST, diff_id="sha256:" + "1" * 64)])
    with pytest.raises(errors.DigestMismatch, match="configuration says sha256:1111"):
        pull_one(repository_path, f"oci:{layout.path}:latest")
    assert names(repository_path) == set()


def test_a_container_layer_of_an_unknown_type_is_refused(repository_path: pathlib.Path, place: pathlib.Path) -> None:
    layout = Layout(place / "layout")
    layout.image([layout.layer(FIRST, media_type="application/x-unknown")])
    with pytest.raises(errors.UnsupportedMediaType):
        pull_one(repository_path, f"oci:{layout.path}:latest")
    assert names(repository_path) == set()


def test_layers_that_are_there_are_told_as_skipped(images: Layout, repository_path: pathlib.Path) -> None:
    single = Layout(images.path.parent / "skipped")
    single.image([FIRST])
    pull_one(repository_path, f"oci:{single.path}:latest", "single")
    recorder = Recorder()
    pull_all(repository_path, [pull.Request(f"oci:{images.path}:gzip", "image")], sink=recorder)
    assert [event.layer for event in recorder.events if event.kind == SKIPPED] == [sha256(FIRST)]


# ---- beside cfsctl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_cfsctl_accepts_our_repository_and_gives_back_the_tars(
    images: Layout, place: pathlib.Path, new_repository: Any, cfsctl: Callable[..., str], algorithm: str
) -> None:
    path = new_repository(place / algorithm, algorithm)
    result = pull_one(path, f"oci:{images.path}:gzip", "app")
    assert "status: ok" in cfsctl("--repo", path, "fsck") and "status: ok" in cfsctl("--repo", path, "oci", "fsck")
    assert "app" in cfsctl("--repo", path, "oci", "images")
    assert cfsctl("--repo", path, "oci", "compute-id", "app").strip() == result["image_id"]
    assert "0 removed" in cfsctl("--repo", path, "gc", "--dry-run")
    for layer, tar in zip(result["layers"], (FIRST, SECOND)):
        assert cfsctl("--repo", path, "oci", "layer", layer["diff_id"]).encode(errors="surrogateescape") == tar


def test_what_cfsctl_pulled_is_read_listed_and_pulled_again_without_a_change(
    images: Layout, repository_path: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    reference = f"oci:{images.path}:gzip"
    cfsctl("--repo", repository_path, "oci", "pull", reference, "app")
    before = names(repository_path)
    predicted = pull_one(repository_path, reference, "app", chosen=options(check=True))
    result = pull_one(repository_path, reference, "app")
    assert not predicted["changed"] and not result["changed"] and names(repository_path) == before
    with Repository.open(str(repository_path)) as repository:
        assert [image["names"] for image in image_list.list_images(repository)[0]] == [["app"]]


def test_a_collection_by_cfsctl_leaves_an_artifact_whose_blob_gave_its_name_away(
    repository_path: pathlib.Path, place: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    layout = Layout(place / "layout")
    layout.artifact([("application/x-tar", FIRST)], "artifact")
    layout.image([FIRST], "image")
    for name in ("artifact", "image"):
        pull_one(repository_path, f"oci:{layout.path}:{name}", name)
    assert "Objects: 0 removed" in cfsctl("--repo", repository_path, "gc")
    assert "status: ok" in cfsctl("--repo", repository_path, "fsck") and "status: ok" in cfsctl(
        "--repo", repository_path, "oci", "fsck"
    )
    for name in ("artifact", "image"):
        assert not pull_one(repository_path, f"oci:{layout.path}:{name}", name)["changed"]
    # What was kept for the artifact's sake goes with it.
    with Repository.open(str(repository_path)) as repository:
        assert repository.streams(imagestreams.KEPT)
        repository.untag("artifact")
    cfsctl("--repo", repository_path, "gc")
    with Repository.open(str(repository_path)) as repository:
        assert not repository.streams(imagestreams.KEPT)
    assert not pull_one(repository_path, f"oci:{layout.path}:image", "image")["changed"]


def test_cfsctl_pulls_our_image_again_without_new_streams(
    images: Layout, repository_path: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    reference = f"oci:{images.path}:gzip"
    result = pull_one(repository_path, reference, "app")
    cfsctl("--repo", repository_path, "oci", "pull", reference, "app")
    again = pull_one(repository_path, reference, "app")
    # cfsctl writes the manifest's refs in random order, so its stream may have moved: that is no change to us.
    assert not again["changed"] and again["image_id"] == result["image_id"]


def test_layer_and_config_streams_equal_cfsctls_to_the_byte(
    images: Layout, place: pathlib.Path, new_repository: Any, cfsctl: Callable[..., str]
) -> None:
    zstandard = pytest.importorskip("zstandard")
    if zstandard.ZSTD_VERSION != (1, 5, 7):
        pytest.skip(f"libzstd here is {'.'.join(map(str, zstandard.ZSTD_VERSION))}, cfsctl 0.9.4 has 1.5.7")
    ours, theirs = new_repository(place / "ours"), new_repository(place / "theirs")
    reference = f"oci:{images.path}:gzip"
    pull_one(ours, reference, "app")
    cfsctl("--repo", theirs, "oci", "pull", reference, "app")

    def streams(path: pathlib.Path) -> set[str]:
        return {name for name in names(path) if "oci-manifest" not in name}

    assert streams(ours) == streams(theirs)


def boot_tree() -> bytes:
    """A small image that can be booted: a kernel, a policy with labels, and the directories that the boot transform
    empties.
    """
    contexts = (
        b"/.* system_u:object_r:default_t:s0\n/usr(/.*)? system_u:object_r:usr_t:s0\n/etc(/.*)? "
        b"system_u:object_r:etc_t:s0\n"
    )
    directories = [
        b"usr",
        b"usr/lib",
        b"usr/lib/modules",
        b"usr/lib/modules/6.1",
        b"boot",
        b"sysroot",
        b"run",
        b"etc",
        b"etc/selinux",
        b"etc/selinux/targeted",
    ]
    directories += [b"etc/selinux/targeted/contexts", b"etc/selinux/targeted/contexts/files"]
    files = {
        b"usr/lib/modules/6.1/vmlinuz": b"kernel" * 100,
        b"usr/lib/modules/6.1/initramfs.img": b"initramfs" * 100,
        b"usr/large": bytes(range(256)) * 50,
        b"etc/small": b"small",
        b"boot/left-over": b"is emptied",
        b"etc/selinux/config": b"SELINUX=enforcing\nSELINUXTYPE=targeted\n",
        b"etc/selinux/targeted/contexts/files/file_contexts": contexts,
    }
    return tarbytes.tar(
        *(member(name, type=DIRECTORY, mode=0o755) for name in directories),
        *(member(name, data) for name, data in files.items()),
    )


def test_bootable_images_equal_those_of_cfsctl(
    place: pathlib.Path, new_repository: Any, cfsctl: Callable[..., str]
) -> None:
    layout = Layout(place / "layout")
    layout.image([boot_tree()])
    reference = f"oci:{layout.path}:latest"
    ours, theirs = new_repository(place / "ours"), new_repository(place / "theirs")
    chosen = replaced(options(), images=Images(plain=True, bootable=True))
    predicted = pull_one(ours, reference, "app", chosen=replaced(chosen, check=True))
    result = pull_one(ours, reference, "app", chosen=chosen)
    said = cfsctl("--repo", theirs, "oci", "pull", "--bootable", reference, "app")
    assert f"Boot image: {result['boot_image_id']}" in said
    assert predicted["streams"] == result["streams"]
    assert (
        cfsctl("--repo", ours, "oci", "compute-id", "--bootable", "app").strip()
        == result["boot_image_id"]
        != result["image_id"]
    )
    assert "status: ok" in cfsctl("--repo", ours, "oci", "fsck") and "0 removed" in cfsctl(
        "--repo", ours, "gc", "--dry-run"
    )
    again = pull_one(ours, reference, "app", chosen=chosen)
    assert not again["changed"] and again["boot_image_id"] == result["boot_image_id"]
    # A later pull that does not ask for the boot image leaves it alone.
    assert pull_one(ours, reference, "app")["boot_image_id"] == result["boot_image_id"]
    plain = new_repository(place / "plain")
    assert pull_one(plain, reference, "app")["boot_image_id"] is None
    gained = pull_one(plain, reference, "app", chosen=chosen)
    assert gained["changed"] and gained["boot_image_id"] == result["boot_image_id"]
