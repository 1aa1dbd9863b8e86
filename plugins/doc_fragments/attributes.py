# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said about every module in the same words: its attributes."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Runs in check mode, changes nothing there, and predicts RV(ignore:changed) as a real run would report
      it.
  diff_mode:
    description: Returns what was, or in check mode would be, different before and after when diff mode is on.
  idempotent:
    description: Run twice with the same arguments on an unchanged source, the second run changes nothing and says so.
  platform:
    description: Operating systems whose hosts can be managed.
    support: full
    platforms: linux
"""

    # Used as composefs.oci.attributes.info by modules that only look.
    INFO = r"""
options: {}
attributes:
  check_mode:
    support: full
    details:
      - The module changes nothing anyway.
  diff_mode:
    support: N/A
    details:
      - The module changes nothing.
  idempotent:
    support: N/A
    details:
      - The module changes nothing.
"""

    # Used as composefs.oci.attributes.actiongroup_composefs.
    ACTIONGROUP_COMPOSEFS = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/composefs.oci.composefs) in C(module_defaults) to set defaults for all modules of the group
      at once.
    support: full
    membership:
      - composefs.oci.composefs
"""

    # Used as composefs.oci.attributes.actiongroup_registry by modules of both groups.
    ACTIONGROUP_REGISTRY = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/composefs.oci.composefs) in C(module_defaults) to set defaults for all modules of the
      collection at once, and C(group/composefs.oci.composefs_registry) for those that reach registries, such as
      C(auth_file).
    support: full
    membership:
      - composefs.oci.composefs
      - composefs.oci.composefs_registry
"""
