# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The interface that every source of images implements, and a wrapper that asks any source again after a passing fault.

A source tells what a reference means (resolve), hands out the documents and delivers the layers: either as *blobs*,
compressed tars that arrive on a file descriptor and on which it gives a verdict, or as *objects*, which are in a
repository's form already. Nothing that a source says is believed without a proof: the caller checks every byte
against its digest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO, NamedTuple, TypeVar

from ..formats.digests import ObjectDigest, StreamDigest
from ..formats.fsverity import Algorithm
from ..errors import EngineError
from ..formats.ocidocuments import Descriptor, Manifest, Platform
from ..formats.reference import Reference
from ..progress import Progress

T = TypeVar("T")

BACKOFF_LIMIT = 30.0

# How a policy for signatures was applied; stored with the image and returned by modules.
ENFORCED = "enforced"
IGNORED = "ignored"
ACCEPT_ANYTHING = "accept_anything"


class Resolved(NamedTuple):
    """What a reference means: one manifest, whose documents and layers are all to be asked for with ``reference``.

    ``digest`` is the manifest's as the source knows it, ``raw`` the manifest in OCI's format. ``index_digest`` is that
    of the outermost index, proved to lead to the manifest; None if there is none. ``platform`` is what the index says
    the manifest is for, None if it says nothing.
    """

    reference: Reference
    digest: str
    raw: bytes
    index_digest: str | None = None
    platform: Platform | None = None


class Facts(NamedTuple):
    """What results tell about a source: versions of the program behind it, None if there is none, and how the policy
    for signatures was applied (``enforced``, ``ignored``, ``accept_anything``).
    """

    skopeo_version: str | None = None
    protocol_version: str | None = None
    policy: str | None = None


class Transfer:
    """A blob on its way. ``fd`` is where it arrives; whoever takes the transfer closes it. ``remote`` tells whether it
    comes through a network, which may fail for a while.
    """

    remote = False

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def verdict(self) -> None:
        """Return if the source stands by the blob, else raise what it says against it. Waits as long as it takes.

        It is asked for once, beside the reader: when the last byte was read, or when no bytes come and the source is
        to say why. Only a return means that the blob is good; an error, or no answer at all, means that it must be
        fetched again.
        """
        raise NotImplementedError


class LayerObjects:
    """A layer that a source delivers in a repository's form: a splitstream and the objects that it refers to.

    It is used within one process, one call at a time. ``pull.objectlayer`` stores and proves what it hands out.
    ``algorithm`` is that of the digests in the splitstream. ``trusted`` says that the splitstream's own fs-verity
    digest, which is compared with ``stream``, is proof enough of the tar: only a repository whose proofs root or the
    caller made can say so. ``fetched`` counts the bytes that crossed a network, None if there is none.
    """

    algorithm: Algorithm
    stream: StreamDigest
    trusted: bool = False
    fetched: int | None = None

    def splitstream(self) -> BinaryIO:
        """The bytes of the splitstream object, from its beginning; the caller closes it."""
        raise NotImplementedError

    def open_object(self, digest: ObjectDigest) -> BinaryIO:
        """The content of the object with this digest, from its beginning; the caller closes it.

        A file whose ``fileno()`` is that of a regular file on this host is cloned where the file systems allow; any
        other is read with ``readinto``. Raises EngineError if the object cannot be had.
        """
        raise NotImplementedError

    def linkable(self, fd: int) -> bool:
        """Whether the open object ``fd`` may become ours by a hard link: nobody but root and the caller owns it or
        can write it, and nobody will.
        """
        return False

    def expect(self, digests: list[ObjectDigest]) -> None:
        """A hint: these objects will be asked for, in this order. A source that waits for a network may begin."""

    def close(self) -> None:
        """Release what was opened."""


class Source:
    """A source of images. ``name`` is what errors call it; ``generation`` counts how often it was renewed;
    ``delivers_objects`` says in which form the layers come.
    """

    name = "the source"
    generation = 0
    delivers_objects = False

    def resolve(self, reference: Reference) -> Resolved:
        """What ``reference`` means now, all of it from one answer: see Resolved. Raises ImageNotFound, PlatformNotFound
        and what else may be wrong with a source and its documents.
        """
        raise NotImplementedError

    def config(self, resolved: Resolved, manifest: Manifest) -> bytes:
        """The configuration, proved against the manifest's descriptor."""
        raise NotImplementedError

    def layers(self, resolved: Resolved, manifest: Manifest) -> list[Descriptor]:
        """What will be delivered for each layer, lowest first: the manifest's own blobs, unless the source keeps
        others.
        """
        return list(manifest.layers)

    def transfer(self, reference: Reference, blob: Descriptor) -> Transfer:
        """Begin to deliver a blob. Sources that deliver objects have none."""
        raise NotImplementedError

    def layer_objects(self, reference: Reference, diff_id: str) -> LayerObjects:
        """The objects of a layer, of a source that delivers such. Called in the process that stores them, which was
        forked after resolve().
        """
        raise NotImplementedError

    def facts(self) -> Facts:
        """What is known about the source by now."""
        return Facts()

    def renew(self, generation: int) -> None:
        """Begin anew after a fault that was met in ``generation``; a later generation is left alone."""

    def abandon(self) -> None:
        """For a forked process: let go of what only the parent may use."""

    def close(self) -> None:
        """Release everything."""


class TransferFailed(Exception):
    """An attempt failed with ``error``; ``usable`` tells whether the source itself is well, so that it need not be
    renewed.
    """

    def __init__(self, error: EngineError, usable: bool) -> None:
        super().__init__(error)
        self.error = error
        self.usable = usable


def pause(attempt: int, error: EngineError, progress: Progress) -> None:
    """Wait before the ``attempt``-th repetition, twice as long each time, and say so."""
    seconds = min(0.5 * 2 ** (attempt - 1), BACKOFF_LIMIT)
    progress.message(f"{error.text} Trying again in {seconds:g} s.")
    time.sleep(seconds)


def persist(attempt: Callable[[], T], retries: int, progress: Progress) -> T:
    """What ``attempt`` returns, which is called again after a passing fault, up to ``retries`` times with growing
    pauses. Raises its last error.
    """
    begin = time.monotonic()
    for tries in range(retries + 1):
        try:
            return attempt()
        except EngineError as error:
            if not error.passing or tries == retries:
                error.attempts, error.seconds = tries + 1, time.monotonic() - begin
                raise
            pause(tries + 1, error, progress)
    raise AssertionError("this must hold: retries >= 0")


class Patient(Source):
    """Any source, asked again after a passing fault, up to ``retries`` times with growing pauses. Before each attempt
    ``permit`` is called, which raises an engine error if there may be no further one.
    """

    def __init__(
        self, source: Source, retries: int, progress: Progress, permit: Callable[[], object] = lambda: None
    ) -> None:
        self._permit = permit
        self.source = source
        self.retried = 0
        self.name = source.name
        self.delivers_objects = source.delivers_objects
        self._retries = retries
        self._progress = progress

    def again(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns, which may be called several times. Raises its last error; TransferFailed is
        unwrapped.
        """
        tries = 0
        begin = time.monotonic()
        while True:
            generation = self.source.generation
            self._permit()
            try:
                return attempt()
            except TransferFailed as failure:
                error, usable = failure.error, failure.usable
            except EngineError as failure:
                error, usable = failure, False
            # If another attempt had the source renewed, this attempt failed along with it, and that does not count.
            if generation == self.source.generation:
                if not error.passing or tries >= self._retries:
                    error.attempts, error.seconds = tries + 1, time.monotonic() - begin
                    raise error
                tries += 1
                if not usable:
                    self.source.renew(generation)
            self.retried += 1
            pause(max(tries, 1), error, self._progress)

    def resolve(self, reference: Reference) -> Resolved:
        return self.again(lambda: self.source.resolve(reference))

    def config(self, resolved: Resolved, manifest: Manifest) -> bytes:
        return self.again(lambda: self.source.config(resolved, manifest))

    def layers(self, resolved: Resolved, manifest: Manifest) -> list[Descriptor]:
        return self.again(lambda: self.source.layers(resolved, manifest))

    # Deliveries are tried again as a whole, by whoever takes them, within again().

    def transfer(self, reference: Reference, blob: Descriptor) -> Transfer:
        return self.source.transfer(reference, blob)

    def layer_objects(self, reference: Reference, diff_id: str) -> LayerObjects:
        return self.source.layer_objects(reference, diff_id)

    def facts(self) -> Facts:
        return self.source.facts()

    def renew(self, generation: int) -> None:
        self.source.renew(generation)

    def abandon(self) -> None:
        self.source.abandon()

    def close(self) -> None:
        self.source.close()
