# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Namespace hosts: a process tree with a root file system, a host name, process numbers and an sshd of its own, in a
fraction of a second.

Kernel, processors and (unless ``isolated``) the network are the machine's: 127.0.0.1 is the machine's loopback, so a
registry there is everybody's. There is no systemd. /var/lib, /srv and /home are real directories, for a repository must
not lie on overlayfs.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
from typing import Any

import ground
import ports
import roots
from ground import Unavailable

UNSHARE = ("unshare", "--mount", "--uts", "--pid", "--ipc", "--fork", "--kill-child=KILL")


@functools.cache
def check() -> None:
    """`Unavailable`, with the reason, where namespace hosts cannot be had."""
    if os.geteuid() != 0:
        raise Unavailable("namespace hosts need root")
    ground.need("unshare", "mount", "pivot_root", "setsid", "ip", why="a namespace host")
    probe = subprocess.run(
        [*UNSHARE, "true"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if probe.returncode:
        raise Unavailable(f"this machine does not let namespaces be made: {probe.stdout.strip()}")
    where = ground.state()
    if ground.filesystem(where) in ("overlayfs", "nfs", "tmpfs"):
        raise Unavailable(
            f"{where} is on {ground.filesystem(where)}, where host file systems cannot lie; set COMPOSEFS_OCI_CACHE "
            f"to a directory on a disk"
        )


def _address(name: str) -> str:
    """An address of the loopback network that no other host of this checkout has."""
    file = ground.running(name) / "address"
    with ground.locked(ground.running()):
        if not file.exists():
            taken = {other.read_text().strip() for other in ground.running().glob("*/address")}
            file.write_text(
                next(address for address in (f"127.0.1.{number}" for number in range(1, 255)) if address not in taken)
                + "\n"
            )
    return file.read_text().strip()


def _isolate(name: str) -> tuple[str, str]:
    """A network namespace that reaches nothing but this machine's end of its cable: its name, and the address of the
    host in it.
    """
    # Names and addresses are the machine's, so another checkout may have taken them.
    for number in range(1, 255):
        outer, space, address = f"cmpfs{number}", f"cmpfs-{number}", f"10.213.{number}.2"
        made = subprocess.run(
            ["ip", "netns", "add", space],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode == 0:
            break
        if "File exists" not in made.stdout:
            raise Unavailable(f"a host without network cannot be made here: {made.stdout.strip()}")
    else:
        raise Unavailable(
            "a host without network cannot be made here: all names for such networks are taken (ip netns list)"
        )
    (ground.running(name) / "network").write_text(str(number))
    ground.run("ip", "link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", space)
    ground.run("ip", "address", "add", f"10.213.{number}.1/30", "dev", outer)
    ground.run("ip", "link", "set", outer, "up")
    for words in (
        ["address", "add", f"{address}/30", "dev", "eth0"],
        ["link", "set", "eth0", "up"],
        ["link", "set", "lo", "up"],
    ):
        ground.run("ip", "-n", space, *words)
    return space, address


def _connect(name: str) -> None:
    """Undo `_isolate`."""
    file = ground.running(name) / "network"
    if file.exists():
        for words in (["link", "delete", f"cmpfs{file.read_text()}"], ["netns", "delete", f"cmpfs-{file.read_text()}"]):
            subprocess.run(["ip", *words], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
        file.unlink()


def python_directories(interpreter: str) -> list[str]:
    """What a host needs of a Python of this machine to run it too: its virtual environment, and what that was made
    from.
    """
    places = ground.run(interpreter, "-c", "import sys; print(sys.prefix); print(sys.base_prefix)").split()
    if "/usr" in places:
        raise Unavailable(f"{interpreter} is part of this machine's own system and cannot be lent to a host")
    return list(dict.fromkeys(places))


def start(name: str, suite: str, flavour: str = "ready", isolated: bool = False, python: str = "") -> dict[str, Any]:
    """Start a host with an empty disk, or one with the disk that it was stopped or crashed with; how to reach it.

    ``python`` is an interpreter of this machine that the host gets, at the same path, beside its own.
    """
    check()
    tree = roots.tree(suite, flavour)
    packages = str(roots.archive(suite)) if flavour == "bare" else "-"
    lent = python_directories(python) if python else []
    directory = ground.running(name)
    end(name)
    for part in ("upper", "work", "root"):
        (directory / part).mkdir(exist_ok=True)
    address, prefix = _address(name), []
    if isolated:
        try:
            space, address = _isolate(name)
        except RuntimeError as problem:
            raise Unavailable(f"a host without network cannot be made here: {problem}") from None
        prefix = ["ip", "netns", "exec", space]
    port_file = directory / "port"
    # A host that comes back is found where it was.
    port = int(port_file.read_text()) if port_file.exists() else (22 if isolated else ports.free_port(address))
    port_file.write_text(str(port))
    (directory / "how").write_text(json.dumps([suite, flavour, isolated, python]))
    inside = ground.HERE / "inside"
    command = [
        *prefix,
        *UNSHARE,
        "bash",
        str(inside / "namespace-init"),
        name,
        str(directory),
        str(tree),
        packages,
        address,
        str(port),
        str(inside),
        *lent,
    ]
    with open(directory / "log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    ground.remember_process(directory, process.pid)
    if not ground.answers(address, port, 20):
        end(name)
        raise RuntimeError(f"{name} did not start: {ground.quoted_tail(directory / 'log')}")
    return {"instance": name, "address": address, "port": port, "user": "root", "identity_file": str(ground.key())}


def again(name: str) -> dict[str, Any]:
    """Start a host that was ended, with all its files."""
    return start(name, *json.loads((ground.running(name) / "how").read_text()))


def end(name: str) -> None:
    """End every process of a host at once, as when the power of a container's machine goes; its files stay."""
    ground.end_process(ground.running(name))
    _connect(name)


def remove(name: str) -> None:
    """End a host and remove its files."""
    end(name)
    ground.remove(ground.running(name))


def directory_of(name: str) -> pathlib.Path:
    """The real directory behind /var/lib, /srv and /home of a host."""
    return ground.running(name) / "real"
