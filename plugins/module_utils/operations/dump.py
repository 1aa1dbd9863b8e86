# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Write what an image holds to a file: its composefs dumpfile."""

from __future__ import annotations

import contextlib
import os
import stat

from . import mounting
from ..rootfs import dumpfile
from ..rootfs.erofsreader import ErofsImage
from ..errors import IOFailed, doing
from ..store.repository import Repository


def dump(repository: Repository, image_id: str) -> bytes:
    """The dumpfile (composefs-dump(5)) of the tree in the image ``image_id`` (hex), which is measured first.

    ImageNotFound if it does not stand under ``images/``, FormatError if it is damaged.
    """
    digest = mounting.resolve(repository, image_id)
    with (
        mounting.open_image(repository, digest) as fd,
        doing(f"Reading the image {image_id}"),
        ErofsImage.open(fd, repository.algorithm) as image,
    ):
        return dumpfile.dumpfile_bytes(image.tree())


def write(content: bytes, path: str, check: bool = False) -> bool:
    """Make the file at ``path`` hold exactly ``content``, in one step; whether it did not. With ``check`` only that is
    found out.
    """
    with doing(f"Writing {path}"):
        try:
            has = os.stat(path)
        except FileNotFoundError:
            mode = 0o644
        else:
            if not stat.S_ISREG(has.st_mode):
                raise IOFailed(f"{path} is not a regular file.", "Choose another path.")
            mode = stat.S_IMODE(has.st_mode)
            with open(path, "rb") as file:
                if has.st_size == len(content) and file.read() == content:
                    return False
        # Who gave a link wants the file behind it written.
        path = os.path.realpath(path)
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise IOFailed(f"The directory {directory} does not exist.", "Make it first.")
        if check:
            return True
        temporary = f"{directory}/.composefs-oci-{os.urandom(6).hex()}"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), mode)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    return True
