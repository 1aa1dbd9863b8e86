# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The experiment behind the shape of a fetch: import the layers of a layout one by one, in threads, and in processes.

    shape.py LAYOUT WORK [--lanes 2] [--repeat 3]

LAYOUT is an OCI layout that ``images.py`` made; blobs are read from files, so skopeo has no part in it. Every run
imports into a fresh repository below WORK (SHA-256, no fs-verity), and all are kept until the end: what was deleted a
moment ago slows down what is created next on ext4.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import queue
import resource
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from pull import provide_engine

provide_engine()

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import layer
from ansible_collections.composefs.oci.plugins.module_utils.store import create, repository


def specifications(layout: pathlib.Path) -> list[layer.LayerSpec]:
    """The layers of the layout's only image, largest first."""

    def blob(digest: str) -> Any:
        return json.loads((layout / "blobs/sha256" / digest[7:]).read_bytes())

    manifest = blob(json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"])
    diff_ids = blob(manifest["config"]["digest"])["rootfs"]["diff_ids"]
    found = [
        layer.LayerSpec(one["digest"], one["size"], diff_id, ocidocuments.layer_compression(one["mediaType"]))
        for one, diff_id in zip(manifest["layers"], diff_ids)
    ]
    return sorted(found, key=lambda one: -one.size)


def one_layer(layout: pathlib.Path, spec: layer.LayerSpec, opened: repository.Repository) -> None:
    """Import one layer through a pipe that a small process fills, as skopeo would."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        os.close(ours)
        with open(layout / "blobs/sha256" / spec.digest[7:], "rb") as file:
            while os.sendfile(theirs, file.fileno(), None, 1 << 20):  # type: ignore[arg-type]
                pass
        os._exit(0)
    os.close(theirs)
    layer.import_layer(ours, spec, opened.objects, opened.algorithm, 60, lambda done: None, lambda: None, lambda: None)


def one_by_one(layout: pathlib.Path, specs: list[layer.LayerSpec], opened: repository.Repository, lanes: int) -> None:
    for spec in specs:
        one_layer(layout, spec, opened)


def in_lanes(work: Callable[[layer.LayerSpec], None], specs: list[layer.LayerSpec], lanes: int) -> None:
    todo: queue.SimpleQueue[layer.LayerSpec] = queue.SimpleQueue()
    for spec in specs:
        todo.put(spec)

    def lane() -> None:
        while True:
            try:
                spec = todo.get_nowait()
            except queue.Empty:
                return
            work(spec)

    threads = [threading.Thread(target=lane) for _unused in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_threads(layout: pathlib.Path, specs: list[layer.LayerSpec], opened: repository.Repository, lanes: int) -> None:
    in_lanes(lambda spec: one_layer(layout, spec, opened), specs, lanes)


def in_processes(layout: pathlib.Path, specs: list[layer.LayerSpec], opened: repository.Repository, lanes: int) -> None:
    in_lanes(lambda spec: processes.call("imports", lambda: one_layer(layout, spec, opened)), specs, lanes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layout", type=pathlib.Path)
    parser.add_argument("work", type=pathlib.Path)
    parser.add_argument("--lanes", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    specs = specifications(options.layout)
    options.work.mkdir(parents=True, exist_ok=True)
    shapes = (one_by_one, in_threads, in_processes)
    walls: dict[str, list[float]] = {shape.__name__: [] for shape in shapes}
    processors: dict[str, list[float]] = {shape.__name__: [] for shape in shapes}
    for turn in range(options.repeat):
        for shape in shapes:
            path = options.work / f"{turn}-{shape.__name__}"
            create.prepare(str(path), fsverity.SHA256, create.DISABLED)
            with repository.Repository.open(str(path), write=True) as opened:
                opened.sync()
                before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
                start = time.monotonic()
                shape(options.layout, specs, opened, options.lanes)
                walls[shape.__name__].append(time.monotonic() - start)
                while True:
                    try:
                        os.waitpid(-1, 0)
                    except ChildProcessError:
                        break
                after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
                processors[shape.__name__].append(
                    sum(b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after))
                )
                opened.sync()
    print(
        f"| {options.layout.name}, {len(specs)} layers, {options.lanes} lanes | wall s (median) | processor s "
        f"|\n|---|---|---|"
    )
    for name, found in walls.items():
        print(
            f"| {name.replace('_', ' ')} | {statistics.median(found):.2f} | {statistics.median(processors[name]):.2f} |"
        )
    shutil.rmtree(options.work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
