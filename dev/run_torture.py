# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Harm the engine at work, look at what it left with both checkers, and have it finish.

``kills`` (the default): each round runs one verb (pull, prune, repair, tag, upgrade) on a repository in a process of
its own and kills that at a random instant, or lets the disk be full for it. ``faults``: each verb once for every system
call that changes something, which fails with EIO or ENOSPC there and then (needs ``strace``). ``together``: two
writers, one of them ``cfsctl`` where it is on the PATH, a pruner and a checker work at once.

Afterwards the check of level ``full`` must find nothing that the verb is to blame for, ``cfsctl fsck`` and ``cfsctl oci
fsck`` must be content, and the same verb must finish. The first repository in which that is not so is kept and named.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Iterator
from typing import NoReturn

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "ansible_collections.composefs.oci"
for _name, _path in (("ansible_collections", []), ("ansible_collections.composefs", []), (PACKAGE, [str(ROOT)])):
    sys.modules.setdefault(_name, types.ModuleType(_name)).__path__ = _path
sys.path.insert(0, str(ROOT / "tests/support"))

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, prune, repair
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import publish, pull
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.store import create, graph
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout
from tarbytes import small_tree

VERBS = ("pull", "prune", "repair", "tag", "upgrade")
TAGS = ("one", "two", "three")
# How long a verb takes, in seconds, until one that was not killed in time tells; so that every part of it is hit.
TAKES = {"pull": 0.3, "prune": 0.2, "repair": 0.5, "tag": 0.1, "upgrade": 0.1}
FULL = 12_000  # bytes that a file may have, where the disk is to be full
# Everything by which a disk is changed. Opening is not among them: the loader of programs opens files, too.
SPACE = {"write", "pwrite64", "writev", "copy_file_range", "sendfile", "fallocate", "link", "linkat", "symlink"}
SPACE |= {"symlinkat", "rename", "renameat", "renameat2", "mkdir", "mkdirat", "fsync", "fdatasync", "syncfs"}
CALLS = SPACE | {"ftruncate", "unlink", "unlinkat", "fchmod"}
ERRORS = {"EIO": CALLS, "ENOSPC": SPACE}
MOST = 60  # calls of one kind that fail, one after the other; later ones are repetitions
FAILED = 3


def options(erofs: bool = True) -> pull.Options:
    return pull.Options(
        proxy=ProxyOptions(unenforced_policy="ignore", tls_verify=False), images=publish.Images(plain=erofs)
    )


def do(verb: str, path: str, layout: str, tag: str) -> None:
    """One verb, as a module does it."""
    if verb == "upgrade":
        create.prepare(path, fsverity.SHA512, create.DISABLED)
    with Repository.open(path, write=True) as repository:
        if verb in ("pull", "upgrade"):
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
            for name in repository.tags():
                # They would keep what a prune is to remove.
                if name.startswith(f"{tag}-"):
                    repository.untag(name)


def findings(path: pathlib.Path) -> list[str]:
    with Repository.open(str(path)) as repository:
        # In this process: to start others for so few objects takes longer than to look at them.
        report = check.check(repository, check.Wish(check.FULL, parallel=1), Progress())
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


def make_old(path: pathlib.Path, layout: str, tag: str) -> None:
    """As before version 0.7 of cfsctl: no ``meta.json``, and images without an EROFS image."""
    with Repository.open(str(path), write=True) as repository:
        repository.untag(tag) if tag in repository.tags() else None
        prune.prune(repository, prune.Wish(timeout=60), Progress(), settle=lambda _ended: None)
        pull.pull_images(repository, [pull.Request(f"oci:{layout}:{tag}", tag)], options(erofs=False), Progress())
    (path / "meta.json").unlink()


def prepared(verb: str, path: pathlib.Path, layout: str, tag: str, chance: random.Random) -> None:
    """See to it that the verb has something to do; sometimes it has nothing."""
    with Repository.open(str(path)) as repository:
        present = tag in repository.tags()
    if chance.random() < 0.9 and present == (verb == "pull"):
        do("prune" if present else "pull", str(path), layout, tag)
    if verb == "repair":
        damage(path, chance)
    elif verb == "upgrade":
        make_old(path, layout, tag)


def command(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str) -> list[str]:
    return [sys.executable, __file__, "--do", verb, str(path), str(layout), tag]


def attempt(
    verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str, chance: random.Random, takes: dict[str, float]
) -> str:
    """Run a verb and do something to it: what. ``takes`` says how long each verb takes, and learns it."""

    full = verb in ("pull", "repair") and chance.random() < 0.15
    begun = time.monotonic()
    # A fork is there at once, where a new interpreter takes longer to start than most verbs to end.
    child = os.fork()
    if not child:
        alone(verb, path, layout, tag, FULL if full else resource.RLIM_INFINITY)
    end = begun + (300 if full else chance.random() * takes[verb])
    while not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            break
        time.sleep(0.0005)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == -signal.SIGKILL:
        # Slowly upwards, or a machine that is less busy than it was would never let the end of a verb be reached.
        takes[verb] *= 1.03
        return "killed"
    if full:
        return "full" if status else "finished"
    takes[verb] = (takes[verb] + time.monotonic() - begun) / 2
    return "finished"


def alone(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str, most: int) -> NoReturn:
    """One verb in this process, which ends with it; no file may have more than ``most`` bytes."""
    status = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        do(verb, str(path), str(layout), tag)
        status = 0
    except EngineError:
        status = FAILED
    except BaseException:  # as long as this frame ends, whatever happens
        traceback.print_exc()
    finally:
        os._exit(status)


def finished_by(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str) -> list[str]:
    """What is wrong after a verb that was harmed, and after a second run of it."""
    # What was damaged before, and what is still old, is not the verb's fault.
    wrong = [] if verb == "repair" or not (path / "meta.json").exists() else findings(path) + theirs(path)
    if not wrong:
        try:
            do(verb, str(path), str(layout), tag)
            wrong = findings(path) + theirs(path)
        except EngineError as error:
            wrong = [str(error)]
    return wrong


@contextlib.contextmanager
def ground(files: int, size: int) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """An empty repository and a layout of images that share a layer; both stay where something goes wrong."""
    base = pathlib.Path(tempfile.mkdtemp(prefix="composefs-oci-torture-", dir=os.environ.get("COMPOSEFS_OCI_DISK")))
    layout = Layout(base / "layout")
    shared = small_tree(seed=1, files=files, size=size)
    for number, tag in enumerate(TAGS):
        layout.image([shared, small_tree(seed=number + 2, files=files, size=size, prefix=f"opt/{tag}")], tag)
    create.prepare(str(base / "repository"), fsverity.SHA512, create.DISABLED)
    yield base / "repository", layout.path
    shutil.rmtree(base)


def told(counts: collections.Counter[str]) -> None:
    print(", ".join(f"{count} x {what}" for what, count in sorted(counts.items())) + ": nothing was found.")


def kills(minutes: float, seed: int) -> None:
    chance = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    takes = dict(TAKES)
    end = time.monotonic() + minutes * 60
    with ground(12, 20_000) as (path, layout):
        while time.monotonic() < end:
            verb, tag = chance.choice(VERBS), chance.choice(TAGS)
            prepared(verb, path, str(layout), tag, chance)
            what = attempt(verb, path, layout, tag, chance, takes)
            counts[f"{verb} {what}"] += 1
            wrong = finished_by(verb, path, layout, tag)
            if wrong:
                raise Wrong(f"After '{verb} {tag}' was {what} (seed {seed}), {path} has:", wrong)
    told(counts)


def faults(minutes: float, seed: int) -> None:
    """Every call of each verb, as far as the time allows; the verbs take turns, so that none is left out."""
    chance = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    end = time.monotonic() + minutes * 60
    with ground(4, 4000) as (path, layout):
        for tag in TAGS:
            do("pull", str(path), str(layout), tag)

        def ready(verb: str, tag: str) -> None:
            do("prune" if verb == "pull" else "pull", str(path), str(layout), tag)
            prepared(verb, path, str(layout), tag, chance)

        todo = []
        for verb in VERBS:
            ready(verb, TAGS[0])
            made = calls(verb, path, layout, TAGS[0])
            for error, kinds in ERRORS.items():
                todo += [(n, verb, error, call) for call in sorted(kinds & set(made)) for n in range(1, made[call] + 1)]
        # Where not all can be tried, a part of each kind.
        chance.shuffle(todo)
        tried = 0
        for number, verb, error, call in todo:
            if time.monotonic() > end:
                break
            tag = chance.choice(TAGS)
            ready(verb, tag)
            what = inject(verb, path, layout, tag, error, call, number)
            counts[f"{verb} {error} {what.partition(':')[0]}"] += 1
            tried += 1
            wrong = [what] if what.startswith("bad") else finished_by(verb, path, layout, tag)
            if wrong:
                failed = f"{call} number {number} of '{verb} {tag}' failed with {error}"
                raise Wrong(f"After {failed} (seed {seed}), {path} has:", wrong)
    told(counts)
    print(f"{tried} of {len(todo)} faults tried.")


def calls(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str) -> dict[str, int]:
    """The calls that change something, and how many of each kind one process of the verb makes at most."""
    log = path.parent / "strace"
    words = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", str(log), "-e", f"trace={','.join(sorted(CALLS))}"]
    subprocess.run([*words, *command(verb, path, layout, tag)], check=True, capture_output=True)
    found = collections.Counter(re.findall(r"^(\d+) +(\w+)\(", log.read_text(errors="replace"), re.MULTILINE))
    most: dict[str, int] = {}
    for (_pid, call), count in found.items():
        most[call] = min(MOST, max(count, most.get(call, 0)))
    return most


def inject(verb: str, path: pathlib.Path, layout: pathlib.Path, tag: str, error: str, call: str, number: int) -> str:
    """Run a verb while the ``number``-th ``call`` of each of its processes fails: how it ended, ``untouched`` if there
    are not so many, ``bad: ...`` if it did not end as it should.
    """
    log = path.parent / "strace"
    words = ["strace", "-f", "-qq", "--seccomp-bpf", "-o", str(log), "-e", f"trace={call}"]
    words += ["-e", f"inject={call}:error={error}:when={number}"]
    done = subprocess.run(
        [*words, *command(verb, path, layout, tag)], capture_output=True, text=True, check=False, timeout=600
    )
    if "Traceback" in done.stderr:
        return f"bad: {done.stderr}"
    if "(INJECTED)" not in log.read_text(errors="replace"):
        return "untouched"
    return {0: "borne", FAILED: "told"}.get(done.returncode, f"bad: it ended with {done.returncode}: {done.stderr}")


def together(minutes: float, seed: int) -> None:
    """Writers, a pruner and a checker at once, each in a process of its own."""
    end = time.time() + minutes * 60
    with ground(30, 8000) as (path, layout):
        roles = ("ours", "theirs" if shutil.which("cfsctl") else "others", "pruner", "checker")
        words = [sys.executable, __file__, "--work"]
        workers = {
            role: subprocess.Popen(
                [*words, role, str(path), str(layout), str(end), str(seed + number)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for number, role in enumerate(roles)
        }
        said = {role: worker.communicate()[0] for role, worker in workers.items()}
        wrong = [f"{role}: {said[role]}" for role in roles if workers[role].returncode]
        wrong += findings(path) + theirs(path)
        if wrong:
            raise Wrong(f"After all worked at once (seed {seed}), {path} has:", wrong)
    print(", ".join(f"{role}: {said[role].strip()}" for role in roles) + ": nothing was found.")


def work(role: str, path: str, layout: str, end: float, seed: int) -> int:
    """What one of them does until the end."""
    chance = random.Random(seed)
    rounds = 0
    while time.time() < end:
        rounds += 1
        name = f"{role}-{chance.randrange(3)}"
        tag = chance.choice(TAGS)
        if role == "theirs":
            for verb in (["pull", f"oci:{layout}:{tag}", name], ["untag", name]):
                if verb[0] == "pull" or chance.random() < 0.5:
                    subprocess.run(["cfsctl", "--repo", path, "oci", *verb], check=True, stdout=subprocess.DEVNULL)
            continue
        with Repository.open(path, write=True) as repository:
            if role == "pruner":
                prune.prune(repository, prune.Wish(remove=["ours-*"], keep_last=2, timeout=300), Progress())
            elif role == "checker":
                report = check.check(repository, check.Wish(chance.choice(check.LEVELS)), Progress())
                if report.findings:
                    print(*report.findings, sep="\n")
                    return 1
            else:
                request = pull.Request(f"oci:{layout}:{tag}", name)
                pull.pull_images(repository, [request], options(), Progress())
                if chance.random() < 0.5 and name in repository.tags():
                    with contextlib.suppress(EngineError):  # the pruner was faster
                        repository.untag(name)
        time.sleep(chance.random() * 0.1)
    print(rounds, "rounds")
    return 0


class Wrong(Exception):
    """Something was found."""

    def __init__(self, what: str, found: list[str]) -> None:
        super().__init__("\n  ".join([what, *found]))


MODES = {"kills": kills, "faults": faults, "together": together}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("minutes", type=float, nargs="?", default=5.0)
    parser.add_argument("mode", choices=MODES, nargs="?", default="kills")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--do", nargs=4, metavar=("VERB", "REPOSITORY", "LAYOUT", "TAG"), help=argparse.SUPPRESS)
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        role, path, layout, end, seed = arguments.work
        return work(role, path, layout, float(end), int(seed))
    if arguments.do:
        with contextlib.suppress(OSError):  # where nothing can be written, not even this
            print("begun", flush=True)
        try:
            do(*arguments.do)
        except EngineError:
            return FAILED
        return 0
    try:
        MODES[arguments.mode](arguments.minutes, arguments.seed)
    except Wrong as wrong:
        print(wrong)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
