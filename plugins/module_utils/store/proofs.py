# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Whether a stored layer is what it is named after.

The name of a layer stream is the digest of a tar (its diff_id), but nothing makes a program compare the two before it
registers the stream. A stream that this engine imported was compared on its way in, and ``.composefs-oci/trusted/``
remembers so together with the stream's object. Any other is hashed once before it is believed.
"""

from __future__ import annotations

import hashlib
import os

from ..formats.digests import StreamDigest
from ..formats import repolayout, splitstream
from ..errors import OF_THIS_PROCESS, EngineError, FormatError
from .objects import ObjectStore
from .repository import Repository

_PIECE = 256 * 1024


def proved_layer(
    repository: Repository, stored: StreamDigest | None, diff_id: str, tar: bool, record: bool, warnings: list[str]
) -> StreamDigest | None:
    """``stored``, the object digest of a layer stream, if it is there and its content is what it is named after; None
    if it must be fetched.

    A stream that this engine registered, or once proved, is remembered as trusted together with its object digest. Any
    other may have been put there by a tool that never compared it with the diff_id, for an image that lied: its tar is
    hashed once before it is believed.
    """
    if stored is None or not repository.objects.contains(stored):
        return None
    stream = repolayout.layer_stream(diff_id)
    try:
        # An artifact's layer is a raw blob, but the same bytes stored as a layer serve as well; a container needs a
        # split tar.
        with repository.open_object_stream(stored, splitstream.LAYER if tar else None) as opened:
            suspects = repository.objects.suspects
            if any(digest in suspects and not repository.objects.contains(digest) for digest in opened.object_refs):
                warnings.append(f"The stored layer {stream} has damaged objects and is replaced.")
                return None
            if repository.trusted(diff_id) == stored:
                return stored
            found = "sha256:" + tar_sha256(opened, repository.objects)
    except FormatError as error:
        warnings.append(f"The stored layer {stream} is not usable and is replaced: {error.text}")
        return None
    except OF_THIS_PROCESS:
        raise
    except EngineError as error:
        warnings.append(f"The stored layer {stream} cannot be read and is replaced: {error.text}")
        return None
    if found != diff_id:
        warnings.append(
            f"The stored layer {stream} holds {found}: it was registered by another tool for an image that lied about "
            f"it, and is replaced."
        )
        return None
    if record:
        repository.trust(diff_id, stored)
    return stored


def tar_sha256(stream: splitstream.Splitstream, objects: ObjectStore) -> str:
    """The SHA-256 (hex) of the tar a stored layer stands for, computed from its inline bytes and objects.

    Raises EngineError if the stream or one of its objects is damaged or missing. This is the only proof that a layer
    stream which another tool registered really is the layer it is named after.
    """
    sha256 = hashlib.sha256()
    buffer = bytearray(_PIECE)
    view = memoryview(buffer)
    left = stream.size  # of the tar: no object need be read beyond it
    for chunk in stream.chunks():
        if isinstance(chunk, bytes):
            sha256.update(chunk)
            left -= len(chunk)
            continue
        fd = objects.open(chunk.digest)
        try:
            while True:
                n = os.readv(fd, [buffer])
                if not n:
                    break
                left -= n
                if left < 0:
                    raise FormatError(
                        f"Its objects are longer than the {stream.size} bytes they should have together.",
                        "Pull the image again.",
                    )
                sha256.update(view[:n])
        finally:
            os.close(fd)
    return sha256.hexdigest()
