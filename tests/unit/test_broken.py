# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What dev/molecule --broken breaks (tests/hosts/broken.py) fits the code as it is, and every scenario has something to
break.
"""

from __future__ import annotations

import pathlib
import shutil
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "hosts"))

import broken


@pytest.mark.parametrize("breakage", broken.BREAKAGES, ids=lambda breakage: f"{breakage.scenario}: {breakage.promise}")
def test_a_breakage_can_be_applied_and_leaves_what_can_be_read(
    breakage: broken.Breakage, tmp_path: pathlib.Path
) -> None:
    copy = tmp_path / breakage.file
    copy.parent.mkdir(parents=True)
    shutil.copyfile(ROOT / breakage.file, copy)
    breakage.apply(tmp_path)
    text = copy.read_text()
    assert text != (ROOT / breakage.file).read_text()
    if copy.suffix == ".yml":
        yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
        assert yaml.safe_load(text) != yaml.safe_load((ROOT / breakage.file).read_text())
    else:
        compile(text, str(copy), "exec")


@pytest.mark.parametrize("breakage", broken.BREAKAGES, ids=lambda breakage: f"{breakage.scenario}: {breakage.promise}")
def test_the_test_that_has_to_notice_is_one_of_the_scenarios(breakage: broken.Breakage) -> None:
    directory = ROOT / (
        "examples/molecule-rollout/molecule/rollout"
        if breakage.scenario == "example"
        else f"extensions/molecule/{breakage.scenario}"
    )
    shared = ROOT / "extensions/molecule/shared/test_check_mode.py"
    tests = "".join(path.read_text() for path in (*(directory / "tests").glob("test_*.py"), shared))
    assert f"def {breakage.noticed_by}(" in tests


def test_every_scenario_has_a_promise_to_break() -> None:
    scenarios = {path.parent.name for path in (ROOT / "extensions/molecule").glob("*/molecule.yml")} | {"example"}
    assert {breakage.scenario for breakage in broken.BREAKAGES} == scenarios


def test_code_that_has_changed_is_told(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file.py").write_text("something else\n")
    with pytest.raises(ValueError, match=r"file\.py has 'this' 0 times"):
        broken.Breakage("default", "nothing", "file.py", "this", "that", "test_nothing").apply(tmp_path)
