#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_repository
short_description: Make a composefs repository, or bring an old one up to date
version_added: 0.1.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Makes sure that a directory is a composefs repository with a given digest algorithm and protection, as C(cfsctl
    init) does.
  - What the file system cannot do is said before anything is made. A repository that exists is never converted or
    emptied; one that is not what the task asks for is an error.
  - A repository without C(meta.json), made by programs older than composefs-rs 0.7, gets one.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
attributes:
  check_mode:
    support: full
    details:
      - Abilities of the file system are tried out in check mode too, on a file without a name that vanishes.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  path:
    description:
      - The directory of the repository. It is made if it does not exist, with its parents. One that exists must be
        empty or a repository. Written from V(/) on; an empty text is refused, not taken for the default.
      - The default is where C(cfsctl) has its own, V(/sysroot/composefs) for root and V(~/.var/lib/composefs) for any
        other user.
    type: path
  repository:
    description:
      - The same as O(path), which takes precedence, under the name that the other modules of the collection have for
        it. So one default in C(module_defaults) serves the whole action group.
    type: path
  state:
    description:
      - What the directory shall be. There is no state that removes a repository; that takes M(ansible.builtin.file) and
        a decision.
    type: str
    choices: [present]
    default: present
  algorithm:
    description:
      - The hash of the fs-verity digests by which the repository names its objects. It cannot be changed later.
      - V(sha512) is what C(cfsctl init) takes. V(sha256) costs less processor time where the processor has instructions
        for it.
      - A repository that exists with the other algorithm fails the task with RV(error=incompatible_repository).
    type: str
    choices: [sha512, sha256]
    default: sha512
  verity:
    description:
      - Whether the kernel shall protect every object against changes by fs-verity. A repository is made with this
        property and keeps it.
      - V(required) fails with RV(error=verity_unsupported) where the file system or the kernel does not have fs-verity,
        and with RV(error=incompatible_repository) where the repository exists without it.
      - V(preferred) takes fs-verity where it works, does without where it does not, and accepts a repository that
        exists as it is.
      - V(disabled) makes a repository that does not require fs-verity, and fails with RV(error=incompatible_repository)
        on one that does. Objects are protected nevertheless where the file system can do it, as with C(cfsctl).
    type: str
    choices: [required, preferred, disabled]
    default: required
  owner:
    description:
      - The user that shall own the directory. Without it a new directory belongs to the user that runs the task, and an
        existing one is left alone.
      - Files inside are not touched; whoever works in the repository should be the owner. Tasks of other users, root
        among them, refuse it then, as RV(unsafe) tells.
    type: str
  group:
    description:
      - The group that shall own the directory.
    type: str
  mode:
    description:
      - The permissions of the directory, as with M(ansible.builtin.file). Without it a directory that becomes a
        repository can be entered by its owner only (V(0700)), and one that is a repository already is left alone.
      - Files and directories inside get V(0644) and V(0755) whatever the umask is, so this decides who can read them.
        One that others can write to is not safe, as RV(unsafe) tells.
      - Objects hold the files of images with all their secrets, readable by anyone who gets into the directory.
    type: raw
notes:
  - A repository should not lie on an overlay file system, because images cannot be mounted from there.
  - For ext4, fs-verity must be switched on once with C(tune2fs -O verity). The role P(composefs.oci.repository#role)
    wraps this module.
seealso:
  - module: composefs.oci.composefs_image
  - name: Linux kernel, fs-verity
    description: What file systems need for fs-verity.
    link: https://docs.kernel.org/filesystems/fsverity.html
"""

EXAMPLES = r"""
- name: Make the system's repository
  become: true
  composefs.oci.composefs_repository:

- name: Make a repository with SHA-256, protected where the file system can do it
  become: true
  composefs.oci.composefs_repository:
    path: /var/lib/images
    algorithm: sha256
    verity: preferred
    owner: root
    group: root
    mode: "0700"
  register: repository

- name: Say so where it is not protected
  ansible.builtin.debug:
    msg: "{{ repository.path }} on {{ repository.filesystem }} is not protected by fs-verity."
  when: repository.verity != 'required'

- name: Make a repository of my own
  composefs.oci.composefs_repository:
    path: ~/.var/lib/composefs
    verity: preferred

- name: Make a repository and pull into it
  module_defaults:
    group/composefs.oci.composefs:
      repository: /var/lib/images
  block:
    - name: Make it
      composefs.oci.composefs_repository:
    - name: Pull
      composefs.oci.composefs_image:
        ref: quay.io/fedora/fedora-minimal:latest
"""

RETURN = r"""
path:
  description: The absolute path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
created:
  description: Whether the repository was made by this task, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: bool
  sample: true
upgraded:
  description: Whether a repository without C(meta.json) was given one by this task, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: bool
  sample: false
unsafe:
  description:
    - Whether somebody else than root and the user that runs the task owns the repository or can write to it. Then other
      modules refuse it in tasks of this user, unless they are told to accept it, and it cannot be mounted from.
    - This module warns and goes on, so that O(owner) and O(mode) can give it away or mend it.
  returned: success, and on failure as far as it is known
  type: bool
  sample: false
  version_added: 0.2.0
algorithm:
  description: The hash of the repository's fs-verity digests, V(sha256) or V(sha512).
  returned: success, and on failure as far as it is known
  type: str
  sample: sha512
verity:
  description: V(required) if every object must be protected by fs-verity, V(optional) if not.
  returned: success, and on failure as far as it is known
  type: str
  sample: required
verity_supported:
  description: Whether fs-verity works on the repository's file system; V(null) if that could not be tried out.
  returned: success, and on failure as far as it is known
  type: bool
  sample: true
formats:
  description: The format versions of the EROFS images made in the repository, the default one first.
  returned: success, and on failure as far as it is known
  type: list
  elements: int
  sample: [1]
filesystem:
  description: The type of the file system.
  returned: success, and on failure as far as it is known
  type: str
  sample: ext4
free_bytes:
  description: Bytes that are free for ordinary users.
  returned: success, and on failure as far as it is known
  type: int
  sample: 52428800000
free_inodes:
  description: Inodes that are free for ordinary users; V(null) where the file system does not count them.
  returned: success, and on failure as far as it is known
  type: int
  sample: 3276800
error:
  description:
    - What went wrong, as a stable code for conditions in playbooks.
    - For example V(verity_unsupported), V(incompatible_repository), V(not_a_repository), V(repository_damaged),
      V(read_only), V(permission_denied) or V(no_space).
  returned: on failure
  type: str
  sample: verity_unsupported
"""

import grp
import pwd
from collections.abc import Callable
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.host import filesystem
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.errors import EngineError, IOFailed, doing
from ansible_collections.composefs.oci.plugins.module_utils.module import guarded, repository_path, run_module, told

ARGUMENT_SPEC = {
    "path": {"type": "path"},
    "repository": {"type": "path"},
    "state": {"type": "str", "choices": ["present"], "default": "present"},
    "algorithm": {"type": "str", "choices": ["sha512", "sha256"], "default": "sha512"},
    "verity": {"type": "str", "choices": ["required", "preferred", "disabled"], "default": "required"},
    "owner": {"type": "str"},
    "group": {"type": "str"},
    "mode": {"type": "raw"},
}
FACTS = (
    "created",
    "upgraded",
    "unsafe",
    "algorithm",
    "verity",
    "verity_supported",
    "formats",
    "filesystem",
    "free_bytes",
    "free_inodes",
)


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Prepare the repository and describe it; ``base`` gets what a failure should still tell."""
    params = module.params
    path = base["path"] = repository_path(module, "path" if params["path"] is not None else "repository")
    require_account(params["owner"], pwd.getpwnam, "user")
    require_account(params["group"], grp.getgrnam, "group")
    with create.Place(path) as place:
        return prepare(module, place, base)


def prepare(module: AnsibleModule, place: create.Place, base: dict[str, Any]) -> dict[str, Any]:
    """The same for the directory that was opened once: all steps act on it, wherever its name leads by then."""
    params, path = module.params, place.path
    algorithm = fsverity.ALGORITHMS[params["algorithm"]]
    before = {"path": path, "state": place.state}
    done = create.prepare_place(
        place, algorithm, params["verity"], check=module.check_mode, private=params["mode"] is None
    )
    will_be = told(module, path).repository or {}
    if will_be:
        # An earlier task of this run in check mode would have done that.
        done = done._replace(
            created=done.created and not will_be["created"], upgraded=done.upgraded and not will_be["upgraded"]
        )
    verity = "required" if done.secure else "optional"
    description = {
        "algorithm": done.metadata.algorithm.name,
        "verity": verity,
        "formats": list(done.metadata.erofs_formats),
    }
    after = {"path": path, "state": "present"}
    changed = base["changed"] = done.created or done.upgraded
    if changed:
        after.update(description)
    settled = will_be.get("attributes") or {}
    changed = base["changed"] = set_attributes(module, place, changed, before, after, settled)
    unsafe = place.unsafe(*wanted(module, after)) if module.check_mode else place.unsafe()
    if will_be and not changed and not will_be["unsafe"]:
        unsafe = ""
    if unsafe:
        module.warn(
            f"The repository is not safe for tasks of this user: {unsafe} Tasks of its owner can use it, others with "
            f"'unsafe_repository: accept'; it cannot be mounted from."
        )
    result = {
        "changed": changed,
        "created": done.created,
        "upgraded": done.upgraded,
        "unsafe": bool(unsafe),
        **description,
        **describe_place(place, algorithm),
    }
    if result["filesystem"] == "overlay":
        module.warn(
            f"The repository {path} lies on an overlay file system: images can be stored there, but not mounted."
        )
    return {**result, "diff": {"before": before, "after": after}} if module._diff else result


def wanted(module: AnsibleModule, after: dict[str, Any]) -> tuple[int | None, int | None]:
    """The owner and the mode that the directory would get, None for what stays; as Ansible's functions have understood
    them, which tell what they would change.
    """
    owner, mode = module.params["owner"], after.get("mode")
    uid = None if not owner else int(owner) if owner.isdigit() else pwd.getpwnam(owner).pw_uid
    try:
        return uid, None if mode is None else mode if isinstance(mode, int) else int(mode, 8)
    except ValueError:
        return uid, None  # a symbolic mode of a directory that is not there yet


def require_account(name: str | None, look_up: Callable[[str], Any], kind: str) -> None:
    """Fail before anything is made if the host does not know the user or group; numbers need no name."""
    if name and not name.isdigit():
        try:
            look_up(name)
        except KeyError:
            raise IOFailed(f"This host has no {kind} {name}.", "Make it first, or correct the name.") from None


def set_attributes(
    module: AnsibleModule,
    place: create.Place,
    changed: bool,
    before: dict[str, Any],
    after: dict[str, Any],
    settled: dict[str, str],
) -> bool:
    """Owner, group and mode by Ansible's own means, which know symbolic modes and check mode; whether
    anything changed. ``settled``: those that an earlier task of a run in check mode would have set.
    """
    params = {
        name: None if name in settled and settled[name] == str(module.params[name]) else module.params[name]
        for name in ("owner", "group", "mode")
    }
    if place.root is None:
        after.update({name: value for name, value in params.items() if value is not None})
        return changed
    diff: dict[str, Any] = {"before": before, "after": after}
    # Ansible's functions take paths and do not follow links. This one leads through the fd to the directory.
    path = f"/proc/self/fd/{place.root.fd}/."
    changed = module.set_owner_if_different(path, params["owner"], changed, diff)
    changed = module.set_group_if_different(path, params["group"], changed, diff)
    return module.set_mode_if_different(path, params["mode"], changed, diff)


def describe_place(place: create.Place, algorithm: fsverity.Algorithm) -> dict[str, Any]:
    """What the file system of the repository, or of the directory it would be made in, is and has."""
    with doing(f"Looking at the file system of {place.path}"), place.opened() as fd:
        free_bytes, free_inodes = filesystem.free_space(fd)
        try:
            supported = filesystem.missing_ability(fd, algorithm) is None
        except EngineError:
            supported = None
        return {
            "filesystem": filesystem.type_of(fd),
            "verity_supported": supported,
            "free_bytes": free_bytes,
            "free_inodes": free_inodes,
        }


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    base: dict[str, Any] = {"changed": False, "path": None, **dict.fromkeys(FACTS)}
    run_module(module, lambda module: run(module, base), base)


if __name__ == "__main__":
    main()
