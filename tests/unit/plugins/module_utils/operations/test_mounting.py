# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which image a name means, when a mount is the one asked for, and what is refused before the kernel is asked."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity, ocidocuments
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import digest_of
from ansible_collections.composefs.oci.plugins.module_utils.host import mountcalls, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import dump, mounting
from ansible_collections.composefs.oci.plugins.module_utils.store import create, imagestreams
from ansible_collections.composefs.oci.plugins.module_utils.operations.diskuse import DiskUse, disk_use
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.erofswriter import write_image
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    Busy,
    FormatError,
    ImageNotFound,
    IncompatibleRepository,
    InvalidMountOption,
    IOFailed,
    MountFailed,
    PermissionDenied,
)
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.filetree import Directory, Leaf, Stat
from ansible_collections.composefs.oci.plugins.module_utils.host.mountinfo import Mounted
from ansible_collections.composefs.oci.plugins.module_utils.operations.mounting import Target, Wish
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

ALGORITHM = fsverity.SHA256


@pytest.fixture
def repository(tmp_path: pathlib.Path) -> Iterator[Repository]:
    path = tmp_path / "repo"
    create.prepare(str(path), ALGORITHM, create.DISABLED)
    with Repository.open(str(path), write=True) as opened:
        yield opened


def put_image(
    repository: Repository,
    name: str,
    content: bytes = b"",
    versions: tuple[int, ...] = (1,),
    boot: bool = False,
    linked: bool = True,
    labelled: str = "1.4",
) -> str:
    """A container without layers whose configuration has EROFS images; the hex of the first one."""
    refs = {}
    for version in versions:
        root = Directory(Stat(0o755), {name.encode().replace(b"/", b"_"): Leaf(Stat(0o644), data=content)})
        image = bytearray()
        write_image(root, version, ALGORITHM, image.extend)
        refs[imagestreams.image_ref(version, boot)] = repository.objects.put(bytes(image))
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": {"name": name, "org.opencontainers.image.version": labelled}},
        "rootfs": {"type": "layers", "diff_ids": []},
    }
    raw = json.dumps(config).encode()
    config_stream = imagestreams.store(repository, imagestreams.CONFIG, raw, refs)
    manifest = {
        "schemaVersion": 2,
        "mediaType": ocidocuments.OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": digest_of(raw),
            "size": len(raw),
        },
        "layers": [],
    }
    raw_manifest = json.dumps(manifest).encode()
    stream = imagestreams.store(
        repository,
        imagestreams.MANIFEST,
        raw_manifest,
        {imagestreams.CONFIG_REF + digest_of(raw): config_stream},
    )
    repository.register(imagestreams.CONFIG + digest_of(raw), config_stream)
    repository.register(imagestreams.MANIFEST + digest_of(raw_manifest), stream)
    repository.tag(name, digest_of(raw_manifest))
    for digest in refs.values() if linked else ():
        repository.link_image(digest)
    return next(iter(refs.values())).hex() if refs else ""


def there(image_id: str, **changes: Any) -> Mounted:
    """A plain mount of the image, as the kernel would show it."""
    settings = {
        "ro": "",
        "lowerdir+": "/",
        "datadir+": "/r/objects",
        "redirect_dir": "on",
        "metacopy": "on",
        **changes.pop("settings", {}),
    }
    options = frozenset(changes.pop("options", ("ro", "nodev", "nosuid", "relatime")))
    return Mounted(
        46,
        27,
        "/srv/app",
        changes.pop("kind", "overlay"),
        changes.pop("source", f"composefs:{image_id}"),
        options,
        settings,
    )


# ---- which image -----------------------------------------------------------------------------------------------------


def test_names_manifests_and_ids_lead_to_the_image(repository: Repository) -> None:
    image = put_image(repository, "docker://example.com/app:1")
    digest = repository.tags()["docker://example.com/app:1"]
    for name in ("docker://example.com/app:1", digest, f"@{digest}", image):
        assert mounting.resolve(repository, name).hex() == image


def test_the_repositorys_own_format_is_taken(repository: Repository) -> None:
    put_image(repository, "app", versions=(2, 1))
    assert repository.metadata.erofs_formats == (1,)
    with (
        mounting.open_image(repository, mounting.resolve(repository, "app")) as fd,
        dump.ErofsImage.open(fd, ALGORITHM) as image,
    ):
        assert image.version == 1


def test_the_bootable_variant_is_another_image(repository: Repository) -> None:
    image = put_image(repository, "app", boot=True)
    assert mounting.resolve(repository, "app", bootable=True).hex() == image
    with pytest.raises(ImageNotFound, match="erofs: true"):
        mounting.resolve(repository, "app")
    put_image(repository, "plain")
    with pytest.raises(ImageNotFound, match="bootable: true"):
        mounting.resolve(repository, "plain", bootable=True)


@pytest.mark.parametrize("name", ["missing", "sha256:" + "0" * 64, "0" * 64, "0" * 128, "0" * 63])
def test_what_is_not_there_is_said(repository: Repository, name: str) -> None:
    with pytest.raises(ImageNotFound):
        mounting.resolve(repository, name)


def test_an_image_that_is_not_listed_is_not_mounted(repository: Repository) -> None:
    image = put_image(repository, "app", linked=False)
    for name in ("app", image):
        with pytest.raises(ImageNotFound, match=image):
            mounting.resolve(repository, name)


def test_an_id_is_an_id_even_if_an_image_has_such_a_name(repository: Repository) -> None:
    image = put_image(repository, "app")
    other = put_image(repository, image, b"other")
    assert other != image and mounting.resolve(repository, image).hex() == image
    assert mounting.resolve(repository, put_image(repository, "ab" * 32)) == mounting.resolve(repository, "ab" * 32), (
        "a name that only looks like one"
    )


def test_messages_call_an_image_what_people_call_it(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name, its version and the beginning of its digest, beside the id; however the task names it."""
    image, other = put_image(repository, "app"), put_image(repository, "old", b"old", labelled="1.3")
    digest, old = repository.tags()["app"], repository.tags()["old"]
    host = Host(monkeypatch)
    words = f"the image app (version 1.4, {digest[:19]}, id {image})"

    def refuse(request: mountcalls.Request, path: str) -> None:
        raise MountFailed(f"{request.mounting(path)} failed.")

    monkeypatch.setattr(mountcalls, "mount", refuse)
    for wished in ("app", digest, image):
        with pytest.raises(MountFailed) as failed:
            mounting.ensure_mounted(repository, Wish(wished, str(tmp_path / "m")))
        assert f"Mounting {words} at " in str(failed.value), wished
    host.shown = there(other)
    with pytest.raises(Busy) as busy:
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m")))
    assert f"the image old (version 1.3, {old[:19]}, id {other})" in str(busy.value)
    host.shown = None
    pathlib.Path(repository.path, "objects", image[:2], image[2:]).write_bytes(b"damaged")
    with pytest.raises(FormatError) as damaged:
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m")))
    assert f"{words} is damaged".replace("the image", "The image") in str(damaged.value)
    pathlib.Path(repository.path, "objects", image[:2], image[2:]).unlink()
    with pytest.raises(FormatError) as missing:
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m")))
    assert f"Opening {words}: " in str(missing.value)


# ---- measuring -------------------------------------------------------------------------------------------------------


def test_an_image_is_hashed_where_the_kernel_did_not_measure_it(repository: Repository) -> None:
    image = put_image(repository, "app")
    path = pathlib.Path(repository.path, "objects", image[:2], image[2:])
    with mounting.open_image(repository, bytes.fromhex(image)) as fd:
        assert os.fstat(fd).st_ino == path.stat().st_ino
    content = bytearray(path.read_bytes())
    content[1200] ^= 1
    path.write_bytes(content)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FormatError, match="damaged"), mounting.open_image(repository, bytes.fromhex(image)):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_sealed_image_is_not_read(
    tmp_path: pathlib.Path, verity_kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secure"
    create.prepare(str(path), ALGORITHM, create.REQUIRED)
    with Repository.open(str(path), write=True) as repository:
        image = put_image(repository, "app")
        assert repository.secure
        monkeypatch.setattr(mounting, "hash_file", lambda *_arguments: pytest.fail("hashed in user space"))
        with mounting.open_image(repository, bytes.fromhex(image)):
            pass
        wish = Wish("app", "/srv/app")
        assert [
            mounting.decide(repository, Wish("app", "/srv", verity=verity)).verity
            for verity in ("required", "preferred", "disabled")
        ] == [
            True,
            True,
            False,
        ]
        assert mounting.decide(repository, wish).image_id == image


def test_required_verity_needs_a_secure_repository(repository: Repository) -> None:
    put_image(repository, "app")
    with pytest.raises(IncompatibleRepository, match="not protected"):
        mounting.decide(repository, Wish("app", "/srv", verity=mounting.REQUIRED))
    assert not mounting.decide(repository, Wish("app", "/srv")).verity


# ---- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["bogus"], "'bogus' is not known"),
        (["nodev=1"], "not known"),
        (["context"], "not known"),
        (["context="], "not known"),
        (["lowerdir=/etc"], "not known"),
        (["noatime", "strictatime"], "contradict"),
        (["rw"], "upperdir"),
        (["volatile"], "upperdir"),
    ],
)
def test_options_that_cannot_be_are_refused(repository: Repository, options: list[str], words: str) -> None:
    put_image(repository, "app")
    with pytest.raises(InvalidMountOption, match=words):
        mounting.decide(repository, Wish("app", "/srv", options=options))


def test_an_upper_directory_needs_a_work_directory(repository: Repository) -> None:
    with pytest.raises(InvalidMountOption, match="only one of them"):
        mounting.decide(repository, Wish("app", "/srv", upperdir="/u"))
    with pytest.raises(InvalidMountOption, match="ro and rw"):
        mounting.decide(repository, Wish("app", "/srv", upperdir="/u", workdir="/w", options=["ro", "rw"]))


def test_options_have_one_form(repository: Repository) -> None:
    put_image(repository, "app")
    assert mounting.decide(repository, Wish("app", "/srv", options=["nosuid", "ro", "nodev", "nodev"])).options == (
        "nodev",
        "nosuid",
    )
    writable = Wish("app", "/srv", upperdir="/u", workdir="/w", dev=True, suid=True)
    assert mounting.decide(repository, dataclasses.replace(writable, options=["rw"])).options == ()
    assert mounting.decide(repository, dataclasses.replace(writable, options=["ro"])).options == ("ro",)


@pytest.mark.parametrize("bootable", [False, True])
def test_a_mount_is_nodev_and_nosuid_unless_it_is_asked_for_otherwise(repository: Repository, bootable: bool) -> None:
    put_image(repository, "app", boot=bootable)

    def options(**changes: Any) -> tuple[str, ...]:
        return mounting.decide(repository, Wish("app", "/srv", bootable=bootable, **changes)).options

    assert options() == ("nodev", "nosuid") == options(options=["nosuid", "nodev"])
    assert options(upperdir="/u", workdir="/w", options=["noatime"]) == ("noatime", "nodev", "nosuid")
    assert (options(dev=True), options(suid=True), options(dev=True, suid=True)) == (("nosuid",), ("nodev",), ())
    for contradiction in ({"dev": True, "options": ["nodev"]}, {"suid": True, "options": ["nosuid"]}):
        with pytest.raises(InvalidMountOption, match="contradict"):
            options(**contradiction)


# ---- what is there already -------------------------------------------------------------------------------------------

IMAGE = "ab" * 32


@pytest.mark.parametrize(
    ("mounted", "target", "word"),
    [
        (there(IMAGE), Target(IMAGE, "/srv/app", False), ""),
        (there("cd" * 32), Target(IMAGE, "/srv/app", False), "cd" * 32),
        (there(IMAGE, settings={"verity": "require"}), Target(IMAGE, "/srv/app", True), ""),
        (there(IMAGE, settings={"verity": "require"}), Target(IMAGE, "/srv/app", False), "verity on instead of off"),
        (there(IMAGE), Target(IMAGE, "/srv/app", True), "verity off instead of on"),
        (there(IMAGE, options=("ro", "nodev", "relatime")), Target(IMAGE, "/srv/app", False, options=("nodev",)), ""),
        (
            there(IMAGE, options=("ro", "nodev", "relatime")),
            Target(IMAGE, "/srv/app", False, options=()),
            "nodev on instead of off",
        ),
        (there(IMAGE, options=("ro",)), Target(IMAGE, "/srv/app", False, options=("strictatime",)), ""),
        (there(IMAGE, options=("ro", "noatime")), Target(IMAGE, "/srv/app", False, options=("noatime",)), ""),
        (there(IMAGE), Target(IMAGE, "/srv/app", False, "/u", "/w"), "upperdir none instead of /u"),
        (
            there(IMAGE, settings={"context": "a:b:c:d"}),
            Target(IMAGE, "/srv/app", False, options=("context=a:b:c:d", "nodev", "nosuid")),
            "",
        ),
        (
            there(IMAGE, settings={"context": "a:b:c:d"}),
            Target(IMAGE, "/srv/app", False),
            "context a:b:c:d instead of none",
        ),
    ],
)
def test_a_mount_is_compared_in_all_that_matters(mounted: Mounted, target: Target, word: str) -> None:
    found = "; ".join(mounting.differences(mounted, target))
    assert word in found and bool(word) == bool(found)


def test_volatile_is_recognised_as_old_and_new_kernels_show_it() -> None:
    target = Target(IMAGE, "/srv/app", False, "/u", "/w", ("volatile",))
    for setting in ({"volatile": ""}, {"fsync": "volatile"}):
        mounted = there(IMAGE, options=("rw", "relatime"), settings={"upperdir": "/u", "workdir": "/w", **setting})
        mounted.settings.pop("ro")
        assert mounting.differences(mounted, target) == []


class Host:
    """A stand-in for what is mounted and for the verbs of mount."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shown: Mounted | None = None) -> None:
        self.shown = shown
        self.inside: list[Mounted] = []
        self.calls: list[str] = []
        monkeypatch.setattr(mountinfo, "at", lambda _path: self.shown)
        monkeypatch.setattr(mountinfo, "children", lambda _of: self.inside)
        monkeypatch.setattr(mountinfo, "hidden_at", lambda _path: [])
        monkeypatch.setattr(mounting, "require_capability", lambda _what: None)
        monkeypatch.setattr(mountcalls, "mount", lambda request, path: self.calls.append(f"mount {path}"))
        monkeypatch.setattr(mountcalls, "replace", lambda request, path: self.calls.append(f"replace {path}"))
        monkeypatch.setattr(mountcalls, "unmount", self.unmount)
        monkeypatch.setattr(mountcalls, "tighten", lambda there, names: self.calls.append(f"tighten {names}"))

    def unmount(self, path: str) -> None:
        self.calls.append(f"unmount {path}")
        self.shown = None


def test_the_mount_point_is_made_and_check_mode_makes_none(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(repository, "app")
    host = Host(monkeypatch)
    point = tmp_path / "a/b"
    assert mounting.ensure_mounted(repository, Wish("app", str(point)), check=True).changed
    assert host.calls == [] and not point.exists()
    old = os.umask(0o077)
    try:
        assert mounting.ensure_mounted(repository, Wish("app", str(point))).changed
    finally:
        os.umask(old)
    assert host.calls == [f"mount {point}"] and point.stat().st_mode & 0o777 == 0o755


def test_a_file_is_no_mount_point(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(repository, "app")
    Host(monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(MountFailed, match="not a directory"):
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "file")))


def test_only_remounted_replaces(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = put_image(repository, "app")
    host = Host(monkeypatch, there("cd" * 32))
    with pytest.raises(Busy, match="(?s)the image cdcd.*remounted"):
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m")))
    outcome = mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m"), replace=True))
    assert outcome.changed and outcome.previous == host.shown and host.calls == [f"replace {tmp_path / 'm'}"]
    host.shown = there(image)
    assert not mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m"), replace=True)).changed


@pytest.mark.parametrize("replace", [False, True])
def test_a_mount_that_only_lacks_protection_gets_it_in_place(
    repository: Repository, monkeypatch: pytest.MonkeyPatch, replace: bool
) -> None:
    image = put_image(repository, "app")
    host = Host(monkeypatch, there(image, options=("ro", "relatime", "nosuid")))
    host.inside = [there("ef" * 32)._replace(path="/srv/app/inner")]
    wish = Wish("app", "/srv/app", replace=replace)
    assert mounting.ensure_mounted(repository, wish, check=True).changed and host.calls == []
    outcome = mounting.ensure_mounted(repository, wish)
    assert outcome.changed and outcome.previous is not None and outcome.previous.image_id == image
    assert host.calls == ["tighten ('nodev',)"]
    # One that was made with more protection than is asked for is another mount, as ever.
    with pytest.raises(Busy):
        mounting.ensure_mounted(repository, Wish("app", "/srv/app", suid=True))
    host.shown = there("cd" * 32, options=("ro", "relatime"))
    with pytest.raises(Busy):
        mounting.ensure_mounted(repository, Wish("app", "/srv/app"))
    assert len(host.calls) == 1


def test_a_mount_with_others_inside_is_not_replaced(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(repository, "app")
    host = Host(monkeypatch, there("cd" * 32))
    host.inside = [there("ef" * 32)._replace(path="/srv/app/inner")]
    with pytest.raises(Busy, match="/srv/app/inner"):
        mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m"), replace=True))
    with pytest.raises(Busy, match="/srv/app/inner"):
        mounting.ensure_unmounted(str(tmp_path / "m"))
    assert host.calls == []


def test_the_upper_directory_of_the_old_mount_is_not_taken_over(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(repository, "app")
    Host(monkeypatch, there("cd" * 32, settings={"upperdir": "/u", "workdir": "/w"}))
    with pytest.raises(Busy, match="in use by the old one"):
        mounting.ensure_mounted(
            repository, Wish("app", str(tmp_path / "m"), upperdir="/u", workdir="/other", replace=True)
        )


def test_foreign_mounts_are_named_and_left(
    repository: Repository, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_image(repository, "app")
    host = Host(monkeypatch, there(IMAGE, kind="tmpfs", source="cache"))
    for replace in (False, True):
        with pytest.raises(Busy, match="tmpfs from cache"):
            mounting.ensure_mounted(repository, Wish("app", str(tmp_path / "m"), replace=replace))
    assert not mounting.ensure_unmounted(str(tmp_path / "m")).changed
    assert host.calls == []


def test_unmounting_takes_every_image_that_lies_there(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch, there(IMAGE))
    outcome = mounting.ensure_unmounted(str(tmp_path), check=True)
    assert outcome.changed and outcome.target is None and host.calls == []
    assert mounting.ensure_unmounted(str(tmp_path)).changed
    assert host.calls == [f"unmount {tmp_path}"]
    assert not mounting.ensure_unmounted(str(tmp_path)).changed


@pytest.mark.parametrize("below", ["", "objects", ".."])
def test_the_repository_must_stay_visible(repository: Repository, monkeypatch: pytest.MonkeyPatch, below: str) -> None:
    put_image(repository, "app")
    host = Host(monkeypatch)
    with pytest.raises(MountFailed, match="hide the repository"):
        mounting.ensure_mounted(repository, Wish("app", os.path.join(repository.path, below)))
    assert host.calls == []


def test_a_missing_capability_is_said_before_anything_is_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    really = open
    monkeypatch.setattr(
        "builtins.open",
        lambda path, *rest, **named: really(status if path == "/proc/self/status" else path, *rest, **named),
    )
    status.write_text("Name:\tx\nCapEff:\t000001ffffdfffff\n")
    with pytest.raises(PermissionDenied, match="CAP_SYS_ADMIN"):
        mounting.require_capability("Mounting")
    status.write_text("Name:\tx\nCapEff:\t0000000000200000\n")
    mounting.require_capability("Mounting")
    status.write_text("nothing of the kind\n")
    mounting.require_capability("Mounting")


# ---- dumpfiles and disk use ------------------------------------------------------------------------------------------


def test_a_dumpfile_is_written_once(repository: Repository, tmp_path: pathlib.Path) -> None:
    image = put_image(repository, "app", b"small")
    text = dump.dump(repository, image)
    assert (
        text.splitlines()[0].startswith(b"/ 0 40755 2 ")
        and text.splitlines()[1].startswith(b"/app 5 100644 1 ")
        and b" small - " not in text[:20]
    )
    path = tmp_path / "out.dump"
    assert dump.write(text, str(path), check=True) and not path.exists()
    assert dump.write(text, str(path)) and path.read_bytes() == text
    assert not dump.write(text, str(path))
    path.chmod(0o600)
    assert dump.write(text + b"x", str(path)) and path.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["out.dump", "repo"]


def test_a_damaged_image_is_not_dumped(repository: Repository) -> None:
    image = put_image(repository, "app")
    path = pathlib.Path(repository.path, "objects", image[:2], image[2:])
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(FormatError):
        dump.dump(repository, image)


def test_a_dumpfile_replaces_files_only(repository: Repository, tmp_path: pathlib.Path) -> None:
    for path in (tmp_path, tmp_path / "missing/out"):
        with pytest.raises(IOFailed):
            dump.write(b"x", str(path))


def test_a_link_planted_in_the_place_of_a_dumpfile_is_replaced_and_not_followed(tmp_path: pathlib.Path) -> None:
    (tmp_path / "real").write_bytes(b"new")
    (tmp_path / "link").symlink_to("real")
    assert dump.write(b"new", str(tmp_path / "link"))
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_what_two_images_share_is_counted_as_shared(repository: Repository) -> None:
    put_image(repository, "one", b"1")
    put_image(repository, "two", b"2")
    digests = repository.tags()
    use = disk_use(repository, digests.values())
    everything = sum(
        path.stat().st_size for path in pathlib.Path(repository.path, "objects").rglob("*") if path.is_file()
    )
    assert [used.shared for used in use.values()] == [0, 0]
    assert sum(used.own for used in use.values()) == everything
    assert [used.own_objects for used in use.values()] == [5, 5], "manifest, configuration, their streams and the image"
    # A second manifest with the same configuration.
    document = imagestreams.read(repository, imagestreams.MANIFEST, digests["one"])
    assert document is not None
    raw = json.dumps({**json.loads(document.raw), "annotations": {"again": "yes"}}).encode()
    repository.register(
        imagestreams.MANIFEST + digest_of(raw),
        imagestreams.store(repository, imagestreams.MANIFEST, raw, document.refs),
    )
    again = disk_use(repository, [digests["one"], digests["two"]])
    assert again[digests["two"]] == use[digests["two"]]
    assert (again[digests["one"]].own_objects, again[digests["one"]].shared_objects) == (2, 3)
    assert again[digests["one"]].own + again[digests["one"]].shared == use[digests["one"]].own


def test_an_image_that_cannot_be_read_is_left_out(repository: Repository) -> None:
    put_image(repository, "one")
    digest = repository.tags()["one"]
    stream = repository.stream(imagestreams.MANIFEST + digest)
    assert stream is not None
    pathlib.Path(repository.path, "objects", fsverity.object_path(stream)).write_bytes(b"damaged")
    assert disk_use(repository, [digest, "sha256:" + "0" * 64]) == {}
    assert DiskUse(1, 2, 3, 4)._asdict() == {"own": 1, "shared": 2, "own_objects": 3, "shared_objects": 4}
