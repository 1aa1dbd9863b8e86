# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""dev/test near runs what a change can have broken at first sight."""

from __future__ import annotations

import importlib.util
import pathlib
import subprocess
import sys
from types import ModuleType

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENGINE = "plugins/module_utils/"
TESTS = "tests/unit/plugins/"


@pytest.fixture(scope="module")
def nearby() -> ModuleType:
    spec = importlib.util.spec_from_file_location("nearby", ROOT / "dev" / "nearby.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_room_brings_its_own_tests_and_those_of_its_importers(nearby: ModuleType) -> None:
    found = nearby.tests([ENGINE + "host/watch.py"])
    assert TESTS + "module_utils/host/test_watch.py" in found
    assert TESTS + "modules/test_composefs_image.py" in found, "a module that imports it"
    assert TESTS + "action/test_composefs_image.py" in found, "and an action"
    assert "tests/unit/test_layering.py" in found
    assert TESTS + "module_utils/formats/test_tar.py" not in found


def test_what_changed_itself_comes_without_its_importers(nearby: ModuleType) -> None:
    found = nearby.tests([ENGINE + "host/watch.py"], importers=False)
    assert found == [TESTS + "module_utils/host/test_watch.py", "tests/unit/test_layering.py"]


@pytest.mark.slow
@pytest.mark.parametrize(("whole", "outcome"), [(True, "passed"), (False, "skipped")])
def test_when_the_time_is_over_only_tests_of_what_changed_are_begun(whole: bool, outcome: str) -> None:
    path = TESTS + "module_utils/test_text.py"
    words = ["--until=0", f"--whole={path if whole else 'tests/unit/roles'}", path]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    told = done.stdout.splitlines()[-1]
    assert outcome in told and len({"passed", "skipped"} & set(told.split())) == 1, told


def test_late_and_relative_imports_count(nearby: ModuleType) -> None:
    importers = nearby.direct_importers(ROOT)
    assert ENGINE + "pull/pull.py" in importers[ENGINE + "pull/fetch.py"], "imported within a function"
    assert ENGINE + "store/repository.py" in importers[ENGINE + "errors.py"]


def test_tests_and_roles_that_changed_are_run_themselves(nearby: ModuleType) -> None:
    assert nearby.tests(["tests/unit/test_traps.py"]) == ["tests/unit/test_traps.py"]
    assert nearby.tests(["roles/skopeo/README.md"]) == ["tests/unit/roles"]
    assert nearby.tests(["README.md", "tests/unit/test_gone.py"]) == []


def test_what_stands_elsewhere_exists(nearby: ModuleType) -> None:
    assert all((ROOT / test).exists() for test in nearby.ELSEWHERE.values())
    assert all((ROOT / start).exists() for start in nearby.ELSEWHERE)
