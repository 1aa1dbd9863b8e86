# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fuzz everything between layer archives and EROFS images: whatever the bytes, they become an image or an error of the
engine, soon.

    python tests/fuzz/fuzz_tree.py [--seconds 60] [--seed N] [LAYER ...]

Archives are composed at random (odd paths, whiteouts, links, sizes, SELinux policies) or damaged. LAYERs are archives
that are run once, as the layers of one image, to look at what was found.
"""

from __future__ import annotations

import argparse
import pathlib
import random
import resource
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "unit")]

__import__("conftest")  # makes the collection importable
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import bootable, erofswriter, lastmatch
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.merge import XATTR_MODES, TreeBuilder
from ansible_collections.composefs.oci.tests.support.layers import Objects, base
from ansible_collections.composefs.oci.tests.support.tarbytes import header, member, padding, small_tree, tar

SECONDS_PER_INPUT = 5.0
# Expressions of a policy that never end are interrupted; here sooner than in a pull.
lastmatch._MAX_SECONDS = 1.0
MEMORY = 1 << 29
FILES = "etc/selinux/t/contexts/files/file_contexts"
PARENTS = (b"a", b"b", b"usr", b"run", b"etc", b".", b"", b"\xff")
WORDS = (
    *PARENTS[:5],
    b"c",
    b"d",
    b"e",
    b"f",
    b"g",
    b"00",
    b"boot",
    b"n" * 255,
    b".wh.a",
    b".wh.c",
    b".wh.d",
    b".wh..wh..opq",
    b"c/",
    b"d/.",
    b".wh.",
)
START = [
    *base("run", "a", "b"),
    member("usr/c", b"c"),
    member("a/c", b"c" * 100),
    member("c", type=b"2", linkname="usr"),
]
BAD_WORDS = (b"..", b"n" * 256, b"a\0b", b".wh.a/x", b"c/x", b"")
REGEX = (
    b"a",
    b"b",
    b"/",
    b".",
    b"*",
    b"+",
    b"?",
    b"(",
    b")",
    b"[",
    b"]",
    b"|",
    b"{",
    b"}",
    b"2",
    b",",
    b"9",
    b"\\",
    b"d",
    b"^",
    b"$",
    b"(?",
    b"!",
    b"=",
    b"[^/]*",
    b".*",
)


def path(chance: random.Random) -> bytes:
    if chance.random() < 0.003:
        return b"d/" * chance.choice((100, 3000, 20_000)) + chance.choice(WORDS)
    last = chance.choice(WORDS if chance.random() < 0.99 else BAD_WORDS)
    return b"/".join((*(chance.choice(PARENTS) for _unused in range(chance.randrange(4))), last))


def entry(chance: random.Random) -> bytes:
    """A member of which nearly everything is possible; the rest is rare, since it ends the whole image."""
    odd = chance.random() < 0.03
    kind = chance.choice(b"SVgxLKDM\0" if odd else b"000555555234671")
    xattrs: dict[str, bytes] = {}
    for _unused in range(chance.choice((0, 0, 0, 1, 3))):
        name = chance.choice(("security.capability", "security.selinux", "user.a", "trusted.overlay.opaque"))
        xattrs[name if not odd else "user." + "x" * 300] = chance.choice(
            (b"", b"y", b"0sA=\n", b"x" * (70_000 if odd else 7000))
        )
    pax: dict[str, bytes] = {}
    if chance.random() < 0.2:
        pax["mtime"] = chance.choice((b"9" * 25, b"x", "1.\u00e9".encode()) if odd else (b"1.5", b"-3.25", b"1."))
    regular = kind in b"07\0"
    return member(
        path(chance),
        chance.choice((b"", b"x", b"y" * 64, b"z" * 65, b"w" * 5000)) if regular or odd else b"",
        bytes((kind,)),
        mode=chance.choice((0o644, 0o755, 0o104755, 0o7777777)),
        uid=chance.choice((0, 1, 1 << 20)),
        mtime=chance.choice((0, 1, -5, 1 << 33, -(1 << 70))),
        linkname=chance.choice((b"usr/c", b"usr/c", b"a/./c", b"c", path(chance)))
        if kind == 0x31
        else b"t" * chance.choice((0, 1, 900, 4096 if odd else 4095)),
        device=chance.choice(((4096, 0), (0, 1048576)) if odd else ((0, 0), (1, 3), (4095, 1048575))),
        xattrs=xattrs,
        pax=pax,
    )


def policy(chance: random.Random) -> list[bytes]:
    """A policy with random expressions, which are matched against the paths of the same image."""
    lines = [
        b"/"
        + b"".join(chance.choice(REGEX) for _unused in range(chance.randrange(12)))
        + chance.choice((b" ", b" -- ", b" -d "))
        + chance.choice((b"l", b"<<none>>"))
        for _unused in range(chance.randrange(6))
    ]
    subs = b"".join(b"/%s /%s\n" % (path(chance), path(chance)) for _unused in range(chance.randrange(3)))
    return [
        *base("run", "a", "b"),
        member("etc/selinux/config", b"SELINUXTYPE=t\n"),
        member(FILES, b"/.* all\n" + b"\n".join(lines)),
        member(FILES + ".subs", subs),
    ]


def damaged(data: bytes, chance: random.Random) -> bytes:
    """A well-formed archive with a few bytes changed, cut out or doubled; sums of headers are made right again, so that
    more gets through.
    """
    raw = bytearray(data)
    for _unused in range(chance.randrange(1, 6)):
        at = chance.randrange(len(raw))
        action = chance.randrange(4)
        if action == 0:
            raw[at] ^= 1 << chance.randrange(8)
        elif action == 1:
            raw[at : at + chance.randrange(1, 9)] = chance.choice(
                (b"\0" * 8, b"7" * 8, b"\x80\xff\xff\xff", b"\xff" * 8)
            )
        elif action == 2:
            del raw[at : at + 512 * chance.randrange(1, 3)]
        else:
            block = at - at % 512
            raw[block:block] = raw[block : block + 512 * chance.randrange(1, 4)]
        if not raw:
            return b""
    for block in range(0, len(raw) - 511, 512):
        if raw[block + 257 : block + 262] == b"ustar":
            raw[block + 148 : block + 156] = b" " * 8
            raw[block + 148 : block + 156] = b"%06o\0 " % sum(raw[block : block + 512])
    return bytes(raw)


def make(chance: random.Random) -> list[bytes]:
    shape = chance.randrange(8)
    if shape == 0:
        return [
            damaged(small_tree(files=3, seed=chance.randrange(100)), chance)
            for _unused in range(chance.randrange(1, 3))
        ]
    if shape == 1:
        return [tar(*policy(chance), *(entry(chance) for _unused in range(chance.randrange(10))))]
    if shape == 2:
        # Many directories for few bytes.
        return [
            tar(
                *(header(b"%d/" % chance.randrange(3) + b"d/" * 45, 0, b"5") for _unused in range(300)),
                member("x/" * chance.choice((16_000, 400_000)), b""),
            )
        ]
    if shape == 3:
        loud = b"".join(member(path(chance), padding(1)) for _unused in range(5))
        return [tar(*base(), loud), damaged(tar(*(entry(chance) for _unused in range(5))), chance)]
    return [
        tar(*(START if chance.random() < 0.9 else []), *(entry(chance) for _unused in range(chance.randrange(25))))
        for _unused in range(chance.randrange(1, 4))
    ]


def swallow(layers: list[bytes]) -> str:
    """Everything from archive to image; what became of it in a word."""
    mode = XATTR_MODES[len(layers) % 2]
    objects = Objects()
    builder = TreeBuilder(max_inodes=1 << 18)
    try:
        for layer in layers:
            for one, content in objects.entries(layer):
                builder.add(one, content)
        filesystem = builder.finish(mode)
        for version in (1, 2):
            erofswriter.image_bytes(filesystem.root, version, fsverity.SHA256)
        bootable.transform_for_boot(filesystem, objects.read)
        erofswriter.image_bytes(filesystem.root, 1, fsverity.SHA256)
    except EngineError as error:
        text = str(error)
        if not error.message or len(text) > 2000:
            raise AssertionError(f"an error of {len(text)} characters") from error
        return error.code
    return "image"


def attempt(layers: list[bytes]) -> str:
    """As swallow(), within limits of time and memory."""
    started = time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    word = swallow(layers)
    seconds = time.process_time() - started
    assert seconds < SECONDS_PER_INPUT, f"took {seconds:.1f} seconds"
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most == memory or most < MEMORY >> 10, f"needed {most >> 10} MiB"
    return word


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", type=pathlib.Path)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    if options.layers:
        print(attempt([layer.read_bytes() for layer in options.layers]))
        return 0
    print(f"seed {options.seed}", flush=True)
    chance = random.Random(options.seed)
    seen: dict[str, int] = {}
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        layers = make(chance)
        try:
            word = attempt(layers)
        except Exception:  # whatever it is, it is a finding
            traceback.print_exc()
            names = []
            for number, layer in enumerate(layers):
                names.append(f"crash-{options.seed}-{sum(seen.values())}-{number}.tar")
                pathlib.Path(names[-1]).write_bytes(layer)
            print(f"again: python tests/fuzz/fuzz_tree.py {' '.join(names)}")
            return 1
        seen[word] = seen.get(word, 0) + 1
    print(", ".join(f"{count} {word}" for word, count in sorted(seen.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
