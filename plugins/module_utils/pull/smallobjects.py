# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Small objects, written by a process of their own beside the one that splits the tar.

Making a file costs the kernel several times what splitting and hashing it costs us, and a thread that makes files waits
for the interpreter's lock at every system call: it gained nothing (benchmarks/README.md has the figures). So contents
are handed over, many at a time, in memory that both processes share: they were copied twice through a pipe, which took
more processor time than hashing them.

The memory is a ring of slots, one for each batch. A pipe tells of a batch: its count and where its contents begin
(``<II``), then for each object its digest and size. A byte on a second pipe gives the oldest slot back. A batch of none
asks for an account, which comes as a JSON packet on the control socket; the first error comes there at once, by itself.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections.abc import Callable

from ..formats.digests import ObjectDigest
from ..formats import fsverity
from ..host import processes
from ..errors import EngineError, IOFailed, from_values, to_values
from ..store.objects import ObjectStats, ObjectStore

# A batch is handed over when it has so many objects or bytes.
BATCH_OBJECTS = 250
BATCH_BYTES = 256 * 1024
# A batch that is not full may take one more object of the size of a batch.
SLOT = 2 * BATCH_BYTES
SLOTS = 4
_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<I")


class DirectStorer:
    """Stores at once and in this process: for a host with a single processor, and the same interface without a fork."""

    def __init__(self, objects: ObjectStore) -> None:
        self._objects = objects
        self.put: Callable[[fsverity.Bytes], ObjectDigest] = objects.put

    def finish(self) -> None:
        """Return when all is stored."""

    def reset(self) -> None:
        """Forget what failed."""

    def close(self) -> None:
        """Nothing to end."""


class Storer:
    """Hands small objects to a forked process. Make it before any thread is started; ``finish`` may be called again and
    again.
    """

    def __init__(self, objects: ObjectStore, stranger: socket.socket | None = None) -> None:
        """``stranger`` is a connection of this process that the new one must not keep open."""
        self._objects = objects
        self._algorithm = objects.algorithm
        self._table: list[bytes] = []
        self._memory = memoryview(mmap.mmap(-1, SLOTS * SLOT))
        self._slot = self._at = 0  # where the batch begins that is being filled, and where its next object does
        self._away = 0  # batches that were handed over and not given back
        source, self._pipe = os.pipe()
        self._back, back = os.pipe()

        def leave() -> None:
            os.close(self._pipe)
            os.close(self._back)
            if stranger is not None:
                stranger.close()

        def work(control: socket.socket) -> None:
            _serve(source, back, self._memory, control, objects)

        self._child = processes.Child("stores objects", work, leave)
        os.close(source)
        os.close(back)

    def put(self, data: fsverity.Bytes) -> ObjectDigest:
        """Have ``data`` stored soon; its fs-verity digest. Raises what went wrong with earlier ones."""
        digest = fsverity.digest(data, self._algorithm)
        size = len(data)
        start = self._at
        self._at = end = start + size
        if end - self._slot > SLOT:
            self._at = start
            self._objects.put_known(digest, data)
            return digest
        self._memory[start:end] = data
        self._table += (digest, _SIZE.pack(size))
        if end - self._slot >= BATCH_BYTES or len(self._table) >= 2 * BATCH_OBJECTS:
            self._send()
        return digest

    def finish(self) -> None:
        """Return when everything is stored, and count it in the store's own counters. Raises EngineError if something
        was not.
        """
        if self._table:
            self._send()
        error = self._account()
        if error is not None:
            raise error

    def reset(self) -> None:
        """After a layer failed, for whatever reason: forget what was not handed over yet, and the error if there was
        one.
        """
        self._table, self._at = [], self._slot
        self._account()

    def _account(self) -> EngineError | None:
        self._write(_HEAD.pack(0, 0))
        error: EngineError | None = None
        while True:
            try:
                message = self._child.receive()
            except IOFailed:
                if error is not None:
                    return error  # the child told why before it ended
                raise
            if "stats" in message:
                self._objects.stats.add(ObjectStats(**message["stats"]))
                return error
            error = from_values(message["error"])

    def _send(self) -> None:
        self._write(_HEAD.pack(len(self._table) // 2, self._slot) + b"".join(self._table))
        self._table = []
        self._away += 1
        self._slot = self._at = (self._slot + SLOT) % (SLOTS * SLOT)
        if self._away == SLOTS:
            # They come back in the order in which they went, so the next slot is the first to be free.
            given_back = len(os.read(self._back, SLOTS))
            if not given_back:
                raise self._account() or processes.killed("stores objects")
            self._away -= given_back
        # See whether an earlier batch failed: a full disk should be reported now, not at the end of the layer.
        with contextlib.suppress(BlockingIOError):
            raise from_values(self._child.receive(socket.MSG_DONTWAIT)["error"])

    def _write(self, message: bytes) -> None:
        try:
            rest = memoryview(message)
            while rest:
                rest = rest[os.write(self._pipe, rest) :]
        except BrokenPipeError as error:
            raise processes.killed("stores objects") from error

    def close(self) -> None:
        """End the process and reap it; what was not finished may or may not be stored."""
        os.close(self._pipe)
        os.close(self._back)
        self._child.close()
        self._memory.release()


def _serve(source: int, back: int, memory: memoryview, control: socket.socket, objects: ObjectStore) -> None:
    entry = objects.algorithm.size + _SIZE.size
    digest_size = objects.algorithm.size
    failed = False
    objects.stats = ObjectStats()
    while True:
        head = _read(source, memoryview(bytearray(_HEAD.size)))
        if head is None:
            return
        count, start = _HEAD.unpack(head)
        if not count:
            processes.tell(control, {"stats": vars(objects.stats)})
            # The next layer may come although this one failed: it starts with a clean account.
            objects.stats, failed = ObjectStats(), False
            continue
        table = _read(source, memoryview(bytearray(count * entry)))
        if table is None:
            return
        try:
            for place in range(0, 0 if failed else len(table), entry):
                end = start + _SIZE.unpack_from(table, place + digest_size)[0]
                objects.put_known(ObjectDigest(bytes(table[place : place + digest_size])), memory[start:end])
                start = end
        except Exception as error:
            failed = True
            processes.tell(control, {"error": to_values(processes.explain(error, "Storing objects"))})
        os.write(back, b"\0")


def _read(source: int, view: memoryview) -> memoryview | None:
    """Fill ``view`` from the pipe; None if it ends."""
    done = 0
    while done < len(view):
        got = os.readv(source, [view[done:]])
        if not got:
            return None
        done += got
    return view
