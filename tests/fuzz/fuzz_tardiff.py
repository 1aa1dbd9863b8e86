# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fuzz the reader of tar-diffs: whatever the program, its output ends soon, stays within its limit and in flat memory,
and nothing but the engine's own errors comes out.

    python tests/fuzz/fuzz_tardiff.py [--seconds 60] [--seed N] [FILE ...]

The first byte of an input chooses: 0 a whole blob follows, otherwise the operations of a tardf1 (odd) or tardf2 (even),
which are compressed first, so that damage reaches the operations. With atheris installed it is guided by coverage
(further options go to libFuzzer). FILEs are run once each, to look at what was found.
"""

from __future__ import annotations

import io
import pathlib
import random
import resource
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "fuzz"), str(ROOT / "tests" / "unit")]

import fuzzing

__import__("conftest")  # makes the collection importable
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs, tardiff

LIMIT = 32 << 20
SECONDS_PER_INPUT = 10.0
MEGABYTES = 400
FILES = {b"a": bytes(range(256)) * 40, b"usr/lib/libx.so.1": random.Random(1).randbytes(100_000), b"empty": b""}


class File:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def pread(self, n: int, offset: int) -> bytes:
        return self._data[offset : offset + n]

    def whole(self) -> bytes:
        return self._data

    def close(self) -> None:
        pass


def open_file(path: bytes) -> File | None:
    return File(FILES[path]) if path in FILES else None


def frame(data: bytes) -> bytes:
    compressor = codecs.zstd_compressor()
    return compressor.compress(data) + compressor.flush()


def run(data: bytes) -> None:
    """One input."""
    if not data:
        return
    blob = data[1:] if data[0] == 0 else tardiff.MAGIC[1 if data[0] & 1 else 2] + frame(data[1:])
    started = time.process_time()
    total = 0
    try:
        for piece in tardiff.apply(io.BytesIO(blob).read, open_file, LIMIT):
            assert len(piece) <= codecs.CHUNK, "a piece is larger than promised"
            total += len(piece)
    except InvalidLayer:
        pass
    assert total <= LIMIT, "it writes more than it may"
    assert time.process_time() - started < SECONDS_PER_INPUT, "too slow"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10 < MEGABYTES, "memory grows"


def operations(dice: random.Random) -> bytes:
    """A valid program."""
    out = bytearray()
    file, at = b"", -1
    for _unused in range(dice.randrange(1, 30)):
        what = dice.randrange(6)
        data = dice.randbytes(dice.choice((0, 1, 40, 700)))
        if what == tardiff.OPEN or (at < 0 and what != tardiff.DATA):
            path = dice.choice(sorted(FILES))
            out += bytes((tardiff.OPEN,)) + tardiff.leb128(len(path)) + path
            file, at = FILES[path], 0
            continue
        number = len(data)
        if what == tardiff.COPY:
            number, data = dice.randint(0, len(file) - at), b""
            at += number
        elif what == tardiff.SEEK:
            number, data = dice.randint(0, len(file)), b""
            at = number
        elif what == tardiff.ADD:
            data = data[: len(file) - at]
            number = len(data)
            at += number
        elif what == tardiff.DICT:
            data = codecs.PatchMaker(file, 1).make(data)
            number, at = len(data), len(file)
        out += bytes((what,)) + tardiff.leb128(number) + data
    return bytes(out)


def damage(data: bytes, dice: random.Random) -> bytes:
    out = bytearray(data)
    for _unused in range(dice.choice((1, 1, 1, 2, 4, 16))):
        if not out:
            break
        at = dice.randrange(len(out))
        how = dice.randrange(5)
        if how == 0:
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            out[at] = dice.choice((0, 1, 2, 3, 4, 5, 6, 0x7F, 0x80, 0xFF))
        elif how == 2:
            out[at:at] = dice.randbytes(dice.choice((1, 2, 9)))
        elif how == 3:
            other = dice.randrange(len(out))
            out[at:at] = out[other : other + dice.choice((2, 8, 64, 1000))]
        else:
            del out[at : at + dice.choice((1, 2, 8, 1000))]
    return bytes(out)


def make(dice: random.Random) -> bytes:
    body = operations(dice)
    kind = dice.randrange(3)
    if kind == 0:
        return b"\0" + damage(tardiff.MAGIC[dice.choice((1, 2))] + frame(body), dice)
    return bytes((kind,)) + damage(body, dice)


def main() -> None:
    fuzzing.fuzz("tardiff", run, make, fuzzing.parser(__doc__).parse_known_args())


if __name__ == "__main__":
    main()
