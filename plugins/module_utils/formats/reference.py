# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""References to images, and the names that images get by default. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from ..errors import InvalidReference
from ..text import file_name
from .digests import is_digest

# What skopeo calls transports; ``registry:`` is another spelling of ``docker://``.
TRANSPORTS = ("docker", "oci", "oci-archive", "docker-archive", "dir", "containers-storage", "docker-daemon")
_LOCAL = ("oci", "oci-archive", "docker-archive", "dir")
MAX_REFERENCE = 4096  # bytes; a request to skopeo, at most 32 KiB, holds it even if every character is escaped

_HOST = re.compile(
    r"(?:(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[a-fA-F0-9:]+\])(?::[0-9]{1,5})?\Z"
)
_PATH = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}\Z")
_FORMS = (
    "Write HOST/NAME:TAG, or one of "
    + ", ".join(["docker://HOST/NAME:TAG"] + [f"{name}:PATH" for name in _LOCAL] + ["containers-storage:NAME"])
    + "."
)


@dataclass(frozen=True)
class Reference:
    """Where an image is. ``name`` is what follows the transport, in the form that every skopeo takes; ``original`` is
    the text as written.

    For ``docker``, ``registry`` is the host (with its port), ``repository`` the path on it, and ``tag`` and ``digest``
    what the text names; if it names both, the digest wins and ``name`` has no tag, since skopeo refuses both at once.
    For ``composefs``, ``repository`` is the path of a repository on this host, and the text names either ``tag``, a
    name in it, or ``digest``, that of a manifest. For the other transports these are empty.
    """

    transport: str
    name: str
    original: str = field(compare=False)
    registry: str = ""
    repository: str = ""
    tag: str = ""
    digest: str = ""

    @property
    def text(self) -> str:
        """The reference in skopeo's syntax. It starts with the transport, so that it can never be taken for
        an option.
        """
        return f"docker://{self.name}" if self.transport == "docker" else f"{self.transport}:{self.name}"

    @property
    def is_remote(self) -> bool:
        """Whether the image comes from a registry."""
        return self.transport == "docker"

    @property
    def path(self) -> str:
        """The file or directory of a local transport, empty for the others. A tag or image name after it is cut off as
        skopeo does.
        """
        if self.transport == "dir":
            return file_name(self.name)
        if self.transport == "composefs":
            return file_name(self.repository)
        return file_name(self.name.split(":", 1)[0]) if self.transport in _LOCAL else ""

    def pinned(self, digest: str) -> Reference:
        """The reference to the same repository by ``sha256:<hex>``: what a tag meant a moment ago. A reference that
        cannot name a digest, such as that of a local layout, comes back as it is.
        """
        if self.transport == "composefs" and is_digest(digest):
            return replace(self, name=f"{self.repository}#{digest}", tag="", digest=digest)
        if self.transport != "docker" or not is_digest(digest):
            return self
        return replace(self, name=f"{self.registry}/{self.repository}@{digest}", digest=digest)


def parse_reference(text: str) -> Reference:
    """The reference behind ``text``: ``HOST/NAME[:TAG][@DIGEST]``, ``docker://…``, ``registry:…``, ``oci:PATH[:TAG]``,
    ``oci-archive:…``, ``docker-archive:…``, ``dir:PATH``, ``containers-storage:…``, ``docker-daemon:…`` or
    ``composefs:/PATH#NAME``.

    Raises InvalidReference, whose message never repeats what may be a password.
    """
    if not isinstance(text, str) or not text:
        raise InvalidReference("The image reference is empty.", _FORMS)
    if not text.isprintable() or any(character.isspace() for character in text):
        raise InvalidReference(
            f"The image reference {ascii(text):.200} contains white space or control characters.", _FORMS
        )
    if len(text.encode()) > MAX_REFERENCE:
        raise InvalidReference(f"The image reference has more than {MAX_REFERENCE} bytes.", _FORMS)
    prefix, colon, rest = text.partition(":")
    if prefix in ("http", "https") and rest.startswith("//"):
        raise InvalidReference(
            "The image reference is a web address.",
            "Leave out the scheme: HOST/NAME:TAG; validate_certs=false also allows plain HTTP.",
        )
    if prefix == "docker" and colon:
        if not rest.startswith("//"):
            raise InvalidReference(
                f"The image reference {_safe(text)} lacks the // after docker:.", "Write docker://HOST/NAME:TAG."
            )
        return _in_registry(text, rest[2:], short=True)
    if prefix == "registry" and colon and not re.match(r"[0-9]{1,5}/", rest):
        return _in_registry(text, rest[2:] if rest.startswith("//") else rest, short=True)
    if colon and prefix == "composefs":
        return _in_repository(text, rest)
    if colon and prefix in TRANSPORTS:
        return _elsewhere(text, prefix, rest)
    if text[0] in "./~" or (colon and rest.startswith("/")) or "://" in text:
        if text[0] in "./~":
            raise InvalidReference(
                f"The image reference {_safe(text)} is a path without a transport.",
                "Write oci:PATH, dir:PATH, oci-archive:PATH or docker-archive:PATH.",
            )
        raise InvalidReference(
            f"The image reference {_safe(text)} has an unknown transport.",
            f"Known are docker://, registry:, {', '.join(name + ':' for name in TRANSPORTS[1:])}, composefs:.",
        )
    return _in_registry(text, text, short=False)


def _safe(text: str) -> str:
    """``text`` for a message, without what stands before an ``@`` that no digest follows: it may be a password."""
    _head, at, tail = text.rpartition("@")
    return f"{text if not at or is_digest(tail) else '…@' + tail!r:.300}"


def _in_registry(text: str, name: str, short: bool) -> Reference:
    rest, at, digest = name.partition("@")
    if at and not is_digest(digest):
        # Nothing is quoted here: what stands before the @ may be a user and a password.
        raise InvalidReference(
            "The image reference has an @ that is not followed by sha256: and 64 lower-case hexadecimal digits.",
            "Copy the digest in full; other algorithms are not supported. Credentials do not belong there: use "
            "username and password, or auth_file.",
        )
    head, slash, last = rest.rpartition("/")
    last, colon, tag = last.partition(":")
    path = head + slash + last
    if colon and not _TAG.match(tag):
        if not slash and tag.isdigit() or not tag:
            raise InvalidReference(f"The image reference {_safe(text)} has no valid tag.", _FORMS)
        raise InvalidReference(
            f"The image reference {_safe(text)} has an invalid tag.",
            "A tag is at most 128 letters, digits, dots, dashes and underscores.",
        )
    host, slash, repository = path.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost" or host.lower() != host):
        # What a short name means is up to whoever reads it. Written with docker:// it means what it means to skopeo.
        if not short:
            raise InvalidReference(
                f"The image reference {_safe(text)} names neither a registry nor a transport.",
                f"Write the registry's host first, for example docker.io/library/{rest}, or one of "
                f"{', '.join(form + ':' for form in TRANSPORTS[1:])}."
                if _PATH.match(path)
                else _FORMS,
            )
        host, repository = "docker.io", path
    if host in ("docker.io", "index.docker.io"):
        host, repository = "docker.io", repository if "/" in repository else f"library/{repository}"
    if not _HOST.match(host) or not _PATH.match(repository) or len(host) + len(repository) > 254:
        hint = "The name must be in lower case." if repository != repository.lower() else _FORMS
        raise InvalidReference(f"The image reference {_safe(text)} is not a valid name in a registry.", hint)
    named = f"{host}/{repository}"
    full = f"{named}@{digest}" if digest else f"{named}:{tag}" if tag else named
    return Reference("docker", full, text, registry=host, repository=repository, tag=tag, digest=digest)


def _in_repository(text: str, rest: str) -> Reference:
    path, sharp, what = rest.partition("#")
    if not path.startswith("/") or not sharp or not what:
        raise InvalidReference(
            f"The image reference {_safe(text)} does not name an image in a repository.",
            "Write composefs:/path/to/repository#NAME, or #sha256: and the digest of a manifest.",
        )
    digest = what if is_digest(what) else ""
    return Reference("composefs", rest, text, repository=path, tag="" if digest else what, digest=digest)


def _elsewhere(text: str, transport: str, rest: str) -> Reference:
    if transport == "containers-storage" and rest.startswith("sha256:"):
        rest = rest[len("sha256:") :]  # skopeo knows image ids only without this prefix
    if not rest.partition(":")[0] and transport in _LOCAL or not rest:
        raise InvalidReference(
            f"The image reference {_safe(text)} names nothing after the transport.",
            f"Write {transport}:{'PATH' if transport in _LOCAL else 'NAME'}.",
        )
    return Reference(transport, rest, text)


def default_name(text: str) -> str:
    """The name that an image gets when it is pulled by the reference ``text`` and the user gives no name: the reference
    as it is written, with its transport in front, as ``cfsctl`` names it. An image of another repository keeps the name
    that it has there, or its digest. Raises InvalidReference.
    """
    reference = parse_reference(text)
    if reference.transport == "composefs":
        return reference.tag or reference.digest
    if reference.transport != "docker":
        return text
    return "docker://" + _without_transport(text)


def other_names(name: str) -> tuple[str, ...]:
    """The other spellings of a default name: ``docker://x`` and ``x`` are one, and earlier versions wrote ``x``. Empty
    for names that are no references.
    """
    try:
        usual = default_name(name)
    except InvalidReference:
        return ()
    if not usual.startswith("docker://"):
        return ()
    return tuple(form for form in dict.fromkeys((usual, _without_transport(name))) if form != name)


def _without_transport(text: str) -> str:
    for prefix in ("docker://", "registry://", "registry:"):
        if text.startswith(prefix) and not re.match(r"registry:[0-9]{1,5}/", text):
            return text[len(prefix) :]
    return text
