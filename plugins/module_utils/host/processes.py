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
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

from ..errors import EngineError, IOFailed, LimitReached, from_exception, from_values, to_values

MAX_MESSAGE = 64 * 1024
MEMORY_LIMIT = 1280 << 20
"""Bytes that a child may have besides what it was born with: more than the largest image within bounds needs, and less
than what takes a host down.
"""
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
    limit_memory(MEMORY_LIMIT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    if null > 2:
        os.close(null)


def limit_memory(extra: int) -> None:
    """Let this process have ``extra`` bytes more than it has now, so that what comes from outside cannot take the
    host's memory. Then memory ends with a MemoryError, which explain() tells from that of a host without memory.

    RLIMIT_DATA counts what is private and can be written (since Linux 4.7); the limit on addresses would count
    libraries and the stacks of threads that nobody uses, too. See setrlimit(2).
    """
    with contextlib.suppress(OSError, ValueError, StopIteration):
        now = _data()
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if soft == resource.RLIM_INFINITY or now + extra < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (now + extra, hard))


def _data() -> int:
    """The bytes that RLIMIT_DATA counts."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))


def explain(error: BaseException, what: str) -> EngineError:
    """The engine error for what ended the work of a child, ``what`` being what it did."""
    if not isinstance(error, MemoryError):
        return from_exception(error, what)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    # Telling takes memory, too, and what held it may still be referred to.
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    # What the work holds is still there, for the error refers to it: little of it means that the host has no more.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        if soft == resource.RLIM_INFINITY or _data() < soft // 2:
            return from_exception(error, what)
    return LimitReached(
        f"That needs more memory than the {soft >> 20} MiB (RLIMIT_DATA) that a process of a pull may have.",
        "The image is hostile or far beyond what is usual; look at what it consists of. If a limit of the user is "
        "lower, raise that (ulimit -d).",
        doing=what,
    )


def killed(what: str) -> IOFailed:
    """The error for a child that ended without a word."""
    return IOFailed(
        f"The process that {what} was killed.",
        "The host may be out of memory; look at its kernel log, and lower 'parallel'.",
    )


class Task:
    """Work in a child while the parent does other things: ``tell`` it what it waits for, then take its ``result``.

    ``function`` gets a function that returns the next value it was told, and returns a value that fits into a small
    JSON document; ``what`` is what the child does, such as ``makes the EROFS image``. ``leave`` runs first in the
    child, which lets go there of what it must not keep open. Call ``close`` whatever happens.
    """

    def __init__(
        self, what: str, function: Callable[[Callable[[], Any]], Any], leave: Callable[[], None] = lambda: None
    ) -> None:
        self._what = what
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                self._ours.close()
                settle(parent)
                leave()

                def hear() -> Any:
                    message = theirs.recv(MAX_MESSAGE)
                    if not message:
                        os._exit(0)  # nobody waits for the result any more
                    return json.loads(message)

                try:
                    answer = {"value": function(hear)}
                except BaseException as error:
                    answer = {"error": to_values(explain(error, f"The process that {what}"))}
                theirs.send(json.dumps(answer).encode())
            finally:
                os._exit(0)
        theirs.close()

    def tell(self, value: Any) -> None:
        """Send ``value`` to the child. That it has ended already is told by `result`."""
        with contextlib.suppress(OSError):
            self._ours.send(json.dumps(value).encode())

    def result(self) -> Any:
        """Wait for the child's value. Engine errors come through; IOFailed if it was killed."""
        try:
            answer = json.loads(self._ours.recv(MAX_MESSAGE) or b"null")
        except OSError:
            answer = None
        finally:
            self.close()
        if answer is None:
            raise killed(self._what)
        if "error" in answer:
            raise from_values(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the child and reap it; nothing if that was done."""
        if self._pid:
            self._ours.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._pid, 0)
            self._pid = 0


def call(what: str, function: Callable[[], Any]) -> Any:
    """Run ``function`` in a child and return its value, which must fit into a small JSON document. Engine errors come
    through; ``what`` is what the child does, such as ``makes the EROFS image``.
    """
    return Task(what, lambda _hear: function()).result()
