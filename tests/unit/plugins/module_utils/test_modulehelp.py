# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How every module ends."""

from __future__ import annotations

import os
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import modulehelp
from ansible_collections.composefs.oci.plugins.module_utils.errors import ImageNotFound


class Ended(BaseException):
    """Like SystemExit, which exit_json and fail_json raise."""


class Module:
    def __init__(self, **params: Any) -> None:
        self.params = params
        self.result: dict[str, Any] = {}

    def exit_json(self, **values: Any) -> None:
        self.result = {"failed": False, **values}
        raise Ended

    def fail_json(self, msg: str, **values: Any) -> None:
        self.result = {"failed": True, "msg": msg, **values}
        raise Ended


def run(main: Any, base: Any = None) -> dict[str, Any]:
    module = Module()
    with pytest.raises(Ended):
        modulehelp.run_module(module, main, base)
    return module.result


def test_results_stand_over_the_base() -> None:
    assert run(lambda module: {"changed": True, "x": 1}, {"changed": False, "y": 2}) == {"failed": False, "changed": True, "x": 1, "y": 2}


def test_engine_errors_carry_their_code_and_the_base_as_it_is_by_then() -> None:
    base: dict[str, Any] = {"changed": False}

    def main(module: Any) -> dict[str, Any]:
        base["changed"] = True
        raise ImageNotFound("There is no x.", "Look.")

    assert run(main, base) == {"failed": True, "msg": "There is no x. Look.", "error": "image_not_found", "changed": True}


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
    assert "ValueError" in found["msg"] and "test_modulehelp.py:" in found["msg"] and "main" in found["msg"]
    assert "hunter2" not in str(found) and "\n" not in found["msg"]


def test_lack_of_memory_is_said() -> None:
    def main(module: Any) -> dict[str, Any]:
        raise MemoryError

    assert run(main)["error"] == "out_of_memory"


def test_the_repository_is_the_tasks_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("HOME", "/home/u")
    assert modulehelp.repository_path(Module(repository=None)) == "/sysroot/composefs"
    assert modulehelp.repository_path(Module(path="~/x/../r/"), "path") == "/home/u/r"
