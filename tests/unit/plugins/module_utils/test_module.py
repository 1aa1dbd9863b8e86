# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How every module ends."""

from __future__ import annotations

import json
import os
import sys
import pathlib
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import module as threshold
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    ImageNotFound,
    InvalidOption,
    NotARepository,
    UnsafeRepository,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.progress import MESSAGE, Event, Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import create


ROOT = pathlib.Path(__file__).resolve().parents[4]


class Ended(BaseException):
    """Like SystemExit, which exit_json and fail_json raise."""


class Module:
    def __init__(self, **params: Any) -> None:
        self.params = params
        self.check_mode = False
        self.warnings: list[str] = []
        self.result: dict[str, Any] = {}

    def warn(self, warning: str) -> None:
        self.warnings.append(warning)

    def exit_json(self, **values: Any) -> None:
        self.result = {"failed": False, **values}
        raise Ended

    def fail_json(self, msg: str, **values: Any) -> None:
        self.result = {"failed": True, "msg": msg, **values}
        raise Ended


def run(main: Any, base: Any = None) -> dict[str, Any]:
    module = Module()
    with pytest.raises(Ended):
        threshold.run_module(module, main, base)
    return module.result


def test_results_stand_over_the_base() -> None:
    assert run(lambda module: {"changed": True, "x": 1}, {"changed": False, "y": 2}) == {
        "failed": False,
        "changed": True,
        "x": 1,
        "y": 2,
    }


def test_engine_errors_carry_their_code_and_the_base_as_it_is_by_then() -> None:
    base: dict[str, Any] = {"changed": False}

    def main(module: Any) -> dict[str, Any]:
        base["changed"] = True
        raise ImageNotFound("There is no x.", "Look.")

    assert run(main, base) == {
        "failed": True,
        "msg": "There is no x. Look.",
        "error": "image_not_found",
        "changed": True,
    }


def test_operating_system_errors_get_a_code() -> None:
    def main(module: Any) -> dict[str, Any]:
        raise OSError(28, "full", "/x")

    found = run(main)
    assert found["error"] == "no_space" and "/x" in found["msg"]


def test_a_bug_is_one_line_with_its_place_and_without_the_exceptions_words() -> None:
    def main(module: Any) -> dict[str, Any]:
        raise ValueError("password=hunter2")

    found = run(main)
    assert found["error"] == "internal_error"
    assert "ValueError" in found["msg"] and "test_module.py:" in found["msg"] and "main" in found["msg"]
    assert "hunter2" not in str(found) and "\n" not in found["msg"]


def test_a_python_that_lacks_a_part_of_its_library_is_named_and_a_file_of_the_collection_is_a_bug(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def main(module: Any) -> dict[str, Any]:
        monkeypatch.setitem(sys.modules, "_bz2", None)
        import _bz2  # noqa: F401  # it is the part that is built or not

        return {}

    def bug(module: Any) -> dict[str, Any]:
        raise ModuleNotFoundError("No module named 'ansible_collections.x.y'", name="ansible_collections.x.y")

    found = run(main)
    assert found["error"] == "missing_library" and "without its module bz2. Set ansible_python_interp" in found["msg"]
    assert run(bug)["error"] == "internal_error"


def test_lack_of_memory_is_said() -> None:
    def main(module: Any) -> dict[str, Any]:
        raise MemoryError

    assert run(main)["error"] == "out_of_memory"


def test_the_repository_is_the_tasks_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HOME", "/home/u")
    assert threshold.repository_path(Module(repository=None)) == "/sysroot/composefs"
    assert threshold.repository_path(Module(path="~/x/../r/"), "path") == "/home/u/r"


@pytest.mark.parametrize("path", ["", "images", "./images", "../images"])
def test_no_repository_is_guessed_from_a_path_that_is_empty_or_relative(path: str) -> None:
    with pytest.raises(InvalidOption, match="no absolute path"):
        threshold.repository_path(Module(repository=path))


def test_check_mode_takes_a_repository_that_is_not_there_yet_for_an_empty_one(tmp_path: pathlib.Path) -> None:
    module = Module()
    module.check_mode = True
    with threshold.opened_repository(module, str(tmp_path / "later")) as repository:
        assert repository.tags() == {} and repository.streams() == []
        scratch = repository.path
    assert "no repository" in module.warnings[0] and not os.path.exists(scratch) and not (tmp_path / "later").exists()


def foretell(monkeypatch: pytest.MonkeyPatch, path: pathlib.Path, **facts: Any) -> None:
    """Have earlier tasks foretold what becomes of the repository."""
    told = {"created": False, "upgraded": False, "unsafe": False, "algorithm": "sha256", "secure": False, **facts}
    monkeypatch.setenv("COMPOSEFS_OCI_FORETOLD", json.dumps([{"repository": str(path), **told}]))


def test_check_mode_takes_an_old_repository_for_what_an_earlier_task_makes_of_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "repository"
    create.create(str(path), fsverity.SHA256, create.DISABLED).close()
    (path / "objects").mkdir(exist_ok=True)
    (path / "meta.json").unlink()
    path.chmod(0o777)
    foretell(monkeypatch, path, upgraded=True, secure=True)
    module = Module()
    with pytest.raises(UnsafeRepository), threshold.opened_repository(module, str(path)):
        pass
    module.check_mode = True
    with threshold.opened_repository(module, str(path)) as repository:
        assert (repository.path, repository.secure, repository.algorithm.name) == (str(path), True, "sha256")
    assert module.warnings == []
    foretell(monkeypatch, path, upgraded=True, unsafe=True)
    with pytest.raises(UnsafeRepository), threshold.opened_repository(module, str(path)):
        pass
    path.chmod(0o755)
    foretell(monkeypatch, tmp_path / "another", upgraded=True)
    with pytest.raises(NotARepository), threshold.opened_repository(module, str(path)):
        pass


def test_check_mode_takes_the_root_of_a_new_file_system_for_the_repository_that_it_becomes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lost+found").mkdir()
    module = Module()
    module.check_mode = True
    with pytest.raises(NotARepository), threshold.opened_repository(module, str(tmp_path)):
        pass
    foretell(monkeypatch, tmp_path, created=True, algorithm="sha512")
    with threshold.opened_repository(module, str(tmp_path)) as repository:
        assert repository.place == str(tmp_path) and repository.algorithm.name == "sha512"


@pytest.mark.parametrize("there", [False, True])
def test_check_mode_refuses_a_repository_that_an_earlier_task_gives_away(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    path = tmp_path / "repository"
    if there:
        create.create(str(path), fsverity.SHA256, create.DISABLED).close()
    foretell(monkeypatch, path, created=not there, unsafe=True)
    module = Module()
    module.check_mode = True
    with pytest.raises(UnsafeRepository, match="earlier task"), threshold.opened_repository(module, str(path)):
        pass
    accepting = Module(unsafe_repository="accept")
    accepting.check_mode = True
    with threshold.opened_repository(accepting, str(path)) as repository:
        assert repository.tags() == {}


@pytest.mark.parametrize("check", [False, True])
def test_a_directory_with_other_things_in_it_is_no_repository_in_either_mode(
    tmp_path: pathlib.Path, check: bool
) -> None:
    (tmp_path / "other").touch()
    module = Module()
    module.check_mode = check
    with pytest.raises(NotARepository), threshold.opened_repository(module, str(tmp_path)):
        pass


def test_a_run_does_not_take_nothing_for_a_repository(tmp_path: pathlib.Path) -> None:
    with pytest.raises(NotARepository), threshold.opened_repository(Module(), str(tmp_path / "later")):
        pass


def test_a_failure_tells_what_was_found_out_and_nothing_else() -> None:
    base: dict[str, Any] = {
        **{"changed": False, "path": None, "repository": None, "bytes": 0, "by_kind": {"files": 0}},
        **{"names": [], "repaired": [], "state": "absent"},
    }

    def main(module: Any) -> dict[str, Any]:
        base.update(repository="/repo", repaired=[])
        raise ImageNotFound("Not there.")

    assert run(main, base) == {
        "failed": True,
        "changed": False,
        "repository": "/repo",
        "repaired": [],
        "state": "absent",
        "msg": "Not there.",
        "error": "image_not_found",
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="needs other users, which only root can be")
def test_the_file_of_progress_is_written_where_no_link_of_somebody_else_leads(tmp_path: pathlib.Path) -> None:
    (tmp_path / "victim").mkdir()
    for name, owner in (("own", 0), ("theirs", 12345)):
        (tmp_path / name).symlink_to("victim")
        os.lchown(tmp_path / name, owner, owner)
    with pytest.raises(UnsafeRepository, match="link theirs belongs to"):
        threshold.progress_files(Module(progress_file=str(tmp_path / "theirs/app.json")), None)
    assert os.listdir(tmp_path / "victim") == []
    (sink,) = threshold.progress_files(Module(progress_file=str(tmp_path / "own/app.json")), None)
    # What the directory is called afterwards does not matter: it is the one that was looked at.
    (tmp_path / "victim").rename(tmp_path / "renamed")
    (tmp_path / "victim").mkdir()
    sink.event(Event(MESSAGE, text="hello"))
    sink.close()
    assert os.listdir(tmp_path / "renamed") == ["app.json"] and os.listdir(tmp_path / "victim") == []


def test_where_no_progress_can_be_written_the_task_goes_on(tmp_path: pathlib.Path) -> None:
    module = Module(progress_file=str(tmp_path / "nowhere/app.json"))
    emit = Progress(*threshold.progress_files(module, str(tmp_path / "neither/own.json")))
    emit.message("one")
    threshold.close_progress(module, emit)
    assert os.listdir(tmp_path) == []
    assert len(module.warnings) == 1 and "nowhere/app.json cannot be written: No such file" in module.warnings[0]


@pytest.mark.parametrize("events", [0, 2])
def test_a_file_of_progress_that_is_lost_on_the_way_is_a_warning(tmp_path: pathlib.Path, events: int) -> None:
    module = Module(progress_file=str(tmp_path))
    emit = Progress(*threshold.progress_files(module, str(tmp_path / "own.json")))
    for number in range(events):
        emit.message(str(number))
    threshold.close_progress(module, emit)
    assert os.listdir(tmp_path) == ["own.json"]
    assert len(module.warnings) == 1 and "cannot be written: Is a directory" in module.warnings[0]


@pytest.mark.parametrize("path", sorted((ROOT / "plugins/modules").glob("composefs_*.py")), ids=lambda path: path.stem)
def test_every_module_takes_null_for_not_written(path: pathlib.Path) -> None:
    assert "guarded(AnsibleModule" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("docker://user:x@h.example/app:1", "docker://***@h.example/app:1"),
        ("user:x@h.example/app:1", "***@h.example/app:1"),
        ("oci:user:x@h.example/app", "***@h.example/app"),
        ("oci://user:x@h.example/app", "oci://***@h.example/app"),
        ("oci:/srv/layout:@0", ""),
        ("oci-archive:/srv/app@2.tar:@0", ""),
        ("dir:/srv/app@2", ""),
        ("composefs:/srv/a@b#app", ""),
        ("containers-storage:[overlay@/var/lib/containers]app", ""),
        ("docker://h.example/app@sha256:" + "1" * 64, ""),
    ],
)
def test_credentials_in_references_are_hidden_and_paths_are_not(written: str, shown: str) -> None:
    assert threshold.without_credentials(written) == (shown or written)
