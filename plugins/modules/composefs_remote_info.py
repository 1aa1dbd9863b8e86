#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_remote_info
short_description: Tell what a reference means now
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Asks a registry, or looks into a layout or an archive, what a reference means at this moment, with digests, sizes,
    platforms and labels. It fetches documents, no layer, and needs no repository.
  - A tag can move between two hosts. Ask once, on the controller with C(delegate_to) and C(run_once), and pin every
    host to the answer.
  - In check mode on a host that has no fitting C(skopeo) yet, or no library that an archive needs, which an earlier
    task may only foretell, everything but RV(ref) is V(null), with a warning.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_registry
  - composefs.oci.attributes.info
  - composefs.oci.registry
options:
  ref:
    description:
      - The image, as for M(composefs.oci.composefs_image).
    type: str
    required: true
  platform:
    description:
      - The platform to choose from an index, such as V(linux/arm64). Defaults to that of the host that asks.
    type: str
  repository:
    description:
      - It has no meaning here. The module takes it, so that a default for the whole action group does no harm.
    type: path
requirements:
  - skopeo 1.6 or later for everything but C(oci:) and C(oci-archive:)
seealso:
  - module: composefs.oci.composefs_image
"""

EXAMPLES = r"""
- name: Ask once for the whole fleet, on the controller
  composefs.oci.composefs_remote_info:
    ref: docker://registry.example.com/app:1.4
    platform: linux/amd64
  delegate_to: localhost
  run_once: true
  register: app

- name: Pull exactly that everywhere
  composefs.oci.composefs_image:
    ref: docker://registry.example.com/app:1.4
    digest: "{{ app.digest }}"
    name: app
"""

RETURN = r"""
ref:
  description: The reference as it was asked for.
  returned: success, and on failure as far as it is known
  type: str
  sample: docker://registry.example.com/app:1.4
pinned:
  description: The same image of a registry by its digest. V(null) for other images.
  returned: always
  type: str
  sample: docker://registry.example.com/app@sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
digest:
  description: The digest of the manifest for the platform, as a repository would store it.
  returned: always
  type: str
  sample: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
registry_digest:
  description: The digest by which the source knows that manifest. It differs from RV(digest) for Docker images.
  returned: always
  type: str
  sample: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
index_digest:
  description: The digest of the outermost index. V(null) if the reference leads to a manifest directly.
  returned: always
  type: str
  sample: sha256:1d3f3b0c1a4e8f4b0f6e9cf0b90b7c60b7f6a7d1b9c35d1a2b6f6ad4ac0b8d41
config_digest:
  description: The digest of the configuration.
  returned: always
  type: str
  sample: sha256:f6834d914d636e4002b08a6d03dc2c7216922170403aa213f5e5e0208614ee4e
media_type:
  description: The media type of the manifest.
  returned: always
  type: str
  sample: application/vnd.oci.image.manifest.v1+json
kind:
  description: V(container) or V(artifact).
  returned: always
  type: str
  sample: container
artifact_type:
  description: The type of an artifact. V(null) for a container image.
  returned: always
  type: str
  sample: application/vnd.example.config
platform:
  description: The platform of the manifest, by its index or its configuration. V(null) if none is named.
  returned: always
  type: str
  sample: linux/amd64
created:
  description: When the image was made, as it says. V(null) if it does not say.
  returned: always
  type: str
  sample: "2026-03-01T12:00:00Z"
labels:
  description: The labels of the configuration.
  returned: always
  type: dict
  sample: {org.opencontainers.image.version: "1.4"}
annotations:
  description: The annotations of the manifest.
  returned: always
  type: dict
  sample: {}
layers:
  description: The layers, lowest first, with C(digest), C(size) in bytes and C(media_type).
  returned: always
  type: list
  elements: dict
size:
  description: The bytes of all layers as the source has them.
  returned: always
  type: int
  sample: 38881884
manifests:
  description: What the outermost index lists, with C(digest), C(size), C(media_type) and C(platform). V(null) if there
    is no index, or if the image is not in a registry.
  returned: always
  type: list
  elements: dict
policy:
  description: What became of the signature policy of the host. V(enforced), V(ignored) or V(accept_anything).
  returned: always
  type: str
  sample: accept_anything
skopeo_version:
  description: The version of C(skopeo). V(null) if it was not needed.
  returned: always
  type: str
  sample: 1.18.0
attempts:
  description: How often the step that failed was tried.
  returned: on failure
  type: int
  sample: 4
seconds:
  description: The seconds until the task failed.
  returned: on failure
  type: float
  sample: 7.512
error:
  description: What went wrong, as a stable code for conditions in playbooks.
  returned: on failure
  type: str
  sample: image_not_found
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    MissingLibrary,
    SkopeoMissing,
    SkopeoTooOld,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.ocidocuments import parse_platform
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.module import foretells, guarded, run_module
from ansible_collections.composefs.oci.plugins.module_utils.operations.remote import look_up
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.source.options import options_of

ARGUMENT_SPEC = {
    "ref": {"type": "str", "required": True},
    "platform": {"type": "str"},
    "repository": {"type": "path"},
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
}
ANSWERS = (
    *("pinned", "digest", "registry_digest", "index_digest", "config_digest", "media_type", "kind", "artifact_type"),
    *("platform", "created", "labels", "annotations", "layers", "size", "manifests", "policy", "skopeo_version"),
)


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Look the reference up; ``base`` gets what a failure should still tell."""
    params = module.params
    platform = parse_platform(params["platform"]) if params["platform"] else None
    options = options_of(params, platform)
    base["ref"] = parse_reference(params["ref"]).original  # which proves that it holds no password
    try:
        return look_up(params["ref"], options, params["retries"], Progress())
    except (SkopeoMissing, SkopeoTooOld, MissingLibrary) as error:
        if not foretells(module):
            raise
        module.warn(f"{error} So check mode cannot tell what the reference means.")
        return dict.fromkeys(ANSWERS)


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule, ("ref",))(
        argument_spec=ARGUMENT_SPEC,
        mutually_exclusive=[("auth_file", "username")],
        required_together=[("username", "password")],
        supports_check_mode=True,
    )
    base: dict[str, Any] = {"changed": False, "ref": None}
    run_module(module, lambda module: run(module, base), base, effort=True)


if __name__ == "__main__":
    main()
