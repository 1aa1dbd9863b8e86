# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Run a short command of the host, such as systemctl, to its end."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import IO

from ..errors import LimitReached, doing, from_os_error

# Runs a command, given as a list of words, and returns its exit status, output and error output.
Run = Callable[[list[str]], tuple[int, str, str]]

TIMEOUT = 300.0
_LIMIT = 1 << 20
# Seconds between two looks whether a silent command has ended.
_PATIENCE = 0.02
# Exit statuses as a shell has them: command not found, not executable, timed out (timeout(1)).
NOT_FOUND, _NOT_EXECUTABLE, _TIMED_OUT = 127, 126, 124


def run(words: list[str], timeout: float = TIMEOUT) -> tuple[int, str, str]:
    """Run a command that reads nothing; return its exit status, output and error output (the last ``_LIMIT`` bytes of
    each). If it cannot run or takes longer than ``timeout`` seconds, the status is the one that a shell would give. A
    command that takes too long is killed, with all that belongs to its session. Raises LimitReached if this process may
    have no more processes or open files.
    """
    with doing(f"Starting {words[0]!r}"):
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except FileNotFoundError as error:
            return NOT_FOUND, "", _why(error)
        except OSError as error:
            if isinstance(from_os_error(error, ""), LimitReached):
                raise
            return _NOT_EXECUTABLE, "", _why(error)
    with contextlib.ExitStack() as stack:
        pipes = [stack.enter_context(pipe) for pipe in (process.stdout, process.stderr) if pipe is not None]
        try:
            told = _listen(process, pipes, time.monotonic() + timeout)
        finally:
            if process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, signal.SIGKILL)
                # A process that the kernel does not let go of is left to the kernel.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5.0)
    if told is None:
        return _TIMED_OUT, "", f"{words[0]} did not end within {timeout:g} seconds"
    output, errors = (text.decode("utf-8", "replace") for text in told)
    return process.returncode, output, errors


def _why(error: OSError) -> str:
    """Why a program cannot run, as a shell says it: what the system says, and of which file."""
    return f"{os.fsdecode(error.filename) if error.filename else 'it'}: {error.strerror}"


def _listen(process: subprocess.Popen[bytes], pipes: Sequence[IO[bytes]], end: float) -> list[bytearray] | None:
    """What the command writes into its pipes until it ends; None if it does not before ``end``.

    What the command leaves running may keep the pipes open for as long as it likes, so their end is not waited for:
    when the command has ended, what it wrote is there.
    """
    told = [bytearray() for _pipe in pipes]
    with selectors.DefaultSelector() as selector:
        for pipe, text in zip(pipes, told):
            selector.register(pipe, selectors.EVENT_READ, text)
        while True:
            ended = process.poll() is not None
            if not ended and time.monotonic() > end:
                return None
            for key, _events in selector.select(0.0 if ended else _PATIENCE):
                data = os.read(key.fd, _LIMIT)
                key.data.extend(data)
                del key.data[:-_LIMIT]
                if not data:
                    selector.unregister(key.fileobj)
            if ended:
                return told
            if not selector.get_map():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
