# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Layers from a peer: another repository behind any static web server, which nobody has to trust.

Two kinds of requests are all there is: ``streams/oci-layer-sha256%3A<diff_id>`` and ``objects/<xx>/<rest>`` below the
base URL. Whoever takes the layer (``pull.objectlayer``) checks every object against its digest and the whole tar
against the diff_id, so a peer that lies can waste time and disk. Both are bounded here, where its answers come in: each
has a length that is taken from a budget before it is read, or pieces that are taken from it as they are decoded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import http.client
import io
import os
import re
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, BinaryIO, Callable
from urllib.parse import quote, urlsplit

from ..formats.digests import ObjectDigest, StreamDigest
from ..errors import (
    AuthFailed,
    DigestMismatch,
    EngineError,
    FormatError,
    ImageNotFound,
    InvalidOption,
    MissingLibrary,
    RegistryUnreachable,
    Stalled,
    TlsFailed,
    from_exception,
)
from ..formats import fsverity, splitstream
from ..formats.reference import Reference
from .source import LayerObjects, Source

if TYPE_CHECKING:
    import ssl

CONNECTIONS = 8
SILENCE = 10.0
"""Seconds without a byte after which a peer is given up."""
SLOW = 30.0
"""Seconds over which a peer must keep the least rate while it is waited for."""

# A splitstream holds what is inline, compressed, and 32 or 64 bytes an object.
STREAM_FACTOR, STREAM_EXTRA = 8, 1 << 20
# The tar that a splitstream may stand for.
TAR_FACTOR, TAR_LEAST = 40, 256 << 20
# Bytes: larger objects are not held in memory, but read from the connection by whoever takes them.
_LARGE = 1 << 20
# Objects that may wait in memory to be taken.
_AHEAD = 64
_PIECE = 64 * 1024
# Bytes that an answer counts for beside its body.
_HEADERS = 256


@dataclasses.dataclass(frozen=True)
class PeerOptions:
    """How peers are reached: a file with certificates of authorities, headers for every request, and the least rate in
    bytes a second (0 for none).
    """

    ca_file: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)
    min_rate: int = 1024
    silence: float = SILENCE
    slow: float = SLOW


def check_headers(headers: Mapping[str, str]) -> None:
    """InvalidOption unless these can be headers; their values, which may be secret, are not repeated."""
    for name, value in headers.items():
        if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,100}", name):
            raise InvalidOption(f"{name!r:.120} cannot be the name of a header.", "Look at 'peer_headers'.")
        if not value.isascii() or not value.isprintable():
            raise InvalidOption(f"The header {name} has a value that is not plain text.", "Look at 'peer_headers'.")


class PeerSource(Source):
    """The peer at ``url``. ``sizes`` tells the bytes of each layer's blob by its diff_id: what it may send is bounded
    by them. InvalidOption if the URL or the file of certificates cannot be.
    """

    delivers_objects = True

    def __init__(self, url: str, algorithm: fsverity.Algorithm, sizes: Mapping[str, int], options: PeerOptions) -> None:
        self.url = check_url(url)
        self.name = f"the peer {url}"
        self._algorithm = algorithm
        self._sizes = sizes
        self._options = options
        self._context: ssl.SSLContext | None = None
        if is_https(url):
            self._context = tls_context(options.ca_file)

    def layer_objects(self, reference: Reference, diff_id: str) -> LayerObjects:
        """Raises ImageNotFound if the peer lacks the layer, and what else may be wrong with a peer."""
        return _PeerLayer(self._connection, diff_id, self._algorithm, self._sizes[diff_id], self._options)

    def _connection(self) -> _Connection:
        return _Connection(self.url, self.name, self._context, self._options)


def sentence(name: str) -> str:
    """The name of a peer as a sentence begins, with its URL as it is: paths tell capital letters from small ones."""
    return name[:1].upper() + name[1:]


def is_https(url: str) -> bool:
    """Whether the peer is asked by TLS; the scheme may be written in any case."""
    return urlsplit(url).scheme == "https"


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """What peers with https are checked against: the certificates in ``ca_file``, or what the host trusts.
    MissingLibrary, or InvalidOption if the file holds none.
    """
    try:
        import ssl  # late: a Python may lack it, and speaks plain HTTP only
    except ImportError as error:
        raise MissingLibrary(
            "The host's Python was built without ssl, so peers cannot be asked by https.",
            "Name peers by http, or use a Python with ssl.",
        ) from error
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise InvalidOption(f"The certificates in {ca_file} cannot be read.", "Name a file in PEM format.") from error


def check_url(text: str) -> str:
    """``text`` if it is the base URL of a peer; else InvalidOption, which does not repeat what may be a password."""
    hint = "Write http://HOST[:PORT]/PATH or https://…; credentials belong into 'peer_headers'."
    try:
        parts = urlsplit(text)
        host, _port = parts.hostname, parts.port
    except ValueError:
        raise InvalidOption("A peer's URL cannot be understood.", hint) from None
    if "@" in parts.netloc:
        raise InvalidOption("A peer's URL holds a user or a password.", hint)
    plain = text.isascii() and text.isprintable() and " " not in text
    if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment or not plain:
        raise InvalidOption(f"{text!r:.200} is no URL of a peer.", hint)
    return text


class _Budget:
    """Bytes that may still come."""

    def __init__(self, left: int, what: str) -> None:
        self._left = left
        self._most = left
        self._what = what
        self._lock = threading.Lock()

    def take(self, n: int) -> None:
        with self._lock:
            self._left -= n
            if self._left < 0:
                raise _lie(f"it sends more than the {self._most} bytes that {self._what} may have")


def _lie(what: str) -> DigestMismatch:
    return DigestMismatch(f"The peer cannot be believed: {what}.", "Somebody must look at it.")


class _Connection:
    """One connection that is kept alive."""

    def __init__(self, url: str, name: str, context: ssl.SSLContext | None, options: PeerOptions) -> None:
        parts = urlsplit(url)
        self._path = parts.path.rstrip("/")
        self._name = name
        self._options = options
        host = parts.hostname or ""
        self._http: http.client.HTTPConnection
        if context is not None:
            self._http = http.client.HTTPSConnection(host, parts.port or 443, timeout=options.silence, context=context)
        else:
            self._http = http.client.HTTPConnection(host, parts.port or 80, timeout=options.silence)
        self._used = False
        self._closed = False

    def get(self, path: str, budget: _Budget, what: str) -> _Body:
        """The body of the answer, which must be read to its end or closed before the next request."""
        try:
            try:
                answer = self._request(path)
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                if not self._used or self._closed:
                    raise
                # A server may close a connection that was idle; that is no fault yet.
                self._http.close()
                answer = self._request(path)
            self._used = True
            return _Body(self, answer, budget, what)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self.failed(error, f"asking for {what}") from error

    def _request(self, path: str) -> http.client.HTTPResponse:
        request = self._http
        request.putrequest("GET", f"{self._path}/{path}", skip_accept_encoding=True)
        request.putheader("Accept-Encoding", "gzip")
        for name, value in self._options.headers.items():
            request.putheader(name, value)
        request.endheaders()
        if self._closed:
            # This request opened it again after close(), and nobody else would end it.
            raise ConnectionAbortedError(errno.ECONNABORTED, os.strerror(errno.ECONNABORTED))
        return request.getresponse()

    def failed(self, error: Exception, doing: str) -> EngineError:
        if isinstance(error, (socket.timeout, TimeoutError)):
            return Stalled(f"{sentence(self._name)} was silent for {self._options.silence:g} seconds, {doing}.")
        if error.__class__.__module__ == "ssl":
            if type(error).__name__ == "SSLCertVerificationError":
                return TlsFailed(f"The certificate of {self._name} is not accepted.", "Look at 'peer_ca_file'.")
            said = str(getattr(error, "reason", None) or type(error).__name__).replace("_", " ").lower()
            return TlsFailed(
                f"{sentence(self._name)} does not speak TLS as this host does: {said}.",
                "If it speaks plain HTTP, its URL begins with http://.",
            )
        if isinstance(error, OSError):
            return RegistryUnreachable(f"Cannot reach {self._name}: {error.strerror or type(error).__name__}.")
        return RegistryUnreachable(f"{sentence(self._name)} does not speak HTTP: {type(error).__name__}.")

    def close(self) -> None:
        """May be called from any thread: a read that is under way fails soon, and no request opens it again."""
        self._closed = True
        sock = self._http.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        self._http.close()


class _Body(io.RawIOBase):
    """The decoded body of an answer. Raises EngineError from its reads."""

    def __init__(self, connection: _Connection, answer: http.client.HTTPResponse, budget: _Budget, what: str) -> None:
        super().__init__()
        self._connection = connection
        self._answer = answer
        self._budget = budget
        self._what = what
        self.wire = _HEADERS
        status = answer.status
        if status != 200:
            answer.close()
            connection.end()
            if status in (404, 410):
                raise ImageNotFound(f"The peer does not have {what}.")
            if status in (401, 403):
                raise AuthFailed(f"The peer answers {status} for {what}.", "Look at 'peer_headers'.")
            raise RegistryUnreachable(f"The peer answers {status} for {what}.")
        if answer.chunked and answer.getheader("Content-Length") is not None:
            # HTTP leaves open which of the two counts, so readers would disagree about the body.
            raise _lie("it tells a length and sends pieces")
        encoding = (answer.getheader("Content-Encoding") or "identity").lower()
        length = answer.getheader("Content-Length")
        if length is not None and not re.fullmatch("[0-9]{1,18}", length):
            raise _lie("it announces a length that is no number")
        self.length = int(length) if length is not None else None
        self._gzip: Any = None
        self._pending = b""
        self._got = 0
        self._finished = False
        if encoding in ("gzip", "x-gzip"):
            self._gzip = zlib.decompressobj(31)
        elif encoding != "identity":
            raise _lie("it uses an encoding that was not asked for")
        elif self.length is None or answer.chunked:
            raise _lie(f"it does not tell the length of {what}")
        else:
            budget.take(self.length)

    @property
    def plain_length(self) -> int | None:
        """The bytes of the decoded body, if the answer tells."""
        return None if self._gzip is not None else self.length

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._plain(len(buffer)) if self._gzip is None else self._inflated(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _raw(self, n: int) -> bytes:
        try:
            data = self._answer.read1(n)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._connection.failed(error, f"sending {self._what}") from error
        self.wire += len(data)
        if n and not data:
            self._finished = True
        return data

    def _plain(self, n: int) -> bytes:
        data = self._raw(n)
        self._got += len(data)
        if not data and n and self._got != self.length:
            raise self._cut()
        return data

    def _cut(self) -> EngineError:
        return RegistryUnreachable(f"The peer cut {self._what} after {self._got} of {self.length} bytes.")

    def _inflated(self, n: int) -> bytes:
        while n:
            if self._gzip.eof:
                if self._pending or self._gzip.unused_data or self._raw(1):
                    raise _lie(f"garbage follows the gzip data of {self._what}")
                return b""
            if not self._pending:
                self._pending = self._raw(_PIECE)
                if not self._pending:
                    raise RegistryUnreachable(f"The peer cut {self._what}.")
            try:
                data: bytes = self._gzip.decompress(self._pending, n)
            except zlib.error as error:
                raise _lie(f"the gzip data of {self._what} is damaged") from error
            self._pending = self._gzip.unconsumed_tail
            if data:
                self._budget.take(len(data))
                return data
        return b""

    def whole(self) -> bytes:
        """All of the body. What it may hold is bounded by the budget."""
        if self.plain_length is not None:
            try:
                data = self._answer.read(self.plain_length)
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise self._connection.failed(error, f"sending {self._what}") from error
            self.wire += len(data)
            self._got = len(data)
            if self._got != self.length:
                raise self._cut()
            return data
        parts: list[bytes] = []
        while True:
            data = self.read(_PIECE)
            if not data:
                return b"".join(parts)
            parts.append(data)

    def close(self) -> None:
        if not self.closed:
            whole = self._finished or (self._gzip is None and self._got == self.length)
            self._answer.close()
            if not whole:
                self._connection.end()  # unread bytes are in the way of the next answer
        super().close()


class _Watch:
    """Ends a connection that is slower than the least rate, whatever is waited for. That may be the end of an answer,
    which a peer can put off for ever with bytes that are no part of its body.
    """

    def __init__(self, connection: _Connection, options: PeerOptions) -> None:
        self.body: _Body | None = None
        self._connection = connection
        self._options = options
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="peer-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        before = 0
        while not self._done.wait(self._options.slow):
            now = self.body.wire if self.body is not None else 0
            if now - before < max(self._options.min_rate * self._options.slow, 1):
                self._connection.close()
                return
            before = now


class _PeerLayer(LayerObjects):
    """One layer: the splitstream is fetched at once, objects by several connections, in the order they are wanted."""

    def __init__(
        self,
        connect: Callable[[], _Connection],
        diff_id: str,
        algorithm: fsverity.Algorithm,
        layer_size: int,
        options: PeerOptions,
    ) -> None:
        self.algorithm = algorithm
        self._connect = connect
        self._options = options
        self._lock = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._connections: list[_Connection] = []
        self._wanted: list[ObjectDigest] = []
        self._place: dict[ObjectDigest, int] = {}
        self._next = 0
        self._taken = 0
        self._ready: dict[ObjectDigest, bytes | _Lent | EngineError] = {}
        self._closed = False
        self._waited = 0.0
        self._came = 0
        self._file: BinaryIO = io.BytesIO()
        connection = connect()
        try:
            limit = STREAM_FACTOR * layer_size + STREAM_EXTRA
            # open_object() watches the clock for objects; this first answer needs somebody of its own to do that.
            with _Watch(connection, options) as watch:
                path = f"streams/{quote(f'oci-layer-{diff_id}')}"
                body = watch.body = connection.get(path, _Budget(limit, "a splitstream"), "the layer")
                self.stream = StreamDigest(ObjectDigest(self._receive(body)))
            self.fetched = body.wire
            found = splitstream.Splitstream.open(self._file, algorithm, splitstream.LAYER)
            most = max(TAR_LEAST, TAR_FACTOR * layer_size)
            if found.size > most:
                raise _lie(f"it claims a layer of {found.size} bytes, where {most} are believed of it")
            self._budget = _Budget(found.size, "the layer's objects together")
            self._connections.append(connection)
        except BaseException:
            self._file.close()
            connection.end()
            raise

    def _receive(self, body: _Body) -> bytes:
        hasher = fsverity.Hasher(self.algorithm)
        started = time.monotonic()
        with body:
            if body.plain_length is None or body.plain_length > _LARGE:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed with the layer
            while True:
                data = body.read(_PIECE)
                if not data:
                    break
                hasher.update(data)
                self._file.write(data)
                waited = time.monotonic() - started
                if waited > self._options.slow and body.wire < self._options.min_rate * waited:
                    raise self._too_slow(body.wire, waited)
        return hasher.digest()

    def splitstream(self) -> BinaryIO:
        self._file.seek(0)
        return self._file

    def expect(self, digests: list[ObjectDigest]) -> None:
        self._wanted = digests
        self._place = {digest: number for number, digest in enumerate(digests)}
        while len(self._connections) < min(CONNECTIONS, len(digests)):
            self._connections.append(self._connect())
        for connection in self._connections[: len(digests)]:
            thread = threading.Thread(target=self._fetch, args=(connection,), name="peer", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _fetch(self, connection: _Connection) -> None:
        """Fetch one object after the other until none is wanted."""
        while True:
            with self._lock:
                while self._next < len(self._wanted) and self._next >= self._taken + _AHEAD and not self._closed:
                    self._lock.wait()
                if self._closed or self._next >= len(self._wanted):
                    return
                digest = self._wanted[self._next]
                self._next += 1
            try:
                self._one(connection, digest)
            except Exception as error:
                # Whatever it is, the reader that waits for the object must hear of it.
                self._tell(digest, from_exception(error, "fetching from the peer"), 0)
                return

    def _one(self, connection: _Connection, digest: ObjectDigest) -> None:
        body = connection.get(f"objects/{fsverity.object_path(digest)}", self._budget, f"object {digest.hex()}")
        with body:
            if body.length is not None and body.length > _LARGE:
                # Its reader takes it from the connection, which is free again after that.
                lent = _Lent(body, self)
                self._tell(digest, lent, 0)
                while not lent.returned.wait(1.0) and not self._closed:
                    pass
            else:
                self._tell(digest, body.whole(), body.wire)

    def _tell(self, digest: ObjectDigest, what: bytes | _Lent | EngineError, wire: int) -> None:
        with self._lock:
            self._ready[digest] = what
            self._came += wire
            self.fetched = (self.fetched or 0) + wire
            self._lock.notify_all()

    def open_object(self, digest: ObjectDigest) -> BinaryIO:
        with self._lock:
            place = self._place.get(digest)
            if place is None:
                raise FormatError(f"Object {digest.hex()} vanished while the layer was taken over.", "Run again.")
            # What lies before has come from elsewhere meanwhile.
            for skipped in self._wanted[self._taken : place]:
                self._drop(self._ready.pop(skipped, None))
            self._taken = place + 1
            self._next = max(self._next, place)
            self._lock.notify_all()
            while digest not in self._ready:
                if not any(thread.is_alive() for thread in self._threads):
                    raise RegistryUnreachable("The peer broke all connections.")
                started = time.monotonic()
                self._lock.wait(1.0)
                self.waited(time.monotonic() - started)
            found = self._ready.pop(digest)
        if isinstance(found, EngineError):
            raise found
        return found if isinstance(found, _Lent) else io.BytesIO(found)  # type: ignore[return-value]

    def _drop(self, what: bytes | _Lent | EngineError | None) -> None:
        if isinstance(what, _Lent):
            what.close()

    def waited(self, seconds: float, came: int = 0) -> None:
        """Count what came while somebody waited. Only such time counts, so that our own slowness is not held against
        the peer.
        """
        self._waited += seconds
        self._came += came
        if came:
            self.fetched = (self.fetched or 0) + came
        if self._waited >= self._options.slow:
            if self._came < self._options.min_rate * self._waited:
                raise self._too_slow(self._came, self._waited)
            self._waited, self._came = 0.0, 0

    def _too_slow(self, came: int, seconds: float) -> Stalled:
        return Stalled(
            f"The peer sent {came} bytes in {seconds:.0f} seconds, less than {self._options.min_rate} a second."
        )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for one in self._ready.values():
                self._drop(one)
            self._lock.notify_all()
        for connection in self._connections:
            connection.close()
        for thread in self._threads:
            thread.join()
        for connection in self._connections:
            connection.end()
        self._file.close()


class _Lent(io.RawIOBase):
    """A large object, whose reader takes it from the connection."""

    def __init__(self, body: _Body, layer: _PeerLayer) -> None:
        super().__init__()
        self._body = body
        self._layer = layer
        self.returned = threading.Event()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        started, before = time.monotonic(), self._body.wire
        n = self._body.readinto(buffer)
        with self._layer._lock:
            self._layer.waited(time.monotonic() - started, self._body.wire - before)
        return n

    def close(self) -> None:
        if not self.closed:
            self.returned.set()
        super().close()


def is_lie(error: EngineError) -> bool:
    """Whether this error means that the peer sent something wrong, rather than nothing."""
    return isinstance(error, (DigestMismatch, FormatError))
