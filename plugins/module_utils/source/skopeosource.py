# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A conversation with one source of images that outlives the death of the skopeo it is held with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..formats import indexes, ocidocuments
from ..host import machine
from ..errors import DigestMismatch, EngineError, InvalidDocument, UnexpectedDigest
from .imageproxy import ImageProxy, fetch_config
from ..formats.digests import digest_of
from ..formats.ocidocuments import Platform
from ..formats.reference import Reference
from ..progress import Progress
from .skopeo import ProxyOptions, policy_demand, policy_path, skopeo_version, top_digest

T = TypeVar("T")

BACKOFF_LIMIT = 30.0
CLOSE_WAIT = 1.0


def is_passing(error: EngineError) -> bool:
    """Whether trying again may help: the source was silent, out of reach, or its connection broke."""
    return error.passing


def pause(attempt: int, error: EngineError, progress: Progress) -> None:
    """Wait before the ``attempt``-th repetition, twice as long each time, and say so."""
    seconds = min(0.5 * 2 ** (attempt - 1), BACKOFF_LIMIT)
    progress.message(f"{error.text} Trying again in {seconds:g} s.")
    time.sleep(seconds)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What a reference means: one manifest, whose documents and layers are all to be asked for with ``reference``.

    ``digest`` is the manifest's as the source knows it, ``raw`` the manifest in OCI's format. ``index_digest`` is that
    of the outermost index, proved to lead to the manifest; None if there is none. ``platform`` is what the index says
    the manifest is for, None if it says nothing.
    """

    reference: Reference
    digest: str
    raw: bytes
    index_digest: str | None
    platform: Platform | None


class _Moved(UnexpectedDigest):
    """Two answers about one reference differ; asking anew may help."""


class Session:
    """One skopeo proxy with the images of one registry opened in it; starts another when it dies or must be killed.

    skopeo is started by the main thread only (see ``in_main``): the kernel ties the death signal of a child to the
    thread that made it, and a lane of a fetch may end long before the pull does.
    """

    def __init__(self, options: ProxyOptions, retries: int, progress: Progress) -> None:
        self.options = options
        self.generation = 0
        self.retried = 0
        self.in_main: Callable[[Callable[[], Any]], Any] = lambda function: function()
        self.protocol_version: str | None = None
        self._skopeo_version: str | None = None
        self._asked: threading.Thread | None = None
        self._retries = retries
        self._progress = progress
        self._proxy: ImageProxy | None = None
        self._images: dict[Reference, int] = {}
        self._lock = threading.Lock()

    def image(self, reference: Reference) -> tuple[ImageProxy, int]:
        """The running proxy, started if there is none, and its handle of the image, opened if need be."""
        with self._lock:
            if self._proxy is None:
                proxy = ImageProxy(self.options, reference)
                self.in_main(proxy.start)
                self._proxy = proxy
                self.protocol_version = proxy.protocol_version
                if self._asked is None:
                    self._asked = threading.Thread(target=self._ask_version, name="version", daemon=True)
                    self._asked.start()
            if reference not in self._images:
                self._images[reference] = self._proxy.open_image(reference)
            return self._proxy, self._images[reference]

    def _ask_version(self) -> None:
        with contextlib.suppress(EngineError):
            self._skopeo_version = skopeo_version(self.options.executable)

    @property
    def skopeo_version(self) -> str | None:
        """The version of skopeo, None if it was not started or does not tell."""
        if self._asked is not None:
            self._asked.join()
        return self._skopeo_version

    def abandon(self) -> None:
        """For a forked process: let go of the connection, so that skopeo sees its end when the owner dies."""
        if self._proxy is not None:
            self._proxy.abandon()

    def replace(self, generation: int) -> None:
        """Kill the proxy of ``generation``; the next request starts another. A later generation is left alone."""
        with self._lock:
            if generation != self.generation:
                return
            self.generation += 1
            self._images.clear()
            proxy, self._proxy = self._proxy, None
        if proxy is not None:
            proxy.kill()

    def manifest(self, reference: Reference) -> tuple[str, bytes]:
        """The digest by which the source knows the image's manifest for the platform, and the manifest's
        bytes as OCI.
        """
        return self._patiently(lambda proxy, image: proxy.get_manifest(image), reference)

    def config(self, reference: Reference, descriptor: ocidocuments.Descriptor, converted: bool) -> bytes:
        """The configuration's bytes, proved against ``descriptor``; ``converted`` if skopeo made the manifest from
        Docker's format.
        """
        return self._patiently(lambda proxy, image: fetch_config(proxy, image, descriptor, converted), reference)

    def layer_sources(self, reference: Reference, manifest: ocidocuments.Manifest) -> list[ocidocuments.Descriptor]:
        """What the transport delivers for each layer: the manifest's own blobs, except for a container storage, which
        keeps tars.
        """
        if reference.transport != "containers-storage":
            return list(manifest.layers)
        infos = self._patiently(lambda proxy, image: proxy.layer_infos(image), reference)
        if len(infos) != len(manifest.layers):
            raise InvalidDocument(
                f"{reference.original} has {len(manifest.layers)} layers, and the container storage delivers "
                f"{len(infos)}."
            )
        return list(infos)

    def resolve(self, reference: Reference) -> Resolved:
        """What ``reference`` means now. Raises PlatformNotFound if it has nothing for the platform, and what a source
        may raise.

        A tag may move at any moment, and two caches behind one name may disagree. So one answer is taken, as bytes,
        and everything else is asked for by the digests that it proves: whatever the tag says meanwhile, index,
        manifest and layers belong together.
        """
        if not reference.is_remote:
            digest, raw = self.manifest(reference)
            return Resolved(reference, digest, raw, None, None)
        attempt = 0
        while True:
            try:
                return self._resolve_remote(reference)
            except _Moved as error:
                if attempt >= self._retries:
                    raise
                attempt += 1
                self.retried += 1
                pause(attempt, error, self._progress)

    def _resolve_remote(self, reference: Reference) -> Resolved:
        top, raw = self._raw(reference)
        chosen = indexes.Chosen(ocidocuments.Descriptor("", top, len(raw)), None)
        if ocidocuments.is_index(raw):
            wanted = self.options.platform or machine.own_platform()
            chosen = indexes.choose(raw, wanted, lambda entry: self._raw(reference.pinned(entry.digest))[1])
        wanted_digest = chosen.descriptor.digest
        opened = reference.pinned(wanted_digest)
        if not reference.digest and self._asks_for_signatures():
            # A signature vouches for a name or for the index, so skopeo must judge the reference as it is written.
            opened = reference
        digest, manifest = self.manifest(opened)
        if digest != wanted_digest:
            raise _Moved(
                f"{reference.original} meant {wanted_digest} a moment ago, and {digest} now.",
                "Somebody moves the tag right now, or the registry contradicts itself; try again.",
            )
        if digest_of(manifest) != digest and chosen.descriptor.media_type == ocidocuments.OCI_MANIFEST:
            raise DigestMismatch(
                f"The manifest {digest} of {reference.original} has the digest {digest_of(manifest)}.",
                "The image is damaged; ask its publisher.",
            )
        return Resolved(opened, digest, manifest, top if top != digest else None, chosen.platform)

    def _asks_for_signatures(self) -> bool:
        path = policy_path(self.options.policy)
        # Without any policy there is nothing to judge: newer ones refuse the image anyway, older ones take it.
        return not self.options.insecure_policy and os.path.exists(path) and bool(policy_demand(path))

    def _raw(self, reference: Reference) -> tuple[str, bytes]:
        """Digest and bytes of the topmost document that ``reference`` leads to."""
        return self._again(lambda: top_digest(self.options, reference), lambda: None)

    def _patiently(self, ask: Callable[[ImageProxy, int], T], reference: Reference) -> T:
        """Ask the proxy, and another one after a passing fault."""
        generation = self.generation

        def once() -> T:
            nonlocal generation
            generation = self.generation
            return ask(*self.image(reference))

        return self._again(once, lambda: self.replace(generation))

    def _again(self, ask: Callable[[], T], before: Callable[[], None]) -> T:
        """Ask, and again after a passing fault of the source, up to ``retries`` times with growing pauses; ``before``
        is called before each repetition.
        """
        attempt = 0
        while True:
            try:
                return ask()
            except EngineError as error:
                if attempt >= self._retries or not is_passing(error):
                    raise
                attempt += 1
                self.retried += 1
                before()
                pause(attempt, error, self._progress)

    def close(self) -> None:
        """End the proxy."""
        with self._lock:
            proxy, self._proxy = self._proxy, None
            self._images.clear()
        if proxy is not None:
            proxy.close()
        # After a failure the question may still be open. It ends by itself, and nobody waits long for an answer that
        # is not wanted.
        if self._asked is not None:
            self._asked.join(CLOSE_WAIT)
