# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""References to images and the names that images get by default. No I/O."""

from __future__ import annotations

import re

from ..errors import InvalidReference
from .oci import parse_reference


def default_name(text: str) -> str:
    """The name that an image gets that is pulled by the reference ``text``: the reference as it is written, with its
    transport in front, which is what ``cfsctl`` gives it. Raises InvalidReference.
    """
    if parse_reference(text).transport != "docker":
        return text
    return "docker://" + _without_transport(text)


def other_names(name: str) -> tuple[str, ...]:
    """The other spellings of a default name: ``docker://x`` and ``x`` are one, and earlier versions wrote ``x``. Empty
    for names that are no references.
    """
    try:
        usual = default_name(name)
    except InvalidReference:
        return ()
    if not usual.startswith("docker://"):
        return ()
    return tuple(form for form in dict.fromkeys((usual, _without_transport(name))) if form != name)


def _without_transport(text: str) -> str:
    for prefix in ("docker://", "registry://", "registry:"):
        if text.startswith(prefix) and not re.match(r"registry:[0-9]{1,5}/", text):
            return text[len(prefix) :]
    return text
