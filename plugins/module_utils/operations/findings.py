# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What may be wrong with a repository: one finding each, with a stable code.

The page "Living with a repository" of the documentation lists all codes, and which findings of ``cfsctl fsck`` each of
them covers.
"""

from __future__ import annotations

import dataclasses

LOCAL, SOURCE, NO = "local", "source", "no"
"""Where a repair gets what it needs: from the repository itself, from where images come from, or not at all."""

STRAY_FILE = "stray_file"
BAD_LINK = "bad_link"
DANGLING_REFERENCE = "dangling_reference"
INVALID_NAME = "invalid_name"
OBJECT_MISSING = "object_missing"
OBJECT_DAMAGED = "object_damaged"
OBJECT_UNSEALED = "object_unsealed"
OBJECT_UNREADABLE = "object_unreadable"
STREAM_DAMAGED = "stream_damaged"
STREAM_UNNAMED = "stream_unnamed"
DOCUMENT_DAMAGED = "document_damaged"
LAYER_POISONED = "layer_poisoned"
IMAGE_DAMAGED = "image_damaged"
IMAGE_WRONG = "image_wrong"
IMAGE_UNLISTED = "image_unlisted"
PROOF_WRONG = "proof_wrong"
MOUNT_LOST = "mount_lost"


@dataclasses.dataclass
class Finding:
    """One thing that is wrong. ``object``: the digest (hex) of the object it is about, None if it is about a name.
    ``names``: what is affected, as names of images where these have names. ``path``: where, below the repository.
    """

    code: str
    object: str | None
    path: str
    message: str
    names: list[str] = dataclasses.field(default_factory=list)
    repairable: str = NO
