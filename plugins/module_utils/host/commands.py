# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Run a short command of the host, such as systemctl, to its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from typing import BinaryIO

from ..errors import LimitReached, doing, from_os_error

# Runs a command, given as a list of words, and returns its exit status, output and error output.
Run = Callable[[list[str]], tuple[int, str, str]]

TIMEOUT = 300.0
_LIMIT = 1 << 20
# What a shell says: not found, not executable, timed out (timeout(1)).
NOT_FOUND, _NOT_EXECUTABLE, _TIMED_OUT = 127, 126, 124


def run(words: list[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Exit status, output and error output of a command that reads nothing; statuses as a shell has them where it could
    not run or took longer than ``timeout`` seconds. Then it is killed, with all that belongs to its session.
    LimitReached if this process may have no more processes or descriptors.
    """
    # Files instead of pipes: what the command leaves running may keep its output open for as long as it likes.
    with doing(f"Starting {words[0]!r}"), _unnamed() as output, _unnamed() as errors:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, start_new_session=True
            )
        except FileNotFoundError as error:
            return NOT_FOUND, "", str(error)
        except OSError as error:
            if isinstance(from_os_error(error, ""), LimitReached):
                raise
            return _NOT_EXECUTABLE, "", str(error)
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            return _TIMED_OUT, "", f"{words[0]} did not end within {timeout:g} seconds"
        finally:
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                # One that the kernel does not let go is left to it.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)
        return status, _text(output), _text(errors)


def _unnamed() -> BinaryIO:
    return os.fdopen(os.memfd_create("output"), "w+b")


def _text(file: BinaryIO) -> str:
    """What was written into the file, the last ``_LIMIT`` bytes of it."""
    file.seek(max(0, os.fstat(file.fileno()).st_size - _LIMIT))
    return file.read(_LIMIT).decode("utf-8", "replace")
