# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What namespace hosts and guests share: where things lie, the key to log in with, and running programs.

Everything lies in the project's cache (`aptroot.cache_directory`, ``.cache`` of the checkout): ``hosts/`` holds root
trees, disks and the key, which are made once, and ``hosts/run/NAME`` what belongs to one running host.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

from aptroot import Unavailable, cache_directory, locked, mirror

__all__ = ["Unavailable", "locked", "mirror"]

SSH_OPTIONS = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
    *("-o", "ConnectTimeout=30", "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes"),
)
SSHD_CONFIG = "PermitRootLogin prohibit-password\nUsePAM no\nUseDNS no\nMaxStartups 100\nMaxSessions 100\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def state() -> pathlib.Path:
    """``hosts/`` of the cache."""
    path = cache_directory() / "hosts"
    path.mkdir(exist_ok=True)
    return path


def running(name: str = "") -> pathlib.Path:
    """``hosts/run/NAME``, or the directory above."""
    path = state() / "run" / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def need(*programs: str, why: str) -> None:
    """`Unavailable` with the names of the ``programs`` that are missing."""
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        raise Unavailable(f"{why} needs {', '.join(missing)}, not found on the PATH")


def run(*command: str | os.PathLike[str], **options: object) -> str:
    """Run a command to its end; its output. RuntimeError with the last words if it fails."""
    words = [os.fspath(word) for word in command]
    settings: dict[str, Any] = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        **options,
    }
    done = subprocess.run(words, check=False, **settings)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[:8])}: exit code {done.returncode}: {done.stdout[-1500:].strip()}")
    return str(done.stdout)


def key() -> pathlib.Path:
    """The private key that every host accepts; made for this checkout and good for nothing else."""
    path = state() / "key"
    need("ssh", "ssh-keygen", why="logging in to test hosts")
    with locked(state()):
        if not path.exists():
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test hosts", "-f", path)
    return path


def allow_login(root: pathlib.Path) -> None:
    """Let the key in as root below ``root``."""
    directory = root / "root/.ssh"
    directory.mkdir(mode=0o700, exist_ok=True)
    shutil.copyfile(f"{key()}.pub", directory / "authorized_keys")
    (root / "etc/ssh/sshd_config.d/tests.conf").write_text(SSHD_CONFIG)


def ssh_command(address: str, port: int, *command: str) -> list[str]:
    return ["ssh", *SSH_OPTIONS, "-i", str(key()), "-p", str(port), f"root@{address}", *command]


def answers(address: str, port: int, seconds: float) -> bool:
    """Whether an ssh server greets within ``seconds``. (A forwarded port accepts connections long before.)"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((address, port), 1) as connection:
            connection.settimeout(20)
            if connection.recv(4) == b"SSH-":
                return True
        time.sleep(0.05)
    return False


def process_of(directory: pathlib.Path) -> int | None:
    """The process whose number and start time stand in ``directory``/pid, if it still lives. A number alone may belong
    to somebody else by now.
    """
    with contextlib.suppress(OSError, ValueError):
        pid, started = (directory / "pid").read_text().split()
        return int(pid) if started_at(int(pid)) == started else None
    return None


def started_at(pid: int) -> str:
    """The start time of a process in clock ticks since boot; "" if there is no such process (or it is dead and not
    reaped). The first thread may be dead while others still end, and with them the process holds its files and locks.
    """
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] in "ZX" and len(os.listdir(f"/proc/{pid}/task")) < 2:
            return ""
        return fields[19]
    return ""


def remember_process(directory: pathlib.Path, pid: int) -> None:
    (directory / "pid").write_text(f"{pid} {started_at(pid)}\n")


def end_process(directory: pathlib.Path, sign: int = signal.SIGKILL) -> None:
    """End the process of `process_of` and wait until it is gone."""
    pid = process_of(directory)
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, sign)
        end = time.monotonic() + 10
        while process_of(directory) is not None:
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.01)
    (directory / "pid").unlink(missing_ok=True)


@contextlib.contextmanager
def making(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new name beside ``target``, which becomes ``target`` if all goes well: what is cached is whole."""
    temporary = target.with_name(f".new-{target.name}")
    remove(temporary)
    yield temporary
    os.rename(temporary, target)


def remove(path: pathlib.Path) -> None:
    """Remove a file or a tree, but nothing that is mounted in it."""
    if path.is_dir() and not path.is_symlink():
        run("rm", "-rf", "--one-file-system", path)
    else:
        path.unlink(missing_ok=True)


def filesystem(path: pathlib.Path) -> str:
    """The type of the file system of ``path``, as stat(1) names it."""
    return run("stat", "-f", "-c", "%T", path).strip()


def quoted_tail(path: pathlib.Path, lines: int = 8) -> str:
    with contextlib.suppress(OSError):
        return " / ".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""


def words_of(value: Sequence[str] | str) -> list[str]:
    return value.split() if isinstance(value, str) else list(value)
