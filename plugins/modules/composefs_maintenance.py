#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_maintenance
short_description: Have a host check and prune a composefs repository by itself
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Writes a timer of systemd that checks a composefs repository and frees what nothing keeps in it, without a
    controller. It does what M(composefs.oci.composefs_check) and M(composefs.oci.composefs_prune) do, at the lowest
    priority.
  - The result of the last run is in C(last_maintenance) of M(composefs.oci.composefs_repository_info), and in the page
    of the playbook C(composefs.oci.status). Where the check found something, or something went wrong, the unit counts
    as failed.
  - The program that is run, C(/var/lib/composefs-oci/maintain.pyz), is made of the sources of this collection and needs
    nothing but Python. Run the module again after an update of the collection.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
  - composefs.oci.repository
  - composefs.oci.repository.unsafe
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  state:
    description:
      - Whether the timer shall be there.
    type: str
    choices: [present, absent]
    default: present
  schedule:
    description:
      - When to do it, as for C(OnCalendar), see C(systemd.time(7)). What was missed while the host was off is done at
        the next boot.
    type: str
    default: daily
  spread:
    description:
      - Up to how many seconds later it is done, by chance, so that hosts with one disk or one network do not all begin
        at once.
    type: int
    default: 3600
  level:
    description:
      - How thoroughly to check, as for M(composefs.oci.composefs_check). Its level V(full) is for tasks only.
    type: str
    choices: [quick, objects]
    default: quick
  prune:
    description:
      - Whether to free what nothing keeps after the check.
    type: bool
    default: true
  remove:
    description:
      - Patterns of names to remove before that, as for M(composefs.oci.composefs_prune). Without it no name is removed.
    type: list
    elements: str
    default: []
  keep:
    description:
      - Patterns of names that are never removed.
    type: list
    elements: str
    default: []
  keep_last:
    description:
      - For each pattern of O(remove), the number of names to keep of those that match it. The newest ones are kept.
    type: int
    default: 0
  older_than:
    description:
      - Of the names that match O(remove), only remove those that were set before this time. A number of seconds, or of
        minutes, hours, days or weeks with V(m), V(h), V(d) or V(w) behind it.
    type: str
  timeout:
    description:
      - The number of seconds to wait until nobody else uses the repository.
    type: int
    default: 600
notes:
  - Needs root and systemd.
  - The repository need not exist yet. As long as it does not, the unit fails.
seealso:
  - module: composefs.oci.composefs_check
  - module: composefs.oci.composefs_prune
  - module: composefs.oci.composefs_repository_info
"""

EXAMPLES = r"""
- name: Check and prune once a day
  composefs.oci.composefs_maintenance:

- name: Read everything on Sundays, and keep the last three images of each application
  composefs.oci.composefs_maintenance:
    repository: /var/lib/images
    schedule: Sun 03:00
    level: objects
    remove: ["docker://registry.example.com/*"]
    keep_last: 3

- name: Have it no more
  composefs.oci.composefs_maintenance:
    state: absent
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
unit:
  description: The timer. A service of the same name is what it starts.
  returned: success
  type: str
  sample: composefs-maintenance-sysroot-composefs.timer
error:
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes.
  returned: on failure
  type: str
  sample: invalid_option
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidOption
from ansible_collections.composefs.oci.plugins.module_utils.module import guarded, repository_path, run_module
from ansible_collections.composefs.oci.plugins.module_utils.operations import maintenance, maintenancetimer, prune


def wish_of(params: dict[str, Any]) -> maintenance.Wish:
    """What the timer shall do."""
    wish = prune.wish_of(params)
    if params["spread"] < 0:
        raise InvalidOption(f"The option spread is {params['spread']}.", "It must be at least 0.")
    return maintenance.Wish(params["level"], wish if params["prune"] else None, params["unsafe_repository"])


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Do what the task says; ``base`` gets what a failure should still tell."""
    params = module.params
    path = base["repository"] = repository_path(module)
    if params["state"] == "absent":
        changed = maintenancetimer.remove(path, check=module.check_mode)
    else:
        for warning in prune.vain(params) if params["prune"] else ():
            module.warn(warning)
        if params["remove"] and not params["prune"]:
            module.warn("With 'prune: false' nothing is removed, so 'remove' says nothing.")
        schedule = maintenancetimer.Schedule(params["schedule"], params["spread"])
        changed = maintenancetimer.ensure(path, wish_of(params), schedule, check=module.check_mode)
    return {"changed": changed, "unit": f"{maintenancetimer.unit_name(path)}.timer"}


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec={
            "repository": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
            "schedule": {"type": "str", "default": "daily"},
            "spread": {"type": "int", "default": 3600},
            "level": {"type": "str", "choices": list(maintenance.LEVELS), "default": "quick"},
            "prune": {"type": "bool", "default": True},
            "remove": {"type": "list", "elements": "str", "default": []},
            "keep": {"type": "list", "elements": "str", "default": []},
            "keep_last": {"type": "int", "default": 0},
            "older_than": {"type": "str"},
            "timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    base: dict[str, Any] = {"changed": False, "repository": None}
    run_module(module, lambda module: run(module, base), base)


if __name__ == "__main__":
    main()
