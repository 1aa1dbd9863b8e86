# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How modules reach registries."""

from __future__ import annotations


class ModuleDocFragment:
    DOCUMENTATION = r"""
options:
  auth_file:
    description:
      - A file on the host with credentials, as C(skopeo login) and C(podman login) write it. Defaults to what C(skopeo)
        looks for.
    type: path
  username:
    description:
      - The user to log in to the registry with. Needs O(password), and excludes O(auth_file). If O(auth_file) is a
        default of the action group, V(null) takes it away.
    type: str
  password:
    description:
      - The password to log in to the registry with. It reaches C(skopeo) through an unnamed file, never through a
        command line or the environment.
    type: str
  validate_certs:
    description:
      - Whether registries must speak TLS with a certificate that can be verified.
      - Where it is not set, the host's C(registries.conf) decides.
    type: bool
  ca_cert_dir:
    description:
      - A directory on the host with additional certificates (C(*.crt)) of authorities, and client certificates
        (C(*.cert), C(*.key)).
    type: path
  signature_policy:
    description:
      - A signature policy file on the host to use instead of the host's own C(policy.json).
    type: path
  unenforced_policy:
    description:
      - What to do where the signature policy of the host asks for more than accepting anything, and nobody here can
        enforce it; C(skopeo) before 1.13 cannot.
      - V(refuse) fails, V(ignore) goes on without any check of signatures.
    type: str
    choices: [refuse, ignore]
    default: refuse
  executable:
    description:
      - The C(skopeo) to run.
    type: path
    default: skopeo
  timeout:
    description:
      - After how many seconds without an answer, at least V(1), a request counts as stalled.
    type: int
    default: 60
  retries:
    description:
      - How often to try again after a passing fault of the registry, with growing pauses.
    type: int
    default: 3
"""
