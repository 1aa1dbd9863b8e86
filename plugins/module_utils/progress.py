# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What a pull tells while it runs, and who can listen.

The engine emits :class:`Event` values; a sink decides what becomes of them. Sinks are called from several threads, one
event at a time (:class:`Progress` holds a lock), and never raise into a pull: a full disk must not fail a transfer for
the sake of its progress bar.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol
import contextlib

from .text import LINE_LIMIT, printable

IMAGE = "image"
PLANNED = "planned"
STARTED = "started"
BYTES = "bytes"
SKIPPED = "skipped"
DONE = "done"
MESSAGE = "message"


class Event(NamedTuple):
    """One step. ``layer`` is a digest (``sha256:<hex>``) or empty for images and messages; ``done`` and ``total`` are
    compressed bytes; ``text`` is the name of an image or a message.
    """

    kind: str
    layer: str = ""
    done: int = 0
    total: int = 0
    text: str = ""


class Sink(Protocol):
    """Receives every event of a pull."""

    def event(self, event: Event) -> None:
        """Take note of ``event``."""

    def close(self) -> None:
        """The pull is over."""


class _Layer:
    __slots__ = ("done", "started", "state", "total")

    def __init__(self, total: int, now: float) -> None:
        self.total = total
        self.done = 0
        self.started = now
        self.state = STARTED


class Progress:
    """Serialises events of many threads and shields the pull from what the sinks do wrong."""

    def __init__(self, *sinks: Sink | None) -> None:
        self._sinks = [sink for sink in sinks if sink]
        self._lock = threading.Lock()
        self.lost: list[tuple[Sink, OSError]] = []
        """Sinks that could not go on, and why."""

    def __call__(self, event: Event) -> None:
        with self._lock:
            for sink in list(self._sinks):
                try:
                    sink.event(event)
                except OSError as error:
                    self._sinks.remove(sink)
                    self.lost.append((sink, error))

    def message(self, text: str) -> None:
        """Emit a message event."""
        self(Event(MESSAGE, text=text))

    def close(self) -> None:
        with self._lock:
            for sink in self._sinks:
                try:
                    sink.close()
                except OSError as error:
                    self.lost.append((sink, error))
            self._sinks = []


class Countdown:
    """Tells how far something of many parts is, and how long the rest takes if it goes on like that; at most twice a
    second, and at its end.
    """

    def __init__(
        self,
        progress: Progress,
        text: str,
        total: int,
        share: bool = False,
        clock: Callable[[], float] = time.monotonic,
        begun: float | None = None,
    ) -> None:
        """``begun``: when the work began by ``clock``, if that was before now."""
        self._progress, self._text, self._total, self._share = progress, text, total, share
        self._clock = clock
        self._told = clock()
        self._begun = self._told if begun is None else begun

    def reached(self, done: int) -> None:
        """``done`` parts are done now."""
        now, total = self._clock(), self._total
        if not done or (now - self._told <= 0.5 and done != total):
            return
        self._told = now
        left = max(total - done, 0)
        far = f"{100 * done // total}%" if self._share and total else f"{done} of {total}"
        rest = f", {int((now - self._begun) * left / done)} s left" if left else ""
        self._progress.message(f"{self._text}: {far}{rest}")


class Board:
    """What all events so far add up to; whoever shows a pull draws from it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.begun = clock()
        self.images: list[str] = []
        self.layers: dict[str, _Layer] = {}
        self.text = ""

    def take(self, event: Event) -> None:
        if event.kind == MESSAGE:
            self.text = printable(event.text, LINE_LIMIT)
            return
        if event.kind == IMAGE:
            self.images.append(printable(event.text, LINE_LIMIT))
            return
        layer = self.layers.get(event.layer)
        if layer is None:
            layer = self.layers[event.layer] = _Layer(event.total, self.clock())
        if event.kind == STARTED:
            # A retry starts the same layer over. What was reached stays, for nobody likes a bar that goes back; the
            # bytes count on when the new attempt is past it.
            layer.total = event.total
            if layer.state == PLANNED:
                layer.started = self.clock()
        elif event.kind == BYTES:
            layer.done = max(layer.done, event.done)
        elif event.kind in (DONE, SKIPPED):
            layer.done = layer.total
        layer.state = event.kind

    def totals(self) -> tuple[int, int]:
        """Compressed bytes fetched and to fetch, without skipped layers."""
        active = [layer for layer in self.layers.values() if layer.state != SKIPPED]
        return sum(layer.done for layer in active), sum(layer.total for layer in active)

    def rate(self) -> float:
        """Bytes a second since the first layer that is not skipped began."""
        starts = [layer.started for layer in self.layers.values() if layer.state not in (PLANNED, SKIPPED)]
        if not starts:
            return 0.0
        return self.totals()[0] / max(self.clock() - min(starts), 0.001)


def human(count: float) -> str:
    """``count`` bytes for people, in binary units with two decimals."""
    if count < 1024:
        return f"{int(count)} B"
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        count /= 1024
        if count < 1024 or unit == "TiB":
            break
    return f"{count:.2f} {unit}"


def summary(state: dict[str, Any]) -> str:
    """One line of text for a state as :class:`FileSink` writes it, fit for a terminal: the state may come from a host
    that is not to be trusted. Raises ValueError, KeyError and TypeError for what is no such state.
    """
    try:
        return printable(_summary(state), LINE_LIMIT)
    except OverflowError as error:
        raise ValueError("a number of the state is out of range") from error


def _summary(state: dict[str, Any]) -> str:
    names = state.get("images") or []
    name = f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: " if names else ""
    done, total, rate = int(state["done"]), int(state["total"]), int(state["rate"])
    layers = state["layers"]
    finished = sum(layer["state"] in (DONE, SKIPPED) for layer in layers)
    if not total:
        return f"{name}{state['message']}" if state["message"] else ""
    eta = f", {int((total - done) / rate)} s left" if rate > 0 and done < total else ""
    tail = f" - {state['message']}" if done >= total and state["message"] else ""
    share = f"{100 * done // total}% of {human(total)}, {human(rate)}/s{eta}"
    return f"{name}{share}, {finished} of {len(layers)} layers{tail}"


class FileSink:
    """Keeps a JSON file up to date that anybody may poll: always whole (written aside and renamed), at most twice a
    second.
    """

    def __init__(self, path: str, interval: float = 0.5, directory: int | None = None) -> None:
        """``directory``: an fd of where the file lies (O_PATH will do), which ``close`` closes. Without it links in the
        directory of ``path`` are followed.
        """
        self.path = path
        self._directory = directory
        self._interval = interval
        self._board = Board()
        self._last = float("-inf")

    def event(self, event: Event) -> None:
        self._board.take(event)
        now = self._board.clock()
        if event.kind == BYTES and now - self._last < self._interval:
            return
        self._last = now
        self._write(False)

    def close(self) -> None:
        try:
            self._write(True)
        finally:
            if self._directory is not None and self._directory >= 0:
                os.close(self._directory)
                self._directory = -1

    def state(self, finished: bool = False) -> dict[str, Any]:
        """The JSON document: ``done``/``total`` bytes, ``rate`` in bytes a second, ``message``, ``finished``,
        ``images`` (names), ``layers``.
        """
        board = self._board
        done, total = board.totals()
        layers = [
            {"id": name, "state": layer.state, "done": layer.done, "total": layer.total}
            for name, layer in board.layers.items()
        ]
        return {
            "done": done,
            "total": total,
            "rate": round(board.rate()),
            "elapsed": round(board.clock() - board.begun, 1),
            "message": board.text,
            "finished": finished,
            "images": board.images,
            "layers": layers,
        }

    def _write(self, finished: bool) -> None:
        # The wings have host/files for this, but this room stands below them. The name is one that nobody can foresee
        # and that must not exist: the directory may be one where everybody may write. A link that has the file's own
        # name is replaced, not followed.
        where, name = os.path.split(self.path)
        if self._directory is None:
            self._directory = os.open(where or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        here = self._directory
        aside = f"{name}.{os.urandom(6).hex()}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(aside, flags, 0o600, dir_fd=here), "w", encoding="utf-8") as file:
            try:
                json.dump(self.state(finished), file)
                file.flush()
                os.replace(aside, name, src_dir_fd=here, dst_dir_fd=here)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(aside, dir_fd=here)
                raise
