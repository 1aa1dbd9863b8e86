# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_repository_info through AnsibleModule, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "module_utils"))

from filled_repository import TAGS, Repo, copy_of, fill, make_layout, rotten_file

from ansible_collections.composefs.oci.plugins.module_utils.operations import check, maintenance, prune
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import marks
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.modules import composefs_repository_info
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments


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
    def task(**values: Any) -> dict[str, Any]:
        common = {"repository": str(repo.path), "_ansible_remote_tmp": "/tmp"}
        with arguments({**common, **values}), pytest.raises(SystemExit):
            composefs_repository_info.main()
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert not result["changed"] and "repository" in result
        return result

    return task


def test_everything_is_counted(run: Any, repo: Repo) -> None:
    found = run()
    objects = list((repo.path / "objects").glob("??/*"))
    assert found["bytes"] == sum(one.stat().st_size for one in objects) and found["bytes_unused"] == 0
    assert found["counts"] == {
        "names": 4,
        "manifests": 4,
        "configs": 4,
        "layers": 5,
        "streams": 13,
        "images": 3,
        "objects": len(objects),
        "references": 4,
        "problems": 0,
    }
    assert found["algorithm"] == "sha256" and not found["verity"] and found["format"]["erofs_formats"] == [1]
    assert found["free_bytes"] > 0 and found["filesystem"] and found["sharing"] > 1


def test_each_name_tells_what_it_takes(run: Any, repo: Repo) -> None:
    names = {one["name"]: one for one in run()["names"]}
    assert set(names) == set(TAGS)
    with Repository.open(str(repo.path)) as repository:
        freed = prune.prune(repository, prune.Wish(), Progress(), True, lambda _one: []).by_name
    assert {name: one["own"] for name, one in names.items()} == freed
    assert names["b"]["shared"] > names["artifact"]["shared"] == 0
    assert names["a"]["ref"].endswith("/a") and names["a"]["digest"].startswith("sha256:") and names["a"]["since"]


def test_what_nothing_needs_is_told(run: Any, repo: Repo) -> None:
    with repo.open() as repository:
        repository.untag("artifact")
    found = run()
    with Repository.open(str(repo.path)) as repository:
        pruned = prune.prune(repository, prune.Wish(), Progress(), True, lambda _one: [])
    assert found["bytes_unused"] == pruned.bytes > 0


def test_who_uses_it_and_what_did_not_end(run: Any, repo: Repo) -> None:
    assert run()["lock_holders"] == [] and run()["unfinished_imports"] == []
    code = "import fcntl,os,sys;fd=os.open(sys.argv[1],0);fcntl.flock(fd,fcntl.LOCK_SH);print('ok',flush=True);input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(repo.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout and other.stdout.readline() == b"ok\n"
        (holder,) = run()["lock_holders"]
        assert holder["pid"] == other.pid and "python" in holder["command"] and not holder["exclusive"]
        other.communicate(b"\n")
    mark = repo.path / ".composefs-oci/imports/0123456789abcdef"
    mark.parent.mkdir(exist_ok=True)
    mark.write_text(json.dumps({"boot_id": "another", "pid": 1, "started": 1e9}))
    assert run()["unfinished_imports"] == [{"pid": 1, "started": "2001-09-09T01:46:40Z", "alive": False}]
    mark.write_text(json.dumps({"boot_id": marks.boot_id(), "pid": 1, "started": 1e9}))
    assert run()["unfinished_imports"][0]["alive"]


def test_the_last_check_is_told(run: Any, repo: Repo) -> None:
    assert run()["last_check"] is None
    rotten_file(repo)
    with Repository.open(str(repo.path)) as repository:
        check.check(repository, check.Wish(check.OBJECTS, (), 1), Progress(), lambda _one: [])
    last = run()["last_check"]
    assert last["level"] == "objects" and last["findings"] == {"object_damaged": 1}


def test_the_last_maintenance_is_told(run: Any, repo: Repo) -> None:
    assert run()["last_maintenance"] is None
    with Repository.open(str(repo.path), write=True) as repository:
        result = maintenance.maintain(repository, maintenance.Wish(), Progress())
    last = run()["last_maintenance"]
    assert last == {"version": 1, **result}
    documented = yaml.safe_load(composefs_repository_info.RETURN)["last_maintenance"]["contains"]
    assert set(documented) == set(result)


def test_a_failure_has_its_code(run: Any) -> None:
    assert run(repository="/nonexistent")["error"] == "not_a_repository"


def test_what_earlier_tasks_of_a_run_in_check_mode_foretold_is_listed_and_the_rest_is_null(
    run: Any, repo: Repo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = {"repository": str(tmp_path / "later")}
    made = {**later, "created": True, "upgraded": False, "unsafe": False, "algorithm": "sha512", "secure": True}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([made]))
    found = run(**later, _ansible_check_mode=True)
    assert (found["algorithm"], found["verity"], found["names"]) == ("sha512", True, [])
    assert {*found["counts"].values(), found["bytes"], found["bytes_unused"], found["sharing"]} == {None}
    assert found["filesystem"] and found["free_bytes"] > 0
    name = {"name": "app", "digest": "sha256:" + "1" * 64, "absent": False, **later}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([made, name]))
    found = run(**later, _ansible_check_mode=True)
    assert found["counts"]["names"] == 1
    assert [(one["name"], one["digest"], one["own"]) for one in found["names"]] == [("app", name["digest"], None)]
    # Names of a repository that is there move, come and go as well.
    gone = {**name, "repository": str(repo.path), "name": "a", "digest": None, "absent": True}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([gone, {**name, "repository": str(repo.path)}]))
    found = run(_ansible_check_mode=True)
    assert found["counts"] == {**dict.fromkeys(found["counts"]), "names": 4} and found["bytes"] is None
    assert "app" in [one["name"] for one in found["names"]] and "a" not in [one["name"] for one in found["names"]]
    assert run()["counts"]["objects"] > 0


def test_check_mode_does_not_fail_before_there_is_a_library_to_read_images(
    run: Any, monkeypatch: pytest.MonkeyPatch, hide_zstd: Any
) -> None:
    hide_zstd()
    assert run()["error"] == "missing_library"
    told = run(_ansible_check_mode=True)
    assert not told.get("failed") and not told["changed"] and "zstd" in str(told["warnings"])
    nulls = set(yaml.safe_load(composefs_repository_info.RETURN)) - {"repository", "error"}
    assert {key: told[key] for key in nulls} == dict.fromkeys(nulls) and told["repository"]
    # A task that only asks, in a run that is not in check mode: nobody is going to install anything.
    monkeypatch.setenv("COMPOSEFS_OCI_ASKS", "1")
    assert run(_ansible_check_mode=True)["error"] == "missing_library"
