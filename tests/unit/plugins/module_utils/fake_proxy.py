# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An image proxy that fails on purpose, for what the real skopeo cannot be made to do.

Arguments: a JSON object that changes what it does, then what skopeo would get. It keeps the real one's order: one
request at a time, data written by a thread of its own, no end of file before FinishPipe, which waits for the thread.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time

PLAN = json.loads(sys.argv[1])
PIPES: dict[int, tuple[threading.Thread, list[str]]] = {}


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def answer(connection, value=None, pipeid=0, fds=(), error="", **more):
    reply = {"success": not error, "value": value, "pipeid": pipeid, "error": error, **more}
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([json.dumps(reply).encode()], rights)
    for fd in fds:
        os.close(fd)


def send_data(connection, value, data, pause=0.0, stop=-1, failure=""):
    readable, writable = os.pipe()
    verdict = [failure]

    def copy():
        try:
            if pause:
                for byte in data:
                    os.write(writable, bytes([byte]))
                    time.sleep(pause)
                return
            rest = memoryview(data)[: len(data) if stop < 0 else stop]
            while rest:
                rest = rest[os.write(writable, rest) :]
        except BrokenPipeError:
            verdict[0] = "write |1: broken pipe"

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    PIPES[writable] = (thread, verdict)
    answer(connection, value, writable, [readable])


def self_portrait() -> bytes:
    told = " ".join(sys.argv)
    credentials = ""
    match = re.search(r"--authfile (\S+)", told)
    if match:
        with open(match.group(1)) as file:
            credentials = file.read()
        mode = oct(os.stat(match.group(1)).st_mode & 0o777)
    else:
        mode = ""
    with open("/proc/self/environ", "rb") as file:
        environment = file.read().decode("utf-8", "replace")
    fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1]
    return json.dumps(
        {"argv": sys.argv[2:], "environ": environment, "auth": credentials, "mode": mode, "fds": fds}
    ).encode()


def serve(connection, request):
    method, args = request["method"], request["args"]
    plan = PLAN.get(method, {})
    if "stderr" in plan:
        os.write(2, plan["stderr"].encode() * plan.get("times", 1))
    if "exit" in plan:
        os._exit(plan["exit"])
    if "signal" in plan:
        os.kill(os.getpid(), plan["signal"])
    if "sleep" in plan:
        time.sleep(plan["sleep"])
    if "raw" in plan:
        connection.send(plan["raw"].encode())
    elif "error" in plan:
        answer(connection, error=plan["error"], error_code=plan.get("code", ""))
    elif "fds" in plan:
        answer(
            connection,
            plan.get("value"),
            plan.get("pipeid", 0),
            [os.open("/dev/null", os.O_RDONLY) for _each in range(plan["fds"])],
        )
    elif method == "Initialize":
        answer(connection, PLAN.get("version", "0.2.8"))
    elif method == "OpenImage":
        answer(connection, 1)
    elif method in ("GetManifest", "GetFullConfig", "GetLayerInfoPiped"):
        data = self_portrait() if plan.get("portrait") else (plan.get("data", "{}") * plan.get("times", 1)).encode()
        send_data(
            connection,
            plan.get("value", digest(data)),
            data,
            plan.get("pause", 0.0),
            plan.get("stop", -1),
            plan.get("failure", ""),
        )
    elif method == "GetLayerInfo":
        answer(connection, json.loads(plan.get("data", "[]")))
    elif method == "GetBlob":
        data = (plan.get("data", "x") * plan.get("times", 1)).encode()
        send_data(
            connection,
            plan.get("value", args[2]),
            data,
            plan.get("pause", 0.0),
            plan.get("stop", -1),
            plan.get("failure", ""),
        )
    elif method == "FinishPipe":
        thread, verdict = PIPES.pop(args[0])
        thread.join()
        os.close(args[0])
        answer(connection, error=verdict[0])
    else:
        answer(connection, error=f"unknown method: {method}")


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    connection = socket.socket(fileno=0)
    while True:
        packet = connection.recv(32768)
        if not packet:
            time.sleep(PLAN.get("linger", 0))
            os._exit(0)
        serve(connection, json.loads(packet))


main()
