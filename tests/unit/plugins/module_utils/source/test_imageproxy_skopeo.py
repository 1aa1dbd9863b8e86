# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tarfile
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.source import imageproxy, skopeo
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    DigestMismatch,
    EngineError,
    ImageNotFound,
    PlatformNotFound,
    PolicyRejected,
    SkopeoTooOld,
    ProxyFailed,
    RegistryUnreachable,
    Stalled,
)
from ansible_collections.composefs.oci.plugins.module_utils.source.imageproxy import ImageProxy, ProxyOptions

# The host's skopeo, and a newer one where the tests' cache has it.
PROGRAMS = [
    program
    for program in (
        shutil.which("skopeo"),
        str(pathlib.Path(__file__).resolve().parents[5] / ".cache/foreign/trixie-skopeo/skopeo"),
    )
    if program and os.access(program, os.X_OK)
]

pytestmark = pytest.mark.skipif(not PROGRAMS, reason="skopeo is not installed")


def drain(fd, size):
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        assert piece
        data += piece
    return bytes(data)


@pytest.fixture(autouse=True)
def nothing_remains():
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


class Layout:
    """An image layout on disk, made without any tool."""

    def __init__(self, path):
        self.path = path
        self.blobs = path / "blobs" / "sha256"
        self.blobs.mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def put(self, data, media_type):
        hexadecimal = hashlib.sha256(data).hexdigest()
        (self.blobs / hexadecimal).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{hexadecimal}", "size": len(data)}

    def image(self, architecture="amd64", content=b"hello", annotations=None):
        tar = content.ljust(10240, b"\0")
        diff_id = "sha256:" + hashlib.sha256(tar).hexdigest()
        layer = self.put(gzip.compress(tar), "application/vnd.oci.image.layer.v1.tar+gzip")
        document = {"architecture": architecture, "os": "linux", "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": ocidocuments.OCI_MANIFEST,
            "config": self.put(json.dumps(document).encode(), ocidocuments.OCI_CONFIG),
            "layers": [layer],
        }
        if annotations:
            manifest["annotations"] = annotations
        return self.put(json.dumps(manifest, indent=1).encode(), ocidocuments.OCI_MANIFEST)

    def index(self, entries, **more):
        document = {
            "schemaVersion": 2,
            "mediaType": ocidocuments.OCI_INDEX,
            "manifests": [dict(entry, platform=platform) for entry, platform in entries],
            **more,
        }
        return self.put(json.dumps(document).encode(), ocidocuments.OCI_INDEX)

    def publish(self, *descriptors):
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": list(descriptors)}))
        return parse_reference(f"oci:{self.path}")


@pytest.fixture
def layout(tmp_path):
    return Layout(tmp_path / "layout")


@pytest.fixture(params=PROGRAMS or ["skopeo"], ids=lambda program: pathlib.Path(program).parent.name)
def accept(request, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text('{"default":[{"type":"insecureAcceptAnything"}]}')
    return ProxyOptions(executable=(request.param,), policy=str(path), timeout=20)


def test_an_image_comes_through_byte_for_byte(layout, accept):
    top = layout.image(annotations={"note": "x" * 200_000})  # far more than a pipe holds
    with ImageProxy(accept, layout.publish(top)) as proxy:
        image = proxy.open_image()
        digest, data = proxy.get_manifest(image)
        manifest = ocidocuments.parse_manifest(data)
        assert digest == manifest.digest == top["digest"]
        config = ocidocuments.parse_config(imageproxy.fetch_config(proxy, image, manifest.config))
        ((layer, diff_id),) = ocidocuments.pairs(manifest, config)
        pipe = proxy.get_blob(image, layer.digest, layer.size)
        blob = drain(pipe.fd, pipe.size)
        assert not skopeo.readable(pipe.fd, time.monotonic() + 0.05), (
            "mistake 25: there is no end of file before FinishPipe"
        )
        proxy.finish_pipe(pipe.pipeid)
        assert os.read(pipe.fd, 1) == b""
        os.close(pipe.fd)
        assert digests.digest_of(blob) == layer.digest
        assert digests.digest_of(gzip.decompress(blob)) == diff_id
        proxy.close_image(image)


def test_a_damaged_blob_is_skopeos_to_tell(layout, accept):
    reference = layout.publish(layout.image())
    with ImageProxy(accept, reference) as proxy:
        image = proxy.open_image()
        layer = ocidocuments.parse_manifest(proxy.get_manifest(image)[1]).layers[0]
        path = layout.blobs / layer.digest[7:]
        path.write_bytes(b"\0" * layer.size)
        pipe = proxy.get_blob(image, layer.digest, layer.size)
        assert drain(pipe.fd, pipe.size)
        with pytest.raises(DigestMismatch, match="corrupted blob"):
            proxy.finish_pipe(pipe.pipeid)
        os.close(pipe.fd)
        path.write_bytes(b"\0")
        with pytest.raises(DigestMismatch, match="offers 1 bytes"):
            proxy.get_blob(image, layer.digest, layer.size)
        path.unlink()
        with pytest.raises(ImageNotFound):
            proxy.get_blob(image, layer.digest, layer.size)
        assert proxy.alive


def test_a_reader_that_gives_up_does_not_disturb_the_others(layout, accept):
    content = os.urandom(3_000_000)
    layout.put(content, "x/y")
    with ImageProxy(accept, layout.publish(layout.image())) as proxy:
        image = proxy.open_image()
        first = proxy.get_blob(image, digests.digest_of(content), len(content))
        second = proxy.get_blob(image, digests.digest_of(content), len(content))
        os.close(first.fd)
        with pytest.raises(EngineError, match="broken pipe"):
            proxy.finish_pipe(first.pipeid)
        assert drain(second.fd, second.size) == content
        proxy.finish_pipe(second.pipeid)
        os.close(second.fd)


def test_a_skopeo_that_is_killed_within_a_blob(layout, accept):
    content = os.urandom(3_000_000)
    layout.put(content, "x/y")
    with ImageProxy(accept, layout.publish(layout.image())) as proxy:
        pipe = proxy.get_blob(proxy.open_image(), digests.digest_of(content), len(content))
        os.kill(proxy._child.process.pid, signal.SIGKILL)
        with pytest.raises(ProxyFailed, match="signal 9") as caught:
            proxy.finish_pipe(pipe.pipeid)
        assert caught.value.passing
        os.close(pipe.fd)


def test_skopeo_chooses_the_platform_of_an_index(layout, accept):
    entries = [
        (layout.image(name, name.encode()), {"os": "linux", "architecture": name}) for name in ("amd64", "arm64")
    ]
    top = layout.index(entries)
    reference = layout.publish(top)
    for (entry, platform), name in zip(entries, ("linux/amd64", "linux/arm64")):
        with ImageProxy(dataclasses.replace(accept, platform=ocidocuments.parse_platform(name)), reference) as proxy:
            image = proxy.open_image()
            digest, data = proxy.get_manifest(image)
            assert digest == entry["digest"]
            config = ocidocuments.parse_config(
                imageproxy.fetch_config(proxy, image, ocidocuments.parse_manifest(data).config)
            )
            assert config.architecture == platform["architecture"]
    with ImageProxy(
        dataclasses.replace(accept, platform=ocidocuments.parse_platform("linux/s390x")), reference
    ) as proxy:
        image = proxy.open_image()
        with pytest.raises(PlatformNotFound, match="s390x"):
            proxy.get_manifest(image)
    digest, data = skopeo.top_digest(accept, reference)
    assert digest == top["digest"] == ocidocuments.parse_index(data).digest


@pytest.mark.parametrize("transport", ["dir", "docker-archive"])
def test_section_13_docker_images_come_converted_with_a_config_that_only_skopeo_has(
    layout, accept, tmp_path, transport
):
    source = layout.publish(layout.image())
    target = f"dir:{tmp_path}/docker" if transport == "dir" else f"docker-archive:{tmp_path}/docker.tar:x/y:z"
    subprocess.run(
        [*accept.executable, "--policy", accept.policy, "copy", "-q", "--format", "v2s2", source.text, target],
        check=True,
        timeout=60,
    )
    with ImageProxy(accept, parse_reference(target)) as proxy:
        image = proxy.open_image()
        digest, data = proxy.get_manifest(image)
        manifest = ocidocuments.parse_manifest(data)
        assert digest != manifest.digest
        assert manifest.media_type == ocidocuments.OCI_MANIFEST
        for converted in (True, False):
            config = imageproxy.fetch_config(proxy, image, manifest.config, converted)
            assert digests.digest_of(config) == manifest.config.digest
        assert ocidocuments.pairs(manifest, ocidocuments.parse_config(config))


def test_an_archive_is_read(layout, accept, tmp_path):
    top = layout.image()
    layout.publish(top)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(layout.path, ".")
    with ImageProxy(accept, parse_reference(f"oci-archive:{tmp_path}/a.tar")) as proxy:
        assert proxy.get_manifest(proxy.open_image())[0] == top["digest"]


@pytest.mark.parametrize(
    "text",
    ["oci:{}/none", "oci:{}/layout:none", "dir:{}/none", "oci-archive:{}/none.tar", "docker-archive:{}/none.tar"],
)
def test_what_is_not_there_is_not_found(layout, accept, tmp_path, text):
    layout.publish(layout.image())
    reference = parse_reference(text.format(tmp_path))
    with ImageProxy(accept, reference) as proxy, pytest.raises(ImageNotFound) as caught:
        proxy.get_manifest(proxy.open_image())
    assert "skopeo says" in str(caught.value)
    with pytest.raises(ImageNotFound):
        skopeo.top_digest(accept, reference)


def test_nobody_listening_is_unreachable_and_may_be_tried_again(accept):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        reference = parse_reference(f"127.0.0.1:{holder.getsockname()[1]}/x:y")
        with ImageProxy(accept, reference) as proxy, pytest.raises(RegistryUnreachable, match="refused") as caught:
            proxy.open_image()
        assert caught.value.passing


@pytest.mark.slow
def test_a_registry_that_never_answers_is_a_stall(accept):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        reference = parse_reference(f"127.0.0.1:{silent.getsockname()[1]}/x:y")
        quick = dataclasses.replace(accept, timeout=3)
        with ImageProxy(quick, reference) as proxy, pytest.raises(Stalled):
            proxy.open_image()
        with pytest.raises(Stalled):
            skopeo.top_digest(quick, reference)


def test_a_policy_that_is_not_enforced_is_not_passed_over(layout, accept, tmp_path):
    (tmp_path / "reject.json").write_text('{"default":[{"type":"reject"}]}')
    strict = dataclasses.replace(accept, policy=str(tmp_path / "reject.json"))
    reference = layout.publish(layout.image())
    with pytest.raises((PolicyRejected, SkopeoTooOld)), ImageProxy(strict, reference) as proxy:
        proxy.open_image()
    with ImageProxy(dataclasses.replace(strict, insecure_policy=True), reference) as proxy:
        assert proxy.open_image() > 0


def test_skopeo_tells_its_version(accept):
    assert skopeo.skopeo_version(accept.executable)[0].isdigit()
    with pytest.raises(ProxyFailed, match="version"):
        skopeo.skopeo_version(("echo",))
