# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_check through AnsibleModule, in this process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from filled_repository import Repo, copy_of, fill, make_layout, rotten_file, rotten_image, stray

from ansible_collections.composefs.oci.plugins.module_utils.store import namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_check
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape

SHAPE = {"changed", "repository", "findings", "repaired", "checked"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("filled")
    fill(base / "repo", make_layout(base / "layout"))
    return base / "repo"


@pytest.fixture
def repo(filled: Path, tmp_path: Path) -> Repo:
    return Repo(copy_of(filled, tmp_path / "repo"))


@pytest.fixture
def run(repo: Repo, capsys: pytest.CaptureFixture[str]) -> Any:
    def task(check: bool = False, **values: Any) -> dict[str, Any]:
        common = {"repository": str(repo.path), "_ansible_remote_tmp": "/tmp", "_ansible_check_mode": check}
        with arguments({**common, **values}), pytest.raises(SystemExit):
            composefs_check.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        require_shape(result, SHAPE)
        return result

    return task


@pytest.mark.parametrize("level", ["quick", "objects", "full"])
def test_a_whole_repository_passes(run: Any, repo: Repo, level: str) -> None:
    result = run(level=level)
    assert "failed" not in result and result["findings"] == [] and not result["changed"]
    assert result["checked"]["level"] == level and result["repository"] == str(repo.path)


def test_findings_fail_the_task_and_are_told_all_the_same(run: Any, repo: Repo) -> None:
    what = rotten_file(repo)
    assert "failed" not in run()
    result = run(level="objects")
    assert result["failed"] and result["error"] == "repository_damaged" and what in result["msg"]
    (finding,) = result["findings"]
    assert {key: finding[key] for key in ("code", "object", "names", "repairable")} == {
        "code": "object_damaged",
        "object": what,
        "names": ["b", "c"],
        "repairable": "source",
    }
    assert not result["changed"]


def test_findings_need_not_fail_the_task(run: Any, repo: Repo) -> None:
    rotten_file(repo)
    result = run(level="objects", fail_on_findings=False)
    assert "failed" not in result and len(result["findings"]) == 1


def test_only_some_images_are_checked(run: Any, repo: Repo) -> None:
    rotten_file(repo)
    assert "failed" not in run(level="objects", images=["a"])
    assert run(level="objects", images=["nobody"])["error"] == "image_not_found"


@pytest.mark.slow
def test_a_repair_is_foretold_done_and_not_done_again(run: Any, repo: Repo) -> None:
    what = rotten_image(repo)
    foretold = run(True, level="objects", repair=True)
    assert foretold["changed"] and "failed" not in foretold and len(foretold["findings"]) == 1
    assert run(level="objects", fail_on_findings=False)["findings"]
    result = run(level="objects", repair=True)
    assert result["changed"] and "failed" not in result and result["findings"] == []
    assert [(one["object"], one["how"]) for one in result["repaired"]] == [(what, "rebuilt")]
    assert [(one["object"], one["how"]) for one in foretold["repaired"]] == [(what, "rebuilt")]
    assert foretold["repaired"][0]["message"].endswith(" would be made anew of what is here.")
    assert not run(level="objects", repair=True)["changed"]


def test_a_repair_takes_from_another_repository(run: Any, repo: Repo, filled: Path) -> None:
    what = rotten_file(repo)
    for check in (True, False):
        result = run(check, level="objects", repair=True, source=str(filled))
        assert [(one["object"], one["how"]) for one in result["repaired"]] == [(what, "copied")]
        assert "failed" not in result and result["changed"]


def test_what_cannot_be_repaired_fails_the_task(run: Any, repo: Repo) -> None:
    stray(repo)
    result = run(repair=True)
    assert result["failed"] and result["error"] == "repository_damaged" and not result["changed"]


def test_what_is_said_of_findings_is_a_sentence_and_promises_nothing(run: Any, repo: Repo) -> None:
    stray(repo)
    with Repository.open(str(repo.path)) as repository:
        name, manifest = next(iter(repository.tags().items()))
        repository.tag("a/../../b", manifest)
    assert "repair: true" not in run()["msg"]
    (repo.path / "streams/refs/oci/..%2F..%2Fgone").symlink_to("nowhere")
    told = run()
    assert ". and" not in told["msg"] and ", and 1 more. " in told["msg"], told["msg"]
    assert told["findings"][0]["message"].rstrip(".") in told["msg"]
    rotten_file(repo)
    assert "repair: true may help." in run(level="objects")["msg"]
    assert "repair: true" not in run(level="objects", repair=True, images=["a"]).get("msg", "")


def test_a_password_is_for_one_registry(run: Any, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair fetches each image from where it came from; the password would go to each registry that asks."""
    who = {"username": "anna", "password": "hunter2"}
    assert "failed" not in run(repair=True, **who)
    with Repository.open(str(repo.path)) as repository:
        name, manifest = next(iter(repository.tags().items()))
        repository.tag("second", manifest)
        for one, ref in ((name, "docker://registry.example.com/app"), ("second", "docker://other.example.com/app")):
            namerecords.remember(repository, one, namerecords.NameRecord(ref, manifest))
    for chosen in ({}, {"images": [name, "second"]}):
        result = run(repair=True, **who, **chosen)
        assert result["error"] == "invalid_option" and "other.example.com, registry.example.com" in result["msg"]
        assert "hunter2" not in json.dumps(result)
    assert "failed" not in run(repair=True, images=["second"], **who)


def test_the_priority_is_lowered_on_demand(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "nice", asked.append)
    run(nice=7, ionice="idle")
    assert asked == [7]
    assert run(nice=20)["error"] == run(nice=-1)["error"] == "invalid_option"


def test_a_failure_has_the_same_shape(run: Any) -> None:
    assert run(repository="/nonexistent")["error"] == "not_a_repository"


def test_check_mode_does_not_fail_before_there_is_a_library_to_read_images(
    run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    hide_zstd()
    assert run()["error"] == "missing_library"
    told = run(check=True)
    assert not told.get("failed") and not told["changed"] and "zstd" in str(told["warnings"])
    assert (told["findings"], told["repaired"], told["checked"]) == (None, None, None)
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(check=True)["error"] == "missing_library"
