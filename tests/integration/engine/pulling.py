# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of pulls have in common: pull as the module does, and read back what is stored."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.progress import Event, Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull.publish import Images
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions


class Recorder:
    """A sink that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def event(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


def options(
    skopeo: str = "skopeo", *, erofs: bool = True, proxy: dict[str, Any] | None = None, **others: Any
) -> pull.Options:
    """Options of a pull that is tried once. The timeout is longer than any pause of a machine that does much else, and
    shorter than the product's, so that a test that fails does not take many minutes.
    """
    others = {"timeout": 30.0, "retries": 0, **others}
    settings = {"tls_verify": False, "unenforced_policy": "ignore", "timeout": others["timeout"], **(proxy or {})}
    return pull.Options(images=Images(plain=erofs), proxy=ProxyOptions(executable=(skopeo,), **settings), **others)


def pull_all(
    path: pathlib.Path,
    requests: Sequence[pull.Request],
    chosen: pull.Options | None = None,
    sink: Recorder | None = None,
) -> list[dict[str, Any]]:
    """Pull as the module does; descriptions as it returns them, with the warnings."""
    with Repository.open(str(path)) as repository:
        outcomes = pull.pull_images(repository, requests, chosen or options(), Progress(sink))
        reports = [pull.describe(repository, outcome) for outcome in outcomes]
        return [
            {**report.result.values(), "changed": report.changed, "warnings": outcome.plan.warnings}
            for report, outcome in zip(reports, outcomes)
        ]


def pull_one(
    path: pathlib.Path, ref: str, name: str = "image", chosen: pull.Options | None = None, **request: str
) -> dict[str, Any]:
    """Pull one image; its description."""
    return pull_all(path, [pull.Request(ref, name, **request)], chosen)[0]


def layer_tar(path: pathlib.Path, diff_id: str) -> bytes:
    """The tar that a stored layer stands for, put together from its inline bytes and objects."""
    with (
        Repository.open(str(path)) as repository,
        repository.open_object_stream(repository.stream(f"oci-layer-{diff_id}"), splitstream.LAYER) as stream,
    ):
        return b"".join(
            chunk if isinstance(chunk, bytes) else repository.objects.read(chunk.digest, 1 << 30)
            for chunk in stream.chunks()
        )


def names(path: pathlib.Path) -> set[str]:
    """Everything in the repository that has a name: streams, images, refs and tags, with where links lead."""
    found = set()
    for kind in ("streams", "images"):
        for directory, _folders, files in os.walk(path / kind):
            for file in files:
                place = os.path.join(directory, file)
                found.add(f"{os.path.relpath(place, path)} -> {os.readlink(place)}")
            # Links to directories do not occur, and links to nothing count as files.
    return found


def replaced(chosen: pull.Options, **changes: Any) -> pull.Options:
    return dataclasses.replace(chosen, **changes)
