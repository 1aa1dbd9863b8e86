# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A limit that is reached is told as what it is, wherever it strikes."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, LimitReached, SkopeoMissing
from ansible_collections.composefs.oci.plugins.module_utils.formats import codecs
from ansible_collections.composefs.oci.plugins.module_utils.source import skopeo, skopeowords
from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions

NO_THREAD = (
    "runtime: failed to create new OS thread (have 5 already; errno=11)\nruntime: may need to increase max user "
)
NO_THREAD += "processes (ulimit -u)\nfatal error: newosproc\n\nruntime stack:\nruntime.throw\nrax    0x0\nrbx    0x6\n"


@pytest.mark.parametrize(
    ("number", "limit", "how"),
    [
        (errno.EMFILE, "RLIMIT_NOFILE is ", "ulimit -n"),
        (errno.ENFILE, "fs.file-max is ", "fs.file-max"),
        (errno.EAGAIN, "processes or threads", "ulimit -u"),
    ],
)
def test_a_limit_has_its_name_its_value_and_how_to_raise_it(number: int, limit: str, how: str) -> None:
    with pytest.raises(LimitReached) as caught, errors.doing("Storing"):
        raise OSError(number, "x")
    assert limit in caught.value.message and how in caught.value.hint and caught.value.doing == "Storing"


def test_threads_and_processes_share_their_limit() -> None:
    error = errors.from_exception(RuntimeError("can't start new thread"), "Fetching")
    assert isinstance(error, LimitReached) and "threads" in error.message and "bug" not in str(error)


def test_a_thread_that_finds_no_room_for_its_stack_lacks_memory() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + (6 << 20), before[1]))
        error = errors.from_exception(RuntimeError("can't start new thread"), "Fetching")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert isinstance(error, LimitReached) and "RLIMIT_AS is " in error.message


@pytest.mark.parametrize("text", ["libx.so: failed to map segment from shared object", "No module named x"])
def test_no_library_is_missing_where_there_is_no_room_for_one(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The loader has many words for it, and some do not tell."""

    def fail(_name: str) -> None:
        raise (ModuleNotFoundError if text.startswith("No") else ImportError)(text)

    codecs._module.cache_clear()
    monkeypatch.setattr(codecs.importlib, "import_module", fail)
    monkeypatch.setattr(errors, "lacks_room", lambda: True)
    monkeypatch.setattr(codecs, "lacks_room", lambda: True)
    try:
        with pytest.raises(EngineError) as caught:
            codecs.require_zstd()
    finally:
        codecs._module.cache_clear()
    assert isinstance(caught.value, errors.OF_THIS_PROCESS) and not isinstance(caught.value, errors.MissingLibrary)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        (f"libx.so: cannot open shared object file: {os.strerror(errno.EMFILE)}", "RLIMIT_NOFILE is "),
        (f"libx.so: cannot create shared object descriptor: {os.strerror(errno.ENOMEM)}", "RLIMIT_AS is "),
        ("libx.so: failed to map segment from shared object: Operation not permitted", None),
        ("libx.so: undefined symbol: f", None),
    ],
)
def test_a_library_that_is_there_and_cannot_be_loaded_is_not_missing(
    narrow: None, monkeypatch: pytest.MonkeyPatch, text: str, limit: str | None
) -> None:
    def fail(_name: str) -> None:
        raise ImportError(text)

    codecs._module.cache_clear()
    monkeypatch.setattr(codecs.importlib, "import_module", fail)
    try:
        if limit is None:
            assert codecs._module("zstandard") is None
        else:
            with pytest.raises(LimitReached, match=limit):
                codecs._module("zstandard")
    finally:
        codecs._module.cache_clear()


@pytest.fixture
def narrow() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 42, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_memory_that_is_limited_is_told_with_the_limit(narrow: None) -> None:
    error = errors.from_exception(MemoryError(), "Splitting")
    assert isinstance(error, LimitReached) and f"RLIMIT_AS is {1 << 22} MiB" in error.message


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_skopeo_that_may_not_be_started_is_not_missing(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*arguments: Any, **options: Any) -> Any:
        raise OSError(number, "x")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(EngineError) as caught:
        skopeo.skopeo_version()
    assert not isinstance(caught.value, SkopeoMissing) and caught.value.code in ("limit_reached", "out_of_memory")


@pytest.mark.parametrize(
    "words", [NO_THREAD, "fork/exec x: resource temporarily unavailable", "open /x: too many open files"]
)
def test_words_of_skopeo_about_limits_are_told_without_registers(words: str) -> None:
    said = skopeowords.unwrap_log(words.encode())
    error = skopeowords.classify(ProxyOptions(), "Opening docker://x", said)
    assert isinstance(error, LimitReached) and "rax" not in str(error) + error.said
