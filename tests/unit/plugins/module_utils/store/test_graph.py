# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who keeps what alive, held against a plain model."""

from __future__ import annotations

import os
import pathlib
import tracemalloc
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as hs

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, FormatError
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofswriter import write_image
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.store import create, graph
from ansible_collections.composefs.oci.plugins.module_utils.store.graph import Graph, Root
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Iterator[Repository]:
    with new_repository(tmp_path / "repo") as opened:
        yield opened


def new_repository(path: pathlib.Path) -> Repository:
    create.prepare(str(path), fsverity.SHA256, create.DISABLED)
    repository = Repository.open(str(path), write=True)
    return repository


def content(number: int) -> bytes:
    return b"object %d " % number * 20


def put_stream(repository: Repository, objects: list[int], leads: list[bytes]) -> bytes:
    writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
    for number in objects:
        writer.external(repository.objects.put(content(number)), len(content(number)))
    # So that no two streams are the same object.
    writer.inline(os.urandom(8))
    for number, digest in enumerate(leads):
        writer.named_ref(f"ref{number}", digest)
    return repository.objects.put_pieces(writer.finish())


def put_image(repository: Repository, objects: list[int]) -> bytes:
    root = Directory(Stat(0o755))
    for number in objects:
        data = content(number)
        root.entries[b"%d" % number] = Leaf(Stat(0o644), digest=repository.objects.put(data), size=len(data))
    image = bytearray()
    write_image(root, 1, repository.algorithm, image.extend)
    digest = repository.objects.put(bytes(image))
    repository.link_image(digest)
    return digest


numbers = hs.lists(hs.integers(0, 12), max_size=5)


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # Each stream: its objects, and which of the streams before it it leads to.
    streams=hs.lists(hs.tuples(numbers, hs.lists(hs.integers(0, 9), max_size=3)), min_size=1, max_size=7),
    images=hs.lists(numbers, max_size=2),
    named=hs.lists(hs.integers(0, 6), max_size=5),
)
def test_what_roots_reach_is_what_a_plain_walk_finds(
    tmp_path_factory: pytest.TempPathFactory,
    streams: list[tuple[list[int], list[int]]],
    images: list[list[int]],
    named: list[int],
) -> None:
    with new_repository(tmp_path_factory.mktemp("model") / "repo") as repository:
        digests: list[bytes] = []
        model: list[set[bytes]] = []
        for number, (objects, leads) in enumerate(streams):
            children = sorted({lead % number for lead in leads}) if number else []
            digests.append(put_stream(repository, objects, [digests[child] for child in children]))
            own = {fsverity.digest(content(one), repository.algorithm) for one in objects}
            model.append({digests[-1], *own}.union(*(model[child] for child in children)))
            repository.register(f"s{number}", digests[-1])
        expected: dict[str, set[bytes]] = {}
        os.makedirs(os.path.join(repository.path, "streams/refs"), exist_ok=True)
        for index, number in enumerate(named):
            os.symlink(f"../s{number % len(streams)}", os.path.join(repository.path, f"streams/refs/n{index}"))
            expected[f"streams/refs/n{index}"] = model[number % len(streams)]
        os.makedirs(os.path.join(repository.path, "images/refs/deep"), exist_ok=True)
        for index, objects in enumerate(images):
            image = put_image(repository, objects)
            os.symlink(f"../../{image.hex()}", os.path.join(repository.path, f"images/refs/deep/i{index}"))
            expected[f"images/refs/deep/i{index}"] = {
                image,
                *(fsverity.digest(content(one), repository.algorithm) for one in objects),
            }

        found = Graph.read(repository, prove=True)
        assert {root.name: found.reaches(root) for root in found.roots} == expected and found.problems == []
        every = set().union(*expected.values(), *model)
        assert {digest: {root.name for root in roots} for digest, roots in found.reached_by(every).items()} == {
            digest: {name for name, reached in expected.items() if digest in reached} for digest in every
        }
        owners = found.owners(found.roots)
        for digest in every:
            keepers = [number for number, root in enumerate(found.roots) if digest in expected[root.name]]
            owner = owners.part(digest[0]).get(graph.key(digest))
            assert owner == (None if not keepers else keepers[0] if len(keepers) == 1 else graph.SHARED)


def test_a_reference_of_early_2026_keeps_the_configuration_that_it_means(repository: Repository) -> None:
    digest = put_stream(repository, [1], [])
    config = "sha256:" + "5" * 64
    repository.register(f"oci-config-{config}", digest)
    os.makedirs(os.path.join(repository.path, "streams/refs"))
    os.symlink(f"../{config}", os.path.join(repository.path, "streams/refs/app"))
    os.symlink("../sha256:" + "6" * 64, os.path.join(repository.path, "streams/refs/gone"))
    found = Graph.read(repository)
    assert [root.node for root in found.roots] == [digest]
    assert found.problems == [("dangling_reference", "streams/refs/app"), ("dangling_reference", "streams/refs/gone")]


def test_what_is_no_link_and_links_that_lead_nowhere_are_told_and_not_followed(repository: Repository) -> None:
    for directory in ("streams/refs/oci", "images/refs"):
        os.makedirs(os.path.join(repository.path, directory))
    for name in ("streams/file", "streams/refs/file", "images/refs/file"):
        pathlib.Path(repository.path, name).write_text("not a link")
    os.mkdir(os.path.join(repository.path, "streams/directory"))
    os.symlink("/etc/passwd", os.path.join(repository.path, "streams/elsewhere"))
    os.symlink("../../elsewhere", os.path.join(repository.path, "streams/refs/oci/app"))
    found = Graph.read(repository)
    assert sorted(found.problems) == [
        ("bad_link", "streams/elsewhere"),
        ("dangling_reference", "streams/refs/oci/app"),
        ("stray_file", "images/refs/file"),
        ("stray_file", "streams/directory"),
        ("stray_file", "streams/file"),
        ("stray_file", "streams/refs/file"),
    ]
    assert found.roots == []


def test_a_stream_whose_bytes_changed_is_not_believed(repository: Repository) -> None:
    layer = put_stream(repository, [1], [])
    root = Root("tag", "x", put_stream(repository, [], [layer]))
    path = pathlib.Path(repository.path, "objects", fsverity.object_path(layer))
    raw = bytearray(path.read_bytes())
    raw[120] ^= 1  # within the table of objects
    path.write_bytes(raw)
    with pytest.raises(FormatError, match="does not have the content"):
        Graph.read(repository, prove=True).nodes(root)
    path.unlink()
    with pytest.raises(FormatError, match="missing"):
        Graph.read(repository, prove=True).nodes(root)
    told: list[bytes] = []

    def tell(node: bytes, _error: EngineError) -> None:
        told.append(node)

    assert Graph.read(repository).nodes(root, tell) == [root.node, layer] and told == [layer]


@pytest.mark.slow
def test_owners_of_very_many_objects_fit_into_little_memory() -> None:
    count = 100_000
    table = b"".join(os.urandom(32 * 10_000) for _run in range(count // 10_000))
    tracemalloc.start()
    owners = graph.Owners(32)
    for round_ in range(3):
        for at in range(0, len(table), 32 * 10_000):
            owners.add(table[at : at + 32 * 10_000], round_ % 2)
    assert sum(len(owners.part(first)) for first in range(256)) == count
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Twelve bytes an object, twice that between two compactions, and what an array keeps in reserve; each of the 256
    # parts may wait for the first compaction.
    assert peak < 45 * count + 256 * 4096 * 12
    assert set(owners.part(0).values()) == {graph.SHARED}
