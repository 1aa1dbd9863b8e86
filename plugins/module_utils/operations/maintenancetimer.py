# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A timer of systemd that checks and prunes a repository, on the host and without a controller.

What it runs is a zip application of the engine's own sources, as for mounts, but a file of its own: the program of
mounts stays small, and no task that mounts has to carry what prunes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os

from ..errors import InvalidOption, UnsafeRepository, doing
from ..formats.bounds import MAX_NAME
from ..host import commands, files, safety
from ..host.commands import Run
from ..rootfs import erofs, erofsreader
from ..text import from_file_name
from . import bootmount, journal, maintenance, program, unitfiles
from .journal import HOST, Places

PREFIX = "composefs-maintenance-"
_WANTED_BY = "timers.target"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When: an expression as for ``OnCalendar=``, and up to how many seconds later, by chance."""

    calendar: str = "daily"
    spread: int = 3600


def unit_name(repository: str) -> str:
    """The timer for a repository (absolute path), without ``.timer``."""
    name = PREFIX + journal.escape(os.path.normpath(repository).strip("/"))
    if len(name) > MAX_NAME - len(".service"):
        raise InvalidOption(f"The path {repository} is too long for the name of a unit.", "Choose a shorter one.")
    return name


def ensure(
    repository: str,
    wish: maintenance.Wish,
    schedule: Schedule,
    run: Run = commands.run,
    check: bool = False,
    places: Places = HOST,
) -> bool:
    """Write and start the timer; whether anything had to be changed, or with ``check`` has to be.

    InvalidOption on a host without systemd, and for a time that systemd does not understand; UnsafeRepository if others
    could change what root would run.
    """
    name = unit_name(repository)
    if not any(map(os.path.exists, (places.running, "/usr/lib/systemd/systemd", "/lib/systemd/systemd"))):
        raise InvalidOption(
            "This host has no systemd, so it cannot do anything on a schedule by itself.",
            "Run composefs_check and composefs_prune from a playbook.",
        )
    _require_calendar(schedule.calendar, run)
    fault = safety.fault(places.maintenance)
    if fault:
        raise UnsafeRepository(
            f"The program {places.maintenance}, which root would run, could be changed by others: {fault}.",
            "Have every directory on the way belong to root and be writable for nobody else.",
        )
    contents = {
        places.maintenance: program.made(maintenance.__name__, erofs.__name__, erofsreader.__name__),
        f"{places.units}/{name}.service": os.fsencode(_service(repository, wish, places)),
        f"{places.units}/{name}.timer": os.fsencode(_timer(repository, schedule)),
    }
    stale = {path: content for path, content in contents.items() if unitfiles.read_bytes(path) != content}
    link = f"{places.units}/{_WANTED_BY}.wants/{name}.timer"
    enabled = os.path.lexists(link)
    if check or (enabled and not stale):
        return bool(stale) or not enabled
    with doing(f"Writing the timer {name}"):
        for path, content in stale.items():
            unitfiles.write(path, content)
        if not enabled:
            unitfiles.make_directories(os.path.dirname(link))
            os.symlink(f"{places.units}/{name}.timer", link)
            with files.opened_directory(os.path.dirname(link)) as fd:
                files.sync_directory(fd)
    if unitfiles.tell(run, ["daemon-reload"], places):
        unitfiles.tell(run, ["restart", f"{name}.timer"], places)
    return True


def remove(repository: str, run: Run = commands.run, check: bool = False, places: Places = HOST) -> bool:
    """Remove the timer, and the program with the last one; whether there was one."""
    name = unit_name(repository)
    paths = [f"{places.units}/{name}.{kind}" for kind in ("timer", "service")]
    paths.insert(0, f"{places.units}/{_WANTED_BY}.wants/{name}.timer")
    there = [path for path in paths if os.path.lexists(path)]
    if check or not there:
        return bool(there)
    unitfiles.tell(run, ["stop", f"{name}.timer"], places, strict=False)
    with doing(f"Removing the timer {name}"):
        for path in there:
            os.unlink(path)
    with contextlib.suppress(OSError):
        if not any(other.startswith(PREFIX) for other in os.listdir(places.units)):
            os.unlink(places.maintenance)
            os.rmdir(places.library)
    unitfiles.tell(run, ["daemon-reload"], places)
    return True


def _require_calendar(calendar: str, run: Run) -> None:
    fault = "" if calendar.isprintable() and calendar.strip() else "no time can be read from it"
    if not fault:
        status, _output, errors = run(["systemd-analyze", "calendar", "--", calendar])
        # Where there is no such program systemd itself will have to understand it.
        if status and status != commands.NOT_FOUND:
            fault = (errors.strip().splitlines() or ["it is not understood"])[0]
    if fault:
        raise InvalidOption(
            f"{calendar!r} is no time for a timer of systemd: {fault.rstrip('.')}.",
            "Write it as for OnCalendar, for example daily, or Mon 03:00; see systemd.time(7).",
        )


def _service(repository: str, wish: maintenance.Wish, places: Places) -> str:
    words = [bootmount.interpreter_to_run(), "-I", places.maintenance, *maintenance.words(wish, repository)]
    for word in words:
        if not from_file_name(word).isprintable():
            raise InvalidOption(f"A unit of systemd cannot hold {from_file_name(word)!r}.", "Use printable characters.")
    return f"""\
# Written by composefs.oci.composefs_maintenance, which replaces changes made here.
[Unit]
Description=Check and prune the composefs repository {unitfiles.specifiers(repository)}
RequiresMountsFor={unitfiles.quoted(repository)}

[Service]
Type=oneshot
Nice=19
IOSchedulingClass=idle
NoNewPrivileges=yes
ExecStart={unitfiles.command_line(words)}
"""


def _timer(repository: str, schedule: Schedule) -> str:
    return f"""\
# Written by composefs.oci.composefs_maintenance, which replaces changes made here.
[Unit]
Description=When to check and prune the composefs repository {unitfiles.specifiers(repository)}

[Timer]
OnCalendar={schedule.calendar}
RandomizedDelaySec={schedule.spread}
Persistent=true

[Install]
WantedBy={_WANTED_BY}
"""
