# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""One layer: blob from a pipe -> decoder -> tar split -> objects -> splitstream object, everything verified.

Two threads share the work of a layer. One reads the pipe, hashes the blob, decodes it and hashes the tar: nearly all of
its time passes inside C code that does not hold the interpreter's lock. The other splits the tar and stores objects,
and meets the first only at a bounded queue. Nothing here registers anything: the result names anonymous objects, and
the caller decides when they get a name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import queue
import select
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, Union, cast

from ..formats.digests import object_digest
from ..formats import codecs, splitstream, tar
from ..errors import DigestMismatch, EngineError, InvalidLayer, RegistryUnreachable, Stalled
from ..formats.fsverity import Algorithm
from ..store.objects import ObjectStore
from .feed import Tap
from .limits import RATE_WINDOW, Budget, Limits, Tally
from .smallobjects import DirectStorer, Storer

# Decoded bytes per step: large enough that a step's fixed cost vanishes, small enough that what was decoded is still in
# the processor's cache when it is hashed and split.
CHUNK = 256 * 1024
# Steps that may wait between decoder and splitter; bounds memory to a few megabytes.
QUEUE_DEPTH = 8
# Compressed bytes asked for at once, and the pipe's capacity: fewer wake-ups of two processes.
PIPE_SIZE = 1024 * 1024
# A transfer silent for this many seconds is worth asking skopeo about, long before the timeout gives it up.
PROBE_AFTER = 3.0
# skopeo 1.9.3 drops the zero padding behind a tar's end marker when it recompresses to zstd:chunked; this much is
# restored at most.
PADDING_LIMIT = 1024 * 1024
# Compressed splitstream bytes kept in memory before they move to an unnamed file.
SPOOL_LIMIT = 4 * 1024 * 1024


UNLIMITED = Limits(min_rate=0)

AnyStorer = Union[Storer, DirectStorer]
# The compression of a blob that is a program of formats.tardiff.
TAR_DIFF = "tar-diff"


class LayerSpec(NamedTuple):
    """What a blob was announced to be. ``digest`` and ``diff_id`` are ``sha256:<hex>``; ``compression`` is None for a
    raw blob, and TAR_DIFF for one that writes the tar, at most ``limit`` bytes, from files of the EROFS image ``image``
    (object digest in hex). ``feed`` is the importer's end of a feed of the layer, or -1.
    """

    digest: str
    size: int
    diff_id: str
    compression: str | None
    image: str = ""
    limit: int = 0
    feed: int = -1


class LayerResult(NamedTuple):
    """A verified layer whose splitstream object is stored but not named. ``stream`` is the object's fs-verity digest in
    hex.
    """

    stream: str
    fetched: int
    tar_size: int
    objects_new: int
    objects_present: int
    bytes_new: int
    bytes_present: int
    bytes_inlined: int
    restored_padding: int


class PipeSource:
    """The blob's bytes: at most ``size`` of them, hashed as they pass, and never waited for longer than ``timeout``
    seconds, nor for bytes that come slower than the least rate, nor beyond the deadline.
    """

    def __init__(
        self,
        fd: int,
        size: int,
        timeout: float,
        on_bytes: Callable[[int], None],
        on_silence: Callable[[], None],
        limits: Limits = UNLIMITED,
    ) -> None:
        self._limits = limits
        # The rate counts the seconds that were spent waiting for the source only: a slow disk here is not its fault.
        self._waited = 0.0
        self._counted = 0
        self._fd = fd
        self._left = size
        self._timeout = timeout
        self._on_bytes = on_bytes
        self._on_silence = on_silence
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self.size = size
        self.sha256 = hashlib.sha256()
        self.cancelled = False
        os.set_blocking(fd, False)
        # An unprivileged user may have used up the share of pipe memory; the default size works too.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, getattr(fcntl, "F_SETPIPE_SZ", 1031), PIPE_SIZE)

    @property
    def fetched(self) -> int:
        """Bytes read so far."""
        return self.size - self._left

    def read(self, n: int) -> bytes:
        """Up to ``n`` bytes; ``b""`` after the last. Raises Stalled if it takes too long, RegistryUnreachable if the
        pipe ends early.
        """
        if not self._left:
            return b""
        if self._limits.deadline is not None:
            self._limits.left(0)
        try:
            data = os.read(self._fd, min(n, self._left))
        except BlockingIOError:
            self._wait()
            data = os.read(self._fd, min(n, self._left))
        if not data:
            raise RegistryUnreachable(f"The blob ended after {self.fetched} of {self.size} bytes.")
        self._left -= len(data)
        self.sha256.update(data)
        self._on_bytes(self.fetched)
        return data

    def _wait(self) -> None:
        start = last = time.monotonic()
        told = False
        while True:
            ready = self._poll.poll(500)
            now = time.monotonic()
            self._judge_rate(now - last)
            if ready:
                return
            last = now
            silent = now - start
            self._limits.left(0)
            if self.cancelled:
                raise Stalled("The transfer was given up.")
            if silent >= self._timeout:
                raise Stalled(
                    f"No data arrived for {self._timeout:g} seconds after {self.fetched} of {self.size} bytes.",
                    "Check the network and the registry, or raise the timeout.",
                )
            if not told and silent >= PROBE_AFTER:
                told = True
                self._on_silence()

    def _judge_rate(self, waited: float) -> None:
        self._waited += waited
        if self._waited < RATE_WINDOW:
            return
        came = self.fetched - self._counted
        if came < self._limits.min_rate * self._waited:
            raise Stalled(
                f"Only {came} bytes arrived in {self._waited:.0f} seconds of waiting; there are {self.fetched} of "
                f"{self.size} bytes.",
                f"'min_rate' asks for {self._limits.min_rate} bytes a second. Check the network and the registry, or "
                "lower it.",
            )
        self._waited = 0.0
        self._counted = self.fetched

    def drain(self) -> None:
        """Read and hash what is left, so that the blob's digest can be judged although its content could not
        be used.
        """
        while self.read(PIPE_SIZE):
            pass


class _Failure(NamedTuple):
    error: BaseException


_Pieces = Generator[bytes, None, None]
_Item = Any  # bytes, _Failure, or None at the end


def _decoded(source: PipeSource, spec: LayerSpec) -> _Pieces:
    """The tar of a blob that holds it."""
    decoder = codecs.open_decoder(cast(str, spec.compression), source)
    while True:
        data = decoder.read(CHUNK)
        if not data:
            return
        yield data


def _from_files(source: PipeSource, spec: LayerSpec, objects: ObjectStore, algorithm: Algorithm) -> _Pieces:
    """The tar of a blob that writes it from the files of another image, in pieces of about CHUNK bytes."""
    from ..formats import tardiff  # late: most layers are not made so
    from .sourcefiles import SourceFiles

    with contextlib.closing(SourceFiles(objects, algorithm, object_digest(spec.image))) as files:
        gathered: list[bytes] = []
        size = 0
        for piece in tardiff.apply(source.read, files.open, spec.limit):
            gathered.append(piece)
            size += len(piece)
            if size >= CHUNK:
                yield b"".join(gathered)
                gathered.clear()
                size = 0
        yield b"".join(gathered)


class _Decoder(threading.Thread):
    """Reads, hashes and decodes into a bounded queue; whatever goes wrong is delivered through the queue as well."""

    def __init__(self, source: PipeSource, spec: LayerSpec, objects: ObjectStore, algorithm: Algorithm) -> None:
        super().__init__(name="decoder", daemon=True)
        self._source = source
        self._pieces = _from_files(source, spec, objects, algorithm) if spec.image else _decoded(source, spec)
        self._queue: queue.Queue[_Item] = queue.Queue(QUEUE_DEPTH)
        # An uncompressed blob is its own tar: one hash serves both.
        self._plain = spec.compression == "none"
        self.sha256 = source.sha256 if self._plain else hashlib.sha256()
        self.size = 0

    def run(self) -> None:
        try:
            put = self._queue.put
            update = None if self._plain else self.sha256.update
            for data in self._pieces:
                if update:
                    update(data)
                self.size += len(data)
                put(data)
                if self._source.cancelled:
                    break
            self._pieces.close()
        except BaseException as error:
            self._queue.put(_Failure(error))
        else:
            self._queue.put(None)

    def chunks(self) -> Iterator[bytes]:
        """The decoded tar, piece by piece."""
        while True:
            item = self._queue.get()
            if item is None:
                return
            if isinstance(item, _Failure):
                raise item.error
            yield item

    def stop(self) -> None:
        """End the thread before it has decoded everything; the rest is dropped."""
        self._source.cancelled = True
        while self.is_alive():
            with contextlib.suppress(queue.Empty):
                self._queue.get(timeout=0.05)
        self.join()


class _Sink:
    """Joins the splitter's pieces to the object store and the splitstream."""

    def __init__(self, objects: ObjectStore, storer: AnyStorer, writer: splitstream.Writer) -> None:
        self._put = storer.put
        self._open = objects.writer
        self._external = writer.external
        self.inline = writer.inline
        self._object: Any = None
        self.announced = 0
        """Bytes of the object under way."""
        self.content: Callable[[memoryview], None]  # the open object's own write(), between begin() and end()

    def external(self, data: memoryview) -> None:
        self._external(self._put(data), len(data))

    def begin(self, size: int) -> None:
        self.announced = size
        self._object = self._open()
        self.content = self._object.write

    def end(self) -> None:
        digest, size = self._object.commit()
        self._object = None
        self.announced = 0
        self._external(digest, size)

    def abort(self) -> None:
        if self._object is not None:
            self._object.abort()


def spool(objects: ObjectStore) -> BinaryIO:
    """A temporary file for compressed chunks."""
    # On the repository's own file system, so that a full /tmp is no concern; unnamed, so that a crash leaves nothing.
    return cast(BinaryIO, tempfile.SpooledTemporaryFile(SPOOL_LIMIT, dir=f"/proc/self/fd/{objects.dirfd}"))


def import_layer(
    fd: int,
    spec: LayerSpec,
    objects: ObjectStore,
    algorithm: Algorithm,
    timeout: float,
    on_bytes: Callable[[int], None],
    on_silence: Callable[[], None],
    on_drained: Callable[[], None],
    storer: AnyStorer | None = None,
    budget: Budget | None = None,
) -> LayerResult:
    """Store the blob that arrives on ``fd`` (which is closed) and prove that it is what ``spec`` says.

    ``storer`` takes the small objects; without one they are stored in this thread. ``budget`` bounds what the blob may
    unpack to, and how slowly it may come; without one there are no bounds.

    Blob size, blob digest and diff_id are all checked; DigestMismatch names every one that disagrees. Follows the OCI
    image specification, "Image Layer Filesystem Changeset", for the tar and the composefs splitstream format for the
    result.
    """
    budget = budget or Budget(UNLIMITED, Tally(1))
    before = counters(objects)
    whole = False
    try:
        source = PipeSource(fd, spec.size, timeout, on_bytes, on_silence, budget.limits)
        if spec.compression is None:
            result = _import_blob(source, spec, objects, algorithm, on_drained, before, budget)
        else:
            storer = storer or DirectStorer(objects)
            result = _import_tar(source, spec, objects, storer, algorithm, on_drained, before, budget)
        whole = True
        return result
    finally:
        budget.end(whole)
        os.close(fd)


def _import_tar(
    source: PipeSource,
    spec: LayerSpec,
    objects: ObjectStore,
    storer: AnyStorer,
    algorithm: Algorithm,
    on_drained: Callable[[], None],
    before: Counters,
    budget: Budget,
) -> LayerResult:
    def spared() -> int:
        storer.finish()
        return splitter.size - (objects.stats.bytes_new - before.bytes_new) - sink.announced

    with contextlib.closing(spool(objects)) as chunks:
        tap = Tap(spec.feed)
        writer = splitstream.Writer(algorithm, splitstream.LAYER, chunks, tap=tap)
        sink = _Sink(objects, storer, writer)
        splitter = tar.Splitter(sink)
        decoder = _Decoder(source, spec, objects, algorithm)
        decoder.start()
        try:
            for chunk in decoder.chunks():
                splitter.feed(chunk)
                budget.count(splitter.size, splitter.entries_seen, spared)
            splitter.finish()
            storer.finish()
        except BaseException as error:
            sink.abort()
            decoder.stop()
            _blame_blob(source, spec, error)
            raise
        decoder.join()
        on_drained()
        check_blob(source, spec)
        restored = 0
        if decoder.sha256.hexdigest() != spec.diff_id[7:]:
            restored = _restore_padding(decoder.sha256, spec, splitter)
            if restored:
                writer.inline(bytes(restored))
            else:
                raise DigestMismatch(
                    f"The blob is as announced, but its tar has the digest sha256:{decoder.sha256.hexdigest()} where "
                    f"the configuration says {spec.diff_id}.",
                    "The image is broken or hostile; nothing was registered.",
                )
        return layer_result(writer, objects, before, source.fetched, restored, tap)


def _import_blob(
    source: PipeSource,
    spec: LayerSpec,
    objects: ObjectStore,
    algorithm: Algorithm,
    on_drained: Callable[[], None],
    before: Counters,
    budget: Budget,
) -> LayerResult:
    output = objects.writer()
    try:
        while True:
            data = source.read(CHUNK)
            if not data:
                break
            budget.count(source.fetched, 1, lambda: 0)
            output.write(data)
        on_drained()
        check_blob(source, spec)
        digest, size = output.commit()
    except BaseException:
        output.abort()
        raise
    writer = splitstream.Writer(algorithm, splitstream.BLOB)
    writer.external(digest, size)
    return layer_result(writer, objects, before, source.fetched, 0)


def check_blob(source: PipeSource, spec: LayerSpec) -> None:
    """Raise DigestMismatch unless the whole blob passed with the digest that was announced."""
    found = "sha256:" + source.sha256.hexdigest()
    if found != spec.digest:
        raise DigestMismatch(
            f"The blob of {spec.size} bytes has the digest {found} where the manifest says {spec.digest}.",
            "The source is damaged or was tampered with; nothing was registered.",
        )


def _blame_blob(source: PipeSource, spec: LayerSpec, error: BaseException) -> None:
    """A content error in a blob that is not the announced one is the blob's fault: say so instead of complaining about
    its gzip or tar.
    """
    if not isinstance(error, InvalidLayer):
        return
    try:
        source.cancelled = False
        source.drain()
        check_blob(source, spec)
    except DigestMismatch as mismatch:
        mismatch.message += f" ({error.text})"
        raise mismatch from error
    except EngineError as transfer:
        raise transfer from error


def _restore_padding(sha256: Any, spec: LayerSpec, splitter: tar.Splitter) -> int:
    """How many zero bytes a tar lacks to have the diff_id; 0 if none helps. The hash proves the guess, so nothing wrong
    can pass.
    """
    if not splitter.ended_with_zeros:
        return 0
    wanted = bytes.fromhex(spec.diff_id[7:])
    state = sha256.copy()
    step = bytes(512)
    for added in range(512, PADDING_LIMIT + 1, 512):
        state.update(step)
        if state.copy().digest() == wanted:
            return added
    return 0


class Counters(NamedTuple):
    """What a store did up to a moment."""

    new: int
    present: int
    bytes_new: int
    bytes_present: int


def counters(objects: ObjectStore) -> Counters:
    """What the store did so far."""
    stats = objects.stats
    return Counters(stats.new, stats.present, stats.bytes_new, stats.bytes_present)


def layer_result(
    writer: splitstream.Writer,
    objects: ObjectStore,
    before: Counters,
    fetched: int,
    restored: int,
    tap: Tap | None = None,
) -> LayerResult:
    """Store the splitstream and tell what the layer brought since ``before``; ``tap`` is the feed of a layer that is
    proved.
    """
    # Counted before the splitstream itself is stored: the figures are about what the layer brought.
    after = counters(objects)
    new, present, bytes_new, bytes_present = (b - a for a, b in zip(before, after))
    pieces = writer.finish()
    if tap is not None:
        tap.end()
    stream = objects.put_pieces(pieces)
    return LayerResult(
        stream.hex(),
        fetched,
        writer.size,
        new,
        present,
        bytes_new,
        bytes_present,
        writer.size - bytes_new - bytes_present,
        restored,
    )
