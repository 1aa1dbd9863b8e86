# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let plain ``pytest`` import ``ansible_collections.composefs.oci`` from wherever this repository is checked out.

ansible-test and ansible-core bring an importer of their own; this steps in only where neither is there.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import sys
import time
import types
from collections.abc import Callable

import pytest


def _provide_collection() -> None:
    name = "ansible_collections.composefs.oci"
    try:
        if importlib.util.find_spec(name) is not None:
            return
    except (ModuleNotFoundError, ValueError):
        pass
    paths: dict[str, list[str]] = {
        "ansible_collections": [],
        "ansible_collections.composefs": [],
        name: [str(pathlib.Path(__file__).resolve().parents[2])],
    }
    for package, path in paths.items():
        module = sys.modules.setdefault(package, types.ModuleType(package))
        if not hasattr(module, "__path__"):
            module.__path__ = path  # type: ignore[attr-defined]


_provide_collection()

# In CI the same examples every time: a submission must not fail for what chance found in somebody else's code. At home
# they vary, and find more.
if os.environ.get("CI") and importlib.util.find_spec("hypothesis") is not None:
    from hypothesis import settings

    settings.register_profile("ci", derandomize=True, database=None)
    settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--until", type=float, help="time of the monotonic clock after which no more tests are begun")
    parser.addoption("--whole", action="append", default=[], help="a file of tests, or a directory, for which all are")


def pytest_runtest_setup(item: pytest.Item) -> None:
    until = item.config.getoption("--until")
    # The clock is the same in all processes: it was read when the command began that runs these tests.
    if until is not None and time.monotonic() > until:
        here = os.path.relpath(item.path, pathlib.Path(__file__).resolve().parents[2])
        if not any(here == whole or here.startswith(f"{whole}/") for whole in item.config.getoption("--whole")):
            pytest.skip("the seconds of dev/test near are over")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than half a second; dev/test near leaves it out")


@pytest.fixture
def hide_zstd(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes the host one without any library for zstd, until the end of the test."""
    from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs

    real = codecs._module

    def hide() -> None:
        monkeypatch.setattr(
            codecs, "_module", lambda name: None if name in codecs.ZSTD_BACKENDS.values() else real(name)
        )

    return hide
