#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_deployment_info
short_description: Tell what is deployed at the mount points of a host
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Tells of every mount point that has a journal on the host what is current, what is on trial, what is kept for going
    back, what was fetched ahead, and what happened before.
  - In check mode it tells what earlier tasks of the run foretold; what nobody can know yet is V(null).
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.attributes.info
options:
  path:
    description:
      - Only the mount point at this path.
      - The default is every one.
    type: path
  repository:
    description:
      - The repository that RV(place) is about. Nothing else depends on it, and it need not exist.
      - The default is where C(cfsctl) has its own, V(/sysroot/composefs) for root and V(~/.var/lib/composefs) for any
        other user.
    type: path
seealso:
  - module: composefs.oci.composefs_deployment
  - module: composefs.oci.composefs_mount_info
"""

EXAMPLES = r"""
- name: Look at what is deployed
  composefs.oci.composefs_deployment_info:
  register: found

- name: Fail where something else is mounted than what was confirmed
  ansible.builtin.assert:
    that: found.deployments | selectattr('state', 'equalto', 'drifted') | length == 0
"""

RETURN = r"""
deployments:
  description:
    - One entry for each mount point, sorted by its path, in the words of its journal. Keys of other versions of the
      collection may be among them.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: The mount point.
      type: str
      sample: /srv/app
    state:
      description:
        - V(current), what was confirmed last is mounted.
        - V(activated), an image is on trial.
        - V(drifted), something else is mounted than the journal says, or nothing.
        - V(reverted), an image was taken back and none was ever confirmed.
        - V(revert_failed), the image on trial could not be taken back and is still mounted.
      type: str
      sample: current
    mounted_image_id:
      description: The image that is mounted. V(null) if none is.
      type: str
      sample: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
    name:
      description: The name of the image. V(null) if it was mounted by its image id.
      type: str
      sample: app
    repository:
      description: The repository.
      type: str
      sample: /sysroot/composefs
    mount:
      description: How it is mounted, with the keys C(verity), C(opts), C(dev), C(suid), C(bootable), C(upperdir),
        C(workdir) and C(persistent).
      type: dict
      sample: {"verity": "required", "opts": [], "persistent": true}
    current:
      description: What was confirmed last, with the keys C(digest), C(index_digest), C(image_id), C(ref), C(since) and
        C(rollout). V(null) if nothing ever was.
      type: dict
      sample: {"digest": "sha256:130e...", "image_id": "14a2...", "since": "2026-11-27T14:40:07Z"}
    previous:
      description: What is kept for going back, newest first, with the same keys.
      type: list
      elements: dict
      sample: []
    pending:
      description: What is on trial, with the keys C(digest), C(image_id), C(from), C(rollout), C(who), C(since) and
        C(deadline) among others. V(null) if nothing is.
      type: dict
      sample: null
    history:
      description: The last fifty changes, oldest first, with the keys C(time), C(rollout), C(who), C(from), C(to),
        C(result), C(reason) and C(seconds).
      type: list
      elements: dict
      sample: []
    pins:
      description: The names in the repository that exist for this mount.
      type: list
      elements: str
      sample: ["app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd"]
    staged:
      description: Pins of the name that were fetched ahead and are not used yet, with the keys C(name) and C(digest).
      type: list
      elements: dict
      sample: []
place:
  description:
    - A word that is the same for two names of an inventory if both lead to the same repository on the same running
      host, and differs otherwise, also between machines that were made as copies of one. It is another one after a
      reboot.
    - V(null) where the host does not tell which boot it runs.
  returned: success
  type: str
  sample: 5f1c9f4b3c1f0b1e0a4d8a2f7c6e5d4b3a29181706f5e4d3c2b1a09f8e7d6c5b
error:
  description: What went wrong, as a stable code for conditions in playbooks.
  returned: on failure
  type: str
  sample: io_error
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, deployment, mountlisting
from ansible_collections.composefs.oci.plugins.module_utils.module import guarded, repository_path, run_module, told

ARGUMENT_SPEC = {"path": {"type": "path"}, "repository": {"type": "path"}}


def run(module: AnsibleModule) -> dict[str, Any]:
    """Tell what the journals say and what is mounted."""
    host = deployment.Host(bootmount.HOST)
    found, complaints = mountlisting.deployments(host, module.params["path"])
    for complaint in complaints:
        module.warn(complaint)
    real = os.path.realpath(module.params["path"]) if module.params["path"] else None
    known = [one for one in told(module).mounts if real is None or one["path"] == real]
    found = mountlisting.foresee_deployments(found, known) if known else found
    return {"deployments": found, "place": mountlisting.place(host, repository_path(module))}


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    run_module(module, run, {"changed": False})


if __name__ == "__main__":
    main()
