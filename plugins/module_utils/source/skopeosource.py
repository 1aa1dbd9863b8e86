# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""A conversation with one source of images that outlives the death of the skopeo it is held with."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..formats import oci
from ..errors import EngineError, InvalidDocument
from .imageproxy import ImageProxy, fetch_config
from ..formats.oci import Reference
from ..progress import Progress
from .skopeo import ProxyOptions, skopeo_version, top_digest

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
        self._asking: list[threading.Thread] = []
        self._closed = False
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

    def config(self, reference: Reference, descriptor: oci.Descriptor, converted: bool) -> bytes:
        """The configuration's bytes, proved against ``descriptor``; ``converted`` if skopeo made the manifest from
        Docker's format.
        """
        return self._patiently(lambda proxy, image: fetch_config(proxy, image, descriptor, converted), reference)

    def layer_sources(self, reference: Reference, manifest: oci.Manifest) -> list[oci.Descriptor]:
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

    def ask_index_digest(self, reference: Reference) -> Callable[[str], str | None]:
        """Begin to ask what the reference itself leads to; the function that is returned, to be called with the
        manifest's digest as the source knows it, waits for the digest of the index (None: there is none).

        The image proxy tells only the digest of the platform's manifest. So skopeo is asked a second time, beside the
        first, and again after a passing fault, for a task that names the index's digest cannot do without the answer. A
        lasting failure is none of the pull.
        """
        if not reference.is_remote or reference.digest:
            # A digest in the reference answers the question: either it is the manifest's own, or it is the index's.
            return lambda registry_digest: reference.digest if reference.digest not in ("", registry_digest) else None
        found: list[str | None] = [None]

        def ask() -> None:
            attempt = 0
            while not self._closed:
                try:
                    found[0] = top_digest(self.options, reference)[0]
                    return
                except EngineError as error:
                    if attempt >= self._retries or not is_passing(error):
                        return
                    attempt += 1
                    self.retried += 1
                    pause(attempt, error, self._progress)

        thread = threading.Thread(target=ask, name="index", daemon=True)
        self._asking.append(thread)
        thread.start()

        def wait(registry_digest: str) -> str | None:
            thread.join()
            return found[0] if found[0] != registry_digest else None

        return wait

    def _patiently(self, ask: Callable[[ImageProxy, int], T], reference: Reference) -> T:
        """Ask, and again after a passing fault of the source, up to ``retries`` times with growing pauses."""
        attempt = 0
        while True:
            generation = self.generation
            try:
                return ask(*self.image(reference))
            except EngineError as error:
                if attempt >= self._retries or not is_passing(error):
                    raise
                attempt += 1
                self.retried += 1
                self.replace(generation)
                pause(attempt, error, self._progress)

    def close(self) -> None:
        """End the proxy."""
        self._closed = True
        with self._lock:
            proxy, self._proxy = self._proxy, None
            self._images.clear()
        if proxy is not None:
            proxy.close()
        # After a failure questions may still be open. They end by themselves, but nobody waits long for answers that
        # are not wanted.
        for thread in (*self._asking, *([self._asked] if self._asked else [])):
            thread.join(CLOSE_WAIT)
