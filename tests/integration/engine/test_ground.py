# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ground carries: real skopeo gets real images from the real registry, and every fault that tests ask for really
happens.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import io
import json
import os
import pathlib
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable

import pytest

import ociimage
import registry as registry_module
import tarbytes
from aptroot import Unavailable
from faultproxy import FaultProxy, Rule
from ociimage import Built, Layout, docker_directory, encode, sha256
from registry import Registry


def copy(skopeo: str, source: str, target: pathlib.Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [skopeo, "--insecure-policy", "copy", "--quiet", *options, source, f"dir:{target}"]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)


def first_layer(layout: Layout, tag: str) -> dict[str, object]:
    index = json.loads((layout.path / "index.json").read_text())
    one = next(
        entry for entry in index["manifests"] if entry["annotations"]["org.opencontainers.image.ref.name"] == tag
    )
    layer = json.loads(layout.read(one["digest"]))["layers"][0]
    assert isinstance(layer, dict)
    return layer


@pytest.fixture
def pushed(registry: Registry, images: Layout) -> tuple[str, dict[str, object]]:
    """The gzip image in the registry: its name there and the descriptor of its first layer."""
    registry.push(f"{images.path}:gzip", "ground:gzip")
    return "ground:gzip", first_layer(images, "gzip")


def get(address: str, path: str, timeout: float = 5) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=timeout)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# ---- archives and layouts --------------------------------------------------------------------------------------------


def test_archives_are_what_tar_readers_expect() -> None:
    with tarfile.open(fileobj=io.BytesIO(tarbytes.small_tree())) as archive:
        found = {member.name: member for member in archive}
        content = archive.extractfile("usr/share/data/size-4097")
        assert content is not None and len(content.read()) == 4097
    assert found["usr/bin/alias"].islnk() and found["usr/lib/null"].ischr() and found["usr/lib/pipe"].isfifo()
    assert found["usr/lib/" + "long-name-" * 12].pax_headers["mtime"] == "1600000000.123456789"
    assert "SCHILY.xattr.security.capability" in found["usr/bin/tool"].pax_headers


def test_numbers_too_large_for_octal_are_written_in_base_256() -> None:
    with tarfile.open(fileobj=io.BytesIO(tarbytes.tar(tarbytes.member("old", mtime=-5, uid=1 << 40)))) as archive:
        one = archive.next()
        assert one is not None and (one.mtime, one.uid) == (-5, 1 << 40)


def test_archives_are_taken_by_gnu_tar() -> None:
    listing = subprocess.run(
        ["tar", "-tf", "-"], input=tarbytes.small_tree(), stdout=subprocess.PIPE, check=True
    ).stdout
    assert b"usr/share/data/size-70000" in listing


@pytest.mark.parametrize("encoding", ["gzip", "gzip-multi", "estargz"])
def test_gzip_encodings_decode_to_the_tar(encoding: str) -> None:
    tar = tarbytes.small_tree()
    assert (
        subprocess.run(["gzip", "-dc"], input=encode(tar, encoding), stdout=subprocess.PIPE, check=True).stdout == tar
    )


@pytest.mark.parametrize("encoding", ["zstd", "zstd-frames", "zstd-skippable", "zstd-chunked"])
def test_zstd_encodings_decode_to_the_tar(encoding: str) -> None:
    tar = tarbytes.small_tree()
    try:
        data = encode(tar, encoding)
    except Unavailable as error:
        pytest.skip(str(error))
    assert subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout == tar


def test_the_same_directory_gives_the_same_layer(place: pathlib.Path) -> None:
    (place / "tree/sub").mkdir(parents=True)
    (place / "tree/sub/file").write_bytes(b"x" * 100)
    (place / "tree/link").symlink_to("sub/file")
    layers = [Layout(place / f"layout-{number}").layer_from_directory(place / "tree") for number in range(2)]
    assert layers[0] == layers[1]


def test_a_layout_can_lie_in_one_place_and_be_true_elsewhere(place: pathlib.Path) -> None:
    layout = Layout(place / "layout")
    tar = tarbytes.small_tree()
    liar = layout.layer(tar, diff_id="sha256:" + "0" * 64, size=7)
    assert liar.descriptor["size"] == 7 and liar.diff_id.endswith("0" * 64)
    assert sha256(layout.read(liar.descriptor["digest"])) == liar.descriptor["digest"]
    cut = layout.broken_layer(tar, cut=10)
    assert sha256(layout.read(cut.descriptor["digest"])) == cut.descriptor["digest"]


def test_chunked_layers_of_old_writers_lack_the_padding(place: pathlib.Path) -> None:
    tar = tarbytes.small_tree()
    layer = Layout(place / "layout").chunked_layer(tar)
    data = Layout(place / "layout").read(layer.descriptor["digest"])
    decoded = subprocess.run(["zstd", "-dc"], input=data, stdout=subprocess.PIPE, check=True).stdout
    missing = len(tar) - len(decoded)
    assert missing > 0 and missing % 512 == 0 and sha256(decoded + bytes(missing)) == layer.diff_id == sha256(tar)


def test_the_debian_image_is_real_and_always_the_same(
    debian: tuple[pathlib.Path, Built], place: pathlib.Path, skopeo: str
) -> None:
    path, built = debian
    layout = Layout(path)
    manifest = json.loads(layout.read(built.digest))
    config = json.loads(layout.read(manifest["config"]["digest"]))
    assert len(manifest["layers"]) >= 2 and built.entries > 1000
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"]):
        tar = subprocess.run(
            ["gzip", "-dc", str(layout.blob_path(layer["digest"]))], stdout=subprocess.PIPE, check=True
        ).stdout
        assert sha256(tar) == diff_id
    first = layout.blob_path(manifest["layers"][0]["digest"])
    (place / "root").mkdir()
    subprocess.run(
        ["tar", "-xzf", str(first), "-C", str(place / "root"), "--no-same-owner", "--exclude=dev"], check=True
    )
    if os.geteuid() == 0:
        said = subprocess.run(
            ["chroot", str(place / "root"), "/bin/bash", "-c", "echo $((6*7))"], stdout=subprocess.PIPE, check=True
        ).stdout
        assert said == b"42\n"


# ---- registries ------------------------------------------------------------------------------------------------------


def test_every_encoding_survives_the_registry_byte_for_byte(
    registry: Registry, images: Layout, each_skopeo: str, place: pathlib.Path
) -> None:
    for tag in ("none", "gzip", "gzip-multi", "estargz", "zstd", "zstd-skippable", "artifact"):
        layer = first_layer(images, tag)
        registry.push(f"{images.path}:{tag}", f"encodings:{tag}", "--preserve-digests")
        done = copy(
            each_skopeo,
            registry.reference(f"encodings:{tag}"),
            place / tag,
            "--src-tls-verify=false",
            "--preserve-digests",
        )
        assert done.returncode == 0, done.stdout
        data = (place / tag / str(layer["digest"]).split(":")[1]).read_bytes()
        assert sha256(data) == layer["digest"] and len(data) == layer["size"]


def test_an_index_keeps_its_platforms(registry: Registry, images: Layout) -> None:
    registry.push(f"{images.path}:platforms", "platforms:all", "--all", "--preserve-digests")
    status, headers, body = registry.request("GET", "/v2/platforms/manifests/all", {"Accept": ociimage.INDEX})
    assert status == 200 and headers["content-type"] == ociimage.INDEX
    assert [one["platform"]["architecture"] for one in json.loads(body)["manifests"]] == ["amd64", "arm64", "arm"]


def test_tls_is_refused_without_and_works_with_the_ca(
    tls_registry: Registry, images: Layout, each_skopeo: str, place: pathlib.Path
) -> None:
    reference = tls_registry.push(f"{images.path}:gzip", "tls:gzip")
    refused = copy(each_skopeo, reference, place / "refused")
    assert refused.returncode != 0 and "certificate" in refused.stdout
    assert copy(each_skopeo, reference, place / "taken", f"--src-cert-dir={tls_registry.ca_directory}").returncode == 0


def test_user_and_password_are_wanted(
    private_registry: Registry, images: Layout, each_skopeo: str, place: pathlib.Path
) -> None:
    reference = private_registry.push(f"{images.path}:gzip", "private:gzip")
    trust = f"--src-cert-dir={private_registry.ca_directory}"
    for wrong in (["--src-no-creds"], ["--src-creds=reader:wrong"]):
        refused = copy(each_skopeo, reference, place / "refused", trust, *wrong)
        assert refused.returncode != 0 and (
            "unauthorized" in refused.stdout or "authentication required" in refused.stdout
        )
    assert (
        copy(
            each_skopeo, reference, place / "taken", trust, f"--src-authfile={private_registry.auth_file()}"
        ).returncode
        == 0
    )


def test_docker_images_are_docker_images(registry: Registry, skopeo: str, place: pathlib.Path) -> None:
    digest = docker_directory(place / "docker", [tarbytes.small_tree()])
    registry.push(f"dir:{place / 'docker'}", "docker:v2s2", "--preserve-digests")
    status, headers, _unused = registry.request(
        "GET", "/v2/docker/manifests/v2s2", {"Accept": ociimage.DOCKER_MANIFEST}
    )
    assert (status, headers["content-type"], headers["docker-content-digest"]) == (
        200,
        ociimage.DOCKER_MANIFEST,
        digest,
    )


def test_skopeo_makes_docker_images_of_oci_images(registry: Registry, images: Layout) -> None:
    registry.push(f"{images.path}:gzip", "converted:v2s2", "--format=v2s2")
    _unused, headers, _unused = registry.request(
        "GET", "/v2/converted/manifests/v2s2", {"Accept": ociimage.DOCKER_MANIFEST}
    )
    assert headers["content-type"] == ociimage.DOCKER_MANIFEST


def test_a_lying_manifest_reaches_the_registry(registry: Registry, images: Layout) -> None:
    registry.push(f"{images.path}:gzip", "liar:honest")
    manifest = json.loads(registry.request("GET", "/v2/liar/manifests/honest", {"Accept": ociimage.MANIFEST})[2])
    manifest["layers"][0]["size"] += 5
    data = json.dumps(manifest).encode()
    assert registry.put_manifest("liar", "lie", data, ociimage.MANIFEST) == sha256(data)


def test_the_command_line_starts_and_stops_a_registry(
    place: pathlib.Path, images: Layout, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = str(place / "served")
    try:
        registry_module.find_registry()
    except Unavailable as error:
        pytest.skip(str(error))
    assert registry_module.main(["start", "--dir", directory]) == 0
    address = capsys.readouterr().out.strip()
    assert registry_module.main(["push", "--dir", directory, f"{images.path}:gzip", "cli:1"]) == 0
    assert get(address, "/v2/cli/tags/list")[1] == b'{"name":"cli","tags":["1"]}\n'
    assert registry_module.main(["stop", "--dir", directory]) == 0
    with pytest.raises(OSError):
        get(address, "/v2/")


def test_the_other_skopeo_is_another_version(skopeo: str, newer_skopeo: str) -> None:
    versions = [
        subprocess.run([one, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-1]
        for one in (skopeo, newer_skopeo)
    ]
    assert versions[1].startswith("1.18")


# ---- faults of the network -------------------------------------------------------------------------------------------


def test_an_undisturbed_proxy_is_not_noticed(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]], skopeo: str, place: pathlib.Path
) -> None:
    name, layer = pushed
    assert copy(skopeo, faults.reference(name), place / "copy", "--src-tls-verify=false").returncode == 0
    assert faults.hits(str(layer["digest"])) == 1 and faults.sent(str(layer["digest"])) == layer["size"]


@pytest.mark.parametrize("reset", [False, True], ids=["end", "reset"])
def test_a_cut_answer_ends_early(faults: FaultProxy, pushed: tuple[str, dict[str, object]], reset: bool) -> None:
    name, layer = pushed
    faults.add(Rule(str(layer["digest"]), cut=1000, reset=reset, times=1))
    with pytest.raises((http.client.IncompleteRead, ConnectionError)) as caught:
        get(faults.address, f"/v2/ground/blobs/{layer['digest']}")
    if not reset:
        assert isinstance(caught.value, http.client.IncompleteRead) and len(caught.value.partial) == 1000
    assert sha256(get(faults.address, f"/v2/ground/blobs/{layer['digest']}")[1]) == layer["digest"]


def test_a_cut_answer_is_an_error_for_the_old_skopeo_only(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]], skopeo: str, newer_skopeo: str, place: pathlib.Path
) -> None:
    name, layer = pushed
    version = subprocess.run([skopeo, "--version"], stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-1]
    if tuple(map(int, version.split(".")[:2])) >= (1, 12):
        pytest.skip(f"the installed skopeo {version} resumes, too")
    faults.add(Rule(str(layer["digest"]), cut=1000, times=1))
    assert copy(skopeo, faults.reference(name), place / "old", "--src-tls-verify=false").returncode != 0
    assert copy(newer_skopeo, faults.reference(name), place / "new", "--src-tls-verify=false").returncode == 0


def test_a_stalled_answer_stays_silent_until_released(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]]
) -> None:
    name, layer = pushed
    faults.add(Rule(str(layer["digest"]), stall=500))
    connection = http.client.HTTPConnection(faults.address, timeout=60)
    connection.request("GET", f"/v2/ground/blobs/{layer['digest']}")
    told = connection.sock
    answer = connection.getresponse()
    assert len(answer.read(500)) == 500
    told.settimeout(0.5)
    with pytest.raises(OSError):
        answer.read(1)
    connection.close()
    threading.Timer(0.3, faults.release).start()
    with pytest.raises(http.client.IncompleteRead):
        get(faults.address, f"/v2/ground/blobs/{layer['digest']}")


def test_a_flipped_bit_is_one_bit(faults: FaultProxy, pushed: tuple[str, dict[str, object]], images: Layout) -> None:
    name, layer = pushed
    faults.add(Rule(str(layer["digest"]), flip=700))
    right, wrong = images.read(str(layer["digest"])), get(faults.address, f"/v2/ground/blobs/{layer['digest']}")[1]
    assert [(spot, one ^ other) for spot, (one, other) in enumerate(zip(right, wrong)) if one != other] == [
        (700, 1)
    ] and len(right) == len(wrong)


def test_a_shortened_answer_is_orderly(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]], images: Layout
) -> None:
    name, layer = pushed
    faults.add(Rule(str(layer["digest"]), shorten=100))
    assert get(faults.address, f"/v2/ground/blobs/{layer['digest']}")[1] == images.read(str(layer["digest"]))[:-100]


@pytest.mark.parametrize("lie", [10, -10])
def test_a_lying_content_length(faults: FaultProxy, pushed: tuple[str, dict[str, object]], lie: int) -> None:
    name, layer = pushed
    size = int(str(layer["size"]))
    faults.add(Rule(str(layer["digest"]), content_length=lie))
    if lie > 0:
        with pytest.raises(http.client.IncompleteRead) as caught:
            get(faults.address, f"/v2/ground/blobs/{layer['digest']}")
        assert len(caught.value.partial) == size
    else:
        assert len(get(faults.address, f"/v2/ground/blobs/{layer['digest']}")[1]) == size + lie


def test_errors_come_as_often_as_told(faults: FaultProxy) -> None:
    faults.add(Rule("/v2/$", status=500, times=2))
    assert [get(faults.address, "/v2/")[0] for _unused in range(3)] == [500, 500, 200]
    assert faults.hits("/v2/$") == 3


def test_skopeo_obeys_retry_after(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]], skopeo: str, place: pathlib.Path
) -> None:
    rule = faults.add(Rule("/manifests/", status=429, headers={"Retry-After": "1"}, times=1))
    started = time.monotonic()
    assert copy(skopeo, faults.reference(pushed[0]), place / "copy", "--src-tls-verify=false").returncode == 0
    assert rule.used == 1 and time.monotonic() - started > 0.9


def test_a_refused_user(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]], skopeo: str, place: pathlib.Path
) -> None:
    faults.add(Rule("/v2/", status=401, headers={"WWW-Authenticate": 'Basic realm="test"'}))
    done = copy(skopeo, faults.reference(pushed[0]), place / "copy", "--src-tls-verify=false")
    assert done.returncode != 0 and "auth" in done.stdout.lower()


def test_delays_and_rates_take_their_time(faults: FaultProxy, pushed: tuple[str, dict[str, object]]) -> None:
    layer = pushed[1]
    path = f"/v2/ground/blobs/{layer['digest']}"
    faults.add(Rule(str(layer["digest"]), delay=0.3, times=1))
    faults.add(Rule(str(layer["digest"]), rate=int(str(layer["size"])) / 0.5, times=1))
    for least in (0.3, 0.4):
        started = time.monotonic()
        assert sha256(get(faults.address, path)[1]) == layer["digest"]
        assert time.monotonic() - started >= least


def test_parallel_requests_do_not_wait_for_a_stalled_one(
    faults: FaultProxy, pushed: tuple[str, dict[str, object]]
) -> None:
    layer = pushed[1]
    faults.add(Rule(str(layer["digest"]), stall=10, times=1))
    stalled = http.client.HTTPConnection(faults.address, timeout=60)
    stalled.request("GET", f"/v2/ground/blobs/{layer['digest']}")
    assert get(faults.address, "/v2/")[0] == 200
    stalled.close()


# ---- faults of the disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ext4", "tmpfs"])
def test_a_small_disk_fills_up(small_fs: Callable[..., pathlib.Path], kind: str) -> None:
    place = small_fs("16M", kind)
    with pytest.raises(OSError) as caught, open(place / "large", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_without_inodes_left(small_fs: Callable[..., pathlib.Path]) -> None:
    place = small_fs("16M", "inodes")
    with pytest.raises(OSError) as caught:
        for number in range(1000):
            (place / str(number)).touch()
    assert caught.value.errno == errno.ENOSPC and os.statvfs(place).f_bavail > 100


def test_a_read_only_disk(small_fs: Callable[..., pathlib.Path], read_only: Callable[[pathlib.Path], None]) -> None:
    place = small_fs("16M")
    read_only(place)
    with pytest.raises(OSError) as caught:
        (place / "file").touch()
    assert caught.value.errno == errno.EROFS


# ---- repositories ----------------------------------------------------------------------------------------------------


def test_a_new_repository_is_one_for_cfsctl_too(repository_path: pathlib.Path, cfsctl: Callable[..., str]) -> None:
    assert "No images found" in cfsctl("--repo", repository_path, "oci", "images")


def test_cfsctl_pulls_the_images_of_this_ground(
    images: Layout, place: pathlib.Path, cfsctl: Callable[..., str]
) -> None:
    repository = place / "theirs"
    cfsctl("--repo", repository, "init", "--insecure", "--algorithm", "fsverity-sha256-12")
    cfsctl("--repo", repository, "oci", "pull", f"oci:{images.path}:gzip", "ground")
    assert "ground" in cfsctl("--repo", repository, "oci", "images")
    tar = cfsctl("--repo", repository, "oci", "layer", sha256(tarbytes.small_tree(seed=1)))
    assert (
        hashlib.sha256(tar.encode(errors="surrogateescape")).digest()
        == hashlib.sha256(tarbytes.small_tree(seed=1)).digest()
    )
