# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Where a registry sends those who log in: found out before skopeo goes there with the password.

A registry that wants a token names a *realm*, any address, and its clients log in there. If that is plain HTTP the
password would cross the network for everyone to read, although the registry itself was reached by TLS. So the question
is asked here first, without any secret.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import socket
import threading
from urllib.parse import urlsplit

from ..errors import TlsFailed
from .options import ProxyOptions

_LIMIT = 10.0
_DEFAULT_AUTH = (
    "${REGISTRY_AUTH_FILE}",
    "${XDG_RUNTIME_DIR}/containers/auth.json",
    "/run/containers/0/auth.json",
    "~/.config/containers/auth.json",
    "~/.docker/config.json",
)


def has_credentials(options: ProxyOptions) -> bool:
    """Whether there is anything that skopeo might send to a registry."""
    if options.username or options.auth_file:
        return True
    places = (os.path.expanduser(os.path.expandvars(place)) for place in _DEFAULT_AUTH)
    return any("$" not in place and os.path.exists(place) for place in places)


def check_realm(options: ProxyOptions, registry: str) -> None:
    """Raise TlsFailed if ``registry`` wants people to log in over plain HTTP while certificates are to be validated.

    If it cannot be asked, skopeo will not reach it either, or it speaks plain HTTP by the host's own configuration.
    """
    if options.tls_verify is False or not has_credentials(options):
        return
    for challenge in _challenges(options, registry):
        match = re.match(r'(?is)\s*bearer\s.*?\brealm\s*=\s*"?([^",\s]*)', challenge)
        if match is not None and urlsplit(match.group(1)).scheme.lower() == "http":
            host = urlsplit(match.group(1)).hostname or "somewhere"
            raise TlsFailed(
                f"The registry {registry} wants the password to be sent to {host} over plain HTTP.",
                "Its operator must give it a realm that begins with https. Nothing was sent.",
            )


def _challenges(options: ProxyOptions, registry: str) -> list[str]:
    """What the registry answers to a visitor without credentials."""
    # Imported late: most runs send no password. Where ssl is missing, the registry cannot be asked.
    import http.client
    from urllib.request import getproxies, proxy_bypass

    # Nobody is trusted here and nothing is sent, so the certificate does not matter: skopeo judges it.
    try:
        import ssl
    except ImportError:
        return []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    for place in (options.cert_dir, f"/etc/containers/certs.d/{registry}", f"/etc/docker/certs.d/{registry}"):
        for certificate in glob.glob(os.path.join(glob.escape(place), "*.cert")) if place else ():
            with contextlib.suppress(OSError, ssl.SSLError):
                context.load_cert_chain(certificate, certificate[: -len("cert")] + "key")
    host = "registry-1.docker.io" if registry == "docker.io" else registry
    proxy = None if proxy_bypass(host) else urlsplit(getproxies().get("https", ""))
    connection = None
    alarm = None
    try:
        if proxy is not None and proxy.hostname:
            connection = http.client.HTTPSConnection(
                proxy.hostname, proxy.port or 3128, timeout=min(options.timeout, _LIMIT), context=context
            )
            connection.set_tunnel(host)
        else:
            connection = http.client.HTTPSConnection(host, timeout=min(options.timeout, _LIMIT), context=context)
        connection.connect()
        # Every byte may come in time and the answer still never end, so a timer cuts the connection at the limit.
        alarm = threading.Timer(min(options.timeout, _LIMIT), _cut, (connection.sock,))
        alarm.daemon = True
        alarm.start()
        connection.request("GET", "/v2/", headers={"Accept": "*/*"})
        return connection.getresponse().headers.get_all("WWW-Authenticate") or []
    except (OSError, http.client.HTTPException, ValueError):
        return []
    finally:
        if alarm is not None:
            alarm.cancel()
            alarm.join()  # processes are forked soon, and none should find a thread that holds a lock
        if connection is not None:
            connection.close()


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
