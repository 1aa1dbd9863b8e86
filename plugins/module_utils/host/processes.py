# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Work in a process of its own: it uses another processor, and all its memory is gone when it ends.

Only ``fork`` will do: a module runs from a temporary archive that no new interpreter could import from. A child
never returns into its parent's stack, says nothing on the module's output, and dies with its parent.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
import signal
import socket
import time
from collections.abc import Callable
from typing import Any, Protocol

from ..errors import EngineError, IOFailed, LimitReached, from_exception, from_values, to_values

MAX_MESSAGE = 64 * 1024
MEMORY_LIMIT = 1280 << 20
"""Bytes that a child may have besides what it was born with: more than the largest image within bounds needs, and less
than what takes a host down.
"""
_PR_SET_PDEATHSIG = 1


def death_signal() -> Callable[[], None] | None:
    """A function that a process calls right after it was forked, to have the kernel kill it when the thread that forked
    it ends; None for a Python without ctypes.

    All that the call needs is looked up here, before the fork: what is left is one call of a C function through a bound
    pointer, which takes no lock and imports nothing. The caller has to check whether the parent died before.
    """
    try:
        import ctypes
    except ImportError:
        return None
    prctl = ctypes.CDLL(None).prctl
    prctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong, ctypes.c_ulong]
    number = int(signal.SIGKILL)

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)

    return tie


def _settle(parent: int) -> None:
    """Make a freshly forked process a quiet one that dies with its parent, whose process id is ``parent``."""
    tie = death_signal()
    if tie is not None:  # without it the child still ends when its connection does
        tie()
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
    host's memory. Beyond that it gets a MemoryError, which explain() can tell from that of a host without memory.

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
    # The message takes memory, too, and what the work allocated may still be alive.
    resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))
    # The error still refers to what the work allocated. If that is little, it is the host that ran out of memory.
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
        "The host may be out of memory; look at its kernel log, and lower 'parallel' if the task has it.",
    )


class Child:
    """A forked process and the ``connection`` to it, on which every message is a JSON document. Call ``close`` whatever
    happens.

    ``what`` is what it does, such as ``imports layers``. ``work`` gets its end of the connection; when it returns, or
    fails, the process ends. ``leave`` runs in the child before that, and lets go of what it must not keep open: it
    inherits all that the forking process has.
    """

    def __init__(
        self, what: str, work: Callable[[socket.socket], None], leave: Callable[[], None] = lambda: None
    ) -> None:
        self._what = what
        self.connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            self.connection.close()
            theirs.close()
            raise
        if self.pid == 0:
            # Never return into the caller's stack: whatever happens, this process ends here.
            try:
                try:
                    _settle(parent)
                    self.connection.close()
                    leave()
                except OSError as error:
                    # A process that may open no more files cannot begin, but it can still say so.
                    found = explain(error, f"The process that {what}")
                    tell(theirs, {"kind": "error", "error": to_values(found)})
                else:
                    work(theirs)
            finally:
                os._exit(0)
        theirs.close()

    def send(self, value: Any, fd: int = -1) -> None:
        """Send ``value``, and with it the file behind ``fd`` unless that is -1. IOFailed if the child is gone."""
        message = json.dumps(value).encode()
        try:
            if fd < 0:
                self.connection.send(message)
            else:
                self.connection.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        except OSError as error:
            raise killed(self._what) from error

    def receive(self, flags: int = 0) -> Any:
        """The child's next message. IOFailed if it is gone; BlockingIOError if there is none, where ``flags`` says not
        to wait.
        """
        try:
            message = self.connection.recv(MAX_MESSAGE, flags)
        except BlockingIOError:
            raise
        except OSError:
            message = b""
        if not message:
            raise killed(self._what)
        return json.loads(message)

    def close(self, grace: float = 0.0) -> None:
        """End the child and reap it; does nothing if that was done. The end of the connection asks it to go, and it is
        killed if it does not within ``grace`` seconds.
        """
        if not self.pid:
            return
        pid, self.pid = self.pid, 0
        # Shut down, because others may hold this end open, such as children that were forked later.
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()
        deadline = time.monotonic() + grace
        with contextlib.suppress(ChildProcessError):
            while time.monotonic() < deadline:
                if os.waitpid(pid, os.WNOHANG)[0]:
                    return
                time.sleep(0.002)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def tell(connection: socket.socket, value: Any) -> None:
    """Send a message from the child."""
    connection.send(json.dumps(value).encode())


class Hear(Protocol):
    """Returns the next value that a task was told. With the fd ``beside`` it returns None as soon as there is something
    to be read from that, unless there is such a value.
    """

    def __call__(self, beside: int = -1) -> Any: ...


class Task:
    """Work in a child while the parent does other things: ``tell`` it what it waits for, then take its ``result``.

    ``function`` gets a function of type Hear, and returns a value that fits into a small JSON document; ``what`` is
    what the child does, such as ``makes the EROFS image``. ``leave`` runs first in the child, which lets go there of
    what it must not keep open. Call ``close`` whatever happens.
    """

    def __init__(self, what: str, function: Callable[[Hear], Any], leave: Callable[[], None] = lambda: None) -> None:
        def work(connection: socket.socket) -> None:
            def hear(beside: int = -1) -> Any:
                if beside >= 0:
                    poll = select.poll()
                    poll.register(connection, select.POLLIN)
                    poll.register(beside, select.POLLIN)
                    if connection.fileno() not in dict(poll.poll()):
                        return None
                message = connection.recv(MAX_MESSAGE)
                if not message:
                    os._exit(0)  # nobody waits for the result any more
                return json.loads(message)

            try:
                answer = {"value": function(hear)}
            except BaseException as error:
                answer = {"error": to_values(explain(error, f"The process that {what}"))}
            tell(connection, answer)
            # What it was told and did not hear would make the kernel throw the answer away as soon as this end is gone.
            while connection.recv(MAX_MESSAGE):
                pass

        self._child = Child(what, work, leave)

    def tell(self, value: Any) -> None:
        """Send ``value`` to the child. If the child has ended already, ``result`` says so."""
        with contextlib.suppress(IOFailed):
            self._child.send(value)

    def result(self) -> Any:
        """Wait for the child's value. Engine errors come through; IOFailed if it was killed."""
        try:
            answer = self._child.receive()
        finally:
            self.close()
        if "error" in answer:
            raise from_values(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """End the child and reap it; does nothing if that was done."""
        self._child.close()


def call(what: str, function: Callable[[], Any]) -> Any:
    """Run ``function`` in a child and return its value, which must fit into a small JSON document. Engine errors come
    through; ``what`` is what the child does, such as ``makes the EROFS image``.
    """
    return Task(what, lambda _hear: function()).result()
