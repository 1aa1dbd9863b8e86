# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The machine that the programs of an image would run on."""

from __future__ import annotations

import os
import sys

from ..formats.ocidocuments import Platform

# What uname calls a machine -> architecture and variant in Go's words. What is not listed is called the same there.
_MACHINES = {
    "x86_64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "armv5tejl": ("arm", "v5"),
    "loongarch64": ("loong64", ""),
    "mips64": ("mips64le" if sys.byteorder == "little" else "mips64", ""),
    "mips": ("mipsle" if sys.byteorder == "little" else "mips", ""),
}
# A 32-bit system may run on a 64-bit kernel, and uname names the kernel's architecture.
_NARROW = {"amd64": ("386", ""), "arm64": ("arm", "v8")}


def own_platform() -> Platform:
    """The platform that images for this host are for."""
    machine = os.uname().machine
    architecture, variant = _MACHINES.get(machine, (machine, ""))
    if sys.maxsize < 2**32:
        architecture, variant = _NARROW.get(architecture, (architecture, variant))
    return Platform("linux", architecture, variant)
