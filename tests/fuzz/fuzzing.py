# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the fuzz targets have in common: their options, the loop, and what is done with an input that failed."""

from __future__ import annotations

import argparse
import pathlib
import random
import sys
import time
from collections.abc import Callable, Sequence


def parser(doc: str | None, targets: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The options that every file has; one with several ``targets`` wants to know which."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if targets:
        made.add_argument("target", choices=targets)
    made.add_argument("--seconds", type=float, default=60)
    made.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    made.add_argument("files", nargs="*", metavar="FILE")
    return made


def fuzz(
    name: str,
    run: Callable[[bytes], object],
    make: Callable[[random.Random], bytes],
    arguments: tuple[argparse.Namespace, list[str]],
    longest: int = 65536,
) -> None:
    """Give ``run`` the files that were named, once each; or else inputs until the time is over, which ``make`` makes
    where there is no atheris. ``arguments`` are what the parser knew, and the rest for libFuzzer.
    """
    options, rest = arguments
    if options.files:
        for file in options.files:
            run(pathlib.Path(file).read_bytes())
        return
    try:
        import atheris  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        _mutate(name, run, make, options.seconds, options.seed)
        return
    atheris.instrument_all()
    limits = [f"-max_total_time={options.seconds:.0f}", f"-max_len={longest}"]
    atheris.Setup([sys.argv[0], *limits, *rest], run)
    atheris.Fuzz()


def _mutate(
    name: str, run: Callable[[bytes], object], make: Callable[[random.Random], bytes], seconds: float, seed: int
) -> None:
    dice = random.Random(seed)
    count = 0
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        data = make(dice)
        try:
            run(data)
        except BaseException:
            pathlib.Path(f"crash-{name}").write_bytes(data)
            print(f"seed {seed}, input {count}, kept as crash-{name}", file=sys.stderr)
            raise
        count += 1
    print(f"{name}: {count} inputs in {seconds:g} s, seed {seed}: nothing found")
