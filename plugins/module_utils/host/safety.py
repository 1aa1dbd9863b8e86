# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""Who could change what root is about to rely on for ever: every directory and link on the way to a file counts."""

from __future__ import annotations

import errno
import os
import pwd
import stat

_MAX_LINKS = 40


def fault(path: str) -> str:
    """Why others than root and this user can change what ``path`` (absolute) leads to, in words; empty if they cannot.

    A component may belong to root or to this user and be writable for nobody else. A directory where everybody may make
    files but not touch those of others (sticky) may contain one that is safe. What is not there yet cannot be changed
    by whoever may not change where it will be.
    """
    trusted = (0, os.geteuid())
    names = [name for name in path.split("/") if name]
    here = "/"
    links = 0
    while True:
        try:
            found = os.lstat(here)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{here} cannot be looked at ({os.strerror(error.errno or errno.EIO)})"
        if found.st_uid not in trusted:
            return f"{here} belongs to {_user(found.st_uid)}"
        if stat.S_ISLNK(found.st_mode):
            links += 1
            if links > _MAX_LINKS:
                return f"{here} leads in a circle"
            target = [name for name in os.readlink(here).split("/") if name]
            base = "/" if os.readlink(here).startswith("/") else os.path.dirname(here)
            names, here = target + names, base
        else:
            # What the group of root may write is root's business.
            others = found.st_mode & (stat.S_IWOTH | (stat.S_IWGRP if found.st_gid != 0 else 0))
            sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX and names
            if others and not sticky:
                return f"{here} can be written by others (mode {stat.S_IMODE(found.st_mode):04o})"
        if not names:
            return ""
        name = names.pop(0)
        if name == "..":
            here = os.path.dirname(here)
        elif name != ".":
            here = os.path.join(here, name)


def _user(number: int) -> str:
    try:
        return f"the user {pwd.getpwuid(number).pw_name}"
    except KeyError:
        return f"the user {number}"
