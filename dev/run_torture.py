# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Kill the engine at random instants, look at what it left with both checkers, and have it finish.

Each round runs one verb (pull, prune, repair, tag) on a repository in a process of its own and kills that, or lets the
disk be full for it. Then the check of level ``full`` must find nothing that the verb is to blame for, ``cfsctl fsck``
and ``cfsctl oci fsck`` must be content where there is a ``cfsctl`` on the PATH, and the same verb must finish. The
first repository in which that is not so is kept and named.
"""

from __future__ import annotations

import argparse
import collections
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import types

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "ansible_collections.composefs.oci"
for _name, _path in (("ansible_collections", []), ("ansible_collections.composefs", []), (PACKAGE, [str(ROOT)])):
    sys.modules.setdefault(_name, types.ModuleType(_name)).__path__ = _path
sys.path.insert(0, str(ROOT / "tests/support"))

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, prune, repair
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeo import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store import create, graph
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout
from tarbytes import small_tree

VERBS = ("pull", "prune", "repair", "tag")
TAGS = ("one", "two", "three")
# How long a verb may run before it is killed, in seconds; about as long as it takes, so that every part of it is hit.
LONGEST = {"pull": 2.0, "prune": 0.4, "repair": 2.5, "tag": 0.3}
FULL = 300_000  # bytes that a file may have, where the disk is to be full


def options() -> pull.Options:
    return pull.Options(proxy=ProxyOptions(unenforced_policy="ignore", tls_verify=False))


def do(verb: str, path: str, layout: str, tag: str) -> None:
    """One verb, as a module does it."""
    with Repository.open(path, write=True) as repository:
        if verb == "pull":
            pull.pull_images(repository, [pull.Request(f"oci:{layout}:{tag}", tag)], options(), Progress())
        elif verb == "prune":
            prune.prune(repository, prune.Wish(remove=[tag], timeout=60), Progress())
        elif verb == "repair":
            repair.repair(repository, check.Wish(check.FULL), repair.Means(layout, options()), Progress())
        else:
            digest = repository.tag_digest(tag)
            for number in range(200 if digest else 0):
                repository.tag(f"{tag}-{number % 5}", digest or "")
                repository.untag(f"{tag}-{(number + 2) % 5}")


def findings(path: pathlib.Path) -> list[str]:
    with Repository.open(str(path)) as repository:
        report = check.check(repository, check.Wish(check.FULL), Progress())
    return [f"{one.code} {one.path}: {one.message}" for one in report.findings]


def theirs(path: pathlib.Path) -> list[str]:
    """What cfsctl has to say."""
    program = shutil.which("cfsctl")
    said = []
    for words in (["fsck"], ["oci", "fsck"]) if program else ():
        done = subprocess.run([str(program), "--repo", str(path), *words], capture_output=True, text=True, check=False)
        if done.returncode:
            said.append(f"cfsctl {' '.join(words)}: {done.stdout} {done.stderr}")
    return said


def damage(path: pathlib.Path, chance: random.Random) -> None:
    """Lose or spoil a few objects that images need."""
    with Repository.open(str(path)) as repository:
        found = graph.Graph.read(repository)
        wanted = sorted({one for root in found.roots for one in found.reaches(root)})
    for digest in chance.sample(wanted, min(3, len(wanted))):
        victim = path / "objects" / fsverity.object_path(digest)
        raw = bytearray(victim.read_bytes())
        victim.unlink()
        if chance.random() < 0.5:
            raw[len(raw) // 2] ^= 1
            victim.write_bytes(raw)


def attempt(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str, chance: random.Random) -> str:
    """Run a verb and do something to it: what."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL, FULL))

    full = verb in ("pull", "repair") and chance.random() < 0.15
    child = subprocess.Popen(
        [sys.executable, __file__, "--do", verb, str(path), str(layout), tag],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        preexec_fn=limit if full else None,
        start_new_session=True,
    )
    with child:
        assert child.stdout is not None
        child.stdout.readline()
        if full:
            return "full" if child.wait() else "finished"
        time.sleep(chance.random() * LONGEST[verb])
        finished = child.poll() is not None
        child.send_signal(signal.SIGKILL)
    return "finished" if finished else "killed"


def campaign(minutes: float, seed: int) -> int:
    """The whole of it; 1 if something was wrong."""
    chance = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + minutes * 60
    base = pathlib.Path(tempfile.mkdtemp(prefix="composefs-oci-torture-", dir=os.environ.get("COMPOSEFS_OCI_DISK")))
    layout = Layout(base / "layout")
    shared = small_tree(seed=1, files=60, size=20_000)
    for number, tag in enumerate(TAGS):
        layout.image([shared, small_tree(seed=number + 2, files=60, size=20_000, prefix=f"opt/{tag}")], tag)
    path = base / "repository"
    create.prepare(str(path), fsverity.SHA512, create.DISABLED)
    while time.monotonic() < end:
        verb, tag = chance.choice(VERBS), chance.choice(TAGS)
        if verb == "repair":
            damage(path, chance)
        what = attempt(verb, path, layout.path, tag, chance)
        counts[f"{verb} {what}"] += 1
        wrong = [] if verb == "repair" else findings(path) + theirs(path)
        if not wrong:
            try:
                do(verb, str(path), str(layout.path), tag)
                wrong = findings(path) + theirs(path)
            except EngineError as error:
                wrong = [str(error)]
        if wrong:
            print(f"After '{verb} {tag}' was {what} (seed {seed}), {path} has:", *wrong, sep="\n  ")
            return 1
    shutil.rmtree(base)
    print(", ".join(f"{count} x {what}" for what, count in sorted(counts.items())) + ": nothing was found.")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=5.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--do", nargs=4, metavar=("VERB", "REPOSITORY", "LAYOUT", "TAG"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do:
        print("begun", flush=True)
        do(*arguments.do)
        return 0
    return campaign(arguments.minutes, arguments.seed)


if __name__ == "__main__":
    sys.exit(main())
