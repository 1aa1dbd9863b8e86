# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pull one image with the engine alone, without Ansible: ``pull.py REPOSITORY REFERENCE [NAME]``.

This is what the benchmarks measure beside ``cfsctl oci pull``; ``--profile FILE`` writes a cProfile of the parent
process.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import types
from typing import Any


def provide_engine() -> None:
    """Make ``ansible_collections.composefs.oci`` importable from this checkout, as AnsiballZ would from its archive."""
    root = str(pathlib.Path(__file__).resolve().parents[1])
    for name, path in (
        ("ansible_collections", []),
        ("ansible_collections.composefs", []),
        ("ansible_collections.composefs.oci", [root]),
    ):
        module = types.ModuleType(name)
        module.__path__ = path
        sys.modules[name] = module


def pull(options: argparse.Namespace) -> list[dict[str, Any]]:
    from ansible_collections.composefs.oci.plugins.module_utils import progress
    from ansible_collections.composefs.oci.plugins.module_utils.pull import plan, pull
    from ansible_collections.composefs.oci.plugins.module_utils.store import repository
    from ansible_collections.composefs.oci.plugins.module_utils.source.imageproxy import ProxyOptions

    sink = progress.TerminalSink(sys.stderr) if options.progress else None
    listener = progress.Progress(sink)
    proxy = ProxyOptions(executable=tuple(options.skopeo.split()))
    settings = pull.Options(proxy=proxy, parallel=options.parallel)
    with repository.Repository.open(options.repository, write=True) as opened:
        outcomes = pull.pull_images(
            opened, [plan.Request(ref=options.reference, name=options.name or options.reference)], settings, listener
        )
        listener.close()
        return [pull.describe(opened, outcome) for outcome in outcomes]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository")
    parser.add_argument("reference")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--parallel", type=int, default=0)
    parser.add_argument("--skopeo", default="skopeo")
    parser.add_argument("--progress", action="store_true")
    parser.add_argument("--profile")
    options = parser.parse_args()
    provide_engine()
    if options.profile:
        import cProfile

        profile = cProfile.Profile()
        result = profile.runcall(pull, options)
        profile.dump_stats(options.profile)
    else:
        result = pull(options)
    print(json.dumps(result, indent=1, default=str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
