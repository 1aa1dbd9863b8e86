# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Mistakes that mypy must notice. Nothing runs this file.

mypy reads it together with the engine, and complains about every comment below that silences nothing: so each of these
lines holds that such a swap is an error.
"""

from __future__ import annotations

from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import ObjectDigest, StreamDigest
from ansible_collections.composefs.oci.plugins.module_utils.formats.repolayout import StreamName, layer_stream
from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


def swaps(
    repository: Repository, name: StreamName, stream: StreamDigest, image: ObjectDigest, diff_id: str, raw: bytes
) -> None:
    # As they belong.
    repository.register(name, stream)
    repository.link_image(image)
    repository.objects.contains(stream)
    repository.stream(layer_stream(diff_id))
    # An OCI digest is no name of a stream.
    repository.stream(diff_id)  # type: ignore[arg-type]
    imagestreams.name_layer(repository, diff_id, stream)  # type: ignore[arg-type]
    # An EROFS image is no stream.
    repository.register(name, image)  # type: ignore[arg-type]
    repository.trust(diff_id, image)  # type: ignore[arg-type]
    with repository.open_object_stream(image):  # type: ignore[arg-type]
        pass
    # The content of an object is not its digest.
    repository.objects.open(raw)  # type: ignore[arg-type]
    repository.objects.put_known(raw, image)  # type: ignore[arg-type]
