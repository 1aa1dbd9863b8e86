# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""composefs_repository through AnsibleModule, in this process."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)

import yaml

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.modules import composefs_repository
from ansible_collections.composefs.oci.tests.support.moduleargs import arguments, require_shape

SHAPE = {"changed", "path", *composefs_repository.FACTS}


def run(capsys: pytest.CaptureFixture[str], **values: Any) -> dict[str, Any]:
    values.setdefault("_ansible_remote_tmp", "/tmp")
    with arguments(values), pytest.raises(SystemExit):
        composefs_repository.main()
    result = json.loads(capsys.readouterr().out)
    require_shape(result, SHAPE)
    return result


def check(capsys: pytest.CaptureFixture[str], **values: Any) -> dict[str, Any]:
    return run(capsys, _ansible_check_mode=True, _ansible_diff=True, **values)


def test_a_repository_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "repo")
    first = run(capsys, path=path, verity="disabled")
    assert (first["changed"], first["created"], first["upgraded"]) == (True, True, False)
    assert (first["path"], first["algorithm"], first["verity"], first["formats"]) == (path, "sha512", "optional", [1])
    assert first["free_bytes"] > 0 and first["filesystem"] != "unknown"
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    second = run(capsys, path=path, verity="disabled")
    assert (second["changed"], second["created"], second["upgraded"]) == (False, False, False)


def test_check_mode_predicts_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "repo")
    predicted = check(capsys, path=path, verity="preferred", mode="0750")
    assert list(tmp_path.iterdir()) == []
    assert predicted["changed"] and predicted["created"]
    assert predicted["diff"]["before"] == {"path": path, "state": "absent"}
    assert predicted["diff"]["after"] == {
        "path": path,
        "state": "present",
        "algorithm": "sha512",
        "verity": predicted["verity"],
        "formats": [1],
        "mode": "0750",
    }
    real = run(capsys, path=path, verity="preferred", mode="0750")
    assert {name: real[name] for name in ("changed", "created", "algorithm", "verity", "formats", "filesystem")} == {
        name: predicted[name] for name in ("changed", "created", "algorithm", "verity", "formats", "filesystem")
    }
    after = check(capsys, path=path, verity="preferred", mode="0750")
    assert not after["changed"]
    assert after["diff"]["before"] == after["diff"]["after"]


def test_mode_and_owner_of_an_existing_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "repo")
    run(capsys, path=path, verity="disabled")
    predicted = check(capsys, path=path, verity="disabled", mode="u=rwx,g=rx,o=")
    assert predicted["changed"] and not predicted["created"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o700
    assert (predicted["diff"]["before"]["mode"], predicted["diff"]["after"]["mode"]) == ("0700", "0750")
    assert run(
        capsys, path=path, verity="disabled", mode="u=rwx,g=rx,o=", owner=str(os.getuid()), group=str(os.getgid())
    )["changed"]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o750
    assert not run(capsys, path=path, verity="disabled", mode="0750", owner=str(os.getuid()))["changed"]
    assert not run(capsys, path=path, verity="disabled")["changed"], "without mode an existing directory keeps its own"


def test_an_unknown_owner_is_noticed_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, path=str(tmp_path / "repo"), verity="disabled", owner="nobody-of-that-name")
    assert result["failed"] and "nobody-of-that-name" in result["msg"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verity", "state"), [("required", "required"), ("preferred", "required"), ("disabled", "optional")]
)
def test_verity_is_what_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verity_kernel: Any, verity: str, state: str
) -> None:
    result = run(capsys, path=str(tmp_path / "repo"), verity=verity)
    assert (result["verity"], result["verity_supported"]) == (state, True)


def test_missing_verity_is_said_before_anything_is_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verity_kernel: Any
) -> None:
    verity_kernel.supported = False
    for result in (check(capsys, path=str(tmp_path / "a/b")), run(capsys, path=str(tmp_path / "a/b"))):
        assert result["failed"] and result["error"] == "verity_unsupported" and not result["changed"]
        assert result["path"] == str(tmp_path / "a/b")
    assert list(tmp_path.iterdir()) == []
    assert run(capsys, path=str(tmp_path / "a/b"), verity="preferred")["verity_supported"] is False


def test_a_repository_of_another_algorithm_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create.prepare(str(tmp_path / "repo"), fsverity.SHA256, "disabled")
    result = run(capsys, path=str(tmp_path / "repo"), verity="disabled")
    assert result["failed"] and result["error"] == "incompatible_repository" and "sha256" in result["msg"]


def test_a_legacy_repository_is_upgraded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"x" * 100
    file = tmp_path / "repo/objects" / fsverity.object_path(fsverity.digest(content, fsverity.SHA256))
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    for _time in range(2):
        predicted = check(capsys, path=str(tmp_path / "repo"), algorithm="sha256", verity="preferred")
        assert (predicted["changed"], predicted["created"], predicted["upgraded"]) == (True, False, True)
    done = run(capsys, path=str(tmp_path / "repo"), algorithm="sha256", verity="preferred")
    assert (done["changed"], done["upgraded"], done["formats"]) == (True, True, [1])
    assert not run(capsys, path=str(tmp_path / "repo"), algorithm="sha256", verity="preferred")["changed"]


def test_a_groups_default_for_repository_serves_this_module_and_path_goes_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, repository=str(tmp_path / "one"), verity="disabled")["path"] == str(tmp_path / "one")
    assert run(capsys, repository=str(tmp_path / "one"), path=str(tmp_path / "two"), verity="disabled")["path"] == str(
        tmp_path / "two"
    )


def test_documentation_and_argument_spec_say_the_same() -> None:
    documented = yaml.safe_load(composefs_repository.DOCUMENTATION)["options"]
    assert set(documented) == set(composefs_repository.ARGUMENT_SPEC)
    for name, spec in composefs_repository.ARGUMENT_SPEC.items():
        for key in ("type", "choices", "default", "aliases"):
            assert documented[name].get(key) == spec.get(key), name


def test_what_is_returned_is_documented() -> None:
    assert set(yaml.safe_load(composefs_repository.RETURN)) == (SHAPE - {"changed"}) | {"error"}


# --- a place that others can change
# ----------------------------------------------------------------------------------------------------------------------


def test_a_repository_that_others_can_change_is_told_and_stays_idempotent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "repo")
    made = run(capsys, path=path, verity="disabled", mode="0770")
    assert made["unsafe"] is True and "written by others" in str(made["warnings"])
    again = run(capsys, path=path, verity="disabled", mode="0770")
    assert (again["changed"], again["unsafe"]) == (False, True)
    mended = run(capsys, path=path, verity="disabled", mode="0755")
    assert (mended["changed"], mended["unsafe"]) == (True, False)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_repository_of_somebody_else_is_told_and_stays_idempotent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "repo")
    for changed in (True, False):
        result = run(capsys, path=path, verity="disabled", owner="12345")
        assert (result["changed"], result["unsafe"]) == (changed, True)
    assert os.stat(path).st_uid == 12345 and os.stat(f"{path}/meta.json").st_uid == 0


def test_owner_and_mode_are_set_where_the_repository_is_although_its_name_moves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may write to the directory above can put a link in its place at any moment."""
    path, victim = tmp_path / "repo", tmp_path / "victim"
    victim.mkdir(mode=0o700)
    real = create.prepare_place

    def late(*arguments: Any, **options: Any) -> Any:
        done = real(*arguments, **options)
        path.rename(tmp_path / "moved")
        path.symlink_to(victim)
        return done

    monkeypatch.setattr(create, "prepare_place", late)
    assert run(capsys, path=str(path), verity="disabled", mode="0755")["changed"]
    assert stat.S_IMODE((tmp_path / "moved").stat().st_mode) == 0o755
    assert stat.S_IMODE(victim.stat().st_mode) == 0o700 and os.listdir(victim) == []
