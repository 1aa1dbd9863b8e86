# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""JSON schemas (draft 7) of manifests, indexes and configurations, and their check with ``jsonschema`` where the host
has it.

The typed readers in ``ocidocuments`` check what safety needs. The schemas also check those parts of a document that the
engine keeps but never reads, by the OCI image specification. They ask for no more than what real images from every
common builder satisfy.
"""

from __future__ import annotations

from typing import Any

from ..errors import InvalidDocument
from .ocidocuments import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    MAX_CONFIG,
    MAX_INDEX,
    MAX_LAYERS,
    MAX_MANIFEST,
    MAX_SIZE,
    OCI_INDEX,
    OCI_MANIFEST,
)
from .strictjson import load_json

_DRAFT = "http://json-schema.org/draft-07/schema#"

# Go writes an absent list or map as null, and reads null as nothing at all, whatever belongs there.
_TEXT: dict[str, Any] = {"type": ["string", "null"], "maxLength": 4096}
_TEXTS: dict[str, Any] = {"type": ["object", "null"], "additionalProperties": {"type": ["string", "null"]}}
_LINES: dict[str, Any] = {"type": ["array", "null"], "items": {"type": ["string", "null"]}}
_SET: dict[str, Any] = {"type": ["object", "null"], "additionalProperties": {"type": ["object", "null"]}}
_DIGEST: dict[str, Any] = {"type": "string", "maxLength": 71, "pattern": "^sha256:[0-9a-f]{64}$"}
_MEDIA_TYPE: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"}
_PLATFORM: dict[str, Any] = {
    "type": "object",
    "properties": {
        "architecture": _TEXT,
        "os": _TEXT,
        "os.version": _TEXT,
        "os.features": _LINES,
        "variant": _TEXT,
        "features": _LINES,
    },
}
_DESCRIPTOR: dict[str, Any] = {
    "type": "object",
    "required": ["mediaType", "digest", "size"],
    "properties": {
        "mediaType": _MEDIA_TYPE,
        "digest": _DIGEST,
        "size": {"type": "integer", "minimum": 0, "maximum": MAX_SIZE},
        "urls": _LINES,
        "annotations": _TEXTS,
        "data": {"type": ["string", "null"]},
        "artifactType": _TEXT,
        "platform": {"anyOf": [_PLATFORM, {"type": "null"}]},
    },
}

MANIFEST_SCHEMA: dict[str, Any] = {
    "$schema": _DRAFT,
    "title": "OCI image manifest or Docker manifest, schema 2",
    "type": "object",
    "required": ["schemaVersion", "config"],
    "properties": {
        "manifests": {"type": "null"},
        "schemaVersion": {"const": 2},
        "mediaType": {"enum": [OCI_MANIFEST, DOCKER_MANIFEST, "", None]},
        "artifactType": {"type": ["string", "null"], "maxLength": 255},
        "config": _DESCRIPTOR,
        "layers": {"type": ["array", "null"], "maxItems": MAX_LAYERS, "items": _DESCRIPTOR},
        "subject": {"anyOf": [_DESCRIPTOR, {"type": "null"}]},
        "annotations": _TEXTS,
    },
}

INDEX_SCHEMA: dict[str, Any] = {
    "$schema": _DRAFT,
    "title": "OCI image index or Docker manifest list",
    "type": "object",
    "required": ["schemaVersion"],
    "properties": {
        "layers": {"type": "null"},
        "config": {"type": "null"},
        "schemaVersion": {"const": 2},
        "mediaType": {"enum": [OCI_INDEX, DOCKER_LIST, "", None]},
        "artifactType": {"type": ["string", "null"], "maxLength": 255},
        "manifests": {"type": ["array", "null"], "maxItems": MAX_INDEX, "items": _DESCRIPTOR},
        "subject": {"anyOf": [_DESCRIPTOR, {"type": "null"}]},
        "annotations": _TEXTS,
    },
}

CONFIG_SCHEMA: dict[str, Any] = {
    "$schema": _DRAFT,
    "title": "OCI image configuration or Docker image JSON",
    "type": "object",
    "required": ["rootfs"],
    "properties": {
        "created": {"type": ["string", "null"], "maxLength": 4096},
        "author": {"type": ["string", "null"]},
        "architecture": _TEXT,
        "variant": _TEXT,
        "os": _TEXT,
        "os.version": _TEXT,
        "os.features": _LINES,
        "config": {
            "type": ["object", "null"],
            "properties": {
                "User": {"type": ["string", "null"]},
                "WorkingDir": {"type": ["string", "null"]},
                "StopSignal": {"type": ["string", "null"]},
                "Env": _LINES,
                "Entrypoint": _LINES,
                "Cmd": _LINES,
                "ExposedPorts": _SET,
                "Volumes": _SET,
                "Labels": _TEXTS,
            },
        },
        "rootfs": {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"const": "layers"},
                "diff_ids": {"type": ["array", "null"], "maxItems": MAX_LAYERS, "items": _DIGEST},
            },
        },
        "history": {
            "type": ["array", "null"],
            "items": {
                "type": ["object", "null"],
                "properties": {
                    "created": {"type": ["string", "null"]},
                    "created_by": {"type": ["string", "null"]},
                    "author": {"type": ["string", "null"]},
                    "comment": {"type": ["string", "null"]},
                    "empty_layer": {"type": ["boolean", "null"]},
                },
            },
        },
    },
}

SCHEMAS: dict[str, dict[str, Any]] = {"manifest": MANIFEST_SCHEMA, "index": INDEX_SCHEMA, "config": CONFIG_SCHEMA}
_LIMITS = {"manifest": MAX_MANIFEST, "index": MAX_MANIFEST, "config": MAX_CONFIG}


def available() -> bool:
    """Whether this host has ``jsonschema`` in a version that knows draft 7 (3.0 or later)."""
    try:
        from jsonschema import Draft7Validator
    except Exception:  # a damaged installation can fail with anything, and the check is an extra
        return False
    return callable(Draft7Validator)


def validate(kind: str, document: Any) -> bool:
    """Check a document against the schema ``kind``: ``manifest``, ``index`` or ``config``.

    ``document`` is the bytes of the JSON text or its value. Returns False if the host lacks ``jsonschema``, True if the
    document was checked and fits; raises InvalidDocument, naming the place, if it does not.
    """
    value = load_json(document, _LIMITS[kind], kind) if isinstance(document, bytes) else document
    if not available():
        return False
    from jsonschema import Draft7Validator

    for error in Draft7Validator(SCHEMAS[kind]).iter_errors(value):
        # The library's message quotes the value, which may be anything and of any length.
        place = "/".join(str(part) for part in error.absolute_path)[:200] or "its top level"
        raise InvalidDocument(
            f"The {kind} breaks the rule {error.validator!r} of its schema at {place!r}: {error.message!r:.300}.",
            "The image is damaged; ask its publisher.",
        )
    return True
