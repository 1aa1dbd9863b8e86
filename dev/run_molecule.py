# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the Molecule scenarios in extensions/molecule, all or those named, on hosts made for the purpose (tests/hosts).

A scenario that this machine cannot run is skipped, and the reason told. Logs are in .venv/logs/molecule-SCENARIO.log.
"""

from __future__ import annotations

import argparse
import concurrent.futures
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

import environment
from environment import ROOT, VENV, Missing, say

SCENARIOS = ROOT / "extensions" / "molecule"
EXAMPLE = ROOT / "examples" / "molecule-rollout"
MOLECULE = VENV / "molecule"
LOGS = VENV / "logs"
SKIP = 77
GUESTS = ("verity", "power")
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
    "xz": "xz-utils",
}

running: list[subprocess.Popen[bytes]] = []
stopping = threading.Event()


def scenarios() -> list[str]:
    """All scenarios, those with guests last."""
    names = sorted(path.parent.name for path in SCENARIOS.glob("*/molecule.yml"))
    return sorted(names, key=lambda name: (name in GUESTS, name != "default", name)) + (["example"] if EXAMPLE.exists() else [])


def scenario_environment(name: str, long: bool) -> dict[str, str]:
    """The environment of Molecule: its own programs, the checkout as the collection, everything it writes in .venv."""
    result = environment.ansible_environment()
    result["PATH"] = os.pathsep.join([str(MOLECULE / "bin"), *result["PATH"].split(os.pathsep)[1:]])
    result.pop("ANSIBLE_CONFIG")
    result.update(
        ANSIBLE_COLLECTIONS_PATH=str(MOLECULE / "collections"),
        ANSIBLE_HOME=str(MOLECULE / "ansible"),
        # The path of a socket must be short, wherever the checkout lies.
        ANSIBLE_SSH_CONTROL_PATH_DIR=f"{tempfile.gettempdir()}/composefs-oci-{os.getuid()}-{zlib.crc32(str(ROOT).encode()):08x}",
        MOLECULE_EPHEMERAL_DIRECTORY=str(MOLECULE / "run" / name),
        PYTHONDONTWRITEBYTECODE="1",
        NO_COLOR="1",
        ANSIBLE_NOCOLOR="1",
        COMPOSEFS_OCI_LONG="1" if long else "",
    )
    for variable in ("PYTHONPATH", "PYENV_VERSION"):
        result.pop(variable, None)
    return result


def why_not(name: str, env: dict[str, str]) -> str:
    """Why the scenario cannot be run here; "" if it can."""
    # The example needs what the scenario default needs.
    file = SCENARIOS / ("default" if name == "example" else name) / "molecule.yml"
    program = ROOT / "tests" / "hosts" / "lab.py"
    done = subprocess.run(
        [str(MOLECULE / "bin/python"), str(program), "check", str(file)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode not in (0, SKIP):
        raise Missing(f"it cannot be told whether {name} can be run: {done.stdout}")
    return done.stdout.strip().removeprefix("cannot be run here: ") if done.returncode else ""


def run_scenario(name: str, action: str, long: bool) -> tuple[str, str, float, str]:
    """Run one; its name, ok/skipped/FAILED, seconds, and the reason or the tests that ran."""
    started = time.monotonic()
    env = scenario_environment(name, long)
    reason = "interrupted" if stopping.is_set() else why_not(name, env)
    if reason:
        return name, "skipped", 0.0, reason
    log = LOGS / f"molecule-{name}.log"
    ephemeral = pathlib.Path(env["MOLECULE_EPHEMERAL_DIRECTORY"])
    if action == "test":
        shutil.rmtree(ephemeral, ignore_errors=True)
    ephemeral.mkdir(parents=True, exist_ok=True)
    if name == "example":
        command = [str(MOLECULE / "bin/python"), str(ROOT / "tests" / "hosts" / "run_example.py"), action]
    else:
        command = [str(MOLECULE / "bin/molecule"), "-c", str(SCENARIOS / "shared/base.yml"), action, "-s", name]
    with open(log, "wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        running.append(process)
        code = process.wait()
        running.remove(process)
    text = log.read_text(errors="replace")
    tests = re.findall(r"(\d+) passed", text)
    return name, "FAILED" if code else "ok", time.monotonic() - started, f"{tests[-1]} tests" if tests else ""


def end_all(signum: int, _frame: object) -> None:
    stopping.set()
    for process in running:
        os.killpg(process.pid, signal.SIGTERM)
    raise SystemExit(128 + signum)


def main() -> int:
    parser = argparse.ArgumentParser(prog="dev/molecule", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help="what to run; all if none is named; 'namespace' stands for those without guests")
    parser.add_argument("--long", action="store_true", help="the long forms of the scenarios with guests")
    parser.add_argument("--jobs", type=int, default=1, help="scenarios at a time (1)")
    parser.add_argument("--do", default="test", metavar="ACTION", help="an action of Molecule other than test, such as converge, verify or destroy")
    parser.add_argument("--times", type=int, default=1, help="run everything so many times, to find what is not reliable")
    parser.add_argument("--list", action="store_true", help="tell the scenarios")
    parser.add_argument("--verbose", "-v", action="store_true", help="show the whole log of every scenario, not only of those that failed")
    arguments = parser.parse_args()
    every = scenarios()
    if arguments.list:
        say("\n".join(every))
        return 0
    chosen = []
    for word in arguments.scenarios or every:
        chosen += [name for name in every if name not in GUESTS] if word == "namespace" else [word]
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
    try:
        environment.virtual_environment(MOLECULE, environment.python(), [ROOT / "dev" / "requirements-molecule.txt"])
        # A copy, so that editing goes on while scenarios run.
        if arguments.do in ("test", "create", "converge"):
            environment.collection_copy(MOLECULE / "collections")
    except Missing as problem:
        say(f"dev/molecule: {problem}")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    failures = 0
    with concurrent.futures.ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for _round in range(arguments.times):
            pending = [pool.submit(run_scenario, name, arguments.do, arguments.long) for name in dict.fromkeys(chosen)]
            for future in concurrent.futures.as_completed(pending):
                name, verdict, seconds, words = future.result()
                say(f"{name:14} {seconds:6.1f} s  {verdict}{words and '  ' + words}")
                if verdict == "FAILED":
                    failures += 1
                if verdict == "FAILED" or (arguments.verbose and verdict == "ok"):
                    lines = (LOGS / f"molecule-{name}.log").read_text(errors="replace").splitlines()
                    say("\n".join(f"    {line}" for line in (lines if arguments.verbose else lines[-120:])))
    say(f"All scenarios took {time.monotonic() - started:.0f} s.")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
