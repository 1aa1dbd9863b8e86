# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Missing layers, several at once: who fetches what, when to try again, and when a layer gets its name.

One worker process per layer under way: splitting a tar holds the interpreter's lock, so layers in threads of one
process would take turns (benchmarks/README.md tells what was measured). A lane, a thread of the parent that mostly
waits, stands behind each worker: it asks the source for a blob, hands what it gets to its worker, awaits both verdicts,
and registers the layer.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import functools
import json
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ..formats.repolayout import StreamName
from ..formats.digests import StreamDigest, stream_digest
from ..host import processes, processors
from ..store import imagestreams, proofs
from ..errors import (
    FILES,
    Busy,
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InternalError,
    IOFailed,
    LimitReached,
    NoSpace,
    OutOfMemory,
    PermissionDenied,
    ProxyFailed,
    ReadOnly,
    RegistryUnreachable,
    Stalled,
    doing,
    exhausted,
    from_exception,
    from_values,
    to_values,
)
from ..formats.fsverity import Algorithm
from .feed import Feed
from .layer import AnyStorer, LayerResult, LayerSpec, import_layer
from ..store.objects import ObjectStore
from ..formats.ocidocuments import Descriptor
from ..formats.reference import Reference
from ..progress import BYTES, DONE, STARTED, Event, Progress
from ..store.repository import LOCK_WAIT, Repository
from ..source.source import Patient, Source, Transfer, TransferFailed
from .limits import Budget, Limits, Tally
from .smallobjects import DirectStorer, Storer

# No other source of a layer helps against these.
_OF_THIS_HOST = (NoSpace, ReadOnly, PermissionDenied, IOFailed)
# Seconds that a worker gets to end by itself.
GRACE = 1.0


class Job(NamedTuple):
    """One missing layer: the stream it will become and where its blob comes from, which results call ``by``.

    ``otherwise`` is what to do if that fails: a delta may be stale, damaged or gone, a peer may lie, and the layer's
    own blob is what counts.
    """

    stream: StreamName
    spec: LayerSpec
    source: Patient
    reference: Reference
    otherwise: Any = None  # another Job
    by: str = ""


class Disappointment(NamedTuple):
    """A way to a layer that failed, so that the next one was taken."""

    job: Job
    error: EngineError


DELTA, PEER = "delta", "peer"


class Worker(processes.Child):
    """A forked process that imports the layers it is handed, one after the other."""

    def __init__(
        self,
        objects: ObjectStore,
        algorithm: Algorithm,
        timeout: float,
        siblings: Sequence[Worker],
        sources: Sequence[Source],
        budget: Budget | None = None,
    ) -> None:
        def leave() -> None:
            for sibling in siblings:
                sibling.connection.close()
            for source in sources:
                source.abandon()

        super().__init__(
            "imports layers",
            lambda control: _serve(control, objects, algorithm, timeout, sources, budget),
            leave,
        )

    def send_layer(self, spec: LayerSpec, fd: int) -> None:
        """Give the worker a layer and its pipe. Raises IOFailed if it is gone."""
        self.send(spec._asdict(), fd)

    def send_objects(self, spec: LayerSpec, source: int, reference: Reference) -> None:
        """Have the worker take over the objects of a layer from the source of this number. Raises IOFailed if it is
        gone.
        """
        self.send({**spec._asdict(), "source": source, "reference": dataclasses.asdict(reference)})


def _serve(
    control: socket.socket,
    objects: ObjectStore,
    algorithm: Algorithm,
    timeout: float,
    sources: Sequence[Source] = (),
    budget: Budget | None = None,
) -> None:
    def tell(kind: str, **values: Any) -> None:
        processes.tell(control, {"kind": kind, **values})

    # The storer forks its process before any thread of this one exists; that process ends with this one.
    storer: AnyStorer = Storer(objects, control) if processors.usable() > 1 else DirectStorer(objects)
    try:
        while True:
            message, ancillary, _flags, _address = control.recvmsg(
                processes.MAX_MESSAGE, socket.CMSG_SPACE(4), getattr(socket, "MSG_CMSG_CLOEXEC", 0)
            )
            if not message:
                return
            order = json.loads(message)
            try:
                if "source" in order:
                    source, reference = sources[order.pop("source")], Reference(**order.pop("reference"))
                    _one_object_layer(source, reference, LayerSpec(**order), objects, tell, budget)
                elif not ancillary:
                    # One was sent, and this process could open no more.
                    raise exhausted(FILES, "Taking a layer")
                else:
                    fd = array.array("i", ancillary[0][2])[0]
                    _one_layer(fd, LayerSpec(**order), objects, storer, algorithm, timeout, tell, budget)
            except BrokenPipeError:
                return
            except Exception as error:
                storer.reset()
                tell("error", error=to_values(processes.explain(error, "in the process that imports it")))
    finally:
        storer.close()


def _one_layer(
    fd: int,
    spec: LayerSpec,
    objects: ObjectStore,
    storer: AnyStorer,
    algorithm: Algorithm,
    timeout: float,
    tell: Callable[..., None],
    budget: Budget | None,
) -> None:
    on_bytes = _reporter(tell)
    result = import_layer(
        fd, spec, objects, algorithm, timeout, on_bytes, lambda: tell("silent"), lambda: tell("drained"), storer, budget
    )
    tell("result", result=result._asdict())


def _one_object_layer(
    source: Source,
    reference: Reference,
    spec: LayerSpec,
    objects: ObjectStore,
    tell: Callable[..., None],
    budget: Budget | None,
) -> None:
    from .objectlayer import import_objects  # late: most layers come as blobs

    offer = source.layer_objects(reference, spec.diff_id)
    report = _reporter(tell)

    def on_bytes(done: int) -> None:
        report(done)
        if budget is not None:
            budget.limits.left(0)
            # What is cloned or linked takes no room, so the free space is no bound here.
            budget.count(done, 0, lambda: done)

    result = import_objects(offer, spec, objects, on_bytes)
    if budget is not None:
        budget.end(True)
    tell("result", result=result._asdict())


def _reporter(tell: Callable[..., None]) -> Callable[[int], None]:
    """A function that tells how many bytes are done, ten times a second at most."""
    next_report = 0.0

    def on_bytes(done: int) -> None:
        nonlocal next_report
        now = time.monotonic()
        if now >= next_report:
            next_report = now + 0.1
            tell("bytes", done=done)

    return on_bytes


class _Verdict(threading.Thread):
    """The source's judgement of one blob, awaited beside the import.

    Only ``approved`` is a yes: it stays false whatever else happens in here.
    """

    def __init__(self, transfer: Transfer) -> None:
        super().__init__(name="verdict", daemon=True)
        self._transfer = transfer
        self.approved = False
        self.error: EngineError | None = None

    def run(self) -> None:
        try:
            self._transfer.verdict()
            self.approved = True
        except BaseException as error:
            self.error = from_exception(error, "awaiting the source's verdict on the blob")


def _ways(job: Job) -> list[Job]:
    """The job and what is to be tried after it, in order."""
    ways = [job]
    while ways[-1].otherwise is not None:
        ways.append(ways[-1].otherwise)
    return ways


class Fetcher:
    """Brings missing layers into a repository and names each as soon as it is whole, synced and verified."""

    def __init__(
        self,
        repository: Repository,
        parallel: int,
        timeout: float,
        progress: Progress,
        arrived: Callable[[StreamName, StreamDigest], None] = lambda stream, digest: None,
        limits: Limits = Limits(),  # noqa: B008 -- it is frozen
        feeds: Mapping[StreamName, Feed] | None = None,
        lost: Callable[[StreamName], None] = lambda stream: None,
    ) -> None:
        """``arrived`` is told the stream and the object digest of each layer that was named, by any thread.

        The first attempt at a layer that has one of ``feeds`` tells there what the layer consists of; ``lost`` is told
        the stream, by any thread, if that attempt failed, so that nothing is made of what was told.
        """
        self._feeds = dict(feeds or {})
        self._lost = lost
        self._limits = limits
        self._arrived = arrived
        self._repository = repository
        self._parallel = parallel or processors.usable()
        self._timeout = timeout
        self._progress = progress
        self._failure: EngineError | None = None
        self._moved = 0.0
        self._sources: list[Patient] = []
        # Lanes are threads, and a store serves one at a time.
        self._naming = threading.Lock()
        self.results: dict[StreamName, LayerResult] = {}
        # Stream -> the job that brought it.
        self.brought: dict[StreamName, Job] = {}
        self.disappointments: list[Disappointment] = []
        self._left_out: set[Patient] = set()

    def run(self, jobs: Sequence[Job]) -> None:
        """Fetch all ``jobs``, given from the lowest layer up: the lowest first, because the file tree grows from there,
        and then the largest first, so that the lanes end together. Raises the first error after the layers under way
        have ended; what was imported stays named.
        """
        todo: queue.Queue[Job] = queue.Queue()
        for job in [*jobs[:1], *sorted(jobs[1:], key=lambda job: -job.spec.size)]:
            todo.put(job)
        every = [way for job in jobs for way in _ways(job)]
        self._sources = sources = list({id(job.source): job.source for job in every}.values())
        workers: list[Worker] = []
        lanes: list[threading.Thread] = []
        try:
            # All forks happen before the first lane starts: a forked child holds only what the forking thread held.
            count = min(self._parallel, len(jobs))
            tally = Tally(count)
            for number in range(count):
                objects, algorithm = self._repository.objects, self._repository.algorithm
                budget = Budget(self._limits, tally, number)
                workers.append(Worker(objects, algorithm, self._timeout, workers, sources, budget))
            lanes = [threading.Thread(target=self._lane, args=(worker, todo), daemon=True) for worker in workers]
            for lane in lanes:
                lane.start()
            for lane in lanes:
                lane.join()
        finally:
            # Workers first: a lane ends when its worker is gone.
            for worker in workers:
                # It is asked to end before it is killed, so that it can reap its own storer: it may be in the middle of
                # a layer that nobody wants any more.
                worker.close(GRACE)
            for lane in lanes:
                if lane.ident is not None:
                    lane.join()
        if self._failure:
            raise self._failure

    def _lane(self, worker: Worker, todo: queue.Queue[Job]) -> None:
        waiting: dict[StreamName, float] = {}
        try:
            while self._failure is None:
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    return
                with (
                    doing(f"importing layer {job.spec.diff_id} of {job.reference.original}"),
                    contextlib.ExitStack() as stack,
                ):
                    if not self._claim(job, stack, waiting, todo):
                        continue
                    result = self._brought(job)
                    if result is None:
                        result = self._somehow(worker, job)
                        self._publish(job, result)
                self.results[job.stream] = result
                self._arrived(job.stream, stream_digest(result.stream))
                self._progress(Event(DONE, job.spec.diff_id, job.spec.size, job.spec.size))
        except EngineError as error:
            self._failure = self._failure or error
        except BaseException as error:
            # Nothing may pass unnoticed: a lane that ends without a word counts as done.
            self._failure = self._failure or from_exception(error, "importing layers")

    def _claim(
        self, job: Job, stack: contextlib.ExitStack, waiting: dict[StreamName, float], todo: queue.Queue[Job]
    ) -> bool:
        """Take the lock of a layer until ``stack`` ends; False if another pull fetches it, and the job was put back.

        Each layer is fetched by one pull at a time: the others wait, and do what else they have to do meanwhile. A
        holder that dies frees it. The lock only spares work, so nobody waits for ever: then the layer is fetched twice,
        which harms nothing.
        """
        since = waiting.get(job.stream)
        if since is not None and time.monotonic() - since >= LOCK_WAIT:
            self._progress.message(f"Layer {job.spec.diff_id} is fetched here, too: the other pull takes too long")
            return True
        try:
            lock = self._repository.lock(f"layer-{job.spec.diff_id}", 0.0 if todo.qsize() else 0.5, keep=False)
            stack.enter_context(lock)
        except Busy as busy:
            if since is None:
                waiting[job.stream] = time.monotonic()
                self._progress.message(f"Waiting for layer {job.spec.diff_id}, which another pull fetches: {busy.text}")
            if todo.qsize():
                time.sleep(0.05)
            todo.put(job)
            return False
        return True

    def _brought(self, job: Job) -> LayerResult | None:
        """The layer, if another pull brought and proved it since this one was planned."""
        with self._naming:
            digest = self._repository.stream(job.stream)
            if digest is None or self._repository.trusted(job.spec.diff_id) != digest:
                return None
            tar = job.spec.compression is not None
            if proofs.proved_layer(self._repository, digest, job.spec.diff_id, tar, False, []) is None:
                return None
        return LayerResult(digest.hex(), 0, 0, 0, 0, 0, 0, 0, 0)

    def _publish(self, job: Job, result: LayerResult) -> None:
        # The barrier first: a name must never lead to bytes that a power cut can still take away.
        self._repository.sync()
        digest = stream_digest(result.stream)
        with self._naming:
            imagestreams.name_layer(self._repository, job.stream, digest)
            self._repository.trust(job.spec.diff_id, digest)

    def _somehow(self, worker: Worker, job: Job) -> LayerResult:
        """Bring the layer by the first way that serves. Only if the last way fails, the layer fails."""
        *before, last = _ways(job)
        for way in before:
            if way.source in self._left_out:
                continue
            usable = True

            def attempt(way: Job = way) -> LayerResult:
                nonlocal usable
                try:
                    return self._attempt(worker, way)
                except TransferFailed as failure:
                    usable = failure.usable
                    raise

            try:
                result = way.source.again(attempt)
            except _OF_THIS_HOST:
                raise
            except EngineError as error:
                self.disappointments.append(Disappointment(way, error))
                self._progress.message(f"{way.source.name} does not serve layer {way.spec.diff_id}: {error.text}")
                if way.by == PEER and not isinstance(error, ImageNotFound):
                    # A peer may lack a layer. After any other fault it is not asked for further layers.
                    self._left_out.add(way.source)
                if not usable:
                    # The broken transfer is still in the way of the next one.
                    way.source.renew(way.source.source.generation)
            else:
                self.brought[job.stream] = way
                return result
        self.brought[job.stream] = last
        return last.source.again(functools.partial(self._attempt, worker, last))

    def _attempt(self, worker: Worker, job: Job) -> LayerResult:
        # Another way, or another try, may bring other bytes: what was told before belongs to one attempt alone.
        feed = None if job.source.delivers_objects else self._feeds.pop(job.stream, None)
        if feed is None:
            return self._tried(worker, job)
        try:
            return self._tried(worker, job._replace(spec=job.spec._replace(feed=feed.writer)))
        except BaseException:
            self._lost(job.stream)
            raise

    def _tried(self, worker: Worker, job: Job) -> LayerResult:
        transfer = None
        if job.source.delivers_objects:
            worker.send_objects(job.spec, self._sources.index(job.source), job.reference)
            self._progress(Event(STARTED, job.spec.diff_id, 0, job.spec.size))
        else:
            transfer = job.source.transfer(job.reference, Descriptor("", job.spec.digest, job.spec.size))
            self._progress(Event(STARTED, job.spec.diff_id, 0, job.spec.size))
            try:
                worker.send_layer(job.spec, transfer.fd)
            finally:
                os.close(transfer.fd)
        verdict: _Verdict | None = None
        while True:
            message = worker.receive()
            kind = message["kind"]
            self._moved = time.monotonic()
            if kind == "bytes":
                self._progress(Event(BYTES, job.spec.diff_id, message["done"], job.spec.size))
            elif kind in ("silent", "drained"):
                if verdict is None and transfer is not None:
                    verdict = _Verdict(transfer)
                    verdict.start()
            elif kind == "error":
                remote = job.by == PEER if transfer is None else transfer.remote
                raise _judge(from_values(message["error"]), verdict, remote)
            elif transfer is None:
                # Objects come without a verdict: our own proofs have decided.
                return LayerResult(**message["result"])
            else:
                if verdict is None:
                    raise AssertionError("this must hold: verdict is not None")
                self._await(verdict, job.source.name)
                if not verdict.approved:
                    raise _refusal(verdict.error, job.source.name)
                return LayerResult(**message["result"])

    def _await(self, verdict: _Verdict, name: str) -> None:
        """Wait for the source's judgement. It may have to queue behind another blob's, which comes when that blob has
        ended: as long as any transfer moves nothing is stuck.
        """
        while verdict.is_alive():
            verdict.join(0.5)
            if verdict.is_alive() and time.monotonic() - self._moved >= self._timeout:
                raise Stalled(
                    f"{name} gave no verdict on the blob within {self._timeout:g} seconds.",
                    "Check the registry, or raise the timeout.",
                )


def _refusal(error: EngineError | None, name: str) -> EngineError:
    """The error for a blob in which we found nothing wrong, but which the source did not approve."""
    if error is None:
        return InternalError(f"{name} gave no verdict on the blob.")
    # If the source died first there is no verdict: fetch again. The same holds if we could not ask for one.
    if error.passing or isinstance(error, (InternalError, IOFailed, LimitReached, OutOfMemory)):
        return error
    return DigestMismatch(f"{name} refuses the blob: {error.message}", error.hint, said=error.said)


def _judge(error: EngineError, verdict: _Verdict | None, remote: bool) -> TransferFailed:
    """The worker's error, with the source's own words where it has any."""
    if isinstance(error, RegistryUnreachable) and not remote:
        # The worker only sees where the bytes end. No network can have cut them, so trying again is of no use.
        error = DigestMismatch(error.message, "The image is damaged: copy or make it again.", doing=error.doing)
    elif isinstance(error, Stalled) and not remote:
        error.passing = False
    if verdict is None:
        return TransferFailed(error, False)
    verdict.join(1.0)
    said = verdict.error
    if said is not None:
        if isinstance(error, RegistryUnreachable) and said.__class__ is not ProxyFailed:
            # The worker only sees the pipe end; the source knows why. Whatever broke a transfer may be gone at the next
            # try.
            error = type(said)(error.message, said.hint, doing=error.doing, passing=True)
        error.message = f"{error.message} {said.message}"
        error.said = said.said
    return TransferFailed(error, not verdict.is_alive())
