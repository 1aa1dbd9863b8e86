# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Work in a process of its own: it uses another processor, and all its memory is gone when it ends.

``fork`` and nothing else: a module runs from a temporary archive that no new interpreter could import from. A child
never returns into its parent's stack, says nothing on the module's output, and dies with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any

from ..errors import IOFailed, from_exception, from_values, to_values

MAX_MESSAGE = 64 * 1024
_PR_SET_PDEATHSIG = 1


def settle(parent: int) -> None:
    """Make a freshly forked process a quiet one that dies with its parent, whose process id is ``parent``."""
    try:
        import ctypes
    except ImportError:
        pass  # a Python built without it; what the child reads from ends with its parent all the same
    else:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent died before the kernel was told to tell
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def killed(what: str) -> IOFailed:
    """The error for a child that ended without a word."""
    return IOFailed(
        f"The process that {what} was killed.",
        "The host may be out of memory; look at its kernel log, and lower 'parallel'.",
    )


def call(what: str, function: Callable[[], Any]) -> Any:
    """Run ``function`` in a child and return its value, which must fit into a small JSON document. Engine errors come
    through; ``what`` is what the child does, such as ``makes the EROFS image``.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        try:
            ours.close()
            settle(parent)
            try:
                answer = {"value": function()}
            except BaseException as error:
                answer = {"error": to_values(from_exception(error, f"The process that {what}"))}
            theirs.send(json.dumps(answer).encode())
        finally:
            os._exit(0)
    theirs.close()
    try:
        answer = json.loads(ours.recv(MAX_MESSAGE) or b"null")
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if answer is None:
        raise killed(what)
    if "error" in answer:
        raise from_values(answer["error"])
    return answer["value"]
