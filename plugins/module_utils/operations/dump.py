# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Write what an image holds to a file: its composefs dumpfile."""

from __future__ import annotations

import os
import stat

from ..host import beneath, files
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
    """Make the file at ``path`` hold exactly ``content``, in one step; return whether it had to be changed. With
    ``check`` only find that out. ``path`` is absolute; a link there is replaced, not followed.
    """
    directory, name = os.path.split(path)
    with doing(f"Writing {path}"):
        if not os.path.isdir(directory):
            raise IOFailed(f"The directory {directory} does not exist.", "Make it first.")
        # The directory is opened once, and by no link of somebody else: whoever may rename the directories above, or
        # plant links there, cannot lead what follows elsewhere.
        with beneath.opened_path(directory) as fd:
            mode = 0o644
            try:
                has = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                pass
            else:
                # A link may have been planted by anybody who may write to the directory, so it is replaced itself.
                if not stat.S_ISLNK(has.st_mode):
                    if not stat.S_ISREG(has.st_mode):
                        raise IOFailed(f"{path} is not a regular file.", "Choose another path.")
                    mode = stat.S_IMODE(has.st_mode) & 0o777
                    if has.st_size == len(content) and files.read_whole(fd, name, len(content)) == content:
                        return False
            if not check:
                files.write_whole(fd, name, content, mode)
    return True
