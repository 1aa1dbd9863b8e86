# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Programs that use the engine outside of every other test, inside a guest for example, import what there is."""

from __future__ import annotations

import ast
import importlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PREFIX = "plugins.module_utils"
PROGRAMS = sorted(
    path
    for place in ("tests/hosts", "extensions", "benchmarks", "dev", "examples")
    for path in (ROOT / place).rglob("*.py")
    if f"from {PREFIX}" in path.read_text(encoding="utf-8")
)


def test_there_are_such_programs() -> None:
    assert "pull_in_guest.py" in {path.name for path in PROGRAMS}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_program_imports_from_the_engine_is_there(path: pathlib.Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith(PREFIX):
            continue
        package = importlib.import_module(f"ansible_collections.composefs.oci.{node.module}")
        for alias in node.names:
            if not hasattr(package, alias.name):
                importlib.import_module(f"{package.__name__}.{alias.name}")
