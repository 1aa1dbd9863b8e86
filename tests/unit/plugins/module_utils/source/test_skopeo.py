# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.source import policy as rules, skopeo, skopeowords
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    AuthFailed,
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InvalidDocument,
    InvalidReference,
    NoSpace,
    PermissionDenied,
    PlatformNotFound,
    PolicyRejected,
    ProxyFailed,
    RegistryUnreachable,
    SkopeoTooOld,
    TlsFailed,
    UnsupportedMediaType,
)
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = ProxyOptions(username="me", password="s3cret")

# What skopeo 1.9.3 and 1.18 said in front of a registry, of servers that failed on purpose, and of missing files.
HEARD = [
    ("reading manifest v1 in r.example/x: manifest unknown: manifest unknown", ImageNotFound),
    ("reading manifest v1 in r.example/x: manifest unknown", ImageNotFound),
    ("reading manifest x in r.example/x: name unknown: something", ImageNotFound),
    ("reading manifest x in r.example/x: StatusCode: 404, oops", ImageNotFound),
    ('no descriptor found for reference "nope"', ImageNotFound),
    ("open /a/nope/index.json: no such file or directory", ImageNotFound),
    ("creating temp directory: open /a/nope.tar: no such file or directory", ImageNotFound),
    ('creating temp directory: archive file not found: "/a/nope.tar"', ImageNotFound),
    ('Tag "docker.io/x/one:v2" not found', ImageNotFound),
    (
        'reference "[overlay@/a+/b]localhost/x:y" does not resolve to an image ID: identifier is not an image',
        ImageNotFound,
    ),
    ("reading manifest v1 in r.example/x: unauthorized: authentication required", AuthFailed),
    ("reading manifest v1 in r.example/x: authentication required", AuthFailed),
    ("reading manifest x in r.example/x: denied: something", AuthFailed),
    ("reading manifest x in r.example/x: StatusCode: 403, oops", AuthFailed),
    (
        'getting username and password: 1 error occurred:\n\t* reading JSON file "/a": unmarshaling JSON at "/a": '
        "invalid character",
        AuthFailed,
    ),
    (
        'pinging container registry r.example: Get "https://r.example/v2/": http: server gave HTTP response to HTTPS '
        "client",
        TlsFailed,
    ),
    (
        'pinging container registry r.example: Get "https://r.example/v2/": x509: certificate signed by unknown '
        "authority",
        TlsFailed,
    ),
    (
        'Get "https://r.example/v2/": tls: failed to verify certificate: x509: certificate signed by unknown authority',
        TlsFailed,
    ),
    ('Get "https://r.example/v2/": net/http: TLS handshake timeout', RegistryUnreachable),
    ('Get "http://r.example/v2/": dial tcp 127.0.0.1:1: connect: connection refused', RegistryUnreachable),
    ("dial tcp: lookup r.example on 127.0.0.1:53: no such host", RegistryUnreachable),
    ("dial tcp: lookup r.example: Temporary failure in name resolution", RegistryUnreachable),
    ("dial tcp 10.0.0.1:5000: i/o timeout", RegistryUnreachable),
    ("dial tcp 10.0.0.1:5000: connect: network is unreachable", RegistryUnreachable),
    ("read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer", RegistryUnreachable),
    ('Get "http://r.example/v2/x/manifests/x": EOF', RegistryUnreachable),
    ("unexpected EOF", RegistryUnreachable),
    (
        "reading manifest x in r.example/x: received unexpected HTTP status: 500 Internal Server Error",
        RegistryUnreachable,
    ),
    (
        "reading manifest x in r.example/x: received unexpected HTTP status: 503 Service Unavailable",
        RegistryUnreachable,
    ),
    ("reading manifest x in r.example/x: StatusCode: 429, oops", RegistryUnreachable),
    ("reading manifest x in r.example/x: toomanyrequests: slow down", RegistryUnreachable),
    ("context deadline exceeded", RegistryUnreachable),
    (
        "loading image from docker engine: Cannot connect to the Docker daemon at unix:///var/run/docker.sock.",
        RegistryUnreachable,
    ),
    ('no image found in image index for architecture s390x, variant "", OS linux', PlatformNotFound),
    ('no image found in manifest list for architecture "arm64", variant "v7", OS "linux"', PlatformNotFound),
    ("Running image docker://r.example/x:y is rejected by policy.", PolicyRejected),
    ("Source image rejected: Running image oci:/a:b is rejected by policy.", PolicyRejected),
    ("A signature was required, but no signature exists", PolicyRejected),
    ("open /etc/containers/policy.json: no such file or directory", PolicyRejected),
    ("more than one image in oci, choose an image", InvalidReference),
    ("corrupted blob, expecting sha256:aa, got sha256:bb", DigestMismatch),
    ("expected 94 bytes in blob, got 99", DigestMismatch),
    ("write /var/tmp/x: no space left on device", NoSpace),
    ("open /a/manifest.json: permission denied", PermissionDenied),
    (
        "unsupported legacy manifest MIME type application/vnd.docker.distribution.manifest.v1+json",
        UnsupportedMediaType,
    ),
    ("no FSLayers in manifest", UnsupportedMediaType),
    ("exceeded maximum allowed size of 4194304 bytes", InvalidDocument),
    ("unknown flag: --nope", SkopeoTooOld),
    ("invalid character '<' looking for beginning of value", ProxyFailed),
    ("", ProxyFailed),
]


@pytest.mark.parametrize(("words", "kind"), HEARD)
def test_what_skopeo_says_becomes_an_error_with_a_code(words, kind):
    error = skopeowords.classify(OPTIONS, "Opening x", words)
    assert error.__class__ is kind
    assert "Opening x: skopeo " in error.text
    assert kind is ProxyFailed or error.hint


def test_what_may_pass_is_tried_again_and_nothing_else():
    retryable = {kind for words, kind in HEARD if skopeowords.classify(OPTIONS, "x", words).passing}
    assert retryable == {RegistryUnreachable}


@pytest.mark.parametrize("name", ["unauthorized", "denied", "x509", "timeout", "eof", "policy.json"])
def test_the_name_of_an_image_is_not_taken_for_words(name):
    words = f"reading manifest {name} in r.example/{name}/{name}: manifest unknown"
    assert skopeowords.classify(OPTIONS, "x", words).__class__ is ImageNotFound
    assert (
        skopeowords.classify(OPTIONS, "x", f"open /srv/{name}/index.json: no such file or directory").__class__
        is ImageNotFound
    )


def test_the_error_code_of_new_proxies_helps_where_the_words_do_not():
    assert skopeowords.classify(OPTIONS, "x", "odd", "retryable").__class__ is RegistryUnreachable
    assert skopeowords.classify(OPTIONS, "x", "odd", "other").__class__ is ProxyFailed
    assert skopeowords.classify(OPTIONS, "x", "manifest unknown", "retryable").__class__ is ImageNotFound


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (b'time="2024-01-01T00:00:00Z" level=fatal msg="a \\"b\\" c"\n', 'a "b" c'),
        (b'time="2024-01-01T00:00:00Z" level=fatal msg=short\n', "short"),
        (b'time="x" level=warning msg="w"\ntime="x" level=error msg="e"\ntime="x" level=fatal msg="f"\n', "e\nf"),
        (b'time="x" level=warning msg="w"\n', "w"),
        (b'level=error msg="a \\x01 b"', "a \\x01 b"),
        (b"Error: plain words\nmore\n", "Error: plain words\nmore"),
        (b"plain" + b"\0" * 100, "plain"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"", ""),
    ],
)
def test_the_loggers_decoration_is_taken_off(log, words):
    assert skopeowords.unwrap_log(log) == words


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("a\tb\nc  d", "a b c d"),
        ("\x1b[31mred\x07", "[31mred"),
        ("with s3cret in it", "with *** in it"),
        ("bWU6czNjcmV0", "***"),
        ("https://u:p@h.example/x", "https://***@h.example/x"),
        ('Get "https://h.example/x?X-Sig=1&y=2": EOF', 'Get "https://h.example/x?***": EOF'),
        ("authorization: Bearer abcdefghijkl.mno-p_q", "authorization: Bearer ***"),
    ],
)
def test_a_message_is_one_clean_line(text, clean):
    assert skopeowords.scrub(OPTIONS, text) == clean


@pytest.mark.slow
def test_any_amount_of_words_costs_little_and_keeps_the_cause():
    start = time.perf_counter()
    for filler in ("x", "/", "://", " ", "\\", '"', "x/", "://x?", "bearer "):
        words = "first " + filler * (250_000 // len(filler)) + " manifest unknown"
        error = skopeowords.classify(OPTIONS, "x", words)
        assert len(str(error)) < 2500
        assert skopeowords.unwrap_log(b'level=error msg="' + words.encode())
    assert time.perf_counter() - start < 60, "what grows with the square takes hours"
    assert skopeowords.classify(OPTIONS, "x", "first " + "y " * 9000 + "manifest unknown").__class__ is ImageNotFound


def test_a_secret_is_not_cut_into_a_piece_that_remains():
    for length in range(980, 1010):
        words = "x" * length + " s3cret https://h.example/?sig=" + "q" * 5000
        assert "cret" not in skopeowords.scrub(OPTIONS, words)
        assert "qqq" not in skopeowords.scrub(OPTIONS, words)
    assert skopeowords.scrub(OPTIONS, "first " + "y " * 9000 + "the cause").endswith("y the cause")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.binary(max_size=200))
def test_any_words_become_a_printable_error(words, log):
    error = skopeowords.classify(OPTIONS, "Opening", words)
    assert isinstance(error, EngineError) and str(error).isprintable()
    assert skopeowords.scrub(OPTIONS, skopeowords.unwrap_log(log)).isprintable()


# -- the signature policy

ANY = {"type": "insecureAcceptAnything"}


@pytest.mark.parametrize(
    "policy",
    [
        {"default": [ANY]},
        {"default": [ANY, ANY]},
        {"default": [ANY], "transports": {}},
        {"default": [ANY], "transports": {"docker-daemon": {"": [ANY]}, "docker": {}}},
    ],
)
def test_a_policy_that_accepts_anything_needs_no_enforcement(tmp_path, policy):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    assert not rules.policy_demand(str(path))
    rules.check_unenforced_policy(ProxyOptions(policy=str(path)))


@pytest.mark.parametrize(
    "policy",
    [
        {"default": [{"type": "reject"}]},
        {"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/x"}]},
        {"default": [ANY, {"type": "reject"}]},
        {"default": [ANY], "transports": {"docker": {"r.example/x": [{"type": "sigstoreSigned", "keyPath": "/x"}]}}},
        {"default": [ANY], "transports": {"docker": {"r.example": [{"type": "reject"}]}}},
        {"default": [ANY], "transports": {"docker": None}},
        {"default": [ANY], "transports": []},
        {"default": []},
        {"default": {}},
        {"default": [dict(ANY, more=1)]},
        {},
        [],
        None,
    ],
)
def test_a_policy_that_asks_for_more_is_refused_where_it_is_not_enforced(tmp_path, policy):
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(policy))
    with pytest.raises(SkopeoTooOld, match="unenforced_policy") as caught:
        rules.check_unenforced_policy(ProxyOptions(policy=str(path)))
    assert str(path) in str(caught.value)
    rules.check_unenforced_policy(ProxyOptions(policy=str(path), unenforced_policy="ignore"))
    rules.check_unenforced_policy(ProxyOptions(policy=str(path), insecure_policy=True))


@pytest.mark.parametrize(
    "content", ["", "{", '{"default":[{"type":"insecureAcceptAnything"}],"default":[{"type":"reject"}]}', "\0"]
)
def test_a_policy_that_cannot_be_read_does_not_accept_anything(tmp_path, content):
    path = tmp_path / "policy.json"
    path.write_text(content)
    assert rules.policy_demand(str(path))
    assert rules.policy_demand(str(tmp_path / "missing.json"))
    assert rules.policy_demand(str(tmp_path))


def test_the_users_policy_comes_before_the_systems(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert rules.policy_path(None) == "/etc/containers/policy.json"
    users = tmp_path / ".config" / "containers" / "policy.json"
    users.parent.mkdir(parents=True)
    users.write_text('{"default":[{"type":"reject"}]}')
    assert rules.policy_path(None) == str(users)
    assert rules.policy_demand()
    assert rules.policy_path("/given.json") == "/given.json"


# -- what was asked of what


@pytest.mark.parametrize(
    "words",
    [
        "unexpected EOF",
        "connection refused",
        "i/o timeout",
        "unauthorized: authentication required",
        "x509: certificate signed by unknown authority",
    ],
)
@pytest.mark.parametrize("transport", ["dir", "docker-archive", "oci-archive", "containers-storage", "docker-daemon"])
def test_a_local_transport_gives_no_code_of_a_network_and_is_not_retried(words, transport):
    error = skopeowords.classify(ProxyOptions(), f"Opening {transport}:x", words, transport=transport)
    assert error.code not in ("registry_unreachable", "auth_failed", "tls_failed", "stalled") and not error.passing
    assert "registry" not in error.hint and "network" not in error.hint


@pytest.mark.parametrize(
    "words",
    [
        "pinging container registry r.example: Get https://r.example/v2/: Proxy Authentication Required",
        "invalid status code from registry 407 (Proxy Authentication Required)",
    ],
)
def test_a_proxy_that_wants_credentials_is_not_the_registry(words):
    error = skopeowords.classify(ProxyOptions(), "Opening docker://r.example/x", words)
    assert error.code == "registry_unreachable" and not error.passing
    assert "proxy" in error.hint.lower() and "auth_file" not in error.hint


GET = 'pinging container registry r.example: Get "https://r.example/v2/": '


@pytest.mark.parametrize("words", ["Bad Gateway", "Service Unavailable", "Gateway Timeout", "Gateway Time-out"])
def test_a_proxy_that_cannot_reach_the_registry_is_asked_again(words):
    error = skopeowords.classify(ProxyOptions(), "Opening docker://r.example/x", GET + words)
    assert error.code == "registry_unreachable" and error.passing


def test_a_proxy_that_refuses_is_not_the_registry():
    error = skopeowords.classify(ProxyOptions(), "Opening docker://r.example/x", GET + "Forbidden")
    assert error.code == "registry_unreachable" and not error.passing and "NO_PROXY" in error.hint
    registry = "pinging container registry r.example: invalid status code from registry 403 (Forbidden)"
    assert skopeowords.classify(ProxyOptions(), "Opening docker://r.example/x", registry).code == "auth_failed"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("Opening docker-archive:x", "loading tar component manifest.json: archive/tar: invalid tar header"),
        ("Opening docker-archive:x", "loading tar component manifest.json: file does not exist"),
        ("Opening docker-archive:x", "loading tar component manifest.json: unexpected EOF"),
        ("Reading the manifest of dir:x", "unexpected end of JSON input"),
        ("Reading the manifest of dir:x", "invalid character 'x' looking for beginning of value"),
    ],
)
def test_a_local_image_of_which_a_part_is_damaged_is_damaged(what, words):
    transport = what.split()[-1].partition(":")[0]
    error = skopeowords.classify(ProxyOptions(), what, words, transport=transport)
    assert error.code == "invalid_document" and not error.passing and "make it again" in error.hint


def test_a_local_image_of_which_a_part_is_missing_is_incomplete():
    words = "open x/0: no such file or directory"
    error = skopeowords.classify(ProxyOptions(), "Reading the blob sha256:0 of dir:x", words, transport="dir")
    assert error.code == "image_not_found" and "incomplete" in error.hint and "tag" not in error.hint


@pytest.mark.parametrize("what", ["Opening docker-archive:x", "Reading the manifest of dir:x"])
def test_a_local_image_that_is_not_there_is_not_found(what):
    error = skopeowords.classify(ProxyOptions(), what, "open x: no such file or directory", transport="dir")
    assert error.code == "image_not_found"


@pytest.mark.parametrize(
    ("options", "whose"),
    [
        ({}, "No credentials were given"),
        ({"username": "puller", "password": "s3cret-word"}, "those of the user puller."),
        ({"auth_file": "/etc/auth.json"}, "those in /etc/auth.json"),
    ],
)
def test_credentials_that_are_refused_are_named_and_not_shown(options: dict[str, str], whose: str) -> None:
    error = skopeowords.classify(
        ProxyOptions(**options), "Opening docker://r.test/x", "unauthorized: authentication required"
    )
    assert isinstance(error, AuthFailed) and whose in str(error) and "s3cret" not in str(error)


@pytest.mark.parametrize(("executable", "said"), [("/bin/true", "gave no manifest"), ("/bin/false", "said nothing")])
def test_a_program_that_is_not_skopeo_is_told_apart_from_a_damaged_image(executable: str, said: str) -> None:
    options = ProxyOptions(executable=(executable,))
    with pytest.raises(ProxyFailed, match=f"{said}.*executable"):
        skopeo.top_digest(options, parse_reference("docker://127.0.0.1:1/app:1"))
