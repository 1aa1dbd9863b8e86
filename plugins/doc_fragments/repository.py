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
        it.
      - The default is where C(cfsctl) has its own, V(/sysroot/composefs) for root and V(~/.var/lib/composefs) for any
        other user.
    type: path
"""
