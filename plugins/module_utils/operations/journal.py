# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What this host remembers of each mount point: which image is current, which came before, which is on trial.

One journal a mount point, ``/var/lib/composefs-oci/deployments/<path escaped as for units>.json``. It does not lie in
the repository, for that may be shared, read-only or on a network, while a deployment is a fact of this host. To
replace the journal by one rename is the only commit there is: whatever else follows from a journal (unit, links, pins,
timer) is derived from it, and the next verb repairs it. The journal that was replaced stays beside it as ``....json~``,
so that a boot finds one even if the newest cannot be read.

Whoever changes something holds the lock ``....json.lock``. Readers need none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

from ..errors import EngineError, FormatError, IncompatibleJournal, ReadOnly, doing, from_os_error
from ..host import files, locks
from ..text import file_name, from_file_name, named_files

VERSION = 1
HISTORY = 50
LOCK_WAIT = 600.0
# A journal of fifty entries takes 20 KB.
MAX_SIZE = 1 << 20
_STEM_MAX = 200
_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_BOOT_ID = "/proc/sys/kernel/random/boot_id"


class Places(NamedTuple):
    """Where things lie on the host. ``running`` exists where systemd is in charge."""

    units: str = "/etc/systemd/system"
    library: str = "/var/lib/composefs-oci"
    running: str = "/run/systemd/system"

    @property
    def application(self) -> str:
        return f"{self.library}/mount.pyz"

    @property
    def maintenance(self) -> str:
        return f"{self.library}/maintain.pyz"

    @property
    def journals(self) -> str:
        return f"{self.library}/deployments"

    @property
    def words(self) -> list[str]:
        """The arguments by which the program finds the journals: none where they lie in the usual place."""
        return [] if self.library == Places().library else ["--library", self.library]


HOST = Places()


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an image is mounted. ``verity`` is what was decided: ``required`` or ``disabled``; ``opts`` without what
    ``dev`` and ``suid`` say.
    """

    verity: str = "disabled"
    opts: tuple[str, ...] = ()
    dev: bool = False
    suid: bool = False
    bootable: bool = False
    upperdir: str | None = None
    workdir: str | None = None
    persistent: bool = False
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Image:
    """An image that is, or was, current. ``digest`` is that of its manifest, None for a bare image id;
    ``index_digest`` the one that was asked for if that was another; ``since`` a time in UTC.
    """

    image_id: str
    digest: str | None = None
    index_digest: str | None = None
    ref: str | None = None
    since: str = ""
    rollout: str | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Pending:
    """An image on trial, until it is confirmed or taken back. ``origin`` (``from`` in the file) is the image id that
    was mounted before, None if there was none; ``boot`` the boot it was activated in; ``token`` what its timer names.
    ``repository``, ``name`` and ``mount`` become the journal's when it is confirmed.
    """

    image_id: str
    digest: str | None
    origin: str | None
    rollout: str | None
    who: str
    since: str
    deadline: str
    boot: str
    token: str
    index_digest: str | None = None
    ref: str | None = None
    name: str | None = None
    repository: str = ""
    mount: Settings = Settings()
    reload: tuple[str, ...] = ()
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Event:
    """One line of the history: which image (id) gave way to which, and how that ended."""

    time: str
    result: str
    origin: str | None = None
    to: str | None = None
    digest: str | None = None
    rollout: str | None = None
    who: str = ""
    reason: str = ""
    seconds: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Journal:
    """A whole journal. ``pins`` are the names in the repository that exist for this mount; ``boot`` is the boot that a
    mount without a unit belongs to, None if the mount comes back at boot.
    """

    path: str
    name: str | None = None
    repository: str = ""
    mount: Settings = Settings()
    current: Image | None = None
    previous: tuple[Image, ...] = ()
    pending: Pending | None = None
    history: tuple[Event, ...] = ()
    pins: tuple[str, ...] = ()
    boot: str | None = None
    version: int = VERSION
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def images(self) -> tuple[Image, ...]:
        """Every image that this mount keeps alive, the current one first, except the one on trial."""
        return (*((self.current,) if self.current else ()), *self.previous)

    def with_event(self, event: Event) -> Journal:
        """The same with one more line of history, of which the last fifty are kept."""
        return dataclasses.replace(self, history=(*self.history, event)[-HISTORY:])


class Kept(NamedTuple):
    """An image that a journal, and so a mount or a unit, relies on: whoever collects garbage must leave it. ``role`` is
    ``current``, ``previous`` or ``pending``.
    """

    path: str
    role: str
    repository: str
    image_id: str
    digest: str | None
    name: str | None


# ---- values <-> text -------------------------------------------------------------------------------------------------

# In the file the keys are the words that people use.
_WORDS = {"origin": "from"}
_Value = TypeVar("_Value", Settings, Image, Pending, Event, Journal)


def to_values(value: Settings | Image | Pending | Event | Journal) -> dict[str, Any]:
    """The plain values that stand in the file, unknown keys included."""
    found: dict[str, Any] = dict(value.extra)
    for field in dataclasses.fields(value):
        if field.name != "extra":
            found[_WORDS.get(field.name, field.name)] = _plain(getattr(value, field.name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return to_values(value) if isinstance(value, (Settings, Image, Pending, Event, Journal)) else value


def parse(raw: bytes, path: str, any_version: bool = False) -> Journal:
    """The journal in the bytes of the file ``path``. IncompatibleJournal if it was written by a newer version, unless
    ``any_version``, or cannot be understood.
    """
    try:
        values = named_files(json.loads(raw), file_name)
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise ValueError("no version")
        if values["version"] > VERSION and not any_version:
            raise IncompatibleJournal(
                f"The journal {path} has the version {values['version']}; this is known up to version {VERSION}.",
                "Update the collection.",
            )
        return _journal(values)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IncompatibleJournal(
            f"The journal {path} cannot be understood.",
            f"Look at it. The one before is {path}~; to go on without, unmount the image and remove the file.",
        ) from error


def _journal(values: dict[str, Any]) -> Journal:
    pending = values.get("pending")
    return _from(
        Journal,
        values,
        mount=_from(Settings, values.get("mount") or {}),
        current=_from(Image, values["current"]) if values.get("current") is not None else None,
        previous=tuple(_from(Image, image) for image in values.get("previous") or ()),
        pending=_from(Pending, pending, mount=_from(Settings, pending.get("mount") or {})) if pending else None,
        history=tuple(_from(Event, event) for event in values.get("history") or ()),
    )


def _from(kind: type[_Value], values: Mapping[str, Any], **parsed: Any) -> _Value:
    """A value of the class ``kind``; what is not a field is kept as it is. TypeError for a value of another type than
    its field has.
    """
    known: dict[str, Any] = {}
    fields = {_WORDS.get(field.name, field.name): field for field in dataclasses.fields(kind) if field.name != "extra"}
    for word, field in fields.items():
        if field.name in parsed:
            known[field.name] = parsed[field.name]
        elif word in values:
            known[field.name] = _checked(str(field.type), values[word])
    return kind(**known, extra={key: value for key, value in values.items() if key not in fields})


def _checked(kind: str, value: Any) -> Any:
    if kind.startswith("tuple[str"):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise TypeError(value)
        return tuple(value)
    allowed = {
        "str": (str,),
        "str | None": (str, type(None)),
        "int": (int,),
        "bool": (bool,),
        "float | None": (int, float, type(None)),
    }[kind]
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise TypeError(value)
    return value


# ---- on the host -----------------------------------------------------------------------------------------------------


def stem(path: str) -> str:
    """The name of the journal of ``path`` (absolute) without its ending, as ``systemd-escape --path`` has it; where
    that is too long for a file name its beginning and a digest of it.
    """
    path = os.path.normpath(path)
    text = "-" if path == "/" else escape(path.strip("/"))
    if len(text) <= _STEM_MAX:
        return text
    return f"{text[: _STEM_MAX - 33]}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def escape(text: str) -> str:
    """A path without its outer slashes as it stands in the name of a unit (systemd.unit(5))."""
    escaped = "".join(
        chr(byte) if chr(byte) in _PLAIN else "-" if byte == 0x2F else f"\\x{byte:02x}" for byte in os.fsencode(text)
    )
    return f"\\x2e{escaped[1:]}" if escaped.startswith(".") else escaped


_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:_.")


def file_of(path: str, places: Places = HOST) -> str:
    """Where the journal of the mount point ``path`` lies."""
    return f"{places.journals}/{stem(path)}.json"


def read(path: str, places: Places = HOST, any_version: bool = False) -> Journal | None:
    """The journal of ``path``, None if it has none. Raises IncompatibleJournal, IOFailed and PermissionDenied."""
    return _read_file(file_of(path, places), any_version)


def read_for_boot(path: str, places: Places = HOST) -> tuple[Journal | None, str]:
    """The journal to boot with: also of a newer version, or the one before if it cannot be read; and a complaint, empty
    if all is well.
    """
    try:
        return read(path, places, any_version=True), ""
    except EngineError as error:
        file = f"{file_of(path, places)}~"
        complaint = f"{error.text} Going on with {file}."
        try:
            before = _read_file(file, any_version=True)
        except EngineError:
            before = None
        if before is None:
            raise
        return before, complaint


def journals(places: Places = HOST) -> dict[str, Journal | EngineError]:
    """Every journal of this host by its file, sorted; one that cannot be read is the error that says why."""
    try:
        names = sorted(name for name in os.listdir(places.journals) if name.endswith(".json"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise from_os_error(error, f"Listing {places.journals}") from error
    found: dict[str, Journal | EngineError] = {}
    for name in names:
        file = f"{places.journals}/{name}"
        try:
            one = _read_file(file)
        except EngineError as error:
            found[file] = error
        else:
            if one is not None:
                found[file] = one
    return found


def kept(places: Places = HOST) -> list[Kept]:
    """Every image that some journal of this host relies on. IncompatibleJournal, IOFailed if one cannot be read: then
    nobody knows what must be kept.
    """
    found: list[Kept] = []
    for one in journals(places).values():
        if isinstance(one, EngineError):
            raise one
        found += kept_by(one)
    return found


def kept_by(one: Journal) -> list[Kept]:
    """The same of one journal: what is current, what came before, and what is on trial, each with its repository."""
    found: list[Kept] = []
    for role, images in (("current", one.images()[:1] if one.current else ()), ("previous", one.previous)):
        found += [Kept(one.path, role, one.repository, image.image_id, image.digest, one.name) for image in images]
    trial = one.pending
    if trial is not None:
        repository = trial.repository or one.repository
        found.append(Kept(one.path, "pending", repository, trial.image_id, trial.digest, trial.name or one.name))
        if trial.origin and (one.current is None or trial.origin != one.current.image_id):
            found.append(Kept(one.path, "previous", one.repository or repository, trial.origin, None, one.name))
    return found


def _read_file(file: str, any_version: bool = False) -> Journal | None:
    directory, name = os.path.split(file)
    try:
        with files.opened_directory(directory) as fd:
            raw = files.read_whole(fd, name, MAX_SIZE)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error, f"Reading the journal {file}") from error
    return parse(raw, file, any_version)


def write(value: Journal, places: Places = HOST) -> None:
    """Commit: when this returns, the journal is on the disk, and the one it replaces stays as ``....json~``.

    The caller holds the lock. Raises ReadOnly, NoSpace, PermissionDenied and IOFailed; then the old one still counts.
    """
    file = file_of(value.path, places)
    name = os.path.basename(file)
    text = json.dumps(named_files(to_values(value), from_file_name), indent=1).encode() + b"\n"
    with doing(f"Writing the journal {file}"), files.opened_directory(places.journals) as fd:
        with contextlib.suppress(FileNotFoundError, EngineError):
            old = files.read_whole(fd, name, MAX_SIZE)
            # Only one that can be read is worth keeping: a boot may need it.
            parse(old, file, any_version=True)
            files.write_whole(fd, f"{name}~", old)
        files.write_whole(fd, name, text)


def remove(path: str, places: Places = HOST) -> None:
    """Forget the mount point. The caller holds the lock, whose file is removed when it is let go."""
    file = file_of(path, places)
    with doing(f"Removing the journal {file}"):
        # The backup first: as long as the journal itself is there, it counts.
        for name in (f"{file}~", file):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
        with files.opened_directory(places.journals) as fd:
            files.sync_directory(fd)


@contextlib.contextmanager
def locked(path: str, places: Places = HOST, wait: float = LOCK_WAIT) -> Iterator[None]:
    """Hold the lock of the mount point ``path`` alone. Raises Busy after ``wait`` seconds, ReadOnly, PermissionDenied.

    Where no journal is left in the end, the lock file goes, too; whoever waited for it takes a new one.
    """
    file = f"{file_of(path, places)}.lock"
    with doing(f"Locking {file}"):
        fd = _lock(file, places, wait)
    try:
        yield
    finally:
        if not os.path.lexists(file_of(path, places)):
            with contextlib.suppress(OSError):
                os.unlink(file)
            for directory in (places.journals, places.library):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        os.close(fd)


def make_directories(places: Places) -> None:
    """The directories of the journals, which everybody may read. OSError passes."""
    for directory in (places.library, places.journals):
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o755)
            os.chmod(directory, 0o755)  # whatever the umask is


def _lock(file: str, places: Places, wait: float) -> int:
    deadline = time.monotonic() + wait
    while True:
        with contextlib.suppress(FileNotFoundError):
            make_directories(places)
        try:
            fd = os.open(file, os.O_RDWR | os.O_CREAT | _FLAGS, 0o600)
        except FileNotFoundError:
            if not os.path.isdir(os.path.dirname(places.library)):
                raise
            continue  # the directory went with somebody's last journal
        except OSError as error:
            if not isinstance(from_os_error(error, ""), ReadOnly) or not os.path.exists(file):
                raise
            fd = os.open(file, os.O_RDONLY | _FLAGS)
        try:
            # Only a regular file is waited for. If its lock is held for too long, the error names the holder.
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FormatError(f"{file} is not a regular file.", "Find out who put it there, then remove it.")
            left = max(deadline - time.monotonic(), 0.0)
            locks.acquire(fd, locks.EXCLUSIVE, left, "Another task has been changing this mount")
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(file, follow_symlinks=False)
                own = os.fstat(fd)
                if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was removed by the last holder


# ---- time and boots --------------------------------------------------------------------------------------------------


def boot_id() -> str:
    """The id of this boot, which no other boot has."""
    with doing("Asking the kernel for the boot's id"), open(_BOOT_ID, encoding="ascii") as file:
        return file.read().strip()


def stamp(seconds: float | None = None) -> str:
    """A time in seconds since 1970, or now, as it stands in journals: ``2026-11-27T14:40:07Z``."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() if seconds is None else seconds))
