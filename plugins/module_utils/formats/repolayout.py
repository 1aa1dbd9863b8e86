# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Names inside a repository: tags, streams and the texts of symbolic links (composefs repository format).

Nothing here touches a disk.
"""

from __future__ import annotations

import re
from typing import NewType

from ..errors import InvalidReference
from ..text import file_name, from_file_name
from .bounds import MAX_NAME
from .digests import is_oci_digest

StreamName = NewType("StreamName", str)
"""A name in ``streams/``, without the directory."""

MANIFEST_PREFIX = "oci-manifest-"
CONFIG_PREFIX = "oci-config-"
LAYER_PREFIX = "oci-layer-"
TAGS = "streams/refs/oci"
IMAGE_REFS = "images/refs"

_ESCAPED = re.compile("%2F|%25")


def stream_name(prefix: str, digest: str) -> StreamName:
    """What the stream of a document or layer is called: its kind and its OCI digest."""
    return StreamName(prefix + digest)


def manifest_stream(digest: str) -> StreamName:
    """The stream of the manifest ``sha256:<hex>``."""
    return StreamName(MANIFEST_PREFIX + digest)


def config_stream(digest: str) -> StreamName:
    """The stream of the configuration ``sha256:<hex>``."""
    return StreamName(CONFIG_PREFIX + digest)


def layer_stream(diff_id: str) -> StreamName:
    """The stream of the layer whose unpacked tar has the digest ``sha256:<hex>``."""
    return StreamName(LAYER_PREFIX + diff_id)


def encode_tag(name: str) -> str:
    """The file name that a tag has below ``streams/refs/oci``: ``%`` becomes ``%25``, then ``/`` becomes ``%2F``; all
    else stays, in UTF-8 whatever the locale.
    """
    return file_name(_escape(name))


def _escape(name: str) -> str:
    return name.replace("%", "%25").replace("/", "%2F")


def decode_tag(text: str) -> str:
    """The tag that a file name stands for. It is decoded in one pass from the left, so ``%252F`` becomes ``%2F``.
    Any other ``%``, also the one in ``%2f``, stays.
    """
    return _ESCAPED.sub(lambda match: "/" if match[0] == "%2F" else "%", from_file_name(text))


def check_tag_name(name: str) -> None:
    """Raise InvalidReference unless an image can be given this name. Call it before any work is done for the image."""
    check_file_name(name, _escape(name), "image name")
    if name.startswith("@"):
        raise InvalidReference(
            f"The image name {name!r} begins with '@', which cfsctl reserves for digests.", "Choose another name."
        )


def check_file_name(name: str, encoded: str, what: str) -> None:
    """Raise InvalidReference unless ``encoded`` can be the name of a file; ``name`` is what the user wrote."""
    try:
        length = len(encoded.encode("utf-8"))
    except UnicodeEncodeError:
        raise InvalidReference(f"The {what} {name!r} is not valid UTF-8.", "Choose another name.") from None
    if encoded in ("", ".", "..") or "\0" in encoded or "/" in encoded:
        raise InvalidReference(f"The {what} {name!r} cannot be used as a name.", "Choose another name.")
    if length > MAX_NAME:
        raise InvalidReference(
            f"The {what} {name[:60]!r}... takes {length} bytes in the repository; {MAX_NAME} is the limit.",
            "Give a shorter name with the option name.",
        )


def manifest_of_target(target: str) -> str | None:
    """The manifest digest in the text of a tag's link, of which only the last component counts; None if it names no
    manifest.
    """
    last = target.rsplit("/", 1)[-1]
    digest = last[len(MANIFEST_PREFIX) :]
    return digest if last.startswith(MANIFEST_PREFIX) and is_oci_digest(digest) else None


def link_text(name: str, target: str) -> str:
    """What a symbolic link at ``name`` must contain to lead to ``target``; both are relative to the repository.

    The directories that both have in common are left out of the text: ``streams/refs/oci/x`` leads to ``streams/y`` by
    ``../../y``. Readers parse these texts, so they must be exactly so.
    """
    here = name.split("/")[:-1]
    there = target.split("/")
    while here and there and here[0] == there[0]:
        del here[0], there[0]
    return "/".join([".."] * len(here) + there)
