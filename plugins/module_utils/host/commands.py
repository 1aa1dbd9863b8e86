# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Run a short command of the host, such as systemctl, to its end."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

# Runs a command, given as a list of words, and returns its exit status, output and error output.
Run = Callable[[list[str]], tuple[int, str, str]]

TIMEOUT = 300.0
# What a shell says: not found, not executable, timed out (timeout(1)).
_NOT_FOUND, _NOT_EXECUTABLE, _TIMED_OUT = 127, 126, 124


def run(words: list[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Exit status, output and error output of a command that reads nothing; statuses as a shell has them where it could
    not run or took longer than ``timeout`` seconds.
    """
    try:
        done = subprocess.run(
            words,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _TIMED_OUT, "", f"{words[0]} did not end within {timeout:g} seconds"
    except FileNotFoundError as error:
        return _NOT_FOUND, "", str(error)
    except OSError as error:
        return _NOT_EXECUTABLE, "", str(error)
    return done.returncode, done.stdout, done.stderr
