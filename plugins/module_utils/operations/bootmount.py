# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Mounts that come back at boot: a systemd unit for each, and one small program that all of them run.

The program is a zip application made of the engine's own sources, so what measures and mounts at boot is exactly what
did so when the unit was written. It needs nothing but the Python that ran the task: no collection, no cfsctl. A unit of
type mount could not do it, because there the image would be opened by name after it was measured.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..host import files, mountinfo
from . import mounting
from ..errors import FormatError, IOFailed, MountFailed, doing

PREFIX = "composefs-oci-"
LOCAL, REMOTE = "local-fs.target", "remote-fs.target"
NAME_MAX = 255
_PACKAGE = "composefs_oci"
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

# Runs a command, given as a list of words, and returns its exit status, output and error output.
Run = Callable[[list[str]], tuple[int, str, str]]


class Places(NamedTuple):
    """Where things lie on the host. ``running`` exists where systemd is in charge."""

    units: str = "/etc/systemd/system"
    library: str = "/var/lib/composefs-oci"
    running: str = "/run/systemd/system"

    @property
    def application(self) -> str:
        return f"{self.library}/mount.pyz"


class Persistent(NamedTuple):
    """What a unit mounts: the image (hex) of the repository, at the path."""

    unit: str
    path: str
    repository: str
    image_id: str


HOST = Places()


def unit_name(path: str) -> str:
    """The unit for ``path`` (absolute), escaped as by ``systemd-escape --path``. MountFailed if that is too long for a
    file name.
    """
    path = os.path.normpath(path)
    name = PREFIX + ("-" if path == "/" else _escape(path.strip("/"))) + ".service"
    if len(name) > NAME_MAX:
        raise MountFailed(
            f"The path {path} is too long for the name of a unit of systemd.",
            "Choose a shorter path, or set 'persistent' to false.",
        )
    return name


def unit_text(target: mounting.Target, repository: str, places: Places = HOST, interpreter: str = "") -> str:
    """The unit that mounts ``target`` from the repository at boot. MountFailed for paths that no unit can hold."""
    interpreter = interpreter or sys.executable
    directories = [target.upperdir, target.workdir]
    needs = [repository, os.path.dirname(target.path), places.library, os.path.dirname(interpreter), *directories]
    for text in (*needs, target.path, *target.options):
        if text and not text.isprintable():
            raise MountFailed(
                f"A unit of systemd cannot hold {text!r}.",
                "Choose names of printable characters, or set 'persistent' to false.",
            )
    when = REMOTE if any(is_remote(path) for path in needs if path) else LOCAL
    # What was decided once is kept: a repository that loses its protection later must not be mounted without.
    words = [
        "mount",
        "--repository",
        repository,
        "--image",
        target.image_id,
        "--verity",
        mounting.REQUIRED if target.verity else mounting.DISABLED,
    ]
    for option, value in (
        ("--upperdir", target.upperdir),
        ("--workdir", target.workdir),
        *(("--option", option) for option in target.options),
    ):
        words += [option, value] if value else []
    words += [f"--{name[2:]}" for name in mounting.HARDENING if name not in target.options]
    program = [interpreter, "-I", places.application]
    return f"""\
# Written by composefs.oci.composefs_mount, which replaces changes made here.
[Unit]
Description=Composefs image at {_specifiers(target.path)}
DefaultDependencies=no
RequiresMountsFor={" ".join(_quoted(path) for path in dict.fromkeys(needs) if path)}
After=systemd-remount-fs.service systemd-tmpfiles-setup-dev.service
Before={when} umount.target
Conflicts=umount.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={_command([*program, *words, "--", target.path])}
ExecStop={_command([*program, "unmount", "--", target.path])}
TimeoutSec=120

[Install]
WantedBy={when}

[X-Composefs]
Path={target.path}
Repository={repository}
Image={target.image_id}
"""


def current(path: str, places: Places = HOST) -> str | None:
    """The text of the unit for ``path``, None if there is none."""
    return _text(f"{places.units}/{unit_name(path)}")


def persistent(places: Places = HOST) -> list[Persistent]:
    """What is brought back at boot. Whoever collects garbage must keep these images, or the next boot lacks them."""
    found = []
    for name in _units(places):
        values = dict(
            re.findall(
                "^(Path|Repository|Image)=(.*)$",
                (_text(f"{places.units}/{name}") or "").partition("[X-Composefs]")[2],
                re.MULTILINE,
            )
        )
        if len(values) == 3:
            found.append(Persistent(name, values["Path"], values["Repository"], values["Image"]))
    return found


def ensure(target: mounting.Target, repository: str, run: Run, check: bool = False, places: Places = HOST) -> bool:
    """Write and enable the unit for ``target``; whether anything had to be changed, or with ``check`` has to be.

    MountFailed on a host without systemd. Where systemd runs it is told; elsewhere (an image being built, a container)
    files are enough.
    """
    name = unit_name(target.path)
    if not any(map(os.path.exists, (places.running, "/usr/lib/systemd/systemd", "/lib/systemd/systemd"))):
        raise MountFailed(
            "This host has no systemd, so no mount can be brought back at boot.", "Set 'persistent' to false."
        )
    text = unit_text(target, repository, places)
    wanted = REMOTE if f"WantedBy={REMOTE}\n" in text else LOCAL
    contents = {places.application: application(), f"{places.units}/{name}": os.fsencode(text)}
    stale = {path: content for path, content in contents.items() if _bytes(path) != content}
    links = _links(name, places)
    wrong = [link for when, link in links.items() if os.path.lexists(link) != (when == wanted)]
    if check or not (stale or wrong):
        return bool(stale or wrong)
    with doing(f"Writing the unit {name}"):
        for path, content in stale.items():
            _write(path, content)
        for link in wrong:
            if os.path.lexists(link):
                os.unlink(link)
            else:
                os.makedirs(os.path.dirname(link), exist_ok=True)
                os.symlink(f"{places.units}/{name}", link)
        with files.opened_directory(os.path.dirname(links[wanted])) as fd:
            files.sync_directory(fd)
    if _tell(run, ["daemon-reload"], places):
        # The mount is there already, so this does nothing but let systemd know; nobody needs to wait for it.
        _tell(run, ["start", "--no-block", name], places, strict=False)
    return True


def remove(path: str, run: Run, check: bool = False, stop: bool = False, places: Places = HOST) -> bool:
    """Remove the unit for ``path``, and with the last unit the program; whether there was one. ``stop``: what it
    mounted is unmounted.
    """
    name = unit_name(path)
    links = [link for link in _links(name, places).values() if os.path.lexists(link)]
    files = [file for file in (f"{places.units}/{name}",) if os.path.lexists(file)]
    if check or not (links or files):
        return bool(links or files)
    if stop:
        _tell(run, ["stop", name], places, strict=False)
    with doing(f"Removing the unit {name}"):
        for file in (*links, *files):
            os.unlink(file)
        for link in links:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(link))
        if not _units(places):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(places.application)
            with contextlib.suppress(OSError):
                os.rmdir(places.library)
    _tell(run, ["daemon-reload"], places)
    return True


def application() -> bytes:
    """The program that the units run: a zip application, the same bytes for the same sources."""
    from .. import errors
    from . import bootmountmain  # late: only persistent mounts need the sources

    head = "".join(line for line in _source(errors.__name__).splitlines(keepends=True)[:3])
    root = errors.__name__.rpartition(".")[0]
    sources = _reached(bootmountmain.__name__, root)
    files = {f"{_PACKAGE}/{name.replace('.', '/')}.py": text for name, text in sources.items()}
    wings = {name.rpartition(".")[0] for name in sources}
    files.update({f"{_PACKAGE}/{wing}/__init__.py" if wing else f"{_PACKAGE}/__init__.py": head for wing in wings})
    main = bootmountmain.__name__[len(root) + 1 :]
    files["__main__.py"] = f"{head}\nimport sys\n\nfrom {_PACKAGE}.{main} import main\n\nsys.exit(main(sys.argv[1:]))\n"
    out = io.BytesIO()
    # Stored, not compressed: versions of zlib differ in what they write.
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1 January 1980
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name].encode())
    return out.getvalue()


def _reached(start: str, root: str) -> dict[str, str]:
    """The sources that importing the engine module ``start`` loads, by dotted name below ``root``.

    What a function imports late is not among them: the program must not need it.
    """
    found: dict[str, str] = {}
    left = [start]
    while left:
        name = left.pop()
        if name[len(root) + 1 :] in found:
            continue
        text = found[name[len(root) + 1 :]] = _source(name)
        package = name.split(".")[:-1]
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                modules = [f"{base}.{alias.name}" for alias in node.names]
                left += [module for module in (base, *modules) if _is_module(module)]
    return found


def _is_module(name: str) -> bool:
    """Whether ``name``, which is loaded if it is a module at all, is a module with a source of its own and not a
    package.
    """
    module = sys.modules.get(name)
    return module is not None and not hasattr(module, "__path__")


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
    for line in (_text("/etc/fstab") or "").splitlines():
        fields = line.split()
        if (
            len(fields) > 3
            and not fields[0].startswith("#")
            and fields[1] == covering[1].path
            and "_netdev" in fields[3].split(",")
        ):
            return True
    return False


def _escape(text: str) -> str:
    escaped = "".join(
        chr(byte) if chr(byte) in _PLAIN else "-" if byte == 0x2F else f"\\x{byte:02x}" for byte in os.fsencode(text)
    )
    return f"\\x2e{escaped[1:]}" if escaped.startswith(".") else escaped


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.")


def _specifiers(text: str) -> str:
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    escaped = _specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def _command(words: Sequence[str]) -> str:
    return " ".join(_quoted(word).replace("$", "$$") for word in words)


def _source(name: str) -> str:
    """The source of a loaded engine module, from wherever it was imported: a file, or the zip in which a task's code
    travels.
    """
    spec = sys.modules[name].__spec__
    loader: Any = spec.loader if spec else None
    text = loader.get_source(name) if loader is not None and hasattr(loader, "get_source") else None
    if not isinstance(text, str):
        raise IOFailed(f"The source of {name} cannot be found.", "Report this as a bug.")
    return text


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


def _bytes(path: str) -> bytes | None:
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _text(path: str) -> str | None:
    with doing(f"Reading {path}"):
        content = _bytes(path)
    if content is None:
        return None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text.", "Remove it.") from error
    # Like the paths that it is held against; in a locale without UTF-8 that is another str than decode() gives.
    return os.fsdecode(content)


def _write(path: str, content: bytes) -> None:
    """Replace a file in one step and durably: a boot must find the old one or the new one, whole."""
    directory = os.path.dirname(path)
    os.makedirs(directory, mode=0o755, exist_ok=True)
    with files.opened_directory(directory) as fd:
        files.write_whole(fd, os.path.basename(path), content)


def _tell(run: Run, words: list[str], places: Places, strict: bool = True) -> bool:
    """Tell systemd, if it is in charge; whether it is. IOFailed if it refuses and ``strict``."""
    if not os.path.exists(places.running):
        return False
    status, _output, errors = run(["systemctl", "--no-ask-password", *words])
    if status and strict:
        raise IOFailed(f"systemctl {' '.join(words)} failed: {errors.strip()}.", "Look at the journal of the host.")
    return True
