# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The peers of one pull: what is asked of them first, and what each did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..formats.repolayout import StreamName
from ..errors import EngineError, ImageNotFound
from ..formats.fsverity import Algorithm
from ..progress import Progress
from ..source.peer import PeerOptions, PeerSource, check_headers, check_url, is_https, is_lie, sentence, tls_context
from ..source.source import Patient
from .fetch import PEER, Fetcher, Job
from .plan import Layer, Plan


def check(urls: Sequence[str], headers: Mapping[str, str], ca_file: str | None = None) -> None:
    """InvalidOption unless these can be URLs of peers, headers, and a file of certificates if one of the peers needs
    it. Nobody is asked, so it says the same in check mode, and where no layer is missing.
    """
    for url in urls:
        check_url(url)
    check_headers(headers)
    if ca_file is not None and any(is_https(url) for url in urls):
        tls_context(ca_file)


class Peers:
    """The peers at ``urls`` for the ``missing`` layers (stream -> plan and layer)."""

    def __init__(
        self,
        urls: Sequence[str],
        options: PeerOptions,
        algorithm: Algorithm,
        missing: Mapping[StreamName, tuple[Plan, Layer]],
        progress: Progress,
    ) -> None:
        sizes = {layer.diff_id: layer.source.size for _plan, layer in missing.values()}
        peers = [PeerSource(url, algorithm, sizes, options) for url in dict.fromkeys(urls)]
        # No peer is asked twice for a layer: the next source is the better second try.
        self._sources = [Patient(peer, 0, progress) for peer in peers]
        self.stats: list[dict[str, Any]] = [
            {"url": peer.url, "layers": 0, "objects": 0, "bytes": 0, "error": None} for peer in peers
        ]

    def before(self, job: Job) -> Job:
        """The job with all peers before it."""
        for source in reversed(self._sources):
            job = Job(job.stream, job.spec, source, job.reference, job, PEER)
        return job

    def account(self, fetcher: Fetcher) -> None:
        """Count what came from whom."""
        of = dict(zip(self._sources, self.stats))
        for stream, result in fetcher.results.items():
            stats = of.get(fetcher.brought[stream].source)
            if stats is not None:
                stats["layers"] += 1
                stats["objects"] += result.objects_new
                stats["bytes"] += result.fetched
        for job, error in fetcher.disappointments:
            if job.source in of and not isinstance(error, ImageNotFound):
                of[job.source]["error"] = error.text

    def complaint(self, job: Job, error: EngineError) -> str:
        """The warning about a peer that failed."""
        if is_lie(error):
            return f"{sentence(job.source.name)} lied about layer {job.spec.diff_id}, look at it: {error.text}"
        return f"{sentence(job.source.name)} failed and was left out: {error}"
