# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Which source an image comes from."""

from __future__ import annotations

from ..errors import PolicyRejected
from ..formats.reference import Reference
from ..source.options import ProxyOptions
from ..source.policy import judged_without_skopeo
from ..source.source import Source

_LAYOUTS = ("oci", "oci-archive")


def open_source(options: ProxyOptions, reference: Reference) -> Source:
    """The source for ``reference``; ``options.platform`` is the platform to choose.

    Layouts are read without skopeo, unless the policy for signatures asks for more than accepting anything: then skopeo
    reads them and checks. Nothing can check the images of another repository: PolicyRejected in that case.
    """
    if reference.transport == "composefs":
        policy = judged_without_skopeo(options, "composefs")
        if policy is None:
            raise PolicyRejected(
                "The signature policy asks for more than accepting anything, and nobody can check signatures of an "
                f"image in {reference.path}.",
                "Accept anything of the transport composefs in the policy, or set unenforced_policy to ignore.",
            )
        from .local import LocalSource  # late, as the others: a task needs one of them

        return LocalSource(policy)
    if reference.transport in _LAYOUTS:
        policy = judged_without_skopeo(options, reference.transport)
        if policy is not None:
            from ..source.layout import LayoutSource

            return LayoutSource(options.platform, policy)
    from ..source.skopeosource import SkopeoSource

    return SkopeoSource(options)
