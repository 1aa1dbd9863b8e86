# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Let the tests import composefs_testinfra, which comes with the collection."""

from __future__ import annotations

import os
import pathlib
import site
import sys

places = [
    *os.environ.get("ANSIBLE_COLLECTIONS_PATH", "").split(":"),
    "~/.ansible/collections",
    "/usr/share/ansible/collections",
    *site.getsitepackages(),
]
for place in filter(None, places):
    support = pathlib.Path(place).expanduser() / "ansible_collections/composefs/oci/plugins/plugin_utils"
    if (support / "composefs_testinfra.py").exists():
        sys.path.insert(0, str(support))
        break
