# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run a module's main() in this process: what AnsibleModule reads from its standard input otherwise."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Set
from typing import Any

from ansible.module_utils import basic
from ansible.module_utils.common.text.converters import to_bytes


@contextlib.contextmanager
def arguments(values: dict[str, Any]) -> Iterator[None]:
    """Make AnsibleModule see ``values``, in the way of whatever ansible-core there is."""
    try:
        from ansible.module_utils.testing import patch_module_args
    except ImportError:
        old = basic._ANSIBLE_ARGS
        basic._ANSIBLE_ARGS = to_bytes(json.dumps({"ANSIBLE_MODULE_ARGS": values}))
        try:
            yield
        finally:
            basic._ANSIBLE_ARGS = old
    else:
        with patch_module_args(values):
            yield


def require_shape(result: dict[str, Any], shape: Set[str]) -> None:
    """A result of a module has all of ``shape``, and a failure tells facts only: nothing that nobody has found out."""
    if not result.get("failed"):
        assert set(result) >= shape
    elif "error" in result:
        blank = {key: value for key, value in result.items() if value is None or value == {}}
        assert blank == {} and "msg" in result
