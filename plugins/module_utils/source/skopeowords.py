# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What skopeo's words mean: the error for what it says, without secrets and without the decoration of its logger."""

from __future__ import annotations

import base64
import json
import re

from ..errors import (
    FILES,
    MEMORY,
    PROCESSES,
    AuthFailed,
    DigestMismatch,
    EngineError,
    ImageNotFound,
    InvalidDocument,
    InvalidReference,
    NoSpace,
    PermissionDenied,
    PlatformNotFound,
    PolicyRejected,
    ProxyFailed,
    RegistryUnreachable,
    SkopeoTooOld,
    TlsFailed,
    UnsupportedMediaType,
    exhausted,
)
from .options import ProxyOptions

NOT_SKOPEO = "Check that the option executable names skopeo."
INSTALL = "Install skopeo 1.6 or later (the role composefs.oci.skopeo does), or name it with the option executable."
_MAX_WORDS = 2000

# These patterns are compiled only when skopeo has complained, which it does in few runs. Compiling them always would
# make a run with nothing to do a tenth slower.
_LOG_LINE = r'^(?:time="[^"]*" )?level=(?P<level>[a-z]+) msg=(?P<msg>"(?:[^"\\]|\\.)*"|\S*)'


_NAMES = r"reading manifest \S+ in \S+|\b(?:tag|reference) \"[^\"]*\"|\S*/\S*"


def _means(pattern: str, kind: type[EngineError], hint: str = "") -> tuple[str, type[EngineError], str]:
    return pattern, kind, hint


# The first that fits decides. These words were heard from skopeo 1.9.3 and 1.18 in front of a registry and of servers
# that fail on purpose.
_MEANINGS = (
    _means(
        r"image rejected|rejected by policy|signature was required|signature policy|trust policy|policy\.json"
        r"|signatures were accepted|signature for identity|invalid gpg signature",
        PolicyRejected,
        "Sign the image as the signature policy asks, or change the policy.",
    ),
    _means(
        r"no image found in (?:manifest list|image index)",
        PlatformNotFound,
        "Choose one of the platforms that the image has, with the option platform.",
    ),
    _means(r"unknown (?:flag|command|shorthand)", SkopeoTooOld, INSTALL),
    _means(r"tls handshake timeout", RegistryUnreachable, "Check the network and the registry, and try again later."),
    _means(
        r"server gave http response to https client",
        TlsFailed,
        "The registry speaks plain HTTP: give it TLS, or set validate_certs to false.",
    ),
    _means(
        r"x509: |tls: |certificate signed by|bad certificate",
        TlsFailed,
        "Name the directory with the authority's certificate with ca_cert_dir, or set validate_certs to false.",
    ),
    _means(
        r"unauthorized|authentication required|(?<!permission )\bdenied\b|status ?(?:code)?(?: from registry)?:? "
        r"40[13]\b"
        r"|getting username and password|authentication file|auth ?file",
        AuthFailed,
        "Give username and password, or auth_file, of an account that may read the image. Some registries answer so "
        "for images that do not exist.",
    ),
    _means(
        r"more than one image|choose an image|expected 1 item, got",
        InvalidReference,
        "There are several images: name one of them after the path, separated by a colon.",
    ),
    _means(
        r"manifest unknown|name unknown|blob unknown|unknown blob|status ?(?:code)?(?: from registry)?:? 404\b|no "
        r"such file or directory"
        r"|no descriptor found|not found|no such image|does not exist|does not resolve to an image|is not an image",
        ImageNotFound,
        "Check the name, the tag and the path.",
    ),
    _means(
        r"corrupted blob|expected \d+ bytes in blob|digest did not match|does not match provided manifest digest",
        DigestMismatch,
        "Try again; if it stays so, the image is damaged.",
    ),
    _means(
        r"no space left on device|disk quota exceeded",
        NoSpace,
        "Free space where skopeo unpacks archives, or name another directory with the option tmpdir.",
    ),
    _means(
        r"permission denied|operation not permitted",
        PermissionDenied,
        "Run as a user that may read it, for example with become.",
    ),
    _means(
        r"connection re(?:fused|set)|no such host|time-?out|timed out|deadline exceeded|unreachable|no route to "
        r"host|\beof\b|too ?many ?requests"
        r"|status ?(?:code)?(?: from registry)?:? (?:408|429|5\d\d)\b|temporary failure|server misbehaving|broken "
        r"pipe|proxyconnect|stream error|http2: "
        r"|goaway|server closed|cannot connect|bad gateway|service unavailable|gateway time-?out",
        RegistryUnreachable,
        "Check the network and the registry, and try again later.",
    ),
    _means(
        r"unsupported .*(?:mime|media|schema)|mime type|no fslayers",
        UnsupportedMediaType,
        "Push the image again with a current tool.",
    ),
    _means(
        r"exceeded maximum allowed size", InvalidDocument, "The image is damaged or made to do harm; ask its publisher."
    ),
    _means(
        r"invalid reference|invalid image name|invalid source name|unknown transport|parsing reference",
        InvalidReference,
        "Check how the reference is written.",
    ),
)


# What the same words mean about an image on this host: there is no network, no registry and nobody to log in to.
_MEANT_LOCALLY: dict[type[EngineError], tuple[type[EngineError], str]] = {
    RegistryUnreachable: (InvalidDocument, "What the reference names is damaged or incomplete: copy or make it again."),
    AuthFailed: (PermissionDenied, "Run as a user that may read it, for example with become."),
    TlsFailed: (ProxyFailed, ""),
}
# What only a local image can be, in the words of Go's readers of archives and JSON.
_DAMAGED_LOCALLY = (
    r"invalid tar header|loading tar component|unexpected end of json input|invalid character .* looking for|"
    r"cannot unmarshal|invalid checksum digest|\bgzip: |\bzstd: "
)
_DAMAGED_HINT = (
    "What the reference names is damaged, incomplete or of another kind: copy or make it again, or write the transport "
    "that it is for (oci-archive: or docker-archive:)."
)
_PART = re.compile(r"(?:Reading|Fetching) the (?:blob|configuration|config) ")
# Words about a limit of this host that skopeo reached: that is no fault of the source.
_EXHAUSTED = (
    (r"failed to create new os thread|newosproc|pthread_create|resource temporarily unavailable", PROCESSES),
    (r"too many open files", FILES),
    (r"cannot allocate memory|runtime: out of memory|failed to reserve (page summary )?memory", MEMORY),
)
_PROXY = r"\b407\b|proxy authentication required"
# Of an answer to CONNECT Go tells nothing but the reason; a registry's own answers come with their number.
_PROXY_REFUSES = r"\b(?:get|head|post)[\s:]+(?:forbidden|not allowed)\.?$"
_PROXY_REFUSES_HINT = (
    "The HTTP proxy on the way does not let this registry through: ask its operator, or name the registry in NO_PROXY."
)
_PROXY_HINT = (
    "The HTTP proxy on the way wants credentials: put them into its address in the task's environment (HTTPS_PROXY), "
    "or name the registry in NO_PROXY."
)


def unwrap_log(log: bytes) -> str:
    """What skopeo said on stderr: its fatal and error messages without the logger's decoration; if there is none,
    everything.
    """
    grave: list[str] = []
    lines: list[str] = []
    for line in log.rstrip(b"\0").decode("utf-8", "replace").splitlines():
        match = re.match(_LOG_LINE, line.strip())
        text = line.strip()
        if match is not None:
            text = match.group("msg")
            if text.startswith('"'):
                try:
                    text = str(json.loads(text))
                except ValueError:
                    text = text[1:-1]
            if match.group("level") in ("fatal", "error", "panic"):
                grave.append(text)
        if text.startswith(("goroutine ", "runtime stack:")):
            # Go's runtime gave up and dumps stacks and registers: what it said before is all that helps.
            break
        if text:
            lines.append(text)
    return "\n".join(grave or lines)


def _shorten(text: str) -> str:
    """The beginning and the end, where Go puts what was done and what was the cause: a registry can make skopeo say any
    amount.
    """
    if len(text) <= _MAX_WORDS:
        return text
    # The end starts at a word, lest it be the rest of an address whose secret part can no longer be recognised.
    return f"{text[: _MAX_WORDS // 2]} … {text[-_MAX_WORDS // 2 :].partition(' ')[2]}"


def scrub(options: ProxyOptions, text: str) -> str:
    """``text`` for a message: one line, bounded, without control characters and without secrets."""
    username, password = options.username or "", options.password or ""
    if password:
        from urllib.parse import quote, quote_plus

        token = base64.b64encode(f"{username}:{password}".encode("utf-8", "surrogateescape")).decode()
        coded = password.encode("utf-8", "surrogateescape")
        for secret in sorted({token, password, quote(coded, safe=""), quote_plus(coded)}, key=len, reverse=True):
            text = text.replace(secret, "***")
    text = _shorten(text)
    # Other places where secrets may be: user information and the query of an address (signed addresses), and
    # authorization headers.
    text = re.sub(r"(?<=://)[^/\s\"'@]*@", "***@", text)
    text = re.sub(r"(://[^\s\"'?]*)\?[^\s\"']*", r"\1?***", text)
    text = re.sub(r"(?i)\b(bearer|basic) +[A-Za-z0-9+/=._~-]{8,}", r"\1 ***", text)
    text = "".join(character if character.isprintable() else " " for character in text)
    return re.sub(r" {2,}", " ", text).strip()


def _once(text: str) -> str:
    """``text`` without what it says twice in a row: registries answer with a code and a text, often the same."""
    parts: list[str] = []
    for part in text.split(": "):
        if not parts or part.rstrip(".") != parts[-1]:
            parts.append(part)
    return ": ".join(parts)


def classify(
    options: ProxyOptions, what: str, words: str, code: object = None, transport: str = "docker"
) -> EngineError:
    """The error for skopeo's ``words`` (and, since protocol 0.2.8, its error code) about ``what``, a phrase such as
    ``Opening docker://…``. What words mean depends on the ``transport``: only a registry is reached through a network.
    """
    # Paths, addresses and names are not skopeo's own words: an image may well be called unauthorized.
    said = re.sub(_NAMES, " ", _shorten(words).lower().replace("/policy.json: no such file", "/x no signature policy"))
    kind: type[EngineError] = ProxyFailed
    hint = ""
    for pattern, candidate, advice in _MEANINGS:
        if re.search(pattern, said):
            kind, hint = candidate, advice
            break
    else:
        if code == "retryable":
            kind = RegistryUnreachable
    passes: bool | None = None
    if transport != "docker":
        kind, hint = _MEANT_LOCALLY.get(kind, (kind, hint))
        if kind in (ProxyFailed, ImageNotFound) and re.search(_DAMAGED_LOCALLY, said):
            kind, hint = InvalidDocument, _DAMAGED_HINT
        elif kind is ImageNotFound and _PART.match(what):
            hint = "What the reference names is incomplete: copy or make it again."
    elif kind in (AuthFailed, ProxyFailed) and re.search(_PROXY, said):
        # Credentials for the registry would not help, and neither would patience.
        kind, hint, passes = RegistryUnreachable, _PROXY_HINT, False
    elif kind is ProxyFailed and re.search(_PROXY_REFUSES, said):
        kind, hint, passes = RegistryUnreachable, _PROXY_REFUSES_HINT, False
    for pattern, what_of in _EXHAUSTED:
        if re.search(pattern, said):
            error = exhausted(what_of, what)
            error.said = f"{_once(scrub(options, words))[:300]}"
            return error
    quoted = _once(scrub(options, words)).rstrip(".")
    if not quoted:
        return kind("skopeo failed and said nothing.", hint or NOT_SKOPEO, doing=what, passing=passes)
    quoted += "" if quoted[-1] in "?!…" else "."
    whose = f" {_whose(options)}" if kind is AuthFailed and transport == "docker" else ""
    return kind(f"skopeo says: {quoted}{whose}", hint, doing=what, said=quoted, passing=passes)


def _whose(options: ProxyOptions) -> str:
    """A sentence about the credentials that skopeo had."""
    if options.auth_file:
        return f"The credentials were those in {options.auth_file}, if it has some for this registry."
    if options.username:
        return f"The credentials were those of the user {options.username}."
    return "No credentials were given, so skopeo had those of its own configuration on the host, if any."
