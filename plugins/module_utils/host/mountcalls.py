# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Composefs mounts by the kernel's file-descriptor interface (fsopen(2) and its kin), with what older kernels take
instead.

A composefs mount is an overlay with one lower layer, the EROFS image, and one data-only layer, the repository's
``objects/``. The image is given as an fd whose file the caller measured: the bytes that were measured are the bytes
that are mounted.

What kernels take: overlay with data-only layers since 6.5 (before, the objects are an ordinary layer under an image
that hides their directories, and nothing can insist on fs-verity), ``verity=`` since 6.6, ``lowerdir+`` since 6.7,
EROFS on a plain file since 6.12 (a loop device before), fds as upper and work directory since 6.13 (paths before), fds
of detached mounts as layers since 6.15 (an attached helper mount before). Each attempt gets a new
context, for a failed option may leave traces in the old one.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from . import beneath as paths
from . import safety
from ..errors import (
    Busy,
    EngineError,
    MissingLibrary,
    MountFailed,
    PermissionDenied,
    UnsafeRepository,
    from_os_error,
)
from .mountinfo import SOURCE, Mounted, mount_id

try:
    import ctypes
except ImportError:  # a Python built without libffi: nothing fails before it is needed
    ctypes = None  # type: ignore[assignment]

_FSOPEN, _FSCONFIG, _FSMOUNT, _MOVE_MOUNT, _MOUNT_SETATTR = 430, 431, 432, 429, 442
_SET_FLAG, _SET_STRING, _SET_FD, _CMD_CREATE = 0, 1, 5, 6
_CLOEXEC = 1
_MOVE_EMPTY_PATH = 0x4
_MOVE_TO_EMPTY_PATH = 0x40
_MOVE_BENEATH = 0x200
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8
_RDONLY = 0x1

# Options of a mount point that an operator may ask for (mount_setattr(2)); others go to the overlay file system itself.
ATTRIBUTES = {
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "noatime": 0x10,
    "strictatime": 0x20,
    "nodiratime": 0x80,
    "nosymfollow": 0x200000,
}

# The same for mount(2), which knows other numbers. A remount states all of them anew.
_MS_REMOUNT, _MS_BIND = 32, 4096
_MS_FLAGS = {
    "ro": 1,
    "nosuid": 2,
    "nodev": 4,
    "noexec": 8,
    "nosymfollow": 256,
    "noatime": 1024,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
_MS_STRICTATIME = 1 << 24

# How kernels say that they do not take a layer in this form. Before 6.5 overlay's options are strings only, and an
# fd is "not supported".
_NOT_THIS_WAY = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.EOPNOTSUPP)

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_READ_ONLY, _LOOP_AUTOCLEAR, _LOOP_DIRECT_IO = 1, 4, 16


class Request(NamedTuple):
    """What to mount. ``image_id`` is hex; ``image`` and ``objects`` are fds; ``options`` are as an operator writes
    them; ``words`` says what messages call the image.
    """

    image_id: str
    image: int
    objects: int
    verity: bool
    upperdir: str | None = None
    workdir: str | None = None
    options: Sequence[str] = ()
    words: Callable[[], str] | None = None

    def mounting(self, target: str) -> str:
        """What is being done, for a message."""
        return f"Mounting {self.words() if self.words is not None else f'the image {self.image_id}'} at {target}"


class _KernelRefused(Exception):
    """A step of the mount failed; ``words`` are the kernel's own."""

    def __init__(self, step: str, number: int, words: str) -> None:
        super().__init__(step, number, words)
        self.step = step
        self.errno = number
        self.words = words


class _Kernel:
    """The system calls that the standard library lacks."""

    def __init__(self) -> None:
        if ctypes is None:
            raise MissingLibrary(
                "This Python cannot call the kernel: it was built without the library ctypes.",
                "Set ansible_python_interpreter to another Python, such as the one of the distribution.",
            )
        self._libc = ctypes.CDLL(None, use_errno=True)

    def call(self, step: str, number: int, *arguments: int | bytes | None, context: int = -1) -> int:
        converted = [
            ctypes.c_long(argument) if isinstance(argument, int) else ctypes.c_char_p(argument)
            for argument in arguments
        ]
        result = int(self._libc.syscall(ctypes.c_long(number), *converted))
        if result < 0:
            raise _KernelRefused(step, ctypes.get_errno(), _kernel_words(context))
        return result

    def remount(self, path: str, flags: int) -> None:
        if self._libc.mount(None, ctypes.c_char_p(os.fsencode(path)), None, ctypes.c_ulong(flags), None) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)

    def umount(self, path: str, flags: int) -> None:
        if self._libc.umount2(ctypes.c_char_p(os.fsencode(path)), ctypes.c_int(flags)) < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)


def _kernel_words(context: int) -> str:
    """What the kernel logged into a mount context: lines such as ``e overlay: ...``."""
    words = []
    while context >= 0:
        try:
            line = os.read(context, 4096)
        except OSError:
            break
        if not line:
            break
        words.append(line.decode("utf-8", "replace").strip()[2:])
    return "; ".join(words)


class _Context:
    """One file-system context; a context manager that closes it."""

    def __init__(self, kernel: _Kernel, kind: str) -> None:
        self._kernel = kernel
        self.kind = kind
        self.fd = kernel.call(f"opening a context for {kind}", _FSOPEN, kind.encode(), _CLOEXEC)

    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self.fd)

    def _config(self, step: str, command: int, key: bytes | None, value: bytes | None, number: int) -> None:
        self._kernel.call(step, _FSCONFIG, self.fd, command, key, value, number, context=self.fd)

    def flag(self, key: str) -> None:
        self._config(f"option {key}", _SET_FLAG, key.encode(), None, 0)

    def string(self, key: str, value: str) -> None:
        self._config(f"option {key}", _SET_STRING, key.encode(), os.fsencode(value), 0)

    def set_fd(self, key: str, fd: int) -> None:
        self._config(f"option {key}", _SET_FD, key.encode(), None, fd)

    def create(self, attributes: int) -> int:
        """An fd of the new mount, which is attached nowhere yet."""
        self._config(f"creating the {self.kind}", _CMD_CREATE, None, None, 0)
        return self._kernel.call(f"mounting the {self.kind}", _FSMOUNT, self.fd, _CLOEXEC, attributes, context=self.fd)


def mount(request: Request, path: str, beneath: bool = False) -> None:
    """Mount at the existing directory ``path``, which is absolute and without links: it was resolved when all was
    decided, and a link that has appeared in it since is not followed (UnsafeRepository).

    With ``beneath`` the new mount goes under the one that is there, to be uncovered when that is detached: at every
    moment ``path`` shows one of the two. Raises MountFailed with the kernel's words, PermissionDenied, and Busy.
    """
    with _opened(path) as place:
        _mount(request, path, place, beneath)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[int]:
    """An fd of the mount point: all later steps happen there, wherever its name leads by then."""
    try:
        fd = paths.open_path(path, links=False)
    except OSError as error:
        raise MountFailed(f"Opening the mount point {path}: {error.strerror}.", "Make the directory.") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _mount(request: Request, target: str, place: int, beneath: bool) -> None:
    kernel = _Kernel()
    try:
        with contextlib.ExitStack() as stack:
            changes = _open_changes(request, stack)
            erofs = _mount_erofs(kernel, request.image)
            stack.callback(os.close, erofs)
            overlay = _mount_overlay(kernel, request, erofs, changes)
            stack.callback(os.close, overlay)
            flags = _MOVE_EMPTY_PATH | _MOVE_TO_EMPTY_PATH | (_MOVE_BENEATH if beneath else 0)
            kernel.call(
                _beneath(target) if beneath else f"attaching to {target}",
                _MOVE_MOUNT,
                overlay,
                b"",
                place,
                b"",
                flags,
            )
    except _KernelRefused as refusal:
        raise _explain(refusal, request, target) from refusal
    except OSError as error:
        raise from_os_error(error, request.mounting(target)) from error


def replace(request: Request, path: str) -> None:
    """Put a new mount in the place of the topmost one at ``path`` and detach the old one. At every moment ``path``
    shows one of the two.

    Files that are open on the old mount stay readable until they are closed.
    """
    with _opened(path) as place:
        _mount(request, path, place, True)
        # The fd belongs to the old mount, which lies on top. The dot makes the link in /proc an inner component.
        _umount(f"/proc/self/fd/{place}/.", _MNT_DETACH, path)


def tighten(there: Mounted, options: Sequence[str]) -> None:
    """Add protections (names of ATTRIBUTES) to the mount ``there``, which stays as it is otherwise and in use.

    Before 5.12 there is no mount_setattr(2), and a remount of the mount point does it. Raises Busy if another mount is
    at the path by now, MountFailed and PermissionDenied.
    """
    kernel = _Kernel()
    path = there.path
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise from_os_error(error, f"Opening {path}") from error
    try:
        if mount_id(fd) != there.mount_id:
            raise Busy(f"Something else was mounted at {path} meanwhile.", "Run again.")
        flags = sum(ATTRIBUTES[option] for option in options)
        try:
            kernel.call(
                f"setting {', '.join(options)} at {path}",
                _MOUNT_SETATTR,
                fd,
                b"",
                _AT_EMPTY_PATH,
                struct.pack("=4Q", flags, 0, 0, 0),
                32,
            )
        except _KernelRefused as refusal:
            if refusal.errno not in (errno.ENOSYS, errno.EPERM):
                raise
            # EPERM may come from a sandbox that does not know the call. Without the right to mount the remount fails,
            # too.
            wanted = there.options.union(options)
            old = sum(number for name, number in _MS_FLAGS.items() if name in wanted)
            if not {"noatime", "relatime"} & wanted:
                old |= _MS_STRICTATIME
            kernel.remount(f"/proc/self/fd/{fd}", _MS_REMOUNT | _MS_BIND | old)
    except (_KernelRefused, OSError) as refusal:
        text = f"Setting {', '.join(options)} at {path} failed: {os.strerror(refusal.errno or 0)}."
        if refusal.errno in (errno.EPERM, errno.EACCES):
            raise PermissionDenied(text, "Run as root, for example with become.") from refusal
        raise MountFailed(text, "Unmount it, then mount it again.") from refusal
    finally:
        os.close(fd)


def detach(path: str) -> None:
    """Detach the topmost mount at ``path``; it vanishes when nobody uses it any more."""
    _unmount(path, _MNT_DETACH)


def unmount(path: str) -> None:
    """Unmount the topmost mount at ``path``. Raises Busy if it is in use."""
    _unmount(path, 0)


def _unmount(path: str, flags: int) -> None:
    directory, name = os.path.split(path)
    if not name:
        _umount(path, flags, path)
        return
    # An fd of the mount point itself would keep the mount in use; one of the directory that it lies in does not.
    with _opened(directory) as fd:
        _umount(f"/proc/self/fd/{fd}/{name}", flags, path)


def _umount(where: str, flags: int, path: str) -> None:
    try:
        _Kernel().umount(where, flags | _UMOUNT_NOFOLLOW)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Busy(
                f"{path} is in use, so it cannot be unmounted.",
                "End what has files or a working directory there (fuser -vm shows it), then run again.",
            ) from error
        if error.errno in (errno.EPERM, errno.EACCES):
            raise PermissionDenied(
                f"Unmounting {path} needs the capability CAP_SYS_ADMIN.", "Run as root, for example with become."
            ) from error
        raise MountFailed(f"Unmounting {path} failed: {error.strerror}.") from error


def _mount_erofs(kernel: _Kernel, image: int) -> int:
    source = f"/proc/self/fd/{image}"
    try:
        return _erofs_from(kernel, source)
    except _KernelRefused as refusal:
        if refusal.errno != errno.ENOTBLK:
            raise
    # Before 6.12 EROFS wants a block device.
    loop = _loop_device(image)
    try:
        return _erofs_from(kernel, f"/proc/self/fd/{loop}")
    finally:
        os.close(loop)  # AUTOCLEAR: the device lives as long as the mount


def _erofs_from(kernel: _Kernel, source: str) -> int:
    with _Context(kernel, "erofs") as context:
        context.flag("ro")
        context.string("source", source)
        return context.create(_RDONLY)


def _loop_device(image: int) -> int:
    """An fd of a read-only loop device over the image. If another process takes the free device first, the next one is
    tried.
    """
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _KernelRefused(
            "opening /dev/loop-control", error.errno or 0, "this kernel mounts EROFS from block devices only"
        ) from error
    try:
        for attempt in range(64):
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            device = os.open(f"/dev/loop{number}", os.O_RDWR | os.O_CLOEXEC)
            # Not every file system under the image can do direct input and output.
            flags = _LOOP_READ_ONLY | _LOOP_AUTOCLEAR | (_LOOP_DIRECT_IO if attempt % 2 == 0 else 0)
            config = struct.pack(
                "<II5Q4I64s64s32s2Q64s", image, 4096, 0, 0, 0, 0, 0, 0, 0, 0, flags, b"", b"", b"", 0, 0, b""
            )
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                return device
            except OSError as error:
                os.close(device)
                if error.errno not in (errno.EBUSY, errno.EINVAL):
                    raise
        raise _KernelRefused("setting up a loop device", errno.EBUSY, "")
    except OSError as error:
        raise _KernelRefused("setting up a loop device", error.errno or 0, "") from error
    finally:
        os.close(control)


def check_changes(upperdir: str | None, workdir: str | None) -> None:
    """UnsafeRepository if somebody else than root and the caller owns one of the directories that take the changes, can
    write to it, or can put another in its place: the mount would show that user's files.
    """
    for key, path in (("upperdir", upperdir), ("workdir", workdir)):
        fault = safety.fault(path) if path else ""
        if fault:
            raise UnsafeRepository(
                f"The {key} {path} cannot hold the changes of a mount: {fault}.",
                "Have every directory on the way belong to root and be writable for nobody else.",
            )


def _open_changes(request: Request, stack: contextlib.ExitStack) -> dict[str, int]:
    """The fds of the directories that take the changes, ``upperdir`` and ``workdir``, which ``stack`` closes; see
    check_changes().
    """
    check_changes(request.upperdir, request.workdir)
    found = {}
    for key, path in (("upperdir", request.upperdir), ("workdir", request.workdir)):
        if path:
            above = paths.open_path(path, links=False)
            try:
                # Kernels before 6.15 take no fds that were opened with O_PATH.
                found[key] = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=above)
            finally:
                os.close(above)
            stack.callback(os.close, found[key])
    return found


def _mount_overlay(kernel: _Kernel, request: Request, erofs: int, changes: dict[str, int]) -> int:
    refusal: _KernelRefused | None = None
    try:
        with _overlay(kernel, request, changes) as context:
            context.set_fd("lowerdir+", erofs)
            context.set_fd("datadir+", request.objects)
            return context.create(_attributes(request))
    except _KernelRefused as error:
        if error.errno not in _NOT_THIS_WAY:
            raise
        refusal = error
    with _attached(kernel, erofs) as helper:
        lower = os.open(helper, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            first, data = f"/proc/self/fd/{lower}", f"/proc/self/fd/{request.objects}"
            forms = [{"lowerdir+": first, "datadir+": data}, {"lowerdir": f"{first}::{data}"}]
            if not request.verity and _hides_objects(helper):
                forms.append({"lowerdir": f"{first}:{data}"})
            for form in forms:
                try:
                    with _overlay(kernel, request) as context:
                        _still_there(request, changes)
                        for key, value in form.items():
                            context.string(key, value)
                        return context.create(_attributes(request))
                except _KernelRefused as error:
                    if error.errno not in _NOT_THIS_WAY:
                        raise
                    refusal = error
        finally:
            os.close(lower)
    raise refusal


def _hides_objects(image: str) -> bool:
    """Whether the image, attached at ``image``, may lie on the objects as on any other layer, which is all that kernels
    before 6.5 know.

    Then the directories of the objects would show in its root, unless it has a whiteout for each of them. Images of
    format V1 bring those.
    """
    for first in range(256):
        try:
            found = os.lstat(f"{image}/{first:02x}")
        except FileNotFoundError:
            return False
        if not stat.S_ISCHR(found.st_mode) or found.st_rdev != 0:
            return False
    return True


def _still_there(request: Request, changes: dict[str, int]) -> None:
    """MountFailed unless the paths still lead to the open directories: kernels before 6.13 take these by path only, and
    show the path that they got. That nobody else can put another one there was checked before.
    """
    for key, path in (("upperdir", request.upperdir), ("workdir", request.workdir)):
        if path and not os.path.samestat(os.fstat(changes[key]), os.lstat(path)):
            raise MountFailed(f"Another directory has appeared at {path} meanwhile.", "Run again.")


def _overlay(kernel: _Kernel, request: Request, changes: Mapping[str, int] | None = None) -> _Context:
    """The context of the overlay with all but its layers; the directories for changes are given by fd (``changes``) or,
    without that, by path.
    """
    context = _Context(kernel, "overlay")
    try:
        context.string("source", SOURCE + request.image_id)
        context.string("metacopy", "on")
        context.string("redirect_dir", "on")
        if request.upperdir:
            # Image and changes are two file systems. Without this files have other device numbers than the directories
            # that they lie in, and what stays on one file system, such as du -x, leaves them out.
            context.string("xino", "on")
        if request.verity:
            context.string("verity", "require")
        for key, fd in (changes or {}).items():
            context.set_fd(key, fd)
        if request.upperdir and not changes:
            # The kernel takes a backslash in these two for an escape.
            context.string("upperdir", request.upperdir.replace("\\", "\\\\"))
            context.string("workdir", (request.workdir or "").replace("\\", "\\\\"))
        for option in request.options:
            key, separator, value = option.partition("=")
            if key in ATTRIBUTES or option == "ro":
                continue
            if separator:
                context.string(key, value)
            else:
                context.flag(key)
    except BaseException:
        os.close(context.fd)
        raise
    return context


def _attributes(request: Request) -> int:
    read_only = request.upperdir is None or "ro" in request.options
    return sum({ATTRIBUTES[option] for option in request.options if option in ATTRIBUTES}) | (
        _RDONLY if read_only else 0
    )


@contextlib.contextmanager
def _attached(kernel: _Kernel, erofs: int) -> Iterator[str]:
    """Give a detached mount a place for the while that an overlay is built on it: kernels before 6.15 refuse detached
    layers.
    """
    helper = tempfile.mkdtemp(prefix="composefs-", dir="/run" if os.access("/run", os.W_OK) else None)
    try:
        kernel.call("attaching the image", _MOVE_MOUNT, erofs, b"", _AT_FDCWD, os.fsencode(helper), _MOVE_EMPTY_PATH)
        try:
            yield helper
        finally:
            kernel.umount(helper, _MNT_DETACH | _UMOUNT_NOFOLLOW)
    finally:
        os.rmdir(helper)


def _beneath(target: str) -> str:
    return f"attaching under the mount at {target}"


def _explain(refusal: _KernelRefused, request: Request, target: str) -> EngineError:
    words = f" The kernel says: {refusal.words}." if refusal.words else ""
    text = f"{request.mounting(target)} failed when {refusal.step}: {os.strerror(refusal.errno)}.{words}"
    if refusal.errno in (errno.EPERM, errno.EACCES):
        return PermissionDenied(
            text,
            "Mounting needs the capability CAP_SYS_ADMIN in the initial user namespace: run as root, for example with "
            "become.",
        )
    if refusal.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        what = f"{request.mounting(target)} ({refusal.step})"
        return from_os_error(OSError(refusal.errno, ""), what)
    if refusal.errno == errno.EBUSY:
        return Busy(text, "Loop devices, or the upper or work directory, may be in use by others.")
    if refusal.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        return MountFailed(text, "Make the directory that is missing.")
    if refusal.errno in (errno.ENODEV, errno.ENOSYS):
        return MountFailed(
            text, "The kernel lacks EROFS or overlay, or is older than 5.2; load the modules or update it."
        )
    if refusal.errno == errno.EINVAL and request.workdir and os.path.isdir(f"{request.workdir}/work/incompat/volatile"):
        return MountFailed(
            text,
            f"The last mount with {request.workdir} was volatile, so what is there may be torn: empty the upper and "
            f"the work directory.",
        )
    if refusal.step == "creating the erofs" and refusal.errno in (errno.EINVAL, errno.EUCLEAN):
        return MountFailed(
            text,
            "The object is no EROFS image that this kernel understands, or its file system cannot hold one; the "
            "kernel's log says more.",
        )
    if refusal.errno == errno.EINVAL and refusal.step == _beneath(target):
        return MountFailed(
            text,
            "Kernels before 6.5 cannot put a mount under another: unmount the old image first, then mount the new one.",
        )
    if refusal.errno == errno.EINVAL:
        return MountFailed(
            text,
            "Kernels before 6.6 cannot mount with verity, and before 6.5 only images of format V1; file systems "
            "without d_type, or overlays, cannot "
            "hold objects. The kernel's log may say more.",
        )
    return MountFailed(text)
