# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import hashlib
import json
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import oci
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    EngineError,
    InvalidDocument,
    InvalidReference,
    PlatformNotFound,
    UnsupportedMediaType,
)
from hypothesis import given, settings
from hypothesis import strategies as st

D = "sha256:" + "a" * 64
E = "sha256:" + "b" * 64
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def descriptor(**changes):
    value = {"mediaType": GZIP, "digest": D, "size": 10}
    value.update(changes)
    return value


def manifest(**changes):
    value = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "config": descriptor(mediaType=oci.OCI_CONFIG),
        "layers": [descriptor(), descriptor(digest=E)],
    }
    value.update(changes)
    return {key: item for key, item in value.items() if item is not ...}


def config(**changes):
    value = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [D, E]}}
    value.update(changes)
    return {key: item for key, item in value.items() if item is not ...}


def raw(value):
    return json.dumps(value).encode()


# -- references


@pytest.mark.parametrize(
    ("text", "skopeo"),
    [
        ("quay.example/x/y:tag", "docker://quay.example/x/y:tag"),
        ("quay.example/x", "docker://quay.example/x"),
        ("localhost/x", "docker://localhost/x"),
        ("localhost:5000/x", "docker://localhost:5000/x"),
        ("registry:5000/x:1", "docker://registry:5000/x:1"),
        ("[::1]:5000/x:y", "docker://[::1]:5000/x:y"),
        ("docker://quay.example/x:y", "docker://quay.example/x:y"),
        ("registry:quay.example/x:y", "docker://quay.example/x:y"),
        ("docker://fedora:40", "docker://docker.io/library/fedora:40"),
        ("docker.io/alpine", "docker://docker.io/library/alpine"),
        ("index.docker.io/a/b", "docker://docker.io/a/b"),
        ("oci:/a/b:c", "oci:/a/b:c"),
        ("oci-archive:/a.tar", "oci-archive:/a.tar"),
        ("docker-archive:/a.tar:x/y:z", "docker-archive:/a.tar:x/y:z"),
        ("dir:/a:b", "dir:/a:b"),
        ("containers-storage:localhost/x:y", "containers-storage:localhost/x:y"),
        ("containers-storage:[vfs@/a+/b]localhost/x", "containers-storage:[vfs@/a+/b]localhost/x"),
        ("docker-daemon:x:y", "docker-daemon:x:y"),
    ],
)
def test_references_as_people_write_them(text, skopeo):
    reference = oci.parse_reference(text)
    assert reference.text == skopeo
    assert reference.original == text


@pytest.mark.parametrize("prefix", ["", "docker://", "registry:"])
def test_the_digest_wins_over_the_tag(prefix):
    text = f"{prefix}quay.example/x/y:tag@{D}"
    reference = oci.parse_reference(text)
    assert reference.text == f"docker://quay.example/x/y@{D}"
    assert (reference.original, reference.tag, reference.digest) == (text, "tag", D)


def test_a_leading_sha256_of_containers_storage_is_stripped():
    assert oci.parse_reference("containers-storage:sha256:abc").text == "containers-storage:abc"
    assert oci.parse_reference("containers-storage:[vfs@/a]sha256:abc").text == "containers-storage:[vfs@/a]sha256:abc"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "HOST/NAME:TAG"),
        ("docker:quay.example/x", "docker://"),
        ("docker://", "HOST"),
        ("registry:", "HOST"),
        ("oci:", "PATH"),
        ("oci::tag", "PATH"),
        ("dir:", "PATH"),
        ("containers-storage:", "NAME"),
        ("containers-storage:sha256:", "NAME"),
        ("./x", "oci:PATH"),
        ("/x", "dir:PATH"),
        ("~/x", "dir:PATH"),
        ("dri:/x", "containers-storage:"),
        ("ostree:/x", "containers-storage:"),
        ("foo://x", "containers-storage:"),
        ("https://quay.example/x", "scheme"),
        ("fedora:40", "docker.io/library/fedora:40"),
        ("fedora", "docker.io/library/fedora"),
        ("a/b", "docker.io"),
        ("quay.example/X", "lower case"),
        ("quay.example/x:", "HOST"),
        ("quay.example/x:-a", "tag"),
        ("quay.example/x:" + "a" * 129, "tag"),
        ("quay.example/x@sha256:abc", "digest"),
        ("quay.example/x@sha512:" + "a" * 128, "digest"),
        ("quay.example/x@" + D.upper(), "digest"),
        ("quay.example/x y", "HOST"),
        ("quay.example/x\n", "HOST"),
        ("quay.example/x\u00a0", "HOST"),
        ("quay.example/\x1b[31mx", "HOST"),
        ("quay.example/\udcff", "HOST"),
        (" quay.example/x", "HOST"),
        ("quay.example/" + "a/" * 2100 + "a", "HOST"),
        ("quay.example/" + "a" * 250, "HOST"),
        ("oci:/" + "a" * 4096, "HOST"),
    ],
)
def test_what_is_no_reference_is_refused_with_a_way_out(text, hint):
    with pytest.raises(InvalidReference) as caught:
        oci.parse_reference(text)
    assert hint in caught.value.hint
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1200


@pytest.mark.parametrize("text", ["-x", "--policy=/x", "docker://--policy", "docker://-x/y", "registry:--x"])
def test_an_option_is_no_reference(text):
    with pytest.raises(InvalidReference):
        oci.parse_reference(text)


@pytest.mark.parametrize("text", ["oci:--policy", "dir:-x", "containers-storage:--x", "docker-daemon:-x"])
def test_what_looks_like_an_option_stays_behind_its_transport(text):
    assert not oci.parse_reference(text).text.startswith("-")


@pytest.mark.parametrize(
    "text",
    [
        "user:s3cret@quay.example/x",
        "docker://user:s3cret@quay.example/x",
        "https://user:s3cret@quay.example/x",
        "foo://user:s3cret@quay.example/x",
        "/user:s3cret@quay.example/x",
        "user:s3cret@localhost:5000",
        "user:s3cret@p@quay.example/x",
        f"docker://user:s3cret@quay.example/x@{D}",
    ],
)
def test_a_password_in_a_reference_is_refused_and_not_repeated(text):
    with pytest.raises(InvalidReference) as caught:
        oci.parse_reference(text)
    assert "s3cret" not in str(caught.value)


def test_a_reference_knows_its_registry_and_its_path():
    reference = oci.parse_reference("quay.example:443/x/y:z")
    assert (reference.registry, reference.repository, reference.tag, reference.is_remote) == (
        "quay.example:443",
        "x/y",
        "z",
        True,
    )
    assert oci.parse_reference("oci:/a/b:c").path == "/a/b"
    assert oci.parse_reference("dir:/a:b").path == "/a:b"
    assert oci.parse_reference("quay.example/x").path == ""


def test_pinning_names_what_a_tag_meant():
    assert oci.parse_reference("quay.example/x:y").pinned(D).text == f"docker://quay.example/x@{D}"
    assert oci.parse_reference("oci:/x:y").pinned(D).text == "oci:/x:y"


def test_the_longest_reference_fits_into_a_request_whatever_its_characters():
    for character in ("a", '"', "\\", "é", "漢", "🎉"):
        text = "oci:" + character * ((oci.MAX_REFERENCE - 4) // len(character.encode()))
        request = json.dumps({"method": "OpenImage", "args": [oci.parse_reference(text).text]}).encode()
        assert len(request) < 32768


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"[a-z-]{0,12}:?(//)?[a-zA-Z0-9:@/._\[\]-]{0,40}", fullmatch=True))
def test_any_text_is_a_reference_or_refused(text):
    try:
        reference = oci.parse_reference(text)
    except InvalidReference:
        return
    assert reference.text.partition(":")[0] in oci.TRANSPORTS
    assert reference.text.isprintable() and " " not in reference.text
    assert reference.text.count("@") <= 1 or not reference.is_remote
    assert oci.parse_reference(reference.text).text == reference.text


# -- platforms


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/arm64/v8", "linux/arm64/v8"),
        ("linux/x86_64", "linux/amd64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/armhf", "linux/arm/v7"),
        ("linux/armhf/v6", "linux/arm/v6"),
    ],
)
def test_platforms(text, result):
    assert str(oci.parse_platform(text)) == result


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linux",
        "amd64",
        "linux/",
        "/amd64",
        "linux/amd64/",
        "linux/amd64/v1/x",
        "linux/--x",
        "Linux/amd64",
        "linux/a b",
        "linux/amd64\n",
    ],
)
def test_what_is_no_platform_is_refused(text):
    with pytest.raises(PlatformNotFound, match="os/architecture"):
        oci.parse_platform(text)


def test_a_single_manifest_of_another_platform_is_noticed():
    image = oci.parse_config(raw(config(architecture="arm64", variant="v8")))
    for text in ("linux/arm64", "linux/arm64/v8"):
        oci.check_platform(image, oci.parse_platform(text))
    for text in ("linux/amd64", "linux/arm64/v9", "windows/arm64"):
        with pytest.raises(PlatformNotFound, match="linux/arm64/v8"):
            oci.check_platform(image, oci.parse_platform(text))


# -- documents


def test_a_manifest_keeps_its_bytes_and_their_digest():
    data = (
        json.dumps(manifest(annotations={"k": "v"}, artifactType="a/b", subject=descriptor()), indent=3).encode()
        + b"\n"
    )
    parsed = oci.parse_manifest(data)
    assert parsed.raw is data
    assert parsed.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert [layer.digest for layer in parsed.layers] == [D, E]
    assert (parsed.config.media_type, parsed.artifact_type, parsed.annotations) == (oci.OCI_CONFIG, "a/b", {"k": "v"})
    assert parsed.subject == oci.Descriptor(GZIP, D, 10)
    assert oci.is_container(parsed)


def test_a_manifest_without_media_type_is_an_oci_manifest():
    assert oci.parse_manifest(raw(manifest(mediaType=...))).media_type == oci.OCI_MANIFEST


def test_docker_schema_2_is_taken():
    layer = descriptor(mediaType="application/vnd.docker.image.rootfs.diff.tar.gzip")
    parsed = oci.parse_manifest(
        raw(manifest(mediaType=oci.DOCKER_MANIFEST, config=descriptor(mediaType=oci.DOCKER_CONFIG), layers=[layer]))
    )
    assert oci.is_container(parsed)
    assert oci.layer_compression(parsed.layers[0].media_type) == "gzip"


def test_an_artifact_is_no_container_and_has_the_empty_config():
    parsed = oci.parse_manifest(
        raw(manifest(config={"mediaType": oci.OCI_EMPTY, "digest": oci.EMPTY_DIGEST, "size": 2}, layers=[]))
    )
    assert not oci.is_container(parsed)
    assert oci.digest_of(b"{}") == oci.EMPTY_DIGEST


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"schemaVersion": 1}, UnsupportedMediaType),
        ({"schemaVersion": 3}, InvalidDocument),
        ({"schemaVersion": True}, InvalidDocument),
        ({"schemaVersion": 2.0}, InvalidDocument),
        ({"schemaVersion": ...}, InvalidDocument),
        ({"mediaType": oci.OCI_INDEX}, UnsupportedMediaType),
        ({"mediaType": "x/y"}, UnsupportedMediaType),
        ({"mediaType": 3}, InvalidDocument),
        ({"manifests": []}, InvalidDocument),
        ({"config": ...}, InvalidDocument),
        ({"config": None}, InvalidDocument),
        ({"layers": ...}, InvalidDocument),
        ({"layers": None}, InvalidDocument),
        ({"layers": {}}, InvalidDocument),
        ({"layers": ["x"]}, InvalidDocument),
        ({"layers": [descriptor()] * (oci.MAX_LAYERS + 1)}, InvalidDocument),
        ({"layers": [descriptor(size=-1)]}, InvalidDocument),
        ({"layers": [descriptor(size=2**53)]}, InvalidDocument),
        ({"layers": [descriptor(size=1.0)]}, InvalidDocument),
        ({"layers": [descriptor(size=True)]}, InvalidDocument),
        ({"layers": [descriptor(size="1")]}, InvalidDocument),
        ({"layers": [descriptor(size=None)]}, InvalidDocument),
        ({"layers": [descriptor(digest="sha256:" + "A" * 64)]}, InvalidDocument),
        ({"layers": [descriptor(digest="sha256:../../x")]}, InvalidDocument),
        ({"layers": [descriptor(digest=D + "\n")]}, InvalidDocument),
        ({"layers": [descriptor(digest=D[:-1])]}, InvalidDocument),
        ({"layers": [descriptor(digest=5)]}, InvalidDocument),
        ({"layers": [descriptor(digest="sha512:" + "a" * 128)]}, UnsupportedMediaType),
        ({"layers": [descriptor(mediaType="")]}, InvalidDocument),
        ({"layers": [descriptor(mediaType="a b")]}, InvalidDocument),
        ({"layers": [descriptor(mediaType="a" * 256)]}, InvalidDocument),
        ({"layers": [descriptor(mediaType=None)]}, InvalidDocument),
        ({"annotations": {"a": 1}}, InvalidDocument),
        ({"annotations": []}, InvalidDocument),
        ({"annotations": {"a": "\ud800"}}, InvalidDocument),
        ({"Layers": []}, InvalidDocument),
        ({"layer\u017f": []}, InvalidDocument),
        ({"x": [[[[]]]] * 100_000}, InvalidDocument),
    ],
)
def test_manifests_out_of_bounds_are_refused(changes, error):
    with pytest.raises(error) as caught:
        oci.parse_manifest(raw(manifest(**changes)))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xef\xbb\xbf{}",
        '{"schemaVersion":2}'.encode("utf-16"),
        b'{"a":"\xff"}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":' + b"9" * 5000 + b"}",
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' + b"[" * 100 + b"]" * 100 + b"}",
        b'{"a":"\\ud800"}',
        b'{"\\ud800":1}',
        b'{"layers":[],"layers":[]}',
        b'{"a":{"b":1,"b":1}}',
        b"{} {}",
        b" " * (oci.MAX_MANIFEST + 1),
    ],
)
@pytest.mark.parametrize("parse", [oci.parse_manifest, oci.parse_index, oci.is_index])
def test_what_is_no_json_object_is_refused(parse, text):
    with pytest.raises(InvalidDocument):
        parse(text)


def test_huge_numbers_cost_no_time():
    start = time.perf_counter()
    with pytest.raises(InvalidDocument, match="more than 40 digits"):
        oci.parse_manifest(b'{"a":' + b"9" * (oci.MAX_MANIFEST - 100) + b"}")
    assert time.perf_counter() - start < 2


def test_a_config_knows_its_layers_and_labels():
    data = raw(
        config(created="2024-01-01T00:00:00Z", config={"Labels": {"a": "b", "c": None}, "Env": None}, variant="v1")
    )
    parsed = oci.parse_config(data)
    assert (parsed.diff_ids, parsed.labels, parsed.created, str(parsed.platform)) == (
        (D, E),
        {"a": "b", "c": ""},
        "2024-01-01T00:00:00Z",
        "linux/amd64/v1",
    )
    assert parsed.digest == oci.digest_of(data)


@pytest.mark.parametrize("changes", [{"config": None}, {"config": {}}, {"config": {"Labels": None}}, {"config": ...}])
def test_a_config_without_labels(changes):
    assert oci.parse_config(raw(config(**changes))).labels == {}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rootfs": ...}, InvalidDocument),
        ({"rootfs": {"type": "base", "diff_ids": []}}, InvalidDocument),
        ({"rootfs": {"type": "layers"}}, InvalidDocument),
        ({"rootfs": {"type": "layers", "diff_ids": ["x"]}}, InvalidDocument),
        ({"rootfs": {"type": "layers", "diff_ids": ["sha512:" + "a" * 128]}}, UnsupportedMediaType),
        ({"rootfs": {"type": "layers", "diff_ids": [D] * (oci.MAX_LAYERS + 1)}}, InvalidDocument),
        ({"config": []}, InvalidDocument),
        ({"config": {"Labels": {"a": 1}}}, InvalidDocument),
        ({"config": {"Labels": ["a"]}}, InvalidDocument),
        ({"architecture": 1}, InvalidDocument),
        ({"os": "a" * 5000}, InvalidDocument),
        ({"created": {}}, InvalidDocument),
        ({"Rootfs": {}}, InvalidDocument),
    ],
)
def test_configs_out_of_bounds_are_refused(changes, error):
    with pytest.raises(error):
        oci.parse_config(raw(config(**changes)))


def test_layers_pair_with_their_diff_ids_in_order():
    pairs = oci.pairs(oci.parse_manifest(raw(manifest())), oci.parse_config(raw(config())))
    assert [(layer.digest, diff_id) for layer, diff_id in pairs] == [(D, D), (E, E)]


def test_a_count_of_layers_that_disagrees_is_refused_before_anything_is_fetched():
    with pytest.raises(InvalidDocument, match="1 layers, its configuration 2"):
        oci.pairs(oci.parse_manifest(raw(manifest(layers=[descriptor()]))), oci.parse_config(raw(config())))


def test_mistake_26_a_raw_blob_never_stands_where_a_diff_id_can():
    parsed = oci.parse_manifest(raw(manifest(layers=[descriptor(), descriptor(mediaType="application/octet-stream")])))
    with pytest.raises(UnsupportedMediaType, match="octet-stream"):
        oci.pairs(parsed, oci.parse_config(raw(config())))


def test_an_index_lists_platforms():
    entry = descriptor(
        mediaType=oci.OCI_MANIFEST,
        platform={"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1"},
    )
    data = raw({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": [entry, descriptor()]})
    index = oci.parse_index(data)
    assert oci.is_index(data) and not oci.is_index(raw(manifest()))
    assert [str(item.platform) for item in index.manifests] == ["linux/arm64/v8", "None"]
    assert index.digest == oci.digest_of(data)


def test_a_document_that_is_manifest_and_index_at_once_is_refused():
    both = raw({"schemaVersion": 2, "manifests": [], "layers": [], "config": descriptor()})
    for parse in (oci.parse_manifest, oci.parse_index):
        with pytest.raises(InvalidDocument):
            parse(both)


@pytest.mark.parametrize(
    ("media_type", "compression"),
    [
        ("application/vnd.oci.image.layer.v1.tar", "none"),
        ("application/vnd.oci.image.layer.v1.tar+gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", "zstd"),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", "zstd"),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", "gzip"),
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "gzip"),
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", None),
        ("application/x-tar", None),
        ("", None),
    ],
)
def test_compression_by_media_type(media_type, compression):
    assert oci.layer_compression(media_type) == compression


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([D, GZIP, oci.OCI_MANIFEST, "layers"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["mediaType", "digest", "size", "platform", "os", "type", "diff_ids", "Labels", "x"]), inner
        )
    ),
    max_leaves=12,
)
members = [
    "schemaVersion",
    "mediaType",
    "config",
    "layers",
    "manifests",
    "annotations",
    "subject",
    "rootfs",
    "os",
    "created",
    "artifactType",
]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([manifest, config]),
    st.dictionaries(st.sampled_from(members), json_values, max_size=3),
    st.binary(max_size=3),
    st.integers(0, 400),
)
def test_hostile_documents_raise_engine_errors_only(make, changes, noise, place):
    data = raw(make(**changes))
    for document in (data, data[:place] + noise + data[place:]):
        for parse in (oci.parse_manifest, oci.parse_config, oci.parse_index, oci.is_index):
            try:
                parsed = parse(document)
            except EngineError as error:
                assert str(error).isprintable()
            else:
                assert isinstance(parsed, bool) or parsed.raw == document
