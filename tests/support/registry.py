# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real registry (the distribution's ``docker-registry``) on a free loopback port: plain, with TLS of its own CA, with
user and password.

In Python::

    with Registry(directory, tls=True, user="u", password="p") as registry:
        registry.push("oci:/some/layout:latest", "team/app:1")
        ... registry.reference("team/app:1"), registry.ca_directory ...

From the command line::

    registry.py start --dir D [--tls] [--user U --password P] [--port N]    # writes D/pid, D/port, D/url; prints
    127.0.0.1:PORT registry.py push --dir D OCI_DIR[:TAG] NAME:TAG [--format v2s2] [--compress zstd] registry.py stop
    --dir D
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import pathlib
import shutil
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Sequence
from types import TracebackType

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from aptroot import Unavailable
from ociimage import skopeo_copy
from ports import free_port

START_SECONDS = 15.0


def find_registry() -> str:
    """The registry's program, or `Unavailable`."""
    for name in ("docker-registry", "registry"):
        found = shutil.which(name)
        if found:
            return found
    raise Unavailable("docker-registry is not installed (Debian package docker-registry)")


def _openssl(*arguments: str) -> None:
    if not shutil.which("openssl"):
        raise Unavailable("openssl is not installed")
    done = subprocess.run(
        ["openssl", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stdout}")


def make_certificates(
    directory: pathlib.Path, addresses: Sequence[str] = ("127.0.0.1", "::1"), names: Sequence[str] = ("localhost",)
) -> None:
    """ca.crt, server.crt and server.key in ``directory``; the CA signs nothing else. Strict enough for Python 3.13,
    which insists on RFC 5280.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = str(directory) + "/"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    usage = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    _openssl(
        "req",
        "-x509",
        *curve,
        "-days",
        "30",
        "-subj",
        "/CN=test CA",
        *usage,
        "-keyout",
        path + "ca.key",
        "-out",
        path + "ca.crt",
    )
    _openssl(
        "req", "-new", *curve, "-subj", "/CN=test registry", "-keyout", path + "server.key", "-out", path + "server.csr"
    )
    extensions = directory / "server.ext"
    wanted = ",".join([*(f"IP:{address}" for address in addresses), *(f"DNS:{name}" for name in names)])
    identifiers = "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
    extensions.write_text(
        f"subjectAltName={wanted}\nkeyUsage=critical,digitalSignature\nextendedKeyUsage=serverAuth\nbasicConstraints=CA:FALSE\n{identifiers}"
    )
    signing = (
        "-CA",
        path + "ca.crt",
        "-CAkey",
        path + "ca.key",
        "-CAcreateserial",
        "-days",
        "30",
        "-extfile",
        str(extensions),
    )
    _openssl("x509", "-req", "-in", path + "server.csr", *signing, "-out", path + "server.crt")


def bcrypt(password: str) -> str:
    """A bcrypt hash, the only kind that the registry takes."""
    if shutil.which("htpasswd"):
        done = subprocess.run(
            ["htpasswd", "-niB", "-C", "5", "user"], input=password, stdout=subprocess.PIPE, check=True, text=True
        )
        return done.stdout.strip().split(":", 1)[1]
    # Everything Debian has perl, whose crypt() is libxcrypt's.
    salt = base64.b64encode(os.urandom(16), b"./").decode()[:21] + "."
    program = "$_ = <STDIN>; print crypt($_, $ARGV[0])"
    done = subprocess.run(
        ["perl", "-e", program, "$2y$05$" + salt], input=password, stdout=subprocess.PIPE, check=True, text=True
    )
    if not done.stdout.startswith("$2y$"):
        raise Unavailable("neither htpasswd nor a crypt() with bcrypt is there")
    return done.stdout


class Registry:
    """One registry process; everything it writes lies in ``directory``."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        tls: bool = False,
        user: str = "",
        password: str = "",
        port: int = 0,
        storage: str | os.PathLike[str] | None = None,
        access_log: bool = False,
    ) -> None:
        self.directory = pathlib.Path(directory).resolve()
        self.tls, self.user, self.password, self.port = tls, user, password, port
        self.access_log = access_log
        self.storage = pathlib.Path(storage).resolve() if storage else self.directory / "data"
        self.process: subprocess.Popen[bytes] | None = None

    # -- what tests ask for

    @property
    def address(self) -> str:
        """``127.0.0.1:PORT``."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    @property
    def ca_directory(self) -> pathlib.Path:
        """What ``--cert-dir`` of skopeo wants: a directory that holds only ca.crt."""
        return self.directory / "trust"

    def reference(self, name: str) -> str:
        """``docker://127.0.0.1:PORT/NAME``."""
        return f"docker://{self.address}/{name}"

    def auth_file(self) -> pathlib.Path:
        """An auth.json with the right user and password."""
        path = self.directory / "auth.json"
        secret = base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        path.write_text(json.dumps({"auths": {self.address: {"auth": secret}}}))
        path.chmod(0o600)
        return path

    def push(self, source: str, name: str, *options: str) -> str:
        """Copy an image (skopeo syntax; a bare path is an OCI layout) into the registry; returns its reference."""
        if source.partition(":")[0] not in (
            "oci",
            "dir",
            "docker",
            "docker-archive",
            "oci-archive",
            "containers-storage",
        ):
            source = "oci:" + source
        flags = [f"--dest-cert-dir={self.ca_directory}"] if self.tls else ["--dest-tls-verify=false"]
        flags += [f"--dest-authfile={self.auth_file()}"] if self.user else ["--dest-no-creds"]
        skopeo_copy(source, self.reference(name), *flags, *options)
        return self.reference(name)

    def request(
        self, method: str, path: str, headers: dict[str, str] | None = None, body: bytes | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """One HTTP request as the right user; returns status, headers (lower case) and body."""
        connection: http.client.HTTPConnection
        if self.tls:
            connection = http.client.HTTPSConnection(
                "127.0.0.1",
                self.port,
                timeout=30,
                context=ssl.create_default_context(cafile=str(self.ca_directory / "ca.crt")),
            )
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        every = dict(headers or {})
        if self.user:
            every["Authorization"] = "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=every)
            answer = connection.getresponse()
            return answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()

    def put_manifest(self, name: str, tag: str, data: bytes, media_type: str) -> str:
        """Put a manifest as it is, past every check of a client (the registry itself wants the blobs to be there);
        returns its digest.
        """
        status, headers, body = self.request("PUT", f"/v2/{name}/manifests/{tag}", {"Content-Type": media_type}, data)
        if status != 201:
            raise RuntimeError(f"the registry refused the manifest: {status} {body.decode(errors='replace')}")
        return headers["docker-content-digest"]

    def blob_file(self, digest: str) -> pathlib.Path:
        """Where the registry keeps a blob on disk (to spoil it there)."""
        value = digest.split(":")[1]
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    # -- life

    def _configuration(self) -> str:
        # JSON is YAML.
        http_part: dict[str, object] = {"addr": self.address, "headers": {"X-Content-Type-Options": ["nosniff"]}}
        if self.tls:
            http_part["tls"] = {
                "certificate": str(self.directory / "tls/server.crt"),
                "key": str(self.directory / "tls/server.key"),
            }
        document: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": not self.access_log}},
            "storage": {"filesystem": {"rootdirectory": str(self.storage)}, "delete": {"enabled": True}},
            "http": http_part,
        }
        if self.user:
            document["auth"] = {"htpasswd": {"realm": "test", "path": str(self.directory / "htpasswd")}}
        return json.dumps(document)

    def start(self) -> Registry:
        program = find_registry()
        self.storage.mkdir(parents=True, exist_ok=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.tls:
            if not (self.directory / "tls/server.crt").exists():
                make_certificates(self.directory / "tls")
            self.ca_directory.mkdir(exist_ok=True)
            shutil.copyfile(self.directory / "tls/ca.crt", self.ca_directory / "ca.crt")
        if self.user:
            (self.directory / "htpasswd").write_text(f"{self.user}:{bcrypt(self.password)}\n")
        fixed = self.port
        for attempt in range(3):
            # The port may be taken between the look and the start: then the registry ends, and another one is tried.
            self.port = fixed or free_port()
            (self.directory / "config.yml").write_text(self._configuration())
            with open(self.directory / "log", "ab") as log:
                self.process = subprocess.Popen(
                    [program, "serve", str(self.directory / "config.yml")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env={key: value for key, value in os.environ.items() if not key.startswith(("REGISTRY_", "OTEL_"))},
                )
            if self._wait():
                break
            self.stop()
            if attempt == 2 or fixed:
                raise RuntimeError(f"the registry did not start: {(self.directory / 'log').read_text()[-800:]}")
        assert self.process is not None
        for name, text in (("pid", str(self.process.pid)), ("port", str(self.port)), ("url", self.url)):
            (self.directory / name).write_text(text + "\n")
        return self

    def _wait(self) -> bool:
        assert self.process is not None
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.request("GET", "/v2/")[0] == 200:
                    return self.process.poll() is None
            time.sleep(0.03)
        return False

    def stop(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                try:
                    self.process.wait(5)
                except subprocess.TimeoutExpired:
                    self.process.kill()
            self.process.wait()
            self.process = None
        (self.directory / "pid").unlink() if (self.directory / "pid").exists() else None

    def __enter__(self) -> Registry:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def _saved(directory: pathlib.Path) -> Registry:
    """The registry that an earlier ``start`` left running in ``directory``."""
    if not (directory / "port").exists():
        raise SystemExit(f"no registry was started in {directory}")
    settings = json.loads((directory / "settings.json").read_text())
    return Registry(directory, **settings, port=int((directory / "port").read_text()))


def _stop_saved(directory: pathlib.Path) -> None:
    pid_file = directory / "pid"
    if not pid_file.exists():
        return
    pid = int(pid_file.read_text())
    # The number may belong to somebody else by now: only what runs on our configuration is ours to stop.
    with contextlib.suppress(OSError):
        if str(directory / "config.yml").encode() in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGTERM)
            end = time.monotonic() + 5
            while pathlib.Path(f"/proc/{pid}/cmdline").read_bytes():
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
    pid_file.unlink()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    start, push, stop = (commands.add_parser(name) for name in ("start", "push", "stop"))
    for command in (start, push, stop):
        command.add_argument("--dir", type=pathlib.Path, required=True)
    start.add_argument("--port", type=int, default=0)
    start.add_argument("--tls", action="store_true")
    start.add_argument("--user", default="")
    start.add_argument(
        "--password",
        default=os.environ.get("REGISTRY_PASSWORD", ""),
        help="better: the environment variable REGISTRY_PASSWORD",
    )
    push.add_argument("source", help="OCI layout (PATH or PATH:TAG) or any reference of skopeo")
    push.add_argument("name", help="NAME:TAG in the registry")
    push.add_argument("--format", choices=("oci", "v2s2"))
    push.add_argument("--compress", choices=("gzip", "zstd", "zstd:chunked"))
    push.add_argument("--all", action="store_true", help="every platform of an index")
    options = parser.parse_args(arguments)
    directory = options.dir.resolve()
    try:
        if options.command == "start":
            _stop_saved(directory)
            registry = Registry(
                directory, tls=options.tls, user=options.user, password=options.password, port=options.port
            ).start()
            settings = directory / "settings.json"
            settings.touch(0o600)
            settings.write_text(json.dumps({"tls": options.tls, "user": options.user, "password": options.password}))
            print(registry.address)
        elif options.command == "push":
            flags = [f"--format={options.format}"] if options.format else []
            flags += [f"--dest-compress-format={options.compress}"] if options.compress else []
            print(_saved(directory).push(options.source, options.name, *flags, *(["--all"] if options.all else [])))
        else:
            _stop_saved(directory)
    except (Unavailable, RuntimeError) as error:
        print(f"registry.py: {error}", file=sys.stderr)
        return 77 if isinstance(error, Unavailable) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
