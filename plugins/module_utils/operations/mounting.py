# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Have an image of a repository mounted at a path, or not.

What is there already is judged by the kernel's list of mounts alone: the image in the source of the overlay, fs-verity,
the upper and work directory and the options. What is remembered of a mount is the business of ``lastingmount``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence

from ..formats import fsverity
from ..host import beneath, mountcalls, mountinfo
from ..errors import (
    EngineError,
    Busy,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    InvalidMountOption,
    MountFailed,
    PermissionDenied,
    VerityUnsupported,
    doing,
)
from ..host.mountinfo import Mounted
from ..formats.digests import ObjectDigest, is_oci_digest, object_digest
from ..store.objects import hash_file
from ..store.repository import Repository
from . import journal

REQUIRED, PREFERRED, DISABLED = "required", "preferred", "disabled"
# Options of the overlay file system itself: only those that the kernel shows exactly as they were given. With others
# nobody could tell what is mounted.
FLAGS = ("volatile",)
# What every mount has unless it is asked for otherwise: an image comes from elsewhere, and a device node or a setuid
# file in it would hand the host to any local user.
HARDENING = ("nodev", "nosuid")
CONTEXTS = ("context", "fscontext", "defcontext", "rootcontext")
_CAP_SYS_ADMIN = 21


@dataclasses.dataclass(frozen=True)
class Wish:
    """What shall be mounted where. ``image``: a name, a manifest digest or an image id. ``replace``: also in the place
    of another image. ``dev``, ``suid``: device nodes, and setuid bits and file capabilities, of the image take effect.
    """

    image: str
    path: str
    verity: str = PREFERRED
    upperdir: str | None = None
    workdir: str | None = None
    options: Sequence[str] = ()
    bootable: bool = False
    replace: bool = False
    dev: bool = False
    suid: bool = False


@dataclasses.dataclass(frozen=True)
class Target:
    """The same with everything decided: ``image_id`` in hex, ``path`` and the directories absolute and
    without links.
    """

    image_id: str
    path: str
    verity: bool
    upperdir: str | None = None
    workdir: str | None = None
    options: tuple[str, ...] = HARDENING

    @property
    def read_only(self) -> bool:
        return self.upperdir is None or "ro" in self.options


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a verb did, or would do. ``previous``: the composefs mount that was there; ``target``: what is there now,
    None if nothing.
    """

    changed: bool
    previous: Mounted | None
    target: Target | None


def ensure_mounted(
    repository: Repository,
    wish: Wish,
    check: bool = False,
    prepare: Callable[[Target, Mounted | None], None] | None = None,
) -> Outcome:
    """Mount what ``wish`` says unless exactly that is mounted there; with ``check`` only find out.

    ``prepare`` is called when all is judged, with what is there, directly before the kernel is asked.

    Busy if another file system, or (without ``replace``) another image, is there. ImageNotFound, FormatError if the
    image is damaged, IncompatibleRepository if fs-verity is required and the repository has none, PermissionDenied,
    MountFailed.
    """
    target = decide(repository, wish)
    there = mountinfo.at(target.path)
    if there is not None:
        if there.image_id is None:
            raise Busy(
                f"At {target.path} a file system of another kind is mounted ({there.kind} from {there.source}).",
                "Unmount it, or choose another path.",
            )
        different = differences(there, target)
        if not different:
            return Outcome(False, there, target)
        missing = _lacking(there, target)
        if missing:
            require_capability(f"Changing the mount at {target.path}")
            if not check:
                if prepare is not None:
                    prepare(target, there)
                mountcalls.tighten(there, missing)
            return Outcome(True, there, target)
        if not wish.replace:
            different = differences(there, target, repository)
            raise Busy(
                f"At {target.path} something else is mounted: {'; '.join(different)}.",
                "The state 'remounted' puts the image asked for in its place without a gap; 'unmounted' removes it.",
            )
    # This is checked before anything is made, names in the repository included.
    require_place(repository.path, target.path, target.upperdir, target.workdir, there)

    def words() -> str:
        return called(target.image_id, target.path, repository, wish.image)

    with open_image(repository, object_digest(target.image_id), words) as image:
        if not check:
            objects = repository.objects.dirfd
            request = mountcalls.Request(
                target.image_id, image, objects, target.verity, target.upperdir, target.workdir, target.options, words
            )
            with contextlib.ExitStack() as made:
                for directory in (target.upperdir, target.workdir):
                    if directory:
                        _make_directory(directory, made)
                if prepare is not None:
                    prepare(target, there)
                if there is None:
                    _make_directory(target.path, made)
                    mountcalls.mount(request, target.path)
                else:
                    mountcalls.replace(request, target.path)
                made.pop_all()  # it is mounted, so they stay
    return Outcome(True, there, target)


def require_place(where: str, path: str, upperdir: str | None, workdir: str | None, there: Mounted | None) -> None:
    """Refuse what no image can be mounted over: ``path`` (real), with what is ``there``, for the repository at
    ``where`` and with the directories that take changes. Busy, MountFailed, PermissionDenied, UnsafeRepository.
    """
    if there is not None:
        _check_replaceable(there, path, {upperdir, workdir})
    _check_place(where, path)
    if os.path.lexists(path) and not os.path.isdir(path):
        raise _no_directory(path)
    require_capability(f"Mounting at {path}")
    mountcalls.check_changes(upperdir, workdir)


def ensure_unmounted(path: str, check: bool = False) -> Outcome:
    """Unmount every composefs image that is mounted at ``path``, one above the other; other file systems are left
    alone.

    Busy if it is in use, or hidden below another file system.
    """
    path = os.path.realpath(path)
    first = there = mountinfo.at(path)
    if there is None or there.image_id is None:
        hidden = mountinfo.hidden_at(path)
        if hidden:
            above = f"{there.kind} from {there.source}" if there else "another file system"
            raise Busy(
                f"At {path} {called(hidden[-1].image_id or '', path)} is hidden below another mount ({above}).",
                "Unmount that first.",
            )
        return Outcome(False, None, None)
    inside = mountinfo.children(there)
    if inside:
        raise Busy(f"Within {path} other file systems are mounted: {_paths(inside)}.", "Unmount them first.")
    require_capability(f"Unmounting {path}")
    while not check and there is not None and there.image_id is not None:
        mountcalls.unmount(path)
        there = mountinfo.at(path)
    return Outcome(True, first, None)


def decide(repository: Repository, wish: Wish) -> Target:
    """Find the image and settle every choice that ``wish`` leaves open. Looks only."""
    options = check(wish)
    digest = resolve(repository, wish.image, wish.bootable)
    if wish.verity == REQUIRED and not repository.secure:
        raise IncompatibleRepository(
            f"The repository {repository.path} is not protected by fs-verity, which this mount requires.",
            "Use a repository that was made with it, or set 'verity' to preferred.",
        )
    return Target(
        digest.hex(),
        os.path.realpath(wish.path),
        repository.secure and wish.verity != DISABLED,
        os.path.realpath(wish.upperdir) if wish.upperdir else None,
        os.path.realpath(wish.workdir) if wish.workdir else None,
        options,
    )


def check(wish: Wish) -> tuple[str, ...]:
    """The options of the mount in a fixed order, with the protections that were not given up. InvalidMountOption for
    what can be mounted nowhere.
    """
    if bool(wish.upperdir) != bool(wish.workdir):
        raise InvalidMountOption(
            "A writable mount needs an upper and a work directory, and only one of them was given.",
            "Set both, or none.",
        )
    return _checked(wish.options, bool(wish.upperdir), wish.dev, wish.suid)


def resolve(repository: Repository, image: str, bootable: bool = False) -> ObjectDigest:
    """The fs-verity digest of the EROFS image that ``image`` means: its id in hex, a manifest digest (``sha256:<hex>``)
    or a name.

    Names and manifests lead to the image of the repository's own format, ``bootable`` to the one to boot from. An id
    that is listed is an id, even if an image should have such a name: what was pinned stays pinned. ImageNotFound if
    there is none, or if it does not stand under ``images/``: then it may not be mounted, whatever object has the
    digest.
    """
    digest = _parse_id(image, repository.algorithm)
    if digest is not None and repository.image(digest):
        return digest
    manifest = image.lstrip("@") if is_oci_digest(image.lstrip("@")) else repository.tag_digest(image)
    if manifest is None:
        kind = "listed EROFS image" if digest is not None else "image named"
        raise ImageNotFound(
            f"The repository {repository.path} has no {kind} {image!r}.", "Pull it first, or correct the name."
        )
    from . import listing  # late: a mount by id, as at boot, needs no documents

    found = listing.describe_image(repository, manifest)["boot_image_id" if bootable else "image_id"]
    if found is None:
        option = "bootable" if bootable else "erofs"
        kind = "EROFS image to boot from" if bootable else "EROFS image"
        raise ImageNotFound(
            f"{image} has no {kind} in the repository {repository.path}.",
            f"Pull it with '{option}: true'. Artifacts have none.",
        )
    if not repository.image(object_digest(found)):
        raise ImageNotFound(
            f"The EROFS image {found} of {image} is not listed in the repository {repository.path}.",
            "Pull the image again.",
        )
    return object_digest(found)


def is_id(repository: Repository, image: str) -> bool:
    """Whether ``image`` is the id of a listed EROFS image, and so neither a name nor a manifest."""
    digest = _parse_id(image, repository.algorithm)
    return digest is not None and repository.image(digest)


def manifest_of(repository: Repository, image: str) -> str | None:
    """The manifest (``sha256:<hex>``) that a name or a manifest digest means, None for an image id."""
    if is_id(repository, image):
        return None
    bare = image.lstrip("@")
    return bare if is_oci_digest(bare) else repository.tag_digest(image)


@contextlib.contextmanager
def open_image(repository: Repository, digest: ObjectDigest, words: Callable[[], str] | None = None) -> Iterator[int]:
    """An fd of the image whose content was just proved to have the digest: mount this one, because a name may come to
    mean another file. ``words``: what messages call it.

    A sealed file was measured by the kernel, which also checks every later read. Without a seal the content is hashed
    here, and the proof holds for this moment. FormatError if it is another one.
    """
    try:
        fd = repository.objects.open(digest)
    except EngineError as error:
        if words is not None:
            error.within(f"Opening {words()}")
        raise
    try:
        if not repository.secure and not _is_sealed(fd, repository.algorithm):
            with doing(f"Reading the image {digest.hex()}"):
                found = hash_file(fd, repository.algorithm)[0]
            if found != digest:
                what = words() if words is not None else f"the image {digest.hex()}"
                raise FormatError(
                    f"{what[0].upper()}{what[1:]} is damaged: it has the fs-verity digest {found.hex()}.",
                    "Remove the object and pull the image again.",
                )
        yield fd
    finally:
        os.close(fd)


def called(image_id: str, path: str, repository: Repository | None = None, wished: str = "") -> str:
    """An image in words for a message: what people know of it, which is its name, its version and the beginning of its
    digest, and its id.

    ``wished``: what a task calls it. What that leaves open is taken from the journal of ``path`` and from
    ``repository``. Nothing is refused here: what cannot be found out is left out.
    """
    name = digest = None
    with contextlib.suppress(EngineError):
        one = journal.read(path)
        if one is not None:
            images = (*one.images(), *((one.pending,) if one.pending is not None else ()))
            digest = next((image.digest for image in images if image.image_id == image_id), None)
            name = one.name if digest is not None else None
    version = None
    if repository is not None:
        try:
            from . import listing  # late, and not in the program that mounts at boot
        except ImportError:
            return _in_words(image_id, name, digest, version)
        with contextlib.suppress(EngineError):
            if wished and not is_id(repository, wished):
                digest = manifest_of(repository, wished)
                name = name if is_oci_digest(wished.lstrip("@")) else wished
            if digest is None:
                for found in listing.list_images(repository)[0]:
                    if image_id in (found["image_ids"] or {}).values():
                        digest = found["digest"]
                        break
            if digest is not None and name is None:
                name = min((tag for tag, manifest in repository.tags().items() if manifest == digest), default=None)
            if digest is not None:
                version = listing.describe_image(repository, digest)["labels"].get(listing.VERSION_LABEL)
    return _in_words(image_id, name, digest, version)


def _in_words(image_id: str, name: str | None, digest: str | None, version: str | None) -> str:
    facts = [f"version {version[:64]}"] if version else []
    if digest and digest not in (name or ""):
        facts.append(digest[:19])
    if not name and not facts:
        return f"the image {image_id}"
    return f"the image{f' {name}' if name else ''} ({', '.join((*facts, f'id {image_id}'))})"


def differences(there: Mounted, target: Target, repository: Repository | None = None) -> list[str]:
    """In words, what is mounted otherwise than ``target`` says; empty if nothing is. ``repository``: where another
    image may have a name.
    """
    if there.image_id is not None and there.image_id != target.image_id:
        return [called(there.image_id, there.path, repository)]
    pairs: list[tuple[str, object, object]] = [
        ("verity", there.verity, target.verity),
        ("upperdir", there.directory("upperdir"), target.upperdir),
        ("workdir", there.directory("workdir"), target.workdir),
        ("ro", there.read_only, target.read_only),
    ]
    strict = not {"relatime", "noatime"} & there.options
    pairs += [
        (name, name in there.options or (name == "strictatime" and strict), name in target.options)
        for name in mountcalls.ATTRIBUTES
    ]
    pairs += [
        (name, name in there.settings or there.settings.get("fsync") == name, name in target.options) for name in FLAGS
    ]
    wanted = dict(option.split("=", 1) for option in target.options if "=" in option)
    pairs += [(name, there.settings.get(name), wanted.get(name)) for name in CONTEXTS]
    return [
        f"the same image with {name} {_said(has)} instead of {_said(wants)}"
        for name, has, wants in pairs
        if has != wants
    ]


def _lacking(there: Mounted, target: Target) -> tuple[str, ...]:
    """The protections that the mount lacks, if that is all in which it differs from ``target``; else nothing.

    Mounts of 0.1.0 and of ``cfsctl`` have none. They get the protections in place, since nobody who uses the
    mount loses anything that an image should give.
    """
    missing = tuple(name for name in HARDENING if name in target.options and name not in there.options)
    return missing if not differences(there._replace(options=there.options.union(missing)), target) else ()


def may_mount() -> bool:
    """Whether this process has the capability to mount, as far as can be told."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as status:
            capabilities = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    except (OSError, StopIteration, ValueError):
        return True
    return bool(capabilities >> _CAP_SYS_ADMIN & 1)


def require_capability(what: str) -> None:
    """PermissionDenied unless this process may mount. The kernel would say so, too, but only after things were made."""
    if not may_mount():
        raise PermissionDenied(f"{what} needs the capability CAP_SYS_ADMIN.", "Run as root, for example with become.")


def _checked(options: Sequence[str], writable: bool, dev: bool, suid: bool) -> tuple[str, ...]:
    """The options, each once and in a fixed order, with the protections that were not given up. InvalidMountOption for
    what is unknown or contradicts itself.
    """
    known = (*mountcalls.ATTRIBUTES, *FLAGS, "ro", "rw")
    chosen = sorted(set(options))
    for option in chosen:
        name, separator, value = option.partition("=")
        if (separator and value and name in CONTEXTS) or (not separator and option in known):
            continue
        raise InvalidMountOption(
            f"The mount option {option!r} is not known here.",
            f"Known are {', '.join(sorted(known))} and {', '.join(f'{key}=...' for key in CONTEXTS)}.",
        )
    for one, other in (("ro", "rw"), ("noatime", "strictatime")):
        if one in chosen and other in chosen:
            raise InvalidMountOption(f"The mount options {one} and {other} contradict each other.", "Set one of them.")
    for given, protection in ((dev, "nodev"), (suid, "nosuid")):
        if given and protection in chosen:
            raise InvalidMountOption(
                f"The mount option {protection} and '{protection[2:]}: true' contradict each other.",
                "Set one of them.",
            )
        chosen += [] if given or protection in chosen else [protection]
    chosen.sort()
    if not writable and ("rw" in chosen or "volatile" in chosen):
        raise InvalidMountOption(
            "An image is read-only: the mount options rw and volatile need a place for changes.",
            "Set 'upperdir' and 'workdir'.",
        )
    # Options that hold anyway are left out: the same mount may be asked for with or without them.
    return tuple(option for option in chosen if option != "rw" and not (option == "ro" and not writable))


def _check_replaceable(there: Mounted, path: str, writable: set[str | None]) -> None:
    """Raise Busy if the old mount cannot be detached, or the new one cannot be made beneath it."""
    inside = mountinfo.children(there)
    if inside:
        raise Busy(
            f"Within {path} other file systems are mounted: {_paths(inside)}.",
            "They would vanish with the old mount; unmount them first.",
        )
    used = {there.directory("upperdir"), there.directory("workdir")} - {None}
    if used & writable:
        raise Busy(
            f"The upper or work directory of the new mount at {path} is in use by the old one, and two mounts "
            f"must not write to one.",
            "Unmount it first, and mind that changes made on top of one image need not fit another; or choose other "
            "directories.",
        )


def _check_place(where: str, path: str) -> None:
    own = os.path.realpath(where)
    if os.path.commonpath([own, path]) in (own, path):
        raise MountFailed(
            f"A mount at {path} would hide the repository {own}, or lie within it.", "Choose another path."
        )


def _make_directory(path: str, made: contextlib.ExitStack) -> None:
    """Make the directory and those that it lies in; ``made`` removes those that were made, as far as they are empty."""
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise _no_directory(path)
    missing = [path]
    while not os.path.lexists(os.path.dirname(missing[-1])):
        missing.append(os.path.dirname(missing[-1]))
    # The innermost comes last, to be removed first.
    for directory in reversed(missing):
        made.callback(_remove_directory, directory)
    with doing(f"Making the directory {path}"):
        os.close(beneath.open_path(path, links=False, make=True))


def _no_directory(path: str) -> MountFailed:
    return MountFailed(f"{path} is not a directory, so nothing can be mounted there.", "Choose another path.")


def _remove_directory(path: str) -> None:
    with contextlib.suppress(OSError, EngineError):
        fd = beneath.open_path(os.path.dirname(path), links=False)
        try:
            os.rmdir(os.path.basename(path), dir_fd=fd)
        finally:
            os.close(fd)


def _parse_id(text: str, algorithm: fsverity.Algorithm) -> ObjectDigest | None:
    try:
        return fsverity.parse_hex(text, algorithm)
    except FormatError:
        return None


def _is_sealed(fd: int, algorithm: fsverity.Algorithm) -> bool:
    try:
        return fsverity.measure(fd, algorithm) is not None
    except VerityUnsupported:
        return False


def _paths(inside: Sequence[Mounted]) -> str:
    return ", ".join(mounted.path for mounted in inside[:5])


def _said(value: object) -> str:
    return (
        {True: "on", False: "off", None: "none"}.get(value, str(value))
        if value is None or isinstance(value, bool)
        else str(value)
    )
