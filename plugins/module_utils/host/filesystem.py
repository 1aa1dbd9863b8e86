# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What is asked of the file system below a repository: its type, its free space, whether it has fs-verity, and one
barrier for all of it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from ..formats import fsverity
from . import files
from ..errors import EngineError, IOFailed, PermissionDenied, ReadOnly, VerityUnsupported, from_os_error

_AT_EMPTY_PATH = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_STX_MNT_ID = 144


def type_of(fd: int) -> str:
    """The type of the file system that the open file lies on (``ext4``, ``btrfs``, ...), or ``unknown``. See proc(5),
    mountinfo.
    """
    return _mounted(fd)[0]


def _mounted(fd: int) -> tuple[str, str]:
    """The type of the file system of an open file, and the device that it is on."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", encoding="ascii") as info:
            mount = next(line.split()[1] for line in info if line.startswith("mnt_id:"))
        with open("/proc/self/mountinfo", encoding="ascii", errors="replace") as mounts:
            for line in mounts:
                fields = line.split(" ")
                if fields[0] == mount:
                    here = fields.index("-", 6)
                    return fields[here + 1], fields[here + 2]
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    return "unknown", ""


def mount_id(fd: int) -> str:
    """The id of the mount through which the open file was reached, which no other mount of this boot has; empty where
    the kernel has no such id (before 6.8). See statx(2), STATX_MNT_ID_UNIQUE.
    """
    try:
        import ctypes

        library = ctypes.CDLL(None, use_errno=True)
        buffer = ctypes.create_string_buffer(256)
        failed = library.statx(fd, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, buffer)
    except (ImportError, AttributeError, OSError):
        return ""
    mask = int.from_bytes(buffer.raw[:4], sys.byteorder)
    if failed or not mask & _STATX_MNT_ID_UNIQUE:
        return ""
    return str(int.from_bytes(buffer.raw[_STX_MNT_ID : _STX_MNT_ID + 8], sys.byteorder))


def free_space(fd: int) -> tuple[int, int | None]:
    """Bytes and inodes that an ordinary user may still use; None inodes where the file system does not count them
    (btrfs).
    """
    found = os.fstatvfs(fd)
    return found.f_bavail * found.f_frsize, found.f_favail if found.f_files else None


def size(fd: int) -> int:
    """Bytes that the file system holds, used and free."""
    found = os.fstatvfs(fd)
    return found.f_blocks * found.f_frsize


def require_writable(fd: int, path: str) -> None:
    """Raise ReadOnly or PermissionDenied unless files can be made in the open directory ``fd`` (``path`` in the
    message).
    """
    if os.fstatvfs(fd).f_flag & os.ST_RDONLY:
        raise ReadOnly(
            f"{path} lies on a file system that is mounted read-only.", "Remount it read-write or choose another path."
        )
    effective = os.access in os.supports_effective_ids
    if not os.access(".", os.W_OK | os.X_OK, dir_fd=fd, effective_ids=effective):
        raise PermissionDenied(f"This user may not write to {path}.", "Run as its owner, for example with become.")


def sync(fd: int) -> None:
    """Wait until everything written so far to the file system of ``fd`` (not O_PATH) is on the disk. See syncfs(2).

    Raises NoSpace or IOFailed if the kernel could not write something: then nothing that was written may be relied on.
    """
    try:
        import ctypes
    except ImportError:  # a Python built without it
        os.sync()
        return
    library = ctypes.CDLL(None, use_errno=True)
    if not hasattr(library, "syncfs"):
        os.sync()
        return
    if library.syncfs(fd):
        number = ctypes.get_errno()
        raise from_os_error(OSError(number, os.strerror(number)), "Writing the repository's data to the disk")


def nearest_directory(path: str) -> str:
    """``path`` if it exists, else the nearest parent that does. IOFailed if that is no directory."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        raise IOFailed(f"{path} is not a directory.", "Choose another path.")
    return path


def missing_ability(fd: int, algorithm: fsverity.Algorithm) -> VerityUnsupported | None:
    """Try out on a file in the open directory ``fd`` whether fs-verity works there: None if so, else the error that
    says why not.

    Asking the kernel is the only way: a feature flag of the file system, a kernel option and the block size all have a
    say. The file has no name where that is possible, and is gone afterwards in any case.
    """
    trial = None
    try:
        trial = files.draft(fd, prefix=files.OBJECT_PREFIX)
        os.write(trial.fd, b"fs-verity?")
        trial.reopen_read_only()
        fsverity.enable(trial.fd, algorithm)
        if fsverity.measure(trial.fd, algorithm) == fsverity.digest(b"fs-verity?", algorithm):
            return None
        return VerityUnsupported(
            "The kernel's fs-verity digest is not the one that is computed here.", "Report this as a bug."
        )
    except VerityUnsupported as error:
        return _reason(fd, algorithm) or error
    except OSError as error:
        # EINVAL: a block size that this kernel cannot seal (ext4 before 6.3 needs blocks of the page size).
        if error.errno == errno.EINVAL:
            return VerityUnsupported(
                "The file system refuses fs-verity with blocks of 4096 bytes.",
                "On older kernels the file system's own block size must be 4096, too.",
            )
        raise from_os_error(error, "Trying out fs-verity") from error
    finally:
        if trial is not None:
            trial.close()


# File systems that have fs-verity where the kernel was built with it, what switches it on, and where the kernel says
# that it knows it.
_WITH_VERITY = {
    "ext4": ("tune2fs -O verity", "/sys/fs/ext4/features/verity"),
    "f2fs": ("fsck.f2fs -O verity", "/sys/fs/f2fs/features/verity"),
    "btrfs": ("", "/sys/fs/btrfs/features/verity"),
    "xfs": ("", "/sys/fs/xfs/features/verity"),
}


def _reason(fd: int, algorithm: fsverity.Algorithm) -> VerityUnsupported | None:
    """Why the file system of the open directory ``fd`` refuses fs-verity: its kind never has it, the kernel was built
    without, or it is switched off on this device. None if that cannot be told.
    """
    kind, device = _mounted(fd)
    instead = "or make a repository that does not require it (verity=preferred)"
    if kind == "unknown":
        return None
    if kind not in _WITH_VERITY:
        return VerityUnsupported(
            f"The file system {kind} never has fs-verity.",
            f"Put the repository on ext4, f2fs, btrfs or xfs with fs-verity, {instead}.",
        )
    command, feature = _WITH_VERITY[kind]
    # The file says what the kernel knows, not what this device has; xfs has no such file.
    if os.path.isdir("/sys/fs") and kind != "xfs" and not os.path.exists(feature):
        return VerityUnsupported(
            f"The kernel ({os.uname().release}) has no fs-verity for {kind}.",
            f"Boot a kernel that was built with CONFIG_FS_VERITY, as those of the distributions are, {instead}.",
        )
    if not command:
        return None
    return VerityUnsupported(
        f"fs-verity with {algorithm.name} is switched off on {device} ({kind}).",
        f"Switch it on with '{command} {device}', {instead}.",
    )


def require_links(fd: int, path: str) -> None:
    """Raise IOFailed unless the file system of the open directory ``fd`` has symbolic and hard links; leaves nothing
    behind.
    """
    try:
        # Every file system that has unnamed files has links as well, and this test is invisible.
        os.close(os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=fd))
        return
    except OSError as error:
        if error.errno not in files.NO_TMPFILE:
            raise from_os_error(error, f"Making a file in {path}") from error
    trial = files.temporary_name(files.OBJECT_PREFIX)
    try:
        os.mkdir(trial, 0o700, dir_fd=fd)
        try:
            os.symlink("target", f"{trial}/symlink", dir_fd=fd)
            os.link(f"{trial}/symlink", f"{trial}/link", src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
        finally:
            for name in ("link", "symlink"):
                with contextlib.suppress(OSError):
                    os.unlink(f"{trial}/{name}", dir_fd=fd)
            os.rmdir(trial, dir_fd=fd)
    except OSError as error:
        known: EngineError = from_os_error(error, f"Making links in {path}")
        if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            known = IOFailed(
                f"The file system of {path} ({type_of(fd)}) has no links, which a repository is made of.",
                "Use ext4, btrfs or XFS.",
            )
        raise known from error
