# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Serve a repository: as it is, with other contents in the place of objects, or until death after so many objects.

seed.py REPOSITORY ADDRESS PORTFILE --honest | --lie | --die OBJECTS
"""

from __future__ import annotations

import argparse
import http.server
import os
import pathlib
import sys
import threading
from urllib.parse import unquote

parser = argparse.ArgumentParser()
parser.add_argument("repository", type=pathlib.Path)
parser.add_argument("address")
parser.add_argument("portfile", type=pathlib.Path)
parser.add_argument("--honest", action="store_true")
parser.add_argument("--lie", action="store_true")
parser.add_argument("--die", type=int, default=0)
options = parser.parse_args()
served = 0
counting = threading.Lock()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Header and body in one packet.
    wbufsize = -1

    def do_GET(self) -> None:
        global served
        path = unquote(self.path).lstrip("/")
        try:
            data = (options.repository / path).read_bytes()
        except OSError:
            self.send_error(404)
            return
        is_object = path.startswith("objects/")
        if is_object and options.lie:
            data = b"?" * len(data)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with counting:
            served += is_object
            if options.die and served >= options.die:
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                sys.stderr.write(f"dies in the middle of {path}\n")
                sys.stderr.flush()
                os._exit(1)
        self.wfile.write(data)
        self.wfile.flush()


server = http.server.ThreadingHTTPServer((options.address, 0), Handler)
new = options.portfile.with_suffix(".new")
new.write_text(f"{server.server_address[1]}\n")
new.rename(options.portfile)
server.serve_forever()
