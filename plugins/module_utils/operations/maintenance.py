# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What keeps a repository in order while nobody looks: a check, and a prune.

A timer of systemd runs this module as a program of its own, see ``maintenancetimer``. Timers outlive the version that
wrote them, so the words of the command line stay as they are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import EngineError
from ..host import beneath
from ..progress import Progress
from ..store import checks
from ..store.repository import LOCK_WAIT, Repository
from ..text import file_name, from_file_name
from . import check, prune

LEVELS = (check.QUICK, check.OBJECTS)
"""A check of level ``full`` needs parts of the engine that the program does not have."""


@dataclasses.dataclass(frozen=True)
class Wish:
    """What to do: a check of a level, and a prune, if any. ``unsafe``: whether a repository is accepted that others can
    change.
    """

    level: str = check.QUICK
    prune: prune.Wish | None = dataclasses.field(default_factory=prune.Wish)
    unsafe: str = beneath.REFUSE


def maintain(repository: Repository, wish: Wish, progress: Progress) -> dict[str, Any]:
    """Check and prune, and write down the result: ``time`` (when it began, since the epoch), ``seconds``, ``level``,
    ``findings`` (how many of each code), ``names`` (that were removed), ``objects`` and ``bytes`` (the same), and
    ``error`` (code and message, or None). Errors end up there, too.

    Findings of the check do not stop the prune, which finds out by itself what it must not touch.
    """
    begun = time.time()
    result: dict[str, Any] = {
        "time": begun,
        "level": wish.level,
        "findings": {},
        "names": [],
        "objects": 0,
        "bytes": 0,
        "error": None,
    }
    try:
        for finding in check.check(repository, check.Wish(wish.level), progress).findings:
            result["findings"][finding.code] = result["findings"].get(finding.code, 0) + 1
        if wish.prune is not None:
            pruned = prune.prune(repository, wish.prune, progress)
            result.update(names=pruned.names, objects=pruned.objects, bytes=pruned.bytes)
    except EngineError as error:
        result["error"] = {"code": error.code, "message": str(error)}
    result["seconds"] = round(time.time() - begun, 2)
    checks.remember_maintenance(repository, result)
    return result


def words(wish: Wish, repository: str) -> list[str]:
    """The command line that means the same, as the operating system spells it: the program may run in another locale
    than the task that wrote it, and must keep the same names.
    """
    found = ["--level", wish.level, *(["--accept-unsafe"] if wish.unsafe == beneath.ACCEPT else [])]
    if wish.prune is None:
        found.append("--no-prune")
    else:
        for option, patterns in (("--keep", wish.prune.keep), ("--remove", wish.prune.remove)):
            found += [f"{option}={file_name(pattern)}" for pattern in patterns]
        found += ["--keep-last", str(wish.prune.keep_last), "--older-than", f"{wish.prune.older_than:g}"]
        found += ["--timeout", f"{wish.prune.timeout:g}"]
    return [*found, "--", repository]


def main(arguments: Sequence[str], opened: Callable[..., Repository] = Repository.open) -> int:
    """Run with the words of a command line, without the program; the exit status, which is that of failure also where
    the check found something. What came of it is printed as one line.
    """
    parser = argparse.ArgumentParser(prog="maintain.pyz", description="Check a composefs repository, and prune it.")
    parser.add_argument("--level", choices=LEVELS, default=check.QUICK)
    parser.add_argument("--no-prune", action="store_true")
    parser.add_argument("--keep", action="append", default=[])
    parser.add_argument("--remove", action="append", default=[])
    parser.add_argument("--keep-last", type=int, default=0)
    parser.add_argument("--older-than", type=float, default=0.0, help="seconds")
    parser.add_argument("--timeout", type=float, default=LOCK_WAIT, help="seconds to wait for the repository")
    parser.add_argument("--accept-unsafe", action="store_true", help="also a repository that others can change")
    parser.add_argument("repository")
    options = parser.parse_args(arguments)
    keep, remove = (list(map(from_file_name, patterns)) for patterns in (options.keep, options.remove))
    pruning = prune.Wish(keep, remove, options.keep_last, options.older_than, options.timeout)
    unsafe = beneath.ACCEPT if options.accept_unsafe else beneath.REFUSE
    wish = Wish(options.level, None if options.no_prune else pruning, unsafe)
    try:
        with opened(options.repository, write=True, unsafe=unsafe) as repository:
            result = maintain(repository, wish, Progress())
    except EngineError as error:
        sys.stderr.write(f"{error.code}: {error}\n")
        return 1
    sys.stdout.write(json.dumps(result, sort_keys=True) + "\n")
    if result["error"]:
        sys.stderr.write(f"{result['error']['code']}: {result['error']['message']}\n")
    for code, count in sorted(result["findings"].items()):
        sys.stderr.write(f"The check found: {count} x {code}\n")
    return 1 if result["error"] or result["findings"] else 0
