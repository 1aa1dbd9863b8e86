# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Mounts that come back at boot: a systemd unit for each, and one small program that all of them run.

The program is a zip application made of the engine's own sources, so what measures and mounts at boot is exactly what
did so when the unit was written. It needs nothing but the Python that ran the task: no collection, no cfsctl. A unit of
type mount could not do it, because there the image would be opened by name after it was measured.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from typing import NamedTuple

from ..formats.bounds import MAX_NAME
from ..host import commands, files, mountinfo, safety
from ..host.commands import Run
from . import journal, mounting, program, unitfiles
from .journal import HOST, Places
from ..errors import MountFailed, UnsafeRepository, doing
from ..text import from_file_name

PREFIX = "composefs-oci-"
LOCAL, REMOTE = "local-fs.target", "remote-fs.target"
_PLATFORM_PYTHONS = ("/usr/bin/python3", "/usr/libexec/platform-python")
# What the program needs of an interpreter.
_TRIAL = "import sys, ctypes, zipfile; sys.exit(sys.version_info < (3, 9))"
_REMOTE_KINDS = frozenset(
    (
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "ceph",
        "9p",
        "virtiofs",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "lustre",
        "ocfs2",
        "gfs2",
    )
)


class Persistent(NamedTuple):
    """What a unit mounts: the image (hex) of the repository, at the path."""

    unit: str
    path: str
    repository: str
    image_id: str


def unit_name(path: str) -> str:
    """The unit for ``path`` (absolute), escaped as by ``systemd-escape --path``. MountFailed if that is too long for a
    file name.
    """
    path = os.path.normpath(path)
    name = PREFIX + ("-" if path == "/" else journal.escape(path.strip("/"))) + ".service"
    if len(name) > MAX_NAME:
        raise MountFailed(
            f"The path {path} is too long for the name of a unit of systemd.",
            "Choose a shorter path, or set 'persistent' to false.",
        )
    return name


def unit_text(target: mounting.Target, repository: str, places: Places = HOST, interpreter: str = "") -> str:
    """The unit that mounts at boot what the journal of ``target.path`` calls current. MountFailed for paths that no
    unit can hold.

    It does not name the image, so it stays as it is from version to version, and the journal alone decides.
    """
    interpreter = interpreter or interpreter_to_run()
    directories = [target.upperdir, target.workdir]
    needs = [repository, os.path.dirname(target.path), places.library, os.path.dirname(interpreter), *directories]
    for path in (*needs, target.path):
        # What is text in UTF-8 need not be text in the locale of this process.
        if path and not from_file_name(path).isprintable():
            raise MountFailed(
                f"A unit of systemd cannot hold {from_file_name(path)!r}.",
                "Choose names of printable characters, or set 'persistent' to false.",
            )
    when = REMOTE if any(is_remote(path) for path in needs if path) else LOCAL
    program = [interpreter, "-I", places.application]
    return f"""\
# Written by composefs.oci.composefs_mount, which replaces changes made here.
[Unit]
Description=Composefs image at {unitfiles.specifiers(target.path)}
DefaultDependencies=no
RequiresMountsFor={" ".join(unitfiles.quoted(path) for path in dict.fromkeys(needs) if path)}
After=systemd-remount-fs.service systemd-tmpfiles-setup-dev.service
Before={when} umount.target
Conflicts=umount.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={unitfiles.command_line([*program, "boot", *places.words, "--", target.path])}
ExecStop={unitfiles.command_line([*program, "unmount", "--", target.path])}
TimeoutSec=120

[Install]
WantedBy={when}

[X-Composefs]
Path={target.path}
Repository={repository}
"""


def interpreter_to_run(run: Run = commands.run) -> str:
    """The Python that units and timers run: that of this task, or where that is one of a virtual environment, or can be
    changed by others, the platform's own. MountFailed if none is fit to be run by root at every boot.
    """
    own = os.path.abspath(sys.executable or "/")
    virtual = sys.prefix != sys.base_prefix
    reason = "it is one of a virtual environment" if virtual else safety.fault(own)
    if not reason:
        return own
    for other in _PLATFORM_PYTHONS:
        if os.path.exists(other) and not safety.fault(other) and not run([other, "-I", "-c", _TRIAL])[0]:
            return other
    fault = safety.fault(own)
    if fault:
        raise MountFailed(
            f"The Python of this task, {own}, is not safe to be run by root at boot: {fault}.",
            "Install the platform's own Python, 3.9 or later, or set ansible_python_interpreter to one that only root "
            "can change.",
        )
    return own


def require_safe(repository: str, places: Places = HOST) -> None:
    """Raise UnsafeRepository or MountFailed unless only root can change what is mounted at boot, and the program that
    does it.
    """
    fault = safety.fault(repository)
    if fault:
        raise UnsafeRepository(
            f"What lies in {repository} cannot be mounted at every boot: {fault}.",
            "Have every directory on the way belong to root and be writable for nobody else.",
        )
    fault = safety.fault(places.application)
    if fault:
        raise MountFailed(
            f"The program {places.application}, which root runs at boot, could be changed by others: {fault}.",
            "Have every directory on the way belong to root and be writable for nobody else.",
        )


def current(path: str, places: Places = HOST) -> str | None:
    """The text of the unit for ``path``, None if there is none."""
    return unitfiles.read_text(f"{places.units}/{unit_name(path)}")


def persistent(places: Places = HOST) -> list[Persistent]:
    """What is brought back at boot. Whoever collects garbage must keep these images, or the next boot lacks them.

    Units of 0.1.0 name the image; for others the journal does. IncompatibleJournal if that cannot be read.
    """
    found = []
    for name in _units(places):
        values = _values(unitfiles.read_text(f"{places.units}/{name}") or "")
        if "Path" not in values or "Repository" not in values:
            continue
        image_id = values.get("Image")
        if image_id is None:
            there = journal.read(values["Path"], places, any_version=True)
            image_id = there.current.image_id if there and there.current else None
        if image_id is not None:
            found.append(Persistent(name, values["Path"], values["Repository"], image_id))
    return found


def units(places: Places = HOST) -> dict[str, str]:
    """Every unit of this collection by the path that it mounts at."""
    found = {}
    for name in _units(places):
        path = _values(unitfiles.read_text(f"{places.units}/{name}") or "").get("Path")
        if path is not None:
            found[path] = name
    return found


def state_of(name: str, run: Run, places: Places = HOST) -> str | None:
    """What systemd says of a unit (``active``, ``failed``, ...), None where it is not in charge."""
    if not os.path.exists(places.running):
        return None
    _status, output, _errors = run(["systemctl", "--no-ask-password", "is-active", name])
    return output.strip() or "unknown"


def _values(text: str) -> dict[str, str]:
    own = text.partition("[X-Composefs]")[2]
    return dict(re.findall("^(Path|Repository|Image)=(.*)$", own, re.MULTILINE))


def ensure(target: mounting.Target, repository: str, run: Run, check: bool = False, places: Places = HOST) -> bool:
    """Write and enable the unit for ``target``; whether anything had to be changed, or with ``check`` has to be.

    MountFailed on a host without systemd. Where systemd runs it is told; elsewhere (an image being built, a container)
    files are enough.
    """
    name = unit_name(target.path)
    require_systemd(places)
    text = unit_text(target, repository, places)
    wanted = REMOTE if f"WantedBy={REMOTE}\n" in text else LOCAL
    contents = {places.application: application(), f"{places.units}/{name}": os.fsencode(text)}
    stale = {path: content for path, content in contents.items() if unitfiles.read_bytes(path) != content}
    links = _links(name, places)
    wrong = [link for when, link in links.items() if os.path.lexists(link) != (when == wanted)]
    if check or not (stale or wrong):
        return bool(stale or wrong)
    with doing(f"Writing the unit {name}"):
        for path, content in stale.items():
            unitfiles.write(path, content)
        for link in wrong:
            if os.path.lexists(link):
                os.unlink(link)
            else:
                unitfiles.make_directories(os.path.dirname(link))
                os.symlink(f"{places.units}/{name}", link)
        with files.opened_directory(os.path.dirname(links[wanted])) as fd:
            files.sync_directory(fd)
    if unitfiles.tell(run, ["daemon-reload"], places):
        # The mount is there already, so this does nothing but let systemd know; nobody needs to wait for it.
        unitfiles.tell(run, ["start", "--no-block", name], places, strict=False)
    return True


def require_systemd(places: Places = HOST) -> None:
    """MountFailed on a host without systemd."""
    if not any(map(os.path.exists, (places.running, "/usr/lib/systemd/systemd", "/lib/systemd/systemd"))):
        raise MountFailed(
            "This host has no systemd, so no mount can be brought back at boot.", "Set 'persistent' to false."
        )


def install(places: Places = HOST) -> None:
    """Have the program in its place, for a unit or a timer. Raises ReadOnly, NoSpace and PermissionDenied."""
    with doing(f"Writing {places.application}"):
        content = application()
        if unitfiles.read_bytes(places.application) != content:
            unitfiles.write(places.application, content)


def tidy(places: Places = HOST, path: str = "") -> None:
    """Remove the program once neither a unit nor a journal is left. Locks count, too, except the caller's own at
    ``path``: another task may be about to need it.
    """
    own = f"{journal.stem(path)}.json" if path else ""
    try:
        others = [name for name in os.listdir(places.journals) if not own or not name.startswith(own)]
    except OSError:
        others = []
    if not _units(places) and not others:
        with contextlib.suppress(OSError):
            os.unlink(places.application)
        with contextlib.suppress(OSError):
            os.rmdir(places.library)


def remove(path: str, run: Run, check: bool = False, stop: bool = False, places: Places = HOST) -> bool:
    """Remove the unit for ``path``, and the program with the last unit and journal; whether there was one. ``stop``:
    what it mounted is unmounted.
    """
    name = unit_name(path)
    links = [link for link in _links(name, places).values() if os.path.lexists(link)]
    files = [file for file in (f"{places.units}/{name}",) if os.path.lexists(file)]
    if check or not (links or files):
        return bool(links or files)
    if stop:
        unitfiles.tell(run, ["stop", name], places, strict=False)
    with doing(f"Removing the unit {name}"):
        for file in (*links, *files):
            os.unlink(file)
        for link in links:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(link))
    tidy(places)
    unitfiles.tell(run, ["daemon-reload"], places)
    return True


def application() -> bytes:
    """The program that the units run."""
    from . import bootmountmain  # late: only persistent mounts need the sources

    return program.made(bootmountmain.__name__)


def is_remote(path: str) -> bool:
    """Whether ``path`` lies on a file system that waits for the network: by its type, or by ``_netdev`` in fstab(5)."""
    real = os.path.realpath(path)
    around = [mounted for mounted in mountinfo.mounts() if os.path.commonpath([mounted.path, real]) == mounted.path]
    # Of the mounts on the way the deepest counts, and at one place the last.
    covering = max(enumerate(around), key=lambda item: (len(item[1].path), item[0]), default=None)
    if covering is None:
        return False
    if covering[1].kind in _REMOTE_KINDS:
        return True
    for line in (unitfiles.read_text("/etc/fstab") or "").splitlines():
        fields = line.split()
        if (
            len(fields) > 3
            and not fields[0].startswith("#")
            and fields[1] == covering[1].path
            and "_netdev" in fields[3].split(",")
        ):
            return True
    return False


def _links(name: str, places: Places) -> dict[str, str]:
    """The links by which the unit is enabled, by the target that wants it."""
    return {when: f"{places.units}/{when}.wants/{name}" for when in (LOCAL, REMOTE)}


def _units(places: Places) -> list[str]:
    try:
        return sorted(
            name for name in os.listdir(places.units) if name.startswith(PREFIX) and name.endswith(".service")
        )
    except FileNotFoundError:
        return []
