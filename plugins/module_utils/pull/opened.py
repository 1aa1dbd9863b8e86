# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""The sources that one pull has open, each with the credentials that are meant for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from ..formats.ocidocuments import Platform, parse_platform
from ..formats.reference import Reference, parse_reference
from ..progress import Progress
from ..source.options import ProxyOptions, registry_to_log_in
from ..source.source import Patient
from .limits import Limits
from .plan import Request
from .sources import open_source


class Sources:
    """One source for all images of a pull that it can serve with the same options. InvalidOption where ``proxy`` has a
    password and it is not clear which registry that is for.
    """

    def __init__(
        self, proxy: ProxyOptions, retries: int, progress: Progress, limits: Limits, requests: Sequence[Request]
    ) -> None:
        self._proxy = proxy
        self._retries = retries
        self._progress = progress
        self._limits = limits
        self._sources: dict[tuple[str, str, Platform | None, _Credentials | None], Patient] = {}
        self._registry = registry_to_log_in(
            proxy,
            (parse_reference(request.ref) for request in requests if not _has_own(request) and not request.local),
            "Give each image a username and password of its own, or name an auth_file.",
        )

    def source(self, reference: Reference, platform: str, request: Request | None = None) -> Patient:
        """The source for a reference, of ``request`` if given."""
        wanted = parse_platform(platform) if platform else None
        credentials = self._credentials(reference, request)
        key = (reference.transport, reference.registry, wanted, credentials)
        if key not in self._sources:
            timeout = self._limits.left(self._proxy.timeout)
            username, password, auth_file = credentials or (None, None, self._proxy.auth_file)
            options = dataclasses.replace(
                self._proxy,
                platform=wanted,
                timeout=timeout,
                username=username,
                password=password,
                auth_file=auth_file,
            )
            source = open_source(options, reference)
            self._sources[key] = Patient(source, self._retries, self._progress, lambda: self._limits.left(0))
        return self._sources[key]

    def _credentials(self, reference: Reference, request: Request | None) -> _Credentials | None:
        if request is not None and _has_own(request):
            return _Credentials(request.username, request.password, request.auth_file)
        if self._registry is not None and reference.registry == self._registry:
            return _Credentials(self._proxy.username, self._proxy.password)
        return None

    @property
    def retried(self) -> int:
        return sum(source.retried for source in self._sources.values())

    def close(self) -> None:
        for source in self._sources.values():
            source.close()


class _Credentials(NamedTuple):
    """A user and a password for one registry, or a file that has them."""

    username: str | None
    password: str | None
    auth_file: str | None = None


def _has_own(request: Request) -> bool:
    """Whether an image has credentials of its own; those of the task then are not for it."""
    return request.username is not None or request.auth_file is not None
