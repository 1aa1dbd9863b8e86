# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Images of every transport that skopeo knows, of one registry or store; outlives the death of the skopeo it talks to.

What only skopeo needs stays in this room and below: that a pipe has no end before FinishPipe, which versions of its
protocol lack what, and that the thread which starts the program must live as long as it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from ..formats import indexes, ocidocuments
from ..host import machine
from ..errors import DigestMismatch, EngineError, InvalidDocument, UnexpectedDigest
from .imageproxy import BlobPipe, ImageProxy, fetch_config
from ..formats.digests import digest_of
from ..formats.ocidocuments import Descriptor, Manifest
from ..formats.reference import Reference
from .options import ProxyOptions
from .policy import policy_demand, policy_path
from .realm import check_realm
from .skopeo import skopeo_version, top_digest
from .source import ACCEPT_ANYTHING, ENFORCED, IGNORED, Facts, Resolved, Source, Transfer

T = TypeVar("T")

CLOSE_WAIT = 1.0
# Seconds: the verdict on a blob may take as long as the blob does. Whoever waits for it watches the bytes and ends the
# wait by renewing the source.
FOREVER = 1_000_000.0


class SkopeoTransfer(Transfer):
    """A blob that skopeo's proxy copies into a pipe.

    FinishPipe blocks skopeo's only request channel until the blob is drained, so it is sent when the last byte was
    read, or when the pipe has gone silent: then it is the only way to hear that the source failed, for skopeo leaves a
    broken transfer's pipe open.
    """

    def __init__(self, proxy: ImageProxy, pipe: BlobPipe) -> None:
        super().__init__(pipe.fd)
        self.remote = proxy.reference.is_remote
        self._proxy = proxy
        self._pipeid = pipe.pipeid

    def verdict(self) -> None:
        self._proxy.finish_pipe(self._pipeid, timeout=FOREVER)


class _Starter(threading.Thread):
    """A thread that runs functions for others and lives until the process ends: the kernel ties the death signal of a
    child to the thread that made it, and a lane of a fetch may end long before the pull does.
    """

    def __init__(self) -> None:
        super().__init__(name="starter", daemon=True)
        self._todo: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def run(self) -> None:
        while True:
            self._todo.get()()

    def call(self, function: Callable[[], T]) -> T:
        done = threading.Event()
        outcome: list[T] = []
        failures: list[BaseException] = []

        def work() -> None:
            try:
                outcome.append(function())
            except BaseException as error:
                failures.append(error)
            done.set()

        self._todo.put(work)
        done.wait()
        for error in failures:
            raise error
        return outcome[0]


class SkopeoSource(Source):
    """One skopeo proxy with the images of one registry opened in it; starts another when it dies or must be killed."""

    name = "skopeo"

    def __init__(self, options: ProxyOptions) -> None:
        self.options = options
        self._facts = Facts()
        self._asked: threading.Thread | None = None
        self._starter: _Starter | None = None
        self._proxy: ImageProxy | None = None
        self._launched: ImageProxy | None = None
        self._images: dict[Reference, int] = {}
        self._known: set[str] = set()
        self._lock = threading.Lock()

    # -- the proxy

    def image(self, reference: Reference) -> tuple[ImageProxy, int]:
        """The running proxy, started if there is none, and its handle of the image, opened if need be."""
        with self._lock:
            if self._proxy is None:
                proxy, self._launched = self._launched or ImageProxy(self.options, reference), None
                self._start(proxy.start)
                self._proxy = proxy
                self._facts = self._facts._replace(
                    protocol_version=proxy.protocol_version, policy=self._policy(reference, proxy.enforces_policy)
                )
                if self._asked is None:
                    asked = threading.Thread(target=self._ask_version, name="version", daemon=True)
                    asked.start()
                    self._asked = asked
            if reference not in self._images:
                self._images[reference] = self._proxy.open_image(reference)
            return self._proxy, self._images[reference]

    def _launch(self, reference: Reference) -> None:
        """Start a proxy that will be needed soon, and do not wait for it."""
        with self._lock:
            if self._proxy is None and self._launched is None:
                proxy = ImageProxy(self.options, reference)
                self._start(proxy.launch)
                self._launched = proxy

    def _start(self, start: Callable[[], None]) -> None:
        if threading.current_thread() is threading.main_thread():
            return start()
        if self._starter is None:
            starter = _Starter()
            starter.start()
            self._starter = starter
        return self._starter.call(start)

    def _ask_version(self) -> None:
        # The version is only shown: if anything goes wrong here, results have none.
        with contextlib.suppress(Exception):
            self._facts = self._facts._replace(skopeo_version=skopeo_version(self.options.executable))

    def facts(self) -> Facts:
        if self._asked is not None:
            self._asked.join()
        return self._facts

    def abandon(self) -> None:
        for proxy in (self._proxy, self._launched):
            if proxy is not None:
                proxy.abandon()

    def renew(self, generation: int) -> None:
        with self._lock:
            if generation != self.generation:
                return
            self.generation += 1
            self._images.clear()
            proxies = self._proxy, self._launched
            self._proxy = self._launched = None
        for proxy in proxies:
            if proxy is not None:
                proxy.kill()

    def close(self) -> None:
        with self._lock:
            proxy, self._proxy = self._proxy, None
            images = [image for reference, image in self._images.items() if not reference.is_remote]
            self._images.clear()
            launched, self._launched = self._launched, None
        if launched is not None:
            launched.close()
        if proxy is not None:
            with contextlib.suppress(EngineError):
                for image in images if proxy.alive else ():
                    proxy.close_image(image)
            proxy.close()
        # After a failure the question for the version may still be open. It ends by itself, so this does not wait long
        # for an answer that nobody needs.
        if self._asked is not None:
            self._asked.join(CLOSE_WAIT)

    # -- what a reference means

    def resolve(self, reference: Reference) -> Resolved:
        """See Source.resolve.

        A tag may move at any moment, and two caches behind one name may disagree. So one answer is taken, as bytes,
        and everything else is asked for by the digests that it proves: whatever the tag says meanwhile, index,
        manifest and layers belong together.
        """
        if not reference.is_remote:
            return Resolved(reference, *self._manifest(reference))
        if reference.registry not in self._known:
            check_realm(self.options, reference.registry)
            self._known.add(reference.registry)
        self._launch(reference)
        top, raw = top_digest(self.options, reference)
        chosen = indexes.Chosen(Descriptor("", top, len(raw)), None)
        if ocidocuments.is_index(raw):
            wanted = self.options.platform or machine.own_platform()
            chosen = indexes.choose(
                raw, wanted, lambda entry: top_digest(self.options, reference.pinned(entry.digest))[1]
            )
        wanted_digest = chosen.descriptor.digest
        opened = reference.pinned(wanted_digest)
        if not reference.digest and self._asks_for_signatures(reference):
            # A signature vouches for a name or for the index, so skopeo must judge the reference as it is written.
            opened = reference
        digest, manifest = self._manifest(opened)
        if digest != wanted_digest:
            raise UnexpectedDigest(
                f"{reference.original} meant {wanted_digest} a moment ago, and {digest} now.",
                "Somebody moves the tag right now, or the registry contradicts itself; try again.",
                passing=True,
            )
        if digest_of(manifest) != digest and chosen.descriptor.media_type == ocidocuments.OCI_MANIFEST:
            raise DigestMismatch(
                f"The manifest {digest} of {reference.original} has the digest {digest_of(manifest)}.",
                "The image is damaged; ask its publisher.",
            )
        return Resolved(opened, digest, manifest, top if top != digest else None, chosen.platform)

    def _manifest(self, reference: Reference) -> tuple[str, bytes]:
        """The digest by which the source knows the image's manifest for the platform, and the manifest's bytes as
        OCI.
        """
        proxy, image = self.image(reference)
        return proxy.get_manifest(image)

    def _asks_for_signatures(self, reference: Reference) -> bool:
        if self.options.insecure_policy:
            return False
        # Without any policy there is nothing to judge: newer skopeos refuse the image anyway, older ones take it.
        path = policy_path(self.options.policy)
        return os.path.exists(path) and bool(policy_demand(path, reference.transport))

    def _policy(self, reference: Reference, enforces: bool) -> str:
        if self.options.insecure_policy:
            return IGNORED
        if not policy_demand(self.options.policy, reference.transport):
            return ACCEPT_ANYTHING
        return ENFORCED if enforces else IGNORED

    # -- documents and layers

    def config(self, resolved: Resolved, manifest: Manifest) -> bytes:
        proxy, image = self.image(resolved.reference)
        # Where skopeo made the manifest from Docker's format, only skopeo has the configuration.
        return fetch_config(proxy, image, manifest.config, converted=manifest.digest != resolved.digest)

    def layers(self, resolved: Resolved, manifest: Manifest) -> list[Descriptor]:
        """The manifest's own blobs, except for a container storage, which keeps tars."""
        reference = resolved.reference
        if reference.transport != "containers-storage":
            return list(manifest.layers)
        proxy, image = self.image(reference)
        infos = proxy.layer_infos(image)
        if len(infos) != len(manifest.layers):
            raise InvalidDocument(
                f"{reference.original} has {len(manifest.layers)} layers, and the container storage delivers "
                f"{len(infos)}."
            )
        return list(infos)

    def transfer(self, reference: Reference, blob: Descriptor) -> SkopeoTransfer:
        proxy, image = self.image(reference)
        return SkopeoTransfer(proxy, proxy.get_blob(image, blob.digest, blob.size))
