#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_prune
short_description: Free the space of images that nothing in a composefs repository keeps any more
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Removes from a composefs repository what nothing keeps, and before that, if O(remove) says so, names of images.
  - An image is kept by every name that leads to it, by a mount of it in any mount namespace that can be seen, by a
    mount that comes back at boot, and by the journal of a mount, which remembers the image that is mounted, those
    before it and the one that is being tried. Artifacts that refer to an image have names of their own and are kept.
  - Removes the same objects as C(cfsctl gc), with which it can be used in turns, and also what crashed programs and
    repairs left behind.
  - Nothing is removed as long as something that may be needed cannot be read. References that lead nowhere and files
    that do not belong into a repository are reported in RV(problems) and left alone.
  - While it works out what is kept, others may use the repository. For the removal itself it has to be alone, and waits
    for that as long as O(timeout) says.
  - May be interrupted at any time. The repository is consistent then, and the next run removes the rest.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.repository
  - composefs.oci.repository.unsafe
attributes:
  check_mode:
    support: full
    details:
      - What earlier tasks of the same run in check mode foretold, names that move and images that are mounted and
        unmounted, counts as done. While an image is still to be fetched it is not known what it shares with others;
        then numbers are V(null).
      - Where the library that reads images is still to be installed, which an earlier task may only foretell, a change
        is foretold of which nothing is known, so everything but RV(repository) is V(null), with a warning.
  diff_mode:
    support: full
    details:
      - Shows the names of images, streams and EROFS images.
  idempotent:
    support: full
options:
  remove:
    description:
      - Patterns of names of images to remove first, as a shell has them, for example V(docker://registry.example.com/*).
        Without it no name is removed.
      - A name that a mount or the journal of a mount uses is not removed, but listed in RV(held).
    type: list
    elements: str
    default: []
  keep:
    description:
      - Patterns of names that are never removed, whatever O(remove) says. V(localhost/bootc-*) is always among them.
        They need not begin with the C(docker://) that default names have.
    type: list
    elements: str
    default: []
  keep_last:
    description:
      - For each pattern of O(remove), the number of names to keep of those that match it. The newest ones are kept.
      - Without O(remove) no name is removed, so this and O(older_than) say nothing, which is a warning.
    type: int
    default: 0
  older_than:
    description:
      - Of the names that match O(remove), only remove those that were set before this time. A number of seconds, or of
        minutes, hours, days or weeks with V(m), V(h), V(d) or V(w) behind it.
      - With O(keep_last) as well, a name must be both old and not among the newest.
    type: str
  timeout:
    description:
      - The number of seconds to wait until nobody else uses the repository.
    type: int
    default: 600
  progress_file:
    description:
      - A file on the host that is kept up to date with the progress of the task as a JSON document, for anybody to
        poll.
      - The live line on a terminal needs no such file. See the notes.
    type: path
notes:
  - While it takes time, a live line on a terminal tells how far it is, as for M(composefs.oci.composefs_image).
seealso:
  - module: composefs.oci.composefs_image
  - module: composefs.oci.composefs_check
"""

EXAMPLES = r"""
- name: Free the space of images that have no name any more
  composefs.oci.composefs_prune:

- name: Keep the three newest images of an application, and free the space of the others
  composefs.oci.composefs_prune:
    remove: ["docker://registry.example.com/app:*"]
    keep_last: 3

- name: Forget what nobody has pulled for a month, but for the base images
  composefs.oci.composefs_prune:
    remove: ["*"]
    keep: ["docker://registry.example.com/base/*"]
    older_than: 30d

- name: See what each name costs
  composefs.oci.composefs_prune:
  check_mode: true
  register: found

- name: Show it, the most expensive first
  ansible.builtin.debug:
    msg: "{{ found.by_name | dict2items | sort(attribute='value', reverse=true) }}"
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
names:
  description: The names of images that were removed, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
  sample: ["docker://registry.example.com/app:1"]
images:
  description: The EROFS images that were removed, by their fs-verity digests.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
streams:
  description: The stored layers, configurations, manifests and other streams that were removed, by their names in the
    repository.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
  sample: ["oci-layer-sha256:5c2e…"]
objects:
  description: The number of objects that were removed.
  returned: success, and on failure as far as it is known
  type: int
  sample: 1210
bytes:
  description: The bytes of everything that was removed.
  returned: success, and on failure as far as it is known
  type: int
  sample: 48037181
bytes_by_kind:
  description: The same bytes by what they were.
  returned: success, and on failure as far as it is known
  type: dict
  contains:
    files:
      description: The bytes of the content of files, and of documents of images.
      type: int
    streams:
      description: The bytes of streams.
      type: int
    images:
      description: The bytes of EROFS images.
      type: int
    leftovers:
      description: The bytes of what crashed programs left.
      type: int
    damaged:
      description: The bytes of damaged objects that a repair had set aside.
      type: int
by_name:
  description: For every name of an image as it was before, how many bytes removing it alone would have freed. Names
    that lead to the same image free nothing by themselves.
  returned: success, and on failure as far as it is known
  type: dict
  sample: {"docker://registry.example.com/app:1": 48037181}
links:
  description: References to EROFS images below the repository that mounts of an earlier boot had left.
  returned: always
  type: list
  elements: str
  sample: []
held:
  description: The names that O(remove) asked for, but that a mount or the journal of a mount uses.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
problems:
  description: What was found in the repository that is not understood and was left alone.
  returned: success, and on failure as far as it is known
  type: list
  elements: dict
  contains:
    code:
      description: V(dangling_reference), a name or other reference that leads nowhere. V(stray_file), something that
        does not belong there. V(bad_link), a symbolic link that does not lead to an object.
      type: str
    path:
      description: Where it is, below the repository.
      type: str
error:
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes. V(busy) if others did not let go of the repository in time; the message names them. V(repository_damaged) if
    something that may be needed cannot be read.
  returned: on failure
  type: str
  sample: busy
"""

import dataclasses
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.host import watch
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    guarded,
    opened_repository,
    close_progress,
    progress_files,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations import foreseen, prune
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress


def values(pruned: prune.Pruned) -> dict[str, Any]:
    """The result in plain values."""
    found = {**vars(pruned), "problems": [problem._asdict() for problem in pruned.problems]}
    del found["certain"]
    if not pruned.certain:
        unknown = [*(("objects", "bytes", "bytes_by_kind", "streams", "images") if pruned.changed else ()), "by_name"]
        found.update(dict.fromkeys(unknown))
    return found


def ahead_of(module: AnsibleModule, path: str) -> foreseen.Ahead | None:
    """What earlier tasks of a run in check mode foretold for the repository."""
    known = told(module, path)
    if not known.names and not known.mounts:
        return None
    keys = [field.name for field in dataclasses.fields(foreseen.Mount)]
    return foreseen.Ahead(
        {name: None if one.absent else one.digest or "" for name, one in known.names.items()},
        [foreseen.Mount(**{key: one[key] for key in keys}) for one in known.mounts],
    )


def run(module: AnsibleModule, base: dict[str, Any], life: watch.Life) -> dict[str, Any]:
    """Do what the task says; ``base`` gets what a failure should still tell."""
    wish = prune.wish_of(module.params)
    path = base["repository"] = repository_path(module)
    for warning in prune.vain(module.params):
        module.warn(warning)
    progress = Progress(*progress_files(module, life.progress_file))
    try:
        with opened_repository(module, path) as repository:
            pruned = prune.prune(repository, wish, progress, module.check_mode, ahead=ahead_of(module, path))
    finally:
        close_progress(module, progress)
    for warning in prune.astray(wish.remove, pruned):
        module.warn(warning)
    result = values(pruned)
    if pruned.changed:
        gone = {key: result[key] for key in ("names", "links", "streams", "images") if result[key]}
        result["diff"] = {"before_header": path, "after_header": path, "before": gone, "after": {}}
        if not module.check_mode:
            module.log(f"{path}: removed {pruned.objects} objects, {pruned.bytes} bytes; names: {pruned.names}")
    return result


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec={
            "repository": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
            "remove": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "list", "elements": "str", "default": []},
            "keep_last": {"type": "int", "default": 0},
            "older_than": {"type": "str"},
            "timeout": {"type": "int", "default": 600},
            "progress_file": {"type": "path"},
        },
        supports_check_mode=True,
    )
    base: dict[str, Any] = {"repository": None, **values(prune.Pruned())}
    unread = {**dict.fromkeys(values(prune.Pruned())), "changed": True}
    # The action plugin passes through the environment what concerns only itself and this module.
    job, token = os.environ.pop(watch.COLLECT, ""), os.environ.pop(watch.WATCH, "")
    if job:
        run_module(module, lambda module: watch.collect(job))
        return
    watch.run(token, lambda life: run_module(module, lambda module: run(module, base, life), base, unread=unread))


if __name__ == "__main__":
    main()
