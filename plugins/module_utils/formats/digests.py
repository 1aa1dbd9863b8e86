# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""OCI digests (OCI image specification, "Digests"): making and recognising them, and the types that keep the digests
of a repository apart. No I/O."""

from __future__ import annotations

import hashlib
import re
from typing import NewType

ObjectDigest = NewType("ObjectDigest", bytes)
"""The fs-verity digest that names an object of a repository, in raw bytes. It is never the SHA-256 of the content."""
StreamDigest = NewType("StreamDigest", ObjectDigest)
"""The digest of an object that holds a splitstream. It is accepted wherever an ObjectDigest is asked for, but not the
other way round.
"""

# The digest of the two bytes ``{}``, the configuration that artifacts share (OCI image spec, "Guidance for an empty
# descriptor").
EMPTY_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"

# What the specification allows in general; only SHA-256 can be stored.
ANY_DIGEST = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[a-zA-Z0-9=_-]+\Z")

_SHA256 = re.compile(r"sha256:[0-9a-f]{64}\Z")
_OCI_DIGEST = re.compile("sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


def object_digest(text: str) -> ObjectDigest:
    """The digest in ``text``, hex that the engine wrote itself. For text from elsewhere use
    ``fsverity.parse_hex``, which checks it.
    """
    return ObjectDigest(bytes.fromhex(text))


def stream_digest(text: str) -> StreamDigest:
    """The same for the object of a splitstream."""
    return StreamDigest(object_digest(text))


def digest_of(raw: bytes) -> str:
    """``sha256:<hex>`` of the bytes."""
    return "sha256:" + hashlib.sha256(raw).hexdigest()


def is_digest(text: object) -> bool:
    """Whether ``text`` is ``sha256:`` and 64 lower-case hexadecimal digits: the only form that may become a name in a
    repository.
    """
    return isinstance(text, str) and _SHA256.match(text) is not None


def is_oci_digest(text: str) -> bool:
    """Whether ``text`` is a digest such as ``sha256:<64 lowercase hex digits>`` (OCI image specification,
    descriptors).
    """
    return _OCI_DIGEST.fullmatch(text) is not None
