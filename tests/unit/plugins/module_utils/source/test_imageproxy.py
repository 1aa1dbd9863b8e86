# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.source import imageproxy, skopeo
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    DigestMismatch,
    EngineError,
    InvalidDocument,
    PolicyRejected,
    LimitReached,
    ProxyFailed,
    RegistryUnreachable,
    SkopeoMissing,
    SkopeoTooOld,
    Stalled,
    UnsupportedMediaType,
)
from ansible_collections.composefs.oci.plugins.module_utils.source.imageproxy import ImageProxy, ProxyOptions
from hypothesis import given, settings
from hypothesis import strategies as st

FAKE = str(pathlib.Path(__file__).parents[1] / "fake_proxy.py")
REMOTE = parse_reference("registry.example:5000/x/y:z")
SECRET = "s3cret/pass word"
D = "sha256:" + "a" * 64


def options(plan=None, **more):
    more.setdefault("timeout", 60.0)
    return ProxyOptions(executable=(sys.executable, "-I", "-S", FAKE, json.dumps(plan or {})), **more)


def fake(plan=None, reference=REMOTE, **more):
    return ImageProxy(options(plan, **more), reference)


def drain(fd, size):
    data = bytearray()
    while len(data) < size:
        piece = os.read(fd, size - len(data))
        assert piece
        data += piece
    return bytes(data)


def open_fds():
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def nothing_remains():
    before = open_fds()
    yield
    assert open_fds() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


# -- the protocol


def test_a_document_larger_than_the_pipe_does_not_deadlock():
    with fake({"GetManifest": {"data": "x" * 1000, "times": 300}}) as proxy:
        digest, data = proxy.get_manifest(proxy.open_image())
    assert data == b"x" * 300_000
    assert digest == digests.digest_of(data)
    assert (proxy.version, proxy.protocol_version) == ((0, 2, 8), "0.2.8")


def test_a_document_without_bounds_is_cut_off_and_the_proxy_stays_usable(monkeypatch):
    monkeypatch.setattr(imageproxy, "MAX_MANIFEST", 100_000)
    with fake({"GetManifest": {"data": "x" * 1000, "times": 300}}) as proxy:
        with pytest.raises(InvalidDocument, match="more than 100000 bytes"):
            proxy.get_manifest(1)
        assert proxy.alive
        assert proxy.open_image() == 1


def test_blobs_flow_side_by_side_and_finish_in_any_order():
    with fake({"GetBlob": {"data": "y" * 1000, "times": 200}}) as proxy:
        first = proxy.get_blob(1, D, 200_000)
        second = proxy.get_blob(1, D, 200_000)
        for pipe in (second, first):
            assert not os.get_inheritable(pipe.fd)
            assert drain(pipe.fd, pipe.size) == b"y" * 200_000
            proxy.finish_pipe(pipe.pipeid)
            os.close(pipe.fd)


def test_a_blob_that_breaks_off_is_explained_by_finish_pipe():
    with fake({"GetBlob": {"data": "y" * 1000, "stop": 300, "failure": "unexpected EOF"}}) as proxy:
        pipe = proxy.get_blob(1, D, 1000)
        assert len(drain(pipe.fd, 300)) == 300
        assert not skopeo.readable(pipe.fd, time.monotonic() + 0.05)
        with pytest.raises(RegistryUnreachable, match="unexpected EOF") as caught:
            proxy.finish_pipe(pipe.pipeid, timeout=60)
        assert caught.value.passing
        os.close(pipe.fd)
        assert proxy.open_image() == 1


@pytest.mark.slow
def test_a_blob_that_crawls_is_not_taken_for_dead():
    with fake({"GetBlob": {"data": "z" * 10, "pause": 0.1}}) as proxy:
        pipe = proxy.get_blob(1, D, 10)
        seen = bytearray()

        def read():
            while len(seen) < 10:
                seen.extend(os.read(pipe.fd, 10))

        reader = threading.Thread(target=read)
        reader.start()
        # The whole takes longer than the timeout, and the last byte has always just come, however slow this machine is.
        proxy.finish_pipe(pipe.pipeid, timeout=0.3, last_byte=time.monotonic)
        reader.join()
        os.close(pipe.fd)
    assert bytes(seen) == b"z" * 10


def test_a_blob_that_is_silent_for_good_ends_the_proxy():
    with fake({"FinishPipe": {"sleep": 60}}) as proxy:
        pipe = proxy.get_blob(1, D, 10)
        os.close(pipe.fd)
        with pytest.raises(Stalled):
            proxy.finish_pipe(pipe.pipeid, timeout=0.2, last_byte=lambda: 0.0)
        assert not proxy.alive


def test_a_size_that_is_announced_wrongly_is_noticed_at_once():
    with fake({"GetBlob": {"value": 11}}) as proxy:
        with pytest.raises(DigestMismatch, match="11 bytes.*says 10"):
            proxy.get_blob(1, D, 10)
        assert proxy.open_image() == 1


def test_an_unknown_size_is_accepted():
    with fake({"GetBlob": {"value": -1}}) as proxy:
        pipe = proxy.get_blob(1, D, 1)
        assert drain(pipe.fd, 1) == b"x"
        proxy.finish_pipe(pipe.pipeid)
        os.close(pipe.fd)


@pytest.mark.parametrize("plan", [{"data": "{}x"}, {"data": "{}", "times": 2}, {"data": "[]"}, {"data": "{"}])
def test_a_small_blob_is_verified(plan):
    with fake({"GetBlob": {"value": -1, **plan}}) as proxy, pytest.raises(DigestMismatch):
        proxy.read_blob(1, ocidocuments.Descriptor(ocidocuments.OCI_EMPTY, digests.EMPTY_DIGEST, 2), 100)


@pytest.mark.parametrize(
    ("version", "method"),
    [
        ("0.2.5", "GetLayerInfo"),
        ("0.2.6", "GetLayerInfo"),
        ("0.2.7", "GetLayerInfoPiped"),
        ("0.2.8", "GetLayerInfoPiped"),
    ],
)
def test_layers_are_listed_by_the_method_that_the_version_has(version, method):
    layers = [{"digest": D, "size": 5, "media_type": "application/vnd.oci.image.layer.v1.tar"}] * 200
    plan = {"version": version, method: {"data": json.dumps(layers)}}
    with fake(plan, parse_reference("containers-storage:localhost/x"), insecure_policy=True) as proxy:
        assert proxy.layer_infos(1) == (ocidocuments.Descriptor("application/vnd.oci.image.layer.v1.tar", D, 5),) * 200


@pytest.mark.parametrize(
    "item",
    [
        5,
        None,
        {},
        {"digest": "x", "size": 1, "media_type": "x"},
        {"digest": D, "size": -1, "media_type": "x"},
        {"digest": D, "size": 1},
    ],
)
def test_a_nonsensical_list_of_layers_is_refused(item):
    with (
        fake({"GetLayerInfoPiped": {"data": json.dumps([item])}}) as proxy,
        pytest.raises(ProxyFailed, match="GetLayerInfo"),
    ):
        proxy.layer_infos(1)


def test_containers_storage_needs_a_newer_skopeo_and_says_which():
    proxy = fake({"version": "0.2.3"}, parse_reference("containers-storage:localhost/x"))
    with pytest.raises(SkopeoTooOld, match=r"skopeo 1\.11"):
        proxy.start()


@pytest.mark.parametrize("version", ["0.2.2", "0.1.9", "0.0.0"])
def test_a_protocol_that_is_too_old_is_refused(version):
    with pytest.raises(SkopeoTooOld, match=r"0\.2\.3 is needed"):
        fake({"version": version}).start()


@pytest.mark.parametrize("version", [5, None, "", "x", "0.2", ["0.2.3"]])
def test_a_version_that_is_none_is_refused(version):
    with pytest.raises(ProxyFailed, match="Initialize"):
        fake({"version": version}).start()


def test_error_codes_of_0_2_8_tell_what_may_pass():
    with (
        fake({"OpenImage": {"error": "something odd", "code": "retryable"}}) as proxy,
        pytest.raises(RegistryUnreachable, match="something odd"),
    ):
        proxy.open_image()
    with (
        fake({"OpenImage": {"error": "something odd", "code": "other"}}) as proxy,
        pytest.raises(ProxyFailed, match="something odd"),
    ):
        proxy.open_image()


# -- faults


@pytest.mark.parametrize(
    "packet",
    [
        "garbage",
        "{",
        "[]",
        "null",
        "{}",
        '{"success":1}',
        '{"success":true,"pipeid":-1}',
        '{"success":true,"pipeid":"x"}',
        '{"success":true,"success":true}',
        '{"success":false,"error":5}',
    ],
)
def test_a_garbled_reply_ends_the_proxy(packet):
    with fake({"OpenImage": {"raw": packet}}) as proxy:
        with pytest.raises(ProxyFailed, match="OpenImage") as caught:
            proxy.open_image()
        assert not caught.value.passing
        assert not proxy.alive
        with pytest.raises(ProxyFailed):
            proxy.open_image()


@pytest.mark.parametrize("value", [0, -1, True, "1", None, 1.5, 2**60])
def test_a_nonsensical_image_number_ends_the_proxy(value):
    with (
        fake({"OpenImage": {"raw": json.dumps({"success": True, "value": value, "pipeid": 0, "error": ""})}}) as proxy,
        pytest.raises(ProxyFailed),
    ):
        proxy.open_image()


@pytest.mark.parametrize("value", [None, 5, "", "x", "sha256:abc"])
def test_a_nonsensical_manifest_digest_is_refused(value):
    with fake({"GetManifest": {"value": value}}) as proxy, pytest.raises((ProxyFailed, UnsupportedMediaType)):
        proxy.get_manifest(1)


@pytest.mark.parametrize(
    ("method", "fds", "pipeid"),
    [
        ("OpenImage", 1, 0),
        ("OpenImage", 3, 7),
        ("GetBlob", 0, 7),
        ("GetBlob", 1, 0),
        ("GetBlob", 2, 7),
        ("GetBlob", 40, 7),
    ],
)
def test_unexpected_descriptors_are_closed_and_end_the_proxy(method, fds, pipeid):
    with fake({method: {"fds": fds, "pipeid": pipeid, "value": 1}}) as proxy, pytest.raises(ProxyFailed, match=method):
        proxy.open_image() if method == "OpenImage" else proxy.get_blob(1, D, 1)


def test_a_file_for_which_there_is_no_room_is_told_as_the_limit(request):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with fake({}) as proxy:
        image = proxy.open_image()
        held = [os.open(os.devnull, os.O_RDONLY)]
        request.addfinalizer(lambda: [os.close(fd) for fd in held])
        request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(LimitReached, match="RLIMIT_NOFILE"):
            proxy.get_manifest(image)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_reply_that_was_cut_is_refused(monkeypatch):
    monkeypatch.setattr(imageproxy, "REPLY", 1000)
    with fake({"OpenImage": {"error": "x" * 5000}}) as proxy, pytest.raises(ProxyFailed, match="too long"):
        proxy.open_image()


@pytest.mark.parametrize("method", ["Initialize", "OpenImage", "GetManifest", "FinishPipe"])
def test_nothing_waits_for_ever(method):
    start = time.monotonic()
    proxy = fake({method: {"sleep": 60}}, timeout=0.4)
    with contextlib.ExitStack() as stack:
        with pytest.raises(Stalled, match="no answer") as caught:
            stack.enter_context(proxy)
            proxy.get_manifest(proxy.open_image())
        assert caught.value.passing
        assert not proxy.alive
        with pytest.raises(ProxyFailed, match="not running"):
            proxy.open_image()
    assert time.monotonic() - start < 50


def test_a_pipe_that_stays_silent_is_a_stall():
    with fake({"GetManifest": {"data": "x" * 10, "stop": 5}, "FinishPipe": {"sleep": 60}}) as proxy:
        proxy.options = dataclasses.replace(proxy.options, timeout=0.2)
        with pytest.raises(Stalled):
            proxy.get_manifest(1)


def test_a_document_that_drips_is_a_stall_in_the_end():
    with fake({"GetManifest": {"data": "x" * 5000, "pause": 0.02}}) as proxy:
        proxy.options = dataclasses.replace(proxy.options, timeout=0.06)
        start = time.monotonic()
        with pytest.raises(Stalled):
            proxy.get_manifest(1)
        assert time.monotonic() - start < 60


@pytest.mark.parametrize("method", ["OpenImage", "GetManifest", "FinishPipe"])
@pytest.mark.parametrize(("plan", "how"), [({"exit": 3}, "status 3"), ({"signal": 9}, "signal 9")])
def test_a_skopeo_that_dies_is_told_with_its_words(method, plan, how):
    log = 'time="2024-01-01T00:00:00Z" level=fatal msg="it \\"broke\\" here"\n'
    with fake({method: {"stderr": log, **plan}}) as proxy, pytest.raises(ProxyFailed) as caught:
        proxy.get_manifest(proxy.open_image())
    assert how in str(caught.value)
    assert 'it "broke" here' in str(caught.value)
    assert caught.value.passing
    assert "level=" not in str(caught.value)


def test_a_skopeo_that_dies_at_once_says_why():
    with pytest.raises(SkopeoTooOld, match='unknown command "experimental-image-proxy"'):
        fake({"Initialize": {"stderr": 'unknown command "experimental-image-proxy" for "skopeo"\n', "exit": 1}}).start()
    with pytest.raises(AuthFailed, match="authentication file"):
        fake({"Initialize": {"stderr": "credential file is not accessible: authentication file\n", "exit": 1}}).start()
    with pytest.raises(ProxyFailed, match="status 1"):
        fake({"Initialize": {"exit": 1}}).start()


@pytest.mark.parametrize("executable", [("true",), ("cat",), ("echo", "x")])
def test_another_program_is_not_taken_for_skopeo(executable):
    with pytest.raises(ProxyFailed, match="executable"):
        ImageProxy(ProxyOptions(executable=executable, timeout=2), REMOTE).start()


def test_a_missing_program_is_told():
    for executable in ("/nonexistent/skopeo", "/", "/etc/passwd"):
        with pytest.raises(SkopeoMissing, match="executable"):
            ImageProxy(ProxyOptions(executable=(executable,)), REMOTE).start()


def test_chatter_on_stderr_neither_blocks_nor_fills_the_memory():
    with fake({"OpenImage": {"stderr": "x" * 99 + "\n", "times": 30_000}, "GetManifest": {"exit": 1}}) as proxy:
        assert proxy.open_image() == 1
        with pytest.raises(ProxyFailed) as caught:
            proxy.get_manifest(1)
    assert len(str(caught.value)) < 3000


def test_kill_from_another_thread_ends_a_request_at_once():
    with fake({"OpenImage": {"sleep": 60}}, timeout=90) as proxy:
        timer = threading.Timer(0.2, proxy.kill, ["the pull was given up"])
        timer.start()
        start = time.monotonic()
        with pytest.raises(ProxyFailed, match="the pull was given up") as caught:
            proxy.open_image()
        assert caught.value.passing
        assert time.monotonic() - start < 50
        timer.join()
        proxy.kill()


def test_kill_does_not_depend_on_reaching_every_process():
    wrapper = (
        "import os, sys\nif os.fork() == 0:\n    os.setsid()\n    os.execv(sys.argv[1], sys.argv[1:])\nos.wait()\n"
    )
    executable = (sys.executable, "-I", "-S", "-c", wrapper, *options({"OpenImage": {"sleep": 60}}).executable)
    with ImageProxy(ProxyOptions(executable=executable, timeout=90), REMOTE) as proxy:
        timer = threading.Timer(0.2, proxy.kill)
        timer.start()
        start = time.monotonic()
        with pytest.raises(ProxyFailed):
            proxy.open_image()
        assert time.monotonic() - start < 50
        timer.join()


def test_close_does_not_wait_for_a_skopeo_that_stays():
    start = time.monotonic()
    with fake({"linger": 60}):
        pass
    assert time.monotonic() - start < 50


def test_requests_of_several_threads_do_not_mix():
    with fake({"GetManifest": {"data": "x" * 100_000}}) as proxy:
        results = []
        threads = [threading.Thread(target=lambda: results.append(proxy.get_manifest(1)[0])) for _each in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [digests.digest_of(b"x" * 100_000)] * 8


def test_skopeo_dies_with_the_process_that_started_it(tmp_path):
    script = (
        "import sys, os, json, signal\n"
        "sys.path[:0] = json.loads(sys.argv[1])\n"
        "import importlib.util\n"
        "spec = importlib.util.spec_from_file_location('shim', sys.argv[3])\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "from ansible_collections.composefs.oci.plugins.module_utils.source import imageproxy\n"
        "from ansible_collections.composefs.oci.plugins.module_utils.formats import reference\n"
        "proxy = imageproxy.ImageProxy(imageproxy.ProxyOptions(executable=tuple(json.loads(sys.argv[2]))), "
        "reference.parse_reference('a.example/b'))\n"
        "proxy.start()\n"
        "os.dup2(os.dup(proxy.fileno()), 200)\n"
        "if os.fork() == 0:\n"  # somebody else keeps the connection open
        "    signal.alarm(60); signal.pause()\n"
        "print(proxy._child.process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    shim = str(pathlib.Path(__file__).resolve().parents[3] / "conftest.py")
    executable = list(options({"linger": 60}).executable)
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(sys.path), json.dumps(executable), shim],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + 50
        while time.monotonic() < deadline:
            try:
                state = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                break
            if state == "Z":
                break
            time.sleep(0.01)
        else:
            pytest.fail("skopeo outlived its parent")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def test_a_forked_process_can_let_go_of_the_connection():
    with fake() as proxy:
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                proxy.abandon()
                with contextlib.suppress(ProxyFailed):
                    proxy.open_image()
                    os._exit(2)
                code = 0 if proxy.fileno() == -1 else 3
            os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert proxy.open_image() == 1


# -- secrets and options


def portrait(reference=REMOTE, **more):
    with fake({"GetManifest": {"portrait": True}}, reference, **more) as proxy:
        return json.loads(proxy.get_manifest(1)[1])


def test_credentials_are_in_a_private_file_for_one_registry_only():
    seen = portrait(username="me", password=SECRET)
    (host, entry), *rest = json.loads(seen["auth"])["auths"].items()
    import base64

    assert not rest
    assert (host, base64.b64decode(entry["auth"]).decode()) == ("registry.example:5000", f"me:{SECRET}")
    assert seen["mode"] == "0o600"
    assert SECRET not in " ".join(seen["argv"]) + seen["environ"]
    assert entry["auth"] not in " ".join(seen["argv"]) + seen["environ"]
    assert len(seen["fds"]) == 4  # 0, 1, 2 and the file


def test_credentials_for_docker_io_are_under_its_name():
    assert list(
        json.loads(portrait(parse_reference("docker://fedora"), username="me", password="x")["auth"])["auths"]
    ) == ["docker.io"]


def test_local_transports_get_no_credentials():
    assert portrait(parse_reference("dir:/x"), username="me", password=SECRET)["auth"] == ""


def test_skopeo_inherits_no_descriptors():
    with open(os.devnull) as file:
        os.set_inheritable(file.fileno(), True)
        assert portrait()["fds"] == [0, 1, 2]


def test_options_reach_the_command_line(tmp_path):
    auth = tmp_path / "auth.json"
    auth.write_text("{}")
    policy = tmp_path / "policy.json"
    policy.write_text("{}")
    argv = portrait(
        auth_file=str(auth),
        tls_verify=False,
        cert_dir=str(tmp_path),
        policy=str(policy),
        insecure_policy=True,
        platform=ocidocuments.Platform("linux", "arm64", "v8"),
        tmpdir="/t",
    )["argv"]
    verb = argv.index("experimental-image-proxy")
    assert argv[:verb] == [
        *("--policy", str(policy), "--insecure-policy", "--tmpdir", "/t"),
        *("--override-os", "linux", "--override-arch", "arm64", "--override-variant", "v8"),
    ]
    assert argv[verb + 1 :] == ["--tls-verify=false", "--cert-dir", str(tmp_path), "--authfile", str(auth)]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"username": "x"}, AuthFailed),
        ({"password": "x"}, AuthFailed),
        ({"username": "a:b", "password": "x"}, AuthFailed),
        ({"username": "a", "password": "x", "auth_file": "/etc/passwd"}, AuthFailed),
        ({"auth_file": "/nonexistent"}, AuthFailed),
        ({"cert_dir": "/nonexistent"}, EngineError),
        ({"policy": "/nonexistent"}, PolicyRejected),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_started(more, error):
    with pytest.raises(error):
        fake({}, **more).start()


def test_secrets_never_reach_a_message():
    words = (
        f"bad {SECRET} s3cret%2Fpass%20word s3cret%2Fpass+word https://me:{SECRET[:6]}@h.example/x?X-Sig=abc123 "
        f"Authorization: Basic bWU6czNjcmV0"
    )
    with (
        fake({"OpenImage": {"error": words}}, username="me", password=SECRET) as proxy,
        pytest.raises(ProxyFailed) as caught,
    ):
        proxy.open_image()
    for secret in (SECRET, "s3cret%2F", "abc123", "bWU6", "s3cret@"):
        assert secret not in str(caught.value)
    assert SECRET not in repr(ProxyOptions(username="me", password=SECRET))
    with (
        fake({"OpenImage": {"raw": SECRET}}, username="me", password=SECRET) as proxy,
        pytest.raises(ProxyFailed) as caught,
    ):
        proxy.open_image()
    assert SECRET not in str(caught.value)


def test_without_root_containers_storage_goes_through_podman(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    reference = parse_reference("containers-storage:x")
    with skopeo.command(ProxyOptions(), reference, ("verb",), ()) as (argv, _fds):
        assert argv == ["podman", "unshare", "skopeo", "verb"]
    with skopeo.command(ProxyOptions(), REMOTE, ("verb",), ()) as (argv, _fds):
        assert argv == ["skopeo", "verb"]
    with skopeo.command(ProxyOptions(executable=("sudo", "skopeo")), reference, ("verb",), ()) as (argv, _fds):
        assert argv == ["sudo", "skopeo", "verb"]
    if not shutil.which("podman"):
        with pytest.raises(SkopeoMissing, match="podman"):
            ImageProxy(ProxyOptions(), reference).start()


# -- any bytes as replies


class Wire:
    """A proxy whose other end is in the test's hands."""

    def __init__(self):
        self.ours, self.theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.proxy = ImageProxy(ProxyOptions(timeout=0.2), REMOTE)
        self.proxy._socket = self.ours

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.theirs.close()
        self.proxy.close()


replies = st.fixed_dictionaries(
    {},
    optional={
        "success": st.booleans() | st.none(),
        "value": st.none() | st.integers() | st.text(max_size=5) | st.just(D) | st.lists(st.integers(), max_size=2),
        "pipeid": st.integers(-2, 2**33) | st.just(0) | st.text(max_size=2),
        "error": st.text(max_size=30) | st.none(),
        "error_code": st.text(max_size=3) | st.just("retryable"),
    },
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.binary(min_size=1, max_size=60) | replies.map(lambda item: json.dumps(item).encode()), st.integers(0, 3)
        ),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 4),
)
def test_any_replies_raise_engine_errors_only(packets, method):
    with Wire() as wire:
        for packet, fds in packets:
            rights = [os.open(os.devnull, os.O_RDONLY) for _each in range(fds)]
            wire.theirs.sendmsg(
                [packet], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", rights))] if rights else []
            )
            for fd in rights:
                os.close(fd)
        wire.theirs.shutdown(socket.SHUT_WR)
        try:
            result = [
                wire.proxy._initialize,
                wire.proxy.open_image,
                lambda: wire.proxy.get_manifest(1),
                lambda: wire.proxy.get_blob(1, D, 5),
                lambda: wire.proxy.read_blob(1, ocidocuments.Descriptor("x/y", D, 0), 10),
            ][method]()
        except EngineError as error:
            assert str(error).isprintable()
        else:
            if isinstance(result, imageproxy.BlobPipe):
                os.close(result.fd)
