# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_remote_info through AnsibleModule, with layouts, a real registry and the real skopeo."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "support"))

from aptroot import Unavailable
from ociimage import Layout
from registry import Registry, free_port

from ansible_collections.composefs.oci.plugins.modules import composefs_remote_info
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

FILES = tar(member("usr/", type=DIRECTORY), member("usr/one", b"1" * 300))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def task(**values: Any) -> dict[str, Any]:
        with (
            arguments({"_ansible_remote_tmp": "/tmp", "_ansible_check_mode": False, **values}),
            pytest.raises(SystemExit),
        ):
            composefs_remote_info.main()
        return dict(json.loads(capsys.readouterr().out))

    return task


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = Layout(tmp_path_factory.mktemp("images") / "layout")
    layout.image([FILES], "app", labels={"version": "1.4"})
    layout.image([FILES], "nowhere", os="", architecture="")
    layout.multi_platform({"linux/amd64": [FILES], "linux/arm64": [FILES]}, "both")
    return layout


@pytest.fixture(scope="module")
def registry(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    try:
        with Registry(tmp_path_factory.mktemp("registry")) as running:
            running.push(f"{layout.path}:both", "both:1", "--all")
            yield running
    except Unavailable as error:
        pytest.skip(str(error))


def test_a_layout_is_described_without_a_repository(run: Any, layout: Layout) -> None:
    found = run(ref=f"oci:{layout.path}:app", repository="/nowhere")
    assert not found["changed"] and found["digest"] == found["registry_digest"] and found["index_digest"] is None
    assert found["labels"] == {"version": "1.4"} and found["kind"] == "container" and found["pinned"] is None
    assert found["size"] == sum(layer["size"] for layer in found["layers"]) > 0 and len(found["layers"]) == 1


@pytest.mark.slow
def test_an_image_that_names_no_platform_has_none(run: Any, layout: Layout) -> None:
    found = run(ref=f"oci:{layout.path}:nowhere")
    assert found["kind"] == "container" and found["platform"] is None


def test_an_index_in_a_registry_tells_all_platforms_and_the_one_asked_for(run: Any, registry: Registry) -> None:
    ref = registry.reference("both:1")
    found = run(ref=ref, platform="linux/arm64", validate_certs=False)
    assert found["platform"] == "linux/arm64" and found["skopeo_version"] and found["policy"]
    assert {entry["platform"] for entry in found["manifests"]} == {"linux/amd64", "linux/arm64"}
    assert found["registry_digest"] in [entry["digest"] for entry in found["manifests"]]
    assert found["index_digest"] not in (None, found["registry_digest"])
    again = run(ref=found["pinned"], validate_certs=False)
    assert again["registry_digest"] == found["registry_digest"] and again["index_digest"] is None
    assert run(ref=ref, platform="linux/s390x", validate_certs=False)["error"] == "platform_not_found"
    assert run(ref=registry.reference("nothing:1"), validate_certs=False)["error"] == "image_not_found"


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"ref": "oci:/nowhere:x"}, "image_not_found"),
        ({"ref": "a b"}, "invalid_reference"),
        ({"ref": "x", "platform": "///"}, "invalid_platform"),
        ({"ref": "x", "timeout": 0}, "invalid_option"),
    ],
)
def test_what_cannot_be_looked_up_is_told_by_a_code(run: Any, values: dict[str, Any], error: str) -> None:
    failed = run(**values)
    assert failed["failed"] and failed["error"] == error, failed["msg"]


@pytest.mark.slow
def test_a_registry_that_is_not_there_is_named_with_how_often_it_was_asked(run: Any) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    ref = f"docker://127.0.0.1:{free_port()}/x:1"
    failed = run(ref=ref, retries=1)
    facts = {key: failed[key] for key in ("error", "ref", "attempts")}
    assert facts == {"error": "registry_unreachable", "ref": ref, "attempts": 2} and failed["seconds"] > 0
    assert "It was tried 2 times in" in failed["msg"] and None not in failed.values()


def test_credentials_in_a_reference_stand_nowhere(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        arguments({"ref": "docker://somebody:hunter2@h.example/x", "_ansible_remote_tmp": "/tmp"}),
        pytest.raises(SystemExit),
    ):
        composefs_remote_info.main()
    output = capsys.readouterr().out
    assert "hunter2" not in output and '"failed": true' in output


def test_check_mode_does_not_fail_before_there_is_skopeo(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"ref": "docker://registry.test/app:1", "executable": "/nowhere/skopeo"}
    assert run(**values)["error"] == "skopeo_missing"
    told = run(_ansible_check_mode=True, **values)
    assert not told["changed"] and not told.get("failed") and told["ref"] == "docker://registry.test/app:1"
    documented = yaml.safe_load(composefs_remote_info.RETURN)
    nulls = set(documented) - {"ref", "error", "attempts", "seconds"}
    assert {key: told[key] for key in nulls} == dict.fromkeys(nulls) and "/nowhere/skopeo" in str(told["warnings"])
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(_ansible_check_mode=True, **values)["error"] == "skopeo_missing"


def test_check_mode_does_not_fail_before_there_is_a_library_for_an_archive(
    run: Any, tmp_path: Path, hide_zstd: Any
) -> None:
    (tmp_path / "app.tar").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(2000))
    hide_zstd()
    values = {"ref": f"oci-archive:{tmp_path}/app.tar", "unenforced_policy": "ignore"}
    assert run(**values)["error"] == "missing_library"
    told = run(_ansible_check_mode=True, **values)
    assert not told.get("failed") and told["digest"] is None and "zstd" in str(told["warnings"])
