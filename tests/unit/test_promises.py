# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The page about security names tests that exist, and has some for every promise."""

from __future__ import annotations

import pathlib
import re

TESTS = pathlib.Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "docsite" / "rst" / "security.rst"


def test_every_promise_has_tests_and_they_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    promised = re.findall(r"^P(\d+)\. \*\*", text, re.MULTILINE)
    rows = dict(re.findall(r"^   \* - P(\d+)\n((?: {5}.*\n)+)", text, re.MULTILINE))
    assert promised == [str(number) for number in range(1, 11)] == list(rows)
    there = set()
    for path in [*TESTS.rglob("test_*.py"), *(TESTS.parent / "extensions").rglob("test_*.py")]:
        there |= set(re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE))
    for promise, row in rows.items():
        named = re.findall(r"``(test_\w+)``", row)
        assert named and [name for name in named if name not in there] == [], f"P{promise}"
