#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_mount
short_description: Mount images of a composefs repository
version_added: 0.1.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Mounts an image of a composefs repository as a directory tree, takes it away, or puts another image in its place.
  - The mount is an overlay of the EROFS image, which holds the tree and all metadata, and the objects of the
    repository, which hold the content. In a repository that is protected by fs-verity the kernel checks every byte at
    every read.
  - Only images that the repository lists may be mounted. An image is measured first, and the very file that was
    measured is mounted.
  - Neither C(cfsctl) nor C(mount.composefs) is needed. Mounts that they made are recognised, and they recognise those
    of this module.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.repository
attributes:
  check_mode:
    support: full
    details:
      - The image is looked up and measured in check mode, too. What only the kernel can tell, for example that a file
        is in use, is not foreseen.
      - An image that an earlier task of the same run in check mode would have pulled, or a name that it would have
        moved, counts as there. What nobody can know before it is, such as RV(image_id), is V(null).
      - Where the library that reads images is still to be installed, which an earlier task may only foretell, what is
        mounted stays with O(state=mounted), and otherwise a change is foretold with V(null) for what is not known. A
        warning says so.
  diff_mode:
    support: full
  idempotent:
    support: full
    details:
      - Judged by what is mounted there, which is the image, fs-verity, the upper and work directory and the options,
        and by what is remembered of it.
options:
  image:
    description:
      - The image as a name in the repository, as the digest of its manifest (V(sha256:) and 64 hexadecimal digits), or
        as an image id, the fs-verity digest of the EROFS image in hexadecimal digits.
      - Required with O(state=mounted) and O(state=remounted).
    type: str
  path:
    description:
      - Where to mount. The directory is made with the mode V(0755) if it does not exist, and stays when the image is
        unmounted.
    type: path
    required: true
  state:
    description:
      - V(mounted) mounts the image unless exactly that is mounted. Where another image, the same one in another way, or
        another file system is mounted, it fails with RV(error=busy).
      - V(remounted) is like V(mounted), but puts the image in the place of another one. At every moment one of the two
        is mounted. Whoever has files of the old image open may read on.
      - V(unmounted) removes all composefs images that are mounted at O(path), and fails with RV(error=busy) while they
        are in use. Other file systems are left alone.
    type: str
    choices: [mounted, remounted, unmounted]
    default: mounted
  verity:
    description:
      - Whether the kernel shall insist on fs-verity for the content of every file.
      - V(required) fails with RV(error=incompatible_repository) if the repository is not protected by fs-verity.
      - V(preferred) insists on it if the repository is protected, as C(cfsctl) does.
      - V(disabled) never insists. The image itself is measured nevertheless.
      - Without this option it is as with V(preferred).
      - Without fs-verity whoever can write to the objects can change what is mounted, and nobody notices. So a warning
        says so when such a mount is made, and O(persistent=true) fails with RV(error=verity_unsupported) unless this
        option is written in the task.
    type: str
    choices: [required, preferred, disabled]
  bootable:
    description:
      - Mount the variant of the image that was made to boot from. It has no meaning if O(image) is an image id.
    type: bool
    default: false
  dev:
    description:
      - Whether device nodes of the image take effect. With V(true) whoever made the image decides to which devices of
        the host its users get access.
      - Every mount is V(nodev) otherwise. A mount that lacks only this, for example one that C(cfsctl) made, gets it in
        place, whatever O(state) says.
    type: bool
    default: false
    version_added: 0.2.0
  suid:
    description:
      - Whether setuid and setgid bits and the capabilities of files take effect. With V(true) whoever made the image
        decides which programs run as root for local users.
      - Every mount is V(nosuid) otherwise, also with O(bootable). A mount that lacks only this gets it in place.
    type: bool
    default: false
    version_added: 0.2.0
  upperdir:
    description:
      - A directory that takes all changes, so that the mount can be written. It is made if it does not exist. Requires
        O(workdir).
      - Its own owner and permissions are those of the root directory of the mount.
      - Changes made on top of one image need not fit another, so O(state=remounted) refuses to take over the directory
        of the mount that it replaces.
    type: path
  workdir:
    description:
      - An empty directory on the file system of O(upperdir), for the kernel's own use. It is made if it does not exist.
    type: path
  opts:
    description:
      - Mount options. V(nodev), V(noexec), V(nosuid), V(nosymfollow), V(noatime), V(nodiratime), V(strictatime) and
        V(ro) as in C(mount(8)). V(nodev) and V(nosuid) are set without being asked for; see O(dev) and O(suid).
      - V(volatile) makes a writable mount that is faster and does not survive a crash.
      - V(context=), V(fscontext=), V(defcontext=) and V(rootcontext=) each with an SELinux context.
    type: list
    elements: str
    default: []
  persistent:
    description:
      - Whether the mount shall come back when the host boots. A unit of systemd is written and enabled for it, which
        runs a small Python program. It mounts what the journal of O(path) calls current, exactly the image that was
        mounted last, and fails if that is not there any more or damaged.
      - Without this option a unit that exists stays, and brings back the image that this task mounts. V(false) removes
        it, and so does O(state=unmounted).
      - On a host without systemd V(true) is refused before anything is mounted.
    type: bool
  keep_previous:
    description:
      - How many of the images that were mounted here before are kept, so that there is a way back without a transfer.
        They have names in the repository that every collector of garbage respects; see RV(keeps).
    type: int
    default: 1
    version_added: 0.2.0
notes:
  - What is mounted is remembered in a journal, C(/var/lib/composefs-oci/deployments/), one file for each O(path), and
    kept alive by names in the repository, a link below C(images/refs/composefs-oci) and a pin, the name
    C(NAME@sha256:...). So neither pulling another image under the same name nor C(cfsctl gc) takes anything away from
    it. Both go with O(state=unmounted).
  - While M(composefs.oci.composefs_deployment) has an image on trial at O(path), this module fails with
    RV(error=busy).
  - Mounting needs root, more exactly the capability C(CAP_SYS_ADMIN) in the initial user namespace.
  - Linux 6.6 or later is needed for O(verity=required), and 6.5 to put one image in the place of another. Without both,
    older kernels mount images of format V1, which is what M(composefs.oci.composefs_image) makes. Before 6.12 each
    image takes a loop device.
  - A repository on an overlay file system, such as in most containers, cannot be mounted from.
  - Services that use a persistent mount should be ordered after its unit, RV(unit).
seealso:
  - module: composefs.oci.composefs_image
  - module: composefs.oci.composefs_repository
"""

EXAMPLES = r"""
- name: Pull an image
  become: true
  composefs.oci.composefs_image:
    ref: docker://quay.io/fedora/fedora-minimal:latest
    name: app

- name: Mount it, now and at every boot
  become: true
  composefs.oci.composefs_mount:
    image: app
    path: /srv/app
    persistent: true

- name: Put the newest version in the place of the old one without a gap
  become: true
  composefs.oci.composefs_mount:
    image: app
    path: /srv/app
    persistent: true
    state: remounted
  register: mounted

- name: Tell services about it
  ansible.builtin.debug:
    msg: "Was {{ mounted.previous_image_id }}, is {{ mounted.image_id }}"
  when: mounted is changed

- name: Mount a certain image that can be written
  become: true
  composefs.oci.composefs_mount:
    image: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
    path: /srv/build
    verity: required
    upperdir: /var/tmp/build/upper
    workdir: /var/tmp/build/work

- name: Unmount it
  become: true
  composefs.oci.composefs_mount:
    path: /srv/build
    state: unmounted
"""

RETURN = r"""
image_id:
  description:
    - The image that is mounted at the end of the task, or in check mode would be. V(null) if none is.
  returned: success, and on failure as far as it is known
  type: str
  sample: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
previous_image_id:
  description: The image that was mounted at the beginning of the task. V(null) if none was.
  returned: success, and on failure as far as it is known
  type: str
  sample: d420e43bad636447d75750346d609a28b041a776d8232a701f5a238fefc747f4
path:
  description: The absolute path of the mount.
  returned: success, and on failure as far as it is known
  type: str
  sample: /srv/app
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
mounted:
  description: Whether a composefs image is mounted at the end of the task, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: bool
  sample: true
verity:
  description: Whether the kernel insists on fs-verity for the content of every file. V(null) if no image is mounted.
  returned: success, and on failure as far as it is known
  type: bool
  sample: true
unit:
  description: The unit of systemd that brings the mount back at boot. V(null) if there is none.
  returned: success, and on failure as far as it is known
  type: str
  sample: composefs-oci-srv-app.service
name:
  description: The name of the image that is mounted. V(null) if it was mounted by its image id, or none is.
  returned: success, and on failure as far as it is known
  type: str
  sample: app
digest:
  description: The digest of its manifest. V(null) where there is none.
  returned: success, and on failure as far as it is known
  type: str
  sample: sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
keeps:
  description:
    - What keeps the mounted image in the repository, whatever becomes of other names. Empty where the repository cannot
      be written. V(null) in check mode if the image is not there yet.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
  sample:
    - app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
    - images/refs/composefs-oci/srv-app/14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
error:
  description:
    - What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all codes.
    - For example V(busy), V(image_not_found), V(mount_failed), V(permission_denied), V(repository_damaged) or
      V(incompatible_repository).
  returned: on failure
  type: str
  sample: busy
"""

import dataclasses
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import Busy, ImageNotFound, MissingLibrary, doing
from ansible_collections.composefs.oci.plugins.module_utils.formats import digests
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import other_names
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath, commands, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    bootmount,
    deployment,
    keeping,
    lastingmount,
    mounting,
)
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    foretells,
    guarded,
    Foretold,
    mount_point,
    opened_repository,
    operator,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.store import namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Foreseen, Repository

ARGUMENT_SPEC = {
    "image": {"type": "str"},
    "path": {"type": "path", "required": True},
    "repository": {"type": "path"},
    "state": {"type": "str", "choices": ["mounted", "remounted", "unmounted"], "default": "mounted"},
    "verity": {"type": "str", "choices": ["required", "preferred", "disabled"]},
    "bootable": {"type": "bool", "default": False},
    "dev": {"type": "bool", "default": False},
    "suid": {"type": "bool", "default": False},
    "upperdir": {"type": "path"},
    "workdir": {"type": "path"},
    "opts": {"type": "list", "elements": "str", "default": []},
    "persistent": {"type": "bool"},
    "keep_previous": {"type": "int", "default": 1},
}


def tell(base: dict[str, Any], there: mountinfo.Mounted | mounting.Target | None) -> None:
    """Note in ``base`` what is mounted, so that also a failure tells it."""
    image_id = there.image_id if there else None
    base.update(image_id=image_id, mounted=image_id is not None, verity=there.verity if there and image_id else None)


def side(
    image_id: str | None, verity: bool | None, read_only: bool | None, upperdir: str | None, unit: str | None
) -> dict[str, Any]:
    """One side of the difference that ``--diff`` shows."""
    mounted = (
        {"image_id": image_id, "verity": verity, "read_only": read_only, "upperdir": upperdir} if image_id else None
    )
    return {"mounted": mounted, "unit": unit.splitlines() if unit else None}


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Do what the task says; ``base`` gets what a failure should still tell."""
    params = module.params
    check = module.check_mode
    path = base["path"] = mount_point(params["path"])
    base["repository"] = repository_path(module)
    for option in ("upperdir", "workdir"):
        if params[option] is not None:
            mount_point(params[option], option)
    with doing(f"Looking for the mount point {path}"):
        # Resolved once, here; whoever could put a link in its place must be root or the user that runs this.
        beneath.check_way(path)
    real = os.path.realpath(path)
    there = mountinfo.at(real)
    tell(base, there)
    base["previous_image_id"] = base["image_id"]
    places = bootmount.HOST
    old_unit = bootmount.current(real, places)
    base["unit"] = bootmount.unit_name(real) if old_unit is not None else None
    before = side(
        base["image_id"], base["verity"], there and there.read_only, there and there.directory("upperdir"), old_unit
    )

    host = deployment.Host(places, commands.run, module.warn)
    by_then = next((one for one in told(module).mounts if one["path"] == real), None)
    if by_then is not None:
        base["previous_image_id"] = None if by_then["absent"] else by_then["image_id"]
    if params["state"] == "unmounted":
        if by_then is not None:
            base.update(changed=not by_then["absent"], image_id=None, mounted=False, verity=None, unit=None)
            return {}
        result = lastingmount.have_unmounted(real, host, check)
    else:
        request = requested(params, real)
        by_others = told(module, base["repository"])
        known = by_others.names
        with opened_repository(module, base["repository"], foreseen=True) as repository:
            # "docker://x" and "x" are one default name; the journal has the one that is there.
            image = namerecords.spelled(repository, request.wish.image)
            image = next((form for form in (image, *other_names(image)) if form in known), image)
            request = dataclasses.replace(request, wish=dataclasses.replace(request.wish, image=image))
            settled = foresee(repository, request, known, repository.path == base["repository"])
            occupied = there is not None if by_then is None else not by_then["absent"]
            if settled is None and occupied and may_stay(repository, request, known):
                settled, known = request, {name: one for name, one in known.items() if name != image}
                module.warn(
                    f"Check mode cannot tell whether {image} would be another image than now. If so, the state "
                    f"'mounted' fails at {path}; 'remounted' puts another image in the place of one."
                )
            if settled is None or by_then is not None:
                if by_then is not None and is_mounted_then(repository, request, known, by_then):
                    # Only its name may be another one.
                    name = keeping.split_pin(request.wish.image)[0]
                    name = by_then["name"] if digests.is_digest(request.wish.image) else name
                    base.update(changed=name != by_then["name"], name=name, digest=by_then["digest"])
                    base.update(image_id=by_then["image_id"], mounted=True, verity=None, keeps=None, unit=None)
                    return {}
                if by_then is None:
                    lastingmount.untried(real, host, check)
                made = by_others.repository
                secure = repository.secure if repository.path == base["repository"] else None
                if secure is None and made is not None and made["created"]:
                    secure = bool(made["secure"])
                return not_there_yet(module, base, request, known, there, before, by_then, secure)
            try:
                result = lastingmount.have_mounted(repository, settled, host, check)
            except MissingLibrary as error:
                if not foretells(module):
                    raise
                module.warn(f"{error} So check mode cannot tell whether {image} is another image than what is there.")
                if there is not None and there.image_id is not None and not request.wish.replace:
                    # It stays, or the task fails.
                    base["keeps"] = None
                    return {}
                return not_there_yet(module, base, request, known, there, before, secure=repository.secure)
    target = result.target
    tell(base, target)
    remounted = base["image_id"] != base["previous_image_id"]
    found = result.found
    base.update(
        changed=result.changed,
        unit=result.unit,
        keeps=list(result.keeps),
        name=found.name if found else None,
        digest=found.current.digest if found and found.current else None,
    )
    new_unit = None
    if result.unit is not None and target is not None:
        new_unit = bootmount.unit_text(target, os.path.realpath(base["repository"]), places)
    if target and not target.verity and (remounted or result.previous is None):
        module.warn(
            f"What is mounted at {path} is not protected by fs-verity: whoever can write to the objects of the "
            f"repository {base['repository']} can change it unnoticed."
        )
    if remounted and not check:
        module.log(f"At {path} the image {base['image_id']} is mounted now (was {base['previous_image_id']})")
    after = side(base["image_id"], base["verity"], target and target.read_only, target and target.upperdir, new_unit)
    return {"diff": {"before": before, "after": after}} if module._diff else {}


def requested(params: dict[str, Any], real: str) -> lastingmount.MountRequest:
    """What the task asks for, to be mounted at ``real``."""
    wish = mounting.Wish(
        image=params["image"],
        path=real,
        verity=params["verity"] or mounting.PREFERRED,
        upperdir=params["upperdir"],
        workdir=params["workdir"],
        options=params["opts"],
        bootable=params["bootable"],
        replace=params["state"] == "remounted",
        dev=params["dev"],
        suid=params["suid"],
    )
    return lastingmount.MountRequest(
        wish, params["persistent"], params["keep_previous"], params["verity"] is not None, operator()
    )


def foresee(
    repository: Repository, request: lastingmount.MountRequest, known: dict[str, Foretold], exists: bool
) -> lastingmount.MountRequest | None:
    """The request as it will be when earlier tasks of a run in check mode have done what they foretold; None if the
    image, or the whole repository, will only be there then.
    """
    image = request.wish.image
    if not exists:
        return None  # opened_repository() has warned already
    if image not in known:
        missing = digests.is_digest(image) and repository.foreseen.brings(image)
        missing = missing and repository.stream(f"oci-manifest-{image}") is None
        return None if missing else request
    change = known[image]
    if change.absent:
        raise ImageNotFound(
            f"An earlier task would remove the name {image!r} from the repository {repository.path}.",
            "Mount the image before, or by another name.",
        )
    if change.digest is None or repository.stream(f"oci-manifest-{change.digest}") is None:
        return None
    return dataclasses.replace(request, wish=dataclasses.replace(request.wish, image=change.digest))


def may_stay(repository: Repository, request: lastingmount.MountRequest, known: dict[str, Foretold]) -> bool:
    """Whether the name is there and nobody can know if an earlier task would move it. A task that puts nothing in the
    place of another image either fails then or finds what it finds now, so ``repository`` is left as it is now.
    """
    change = known.get(request.wish.image)
    if change is None or change.absent or change.digest is not None or request.wish.replace:
        return False
    foreseen, repository.foreseen = repository.foreseen, Foreseen()
    if repository.tag_digest(request.wish.image) is not None:
        return True
    repository.foreseen = foreseen
    return False


def is_mounted_then(
    repository: Repository, request: lastingmount.MountRequest, known: dict[str, Foretold], by_then: dict[str, Any]
) -> bool:
    """Whether an earlier task of a run in check mode would mount just this image there."""
    if by_then["absent"] or by_then["digest"] is None:
        return False
    image = request.wish.image
    if digests.is_digest(image):
        return bool(image == by_then["digest"])
    wanted = known[image].digest if image in known else repository.tag_digest(image)
    return wanted == by_then["digest"]


def not_there_yet(
    module: AnsibleModule,
    base: dict[str, Any],
    request: lastingmount.MountRequest,
    known: dict[str, Foretold],
    there: mountinfo.Mounted | None,
    before: dict[str, Any],
    by_then: dict[str, Any] | None = None,
    secure: bool | None = None,
) -> dict[str, Any]:
    """What the run will do once the image is there, and what earlier tasks would mount at the path (``by_then``). What
    nobody can know yet is null. ``secure``: whether the repository will be protected by fs-verity, if that is known.
    """
    image = request.wish.image
    change = known.get(image)
    mounting.check(request.wish)
    if by_then is not None:
        there = None
        if not by_then["absent"] and not request.wish.replace:
            raise Busy(
                f"An earlier task would mount something else at {base['path']}, "
                f"{by_then['name'] or by_then['digest']}.",
                "The state 'remounted' puts the image asked for in its place without a gap; 'unmounted' removes it.",
            )
    if there is not None and (there.image_id is None or not request.wish.replace):
        what = f"{there.kind} from {there.source}"
        if there.image_id is not None:
            what = mounting.called(there.image_id, there.path)
        raise Busy(
            f"At {base['path']} something else is mounted: {what}.",
            "The state 'remounted' puts the image asked for in its place without a gap; 'unmounted' removes it.",
        )
    places = bootmount.HOST
    real = os.path.realpath(base["path"])
    writable = [os.path.realpath(path) if path else None for path in (request.wish.upperdir, request.wish.workdir)]
    mounting.require_place(base["repository"], real, writable[0], writable[1], there)
    persistent = base["unit"] is not None if request.persistent is None else request.persistent
    if request.persistent:
        if not request.verity_given and secure is not None:
            lastingmount.require_verity(base["repository"], secure, real)
        bootmount.require_systemd(places)
    base.update(
        changed=True,
        image_id=None,
        mounted=True,
        verity=None,
        keeps=None,
        name=keeping.split_pin(image)[0] if not digests.is_digest(image) else None,
        digest=image if digests.is_digest(image) else change.digest if change is not None else None,
        unit=bootmount.unit_name(real) if persistent else None,
    )
    after = {"mounted": {"image_id": None, "digest": base["digest"]}, "unit": base["unit"]}
    return {"diff": {"before": before, "after": after}} if module._diff else {}


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec=ARGUMENT_SPEC,
        required_if=[("state", "mounted", ["image"]), ("state", "remounted", ["image"])],
        required_together=[("upperdir", "workdir")],
        supports_check_mode=True,
    )
    keys = ("image_id", "previous_image_id", "path", "repository", "verity", "unit", "name", "digest")
    base: dict[str, Any] = {"changed": False, "mounted": False, "keeps": [], **dict.fromkeys(keys)}
    run_module(module, lambda module: run(module, base), base)


if __name__ == "__main__":
    main()
