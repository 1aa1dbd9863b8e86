# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The tables of what was tested on what are those that the record of runs makes (dev/tested.py)."""

from __future__ import annotations

import importlib.util
import json
import pathlib
from types import ModuleType
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOSTS = [
    {"suite": "trixie", "kernel": "", "python": "3.13.5", "skopeo": "1.18.0"},
    {"suite": "bookworm", "kernel": "", "python": "3.11.2", "skopeo": "1.9.3"},
]
GUEST = {"suite": "trixie", "kernel": "6.12.117+deb13-cloud-amd64", "python": "3.13.5", "skopeo": "1.18.0"}


@pytest.fixture
def tested() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tested", ROOT / "dev" / "tested.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(tested: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Record into files of the test's own; the interpreter stands for a controller with ansible-core 2.19.4."""
    controller = tmp_path / "python"
    controller.write_text("#!/bin/sh\necho ${VERSION:-2.19.4} 3.11.7\n")
    controller.chmod(0o755)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- begin -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tested, "RECORD", tmp_path / "tested.json")
    monkeypatch.setattr(tested, "TABLES", ((readme, "<!-- begin -->", "<!-- end -->", tested.readme_table),))

    def run(
        scenario: str, hosts: list[dict[str, str]], tests: int = 5, seconds: float = 10.4, long: bool = False
    ) -> str:
        tested.record(scenario, seconds, {"hosts": hosts, "passed": tests}, controller, long)
        return readme.read_text()

    return run


def test_the_tables_of_the_project_are_made_from_its_record(tested: ModuleType) -> None:
    assert tested.load()
    for path, text in tested.with_tables().items():
        assert path.read_text() == text, f"{path.name} was edited by hand, or not written anew: python3 dev/tested.py"


def test_a_row_names_the_controller_the_hosts_and_the_scenarios(record: Any) -> None:
    record("default", HOSTS, tests=31)
    text = record("faults", HOSTS, tests=12)
    hosts = "Debian 12: Python 3.11.2, skopeo 1.9.3; Debian 13: Python 3.13.5, skopeo 1.18.0"
    assert f"| 2.19.4 on Python 3.11.7 | {hosts} | `default`, `faults` | 43 |\n" in text
    assert text.startswith("before\n") and text.endswith("\nafter\n")


def test_a_guest_is_told_with_its_kernel_and_has_a_row_of_its_own(record: Any) -> None:
    record("default", HOSTS)
    text = record("verity", [GUEST], tests=9)
    assert (
        "| Debian 13: Linux 6.12.117, Python 3.13.5, skopeo 1.18.0 | `verity` | 9 |" in text
        and text.count("2.19.4") == 2
    )


def test_a_later_run_of_the_same_kind_takes_the_place_of_the_earlier(
    record: Any, tested: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record("default", HOSTS, tests=30)
    monkeypatch.setenv("VERSION", "2.19.5")
    record("default", [{**host, "python": host["python"] + "1"} for host in HOSTS], tests=31)
    (entry,) = json.loads(tested.RECORD.read_text())
    assert entry["tests"] == 31 and entry["ansible"] == "2.19.5" and entry["seconds"] == 10


def test_long_forms_and_other_versions_stand_beside_each_other(
    record: Any, tested: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    record("power", [GUEST], tests=2)
    record("power", [GUEST], tests=24, long=True)
    monkeypatch.setenv("VERSION", "2.20.1")
    text = record("power", [GUEST], tests=2)
    assert len(json.loads(tested.RECORD.read_text())) == 3
    assert "`power` | 24 |" in text and "`power` | 2 |" in text


def test_a_file_without_a_place_for_the_table_is_told(
    tested: ModuleType, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing\n")
    monkeypatch.setattr(tested, "TABLES", ((path, "<!-- begin -->", "<!-- end -->", tested.readme_table),))
    with pytest.raises(ValueError, match=r"page\.md has no place"):
        tested.with_tables()
