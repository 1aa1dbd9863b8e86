#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_repository_info
short_description: Tell what a composefs repository holds, who uses it and how it fared
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Counts what is in a composefs repository, and tells how many bytes each name of an image takes for itself and
    together with others, how many bytes nothing needs any more, who uses the repository now, which imports did not
    end, and what the last check said.
  - Reads no content, so it is quick. M(composefs.oci.composefs_check) finds out whether everything is as it should be.
  - In check mode the names are those that earlier tasks of the run foretold, and what nobody can know before they come
    is V(null), including all figures of a repository that is still to be made. Where the library that reads images is
    still to be installed, which an earlier task may only foretell, everything but RV(repository) is V(null), with a
    warning.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.info
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.repository
  - composefs.oci.repository.unsafe
seealso:
  - module: composefs.oci.composefs_image_info
  - module: composefs.oci.composefs_check
  - module: composefs.oci.composefs_prune
"""

EXAMPLES = r"""
- name: Look at the repository
  composefs.oci.composefs_repository_info:
  register: found

- name: Show what would be freed
  ansible.builtin.debug:
    msg: "{{ found.bytes_unused | human_readable }} of {{ found.bytes | human_readable }} are needed by nothing"

- name: Insist on a check within the last week
  ansible.builtin.assert:
    that:
      - found.last_check is not none
      - found.last_check.findings == {}
      - found.last_check.time > now(utc=true).timestamp() - 7 * 86400
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
algorithm:
  description: The hash that names objects, V(sha256) or V(sha512).
  returned: success
  type: str
verity:
  description: Whether every object is protected by fs-verity.
  returned: success
  type: bool
filesystem:
  description: The type of the file system.
  returned: success
  type: str
  sample: ext4
free_bytes:
  description: The bytes that are free on the file system.
  returned: success
  type: int
free_inodes:
  description: The inodes that are free; V(null) where the file system does not count them.
  returned: success
  type: int
format:
  description: What C(meta.json) says, the version of the format, the formats of EROFS images that are made,
    and lists of features.
  returned: success
  type: dict
  sample: {version: 1, erofs_formats: [1], compatible: [], read_only_compatible: [v1_erofs], incompatible: []}
counts:
  description: How many there are of each.
  returned: success
  type: dict
  sample: {names: 3, manifests: 3, configs: 3, layers: 7, streams: 13, images: 3, objects: 42005}
bytes:
  description: The bytes of all objects.
  returned: success
  type: int
bytes_unused:
  description: The bytes of the objects that no name or other reference within the repository leads to. A mount of this
    host may still need them; M(composefs.oci.composefs_prune) in check mode knows.
  returned: success
  type: int
bytes_damaged:
  description: The bytes of damaged objects that a repair set aside.
  returned: success
  type: int
sharing:
  description: How many times as much the images would take if they shared nothing.
  returned: success
  type: float
  sample: 1.8
names:
  description: The names of images.
  returned: success
  type: list
  elements: dict
  contains:
    name:
      description: The name.
      type: str
    digest:
      description: The digest of the manifest that it leads to.
      type: str
    ref:
      description: The reference that it came from; V(null) if that is not known.
      type: str
    since:
      description: When the name was set.
      type: str
    own:
      description: The bytes that removing this name alone would free.
      type: int
    shared:
      description: The bytes that others keep as well.
      type: int
lock_holders:
  description: The processes that use the repository now, besides this task.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: The id of the process.
      type: int
    command:
      description: The command, as far as it can be seen.
      type: str
    exclusive:
      description: Whether it uses the repository alone.
      type: bool
unfinished_imports:
  description: The imports into a repository without fs-verity that have begun and not ended.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: The id of the process.
      type: int
    started:
      description: When it began.
      type: str
    alive:
      description: Whether that process is still there. If it is not, the next pull cleans up what it left.
      type: bool
last_check:
  description: What the last M(composefs.oci.composefs_check) of the whole repository found; V(null) if there was none.
  returned: success
  type: dict
  contains:
    level:
      description: How thorough it was.
      type: str
    time:
      description: When it began, in seconds since the epoch.
      type: float
    findings:
      description: How many findings there were of each code.
      type: dict
    checked:
      description: How much was looked at.
      type: dict
last_maintenance:
  description: What came of the last time that the host looked after the repository by itself, see
    M(composefs.oci.composefs_maintenance); V(null) if it never did.
  returned: success
  type: dict
  contains:
    time:
      description: When it began, in seconds since the epoch.
      type: float
    seconds:
      description: How long it took.
      type: float
    level:
      description: How thorough the check was.
      type: str
    findings:
      description: How many findings there were of each code.
      type: dict
    names:
      description: The names that were removed.
      type: list
      elements: str
    objects:
      description: How many objects were removed.
      type: int
    bytes:
      description: Their bytes.
      type: int
    error:
      description: What went wrong, C(code) and C(message); V(null) if nothing did.
      type: dict
error:
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes.
  returned: on failure
  type: str
  sample: not_a_repository
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.host import files, filesystem
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    guarded,
    opened_repository,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations import overview

# What it tells of a repository.
UNREAD: dict[str, Any] = dict.fromkeys(
    (
        "algorithm",
        "verity",
        "filesystem",
        "free_bytes",
        "free_inodes",
        "format",
        "counts",
        "bytes",
        "bytes_unused",
        "bytes_damaged",
        "sharing",
        "names",
        "lock_holders",
        "unfinished_imports",
        "last_check",
        "last_maintenance",
    )
)


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Look at the repository; ``base`` gets what a failure should still tell."""
    path = base["repository"] = repository_path(module)
    with opened_repository(module, path) as repository:
        found = overview.describe(repository)
        known = told(module, path)
        if not repository.place and not known.names:
            return found
        names = {name: None if one.absent else one.digest or "" for name, one in known.names.items()}
        found = overview.foresee(found, names, bool(repository.place))
        if repository.place:
            will_be = known.repository or {}
            with files.opened_directory(repository.place) as fd:
                found["filesystem"] = filesystem.type_of(fd)
            found.update(algorithm=will_be.get("algorithm"), verity=will_be.get("secure"))
        return found


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec={
            "repository": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
        },
        supports_check_mode=True,
    )
    base: dict[str, Any] = {"changed": False, "repository": None}
    run_module(module, lambda module: run(module, base), base, unread=UNREAD)


if __name__ == "__main__":
    main()
