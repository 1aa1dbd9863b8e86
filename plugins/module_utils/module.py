# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""What every module does alike: find the repository, and end in one clean line whatever happens.

The ``AnsibleModule`` is passed in and used by its methods only, so that the engine's folder stays free of ansible
imports and the functions can be tested with a stand-in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Callable, NamedTuple, Protocol

from . import text
from .errors import InvalidOption, MissingLibrary, NotARepository, UnsafeRepository, from_exception
from .formats.digests import is_digest
from .formats.reference import TRANSPORTS
from .host import beneath
from .progress import FileSink, Progress
from .store.repository import Described, Foreseen, Repository, default_path


class Module(Protocol):
    """The part of ``AnsibleModule`` that is used here."""

    params: dict[str, Any]
    check_mode: bool

    def warn(self, warning: str) -> Any: ...

    def exit_json(self, **kwargs: Any) -> Any: ...

    def fail_json(self, msg: str, **kwargs: Any) -> Any: ...


def repository_path(module: Module, option: str = "repository") -> str:
    """The repository that ``option`` of the task names, or the default one where it is left out; absolute, without a
    trailing slash. InvalidOption for a path that is relative or empty, for example because a variable is empty: what
    was meant is another repository than the default one, or than one below the directory that the task runs in.
    """
    named = module.params.get(option)
    path = os.path.expanduser(default_path() if named is None else named)
    if named is not None and not os.path.isabs(path):
        raise InvalidOption(
            f"The option {option} is {named!r}, which is no absolute path.",
            "Write it from / on, or leave it out for the default repository.",
        )
    return os.path.abspath(path)


def mount_point(text: str, option: str = "path") -> str:
    """The absolute path of a mount point, or what another ``option`` says, without a trailing slash. InvalidOption for
    one that is relative or empty: it would be below the directory that the task happens to run in, which is somebody's
    home.
    """
    if not os.path.isabs(text):
        raise InvalidOption(f"The option {option} is {text!r}, which is no absolute path.", "Write it from / on.")
    return os.path.abspath(text)


@contextlib.contextmanager
def opened_repository(module: Module, path: str, *, foreseen: bool = False) -> Iterator[Repository]:
    """The repository at ``path``, in check mode as earlier tasks of the run foretold that it would be: where there is
    nothing yet, an empty one that vanishes with the ``with``; an old one that would be upgraded, as upgraded; and one
    whose owner or mode would be corrected, as safe.

    With ``foreseen`` names also mean what they will mean then, although their images may not be there yet.
    """
    known = told(module, path)
    will_be = known.repository
    unsafe = module.params.get("unsafe_repository", beneath.REFUSE)
    if module.check_mode and will_be is not None and will_be["unsafe"] and unsafe != beneath.ACCEPT:
        raise UnsafeRepository(
            f"An earlier task would have somebody else own the repository {path}, or be able to write to it.",
            "Give it an owner and a mode that keep others out.",
        )
    try:
        upgraded = _upgraded(will_be) if will_be is not None and will_be["upgraded"] else None
        repository = Repository.open(
            path, unsafe=unsafe if will_be is None or will_be["unsafe"] else beneath.ACCEPT, described=upgraded
        )
    except NotARepository:
        made = will_be is not None and will_be["created"] and os.path.isdir(path)
        if not module.check_mode or (
            os.path.lexists(path) and not made and (not os.path.isdir(path) or os.listdir(path))
        ):
            raise
    else:
        if repository.root.fault and (will_be is None or will_be["unsafe"]):
            module.warn(f"The repository is not safe: {path} {repository.root.fault}.")
        with repository:
            if foreseen:
                repository.foreseen = known.foreseen
            yield repository
        return
    # Loaded here, for it is seldom needed, and every file costs time in every task.
    from .formats import fsverity
    from .store import create

    module.warn(f"There is no repository at {path} yet. Check mode treats it as empty.")
    algorithm = fsverity.ALGORITHMS.get(will_be["algorithm"] or "") if will_be is not None else None
    with (
        tempfile.TemporaryDirectory(prefix="composefs-") as base,
        create.create(f"{base}/empty", algorithm or fsverity.SHA256, create.DISABLED) as empty,
    ):
        if foreseen:
            empty.foreseen = known.foreseen
        # What is foretold of free space is about the place where the repository will be.
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        empty.place = path
        yield empty


def progress_files(module: Module, own: str | None) -> list[FileSink]:
    """What keeps the file of the option ``progress_file`` up to date, and another one, ``own``. A file that cannot be
    written is a warning if the task named it, and the task goes on. UnsafeRepository if a link on the way to one
    belongs to somebody else, who would choose where root writes.
    """
    found = []
    named = module.params["progress_file"]
    for path in filter(None, (named, own)):
        path = os.path.abspath(path)
        try:
            directory = beneath.open_path(os.path.dirname(path))
        except OSError as error:
            if path != own:
                _without_file(module, error)
            continue
        found.append(FileSink(path, directory=directory))
    return found


def close_progress(module: Module, progress: Progress) -> None:
    """End what the task tells while it runs, with a warning if the file of the option ``progress_file`` was lost."""
    progress.close()
    named = module.params["progress_file"]
    for sink, error in progress.lost:
        if named and isinstance(sink, FileSink) and sink.path == os.path.abspath(named):
            _without_file(module, error)


def _without_file(module: Module, error: OSError) -> None:
    module.warn(
        f"The progress_file {text.printable(module.params['progress_file'])} cannot be written: "
        f"{error.strerror or error}. The task goes on without it."
    )


def operator() -> str:
    """Who runs this task, as far as the host can tell: ``user@host``."""
    import pwd  # late: few modules need it

    name = os.environ.get("SUDO_USER")
    if not name:
        try:
            name = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            name = str(os.getuid())
    return f"{name}@{os.uname().nodename}"


@dataclasses.dataclass(frozen=True)
class Foretold:
    """What an earlier task of a run in check mode would have done to a name: the manifest that it would mean, None if
    that is not known; ``absent`` if the name would be gone.
    """

    digest: str | None
    absent: bool


class Told(NamedTuple):
    """What earlier tasks of a run in check mode foretold for one repository: names; what will be mounted at which
    ``path`` (real), with ``repository``, ``name``, ``digest``, ``asked`` (the digest that the task named),
    ``image_id`` (null if unknown), ``keep_previous``, ``absent`` and ``state`` (of a deployment); what becomes of the
    repository itself (``created``, ``upgraded``, ``unsafe``, ``algorithm``, ``secure``, ``attributes``), None if
    nothing; and the streams that are fetched by then, ``complete`` if all of them are known.
    """

    names: dict[str, Foretold] = {}
    mounts: Sequence[dict[str, Any]] = ()
    repository: dict[str, Any] | None = None
    streams: frozenset[str] = frozenset()
    complete: bool = True

    @property
    def foreseen(self) -> Foreseen:
        """What names will mean."""
        names = {
            name: one.digest if one.absent or one.digest is not None else Foreseen.unknown(name)
            for name, one in self.names.items()
        }
        return Foreseen(names, self.streams, self.complete)


def told(module: Module, repository: str | None = None) -> Told:
    """What earlier tasks of this run foretold for the repository at the path ``repository``, or for mounts of any, as
    the action of the module says. Nothing outside check mode.
    """
    text = os.environ.get("COMPOSEFS_OCI_FORETOLD", "")
    if not module.check_mode or not text:
        return Told()
    try:
        found = json.loads(text)
        real = os.path.realpath(repository) if repository is not None else None
        here = [one for one in found if real is None or os.path.realpath(one["repository"]) == real]
        keys = ("name", "digest", "asked", "image_id", "keep_previous", "absent", "state", "repository")
        facts = ("created", "upgraded", "unsafe", "algorithm", "secure", "attributes")
        made = [{key: one.get(key) for key in facts} for one in here if "created" in one]
        names = {one["name"]: Foretold(one["digest"], bool(one["absent"])) for one in here if _is_name(one)}
        for one in here:
            if "path" in one and one["name"] and one["digest"] and not one["absent"]:
                # What is mounted is kept by a pin.
                names.setdefault(f"{one['name']}@{one['digest']}", Foretold(one["digest"], False))
        return Told(
            names,
            [
                {"path": os.path.realpath(one["path"]), **{key: one.get(key) for key in keys}}
                for one in here
                if "path" in one
            ],
            made[-1] if made else None,
            frozenset(stream for one in here if _is_name(one) for stream in one.get("streams") or ()),
            all(one.get("streams") is not None for one in here if _is_name(one) and not one["absent"]),
        )
    except (ValueError, KeyError, TypeError):
        return Told()


def foretells(module: Module) -> bool:
    """Whether a program or library that is not there may be one that an earlier task of a run in check mode would
    install. A task that is in check mode by a word of its own, in a run that is not, only asks: nothing is to come.
    """
    return module.check_mode and not os.environ.get("COMPOSEFS_OCI_ASKS")


def _is_name(one: dict[str, Any]) -> bool:
    return "path" not in one and "created" not in one


def _upgraded(will_be: dict[str, Any]) -> Described | None:
    """What an old repository will say of itself when it was upgraded."""
    from .formats import fsverity
    from .formats.metajson import Metadata

    algorithm = fsverity.ALGORITHMS.get(will_be["algorithm"] or "")
    return Described(Metadata.new(algorithm), bool(will_be["secure"])) if algorithm is not None else None


def _occupy_standard_fds() -> None:
    """Make sure that nothing else gets the numbers 0, 1 and 2: processes that are forked put /dev/null there, whatever
    it is.
    """
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            return


def _guard(module: Module) -> None:
    """Name the paths of the task in UTF-8, and send warnings and what is logged through ``text.printable``: a task must
    not fail after it is done because its log cannot hold a name.
    """
    text.name_files(getattr(module, "params", {}))
    log: Callable[[str], Any] | None = getattr(module, "log", None)
    if log is not None:
        module.log = lambda message: log(text.printable(message))  # type: ignore[attr-defined]
    warn = getattr(module, "warn", None)
    if warn is not None:
        module.warn = lambda warning: warn(text.printable(warning))  # type: ignore[method-assign]


def _tell_nothing_of_files(module: Any) -> None:
    """``AnsibleModule`` adds mode, owner, size and a ``state`` of its own to every result that has a ``path``, whatever
    that is the path of.
    """
    module.add_path_info = lambda values: values


def guarded(
    kind: Any,
    references: Sequence[str] = (),
    several: str = "",
    read: Callable[[object], object] = lambda value: value,
    complain: Callable[[object], str] = lambda value: "",
) -> Any:
    """A subclass of ``kind``, which is AnsibleModule. It shows no secret even if the task is written wrongly, and it
    treats an option that is null as one that is not written.

    Null is the only way in which a task can do without a default of its action group. AnsibleModule by itself takes
    null for a value, which contradicts other options and stands in the place of the option's own default.

    Ansible logs and returns the options of every task, and of an option that is malformed it cannot know what is a
    secret. So options are cleaned before Ansible sees them. In the options ``references`` credentials are replaced by
    stars, which no reference may have. ``several`` is an option with a list of such options: ``read`` puts it into its
    usual shape, and if ``complain`` finds that wrong, the list is dropped. What ``complain`` says is then the attribute
    ``complaint`` of the module.
    """
    if not isinstance(kind, type):
        return kind  # a test's

    class Guarded(kind):  # type: ignore[misc]
        complaint = ""
        params: dict[str, Any]

        def _load_params(self) -> None:
            super()._load_params()
            self.params = _written(self.params)
            values: Any = None
            if several and self.params.get(several) is not None:
                self.params[several] = values = read(self.params[several])
                wrong = complain(values)
                if isinstance(values, list):
                    self.params[several] = values = [_written(one) if isinstance(one, dict) else one for one in values]
                if wrong:
                    self.complaint = f"The option {several} is malformed. {wrong} Write it as documented."
                    self.params[several] = values = []
            for place in (self.params, *(values if isinstance(values, list) else [])):
                for key in references:
                    if isinstance(place.get(key), str):
                        place[key] = without_credentials(place[key])

    return Guarded


def _written(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are not null; what Ansible itself says to the module stays as it is."""
    return {key: value for key, value in options.items() if value is not None or key.startswith("_ansible_")}


# What a path begins with, or the place of a containers-storage.
_PATHS = ("/", ".", "~", "[")


def without_credentials(reference: str) -> str:
    """``reference`` with stars in the place of a user and a password before an at sign, as in
    ``docker://user:x@host``. A path on the host, as in ``oci:/srv/layout:@0``, stays as it is.
    """
    transport, colon, place = reference.partition(":")
    if colon and transport in ("composefs", *TRANSPORTS[1:]) and place[:1] in _PATHS and place[:2] != "//":
        return reference
    head, at, tail = reference.rpartition("@")
    if not at:
        return reference
    if is_digest(tail):
        return f"{without_credentials(head)}@{tail}"
    scheme, slashes, _rest = head.partition("//")
    return f"{scheme}{slashes}***@{tail}" if slashes else f"***@{tail}"


def run_module(
    module: Module,
    main: Callable[[Any], Mapping[str, Any]],
    base: Mapping[str, Any] | None = None,
    *,
    effort: bool = False,
    unread: Mapping[str, Any] | None = None,
) -> None:
    """Call ``main(module)`` and leave through ``exit_json`` with what it returns, or through ``fail_json``.

    ``base`` holds the return values that exist in every case; ``main``'s own take precedence. It is read when the
    module ends, so ``main`` may fill in what it learns before it fails. Failures carry ``error``: the code of the
    engine's error class; ``internal_error`` stands for a bug. They contain what is known: values that nobody has filled
    in yet are left out. With ``effort`` they also tell how often what failed was tried, and the seconds that the task
    took.

    ``unread`` is what a module says in check mode where it could not read the repository for want of a library, which
    an earlier task of the run may be about to install: null for what it would have found out. A warning tells why.
    """
    _occupy_standard_fds()
    _guard(module)
    _tell_nothing_of_files(module)
    at_first = dict(base or {})
    begin = time.monotonic()
    try:
        result = main(module)
    except Exception as raised:  # the last resort: a traceback must never reach the user
        error = from_exception(raised, "The module could not go on")
        if unread is not None and isinstance(error, MissingLibrary) and foretells(module):
            module.warn(f"{error} So check mode cannot tell what is in the repository.")
            module.exit_json(**text.printable_values({**(base or {}), **unread}))
            return
        failure: dict[str, Any] = {"msg": str(error), "error": error.code}
        if effort:
            failure.update(attempts=max(error.attempts, 1), seconds=round(time.monotonic() - begin, 3))
    else:
        module.exit_json(**text.printable_values({**(base or {}), **result}))
        return
    values = {
        key: value
        for key, value in (base or {}).items()
        # An empty list that was filled in is another object than the one that stood there at first.
        if key == "changed" or not (_says_nothing(value) and value is at_first.get(key, value))
    }
    values.update(failure)
    values["msg"] = text.printable(values["msg"])
    module.fail_json(**text.printable_values(values))


def _says_nothing(value: object) -> bool:
    """Whether ``value`` is what a result begins with: null, false, zero or empty, or a mapping of nothing else."""
    return not value or (isinstance(value, dict) and all(map(_says_nothing, value.values())))
