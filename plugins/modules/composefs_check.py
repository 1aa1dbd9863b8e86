#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_check
short_description: Find what is damaged in a composefs repository, and repair it
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Checks whether everything in a composefs repository is there and is what it says it is. Others may use the
    repository meanwhile.
  - Finds everything that C(cfsctl fsck) and C(cfsctl oci fsck) find, and what they do not look for. With O(level=full)
    these are layers that are not what they are named after, EROFS images that are not what their layers make, and
    damaged objects in repositories without fs-verity.
  - With O(repair=true) it mends what can be mended, checks once more, and says in RV(repaired) what was done.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_registry
  - composefs.oci.registry
  - composefs.oci.repository
  - composefs.oci.repository.unsafe
attributes:
  check_mode:
    support: full
    details:
      - Checks as always, and with O(repair=true) foretells what would be repaired from where.
      - Where the library that reads images is still to be installed, which an earlier task may only foretell,
        RV(findings), RV(repaired) and RV(checked) are V(null), with a warning.
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  level:
    description:
      - How thoroughly to check.
      - V(quick) looks at names, links, documents, streams and EROFS images, and whether every object is there that they
        need.
      - V(objects) also reads every object and compares it with its digest. Where fs-verity protects the repository, the
        kernel does so, and everything is read from the disk again.
      - V(full) also computes the digest of the tar of every layer, and makes every EROFS image once more to compare it.
    type: str
    choices: [quick, objects, full]
    default: quick
  images:
    description:
      - The names of the images to check. Without it the whole repository is checked.
    type: list
    elements: str
    default: []
  repair:
    description:
      - Mend what can be mended. Damaged objects get a second name in C(.composefs-oci/damaged/) below the repository,
        where M(composefs.oci.composefs_prune) removes them, and stay in their place until they are replaced.
      - EROFS images, streams of configurations and manifests, links and proofs are made anew of what is in the
        repository. What is not there is copied from O(source), or else fetched from where the image came from. Then
        only the layers are fetched that have a damaged object.
      - What is damaged and cannot be had is set aside, so that no pull takes it for present, unless it is mounted.
    type: bool
    default: false
  source:
    description:
      - The path on the host of another composefs repository, of an OCI image layout, or of an archive of one, to repair
        from. Layouts and archives may also be written as references with C(oci:) and C(oci-archive:); what is taken
        from them is chosen by digest, whatever its name is there, and checked against that digest.
    type: path
  fail_on_findings:
    description:
      - Whether the task fails if something is wrong, and after a repair, if something is still wrong.
    type: bool
    default: true
  nice:
    description:
      - By how much to lower the priority of the check, from V(0) to V(19).
    type: int
  ionice:
    description:
      - The class of input and output to run in. V(idle) only reads while nobody else does, V(best-effort) reads with
        the lowest priority. Only some schedulers of the kernel know classes.
    type: str
    choices: [best-effort, idle]
  username:
    description:
      - The user to log in with to the registry that a repair fetches from. Needs O(password).
      - The images to check must then come from one registry, for a password is sent nowhere else. O(images) chooses
        them.
  progress_file:
    description:
      - A file on the host that is kept up to date with the progress of the task as a JSON document, for anybody to
        poll.
      - The live line on a terminal needs no such file. See the notes.
    type: path
notes:
  - While it takes time, a live line on a terminal tells how far it is, as for M(composefs.oci.composefs_image).
  - The collection's guide "Living with a repository" lists the codes of findings and says what to schedule when.
seealso:
  - module: composefs.oci.composefs_prune
  - module: composefs.oci.composefs_image
"""

EXAMPLES = r"""
- name: Look whether all images are complete
  composefs.oci.composefs_check:

- name: Read everything, when nobody else needs the disk
  composefs.oci.composefs_check:
    level: objects
    nice: 19
    ionice: idle

- name: Tell what is wrong without failing
  composefs.oci.composefs_check:
    level: full
    fail_on_findings: false
  register: checked

- name: Show it
  ansible.builtin.debug:
    msg: "{{ item.code }}: {{ item.message }}"
  loop: "{{ checked.findings }}"
  loop_control:
    label: "{{ item.code }}"

- name: Check everything, and repair what is damaged
  composefs.oci.composefs_check:
    level: full
    repair: true
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
findings:
  description: What is wrong; after a repair, what is still wrong.
  returned: success, and on failure as far as it is known
  type: list
  elements: dict
  contains:
    code:
      description: A stable code, such as V(object_damaged).
      type: str
    object:
      description: The fs-verity digest of the object that it is about; V(null) if it is about a name.
      type: str
    path:
      description: Where it is, below the repository.
      type: str
    names:
      description: What is affected, names of images where they have names.
      type: list
      elements: str
    repairable:
      description: Whether a repair needs nothing but this repository (V(local)), needs a source (V(source)), or cannot
        help (V(no)).
      type: str
    message:
      description: The same for people.
      type: str
  sample:
    - code: object_damaged
      object: 4f8e7a0c…
      path: objects/4f/8e7a0c…
      names: ["docker://registry.example.com/app:1"]
      repairable: source
      message: The object 4f8e7a0c… has content with the fs-verity digest 90c1….
repaired:
  description: What was repaired, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: list
  elements: dict
  contains:
    code:
      description: The code of the finding.
      type: str
    object:
      description: The object of the finding.
      type: str
    path:
      description: Where it is, below the repository.
      type: str
    how:
      description: V(rebuilt) of what is in the repository, V(copied) from O(source), V(fetched) from where the image
        came from, or V(set_aside).
      type: str
    message:
      description: The same for people.
      type: str
checked:
  description: How much was looked at.
  returned: success, and on failure as far as it is known
  type: dict
  sample: {level: objects, names: 3, streams: 14, images: 3, objects: 42005, bytes: 1603443548, seconds: 1.4}
error:
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes. V(repository_damaged) if there are findings.
  returned: on failure
  type: str
  sample: repository_damaged
"""

import dataclasses
import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import FormatError, InvalidOption
from ansible_collections.composefs.oci.plugins.module_utils.host import watch, workers
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    guarded,
    opened_repository,
    close_progress,
    progress_files,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations import check, repair
from ansible_collections.composefs.oci.plugins.module_utils.operations.findings import NO
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull.pull import Options
from ansible_collections.composefs.oci.plugins.module_utils.source.options import options_of
from ansible_collections.composefs.oci.plugins.module_utils.store import namerecords

FIGURES = ("names", "streams", "images", "objects", "bytes", "seconds")
EMPTY: dict[str, Any] = {"changed": False, "repository": None, "findings": [], "repaired": [], "checked": {}}


def means_of(params: dict[str, Any]) -> repair.Means:
    """Where to get what is not there."""
    options = Options(proxy=options_of(params), timeout=params["timeout"], retries=params["retries"])
    return repair.Means(params["source"], options)


def run(module: AnsibleModule, base: dict[str, Any], life: watch.Life) -> dict[str, Any]:
    """Do what the task says; ``base`` gets what a failure should still tell."""
    params = module.params
    if params["nice"] is not None and not 0 <= params["nice"] <= 19:
        raise InvalidOption(f"The option nice is {params['nice']}.", "It must be between 0 and 19.")
    path = base["repository"] = repository_path(module)
    workers.yield_to_others(params["nice"], params["ionice"])
    progress = Progress(*progress_files(module, life.progress_file))
    try:
        with opened_repository(module, path) as repository:
            images = [namerecords.spelled(repository, name) for name in params["images"]]
            known = told(module, path).names
            here = [name for name in images if name not in known or repository.tag_digest(name) is not None]
            wish = check.Wish(params["level"], here)
            if repository.place or (images and not here):
                # What earlier tasks of a run in check mode foretold cannot be looked at yet.
                findings, checked = [], {"level": params["level"], **dict.fromkeys(FIGURES)}
                base["repaired"] = []
            elif params["repair"]:
                result = repair.repair(repository, wish, means_of(params), progress, module.check_mode)
                base["repaired"] = [dataclasses.asdict(one) for one in result.repaired]
                base["changed"] = result.changed
                findings, checked = result.findings, result.checked
                for complaint in result.complaints:
                    module.warn(f"Something could not be repaired: {complaint}")
            else:
                report = check.check(repository, wish, progress, remember=not module.check_mode)
                findings, checked = report.findings, report.checked
                base["repaired"] = []
    finally:
        close_progress(module, progress)
    if known:
        # Earlier tasks of the run in check mode would change how much there is to look at.
        checked = {**checked, **{key: None for key in FIGURES if key in checked}}
    base["findings"] = [dataclasses.asdict(one) for one in findings]
    base["checked"] = checked
    for one in base["repaired"] if not module.check_mode else ():
        module.log(f"{path}: {one['message']}")
    # In check mode, too, a repair that would mend all findings does not fail.
    foretold = {(one["code"], one["path"]) for one in base["repaired"]} if module.check_mode else set()
    left = [one for one in findings if (one.code, one.path) not in foretold]
    if left and params["fail_on_findings"]:
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        helps = not params["repair"] and any(one.repairable != NO for one in left)
        raise FormatError(
            f"Something is wrong with the repository {path}: {left[0].message.rstrip('.')}{more}.",
            f"All of it is in 'findings'{'; repair: true may help' if helps else ''}.",
        )
    return {}


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec={
            "repository": {"type": "path"},
            "level": {"type": "str", "choices": list(check.LEVELS), "default": check.QUICK},
            "images": {"type": "list", "elements": "str", "default": []},
            "repair": {"type": "bool", "default": False},
            "source": {"type": "path"},
            "fail_on_findings": {"type": "bool", "default": True},
            "nice": {"type": "int"},
            "ionice": {"type": "str", "choices": ["best-effort", "idle"]},
            "auth_file": {"type": "path"},
            "username": {"type": "str"},
            "password": {"type": "str", "no_log": True},
            "validate_certs": {"type": "bool"},
            "ca_cert_dir": {"type": "path"},
            "signature_policy": {"type": "path"},
            "unenforced_policy": {"type": "str", "choices": ["refuse", "ignore"], "default": "refuse"},
            "executable": {"type": "path", "default": "skopeo"},
            "timeout": {"type": "int", "default": 60},
            "retries": {"type": "int", "default": 3},
            "progress_file": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
        },
        mutually_exclusive=[("auth_file", "username")],
        required_together=[("username", "password")],
        supports_check_mode=True,
    )
    base = dict(EMPTY)
    # The action plugin passes through the environment what concerns only itself and this module.
    job, token = os.environ.pop(watch.COLLECT, ""), os.environ.pop(watch.WATCH, "")
    if job:
        run_module(module, lambda module: watch.collect(job))
        return
    unread: dict[str, Any] = dict.fromkeys(("findings", "repaired", "checked"))
    watch.run(token, lambda life: run_module(module, lambda module: run(module, base, life), base, unread=unread))


if __name__ == "__main__":
    main()
