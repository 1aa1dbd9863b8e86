# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ground that the engine's integration tests stand on: a real registry, real images, real file systems, real tools.

What a machine lacks is skipped with the reason; what is there is used as it is. Images and registries live as long as
the session, repositories and mounts as long as one test.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests/support"))

from aptroot import Unavailable, cache_directory
from faultproxy import FaultProxy
from ociimage import Built, Layout, debian_image
from registry import Registry
from tarbytes import small_tree
from trixie_skopeo import trixie_skopeo

if TYPE_CHECKING:
    from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
    from deploying import App

SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


def _provide_collection() -> None:
    """Make ``ansible_collections.composefs.oci`` importable under plain pytest (see tests/unit/conftest.py)."""
    name = "ansible_collections.composefs.oci"
    with contextlib.suppress(ModuleNotFoundError):
        if importlib.util.find_spec(name) is not None:
            return
    paths: dict[str, list[str]] = {"ansible_collections": [], "ansible_collections.composefs": [], name: [str(ROOT)]}
    for package, path in paths.items():
        module = sys.modules.setdefault(package, types.ModuleType(package))
        if not hasattr(module, "__path__"):
            module.__path__ = path


_provide_collection()
os.environ["PATH"] = os.pathsep.join(
    [os.environ.get("PATH", ""), *(path for path in SBIN if path not in os.environ.get("PATH", ""))]
)


def needed(program: str, package: str = "") -> str:
    """The path of a program, or skip."""
    found = shutil.which(program)
    if not found:
        pytest.skip(f"{program} is not installed (Debian package {package or program})")
    return found


def file_system(path: pathlib.Path) -> str:
    """Name of the file system that ``path`` lies on."""
    return subprocess.run(
        ["stat", "-f", "-c", "%T", str(path)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


# ---- places ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pathlib.Path]:
    """A directory on a file system that can hold a repository: not overlayfs (whose files cannot be a lower layer
    again).
    """
    choices = [
        os.environ.get("COMPOSEFS_OCI_DISK"),
        str(tmp_path_factory.getbasetemp()),
        str(cache_directory()),
        "/var/tmp",
        "/dev/shm",
    ]
    for choice in choices:
        if (
            choice
            and os.path.isdir(choice)
            and os.access(choice, os.W_OK)
            and file_system(pathlib.Path(choice)) not in ("overlayfs", "overlay")
        ):
            with tempfile.TemporaryDirectory(prefix="composefs-oci-", dir=choice) as directory:
                yield pathlib.Path(directory)
                return
    pytest.skip("no writable directory outside an overlay file system (set COMPOSEFS_OCI_DISK to one)")


@pytest.fixture
def place(disk: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty directory for one test, on ``disk``."""
    with tempfile.TemporaryDirectory(dir=disk) as directory:
        yield pathlib.Path(directory)


@pytest.fixture
def new_repository() -> Callable[..., pathlib.Path]:
    """``new_repository(path, algorithm="sha256")`` makes an empty repository without fs-verity there, as the module
    would.
    """
    from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
    from ansible_collections.composefs.oci.plugins.module_utils.store import create

    def make(path: pathlib.Path, algorithm: str = "sha256") -> pathlib.Path:
        create.prepare(str(path), fsverity.ALGORITHMS[algorithm], create.DISABLED)
        return path

    return make


@pytest.fixture
def repository_path(place: pathlib.Path, new_repository: Callable[..., pathlib.Path]) -> pathlib.Path:
    """A fresh SHA-256 repository without fs-verity, on ``disk``."""
    return new_repository(place / "repository")


@pytest.fixture
def repository(repository_path: pathlib.Path) -> Iterator[Repository]:
    """The same, open for writing."""
    from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

    with Repository.open(str(repository_path), write=True) as opened:
        yield opened


SmallFileSystem = Callable[..., pathlib.Path]


@pytest.fixture
def small_fs(place: pathlib.Path) -> Iterator[SmallFileSystem]:
    """``small_fs("16M", "ext4")`` mounts a file system that fills up soon; kinds: ext4, tmpfs, inodes (an ext4 with
    200), verity (ext4 with fs-verity), btrfs.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    mounted: list[pathlib.Path] = []

    def make(size: str = "16M", kind: str = "ext4", inodes: int = 200) -> pathlib.Path:
        target = place / f"mount-{len(mounted)}"
        target.mkdir()
        if kind == "tmpfs":
            command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(target)]
        else:
            image = place / f"disk-{len(mounted)}.img"
            needed(*(("mkfs.btrfs", "btrfs-progs") if kind == "btrfs" else ("mkfs.ext4", "e2fsprogs")))
            subprocess.run(["truncate", "-s", size, str(image)], check=True)
            features = (
                ["-N", str(inodes)] if kind == "inodes" else ["-O", "verity", "-b", "4096"] if kind == "verity" else []
            )
            making = ["mkfs.btrfs", "-q"] if kind == "btrfs" else ["mkfs.ext4", "-q", "-F", "-m", "0", *features]
            subprocess.run([*making, str(image)], check=True)
            command = ["mount", "-o", "loop", str(image), str(target)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            pytest.skip(f"cannot mount a {kind} here: {done.stdout.strip()}")
        mounted.append(target)
        return target

    yield make
    for target in reversed(mounted):
        if subprocess.run(["umount", str(target)], stderr=subprocess.DEVNULL, check=False).returncode:
            subprocess.run(["umount", "--lazy", str(target)], check=True)


@pytest.fixture
def read_only() -> Iterator[Callable[[pathlib.Path], None]]:
    """``read_only(mountpoint)`` remounts what ``small_fs`` made; it is writable again after the test."""
    changed: list[pathlib.Path] = []

    def make(path: pathlib.Path) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
        changed.append(path)

    yield make
    for path in changed:
        subprocess.run(["mount", "-o", "remount,rw", str(path)], check=False)


# ---- tools -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def skopeo() -> str:
    return needed("skopeo")


@pytest.fixture(scope="session")
def newer_skopeo() -> str:
    """skopeo of Debian trixie, beside the installed one."""
    try:
        return str(trixie_skopeo())
    except Unavailable as error:
        pytest.skip(f"no skopeo of trixie: {error}")


@pytest.fixture(scope="session", params=["installed", "trixie"])
def each_skopeo(request: pytest.FixtureRequest) -> str:
    """Every skopeo that can be had, one after the other."""
    return str(request.getfixturevalue("skopeo" if request.param == "installed" else "newer_skopeo"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cfsctl: compares with the reference implementation; dev/test cfsctl runs these")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cfsctl" in getattr(item, "fixturenames", ()):
            item.add_marker("cfsctl")


@pytest.fixture(scope="session")
def cfsctl() -> Callable[..., str]:
    """``cfsctl("--repo", path, "oci", "images")`` runs the reference implementation and returns its output; fails the
    test if it fails.
    """
    program = shutil.which("cfsctl")
    if not program:
        pytest.skip("cfsctl is not on the PATH, so nothing can be compared with it")

    def run(*arguments: str | os.PathLike[str], check: bool = True, stdin: bytes | None = None) -> str:
        done = subprocess.run(
            [program, *(os.fspath(argument) for argument in arguments)], input=stdin, capture_output=True, check=False
        )
        if check:
            assert done.returncode == 0, (
                f"cfsctl {' '.join(map(str, arguments))}: {done.stderr.decode(errors='replace')}"
            )
        return done.stdout.decode(errors="surrogateescape")

    return run


# ---- mounts that last ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def versions(disk: pathlib.Path) -> Layout:
    """Three versions of an application: tags ``v1``, ``v2``, ``v3``."""
    from deploying import make_versions

    return make_versions(disk / "versions")


@pytest.fixture
def app(place: pathlib.Path, repository_path: pathlib.Path, versions: Layout, skopeo: str) -> Iterator[App]:
    """A host with a repository, a mount point and journals of its own; skipped where nothing can be mounted."""
    from ansible_collections.composefs.oci.plugins.module_utils.errors import MountFailed
    from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository
    from deploying import App

    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    made = App(place, repository_path, versions)
    try:
        made.pull("v1", "trial")
        try:
            made.mount("trial")
        except MountFailed as error:
            pytest.skip(f"this kernel cannot mount composefs images: {error}")
        made.unmount()
        with Repository.open(str(repository_path), write=True) as repository:
            repository.untag("trial")
        yield made
    finally:
        made.clean()


# ---- images and registries -------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def images(disk: pathlib.Path) -> Layout:
    """A layout with small synthetic images: tags ``gzip``, ``none``, ``zstd``, ... (every encoding), ``artifact``,
    ``platforms``.
    """
    layout = Layout(disk / "images")
    first, second = small_tree(seed=1), small_tree(seed=2, files=5, prefix="usr/share/more")
    for encoding in ("none", "gzip", "gzip-multi", "estargz", "zstd", "zstd-frames", "zstd-skippable", "zstd-chunked"):
        try:
            layout.image([first, second], encoding, encoding, labels={"encoding": encoding})
        except Unavailable:
            continue
    layout.artifact([("application/x-text", b"an artifact\n" * 100)], "artifact")
    layout.multi_platform(
        {name: [small_tree(seed=seed)] for seed, name in enumerate(("linux/amd64", "linux/arm64", "linux/arm/v7"))},
        "platforms",
    )
    return layout


@pytest.fixture(scope="session")
def debian() -> tuple[pathlib.Path, Built]:
    """A small real image of Debian packages in three layers: its layout (tag ``latest``) and what is in it. Kept in the
    cache.
    """
    path = cache_directory() / "images/debian"
    try:
        return path, debian_image(path)
    except Unavailable as error:
        pytest.skip(f"no Debian packages: {error}")


def _registry(directory: pathlib.Path, **options: object) -> Iterator[Registry]:
    try:
        with Registry(directory, **options) as running:  # type: ignore[arg-type]
            yield running
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def registry(disk: pathlib.Path, skopeo: str) -> Iterator[Registry]:
    """A registry without TLS; tests push under names of their own."""
    yield from _registry(disk / "registry")


@pytest.fixture(scope="session")
def tls_registry(disk: pathlib.Path, skopeo: str) -> Iterator[Registry]:
    """A registry with TLS of a CA that nobody knows (``.ca_directory``)."""
    yield from _registry(disk / "tls-registry", tls=True)


@pytest.fixture(scope="session")
def private_registry(disk: pathlib.Path, skopeo: str) -> Iterator[Registry]:
    """A registry with TLS that wants ``.user`` and ``.password``."""
    yield from _registry(disk / "private-registry", tls=True, user="reader", password="se:cret w0rd")


@pytest.fixture
def faults(registry: Registry) -> Iterator[FaultProxy]:
    """A proxy in front of ``registry`` that misbehaves on demand."""
    with FaultProxy(registry.address) as proxy:
        yield proxy
