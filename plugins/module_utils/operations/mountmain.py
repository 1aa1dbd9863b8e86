# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""The command that a unit of systemd runs to bring a mount back at boot, or take it away; see ``mountunit``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import mounts
from ..errors import EngineError
from ..store.repository import Repository

# Nothing collects garbage for long while a host boots; a boot must not wait for ever.
_LOCK_WAIT = 60.0


def main(arguments: Sequence[str]) -> int:
    """Run with the words of a command line, without the program; the exit status. Only errors are printed, to stderr."""
    options = _parser().parse_args(arguments)
    try:
        if options.verb == "unmount":
            mounts.ensure_unmounted(options.path)
        else:
            wish = mounts.Wish(options.image, options.path, options.verity, options.upperdir, options.workdir, options.option)
            with Repository.open(options.repository, wait=_LOCK_WAIT) as repository:
                mounts.ensure_mounted(repository, wish)
    except EngineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mount.pyz", description="Mount a composefs image of a repository, or unmount it.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    mounting = verbs.add_parser("mount", help="mount unless exactly this is mounted there")
    mounting.add_argument("--repository", required=True)
    mounting.add_argument("--image", required=True, help="the id of the image, in hex")
    mounting.add_argument("--verity", choices=(mounts.REQUIRED, mounts.PREFERRED, mounts.DISABLED), default=mounts.REQUIRED)
    mounting.add_argument("--upperdir")
    mounting.add_argument("--workdir")
    mounting.add_argument("--option", action="append", default=[])
    mounting.add_argument("path")
    verbs.add_parser("unmount", help="unmount the images at a path").add_argument("path")
    return parser
