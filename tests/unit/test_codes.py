# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every error code is documented, is raised somewhere in the collection, and can be made to happen.

What is under test is the source itself: a code that nobody raises, one that a module returns without a class, and one
that the page of errors does not have are all found here.
"""

from __future__ import annotations

import ast
import errno
import os
import pathlib
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import errors
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
CODES = {kind.code for kind in errors.classes()}


def sources() -> Iterator[tuple[pathlib.Path, ast.Module]]:
    for path in PLUGINS.rglob("*.py"):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_no_two_families_share_a_code() -> None:
    """A class below another may keep its code; two that know nothing of each other may not."""
    owners: dict[str, type[EngineError]] = {}
    for kind in errors.classes():
        assert issubclass(kind, owners.setdefault(kind.code, kind)), kind


def test_every_code_is_documented_and_no_other() -> None:
    page = (ROOT / "docs" / "docsite" / "rst" / "errors.rst").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^ {3}\* - ``([a-z_]+)``$", page, re.MULTILINE)) == sorted(CODES)


def raised_codes() -> set[str]:
    """The codes of the classes that the source names, apart from where it defines them."""
    named = {node.id for _path, tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return {kind.code for kind in errors.classes() if kind.__name__ in named}


def test_every_code_is_raised_somewhere() -> None:
    assert sorted(CODES - raised_codes()) == []


def test_modules_return_no_code_without_a_class() -> None:
    """``error`` as a keyword or a key, wherever it stands with a text."""
    for path, tree in sources():
        for node in ast.walk(tree):
            values: list[ast.expr] = []
            if isinstance(node, ast.keyword) and node.arg == "error":
                values = [node.value]
            elif isinstance(node, ast.Dict):
                values = [
                    value
                    for key, value in zip(node.keys, node.values)
                    if isinstance(key, ast.Constant) and key.value == "error"
                ]
            for value in values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    assert value.value in CODES, f"{path}:{value.lineno}"


# --- each of them happens
# --------------------------------------------------------------------------------------------------------------------


def engine(room: str) -> Any:
    name = f"ansible_collections.composefs.oci.plugins.module_utils.{room}"
    __import__(name)
    return sys.modules[name]


def os_error(number: int) -> Callable[[pathlib.Path], None]:
    def fail(place: pathlib.Path) -> None:
        with errors.doing("Storing"):
            raise OSError(number, "x")

    return fail


def raised(error: BaseException) -> Callable[[pathlib.Path], None]:
    def fail(place: pathlib.Path) -> None:
        raise errors.from_exception(error, "Doing something")

    return fail


def skopeo_says(words: str) -> Callable[[pathlib.Path], None]:
    def fail(place: pathlib.Path) -> None:
        options = engine("source.options").ProxyOptions()
        raise engine("source.skopeowords").classify(options, "Opening docker://registry.test/app", words)

    return fail


def repository(place: pathlib.Path) -> Any:
    engine("store.create").prepare(str(place / "repo"), engine("formats.fsverity").SHA256, "disabled")
    return engine("store.repository").Repository.open(str(place / "repo"), write=True)


def busy(place: pathlib.Path) -> None:
    with repository(place) as one, one.exclusive(0.1):
        engine("store.repository").Repository.open(str(place / "repo"), wait=0.0)


def damaged(place: pathlib.Path) -> None:
    with repository(place) as opened:
        os.makedirs(f"{opened.path}/streams", exist_ok=True)
        os.symlink("/elsewhere", f"{opened.path}/streams/oci-layer-x")
        opened.stream("oci-layer-x")


def other_algorithm(place: pathlib.Path) -> None:
    repository(place).close()
    engine("store.create").prepare(str(place / "repo"), engine("formats.fsverity").SHA512, "disabled")


def newer_journal(place: pathlib.Path) -> None:
    journal = engine("operations.journal")
    (place / "journal.json").write_text('{"version": 99}')
    journal.parse((place / "journal.json").read_bytes(), "journal.json")


def wrong_option(place: pathlib.Path) -> None:
    pytest.importorskip("ansible.module_utils.basic", exc_type=ImportError)
    from ansible_collections.composefs.oci.plugins.modules import composefs_image

    composefs_image.options_of({"timeout": 0, "retries": 0, "parallel": 1}, False)


def no_platform(place: pathlib.Path) -> None:
    documents = engine("formats.ocidocuments")
    raw = b'{"os": "linux", "architecture": "arm64", "rootfs": {"type": "layers", "diff_ids": []}}'
    documents.check_platform(documents.parse_config(raw), documents.parse_platform("linux/s390x"))


def another_digest(place: pathlib.Path) -> None:
    plan = engine("pull.plan")
    request = plan.Request("docker://registry.test/app", "app", "sha256:" + "a" * 64)
    other = "sha256:" + "b" * 64
    plan._check_digest(request, other, other, None)


def unbootable(place: pathlib.Path) -> None:
    tree = engine("rootfs.filetree")
    root = tree.Directory(tree.Stat(0o755, 0, 0, 0, 0, {}))
    engine("rootfs.bootable")._required(root, b"sysroot")


def without_zstd(place: pathlib.Path) -> None:
    codecs = engine("formats.codecs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codecs, "_module", lambda name: None)
        codecs.require_zstd()


def parse_manifest(raw: bytes) -> Callable[[pathlib.Path], None]:
    return lambda place: engine("formats.ocidocuments").parse_manifest(raw)


def stalled(place: pathlib.Path) -> None:
    skopeo = engine("source.skopeo")
    child = skopeo.Child(["sleep", "60"], subprocess.DEVNULL, subprocess.PIPE, ())
    try:
        child.output(10, time.monotonic() + 0.01, "Asking")
    finally:
        child.close()


def no_verity(place: pathlib.Path) -> None:
    fsverity = engine("formats.fsverity")
    with open("/proc/self/status", "rb") as file:  # no file system that ever had it
        fsverity.enable(file.fileno(), fsverity.SHA256)


def impossible_mount(place: pathlib.Path) -> None:
    with repository(place) as opened:
        engine("operations.mounting")._check_place(opened.path, f"{opened.path}/objects")


def taken_back(place: pathlib.Path) -> None:
    activation = engine("operations.activation")
    activation._confirmed_before(None, str(place), None, None, None, 1, None, False)


def open_to_all(place: pathlib.Path) -> None:
    repository(place).close()
    (place / "repo").chmod(0o777)
    engine("store.repository").Repository.open(str(place / "repo"))


def too_large(place: pathlib.Path) -> None:
    rooms = engine("pull.pull"), engine("pull.limits")
    layer = types.SimpleNamespace(to_fetch=1000)
    plan = types.SimpleNamespace(missing=lambda: {"layer": layer})
    with repository(place) as opened:
        rooms[0]._require_space(opened, [plan], rooms[1].Limits(10))


HAPPENS: dict[str, Callable[[pathlib.Path], Any]] = {
    "failed": raised(EngineError("The pull was interrupted.")),
    "internal_error": raised(KeyError("secret")),
    "out_of_memory": raised(MemoryError()),
    "limit_reached": os_error(errno.EMFILE),
    "invalid_reference": lambda place: engine("formats.reference").parse_reference("docker:x"),
    "invalid_platform": lambda place: engine("formats.ocidocuments").parse_platform("linux"),
    "invalid_option": wrong_option,
    "invalid_mount_option": lambda place: engine("operations.mounting")._checked(["bogus"], False, False, False),
    "image_not_found": skopeo_says("reading manifest x in r.example/x: manifest unknown"),
    "platform_not_found": no_platform,
    "auth_failed": skopeo_says("unauthorized: authentication required"),
    "tls_failed": skopeo_says("x509: certificate signed by unknown authority"),
    "registry_unreachable": skopeo_says("dial tcp 127.0.0.1:1: connect: connection refused"),
    "policy_rejected": skopeo_says("Running image docker://x is rejected by policy."),
    "proxy_failed": skopeo_says("something odd"),
    "skopeo_missing": lambda place: engine("source.skopeo").skopeo_version((str(place / "skopeo"),)),
    "skopeo_too_old": skopeo_says("unknown flag: --nope"),
    "digest_mismatch": skopeo_says("corrupted blob, expecting sha256:aa, got sha256:bb"),
    "unexpected_digest": another_digest,
    "invalid_document": parse_manifest(b"[]"),
    "invalid_layer": lambda place: list(engine("formats.tar").EntryReader().entries([b"x" * 512])),
    "not_bootable": unbootable,
    "unsupported_media_type": parse_manifest(b'{"schemaVersion": 1}'),
    "missing_library": without_zstd,
    "not_a_repository": lambda place: engine("store.repository").Repository.open(str(place)),
    "incompatible_repository": other_algorithm,
    "repository_damaged": damaged,
    "no_space": os_error(errno.ENOSPC),
    "read_only": os_error(errno.EROFS),
    "permission_denied": os_error(errno.EACCES),
    "io_error": os_error(errno.EIO),
    "busy": busy,
    "incompatible_journal": newer_journal,
    "stalled": stalled,
    "verity_unsupported": no_verity,
    "mount_failed": impossible_mount,
    "reverted": taken_back,
    "unsafe_repository": open_to_all,
    "too_large": too_large,
}


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_happens(code: str, tmp_path: pathlib.Path) -> None:
    assert code in HAPPENS, f"make {code} happen in HAPPENS"
    with pytest.raises(EngineError) as caught:
        HAPPENS[code](tmp_path)
    assert caught.value.code == code
    assert caught.value.message and "\n" not in str(caught.value)
