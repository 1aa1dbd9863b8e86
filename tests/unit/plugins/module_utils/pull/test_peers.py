# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Layers from peers: what is asked of them, and that whatever they say the image is right or comes from elsewhere."""

from __future__ import annotations

import gzip
import os
import pathlib
import random
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from fake_source import REGISTRY, Layout, World, pull_all
from lyingpeer import Handler, LyingPeer, compressed, honest
from ociimage import sha256

from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, InvalidOption, InvalidReference
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, splitstream
from ansible_collections.composefs.oci.plugins.module_utils.host import processes
from ansible_collections.composefs.oci.plugins.module_utils.pull import pull
from ansible_collections.composefs.oci.plugins.module_utils.source import peer as peers
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
from ansible_collections.composefs.oci.tests.support.tarbytes import member, tar

dice = random.Random(9)
FILES = {f"f{number:03}": dice.randbytes(100 + 37 * number) for number in range(120)}
BIG = dice.randbytes(3 << 20)
FIRST = tar(*(member(name, data) for name, data in FILES.items()), member("big", BIG), member("inline", b"x" * 20))
SECOND = tar(member("one", b"1" * 3000), member("two", b"2" * 200))
APP = pull.Request(f"{REGISTRY}app", "app")


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> World:
    layout = Layout(tmp_path / "layout")
    layout.image([FIRST, SECOND], "app")
    monkeypatch.setattr(processes, "call", lambda what, function: function())
    return World(layout).install(monkeypatch)


def fresh(path: pathlib.Path, algorithm: Any = fsverity.SHA256) -> pathlib.Path:
    create.prepare(str(path), algorithm, "disabled")
    return path


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return fresh(tmp_path / "repo")


@pytest.fixture
def seed(tmp_path: pathlib.Path, world: World) -> pathlib.Path:
    pull_all(fresh(tmp_path / "seed"), APP)
    world.requests.clear()
    return tmp_path / "seed"


@pytest.fixture
def peer(seed: pathlib.Path) -> Iterator[LyingPeer]:
    with LyingPeer(seed) as peer:
        yield peer


def pulled(path: pathlib.Path, *urls: str, **others: Any) -> dict[str, Any]:
    (result,) = pull_all(path, APP, peers=urls, **others)
    return result


def stored(path: pathlib.Path, diff_id: str) -> bytes:
    with (
        Repository.open(str(path)) as repository,
        repository.open_object_stream(repository.stream(f"oci-layer-{diff_id}")) as stream,
    ):
        return b"".join(
            chunk if isinstance(chunk, bytes) else repository.objects.read(chunk.digest, 1 << 30)
            for chunk in stream.chunks()
        )


def assert_right(path: pathlib.Path, result: dict[str, Any], *sources: str | None) -> None:
    assert result["changed"] and [layer["source"] for layer in result["layers"]] == list(sources)
    for one in (FIRST, SECOND):
        assert stored(path, sha256(one)) == one
        with Repository.open(str(path)) as repository:
            assert repository.trusted(sha256(one)) == repository.stream(f"oci-layer-{sha256(one)}")
    wrong = []
    with Repository.open(str(path)) as repository:
        for _name, digest in repository.objects.names():
            if digest is None or not repository.objects.verify(digest):
                wrong.append(digest)
    assert wrong == [], "every object is what its name says"


# --- what goes well


@pytest.mark.slow
@pytest.mark.parametrize("how", [honest, compressed], ids=["identity", "gzip"])
def test_layers_come_from_a_peer_and_the_registry_sends_documents_only(
    path: pathlib.Path, world: World, peer: LyingPeer, how: Any
) -> None:
    peer.stream = peer.object = how
    result = pulled(path, peer.url)
    assert_right(path, result, "peer", "peer")
    assert world.fetched() == [] and result["warnings"] == []
    (told,) = result["stats"]["peers"]
    assert told["url"] == peer.url and told["layers"] == 2 and told["error"] is None
    assert told["objects"] == len(FILES) + 3
    assert told["bytes"] == result["stats"]["bytes_fetched"] > len(BIG)
    assert sum(layer["bytes_to_fetch"] for layer in result["layers"]) == told["bytes"]
    assert all(headers["Accept-Encoding"] == "gzip" for headers in peer.headers)


@pytest.mark.slow
def test_only_objects_that_are_missing_are_asked_for(path: pathlib.Path, world: World, peer: LyingPeer) -> None:
    world.layout.image([tar(member("big", BIG))], "base")
    pull_all(path, pull.Request(f"{REGISTRY}base", "base"))
    result = pulled(path, peer.url)
    assert_right(path, result, "peer", "peer")
    asked = [what for what in peer.requests if what.startswith("objects/")]
    assert len(asked) == len(set(asked)) == len(FILES) + 2
    assert fsverity.object_path(fsverity.digest(BIG, fsverity.SHA256)) not in "".join(asked)


@pytest.mark.slow
def test_the_first_peer_that_serves_is_enough(path: pathlib.Path, peer: LyingPeer, seed: pathlib.Path) -> None:
    with LyingPeer(seed) as second:
        pulled(path, peer.url, second.url)
        assert second.requests == []


@pytest.mark.slow
def test_headers_are_sent_and_shown_nowhere(path: pathlib.Path, peer: LyingPeer) -> None:
    result = pulled(path, peer.url, peer_headers={"Authorization": "Bearer se-cret"})
    assert all(headers["Authorization"] == "Bearer se-cret" for headers in peer.headers)
    assert "se-cret" not in repr(result)
    assert "se-cret" not in repr(pull.Options(peer_headers={"Authorization": "se-cret"}))


@pytest.mark.slow
def test_check_mode_asks_no_peer_and_says_that_its_bytes_are_a_bound(
    path: pathlib.Path, world: World, peer: LyingPeer
) -> None:
    told = pulled(path, peer.url, check=True)
    assert peer.requests == [] and told["bytes_exact"] is False
    (plain,) = pull_all(path, APP, check=True)
    assert plain["bytes_exact"] is True
    assert told["stats"]["bytes_fetched"] == plain["stats"]["bytes_fetched"] > 0
    done = pulled(path, peer.url)
    assert done["bytes_exact"] is True


@pytest.mark.slow
def test_peers_are_asked_for_nothing_where_nothing_is_missing(path: pathlib.Path, peer: LyingPeer) -> None:
    pulled(path, peer.url)
    peer.requests.clear()
    assert not pulled(path, peer.url)["changed"] and peer.requests == []


@pytest.mark.slow
def test_a_delta_goes_before_peers_and_a_path_in_the_url_is_kept(
    path: pathlib.Path, seed: pathlib.Path, world: World
) -> None:
    with LyingPeer(seed.parent) as peer:
        result = pulled(path, f"{peer.url}{seed.name}")
        assert_right(path, result, "peer", "peer")


# --- what a peer may lack


@pytest.mark.slow
def test_a_layer_that_a_peer_lacks_comes_from_the_next_one(
    path: pathlib.Path, seed: pathlib.Path, peer: LyingPeer
) -> None:
    os.unlink(seed / "streams" / f"oci-layer-{sha256(FIRST)}")
    result = pulled(path, peer.url)
    assert_right(path, result, "registry", "peer")
    assert result["warnings"] == [] and result["stats"]["peers"][0]["error"] is None


@pytest.mark.slow
def test_an_object_that_was_pruned_meanwhile_makes_only_this_layer_come_from_elsewhere(
    path: pathlib.Path, seed: pathlib.Path, peer: LyingPeer
) -> None:
    os.unlink(seed / "objects" / fsverity.object_path(fsverity.digest(FILES["f060"], fsverity.SHA256)))
    result = pulled(path, peer.url)
    assert_right(path, result, "registry", "peer")
    assert result["warnings"] == [] and result["stats"]["objects_already_present"] > 0, "what arrived is used"


# --- what a peer may do wrong: each costs a warning that names it, and the layer comes from the registry

PAYLOAD = b"#!/bin/sh\necho owned\n" * 30


def other_object(handler: Handler, data: bytes) -> None:
    handler.answer(bytes(len(data)))


def other_size(handler: Handler, data: bytes) -> None:
    handler.answer(data[:-1])


def endless(handler: Handler, data: bytes) -> None:
    handler.answer(data, length=10**15)


def without_length(handler: Handler, data: bytes) -> None:
    handler.answer(data, length=None, Connection="close")
    handler.close_connection = True


def chunked(handler: Handler, data: bytes) -> None:
    handler.chunked([data])


def bomb(handler: Handler, data: bytes) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    pieces = (packer.compress(zeros) for _unused in range(2000))
    handler.chunked((piece for piece in pieces if piece), Content_Encoding="gzip")


def garbage_behind(handler: Handler, data: bytes) -> None:
    handler.answer(gzip.compress(data) + b"garbage", Content_Encoding="gzip")


def brotli(handler: Handler, data: bytes) -> None:
    handler.answer(data, Content_Encoding="br")


def nonsense_length(handler: Handler, data: bytes) -> None:
    handler.answer(data, length=None, Content_Length="-5")


OTHER_TAR = tar(member("evil", PAYLOAD))


def stream_of(data: bytes, claims: int = 0) -> bytes:
    writer = splitstream.Writer(fsverity.SHA256, splitstream.LAYER)
    writer.inline(data)
    writer.size += claims
    return b"".join(writer.finish())


def other_stream(handler: Handler, data: bytes) -> None:
    handler.answer(stream_of(OTHER_TAR))


def huge_tar(handler: Handler, data: bytes) -> None:
    handler.answer(stream_of(OTHER_TAR, claims=1 << 40))


def inline_bomb(handler: Handler, data: bytes) -> None:
    handler.answer(stream_of(bytes(64 << 20)))


def noise(handler: Handler, data: bytes) -> None:
    handler.answer(dice.randbytes(500))


def other_algorithm(handler: Handler, data: bytes) -> None:
    writer = splitstream.Writer(fsverity.SHA512, splitstream.LAYER)
    writer.inline(b"x")
    handler.answer(b"".join(writer.finish()))


LIES = {
    "another object of the right size": ("object", other_object),
    "another object of another size": ("object", other_size),
    "an endless object": ("object", endless),
    "an object without a length": ("object", without_length),
    "an object in plain chunks": ("object", chunked),
    "a gzip bomb": ("object", bomb),
    "garbage behind gzip": ("object", garbage_behind),
    "an encoding nobody asked for": ("object", brotli),
    "a length that is none": ("object", nonsense_length),
    "the splitstream of another tar": ("stream", other_stream),
    "an endless splitstream": ("stream", endless),
    "a splitstream bomb in gzip": ("stream", bomb),
    "a huge tar": ("stream", huge_tar),
    "inline bytes without end": ("stream", inline_bomb),
    "a splitstream that is none": ("stream", noise),
    "a splitstream of another algorithm": ("stream", other_algorithm),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIES)
def test_a_peer_that_lies_is_named_and_the_image_is_right(
    path: pathlib.Path, world: World, peer: LyingPeer, name: str
) -> None:
    where, how = LIES[name]
    setattr(peer, where, how)
    result = pulled(path, peer.url, parallel=1)
    assert_right(path, result, "registry", "registry")
    (warning,) = result["warnings"]
    assert peer.url in warning and "lied" in warning and "look at it" in warning
    assert result["stats"]["peers"][0]["error"] and result["stats"]["peers"][0]["layers"] == 0


def test_a_peer_that_lied_is_not_asked_again(path: pathlib.Path, peer: LyingPeer) -> None:
    peer.object = other_object
    pulled(path, peer.url, parallel=1)
    assert len([what for what in peer.requests if what.startswith("streams/")]) == 1


@pytest.mark.slow
def test_the_second_peer_serves_where_the_first_lies(
    path: pathlib.Path, world: World, seed: pathlib.Path, peer: LyingPeer
) -> None:
    peer.object = other_object
    with LyingPeer(seed) as second:
        result = pulled(path, peer.url, second.url, parallel=1)
        assert_right(path, result, "peer", "peer")
        assert world.fetched() == [] and len(result["warnings"]) == 1
        assert [told["layers"] for told in result["stats"]["peers"]] == [0, 2]


def broken(handler: Handler, data: bytes) -> None:
    handler.answer(b"", status=503)


def redirect(handler: Handler, data: bytes) -> None:
    handler.answer(b"", status=302, Location="http://127.0.0.1:1/")


def forbidden(handler: Handler, data: bytes) -> None:
    handler.answer(b"", status=403)


def cut(handler: Handler, data: bytes) -> None:
    handler.answer(data[: len(data) // 2], length=len(data))
    handler.cut()


def hang_up(handler: Handler, data: bytes) -> None:
    handler.cut()


def header_flood(handler: Handler, data: bytes) -> None:
    handler.answer(data, **{f"X_{number}": "flood" for number in range(300)})


def long_header(handler: Handler, data: bytes) -> None:
    handler.answer(data, X_Long="x" * 100_000)


def silence(handler: Handler, data: bytes) -> None:
    handler.server.over.wait(20)


def trickle(handler: Handler, data: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    for number in range(len(data)):
        handler.wfile.write(data[number : number + 1])
        handler.wfile.flush()
        if handler.server.over.wait(0.05):
            return


def endless(handler: Handler, word: bytes) -> None:
    while not handler.server.over.wait(0.01):
        handler.wfile.write(word * 100)
        handler.wfile.flush()


def no_end_of_headers(handler: Handler, data: bytes) -> None:
    """An answer that is not final may come before the final one, and so on."""
    endless(handler, b"HTTP/1.1 100 Continue\r\n\r\n")


def no_end_of_trailers(handler: Handler, data: bytes) -> None:
    """What follows the last piece is no part of the body, and no budget counts it."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    body = gzip.compress(data)
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n" % (len(body), body))
    endless(handler, b"X-More: of it\r\n")


def large_and_no_end_of_trailers(handler: Handler, data: bytes) -> None:
    """What is announced as large is read by who takes it, whom nobody watches."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(2 << 20))
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("Content-Encoding", "gzip")
    handler.end_headers()
    body = gzip.compress(data)
    handler.wfile.write(b"%x\r\n%s\r\n0\r\n" % (len(body), body))
    endless(handler, b"X-More: of it\r\n")


@pytest.mark.parametrize("where", ["stream", "object"])
def test_a_peer_that_tells_a_length_and_sends_pieces_is_not_believed(
    path: pathlib.Path, world: World, peer: LyingPeer, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Long enough that no pause of this machine is taken for a silence of the peer.
    impatient = {"silence": 20.0, "slow": 40.0, "min_rate": 10_000}
    monkeypatch.setattr(peers.PeerOptions, "__init__", patient(peers.PeerOptions.__init__, impatient))
    setattr(peer, where, large_and_no_end_of_trailers)
    result = pulled(path, peer.url, parallel=1)
    assert_right(path, result, "registry", "registry")
    assert "lied" in result["warnings"][0]


FAULTS = [
    no_end_of_headers,
    no_end_of_trailers,
    broken,
    redirect,
    forbidden,
    cut,
    hang_up,
    header_flood,
    long_header,
    silence,
    trickle,
]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["stream", "object"])
@pytest.mark.parametrize("how", FAULTS, ids=lambda how: how.__name__)
def test_a_peer_that_fails_is_left_out_and_the_image_is_right(
    path: pathlib.Path, world: World, peer: LyingPeer, where: str, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient = {"silence": 2.0, "slow": 3.0, "min_rate": 10_000}
    monkeypatch.setattr(peers.PeerOptions, "__init__", patient(peers.PeerOptions.__init__, impatient))
    setattr(peer, where, how)
    started = time.monotonic()
    result = pulled(path, peer.url, parallel=1)
    assert time.monotonic() - started < 60
    assert_right(path, result, "registry", "registry")
    (warning,) = result["warnings"]
    assert peer.url in warning and "lied" not in warning and "left out" in warning


def patient(original: Any, others: dict[str, Any]) -> Any:
    def init(self: Any, ca_file: Any = None, headers: Any = (), *_rest: Any, **_others: Any) -> None:
        original(self, ca_file, dict(headers), others["min_rate"], others["silence"], others["slow"])

    return init


def test_a_peer_that_nobody_answers_for_costs_a_warning(path: pathlib.Path, world: World) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/Images/Repository/"
        result = pulled(path, url)
    assert_right(path, result, "registry", "registry")
    assert url in result["warnings"][0]


def test_a_peer_with_another_algorithm_is_left_out(tmp_path: pathlib.Path, world: World, seed: pathlib.Path) -> None:
    other = fresh(tmp_path / "other", fsverity.SHA512)
    with LyingPeer(seed) as peer:
        result = pulled(other, peer.url)
        assert [layer["source"] for layer in result["layers"]] == ["registry", "registry"]


def test_what_the_registry_refuses_is_still_the_tasks_failure(
    path: pathlib.Path, world: World, peer: LyingPeer
) -> None:
    peer.stream = broken
    blob = world.layout.layer(FIRST).descriptor["digest"]
    world.blobs[blob] = [EngineError("skopeo says: no.")]
    with pytest.raises(EngineError, match="no"):
        pulled(path, peer.url)


# --- options


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/",
        "host",
        "http://",
        "http://user:se-cret@host/",
        "http://host/?q",
        "http://host/#f",
        "http://ho st/",
    ],
)
def test_what_is_no_url_is_refused_before_anything_is_asked(path: pathlib.Path, world: World, url: str) -> None:
    with pytest.raises(InvalidOption) as found:
        pulled(path, url)
    assert "se-cret" not in str(found.value)
    assert world.requests == []


@pytest.mark.parametrize("headers", [{"A b": "x"}, {"A": "x\r\nB: y"}, {"": "x"}, {"A": "ü"}])
def test_what_is_no_header_is_refused(path: pathlib.Path, headers: dict[str, str]) -> None:
    with pytest.raises(InvalidOption):
        pulled(path, "http://127.0.0.1/", peer_headers=headers)


def test_a_file_of_certificates_is_read_before_anything_is_asked(
    path: pathlib.Path, world: World, tmp_path: pathlib.Path
) -> None:
    wrong = tmp_path / "ca.crt"
    wrong.write_text("no certificate")
    for url in ("https://127.0.0.1/", "HTTPS://127.0.0.1/"):
        for file in (wrong, tmp_path / "nowhere"):
            with pytest.raises(InvalidOption, match="certificates"):
                pulled(path, url, peer_ca_file=str(file), check=True)
    assert world.requests == []


@pytest.mark.parametrize("scheme", ["https", "HTTPS"])
def test_what_is_to_be_asked_by_tls_is_asked_by_nothing_else(
    path: pathlib.Path, world: World, peer: LyingPeer, scheme: str
) -> None:
    url = peer.url.replace("http", scheme)
    result = pulled(path, url, peer_headers={"Authorization": "Bearer se-cret"}, parallel=1)
    assert_right(path, result, "registry", "registry")
    assert peer.requests == []
    (warning,) = result["warnings"]
    assert "certificate" not in warning and "does not speak TLS" in warning and "http://" in warning


@pytest.mark.parametrize("text", ["Auto", "", "docker://user:se-cret@host/x"])
def test_a_delta_that_is_no_reference_is_refused_by_the_name_of_its_option(
    path: pathlib.Path, world: World, text: str
) -> None:
    with pytest.raises(InvalidReference, match="deltas: ") as found:
        pulled(path, deltas=(text,))
    assert "se-cret" not in str(found.value) and world.requests == []
