# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Root trees of Debian suites, and an archive of packages that hosts install from without any network.

A tree is made once by mmdebstrap and kept. ``bare`` has what Ansible needs and nothing that the collection needs;
``ready`` has all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import time

import ground
from aptroot import AptRoot
from ground import Unavailable

# What a host must have before Ansible can do anything with it, and what makes it look around.
BARE = ("openssh-server", "python3", "procps", "e2fsprogs", "passwd")
NEEDED = ("skopeo", "python3-jsonschema", "ca-certificates")
# Python 3.14 has zstd in its standard library: hosts of forky do without the package, so that this is tried as well.
ZSTD = {"bookworm": ("python3-zstandard",), "trixie": ("python3-zstandard",), "forky": ()}
ACCELERATORS = {"bookworm": ("libisal2",), "trixie": ("python3-isal",), "forky": ("python3-isal",)}
# The role asks for the first; ansible.builtin.apt installs the second by itself where it is missing.
INSTALLABLE = (*NEEDED, "python3-zstandard", "python3-apt")
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")


def packages(suite: str, flavour: str) -> list[str]:
    """The packages that a tree is made with, apart from what Debian calls essential."""
    if suite not in ACCELERATORS:
        raise Unavailable(f"no root tree is described for the suite {suite!r}")
    return [*BARE, *({"bare": (), "ready": (*NEEDED, *ZSTD[suite], *ACCELERATORS[suite])}[flavour])]


def bootstrap(suite: str, include: list[str], target: str, log: pathlib.Path, *options: str) -> None:
    """mmdebstrap from the mirror that this machine uses itself."""
    ground.need("mmdebstrap", why=f"making a root tree of {suite}")
    if os.geteuid() != 0:
        raise Unavailable("making root trees needs root")
    source = ground.mirror()
    signed = f"[signed-by={source.signed_by}] " if os.path.exists(source.signed_by) else ""
    command = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(include)}", *options]
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT] + ["--dpkgopt=force-unsafe-io"]
    # As in aptroot: a mirror that lags behind will do.
    command += ['--aptopt=Acquire::Check-Valid-Until "false"']
    with open(log, "wb") as out:
        done = subprocess.run(
            [*command, suite, target, f"deb {signed}{source.uri} {suite} main"],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            check=False,
        )
    if done.returncode:
        raise Unavailable(f"mmdebstrap could not make a root tree of {suite}: {ground.quoted_tail(log, 3)}")


def tree(suite: str, flavour: str = "ready") -> pathlib.Path:
    """The root tree of ``suite``; made if it is not there (about a minute), else at once."""
    include = packages(suite, flavour)
    recipe = hashlib.sha256(json.dumps([include, LEFT_OUT, 3]).encode()).hexdigest()[:12]
    target = ground.state() / "roots" / f"{suite}-{flavour}-{recipe}"
    if target.exists():
        return target
    target.parent.mkdir(exist_ok=True)
    with ground.locked(target.parent / f".{suite}-{flavour}"):
        if target.exists():
            return target
        started = time.monotonic()
        with ground.making(target) as root:
            bootstrap(suite, include, str(root), target.with_suffix(".log"))
            ground.allow_login(root)
            (root / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")
            (root / "usr/sbin/policy-rc.d").chmod(0o755)
            for old in (root / "etc/apt/sources.list.d").iterdir():
                old.unlink()
            (root / "etc/apt/sources.list").write_text("deb [trusted=yes] file:/srv/packages ./\n")
        ground.say(f"made the root tree {target.name} in {time.monotonic() - started:.0f} s")
        for other in target.parent.glob(f"{suite}-{flavour}-*"):
            if other.is_dir() and other != target:
                ground.remove(other)
    return target


def archive(suite: str) -> pathlib.Path:
    """A directory with all the packages that the roles may install on a host of ``suite``, laid out as an apt
    repository.
    """
    names = (*INSTALLABLE, *ACCELERATORS[suite])
    # With what is in the tree already: newer versions of that may be needed.
    debs = AptRoot(suite).fetch([*BARE, *names])
    target = ground.state() / "packages" / suite
    with ground.locked(target.parent):
        listing, listed = target / "Packages", target / "listed.json"
        if listed.exists() and json.loads(listed.read_text()) == [deb.name for deb in debs]:
            return target
        ground.remove(target)
        target.mkdir()
        paragraphs = []
        for deb in debs:
            os.link(deb, target / deb.name)
            control = ground.run("dpkg-deb", "--field", deb).rstrip("\n")
            data = deb.read_bytes()
            paragraphs.append(
                f"{control}\nFilename: ./{deb.name}\nSize: {len(data)}\nSHA256: {hashlib.sha256(data).hexdigest()}\n"
            )
        listing.write_text("\n".join(paragraphs))
        listed.write_text(json.dumps([deb.name for deb in debs]))
    return target


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Make root trees before they are needed.")
    parser.add_argument(
        "trees",
        nargs="*",
        default=["bookworm-bare", "bookworm-ready", "trixie-bare", "trixie-ready"],
        metavar="SUITE-FLAVOUR",
    )
    for word in parser.parse_args().trees:
        print(tree(*word.split("-")))
