# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The option that every module which works in a repository has."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  repository:
    description:
      - The directory of the composefs repository. It must be one already; M(composefs.oci.composefs_repository) makes
        it. Written from V(/) on; an empty text is refused, not taken for the default.
      - The default is where C(cfsctl) has its own, V(/sysroot/composefs) for root and V(~/.var/lib/composefs) for any
        other user.
    type: path
"""

    # For every module but those that mount.
    UNSAFE = r"""
options:
  unsafe_repository:
    description:
      - What to do with a repository that somebody else than root and the user that runs the task owns or can write to.
        Whoever can write there can change what is read between two looks, and in a repository without fs-verity the
        content of every image.
      - V(refuse) fails with RV(error=unsafe_repository). That includes root in a repository of another user; run the
        task as its owner instead, with C(become_user).
      - V(accept) goes on with a warning. Symbolic links below the repository are not followed even then, nor are those
        on the way to it that somebody else made. M(composefs.oci.composefs_mount) never accepts such a repository.
    type: str
    choices: [refuse, accept]
    default: refuse
    version_added: 0.2.0
"""
