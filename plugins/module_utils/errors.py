# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The one family of errors that leaves the engine.

Every error says what was being done to what, and what the user can do; its class carries a ``code`` that modules return
and that playbooks may rely on: codes are never renamed. What an error knows is in fields, so nobody has to search its
words; to_values() and from_values() carry it whole from one process to another.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping
from typing import Any

from .text import printable

# What an error quotes may come from an image, and a message between processes is bounded.
_MAX_TEXT = 4096


class EngineError(Exception):
    """Base of all engine errors.

    ``message`` is what went wrong, ``hint`` what the user can do, ``doing`` what was being done to what (outermost
    first, separated by colons), ``said`` the words of the other side, such as skopeo or a registry, without secrets.
    All but ``message`` may be empty. ``passing`` tells whether the same may succeed a little later. ``attempts`` is how
    often it was tried within ``seconds``, 0 where nobody counts.
    """

    code = "failed"
    passing = False

    def __init__(
        self, message: str, hint: str = "", *, doing: str = "", said: str = "", passing: bool | None = None
    ) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint
        self.doing = doing
        self.said = said
        self.attempts = 0
        self.seconds = 0.0
        if passing is not None:
            self.passing = passing

    @property
    def text(self) -> str:
        """What happened, in one line, without the hint."""
        found = f"{self.doing}: {self.message}" if self.doing else self.message
        if self.attempts > 1:
            found += f" It was tried {self.attempts} times in {self.seconds:.0f} s."
        return found

    def __str__(self) -> str:
        return f"{self.text} {self.hint}" if self.hint else self.text

    def within(self, what: str) -> None:
        """Add that it happened while ``what`` was being done (a phrase such as ``importing layer sha256:…``), unless
        that is said already.
        """
        if self.doing == what or self.doing.startswith(f"{what}: "):
            return
        self.doing = f"{what}: {self.doing}" if self.doing else what


class InvalidReference(EngineError):
    """The image reference or name cannot be understood."""

    code = "invalid_reference"


class InvalidPlatform(EngineError):
    """The platform asked for cannot be parsed."""

    code = "invalid_platform"


class InvalidOption(EngineError):
    """An option has a value that is out of range, or that does not fit the others."""

    code = "invalid_option"


class InvalidMountOption(EngineError):
    """A mount option that nobody knows, or that contradicts another option."""

    code = "invalid_mount_option"


class ImageNotFound(EngineError):
    """No such image, tag or blob."""

    code = "image_not_found"


class PlatformNotFound(EngineError):
    """The image exists, but not for the platform asked for."""

    code = "platform_not_found"


class AuthFailed(EngineError):
    """The registry refused the credentials, or wants some."""

    code = "auth_failed"


class TlsFailed(EngineError):
    """The registry's certificate was not accepted, or it does not speak TLS."""

    code = "tls_failed"


class RegistryUnreachable(EngineError):
    """The source could not be reached or answered with a passing fault; trying again later may help."""

    code = "registry_unreachable"
    passing = True


class PolicyRejected(EngineError):
    """The signature policy does not allow the image, or could not be enforced."""

    code = "policy_rejected"


class ProxyFailed(EngineError):
    """skopeo failed in a way that has no code of its own; its words are in the message."""

    code = "proxy_failed"


class SkopeoMissing(EngineError):
    """There is no usable skopeo on the host."""

    code = "skopeo_missing"


class SkopeoTooOld(EngineError):
    """skopeo is there, but older than what is asked for needs."""

    code = "skopeo_too_old"


class Stalled(EngineError):
    """A transfer stayed silent for longer than the timeout."""

    code = "stalled"
    passing = True


class DigestMismatch(EngineError):
    """Bytes do not have the digest (or size) they were announced with: they are damaged."""

    code = "digest_mismatch"


class UnexpectedDigest(EngineError):
    """The reference means another image than the digest that was asked for; nothing is damaged."""

    code = "unexpected_digest"


class InvalidDocument(EngineError):
    """A manifest, index or configuration is malformed or out of bounds."""

    code = "invalid_document"


class InvalidLayer(EngineError):
    """A layer is not a tar archive that can be stored, or is damaged."""

    code = "invalid_layer"


class NotBootable(EngineError):
    """The image is no bootable one: it has no ``/boot`` or no ``/sysroot``."""

    code = "not_bootable"


class UnsupportedMediaType(EngineError):
    """A media type or digest algorithm that the engine cannot handle."""

    code = "unsupported_media_type"


class MissingLibrary(EngineError):
    """A Python library that this image or repository needs is not installed on the host."""

    code = "missing_library"


class NotARepository(EngineError):
    """There is no composefs repository at the path."""

    code = "not_a_repository"


class IncompatibleRepository(EngineError):
    """The repository needs features that this engine does not know, or is configured otherwise than asked."""

    code = "incompatible_repository"


class UnsafeRepository(EngineError):
    """Somebody who is not trusted could change the repository, or the path to it."""

    code = "unsafe_repository"


class FormatError(EngineError):
    """A repository file (splitstream, image, link, meta.json) is damaged."""

    code = "repository_damaged"


class VerityUnsupported(EngineError):
    """The file system, the kernel or the repository has no fs-verity where it is asked for."""

    code = "verity_unsupported"


class NoSpace(EngineError):
    """Not enough free bytes or inodes."""

    code = "no_space"


class TooLarge(EngineError):
    """The image is larger, or has more entries, than the task allows."""

    code = "too_large"


class LimitReached(EngineError):
    """The process may have no more threads, processes, open files or memory."""

    code = "limit_reached"


class ReadOnly(EngineError):
    """What has to be written lies on a file system that is mounted read-only."""

    code = "read_only"


class PermissionDenied(EngineError):
    """The user lacks a right or a capability."""

    code = "permission_denied"


class IOFailed(EngineError):
    """The operating system reported an error that has no code of its own."""

    code = "io_error"


class Busy(EngineError):
    """Something else uses the target."""

    code = "busy"


class MountFailed(EngineError):
    """A mount, or the unit that brings it back at boot, cannot be made or changed."""

    code = "mount_failed"


class Reverted(EngineError):
    """A deployment was not confirmed in time, or did not hold, and what was there before is back."""

    code = "reverted"


class IncompatibleJournal(EngineError):
    """The journal of a mount was written by a newer version, or cannot be read."""

    code = "incompatible_journal"


class OutOfMemory(EngineError):
    """The host has not enough memory for the task."""

    code = "out_of_memory"


# Errors that say nothing about what was being looked at: this process could not look.
OF_THIS_PROCESS = (LimitReached, OutOfMemory, MissingLibrary)


class InternalError(EngineError):
    """A defect of the collection."""

    code = "internal_error"


_BY_ERRNO: dict[int, tuple[type[EngineError], str]] = {
    errno.ENOSPC: (NoSpace, "Free space or inodes on that file system and run again; what is whole is kept."),
    errno.EDQUOT: (NoSpace, "Raise the quota or free space and run again; what is whole is kept."),
    errno.EFBIG: (NoSpace, "Raise the file size limit of the process and run again; what is whole is kept."),
    errno.EROFS: (ReadOnly, "Remount the file system read-write, or choose another repository."),
    errno.EACCES: (PermissionDenied, "Run as a user that may do this, for example with become."),
    errno.EPERM: (PermissionDenied, "Run as a user that may do this, for example with become."),
}


FILES, PROCESSES, MEMORY = "files", "processes", "memory"
# What cannot be had because a limit is reached, whatever was being done then. EAGAIN comes from making processes:
# code that reads without waiting handles its own EAGAIN.
_EXHAUSTED = {
    errno.EMFILE: FILES,
    errno.ENFILE: FILES,
    errno.EAGAIN: PROCESSES,
    errno.ENOMEM: MEMORY,
}
_NO_THREAD = "can't start new thread"
# What a thread's stack takes of the address space where nothing else was chosen.
_STACK = 8 << 20


def exhausted(what: str, doing: str = "") -> EngineError:
    """The error for a limit that was reached: of ``files`` that are open, ``processes`` (threads count as such) or
    ``memory``. It names the limits that hold for this process with their values, and how to raise them.
    """
    import resource  # late: nearly no run needs it

    known = {
        FILES: (
            ("RLIMIT_NOFILE", "RLIMIT_NOFILE", 1),
            "open no more files",
            "Raise the limit (ulimit -n of the user, LimitNOFILE= of the unit; fs.file-max for the whole host), or "
            "lower 'parallel' if the task has it.",
        ),
        PROCESSES: (
            ("RLIMIT_NPROC", "RLIMIT_NPROC", 1),
            "start no more processes or threads",
            "Raise the limit (ulimit -u of the user, TasksMax= of the unit, pids.max of the container), or lower "
            "'parallel' if the task has it.",
        ),
        MEMORY: (
            ("RLIMIT_AS", "RLIMIT_AS", 1 << 20),
            "have no more memory",
            "Raise the limit (ulimit -v of the user, MemoryMax= of the unit or the container), or lower 'parallel' if "
            "the task has it.",
        ),
    }
    (name, key, unit), verb, hint = known[what]
    limits = []
    soft = resource.getrlimit(getattr(resource, key))[0]
    if soft != resource.RLIM_INFINITY:
        limits.append(f"{name} is {soft // unit}{' MiB' if unit > 1 else ''}")
    group = {PROCESSES: "pids.max", MEMORY: "memory.max"}.get(what)
    value = _of_control_group(group) if group else ""
    if value:
        limits.append(f"{group} is {value}")
    if what == FILES:
        with contextlib.suppress(OSError), open("/proc/sys/fs/file-max", encoding="ascii") as file:
            limits.append(f"fs.file-max is {file.read().strip()}")
    if what == MEMORY and not limits:
        return OutOfMemory("The host has not enough memory.", "Lower 'parallel', or give it more memory.", doing=doing)
    return LimitReached(f"The task may {verb}: {', '.join(limits) or 'no limit is set here'}.", hint, doing=doing)


def _of_control_group(name: str) -> str:
    """The lowest limit ``name`` of this process's control groups (version 2), empty if there is none."""
    found = []
    path = ""
    with contextlib.suppress(OSError), open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
        path = next((line.strip()[4:] for line in file if line.startswith("0::/")), "")
    # The limit of any ancestor binds as well.
    parts = path.split("/")
    for depth in range(len(parts), -1, -1):
        place = "/".join(["/sys/fs/cgroup", *parts[:depth], name])
        with contextlib.suppress(OSError, ValueError), open(place, encoding="ascii") as file:
            found.append(int(file.read()))  # "max" is no number
    return str(min(found)) if found else ""


def lacks_room() -> bool:
    """Whether RLIMIT_AS leaves less than the stack of a thread or a library needs. Neither error says so itself: a
    thread is refused in the same words where there are too many of them, and a library in various words.
    """
    import resource  # late, as above

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    if soft == resource.RLIM_INFINITY:
        return False
    with contextlib.suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        return soft - int(file.read().split()[0]) * resource.getpagesize() < 2 * _STACK
    return False


def from_import_error(error: ImportError, what: str) -> EngineError | None:
    """The engine error for a library that is there and could not be loaded because a limit was reached; None if it was
    something else. The loader of shared objects says so in words only.
    """
    text = str(error)
    for number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        if os.strerror(number) in text:
            return exhausted(_EXHAUSTED[number], what)
    return exhausted(MEMORY, what) if lacks_room() else None


def from_os_error(error: OSError, what: str) -> EngineError:
    """The engine error for ``error`` that happened while doing ``what`` (a phrase such as ``importing layer
    sha256:…``).
    """
    if error.errno in _EXHAUSTED:
        return exhausted(_EXHAUSTED[error.errno], what)
    kind, hint = _BY_ERRNO.get(error.errno or 0, (IOFailed, ""))
    text = os.strerror(error.errno) if error.errno else str(error)
    where = f" ({error.filename!r})" if isinstance(error.filename, (str, bytes)) else ""
    return kind(f"{text}{where}.", hint, doing=what)


def from_exception(error: BaseException, what: str) -> EngineError:
    """The engine error for whatever went wrong while doing ``what``; an engine error is returned as it is.

    The words of an exception that nobody expected are left out: see describe_crash().
    """
    if isinstance(error, EngineError):
        return error
    if isinstance(error, OSError):
        return from_os_error(error, what)
    if isinstance(error, MemoryError):
        return exhausted(MEMORY, what)
    if isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        return exhausted(MEMORY if lacks_room() else PROCESSES, what)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.isidentifier():
        # Whoever builds a Python may leave out parts of its own library. The collection's modules have dots in names.
        return MissingLibrary(
            f"{what}: the host's Python was built without its module {error.name.lstrip('_')}.",
            "Set ansible_python_interpreter to another Python, such as the one of the distribution.",
        )
    return InternalError(describe_crash(error))


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Name what the block does: engine errors get it in front of their ``doing``, operating-system errors become engine
    errors that carry it.
    """
    try:
        yield
    except EngineError as error:
        error.within(what)
        raise
    except OSError as error:
        raise from_os_error(error, what) from error


def classes() -> Iterator[type[EngineError]]:
    """EngineError and every class below it, those nearer to it first."""
    level: list[type[EngineError]] = [EngineError]
    while level:
        yield from level
        level = [below for kind in level for below in kind.__subclasses__()]


def by_code(code: str) -> type[EngineError]:
    """The error class with the given stable code; EngineError if there is none."""
    return next((kind for kind in classes() if kind.code == code), EngineError)


def to_values(error: EngineError) -> dict[str, Any]:
    """All that the error knows, as plain values for another process; from_values() makes the error of them again."""
    # The bound is in bytes of the message between processes, in which a character may take twelve.
    texts = {key: printable(getattr(error, key), _MAX_TEXT) for key in ("message", "hint", "doing", "said")}
    counts = {"attempts": error.attempts, "seconds": error.seconds}
    return {"kind": type(error).__name__, "code": error.code, "passing": error.passing, **texts, **counts}


def from_values(values: Mapping[str, Any]) -> EngineError:
    """The error that to_values() wrote down: of the same class, or of the class of its code where that is not known
    here.
    """
    kind = next((kind for kind in classes() if kind.__name__ == values["kind"]), by_code(values["code"]))
    # Made without the constructor of the subclass, which may want something else than a message.
    error = kind.__new__(kind)
    EngineError.__init__(
        error,
        values["message"],
        values["hint"],
        doing=values["doing"],
        said=values["said"],
        passing=values["passing"],
    )
    error.attempts, error.seconds = values["attempts"], values["seconds"]
    return error


def describe_crash(error: BaseException) -> str:
    """One line about an unexpected ``error``: its class and the places it came through, innermost last.

    The error's own words are left out on purpose: they may quote a password, a token or a whole document.
    """
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return (
        f"Internal error: {type(error).__name__} at {' > '.join(places[-4:]) or 'an unknown place'}. Please report "
        f"this line as a bug."
    )
