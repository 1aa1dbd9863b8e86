# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository with a few images in it, to prune, check and repair."""

from __future__ import annotations

import pathlib
import shutil

import pytest
from fake_source import REGISTRY, Layout, World, pull_all

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar

TAGS = ("a", "b", "c", "artifact")


def tree(name: str) -> bytes:
    """The tar of the layer ``name``: four files of which each becomes an object."""
    return tar(
        member("usr/", type=DIRECTORY), *(member(f"usr/{name}{n}", f"{name}{n}".encode() * 90) for n in range(4))
    )


def make_layout(path: pathlib.Path) -> Layout:
    """Three images, of which each shares a layer with the next, and an artifact."""
    layout = Layout(path)
    layout.image([tree("base"), tree("a")], "a")
    layout.image([tree("base"), tree("b")], "b")
    layout.image([tree("b"), tree("c")], "c")
    layout.artifact([("text/plain", b"an artifact " * 30)], "artifact")
    return layout


def fill(path: pathlib.Path, layout: Layout) -> None:
    """Make a repository with all of the layout at ``path``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "call", lambda what, function, **_more: function())
        World(layout).install(patch)
        create.prepare(str(path), fsverity.SHA256, create.DISABLED)
        pull_all(path, *(pull.Request(REGISTRY + tag, tag) for tag in TAGS))


def copy_of(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    shutil.copytree(source, target, symlinks=True)
    return target
