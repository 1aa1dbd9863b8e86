# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import copy
import json
import sys

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests, ocidocuments, ocischemas
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, InvalidDocument
from hypothesis import given, settings
from hypothesis import strategies as st

jsonschema = pytest.importorskip("jsonschema", reason="the host lacks jsonschema")

D = "sha256:" + "a" * 64
LAYER = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": D, "size": 10}

# As umoci, buildah, docker, ko and oras write them: absent and null members, additional members, Docker's names.
MANIFESTS = [
    {"schemaVersion": 2, "config": {"mediaType": ocidocuments.OCI_CONFIG, "digest": D, "size": 2}, "layers": [LAYER]},
    {
        "schemaVersion": 2,
        "mediaType": ocidocuments.OCI_MANIFEST,
        "config": {"mediaType": ocidocuments.OCI_CONFIG, "digest": D, "size": 2},
        "layers": [],
        "annotations": None,
    },
    {
        "schemaVersion": 2,
        "mediaType": ocidocuments.DOCKER_MANIFEST,
        "config": {"mediaType": ocidocuments.DOCKER_CONFIG, "digest": D, "size": 2},
        "layers": [
            dict(
                LAYER, mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", urls=["https://x.example"]
            )
        ],
    },
    {
        "schemaVersion": 2,
        "mediaType": ocidocuments.OCI_MANIFEST,
        "artifactType": "application/x",
        "config": {"mediaType": ocidocuments.OCI_EMPTY, "digest": digests.EMPTY_DIGEST, "size": 2, "data": "e30="},
        "layers": [dict(LAYER, annotations={"org.opencontainers.image.title": "a"})],
        "subject": dict(LAYER, mediaType=ocidocuments.OCI_MANIFEST),
    },
]
CONFIGS = [
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [D]}},
    {
        "architecture": "arm64",
        "variant": "v8",
        "os": "linux",
        "created": "2024-01-01T00:00:00.123Z",
        "author": "a",
        "config": {
            "User": "",
            "Env": ["A=b"],
            "Cmd": ["/bin/sh"],
            "Entrypoint": None,
            "Labels": None,
            "Volumes": {"/x": {}},
            "ExposedPorts": {"80/tcp": {}},
            "OnBuild": None,
            "Healthcheck": {"Test": ["NONE"]},
            "ArgsEscaped": True,
        },
        "container_config": {"Hostname": ""},
        "docker_version": "20.10",
        "history": [{"created": "2024-01-01T00:00:00Z", "created_by": "x", "empty_layer": True}, {}],
        "rootfs": {"type": "layers", "diff_ids": []},
    },
]
INDEXES = [
    {
        "schemaVersion": 2,
        "manifests": [dict(LAYER, platform={"os": "linux", "architecture": "arm", "variant": "v7"}), LAYER],
    },
    {"schemaVersion": 2, "mediaType": ocidocuments.DOCKER_LIST, "manifests": []},
]
EVERY = (
    [("manifest", item) for item in MANIFESTS]
    + [("config", item) for item in CONFIGS]
    + [("index", item) for item in INDEXES]
)


@pytest.mark.parametrize("kind", sorted(ocischemas.SCHEMAS))
def test_the_schemas_are_schemas(kind):
    jsonschema.Draft7Validator.check_schema(ocischemas.SCHEMAS[kind])


@pytest.mark.parametrize(("kind", "document"), EVERY)
def test_documents_of_common_builders_fit(kind, document):
    assert ocischemas.validate(kind, document) is True
    assert ocischemas.validate(kind, json.dumps(document).encode()) is True


@pytest.mark.parametrize(
    ("kind", "path", "value", "place"),
    [
        ("manifest", ["schemaVersion"], 1, "schemaVersion"),
        ("manifest", ["layers", 0, "size"], -1, "layers/0/size"),
        ("manifest", ["layers", 0, "size"], 2**53, "layers/0/size"),
        ("manifest", ["layers", 0, "digest"], D + "\n", "layers/0/digest"),
        ("manifest", ["layers", 0, "urls"], "x", "layers/0/urls"),
        ("manifest", ["layers", 0, "mediaType"], "", "layers/0/mediaType"),
        ("manifest", ["manifests"], [], "at .manifests."),
        ("manifest", ["mediaType"], ocidocuments.OCI_INDEX, "mediaType"),
        ("config", ["rootfs", "type"], "base", "rootfs/type"),
        ("config", ["rootfs", "diff_ids"], ["x"], "rootfs/diff_ids/0"),
        ("config", ["config"], {"Env": {"A": "b"}}, "config/Env"),
        ("config", ["config"], {"Cmd": "sh"}, "config/Cmd"),
        ("config", ["history"], [{"empty_layer": "yes"}], "history/0/empty_layer"),
        ("index", ["manifests", 0, "platform"], {"os": 3}, "manifests/0/platform"),
        ("index", ["layers"], [], "at .layers."),
    ],
)
def test_what_breaks_a_schema_is_named_with_its_place(kind, path, value, place):
    document = copy.deepcopy({"manifest": MANIFESTS, "config": CONFIGS, "index": INDEXES}[kind][0])
    target = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = value
    with pytest.raises(InvalidDocument, match=place) as caught:
        ocischemas.validate(kind, document)
    assert len(str(caught.value)) < 800


def test_a_host_without_jsonschema_is_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert not ocischemas.available()
    assert ocischemas.validate("manifest", {"nonsense": True}) is False


def test_a_jsonschema_too_old_for_the_draft_counts_as_none(monkeypatch):
    monkeypatch.delattr(jsonschema, "Draft7Validator", raising=False)
    monkeypatch.setitem(sys.modules, "jsonschema", type(sys)("jsonschema"))
    assert ocischemas.validate("config", {}) is False


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(EVERY), st.binary(max_size=4), st.integers(0, 300))
def test_hostile_documents_raise_engine_errors_only(case, noise, place):
    kind, document = case
    data = json.dumps(document).encode()
    try:
        ocischemas.validate(kind, data[:place] + noise + data[place + len(noise) :])
    except EngineError as error:
        assert str(error).isprintable()


@pytest.mark.parametrize(("kind", "document"), EVERY)
def test_the_typed_readers_take_what_the_schemas_take(kind, document):
    read = {
        "manifest": ocidocuments.parse_manifest,
        "config": ocidocuments.parse_config,
        "index": ocidocuments.parse_index,
    }[kind]
    assert read(json.dumps(document).encode())
