# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The system log of a namespace host, which has no systemd: what arrives at /dev/log is appended to /var/log/syslog."""

from __future__ import annotations

import os
import socket

receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("/dev/log")
os.chmod("/dev/log", 0o666)
with open("/var/log/syslog", "ab", buffering=0) as log:
    while True:
        log.write(receiver.recv(65536).rstrip(b"\0\n") + b"\n")
