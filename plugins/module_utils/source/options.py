# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""How sources are reached: what a task says about registries, skopeo and signatures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidOption
from ..formats.ocidocuments import Platform
from ..formats.reference import Reference


@dataclass(frozen=True)
class ProxyOptions:
    """How skopeo is run and how it reaches the source; the modules' options of the same names say more.

    ``timeout`` is in seconds: the longest silence within one request. ``policy`` is the path of a policy.json, None the
    host's. ``unenforced_policy`` (``refuse`` or ``ignore``) says what to do where skopeo is too old to enforce it.
    """

    executable: tuple[str, ...] = ("skopeo",)
    auth_file: str | None = None
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls_verify: bool | None = None
    cert_dir: str | None = None
    policy: str | None = None
    insecure_policy: bool = False
    unenforced_policy: str = "refuse"
    platform: Platform | None = None
    tmpdir: str | None = None
    timeout: float = 120.0


def options_of(params: Mapping[str, Any], platform: Platform | None = None) -> ProxyOptions:
    """The options of a task, as far as its module has them. InvalidOption for numbers that make no sense."""
    at_least(params, timeout=1, retries=0)
    known = {
        "executable": (params["executable"],),
        "tls_verify": params["validate_certs"],
        "cert_dir": params["ca_cert_dir"],
        "policy": params.get("signature_policy"),
    }
    names = ("auth_file", "username", "password", "unenforced_policy", "timeout", "tmpdir")
    return ProxyOptions(**known, **{name: params[name] for name in names if name in params}, platform=platform)


def registry_to_log_in(options: ProxyOptions, references: Iterable[Reference], hint: str) -> str | None:
    """The registry that user name and password are for; None if there are none, or no reference leads to a registry.

    InvalidOption, with ``hint``, if the references lead to several: the password would go to each that asks.
    """
    if options.username is None:
        return None
    registries = sorted({reference.registry for reference in references if reference.is_remote})
    if len(registries) > 1:
        raise InvalidOption(
            f"One user name and password are given for images of {len(registries)} registries: "
            f"{', '.join(registries)}."[:1000],
            hint,
        )
    return registries[0] if registries else None


def at_least(params: Mapping[str, Any], **bounds: int) -> None:
    """InvalidOption if one of these options was given and is smaller than its bound."""
    for option, least in bounds.items():
        if params.get(option) is not None and params[option] < least:
            raise InvalidOption(f"The option {option} is {params[option]}.", f"It must be at least {least}.")
