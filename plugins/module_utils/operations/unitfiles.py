# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Files of systemd: how words are written in them, how they are replaced, and how systemd is told."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from ..errors import FormatError, IOFailed, doing
from ..host import files
from ..host.commands import Run
from .journal import Places


def specifiers(text: str) -> str:
    """``text`` with every ``%`` doubled, since systemd would replace it otherwise."""
    return text.replace("%", "%%")


def quoted(text: str) -> str:
    """One word, as units write it."""
    escaped = specifiers(text).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def command_line(words: Sequence[str]) -> str:
    """The words of a command, as ``ExecStart=`` takes them."""
    return " ".join(quoted(word).replace("$", "$$") for word in words)


def read_bytes(path: str) -> bytes | None:
    """What is in a file, None if there is none."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_text(path: str) -> str | None:
    """The same as a text, spelled as paths are. FormatError if it is not UTF-8; EngineError if it cannot be read."""
    with doing(f"Reading {path}"):
        content = read_bytes(path)
    if content is None:
        return None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not a text.", "Remove it.") from error
    # Decoded like the paths that it is compared with; in a locale without UTF-8 that is another str than decode()
    # gives.
    return os.fsdecode(content)


def make_directories(path: str) -> None:
    """Make the directory ``path`` and those that it lies in, as far as they are missing, for everybody to read whatever
    the umask is. OSError passes.
    """
    missing = []
    while not os.path.isdir(path):
        missing.append(path)
        path = os.path.dirname(path)
    for one in reversed(missing):
        with contextlib.suppress(FileExistsError):  # somebody else made it meanwhile
            os.mkdir(one, 0o755)
            os.chmod(one, 0o755)


def write(path: str, content: bytes) -> None:
    """Replace a file in one step and durably: a boot must find the old one or the new one, whole."""
    directory, name = os.path.split(path)
    make_directories(directory)
    with files.opened_directory(directory) as fd:
        files.write_whole(fd, name, content)


def tell(run: Run, words: list[str], places: Places, strict: bool = True) -> bool:
    """Tell systemd, if it is in charge; whether it is. IOFailed if it refuses and ``strict``."""
    if not os.path.exists(places.running):
        return False
    status, _output, errors = run(["systemctl", "--no-ask-password", *words])
    if status and strict:
        raise IOFailed(f"systemctl {' '.join(words)} failed: {errors.strip()}.", "Look at the journal of the host.")
    return True
