# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Make a repository and pull into it, with the engine alone: pull_in_guest.py PATH required|disabled REFERENCE NAME.

It prints "begun" when the first layer is on its way, and at the end whether anything changed.
"""

from __future__ import annotations

import sys

from plugins.module_utils.formats import fsverity
from plugins.module_utils.progress import Event, Progress
from plugins.module_utils.pull import pull
from plugins.module_utils.source.options import ProxyOptions
from plugins.module_utils.store import create
from plugins.module_utils.store.repository import Repository


class Begun:
    """Tells of the first event."""

    told = False

    def event(self, _event: Event) -> None:
        if not self.told:
            print("begun", flush=True)
        self.told = True

    def close(self) -> None:
        pass


path, verity, reference, name = sys.argv[1:]
create.prepare(path, fsverity.SHA256, verity)
proxy = ProxyOptions(executable=("skopeo",), tls_verify=False, unenforced_policy="ignore")
with Repository.open(path) as repository:
    (outcome,) = pull.pull_images(
        repository, [pull.Request(reference, name)], pull.Options(proxy=proxy), Progress(Begun())
    )
print("changed" if outcome.changed else "no change")
