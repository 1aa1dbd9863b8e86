# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What keeps a mounted image alive in its repository, against every collector: ours, that of cfsctl, that of bootc.

Two names, because neither is enough. A link below ``images/refs`` keeps the EROFS image and all objects that the mount
reads, whatever becomes of the name that the image was pulled under. A *pin*, the name ``NAME@DIGEST``, keeps manifest
and configuration as well, so that the image can be listed, and pulled again without a transfer; alone it is not enough,
for a pull by cfsctl may lead the configuration to another EROFS image.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from typing import NamedTuple

from ..formats.digests import object_digest
from ..errors import EngineError, InvalidReference
from ..formats import repolayout
from ..store import namerecords
from ..store.repository import Repository
from . import journal

DIRECTORY = "composefs-oci"
_PIN = re.compile("(.+)@(sha256:[0-9a-f]{64})", re.DOTALL)


class Names(NamedTuple):
    """What keeps one image: the link (below ``images/refs``), the pin, None where there is none, and whether the pin
    was made for this mount, so that it goes with it.
    """

    link: str
    pin: str | None
    own: bool


def split_pin(name: str) -> tuple[str, str | None]:
    """``NAME`` and ``DIGEST`` of a pin; any other name as it is, and None."""
    match = _PIN.fullmatch(name)
    return (match[1], match[2]) if match else (name, None)


def link_name(path: str, image_id: str) -> str:
    """The name below ``images/refs`` that the mount at ``path`` owns for an image (id in hex)."""
    return f"{DIRECTORY}/{journal.stem(path)}/{image_id}"


def find_pin(repository: Repository, name: str, manifest: str, asked: str | None = None) -> str | None:
    """A pin of ``name`` that leads to ``manifest``; the one with the digest that was asked for first."""
    for digest in dict.fromkeys((asked or manifest, manifest)):
        if repository.tag_digest(f"{name}@{digest}") == manifest:
            return f"{name}@{digest}"
    for tag, found in repository.tags().items():
        if found == manifest and split_pin(tag)[0] == name and split_pin(tag)[1]:
            return tag
    return None


def foresee(
    repository: Repository,
    path: str,
    image_id: str,
    name: str | None,
    manifest: str | None,
    listed: Container[str] = (),
    asked: str | None = None,
    adopt: bool = False,
) -> tuple[Names, bool]:
    """The names that would keep the image, and whether one of them is missing. Looks only.

    ``listed`` are the pins that journals of this host list; another name that looks like one is an operator's and stays
    so, unless ``adopt``: a deployment takes over what was fetched ahead for it. ``asked`` is the digest to look for
    first and to name a new pin after.
    """
    link = link_name(path, image_id)
    missing = link.split("/", 1)[1] not in repository.image_refs(DIRECTORY)
    if name is None or manifest is None:
        return Names(link, None, False), missing
    found = find_pin(repository, name, manifest, asked)
    if found is not None:
        return Names(link, found, adopt or found in listed), missing
    pin = f"{name}@{asked or manifest}"
    try:
        repolayout.check_tag_name(pin)
    except InvalidReference:
        return Names(link, None, False), missing  # the pin would be too long; the link alone must do
    return Names(link, pin, True), True


def keep(repository: Repository, names: Names, image_id: str, manifest: str | None) -> None:
    """Make the names, durably. ReadOnly, PermissionDenied and others where the repository cannot be written."""
    repository.require_writable()
    changed = repository.link_image_ref(names.link, object_digest(image_id))
    if names.pin is not None and names.own and manifest is not None and repository.tag_digest(names.pin) != manifest:
        name_like(repository, names.pin, split_pin(names.pin)[0], manifest)
        changed = True
    if changed:
        # A journal that names the image may be on the disk before anything else is synced.
        repository.sync()


def lacking(repository: Repository, names: Names) -> tuple[list[str], list[str]]:
    """The links and the pins that keep() would make, as release() takes them. A pin that leads elsewhere is not
    among them.
    """
    links = [] if names.link.split("/", 1)[1] in repository.image_refs(DIRECTORY) else [names.link]
    pin = names.pin if names.own else None
    return links, [pin] if pin is not None and repository.tag_digest(pin) is None else []


def name_like(repository: Repository, name: str, other: str, manifest: str) -> None:
    """Make ``name`` mean ``manifest``, and let it come from where ``other`` comes from, if that means the same."""
    record = namerecords.read(repository, other)
    if record is not None and record.manifest == manifest:
        namerecords.remember(repository, name, record)
    repository.tag(name, manifest)


def there(repository: Repository, path: str, image_id: str, name: str | None, digest: str | None) -> list[str]:
    """What keeps the image for the mount at ``path`` now, by what people would look for: the pin and the link."""
    found = []
    if name is not None and digest is not None:
        pin = find_pin(repository, name, digest)
        found += [pin] if pin is not None else []
    link = link_name(path, image_id)
    if link.split("/", 1)[1] in repository.image_refs(DIRECTORY):
        found.append(f"{repolayout.IMAGE_REFS}/{link}")
    return found


def surplus(
    repository: Repository, path: str, image_ids: Iterable[str], pins: Iterable[str], manifests: Iterable[str]
) -> tuple[list[str], list[str]]:
    """Links of the mount at ``path`` to other images than ``image_ids``, and those of its own ``pins`` that lead to
    other manifests than ``manifests``.
    """
    wanted, needed = set(image_ids), set(manifests)
    base = f"{DIRECTORY}/{journal.stem(path)}"
    links = [f"{base}/{name}" for name in sorted(repository.image_refs(base)) if name not in wanted]
    return links, [pin for pin in pins if repository.tag_digest(pin) not in needed]


def release(repository: Repository, links: Iterable[str], pins: Iterable[str], used: Iterable[str] = ()) -> list[str]:
    """Remove what ``surplus`` found, except pins that other journals list, too (``used``). Returns
    complaints about what could not be removed: it keeps bytes, but does no other harm.
    """
    complaints = []
    others = set(used)
    for link in links:
        try:
            repository.unlink_image_ref(link)
        except EngineError as error:
            complaints.append(str(error))
    for pin in pins:
        try:
            if pin not in others:
                repository.untag(pin)
                namerecords.forget(repository, pin)
        except EngineError as error:
            complaints.append(str(error))
    return complaints
