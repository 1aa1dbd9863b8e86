# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""How much a pull may fetch, how slowly, and until when.

What the layers unpack to is counted while they are split, by all workers of a fetch together: each keeps its count in a
place of a mapping that they share, and looks at the sum. So a blob that unpacks to a thousand times its size is refused
when the bound is reached, not when the disk is full.
"""

from __future__ import annotations

import dataclasses
import mmap
import struct
import time
from collections.abc import Callable

from ..errors import NoSpace, Stalled, TooLarge
from ..progress import human

MAX_ENTRIES = 20_000_000
"""Members that the archives of one fetch may have together; the largest public images have 1.5 million."""
MIN_RATE = 1024
"""Bytes a second: what is slower is given up."""
RATE_WINDOW = 30.0
"""Seconds of waiting over which the rate is taken."""
_LOOK_AGAIN = 16 << 20
_SLOT = struct.Struct("<3q")


@dataclasses.dataclass(frozen=True)
class Limits:
    """``max_size`` is in bytes, None for what ``free`` has room for; ``min_rate`` in bytes a second, 0 for none;
    ``deadline`` is a time of time.monotonic(), which all processes of a host share, None for none.
    """

    max_size: int | None = None
    free: int | None = None
    max_entries: int = MAX_ENTRIES
    min_rate: int = MIN_RATE
    deadline: float | None = None

    def left(self, seconds: float) -> float:
        """``seconds``, or less if the deadline comes before. Raises Stalled when it is over."""
        if self.deadline is None:
            return seconds
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise Stalled(
                "The deadline of the task is over.",
                "Raise 'deadline', or run the task again: layers that did arrive are kept.",
                passing=False,
            )
        return min(seconds, left)


class Tally:
    """Bytes, entries and bytes that took no space, of several workers. Make it before they are forked."""

    def __init__(self, workers: int) -> None:
        self._shared = mmap.mmap(-1, workers * _SLOT.size)

    def put(self, worker: int, size: int, entries: int, spared: int) -> None:
        _SLOT.pack_into(self._shared, worker * _SLOT.size, size, entries, spared)

    def sums(self) -> tuple[int, int, int]:
        """The sums over all workers, each as of its last ``put``."""
        slots = list(_SLOT.iter_unpack(self._shared))
        return sum(slot[0] for slot in slots), sum(slot[1] for slot in slots), sum(slot[2] for slot in slots)


class Budget:
    """One worker's share of what a fetch may unpack to. ``count`` is called as a layer is split, ``end`` after it."""

    def __init__(self, limits: Limits, tally: Tally, worker: int = 0) -> None:
        self.limits = limits
        self._tally = tally
        self._worker = worker
        self._done = (0, 0, 0)  # of the layers that are whole
        self._now = (0, 0, 0)
        self._next_look = 0

    def count(self, size: int, entries: int, spared: Callable[[], int]) -> None:
        """The layer had ``size`` bytes and ``entries`` members so far. Raises TooLarge where the task allows less, and
        NoSpace where the disk does: the same error as if the disk had been full a moment earlier.

        ``spared`` tells how many of the bytes need no room: what is in the repository already, and what is not stored
        as an object. It is asked only where the free space alone would not do, for it waits for what is being stored.
        """
        self._put(size, entries, self._now[2])
        limits = self.limits
        total, members, saved = self._tally.sums()
        if members > limits.max_entries:
            raise TooLarge(
                f"The layers have more than {limits.max_entries} members.",
                "The image is hostile; if it is not, split it into several.",
            )
        if limits.max_size is not None:
            if total > limits.max_size:
                raise TooLarge(
                    f"The layers that are fetched unpack to more than the {limits.max_size} bytes "
                    f"({human(limits.max_size)}) that the task allows.",
                    "If the image may be so large, raise 'max_size'.",
                )
        elif limits.free is not None and total - saved > limits.free and total >= self._next_look:
            self._next_look = total + _LOOK_AGAIN
            self._put(size, entries, spared())
            total, _members, saved = self._tally.sums()
            if total - saved > limits.free:
                raise NoSpace(
                    f"The layers that are fetched unpack to more than the {limits.free} bytes ({human(limits.free)}) "
                    "that were free for them.",
                    "Free space there, or set 'max_size' if that is wrong.",
                )

    def _put(self, size: int, entries: int, spared: int) -> None:
        self._now = (size, entries, spared)
        self._tally.put(self._worker, *(done + now for done, now in zip(self._done, self._now)))

    def end(self, whole: bool) -> None:
        """The layer is over; if it is not ``whole`` it comes again, or not at all."""
        if whole:
            self._done = (self._done[0] + self._now[0], self._done[1] + self._now[1], self._done[2] + self._now[2])
        self._put(0, 0, 0)
        self._next_look = 0
