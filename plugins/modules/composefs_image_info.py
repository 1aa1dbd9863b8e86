#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_image_info
short_description: Tell which OCI images a composefs repository holds
version_added: 0.1.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Lists images in a composefs repository with their names, digests, platform, labels and layers.
  - Works for any user who can read the repository, without a network and without C(skopeo).
  - In check mode the names are those that earlier tasks of the run foretold. Of an image that is not there yet nothing
    but names and digest is known; the rest is V(null). Where the library that reads images is still to be installed,
    which an earlier task may only foretell, RV(images) and RV(totals) are V(null), with a warning.
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
  name:
    description:
      - The name of the image to describe. Without O(name) and O(digest) all images that have names are listed.
    type: str
  names:
    description:
      - The names of the images to describe, several or none; C(*), C(?) and C([...]) stand for what they do in a shell,
        with C(*) also for slashes. An image is described if one of its names fits.
    type: list
    elements: str
    version_added: 0.2.0
  labels:
    description:
      - Describe only images that have all these labels, with these values. The values are patterns as in O(names).
    type: dict
    version_added: 0.2.0
  digest:
    description:
      - The manifest digest of the image to describe, as V(sha256:) and 64 hexadecimal digits. The image need not have a
        name.
    type: str
  disk_use:
    description:
      - Also tell how many bytes each image occupies, in RV(images[].disk_use). For this all manifests and layers of the
        repository are read, though no content.
    type: bool
    default: false
  dumpfile:
    description:
      - Write the tree of the image to this file as a composefs dumpfile, a text with one line for each file, as
        C(cfsctl oci dump) and C(composefs-info dump) write it. It is the only thing that this module changes.
      - The image must be selected with O(name) or O(digest) and must have an EROFS image, which is measured first. The
        directory must exist.
      - The file is written aside under a random name and renamed. A link that has the name is replaced, not followed.
    type: path
seealso:
  - module: composefs.oci.composefs_image
"""

EXAMPLES = r"""
- name: List all images
  composefs.oci.composefs_image_info:
  register: found

- name: Show their names and digests
  ansible.builtin.debug:
    msg: "{{ item.names | join(', ') }}: {{ item.digest }}"
  loop: "{{ found.images }}"
  loop_control:
    label: "{{ item.digest }}"

- name: List the images of a team that are of version 1
  composefs.oci.composefs_image_info:
    names: [docker://registry.example.com/team/*]
    labels:
      org.opencontainers.image.version: 1.*

- name: Describe one image of a user's own repository
  composefs.oci.composefs_image_info:
    name: app
    repository: ~/.var/lib/composefs

- name: See how much would be gained by removing each image
  composefs.oci.composefs_image_info:
    disk_use: true
  register: found

- name: Write down every file of an image with its metadata and digest
  composefs.oci.composefs_image_info:
    name: app
    dumpfile: /root/app.dump
"""

RETURN = r"""
repository:
  description: The path of the repository.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
images:
  description: The images that were found, sorted by their first name. Empty if there is none.
  returned: success, and on failure as far as it is known
  type: list
  elements: dict
  contains:
    names:
      description: The names of the image.
      type: list
      elements: str
    ref:
      description: The reference that the image was pulled by, V(null) if that is not known. It never holds credentials.
      type: str
    records:
      description:
        - What is remembered of each name, by name. A name that version 0.1.0 or another program gave has no record.
      type: dict
      contains:
        ref:
          description: The reference that the name came from, with its transport.
          type: str
        manifest:
          description: The digest of the manifest.
          type: str
        registry_digest:
          description: The digest by which the source knows the manifest.
          type: str
        index_digest:
          description: The digest of the index that the reference led to, V(null) if it led to a single manifest.
          type: str
        policy:
          description: What became of the signature policy, V(null) if that is not known.
          type: str
        since:
          description: When the name was given to this image, in UTC.
          type: str
    digest:
      description: The digest of the manifest.
      type: str
    config_digest:
      description: The digest of the configuration.
      type: str
    media_type:
      description: The media type of the manifest.
      type: str
    kind:
      description: V(container) or V(artifact).
      type: str
    artifact_type:
      description: The type of an artifact, V(null) for a container image.
      type: str
    platform:
      description: The platform of a container image, as V(os/architecture/variant). V(null) if it names none.
      type: str
    os:
      description: The operating system of a container image.
      type: str
    architecture:
      description: The processor architecture of a container image.
      type: str
    created:
      description: When the container image was made, as its configuration says.
      type: str
    labels:
      description: The labels of a container image.
      type: dict
    annotations:
      description: The annotations of the manifest.
      type: dict
    truncated:
      description: V(labels) and V(annotations) where they have more than 64 KiB, so that only their beginning is
        returned. A warning says so, too.
      type: list
      elements: str
    layers:
      description: The layers, lowest first.
      type: list
      elements: dict
      contains:
        digest:
          description: The digest of the blob.
          type: str
        diff_id:
          description: The digest of the uncompressed tar; V(null) for artifacts.
          type: str
        size:
          description: The bytes of the blob.
          type: int
        media_type:
          description: The media type of the blob.
          type: str
    size:
      description: The bytes of all blobs.
      type: int
    image_id:
      description: The fs-verity digest of the EROFS image in the repository's format, V(null) if there is none.
      type: str
    boot_image_id:
      description: The fs-verity digest of the EROFS image to boot from, V(null) if there is none.
      type: str
    image_ids:
      description: All EROFS images of the configuration by the names under which it refers to them.
      type: dict
    mounted_at:
      description: Where one of its EROFS images is mounted on this host, whoever mounted it.
      type: list
      elements: str
    disk_use:
      description: What the image occupies in the repository. V(null) without O(disk_use).
      type: dict
      contains:
        own:
          description: The bytes of the objects that only this image uses. A garbage collection frees them when the
            image has no name any more.
          type: int
        shared:
          description: The bytes of the objects that other images use as well, whether they have names or not.
          type: int
        own_objects:
          description: The number of objects that only this image uses.
          type: int
        shared_objects:
          description: The number of objects that other images use as well.
          type: int
  sample:
    - names: [app]
      ref: docker://registry.example.com/app:1.4
      records:
        app:
          ref: docker://registry.example.com/app:1.4
          manifest: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
          registry_digest: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
          index_digest: sha256:fe7e1e0a5d2e0d1f4ab6ac2f6fb71a1b5f4c3a2a5d2c9b0f9b1f6e5d4c3b2a19
          policy:
          since: "2026-11-27T14:40:07Z"
      digest: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
      config_digest: sha256:0f4e7c4bb4b0a4aa6e1d5a1a6e86a41d20c6a1ba5ce0f1a1b5b9b8f6d4e5a6b7
      media_type: application/vnd.oci.image.manifest.v1+json
      kind: container
      artifact_type:
      platform: linux/amd64
      os: linux
      architecture: amd64
      created: "2026-11-02T10:11:12Z"
      labels: {org.opencontainers.image.version: "1.4"}
      annotations: {}
      truncated: []
      layers:
        - digest: sha256:1f7ce2fa46ab3942feabee654933948821303a5a821789dddab2d8c3df59e227
          diff_id: sha256:c6e5b1e8f4b0a3a34e2e37a0f5ae6a4dbf1f9fa3a2a1eb4f7a56b3ef40e49f65
          size: 29125228
          media_type: application/vnd.oci.image.layer.v1.tar+gzip
      size: 29125228
      image_id: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
      boot_image_id:
      image_ids:
        composefs.image.v1: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
      mounted_at: [/srv/app]
      disk_use: {own: 48037181, shared: 29810442, own_objects: 1210, shared_objects: 1921}
totals:
  description: Figures of all RV(images) together.
  returned: success
  type: dict
  contains:
    images:
      description: How many images were found.
      type: int
    names:
      description: How many names they have.
      type: int
    layers:
      description: How many different layers they have.
      type: int
    size:
      description: The bytes of the blobs of these layers, each counted once.
      type: int
  sample: {images: 1, names: 1, layers: 1, size: 29125228}
dumpfile:
  description: The absolute path of the dumpfile. V(null) without O(dumpfile).
  returned: success, and on failure as far as it is known
  type: str
  sample: /root/app.dump
error:
  description: What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all
    codes.
  returned: on failure
  type: str
  sample: not_a_repository
"""

import os
from fnmatch import fnmatchcase
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import other_names
from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import dump
from ansible_collections.composefs.oci.plugins.module_utils.operations.diskuse import disk_use
from ansible_collections.composefs.oci.plugins.module_utils.errors import ImageNotFound, InvalidOption
from ansible_collections.composefs.oci.plugins.module_utils.operations.listing import list_images
from ansible_collections.composefs.oci.plugins.module_utils.pull.results import TEXTS_LIMIT
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    guarded,
    opened_repository,
    repository_path,
    run_module,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

EMPTY: dict[str, Any] = {"changed": False, "repository": None, "images": [], "dumpfile": None}


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """List what the task asks for; ``base`` gets what a failure should still tell."""
    params = module.params
    if params["dumpfile"] and not (params["name"] or params["digest"]):
        raise InvalidOption("The option dumpfile needs one image.", "Set 'name' or 'digest' as well.")
    path = base["repository"] = repository_path(module)
    with opened_repository(module, path, foreseen=True) as repository:
        images, complaints = list_images(repository, params["name"] or "", params["digest"] or "")
        images = [image for image in images if fits(image, params["names"], params["labels"] or {})]
        # Of images that earlier tasks of a run in check mode foretold, next to nothing is known; and what they will
        # share with the others is not known either.
        certain = not any(image["image_ids"] is None for image in images) and not repository.foreseen.streams
        wanted = [image["digest"] for image in images if image["image_ids"] is not None]
        use = disk_use(repository, wanted) if params["disk_use"] and certain else {}
        for image in images:
            image["mounted_at"] = None
            if image["image_ids"] is not None:
                image["mounted_at"] = mountinfo.showing(image["image_ids"].values())
            image["disk_use"] = use[image["digest"]]._asdict() if image["digest"] in use else None
        for complaint in complaints:
            module.warn(f"An image cannot be described: {complaint}")
        for image in images:
            for texts in image["truncated"] or ():
                called = ", ".join(image["names"]) or image["digest"]
                module.warn(f"The {texts} of {called} are too long: only their first {TEXTS_LIMIT} bytes are returned.")
        changed = bool(params["dumpfile"]) and write_dumpfile(module, repository, images, base)
        figures = totals(images)
        if (repository.place and not repository.foreseen.names) or any(image["digest"] is None for image in images):
            figures = dict.fromkeys(figures)  # nobody has said what will be in it, or which names will be one image's
    return {"changed": changed, "images": images, "totals": figures}


def fits(image: dict[str, Any], names: list[str] | None, labels: dict[str, Any]) -> bool:
    """Whether an image has one of the names and all of the labels, which are patterns."""
    if names is not None and not any(
        fnmatchcase(name, pattern) or name in other_names(pattern) for name in image["names"] for pattern in names
    ):
        return False
    return not labels or all(
        key in (image["labels"] or {}) and fnmatchcase(image["labels"][key], str(value))
        for key, value in labels.items()
    )


def totals(images: list[dict[str, Any]]) -> dict[str, int | None]:
    """Figures of all images together; those of layers None if not all of them are known."""
    named = sum(len(image["names"]) for image in images)
    if any(image["layers"] is None for image in images):
        return {"images": len(images), "names": named, "layers": None, "size": None}
    sizes = {layer["digest"]: layer["size"] for image in images for layer in image["layers"]}
    return {"images": len(images), "names": named, "layers": len(sizes), "size": sum(sizes.values())}


def write_dumpfile(
    module: AnsibleModule, repository: Repository, images: list[dict[str, Any]], base: dict[str, Any]
) -> bool:
    """Write the dumpfile of the one image that is selected; whether it changed."""
    params = module.params
    asked = params["name"] or params["digest"]
    if not images:
        raise ImageNotFound(
            f"The repository {repository.path} has no image {asked}, so no dumpfile can be written.",
            "Pull it first, or correct the name.",
        )
    if images[0]["image_ids"] is None:
        base["dumpfile"] = os.path.abspath(params["dumpfile"])
        return True  # an earlier task of this run in check mode would fetch it
    if images[0]["image_id"] is None:
        raise ImageNotFound(
            f"{asked} has no EROFS image to dump in {repository.path}.",
            "Pull it with 'erofs: true'. Artifacts have none.",
        )
    base["dumpfile"] = os.path.abspath(params["dumpfile"])
    return dump.write(dump.dump(repository, images[0]["image_id"]), base["dumpfile"], module.check_mode)


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(
        argument_spec={
            "name": {"type": "str"},
            "names": {"type": "list", "elements": "str"},
            "labels": {"type": "dict"},
            "digest": {"type": "str"},
            "repository": {"type": "path"},
            "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
            "disk_use": {"type": "bool", "default": False},
            "dumpfile": {"type": "path"},
        },
        mutually_exclusive=[("name", "digest", "names")],
        supports_check_mode=True,
    )
    base: dict[str, Any] = dict(EMPTY)
    run_module(module, lambda module: run(module, base), base, unread={"images": None, "totals": None})


if __name__ == "__main__":
    main()
