# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the Molecule scenarios in extensions/molecule, all or those named, on hosts made for the purpose (tests/hosts).

A scenario that this machine cannot run is skipped, and the reason told. Logs are in .venv/logs/molecule-SCENARIO.log.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import environment
import tested
from environment import ROOT, VENV, Missing, say

sys.path[:0] = [str(ROOT / "tests" / "hosts"), str(ROOT / "tests" / "support")]
import broken
from aptroot import cache_directory, locked

SCENARIOS = ROOT / "extensions" / "molecule"
EXAMPLE = ROOT / "examples" / "molecule-rollout"
LOGS = VENV / "logs"
SKIP = 77
GUESTS = ("confirm", "power", "verity")
COMMANDS = {
    "skopeo": "skopeo",
    "docker-registry": "docker-registry",
    "htpasswd": "apache2-utils",
    "openssl": "openssl",
    "zstd": "zstd",
    "mmdebstrap": "mmdebstrap",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "git": "git",
}
GUEST_COMMANDS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.btrfs": "btrfs-progs",
    "busybox": "busybox-static",
    "cpio": "cpio",
    "lz4": "lz4",
    "xz": "xz-utils",
}
# Which Pythons each series of ansible-core runs on.
CONTROLLERS = {
    "2.18": ((3, 11), (3, 13)),
    "2.19": ((3, 11), (3, 13)),
    "2.20": ((3, 12), (3, 14)),
    "2.21": ((3, 12), (3, 14)),
}

running: dict[str, subprocess.Popen[bytes]] = {}
stopping = threading.Event()


@dataclasses.dataclass(frozen=True)
class Way:
    """How scenarios are run: by which Ansible, on which hosts; "" stands for what this machine and the scenarios choose
    themselves.
    """

    ansible: str = ""
    """A series of ansible-core, such as 2.18."""
    suite: str = ""
    """The Debian suite of every host."""
    python: str = ""
    """The version of a Python of this machine that runs the modules on every host, such as 3.9."""
    long: bool = False
    broken: bool = False
    """Whether hosts get a copy of the collection in which something is broken on purpose."""

    def __str__(self) -> str:
        words = [
            f"ansible-core {self.ansible}" if self.ansible else "",
            f"hosts with {self.suite}" if self.suite else "",
        ]
        return ", ".join(word for word in (*words, f"Python {self.python} on hosts" if self.python else "") if word)

    @property
    def directory(self) -> pathlib.Path:
        """The virtual environment of this way, with all that its runs write."""
        return VENV / (f"molecule-{self.ansible}" if self.ansible else "molecule")

    @property
    def collections(self) -> pathlib.Path:
        return self.directory / ("broken" if self.broken else "collections")

    def prepare(self) -> None:
        """Make the virtual environments; `Missing` where there is no Python for them."""
        requirements, interpreter = ROOT / "dev" / "requirements-molecule.txt", environment.python()
        if self.ansible:
            if self.ansible not in CONTROLLERS:
                raise Missing(f"no ansible-core {self.ansible} is known here, but {', '.join(CONTROLLERS)}")
            oldest, newest = CONTROLLERS[self.ansible]
            if not oldest <= sys.version_info[:2] <= newest:
                fitting = [path for version, path in environment.interpreters().items() if oldest <= version <= newest]
                if not fitting:
                    raise Missing(
                        f"ansible-core {self.ansible} needs a Python from {oldest[0]}.{oldest[1]} to "
                        f"{newest[0]}.{newest[1]}, and none was found"
                    )
                interpreter = fitting[-1]
            pinned = VENV / f"molecule-{self.ansible}.txt"
            pinned.parent.mkdir(exist_ok=True)
            pinned.write_text(f"ansible-core ~= {self.ansible}.0\n-r {os.path.relpath(requirements, VENV)}\n")
            requirements = pinned
        environment.virtual_environment(self.directory, interpreter, [requirements])
        if self.python:
            found = environment.interpreters().get((3, int(self.python.partition(".")[2])))
            if not found:
                raise Missing(f"Python {self.python} is not on this machine")
            environment.virtual_environment(
                self.host_python.parents[1], found, [ROOT / "dev" / "requirements-host.txt"]
            )

    @property
    def host_python(self) -> pathlib.Path:
        return VENV / f"host-python{self.python}" / "bin" / "python"

    def environment(self, scenario: str) -> dict[str, str]:
        """The environment of Molecule: its own programs, the checkout as the collection, everything it writes
        in .venv.
        """
        result = environment.ansible_environment()
        result["PATH"] = os.pathsep.join([str(self.directory / "bin"), *result["PATH"].split(os.pathsep)[1:]])
        result.pop("ANSIBLE_CONFIG")
        for variable in ("PYTHONPATH", "PYENV_VERSION"):
            result.pop(variable, None)
        result.update(
            ANSIBLE_COLLECTIONS_PATH=str(self.collections),
            ANSIBLE_HOME=str(self.directory / "ansible"),
            # The path of a socket must be short, wherever the checkout lies.
            ANSIBLE_SSH_CONTROL_PATH_DIR=f"{tempfile.gettempdir()}/composefs-oci-{os.getuid()}-{zlib.crc32(str(ROOT).encode()):08x}",
            MOLECULE_EPHEMERAL_DIRECTORY=str(self.directory / "run" / scenario),
            PYTHONDONTWRITEBYTECODE="1",
            NO_COLOR="1",
            ANSIBLE_NOCOLOR="1",
            COMPOSEFS_OCI_LONG="1" if self.long else "",
            COMPOSEFS_OCI_SUITE=self.suite,
            COMPOSEFS_OCI_REPORT=str(LOGS / f"molecule-{scenario}.json"),
        )
        if self.python:
            result.update(
                COMPOSEFS_OCI_HOST_PYTHON=str(self.host_python), COMPOSEFS_OCI_INTERPRETER=str(self.host_python)
            )
        return result


@dataclasses.dataclass
class Outcome:
    """What became of one scenario."""

    scenario: str
    verdict: str
    """ok, skipped or FAILED."""
    seconds: float = 0.0
    words: str = ""
    report: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def log(self) -> pathlib.Path:
        return LOGS / f"molecule-{self.scenario}.log"


# What the supported versions are tried with. The first way is what dev/molecule does anyway; the others have hosts that
# the scenarios do not name.
MATRIX = (
    Way(ansible="2.19"),
    Way(ansible="2.18"),
    Way(ansible="2.20", python="3.9"),
    Way(ansible="2.20", python="3.10"),
    Way(ansible="2.21", suite="forky"),
    Way(ansible="2.21", suite="bookworm"),
    Way(ansible="2.21", python="3.12"),
)


def scenarios() -> list[str]:
    """All scenarios; those with guests, which take longest, come first."""
    names = sorted(path.parent.name for path in SCENARIOS.glob("*/molecule.yml"))
    return sorted(names, key=lambda name: (name not in GUESTS, name != "default", name)) + (
        ["example"] if EXAMPLE.exists() else []
    )


def lab(way: Way, action: str, name: str) -> subprocess.CompletedProcess[str]:
    """Have lab.py check or clean for a scenario."""
    # The example needs what the scenario default needs.
    file = SCENARIOS / ("default" if name == "example" else name) / "molecule.yml"
    command = [str(way.directory / "bin/python"), str(ROOT / "tests" / "hosts" / "lab.py"), action, str(file)]
    env = way.environment(name)
    return subprocess.run(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def why_not(way: Way, name: str) -> str:
    """Why the scenario cannot be run here; "" if it can."""
    done = lab(way, "check", name)
    if done.returncode not in (0, SKIP):
        raise Missing(f"it cannot be told whether {name} can be run: {done.stdout}")
    return done.stdout.strip().removeprefix("cannot be run here: ") if done.returncode else ""


def molecule(way: Way, name: str, action: str, log: Any) -> int:
    """Have Molecule do ``action``; its exit code."""
    if name == "example":
        command = [str(way.directory / "bin/python"), str(ROOT / "tests" / "hosts" / "run_example.py"), action]
    else:
        command = [str(way.directory / "bin/molecule"), "-c", str(SCENARIOS / "shared/base.yml"), action, "-s", name]
    env = way.environment(name)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    running[name] = process
    if stopping.is_set():
        os.killpg(process.pid, signal.SIGTERM)
    try:
        return process.wait()
    finally:
        del running[name]


def attempt(way: Way, name: str, actions: Sequence[str], new: bool, clean: bool) -> tuple[int, dict[str, Any]]:
    """Have Molecule do ``actions`` one after the other, whatever comes of them; the exit code of the last, and what the
    tests reported.

    ``new``: with an empty directory; ``clean``: no host is left in any case, where otherwise that is only so after an
    interruption. Hosts of a scenario have the same names in every checkout that shares the cache, so it waits until no
    other runs it.
    """
    with locked(cache_directory() / "scenarios" / name):
        return alone(way, name, actions, new, clean)


def alone(way: Way, name: str, actions: Sequence[str], new: bool, clean: bool) -> tuple[int, dict[str, Any]]:
    """What `attempt` does once it is the only one."""
    ephemeral, report = way.directory / "run" / name, LOGS / f"molecule-{name}.json"
    if new:
        shutil.rmtree(ephemeral, ignore_errors=True)
    report.unlink(missing_ok=True)
    ephemeral.mkdir(parents=True, exist_ok=True)
    code = 1
    with open(LOGS / f"molecule-{name}.log", "wb") as log:
        for action in actions:
            if not stopping.is_set():
                code = molecule(way, name, action, log)
    if (clean or stopping.is_set()) and name != "example":  # which cleans up by itself
        lab(way, "clean", name)
    return code, json.loads(report.read_text()) if report.exists() else {}


def run_scenario(way: Way, name: str, action: str) -> Outcome:
    """Run one scenario to its end."""
    started = time.monotonic()
    reason = "interrupted" if stopping.is_set() else why_not(way, name)
    if reason:
        return Outcome(name, "skipped", words=reason)
    code, report = attempt(way, name, [action], new=action == "test", clean=False)
    good = not code and (action != "test" or bool(report.get("passed")))
    words = "interrupted" if stopping.is_set() else f"{report['passed']} tests" if report else ""
    return Outcome(name, "ok" if good else "FAILED", time.monotonic() - started, words, report)


def run_all(way: Way, names: Sequence[str], action: str, jobs: int) -> Iterator[Outcome]:
    """Run scenarios, ``jobs`` at a time; they come as they end."""
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run_scenario, way, name, action) for name in names]):
            yield future.result()


def notices(way: Way, breakage: broken.Breakage) -> Outcome:
    """Run a scenario with a collection in which its promise is broken; ok if its tests notice."""
    started, name = time.monotonic(), breakage.scenario
    reason = "interrupted" if stopping.is_set() else why_not(way, name)
    if reason:
        return Outcome(name, "skipped", words=reason)
    breakage.apply(environment.collection_copy(way.collections))
    # The steps before the tests may fail or not; what counts is what the tests say.
    _code, report = attempt(way, name, ["test"] if name == "example" else sequence(name), new=True, clean=True)
    noticed = any(breakage.noticed_by in test for test in report.get("failed", []))
    words = f"{breakage.promise}: broken, {'noticed by' if noticed else 'and not noticed by'} {breakage.noticed_by}"
    return Outcome(name, "ok" if noticed else "FAILED", time.monotonic() - started, words)


def sequence(name: str) -> list[str]:
    """The actions of a scenario up to its tests, as its molecule.yml or the common base says."""
    texts = [path.read_text() for path in (SCENARIOS / name / "molecule.yml", SCENARIOS / "shared" / "base.yml")]
    found = next(match for text in texts if (match := re.search(r"test_sequence: \[(.*)\]", text)))
    return found[1].replace(" ", "").split(",")[:-1]


def tell(outcome: Outcome, verbose: bool) -> None:
    say(f"{outcome.scenario:14} {outcome.seconds:6.1f} s  {outcome.verdict}{outcome.words and '  ' + outcome.words}")
    for test, reason in outcome.report.get("skipped", []):
        say(f"    skipped {test}: {reason}")
    if outcome.verdict == "FAILED" or (verbose and outcome.verdict == "ok"):
        lines = outcome.log.read_text(errors="replace").splitlines()
        say("\n".join(f"    {line}" for line in (lines if verbose else lines[-120:])))


def end_all(signum: int, _frame: object) -> None:
    stopping.set()
    for process in list(running.values()):
        os.killpg(process.pid, signal.SIGTERM)
    # The threads see to it that no host is left, then the program ends.
    raise SystemExit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dev/molecule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "scenarios",
        nargs="*",
        metavar="SCENARIO",
        help="what to run; all if none is named; 'guests' stands for those with guests, 'namespace' for the others",
    )
    parser.add_argument("--long", action="store_true", help="the long forms of the scenarios with guests")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at a time (1)")
    parser.add_argument(
        "--do",
        default="test",
        metavar="ACTION",
        help="an action of Molecule other than test, such as converge, verify or destroy",
    )
    parser.add_argument(
        "--times", type=int, default=1, help="run everything so many times, to find what is not reliable"
    )
    parser.add_argument(
        "--ansible",
        default="",
        metavar="SERIES",
        help=f"run with this series of ansible-core: {', '.join(CONTROLLERS)}",
    )
    parser.add_argument("--suite", default="", help="give every host this Debian suite: bookworm, trixie or forky")
    parser.add_argument(
        "--python",
        default="",
        metavar="VERSION",
        help="run the modules on namespace hosts with this Python of the machine, such as 3.9",
    )
    parser.add_argument(
        "--matrix",
        action="store_true",
        help="run everything in every way in which it is supported, as far as this machine can",
    )
    parser.add_argument(
        "--record", action="store_true", help="write what ran on what into the tables of README and documentation"
    )
    parser.add_argument(
        "--broken",
        action="store_true",
        help="break what the scenarios stand for, and fail unless their tests notice (tests/hosts/broken.py)",
    )
    parser.add_argument("--list", action="store_true", help="tell the scenarios")
    parser.add_argument(
        "--verbose",
        "-v",
        action="store_true",
        help="show the whole log of every scenario, not only of those that failed",
    )
    arguments = parser.parse_args()
    every = scenarios()
    if arguments.list:
        say("\n".join(every))
        return 0
    chosen = []
    for word in arguments.scenarios or every:
        chosen += {"namespace": [name for name in every if name not in GUESTS], "guests": list(GUESTS)}.get(
            word, [word]
        )
    chosen = list(dict.fromkeys(chosen))
    unknown = [name for name in chosen if name not in every]
    if unknown:
        say(f"dev/molecule: no scenario is called {unknown[0]!r}. There are: {' '.join(every)}")
        return 2
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, end_all)
    try:
        environment.install_debian_packages({**COMMANDS, **(GUEST_COMMANDS if set(chosen) & set(GUESTS) else {})})
    except Missing as problem:
        # What cannot be installed makes scenarios skip; each tells what it lacks.
        say(f"dev/molecule: {problem}")
    LOGS.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    failures = 0
    asked = Way(arguments.ansible, arguments.suite, arguments.python, arguments.long)
    for way in [dataclasses.replace(way, long=arguments.long) for way in MATRIX] if arguments.matrix else [asked]:
        try:
            way.prepare()
        except Missing as problem:
            say(f"dev/molecule: {problem}")
            if not arguments.matrix:
                return 2
            continue
        if arguments.broken:
            # One at a time, for each has the copy to itself; in a thread, which ends what it began when this one is
            # interrupted.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                broken_way = dataclasses.replace(way, broken=True)
                for future in [
                    pool.submit(notices, broken_way, one) for one in broken.BREAKAGES if one.scenario in chosen
                ]:
                    outcome = future.result()
                    tell(outcome, arguments.verbose)
                    failures += outcome.verdict == "FAILED"
            continue
        # A copy, so that editing goes on while scenarios run.
        if arguments.do in ("test", "create", "converge"):
            environment.collection_copy(way.directory / "collections")
        if str(way):
            say(f"With {way}:")
        for _round in range(arguments.times):
            for outcome in run_all(way, chosen, arguments.do, arguments.jobs):
                tell(outcome, arguments.verbose)
                failures += outcome.verdict == "FAILED"
                if arguments.record and outcome.verdict == "ok":
                    tested.record(
                        outcome.scenario, outcome.seconds, outcome.report, way.directory / "bin/python", way.long
                    )
    say(f"All scenarios took {time.monotonic() - started:.0f} s.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
