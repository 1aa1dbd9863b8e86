# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the repositories of earlier times in files/, which the scenario upgrade takes over. To be run by hand, with
cfsctl 0.9 on the PATH.

images.tgz       an OCI layout with the images "one" and "two", which share a layer
cfsctl.tgz       a repository written by cfsctl, with "one" in it
older.tgz        the same as programs before composefs-rs 0.7 wrote it: no meta.json, splitstreams with the header of
that time collection.tgz   a repository with "one" in it, written by this collection when the file was made; keep it
when the others are made anew
"""

from __future__ import annotations

import pathlib
import struct
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]

from ociimage import Layout
from plugins.module_utils.formats import fsverity
from plugins.module_utils.progress import Progress
from plugins.module_utils.pull import pull
from plugins.module_utils.source.options import ProxyOptions
from plugins.module_utils.store import create
from plugins.module_utils.store.repository import Repository
from tarbytes import DIRECTORY, member, small_tree, tar

LICENSE = "SPDX-FileCopyrightText: composefs.oci contributors\nSPDX-License-Identifier: GPL-3.0-or-later\n"


def make_images(path: pathlib.Path) -> None:
    layout = Layout(path)
    base = small_tree(files=12, seed=3, size=900)
    for name in ("one", "two"):
        layout.image([base, tar(member("opt/", type=DIRECTORY), member(f"opt/{name}", name.encode() * 2000))], name)


def age(repository: pathlib.Path) -> None:
    """Turn a repository into an older one: take meta.json away, give every splitstream the old header and so another
    name.
    """
    (repository / "meta.json").unlink()
    renamed: dict[bytes, bytes] = {}
    # Layers first, then what names them.
    for kind in ("oci-layer-", "oci-config-", "oci-manifest-"):
        for link in sorted((repository / "streams").glob(f"{kind}*")):
            old_path = link.resolve()
            data = bytearray(old_path.read_bytes())
            magic, version, flags, algorithm, block, start, end = struct.unpack_from("<11sBHBBQQ", data)
            assert magic == b"SplitStream"
            struct.pack_into("<QQH11sBBB", data, 0, start, end, flags, magic, version, algorithm, block)
            first, last = struct.unpack_from("<QQ", data, start)
            for at in range(first, last, 64):
                data[at : at + 64] = renamed.get(bytes(data[at : at + 64]), data[at : at + 64])
            digest = fsverity.digest(bytes(data), fsverity.SHA512)
            renamed[bytes.fromhex(old_path.parent.name + old_path.name)] = digest
            new_path = repository / "objects" / fsverity.object_path(digest)
            new_path.parent.mkdir(exist_ok=True)
            new_path.write_bytes(data)
            old_path.unlink()
            link.unlink()
            link.symlink_to(f"../objects/{fsverity.object_path(digest)}")


def pack(directory: pathlib.Path, name: str) -> None:
    target = HERE / "files" / f"{name}.tgz"
    order = ["--sort=name", "--mtime=@1700000000", "--owner=0", "--group=0", "--numeric-owner"]
    subprocess.run(["tar", *order, "-C", str(directory), "-czf", str(target), name], check=True)
    pathlib.Path(f"{target}.license").write_text(LICENSE)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=ROOT / ".cache") as temporary:
        here = pathlib.Path(temporary)
        make_images(here / "images")
        source = f"oci:{here}/images:one"
        for name in ("cfsctl", "older"):
            cfsctl = ["cfsctl", "--repo", str(here / name)]
            subprocess.run([*cfsctl, "init", "--insecure", "--algorithm", "fsverity-sha512-12"], check=True)
            subprocess.run([*cfsctl, "oci", "pull", source, "one"], check=True)
        age(here / "older")
        create.prepare(str(here / "collection"), fsverity.SHA512, create.DISABLED)
        with Repository.open(str(here / "collection")) as repository:
            options = pull.Options(proxy=ProxyOptions(executable=("skopeo",), unenforced_policy="ignore"))
            pull.pull_images(repository, [pull.Request(source, "one")], options, Progress(None))
        for name in ("images", "cfsctl", "older"):
            pack(here, name)
        if not (HERE / "files/collection.tgz").exists():
            pack(here, "collection")


if __name__ == "__main__":
    main()
