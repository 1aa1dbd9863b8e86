# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A registry whose tags move while they are looked up: each tag answers what is next in its list, the last one for ever.

It serves the blobs of an OCI layout over plain HTTP on 127.0.0.1, manifests and blobs also by digest, and remembers
what it was asked::

    with MovingRegistry(layout, {"app:1": [first, second]}) as registry:
        pull(registry.reference("app:1"), ...)
"""

from __future__ import annotations

import http.server
import json
import re
import threading
from collections.abc import Mapping, Sequence
from types import TracebackType

from ociimage import Layout


class MovingRegistry:
    """``tags`` is NAME:TAG -> digests in the order of the answers. ``lies`` replaces what is behind a digest."""

    def __init__(
        self, layout: Layout, tags: Mapping[str, Sequence[str]], lies: Mapping[str, bytes] | None = None
    ) -> None:
        self.layout = layout
        self.asked: list[str] = []
        self._tags = {name: list(digests) for name, digests in tags.items()}
        self._lies = dict(lies or {})
        self._lock = threading.Lock()
        registry = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                status, media_type, data = registry._answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def reference(self, name: str) -> str:
        """``docker://127.0.0.1:PORT/NAME``."""
        return f"docker://127.0.0.1:{self._server.server_port}/{name}"

    def _answer(self, path: str) -> tuple[int, str, bytes]:
        match = re.fullmatch(r"/v2/(?:(.+)/(manifests|blobs)/([^/]+))?", path)
        if match is None:
            return 404, "text/plain", b""
        name, kind, what = match.groups()
        if name is None:
            return 200, "application/json", b"{}"
        digest = what
        if kind == "manifests":
            with self._lock:
                self.asked.append(f"{name}:{what}" if ":" not in what else f"{name}@{what}")
                answers = self._tags.get(f"{name}:{what}")
                if answers:
                    digest = answers.pop(0) if len(answers) > 1 else answers[0]
        try:
            data = self._lies.get(digest) or self.layout.read(digest)
        except (OSError, ValueError):
            return 404, "text/plain", b""
        if kind == "blobs":
            return 200, "application/octet-stream", data
        document = json.loads(data)
        kinds = "index" if "manifests" in document else "manifest"
        return 200, document.get("mediaType") or f"application/vnd.oci.image.{kinds}.v1+json", data

    def __enter__(self) -> MovingRegistry:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
