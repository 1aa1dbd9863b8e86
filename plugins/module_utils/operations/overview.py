# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What a repository holds, how much of the disk it takes, who uses it now, and how it fared lately. Looks only."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from ..formats.digests import ObjectDigest
from ..host import locks
from ..errors import EngineError, doing
from ..store import checks, imagestreams, marks, namerecords
from ..store import graph as graphs
from ..store.graph import Graph
from ..store.repository import Repository

_MAX_MARK = 4096


def describe(repository: Repository) -> dict[str, Any]:
    """All of it in plain values. What cannot be read counts as nothing; the check says more about that."""
    graph = Graph.read(repository)
    metadata = repository.metadata
    names, totals = _names(repository, graph)
    kinds = {"manifests": imagestreams.MANIFEST, "configs": imagestreams.CONFIG, "layers": imagestreams.LAYER}
    free, free_inodes = repository.free_space()
    used = totals["bytes"] - totals["unused"]
    apparent = sum(name["own"] + name["shared"] for name in names)
    return {
        "algorithm": repository.algorithm.name,
        "verity": repository.secure,
        "filesystem": repository.filesystem(),
        "free_bytes": free,
        "free_inodes": free_inodes,
        "format": {
            "version": metadata.version,
            "erofs_formats": list(metadata.erofs_formats),
            "compatible": list(metadata.compatible),
            "read_only_compatible": list(metadata.read_only_compatible),
            "incompatible": list(metadata.incompatible),
        },
        "counts": {
            "names": len(names),
            **{kind: sum(name.startswith(prefix) for name in graph.streams) for kind, prefix in kinds.items()},
            "streams": len(graph.streams),
            "images": len(graph.images),
            "objects": totals["objects"],
            "references": len(graph.roots),
            "problems": len(graph.problems),
        },
        "bytes": totals["bytes"],
        "bytes_unused": totals["unused"],
        "bytes_damaged": _size_of(repository, checks.DAMAGED),
        "sharing": round(apparent / used, 2) if used else 1.0,
        "names": names,
        "lock_holders": [holder._asdict() for holder in locks.holders(repository.fd)],
        "unfinished_imports": _imports(repository),
        "last_check": checks.last(repository),
        "last_maintenance": checks.last_maintenance(repository),
    }


def foresee(found: dict[str, Any], names: Mapping[str, str | None], made: bool) -> dict[str, Any]:
    """What ``describe`` found, as it will be when earlier tasks of a run in check mode have done what they foretold:
    ``names`` as they will mean manifests, ``sha256:<hex>`` or empty where that is not known, None if they will be gone;
    ``made``: the repository itself is still to come. What cannot be known is None.
    """
    told = [one for one in found["names"] if one["name"] not in names]
    told += [
        {**dict.fromkeys(("ref", "since", "own", "shared")), "name": name, "digest": digest or None}
        for name, digest in names.items()
        if digest is not None
    ]
    # What others share with what comes or goes changes with it.
    told = [{**one, "own": None, "shared": None} for one in told] if names else told
    unknown = ["bytes", "bytes_unused", "sharing"] if names or made else []
    unknown += ["verity", "lock_holders", "unfinished_imports", "last_check", "free_inodes"] if made else []
    counts = dict.fromkeys(found["counts"]) if names or made else found["counts"]
    return {
        **found,
        **dict.fromkeys(unknown),
        "counts": {**counts, "names": len(told) if names or not made else None},
        "names": sorted(told, key=lambda one: str(one["name"])),
    }


def _names(repository: Repository, graph: Graph) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Each name with the bytes of what only it keeps, and of what others keep as well; and the sums of everything."""
    roots = sorted(graph.roots, key=lambda root: root.kind != graphs.TAG)
    owners = graph.owners(roots, _pass_over)
    sizes: dict[int, int] = {}
    own = [0] * len(roots)
    unused = 0
    part: dict[int, int] = {}
    last = -1
    for _name, digest in repository.objects.names():
        found = repository.objects.stat(digest) if digest is not None else None
        if digest is None or found is None or not stat.S_ISREG(found.st_mode):
            continue
        if digest[0] != last:
            last = digest[0]
            part = owners.part(last)
        key = graphs.key(digest)
        sizes[key] = found.st_size
        owner = part.get(key)
        if owner is None:
            unused += found.st_size
        elif owner != graphs.SHARED:
            own[owner] += found.st_size
    names = []
    for number, root in enumerate(roots):
        if root.kind != graphs.TAG:
            break
        record = namerecords.read(repository, root.name)
        total = sum(sizes.get(graphs.key(digest), 0) for digest in graph.reaches(root, _pass_over))
        names.append(
            {
                "name": root.name,
                "digest": repository.tag_digest(root.name),
                "ref": record.ref if record else None,
                "since": namerecords.time_text(graph.times[root.name]),
                "own": own[number],
                "shared": total - own[number],
            }
        )
    totals = {"objects": len(sizes), "bytes": sum(sizes.values()), "unused": unused}
    return sorted(names, key=lambda one: str(one["name"])), totals


def _pass_over(_node: ObjectDigest, _error: EngineError) -> None:
    """What cannot be read counts as nothing."""


def _size_of(repository: Repository, directory: str) -> int:
    """The bytes of the files in a directory of ours."""
    with doing(f"Listing {repository.path}/{directory}"):
        try:
            with repository.root.directory(directory) as fd:
                found = [os.stat(name, dir_fd=fd, follow_symlinks=False) for name in os.listdir(fd)]
        except FileNotFoundError:
            return 0
    return sum(one.st_size for one in found if stat.S_ISREG(one.st_mode))


def _imports(repository: Repository) -> list[dict[str, Any]]:
    """The imports that have begun and not ended, whether their process lives or not."""
    found = []
    with doing(f"Listing {repository.path}/{marks.IMPORTS}"):
        for name in sorted(repository.root.list(marks.IMPORTS)):
            if name.startswith("."):
                continue
            try:
                document = json.loads(repository.root.read_file(f"{marks.IMPORTS}/{name}", _MAX_MARK))
                boot, pid, started = document["boot_id"], int(document["pid"]), float(document["started"])
            except (OSError, ValueError, KeyError, TypeError, EngineError):
                continue
            alive = boot == marks.boot_id() and os.path.exists(f"/proc/{pid}")
            found.append({"pid": pid, "started": namerecords.time_text(started), "alive": alive})
    return found
