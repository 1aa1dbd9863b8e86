# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Look, without changing anything, at what the host has: run by the interpreter that runs the modules.

Its arguments are names of packages. It prints one JSON document: python, libraries, image_based (why, or ""), and
missing, which are those packages that could be installed but are not.
"""

from __future__ import annotations

import glob
import importlib
import json
import os
import shutil
import subprocess
import sys

LIBRARIES = {
    "zstd": ("compression.zstd", "zstandard", "backports.zstd"),
    "jsonschema": ("jsonschema",),
    "gzip": ("isal", "zlib_ng"),
}


def library_version(name: str) -> str:
    """The version of the library called ``name``; "" if it cannot be imported."""
    try:
        module = importlib.import_module(name)
        if name.startswith("compression."):
            return sys.version.split()[0]
        version = getattr(module, "__version__", "")
        if isinstance(version, str) and version and name != "jsonschema":
            return version
        # jsonschema warns when it is asked itself.
        from importlib import metadata

        return metadata.version(name.replace("_", "-"))
    except Exception:
        # Not there, damaged, or made for another Python: none of them is of any use here.
        return "unknown" if name in sys.modules else ""


def output(*command: str) -> tuple[int, str]:
    environment = dict(os.environ, LC_ALL="C")
    run = subprocess.run(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        check=False,
    )
    return run.returncode, run.stdout.decode(errors="replace").strip()


def image_based() -> str:
    """Why nothing can be installed on this host; "" if that is not so."""
    if os.path.exists("/run/ostree-booted"):
        return "it was booted from an image (/run/ostree-booted exists)"
    if os.statvfs("/usr").f_flag & os.ST_RDONLY:
        return "its /usr is read-only"
    return ""


def has_package_lists() -> bool:
    """Whether apt was ever told what there is to be had. Images for clouds and containers come without."""
    code, line = output("apt-config", "shell", "DIRECTORY", "Dir::State::lists/d")
    directory = line.partition("'")[2].rpartition("'")[0] if code == 0 else ""
    return bool(glob.glob(os.path.join(directory or "/var/lib/apt/lists", "*_Packages*")))


def missing_packages(names: list[str]) -> list[str]:
    """Those of ``names`` that are not installed, less those that apt is known not to have."""
    missing = []
    if shutil.which("dpkg-query"):
        for name in names:
            code, status = output("dpkg-query", "--show", "--showformat=${db:Status-Status}", name)
            if code or status != "installed":
                missing.append(name)
        # apt without package lists knows what is installed and nothing else; only then is its ignorance no news.
        if missing and shutil.which("apt-cache") and has_package_lists():
            missing = [
                name
                for name in missing
                if name == "skopeo" or output("apt-cache", "show", "--no-all-versions", name)[0] == 0
            ]
    elif shutil.which("rpm"):
        missing = [name for name in names if output("rpm", "--query", "--whatprovides", name)[0]]
    return missing


def main() -> None:
    libraries = {
        kind: {name: version for name in names for version in [library_version(name)] if version}
        for kind, names in LIBRARIES.items()
    }
    json.dump(
        {
            "python": sys.executable,
            "python_version": ".".join(str(part) for part in sys.version_info[:3]),
            "virtual_environment": sys.prefix != sys.base_prefix,
            "libraries": libraries,
            "image_based": image_based(),
            "missing": missing_packages(sys.argv[1:]),
        },
        sys.stdout,
    )


main()
