# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The platform that images for this host are for."""

from __future__ import annotations

import os
import types

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.host import machine


@pytest.mark.parametrize(
    ("name", "platform"),
    [
        ("x86_64", "linux/amd64"),
        ("aarch64", "linux/arm64/v8"),
        ("armv7l", "linux/arm/v7"),
        ("armv6l", "linux/arm/v6"),
        ("i686", "linux/386"),
        ("s390x", "linux/s390x"),
        ("ppc64le", "linux/ppc64le"),
        ("riscv64", "linux/riscv64"),
        ("loongarch64", "linux/loong64"),
    ],
)
def test_the_kernels_names_are_put_in_gos(monkeypatch: pytest.MonkeyPatch, name: str, platform: str) -> None:
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine=name))
    assert str(machine.own_platform()) == platform


def test_a_narrow_system_on_a_wide_kernel_runs_narrow_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "sys", types.SimpleNamespace(maxsize=2**31 - 1))
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine="aarch64"))
    assert str(machine.own_platform()) == "linux/arm/v8"
