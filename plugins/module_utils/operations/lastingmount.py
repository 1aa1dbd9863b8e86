# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Have an image mounted for longer than a command: remembered, kept alive, brought back at boot.

Every mount of ours has a journal, a link that keeps its image, and where it has a manifest a pin. A plain mount is a
deployment that is confirmed at once; what deployments share with it is here, the rest is in ``activation``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator

from ..errors import Busy, EngineError, PermissionDenied, ReadOnly, VerityUnsupported
from ..formats import repolayout
from ..formats.digests import is_oci_digest
from ..host import deadman, filesystem
from ..host.mountinfo import Mounted
from ..store import namerecords
from ..store.repository import Repository
from . import bootmount, deployment, journal, keeping, mounting
from .deployment import Host
from .journal import Event, Image, Journal, Settings
from .mounting import Target

_REVERT_PREFIX = "composefs-oci-revert-"


@dataclasses.dataclass(frozen=True)
class MountRequest:
    """A mount that is confirmed at once. ``persistent`` None leaves the unit as it is; ``verity_given``: the operator
    wrote the option ``verity``.
    """

    wish: mounting.Wish
    persistent: bool | None = None
    keep_previous: int = 1
    verity_given: bool = False
    who: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a verb did, or in check mode would do. ``previous``: the composefs mount that was there; ``target``: what
    is mounted in the end, None if nothing; ``found``: the journal in the end.
    """

    changed: bool
    previous: Mounted | None
    target: Target | None
    found: Journal | None
    unit: str | None = None
    keeps: tuple[str, ...] = ()
    event: Event | None = None
    mounted: bool = False


@dataclasses.dataclass(frozen=True)
class _Identity:
    name: str | None = None
    digest: str | None = None
    index_digest: str | None = None
    ref: str | None = None


# ---- plain mounts ----------------------------------------------------------------------------------------------------


def have_mounted(repository: Repository, request: MountRequest, host: Host, check: bool = False) -> Result:
    """Have what ``request`` says mounted, kept, remembered and, if asked for, brought back at boot.

    Busy also while an image is on trial there. Where the journal or the names in the repository cannot be written, a
    mount that is not persistent succeeds with a warning.
    """
    path = os.path.realpath(request.wish.path)
    if check or not mounting.may_mount():
        found = _have_mounted(repository, request, path, host, True)
        if found.changed and not check:
            mounting.require_capability(f"Mounting at {path}")
        return found
    with lock(path, host, strict=bool(request.persistent)) as remembers:
        return _have_mounted(repository, request, path, host, False, remembers)


def _have_mounted(
    repository: Repository, request: MountRequest, path: str, host: Host, check: bool, remembers: bool = True
) -> Result:
    before = untried(path, host, check)
    if request.persistent and not request.verity_given:
        require_verity(repository.path, repository.secure, path)
    unit = bootmount.current(path, host.places)
    persistent = unit is not None if request.persistent is None else request.persistent
    target = mounting.decide(repository, request.wish)
    if request.persistent:
        bootmount.require_systemd(host.places)
    where = os.path.realpath(repository.path)
    if persistent:
        bootmount.require_safe(where, host.places)
        bootmount.unit_text(target, where, host.places)  # what no unit can hold is refused before anything is mounted
    identity = _identify(repository, request.wish.image, target.image_id, before)
    names, missing = keeping.foresee(repository, path, target.image_id, *_of(identity), _listed(host))
    image = Image(target.image_id, identity.digest, identity.index_digest, identity.ref, journal.stamp())
    settings = deployment.settings_of(target, request.wish.bootable, persistent)
    after = moved(before, path, where, identity.name, settings, image, request)
    keeper = Keeper(repository, names, target.image_id, identity.digest, host)
    try:
        outcome = mounting.ensure_mounted(repository, request.wish, check, lambda _target, _there: keeper.keep())
    except BaseException:
        keeper.undo()
        raise
    if outcome.changed and not check:
        after = after.with_event(_confirmed(before, image, request.who))
    remembered = before is not None and _without_time(before) == _without_time(after)
    changed = outcome.changed or (missing and keeper.possible)
    changed |= not remembered and remembers and can_remember(host)
    if check:
        changed |= have_unit(target, where, persistent, unit, host, True)
        keeps = keeping.there(repository, path, target.image_id, identity.name, identity.digest)
        if missing and keeper.possible:
            keeps = [*([names.pin] if names.pin is not None else []), f"{repolayout.IMAGE_REFS}/{names.link}"]
        return Result(changed, outcome.previous, target, after, unit_name(path, persistent), tuple(keeps), mounted=True)
    if missing:
        keeper.keep()
    if names.own and names.pin is not None and keeper.kept:
        after = dataclasses.replace(after, pins=tuple(dict.fromkeys((*after.pins, names.pin))))
    if remembers and (before is None or before != after):
        _remember(before, after, persistent, host)
    changed |= have_unit(target, where, persistent, unit, host, False)
    if remembers:
        after = trim(repository, before, after, host)
    keeps = keeping.there(repository, path, target.image_id, identity.name, identity.digest)
    return Result(changed, outcome.previous, target, after, unit_name(path, persistent), tuple(keeps), mounted=True)


def have_unmounted(path: str, host: Host, check: bool = False, rollout: str | None = None) -> Result:
    """Have no image mounted at ``path``, and nothing left that keeps, remembers or brings one back.

    Busy while it is in use, and while somebody has an image on trial there, unless that is ``rollout``.
    """
    path = os.path.realpath(path)
    if check or not mounting.may_mount():
        found = _have_unmounted(path, host, rollout, True)
        if found.changed and not check:
            mounting.require_capability(f"Unmounting {path}")
        return found
    # A task that was killed at the very end may have left its lock, or directories that only the last one removes.
    left = os.path.lexists(f"{journal.file_of(path, host.places)}.lock")
    left = left or any(_is_empty(directory) for directory in (host.places.journals, host.places.library))
    if not left and not _have_unmounted(path, host, rollout, True).changed:
        return Result(False, None, None, None)
    with lock(path, host, strict=False):
        return _have_unmounted(path, host, rollout, False)


def _is_empty(directory: str) -> bool:
    """Whether there is such a directory with nothing in it."""
    try:
        return not os.listdir(directory)
    except OSError:
        return False


def _have_unmounted(path: str, host: Host, rollout: str | None, check: bool) -> Result:
    before = settle(journal.read(path, host.places), host, check)
    trial = before.pending if before else None
    if trial is not None and (rollout is None or trial.rollout != rollout):
        raise Busy(f"At {path} {deployment.described(trial)}.", "Confirm or revert it first.")
    outcome = mounting.ensure_unmounted(path, check)
    changed = outcome.changed or before is not None
    changed |= bootmount.remove(path, host.run, check, stop=True, places=host.places)
    if before is not None and not check:
        if trial is not None:
            deadman.disarm(timer_name(path), host.run, has_systemd(host))
        release_all(before, host)
        journal.remove(path, host.places)
    if not check:
        bootmount.tidy(host.places, path)
    return Result(changed, outcome.previous, None, None)


def untried(path: str, host: Host, check: bool) -> Journal | None:
    """The journal of ``path`` (real), settled. Busy if an image is on trial there."""
    before = settle(journal.read(path, host.places), host, check)
    if before is not None and before.pending is not None:
        raise Busy(f"At {path} {deployment.described(before.pending)}.", "Confirm or revert it first.")
    return before


def require_verity(where: str, secure: bool, path: str) -> None:
    """Raise VerityUnsupported if the repository at ``where`` is not ``secure``, so that nobody would notice a change of
    what is mounted at every boot. Call this unless the operator wrote the option ``verity``.
    """
    if not secure:
        raise VerityUnsupported(
            f"The repository {where} is not protected by fs-verity, so nobody would notice if what is "
            f"mounted at {path} at every boot were changed.",
            "Use a repository that was made with fs-verity, or write 'verity: disabled' in the task.",
        )


def timer_name(path: str) -> str:
    """The unit of the timer that takes back what is on trial at ``path``, without an ending."""
    return f"{_REVERT_PREFIX}{journal.stem(path)}"


# ---- what deployments share with it ----------------------------------------------------------------------------------


class Keeper:
    """Makes the names that keep an image, once; where the repository cannot be written that is a warning."""

    def __init__(
        self, repository: Repository, names: keeping.Names, image_id: str, manifest: str | None, host: Host
    ) -> None:
        self._repository = repository
        self._names = names
        self._image_id = image_id
        self._manifest = manifest
        self._host = host
        self.kept = False
        self._tried = False
        self._made: tuple[list[str], list[str]] = ([], [])

    @property
    def possible(self) -> bool:
        """Whether the repository can be written at all."""
        try:
            self._repository.require_writable()
        except EngineError:
            return False
        return True

    def keep(self) -> None:
        if self._tried:
            return
        self._tried = True
        try:
            self._made = keeping.lacking(self._repository, self._names)
            keeping.keep(self._repository, self._names, self._image_id, self._manifest)
            self.kept = True
        except EngineError as error:
            self._host.warn(f"{error} So nothing keeps the mounted image when garbage is collected.")

    def undo(self) -> None:
        """Remove the names that keep() made, for nothing was mounted after all. Those that were there before stay."""
        made, self._made = self._made, ([], [])
        for complaint in keeping.release(self._repository, *made):
            self._host.warn(complaint)


@contextlib.contextmanager
def lock(path: str, host: Host, strict: bool) -> Iterator[bool]:
    """Hold the lock of the mount point; the value tells whether its journal can be written. If it cannot, that is an
    error with ``strict``, and a warning without.
    """
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(journal.locked(path, host.places))
            can = True
        except (ReadOnly, PermissionDenied) as error:
            if strict:
                raise
            host.warn(f"{error} So this mount is not remembered.")
            can = False
        yield can


def can_remember(host: Host) -> bool:
    """Whether journals can probably be written on this host."""
    return os.access(filesystem.nearest_directory(host.places.journals), os.W_OK)


def has_systemd(host: Host) -> bool:
    return os.path.exists(host.places.running)


def unit_name(path: str, persistent: bool) -> str | None:
    return bootmount.unit_name(path) if persistent else None


def _of(identity: _Identity) -> tuple[str | None, str | None]:
    return identity.name, identity.digest


def settle(found: Journal | None, host: Host, check: bool) -> Journal | None:
    """The journal without what another boot left. One that says nothing any more is removed, with all that it kept."""
    if found is None:
        return None
    after = deployment.settled(found, journal.boot_id(), deployment.shown(found.path) is not None)
    if after == found or check:
        return None if deployment.is_empty(after) and after != found else after
    if deployment.is_empty(after):
        release_all(found, host)
        journal.remove(found.path, host.places)
        return None
    journal.write(after, host.places)
    return after


def _identify(repository: Repository, image: str, image_id: str, before: Journal | None) -> _Identity:
    """The name and the manifest of what is to be mounted. For an image id both are unknown, unless the journal knows
    them from before; for a manifest digest the name is that of the journal, or one that leads there.
    """
    manifest = mounting.manifest_of(repository, image)
    known = before.current if before is not None else None
    if manifest is None:
        if before is not None and known is not None and known.image_id == image_id:
            return _Identity(before.name, known.digest, known.index_digest, known.ref)
        return _Identity()
    if not is_oci_digest(image.lstrip("@")):
        name: str | None = keeping.split_pin(image)[0]
    elif before is not None and before.name is not None and keeping.find_pin(repository, before.name, manifest):
        name = before.name
    else:
        names = sorted(keeping.split_pin(tag)[0] for tag, found in repository.tags().items() if found == manifest)
        name = names[0] if names else None
    record = next(
        (record for one in (image, name) if one and (record := namerecords.read(repository, one)) is not None), None
    )
    if record is None or record.manifest != manifest:
        return _Identity(name, manifest)
    return _Identity(name, manifest, record.index_digest, record.ref)


def _listed(host: Host) -> frozenset[str]:
    """The pins that journals of this host list. One that cannot be read lists none here: then a pin is taken for an
    operator's, and stays.
    """
    found = journal.journals(host.places).values()
    return frozenset(pin for one in found if isinstance(one, Journal) for pin in one.pins)


def moved(
    before: Journal | None,
    path: str,
    repository: str,
    name: str | None,
    settings: Settings,
    image: Image,
    request: MountRequest,
) -> Journal:
    """The journal in which ``image`` is current. What was current is the first of the previous ones, unless it lies in
    another repository.
    """
    found = before or Journal(path)
    previous: tuple[Image, ...] = ()
    if before is not None and before.repository == repository:
        previous = tuple(old for old in before.images() if old.image_id != image.image_id)
        if before.current is not None and before.current.image_id == image.image_id:
            # Where it came from was remembered when it was mounted first, and a name may come from elsewhere by now.
            image = dataclasses.replace(before.current, digest=image.digest)
    return dataclasses.replace(
        found,
        name=name,
        repository=repository,
        mount=dataclasses.replace(settings, extra=found.mount.extra),
        current=image,
        previous=previous[: request.keep_previous],
        boot=None if settings.persistent else journal.boot_id(),
    )


def _confirmed(before: Journal | None, image: Image, who: str) -> Event:
    origin = before.current.image_id if before is not None and before.current is not None else None
    return Event(journal.stamp(), deployment.CONFIRMED, origin, image.image_id, image.digest, None, who)


def _without_time(found: Journal) -> Journal:
    """What counts when two journals are compared: a second run of the same task changes none of it."""
    return dataclasses.replace(found, history=(), pins=(), boot=None)


def _remember(before: Journal | None, after: Journal, persistent: bool, host: Host) -> None:
    try:
        journal.write(after, host.places)
    except (ReadOnly, PermissionDenied) as error:
        if persistent or before is not None:
            raise
        host.warn(f"{error} So this mount is not remembered.")


def have_unit(target: Target, repository: str, persistent: bool, unit: str | None, host: Host, check: bool) -> bool:
    """Write or remove the unit; return whether anything changed. Units of 0.1.0 are rewritten, which interrupts
    nothing.
    """
    if persistent:
        return bootmount.ensure(target, repository, host.run, check, host.places)
    if unit is not None:
        return bootmount.remove(target.path, host.run, check, places=host.places)
    return False


def trim(repository: Repository, before: Journal | None, after: Journal, host: Host) -> Journal:
    """Let go of what no image of the journal needs any more, and forget the pins that are gone."""
    others = frozenset(
        pin
        for one in journal.journals(host.places).values()
        if isinstance(one, Journal) and one.path != after.path
        for pin in one.pins
    )
    if before is not None and before.repository not in ("", after.repository):
        release_all(before, host)
    images = {image.image_id for image in after.images()}
    manifests = {image.digest for image in after.images() if image.digest}
    if after.pending is not None:
        images |= {after.pending.image_id, after.pending.origin or after.pending.image_id}
        manifests |= {after.pending.digest} if after.pending.digest else set()
    links, pins = keeping.surplus(repository, after.path, images, after.pins, manifests)
    for complaint in keeping.release(repository, links, pins, others):
        host.warn(complaint)
    if pins:
        after = dataclasses.replace(after, pins=tuple(pin for pin in after.pins if pin not in pins))
        journal.write(after, host.places)
    return after


def release_all(found: Journal, host: Host) -> None:
    """Let go of everything that a journal keeps in its repository. Where that is gone there is nothing to do."""
    trial = found.pending
    for path in dict.fromkeys((found.repository, trial.repository if trial else "")):
        if not path or not os.path.isdir(path):
            continue
        try:
            with Repository.open(path) as repository:
                links, pins = keeping.surplus(repository, found.path, (), found.pins, ())
                others = frozenset(
                    pin
                    for one in journal.journals(host.places).values()
                    if isinstance(one, Journal) and one.path != found.path
                    for pin in one.pins
                )
                complaints = keeping.release(repository, links, pins, others)
        except EngineError as error:
            complaints = [str(error)]
        for complaint in complaints:
            host.warn(complaint)
