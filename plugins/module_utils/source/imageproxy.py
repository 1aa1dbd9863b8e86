# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""A client of ``skopeo experimental-image-proxy``, protocol 0.2.3 to 0.2.8: images of every transport as documents and
blob pipes.

The proxy serves one connection, a sequenced-packet socket that is its standard input: one JSON request, one JSON reply,
in turn. Data comes through pipes whose read ends travel with the replies. What the protocol leaves to its client is
done here:

* Nothing waits for ever. skopeo waits for a silent server without end, so every request has a deadline; when it passes,
  skopeo is killed and the caller gets ``Stalled``. After that the proxy is of no more use and a new one must be
  started.
* A pipe has no end of file before FinishPipe was called, and FinishPipe blocks the server until the pipe is drained.
  Small documents are read while FinishPipe is under way. The pipes of blobs are handed out (``get_blob``); whoever
  drains them counts the bytes, and then ``finish_pipe`` gives skopeo's verdict.
* The process dies with its parent, is always reaped, and never shows a secret in its arguments, its environment or its
  messages.

There are no threads in here, so a caller may fork at any time.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from ..errors import (
    FILES,
    AuthFailed,
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InvalidDocument,
    InvalidReference,
    LimitReached,
    OutOfMemory,
    PolicyRejected,
    ProxyFailed,
    SkopeoTooOld,
    Stalled,
    UnsupportedMediaType,
    exhausted,
)
from ..formats.digests import digest_of, is_digest
from ..formats.ocidocuments import Descriptor, MAX_CONFIG, MAX_LAYERS, MAX_MANIFEST, MAX_SIZE
from ..formats.reference import Reference
from ..formats.strictjson import load_json
from .options import ProxyOptions
from .policy import check_unenforced_policy
from .skopeo import Child, Scratch, command, readable
from .skopeowords import INSTALL, NOT_SKOPEO, classify, scrub

REQUEST = 32768  # the longest request that skopeo reads
REPLY = 262144  # replies have up to 32 KiB, too, but a list of layers may be longer, and skopeo does not cut it
_ROOM = 16  # fds
OLDEST = (0, 2, 3)
_POLICY_ENFORCED = (0, 2, 6)
_LAYER_INFO = (0, 2, 5)
_LAYER_INFO_PIPED = (0, 2, 7)
_MSG_CMSG_CLOEXEC = 0x40000000  # the socket module names it only since Python 3.11 or so


class BlobPipe(NamedTuple):
    """A blob on its way: the read end of the pipe (the receiver closes it), the id for ``finish_pipe``, and the bytes
    to expect.
    """

    fd: int
    pipeid: int
    size: int


class _Reply(NamedTuple):
    value: Any
    pipeid: int
    fd: int  # -1: none


class ImageProxy:
    """One running proxy for one reference (and others in the same registry). A context manager; start it from a thread
    that lives as long as it is used.

    Requests may come from any thread, one is under way at a time. ``kill`` may be called while another thread is in a
    request.
    """

    def __init__(self, options: ProxyOptions, reference: Reference) -> None:
        self.options = options
        self.reference = reference
        self.version: tuple[int, int, int] = (0, 0, 0)
        self.protocol_version = ""
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._scratch: Scratch | None = None
        self._socket: socket.socket | None = None
        self._broken = ""

    def __enter__(self) -> ImageProxy:
        if self._child is None:
            self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Start skopeo and agree on a version. Raises SkopeoMissing, SkopeoTooOld, PolicyRejected, AuthFailed,
        Stalled, ProxyFailed.
        """
        if self._child is None:
            self.launch()
        try:
            self._initialize()
        except BaseException:
            self.close()
            raise

    def launch(self) -> None:
        """Start the program and do not wait for it: it gets ready while something else is asked. Raises SkopeoMissing,
        and errors for wrong options.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                options, place = self.options, None
                if not self.reference.is_remote:
                    # Blobs of a registry come as they are; skopeo may unpack those of other transports first.
                    self._scratch = Scratch(options.tmpdir)
                    place = self._scratch.path
                    options = dataclasses.replace(options, tmpdir=place)
                with command(options, self.reference, ("experimental-image-proxy",), ()) as (argv, fds):
                    self._child = Child(argv, theirs.fileno(), subprocess.DEVNULL, fds, place)
            except BaseException:
                ours.close()
                self._clean_up()
                raise
        self._socket = ours

    def _initialize(self) -> None:
        value = self._call("Initialize", what="Starting skopeo").value
        match = re.match(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})", value) if isinstance(value, str) else None
        if match is None:
            self._violated("Initialize", f"the version {value!r:.100}")
        self.protocol_version = match.group()
        self.version = (int(match.group(1)), int(match.group(2)), int(match.group(3)))
        if self.version < OLDEST:
            raise SkopeoTooOld(
                f"skopeo speaks version {self.protocol_version} of the image proxy protocol; 0.2.3 is needed.", INSTALL
            )
        if self.reference.transport == "containers-storage" and self.version < _LAYER_INFO:
            raise self._too_old_for_storage()
        if self.version < _POLICY_ENFORCED and not self.options.insecure_policy:
            check_unenforced_policy(self.options, self.reference.transport)

    @property
    def enforces_policy(self) -> bool:
        """Whether this skopeo checks images against the signature policy."""
        return self.version >= _POLICY_ENFORCED

    # -- images

    def open_image(self, reference: Reference | None = None) -> int:
        """Contact the source and return the number of the opened image.

        Without ``reference`` it is the one that the proxy was made for. Another one must be in the same registry,
        because the credentials are for that.
        """
        chosen = reference or self.reference
        value = self._call("OpenImage", chosen.text, what=f"Opening {chosen.text}").value
        if value.__class__ is not int or not 0 < value <= MAX_SIZE:
            self._violated("OpenImage", f"the image number {value!r:.100}")
        return value

    def get_manifest(self, image: int) -> tuple[str, bytes]:
        """``sha256:<hex>`` of the platform's manifest as the source has it, and the manifest in OCI's format.

        For a Docker manifest the bytes are converted, and their digest is another one. For an index skopeo chooses the
        platform.
        """
        value, data = self._document("GetManifest", (image,), MAX_MANIFEST, f"manifest of {self.reference.text}")
        if not is_digest(value):
            if isinstance(value, str) and ":" in value[:20]:
                raise UnsupportedMediaType(
                    f"The manifest of {self.reference.text} has the digest {value!r:.200}.",
                    "Only sha256 digests can be stored.",
                )
            self._violated("GetManifest", f"the digest {value!r:.100}")
        return str(value), data

    def get_full_config(self, image: int) -> bytes:
        """The configuration written anew by skopeo in OCI's format: for converted manifests only, its bytes are not
        those of the source.
        """
        return self._document("GetFullConfig", (image,), MAX_CONFIG, f"configuration of {self.reference.text}")[1]

    def read_blob(self, image: int, descriptor: Descriptor, limit: int) -> bytes:
        """A small blob at once, of the size and digest that the descriptor says. Raises InvalidDocument if that is
        above ``limit``.
        """
        what = f"blob {descriptor.digest} of {self.reference.text}"
        if descriptor.size > limit:
            raise InvalidDocument(f"The {what} has {descriptor.size} bytes; at most {limit} are taken.")
        data = self._document("GetBlob", (image, descriptor.digest, descriptor.size), limit, what)[1]
        _verify(data, descriptor, what)
        return data

    def layer_infos(self, image: int) -> tuple[Descriptor, ...]:
        """The layers as the source can deliver them, lowest first. From containers-storage these are plain tars under
        their diff_ids.
        """
        if self.version < _LAYER_INFO:
            raise self._too_old_for_storage()
        if self.version >= _LAYER_INFO_PIPED:
            data = self._document(
                "GetLayerInfoPiped", (image,), MAX_MANIFEST, f"list of layers of {self.reference.text}"
            )[1]
            value = load_json(data, MAX_MANIFEST, "list of layers")
        else:
            value = self._call("GetLayerInfo", image, what=f"Listing the layers of {self.reference.text}").value
        if not isinstance(value, list) or len(value) > MAX_LAYERS:
            self._violated("GetLayerInfo", "something else than a list of layers")
        return tuple(self._layer_info(item) for item in value)

    def _too_old_for_storage(self) -> SkopeoTooOld:
        return SkopeoTooOld(
            f"skopeo (image proxy protocol {self.protocol_version}) cannot list the layers of {self.reference.text}.",
            "Pulling from containers-storage needs skopeo 1.11 or later.",
        )

    def _layer_info(self, item: Any) -> Descriptor:
        members = item if isinstance(item, dict) else {}
        digest, size, media_type = members.get("digest"), members.get("size"), members.get("media_type")
        if (
            not is_digest(digest)
            or size.__class__ is not int
            or not 0 <= size <= MAX_SIZE
            or not isinstance(media_type, str)
        ):
            self._violated("GetLayerInfo", f"the layer {item!r:.200}")
        return Descriptor(media_type, str(digest), size)

    def get_blob(self, image: int, digest: str, size: int) -> BlobPipe:
        """Start the transfer of the blob ``digest`` (``sha256:<hex>``) of ``size`` bytes. Several may be under way.

        Exactly ``size`` bytes may be read from the pipe; there is no end of file after them. A blob that breaks off
        just goes silent: ``finish_pipe`` then tells why.
        """
        reply = self._call(
            "GetBlob", image, digest, size, what=f"Fetching the blob {digest} of {self.reference.text}", pipe=True
        )
        try:
            _check_announced(reply.value, Descriptor("", digest, size))
        except EngineError:
            os.close(reply.fd)
            with contextlib.suppress(EngineError):
                self.finish_pipe(reply.pipeid)
            raise
        return BlobPipe(reply.fd, reply.pipeid, size)

    def finish_pipe(
        self, pipeid: int, timeout: float | None = None, last_byte: Callable[[], float] | None = None
    ) -> None:
        """Skopeo's verdict on a transfer, to be asked for once: returns if the blob was whole, else raises with
        skopeo's words.

        Ask when all bytes were read, or when the reader has closed the pipe, or while it still waits for bytes that do
        not come: if the transfer has failed the answer comes at once; if it is only slow the answer comes when it has
        ended, and no other request is served until then. Silence for ``timeout`` seconds (default: the option) raises
        Stalled and ends the proxy. It is counted from the request, or, if a function is given, from the
        time.monotonic() of the last byte that the reader got.
        """
        self._call(
            "FinishPipe", pipeid, what=f"Fetching from {self.reference.text}", timeout=timeout, last_byte=last_byte
        )

    def close_image(self, image: int) -> None:
        """Let skopeo release what it holds for the image, within a second."""
        self._call("CloseImage", image, timeout=1.0)

    # -- life and death

    def fileno(self) -> int:
        """The fd of the connection; -1 if there is none."""
        return -1 if self._socket is None else self._socket.fileno()

    @property
    def alive(self) -> bool:
        """Whether requests can be made."""
        return self._socket is not None and not self._broken

    def kill(self, reason: str = "it was stopped") -> None:
        """Kill skopeo at once. A request that is under way in another thread fails quickly. May be called at any time,
        more than once.
        """
        self._broken = self._broken or reason
        if self._child is not None:
            self._child.kill()
        if self._socket is not None:
            # This wakes a thread that waits for a reply, even if something else still holds the other end, such as a
            # wrapper's child.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        self._clean_up()

    def _clean_up(self) -> None:
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            scratch.close()

    def close(self) -> None:
        """End skopeo, by force if it does not go by itself within half a second, and release everything."""
        orderly = not self._broken
        self._broken = self._broken or "it was closed"
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
        if self._child is not None:
            if orderly:
                self._child.wait(0.5)
            self._child.close()
        self._clean_up()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def abandon(self) -> None:
        """For a forked process: drop what it inherited of the connection, so that skopeo sees the end when the owner
        goes.
        """
        self._broken = "it belongs to another process"
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._child is not None:
            self._child.abandon()
            self._child = None
        if self._scratch is not None:
            self._scratch.abandon()
            self._scratch = None

    # -- requests

    def _call(
        self,
        method: str,
        *args: object,
        what: str = "",
        timeout: float | None = None,
        last_byte: Callable[[], float] | None = None,
        pipe: bool = False,
    ) -> _Reply:
        what = what or "Talking to skopeo"
        silence = self.options.timeout if timeout is None else timeout
        with self._lock:
            self._send(method, args, what)
            return self._receive(method, what, silence, pipe, last_byte)

    def _document(self, method: str, args: Sequence[object], limit: int, what: str) -> tuple[Any, bytes]:
        """Call a method that answers through a pipe; the value of the reply and the bytes, at most ``limit``
        of them.
        """
        doing = f"Reading the {what}"
        silence = self.options.timeout
        with self._lock:
            self._send(method, args, doing)
            reply = self._receive(method, doing, silence, pipe=True)
            try:
                # The request goes out before the pipe is read, for there is no end of file without it, and both are
                # then waited for.
                self._send("FinishPipe", (reply.pipeid,), doing)
                data = self._drain(reply.fd, limit, doing)
            finally:
                os.close(reply.fd)
            try:
                self._receive("FinishPipe", doing, silence)
            except EngineError:
                if len(data) <= limit:
                    raise  # otherwise it only complains that we stopped reading
        if len(data) > limit:
            raise InvalidDocument(
                f"The {what} has more than {limit} bytes.",
                "The image is damaged or made to do harm; ask its publisher.",
            )
        return reply.value, bytes(data)

    def _drain(self, fd: int, limit: int, doing: str) -> bytearray:
        """Read to the end of the pipe, but no more than one byte above ``limit``."""
        data = bytearray()
        silence = self.options.timeout
        end = time.monotonic() + 10 * silence  # ends the wait for a source that sends a byte now and then, too
        while len(data) <= limit:
            if not readable(fd, min(end, time.monotonic() + silence)):
                self._stalled(doing, silence)
            piece = os.read(fd, min(65536, limit + 1 - len(data)))
            if not piece:
                break
            data += piece
        return data

    def _send(self, method: str, args: Sequence[object], what: str) -> None:
        if self._socket is None or self._broken:
            raise ProxyFailed(
                f"skopeo is not running, {self._broken or 'it was not started'}.",
                "Run the task again.",
                doing=what,
                passing=True,
            )
        request = json.dumps({"method": method, "args": list(args)}).encode()
        if len(request) > REQUEST:
            raise InvalidReference("The request is too long for skopeo.", "Use a shorter reference.", doing=what)
        try:
            self._socket.send(request, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        except OSError:
            self._died(method, what)

    def _receive(
        self, method: str, what: str, silence: float, pipe: bool = False, last_byte: Callable[[], float] | None = None
    ) -> _Reply:
        connection = self._socket
        deadline = time.monotonic() + silence
        while connection is None or not readable(connection.fileno(), deadline):
            deadline = 0.0 if last_byte is None else last_byte() + silence
            if deadline <= time.monotonic():
                self._stalled(what, silence)
        try:
            # Room for more fds than ever come, so that unexpected ones are received, seen and closed.
            packet, ancillary, flags, _address = connection.recvmsg(
                REPLY, socket.CMSG_SPACE(_ROOM * 4), _MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
            )
        except OSError:
            packet, ancillary, flags = b"", [], 0
        fds = _fds(ancillary)
        try:
            if not packet:
                self._died(method, what)
            if flags & socket.MSG_CTRUNC and len(fds) < _ROOM:
                # There was room for it in the message, so the kernel had none in this process.
                raise exhausted(FILES, what)
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                self._violated(method, "a reply that is too long")
            value, pipeid = self._reply(method, what, packet)
            if (len(fds), pipeid != 0) != (int(pipe), pipe):
                self._violated(method, f"{len(fds)} open files and the pipe {pipeid}")
            return _Reply(value, pipeid, fds.pop() if pipe else -1)
        finally:
            for fd in fds:
                os.close(fd)

    def _reply(self, method: str, what: str, packet: bytes) -> tuple[Any, int]:
        try:
            reply = load_json(packet, REPLY, "reply")
        except InvalidDocument:
            reply = None
        if (
            not isinstance(reply, dict)
            or reply.get("success").__class__ is not bool
            or not isinstance(reply.get("error", ""), str)
        ):
            self._violated(method, f"{packet[:100]!r}")
        if not reply["success"]:
            raise classify(
                self.options, what, reply.get("error", ""), reply.get("error_code"), self.reference.transport
            )
        pipeid = reply.get("pipeid", 0)
        if pipeid.__class__ is not int or not 0 <= pipeid < 2**32:
            self._violated(method, f"the pipe {pipeid!r:.100}")
        return reply.get("value"), pipeid

    # -- failures of the proxy itself

    def _stalled(self, what: str, seconds: float) -> NoReturn:
        if self._broken:
            self._died("", what)
        self.kill("it was stopped because a request had no answer")
        raise Stalled(
            f"There was no answer for {seconds:g} seconds.",
            "Check the network and the registry, or raise the option timeout.",
            doing=what,
            passing=self.reference.is_remote,
        )

    def _violated(self, method: str, got: str) -> NoReturn:
        self.kill("it was stopped because it broke the protocol")
        raise ProxyFailed(
            f"skopeo answered the request {method} with {scrub(self.options, got)}.",
            NOT_SKOPEO,
        )

    def _died(self, method: str, what: str) -> NoReturn:
        """The connection is gone: say why, in skopeo's words if it left any."""
        stopped = self._broken
        child = self._child
        status = None if child is None or stopped else child.wait(2.0)
        words = "" if child is None else child.words()
        self.kill("it has ended")
        if stopped:
            raise ProxyFailed(f"skopeo is gone, {stopped}.", "Run the task again.", doing=what, passing=True)
        how = "closed the connection"
        if status is not None:
            how = f"was killed by signal {abs(status)}" if status < 0 else f"ended with status {status}"
        quoted = scrub(self.options, words).rstrip(".")
        said = f": {quoted}." if words else "."
        if words:
            error = classify(self.options, what, words)
            if isinstance(error, (LimitReached, OutOfMemory)):
                raise error
        if method == "Initialize":
            error = classify(self.options, "Starting skopeo", words)
            if words and isinstance(error, (AuthFailed, PolicyRejected, SkopeoTooOld)):
                raise error
            raise ProxyFailed(
                f"it {how}{said}",
                NOT_SKOPEO,
                doing="Starting skopeo",
                said=quoted,
            )
        raise ProxyFailed(f"skopeo {how}{said}", "Run the task again.", doing=what, said=quoted, passing=True)


def _fds(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    found = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            found.frombytes(data[: len(data) - len(data) % found.itemsize])
    return list(found)


# -- what needs more than one request


def _check_announced(value: Any, descriptor: Descriptor) -> None:
    """The source may say how long a blob is (-1: it does not know); if that is not what the manifest says there is no
    use in waiting for it.
    """
    if value.__class__ is int and 0 <= value != descriptor.size:
        raise DigestMismatch(
            f"The source offers {value} bytes for the blob {descriptor.digest}, the manifest says {descriptor.size}.",
            "The image is damaged; ask its publisher.",
        )


def _verify(data: bytes, descriptor: Descriptor, what: str) -> None:
    if len(data) != descriptor.size or digest_of(data) != descriptor.digest:
        raise DigestMismatch(
            f"The {what} has {len(data)} bytes with the digest {digest_of(data)}; {descriptor.size} bytes were "
            f"announced.",
            "The image is damaged; ask its publisher.",
        )


def fetch_config(proxy: ImageProxy, image: int, descriptor: Descriptor, converted: bool = False) -> bytes:
    """The configuration that ``descriptor`` names, verified.

    ``converted`` says that skopeo converted the manifest from Docker's format (its digest is not that of the bytes):
    the configuration then exists nowhere but in skopeo, which writes it. Otherwise it is a blob, and only if that fails
    is skopeo asked to write it.
    """
    what = f"configuration {descriptor.digest} of {proxy.reference.text}"
    if not converted:
        try:
            return proxy.read_blob(image, descriptor, MAX_CONFIG)
        except (ProxyFailed, ImageNotFound):
            if not proxy.alive:
                raise
            with contextlib.suppress(EngineError):
                data = proxy.get_full_config(image)
                _verify(data, descriptor, what)
                return data
            raise
    data = proxy.get_full_config(image)
    _verify(data, descriptor, what)
    return data
