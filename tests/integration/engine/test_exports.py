# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told about pulled images agrees with other programs: dumpfiles with cfsctl's and mkcomposefs's, disk use with
what can be freed.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
from collections.abc import Callable

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.operations import dump, mounting
from ansible_collections.composefs.oci.plugins.module_utils.operations.diskuse import disk_use
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Built, Layout
from pulling import pull_one


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_a_dumpfile_is_what_cfsctl_prints(
    images: Layout,
    place: pathlib.Path,
    new_repository: Callable[..., pathlib.Path],
    skopeo: str,
    cfsctl: Callable[..., str],
    algorithm: str,
) -> None:
    path = new_repository(place / "repository", algorithm)
    pull_one(path, f"oci:{images.path}:gzip")
    with Repository.open(str(path)) as repository:
        ours = dump.dump(repository, mounting.resolve(repository, "image").hex())
    assert ours.decode(errors="surrogateescape") == cfsctl("--repo", path, "oci", "dump", "image")


def test_mkcomposefs_makes_the_same_image_of_a_dumpfile(
    debian: tuple[pathlib.Path, Built], repository_path: pathlib.Path, skopeo: str
) -> None:
    program = shutil.which("mkcomposefs")
    if not program:
        pytest.skip("mkcomposefs is not on the PATH (Debian package composefs)")
    pull_one(repository_path, f"oci:{debian[0]}:latest")
    with Repository.open(str(repository_path)) as repository:
        image = mounting.resolve(repository, "image").hex()
        text = dump.dump(repository, image)
    command = [program, "--min-version=1", "--from-file", "--print-digest", "--print-digest-only", "-"]
    assert subprocess.run(command, input=text, stdout=subprocess.PIPE, check=True).stdout.decode().strip() == image


def test_what_an_image_has_for_itself_is_what_a_collection_frees(
    images: Layout, repository_path: pathlib.Path, skopeo: str, cfsctl: Callable[..., str]
) -> None:
    for name in ("gzip", "platforms", "artifact"):
        pull_one(repository_path, f"oci:{images.path}:{name}", name)

    def occupied() -> tuple[int, int]:
        sizes = [path.stat().st_size for path in (repository_path / "objects").rglob("*") if path.is_file()]
        return sum(sizes), len(sizes)

    with Repository.open(str(repository_path)) as repository:
        use = disk_use(repository, repository.tags().values())
        gone = use[repository.tags()["gzip"]]
    assert len(use) == 3 and gone.shared > 0, "these images have files in common"
    before = occupied()
    cfsctl("--repo", repository_path, "oci", "untag", "gzip")
    cfsctl("--repo", repository_path, "gc")
    after = occupied()
    assert (before[0] - after[0], before[1] - after[1]) == (gone.own, gone.own_objects)
