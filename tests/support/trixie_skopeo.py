# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A program of another Debian suite beside the installed one: skopeo 1.18 of trixie on a Debian 12.

The packages are unpacked into the cache and the program runs with its own dynamic loader and libraries; nothing is
installed. From the command line: ``trixie_skopeo.py [--suite SUITE] [--package P] [--program NAME] [--link PATH]``
prints the wrapper's path.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shlex
import subprocess
import sys

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from aptroot import AptRoot, Unavailable, cache_directory, locked


def foreign_program(
    suite: str, packages: tuple[str, ...], program: str, cache: pathlib.Path | None = None
) -> pathlib.Path:
    """Unpack ``packages`` of ``suite`` with all they need; return an executable that runs ``program`` (a path below
    usr/, like ``bin/skopeo``).
    """
    base = (cache or cache_directory()) / "foreign" / f"{suite}-{'-'.join(packages)}"
    with locked(base):
        root, wrapper = base / "root", base / pathlib.PurePath(program).name
        if not (base / "unpacked").exists():
            debs = AptRoot(suite, cache / "apt" if cache else None).fetch(packages)
            root.mkdir(exist_ok=True)
            for name in ("bin", "sbin", "lib", "lib64"):
                # Packages that still ship /lib must not end up beside /usr/lib.
                (root / "usr" / name).mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    (root / name).symlink_to(f"usr/{name}")
            for deb in debs:
                # tar through the symlinks above; dpkg-deb -x would replace them by directories.
                with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as unpacker:
                    subprocess.run(
                        ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(root)],
                        stdin=unpacker.stdout,
                        check=True,
                    )
            (base / "unpacked").touch()
        target = root / "usr" / program
        if not target.exists():
            raise Unavailable(f"{' '.join(packages)} of {suite} has no {program}")
        loaders = sorted([*root.glob("usr/lib64/ld-*.so*"), *root.glob("usr/lib/ld-*.so*")])
        if not loaders:
            raise Unavailable(f"no dynamic loader found among the packages of {suite}")
        libraries = ":".join(
            str(path) for path in [*sorted(root.glob("usr/lib/*-linux-*")), root / "usr/lib"] if path.is_dir()
        )
        command = [str(loaders[0]), "--argv0", wrapper.name, "--library-path", libraries, str(target)]
        wrapper.write_text("#!/bin/sh\nexec " + " ".join(shlex.quote(word) for word in command) + ' "$@"\n')
        wrapper.chmod(0o755)
        return wrapper


def trixie_skopeo(cache: pathlib.Path | None = None) -> pathlib.Path:
    """The wrapper of trixie's skopeo; raises `Unavailable` where it cannot be had (no Debian, no network, ...)."""
    wrapper = foreign_program("trixie", ("skopeo",), "bin/skopeo", cache)
    done = subprocess.run(
        [str(wrapper), "--version"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise Unavailable(f"trixie's skopeo does not run here: {done.stdout.strip()}")
    return wrapper


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", default="trixie")
    parser.add_argument("--package", action="append", help="default: skopeo")
    parser.add_argument("--program", default="bin/skopeo", help="path of the program below usr/")
    parser.add_argument("--cache", type=pathlib.Path, help="default: $COMPOSEFS_OCI_CACHE or .cache/ of the checkout")
    parser.add_argument("--link", type=pathlib.Path, help="also put a symbolic link to the wrapper here")
    options = parser.parse_args()
    try:
        wrapper = foreign_program(
            options.suite,
            tuple(options.package or ["skopeo"]),
            options.program,
            options.cache and options.cache.resolve(),
        )
    except Unavailable as error:
        print(f"not available: {error}", file=sys.stderr)
        return 77
    if options.link:
        options.link.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            options.link.unlink()
        os.symlink(wrapper, options.link)
    print(wrapper)
    return 0


if __name__ == "__main__":
    sys.exit(main())
