# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Debian packages of any suite, with their dependencies, without touching the machine's own apt and without root.

The mirror is the one this machine uses itself: its address is read from the apt configuration at run time, so nothing
here names a host.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

FRESH_SECONDS = 12 * 3600
"""How long package lists are used before they are asked for again."""


class Unavailable(Exception):
    """What was asked for cannot be had on this machine; the text says why (tests skip with it)."""


class Mirror(NamedTuple):
    uri: str
    signed_by: str


def cache_directory() -> pathlib.Path:
    """Where everything that is slow to make is kept: $COMPOSEFS_OCI_CACHE or .cache/ of the checkout (never in git)."""
    named = os.environ.get("COMPOSEFS_OCI_CACHE")
    path = pathlib.Path(named) if named else pathlib.Path(__file__).resolve().parents[2] / ".cache"
    path.mkdir(parents=True, exist_ok=True)
    ignore = path / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n")
    return path.resolve()


@contextlib.contextmanager
def locked(path: pathlib.Path) -> Iterator[None]:
    """One process at a time works in ``path`` (two test runs may share a cache)."""
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _deb822(text: str) -> Iterator[dict[str, str]]:
    for paragraph in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        key = ""
        for line in paragraph.splitlines():
            if line.startswith("#"):
                continue
            if line[:1].isspace() and key:
                fields[key] += " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                key = key.strip().lower()
                fields[key] = value.strip()
        if fields:
            yield fields


def _codename() -> str:
    found = ""
    with contextlib.suppress(OSError), open("/etc/os-release") as release:
        for line in release:
            key, _unused, value = line.strip().partition("=")
            if key == "ID" and value.strip('"') != "debian":
                raise Unavailable("this machine is not a Debian, so its apt sources name no Debian mirror")
            if key == "VERSION_CODENAME":
                found = value.strip('"')
    return found


def mirror() -> Mirror:
    """The Debian mirror that serves this machine's own suite, as the first matching line of the apt sources
    names it.
    """
    for program in ("apt-get", "dpkg-deb"):
        if not shutil.which(program):
            raise Unavailable(f"{program} is not installed")
    suites = {_codename(), "stable", "testing", "sid", "unstable"} - {""}
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    etc = pathlib.Path("/etc/apt")
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        for fields in _deb822(path.read_text()):
            if fields.get("enabled", "yes").lower() == "no" or "deb" not in fields.get("types", "").split():
                continue
            if suites & set(fields.get("suites", "").split()) and "main" in fields.get("components", "").split():
                signed = fields.get("signed-by", keyring)
                return Mirror(fields["uris"].split()[0], signed if signed.startswith("/") else keyring)
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]:
        if not path.exists():
            continue
        for line in path.read_text().splitlines():
            match = re.match(r"deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)\s+(.*)", line.strip())
            if match and match.group(3) in suites and "main" in match.group(4).split():
                option = re.search(r"signed-by=(\S+)", match.group(1) or "")
                return Mirror(match.group(2), option.group(1) if option else keyring)
    raise Unavailable("the apt sources of this machine name no mirror of " + " or ".join(sorted(suites)))


class AptRoot:
    """A private apt state for one suite: its lists and its downloaded packages lie in ``directory``."""

    def __init__(self, suite: str = "", directory: pathlib.Path | None = None) -> None:
        self.mirror = mirror()
        self.suite = suite or _codename() or "stable"
        self.directory = (directory or cache_directory() / "apt") / self.suite
        self.archives = self.directory / "archives"

    def _prepare(self) -> None:
        for name in ("archives/partial", "none/partial", "lists/partial", "etc", "log"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "status").touch()
        signed = f"signed-by={self.mirror.signed_by}" if os.path.exists(self.mirror.signed_by) else ""
        (self.directory / "etc/sources.list").write_text(
            f"deb [{signed}] {self.mirror.uri} {self.suite} main\n".replace(" [] ", " ")
        )
        dump = subprocess.run(["apt-config", "dump"], check=True, stdout=subprocess.PIPE, text=True).stdout
        kept = [
            line for line in dump.splitlines() if re.match(r"(?i)Acquire::(http|https|ftp)\b|APT::Architecture ", line)
        ]
        here = self.directory
        kept += [
            f'Dir::Etc "{here}/etc/";',
            'Dir::Etc::sourcelist "sources.list";',
            'Dir::Etc::sourceparts "/dev/null";',
            'Dir::Etc::parts "/dev/null";',
            'Dir::Etc::main "/dev/null";',
            'Dir::Etc::preferences "/dev/null";',
            'Dir::Etc::preferencesparts "/dev/null";',
            f'Dir::State "{here}/";',
            f'Dir::State::status "{here}/status";',
            f'Dir::State::lists "{here}/lists/";',
            f'Dir::Cache "{here}/";',
            f'Dir::Cache::archives "{here}/archives/";',
            f'Dir::Log "{here}/log/";',
            'Acquire::Languages "none";',
            'Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";',
            # A mirror that lags behind is no matter here: the lists are signed all the same, and nothing of this is
            # installed on a real host.
            'Acquire::Check-Valid-Until "false";',
            'Acquire::Retries "3";',
            'Acquire::http::Timeout "30";',
            'Acquire::https::Timeout "30";',
            # Root would hand the download to an unprivileged user who may not write here.
            'APT::Sandbox::User "root";',
            'APT::Install-Recommends "false";',
            'Debug::NoLocking "true";',
        ]
        (here / "apt.conf").write_text("\n".join(kept) + "\n")

    def _apt(self, *arguments: str) -> str:
        environment = {
            **os.environ,
            "APT_CONFIG": str(self.directory / "apt.conf"),
            "LC_ALL": "C.UTF-8",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        done = subprocess.run(
            ["apt-get", "-qq", *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise Unavailable(
                f"apt-get {arguments[0]} for {self.suite} failed: "
                f"{done.stderr.strip()[-600:] or done.stdout.strip()[-600:]}"
            )
        return done.stdout

    def update(self) -> None:
        """Fetch the package lists unless they are fresh."""
        stamp = self.directory / "updated"
        self._prepare()
        if not stamp.exists() or time.time() - stamp.stat().st_mtime > FRESH_SECONDS:
            try:
                self._apt("update")
            except Unavailable:
                # Old lists are better than none: what is in the cache can still be used.
                if not list((self.directory / "lists").glob("*_Packages*")):
                    raise
            else:
                stamp.touch()

    def closure(self, packages: Sequence[str]) -> list[str]:
        """The archive file names of ``packages`` and all they depend on, sorted."""
        # Asking apt takes a second, and the answer stays the same as long as the lists do.
        memory = self.directory / "closures.json"
        state = (self.directory / "updated").stat().st_mtime if (self.directory / "updated").exists() else 0
        known: dict[str, list[str]] = {}
        if memory.exists():
            saved = json.loads(memory.read_text())
            known = saved["closures"] if saved["state"] == state else {}
        key = " ".join(packages)
        if key not in known:
            text = self._apt(
                "install", "-y", "--print-uris", "-o", f"Dir::Cache::archives={self.directory}/none/", *packages
            )
            known[key] = sorted({line.split()[1] for line in text.splitlines() if line.startswith("'")})
            memory.write_text(json.dumps({"state": state, "closures": known}))
        return known[key]

    def fetch(self, packages: Sequence[str]) -> list[pathlib.Path]:
        """Download ``packages`` and all they depend on; apt checks their hashes against the signed lists."""
        with locked(self.directory):
            self.update()
            names = self.closure(packages)
            if not all((self.archives / name).exists() for name in names):
                self._apt("install", "-y", "--download-only", *packages)
        return [self.archives / name for name in names]
