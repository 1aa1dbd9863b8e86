# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The product's main job, on this machine, with nothing but real parts.

Builds an image from Debian's packages, serves it from a real registry on a loopback port, prepares this machine through
the roles, pulls the image into a repository of its own below .demo, pulls it again, which must change nothing, mounts
it, holds every file against what tar makes of the layers, unmounts it, and shows what is there. With a REFERENCE that
image is pulled.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

import environment
from environment import ROOT, VENV, Missing, say

sys.path.insert(0, str(ROOT / "tests" / "support"))

NAME = "demo/debian"


def on_overlay(path: pathlib.Path) -> bool:
    """Whether ``path`` (or what exists of it) is on overlayfs, from where no image can be mounted."""
    while not path.exists():
        path = path.parent
    return (
        subprocess.run(["stat", "-f", "-c", "%T", str(path)], stdout=subprocess.PIPE, check=True).stdout.strip()
        == b"overlayfs"
    )


def interpreter() -> str:
    """The Python that runs the modules here: the distribution's, for that is the one its packages are for."""
    return "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable


def serve_image(stack: contextlib.ExitStack, directory: pathlib.Path) -> str:
    """Build the image, start a registry that ends with ``stack``, push; returns the reference."""
    import ociimage
    import registry

    started = time.monotonic()
    built = ociimage.debian_image(directory / "layout")
    size = (
        f"{len(ociimage.SMALL_LAYERS)} layers, {built.blob_bytes / 2**20:.0f} MiB compressed, "
        f"{built.tar_bytes / 2**20:.0f} MiB of tar, {built.entries} entries"
    )
    say(f"Built an image from Debian's packages in {time.monotonic() - started:.1f} s: {size}")
    server = stack.enter_context(registry.Registry(directory / "registry"))
    reference = server.push(f"{directory / 'layout'}:latest", f"{NAME}:latest")
    say(f"Serving it as {reference}")
    return reference


def unpack(layout: pathlib.Path, target: pathlib.Path) -> None:
    """What tar makes of the image's layers. This image has no whiteouts; what lies in /run is left out of every
    composefs image.
    """
    import json

    def document(digest: str) -> dict[str, Any]:
        return dict(json.loads((layout / "blobs/sha256" / digest[7:]).read_bytes()))

    manifest = document(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
    target.mkdir()
    for layer in manifest["layers"]:
        blob = layout / "blobs/sha256" / layer["digest"][7:]
        subprocess.run(
            [
                "tar",
                "--extract",
                "--gzip",
                "--numeric-owner",
                "--preserve-permissions",
                "--file",
                str(blob),
                "--directory",
                str(target),
            ],
            check=True,
        )
    shutil.rmtree(target / "run", ignore_errors=True)
    (target / "run").mkdir()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="dev/demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "reference",
        nargs="?",
        metavar="REFERENCE",
        help="an image of your own, such as docker://registry.example.com/app:1.4 or oci:/srv/layout",
    )
    parser.add_argument("--name", help="its name in the repository")
    parser.add_argument(
        "--repository",
        type=pathlib.Path,
        default=ROOT / ".demo" / "repository",
        help="where the repository is, or is made (.demo/repository)",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="do not begin with an empty repository; one given by --repository is never emptied",
    )
    parser.add_argument(
        "ansible",
        nargs="*",
        metavar="-- ANSIBLE ...",
        help="further arguments for ansible-playbook, as in -- --check --diff",
    )
    arguments = sys.argv[1:]
    further = arguments[arguments.index("--") + 1 :] if "--" in arguments else []
    options = parser.parse_args(arguments[: arguments.index("--")] if "--" in arguments else arguments)

    # A signal ends the registry too: it becomes an exception, and the stack below is unwound.
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _frame: sys.exit(128 + number))
    try:
        environment.install_debian_packages({} if options.reference else environment.DEMO_COMMANDS)
        environment.controller()
    except Missing as problem:
        say(f"dev/demo: {problem}")
        return 2

    own = ROOT / ".demo" / "repository"
    repository = options.repository.absolute()
    if on_overlay(repository):
        say(
            f"dev/demo: {repository} is on overlayfs, from where no image can be mounted. Choose a directory on a "
            f"disk or a tmpfs with --repository."
        )
        return 2
    if repository == own and not options.keep:
        shutil.rmtree(own, ignore_errors=True)
    repository.parent.mkdir(parents=True, exist_ok=True)

    with contextlib.ExitStack() as stack:
        variables = {
            "composefs_demo_repository": str(repository),
            "composefs_progress": "always",
            "ansible_python_interpreter": interpreter(),
        }
        variables["composefs_demo_mount"] = str(repository.parent / "mounted")
        if options.reference:
            variables["composefs_demo_ref"] = options.reference
            variables["composefs_demo_name"] = options.name or ""
        else:
            directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="demo-", dir=repository.parent))
            variables["composefs_demo_ref"] = serve_image(stack, pathlib.Path(directory))
            variables["composefs_demo_name"] = options.name or NAME
            unpack(pathlib.Path(directory) / "layout", pathlib.Path(directory) / "unpacked")
            variables["composefs_demo_unpacked"] = f"{directory}/unpacked"
            # This registry has no certificate.
            variables["composefs_demo_validate_certs"] = "false"
        command = [
            str(VENV / "bin" / "ansible-playbook"),
            "--inventory",
            "localhost,",
            "--connection",
            "local",
            str(ROOT / "playbooks" / "demo.yml"),
        ]
        for name, value in variables.items():
            command += ["--extra-vars", f"{name}={value}"]
        return subprocess.run(
            [*command, *further], env=environment.ansible_environment(), cwd=ROOT, stdin=subprocess.DEVNULL, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
