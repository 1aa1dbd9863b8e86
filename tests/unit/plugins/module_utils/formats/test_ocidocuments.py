# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import functools
import hashlib
import json
import time

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    EngineError,
    InvalidDocument,
    InvalidPlatform,
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
        "mediaType": ocidocuments.OCI_MANIFEST,
        "config": descriptor(mediaType=ocidocuments.OCI_CONFIG),
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
    assert str(ocidocuments.parse_platform(text)) == result


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
    with pytest.raises(InvalidPlatform, match="os/architecture"):
        ocidocuments.parse_platform(text)


@pytest.mark.parametrize(
    ("wanted", "other", "runs"),
    [
        ("linux/arm/v7", "linux/arm/v6", True),
        ("linux/arm/v6", "linux/arm/v7", False),
        ("linux/arm64/v9", "linux/arm64/v8", True),
        ("linux/arm64/v8", "linux/arm64/v9", False),
        ("linux/arm64/v9", "linux/arm64", True),
        ("linux/amd64/v3", "linux/amd64/v2", True),
        ("linux/amd64/v2", "linux/amd64/v3", False),
        ("linux/riscv64/rva22", "linux/riscv64", True),
        ("linux/amd64", "linux/arm64", False),
    ],
)
def test_a_processor_runs_what_was_built_for_lesser_ones(wanted, other, runs):
    assert ocidocuments.parse_platform(wanted).accepts(ocidocuments.parse_platform(other)) is runs


def test_a_single_manifest_of_another_platform_is_noticed():
    image = ocidocuments.parse_config(raw(config(architecture="arm64", variant="v8")))
    for text in ("linux/arm64", "linux/arm64/v8"):
        ocidocuments.check_platform(image, ocidocuments.parse_platform(text))
    for text in ("linux/amd64", "linux/arm64/v7", "windows/arm64"):
        with pytest.raises(PlatformNotFound, match="linux/arm64/v8"):
            ocidocuments.check_platform(image, ocidocuments.parse_platform(text))


def test_an_image_that_names_no_platform_is_said_to_be_for_none():
    image = ocidocuments.parse_config(raw(config(architecture="", os="", variant="")))
    with pytest.raises(PlatformNotFound, match="is for no platform, not for linux/amd64"):
        ocidocuments.check_platform(image, ocidocuments.parse_platform("linux/amd64"))


# -- documents


def test_a_manifest_keeps_its_bytes_and_their_digest():
    data = (
        json.dumps(manifest(annotations={"k": "v"}, artifactType="a/b", subject=descriptor()), indent=3).encode()
        + b"\n"
    )
    parsed = ocidocuments.parse_manifest(data)
    assert parsed.raw is data
    assert parsed.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert [layer.digest for layer in parsed.layers] == [D, E]
    assert (parsed.config.media_type, parsed.artifact_type, parsed.annotations) == (
        ocidocuments.OCI_CONFIG,
        "a/b",
        {"k": "v"},
    )
    assert parsed.subject == ocidocuments.Descriptor(GZIP, D, 10)
    assert ocidocuments.is_container(parsed)


def test_a_manifest_without_media_type_is_an_oci_manifest():
    assert ocidocuments.parse_manifest(raw(manifest(mediaType=...))).media_type == ocidocuments.OCI_MANIFEST


def test_docker_schema_2_is_taken():
    layer = descriptor(mediaType="application/vnd.docker.image.rootfs.diff.tar.gzip")
    parsed = ocidocuments.parse_manifest(
        raw(
            manifest(
                mediaType=ocidocuments.DOCKER_MANIFEST,
                config=descriptor(mediaType=ocidocuments.DOCKER_CONFIG),
                layers=[layer],
            )
        )
    )
    assert ocidocuments.is_container(parsed)
    assert ocidocuments.layer_compression(parsed.layers[0].media_type) == "gzip"


def test_an_artifact_is_no_container_and_has_the_empty_config():
    parsed = ocidocuments.parse_manifest(
        raw(
            manifest(config={"mediaType": ocidocuments.OCI_EMPTY, "digest": digests.EMPTY_DIGEST, "size": 2}, layers=[])
        )
    )
    assert not ocidocuments.is_container(parsed)
    assert digests.digest_of(b"{}") == digests.EMPTY_DIGEST


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"schemaVersion": 1}, UnsupportedMediaType),
        ({"schemaVersion": 3}, InvalidDocument),
        ({"schemaVersion": True}, InvalidDocument),
        ({"schemaVersion": 2.0}, InvalidDocument),
        ({"schemaVersion": ...}, InvalidDocument),
        ({"mediaType": ocidocuments.OCI_INDEX}, UnsupportedMediaType),
        ({"mediaType": "x/y"}, UnsupportedMediaType),
        ({"mediaType": 3}, InvalidDocument),
        ({"manifests": []}, InvalidDocument),
        ({"config": ...}, InvalidDocument),
        ({"config": None}, InvalidDocument),
        ({"layers": {}}, InvalidDocument),
        ({"layers": ["x"]}, InvalidDocument),
        ({"layers": [descriptor()] * (ocidocuments.MAX_LAYERS + 1)}, InvalidDocument),
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
        ocidocuments.parse_manifest(raw(manifest(**changes)))
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
        b" " * (ocidocuments.MAX_MANIFEST + 1),
    ],
)
@pytest.mark.parametrize("parse", [ocidocuments.parse_manifest, ocidocuments.parse_index, ocidocuments.is_index])
def test_what_is_no_json_object_is_refused(parse, text):
    with pytest.raises(InvalidDocument):
        parse(text)


def test_huge_numbers_cost_no_time():
    start = time.process_time()
    with pytest.raises(InvalidDocument, match="more than 40 digits"):
        ocidocuments.parse_manifest(b'{"a":' + b"9" * (ocidocuments.MAX_MANIFEST - 100) + b"}")
    assert time.process_time() - start < 2


def test_a_config_knows_its_layers_and_labels():
    data = raw(
        config(created="2024-01-01T00:00:00Z", config={"Labels": {"a": "b", "c": None}, "Env": None}, variant="v1")
    )
    parsed = ocidocuments.parse_config(data)
    assert (parsed.diff_ids, parsed.labels, parsed.created, str(parsed.platform)) == (
        (D, E),
        {"a": "b", "c": ""},
        "2024-01-01T00:00:00Z",
        "linux/amd64/v1",
    )
    assert parsed.digest == digests.digest_of(data)


@pytest.mark.parametrize("changes", [{"config": None}, {"config": {}}, {"config": {"Labels": None}}, {"config": ...}])
def test_a_config_without_labels(changes):
    assert ocidocuments.parse_config(raw(config(**changes))).labels == {}


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"rootfs": ...}, InvalidDocument),
        ({"rootfs": {"type": "base", "diff_ids": []}}, InvalidDocument),
        ({"rootfs": {"type": "layers", "diff_ids": ["x"]}}, InvalidDocument),
        ({"rootfs": {"type": "layers", "diff_ids": ["sha512:" + "a" * 128]}}, UnsupportedMediaType),
        ({"rootfs": {"type": "layers", "diff_ids": [D] * (ocidocuments.MAX_LAYERS + 1)}}, InvalidDocument),
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
        ocidocuments.parse_config(raw(config(**changes)))


def test_layers_pair_with_their_diff_ids_in_order():
    pairs = ocidocuments.pairs(ocidocuments.parse_manifest(raw(manifest())), ocidocuments.parse_config(raw(config())))
    assert [(layer.digest, diff_id) for layer, diff_id in pairs] == [(D, D), (E, E)]


def test_a_count_of_layers_that_disagrees_is_refused_before_anything_is_fetched():
    with pytest.raises(InvalidDocument, match="1 layers, its configuration 2"):
        ocidocuments.pairs(
            ocidocuments.parse_manifest(raw(manifest(layers=[descriptor()]))), ocidocuments.parse_config(raw(config()))
        )


def test_mistake_26_a_raw_blob_never_stands_where_a_diff_id_can():
    parsed = ocidocuments.parse_manifest(
        raw(manifest(layers=[descriptor(), descriptor(mediaType="application/octet-stream")]))
    )
    with pytest.raises(UnsupportedMediaType, match="octet-stream"):
        ocidocuments.pairs(parsed, ocidocuments.parse_config(raw(config())))


def test_an_index_lists_platforms():
    entry = descriptor(
        mediaType=ocidocuments.OCI_MANIFEST,
        platform={"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1"},
    )
    data = raw({"schemaVersion": 2, "mediaType": ocidocuments.OCI_INDEX, "manifests": [entry, descriptor()]})
    index = ocidocuments.parse_index(data)
    assert ocidocuments.is_index(data) and not ocidocuments.is_index(raw(manifest()))
    assert [str(item.platform) for item in index.manifests] == ["linux/arm64/v8", "None"]
    assert index.digest == digests.digest_of(data)


def test_a_document_that_is_manifest_and_index_at_once_is_refused():
    both = raw({"schemaVersion": 2, "manifests": [], "layers": [], "config": descriptor()})
    for parse in (ocidocuments.parse_manifest, ocidocuments.parse_index):
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
    assert ocidocuments.layer_compression(media_type) == compression


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.sampled_from([D, GZIP, ocidocuments.OCI_MANIFEST, "layers"]),
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


@pytest.mark.slow
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
        for parse in (
            ocidocuments.parse_manifest,
            ocidocuments.parse_config,
            ocidocuments.parse_index,
            ocidocuments.is_index,
        ):
            try:
                parsed = parse(document)
            except EngineError as error:
                assert str(error).isprintable()
            else:
                assert isinstance(parsed, bool) or parsed.raw == document


@pytest.mark.parametrize("nothing", [..., None, []])
def test_a_list_that_is_null_or_absent_is_empty_as_for_go(nothing):
    from ansible_collections.composefs.oci.plugins.module_utils.formats import ocischemas

    raw_manifest = raw(manifest(layers=nothing))
    rootfs = {"type": "layers", **({} if nothing is ... else {"diff_ids": nothing})}
    raw_config = raw(config(rootfs=rootfs))
    one, other = ocidocuments.parse_manifest(raw_manifest), ocidocuments.parse_config(raw_config)
    assert (one.layers, other.diff_ids, ocidocuments.pairs(one, other)) == ((), (), [])
    index = {"schemaVersion": 2, **({} if nothing is ... else {"manifests": nothing})}
    assert ocidocuments.parse_index(raw(index)).manifests == ()
    ocischemas.validate("manifest", raw_manifest)
    ocischemas.validate("config", raw_config)


def with_nulls(value, place=()):
    """Every document that differs from ``value`` in one member, or item of a list, that is null or not there."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield {**value, key: None}, (*place, key)
            yield {other: value[other] for other in value if other != key}, (*place, f"no {key}")
            for one, where in with_nulls(item, (*place, key)):
                yield {**value, key: one}, where
    elif isinstance(value, list):
        for number, item in enumerate(value):
            for one, where in ((None, (*place, number)), *with_nulls(item, (*place, number))):
                yield [*value[:number], one, *value[number + 1 :]], where


PLATFORM = {"os": "linux", "architecture": "arm64", "variant": "v8", "os.version": "1", "os.features": ["x"]}
LAYER = {
    "mediaType": "application/vnd.oci.image.layer.v1.tar",
    "digest": "sha256:" + "a" * 64,
    "size": 3,
    **{"urls": ["u"], "annotations": {"a": "b"}, "data": "", "artifactType": "a/b", "platform": PLATFORM},
}
COMMON = {"schemaVersion": 2, "subject": LAYER, "annotations": {"a": "b"}, "artifactType": "a/b"}
SETTINGS = {
    **{"User": "u", "WorkingDir": "/", "StopSignal": "9", "Env": ["a"], "Entrypoint": ["x"], "Cmd": ["y"]},
    **{"ExposedPorts": {"1/tcp": {}}, "Volumes": {"/v": {}}, "Labels": {"a": "b"}},
}
WHOLE = {
    "manifest": {**COMMON, "config": LAYER, "layers": [LAYER], "manifests": None},
    "index": {**COMMON, "manifests": [LAYER], "layers": None, "config": None},
    "config": {
        **{"architecture": "arm64", "os": "linux", "created": "x", "author": "a", "variant": "v8", "os.version": "1"},
        "os.features": ["x"],
        "config": SETTINGS,
        "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "a" * 64]},
        "history": [{"created": "x", "created_by": "x", "author": "x", "comment": "", "empty_layer": True}],
    },
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_null_or_absent_is_judged_alike_with_and_without_the_schema(kind):
    """A library that a host may have or not must not decide whether an image can be pulled."""
    from ansible_collections.composefs.oci.plugins.module_utils.formats import ocischemas

    if not ocischemas.available():
        pytest.skip("jsonschema is not installed")
    parse = getattr(ocidocuments, f"parse_{kind}")
    refused = set()
    for document, place in ((WHOLE[kind], ()), *with_nulls(WHOLE[kind])):
        verdicts = []
        for judge in (parse, functools.partial(ocischemas.validate, kind)):
            try:
                judge(raw(document))
                verdicts.append(True)
            except InvalidDocument:
                verdicts.append(False)
        assert verdicts[0] == verdicts[1], place
        if not verdicts[0]:
            refused.add(place)
    assert () not in refused and refused
    for place in refused:
        # What has to be there: which blob it is, and of what the image is made.
        words = (None, "schemaVersion", "config", "rootfs", "type", "mediaType", "digest", "size")
        assert isinstance(place[-1], int) or place[-1].split()[-1] in words, place


def test_lists_of_the_other_kind_that_are_null_are_none():
    """As for podman, which refuses a document that has two kinds of lists."""
    parsed = ocidocuments.parse_manifest(raw(manifest(manifests=None)))
    assert parsed.layers is not None and not ocidocuments.is_index(raw(manifest(manifests=None, mediaType=None)))
    assert ocidocuments.is_index(raw({"schemaVersion": 2, "manifests": None}))
    with pytest.raises(InvalidDocument):
        ocidocuments.parse_manifest(raw(manifest(manifests=[])))
