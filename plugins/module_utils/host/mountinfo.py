# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What is mounted in this mount namespace, as the kernel lists it (proc_pid_mountinfo(5)).

A composefs mount is an overlay whose source is ``composefs:`` and the image's fs-verity digest in hex; everything else
is a foreign mount.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import from_os_error

SOURCE = "composefs:"
_PATH = "/proc/self/mountinfo"
_IMAGE = re.compile(f"{SOURCE}([0-9a-f]{{64}}(?:[0-9a-f]{{64}})?)")
_OCTAL = re.compile(rb"\\([0-7]{3})")
# A security context in quotes may contain commas.
_SETTING = re.compile(r'(?:[^,"]|"[^"]*")+')


class Mounted(NamedTuple):
    """One mount: where, what kind of file system from which source, the options of the mount and the settings of its
    file system.
    """

    mount_id: int
    parent_id: int
    path: str
    kind: str
    source: str
    options: frozenset[str]
    settings: dict[str, str]

    @property
    def image_id(self) -> str | None:
        """The image (hex) if this is a composefs mount, else None."""
        match = _IMAGE.fullmatch(self.source) if self.kind == "overlay" else None
        return match[1] if match else None

    @property
    def verity(self) -> bool:
        """Whether the overlay insists on fs-verity for every object."""
        return self.settings.get("verity") == "require"

    @property
    def read_only(self) -> bool:
        """Whether the mount, or the file system in it, cannot be written."""
        return "ro" in self.options or "ro" in self.settings

    def directory(self, setting: str) -> str | None:
        """The path in ``upperdir`` or ``workdir``, None if the mount has none. The overlay shows it as it got it, with
        backslashes doubled.
        """
        value = self.settings.get(setting)
        return None if value is None else value.replace("\\\\", "\\")


def parse(line: str) -> Mounted:
    """One line of mountinfo. Spaces, tabs, line feeds and backslashes (and, within settings, commas) stand there as
    octal escapes.
    """
    before, _separator, after = line.partition(" - ")
    number, parent, _device, _root, path, options = before.split(" ")[:6]
    kind, source, settings = (*after.split(" "), "", "")[:3]
    pairs = (setting.partition("=") for setting in _SETTING.findall(settings))
    values = {key: _plain(value[1:-1] if value[:1] == '"' == value[-1:] else value) for key, _sign, value in pairs}
    return Mounted(int(number), int(parent), _plain(path), kind, _plain(source), frozenset(options.split(",")), values)


def mounts() -> list[Mounted]:
    """All mounts that this process can see, in the order of the kernel: parents before children, lower before upper."""
    try:
        # Decoded as Python decodes every other file name, so that paths can be compared.
        with open(_PATH, encoding=sys.getfilesystemencoding(), errors="surrogateescape") as file:
            return [parse(line) for line in file.read().split("\n") if line]
    except OSError as error:
        raise from_os_error(error, "Listing what is mounted") from error


def composefs_mounts() -> list[Mounted]:
    """All composefs mounts, whoever made them; what their images need is in use."""
    return [mounted for mounted in mounts() if mounted.image_id is not None]


def everywhere() -> list[tuple[str, str]]:
    """The mounts of every mount namespace that this process can see: where, and the kernel's whole line about it.

    Namespaces in which no process lives cannot be seen, nor those of other users' processes without the right to.
    """
    seen = set()
    found = []
    for pid in ["self", *(name for name in os.listdir("/proc") if name.isdigit())]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in seen:
                continue
            with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
                lines = [line for line in file.read().split("\n") if line]
        except OSError:
            continue  # it ended, or may not be looked at
        seen.add(namespace)
        found += [(_plain(line.split(" ")[4]), line) for line in lines]
    return found


def showing(images: Iterable[str]) -> list[str]:
    """The paths at which one of the images (ids in hex) is mounted, sorted."""
    wanted = set(images)
    return sorted({mounted.path for mounted in composefs_mounts() if mounted.image_id in wanted})


def at(path: str) -> Mounted | None:
    """The mount that ``path`` shows, None if it is no mount point or does not exist.

    The kernel is asked which mount the path leads to, because the list alone does not tell what is hidden below other
    mounts.
    """
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, f"Looking at {path}") from error
    try:
        number = mount_id(fd)
    finally:
        os.close(fd)
    target = os.path.realpath(path)
    return next((mounted for mounted in mounts() if mounted.mount_id == number and mounted.path == target), None)


def mount_id(fd: int) -> int:
    """The number of the mount that the open file lies on, as ``Mounted.mount_id``."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
            return next(int(line.split()[1]) for line in info if line.startswith("mnt_id:"))
    except OSError as error:
        raise from_os_error(error, "Asking which mount a file lies on") from error


def hidden_at(path: str) -> list[Mounted]:
    """Composefs mounts at ``path`` that cannot be seen because something else is mounted over them."""
    target = os.path.realpath(path)
    visible = at(path)
    return [
        mounted
        for mounted in composefs_mounts()
        if mounted.path == target and (visible is None or mounted.mount_id != visible.mount_id)
    ]


def children(of: Mounted, among: Iterable[Mounted] | None = None) -> list[Mounted]:
    """The mounts whose mount points lie directly within ``of``."""
    return [mounted for mounted in (mounts() if among is None else among) if mounted.parent_id == of.mount_id]


def _plain(text: str) -> str:
    if "\\" not in text:
        return text
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), os.fsencode(text)))
