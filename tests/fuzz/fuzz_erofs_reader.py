# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fuzz the EROFS reader: whatever the bytes, it answers or raises FormatError, soon and in memory in proportion to the
image.

    python tests/fuzz/fuzz_erofs_reader.py [--seconds 60] [--seed N] [FILE ...]

With atheris installed it is guided by coverage (further options go to libFuzzer); without, golden images are damaged at
random. FILEs are run once each, to look at what was found.
"""

from __future__ import annotations

import gzip
import pathlib
import random
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "unit"), str(ROOT / "tests" / "support")]

import fuzzing

__import__("conftest")  # makes the collection importable
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import erofsreader, erofswriter
from ansible_collections.composefs.oci.plugins.module_utils.errors import FormatError, InvalidLayer
from readdump import read_dump

GOLDENS = ("acls", "contents", "directories", "dots", "labels", "links", "symlinks", "times", "whiteouts", "xattrs")
SECONDS_PER_INPUT = 5.0
PATHS = (b"a", b"d/f", b"dir/file", b"usr/bin/tool", b"zz/zz/zz", b"file", b"0" * 255)


def corpus() -> list[bytes]:
    """Whole images to start from, of every format."""
    images = []
    for name in GOLDENS:
        root = read_dump(gzip.decompress((ROOT / "tests" / "unit" / "data" / "erofs" / f"{name}.dump.gz").read_bytes()))
        images += [erofswriter.image_bytes(root, version, fsverity.SHA256) for version in (0, 1, 2)]
    return images


def run(data: bytes) -> None:
    """One input. A tree that can be read can be written, if it fits, and is then read as the same."""
    started = time.process_time()
    try:
        image = erofsreader.ErofsImage(data)
        image.objects()
        for path in PATHS:
            image.find(path)
        root = image.tree()
        once = erofswriter.image_bytes(root, image.version, fsverity.SHA256)
        again = erofswriter.image_bytes(erofsreader.ErofsImage(once).tree(), image.version, fsverity.SHA256)
        assert once == again or image.version < 2, "an image that is read and written changes"
    except (FormatError, InvalidLayer):
        pass
    assert time.process_time() - started < SECONDS_PER_INPUT, "too slow"


def damage(image: bytes, dice: random.Random) -> bytes:
    data = bytearray(image)
    for _unused in range(dice.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        # Most of what is believed or not stands in the first blocks.
        at = dice.randrange(len(data)) if dice.random() < 0.3 else min(dice.randrange(1024, 6144), len(data) - 1)
        how = dice.randrange(6)
        if how == 0:
            data[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            data[at] = dice.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
        elif how == 2:
            data[at : at + 4] = dice.choice(
                (0, 1, 36, 4096, 0x7FFFFFFF, 0xFFFFFFFF, len(data) // 32, len(data))
            ).to_bytes(4, "little")
        elif how == 3:
            other = dice.randrange(len(data))
            length = dice.choice((2, 8, 12, 32, 64))
            data[at : at + length] = data[other : other + length]
        elif how == 4:
            at &= ~31
            data[at : at + 32] = data[1152:1184]
        else:
            del data[at + dice.randrange(4096) :]
    return bytes(data)


def main() -> None:
    images = corpus()
    fuzzing.fuzz(
        "erofs-reader", run, lambda dice: damage(dice.choice(images), dice), fuzzing.parser(__doc__).parse_known_args()
    )


if __name__ == "__main__":
    main()
