# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every role documents its options, and what it documents is what holds: the defaults in both places are the same."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")

ROLES = pathlib.Path(__file__).resolve().parents[3] / "roles"
NAMES = sorted(path.name for path in ROLES.iterdir() if path.is_dir())


def load(path: pathlib.Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {}


def options(role: str) -> dict[str, Any]:
    return dict(load(ROLES / role / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {}))


def test_there_are_roles() -> None:
    assert "skopeo" in NAMES


@pytest.mark.parametrize("role", NAMES)
def test_documented_defaults_are_the_real_ones(role: str) -> None:
    documented = {name: option["default"] for name, option in options(role).items() if "default" in option}
    assert documented == load(ROLES / role / "defaults" / "main.yml")


@pytest.mark.parametrize("role", NAMES)
def test_options_carry_the_name_of_the_role_and_a_type(role: str) -> None:
    for name, option in options(role).items():
        assert name.startswith(f"{role}_"), name
        assert option["type"] and option["description"], name


@pytest.mark.parametrize("role", NAMES)
def test_the_readme_names_every_option(role: str) -> None:
    text = (ROLES / role / "README.md").read_text(encoding="utf-8")
    assert [name for name in options(role) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("role", NAMES)
def test_no_task_becomes_another_user_by_itself(role: str) -> None:
    """Whether and how to become root is the operator's to say, on the play or the role."""
    for path in sorted((ROLES / role).rglob("*.yml")):
        assert "become" not in [line.strip().split(":")[0] for line in path.read_text(encoding="utf-8").splitlines()], (
            path
        )
