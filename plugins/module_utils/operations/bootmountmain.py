# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The command that units and timers of systemd run: bring a mount back at boot, take it away, take back what nobody
confirmed; see ``bootmount`` and ``deployment``.

Units and timers outlive the version that wrote them, so the arguments of every verb stay as they are: ``boot PATH``,
``revert --token T PATH``, ``unmount PATH``, and ``mount``, which units of version 0.1.0 run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import deployment, mounting
from ..errors import EngineError
from ..store.repository import Repository
from .journal import HOST, Places

# Nothing collects garbage for long while a host boots; a boot must not wait for ever.
_LOCK_WAIT = 60.0


def main(arguments: Sequence[str]) -> int:
    """Run with the words of a command line, without the program; the exit status. Only errors and warnings are printed,
    to stderr.
    """
    options = _parser().parse_args(arguments)
    host = deployment.Host(Places(library=getattr(options, "library", HOST.library)), warn=_warn)
    try:
        if options.verb == "boot":
            deployment.boot(options.path, host)
        elif options.verb == "revert":
            deployment.revert(options.path, host, token=options.token)
        elif options.verb == "unmount":
            mounting.ensure_unmounted(options.path)
        else:
            _mount(options)
    except EngineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


def _warn(warning: str) -> None:
    sys.stderr.write(f"warning: {warning}\n")


def _mount(options: argparse.Namespace) -> None:
    wish = mounting.Wish(
        options.image,
        options.path,
        options.verity,
        options.upperdir,
        options.workdir,
        options.option,
        dev=options.dev,
        suid=options.suid,
    )
    with Repository.open(options.repository, wait=_LOCK_WAIT) as repository:
        mounting.ensure_mounted(repository, wish)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mount.pyz", description="Mount a composefs image of a repository, or unmount it."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    boot = verbs.add_parser("boot", help="mount what the journal of a path calls current")
    boot.add_argument("path")
    revert = verbs.add_parser("revert", help="take back what is on trial at a path")
    revert.add_argument("--token", required=True, help="the trial that is meant; any other is left alone")
    revert.add_argument("path")
    for verb in (boot, revert):
        verb.add_argument("--library", default=HOST.library, help="where the journals lie")
    mount = verbs.add_parser("mount", help="mount unless exactly this is mounted there")
    mount.add_argument("--repository", required=True)
    mount.add_argument("--image", required=True, help="the id of the image, in hex")
    mount.add_argument(
        "--verity", choices=(mounting.REQUIRED, mounting.PREFERRED, mounting.DISABLED), default=mounting.REQUIRED
    )
    mount.add_argument("--upperdir")
    mount.add_argument("--workdir")
    mount.add_argument("--option", action="append", default=[])
    # Units of 0.1.0 have neither word, and what they mount is protected, too.
    mount.add_argument("--dev", action="store_true", help="device nodes of the image take effect")
    mount.add_argument("--suid", action="store_true", help="setuid bits and capabilities of the image take effect")
    mount.add_argument("path")
    verbs.add_parser("unmount", help="unmount the images at a path").add_argument("path")
    return parser
