# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""``meta.json``: what a composefs repository says about itself (composefs repository format, version 1).

Bytes in, values out and back; byte-identical to what ``cfsctl init`` writes. Whether the repository is protected by
fs-verity is not written in the file: it is so if the file itself has fs-verity (see ``store/repository``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

from . import fsverity
from ..errors import FormatError, IncompatibleRepository

NAME = "meta.json"
VERSION = 1
MAX_SIZE = 1 << 20
V1_EROFS = "v1_erofs"
KNOWN_READ_ONLY_COMPATIBLE = frozenset((V1_EROFS,))
EROFS_VERSIONS = (0, 1, 2)
DEFAULT_EROFS_VERSION = 1
_IMPLIED_EROFS_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Metadata:
    """The fields of ``meta.json``. ``erofs_default`` is None where the file has no ``erofs_formats`` (written before
    composefs-rs 0.8).
    """

    algorithm: fsverity.Algorithm
    version: int = VERSION
    compatible: tuple[str, ...] = ()
    read_only_compatible: tuple[str, ...] = ()
    incompatible: tuple[str, ...] = ()
    erofs_default: int | None = None
    erofs_extra: tuple[int, ...] = ()

    @classmethod
    def new(
        cls,
        algorithm: fsverity.Algorithm,
        erofs_default: int = DEFAULT_EROFS_VERSION,
        erofs_extra: tuple[int, ...] = (),
    ) -> Metadata:
        """What a new repository gets. The flag ``v1_erofs`` stands there exactly if the default image format is V1."""
        flags = (V1_EROFS,) if erofs_default == 1 else ()
        return cls(
            algorithm,
            read_only_compatible=flags,
            erofs_default=erofs_default,
            erofs_extra=tuple(sorted(set(erofs_extra))),
        )

    @classmethod
    def parse(cls, raw: bytes) -> Metadata:
        """Read ``meta.json``. FormatError if it is malformed, IncompatibleRepository if its version, algorithm or EROFS
        format is not known.

        Unknown fields are ignored, as the format asks for. Features are only listed: ask ``check_readable`` and
        ``check_writable``.
        """
        try:
            document = json.loads(raw.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{NAME} is not a JSON document: {error}.", _REPAIR) from error
        if not isinstance(document, dict):
            raise _malformed("is not a JSON object")
        version = document.get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise _malformed("has no valid version")
        if version > VERSION:
            raise IncompatibleRepository(
                f"The repository has format version {version}; only versions up to {VERSION} are known.", _NEWER
            )
        name = document.get("algorithm")
        if not isinstance(name, str):
            raise _malformed("names no algorithm")
        algorithm = fsverity.algorithm_from_meta(name)
        features = document.get("features", {})
        if not isinstance(features, dict):
            raise _malformed("has invalid features")
        default, extra = _erofs_formats(document.get("erofs_formats"))
        return cls(
            algorithm,
            version,
            _strings(features, "compatible"),
            _strings(features, "read-only-compatible"),
            _strings(features, "incompatible"),
            default,
            extra,
        )

    def to_bytes(self) -> bytes:
        """The file, to the byte as ``cfsctl`` writes it: two spaces, fixed order, one newline at the end."""
        document: dict[str, Any] = {
            "version": self.version,
            "algorithm": self.algorithm.meta_name,
            "features": {
                "compatible": list(self.compatible),
                "read-only-compatible": list(self.read_only_compatible),
                "incompatible": list(self.incompatible),
            },
        }
        if self.erofs_default is not None:
            document["erofs_formats"] = {"default": self.erofs_default}
            if self.erofs_extra:
                document["erofs_formats"]["extra"] = list(self.erofs_extra)
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode("utf-8")

    @property
    def erofs_formats(self) -> tuple[int, ...]:
        """Versions of EROFS images to make, the default one first.

        Without ``erofs_formats`` the default is V2. A plain default of V2 beside the flag ``v1_erofs`` means V1,
        explicit or not: that is how repositories looked before the field existed.
        """
        default = _IMPLIED_EROFS_VERSION if self.erofs_default is None else self.erofs_default
        if default == _IMPLIED_EROFS_VERSION and not self.erofs_extra and V1_EROFS in self.read_only_compatible:
            default = 1
        return (default, *(version for version in self.erofs_extra if version != default))

    def check_readable(self) -> None:
        """Raise IncompatibleRepository if the file lists an incompatible feature: then not even reading is safe."""
        if self.incompatible:
            raise IncompatibleRepository(
                f"The repository uses features that are not known: {_listed(self.incompatible)}.", _NEWER
            )

    def check_writable(self) -> None:
        """Raise IncompatibleRepository if the file lists a feature that a writer has to know and this one does not."""
        self.check_readable()
        unknown = [name for name in self.read_only_compatible if name not in KNOWN_READ_ONLY_COMPATIBLE]
        if unknown:
            raise IncompatibleRepository(
                f"The repository can be read but not written, because it uses features that are not known: "
                f"{_listed(unknown)}.",
                _NEWER,
            )


_REPAIR = "Restore the file from a backup or make a new repository elsewhere."
_NEWER = "It was made by a newer program: update this collection."


def _malformed(what: str) -> FormatError:
    return FormatError(f"{NAME} {what}.", _REPAIR)


def _listed(names: Iterable[object]) -> str:
    return ", ".join(repr(name) for name in names)


def _strings(features: dict[str, Any], key: str) -> tuple[str, ...]:
    value = features.get(key, [])
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _malformed(f"has invalid features ({key})")
    return tuple(value)


def _erofs_formats(value: Any) -> tuple[int | None, tuple[int, ...]]:
    if value is None:
        return None, ()
    if not isinstance(value, dict):
        raise _malformed("has invalid erofs_formats")
    default = value.get("default")
    extra = value.get("extra", [])
    if not isinstance(extra, list) or not all(
        isinstance(item, int) and not isinstance(item, bool) for item in (default, *extra)
    ):
        raise _malformed("has invalid erofs_formats")
    unknown = sorted({default, *extra} - set(EROFS_VERSIONS))
    if unknown:
        raise IncompatibleRepository(
            f"The repository makes EROFS images of formats that are not known: {_listed(unknown)}.", _NEWER
        )
    return default, tuple(sorted(set(extra)))
