#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_delta
short_description: Make a delta between two stored images and push it beside the image
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Compares two images that a composefs repository holds and writes what the newer one has and the older one has not as
    an OCI artifact, which C(skopeo) pushes to a registry or stores elsewhere.
  - Hosts that have the older image then fetch the delta in the place of the layers. M(composefs.oci.composefs_image)
    finds it by itself where O(dest) is V(auto), and C(cfsctl) 0.9.3 or later applies it, too.
  - Nobody has to trust a delta. Every layer that is made by it is hashed as a whole by the host that makes it, and the
    module applies the delta once itself before it is pushed.
  - Deltas are made on one host, for example the one that builds images or a seed of a site. It needs both images and
    about as much memory as the larger of their file trees, and five times the largest patched file (of at most 64 MiB).
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
      - In check mode O(dest) is looked at and nothing is made, so RV(digest) and RV(bytes) are V(null) for a delta that
        is not there yet.
      - Of images that an earlier task of the run would pull nothing is known, so a change is foretold, RV(layers) is
        V(null), too, and so is RV(ref) with V(auto) for O(dest). On a host that has no fitting C(skopeo) yet, O(dest)
        cannot be looked at, and without a library for zstd the images cannot be, so a change is foretold with a
        warning.
  diff_mode:
    support: none
  idempotent:
    support: full
    details:
      - The task changes something exactly when O(dest) holds no delta with this source and target. The bytes of a delta
        depend on the version of the zstd library, so digests of deltas are never compared.
options:
  source:
    description:
      - The image that hosts have already, by its name or manifest digest in the repository.
    type: str
    required: true
  target:
    description:
      - The image that hosts are to have, by its name or manifest digest in the repository.
    type: str
    required: true
  dest:
    description:
      - Where to put the delta, as a reference with its transport, which is C(docker://), C(oci:), C(oci-archive:) or
        C(dir:). A place where an image is, and an archive that holds something else, are refused.
      - V(auto) is beside the target in the registry that it was pulled from, under the tag
        C(sha256-<target>.delta-<24 digits of source>), where the digests are those that the registry knows. This needs
        a target that was pulled by a C(docker://) reference.
    type: str
    default: auto
  level:
    description:
      - How hard to compress, from V(1) to V(19). Levels below V(12) find much less in patches of large programs, levels
        above take several times as long for a few percent.
      - By default, patches of files up to 8 MiB are made at level 18 and everything else at level 12.
    type: int
requirements:
  - skopeo 1.6 or later on the host
  - zstandard for Python on the host (or Python 3.14)
seealso:
  - module: composefs.oci.composefs_image
"""

EXAMPLES = r"""
- name: Pull what the hosts run and what they are to run
  composefs.oci.composefs_image:
    images:
      - {ref: "docker://registry.example.com/app:1.4", name: old}
      - {ref: "docker://registry.example.com/app:1.5", name: new}

- name: Publish the way from one to the other beside the image
  composefs.oci.composefs_delta:
    source: old
    target: new
    auth_file: /root/push.json

- name: Carry an update to a place without a network
  composefs.oci.composefs_delta:
    source: old
    target: new
    dest: oci-archive:/media/stick/app-1.4-1.5.tar
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
ref:
  description:
    - The reference of the delta, for O(composefs.oci.composefs_image#module:deltas). For a registry it ends with the
      digest. In check mode, for a delta that is not there yet, it is the place where it would be; on failure, too.
      V(null) in check mode if that place depends on an image which an earlier task would pull.
  returned: success, and on failure as far as it is known
  type: str
  sample: docker://registry.example.com/app@sha256:7c1e9b3c6a0f5d1c2b4e8f9a0d3c5b7e1f2a4c6e8b0d2f4a6c8e0b2d4f6a8c0e
digest:
  description: The digest of the delta's manifest. V(null) in check mode if it is not there yet.
  returned: success
  type: str
  sample: sha256:7c1e9b3c6a0f5d1c2b4e8f9a0d3c5b7e1f2a4c6e8b0d2f4a6c8e0b2d4f6a8c0e
bytes:
  description: The bytes of all layers' deltas together. V(null) in check mode if it is not there yet.
  returned: success
  type: int
  sample: 1478512
layers:
  description: The layers of the target that the source has not. V(null) in check mode if an earlier task of the run
    would pull one of the images.
  returned: success
  type: list
  elements: dict
  contains:
    digest:
      description: The digest of the layer's blob.
      type: str
    diff_id:
      description: The digest of the layer's uncompressed tar.
      type: str
    size:
      description: The bytes of the layer's blob.
      type: int
    bytes:
      description: The bytes that are fetched in its place.
      type: int
  sample:
    - digest: sha256:1f7ce2fa46ab3942feabee654933948821303a5a821789dddab2d8c3df59e227
      diff_id: sha256:c6e5b1e8f4b0a3a34e2e37a0f5ae6a4dbf1f9fa3a2a1eb4f7a56b3ef40e49f65
      size: 60512345
      bytes: 1478512
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
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes.
  returned: on failure
  type: str
  sample: image_not_found
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    InvalidOption,
    MissingLibrary,
    SkopeoMissing,
    SkopeoTooOld,
)
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    foretells,
    guarded,
    opened_repository,
    repository_path,
    run_module,
)
from ansible_collections.composefs.oci.plugins.module_utils.operations import makedelta
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.source.options import options_of


def run(module: AnsibleModule, base: dict) -> dict:
    """Do what the task says; its result."""
    params = module.params
    path = repository_path(module)
    base.update(repository=path)
    options = options_of(params)
    if params["level"] is not None and not 1 <= params["level"] <= 19:
        raise InvalidOption(f"The option level is {params['level']}.", "It must be between 1 and 19.")
    dest = parse_reference(params["dest"]) if params["dest"] != "auto" else None
    base.update(ref=dest.text if dest is not None else None)
    if dest is not None:
        makedelta.require_place(dest)
    with opened_repository(module, path, foreseen=True) as repository:
        wanted = [params[image] for image in ("source", "target")]
        here = [image for image in wanted if not makedelta.comes(repository, image)]
        unknown = {"changed": True, "ref": dest.text if dest is not None else None}
        unknown.update(dict.fromkeys(("digest", "bytes", "layers")))
        try:
            found = {image: makedelta.find(repository, image) for image in here}
        except MissingLibrary as error:
            # As below, the task that installs it was only foretold.
            if not foretells(module):
                raise
            module.warn(f"{error} So check mode cannot tell what the delta would be.")
            return unknown
        if here != wanted:
            # Earlier tasks of this run in check mode would fetch them, but not what is neither here nor foretold.
            return unknown
        source, target = (found[image] for image in wanted)
        makedelta.require_difference(source, target)
        if dest is None:
            dest = makedelta.beside(repository, (params["source"], params["target"]), source, target)
            base.update(ref=dest.text)
        progress, retries = Progress(None), params["retries"]
        try:
            made = makedelta.there(options, dest, source, target, progress, retries)
        except (SkopeoMissing, SkopeoTooOld) as error:
            # A fresh host: the task that installs skopeo was only foretold, too.
            if not foretells(module):
                raise
            module.warn(f"{error} So check mode cannot tell whether the delta is there already.")
            made = None
        changed = made is None
        if changed and not module.check_mode:
            made = makedelta.publish(repository, source, target, dest, options, params["level"], progress, retries)
    digest = made.digest if made else None
    return {
        "changed": changed,
        "ref": dest.pinned(digest).text if digest else dest.text,
        "digest": digest,
        "bytes": sum(layer["bytes"] for layer in made.layers) if made else None,
        "layers": made.layers if made else makedelta.missing(source, target),
    }


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule, ("dest",))(
        argument_spec={
            "repository": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
            "source": {"type": "str", "required": True},
            "target": {"type": "str", "required": True},
            "dest": {"type": "str", "default": "auto"},
            "level": {"type": "int"},
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
        },
        mutually_exclusive=[("auth_file", "username")],
        required_together=[("username", "password")],
        supports_check_mode=True,
    )
    base = {"changed": False, "repository": None, "ref": None}
    run_module(module, lambda module: run(module, base), base, effort=True)


if __name__ == "__main__":
    main()
