# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The images that the scenarios pull, made once into one OCI layout of the cache, and the facts about them that tests
hold results against.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import random
from typing import Any

import ground
from ociimage import Layout, architecture, debian_image
from tarbytes import DIRECTORY, SYMLINK, member, small_tree, tar

# Counted up when something below changes, so that old images are made anew.
EDITION = 9
OTHER = "riscv64"


def _application(version: int) -> bytes:
    parts = [
        member("opt/", type=DIRECTORY),
        member("opt/app/", type=DIRECTORY),
        member("opt/app/version", f"{version}\n".encode()),
    ]
    # The third version is a small update of the second one.
    program = random.Random(min(version, 2)).randbytes(150_000) + (b"more" if version > 2 else b"")
    parts.append(member("opt/app/program", program, mode=0o755))
    parts.append(member("opt/app/current", type=SYMLINK, linkname="program"))
    return tar(*parts)


def _bulk(seed: int, files: int, size: int) -> bytes:
    """A layer that does not compress."""
    chance = random.Random(seed)
    parts = [member("data/", type=DIRECTORY), member(f"data/{seed}/", type=DIRECTORY)]
    return tar(*parts, *(member(f"data/{seed}/{number}", chance.randbytes(size)) for number in range(files)))


def _library(version: int) -> bytes:
    """Files as a distribution has them: of the second version every tenth is another, by a few bytes; so is a large
    one.
    """
    chance = random.Random(77)
    parts = [member("lib/", type=DIRECTORY)]
    for number in range(250):
        data = b" ".join(b"%x" % chance.randrange(1 << 20) for _unused in range(chance.randrange(30, 1500)))
        if number % 10 == 0:
            data = data.replace(b"7", b"%d" % version, 3)
        parts.append(member(f"lib/{number}", data))
    large = bytearray(chance.randbytes(1_500_000))
    large[700_000:700_100] = random.Random(version).randbytes(100)
    return tar(*parts, member("lib/large", bytes(large)), member("lib/version", f"{version}\n".encode()))


def _make(layout: Layout) -> None:
    base = small_tree(files=60, seed=1)
    for version in (1, 2, 3):
        layout.image([base, _application(version)], f"app-{version}", labels={"version": str(version)})
        layout.image([_library(version)], f"library-{version}", labels={"version": str(version)})
    layout.image([base, small_tree(files=10, seed=7, prefix="usr/share/zstd")], "zstd", encoding="zstd")
    layout.multi_platform(
        {f"linux/{architecture()}": [base, _application(1)], f"linux/{OTHER}": [base, _application(2)]}, "multi"
    )
    layout.multi_platform({f"linux/{OTHER}": [base]}, "foreign")
    layout.image([_bulk(seed, 24, 250_000) for seed in range(101, 105)], "big")
    # Little to fetch and much to store: it fills a disk that seemed to have room for it.
    puffy = [
        [member(f"puff/{layer}/{number}", b"%d %d\n" % (layer, number) * 40_000) for number in range(24)]
        for layer in range(4)
    ]
    layout.image(
        [
            tar(member("puff/", type=DIRECTORY), member(f"puff/{n}/", type=DIRECTORY), *files)
            for n, files in enumerate(puffy)
        ],
        "puffy",
    )
    # For guests, whose processor is slow: few files, some of them large enough to have several blocks under their
    # Merkle tree.
    layout.image([small_tree(files=25, seed=5, size=1500), _bulk(201, 4, 60_000)], "small")
    layout.image([_bulk(seed, 12, 20_000) for seed in range(301, 305)], "cut")


def layout() -> pathlib.Path:
    """The layout with all images but ``debian``."""
    path = ground.state() / f"images-{EDITION}"
    with ground.locked(ground.state() / "run"):
        if not path.exists():
            with ground.making(path) as new:
                _make(Layout(new))
        for other in ground.state().glob("images-*"):
            if other != path:
                ground.remove(other)
    return path


def debian() -> pathlib.Path:
    """A layout with a real image of Debian's packages under the name ``debian``."""
    path = ground.state() / "debian"
    with ground.locked(path):
        debian_image(path, tag="debian")
    return path


def source(name: str) -> str:
    """The image called ``name`` as skopeo refers to it."""
    return f"oci:{debian() if name == 'debian' else layout()}:{name}"


def facts(name: str) -> dict[str, Any]:
    """What is true of an image: digests of its manifest, configuration and layers, labels, for this machine's platform
    if there are several.
    """
    base = Layout(debian() if name == "debian" else layout())
    index = json.loads((base.path / "index.json").read_text())
    entry = next(one for one in index["manifests"] if one["annotations"]["org.opencontainers.image.ref.name"] == name)
    document = json.loads(base.read(entry["digest"]))
    result: dict[str, Any] = {"index_digest": None, "digest": entry["digest"]}
    if "manifests" in document:
        entry = next(
            (one for one in document["manifests"] if one["platform"]["architecture"] == architecture()),
            document["manifests"][0],
        )
        result = {"index_digest": result["digest"], "digest": entry["digest"]}
        document = json.loads(base.read(entry["digest"]))
    config = json.loads(base.read(document["config"]["digest"]))
    result.update(
        config_digest=document["config"]["digest"],
        diff_ids=config["rootfs"]["diff_ids"],
        layers=[layer["digest"] for layer in document["layers"]],
        size=sum(layer["size"] for layer in document["layers"]),
        labels=config["config"].get("Labels") or {},
    )
    assert hashlib.sha256(base.read(result["digest"])).hexdigest() == result["digest"].split(":")[1]
    return result
