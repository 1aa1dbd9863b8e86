# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A long task that somebody watches, and that ends when nobody does any more.

The watcher (the action plugin on the controller) and the task meet in a directory, which is named after a token of the
watcher's. The task becomes a *job*: a child that outlives the command that started it, so that a connection may break
and come back. The watcher touches ``sign`` at every look, reads ``progress``, and writes ``stop`` to end the job. The
job puts its output into ``result`` when it is done.

Why the parent leaves by ``_exit`` and the child does not: Ansible unpacks a module into a temporary directory, from
which the engine still imports rooms late, and removes it when the module's stack unwinds. So the one who works last
unwinds the stack.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from . import files
from ..errors import EngineError, FormatError, InvalidOption
from ..progress import PLANNED, Event

# The directory of a watched task lies here; a user without a home has it, too.
PLACE = "/tmp"
PREFIX = "composefs-oci-"
# In it, the result before it is whole.
ASIDE = "result.new"
# Variables of the environment by which the action plugin tells the module the token of a task that it wants to watch,
# or the directory of a job whose result it wants.
WATCH, COLLECT = "COMPOSEFS_OCI_WATCH", "COMPOSEFS_OCI_COLLECT"
# And by which it tells where copies of the controller's archives are: a JSON object of paths there and paths here.
PLACES = "COMPOSEFS_OCI_PLACES"
# Seconds between two looks at what the watcher says.
LOOK = 0.5
# A watcher that was silent for longer than FRESH seconds may be gone: nothing gets a name. One that was silent for
# longer than PATIENCE seconds is gone, and the job ends.
FRESH = 15.0
PATIENCE = 120.0
# How long a task may run within the command that started it. One that finds nothing to do ends within that time, and
# being watched costs it nothing. Fetching a small image is over in SHORT seconds, looking a reference up in LONG ones.
SHORT, LONG = 1.0, 10.0
# Bytes that are kept for a result: enough for that of an image with as many labels and annotations as are returned.
ROOM = 1 << 20
# How long an interrupted job may take to clean up before it is ended in the middle of that.
GRACE = 10.0
# What a job says to the command that started it, and what that answers.
BUSY, READY, TAKEN = b"b", b"r", b"t"
LASTING, ALONE = b"l", b"a"

Clock = Callable[[], float]


class Interrupted(BaseException):
    """The task shall end now. No EngineError, so that nobody who handles those goes on."""


def directory_of(token: str) -> str:
    """Where a watcher and its job meet. Raises InvalidOption if ``token`` is not 32 hexadecimal digits."""
    if len(token) != 32 or not set(token) <= set("0123456789abcdef"):
        raise InvalidOption(
            "The token of a watched task is malformed.", "The action plugin makes it; leave it to that."
        )
    return os.path.join(PLACE, PREFIX + token)


def _unheard() -> bool:
    """Whether nobody reads any more what this process says."""
    poll = select.poll()
    poll.register(1, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _fd, event in poll.poll(0))


class Life:
    """Whether anybody still waits for this task. This class is for a task that nobody watches from afar.

    Such a task is over when nobody reads its output any more: an interrupted playbook closes the pipe, while the module
    itself gets no signal.
    """

    progress_file: str | None = None

    def __init__(self) -> None:
        self.ended = False

    def busy(self) -> None:
        """Called when there is something to fetch."""

    def permit(self) -> None:
        """Called before anything gets a name: returns if it may, waits while that is not known, raises Interrupted."""
        self.look()

    def look(self) -> None:
        """Raise Interrupted, once, if the task shall end."""
        if not self.ended and self.over():
            self.ended = True
            raise Interrupted

    def over(self) -> bool:
        """Whether nobody waits for this task any more."""
        return _unheard()


class Job(Life):
    """A task whose watcher may come and go."""

    def __init__(self, directory: str, parent: socket.socket, clock: Clock = time.monotonic) -> None:
        super().__init__()
        self.directory = directory
        self.progress_file = os.path.join(directory, "progress")
        self._parent = parent
        self._clock = clock
        self._seen: tuple[int, int] | None = None
        self._heard = clock()

    def busy(self) -> None:
        with contextlib.suppress(OSError):
            self._parent.send(BUSY)

    def silence(self) -> float:
        """Seconds since the watcher's last sign."""
        # By the clock of this process, for the host's may be set while a pull runs: only that the time stamp changed
        # matters.
        try:
            found = os.stat(os.path.join(self.directory, "sign"))
        except OSError:
            return self._clock() - self._heard
        if (found.st_ino, found.st_mtime_ns) != self._seen:
            self._seen = (found.st_ino, found.st_mtime_ns)
            self._heard = self._clock()
        return self._clock() - self._heard

    def permit(self) -> None:
        while True:
            self.look()
            if self.silence() < FRESH:
                return
            time.sleep(LOOK)

    def over(self) -> bool:
        return (
            os.path.exists(os.path.join(self.directory, "stop"))
            or not os.path.isdir(self.directory)
            or self.silence() > PATIENCE
        )


class Announcer:
    """A sink of progress that tells ``life`` when there is something to fetch."""

    def __init__(self, life: Life) -> None:
        self._life = life

    def event(self, event: Event) -> None:
        if event.kind == PLANNED:
            self._life.busy()

    def close(self) -> None:
        pass


@contextlib.contextmanager
def interruptible(life: Life) -> Iterator[None]:
    """Let ``life`` end what runs within the ``with``, by raising Interrupted in the main thread."""
    deadline: list[float] = []

    # A timer and not a thread: workers are forked meanwhile, and a fork must not find a thread that holds a lock.
    # Forked children inherit no timer.
    def alarm(number: int, frame: FrameType | None) -> None:
        if life.ended and not deadline:
            deadline.append(time.monotonic() + GRACE)
        if deadline and time.monotonic() > deadline[0]:
            os._exit(1)  # children die with this process, by their death signal
        life.look()

    old = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def run(token: str, main: Callable[[Life], None]) -> None:
    """Call ``main``, which ends in SystemExit: as a job that the owner of ``token`` watches, or, without one, plainly.

    Where the directory to meet in cannot be made, or has no room for a result, the task runs plainly, too: that it can
    be watched is an extra. Raises InvalidOption for a token that is malformed.
    """
    directory = _meeting_place(token) if token else ""
    if directory:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pid = os.fork()
        if pid:
            theirs.close()
            _stay(pid, ours, directory)
        ours.close()
        _work(directory, theirs, main)
        return
    life = Life()
    try:
        with interruptible(life):
            main(life)
    except Interrupted:
        raise SystemExit(1) from None


def _meeting_place(token: str) -> str:
    directory = directory_of(token)
    try:
        os.mkdir(directory, 0o700)
    except OSError:
        return ""
    try:
        # The result gets its room now, and keeps it: a place that is full, or that fills meanwhile, must not lose what
        # was done.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        room = os.open(os.path.join(directory, ASIDE), flags, 0o600)
        try:
            os.posix_fallocate(room, 0, ROOM)
        finally:
            os.close(room)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            shutil.rmtree(directory, ignore_errors=True)
            return ""
    return directory


def _stay(pid: int, job: socket.socket, directory: str) -> NoReturn:
    """What the parent does: wait for a short job and pass its result on, or say where a long one is."""
    code = 1
    try:
        word = _first_word(job)
        if word == READY:
            job.settimeout(None)
            job.send(TAKEN)
            _copy(os.path.join(directory, "result"))
            job.close()
            code = _exit_code(os.waitpid(pid, 0)[1])
        elif word == LASTING and _told(json.dumps({"changed": False, "composefs_job": directory}).encode() + b"\n"):
            code = 0
        elif word:
            with open(os.path.join(directory, "stop"), "xb"):
                pass
        else:
            # The job died without a word, so this process has nothing to say either.
            os.waitpid(pid, 0)
            shutil.rmtree(directory, ignore_errors=True)
    finally:
        os._exit(code)


def _first_word(job: socket.socket) -> bytes:
    """READY, LASTING when the time of a short task is up, or nothing if the job is gone. ALONE if nobody reads what
    this command says: a playbook that is interrupted before there was a directory could tell no job to stop.
    """
    end = time.monotonic() + LONG
    while True:
        left = end - time.monotonic()
        job.settimeout(max(min(left, LOOK), 0.001))
        try:
            word = job.recv(1)
        except socket.timeout:
            if _unheard():
                return ALONE
            if left > LOOK:
                continue
            return LASTING
        if word != BUSY:
            return word
        end = min(end, time.monotonic() + SHORT)


def _exit_code(status: int) -> int:
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1


def _told(data: bytes) -> bool:
    """Write ``data`` to standard output; False if nobody reads it."""
    try:
        _write(data)
    except BrokenPipeError:
        return False
    return True


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(1, data) :]


def _copy(path: str) -> None:
    with open(path, "rb") as file:
        _write(file.read())


def _work(directory: str, parent: socket.socket, main: Callable[[Life], None]) -> None:
    """What the child does: the task itself, whose output goes into a file."""
    job = Job(directory, parent)
    try:
        # A session of its own: neither the end of a terminal nor that of a command of sudo reaches it.
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # This is no draft of host/files: it is the standard output of the task, which prints into it as it likes, and
        # it is whole when the task ends. Nobody else can write to the directory, and nothing in it survives a crash.
        aside = os.path.join(directory, ASIDE)
        _redirect(aside)
        try:
            with interruptible(job):
                main(job)
        except SystemExit:
            sys.stdout.flush()
            os.ftruncate(1, os.lseek(1, 0, os.SEEK_CUR))
            os.rename(aside, os.path.join(directory, "result"))
            _hand_over(job, parent)
            raise
    except Interrupted:
        raise SystemExit(1) from None
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _redirect(path: str) -> None:
    """Read from nowhere, write standard output into the file at ``path``, and errors nowhere."""
    null = os.open(os.devnull, os.O_RDWR)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    for fd, number in ((null, 0), (output, 1), (null, 2)):
        os.dup2(fd, number)
    for fd in (null, output):
        if fd > 2:
            os.close(fd)


def _hand_over(job: Job, parent: socket.socket) -> None:
    """Wait until somebody has taken the result: the parent if it is still there, else the watcher, who removes the
    directory.
    """
    with contextlib.suppress(OSError):
        parent.send(READY)
        if parent.recv(1) == TAKEN:
            parent.recv(1)  # the end: it has read
            return
    while not job.over():
        time.sleep(0.1)


def collect(directory: str) -> NoReturn:
    """Give the output of a finished job as that of this process, and forget the job. Raises EngineError if it is
    gone: when the job has removed its directory, anybody can make another one of that name.
    """
    parent, name = os.path.split(directory)
    if parent != PLACE or not name.startswith(PREFIX):
        raise InvalidOption(
            f"{directory} is not the directory of a job.", "The action plugin names it; leave it to that."
        )
    try:
        with files.opened_directory(PLACE) as place:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            own = os.open(name, flags, dir_fd=place)
        try:
            if os.fstat(own).st_uid != os.geteuid():
                raise FileNotFoundError
            result = files.open_regular(own, "result")
        finally:
            os.close(own)
    except (OSError, FormatError) as error:
        raise EngineError(
            "The job that pulled ended without a result.",
            "If the host was not restarted, look at its log, and run the task again.",
        ) from error
    with os.fdopen(result, "rb") as file:
        _write(file.read())
    shutil.rmtree(directory, ignore_errors=True)
    os._exit(0)
