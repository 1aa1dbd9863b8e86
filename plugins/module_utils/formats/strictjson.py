# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""JSON from strangers: only what every reader takes for the same value, and within bounds. No I/O."""

from __future__ import annotations

import json
import math
from typing import Any

from ..errors import InvalidDocument

MAX_NESTING = 64
# Each array or object costs some sixty bytes in memory for two in the document; this keeps a hostile document below 40
# MB.
MAX_VALUES = 300_000


def load_json(raw: bytes, limit: int, what: str) -> Any:
    """The value of the JSON text ``raw``; raises InvalidDocument for all that another reader could take for something
    else.

    That is: text that is not UTF-8, keys that occur twice, NaN and infinities, numbers beyond any use, characters that
    no encoding can carry, and more bytes than ``limit`` or more values or deeper nesting than any real document has.
    """
    if len(raw) > limit:
        raise InvalidDocument(f"The {what} has {len(raw)} bytes; at most {limit} are taken.")
    if raw.count(b",") + raw.count(b"[") + raw.count(b"{") > MAX_VALUES:
        raise InvalidDocument(f"The {what} has more than {MAX_VALUES} values.")
    try:
        # Decoded here because json.loads() guesses UTF-16 and UTF-32 too.
        value = json.loads(
            str(raw, "utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_bounded_int,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        raise InvalidDocument(
            f"The {what} is not valid JSON: {_brief(error)}.", "The image is damaged; ask its publisher."
        ) from error
    _walk(value, what)
    return value


def _brief(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).rstrip(".")[:200]


def _unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(members)
    if len(result) != len(members):
        raise ValueError("a key occurs twice in one object")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def _bounded_int(text: str) -> int:
    # Converting decimal digits takes quadratic time, and old Pythons have no limit of their own.
    if len(text) > 40:
        raise ValueError("a number has more than 40 digits")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    if len(text) > 400 or not math.isfinite(value):
        raise ValueError("a number is out of range")
    return value


def _walk(value: Any, what: str) -> None:
    """Bound the nesting, and find unpaired surrogates, which would fail later wherever the text is written."""
    level = [value]
    for _depth in range(MAX_NESTING):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, str):
                if not item.isascii():
                    try:
                        item.encode()
                    except UnicodeEncodeError as error:
                        raise InvalidDocument(
                            f"The {what} contains half a character (an unpaired surrogate)."
                        ) from error
            elif isinstance(item, dict):
                deeper.extend(item)
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
        if not deeper:
            return
        level = deeper
    raise InvalidDocument(f"The {what} is nested more than {MAX_NESTING} levels deep.")
