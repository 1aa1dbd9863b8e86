# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_image_info through AnsibleModule, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofswriter import write_image
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_image_info
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape

SHAPE = {"changed", "repository", "images", "dumpfile"}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A repository with ``app``, which has an EROFS image, and ``bare``, which has none."""
    found = str(tmp_path / "repo")
    create.prepare(found, fsverity.SHA256, create.DISABLED)
    with Repository.open(found, write=True) as repository:
        image = bytearray()
        write_image(
            Directory(Stat(0o755), {b"file": Leaf(Stat(0o644), data=b"text")}), 1, fsverity.SHA256, image.extend
        )
        digest = repository.objects.put(bytes(image))
        repository.link_image(digest)
        for name, refs in (("app", {imagestreams.image_ref(1): digest}), ("bare", {})):
            raw = json.dumps(
                {"architecture": "amd64", "os": "linux", "author": name, "rootfs": {"type": "layers", "diff_ids": []}}
            ).encode()
            config = {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digests.digest_of(raw),
                "size": len(raw),
            }
            manifest = json.dumps(
                {"schemaVersion": 2, "mediaType": ocidocuments.OCI_MANIFEST, "config": config, "layers": []}
            ).encode()
            stream = imagestreams.store(repository, imagestreams.CONFIG, raw, refs)
            repository.register(imagestreams.CONFIG + config["digest"], stream)
            leading = imagestreams.store(
                repository, imagestreams.MANIFEST, manifest, {imagestreams.CONFIG_REF + config["digest"]: stream}
            )
            repository.register(imagestreams.MANIFEST + digests.digest_of(manifest), leading)
            repository.tag(name, digests.digest_of(manifest))
    return found


@pytest.fixture
def run(path: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def task(check: bool = False, **values: Any) -> dict[str, Any]:
        with (
            arguments({"repository": path, "_ansible_remote_tmp": "/tmp", "_ansible_check_mode": check, **values}),
            pytest.raises(SystemExit),
        ):
            composefs_image_info.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        require_shape(result, SHAPE)
        return result

    return task


def test_all_images_are_listed(run: Any, path: str) -> None:
    result = run()
    assert (result["changed"], result["repository"], result["dumpfile"]) == (False, path, None)
    assert [(image["names"], image["disk_use"]) for image in result["images"]] == [(["app"], None), (["bare"], None)]
    assert result["images"][0]["image_id"] and result["images"][1]["image_id"] is None
    assert run(name="nothing")["images"] == []


def test_images_are_chosen_by_patterns_of_names_and_labels(run: Any, path: str) -> None:
    def found(**values: Any) -> list[str]:
        return [name for image in run(**values)["images"] for name in image["names"]]

    with Repository.open(path, write=True) as repository:
        repository.tag("docker://r.test/team/app:1", repository.tag_digest("app") or "")
    assert found(names=["app"]) == found(names=["*/team/*"]) == ["app", "docker://r.test/team/app:1"]
    assert found(names=["b?re", "nothing"]) == ["bare"] and found(names=[]) == []
    assert found(labels={"author": "app"}) == [], "the configuration's author is no label"


def test_labels_have_to_fit_with_their_values() -> None:
    image = {"names": ["app"], "labels": {"version": "1.4", "empty": ""}}
    assert composefs_image_info.fits(image, None, {"version": "1.*", "empty": ""})
    assert composefs_image_info.fits(image, None, {"version": 1.4})
    assert not composefs_image_info.fits(image, None, {"version": "2.*"})
    assert not composefs_image_info.fits(image, None, {"other": "*"})


def test_totals_count_each_layer_once(run: Any) -> None:
    layer = {"digest": "sha256:a", "size": 5}
    images = [{"names": ["a", "b"], "layers": [layer]}, {"names": [], "layers": [layer, {"digest": "x", "size": 2}]}]
    assert composefs_image_info.totals(images) == {"images": 2, "names": 2, "layers": 2, "size": 7}
    assert run()["totals"] == {"images": 2, "names": 2, "layers": 0, "size": 0}


def test_disk_use_is_told_on_demand(run: Any) -> None:
    app, bare = (image["disk_use"] for image in run(disk_use=True)["images"])
    assert app["own"] > bare["own"] > 0
    assert (app["shared"], app["own_objects"], bare["own_objects"]) == (0, 5, 4)


def test_a_dumpfile_is_written_once(run: Any, tmp_path: Path) -> None:
    target = tmp_path / "app.dump"
    for check in (True, False):
        result = run(check, name="app", dumpfile=str(target))
        assert result["changed"] and result["dumpfile"] == str(target) and target.exists() != check
    assert b"/file 4 100644 1 0 0 0 0.0 - text -\n" in target.read_bytes()
    for check in (True, False):
        assert not run(check, name="app", dumpfile=str(target))["changed"]


@pytest.mark.parametrize(
    ("values", "error"),
    [({}, "invalid_option"), ({"name": "nothing"}, "image_not_found"), ({"name": "bare"}, "image_not_found")],
)
def test_a_dumpfile_needs_one_image(run: Any, tmp_path: Path, values: dict[str, Any], error: str) -> None:
    result = run(dumpfile=str(tmp_path / "out"), **values)
    assert result["failed"] and result["error"] == error and not result["changed"]
    assert not (tmp_path / "out").exists()


def test_the_documentation_has_the_return_values_of_the_code(run: Any) -> None:
    documented = yaml.safe_load(composefs_image_info.RETURN)
    assert set(documented) | {"changed"} == SHAPE | {"error", "totals"}
    assert set(documented["images"]["contains"]) == set(run()["images"][0]) == set(documented["images"]["sample"][0])


def test_a_repository_that_others_can_change_is_refused_unless_that_is_accepted(run: Any, path: str) -> None:
    os.chmod(path, 0o777)
    result = run()
    assert result["failed"] and result["error"] == "unsafe_repository" and "chmod" in result["msg"]
    accepted = run(unsafe_repository="accept")
    assert len(accepted["images"]) == 2 and "written by others" in str(accepted["warnings"])


def test_a_repository_that_is_only_foretold_has_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = str(tmp_path / "later")

    def task(**values: Any) -> dict[str, Any]:
        with (
            arguments({"repository": place, "_ansible_check_mode": True, "_ansible_remote_tmp": "/tmp", **values}),
            pytest.raises(SystemExit),
        ):
            composefs_image_info.main()
        return dict(json.loads(capsys.readouterr().out))

    found = task(disk_use=True)
    assert found["images"] == [] and set(found["totals"].values()) == {None}
    digest = "sha256:" + "1" * 64
    name = {"repository": place, "name": "app", "digest": digest, "absent": False}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([name]))
    found = task(disk_use=True)
    assert found["totals"] == {"images": 1, "names": 1, "layers": None, "size": None}
    (image,) = found["images"]
    assert (image["names"], image["digest"]) == (["app"], digest)
    assert {value for key, value in image.items() if key not in ("names", "digest")} == {None}
    assert task(name="app")["images"] == task(digest=digest)["images"] == found["images"]
    assert task(name="other")["images"] == task(labels={"a": "*"})["images"] == []
    # Nobody could be asked about these, so they may be one image.
    unknown = [{**name, "name": called, "digest": None} for called in ("app", "more")]
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps(unknown))
    found = task(disk_use=True)
    assert [image["names"] for image in found["images"]] == [["app"], ["more"]]
    assert {image["digest"] for image in found["images"]} == {None} == set(found["totals"].values())
    assert task(name="app", dumpfile=f"{place}.dump")["changed"]


def test_check_mode_does_not_fail_before_there_is_a_library_to_read_images(
    run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    hide_zstd()
    assert run()["error"] == "missing_library"
    told = run(check=True)
    assert not told.get("failed") and not told["changed"] and "zstd" in str(told["warnings"])
    assert told["repository"] and (told["images"], told["totals"], told["dumpfile"]) == (None, None, None)
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(check=True)["error"] == "missing_library"
