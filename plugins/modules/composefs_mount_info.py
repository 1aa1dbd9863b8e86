#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_mount_info
short_description: List the composefs mounts of a host
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Lists every composefs mount of the host, whoever made it, and every unit of systemd of this collection, with the
    image, how it is mounted, whether it comes back at boot, and what keeps it in its repository.
  - In check mode it tells what earlier tasks of the run foretold; what nobody can know yet is V(null).
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.attributes.info
options:
  path:
    description:
      - Only what is mounted, or would be mounted at boot, at this path.
      - The default is everything.
    type: path
  repository:
    description:
      - It has no meaning here. The module takes it, so that a default for the whole action group does no harm.
    type: path
seealso:
  - module: composefs.oci.composefs_deployment_info
  - module: composefs.oci.composefs_mount
"""

EXAMPLES = r"""
- name: List what is mounted
  composefs.oci.composefs_mount_info:
  register: found

- name: Fail where something mounted is kept by nothing
  ansible.builtin.assert:
    that: found.mounts | rejectattr('keeps') | length == 0
"""

RETURN = r"""
mounts:
  description: One entry for each path, sorted by it.
  returned: success
  type: list
  elements: dict
  contains:
    path:
      description: Where the image is mounted, or would be at boot.
      type: str
      sample: /srv/app
    name:
      description: The name of the image. V(null) if it was mounted by its image id, or is not known.
      type: str
      sample: app
    digest:
      description: The digest of its manifest. V(null) if it is not known.
      type: str
      sample: sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
    image_id:
      description: The image that is mounted. V(null) if none is, for example because the unit failed.
      type: str
      sample: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
    version:
      description: The label C(org.opencontainers.image.version) of the image. V(null) if it has none.
      type: str
      sample: "1.4"
    verity:
      description: Whether the kernel insists on fs-verity for the content of every file.
      type: bool
      sample: true
    writable:
      description: Whether the mount takes changes.
      type: bool
      sample: false
    persistent:
      description: Whether a unit brings it back at boot.
      type: bool
      sample: true
    unit:
      description: That unit. V(null) if there is none.
      type: str
      sample: composefs-oci-srv-app.service
    unit_state:
      description: What systemd says of it, for example V(active) or V(failed). V(null) where systemd does not run.
      type: str
      sample: active
    repository:
      description: The repository that the mount reads from. V(null) if it is not known.
      type: str
      sample: /sysroot/composefs
    keeps:
      description: The pin and the link that keep the image in its repository.
      type: list
      elements: str
      sample:
        - app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
        - images/refs/composefs-oci/srv-app/14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
error:
  description: What went wrong, as a stable code for conditions in playbooks.
  returned: on failure
  type: str
  sample: io_error
"""

import os
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.host import commands
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, deployment, mountlisting
from ansible_collections.composefs.oci.plugins.module_utils.module import guarded, run_module, told

ARGUMENT_SPEC = {"path": {"type": "path"}, "repository": {"type": "path"}}


def run(module: AnsibleModule) -> dict[str, Any]:
    """List what is there."""
    found, complaints = mountlisting.mounts(deployment.Host(bootmount.HOST, commands.run), module.params["path"])
    for complaint in complaints:
        module.warn(complaint)
    real = os.path.realpath(module.params["path"]) if module.params["path"] else None
    known = [one for one in told(module).mounts if real is None or one["path"] == real]
    return {"mounts": mountlisting.foresee(found, known) if known else found}


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    run_module(module, run, {"changed": False})


if __name__ == "__main__":
    main()
