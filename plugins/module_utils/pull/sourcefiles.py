# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The files of a stored image by path, for the programs of a delta that copy from them.

They come from the image's EROFS file, so nothing has to be merged and memory does not grow with the tree.
"""

from __future__ import annotations

import mmap
import os
from typing import TYPE_CHECKING

from ..formats.digests import ObjectDigest
from ..errors import FormatError, from_os_error
from ..formats.fsverity import Algorithm
from ..formats.tardiff import File
from ..rootfs.erofsreader import ErofsImage
from ..store.objects import ObjectStore

if TYPE_CHECKING:
    from ..formats.codecs import Buffer


class SourceFiles:
    """The regular files in the EROFS image that is the object ``image`` (digest as bytes). Close it.

    FormatError if the image or one of its files is damaged or missing.
    """

    def __init__(self, objects: ObjectStore, algorithm: Algorithm, image: ObjectDigest) -> None:
        self._objects = objects
        fd = objects.open(image)
        try:
            self._image = ErofsImage.open(fd, algorithm)
        finally:
            os.close(fd)

    def open(self, path: bytes) -> File | None:
        """The file at ``path`` (no leading slash, no link is followed), or None if there is no regular file."""
        leaf = self._image.find(path)
        if leaf is None:
            return None
        if leaf.digest is None:
            return _Inline(leaf.data)
        return _Object(self._objects.open(leaf.digest), leaf.digest, leaf.size)

    def close(self) -> None:
        self._image.close()


class _Inline:
    """A file whose content stands in the image."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def pread(self, n: int, offset: int, /) -> bytes:
        return self._data[offset : offset + n]

    def whole(self) -> Buffer:
        return self._data

    def close(self) -> None:
        pass


class _Object:
    """A file that is an object. ``close`` closes ``fd``."""

    def __init__(self, fd: int, digest: ObjectDigest, size: int) -> None:
        self._fd = fd
        self._digest = digest
        self.size = size
        if os.fstat(fd).st_size != size:
            self.close()
            raise FormatError(f"Object {digest.hex()} does not have the {size} bytes of its file.", "Pull it again.")

    def pread(self, n: int, offset: int, /) -> bytes:
        try:
            return os.pread(self._fd, n, offset)
        except OSError as error:
            raise from_os_error(error, f"Reading object {self._digest.hex()}") from error

    def whole(self) -> Buffer:
        return mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ) if self.size else b""

    def close(self) -> None:
        os.close(self._fd)
