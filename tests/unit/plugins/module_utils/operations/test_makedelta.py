# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import contextlib
import json
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InvalidOption,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs, fsverity, tardiff
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.operations import makedelta
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull import deltas, pull
from ansible_collections.composefs.oci.plugins.module_utils.pull.sourcefiles import SourceFiles
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import DIRECTORY, member, tar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("no_forks")
NOISE = random.Random(3).randbytes(300_000)


@pytest.fixture
def no_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "call", lambda what, function: function())


class Bench:
    """A repository with two images and the place for their delta."""

    def __init__(self, directory: pathlib.Path, old: list[bytes], new: list[bytes]) -> None:
        layout = Layout(directory / "layout")
        layout.image(old, "old")
        layout.image(new, "new")
        create.prepare(str(directory / "repo"), fsverity.SHA256, "disabled")
        with pytest.MonkeyPatch.context() as patch:
            World(layout).install(patch)
            requests = [pull.Request(f"{REGISTRY}{name}", name) for name in ("old", "new")]
            pull_all(directory / "repo", *requests, parallel=1)
        self.directory = directory

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[Repository, makedelta.Stored, makedelta.Stored]]:
        with Repository.open(str(self.directory / "repo")) as repository:
            yield repository, makedelta.find(repository, "old"), makedelta.find(repository, "new")

    def make(self, level: int | None = 3) -> makedelta.Made:
        with self.opened() as (repository, old, new):
            (self.directory / "delta").mkdir()
            return makedelta.make(repository, old, new, str(self.directory / "delta"), level, Progress())

    def blob(self, digest: str) -> bytes:
        return (self.directory / "delta/blobs/sha256" / digest[7:]).read_bytes()

    def applied(self, digest: str) -> bytes:
        with contextlib.ExitStack() as stack:
            repository, old, _new = stack.enter_context(self.opened())
            files = SourceFiles(repository.objects, repository.algorithm, old.image)
            stack.callback(files.close)
            path = self.directory / "delta/blobs/sha256" / digest[7:]
            with path.open("rb") as file:
                return b"".join(tardiff.apply(file.read, files.open, 1 << 30))


def operations(bench: Bench, digest: str) -> list[tuple[int, bytes]]:
    """Kind and path or size of each operation."""
    found: list[tuple[int, bytes]] = []

    class Spy(tardiff._Program):
        def operation(self) -> int:
            kind = super().operation()
            found.append((kind, b""))
            return kind

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tardiff, "_Program", Spy)
        bench.applied(digest)
    return found[:-1]


def test_what_is_known_is_copied_what_changed_is_patched_and_the_rest_is_literal(tmp_path: pathlib.Path) -> None:
    changed = NOISE[:100_000] + b"changed" + NOISE[100_000:]
    old = tar(
        member("bin/same", NOISE[:5000]),
        member("lib/modules/6.1.0-50/a.ko", NOISE),
        member("lib/unlike", NOISE[5000:9000]),
    )
    new = tar(
        member("./bin/renamed", NOISE[:5000]),
        member("lib/modules/6.1.0-51/a.ko", changed),
        member("lib/unlike", NOISE[20_000:24_000]),
        member("lib/tiny", b"inline"),
    )
    bench = Bench(tmp_path, [old], [new])
    made = bench.make()
    (layer,) = made.layers
    diff = json.loads(made.manifest)["layers"][2]
    assert bench.applied(diff["digest"]) == new
    assert layer["bytes"] == diff["size"] < 4000 + 5000, "the unlike file is there, and little else"
    kinds = [kind for kind, _what in operations(bench, diff["digest"])]
    assert kinds == [tardiff.DATA, tardiff.OPEN, tardiff.COPY, tardiff.DATA, tardiff.OPEN, tardiff.DICT, tardiff.DATA]


def test_the_level_goes_by_the_size_of_a_file_unless_one_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels: list[int] = []
    patch_maker = codecs.PatchMaker

    def spy(base: codecs.Buffer, level: int) -> codecs.PatchMaker:
        levels.append(level)
        return patch_maker(base, level)

    monkeypatch.setattr(codecs, "PatchMaker", spy)
    monkeypatch.setattr(makedelta, "_THOROUGH_SIZE", 200_000)
    old = tar(member("large", NOISE), member("small", NOISE[:100_000]))
    new = tar(member("large", NOISE + b"more"), member("small", NOISE[:100_000] + b"more"))
    bench = Bench(tmp_path, [old], [new])
    for level, expected in ((None, [12, 18]), (5, [5, 5])):
        bench.make(level)
        shutil.rmtree(tmp_path / "delta")
        assert levels == expected
        levels.clear()


def test_the_artifact_says_what_it_is(tmp_path: pathlib.Path) -> None:
    shared = tar(member("shared", b"s" * 500))
    bench = Bench(tmp_path, [shared, tar(member("a", b"a" * 500))], [shared, tar(member("b", b"b" * 500))])
    made = bench.make()
    document = json.loads(made.manifest)
    index = json.loads((tmp_path / "delta/index.json").read_text())
    assert index["manifests"][0]["digest"] == made.digest == sha256(bench.blob(made.digest))
    with bench.opened() as (_repository, old, new):
        assert document["artifactType"] == deltas.ARTIFACT_TYPE
        assert document["subject"]["digest"] == new.manifest.digest
        assert document["annotations"] == {
            "io.github.containers.delta.target": new.manifest.digest,
            "io.github.containers.delta.source-config": old.manifest.config.digest,
        }
        content = "io.github.containers.delta.content"
        assert [layer["annotations"][content] for layer in document["layers"]] == [
            "image-manifest",
            "image-config",
            "image-layer",
        ]
        assert bench.blob(document["layers"][0]["digest"]) == new.manifest.raw
        assert bench.blob(document["layers"][1]["digest"]) == new.config.raw
        assert document["layers"][2]["annotations"]["io.github.containers.delta.to"] == new.manifest.layers[1].digest
    assert bench.blob(document["config"]["digest"]) == b"{}"
    parsed = deltas.parse(makedelta.ocidocuments.parse_manifest(made.manifest))
    assert parsed is not None and list(parsed.layers) == [document["layers"][2]["annotations"][deltas.TO]]


def test_a_layer_that_occurs_twice_is_there_once(tmp_path: pathlib.Path) -> None:
    twice = tar(member("b", b"b" * 500))
    bench = Bench(tmp_path, [tar(member("a", b"a" * 500))], [twice, twice])
    assert len(bench.make().layers) == 1


def test_a_large_file_is_patched_in_pieces(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(makedelta, "_PATCH", 70_000)
    old, new = tar(member("f", NOISE)), tar(member("f", NOISE[::-1][:50] + NOISE))
    bench = Bench(tmp_path, [old], [new])
    digest = json.loads(bench.make().manifest)["layers"][2]["digest"]
    kinds = [kind for kind, _what in operations(bench, digest)]
    assert kinds.count(tardiff.DICT) == 5 and kinds.count(tardiff.OPEN) == 1
    assert len(bench.blob(digest)) < 2000


@pytest.mark.parametrize("name", ["nothing", "sha256:" + "0" * 64])
def test_an_image_that_is_not_there_is_named(tmp_path: pathlib.Path, name: str) -> None:
    bench = Bench(tmp_path, [tar(member("a", b"a"))], [tar(member("b", b"b"))])
    with bench.opened() as (repository, _old, _new), pytest.raises(ImageNotFound, match=name):
        makedelta.find(repository, name)


def test_images_with_the_same_layers_have_no_delta(tmp_path: pathlib.Path) -> None:
    same = tar(member("a", b"a" * 100))
    with pytest.raises(InvalidOption, match="nothing between"):
        Bench(tmp_path, [same], [same]).make()


def test_a_delta_that_would_make_another_layer_is_not_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(tmp_path, [tar(member("a", NOISE[:3000]))], [tar(member("b", NOISE[:3000]))])
    monkeypatch.setattr(tardiff.Writer, "copy", lambda self, n: None)
    with pytest.raises(DigestMismatch, match="The delta makes a layer with the digest"):
        bench.make()


names = st.sampled_from(["a", "b", "lib/x.so.1", "lib/x.so.2", "lib/deep/er/f1", "lib/deep/er/f2", "z" * 100])
contents = st.one_of(
    st.binary(max_size=70),
    st.tuples(st.integers(0, 1000), st.integers(65, 30_000)).map(lambda span: NOISE[span[0] : span[0] + span[1]]),
    st.tuples(st.integers(65, 9000), st.binary(max_size=20)).map(lambda how: NOISE[: how[0]] + how[1] + NOISE[:2000]),
)
trees = st.dictionaries(names, contents, max_size=6)


def archive(tree: dict[str, bytes]) -> bytes:
    return tar(member("lib/", type=DIRECTORY), *(member(name, data) for name, data in sorted(tree.items())))


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(trees, min_size=1, max_size=2), st.lists(trees, min_size=1, max_size=2))
def test_whatever_changed_the_delta_makes_the_same_tars(
    old: list[dict[str, bytes]], new: list[dict[str, bytes]]
) -> None:
    before, after = [archive(tree) for tree in old], [archive(tree) for tree in new]
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(pathlib.Path(directory), before, after)
        try:
            made = bench.make()
        except InvalidOption:
            assert before == after
            return
        except EngineError as error:
            raise AssertionError(f"{error.code}: {error}") from error
        by_digest = {sha256(one): one for one in after}
        document = json.loads(made.manifest)
        assert [layer["diff_id"] for layer in made.layers] == [
            diff_id for diff_id in by_digest if diff_id not in {sha256(one) for one in before}
        ]
        for layer, told in zip(document["layers"][2:], made.layers):
            assert bench.applied(layer["digest"]) == by_digest[told["diff_id"]]
