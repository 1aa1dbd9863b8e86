# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run every test of the project, or the parts named; ``dev/test --list`` tells them.

Parts run two at a time, each into a log of its own under .venv/logs; a part that fails does not stop the others. At the
end stand the time of each part, every skipped test with its reason, and one line that sums the pytest runs up. The exit
code is 0 only if all went well.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import glob
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator, Sequence

import environment
import nearby
from environment import ROOT, VENV, Missing, say

LOGS = VENV / "logs"


@dataclasses.dataclass
class Counts:
    passed: int = 0
    failed: int = 0
    skips: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Failed(Exception):
    """A part found something wrong; its log says what."""


class Part:
    """One part while it runs: its log, its process, its results."""

    def __init__(self, name: str, limit: float) -> None:
        self.name = name
        self.deadline = time.monotonic() + limit
        self.counts = Counts()
        self.path = LOGS / f"{name}.log"
        self.log = open(self.path, "wb")  # noqa: SIM115 - closed by run_part
        self.process: subprocess.Popen[bytes] | None = None

    def write(self, text: str) -> None:
        self.log.write(text.encode())
        self.log.flush()

    def run(
        self,
        *command: str | os.PathLike[str],
        cwd: pathlib.Path = ROOT,
        env: dict[str, str] | None = None,
        codes: Sequence[int] = (0,),
    ) -> int:
        """Run ``command`` into the log in a session of its own, so that it and all it started can be ended together."""
        words = [os.fspath(word) for word in command]
        self.write(f"$ {' '.join(words)}\n")
        self.process = subprocess.Popen(
            words,
            cwd=cwd,
            env=env or tool_environment(),
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = self.process.wait(max(1.0, self.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.end()
            self.write("\nended: it took too long\n")
            raise Failed("took too long") from None
        if code not in codes:
            raise Failed(f"exit code {code} of {' '.join(words[:6])}")
        return code

    def end(self) -> None:
        if self.process and self.process.poll() is None:
            for sign in (signal.SIGTERM, signal.SIGKILL):
                try:
                    os.killpg(self.process.pid, sign)
                    self.process.wait(10)
                    return
                except (ProcessLookupError, subprocess.TimeoutExpired):
                    continue

    def pytest(
        self, interpreter: str | os.PathLike[str], *arguments: str, label: str = "", env: dict[str, str] | None = None
    ) -> None:
        """One pytest run, whose results are counted; no test collected at all is a failure."""
        report = LOGS / f"{self.name}{label and '-' + label}.xml"
        report.unlink(missing_ok=True)
        command = [
            os.fspath(interpreter),
            "-m",
            "pytest",
            "-q",
            "-ra",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *arguments,
        ]
        problem: Failed | None = None
        try:
            self.run(*command, env=env)
        except Failed as error:
            problem = error
        if report.exists():
            for case in xml.etree.ElementTree.parse(report).getroot().iter("testcase"):
                name = f"{case.get('classname', '')}.{case.get('name', '')}{label and ' on ' + label}".replace("/", ".")
                skipped = case.find("skipped")
                if case.find("failure") is not None or case.find("error") is not None:
                    self.counts.failed += 1
                elif skipped is not None:
                    text = (skipped.text or "").strip()
                    reason = skipped.get("message") or text
                    # A whole file is skipped: why stands at the end of a tuple.
                    self.counts.skips.append(
                        (
                            name.strip("."),
                            text.rpartition("Skipped: ")[2].strip("'\")") if reason == "collection skipped" else reason,
                        )
                    )
                else:
                    self.counts.passed += 1
        if problem:
            self.counts.failed = max(1, self.counts.failed)
            raise problem


def tool_environment(**more: str) -> dict[str, str]:
    """The environment of every part: the controller's programs first, every real Python before shims that answer for
    one only.
    """
    result = environment.ansible_environment()
    words = [word for word in result["PATH"].split(os.pathsep) if not word.endswith("/.pyenv/shims")]
    result["PATH"] = os.pathsep.join(
        [*words, *sorted({os.path.dirname(path) for path in environment.interpreters().values()} - set(words))]
    )
    result.pop("PYENV_VERSION", None)
    result.update(PYTHONDONTWRITEBYTECODE="1", NO_COLOR="1", ANSIBLE_NOCOLOR="1", **more)
    return result


# --- the parts: each is one function, told apart by name; what its docstring says is what --list shows ---


def other_pythons() -> list[tuple[int, int]]:
    """Versions other than the controller's that unit tests run on: the oldest and the newest there is, or all."""
    found = sorted(set(environment.interpreters()) - {sys.version_info[:2]})
    return found if OPTIONS.all_pythons else sorted({found[0], found[-1]} if found else set())


def on_processors() -> list[str]:
    """The arguments that spread a run of pytest over the processors: all of them, or two beside another part."""
    return ["-n", str(min(2, os.cpu_count() or 1) if OPTIONS.shared else os.cpu_count() or 1), "--dist", "worksteal"]


def own_python(part: Part) -> None:
    """Unit and property tests with the controller's Python."""
    part.pytest(VENV / "bin" / "python", *on_processors(), "tests/unit")
    for wanted in ((3, 9), (3, 13)):
        if wanted not in (*other_pythons(), sys.version_info[:2]):
            part.counts.skips.append(
                (f"unit tests on Python {wanted[0]}.{wanted[1]}", "that Python is not on this machine")
            )


def unit_on(version: tuple[int, int]) -> Callable[[Part], None]:
    def run(part: Part) -> None:
        label = f"python{version[0]}.{version[1]}"
        interpreter = environment.virtual_environment(
            VENV / label, environment.interpreters()[version], [ROOT / "tests" / "unit" / "requirements.txt"]
        )
        # That part of Ansible which is sent to managed hosts runs on older Pythons than the controller's.
        library = VENV / "managed" / "ansible"
        source = pathlib.Path(glob.glob(str(VENV / "lib" / "python3*" / "site-packages" / "ansible"))[0])
        library.mkdir(parents=True, exist_ok=True)
        for name in ("__init__.py", "_vendor", "release.py", "module_utils"):
            with contextlib.suppress(FileExistsError):
                (library / name).symlink_to(source / name)
        part.pytest(
            interpreter,
            *on_processors(),
            "tests/unit",
            label=label,
            env=tool_environment(PYTHONPATH=str(library.parent)),
        )

    run.__doc__ = f"Unit and property tests with Python {version[0]}.{version[1]}, as on managed hosts."
    return run


NEAR = 7.5
"""Seconds of dev/test near, from its start, after which it begins no more tests of what imports a changed room: with
those that run then and the report it ends within ten.
"""
BEGUN = time.monotonic()


def near(part: Part) -> None:
    """Quick unit tests of what differs from the branch main, and of what imports it: for while you work."""
    changed = nearby.changed_files()
    own = nearby.tests(changed, importers=False)
    chosen = [*own, *(path for path in nearby.tests(changed) if path not in own)]
    if not chosen:
        raise Failed("nothing differs from main that has unit tests")
    part.write("".join(f"{path}\n" for path in chosen))
    whole = [f"--whole={path}" for path in own]
    # The order of the files is that of their importance, and so it must be that of the tests.
    spread = ["load" if word == "worksteal" else word for word in on_processors()]
    part.pytest(VENV / "bin" / "python", *spread, "-m", "not slow", f"--until={BEGUN + NEAR}", *whole, *chosen)


def integration(part: Part) -> None:
    """The engine and the modules against the real skopeo, a real registry and, where it is on the PATH, cfsctl."""
    if not any((ROOT / "tests" / "integration").rglob("test_*.py")):
        raise Failed("there are no integration tests")
    environment.cfsctl(build=False)  # the tests say what they skip without it
    part.pytest(VENV / "bin" / "python", "tests/integration")


def cfsctl(part: Part) -> None:
    """The tests that compare with the reference implementation, which is built once where it is not on the PATH. That
    takes many minutes, so only when asked for; 'integration' has the same tests.
    """
    problem = environment.cfsctl(build=True)
    if problem:
        part.counts.skips.append(("cfsctl", problem))
        return
    part.pytest(VENV / "bin" / "python", "-m", "cfsctl", "tests/integration/engine")


def demo(part: Part) -> None:
    """The README's first command, which is the product's main job."""
    # As a person would run it: with the environment that this was started in.
    part.run(ROOT / "dev" / "demo", env=dict(os.environ))


def session(*names: str, what: str) -> Callable[[Part], None]:
    """A part that is sessions of nox, run with the tools that are here."""

    def run(part: Part) -> None:
        nox = environment.virtual_environment(
            VENV / "nox", environment.python(), [ROOT / "dev" / "requirements-nox.txt"]
        )
        more = ["--", *OPTIONS.sanity] if OPTIONS.sanity and "sanity" in names else []
        part.run(nox, "-m", "nox", "--no-venv", "--sessions", *names, *more)
        if "All targets skipped" in part.path.read_text(errors="replace"):
            raise Failed("ansible-test found nothing to test")

    run.__doc__ = what
    return run


def molecule(part: Part, *scenarios: str) -> None:
    code = part.run(ROOT / "dev" / "molecule", *scenarios, codes=(0, 1))
    told = part.path.read_text(errors="replace")
    for test, reason in re.findall(r"^    skipped (.*?): (.*)$", told, re.MULTILINE):
        part.counts.skips.append((test, reason))
    for scenario, verdict, rest in re.findall(r"^(\S+) +[\d.]+ s  (ok|skipped|FAILED)(?:  (.*))?$", told, re.MULTILINE):
        if verdict == "skipped":
            part.counts.skips.append((f"scenario {scenario}", rest))
        elif verdict == "ok":
            part.counts.passed += int(rest.partition(" ")[0] or 0)
        else:
            part.counts.failed += 1
    if code:
        raise Failed("a scenario failed")


def hosts(part: Part) -> None:
    """The Molecule scenarios on several hosts, over ssh, by dev/molecule."""
    molecule(part, "namespace")


def guests(part: Part) -> None:
    """The Molecule scenarios in virtual machines, for fs-verity and power cuts (short forms), by dev/molecule."""
    if not os.environ.get("CI"):
        molecule(part, "guests")
        return
    # Emulated machines are slow beside all else that CI runs. The one that pulls again and again with a processor of
    # that kind is left to people; the one with trials and a power cut uses the same image of a guest as verity.
    part.counts.skips.append(("scenario power", "left out in CI, where it takes too long: dev/molecule power"))
    molecule(part, "verity", "confirm")


PARTS: dict[str, tuple[Callable[[Part], None], float]] = {
    # Name: function, seconds after which it is ended.
    "near": (near, 300),
    "cfsctl": (cfsctl, 3600),
    "sanity": (session("sanity", what="nox: ansible-test sanity, imports and syntax on every Python found."), 2400),
    "hosts": (hosts, 3600),
    "guests": (guests, 3600),
    "integration": (integration, 3600),
    "demo": (demo, 900),
    "ansible-lint": (session("ansible-lint", what="nox: ansible-lint with the production profile."), 600),
    "galaxy": (
        session("galaxy", what="nox: the archive is built, and galaxy-importer takes it without a warning."),
        600,
    ),
    "docs": (session("docs", "docs-check", what="nox: modules, roles and pages are documented well."), 600),
    "mypy": (session("mypy", what="nox: mypy in strict mode on the engine."), 600),
    "style": (session("lint", "extra-checks", what="nox: ruff check and format, yamllint, unwanted files."), 300),
    "licences": (session("license-check", what="nox: reuse lint."), 300),
    "changelog": (session("changelog", what="nox: antsibull-changelog lint."), 300),
}
GROUPS = {
    "molecule": ["hosts", "guests"],
    "lint": ["ansible-lint", "docs", "mypy", "style", "licences", "changelog"],
}
# Parts that need more of the system than git and Python.
NEEDS = {
    "integration": environment.TEST_COMMANDS,
    "demo": environment.DEMO_COMMANDS,
    "sanity": {"shellcheck": "shellcheck"},
}
OPTIONS = argparse.Namespace(all_pythons=False, sanity=[], shared=False)

running: dict[str, Part] = {}
running_lock = threading.Lock()
stopping = threading.Event()


def run_part(name: str) -> tuple[str, str, float, Part]:
    function, limit = PARTS[name]
    part = Part(name, limit)
    started = time.monotonic()
    with running_lock:
        running[name] = part
    problem = ""
    try:
        if stopping.is_set():
            raise Failed("interrupted")
        function(part)
    except (Failed, Missing) as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    finally:
        with running_lock:
            del running[name]
        part.end()
        if problem:
            part.write(f"\n{problem}\n")
        part.log.close()
    return name, problem, time.monotonic() - started, part


def end_all(signum: int, _frame: object) -> None:
    stopping.set()
    with running_lock:
        for part in running.values():
            part.end()
    raise SystemExit(128 + signum)


def choose(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word in GROUPS:
            yield from GROUPS[word]
        elif word in PARTS:
            yield word
        else:
            raise SystemExit(f"dev/test: no part is called {word!r}. There are: {' '.join([*PARTS, *GROUPS])}")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dev/test", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="what to run; everything if none is named")
    parser.add_argument("--list", action="store_true", help="tell the parts and what they do")
    parser.add_argument(
        "--all-pythons",
        action="store_true",
        help="unit tests on every Python that is found, not only the oldest and the newest",
    )
    parser.add_argument("--jobs", type=int, default=2, help="parts at a time (2)")
    parser.add_argument(
        "--verbose", "-v", action="store_true", help="show the whole log of every part, not only of those that failed"
    )
    parser.add_argument(
        "--sanity",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="hand an argument on to ansible-test sanity, as in --sanity=--test=pylint",
    )
    arguments = parser.parse_args(namespace=OPTIONS)
    environment.complete_path()
    PARTS[f"unit-{sys.version_info[0]}.{sys.version_info[1]}"] = (own_python, 2400)
    for version in other_pythons():
        PARTS[f"unit-{version[0]}.{version[1]}"] = (unit_on(version), 2400)
    GROUPS["unit"] = [name for name in PARTS if name.startswith("unit-")]
    if arguments.list:
        for name, (function, _limit) in PARTS.items():
            say(f"{name:14} {function.__doc__}")
        for name, parts in GROUPS.items():
            say(f"{name:14} {', '.join(parts)}")
        return 0
    chosen = list(dict.fromkeys(choose(arguments.parts))) or [name for name in PARTS if name not in ("near", "cfsctl")]
    OPTIONS.shared = len(chosen) > 1 and arguments.jobs > 1
    # The long ones first, so that they do not wait for the short ones.
    chosen.sort(key=lambda name: -PARTS[name][1])

    started = time.monotonic()
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, end_all)
    try:
        commands = {"git": "git"}
        for name in chosen:
            commands.update(NEEDS.get(name, {}))
        environment.install_debian_packages(commands)
        environment.controller("requirements-test.txt")
        environment.collection_link()
    except Missing as problem:
        say(f"dev/test: {problem}")
        return 2
    LOGS.mkdir(parents=True, exist_ok=True)
    say(f"{'prepared':14} {time.monotonic() - started:6.1f} s")

    results = []
    with concurrent.futures.ThreadPoolExecutor(max(1, arguments.jobs)) as pool:
        for future in concurrent.futures.as_completed([pool.submit(run_part, name) for name in chosen]):
            name, problem, seconds, part = result = future.result()
            results.append(result)
            counts = part.counts
            tests = f"  {counts.passed} tests" if counts.passed else ""
            say(f"{name:14} {seconds:6.1f} s  {'FAILED: ' + problem if problem else 'ok'}{tests}")
            if problem or arguments.verbose:
                text = part.path.read_text(errors="replace")
                lines = text.splitlines()
                shown = lines if arguments.verbose else lines[-150:]
                say("\n".join(f"    {line}" for line in shown))

    skips = [
        (name, *skip)
        for name, _problem, _seconds, part in sorted(results, key=lambda r: r[0])
        for skip in part.counts.skips
    ]
    if skips:
        say("\nSkipped, and why:")
        grouped: dict[tuple[str, str], dict[str, int]] = {}
        for name, test, reason in skips:
            # The cases of one test are told together.
            tests = grouped.setdefault((name, " ".join(reason.split())), {})
            tests[test.partition("[")[0]] = tests.get(test.partition("[")[0], 0) + 1
        for (name, reason), tests in grouped.items():
            say(f"  {name}: {reason}")
            for test, number in tests.items():
                say(f"      {test}{f' ({number} cases)' if number > 1 else ''}")
    failures = [name for name, problem, _seconds, _part in results if problem]
    say(
        f"\nAll parts took {time.monotonic() - started:.0f} s."
        + (f" Failed: {', '.join(sorted(failures))}." if failures else "")
    )
    passed = sum(part.counts.passed for *_rest, part in results)
    failed = sum(part.counts.failed for *_rest, part in results)
    # Parts that are not pytest runs count in the exit code and in the line above; the line below is about tests.
    say(f"{passed} passed, {failed} failed, {len(skips)} skipped")
    return 1 if failures or failed else 0


if __name__ == "__main__":
    sys.exit(main())
