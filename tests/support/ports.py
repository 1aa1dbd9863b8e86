# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ports for servers of tests, some of which stop and come back where they were."""

from __future__ import annotations

import contextlib
import pathlib
import random
import socket

_given: set[int] = set()


def free_port(address: str = "127.0.0.1") -> int:
    """A port that nothing listens at. A server that stops can have it again: it lies below those that the kernel gives
    to connections and to whoever asks for any port, so nobody else gets it meanwhile.
    """
    first = int(pathlib.Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = range(max(1024, first // 2), first) if first > 8192 else range(20_000, 32_000)
    for port in random.sample(ports, 200):
        if port in _given:
            continue
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((address, port))
            _given.add(port)
            return port
    raise OSError(f"none of 200 ports of {address} is free")
