# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make the images that the benchmarks pull, as OCI layouts below one directory.

``images.py DIRECTORY [NAME...]`` makes the named images (default: all) unless they are there; ``--list`` tells what
they are. The Debian ones need a Debian with network for the first run; the synthetic ones are the same everywhere and
every time. ``pigz`` makes it several times faster.  All work is done at low priority.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Callable, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests/support"))

from aptroot import Unavailable
from ociimage import SMALL_LAYERS, Layer, LayerSink, Layout, debian_image
from tarbytes import DIRECTORY, END, REGULAR, header, member, padding

BASE = "base-files base-passwd bash coreutils grep sed tar gzip findutils"
TWO_LAYERS = (f"{BASE} python3 perl git", "gcc g++ vim")
FIVE_LAYERS = (f"{BASE} python3 perl git", "gcc g++", "openjdk-17-jdk-headless", "vim emacs-nox", "rust-doc llvm-14")
MANY_INODES = (BASE, "papirus-icon-theme", "linux-headers-amd64 golang-1.19-src")


class Image(NamedTuple):
    summary: str
    build: Callable[[pathlib.Path, argparse.Namespace], str]


def _debian(layers: Sequence[str], encoding: str = "gzip") -> Callable[[pathlib.Path, argparse.Namespace], str]:
    def build(path: pathlib.Path, options: argparse.Namespace) -> str:
        built = debian_image(path, layers, encoding=encoding, cache=options.cache)
        return (
            f"{len(layers)} layers, {built.entries} entries, {built.tar_bytes / 2**20:.0f} MiB of tar, "
            f"{built.blob_bytes / 2**20:.0f} MiB of blobs"
        )

    return build


def _finish(path: pathlib.Path, sink: LayerSink) -> str:
    tar = sink.tar_size
    layer: Layer = sink.finish()
    layout = sink.layout
    layout.tag(layout.manifest(layout.config([layer]), [layer]))
    return f"1 layer, {tar / 2**20:.0f} MiB of tar, {layer.descriptor['size'] / 2**20:.0f} MiB of blobs"


def _top(sink: LayerSink) -> None:
    for name in ("usr/", "usr/share/", "usr/share/bench/", "run/"):
        sink.write(member(name, type=DIRECTORY))


def small_files(path: pathlib.Path, options: argparse.Namespace) -> str:
    """Files of 65 to 8,000 bytes, nearly all different, about half of each random (so that gzip has its usual work)."""
    chance = random.Random(4)
    sink = Layout(path).sink("gzip")
    _top(sink)
    text = b"".join(b"key-%d = value %d of a configuration file\n" % (number, number * number) for number in range(400))
    for number in range(options.files):
        if number % 500 == 0:
            folder = f"usr/share/bench/{number // 500:04}"
            sink.write(member(folder + "/", type=DIRECTORY))
        size = chance.randint(65, 8000)
        # One file in fifty repeats an earlier one, as in real trees.
        content = chance.getrandbits(4 * size).to_bytes(size // 2 + 1, "big") if number % 50 else bytes(size // 2 + 1)
        start = chance.randrange(4000)
        data = (content + text[start : start + size])[:size]
        sink.write(header(f"{folder}/file-{number:06}".encode(), size, REGULAR) + data + padding(size))
    sink.write(END + bytes(-(sink.tar_size + 1024) % 10240))
    return _finish(path, sink)


def one_big_file(path: pathlib.Path, options: argparse.Namespace) -> str:
    """One file of which ``--random`` per cent is random and the rest is text, in turns of 64 KiB pieces."""
    chance = random.Random(5)
    sink = Layout(path).sink("gzip")
    _top(sink)
    size = options.gibibytes << 30
    sink.write(header(b"usr/share/bench/large.bin", size, REGULAR))
    text = b"".join(b"%08d a line of a log that compresses as logs do\n" % number for number in range(2000))[: 1 << 16]
    pool = [chance.getrandbits(8 << 16).to_bytes(1 << 16, "big") for _unused in range(256)]
    for number in range(size >> 16):
        # Rotating a pooled piece by a random amount keeps it random for gzip (whose window is 32 KiB) at no cost.
        turn = chance.randrange(1 << 16)
        piece = pool[number % 256]
        sink.write(piece[turn:] + piece[:turn] if chance.randrange(100) < options.random else text)
    sink.write(END + bytes(-(sink.tar_size + 1024) % 10240))
    return _finish(path, sink)


IMAGES = {
    "deb-small": Image("a small Debian, three layers", _debian(SMALL_LAYERS)),
    "bench-gzip": Image("two gzip layers of Debian packages", _debian(TWO_LAYERS)),
    "bench-small": Image("one layer of many small files (--files)", small_files),
    "bench-2g": Image("one layer with one big file (--gibibytes, --random)", one_big_file),
    "bench-big": Image("five gzip layers, about 1 GB and more unpacked", _debian(FIVE_LAYERS)),
    "bench-zstd": Image("the two layers in zstd", _debian(TWO_LAYERS, "zstd")),
    "deb-140k": Image("more than 140,000 inodes of Debian packages", _debian(MANY_INODES)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=pathlib.Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=" ".join(IMAGES))
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--force", action="store_true", help="make them again")
    parser.add_argument(
        "--cache",
        type=pathlib.Path,
        help="where packages are kept; default: $COMPOSEFS_OCI_CACHE or .cache/ of the checkout",
    )
    parser.add_argument("--files", type=int, default=100_000, help="files of bench-small")
    parser.add_argument("--gibibytes", type=int, default=2, help="size of the file of bench-2g")
    parser.add_argument("--random", type=int, default=90, help="random share of bench-2g in per cent")
    options = parser.parse_args()
    if options.list or options.directory is None:
        for name, image in IMAGES.items():
            print(f"{name:12} {image.summary}")
        return 0
    unknown = set(options.names) - set(IMAGES)
    if unknown:
        parser.error("unknown image " + ", ".join(sorted(unknown)))
    os.nice(10)
    status = 0
    for name in options.names or IMAGES:
        path = options.directory / name
        if (path / "summary").exists() and not options.force:
            print(f"{name:12} {(path / 'summary').read_text().strip()} (there already)", flush=True)
            continue
        fresh = options.directory / f".{name}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        started = time.monotonic()
        try:
            summary = IMAGES[name].build(fresh, options)
        except Unavailable as error:
            print(f"{name:12} not available: {error}", flush=True)
            status = 77
            continue
        (fresh / "summary").write_text(summary + "\n")
        # In place only when it is whole: somebody may be reading the old one.
        shutil.rmtree(path, ignore_errors=True)
        fresh.rename(path)
        print(f"{name:12} {summary} ({time.monotonic() - started:.0f} s)", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
