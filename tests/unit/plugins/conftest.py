# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A kernel with fs-verity for machines that have none: what the two ioctls promise, kept in a table of inodes."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity

ENABLE = 0x40806685
MEASURE = 0xC0046686


class VerityKernel:
    """Stands for fcntl.ioctl. Sealing fails with ETXTBSY while this process has the file open for writing, as in the
    kernel.
    """

    def __init__(self) -> None:
        self.sealed: dict[tuple[int, int], tuple[int, bytes]] = {}
        self.calls: list[int] = []
        self.supported = True
        # How many of the next files someone else seems to have open for writing. (The number of a file that is gone may
        # come back as busy.)
        self.busy_files = 0
        self._busy: set[tuple[int, int]] = set()
        self._free: set[tuple[int, int]] = set()
        self.lies = False

    def __call__(self, fd: int, request: int, argument: bytes = b"", mutate: bool = True) -> int:
        self.calls.append(request)
        if not self.supported:
            raise OSError(errno.EOPNOTSUPP, "no fs-verity")
        if request == ENABLE:
            self._enable(fd, argument)
        elif request == MEASURE:
            self._measure(fd, argument)  # type: ignore[arg-type]
        else:
            raise OSError(errno.ENOTTY, "unknown request")
        return 0

    def digest_of(self, fd: int, number: int) -> bytes:
        algorithm = next(a for a in fsverity.ALGORITHMS.values() if a.id == number)
        return fsverity.digest(os.pread(fd, os.fstat(fd).st_size, 0), algorithm)

    def seal(self, path: str, algorithm: fsverity.Algorithm) -> None:
        """Seal the file at ``path``, as another program would have."""
        fd = os.open(path, os.O_RDONLY)
        try:
            self.sealed[_inode(fd)] = (algorithm.id, self.digest_of(fd, algorithm.id))
        finally:
            os.close(fd)

    def is_sealed(self, path: str) -> bool:
        found = os.stat(path)
        return (found.st_dev, found.st_ino) in self.sealed

    def _enable(self, fd: int, argument: bytes) -> None:
        version, number, block, salt = struct.unpack_from("=IIII", argument)
        assert (version, block, salt) == (1, 4096, 0)
        assert stat.S_ISREG(os.fstat(fd).st_mode)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        key = _inode(fd)
        if key not in self._free and key not in self._busy:
            (self._busy if self.busy_files else self._free).add(key)
            self.busy_files = max(0, self.busy_files - 1)
        if key in self._busy or _open_for_writing(key):
            raise OSError(errno.ETXTBSY, "open for writing")
        found = self.sealed.get(key)
        if found is not None and self.digest_of(fd, found[0]) == found[1]:
            raise OSError(errno.EEXIST, "sealed already")
        self.sealed[key] = (number, self.digest_of(fd, number))

    def _measure(self, fd: int, buffer: bytearray) -> None:
        found = self.sealed.get(_inode(fd))
        if found is not None and self.digest_of(fd, found[0]) != found[1]:
            found = None  # the number of a sealed inode that is gone was given to another file
        if found is None:
            raise OSError(errno.ENODATA, "not sealed")
        number, digest = found
        if len(buffer) - 4 < len(digest):
            raise OSError(errno.EOVERFLOW, "digest too long")
        if self.lies:
            digest = digest[::-1]
        buffer[: 4 + len(digest)] = struct.pack("=HH", number, len(digest)) + digest


def _inode(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def _open_for_writing(key: tuple[int, int]) -> bool:
    for name in os.listdir("/proc/self/fd"):
        try:
            if _inode(int(name)) == key and fcntl.fcntl(int(name), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                return True
        except OSError:
            continue
    return False


@pytest.fixture
def verity_kernel(monkeypatch: pytest.MonkeyPatch) -> VerityKernel:
    """A kernel with fs-verity, for as long as the test runs."""
    kernel = VerityKernel()
    monkeypatch.setattr(fcntl, "ioctl", kernel)
    monkeypatch.setattr(fsverity, "_BUSY_PAUSES", ())
    return kernel
