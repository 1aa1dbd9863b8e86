# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The page about security names tests that exist where it says, and has some for every promise."""

from __future__ import annotations

import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "docsite" / "rst" / "security.rst"
PLACES = {"Unit": "tests/unit", "Integration": "tests/integration", "Molecule": "extensions/molecule"}
HOSTILE = ROOT / "extensions/molecule/hostile/tests/test_hostile.py"


def names_in(place: pathlib.Path) -> set[str]:
    files = [place] if place.is_file() else place.rglob("test_*.py")
    return {
        name
        for path in files
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def table() -> dict[str, dict[str, list[str]]]:
    """By the number of the promise and the kind of tests, their names."""
    text = PAGE.read_text(encoding="utf-8")
    promised = re.findall(r"^P(\d+)\. \*\*", text, re.MULTILINE)
    rows = dict(re.findall(r"^   \* - P(\d+)\n((?: {5}.*\n)+)", text, re.MULTILINE))
    assert promised == [str(number) for number in range(1, 11)] == list(rows)
    return {
        promise: {
            kind: re.findall(r"``(test_\w+)``", names)
            for kind, names in re.findall(r"(\w+):\n((?: +``test_\w+``[,.]\n)+)", row)
        }
        for promise, row in rows.items()
    }


def test_every_promise_has_tests_and_they_exist() -> None:
    there = {kind: names_in(ROOT / place) for kind, place in PLACES.items()}
    for promise, kinds in table().items():
        assert kinds and not kinds.keys() - PLACES.keys(), f"P{promise}"
        for kind, named in kinds.items():
            missing = [name for name in named if name not in there[kind]]
            assert missing == [], f"P{promise}: {kind}"


def test_all_names_of_the_table_are_looked_for() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = [name for kinds in table().values() for names in kinds.values() for name in names]
    assert len(re.findall(r"``test_\w+``", text)) == len(named)


def test_what_holds_against_a_local_attacker_is_tried_on_whole_hosts() -> None:
    """All tests of the scenario stand for a promise, but the one that nothing else suffers."""
    named = {name for kinds in table().values() for name in kinds.get("Molecule", [])}
    assert names_in(HOSTILE) - named == {"test_root_works_on_undisturbed"}
