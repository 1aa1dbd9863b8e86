# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pull the same images with ``cfsctl`` and with the engine, turn by turn, and compare: wall time, processor time,
memory.

    run.py IMAGES [NAME...] [--tools cfsctl,engine] [--repeat 3] [--write results/NAME.md]

IMAGES is what ``images.py`` made.  Each pull comes from a real registry on loopback into a fresh repository (SHA-256,
no fs-verity) on one disk; before each the disk is quiet (sync), and the blobs are in the page cache.  After the first
pull into a repository a second one measures a pull with nothing to do.  Processor time is that of all processes,
skopeo's among them; memory is the peak of the largest process, and which one that was.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import json
import os
import pathlib
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests/support"))

from aptroot import Unavailable, cache_directory
from registry import Registry

NAMES = ("bench-gzip", "bench-zstd", "bench-big", "bench-small", "bench-2g", "deb-small", "deb-140k")
SAMPLE_SECONDS = 0.02
LEAST_FREE = 25 << 30


class Measured(NamedTuple):
    wall: float
    user: float
    system: float
    peak: int
    """Bytes resident of the largest process."""
    largest: str
    """Its name."""
    status: int

    @property
    def processor(self) -> float:
        return self.user + self.system


def _spread(directory: pathlib.Path) -> None:
    """What ``chattr +T`` does: ext4 puts the subdirectories of this one far apart. Other file systems do not
    need it.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            flags = struct.unpack("l", fcntl.ioctl(fd, 0x80086601, bytes(8)))[0]  # FS_IOC_GETFLAGS
            fcntl.ioctl(fd, 0x40086602, struct.pack("l", flags | 0x00020000))  # FS_IOC_SETFLAGS, FS_TOPDIR_FL
    finally:
        os.close(fd)


def _children() -> dict[int, list[int]]:
    tree: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{entry}/stat", "rb") as file:
                tree.setdefault(int(file.read().rsplit(b")", 1)[1].split()[1]), []).append(int(entry))
    return tree


def _sample(root: int, peaks: dict[str, int]) -> None:
    """Note the high-water mark of every process below ``root``."""
    tree = _children()
    waiting = list(tree.get(root, []))
    while waiting:
        pid = waiting.pop()
        waiting += tree.get(pid, [])
        with contextlib.suppress(OSError):
            name = peak = ""
            with open(f"/proc/{pid}/status") as file:
                for line in file:
                    if line.startswith("Name:"):
                        name = line.split()[1]
                    elif line.startswith("VmHWM:"):
                        peak = line.split()[1]
                        break
            if peak:
                peaks[name] = max(peaks.get(name, 0), int(peak) * 1024)


def _measure_here(command: Sequence[str], log: str) -> Measured:
    """Run and reap ``command`` and everything it leaves behind; only for a process that has no other children."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans come to us, with what they used
    peaks: dict[str, int] = {}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SAMPLE_SECONDS):
            _sample(os.getpid(), peaks)

    before = os.times()
    with open(log, "ab") as output:
        started = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        status = process.wait()
        wall = time.monotonic() - started
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    done.set()
    watcher.join()
    after = os.times()
    largest = max(peaks, key=lambda name: peaks[name]) if peaks else "?"
    return Measured(
        wall,
        after.children_user - before.children_user,
        after.children_system - before.children_system,
        peaks.get(largest, 0),
        largest,
        status,
    )


def measure(command: Sequence[str], environment: dict[str, str], log: pathlib.Path) -> Measured:
    """`_measure_here` in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--measure", str(log), *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        check=True,
        text=True,
    )
    return Measured(*json.loads(done.stdout))


class Failed(Exception):
    """A tool could not pull an image; the text holds its last words."""


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.work = (options.work or cache_directory() / "bench").resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.registry = Registry(self.work / "registry")
        self.log = self.work / "log"
        self.environment = dict(os.environ)
        # Numbers go on where an earlier run ended, for the sake of the block groups (see fresh).
        self.count = int(time.time())

    def start(self) -> None:
        self.registry.start()
        settings = self.work / "home/.config/containers/registries.conf"
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text(f'[[registry]]\nlocation = "{self.registry.address}"\ninsecure = true\n')
        # Both tools start skopeo, which reads this; so neither needs options for a registry without TLS. Not every
        # skopeo takes the file from $CONTAINERS_REGISTRIES_CONF (1.9 does not), but all look below $HOME.
        self.environment["HOME"] = str(self.work / "home")
        self.environment.pop("XDG_CONFIG_HOME", None)
        self.log.write_bytes(b"")

    def offer(self, name: str) -> str:
        """Push an image unless the registry has just that; returns its reference."""
        layout = self.options.images / name
        wanted = json.loads((layout / "index.json").read_text())["manifests"][0]
        status, headers, _unused = self.registry.request(
            "HEAD", f"/v2/{name}/manifests/latest", {"Accept": wanted["mediaType"]}
        )
        if status != 200 or headers.get("docker-content-digest") != wanted["digest"]:
            self.registry.push(str(layout), f"{name}:latest")
        manifest = json.loads((layout / "blobs/sha256" / wanted["digest"].split(":")[1]).read_text())
        for layer in manifest["layers"]:
            with open(self.registry.blob_file(layer["digest"]), "rb") as blob:
                while blob.read(1 << 20):
                    pass
        return self.registry.reference(f"{name}:latest")

    def command(self, tool: str, repository: pathlib.Path, reference: str) -> list[str]:
        if tool == "cfsctl":
            return [self.options.cfsctl, "--repo", str(repository), "oci", "pull", reference, "bench"]
        extra = ["--parallel", str(self.options.parallel)] if self.options.parallel else []
        return [
            self.options.python,
            str(HERE.parent / "dev" / "run_engine.py"),
            "--repository",
            str(repository),
            "pull",
            *extra,
            "--skopeo",
            self.options.skopeo,
            reference,
            "bench",
        ]

    def fresh(self) -> pathlib.Path:
        """An empty repository at a place where nothing was deleted lately.

        ext4 does not give a freed inode away for a minute (five if it is not on the disk yet) and looks past all of
        them for each new one: directly after the removal of a large tree a new file in its neighbourhood costs a
        millisecond instead of 0.05. So repositories are kept until the end, and each begins in a block group of its
        own.
        """
        self.count += 1
        base = self.work / "repositories"
        base.mkdir(exist_ok=True)
        _spread(base)
        if shutil.disk_usage(base).free < LEAST_FREE:
            self.clean()
            print("waiting for the file system to forget what was deleted", file=sys.stderr)
            time.sleep(70)
        repository = base / str(self.count)
        if shutil.which(self.options.cfsctl):
            subprocess.run(
                [
                    self.options.cfsctl,
                    "--repo",
                    str(repository),
                    "init",
                    "--insecure",
                    "--algorithm",
                    "fsverity-sha256-12",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
            )
        else:
            meta = {
                "version": 1,
                "algorithm": "fsverity-sha256-12",
                "features": {"compatible": [], "read-only-compatible": [], "incompatible": []},
            }
            (repository / "objects").mkdir(parents=True)
            (repository / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
        os.sync()
        return repository

    def clean(self) -> None:
        shutil.rmtree(self.work / "repositories", ignore_errors=True)
        os.sync()

    def once(self, tool: str, name: str, reference: str) -> tuple[Measured, Measured]:
        """One pull into an empty repository and one with nothing to do."""
        repository = self.fresh()
        both = []
        for _unused in range(2):
            result = measure(self.command(tool, repository, reference), self.environment, self.log)
            if result.status:
                raise Failed(
                    f"{tool} failed to pull {name}; the end of "
                    f"{self.log}:\n{self.log.read_text(errors='replace')[-2000:]}"
                )
            both.append(result)
            os.sync()
        return both[0], both[1]


def _median(results: Sequence[Measured], field: str) -> float:
    return float(statistics.median(getattr(result, field) for result in results))


def _row(name: str, tool: str, results: Sequence[Measured]) -> str:
    largest = max(results, key=lambda result: result.peak)
    walls = " ".join(f"{result.wall:.2f}" for result in results)
    middle = f"{_median(results, 'wall'):.2f} | {_median(results, 'processor'):.2f}"
    return f"| {name} | {tool} | {middle} | {_median(results, 'peak') / 1e6:.0f} ({largest.largest}) | {walls} |"


def _ratio(name: str, mine: Sequence[Measured], theirs: Sequence[Measured]) -> str:
    parts = [f"{_median(mine, field) / _median(theirs, field):.2f}" for field in ("wall", "processor", "peak")]
    best = min(result.wall for result in mine) / min(result.wall for result in theirs)
    return f"| {name} | {parts[0]} | {best:.2f} | {parts[1]} | {parts[2]} |"


def _machine(options: argparse.Namespace) -> str:
    model = ""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "")
    versions = [f"kernel {platform.release()}"]
    for command in ([options.cfsctl, "--version"], [options.skopeo, "--version"], [options.python, "--version"]):
        with contextlib.suppress(OSError):
            versions.append(
                subprocess.run(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.STDOUT, check=False)
                .stdout.strip()
                .splitlines()[0]
            )
    probe = (
        "import importlib.util as u\n"
        "names = ('isal', 'zlib_ng', 'zstandard', 'backports.zstd', 'compression.zstd', 'jsonschema')\n"
        "found = [n for n in names if u.find_spec(n.split('.')[0]) and u.find_spec(n)]\n"
        "try: found += [__import__('ctypes').CDLL('libisal.so.2')._name]\n"
        "except (ImportError, OSError): pass\n"
        "print(' '.join(found) or 'none')"
    )
    libraries = subprocess.run(
        [options.python, "-c", probe], stdout=subprocess.PIPE, text=True, check=False
    ).stdout.strip()
    load = " ".join(f"{value:.1f}" for value in os.getloadavg())
    return (
        f"{len(os.sched_getaffinity(0))} processors, {model}; {', '.join(versions)}; libraries: {libraries}; "
        f"load average at the start: {load}"
    )


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(_measure_here(sys.argv[3:], sys.argv[2])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=pathlib.Path, help="directory of layouts, made by images.py")
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: " + " ".join(NAMES))
    parser.add_argument("--tools", default="cfsctl,engine")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cfsctl", default="cfsctl")
    parser.add_argument("--skopeo", default="skopeo", help="for the engine; cfsctl takes the one on the PATH")
    parser.add_argument("--python", default=sys.executable, help="interpreter for the engine")
    parser.add_argument("--parallel", type=int, default=0, help="for the engine; default: as it decides")
    parser.add_argument(
        "--work", type=pathlib.Path, help="registry and repositories lie here; default: bench/ of the cache"
    )
    parser.add_argument("--write", type=pathlib.Path, help="write the tables to this file too")
    options = parser.parse_args()
    tools = options.tools.split(",")
    names = [name for name in options.names or NAMES if (options.images / name / "index.json").exists()]
    bench = Bench(options)
    lines = [_machine(options), ""]
    full: dict[tuple[str, str], list[Measured]] = {}
    again: dict[tuple[str, str], list[Measured]] = {}
    failures: list[str] = []
    try:
        bench.start()
        for name in names:
            reference = bench.offer(name)
            for turn in range(options.repeat):
                for tool in tools if turn % 2 == 0 else tools[::-1]:
                    try:
                        first, second = bench.once(tool, name, reference)
                    except Failed as error:
                        print(error, file=sys.stderr)
                        failures.append(f"- {name}: {tool} failed")
                        continue
                    full.setdefault((name, tool), []).append(first)
                    again.setdefault((name, tool), []).append(second)
                    print(
                        f"{name} {tool}: {first.wall:.2f} s ({first.processor:.2f}), again {second.wall:.2f} s, "
                        f"{first.peak / 1e6:.0f} MB {first.largest}",
                        file=sys.stderr,
                        flush=True,
                    )
    except Unavailable as error:
        print(f"not available: {error}", file=sys.stderr)
        return 77
    finally:
        bench.registry.stop()
        bench.clean()
    for title, results in (("Pull into an empty repository", full), ("Pull again, nothing to do", again)):
        lines += [
            f"## {title}",
            "",
            "| image | tool | wall s | processor s | peak MB of one process | every wall |",
            "|---|---|---|---|---|---|",
        ]
        lines += [_row(name, tool, values) for (name, tool), values in results.items()]
        if "cfsctl" in tools and "engine" in tools:
            lines += [
                "",
                "Engine / cfsctl:",
                "",
                "| image | wall (median) | wall (best) | processor | peak |",
                "|---|---|---|---|---|",
            ]
            lines += [
                _ratio(name, results[name, "engine"], results[name, "cfsctl"])
                for name in names
                if (name, "engine") in results and (name, "cfsctl") in results
            ]
        lines.append("")
    summaries = [
        f"- {name}: {(options.images / name / 'summary').read_text().strip()}"
        for name in names
        if (options.images / name / "summary").exists()
    ]
    text = "\n".join([*lines, *summaries, *failures]) + "\n"
    print(text)
    if options.write:
        options.write.parent.mkdir(parents=True, exist_ok=True)
        heading = (
            f"# Pulls beside cfsctl, {time.strftime('%Y-%m-%d')}\n\nMade by `benchmarks/run.py --repeat "
            f"{options.repeat}`.\n\n"
        )
        options.write.write_text(heading + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
