# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Text at the borders: what becomes a file name, and what reaches a person's terminal.

Python names files in the encoding of the process's locale. A host whose locale is not UTF-8 would so give an image
called ``büro`` another file name than every other host and tool. ``file_name`` makes of a text the str for which the
operating system gets UTF-8, whatever the locale; ``from_file_name`` turns such a str, or one that the operating system
gave, into the text again. In a UTF-8 locale both change nothing.

``printable`` is the one gate for everything that is shown: an image, a registry or a host must not be able to move the
cursor of the operator's terminal, or to fill it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

MESSAGE_LIMIT = 4096
"""Bytes that one message may have."""
VALUE_LIMIT = 64 * 1024
"""Bytes that one text of a result may have."""
DATA = frozenset(("labels", "annotations"))
"""What a result holds for programs, as the image has it; JSON escapes its control characters."""
LINE_LIMIT = 200
"""Characters that one line of progress may have."""

PATH_OPTIONS = frozenset(
    (
        "auth_file",
        "ca_cert_dir",
        "dest",
        "dumpfile",
        "executable",
        "path",
        "progress_file",
        "repository",
        "signature_policy",
        "upperdir",
        "workdir",
    )
)
"""The options and results of modules that are names of files."""

_FOREIGN = re.compile("[^\x00-\x7f]+")
_SPACES = re.compile("[\t\n\v\f\r]+[ \t\n\v\f\r]*")


def file_name(text: str) -> str:
    """The str that names the file called ``text`` in UTF-8; bytes that are no UTF-8 stand in it as surrogates."""
    if sys.getfilesystemencoding() == "utf-8":
        return text
    return os.fsdecode(text.encode("utf-8", "surrogateescape"))


def from_file_name(name: str) -> str:
    """The text that a file name stands for; what is no UTF-8 gets surrogates, as in a UTF-8 locale."""
    if sys.getfilesystemencoding() == "utf-8":
        return name
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def name_files(options: dict[str, Any]) -> None:
    """Make file names of the options that are paths, in place."""
    for key in PATH_OPTIONS & options.keys():
        if isinstance(options[key], str):
            options[key] = file_name(options[key])


def named_files(values: Any, convert: Callable[[str], str]) -> Any:
    """A document of plain values in which the texts under the keys of ``PATH_OPTIONS`` went through ``convert``: what
    is written down is text (``from_file_name``), what is read is used as names of files (``file_name``).
    """
    if isinstance(values, Mapping):
        return {
            key: convert(item) if key in PATH_OPTIONS and isinstance(item, str) else named_files(item, convert)
            for key, item in values.items()
        }
    return [named_files(item, convert) for item in values] if isinstance(values, (list, tuple)) else values


def printable(text: str, limit: int = MESSAGE_LIMIT) -> str:
    """``text`` as it may be shown: one line, of at most ``limit`` bytes, without control characters.

    Line breaks and tabs become a space; whatever else is not printable (escape sequences, characters that turn the
    direction of writing, what is not assigned) is written as ``\\x1b`` or the like. A text that is too long loses its
    middle, because its end may be the hint.
    """
    if not text.isascii() and sys.getfilesystemencoding() != "utf-8":
        text = _FOREIGN.sub(_readable, text)
    if not text.isprintable():
        text = _SPACES.sub(" ", text[: 2 * limit] + text[2 * limit :][-limit:])
        if not text.isprintable():
            text = "".join(char if char.isprintable() else _escaped(char) for char in text)
    if len(text) * 4 > limit:
        raw = text.encode("utf-8")
        if len(raw) > limit:
            tail = limit // 4
            head = limit - tail - len(" … ".encode())
            text = f"{raw[:head].decode('utf-8', 'ignore')} … {raw[-tail:].decode('utf-8', 'ignore')}"
    return text


def printable_values(value: Any, spare: frozenset[str] = DATA) -> Any:
    """A result whose texts all went through the gate, except those under the keys ``spare``, which are data."""
    if isinstance(value, str):
        return printable(value, VALUE_LIMIT)
    if isinstance(value, Mapping):
        return {
            printable(key) if isinstance(key, str) else key: item if key in spare else printable_values(item, spare)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [printable_values(item, spare) for item in value]
    return value


def _readable(found: re.Match[str]) -> str:
    """A part of a file name as the text that it stands for, if it is one."""
    try:
        return os.fsencode(found[0]).decode("utf-8")
    except UnicodeError:
        return found[0]


def _escaped(char: str) -> str:
    number = ord(char)
    if 0xDC80 <= number <= 0xDCFF:  # a byte of a file name that is no UTF-8
        number -= 0xDC00
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
