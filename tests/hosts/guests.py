# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Guests: stock Debian kernels in qemu, with systemd, a disk that has fs-verity, and a plug that can be pulled.

A guest starts from a frozen template (memory and disks of one that has booted) in a few seconds; after a stop or a
power cut it boots its own disk. Besides its root it has three file systems: /srv/ext4 (fs-verity), /srv/btrfs
(fs-verity) and /srv/plain (ext4 without fs-verity).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import tempfile
import time
from typing import Any

import ground
import ports
import roots
from ground import Unavailable

PACKAGES = (
    *(
        "linux-image-cloud-amd64",
        "systemd-sysv",
        "udev",
        "kmod",
        "dbus",
        "openssh-server",
        "python3",
        "procps",
        "util-linux",
        "iproute2",
    ),
    *("e2fsprogs", "btrfs-progs", "fsverity", "zstd", "ca-certificates", "skopeo", "python3-jsonschema"),
)
# What the kernel package has as modules of these goes into the initramfs; the rest is built in.
DRIVERS = ("virtio_pci", "virtio_blk", "virtio_net", "crc32c_generic", "ext4", "btrfs")
# What a guest can do without: an emulated processor takes half a minute to start all of it. The network is set up by a
# unit of our own.
MASKED = (
    *(
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "e2scrub_all.timer",
        "e2scrub_reap.service",
        "fstrim.timer",
        "dpkg-db-backup.timer",
    ),
    *(
        "getty@tty1.service",
        "serial-getty@ttyS0.service",
        "systemd-timesyncd.service",
        "systemd-logind.service",
        "systemd-random-seed.service",
    ),
    *(
        "systemd-udevd.service",
        "systemd-udevd-control.socket",
        "systemd-udevd-kernel.socket",
        "systemd-udev-trigger.service",
    ),
    *(
        "systemd-networkd.service",
        "systemd-networkd.socket",
        "systemd-networkd-wait-online.service",
        "systemd-networkd-persistent-storage.service",
    ),
    *(
        "systemd-binfmt.service",
        "proc-sys-fs-binfmt_misc.automount",
        "systemd-journal-flush.service",
        "systemd-journal-catalog-update.service",
    ),
    *(
        "sys-fs-fuse-connections.mount",
        "sys-kernel-config.mount",
        "sys-kernel-debug.mount",
        "sys-kernel-tracing.mount",
        "dev-hugepages.mount",
    ),
    *(
        "dev-mqueue.mount",
        "kmod-static-nodes.service",
        "systemd-modules-load.service",
        "systemd-pcrphase.service",
        "ldconfig.service",
    ),
    *(
        "modprobe@drm.service",
        "modprobe@configfs.service",
        "modprobe@efi_pstore.service",
        "modprobe@fuse.service",
        "modprobe@loop.service",
    ),
    *(
        "modprobe@dm_mod.service",
        "systemd-tpm2-setup.service",
        "systemd-tpm2-setup-early.service",
        "systemd-hwdb-update.service",
    ),
)
NETWORK = """\
[Unit]
Description=The network of a test guest
DefaultDependencies=no
Before=network.target ssh.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c "ip link set lo up; ip link set eth0 up; ip address add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2"
[Install]
WantedBy=multi-user.target
"""
DISKS = {
    # Name: size, how the file system is made.
    "ext4": ("1500M", ("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "verity", "-m", "0", "-L", "ext4")),
    "btrfs": ("600M", ("mkfs.btrfs", "-q", "-f", "-L", "btrfs")),
    "plain": ("200M", ("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "^verity", "-m", "0", "-L", "plain")),
}
MEMORY = 640
# An emulated processor is a quarter faster without these: programs that find AVX use it, and five levels of page tables
# take longer to walk.
SLOW_WHEN_EMULATED = ("la57", "avx", "avx2", "smap", "smep", "pku")
# Modules that the collection's tasks load anyway: read once before the freeze, they are in every guest's memory.
WARM = (
    "import ast, asyncio, concurrent.futures, ctypes, hashlib, json, multiprocessing, platform, selectors, shutil, ssl,"
    " subprocess, tempfile, zipfile"
)
BOOT_SECONDS = 240


@functools.cache
def accelerator() -> str:
    """``kvm`` where stock kernels run on it, else ``tcg``, which works everywhere and takes its time."""
    # kvm_pvm lets guests be made, but not ones with an unchanged kernel.
    if os.access("/dev/kvm", os.W_OK) and not os.path.isdir("/sys/module/kvm_pvm"):
        return "kvm"
    return "tcg"


@functools.cache
def check() -> None:
    """`Unavailable`, with the reason, where guests cannot be had."""
    if os.geteuid() != 0:
        raise Unavailable("making the disks of guests needs root")
    if os.uname().machine != "x86_64":
        raise Unavailable("guests are made for x86_64 only")
    ground.need(
        "qemu-system-x86_64",
        "qemu-img",
        "mkfs.ext4",
        "mkfs.btrfs",
        "cpio",
        "busybox",
        "lz4",
        "xz",
        "zstd",
        "mmdebstrap",
        why="a guest",
    )


def _packages(suite: str) -> list[str]:
    if suite not in roots.ZSTD:
        raise Unavailable(f"no guest is described for the suite {suite!r}")
    return [*PACKAGES, *roots.ZSTD[suite]]


def _recipe(suite: str) -> str:
    initramfs = (ground.HERE / "inside/guest-initramfs").read_text()
    parts = [
        _packages(suite),
        DRIVERS,
        MASKED,
        NETWORK,
        DISKS,
        MEMORY,
        SLOW_WHEN_EMULATED,
        WARM,
        accelerator(),
        initramfs,
        5,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


# --- what is made once ---


def base(suite: str) -> pathlib.Path:
    """Kernel, initramfs and disks of a guest that never ran; made if they are not there (two or three minutes)."""
    target = ground.state() / "guests" / f"{suite}-{_recipe(suite)}"
    target.parent.mkdir(exist_ok=True)
    with ground.locked(target.parent / f".{suite}"):
        if not target.exists():
            started = time.monotonic()
            for abandoned in target.parent.glob(f".new-{suite}-*"):
                ground.remove(abandoned)
            with ground.making(target) as new:
                new.mkdir()
                _make_base(suite, new)
            ground.say(f"made the base of {suite} guests in {time.monotonic() - started:.0f} s")
            in_use = {file.read_text() for file in ground.running().glob("*/base")}
            for other in target.parent.glob(f"{suite}-*"):
                if other != target and str(other) not in in_use:
                    ground.remove(other)
    return target


def _make_base(suite: str, new: pathlib.Path) -> None:
    root = new / "root"
    roots.bootstrap(suite, _packages(suite), str(root), new / "bootstrap.log")
    _configure(root)
    (version,) = (root / "usr/lib/modules").iterdir()
    _unpack_kernel(root / f"boot/vmlinuz-{version.name}", new / "vmlinux")
    _make_initramfs(version, new / "initramfs")
    for file in (root / "boot").iterdir():
        ground.remove(file)
    _make_disk(
        new / "root.img",
        "4G",
        ("mkfs.ext4", "-q", "-F", "-b", "4096", "-O", "verity", "-m", "0", "-L", "root", "-d", str(root)),
    )
    for name, (size, command) in DISKS.items():
        _make_disk(new / f"{name}.img", size, command)
    ground.remove(root)


def _make_disk(path: pathlib.Path, size: str, command: tuple[str, ...]) -> None:
    ground.run("truncate", "-s", size, path)
    ground.run(*command, path)


def _configure(root: pathlib.Path) -> None:
    """Turn a root tree into one that boots, has a network and lets the key in."""
    ground.allow_login(root)
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost guest\n")
    # The initramfs mounts all disks, for without udev systemd does not see them come.
    (root / "etc/fstab").write_text("")
    for name in DISKS:
        (root / "srv" / name).mkdir()
    system = root / "etc/systemd/system"
    (system / "multi-user.target.wants").mkdir(exist_ok=True)
    (system / "tests-network.service").write_text(NETWORK)
    (system / "multi-user.target.wants/tests-network.service").symlink_to("../tests-network.service")
    for unit in MASKED:
        (system / unit).unlink(missing_ok=True)
        (system / unit).symlink_to("/dev/null")


def _unpack_kernel(image: pathlib.Path, target: pathlib.Path) -> None:
    """The ELF file inside a bzImage, which qemu can start directly: a guest need not unpack it on its slow processor.

    Boot protocol of the kernel (Documentation/arch/x86/boot.rst): setup_sects at 0x1f1, payload_offset and
    payload_length at 0x248.
    """
    data = image.read_bytes()
    if data[0x202:0x206] != b"HdrS":
        raise Unavailable(f"{image.name} is no kernel that is known here")
    offset, length = struct.unpack_from("<II", data, 0x248)
    start = ((data[0x1F1] or 4) + 1) * 512 + offset
    payload = data[start : start + length]
    tools = {b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zX": "xz", b"\x1f\x8b\x08": "gzip", b"\x02\x21\x4c\x18": "lz4"}
    tool = next((tool for magic, tool in tools.items() if payload.startswith(magic)), "")
    if not tool:
        raise Unavailable(f"{image.name} is packed in a way that is not known here")
    # The last four bytes are the unpacked size, which the kernel's build appends (gzip has it anyway). Its decoder ends
    # with the stream.
    body = payload if tool == "gzip" else payload[:-4]
    unpacked = subprocess.run(
        [tool, "-dc"], input=body, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False
    ).stdout
    if unpacked[:4] != b"\x7fELF":
        raise Unavailable(f"{image.name} could not be unpacked")
    target.write_bytes(unpacked)


def _make_initramfs(modules: pathlib.Path, target: pathlib.Path) -> None:
    """busybox, the drivers that are modules with all they depend on, and guest-initramfs as /init."""
    dependencies: dict[str, tuple[str, list[str]]] = {}
    for line in (modules / "modules.dep").read_text().splitlines():
        path, _unused, others = line.partition(":")
        dependencies[pathlib.Path(path).name.split(".")[0].replace("-", "_")] = (path, others.split())
    with tempfile.TemporaryDirectory() as temporary:
        tree = pathlib.Path(temporary)
        (tree / "bin").mkdir()
        (tree / "modules").mkdir()
        shutil.copy(str(shutil.which("busybox")), tree / "bin/busybox")
        # The line that tells the kernel what runs it is added here: as a file of the collection it would stand for a
        # program of every host.
        (tree / "init").write_text("#!/bin/busybox sh\n" + (ground.HERE / "inside/guest-initramfs").read_text())
        (tree / "init").chmod(0o755)
        order: list[str] = []
        for driver in DRIVERS:
            if driver not in dependencies:
                continue
            path, others = dependencies[driver]
            # modules.dep names the nearest dependency first, so the last one has to be loaded first.
            for file in [*reversed(others), path]:
                name = pathlib.Path(file).name
                for ending in (".xz", ".zst"):
                    name = name.removesuffix(ending)
                if name not in order:
                    order.append(name)
                    tool = {".xz": ["xz", "-dc"], ".zst": ["zstd", "-dcq"]}.get(pathlib.Path(file).suffix, ["cat"])
                    data = subprocess.run([*tool, str(modules / file)], stdout=subprocess.PIPE, check=True).stdout
                    (tree / "modules" / name).write_bytes(data)
        (tree / "modules/order").write_text("\n".join(order) + "\n")
        names = "\n".join(str(path.relative_to(tree)) for path in sorted(tree.rglob("*")))
        archive = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"], input=names.encode(), cwd=tree, stdout=subprocess.PIPE, check=True
        )
        target.write_bytes(archive.stdout)


def template(suite: str) -> pathlib.Path:
    """The directory with the frozen memory and disks of a guest that has booted; made if it is not there."""
    made = base(suite)
    target = made / "frozen"
    with ground.locked(made.parent / f".{suite}-frozen"):
        if not target.exists():
            started = time.monotonic()
            name = f"template-{suite}"
            with ground.making(target) as new:
                new.mkdir()
                for disk in ("root", *DISKS):
                    _overlay(made / f"{disk}.img", "raw", new / f"{disk}.qcow2")
                _launch(name, made, new)
                _wait(name, BOOT_SECONDS)
                ssh(
                    name,
                    f"python3 -c '{WARM}'; skopeo --version; modprobe -a loop overlay erofs; systemctl "
                    f"is-system-running --wait; sync",
                )
                with Monitor(name) as monitor:
                    monitor.ask("stop")
                    monitor.ask("migrate", uri=f"exec:zstd -q -1 -o {new}/memory.zst")
                    while (state := monitor.ask("query-migrate")["status"]) not in ("completed", "failed"):
                        time.sleep(0.2)
                    if state == "failed":
                        raise RuntimeError("the memory of the template could not be saved")
                    monitor.ask("quit")
                ground.end_process(ground.running(name))
                ground.remove(ground.running(name))
            # The overlays name what they lie on by absolute paths, which stay.
            ground.say(f"froze a guest of {suite} in {time.monotonic() - started:.0f} s")
    return target


def _overlay(backing: pathlib.Path, kind: str, target: pathlib.Path) -> None:
    ground.run("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing, "-F", kind, target)


# --- one guest ---


class Monitor:
    """The control connection of a running guest (QMP, the QEMU Machine Protocol: one JSON document a line)."""

    def __init__(self, name: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(120)
        # The path of a socket must be short, wherever the checkout lies.
        directory = os.open(ground.running(name), os.O_RDONLY | os.O_DIRECTORY)
        try:
            self.socket.connect(f"/proc/self/fd/{directory}/monitor")
        finally:
            os.close(directory)
        self.file = self.socket.makefile("rw")
        self.file.readline()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        self.file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.file.flush()
        for line in self.file:
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RuntimeError(f"qemu refuses {command}: {answer['error']['desc']}")
        raise RuntimeError(f"qemu went away at {command}")

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_exception: object) -> None:
        with contextlib.suppress(OSError):
            self.file.close()
        self.socket.close()


def _launch(name: str, made: pathlib.Path, disks: pathlib.Path, frozen: pathlib.Path | None = None) -> None:
    """Start qemu on the disks in ``disks``: cold, or from the frozen memory."""
    directory = ground.running(name)
    port_file = directory / "port"
    if not port_file.exists():
        port_file.write_text(str(ports.free_port()))
    kernel = "console=ttyS0 panic=-1 quiet mitigations=off no_timer_check random.trust_cpu=on systemd.show_status=no"
    command = ["qemu-system-x86_64", "-name", name, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    cpu = "host" if accelerator() == "kvm" else ",".join(["max", *(f"{feature}=off" for feature in SLOW_WHEN_EMULATED)])
    command += ["-machine", f"q35,accel={accelerator()}", "-cpu", cpu, "-m", str(MEMORY), "-smp", "1"]
    command += [
        "-rtc",
        "base=utc",
        "-kernel",
        str(made / "vmlinux"),
        "-initrd",
        str(made / "initramfs"),
        "-append",
        kernel,
    ]
    command += ["-serial", "file:console", "-qmp", "unix:monitor,server=on,wait=off", "-device", "virtio-rng-pci"]
    for number, disk in enumerate(("root", *DISKS)):
        # What the guest has flushed is with this machine's kernel, which outlives qemu: killing qemu takes only what
        # the guest had not written yet.
        command += [
            "-drive",
            f"if=none,id=disk{number},format=qcow2,file={disks}/{disk}.qcow2,cache=unsafe,discard=unmap",
        ]
        command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
    command += [
        "-netdev",
        f"user,id=net,hostfwd=tcp:127.0.0.1:{port_file.read_text()}-:22",
        "-device",
        "virtio-net-pci,netdev=net,romfile=",
    ]
    if frozen:
        command += ["-incoming", f"exec:zstd -dcq {frozen}/memory.zst"]
    (directory / "console").unlink(missing_ok=True)
    with open(directory / "log", "ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=directory
        )
    ground.remember_process(directory, process.pid)


def _wait(name: str, seconds: float) -> None:
    directory = ground.running(name)
    port = int((directory / "port").read_text())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        # sshd may greet while systemd still keeps users out.
        login = ground.ssh_command("127.0.0.1", port, "true")
        if (
            ground.answers("127.0.0.1", port, 1)
            and subprocess.run(login, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0
        ):
            return
        if ground.process_of(directory) is None:
            raise RuntimeError(
                f"{name}: qemu ended: {ground.quoted_tail(directory / 'log')} "
                f"{ground.quoted_tail(directory / 'console')}"
            )
        time.sleep(0.1)
    raise RuntimeError(f"{name} did not answer in {seconds:.0f} s: {ground.quoted_tail(directory / 'console')}")


def start(name: str, suite: str = "trixie") -> dict[str, Any]:
    """Start a guest from the template, with fresh disks; how to reach it."""
    check()
    frozen = template(suite)
    directory = ground.running(name)
    for disk in ("root", *DISKS):
        _overlay(frozen / f"{disk}.qcow2", "qcow2", directory / f"{disk}.qcow2")
    (directory / "base").write_text(str(frozen.parent))
    _launch(name, frozen.parent, directory, frozen)
    end = time.monotonic() + 60
    while True:
        with contextlib.suppress(OSError), Monitor(name) as monitor:
            if monitor.ask("query-status")["status"] != "inmigrate":
                monitor.ask("cont")
                break
        if time.monotonic() > end or ground.process_of(directory) is None:
            raise RuntimeError(f"{name} did not come out of the freezer: {ground.quoted_tail(directory / 'log')}")
        time.sleep(0.1)
    _wait(name, 60)
    ssh(name, f"date -s @{time.time():.0f} >/dev/null; hostname {name}")
    return address(name)


def address(name: str) -> dict[str, Any]:
    port = int((ground.running(name) / "port").read_text())
    return {"instance": name, "address": "127.0.0.1", "port": port, "user": "root", "identity_file": str(ground.key())}


def boot(name: str) -> None:
    """Boot a guest that was stopped or cut off, with its own disks."""
    directory = ground.running(name)
    end_process(name)
    _launch(name, pathlib.Path((directory / "base").read_text()), directory)
    _wait(name, BOOT_SECONDS)


def cut_power(name: str) -> None:
    """What the guest had not written to its disks is gone."""
    ground.end_process(ground.running(name))


end_process = cut_power


def shut_down(name: str) -> None:
    """An orderly end."""
    with contextlib.suppress(RuntimeError):
        ssh(name, "systemctl poweroff")
    directory = ground.running(name)
    end = time.monotonic() + 60
    while ground.process_of(directory) is not None and time.monotonic() < end:
        time.sleep(0.1)
    ground.end_process(directory)


def ssh(name: str, command: str) -> str:
    """Run a shell command in the guest; its output, RuntimeError if it fails."""
    port = int((ground.running(name) / "port").read_text())
    return ground.run(*ground.ssh_command("127.0.0.1", port, command))


def remove(name: str) -> None:
    """End a guest and remove its disks."""
    ground.end_process(ground.running(name))
    ground.remove(ground.running(name))


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Make, start and stop guests by hand.")
    parser.add_argument("action", choices=("template", "start", "boot", "cut", "stop", "ssh", "remove"))
    parser.add_argument("name", nargs="?", default="guest")
    parser.add_argument("command", nargs="*")
    parser.add_argument(
        "--suite", default="trixie", help="for template and start: bookworm (Linux 6.1), trixie (6.12) or forky (7.x)"
    )
    options = parser.parse_args()
    actions = {
        "start": lambda name: start(name, options.suite),
        "boot": boot,
        "cut": cut_power,
        "stop": shut_down,
        "remove": remove,
    }
    if options.action == "template":
        print(template(options.suite))
    elif options.action == "ssh":
        print(ssh(options.name, " ".join(options.command)), end="")
    else:
        print(actions[options.action](options.name) or "")
