# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Running skopeo: its command line, its credentials and its process. ``skopeowords`` knows what its
words mean.

Secrets go to skopeo in a file without a name, never in arguments or the environment, and are taken out of whatever it
says. The process dies with us and is always reaped. There are no threads in here, so a caller may fork at any time.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from ..errors import (
    AuthFailed,
    DigestMismatch,
    InvalidDocument,
    PolicyRejected,
    ProxyFailed,
    SkopeoMissing,
    Stalled,
    TlsFailed,
    from_os_error,
)
from ..formats.digests import digest_of
from ..formats.ocidocuments import MAX_MANIFEST
from ..formats.reference import Reference
from ..host import processes
from .options import ProxyOptions
from .skopeowords import INSTALL, NOT_SKOPEO, classify, unwrap_log


_MAX_LOG = 256 * 1024
# Errors of a host without room for another process, although the program is there.
_EXHAUSTION = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


# -- one process


class Child:
    """A skopeo process: dies with us, is killed with all its children, is reaped, and its first words on stderr are
    kept.
    """

    def __init__(
        self, argv: Sequence[str], stdin: int, stdout: int, fds: Sequence[int], tmpdir: str | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._log = _log_file()
        try:
            self.process = subprocess.Popen(
                argv,
                stdin=stdin,
                stdout=stdout,
                stderr=self._log,
                pass_fds=fds,
                start_new_session=True,
                preexec_fn=_die_with_parent(),
                env={**os.environ, "TMPDIR": tmpdir} if tmpdir else None,
            )
        except FileNotFoundError as error:
            os.close(self._log)
            raise SkopeoMissing(
                f"There is no {argv[0]!r} on this host.",
                INSTALL if argv[0] != "podman" else "Without root, containers-storage is read through podman.",
            ) from error
        except (OSError, subprocess.SubprocessError, ValueError) as error:
            os.close(self._log)
            if isinstance(error, OSError) and error.errno in _EXHAUSTION:
                raise from_os_error(error, f"Starting {argv[0]!r}") from error
            raise SkopeoMissing(
                f"Cannot start {argv[0]!r}: {getattr(error, 'strerror', None) or error}.", INSTALL
            ) from error

    def kill(self) -> None:
        """Kill the process and what it started, then reap it. May be called from any thread, any number of times."""
        with self._lock:
            # Its number cannot be given to another process or group before it is reaped here.
            if self.process.returncode is None:
                with contextlib.suppress(OSError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(5.0)

    def output(self, limit: int, deadline: float, what: str) -> bytes:
        """All of stdout, at most ``limit`` bytes. Raises Stalled if it does not end before the deadline,
        InvalidDocument if it is longer.
        """
        pipe = self.process.stdout
        if pipe is None:
            raise AssertionError("this must hold: pipe is not None")
        data = bytearray()
        while len(data) <= limit:
            if not readable(pipe.fileno(), deadline):
                self.kill()
                raise Stalled(
                    "skopeo gave no answer in time.",
                    "Check the network and the registry, or raise the option timeout.",
                    doing=what,
                )
            piece = os.read(pipe.fileno(), min(65536, limit + 1 - len(data)))
            if not piece:
                return bytes(data)
            data += piece
        self.kill()
        raise InvalidDocument(f"The answer has more than {limit} bytes.", doing=what)

    def wait(self, seconds: float) -> int | None:
        """The exit status (negative: a signal), or None if it has not ended after ``seconds``."""
        deadline = time.monotonic() + seconds
        pause = 0.0005
        while True:
            with self._lock:
                if self.process.poll() is not None:
                    return self.process.returncode
            if time.monotonic() > deadline:
                return None
            time.sleep(pause)
            pause = min(pause * 2, 0.02)

    def words(self) -> str:
        """What it said on stderr, without the decoration of its logger."""
        with contextlib.suppress(OSError, ValueError):
            return unwrap_log(os.pread(self._log, _MAX_LOG, 0))
        return ""

    def close(self) -> None:
        self.kill()
        self.abandon()

    def abandon(self) -> None:
        if self.process.stdout is not None:
            self.process.stdout.close()
        log, self._log = self._log, -1
        if log >= 0:
            os.close(log)


class Scratch:
    """A directory for what skopeo unpacks. It is removed with its content, whichever process dies first.

    skopeo itself leaves its temporary files behind when it is killed, and versions before 1.14 also when it is not. So
    it gets a directory of its own, ``path``, below ``base`` (by default where TMPDIR says, or /var/tmp: it must have
    room for the image). Beside it a shell waits for the end of a pipe: if this process is killed before it can clean
    up, the shell does that.
    """

    def __init__(self, base: str | None = None) -> None:
        place = base or os.environ.get("TMPDIR") or "/var/tmp"
        try:
            self.path = tempfile.mkdtemp(prefix="composefs-oci-", dir=place)
        except OSError as error:
            raise from_os_error(error, f"Making a directory for temporary files in {place}") from error
        self._shell: subprocess.Popen[bytes] | None = None
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", 'cat > /dev/null; rm -rf -- "$1"', "composefs-oci", self.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                cwd="/",
            )

    def close(self) -> None:
        """Remove the directory. Call it when skopeo has ended."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.abandon()
        shell, self._shell = self._shell, None
        if shell is not None:
            # A process that was forked meanwhile may still hold the pipe.
            if os.path.lexists(self.path):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    shell.wait(5.0)
            shell.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                shell.wait(5.0)

    def abandon(self) -> None:
        """For a forked process: let go of the pipe."""
        if self._shell is not None and self._shell.stdin is not None:
            self._shell.stdin.close()


def _unnamed_file(name: str, flags: int = 0) -> int:
    """A file that no directory knows, so that nothing remains of it whatever happens; readable by its
    owner only.
    """
    try:
        fd = os.memfd_create(name, 1 | flags)  # MFD_CLOEXEC
    except (OSError, AttributeError):
        with tempfile.TemporaryFile(buffering=0) as file:
            fd = os.dup(file.fileno())
    os.fchmod(fd, 0o600)
    return fd


def _log_file() -> int:
    """A file for stderr: no thread has to read from it, and it cannot grow, so no chatter fills the memory."""
    fd = _unnamed_file("skopeo-stderr", 2)  # MFD_ALLOW_SEALING
    with contextlib.suppress(OSError):
        os.truncate(fd, _MAX_LOG)
        fcntl.fcntl(fd, 1033, 0x0004)  # F_ADD_SEALS, F_SEAL_GROW: a write beyond the size fails, and skopeo goes on
    return fd


def _die_with_parent() -> Callable[[], None] | None:
    """A function to run between fork and exec that has the kernel kill the process when the thread that started it
    ends; None where that is impossible: then skopeo ends when its connections do.

    Why this is sound although it runs in a fork of a process that may have threads: everything it needs is looked up
    before the fork. What remains is what death_signal() says and one call of getppid: no import, no lock of ours, and
    the allocator is usable since the C library takes its locks around fork. Signal and parent are checked in this order
    so that there is no gap: if the parent died before the signal was asked for, getppid tells; if after, the kernel
    does. ``podman unshare`` gets the signal itself, its skopeo then sees the connection close; ``kill`` reaches both
    since they share a process group.
    """
    tie = processes.death_signal()
    if tie is None:
        return None
    parent = os.getpid()
    bound, getppid, leave = tie, os.getppid, os._exit

    def run() -> None:
        bound()
        if getppid() != parent:
            leave(127)

    return run


@contextlib.contextmanager
def command(
    options: ProxyOptions, reference: Reference, verb: Sequence[str], last: Sequence[str], side: str = ""
) -> Iterator[tuple[list[str], list[int]]]:
    """The arguments for skopeo and the fds that it must inherit, which are ours only until it has started.

    ``side`` goes before the options that say how ``reference`` is reached, for verbs that have two (``dest-``).
    """
    argv = list(options.executable)
    if reference.transport == "containers-storage" and os.geteuid() != 0 and len(argv) == 1:
        # Without root the storage is in a user namespace, which skopeo does not enter by itself.
        argv = ["podman", "unshare", *argv]
    if options.policy:
        if not os.access(options.policy, os.R_OK):
            raise PolicyRejected(
                f"The signature policy {options.policy} does not exist or cannot be read.",
                "Name a file as containers-policy.json(5) says.",
            )
        argv += ["--policy", options.policy]
    if options.insecure_policy:
        argv.append("--insecure-policy")
    if options.tmpdir:
        argv += ["--tmpdir", options.tmpdir]
    if options.platform is not None:
        argv += ["--override-os", options.platform.os, "--override-arch", options.platform.architecture]
        if options.platform.variant:
            argv += ["--override-variant", options.platform.variant]
    argv += verb
    if options.tls_verify is not None:
        argv.append(f"--{side}tls-verify={'true' if options.tls_verify else 'false'}")
    if options.cert_dir:
        if not os.path.isdir(options.cert_dir):
            raise TlsFailed(
                f"The certificate directory {options.cert_dir} does not exist.", "Name a directory with *.crt files."
            )
        argv += [f"--{side}cert-dir", options.cert_dir]
    fds: list[int] = []
    with contextlib.ExitStack() as stack:
        if options.auth_file:
            if options.username or options.password:
                raise AuthFailed(
                    "Both an authentication file and a user name or password are given.", "Use one of them."
                )
            if not os.access(options.auth_file, os.R_OK):
                raise AuthFailed(
                    f"The authentication file {options.auth_file} does not exist or cannot be read.",
                    "Name a file as skopeo login or podman login write it.",
                )
            argv += [f"--{side}authfile", options.auth_file]
        elif options.username or options.password:
            if not options.username or not options.password or ":" in options.username:
                raise AuthFailed(
                    "The user name or the password is empty, or the name has a colon.", "Give both or none."
                )
            if reference.is_remote:
                fd = _auth_file(options.username, options.password, reference.registry)
                stack.callback(os.close, fd)
                fds.append(fd)
                argv += [f"--{side}authfile", f"/proc/self/fd/{fd}"]
        yield argv + list(last), fds


def _auth_file(username: str, password: str, registry: str) -> int:
    """A file with the credentials for one registry (containers-auth.json(5))."""
    token = base64.b64encode(f"{username}:{password}".encode("utf-8", "surrogateescape")).decode()
    fd = _unnamed_file("auth")
    os.write(fd, json.dumps({"auths": {registry: {"auth": token}}}).encode())
    return fd


def readable(fd: int, deadline: float) -> bool:
    """Wait until there is something to read (an end counts too); False if the deadline passes first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))


def skopeo_version(executable: Sequence[str] = ("skopeo",), timeout: float = 20.0) -> str:
    """The version of skopeo, for example ``1.9.3``. Raises SkopeoMissing, Stalled, ProxyFailed."""
    child = Child([*executable, "--version"], subprocess.DEVNULL, subprocess.PIPE, ())
    try:
        output = child.output(65536, time.monotonic() + timeout, "Asking skopeo for its version").decode(
            "utf-8", "replace"
        )
    finally:
        child.close()
    match = re.search(r"skopeo version v?(\d+(?:\.\d+)*\S{0,40})", output)
    if match is None:
        raise ProxyFailed(f"{executable[0]!r} does not tell its version as skopeo does: {output!r:.100}.", INSTALL)
    return match.group(1)


def top_digest(options: ProxyOptions, reference: Reference) -> tuple[str, bytes]:
    """``sha256:<hex>`` and the bytes of the topmost manifest or index that the reference means.

    The proxy tells the digest of the platform's manifest only, so this is another skopeo, ``inspect --raw``, with the
    same credentials. It costs a process and one or two requests to the registry. If the reference has a digest, the
    bytes are proved against it; DigestMismatch if they are others.
    """
    what = f"Opening {reference.text}"
    with command(options, reference, ("inspect", "--raw"), ("--", reference.text)) as (argv, fds):
        child = Child(argv, subprocess.DEVNULL, subprocess.PIPE, fds)
    try:
        raw = child.output(MAX_MANIFEST, time.monotonic() + options.timeout, what)
        status = child.wait(options.timeout)
        if status != 0:
            # skopeo repeats the reference, which the message names anyway.
            raise classify(
                options,
                what,
                re.sub(r'\AError parsing image name "[^"]*": ', "", child.words()),
                None,
                reference.transport,
            )
    finally:
        child.close()
    if not raw:
        raise ProxyFailed("skopeo ended well and gave no manifest.", NOT_SKOPEO, doing=what)
    found = digest_of(raw)
    if reference.digest not in ("", found):
        raise DigestMismatch(
            f"{what}: the registry answers with {found} instead.",
            "The registry or something on the way to it is damaged or lies.",
        )
    return found, raw
