# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What becomes of a repository, with the engine alone: life_in_guest.py VERB PATH [required|disabled NAME=REFERENCE...].

``fill`` makes the repository, and pulls. ``prune`` removes the name ``app`` and what only it needs. ``spoil`` loses and
alters objects that ``app`` needs. ``rot`` changes a byte of one on the disk below the file system, and prints which.
``repair`` mends them. ``check`` prints what it finds, a line each. ``prune`` and
``repair`` print "begun" before they change anything, which is when their first lock is held.
"""

from __future__ import annotations

import fcntl
import os
import random
import struct
import sys

from plugins.module_utils.formats import fsverity
from plugins.module_utils.operations import check, prune, repair
from plugins.module_utils.progress import Progress
from plugins.module_utils.pull import pull
from plugins.module_utils.source.skopeo import ProxyOptions
from plugins.module_utils.store import create, graph
from plugins.module_utils.store.repository import Repository

APP = "app"
_FIBMAP = 1


def options() -> pull.Options:
    return pull.Options(proxy=ProxyOptions(executable=("skopeo",), tls_verify=False, unenforced_policy="ignore"))


def fill(path: str, verity: str, *images: str) -> None:
    create.prepare(path, fsverity.SHA256, verity)
    requests = [pull.Request(reference, name) for name, _unused, reference in (one.partition("=") for one in images)]
    with Repository.open(path, write=True) as repository:
        pull.pull_images(repository, requests, options(), Progress())


def spoil(path: str) -> None:
    """Every seventh object of the image: lost, or with another byte (and, of course, without a seal)."""
    with Repository.open(path) as repository:
        found = graph.Graph.read(repository)
        (root,) = [one for one in found.roots if one.kind == graph.TAG and one.name == APP]
        objects = sorted(found.reaches(root))
    for number, digest in enumerate(random.Random(1).sample(objects, -(-len(objects) // 7))):
        name = f"{path}/objects/{fsverity.object_path(digest)}"
        with open(name, "rb") as file:
            content = bytearray(file.read())
        os.unlink(name)
        if number % 2 and content:
            content[-1] ^= 1
            with open(name, "wb") as file:
                file.write(content)


def rot(path: str) -> None:
    """Whoever reads the object then gets another byte, or, where fs-verity protects it, none."""
    with Repository.open(path) as repository:
        found = graph.Graph.read(repository)
        (root,) = [one for one in found.roots if one.kind == graph.TAG and one.name == APP]
        content = found.reaches(root) - set(found.nodes(root))
        objects = [f"objects/{fsverity.object_path(digest)}" for digest in content]
    victim = max(objects, key=lambda name: (os.stat(f"{path}/{name}").st_size, name))
    os.sync()
    with open(f"{path}/{victim}", "rb") as file:
        block = struct.unpack("i", fcntl.ioctl(file, _FIBMAP, struct.pack("i", 1)))[0]
        size = os.fstatvfs(file.fileno()).f_bsize
        number = os.fstat(file.fileno()).st_dev
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        disks = {line.split()[2]: line.rpartition(" - ")[2].split()[1] for line in file}
    fd = os.open(disks[f"{os.major(number)}:{os.minor(number)}"], os.O_RDWR)
    place = block * size + 17
    byte = os.pread(fd, 1, place)
    os.pwrite(fd, bytes([byte[0] ^ 1]), place)
    os.fsync(fd)
    os.close(fd)
    # The pages that hold what was read before. Those of the object itself the check has to pass over by itself where
    # fs-verity is; elsewhere nobody can tell what is in memory from what is on the disk.
    with open("/proc/sys/vm/drop_caches", "w", encoding="ascii") as file:
        file.write("1\n")
    print(victim)


def main() -> None:
    verb, path, *words = sys.argv[1:]
    if verb == "fill":
        fill(path, *words)
    elif verb == "rot":
        rot(path)
    elif verb == "spoil":
        spoil(path)
    else:
        with Repository.open(path, write=verb != "check") as repository:
            if verb == "check":
                report = check.check(repository, check.Wish(check.FULL), Progress())
                for one in report.findings:
                    print(one.code, one.path, one.message)
                print("checked", report.checked["objects"], "objects", len(report.findings), "findings")
                return
            print("begun", flush=True)
            if verb == "prune":
                prune.prune(repository, prune.Wish(remove=[APP], timeout=60), Progress())
            else:
                repair.repair(repository, check.Wish(check.OBJECTS), repair.Means(options=options()), Progress())
    print("done")


if __name__ == "__main__":
    main()
