# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Bring what was made here to a registry or another place that skopeo can write."""

from __future__ import annotations

import dataclasses
import os

from ..errors import ImageNotFound, Stalled
from ..formats.reference import Reference
from .options import ProxyOptions
from .skopeo import Child, command, top_digest
from .skopeowords import classify

# The slowest that a push may be, in bytes a second, beside the timeout for its answers.
_SLOWEST = 1024


def manifest_at(options: ProxyOptions, reference: Reference) -> bytes | None:
    """The bytes of the manifest (or index) at ``reference``; None if nothing is there."""
    if reference.path and not os.path.exists(reference.path):
        return None
    try:
        return top_digest(options, reference)[1]
    except ImageNotFound:
        return None


def push(options: ProxyOptions, layout: Reference, dest: Reference, size: int) -> None:
    """Copy one image of a local OCI layout, which has ``size`` bytes, to ``dest`` as it is.

    What lies in the layout was made here, so no policy for signatures is asked. skopeo has its temporary files in
    ``options.tmpdir``, and leaves them there when it is killed. Raises AuthFailed, RegistryUnreachable
    and what else skopeo may say.
    """
    what = f"Pushing to {dest.text}"
    # The policy judges what comes in, not what goes out.
    chosen = dataclasses.replace(options, insecure_policy=True, policy=None, platform=None)
    with command(chosen, dest, ("copy", "--quiet"), ("--", layout.text, dest.text), side="dest-") as (
        argv,
        fds,
    ):
        null = os.open(os.devnull, os.O_RDWR)
        try:
            child = Child(argv, null, null, fds, chosen.tmpdir)
        finally:
            os.close(null)
    try:
        status = child.wait(options.timeout + size / _SLOWEST)
        if status is None:
            raise Stalled(
                f"skopeo did not end within {options.timeout + size / _SLOWEST:.0f} seconds.",
                "Check the network and the registry.",
                doing=what,
            )
        if status != 0:
            raise classify(options, what, child.words())
    finally:
        child.close()
