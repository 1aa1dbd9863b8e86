# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What ``dev/demo`` and ``dev/test`` need before they can start: Debian packages, virtual environments, a collection
tree.

Everything but the Debian packages lands in ``.venv`` of the checkout, which git ignores and which may be deleted at any
time. Only the standard library is used, for nothing else is there on a fresh machine.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
COLLECTIONS = VENV / "collections"
NAMESPACE, NAME = "composefs", "oci"

DEMO_COMMANDS = {"skopeo": "skopeo", "docker-registry": "docker-registry", "dpkg-deb": "dpkg"}
"""Command to look for -> Debian package that has it."""
TEST_COMMANDS = {
    **DEMO_COMMANDS,
    "fsverity": "fsverity",
    "fsck.erofs": "erofs-utils",
    "mkfs.ext4": "e2fsprogs",
    "htpasswd": "apache2-utils",
    "igzip": "isal",
    "mmdebstrap": "mmdebstrap",
    "mount": "mount",
    "openssl": "openssl",
    "setfattr": "attr",
    "strace": "strace",
    "unshare": "util-linux",
    "zstd": "zstd",
    "git": "git",
}


CFSCTL = "0.9.4"
"""The version of the reference implementation that the tests compare with."""


class Missing(Exception):
    """Something that has to be there is not, and could not be installed; the text says what and why."""


def say(text: str) -> None:
    print(text, flush=True)


def complete_path() -> None:
    """Debian keeps servers and file system tools in sbin, which the PATH of an ordinary user lacks."""
    parts = os.environ.get("PATH", "").split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join(
        parts + [p for p in ("/usr/local/sbin", "/usr/sbin", "/sbin") if p not in parts]
    )


def cfsctl(build: bool) -> str:
    """See to it that ``cfsctl`` is on the PATH: the one that is there, or the one in the cache, which with ``build`` is
    built once by cargo. Empty if that worked, else why not.
    """
    if shutil.which("cfsctl"):
        return ""
    place = pathlib.Path(os.environ.get("COMPOSEFS_OCI_CACHE") or ROOT / ".cache").absolute() / f"cfsctl-{CFSCTL}"
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(place / "bin")])
    if shutil.which("cfsctl"):
        return ""
    if not build:
        return "cfsctl is not on the PATH; 'dev/test cfsctl' builds it once, where there is cargo"
    if not shutil.which("cargo"):
        return "there is neither cfsctl nor cargo, which could build it"
    command = ["cargo", "install", "--locked", "--root", str(place), "--version", CFSCTL, "composefs-ctl"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return "" if done.returncode == 0 else f"cargo could not build cfsctl: {done.stderr[-500:]}"


def install_debian_packages(commands: Mapping[str, str], modules: Iterable[str] = ("venv", "ensurepip")) -> None:
    """Install the packages of ``commands`` that are not there yet; `Missing` where that is impossible."""
    complete_path()
    wanted = sorted({package for command, package in commands.items() if not shutil.which(command)})
    probe = subprocess.run(
        [python(), "-c", "; ".join(f"import {module}" for module in modules)], stderr=subprocess.DEVNULL, check=False
    )
    if probe.returncode:
        wanted.append("python3-venv")
    if not wanted:
        return
    if not shutil.which("apt-get"):
        raise Missing(
            f"not on the PATH, and this is no Debian system, where they could be installed from: {', '.join(wanted)}"
        )
    if os.geteuid() != 0:
        raise Missing(f"missing Debian packages: {' '.join(wanted)}. Install them, or run this as root.")
    say(f"Installing Debian packages: {' '.join(wanted)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    # A registry that is installed must not start to serve: the scripts start their own on a port of its own.
    quiet = ["-qq", "-o", "Dpkg::Use-Pty=0", "-o", "DPkg::Lock::Timeout=300"]
    policy = pathlib.Path("/usr/sbin/policy-rc.d")
    lay_policy = not policy.exists()
    if lay_policy:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    try:
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *wanted]):
            command = ["apt-get", *quiet, *arguments]
            run = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            if run.returncode:
                sys.stdout.write(run.stdout.decode(errors="replace"))
                if arguments[0] != "update":  # stale lists may still do
                    raise Missing(f"apt-get could not install {' '.join(wanted)}; its words stand above")
    finally:
        if lay_policy:
            policy.unlink()


def python() -> str:
    """The interpreter that virtual environments are made from: the one that runs this script, outside of any virtual
    environment.
    """
    if sys.prefix == sys.base_prefix:
        return sys.executable
    return str(pathlib.Path(sys.base_prefix) / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}")


def _requirement_texts(files: Sequence[pathlib.Path]) -> Iterable[str]:
    for file in files:
        text = file.read_text()
        yield text
        yield from _requirement_texts([file.parent / name for name in re.findall(r"^-r (\S+)", text, re.MULTILINE)])


def virtual_environment(
    directory: pathlib.Path, interpreter: str, requirements: Sequence[pathlib.Path]
) -> pathlib.Path:
    """A virtual environment in ``directory`` that holds ``requirements``; made or renewed only if they changed. Returns
    its python.
    """
    version = subprocess.run([interpreter, "-VV"], stdout=subprocess.PIPE, check=True).stdout.decode()
    # The version, not the path: the same Python is found under several names, and the environment must not be made anew
    # under running tests.
    state = hashlib.sha256("\0".join([version, *_requirement_texts(requirements)]).encode()).hexdigest()
    directory.mkdir(parents=True, exist_ok=True)
    stamp, executable = directory / "requirements.sha256", directory / "bin" / "python"
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if stamp.exists() and stamp.read_text() == state and executable.exists():
            return executable
        say(f"Making a virtual environment with {version.split(' (')[0].strip()}: {directory.relative_to(ROOT)}")
        stamp.unlink(missing_ok=True)
        for old in ("bin", "lib", "lib64", "include"):
            path = directory / old
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)
        subprocess.run([interpreter, "-m", "venv", str(directory)], check=True)
        arguments = [part for file in requirements for part in ("-r", str(file))]
        pip = [str(executable), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        run = subprocess.run(
            [*pip, *arguments],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"},
            check=False,
        )
        if run.returncode:
            raise Missing(
                f"pip could not install {', '.join(str(file.relative_to(ROOT)) for file in requirements)}; its words "
                f"stand above"
            )
        stamp.write_text(state)
    return executable


def controller(requirements: str = "requirements.txt") -> pathlib.Path:
    """The virtual environment that runs Ansible (and, with the requirements of the tests, everything else). Returns its
    python.

    One environment serves both commands: one made for the tests holds all that the demonstration needs, so that is not
    undone.
    """
    demo, test = ROOT / "dev" / "requirements.txt", ROOT / "dev" / "requirements-test.txt"
    made_for_tests = VENV / "for-tests"
    if requirements == test.name:
        result = virtual_environment(VENV, python(), [test])
        made_for_tests.touch()
        return result
    return virtual_environment(VENV, python(), [test if made_for_tests.exists() else demo])


def collection_link() -> pathlib.Path:
    """A tree for ANSIBLE_COLLECTIONS_PATH in which the collection is this checkout itself, through a symbolic link."""
    link = COLLECTIONS / "ansible_collections" / NAMESPACE / NAME
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink() or os.readlink(link) != str(ROOT):
        link.unlink(missing_ok=True)
        link.symlink_to(ROOT, target_is_directory=True)
    return COLLECTIONS


def project_files() -> list[str]:
    """The files of the project, relative to its root: what git tracks and what is new, but nothing that git ignores."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return sorted(name for name in set(os.fsdecode(listing).split("\0")) if name and os.path.lexists(ROOT / name))


def collection_copy(base: pathlib.Path) -> pathlib.Path:
    """A true copy of the collection below ``base`` (ansible-test refuses symbolic links); files that are gone from the
    project go there too.

    What is there already stays untouched, for somebody may be using it.
    """
    target = base / "ansible_collections" / NAMESPACE / NAME
    target.mkdir(parents=True, exist_ok=True)
    with open(base / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _bring_up_to_date(target)
    return target


def _bring_up_to_date(target: pathlib.Path) -> None:
    files = project_files()
    wanted = set(files)
    for directory, _directories, names in os.walk(target):
        for name in names:
            path = pathlib.Path(directory, name)
            if str(path.relative_to(target)) not in wanted:
                path.unlink()
    for name in files:
        source, copy = ROOT / name, target / name
        if not _same(source, copy):
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy, follow_symlinks=False)
    for directory, directories, names in os.walk(target, topdown=False):
        if not names and not any(os.path.lexists(os.path.join(directory, name)) for name in directories):
            os.rmdir(directory)


def _same(source: pathlib.Path, copy: pathlib.Path) -> bool:
    """Whether a copy of ``source`` need not be made again, by size, mode and time."""
    try:
        there, here = copy.lstat(), source.lstat()
    except FileNotFoundError:
        return False
    return not source.is_symlink() and (there.st_size, there.st_mtime_ns, there.st_mode) == (
        here.st_size,
        here.st_mtime_ns,
        here.st_mode,
    )


@functools.cache
def interpreters(oldest: tuple[int, int] = (3, 9), newest: tuple[int, int] = (3, 14)) -> dict[tuple[int, int], str]:
    """Every Python from ``oldest`` to ``newest`` on this machine: those on the PATH and those that pyenv keeps."""
    pyenv = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    directories = [
        p
        for p in os.environ["PATH"].split(os.pathsep)
        if p and not p.endswith("/shims") and not p.startswith(str(VENV))
    ]
    directories += sorted(str(path) for path in pyenv.glob("versions/*/bin"))
    found: dict[tuple[int, int], str] = {}
    for minor in range(oldest[1], newest[1] + 1):
        for directory in directories:
            candidate = os.path.join(directory, f"python3.{minor}")
            if os.access(candidate, os.X_OK):
                # Debian may have an interpreter without the packages that make it useful; one that works is wanted.
                run = subprocess.run(
                    [candidate, "-c", "import ensurepip, venv, ssl, sqlite3"], stderr=subprocess.DEVNULL, check=False
                )
                if run.returncode == 0:
                    found[(3, minor)] = candidate
                    break
    return found


def ansible_environment() -> dict[str, str]:
    """The environment for Ansible's commands: the checkout's collection and settings, none of the user's."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment.update(
        ANSIBLE_COLLECTIONS_PATH=str(collection_link()),
        ANSIBLE_CONFIG=str(ROOT / "dev" / "ansible.cfg"),
        ANSIBLE_HOME=str(VENV / "ansible"),
        PATH=os.pathsep.join([str(VENV / "bin"), environment["PATH"]]),
        # Ansible refuses to start in another encoding; a fresh machine has none set.
        LC_ALL="C.UTF-8",
    )
    return environment
