# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write down, over and over, what every process of this host shows to others: its command line and its environment.

The file named by the argument gets each text once. It ends when a file of that name and .stop appears.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

target = sys.argv[1]
if os.path.exists(target + ".stop"):
    os.unlink(target + ".stop")
seen: set[bytes] = set()
end = time.monotonic() + 180
with open(target, "ab", buffering=0) as out:
    while time.monotonic() < end and not os.path.exists(target + ".stop"):
        for process in os.listdir("/proc"):
            if not process.isdigit() or int(process) == os.getpid():
                continue
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError), open(f"/proc/{process}/{name}", "rb") as file:
                    text = file.read().replace(b"\0", b" ")
                    if text not in seen:
                        seen.add(text)
                        out.write(text + b"\n")
        time.sleep(0.002)
