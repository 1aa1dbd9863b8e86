# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_prune through AnsibleModule, in this process."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidOption
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.operations import prune
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_prune
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape

SHAPE = {
    *("changed", "repository", "names", "images", "streams", "objects", "bytes", "bytes_by_kind", "by_name", "held"),
    "problems",
}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A repository with the artifacts ``app:1`` and ``app:2``, and garbage."""
    found = str(tmp_path / "repo")
    create.prepare(found, fsverity.SHA256, create.DISABLED)
    with Repository.open(found, write=True) as repository:
        repository.objects.put(b"garbage" * 100)
        for name in ("app:1", "app:2"):
            raw = json.dumps({"of": name}).encode()
            config = {"mediaType": "application/x", "digest": digests.digest_of(raw), "size": len(raw)}
            manifest = json.dumps(
                {"schemaVersion": 2, "mediaType": ocidocuments.OCI_MANIFEST, "config": config, "layers": []}
            ).encode()
            stream = imagestreams.store(repository, imagestreams.CONFIG, raw, {})
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
            composefs_prune.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        require_shape(result, SHAPE)
        return result

    return task


def test_garbage_goes_once_and_check_mode_says_the_same(run: Any, path: str) -> None:
    foretold = run(check=True)
    result = run()
    for key in SHAPE:
        assert result[key] == foretold[key], key
    assert result["changed"] and result["objects"] == 1 and result["bytes"] == 700 and result["names"] == []
    assert result["by_name"].keys() == {"app:1", "app:2"} and all(result["by_name"].values())
    again = run()
    assert not again["changed"] and again["bytes"] == 0 and again["by_name"] == result["by_name"]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    "values, told",
    [
        ({"keep_last": 2}, ["so keep_last says nothing"]),
        ({"keep_last": 2, "older_than": "1d"}, ["so keep_last and older_than say nothing"]),
        ({"keep": ["*"]}, []),
        ({"remove": ["other*"], "keep_last": 2}, []),
    ],
)
def test_options_that_say_nothing_without_remove_are_told(
    run: Any, warned: list[str], check: bool, values: dict[str, Any], told: list[str]
) -> None:
    assert run(check=check, **values)["names"] == []
    assert len(warned) == len(told) and all(text in one for text, one in zip(told, warned))


@pytest.mark.parametrize("check", [True, False])
def test_a_pattern_that_only_lacks_the_transport_of_default_names_is_told(
    run: Any, path: str, warned: list[str], check: bool
) -> None:
    with Repository.open(path, write=True) as repository:
        repository.tag("docker://h.test/x:1", repository.tags()["app:1"])
    assert run(check=check, remove=["h.test/x:*", "nothing*"])["names"] == []
    (warning,) = warned
    assert "write 'docker://h.test/x:*'" in warning
    assert run(check=check, remove=["docker://*"], keep=["h.test/*"])["names"] == []
    result = run(check=check, remove=["docker://h.test/*", "app:*"], keep=["other.test/*"])
    assert result["names"] == ["app:1", "app:2", "docker://h.test/x:1"] and warned == [warning]


def test_names_go_by_patterns_and_the_difference_shows_them(run: Any, path: str) -> None:
    os.utime(f"{path}/streams/refs/oci/app:1", (1e9, 1e9), follow_symlinks=False)
    assert run(True, remove=["app:*"], keep=["app:*"])["names"] == []
    assert run(True, remove=["app:*"], older_than="1d")["names"] == ["app:1"]
    result = run(remove=["app:*"], keep_last=1)
    assert result["names"] == result["diff"]["before"]["names"] == ["app:1"] and len(result["streams"]) == 2
    with Repository.open(path) as repository:
        assert list(repository.tags()) == ["app:2"]


@pytest.mark.parametrize(
    ("text", "value"), [(None, 0), ("90", 90), ("90s", 90), ("2m", 120), ("1.5h", 5400), ("1d", 86400), ("2w", 1209600)]
)
def test_times_are_understood(text: str | None, value: float) -> None:
    assert prune.seconds(text) == value


@pytest.mark.parametrize("text", ["", "d", "-1", "1y", "1 d", "1e3"])
def test_times_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption):
        prune.seconds(text)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"older_than": "soon"}, "invalid_option"),
        ({"keep_last": -1}, "invalid_option"),
        ({"timeout": -1}, "invalid_option"),
        ({"repository": "/nonexistent"}, "not_a_repository"),
    ],
)
def test_failures_have_the_same_shape(run: Any, values: dict[str, Any], error: str) -> None:
    result = run(**values)
    assert result["failed"] and result["error"] == error and not result["changed"]


def test_progress_is_written_where_it_is_asked_for(run: Any, tmp_path: Path) -> None:
    target = tmp_path / "progress"
    run(progress_file=str(target))
    assert json.loads(target.read_text())["finished"]


def test_check_mode_foretells_a_change_before_there_is_a_library_to_read_images(
    run: Any, path: str, monkeypatch: pytest.MonkeyPatch, warned: list[str], hide_zstd: Any
) -> None:
    hide_zstd()
    assert run(remove=["*"])["error"] == "missing_library"
    told = run(True, remove=["*"])
    assert told["changed"] and told["repository"] == path and "zstd" in str(warned)
    nulls = {*SHAPE, "links"} - {"changed", "repository"}
    assert {key: told[key] for key in nulls} == dict.fromkeys(nulls)
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(True, remove=["*"])["error"] == "missing_library"
