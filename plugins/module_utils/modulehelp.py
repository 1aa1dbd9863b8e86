# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""What every module does alike: find the repository, and end in one clean line whatever happens.

The ``AnsibleModule`` is passed in and used by its methods only, so that the engine's folder stays free of ansible imports and the
functions can be tested with a stand-in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Callable, Protocol

from .errors import EngineError, from_os_error
from .repository import default_path


class Module(Protocol):
    """The part of ``AnsibleModule`` that is used here."""

    params: dict[str, Any]

    def exit_json(self, **kwargs: Any) -> Any: ...

    def fail_json(self, msg: str, **kwargs: Any) -> Any: ...


def repository_path(module: Module, option: str = "repository") -> str:
    """The repository that ``option`` of the task names, or the default one; absolute, without a trailing slash."""
    return os.path.abspath(os.path.expanduser(module.params.get(option) or default_path()))


def describe_crash(error: BaseException) -> str:
    """One line about an unexpected ``error``: its class and the places it came through, innermost last.

    The error's own words are left out on purpose: they may quote a password, a token or a whole document.
    """
    places = []
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} {code.co_name}")
        trace = trace.tb_next
    return f"Internal error: {type(error).__name__} at {' > '.join(places[-4:]) or 'an unknown place'}. Please report this line as a bug."


def run_module(module: Module, main: Callable[[Any], Mapping[str, Any]], base: Mapping[str, Any] | None = None) -> None:
    """Call ``main(module)`` and leave through ``exit_json`` with what it returns, or through ``fail_json``.

    ``base`` holds the return values that exist in every case; ``main``'s own take precedence. It is read when the module ends, so ``main`` may
    fill in what it learns before it fails. Failures carry ``error``: the code of the engine's error class, ``out_of_memory``, or
    ``internal_error`` for a bug.
    """
    try:
        result = main(module)
    except EngineError as error:
        failure = {"msg": str(error), "error": error.code}
    except OSError as error:
        known = from_os_error(error, "The module could not go on")
        failure = {"msg": str(known), "error": known.code}
    except MemoryError:
        failure = {"msg": "The host has not enough memory for this task.", "error": "out_of_memory"}
    except Exception as error:  # the last resort: a traceback must never reach the user
        failure = {"msg": describe_crash(error), "error": "internal_error"}
    else:
        module.exit_json(**{**(base or {}), **result})
        return
    values = dict(base or {})
    values.update(failure)
    module.fail_json(**values)
