# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What the host does with a deployment by itself, when it boots and when nobody confirmed in time.

All of this is in the program that units and timers run, so it knows no units, no downloads and no Ansible. Bringing a
deployment about is the business of ``activation``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..errors import Busy, EngineError, MountFailed
from ..host import commands, mountcalls, mountinfo
from ..host.mountinfo import Mounted
from ..store.repository import Repository
from . import journal, keeping, mounting
from .journal import HOST, Event, Journal, Pending, Places, Settings

CONFIRMED, REVERTED, REVERT_FAILED, FAILED = "confirmed", "reverted", "revert_failed", "failed"
REBOOT, TIMEOUT = "reboot", "not confirmed in time"
# Nothing collects garbage for long while a host boots; a boot must not wait for ever, and neither must a timer.
_LOCK_WAIT = 60.0
_TRIES, _PAUSE = 3, 1.0


def _silent(_warning: str) -> None:
    pass


class Host(NamedTuple):
    """This host as the verbs use it: where things lie, how to run a command, and where warnings go."""

    places: Places = HOST
    run: commands.Run = commands.run
    warn: Callable[[str], None] = _silent


def settings_of(target: mounting.Target, bootable: bool, persistent: bool) -> Settings:
    """What a journal remembers of a mount that was decided on."""
    return Settings(
        verity=mounting.REQUIRED if target.verity else mounting.DISABLED,
        opts=tuple(option for option in target.options if option not in mounting.HARDENING),
        dev="nodev" not in target.options,
        suid="nosuid" not in target.options,
        bootable=bootable,
        upperdir=target.upperdir,
        workdir=target.workdir,
        persistent=persistent,
    )


def wish_of(settings: Settings, image_id: str, path: str, replace: bool = False) -> mounting.Wish:
    """The wish to have an image (id in hex) mounted as the journal remembers."""
    return mounting.Wish(
        image_id,
        path,
        settings.verity,
        settings.upperdir,
        settings.workdir,
        settings.opts,
        replace=replace,
        dev=settings.dev,
        suid=settings.suid,
    )


def settled(found: Journal, boot: str, mounted: bool) -> Journal:
    """The journal after what another boot left in it was settled: a trial has ended with that boot, and a mount that
    does not come back has gone with it. ``mounted``: an image is mounted there.
    """
    trial = found.pending
    if trial is not None and trial.boot != boot:
        found = dataclasses.replace(found.with_event(_event(trial, REVERTED, REBOOT)), pending=None)
    if found.boot is not None and found.boot != boot:
        if mounted:
            found = dataclasses.replace(found, boot=boot)
        else:
            found = dataclasses.replace(found, boot=None, current=None, previous=())
    return found


def is_empty(found: Journal) -> bool:
    """Whether a journal says nothing that anybody could still need."""
    rolled = any(event.rollout is not None for event in found.history)
    return found.current is None and found.pending is None and not rolled


def ended(trial: Pending, result: str, reason: str, who: str = "") -> Event:
    """The line of history for a trial that is over."""
    return _event(trial, result, reason, who)


def _event(trial: Pending, result: str, reason: str, who: str = "") -> Event:
    seconds = None
    with contextlib.suppress(ValueError):
        begun = time.strptime(trial.since, "%Y-%m-%dT%H:%M:%SZ")
        seconds = round(max(0.0, time.time() - _utc(begun)), 1)
    return Event(
        journal.stamp(),
        result,
        trial.origin,
        trial.image_id,
        trial.digest,
        trial.rollout,
        who or trial.who,
        reason,
        seconds,
    )


def _utc(moment: time.struct_time) -> float:
    import calendar  # late: only trials that end need it

    return float(calendar.timegm(moment))


def overdue(trial: Pending) -> bool:
    """Whether the deadline has passed, by the wall clock."""
    with contextlib.suppress(ValueError):
        return time.time() > _utc(time.strptime(trial.deadline, "%Y-%m-%dT%H:%M:%SZ"))
    return False


def described(trial: Pending) -> str:
    """Who tries what until when, in words for people."""
    rollout = f"rollout {trial.rollout}" if trial.rollout else "a deployment without a rollout"
    return f"{rollout} of {trial.who or 'somebody'} has an image on trial until {trial.deadline}"


def boot(path: str, host: Host) -> None:
    """Mount what the journal of ``path`` calls current, and then write down what the boot has decided.

    Mounting comes first, and nothing that goes wrong with the journal keeps it from happening: such things are
    warnings. MountFailed without a journal; else what ensure_mounted() raises.
    """
    with contextlib.ExitStack() as held:
        locked = True
        try:
            held.enter_context(journal.locked(path, host.places, _LOCK_WAIT))
        except EngineError as error:
            host.warn(f"{error} The image is mounted nevertheless.")
            locked = False
        found, complaint = journal.read_for_boot(path, host.places)
        if complaint:
            host.warn(complaint)
        if found is None:
            raise MountFailed(
                f"There is no journal that says what to mount at {path}.", "Mount an image there with persistent: true."
            )
        now = journal.boot_id()
        there = mountinfo.at(path)
        trial = found.pending
        if trial is not None and trial.boot == now and there is not None and there.image_id == trial.image_id:
            return  # systemd only learns of a mount that is there already; the trial goes on
        if found.current is not None:
            with Repository.open(found.repository, wait=_LOCK_WAIT) as repository:
                mounting.ensure_mounted(repository, wish_of(found.mount, found.current.image_id, path))
        after = settled(found, now, found.current is not None)
        if (after == found and not complaint) or not locked or found.version > journal.VERSION:
            return
        try:
            journal.write(after, host.places)
        except EngineError as error:
            host.warn(f"{error} What is mounted is right; the next task at {path} tries again.")


def revert(
    path: str,
    host: Host,
    token: str | None = None,
    rollout: str | None = None,
    reason: str = TIMEOUT,
    who: str = "",
    wait: float = journal.LOCK_WAIT,
) -> Event | None:
    """Take back what is on trial at ``path``; return the event that ends the trial, None if there is no trial or it is
    somebody else's.

    A timer names the ``token`` of its trial and a controller its ``rollout``, so a late timer, or a rescue after
    ``busy``, does nothing. Raises the error of the last try if the old image cannot be brought back; the trial then
    stays pending, and the journal says ``revert_failed``.
    """
    with journal.locked(path, host.places, wait):
        found = journal.read(path, host.places)
        trial = found.pending if found else None
        if found is None or trial is None:
            return None
        if (token is not None and token != trial.token) or (rollout is not None and rollout != trial.rollout):
            return None
        return take_back(found, host, REVERTED, reason, who).history[-1]


def take_back(found: Journal, host: Host, result: str, reason: str, who: str = "") -> Journal:
    """The same for a caller that holds the lock and read ``found``: the journal that was written in the end."""
    trial = found.pending
    if trial is None:
        return found
    if trial.boot != journal.boot_id():
        after = settled(found, journal.boot_id(), mountinfo.at(found.path) is not None)
        journal.write(after, host.places)
        return after
    for attempt in range(_TRIES):
        try:
            _restore(found, trial)
            break
        except EngineError as error:
            if attempt + 1 == _TRIES:
                failed = found.with_event(ended(trial, REVERT_FAILED, f"{reason}: {error.text}", who))
                journal.write(failed, host.places)
                error.within(f"Taking back the image on trial at {found.path}")
                raise
            time.sleep(_PAUSE)
    complaint = reload(trial.reload, host)
    after = found.with_event(ended(trial, result, f"{reason}; {complaint}" if complaint else reason, who))
    after = dataclasses.replace(after, pending=None)
    journal.write(after, host.places)
    _let_go(after, trial, host)
    return after


def _restore(found: Journal, trial: Pending) -> None:
    """Have mounted what was there before. Does nothing where it is there already, so it can be done again."""
    path = found.path
    there = mountinfo.at(path)
    if there is not None and there.image_id is None:
        raise Busy(f"At {path} a file system of another kind is mounted ({there.kind}).", "Unmount it.")
    if trial.origin is None:
        while there is not None and there.image_id == trial.image_id:
            # Whoever has files of it open keeps them; a plain unmount would fail because of them.
            mountcalls.detach(path)
            there = mountinfo.at(path)
        return
    if there is not None and there.image_id == trial.origin:
        return
    with Repository.open(found.repository, wait=_LOCK_WAIT) as repository:
        mounting.ensure_mounted(repository, wish_of(found.mount, trial.origin, path, replace=True))


def _let_go(found: Journal, trial: Pending, host: Host) -> None:
    """The image that was taken back loses its link, unless it is kept for another reason. Its pin stays staged."""
    if any(image.image_id == trial.image_id for image in found.images()):
        return
    try:
        with Repository.open(trial.repository or found.repository, write=True, wait=_LOCK_WAIT) as repository:
            repository.unlink_image_ref(keeping.link_name(found.path, trial.image_id))
    except EngineError as error:
        host.warn(str(error))


def reload(words: Sequence[str], host: Host) -> str:
    """Run the command that tells services of another image; return what went wrong, in words, or an empty text."""
    if not words:
        return ""
    try:
        status, output, errors = host.run(list(words))
    except OSError as error:
        return f"the command {' '.join(words)!r} could not be run: {error.strerror}"
    if not status:
        return ""
    said = (errors.strip() or output.strip())[-500:]
    return f"the command {' '.join(words)!r} failed with status {status}" + (f": {said}" if said else "")


def shown(path: str) -> Mounted | None:
    """The composefs mount at ``path``, None if there is none, or something else."""
    there = mountinfo.at(path)
    return there if there is not None and there.image_id is not None else None
