# Copyright (c) composefs.oci contributors
# Simplified BSD License (see LICENSES/BSD-2-Clause.txt or https://opensource.org/licenses/BSD-2-Clause)
# SPDX-License-Identifier: BSD-2-Clause

"""How sources are reached: what a task says about registries, skopeo and signatures."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..formats.ocidocuments import Platform


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
