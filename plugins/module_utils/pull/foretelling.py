# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What check mode says of images that nobody can be asked about yet."""

from __future__ import annotations

from ..formats import repolayout
from ..formats.digests import is_digest
from ..store.repository import Foreseen, Repository
from .plan import Request, Standing
from .results import ImageResult, Report


def foretell(repository: Repository, request: Request, digest: str | None = None) -> Report:
    """What check mode says of an image that would be pulled, where nobody can be asked about it; ``digest`` where at
    least that is known, or what stands for it.
    """
    standing = Standing.of(repository, request)
    tags = list(request.tags)
    result = ImageResult(
        name=request.name,
        ref=request.ref,
        tags=tags,
        digest=Foreseen.known(digest),
        previous_digest=Foreseen.known(standing.digest),
        streams=[] if request.local else None,
    )
    leaves = bool(request.gives_up) and repository.tag_digest(request.gives_up) is not None
    settled = digest is not None and all(repository.tag_digest(name) == digest for name in (request.name, *tags))
    return Report(result, leaves or not settled, standing.name)


def comes(repository: Repository, request: Request) -> str | None:
    """The manifest that an image of the repository itself will have, or what stands for one that is not known,
    where an earlier task of a run in check mode would fetch it; None for every other image.
    """
    if not request.local:
        return None
    names = [name for name in (request.ref, request.name) if name == request.ref or request.gives_up]
    found = [request.ref] if is_digest(request.ref) else [repository.tag_digest(name) for name in names]
    digest = next((digest for digest in found if digest is not None), None)
    if digest is None or not repository.foreseen.brings(digest):
        return None
    return digest if repository.stream(repolayout.manifest_stream(digest)) is None else None
