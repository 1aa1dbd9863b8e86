# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Have an image mounted for longer than a command: remembered, kept alive, brought back at boot, taken back in time.

Every mount of ours has a journal, a link that keeps its image, and where it has a manifest a pin. A plain mount is a
deployment that is confirmed at once. An activation first changes nothing that survives a reboot: the journal's
``current`` moves only when it is confirmed, and until then a timer waits that takes the image back.

Order: names that keep the image, then the journal (with the trial, if it is one), then the timer, then the mount. So
whatever dies between two steps leaves the old mount, or the new one with a timer behind it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time

from ..formats import repolayout
from ..errors import (
    Busy,
    EngineError,
    ImageNotFound,
    InvalidOption,
    Reverted,
)
from ..formats.digests import is_oci_digest, object_digest
from ..host import deadman, mountinfo
from ..host.mountinfo import Mounted
from ..store import namerecords
from ..store.repository import Repository
from . import bootmount, deployment, journal, keeping, lastingmount, mounting
from .deployment import Host
from .journal import Image, Journal, Pending, Settings
from .mounting import Target

ACTIVATED, CONFIRMED, REVERTED, ABSENT = "activated", "confirmed", "reverted", "absent"


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What shall be activated, and how. ``digest`` is that of the manifest, or of the index that was pinned; None means
    what ``name`` means now. ``verity``, ``opts`` and ``persistent`` None: as the mount has it now.
    """

    path: str
    name: str | None = None
    digest: str | None = None
    confirm_within: int = 300
    reload: tuple[str, ...] = ()
    rollout: str | None = None
    who: str = ""
    keep_previous: int = 1
    verity: str | None = None
    opts: tuple[str, ...] | None = None
    persistent: bool | None = None


# ---- deployments -----------------------------------------------------------------------------------------------------


def activate(repository: Repository, wanted: Deployment, host: Host, check: bool = False) -> lastingmount.Result:
    """Mount an image on trial: unless it is confirmed in time, what was there before comes back.

    Nothing is fetched: ImageNotFound says that it has to be. Busy while another rollout has an image on trial. With
    ``confirm_within`` 0 it is confirmed at once, also if it is on trial for the same rollout already. Nothing else
    changes where it is, or where the image is current and mounted already.
    """
    path = os.path.realpath(wanted.path)
    if check:
        return _activate(repository, wanted, path, host, True)
    mounting.require_capability(f"Mounting at {path}")
    with lastingmount.lock(path, host, strict=True):
        return _activate(repository, wanted, path, host, False)


def _activate(repository: Repository, wanted: Deployment, path: str, host: Host, check: bool) -> lastingmount.Result:
    before = lastingmount.settle(journal.read(path, host.places), host, check)
    name = wanted.name or (before.name if before else None)
    manifest, asked = _manifest(repository, name, wanted.digest)
    trial = before.pending if before else None
    if before is not None and trial is not None:
        if not deployment.overdue(trial):
            if trial.rollout == wanted.rollout and trial.digest == manifest:
                if not wanted.confirm_within:
                    return _confirm(before, trial, path, host, wanted.keep_previous, wanted.who, check)
                return lastingmount.Result(False, deployment.shown(path), None, before, mounted=True)
            raise Busy(f"At {path} {deployment.described(trial)}.", "Wait for its end, or confirm or revert it.")
        if not check:
            before = deployment.take_back(before, host, deployment.REVERTED, deployment.TIMEOUT)
    choice = _choose(repository, wanted, path, host, before, name, manifest, asked)
    shown = choice.shown
    if _is_current(before, choice.image, choice.settings, choice.where, shown, choice.target):
        after = before if check or before is None else _finish(before, before, host, wanted.keep_previous)
        return lastingmount.Result(False, shown, choice.target, after, choice.unit(path), mounted=True)
    found = before or Journal(path)
    origin = shown.image_id if shown is not None else None
    if origin is not None and (found.current is None or found.current.image_id != origin):
        found = _adopted(repository, found, origin, choice.base, host, check)
    attempt = _Attempt(repository, wanted, path, host, choice, found)
    return attempt.foretold() if check else attempt.make()


@dataclasses.dataclass(frozen=True)
class _Choice:
    """What shall be mounted and how, after everything was checked that can be refused. ``shown`` is the image that is
    mounted now, ``base`` how the mount is meant to be by now, ``settings`` how it will be meant to be; ``where`` is the
    repository.
    """

    where: str
    name: str | None
    manifest: str
    asked: str
    shown: Mounted | None
    base: Settings
    wish: mounting.Wish
    target: Target
    settings: Settings
    image: Image

    def unit(self, path: str) -> str | None:
        """The name of the unit that the mount at ``path`` will have."""
        return lastingmount.unit_name(path, self.settings.persistent)


def _choose(
    repository: Repository,
    wanted: Deployment,
    path: str,
    host: Host,
    before: Journal | None,
    name: str | None,
    manifest: str,
    asked: str,
) -> _Choice:
    """Decide what to mount at ``path``. Raises EngineError for what this host or this repository cannot do."""
    where = os.path.realpath(repository.path)
    there = mountinfo.at(path)
    shown = there if there is not None and there.image_id is not None else None
    base = before.mount if before is not None and before.current else _settings_of(shown)
    wish = _wish(repository, wanted, base, manifest, path)
    if wanted.persistent and wanted.verity is None and not (before is not None and before.current):
        lastingmount.require_verity(repository.path, repository.secure, path)
    target = mounting.decide(repository, wish)
    unit = bootmount.current(path, host.places)
    persistent = wanted.persistent if wanted.persistent is not None else base.persistent or unit is not None
    if wanted.persistent:
        bootmount.require_systemd(host.places)
    if persistent:
        bootmount.require_safe(where, host.places)
        bootmount.unit_text(target, where, host.places)
    record = _record(repository, name, asked, manifest)
    image = Image(
        target.image_id,
        manifest,
        asked if asked != manifest else record.index_digest if record else None,
        record.ref if record else None,
        journal.stamp(),
        wanted.rollout,
    )
    settings = deployment.settings_of(target, base.bootable, persistent)
    return _Choice(where, name, manifest, asked, shown, base, wish, target, settings, image)


class _Attempt:
    """One activation: names, journal, timer, mount, and back again if one of them fails."""

    def __init__(
        self, repository: Repository, wanted: Deployment, path: str, host: Host, choice: _Choice, found: Journal
    ) -> None:
        self._repository = repository
        self._wanted = wanted
        self._path = path
        self._host = host
        self._choice = choice
        image_id, manifest = choice.target.image_id, choice.manifest
        self._names, _missing = keeping.foresee(
            repository, path, image_id, choice.name, manifest, (), choice.asked, adopt=True
        )
        now = time.time()
        self._trial = Pending(
            image_id,
            manifest,
            choice.shown.image_id if choice.shown is not None else None,
            wanted.rollout,
            wanted.who,
            journal.stamp(now),
            journal.stamp(now + wanted.confirm_within),
            journal.boot_id(),
            os.urandom(8).hex(),
            choice.image.index_digest,
            choice.image.ref,
            choice.name,
            choice.where,
            choice.settings,
            wanted.reload,
        )
        self._tried = dataclasses.replace(found, pending=self._trial)
        self._keeper = lastingmount.Keeper(repository, self._names, image_id, manifest, host)

    def foretold(self) -> lastingmount.Result:
        """What the activation would do. Raises EngineError for what would be refused."""
        mounting.ensure_mounted(self._repository, self._choice.wish, check=True)
        return self._on_trial()

    def make(self) -> lastingmount.Result:
        """Activate the image. Raises EngineError; then everything is as it was."""
        wanted, choice, host = self._wanted, self._choice, self._host
        try:
            outcome = mounting.ensure_mounted(self._repository, choice.wish, False, self._prepare)
            if not outcome.changed:
                # It is mounted already, by somebody else's hand: then only the journal has to catch up.
                self._prepare(choice.target, choice.shown)
            complaint = deployment.reload(wanted.reload, host)
            if complaint:
                raise Reverted(
                    f"At {self._path} {complaint}; so the image that was there before is back.",
                    "Find out why the new version failed, and deploy again.",
                )
        except (EngineError, OSError) as error:
            _undo(self._path, self._trial.token, error, host)
            self._keeper.undo()
            raise
        if wanted.confirm_within:
            return self._on_trial()
        return _commit(self._tried, self._trial, wanted.keep_previous, wanted.who, host, choice.shown)

    def _on_trial(self) -> lastingmount.Result:
        choice = self._choice
        return lastingmount.Result(
            True, choice.shown, choice.target, self._tried, choice.unit(self._path), mounted=True
        )

    def _prepare(self, _target: Target, _there: Mounted | None) -> None:
        """Write what must be on the disk before the mount is made, and set the timer."""
        wanted, host, path, names = self._wanted, self._host, self._path, self._names
        self._keeper.keep()
        if names.pin is not None and self._keeper.kept:
            pins = tuple(dict.fromkeys((*self._tried.pins, names.pin)))
            self._tried = dataclasses.replace(self._tried, pins=pins)
        bootmount.install(host.places)
        journal.write(self._tried, host.places)
        if wanted.confirm_within:
            program = [bootmount.interpreter_to_run(), "-I", host.places.application]
            words = [*program, "revert", "--token", self._trial.token, *host.places.words, "--", path]
            deadman.arm(
                lastingmount.timer_name(path), wanted.confirm_within, words, host.run, lastingmount.has_systemd(host)
            )


def confirm(
    path: str,
    host: Host,
    digest: str | None = None,
    rollout: str | None = None,
    keep_previous: int = 1,
    who: str = "",
    check: bool = False,
) -> lastingmount.Result:
    """Make the image on trial the current one, by one atomic write. ``digest`` and ``rollout`` say which is meant.

    Reverted if it was taken back, or something else is mounted by now; Busy if it is another rollout's. Nothing changes
    where the image is current already.
    """
    path = os.path.realpath(path)
    with contextlib.nullcontext(True) if check else lastingmount.lock(path, host, strict=True):
        found = lastingmount.settle(journal.read(path, host.places), host, check)
        trial = found.pending if found else None
        if found is None or trial is None:
            shown = deployment.shown(path)
            return _confirmed_before(found, path, host, digest, rollout, keep_previous, shown, check)
        if (rollout is not None and trial.rollout != rollout) or not _is_meant(trial, digest):
            raise Busy(
                f"At {path} {deployment.described(trial)}, which is not the one to confirm.", "Wait for its end."
            )
        return _confirm(found, trial, path, host, keep_previous, who, check)


def take_back(
    path: str, host: Host, rollout: str | None = None, reason: str = "asked for", who: str = "", check: bool = False
) -> lastingmount.Result:
    """Take back what is on trial at ``path``, unless it is another rollout's. Nothing changes where nothing is."""
    path = os.path.realpath(path)
    shown = deployment.shown(path)
    found = journal.read(path, host.places)
    trial = found.pending if found else None
    meant = trial is not None and (rollout is None or trial.rollout == rollout)
    if check or not meant:
        return lastingmount.Result(meant, shown, None, found, mounted=shown is not None)
    mounting.require_capability(f"Mounting at {path}")
    event = deployment.revert(path, host, rollout=rollout, reason=reason, who=who)
    deadman_name = lastingmount.timer_name(path)
    if event is not None:
        deadman.disarm(deadman_name, host.run, lastingmount.has_systemd(host))
    after = journal.read(path, host.places)
    return lastingmount.Result(
        event is not None, shown, None, after, event=event, mounted=deployment.shown(path) is not None
    )


# ---- how -------------------------------------------------------------------------------------------------------------


def _manifest(repository: Repository, name: str | None, digest: str | None) -> tuple[str, str]:
    """The manifest to deploy, and the digest that was asked for, which may be that of an index."""
    if name is None:
        raise InvalidOption("Nothing says which image to deploy.", "Set 'name'.")
    if digest is None:
        found = repository.tag_digest(name)
        if found is None:
            raise ImageNotFound(f"The repository {repository.path} has no image named {name!r}.", _PREFETCH)
        return found, found
    pinned = repository.tag_digest(f"{name}@{digest}")
    if pinned is not None:
        return pinned, digest
    if not is_oci_digest(digest):
        raise InvalidOption(f"{digest!r} is no digest of an image.", "Digests look like sha256:<64 hex digits>.")
    if repository.stream(repolayout.manifest_stream(digest)) is None:
        raise ImageNotFound(
            f"The repository {repository.path} has neither the name {name}@{digest} nor a manifest of that digest.",
            _PREFETCH,
        )
    return digest, digest


def _record(repository: Repository, name: str | None, asked: str, manifest: str) -> namerecords.NameRecord | None:
    """What is remembered of where the image came from."""
    for one in (f"{name}@{asked}", name) if name is not None else ():
        record = namerecords.read(repository, one)
        if record is not None and record.manifest == manifest:
            return record
    return None


_PREFETCH = "Fetch it first with composefs_image: activating never does."


def _wish(repository: Repository, wanted: Deployment, base: Settings, manifest: str, path: str) -> mounting.Wish:
    image_id = mounting.resolve(repository, manifest, base.bootable).hex()
    verity = wanted.verity or (base.verity if base != Settings() else mounting.PREFERRED)
    if wanted.verity is None and verity == mounting.REQUIRED and not repository.secure:
        verity = mounting.PREFERRED
    settings = dataclasses.replace(base, verity=verity, opts=base.opts if wanted.opts is None else wanted.opts)
    # The words nodev and nosuid may stand among the options, too, as in earlier versions.
    opts = tuple(option for option in settings.opts if option not in mounting.HARDENING)
    given = {option for option in settings.opts if option in mounting.HARDENING}
    settings = dataclasses.replace(
        settings, opts=opts, dev=settings.dev and "nodev" not in given, suid=settings.suid and "nosuid" not in given
    )
    return deployment.wish_of(settings, image_id, path, replace=True)


def _settings_of(shown: Mounted | None) -> Settings:
    """How an image is mounted that no journal knows: one of cfsctl, or of a version before journals."""
    if shown is None:
        return Settings()
    opts = [name for name in ("noexec", "noatime", "nodiratime", "nosymfollow") if name in shown.options]
    opts += [f"{name}={shown.settings[name]}" for name in mounting.CONTEXTS if name in shown.settings]
    return Settings(
        verity=mounting.REQUIRED if shown.verity else mounting.DISABLED,
        opts=tuple(opts),
        upperdir=shown.directory("upperdir"),
        workdir=shown.directory("workdir"),
    )


def _is_current(
    before: Journal | None, image: Image, settings: Settings, where: str, shown: Mounted | None, target: Target
) -> bool:
    """Whether just this is what the journal calls current, and what is mounted."""
    return (
        before is not None
        and before.current is not None
        and before.pending is None
        and before.current.image_id == image.image_id
        and before.repository == where
        and dataclasses.replace(before.mount, extra={}) == settings
        and shown is not None
        and not mounting.differences(shown, target)
    )


def _adopted(repository: Repository, found: Journal, origin: str, base: Settings, host: Host, check: bool) -> Journal:
    """A journal for the mount that is there, so that there is a way back to it. Busy if the repository does
    not have its image.
    """
    if not repository.image(object_digest(origin)):
        raise Busy(
            f"At {found.path} {mounting.called(origin, found.path)} is mounted, which the repository {repository.path} "
            f"does not have, so there would be no way back.",
            "Unmount it first.",
        )
    keeper = lastingmount.Keeper(
        repository, keeping.Names(keeping.link_name(found.path, origin), None, False), origin, None, host
    )
    if not check:
        keeper.keep()
    if found.current is not None:
        return found
    current = Image(origin, since=journal.stamp())
    return dataclasses.replace(
        found,
        repository=os.path.realpath(repository.path),
        mount=base,
        current=current,
        boot=None if base.persistent else journal.boot_id(),
    )


def _undo(path: str, token: str, error: EngineError | OSError, host: Host) -> None:
    """After an activation that failed: nothing is on trial, and the mount is as it was. The first failure is
    the one to report; if going back fails as well, the timer is still there.
    """
    with contextlib.suppress(EngineError):
        found = journal.read(path, host.places)
        if found is not None and found.pending is not None and found.pending.token == token:
            reason = error.text if isinstance(error, EngineError) else error.strerror or type(error).__name__
            after = deployment.take_back(found, host, deployment.FAILED, reason)
            deadman.disarm(lastingmount.timer_name(path), host.run, lastingmount.has_systemd(host))
            if deployment.is_empty(after):
                journal.remove(path, host.places)


def _is_meant(trial: Pending, digest: str | None) -> bool:
    return digest is None or digest in (trial.digest, trial.index_digest)


def _confirmed_before(
    found: Journal | None,
    path: str,
    host: Host,
    digest: str | None,
    rollout: str | None,
    keep_previous: int,
    shown: Mounted | None,
    check: bool,
) -> lastingmount.Result:
    """Confirm where nothing is on trial: fine if the image is current, Reverted if it was taken back."""
    current = found.current if found is not None else None
    last = found.history[-1] if found is not None and found.history else None
    gone = last is not None and last.result != deployment.CONFIRMED
    if gone and last is not None and (rollout is None or last.rollout == rollout):
        raise Reverted(
            f"The image on trial at {path} was taken back at {last.time}: {last.reason or last.result}.",
            "Find out why, and deploy again.",
        )
    meant = current is not None and (digest is None or digest in (current.digest, current.index_digest))
    if found is None or not meant or shown is None or current is None or shown.image_id != current.image_id:
        raise Reverted(f"Nothing is on trial at {path} that could be confirmed.", "Activate it first.")
    after = found if check else _finish(found, found, host, keep_previous)
    return lastingmount.Result(False, shown, None, after, mounted=True)


def _confirm(
    found: Journal, trial: Pending, path: str, host: Host, keep_previous: int, who: str, check: bool
) -> lastingmount.Result:
    """Confirm what is on trial; Reverted if something else is mounted by now."""
    shown = deployment.shown(path)
    if shown is None or shown.image_id != trial.image_id:
        raise Reverted(
            f"At {path} the image on trial is not mounted any more, so it is not confirmed.",
            "Find out who unmounted it, and deploy again.",
        )
    if check:
        return lastingmount.Result(True, shown, None, found, mounted=True)
    return _commit(found, trial, keep_previous, who, host, shown)


def _commit(
    found: Journal, trial: Pending, keep_previous: int, who: str, host: Host, previous: Mounted | None
) -> lastingmount.Result:
    """Move ``current``. What comes after the write follows from it, and the next verb repairs what is missing."""
    image = Image(trial.image_id, trial.digest, trial.index_digest, trial.ref, journal.stamp(), trial.rollout)
    request = lastingmount.MountRequest(mounting.Wish("", found.path), keep_previous=max(keep_previous, 0))
    after = lastingmount.moved(found, found.path, trial.repository, trial.name, trial.mount, image, request)
    after = dataclasses.replace(after.with_event(deployment.ended(trial, deployment.CONFIRMED, "", who)), pending=None)
    journal.write(after, host.places)
    after = _finish(found, after, host, keep_previous)
    return lastingmount.Result(True, previous, None, after, mounted=True, event=after.history[-1])


def _finish(before: Journal, after: Journal, host: Host, keep_previous: int) -> Journal:
    """What follows from a commit: name, unit, timer, and letting go of what is too old. All of it can be done again."""
    deadman.disarm(lastingmount.timer_name(after.path), host.run, lastingmount.has_systemd(host))
    current = after.current
    if current is None:
        return after
    with Repository.open(after.repository) as repository:
        wish = deployment.wish_of(after.mount, current.image_id, after.path)
        target = mounting.decide(repository, wish)
        asked = current.index_digest or current.digest
        names, missing = keeping.foresee(
            repository, after.path, current.image_id, after.name, current.digest, after.pins, asked
        )
        if missing:
            lastingmount.Keeper(repository, names, current.image_id, current.digest, host).keep()
        if after.name is not None:
            _move_name(repository, after.name, current, names.pin, host)
        unit = bootmount.current(after.path, host.places)
        lastingmount.have_unit(target, after.repository, after.mount.persistent, unit, host, False)
        if len(after.previous) > keep_previous:
            after = dataclasses.replace(after, previous=after.previous[:keep_previous])
            journal.write(after, host.places)
        return lastingmount.trim(repository, before, after, host)


def _move_name(repository: Repository, name: str, current: Image, pin: str | None, host: Host) -> None:
    """Let the plain name follow what was confirmed."""
    try:
        if current.digest is not None and repository.tag_digest(name) != current.digest:
            keeping.name_like(repository, name, pin or name, current.digest)
            # Whoever is told of the confirmation must find the name moved, also after a power cut.
            repository.sync()
    except EngineError as error:
        host.warn(str(error))
