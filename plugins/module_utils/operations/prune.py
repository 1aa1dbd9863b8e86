# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Remove what nothing keeps.

What is kept and what is not is worked out under the lock that everyone shares, while others go on pulling. Then the
lock is taken alone, everything that may have moved meanwhile is looked at again, and what is still dead goes: first
names, then the links of streams and images, then, after a barrier, objects. So whenever the run is cut off, nothing
leads to something that is gone, and the next run removes the rest.

What cannot be understood stops the run before the first removal, because nobody can tell what it needs. What nothing
can depend on, a reference that leads nowhere or a file that does not belong there, is reported and left alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..formats.digests import ObjectDigest
from . import keepers
from .foreseen import Ahead
from ..formats import fsverity, reference, repolayout
from ..host import processors, workers
from ..errors import EngineError, FormatError, InvalidOption, doing, from_os_error
from ..progress import Countdown, Progress
from ..store import graph as graphs
from ..store import imagestreams, marks, namerecords
from ..store.graph import Graph, Problem, Root
from ..store.repository import LOCK_WAIT, Repository

NEVER = ("localhost/bootc-*",)
"""Names that belong to others, and that no pattern removes."""
STREAMS, IMAGES, FILES, LEFTOVERS, DAMAGED = "streams", "images", "files", "leftovers", "damaged"
KINDS = (STREAMS, IMAGES, FILES, LEFTOVERS, DAMAGED)
# So many objects are removed by several processes.
_MANY = 10_000
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_TRUSTED = f"{marks.DIRECTORY}/trusted"
_SET_ASIDE = f"{marks.DIRECTORY}/damaged"


@dataclasses.dataclass(frozen=True)
class Wish:
    """What to remove. ``remove`` and ``keep`` are patterns of names; of those that match a pattern of ``remove`` the
    ``keep_last`` newest and those set less than ``older_than`` seconds ago stay. ``timeout``: seconds for the lock.
    """

    keep: Sequence[str] = ()
    remove: Sequence[str] = ()
    keep_last: int = 0
    older_than: float = 0.0
    timeout: float = LOCK_WAIT


@dataclasses.dataclass
class Pruned:
    """What was removed, or would be: names, EROFS images (hex), names under ``streams/``, the number of objects, and
    bytes, of which ``bytes_by_kind`` is the sum.

    ``certain``: whether all of this is known; images that are still to come may share what would be removed.
    ``links``: references below ``images/refs`` that mounts of an earlier boot have left.
    ``by_name``: the bytes that removing each name alone would free. ``held``: names that ``remove`` asked for and that
    are in use. ``problems``: what is not understood and was left alone.
    """

    names: list[str] = dataclasses.field(default_factory=list)
    links: list[str] = dataclasses.field(default_factory=list)
    images: list[str] = dataclasses.field(default_factory=list)
    streams: list[str] = dataclasses.field(default_factory=list)
    objects: int = 0
    bytes: int = 0
    bytes_by_kind: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    by_name: dict[str, int] = dataclasses.field(default_factory=dict)
    held: list[str] = dataclasses.field(default_factory=list)
    problems: list[Problem] = dataclasses.field(default_factory=list)
    changed: bool = False
    certain: bool = True


def seconds(text: str | None) -> float:
    """What ``older_than`` means as an option, in seconds; 0.0 for None. InvalidOption if it means nothing."""
    if text is None:
        return 0.0
    match = re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]{1,6})?)([smhdw]?)", text.strip())
    if match is None:
        raise InvalidOption(
            f"The option older_than is {text!r}.", "Write a number with s, m, h, d or w behind it, for example 30d."
        )
    return float(match[1]) * _UNITS[match[2]]


def wish_of(params: Mapping[str, Any]) -> Wish:
    """The wish that the options ``keep``, ``remove``, ``keep_last``, ``older_than`` and ``timeout`` of a task mean.
    InvalidOption.
    """
    for option in ("keep_last", "timeout"):
        if params[option] < 0:
            raise InvalidOption(f"The option {option} is {params[option]}.", "It must be at least 0.")
    return Wish(
        keep=params["keep"],
        remove=params["remove"],
        keep_last=params["keep_last"],
        older_than=seconds(params["older_than"]),
        timeout=params["timeout"],
    )


def vain(params: Mapping[str, Any]) -> list[str]:
    """The options of a task that say nothing, because no name is removed at all; what to tell of them."""
    given = [option for option in ("keep_last", "older_than") if params[option]]
    if params["remove"] or not given:
        return []
    return [
        f"Without 'remove' no name is removed, so {' and '.join(given)} "
        f"{'say' if len(given) > 1 else 'says'} nothing. Write in 'remove' which names may go."
    ]


def astray(patterns: Sequence[str], result: Pruned) -> list[str]:
    """What to tell of patterns in ``remove`` that fit no name only because they lack the ``docker://`` that default
    names begin with.
    """
    names = {*result.names, *result.held, *result.by_name}
    return [
        f"The pattern {pattern!r} in 'remove' fits no name. Names of images that were pulled without a 'name' begin "
        f"with docker://, so write 'docker://{pattern}' if it means those."
        for pattern in patterns
        if not any(_fits(name, pattern) for name in names) and any(_may_mean(name, pattern) for name in names)
    ]


@dataclasses.dataclass
class _Plan:
    """What is dead, as of one look at the repository and the host."""

    graph: Graph
    roots: list[Root]
    ended: list[keepers.Keeper]
    result: Pruned = dataclasses.field(default_factory=Pruned)
    # For each of the 256 directories the digests of the objects in it, one after the other: names would take three
    # times as much memory.
    dead: list[bytes] = dataclasses.field(default_factory=list)
    links: list[str] = dataclasses.field(default_factory=list)
    files: list[str] = dataclasses.field(default_factory=list)


def prune(
    repository: Repository,
    wish: Wish,
    progress: Progress,
    check: bool = False,
    look: Callable[[Repository], list[keepers.Keeper]] = keepers.keepers,
    settle: Callable[[list[keepers.Keeper]], None] = keepers.settle,
    ahead: Ahead | None = None,
) -> Pruned:
    """Remove what nothing keeps, or with ``check`` foretell it.

    FormatError (``repository_damaged``) if something that may be needed cannot be read; Busy if others do not let go of
    the repository within ``wish.timeout`` seconds. ``look`` tells what this host needs, ``settle`` has its journals
    forget what mounts of earlier boots have left. ``ahead`` is what will have happened by then, for ``check`` only.
    """
    if not check:
        repository.require_writable()
    plan = _plan(repository, wish, progress, look, ahead=ahead if check else None)
    if check or not plan.result.changed:
        return plan.result
    progress.message("Waiting until nobody else uses the repository")
    with repository.exclusive(wish.timeout):
        again = Graph.read(repository, prove=True, before=plan.graph)
        found = look(repository)
        moved = keepers.roots(again, found) != plan.roots or _ended(found) != plan.ended
        if moved or again.names() != plan.graph.names():
            plan = _plan(repository, wish, progress, look, again)
        if plan.result.changed:
            _sweep(repository, plan, progress)
    settle(plan.ended)
    return plan.result


# --- what is dead
# --------------------------------------------------------------------------------------------------------------------


def _plan(
    repository: Repository,
    wish: Wish,
    progress: Progress,
    look: Callable[[Repository], list[keepers.Keeper]],
    graph: Graph | None = None,
    ahead: Ahead | None = None,
) -> _Plan:
    progress.message("Working out what is kept")
    graph = graph or Graph.read(repository, prove=True)
    found = look(repository)
    certain = True
    if ahead is not None:
        certain = ahead.certain(graph)
        found = ahead.apply(graph, found)
    plan = _Plan(graph, keepers.roots(graph, found), _ended(found))
    result = plan.result
    result.problems += graph.problems
    result.names, result.held = _chosen(graph, found, wish, ahead.coming(graph) if ahead is not None else {})
    result.links = sorted(f"{repolayout.IMAGE_REFS}/{link}" for keeper in plan.ended for link in keeper.links)
    gone = {*((graphs.TAG, name) for name in result.names), *((graphs.IMAGE_REF, link) for link in result.links)}
    everyone = _by_label([*graph.roots, *plan.roots])
    staying = {label: roots for label, roots in everyone.items() if label not in gone}
    live = graph.owners_of_groups(list(staying.values()))
    # What only removed names need may be damaged: that is no error here.
    owners = graph.owners_of_groups(list(everyone.values()), _pass_over) if gone else live
    freed = [0] * len(everyone)
    named = _named(repository, plan)
    size, shared, by_kind = repository.algorithm.size, graphs.SHARED, result.bytes_by_kind
    left = Countdown(progress, "Working out what is kept", 256, share=True)
    for first, objects in enumerate(_objects(repository, result.problems)):
        alive = live.part(first)
        owner_of = alive if owners is live else owners.part(first)
        kinds: dict[int, str] = {}
        for kind, path, key in named[first]:
            kinds.setdefault(key, kind)
            if key not in alive:
                plan.links.append(path)
        dead, digests, start, lost = bytearray(), objects.digests, 0, 0
        for key, length in zip(objects.keys, objects.sizes):
            if key in owner_of:
                owner = owner_of[key]
                if owner != shared:
                    freed[owner] += length
            if key not in alive:
                dead += digests[start : start + size]
                if key in kinds:
                    by_kind[kinds[key]] += length
                else:
                    lost += length
            start += size
        by_kind[FILES] += lost
        plan.dead.append(bytes(dead))
        left.reached(first + 1)
    result.objects = sum(map(len, plan.dead)) // size
    result.by_name = {name: freed[number] for number, (kind, name) in enumerate(everyone) if kind == graphs.TAG}
    # Removed from the top down: a run that is cut off must not leave an image of which a part has lost its name.
    plan.links.sort(key=_rank)
    result.streams = sorted(path[8:] for path in plan.links if path.startswith("streams/"))
    result.images = sorted(path[7:] for path in plan.links if path.startswith("images/"))
    for kind, path, size in _leftovers(repository):
        plan.files.append(path)
        result.bytes_by_kind[kind] += size
    result.bytes = sum(result.bytes_by_kind.values())
    result.problems.sort()
    result.changed = bool(result.names or result.links or plan.links or result.objects or plan.files)
    result.certain = certain
    return plan


def _rank(path: str) -> tuple[int, str]:
    tops = (f"streams/{imagestreams.MANIFEST}", f"streams/{imagestreams.CONFIG}", "streams/", "images/")
    return next((number for number, top in enumerate(tops) if path.startswith(top)), len(tops)), path


def _pass_over(_node: ObjectDigest, _error: EngineError) -> None:
    """Ignore what cannot be read: the other look at the graph complains of it."""


def _named(repository: Repository, plan: _Plan) -> list[list[tuple[str, str, int]]]:
    """The links that are removed with the object that they lead to: kind, path and key, by the digest's first byte."""
    found: list[list[tuple[str, str, int]]] = [[] for _first in range(256)]
    for kind, links in ((STREAMS, plan.graph.streams), (IMAGES, plan.graph.images)):
        for name, digest in links.items():
            found[digest[0]].append((kind, f"{kind}/{name}", graphs.key(digest)))
    # Proofs about layers that are gone would only pile up.
    for link in graphs.list_links(repository, _TRUSTED):
        with contextlib.suppress(FormatError):
            digest = fsverity.parse_hex(link.text or "", repository.algorithm)
            found[digest[0]].append((FILES, link.path, graphs.key(digest)))
    return found


def _ended(found: Sequence[keepers.Keeper]) -> list[keepers.Keeper]:
    return [keeper for keeper in found if keeper.kind == keepers.ENDED]


def _by_label(roots: Sequence[Root]) -> dict[tuple[str, str], list[Root]]:
    """Roots grouped by kind and name: what two of one name keep, that name keeps alone."""
    found: dict[tuple[str, str], list[Root]] = {}
    for root in roots:
        found.setdefault((root.kind, root.name), []).append(root)
    return found


def _chosen(
    graph: Graph, found: Sequence[keepers.Keeper], wish: Wish, coming: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """The names to remove, and those that a pattern asks for but that a mount or a journal uses. ``coming`` are names
    that will be there by then, and their manifests, which are not here yet.
    """
    tags = {root.name: root for root in graph.roots if root.kind == graphs.TAG}
    times = {**{name: graph.times[name] for name in tags}, **dict.fromkeys(coming, time.time())}
    staying = {name for name in times if any(_may_mean(name, pattern) for pattern in (*NEVER, *wish.keep))}
    used_names = {name for keeper in found if keeper.kind != keepers.ENDED for name in keeper.names}
    # Nobody asked for these, but nobody needs them either: they came with a mount that ended with an earlier boot.
    left = {name for keeper in _ended(found) for name in keeper.names if name in tags} - staying - used_names
    newest_first = sorted(times, key=lambda name: (-times[name], name))
    before = time.time() - wish.older_than
    wanted: set[str] = set()
    for pattern in wish.remove:
        matching = [name for name in newest_first if name not in staying and _fits(name, pattern)]
        wanted.update(name for name in matching[wish.keep_last :] if times[name] <= before or not wish.older_than)
    held = set()
    if wanted:
        used_nodes = {root.node for root in keepers.roots(graph, list(found))}
        used_manifests = frozenset().union(*(keeper.manifests for keeper in found if keeper.kind != keepers.ENDED))
        held = {
            name
            for name in wanted
            if name in used_names
            or coming.get(name) in used_manifests
            or (name in tags and used_nodes.intersection(graph.nodes(tags[name], _pass_over)))
        }
    return sorted((wanted - held) | left), sorted(held - left)


def _fits(name: str, pattern: str) -> bool:
    """Whether a name fits a pattern, or is another spelling of it: ``docker://x`` and ``x`` are one default name."""
    return fnmatch.fnmatchcase(name, pattern) or name in reference.other_names(pattern)


def _may_mean(name: str, pattern: str) -> bool:
    """The same, and that ``registry.example.com/*`` means the default names there, which begin with ``docker://``,
    whoever writes it. That is enough for what is to stay, since to keep too much is the lesser harm.
    """
    return _fits(name, pattern) or fnmatch.fnmatchcase(name, f"docker://{pattern}")


class _Found(NamedTuple):
    """The objects in one of the 256 directories: their digests, one after the other, and for each the key and bytes."""

    digests: bytes = b""
    keys: Sequence[int] = ()
    sizes: Sequence[int] = ()


def _objects(repository: Repository, problems: list[Problem]) -> Iterator[_Found]:
    """What is in each of the 256 directories. What is no object is a problem."""
    for first in range(256):
        place = f"objects/{first:02x}"
        with doing(f"Listing {repository.path}/{place}"):
            try:
                fd = repository.root.open_directory(place)
            except FileNotFoundError:
                yield _Found()
                continue
            except FormatError:
                # Nothing is removed from what is no directory, so nothing in it can be lost.
                problems.append(Problem("stray_file", place))
                yield _Found()
                continue
            try:
                found = _objects_in(fd, place, repository.algorithm.size, problems)
            finally:
                os.close(fd)
        yield found


def _objects_in(fd: int, place: str, size: int, problems: list[Problem]) -> _Found:
    # Some hundred thousand objects are nothing unusual, so as much as possible is done for many at once.
    names, head = os.listdir(fd), place[-2:]
    if not _all_digests(names, size):
        is_name = re.compile(f"[0-9a-f]{{{2 * size - 2}}}").fullmatch
        problems += [Problem("stray_file", f"{place}/{name}") for name in names if not is_name(name)]
        names = list(filter(is_name, names))
    others: set[str] = set()
    sizes: list[int] = []
    look, is_file = os.stat, stat.S_ISREG
    for name in names:
        try:
            entry = look(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            others.add(name)
            continue
        if is_file(entry.st_mode):
            sizes.append(entry.st_size)
        else:
            others.add(name)
            problems.append(Problem("stray_file", f"{place}/{name}"))
    if others:
        names = [name for name in names if name not in others]
    digests = bytes.fromhex("".join([head, head.join(names)]) if names else "")
    return _Found(digests, graphs.keys(digests, size), sizes)


def _all_digests(names: list[str], size: int) -> bool:
    """Whether all are names of objects with digests of ``size`` bytes: so many small hex digits each."""
    if not set(map(len, names)) <= {2 * size - 2}:
        return False
    text = "".join(names)
    try:
        # What is read leniently is not what is written.
        return bytes.fromhex(text).hex() == text
    except ValueError:
        return False


def _leftovers(repository: Repository) -> list[tuple[str, str, int]]:
    """What crashed writers left: drafts of objects, links and marks; and what a repair set aside. Kind, path and bytes.

    While the lock is held alone no writer lives, for writers hold it, too.
    """
    found = []
    for directory, prefixes, kind in (
        ("", (".symlink-",), LEFTOVERS),
        ("objects", (".tmp-object-",), LEFTOVERS),
        (marks.IMPORTS, (".",), LEFTOVERS),
        (_SET_ASIDE, ("",), DAMAGED),
    ):
        with (
            doing(f"Listing {repository.path}/{directory}"),
            contextlib.suppress(FileNotFoundError),
            repository.root.directory(directory) as fd,
        ):
            for name in sorted(os.listdir(fd)):
                if not name.startswith(prefixes):
                    continue
                entry = os.stat(name, dir_fd=fd, follow_symlinks=False)
                if stat.S_ISREG(entry.st_mode) or stat.S_ISLNK(entry.st_mode):
                    path = f"{directory}/{name}" if directory else name
                    found.append((kind, path, entry.st_size if stat.S_ISREG(entry.st_mode) else 0))
    return found


# --- removal
# --------------------------------------------------------------------------------------------------------------------


def _sweep(repository: Repository, plan: _Plan, progress: Progress) -> None:
    for name in plan.result.names:
        repository.untag(name)
        namerecords.forget(repository, name)
    for path in plan.result.links:
        with doing(f"Removing {repository.path}/{path}"), repository.root.parent(path) as (fd, name):
            _unlink(fd, name, f"{repository.path}/{path}")
    for name in namerecords.strays(repository):
        namerecords.forget(repository, name)
    for path in (*plan.links, *plan.files):
        with doing(f"Removing {repository.path}/{path}"), repository.root.parent(path) as (fd, name):
            _unlink(fd, name, f"{repository.path}/{path}")
    # A link that comes back after a power cut must not lead to an object that did not.
    repository.sync()
    done = 0
    left = Countdown(progress, "Removing objects", plan.result.objects)

    def work(first: int, tell: Callable[[Any], None]) -> None:
        if plan.dead[first]:
            tell(_remove_objects(repository, f"objects/{first:02x}", plan.dead[first]))

    def take(count: int) -> None:
        nonlocal done
        done += count
        left.reached(done)

    # Nobody else may use the repository meanwhile, so it should be over soon.
    many = plan.result.objects >= _MANY
    workers.spread("removes objects", 256, work, take, processors.usable() if many else 1)
    # What is reported as removed must not come back after a power cut.
    repository.sync()


def _remove_objects(repository: Repository, place: str, digests: bytes) -> int:
    """Remove the objects with these digests from their directory; how many they are."""
    text, digits = digests.hex(), 2 * repository.algorithm.size
    names = [text[start + 2 : start + digits] for start in range(0, len(text), digits)]
    unlink = os.unlink
    with doing(f"Removing objects of {repository.path}/{place}"), repository.root.directory(place, os.O_PATH) as fd:
        for name in names:
            try:
                unlink(name, dir_fd=fd)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise from_os_error(error, f"Removing {repository.path}/{place}/{name}") from error
    return len(names)


def _unlink(fd: int, name: str, path: str) -> None:
    with doing(f"Removing {path}"), contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=fd)
