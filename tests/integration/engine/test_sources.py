# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One contract for every source of images: skopeo in front of a registry and of local transports, layouts and archives
that are read without it, and another repository on the host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.formats import ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import digest_of
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.pull.layer import LayerSpec, import_layer
from ansible_collections.composefs.oci.plugins.module_utils.pull.objectlayer import import_objects
from ansible_collections.composefs.oci.plugins.module_utils.pull.sources import open_source
from ansible_collections.composefs.oci.plugins.module_utils.source.layout import LayoutSource
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeosource import SkopeoSource
from ansible_collections.composefs.oci.plugins.module_utils.source.source import Source
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ociimage import Layout, architecture, sha256
from pulling import layer_tar, names, options, pull_all, pull_one
from registry import Registry
from tarbytes import DIRECTORY, member, small_tree, tar

HERE = f"linux/{architecture()}"
FIRST, SECOND = small_tree(seed=11), small_tree(seed=12, files=5, prefix="usr/share/more")


@pytest.fixture(scope="module")
def layout(disk: pathlib.Path) -> Layout:
    made = Layout(disk / "sources")
    made.image([FIRST, SECOND], "app")
    made.multi_platform({HERE: [FIRST], "linux/s390x": [SECOND]}, "index")
    return made


def pack(layout: Layout, target: pathlib.Path, mode: str = "w") -> pathlib.Path:
    with tarfile.open(target, mode) as archive:  # type: ignore[call-overload]
        archive.add(layout.path, ".")
    return target


@dataclasses.dataclass
class Place:
    """A source and how its images are called."""

    source: Source
    refer: Callable[[str], str]
    indexes: bool = True


KINDS = ("skopeo registry", "skopeo layout", "layout", "archive", "archive.gz", "repository")


@pytest.fixture(params=KINDS)
def place_of(
    request: pytest.FixtureRequest, layout: Layout, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> Iterator[Place]:
    chosen = ProxyOptions(tls_verify=False, unenforced_policy="ignore", timeout=20.0)
    if request.param == "skopeo registry":
        registry: Registry = request.getfixturevalue("registry")
        for tag in ("app", "index"):
            registry.push(f"{layout.path}:{tag}", f"contract:{tag}", "--all")
        made = Place(SkopeoSource(chosen), lambda tag: registry.reference(f"contract:{tag}"))
    elif request.param == "skopeo layout":
        made = Place(SkopeoSource(chosen), lambda tag: f"oci:{layout.path}:{tag}", indexes=False)
    elif request.param == "layout":
        made = Place(LayoutSource(None, "accept_anything"), lambda tag: f"oci:{layout.path}:{tag}")
    elif request.param.startswith("archive"):
        archive = pack(layout, place / "a.tar", "w:gz" if request.param.endswith("gz") else "w")
        made = Place(LayoutSource(None, "accept_anything"), lambda tag: f"oci-archive:{archive}:{tag}")
    else:
        there = new_repository(place / "there")
        pull_all(there, [pull.Request(f"oci:{layout.path}:{tag}", tag) for tag in ("app", "index")])
        reference = f"composefs:{there}#"
        made = Place(open_source(chosen, parse_reference(reference + "x")), lambda tag: reference + tag, indexes=False)
    yield made
    made.source.close()


def test_what_a_reference_means_is_proved_and_told(place_of: Place, layout: Layout) -> None:
    resolved = place_of.source.resolve(parse_reference(place_of.refer("app")))
    assert resolved.digest == digest_of(resolved.raw) and resolved.index_digest is None
    index = place_of.source.resolve(parse_reference(place_of.refer("index")))
    assert index.digest == digest_of(index.raw)
    if place_of.indexes:
        assert index.index_digest is not None and str(index.platform) == HERE


def test_what_is_not_there_is_not_found(place_of: Place) -> None:
    with pytest.raises(errors.ImageNotFound) as caught:
        place_of.source.resolve(parse_reference(place_of.refer("never")))
    assert caught.value.hint and not caught.value.passing


def test_documents_and_layers_are_delivered_whole(
    place_of: Place, repository: Repository, repository_path: pathlib.Path
) -> None:
    source = place_of.source
    resolved = source.resolve(parse_reference(place_of.refer("app")))
    manifest = ocidocuments.parse_manifest(resolved.raw)
    raw = source.config(resolved, manifest)
    assert digest_of(raw) == manifest.config.digest
    config = ocidocuments.parse_config(raw)
    assert config.diff_ids == (sha256(FIRST), sha256(SECOND))
    for blob, diff_id in zip(source.layers(resolved, manifest), config.diff_ids):
        spec = LayerSpec(blob.digest, blob.size, diff_id, ocidocuments.layer_compression(blob.media_type))
        if source.delivers_objects:
            offer = source.layer_objects(resolved.reference, diff_id)
            result = import_objects(offer, spec, repository.objects, lambda done: None)
        else:
            transfer = source.transfer(resolved.reference, blob)
            result = import_layer(
                transfer.fd,
                spec,
                repository.objects,
                repository.algorithm,
                20.0,
                lambda done: None,
                lambda: None,
                lambda: None,
            )
            transfer.verdict()
        repository.register(f"oci-layer-{diff_id}", bytes.fromhex(result.stream))
    assert layer_tar(repository_path, sha256(FIRST)) == FIRST
    assert layer_tar(repository_path, sha256(SECOND)) == SECOND


def test_facts_are_told_and_closing_twice_is_no_error(place_of: Place) -> None:
    place_of.source.resolve(parse_reference(place_of.refer("app")))
    facts = place_of.source.facts()
    assert facts.policy in ("accept_anything", "ignored", "enforced")
    assert bool(facts.skopeo_version) == isinstance(place_of.source, SkopeoSource)
    place_of.source.close()
    place_of.source.close()


def test_descriptors_are_given_back(place_of: Place) -> None:
    place_of.source.resolve(parse_reference(place_of.refer("app")))
    place_of.source.close()
    before = sorted(os.listdir("/proc/self/fd"))
    place_of.source.resolve(parse_reference(place_of.refer("app")))
    place_of.source.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


# ---- layouts without skopeo ------------------------------------------------------------------------------------------


def test_a_layout_is_pulled_where_there_is_no_skopeo(layout: Layout, repository_path: pathlib.Path) -> None:
    result = pull_one(repository_path, f"oci:{layout.path}:app", chosen=options("/nonexistent/skopeo"))
    assert (result["skopeo_version"], result["protocol_version"]) == (None, None)
    assert result["policy"] == "accept_anything" and result["changed"]
    assert not pull_one(repository_path, f"oci:{layout.path}:app", chosen=options("/nonexistent/skopeo"))["changed"]


def assert_nothing_new_stays(before: set[str]) -> None:
    """What other programs have in /var/tmp at this moment goes; what a pull forgot there stays."""
    end = time.monotonic() + 60
    while new := set(os.listdir("/var/tmp")) - before:
        assert time.monotonic() < end, new
        time.sleep(0.1)


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_an_archive_is_pulled_without_skopeo_and_leaves_nothing(
    layout: Layout, place: pathlib.Path, repository_path: pathlib.Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(place / "tmp"))
    before = set(os.listdir("/var/tmp"))
    archive = pack(layout, place / "a.tar", mode)
    result = pull_one(repository_path, f"oci-archive:{archive}:app", chosen=options("/nonexistent/skopeo"))
    assert layer_tar(repository_path, sha256(FIRST)) == FIRST and result["stats"]["retries"] == 0
    assert os.listdir(place / "tmp") == []
    assert_nothing_new_stays(before)


def test_an_archive_of_skopeo_is_read(layout: Layout, place: pathlib.Path, repository_path: pathlib.Path) -> None:
    archive = place / "skopeo.tar"
    subprocess.run(
        ["skopeo", "copy", "-q", f"oci:{layout.path}:app", f"oci-archive:{archive}:app"], check=True, timeout=60
    )
    for reference in (f"oci-archive:{archive}", f"oci-archive:{archive}:app"):
        assert pull_one(repository_path, reference)["digest"]


def test_an_index_in_an_index_of_a_layout_is_walked(disk: pathlib.Path, repository_path: pathlib.Path) -> None:
    layout = Layout(disk / "nested-layout")
    layer = layout.layer(FIRST)
    entry = layout.manifest(
        layout.config([layer]), [layer], platform=dict(zip(("os", "architecture"), HERE.split("/")))
    )
    outer = layout.tag(layout.index([layout.index([entry])]), "n")
    result = pull_one(repository_path, f"oci:{layout.path}:n", digest=outer)
    assert (result["digest"], result["index_digest"]) == (entry["digest"], outer)


def test_several_images_in_a_layout_are_told_apart(layout: Layout, repository_path: pathlib.Path) -> None:
    with pytest.raises(errors.InvalidReference, match="app, index"):
        pull_one(repository_path, f"oci:{layout.path}")
    assert pull_one(repository_path, f"oci:{layout.path}:@0")["digest"]
    with pytest.raises(errors.ImageNotFound):
        pull_one(repository_path, f"oci:{layout.path}:@7")


def flipped(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("what", ["manifest", "config", "layer", "short layer", "no layer", "FIFO"])
def test_every_proof_holds_for_a_layout(place: pathlib.Path, repository_path: pathlib.Path, what: str) -> None:
    layout = Layout(place / "layout")
    digest = layout.image([FIRST], "app")
    manifest = json.loads(layout.read(digest))
    blob = layout.blob_path(
        {"manifest": digest, "config": manifest["config"]["digest"]}.get(what, manifest["layers"][0]["digest"])
    )
    if what == "no layer":
        blob.unlink()
    elif what == "short layer":
        blob.write_bytes(blob.read_bytes()[:-1])
    elif what == "FIFO":
        blob.unlink()
        os.mkfifo(blob)
    else:
        flipped(blob)
    for archived in (False, True) if what != "FIFO" else (False,):
        reference = f"oci:{layout.path}"
        if archived:
            reference = f"oci-archive:{pack(layout, place / 'a.tar')}"
        with pytest.raises(errors.EngineError) as caught:
            pull_one(repository_path, reference, chosen=options(retries=3))
        assert caught.value.code in {
            "no layer": ("image_not_found",),
            "FIFO": ("invalid_document",),
        }.get(what, ("digest_mismatch",))
        assert names(repository_path) == set()


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_an_archive_that_is_cut_off_is_no_fault_of_a_network(
    layout: Layout, place: pathlib.Path, repository_path: pathlib.Path, mode: str, part: float
) -> None:
    archive = pack(layout, place / "a.tar", mode)
    os.truncate(archive, int(archive.stat().st_size * part))
    for policy in (pull.ALWAYS, pull.NEWER):
        with pytest.raises(errors.InvalidDocument, match="damaged"):
            pull_one(repository_path, f"oci-archive:{archive}:app", chosen=options(retries=3, policy=policy))


def test_a_manifest_of_docker_in_a_layout_is_an_unsupported_one(
    place: pathlib.Path, repository_path: pathlib.Path
) -> None:
    layout = Layout(place / "layout")
    layer = layout.layer(FIRST)
    document = {"mediaType": ocidocuments.DOCKER_MANIFEST}
    entry = layout.manifest(layout.config([layer]), [layer], overrides=document, mediaType=ocidocuments.DOCKER_MANIFEST)
    layout.tag(entry, "app")
    with pytest.raises(errors.UnsupportedMediaType, match="Docker"):
        pull_one(repository_path, f"oci:{layout.path}:app")


# ---- the policy for signatures ---------------------------------------------------------------------------------------

REJECT, ACCEPT = [{"type": "reject"}], [{"type": "insecureAcceptAnything"}]


@pytest.mark.parametrize(
    ("policy", "free"),
    [
        ({"default": ACCEPT}, True),
        ({"default": REJECT}, False),
        ({"default": REJECT, "transports": {"oci": {"": ACCEPT}}}, True),
        ({"default": ACCEPT, "transports": {"oci": {"": REJECT}}}, False),
        ({"default": ACCEPT, "transports": {"oci": {"/somewhere": REJECT}}}, False),
        ({"default": ACCEPT, "transports": {"docker": {"": REJECT}}}, True),
    ],
)
def test_a_policy_that_asks_for_more_is_never_bypassed(
    layout: Layout, place: pathlib.Path, repository_path: pathlib.Path, policy: dict[str, object], free: bool
) -> None:
    (place / "policy.json").write_text(json.dumps(policy))
    proxy = {"policy": str(place / "policy.json"), "unenforced_policy": "refuse"}
    strict = options("/nonexistent/skopeo", proxy=proxy)
    reference = f"oci:{layout.path}:app"
    if free:
        assert pull_one(repository_path, reference, chosen=strict)["policy"] == "accept_anything"
        return
    with pytest.raises(errors.SkopeoMissing):
        pull_one(repository_path, reference, chosen=strict)
    # The installed one may enforce policies or be too old for it; both end the pull.
    with pytest.raises((errors.PolicyRejected, errors.SkopeoTooOld)):
        pull_one(repository_path, reference, chosen=options(proxy=proxy))
    loose = options("/nonexistent/skopeo", proxy={**proxy, "unenforced_policy": "ignore"})
    assert pull_one(repository_path, reference, chosen=loose)["policy"] == "ignored"


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_policy_that_cannot_be_read_fails(
    layout: Layout, place: pathlib.Path, repository_path: pathlib.Path, content: str
) -> None:
    (place / "policy.json").write_text(content)
    strict = options(proxy={"policy": str(place / "policy.json"), "unenforced_policy": "refuse"})
    with pytest.raises(errors.PolicyRejected, match="policy.json"):
        pull_one(repository_path, f"oci:{layout.path}:app", chosen=strict)


# ---- another repository on this host ---------------------------------------------------------------------------------


@pytest.fixture
def there(layout: Layout, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]) -> pathlib.Path:
    path = new_repository(place / "there")
    pull_one(path, f"oci:{layout.path}:app", "app")
    return path


@pytest.mark.parametrize("algorithm", ["sha256", "sha512"])
def test_an_image_is_copied_from_another_repository(
    there: pathlib.Path, place: pathlib.Path, new_repository: Callable[..., pathlib.Path], algorithm: str
) -> None:
    here = new_repository(place / "here", algorithm)
    reference = f"composefs:{there}#app"
    predicted = pull_one(here, reference, chosen=options("/nonexistent/skopeo", check=True))
    done = pull_one(here, reference, chosen=options("/nonexistent/skopeo"))
    for key in ("digest", "streams", "layers", "changed"):
        assert predicted[key] == done[key], key
    assert predicted["stats"]["bytes_fetched"] == done["stats"]["bytes_fetched"]
    assert done["changed"] and done["image_id"] and done["stats"]["objects_copied"] > 0
    assert layer_tar(here, sha256(FIRST)) == FIRST and layer_tar(here, sha256(SECOND)) == SECOND
    again = pull_one(here, reference)
    assert not again["changed"] and again["stats"]["objects_copied"] == 0
    by_digest = pull_one(here, f"composefs:{there}#{done['digest']}", "by digest")
    assert by_digest["digest"] == done["digest"] and by_digest["streams"] == []


def test_an_artifact_is_copied_from_another_repository(
    place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    layout = Layout(place / "layout")
    layout.artifact([("application/x-text", b"an artifact\n" * 100)], "artifact")
    there, here = new_repository(place / "there"), new_repository(place / "here")
    one = pull_one(there, f"oci:{layout.path}:artifact", "artifact")
    assert pull_one(here, f"composefs:{there}#artifact")["digest"] == one["digest"]


def test_objects_are_linked_only_if_nobody_else_could_change_them(
    there: pathlib.Path, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    objects = [path for path in (there / "objects").rglob("*") if path.is_file()]
    os.chown(objects[0], 12345, 12345)
    here = new_repository(place / "here")
    pull_one(here, f"composefs:{there}#app")
    for path in objects:
        ours = here / path.relative_to(there)
        if ours.exists() and path == objects[0]:
            assert ours.stat().st_ino != path.stat().st_ino


def test_objects_are_cloned_where_the_file_system_can(
    layout: Layout, small_fs: Callable[..., pathlib.Path], new_repository: Callable[..., pathlib.Path]
) -> None:
    place = small_fs("200M", "btrfs")
    there, here = new_repository(place / "there"), new_repository(place / "here")
    pull_one(there, f"oci:{layout.path}:app", "app")
    result = pull_one(here, f"composefs:{there}#app")
    largest = max(
        (path for path in (there / "objects").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    ours = here / largest.relative_to(there)
    assert ours.stat().st_ino != largest.stat().st_ino and ours.read_bytes() == largest.read_bytes()
    os.sync()
    if shutil.which("filefrag"):
        told = subprocess.run(["filefrag", "-v", str(ours)], check=True, stdout=subprocess.PIPE, text=True).stdout
        assert "shared" in told or "inline" in told
    assert result["stats"]["objects_copied"] > 0 and layer_tar(here, sha256(FIRST)) == FIRST


def test_a_damaged_object_there_registers_nothing_here(
    there: pathlib.Path, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    largest = max(
        (path for path in (there / "objects").rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
    flipped(largest)
    here = new_repository(place / "here")
    with pytest.raises(errors.EngineError) as caught:
        pull_one(here, f"composefs:{there}#app", chosen=options(retries=2))
    assert caught.value.code in ("digest_mismatch", "repository_damaged")
    assert not [name for name in names(here) if "refs" in name]


def poisoned(there: pathlib.Path) -> None:
    """Let the first layer's name lead to another tar, as a tool would that never compared it."""
    from ansible_collections.composefs.oci.plugins.module_utils.formats import splitstream
    from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams

    evil = tar(member("usr/", type=DIRECTORY), member("usr/evil", b"evil" * 100))
    with Repository.open(str(there), write=True) as repository:
        writer = splitstream.Writer(repository.algorithm, splitstream.LAYER)
        writer.inline(evil)
        stream = repository.objects.put_pieces(writer.finish())
        repository.register(f"oci-layer-{sha256(FIRST)}", stream)
        digest = repository.tag_digest("app")
        assert digest
        manifest = imagestreams.read(repository, imagestreams.MANIFEST, digest)
        assert manifest
        refs = {**manifest.refs, sha256(FIRST): stream}
        repository.register(
            f"oci-manifest-{digest}", imagestreams.store(repository, imagestreams.MANIFEST, manifest.raw, refs)
        )


def test_a_layer_there_is_proved_by_its_diff_id(
    there: pathlib.Path, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    poisoned(there)
    here = new_repository(place / "here")
    with pytest.raises(errors.DigestMismatch, match=sha256(FIRST)):
        pull_one(here, f"composefs:{there}#app")


def test_a_proof_of_another_user_is_not_believed(
    there: pathlib.Path, place: pathlib.Path, new_repository: Callable[..., pathlib.Path]
) -> None:
    poisoned(there)
    with Repository.open(str(there), write=True) as repository:
        stream = repository.stream(f"oci-layer-{sha256(FIRST)}")
        assert stream
        repository.trust(sha256(FIRST), stream)
    os.chown(there / ".composefs-oci/trusted" / sha256(FIRST), 12345, 12345, follow_symlinks=False)
    with pytest.raises(errors.DigestMismatch, match=sha256(FIRST)):
        pull_one(new_repository(place / "here"), f"composefs:{there}#app")


@pytest.mark.parametrize("reference", ["composefs:/nowhere", "composefs:relative#x", "composefs:/nowhere#"])
def test_a_reference_to_a_repository_names_path_and_image(repository_path: pathlib.Path, reference: str) -> None:
    with pytest.raises(errors.InvalidReference):
        pull_one(repository_path, reference)


# ---- what skopeo leaves behind ---------------------------------------------------------------------------------------

READER = """
import os, sys
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from ansible_collections.composefs.oci.plugins.module_utils.source.skopeosource import SkopeoSource

source = SkopeoSource(ProxyOptions((sys.argv[1],), unenforced_policy="ignore", tmpdir=sys.argv[2]))
source.resolve(parse_reference(sys.argv[3]))
print(len(os.listdir(sys.argv[2])), flush=True)
sys.stdin.read()
"""


def emptied(directory: pathlib.Path) -> bool:
    """Whether the directory is empty within a minute."""
    for _attempt in range(1200):
        if not os.listdir(directory):
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("end", ["close", "skopeo killed", "renew", "wrong image"])
def test_nothing_that_skopeo_unpacked_stays(
    layout: Layout, place: pathlib.Path, each_skopeo: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "tmp").mkdir()
    archive = pack(layout, place / "a.tar")
    before = set(os.listdir("/var/tmp"))
    source = SkopeoSource(ProxyOptions((each_skopeo,), unenforced_policy="ignore", tmpdir=str(place / "tmp")))
    tag = "never" if end == "wrong image" else "app"
    with contextlib.suppress(errors.ImageNotFound, errors.ProxyFailed):
        source.resolve(parse_reference(f"oci-archive:{archive}:{tag}"))
    assert os.listdir(place / "tmp")
    if end == "skopeo killed":
        assert source._proxy is not None and source._proxy._child is not None
        source._proxy._child.process.kill()
    if end == "renew":
        source.renew(0)
    else:
        source.close()
    assert os.listdir(place / "tmp") == []
    assert_nothing_new_stays(before)
    source.close()


def test_nothing_that_skopeo_unpacked_outlives_a_killed_process(
    layout: Layout, place: pathlib.Path, skopeo: str
) -> None:
    (place / "tmp").mkdir()
    archive = pack(layout, place / "a.tar")
    root = pathlib.Path(__file__).resolve().parents[3]
    setup = f"import sys; sys.path.insert(0, {str(root / 'tests/integration/engine')!r}); import conftest\n"
    process = subprocess.Popen(
        [sys.executable, "-c", setup + READER, skopeo, str(place / "tmp"), f"oci-archive:{archive}:app"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()
    process.communicate()
    assert emptied(place / "tmp")
