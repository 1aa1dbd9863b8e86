# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Check and prune a large repository beside ``cfsctl fsck`` and ``cfsctl gc``.

``life.py make REPOSITORY`` makes one without a network: 42,000 objects with 1.6 GB in one image, sizes spread as in a
distribution's image. ``life.py check REPOSITORY`` and ``life.py prune REPOSITORY`` measure, turn by turn; prune works
on copies. ``life.py ours {check,prune} REPOSITORY`` is the engine's side alone.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "ansible_collections.composefs.oci"

for _name, _path in (
    ("ansible_collections", []),
    ("ansible_collections.composefs", []),
    (PACKAGE, [str(ROOT)]),
):
    _module = sys.modules.setdefault(_name, types.ModuleType(_name))
    _module.__path__ = _path

from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, fsverity, ocidocuments, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


def make(options: argparse.Namespace) -> None:
    """A repository with the artifact ``app``, whose one layer has all the objects."""
    import random

    from ansible_collections.composefs.oci.plugins.module_utils.store import create

    chance = random.Random(1)
    create.prepare(options.repository, fsverity.ALGORITHMS[options.algorithm], create.DISABLED)
    weights = [chance.lognormvariate(8, 2) for _number in range(options.objects)]
    scale = options.bytes / sum(weights)
    with Repository.open(options.repository, write=True) as repository:
        writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
        for number, weight in enumerate(weights):
            data = chance.randbytes(8) + number.to_bytes(8, "big") + os.urandom(max(49, int(weight * scale)))
            writer.inline(b"header".ljust(512, b"\0"))
            writer.external(repository.objects.put(data), len(data))
        layer = repository.objects.put_pieces(writer.finish())
        diff_id = "sha256:" + hashlib.sha256(b"no tar").hexdigest()
        repository.register(imagestreams.LAYER + diff_id, layer)
        raw = b"{}"
        config = {"mediaType": "application/x", "digest": digests.digest_of(raw), "size": len(raw)}
        blob = {"mediaType": "application/x", "digest": diff_id, "size": 1}
        document = {"schemaVersion": 2, "mediaType": ocidocuments.OCI_MANIFEST, "config": config, "layers": [blob]}
        manifest = json.dumps(document).encode()
        stream = imagestreams.store(repository, imagestreams.CONFIG, raw, {})
        repository.register(imagestreams.CONFIG + config["digest"], stream)
        leading = imagestreams.store(
            repository,
            imagestreams.MANIFEST,
            manifest,
            {imagestreams.CONFIG_REF + config["digest"]: stream, diff_id: layer},
        )
        repository.register(imagestreams.MANIFEST + digests.digest_of(manifest), leading)
        repository.tag("app", digests.digest_of(manifest))
        repository.sync()


def ours(options: argparse.Namespace) -> None:
    """The engine's side of a comparison."""
    with Repository.open(options.repository) as repository:
        if options.verb == "prune":
            from ansible_collections.composefs.oci.plugins.module_utils.operations import prune

            pruned = prune.prune(repository, prune.Wish(), Progress())
            print(f"{pruned.objects} objects, {pruned.bytes} bytes")
        else:
            from ansible_collections.composefs.oci.plugins.module_utils.operations import check

            report = check.check(repository, check.Wish(level=options.level), Progress())
            print(f"{report.checked}, {len(report.findings)} findings")


def timed(command: list[str]) -> tuple[float, float, float]:
    """Seconds, processor seconds of all its processes, and the peak memory of the largest in MiB; the command must
    succeed.
    """
    pid = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, 1, 0)])
    begun = time.monotonic()
    _pid, status, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - begun
    if status:
        sys.exit(f"{' '.join(command)} failed: {status}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(name: str, commands: dict[str, list[str]], before: object, repeat: int) -> None:
    """Run the commands by turns and print a row for each."""
    results: dict[str, list[tuple[float, float, float]]] = {tool: [] for tool in commands}
    for turn in range(repeat):
        for tool in sorted(commands, reverse=bool(turn % 2)):
            path = before()  # type: ignore[operator]
            results[tool].append(timed([word.replace("REPOSITORY", path) for word in commands[tool]]))
    import statistics

    for tool, found in results.items():
        seconds, processor, memory = zip(*found)
        print(
            f"| {name} | {tool} | {statistics.median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f}) | "
            f"{statistics.median(processor):.2f} | {max(memory):.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="what", required=True)
    for what in ("make", "check", "prune", "ours"):
        verb = verbs.add_parser(what)
        if what == "ours":
            verb.add_argument("verb", choices=["check", "prune"])
        verb.add_argument("repository")
        verb.add_argument("--objects", type=int, default=42_000)
        verb.add_argument("--bytes", type=int, default=1_600_000_000)
        verb.add_argument("--algorithm", choices=sorted(fsverity.ALGORITHMS), default="sha512")
        verb.add_argument("--level", default="objects")
        verb.add_argument("--repeat", type=int, default=5)
        verb.add_argument("--no-cfsctl", action="store_true")
    options = parser.parse_args()
    options.repository = os.path.abspath(options.repository)
    if options.what in ("make", "ours"):
        (make if options.what == "make" else ours)(options)
        return
    mine = [sys.executable, __file__, "ours", options.what, "REPOSITORY", "--level", options.level]
    theirs = ["cfsctl", "--repo", "REPOSITORY", "gc" if options.what == "prune" else "fsck"]
    # As any program that is installed, and as cfsctl, the engine does not have to be compiled first.
    compileall.compile_dir(ROOT / "plugins" / "module_utils", quiet=1)
    commands = {"engine": mine, **({} if options.no_cfsctl else {"cfsctl": theirs})}
    if options.what == "check":
        compare(f"check {options.level}", commands, lambda: options.repository, options.repeat)
        return
    base = f"{options.repository}.copies"
    os.makedirs(base)
    try:
        copies = iter(range(1000))

        def fresh() -> str:
            path = f"{base}/{next(copies)}"
            subprocess.run(["cp", "-a", "--reflink=auto", options.repository, path], check=True)
            for tag in pathlib.Path(path, "streams/refs/oci").iterdir():
                tag.unlink()
            os.sync()
            return path

        compare("prune", commands, fresh, options.repeat)
    finally:
        shutil.rmtree(base)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
