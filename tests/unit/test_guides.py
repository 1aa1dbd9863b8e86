# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the pages and the examples of modules show can be run: every task of this collection has options that exist."""

from __future__ import annotations

import importlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
pytest.importorskip("ansible.module_utils.basic")

ROOT = pathlib.Path(__file__).resolve().parents[2]
COLLECTION = "composefs.oci."
PAGES = [*sorted((ROOT / "docs" / "docsite" / "rst").glob("*.rst")), ROOT / "README.md"]
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))
# What a task may have beside its module.
KEYWORDS = {
    *("name", "when", "register", "notify", "loop", "loop_control", "until", "retries", "delay", "failed_when", "vars"),
    *("changed_when", "become", "become_user", "environment", "delegate_to", "run_once", "check_mode", "tags"),
    *("ignore_errors", "no_log", "async", "poll", "diff", "throttle", "module_defaults", "connection", "args"),
    *("ignore_unreachable", "any_errors_fatal"),
}


def options_of(module: str) -> dict[str, Any]:
    """The options of a module with those of its fragments."""
    root = "ansible_collections.composefs.oci.plugins"
    documentation = yaml.safe_load(importlib.import_module(f"{root}.modules.{module}").DOCUMENTATION)
    found = dict(documentation.get("options") or {})
    for fragment in documentation.get("extends_documentation_fragment") or []:
        name, _dot, part = fragment.removeprefix(COLLECTION).partition(".")
        kind = importlib.import_module(f"{root}.doc_fragments.{name}").ModuleDocFragment
        text = getattr(kind, (part or "documentation").upper())
        found.update(yaml.safe_load(text).get("options") or {})
    return found


def blocks(page: pathlib.Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```ya?ml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for match in re.finditer(r"^\.\. code-block:: ya?ml\n((?:\n| {4}.*\n?)+)", text, re.MULTILINE):
        found.append("\n".join(line[4:] for line in match[1].splitlines()))
    return found


def tasks(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping that may be a task, wherever it stands."""
    if isinstance(value, list):
        for one in value:
            yield from tasks(one)
    elif isinstance(value, dict):
        if any(str(key).startswith(COLLECTION) for key in value):
            yield value
        for key, one in value.items():
            if not str(key).startswith(COLLECTION):
                yield from tasks(one)


def complaints(text: str) -> list[str]:
    """What is wrong with the tasks of this collection in a block."""
    found = []
    for task in tasks(yaml.safe_load(text)):
        for key in task:
            module = str(key).removeprefix(COLLECTION)
            if not str(key).startswith(COLLECTION):
                found += [] if key in KEYWORDS else [f"{key} is no keyword of a task"]
            elif module not in MODULES:
                found.append(f"{key} is no module")
            else:
                found += wrong_options(module, task[key] or {})
    return found


def wrong_options(module: str, given: Any) -> list[str]:
    if not isinstance(given, dict):
        return []  # an expression, or a reference to another task's options
    known = options_of(module)
    found = [f"{module} has no option {option}" for option in given if option not in known]
    found += [
        f"{module} needs {option}"
        for option, what in known.items()
        if what.get("required") and option not in given and not set(what.get("aliases", [])) & set(given)
    ]
    for option, value in given.items():
        choices = known.get(option, {}).get("choices")
        if choices and isinstance(value, str) and "{{" not in value and value not in choices:
            found.append(f"{option} of {module} cannot be {value}")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tasks_of_a_page_have_options_that_exist(page: pathlib.Path) -> None:
    assert [one for text in blocks(page) for one in complaints(text)] == []


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_of_a_module_have_options_that_exist(module: str) -> None:
    examples = importlib.import_module(f"ansible_collections.composefs.oci.plugins.modules.{module}").EXAMPLES
    assert list(tasks(yaml.safe_load(examples))) and complaints(examples) == []


def test_a_wrong_option_is_noticed() -> None:
    task = "- name: X\n  composefs.oci.composefs_mount: {image: app, pth: /srv/app, state: mountd}\n  wen: true\n"
    assert complaints(task) == [
        "composefs_mount has no option pth",
        "composefs_mount needs path",
        "state of composefs_mount cannot be mountd",
        "wen is no keyword of a task",
    ]
