# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A dead man's switch: a command that this host runs after some seconds, even if the process that asked for it is gone.

Where systemd is in charge it is a timer of systemd; elsewhere it is a detached shell, which outlives the end of the
connection. Neither survives a reboot, and neither has to: what is on trial does not survive one either. Both count by
the monotonic clock.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence

from ..errors import IOFailed, from_os_error
from .commands import Run

# What the waiting shell runs; its fourth word, after the name, tells it from every other process.
_SCRIPT = 'sleep "$1"; shift; exec "$@"'
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arm(name: str, seconds: int, command: Sequence[str], run: Run, systemd: bool) -> None:
    """Run ``command`` in ``seconds`` seconds. ``name`` is that of the timer's unit, without an ending; a timer of this
    name that waits already is replaced. IOFailed if no timer can be set.
    """
    if not systemd:
        _detach(name, seconds, command)
        return
    run(["systemctl", "--no-ask-password", "stop", f"{name}.timer"])
    run(["systemctl", "--no-ask-password", "reset-failed", f"{name}.timer", f"{name}.service"])
    options = [f"--on-active={seconds}", "--timer-property=AccuracySec=1s", f"--unit={name}", "--property=Type=exec"]
    status, _output, errors = run(["systemd-run", "--quiet", "--collect", *options, "--", *command])
    if status:
        raise IOFailed(
            f"No timer could be set that takes the new version back: systemd-run failed with {errors.strip()!r}.",
            "Look at the journal of the host. Nothing was changed.",
        )


def disarm(name: str, run: Run, systemd: bool) -> None:
    """Cancel the command of this name. One that runs already is left alone, and failures are ignored: the command has
    to find out by itself that it is not wanted any more.
    """
    if systemd:
        run(["systemctl", "--no-ask-password", "stop", f"{name}.timer"])
        return
    for group in waiting(name):
        with contextlib.suppress(OSError):
            # The shell and its sleep; nothing else is in their group, which was made for them.
            os.killpg(group, signal.SIGTERM)


def waiting(name: str) -> set[int]:
    """The process groups of detached shells that wait to run the command of this name.

    A group is listed once although two of its processes may match: between its fork and the start of sleep, the shell's
    child has the command line of the shell.
    """
    found = set()
    marks = [b"-c", os.fsencode(_SCRIPT), os.fsencode(name)]
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/cmdline", "rb") as file:
                if file.read(65536).split(b"\0")[1:4] == marks:
                    found.add(os.getpgid(int(entry)))
    return found


def _detach(name: str, seconds: int, command: Sequence[str]) -> None:
    """Start the waiting shell as a process of its own session that holds nothing of this one."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                os.chdir("/")
                null = os.open(os.devnull, os.O_RDWR)
                for fd in (0, 1, 2):
                    os.dup2(null, fd)
                # Whoever started this process may wait until all that it has open is closed.
                for fd in [int(entry) for entry in os.listdir("/proc/self/fd")]:
                    if fd > 2 and fd != writer:
                        with contextlib.suppress(OSError):
                            os.close(fd)
                words = ["sh", "-c", _SCRIPT, name, str(seconds), *command]
                # The start of the shell closes the pipe. If nothing was written into it by then, all is well.
                os.execve("/bin/sh", words, {"PATH": _PATH})
        except OSError as error:
            os.write(writer, str(error.errno or 0).encode())
        finally:
            os._exit(0)
    os.close(writer)
    try:
        os.waitpid(pid, 0)
        said = os.read(reader, 16)
    finally:
        os.close(reader)
    if said:
        raise from_os_error(OSError(int(said), os.strerror(int(said))), "Starting the shell that takes changes back")
