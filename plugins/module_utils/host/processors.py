# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""How many processors this process may use."""

from __future__ import annotations

import contextlib
import os

CGROUPS = "/sys/fs/cgroup"


def usable() -> int:
    """Processors this process may use: its affinity, lowered by the quota of its control group (at least 1)."""
    count = len(os.sched_getaffinity(0))
    for quota in _cgroup_quotas():
        count = min(count, max(1, int(quota + 0.5)))
    return max(count, 1)


def _cgroup_quotas() -> list[float]:
    quotas = []
    try:
        with open("/proc/self/cgroup", encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        unified = number == "0"
        if not unified and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS if unified else os.path.join(CGROUPS, "cpu")
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # The limit of any ancestor binds as well. In a container the path may be the host's, while the root that is
        # mounted is the container's own.
        for depth in range(len(parts), -1, -1):
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                quotas += _quota_of(os.path.join(root, *parts[:depth]), unified)
    return quotas


def _quota_of(group: str, unified: bool) -> list[float]:
    """The processors that a control group's own quota allows, as a list of one, or none if it has no quota. Raises
    OSError and ValueError.
    """
    names = ("cpu.max",) if unified else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    words: list[str] = []
    for name in names:
        with open(os.path.join(group, name), encoding="ascii") as file:
            words += file.read().split()
    limit, period = words
    return [] if limit == "max" or int(limit) <= 0 else [int(limit) / int(period)]
