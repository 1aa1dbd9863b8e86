#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: warn
short_description: Warn from a role
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Shows messages as warnings. Ansible shows a warning once, however many hosts have the same to say.
  - The roles of this collection use it. It runs on the controller only.
extends_documentation_fragment:
  - composefs.oci.attributes
attributes:
  check_mode:
    support: full
    details:
      - It warns there, too.
  diff_mode:
    support: N/A
    details:
      - It changes nothing.
  idempotent:
    support: N/A
    details:
      - It changes nothing.
  platform:
    support: full
options:
  messages:
    description:
      - What to say. Empty messages are left out.
    type: list
    elements: str
    required: true
"""

EXAMPLES = r"""
- name: Warn about what will stop working
  composefs.oci.warn:
    messages:
      - "{{ 'This kernel is old.' if ansible_facts.kernel is version('5.15', '<') else '' }}"
"""

RETURN = r"""
"""
