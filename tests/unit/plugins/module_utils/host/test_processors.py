# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many processors may be used: affinity and the quotas of control groups."""

from __future__ import annotations

import os
import pathlib
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.host import processors


@pytest.fixture
def groups(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``groups(lines, {path: text})``: what /proc/self/cgroup says, and the files below /sys/fs/cgroup. Eight
    processors in all.
    """
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    root = tmp_path / "cgroup"
    monkeypatch.setattr(processors, "CGROUPS", str(root))
    real = open

    def make(lines: str, files: dict[str, str]) -> int:
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        (tmp_path / "self").write_text(lines)
        monkeypatch.setattr(
            "builtins.open",
            lambda path, *args, **kw: real(tmp_path / "self" if path == "/proc/self/cgroup" else path, *args, **kw),
        )
        return processors.usable()

    return make


@pytest.mark.parametrize(
    ("lines", "files", "count"),
    [
        ("", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/b\n", {"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "300000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/host/path\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/../sibling\n", {"cpu.max": "200000 100000\n"}, 2),
        (
            "4:cpu,cpuacct:/a\n1:memory:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "400000\n", "cpu/a/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        ("4:cpuacct,cpu:/a\n0::/a\n", {"cpu/a/cpu.cfs_quota_us": "-1\n", "cpu/a/cpu.cfs_period_us": "100000\n"}, 8),
        ("4:cpu:/docker/0123\n", {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1),
        ("0::/\n", {"cpu.max": "garbage\n"}, 8),
        ("0::/\n", {"cpu.max": "100 0\n"}, 8),
        ("nonsense\n", {}, 8),
    ],
)
def test_processors_that_may_be_used(groups: Any, lines: str, files: dict[str, str], count: int) -> None:
    assert groups(lines, files) == count


def test_affinity_binds_as_well(groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    assert groups("0::/\n", {"cpu.max": "400000 100000\n"}) == 1
