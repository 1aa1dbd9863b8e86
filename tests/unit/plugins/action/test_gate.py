# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whatever a host answers, and to whichever module, nothing of it steers the terminal of the controller."""

from __future__ import annotations

import importlib
import pathlib
from typing import Any

import pytest

pytest.importorskip("ansible.plugins.action", exc_type=ImportError)

from ansible.plugins.action import ActionBase

PLUGINS = pathlib.Path(__file__).resolve().parents[4] / "plugins"
MODULES = sorted(path.stem for path in (PLUGINS / "modules").glob("composefs_*.py"))
EVIL = "\x1b]0;owned\x07\x1b[2J\u202e"


class Task:
    args: dict[str, Any] = {}
    async_val = 0
    check_mode = False
    no_log = False
    environment: Any = []


class Templar:
    def template(self, text: str) -> str:
        return text


@pytest.mark.parametrize("module", MODULES)
def test_no_answer_of_a_host_to_any_module_steers_the_terminal(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = importlib.import_module(f"ansible_collections.composefs.oci.plugins.action.{module}").ActionModule
    answer = {"failed": True, "msg": EVIL * 1000, "module_stdout": EVIL, "warnings": [EVIL], EVIL: [{"x": EVIL}]}
    monkeypatch.setattr(ActionBase, "run", lambda self, tmp=None, task_vars=None: {})
    monkeypatch.setattr(kind, "_execute_module", lambda self, **_others: dict(answer))
    made = kind.__new__(kind)
    made._task, made._templar = Task(), Templar()
    result = made.run(task_vars={"composefs_progress": "never"})
    assert "\x1b" not in str(result) and "\u202e" not in str(result) and r"\x1b" in result["msg"]
    assert len(result["msg"]) <= 64 * 1024 and result["failed"]
