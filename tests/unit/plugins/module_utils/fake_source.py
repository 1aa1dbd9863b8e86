# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A source of images without skopeo: stands in for ImageProxy, reads an OCI layout, and fails where it is told to.

It keeps the real one's habits that matter to its callers: blobs come through pipes that have no end before
``finish_pipe``, which waits for the transfer, and a proxy that was killed answers nothing any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import sys
import threading
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "support"))

from ociimage import Layout

from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source import skopeosource, source
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, ImageNotFound, ProxyFailed
from ansible_collections.composefs.oci.plugins.module_utils.source.imageproxy import BlobPipe
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import digest_of
from ansible_collections.composefs.oci.plugins.module_utils.formats.ocidocuments import Descriptor
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import Reference
from ansible_collections.composefs.oci.plugins.module_utils.progress import MESSAGE, Event, Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull.publish import Images
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

__all__ = ["Events", "Layout", "World", "pull_all", "settings"]

REGISTRY = "docker://registry.test/"


class Events:
    """A sink that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event.kind == kind]

    def texts(self) -> list[str]:
        return [event.text for event in self.of(MESSAGE)]


class World:
    """The sources that exist: every tag of ``layout`` is an image ``docker://registry.test/<tag>``."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.requests: list[tuple[str, str]] = []
        self.proxies: list[FakeProxy] = []
        self.starting: list[EngineError] = []
        self.opening: list[EngineError] = []
        # failures of the question what a reference means, one after the other
        self.asking: list[EngineError] = []
        # digest -> what to do with a transfer, one after the other: bytes to send instead, an error at once, or a
        # function of the proxy
        self.blobs: dict[str, list[Any]] = {}
        # digest -> the verdict on a transfer, one after the other
        self.verdicts: dict[str, list[EngineError]] = {}

    def target(self, reference: Reference) -> dict[str, Any]:
        tag = reference.text[len(REGISTRY) :].partition("@")[0]
        if ":sha256-" not in tag:  # which is how what lies beside an image is called
            tag = tag.partition(":")[0]
        entries = json.loads((self.layout.path / "index.json").read_text())["manifests"]
        for entry in entries:
            if entry["digest"] == reference.digest:
                return dict(entry)
        for entry in entries:
            if entry["annotations"]["org.opencontainers.image.ref.name"] == tag:
                return dict(entry)
        raise ImageNotFound(
            f"Opening {reference.text}: skopeo says: reading manifest: manifest unknown.",
            "Check the name, the tag and the path.",
        )

    def fetched(self) -> list[str]:
        return [digest for method, digest in self.requests if method == "GetBlob"]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> World:
        monkeypatch.setattr(skopeosource, "ImageProxy", lambda options, reference: FakeProxy(self, options, reference))
        monkeypatch.setattr(skopeosource, "skopeo_version", lambda executable: "1.2.3")
        monkeypatch.setattr(skopeosource, "top_digest", self._top_digest)
        monkeypatch.setattr(skopeosource, "check_realm", lambda options, registry: None)
        monkeypatch.setattr(source, "pause", lambda attempt, error, progress: None)
        # What a barrier is good for is tested elsewhere; here it would wait for everything else that the machine
        # writes.
        monkeypatch.setattr(filesystem, "sync", lambda fd: None)
        return self

    def _top_digest(self, options: Any, reference: Reference) -> tuple[str, bytes]:
        self.requests.append(("Inspect", reference.text))
        if self.asking:
            raise self.asking.pop(0)
        digest = reference.digest or str(self.target(reference)["digest"])
        return digest, self.layout.read(digest)


class FakeProxy:
    def __init__(self, world: World, options: Any, reference: Reference) -> None:
        self.world = world
        self.options = options
        self.reference = reference
        self.protocol_version = "0.2.3"
        self.enforces_policy = False
        self.dead = False
        self.closed = False
        self.started_by: str | None = None
        self._images: list[Reference] = []
        self._lock = threading.Lock()
        self._pipes: dict[int, tuple[str, threading.Thread, int]] = {}
        self._last = 0
        world.proxies.append(self)

    @property
    def alive(self) -> bool:
        return not self.dead

    def _request(self, method: str, what: str) -> None:
        if self.dead:
            raise ProxyFailed("skopeo is gone, it was killed.", "Run the task again.", passing=True)
        self.world.requests.append((method, what))

    def launch(self) -> None:
        self.launched_by = threading.current_thread().name

    def start(self) -> None:
        self.started_by = threading.current_thread().name
        if self.world.starting:
            raise self.world.starting.pop(0)

    def open_image(self, reference: Reference) -> int:
        self._request("OpenImage", reference.text)
        if self.world.opening:
            raise self.world.opening.pop(0)
        self.world.target(reference)
        self._images.append(reference)
        return len(self._images)

    def get_manifest(self, image: int) -> tuple[str, bytes]:
        reference = self._images[image - 1]
        self._request("GetManifest", reference.text)
        raw = self.world.layout.read(reference.digest or self.world.target(reference)["digest"])
        document = json.loads(raw)
        if "manifests" in document:
            wanted = (
                self.options.platform.architecture
                if self.options.platform
                else document["manifests"][0]["platform"]["architecture"]
            )
            entry = next(entry for entry in document["manifests"] if entry["platform"]["architecture"] == wanted)
            raw = self.world.layout.read(entry["digest"])
        return digest_of(raw), raw

    def read_blob(self, image: int, descriptor: Descriptor, limit: int) -> bytes:
        self._request("ReadBlob", descriptor.digest)
        return self.world.layout.read(descriptor.digest)

    def get_blob(self, image: int, digest: str, size: int) -> BlobPipe:
        with self._lock:
            self._request("GetBlob", digest)
            fault = self.world.blobs[digest].pop(0) if self.world.blobs.get(digest) else None
            if isinstance(fault, EngineError):
                raise fault
            data = fault if isinstance(fault, bytes) else self.world.layout.read(digest)
            if callable(fault):
                data = fault(self)
            readable, writable = os.pipe()
            os.set_inheritable(readable, False)

            def copy() -> None:
                rest = memoryview(data)
                with contextlib.suppress(BrokenPipeError):
                    while rest:
                        rest = rest[os.write(writable, rest) :]

            thread = threading.Thread(target=copy, daemon=True)
            thread.start()
            self._last += 1
            self._pipes[self._last] = (digest, thread, writable)
            return BlobPipe(readable, self._last, size)

    def finish_pipe(self, pipeid: int, timeout: float | None = None) -> None:
        self._request("FinishPipe", str(pipeid))
        digest, thread, writable = self._pipes.pop(pipeid)
        thread.join()
        os.close(writable)
        if self.world.verdicts.get(digest):
            raise self.world.verdicts[digest].pop(0)

    def kill(self, reason: str = "") -> None:
        self.dead = True
        self._end()

    def close(self) -> None:
        self.closed = True
        self._end()

    def _end(self) -> None:
        for pipeid in list(self._pipes):
            _digest, thread, writable = self._pipes.pop(pipeid)
            if thread.is_alive():
                # A real process that is killed drops its pipe; a thread that writes to one must be woken first.
                continue
            os.close(writable)

    def abandon(self) -> None:
        pass


def settings(**others: Any) -> pull.Options:
    chosen = {
        "timeout": 5.0,
        "retries": 2,
        "images": Images(plain=others.pop("erofs", True), bootable=others.pop("bootable", False)),
        **others,
    }
    return pull.Options(**chosen)


def pull_all(
    path: pathlib.Path, *requests: pull.Request, sink: Events | None = None, **others: Any
) -> list[dict[str, Any]]:
    """Pull as the module does; descriptions as it returns them, with the warnings."""
    with Repository.open(str(path)) as repository:
        outcomes = pull.pull_images(repository, requests, settings(**others), Progress(sink))
        reports = [pull.describe(repository, outcome) for outcome in outcomes]
        return [
            {**report.result.values(), "changed": report.changed, "warnings": outcome.plan.warnings}
            for report, outcome in zip(reports, outcomes)
        ]
