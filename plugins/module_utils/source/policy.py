# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The policy for signatures (containers-policy.json(5)): whether it asks for anything, and what follows for each way to
read images.

Nothing here verifies a signature; skopeo does that. Where skopeo cannot, or where it does not read the image, the
policy must ask for nothing.
"""

from __future__ import annotations

import os
import stat
from typing import Any

from ..errors import EngineError, PolicyRejected, SkopeoTooOld
from ..formats.ocidocuments import MAX_MANIFEST
from ..formats.strictjson import load_json
from .options import ProxyOptions
from .source import ACCEPT_ANYTHING, IGNORED


def judged_without_skopeo(options: ProxyOptions, transport: str) -> str | None:
    """How the policy is applied to images of ``transport`` that skopeo does not read: ``accept_anything`` or
    ``ignored``. None if only skopeo may read them.

    Raises PolicyRejected if there is a policy that cannot be read.
    """
    if options.insecure_policy or options.unenforced_policy == "ignore":
        return ACCEPT_ANYTHING if _asks_for_nothing(options, transport, strict=False) else IGNORED
    return ACCEPT_ANYTHING if _asks_for_nothing(options, transport, strict=True) else None


def _asks_for_nothing(options: ProxyOptions, transport: str, strict: bool) -> bool:
    name = policy_path(options.policy)
    if not options.policy and not os.path.lexists(name):
        return True
    try:
        policy = _read(name)
    except (OSError, EngineError, ValueError) as error:
        if not strict:
            return False
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error).rstrip(".")
        raise PolicyRejected(
            f"The signature policy {name} cannot be read: {why}.",
            "Repair it as containers-policy.json(5) says, or name another one with signature_policy.",
        ) from error
    return not _demand(policy, name, transport)


def check_unenforced_policy(options: ProxyOptions, transport: str = "") -> None:
    """Raise SkopeoTooOld if the policy asks for anything: the proxy of an old skopeo enforces no policy. With
    ``transport`` only what the policy asks of its images counts.
    """
    if options.unenforced_policy == "ignore" or options.insecure_policy:
        return
    demand = policy_demand(options.policy, transport)
    if demand:
        raise SkopeoTooOld(
            f"This skopeo is too old to enforce a signature policy (1.13 is needed), and {demand}.",
            "Install a newer skopeo, or set the option unenforced_policy to ignore to go on without the checks.",
        )


def policy_path(path: str | None) -> str:
    """The policy.json that skopeo reads: the one given, else the user's, else the system's."""
    if path:
        return path
    users = os.path.join(os.environ.get("HOME") or os.path.expanduser("~"), ".config/containers/policy.json")
    return users if os.path.exists(users) else "/etc/containers/policy.json"


def policy_demand(path: str | None = None, transport: str = "") -> str:
    """What the policy asks for beyond accepting everything, as part of a sentence; empty if nothing
    (containers-policy.json(5)).

    With ``transport`` only what holds for its images counts, for whatever scope within it.
    """
    name = policy_path(path)
    try:
        return _demand(_read(name), name, transport)
    except FileNotFoundError:
        return f"there is no policy {name}, without which newer ones refuse every image"
    except (OSError, EngineError, ValueError) as error:
        return f"the policy {name} cannot be read ({error})"


def _read(name: str) -> dict[str, Any]:
    # Anything may have the name, and a FIFO must not make us wait. Links are followed: the administrator made them.
    with open(os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("it is not a regular file")
        policy = load_json(file.read(MAX_MANIFEST + 1), MAX_MANIFEST, f"policy {name}")
    if not isinstance(policy, dict):
        raise ValueError("it is not a JSON object")
    return policy


def _demand(policy: dict[str, Any], name: str, transport: str) -> str:
    scopes: list[tuple[str, Any]] = []
    transports = policy.get("transports", {})
    for kind, names in (transports if isinstance(transports, dict) else {"transports": None}).items():
        if transport not in ("", kind) and isinstance(names, dict):
            continue
        scopes += (
            [(f"{kind}:{scope}", demands) for scope, demands in names.items()]
            if isinstance(names, dict)
            else [(kind, None)]
        )
    if not transport or f"{transport}:" not in dict(scopes):
        scopes.insert(0, ("default", policy.get("default")))
    for scope, demands in scopes:
        if (
            not isinstance(demands, list)
            or not demands
            or any(item != {"type": "insecureAcceptAnything"} for item in demands)
        ):
            return f"the policy {name} asks for more than insecureAcceptAnything ({scope!r:.200})"
    return ""
