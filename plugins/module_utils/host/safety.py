# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Who could change what root is about to rely on for ever: every directory and link on the way to a file counts."""

from __future__ import annotations

import errno
import os
import stat

from . import beneath


class _Fault(Exception):
    """Words about a component that others can change."""


def fault(path: str) -> str:
    """Why others than root and this user can change what ``path`` (absolute) leads to, in words; empty if they cannot.

    A component may belong to root or to this user and be writable for nobody else. A directory where everybody may make
    files but not touch those of others (sticky) may contain one that is safe. What does not exist yet is safe if the
    directory that it will lie in is.
    """
    try:
        os.close(beneath.walk(path, _look))
    except _Fault as found:
        return str(found)
    except FileNotFoundError:
        return ""
    except OSError as error:
        if error.errno == errno.ELOOP:
            return f"{error.filename} leads in a circle"
        return f"{error.filename} cannot be looked at ({os.strerror(error.errno or errno.EIO)})"
    return ""


def _look(here: str, found: os.stat_result, more: bool) -> None:
    if found.st_uid not in beneath.owners():
        raise _Fault(f"{here} belongs to {beneath.user(found.st_uid)}")
    if stat.S_ISLNK(found.st_mode):
        return
    # What the group of root may write is root's business.
    others = found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != 0 else 0))
    sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and more
    if others and not sticky:
        raise _Fault(f"{here} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})")
