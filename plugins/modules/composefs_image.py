#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_image
short_description: Pull OCI images into a composefs repository
version_added: 0.1.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Makes OCI and Docker images present in a composefs repository under a name, or removes a name.
  - Every file of an image is stored once under its fs-verity digest, every layer and document as a splitstream. What is
    there already is not fetched again, several layers are fetched at once, and everything is proved to the last byte
    before it gets a name.
  - Images are fetched through C(skopeo), so all of its transports, its authentication files and its registry
    configuration work. OCI layouts, archives of them, and other composefs repositories are read without it.
  - The repository is shared with C(cfsctl) and C(bootc). It must exist; M(composefs.oci.composefs_repository) makes
    one.
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
      - The registry is asked what the reference means, and the result is exactly what a real run would change, with the
        bytes it would fetch.
      - A repository that does not exist yet is treated as empty, with a warning. Where C(skopeo) is not installed
        yet, an image that would have to be asked for is foretold as a change without details, with a warning, whether
        it has its name already or not. What O(digest) or O(pull=missing) settle without asking is foretold as always.
        A task that says C(check_mode=true) itself, in a run that is not in check mode, fails without C(skopeo).
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  ref:
    description:
      - The image, as C(skopeo) writes references, for example V(docker://registry.example.com/app:1.4),
        V(oci:/srv/layout:tag), V(oci-archive:/srv/app.tar), V(docker-archive:/srv/app.tar), V(dir:/srv/app) or
        V(containers-storage:localhost/app).
      - V(oci:) and V(oci-archive:), compressed with gzip, zstd, bzip2, xz or not at all, need no C(skopeo) on the host,
        unless the signature policy asks for more than accepting anything of that transport. V(oci:/srv/layout:@0) is
        the first image of a layout, whatever its name.
      - V(composefs:/path/to/repository#name) takes an image over from another composefs repository on the host, and
        V(composefs:/path/to/repository#sha256:…) the one with this manifest. Its objects are cloned, linked where
        nobody else can change them, or copied, and every layer is proved by its diff_id unless root or the user of the
        task did so there.
      - A manifest digest such as V(sha256:…), or a name in the repository, stands for an image that is there already.
        It gets O(name) without any network.
      - A bare V(quay.io/org/app:tag) means V(docker://quay.io/org/app:tag). If a reference has a tag and a digest, the
        digest wins, and counts like O(digest).
      - Exactly one of O(ref) and O(images) is needed with O(state=present).
    type: str
  name:
    description:
      - The name of the image in the repository. An image of another repository keeps the name that it has there. Else
        defaults to O(ref) with its transport, for example
        V(docker://registry.example.com/app:1.4), as C(cfsctl) names images.
      - A name without V(docker://) that version 0.1.0 gave by default is moved to the one with it, with a warning.
    type: str
  tags:
    description:
      - Further names that the image gets, or with O(state=absent) loses, in the same task.
    type: list
    elements: str
    version_added: 0.2.0
  rename_from:
    description:
      - A name that gives way to O(name). The image that has it gets O(name) without any network, unless O(ref)
        names another image. Nothing happens where this name is gone and O(name) is there.
    type: str
    version_added: 0.2.0
  images:
    description:
      - Several images to pull in one task. Layers that they share are fetched once. With an empty list there is
        nothing to do.
      - An item may be a text, too, which is its O(images[].ref).
      - No name is created or moved unless all of them could be stored.
    type: list
    elements: dict
    suboptions:
      ref:
        description: The image, see O(ref). Not needed with O(state=absent).
        type: str
      name:
        description: The name of the image in the repository, see O(name).
        type: str
      tags:
        description: Further names, see O(tags).
        type: list
        elements: str
        version_added: 0.2.0
      rename_from:
        description: A name that gives way, see O(rename_from).
        type: str
        version_added: 0.2.0
      erofs:
        description: Whether to make the mountable EROFS image. Defaults to O(erofs).
        type: bool
        version_added: 0.2.0
      bootable:
        description: Whether to make the image to boot from. Defaults to O(bootable).
        type: bool
        version_added: 0.2.0
      digest:
        description: What the reference must mean, see O(digest).
        type: str
      platform:
        description: The platform to choose from an index, see O(platform).
        type: str
      username:
        description: The user to log in to the registry of this image with, see O(username). Credentials of an image
          replace those of the task.
        type: str
        version_added: 0.2.0
      password:
        description: The password to log in to the registry of this image with, see O(password).
        type: str
        version_added: 0.2.0
      auth_file:
        description: The authentication file with the credentials for the registry of this image, see O(auth_file).
        type: path
        version_added: 0.2.0
  state:
    description:
      - V(present) pulls the image and names it.
      - V(absent) removes the name. The data stays until the repository is pruned. If the image is mounted a warning
        says where.
    type: str
    choices: [present, absent]
    default: present
  pull:
    description:
      - V(always) asks the registry what the reference means now, and fetches what is missing.
      - V(missing) is content with an image that has the name, was pulled by the same O(ref), and is what O(digest) and
        O(platform) ask for, without any network, and without asking the signature policy again. A name that version
        0.1.0 or another program gave is enough for any O(ref) without a digest.
      - V(newer) is like V(always), but leaves what is there, with a warning, if the registry cannot be reached or does
        not answer in time.
    type: str
    choices: [always, missing, newer]
    default: always
  digest:
    description:
      - The digest that the reference must have, as V(sha256:) and 64 hexadecimal digits. The task fails if it means
        anything else.
      - The digest of the manifest, of the manifest as the registry knows it, and of the (outermost) index are all
        accepted. Whatever a tag does meanwhile, what is stored is this image.
    type: str
  platform:
    description:
      - The platform to choose from an index, as V(os/architecture) or V(os/architecture/variant), for example
        V(linux/arm64/v8).
      - Defaults to the host's own. A variant takes lesser ones, so that V(linux/arm/v7) is content with V(v6).
      - For an image that is chosen from an index the index decides; a configuration that contradicts it is a warning.
        A single image that is for another platform than is asked for is refused, and a warning if none is asked for.
    type: str
  username:
    description:
      - The user to log in to the registry with. Needs O(password).
      - The images of one task that have no O(images[].username) of their own must all be of one registry, because
        the password would go to every registry that asks.
    type: str
  unenforced_policy:
    description:
      - What to do where C(skopeo) is older than 1.13, which does not enforce the signature policy in the mode that is
        used here, and the policy of the host asks for more than accepting anything.
      - V(refuse) fails, V(ignore) goes on without any check of signatures.
    type: str
    choices: [refuse, ignore]
    default: refuse
  tmpdir:
    description:
      - A directory on the host with room for what C(skopeo) unpacks, such as V(docker-archive) files. Nothing stays
        there, whatever happens. Defaults to where the environment variable E(TMPDIR) says, or V(/var/tmp).
    type: path
    version_added: 0.2.0
  erofs:
    description:
      - Whether to make the mountable EROFS image of every container image.
    type: bool
    default: true
  bootable:
    description:
      - Whether to make also the image to boot from, as C(bootc) hosts use it, with the SELinux labels of the image's
        own policy.
    type: bool
    default: false
  parallel:
    description:
      - How many layers to import at once, at least V(1). Defaults to the number of processors that the task may use.
    type: int
  timeout:
    description:
      - After how many seconds without any data, at least V(1), a transfer counts as stalled.
    type: int
    default: 60
  retries:
    description:
      - How often to try again after a stalled transfer or a passing fault of the registry, with growing pauses.
    type: int
    default: 3
  deltas:
    description:
      - Where to look for deltas of layers that are missing, in this order. Each is V(auto), for what lies beside the
        image in its registry under the tag that M(composefs.oci.composefs_delta) gives it, or the reference of a delta.
      - With V(auto) the registry is asked only if the name leads to an older image already. It is asked for the delta
        from that image, then from up to three other stored images of the same registry repository. A tag that is
        missing or refused is the same as no delta.
      - Nothing of a delta is trusted. A layer that it makes is hashed as a whole, and fetched whole, with a warning, if
        anything is wrong. An empty list asks for none.
    type: list
    elements: str
    default: [auto]
    version_added: 0.2.0
  max_size:
    description:
      - What the layers that the task fetches may unpack to, all together, in bytes or as a text such as V(10 GB), which
        is 10 times 1024 to the third bytes. More fails with V(too_large) while it is unpacked, before it has a name.
      - Without it, what has to be written anew may take the space that is free on the file system of the repository.
        More fails with V(no_space).
      - In any case the layers may have no more than 20 million members.
    type: str
    version_added: 0.2.0
  min_rate:
    description:
      - The least number of bytes a second, taken over 30 seconds of waiting, at which a layer must come. One that comes
        more slowly counts as stalled, so that a source that sends a byte now and then cannot hold a task for ever. With
        V(0) any rate will do.
    type: int
    default: 1024
    version_added: 0.2.0
  deadline:
    description:
      - After how many seconds, at least V(1), nothing more is fetched, whatever the reason. The task then fails with
        V(stalled). Layers that arrived are kept for the next run. Without it a pull may take as long as it needs.
    type: int
    version_added: 0.2.0
  peers:
    description:
      - Base URLs, V(http://) or V(https://), of other composefs repositories behind any static web server, tried in
        this order for layers that are missing and have no delta. Only objects that are missing here are fetched.
      - Manifest and configuration always come from the registry, and nothing of a peer is trusted. Each object must
        have the digest it is asked for by, and each layer is hashed as a whole before it gets its name.
      - A peer that fails is left out for the rest of the task with a warning, which names it and says what it did if it
        lied. The layer then comes from the next peer, at last from the registry.
      - Redirects and proxies from the environment are not followed. Check mode asks no peer, so the bytes that it
        foretells are those of the registry. A peer sends less where many objects are here already, and more where few
        are and it does not compress.
    type: list
    elements: str
    default: []
    version_added: 0.2.0
  peer_ca_file:
    description:
      - A file on the host with the certificates of authorities (PEM) that O(peers) with V(https://) are checked
        against. Defaults to what the host trusts.
    type: path
    version_added: 0.2.0
  peer_headers:
    description:
      - Headers to send to O(peers) with every request, for example C(Authorization) with a bearer token.
    type: dict
    version_added: 0.2.0
  remote_src:
    description:
      - Whether archives (C(oci-archive:), C(docker-archive:)) lie on the host. With V(false) they lie on the
        controller, where they are looked for as M(ansible.builtin.copy) does. Each is copied to the host once, and the
        copy is removed when the task ends.
      - With V(false) the task cannot have C(async).
    type: bool
    default: true
    version_added: 0.2.0
  progress_file:
    description:
      - A file on the host that is kept up to date with the progress of the task as a JSON document, for anybody to
        poll.
      - The live line on a terminal needs no such file. See the notes.
    type: path
notes:
  - While a pull takes time, a live line on standard error tells how far it is. The variable C(composefs_progress) of a
    host or a play says when. With V(auto), the default, it does so on a terminal, unless the environment has C(CI).
    V(always) shows it elsewhere, too, as a line every half a minute, and V(never) nowhere. Tasks in check mode, with
    C(async) or with C(no_log) have no line.
  - A pull ends when its playbook is interrupted, and gives nothing a name. A pull with a live line survives a lost
    connection for two minutes. It goes on fetching meanwhile, and the task goes on when the connection comes back. If
    it does not, the pull ends without giving anything a name. A task with C(async) does not depend on anybody
    who waits for it.
  - Whatever was fetched before the end stays, and the next run goes on from there.
requirements:
  - skopeo 1.6 or later on the host (1.13 or later to enforce signature policies), except for OCI layouts, archives of
    them and other repositories
  - zstandard for Python on the host (or Python 3.14)
  - jsonschema for Python on the host (optional, checks new documents against their schemas)
  - isal or zlib-ng for Python, or libisal.so.2 on the host (optional, decode gzip faster)
seealso:
  - module: composefs.oci.composefs_repository
  - module: composefs.oci.composefs_image_info
  - name: skopeo
    description: The program that fetches images.
    link: https://github.com/containers/skopeo
"""

EXAMPLES = r"""
- name: Pull an image and name it
  composefs.oci.composefs_image:
    ref: docker://registry.example.com/app:1.4
    name: app

- name: Pull exactly this image, whatever the tag means tomorrow
  composefs.oci.composefs_image:
    ref: registry.example.com/app:1.4
    digest: sha256:5d41402abc4b2a76b9719d911017c592ae2b5b1ad0bd4ef3a8e7b2b8f3a1c0de
    name: app

- name: Pull from a registry that wants a password and has a certificate of its own authority
  composefs.oci.composefs_image:
    ref: docker://registry.internal:5000/app:1.4
    name: app
    username: puller
    password: "{{ registry_password }}"
    ca_cert_dir: /etc/containers/certs.d/registry.internal:5000

- name: Pull several images that share layers
  composefs.oci.composefs_image:
    images:
      - ref: docker://registry.example.com/base:12
        name: base
      - ref: docker://registry.example.com/app:1.4
        name: app
        platform: linux/arm64/v8

- name: Take an image from an archive that was copied to the host
  composefs.oci.composefs_image:
    ref: oci-archive:/srv/images/app.tar
    name: app

- name: Take an image over from another repository on the host
  composefs.oci.composefs_image:
    ref: composefs:/srv/staging#app
    repository: /sysroot/composefs

- name: Keep what is there if the registry is out of reach
  composefs.oci.composefs_image:
    ref: docker://registry.example.com/app:1.4
    name: app
    pull: newer

- name: Let another name mean the same image, without any network
  composefs.oci.composefs_image:
    ref: app
    name: app-stable

- name: Rename an image
  composefs.oci.composefs_image:
    rename_from: app
    name: shop/app

- name: Forget the name
  composefs.oci.composefs_image:
    name: app
    state: absent
"""

RETURN = r"""
name:
  description: The name of the image in the repository.
  returned: when O(images) is not used
  type: str
  sample: app
ref:
  description: The reference as it was asked for.
  returned: when O(images) is not used
  type: str
  sample: docker://registry.example.com/app:1.4
repository:
  description: The path of the repository.
  returned: always
  type: str
  sample: /sysroot/composefs
digest:
  description:
    - The digest of the manifest as it is stored. V(null) if there is none.
  returned: when O(images) is not used
  type: str
  sample: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
registry_digest:
  description:
    - The digest by which the source knows the manifest. It differs from RV(digest) for Docker images, whose manifests
      are stored as OCI.
  returned: when O(images) is not used
  type: str
  sample: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
index_digest:
  description:
    - The digest of the index that the reference leads to, proved to list the manifest; the outermost one if it lists
      indexes. V(null) if the reference leads to a single manifest. Where the source was not asked it is what was
      remembered with the name.
  returned: when O(images) is not used
  type: str
  sample: sha256:fe7e1e0a5d2e0d1f4ab6ac2f6fb71a1b5f4c3a2a5d2c9b0f9b1f6e5d4c3b2a19
config_digest:
  description: The digest of the configuration.
  returned: when O(images) is not used
  type: str
  sample: sha256:0f4e7c4bb4b0a4aa6e1d5a1a6e86a41d20c6a1ba5ce0f1a1b5b9b8f6d4e5a6b7
tags:
  description: The further names of the image, as in O(tags).
  returned: when O(images) is not used
  type: list
  elements: str
  sample: [app-stable]
previous_digest:
  description:
    - The digest of the manifest that the name led to before. V(null) if the name did not exist.
    - A failure tells RV(name), RV(ref), RV(repository) and this, as far as they are known.
  returned: when O(images) is not used
  type: str
  sample: sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
image_id:
  description: The fs-verity digest of the EROFS image that can be mounted. V(null) if there is none.
  returned: when O(images) is not used
  type: str
  sample: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
boot_image_id:
  description: The fs-verity digest of the EROFS image to boot from. V(null) if there is none.
  returned: when O(images) is not used
  type: str
  sample:
kind:
  description: V(container) or V(artifact). V(null) if check mode cannot know it.
  returned: when O(images) is not used
  type: str
  sample: container
platform:
  description: The platform of a container image, as V(os/architecture/variant).
  returned: when O(images) is not used
  type: str
  sample: linux/amd64
version:
  description: The label C(org.opencontainers.image.version) of a container image, V(null) if it has none.
  returned: when O(images) is not used
  type: str
  sample: "1.4"
created:
  description: When the container image was made, as its configuration says.
  returned: when O(images) is not used
  type: str
  sample: "2026-11-02T10:11:12Z"
labels:
  description: The labels of a container image.
  returned: when O(images) is not used
  type: dict
  sample: {org.opencontainers.image.version: "1.4"}
layers:
  description:
    - The layers of the image, lowest first. V(null) if check mode cannot know them, and with O(state=absent).
  returned: when O(images) is not used
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
      description: The bytes of the blob.
      type: int
    media_type:
      description: The media type of the blob.
      type: str
    status:
      description: V(present) if the layer was there already, V(new) if it was fetched, or would be in check mode.
      type: str
    bytes_to_fetch:
      description:
        - The bytes that were fetched for the layer, or would be in check mode; those of its delta if there is one.
        - A layer that occurs several times in a task is counted where it occurs first.
      type: int
    source:
      description:
        - Where the layer came from, or would come from in check mode. V(registry), V(delta), V(peer), or the
          transport of a local reference such as V(oci). V(null) if it was there already.
      type: str
  sample:
    - digest: sha256:1f7ce2fa46ab3942feabee654933948821303a5a821789dddab2d8c3df59e227
      diff_id: sha256:c6e5b1e8f4b0a3a34e2e37a0f5ae6a4dbf1f9fa3a2a1eb4f7a56b3ef40e49f65
      size: 29125228
      media_type: application/vnd.oci.image.layer.v1.tar+gzip
      status: new
      bytes_to_fetch: 29125228
      source: registry
bytes_exact:
  description:
    - Whether the bytes in RV(layers) and RV(stats) are exact. V(false) in check mode with O(peers), for which the
      registry's bytes are told.
  returned: when O(images) is not used
  type: bool
  sample: true
streams:
  description:
    - The streams that this run registered in the repository, or would register in check mode. V(null) if check mode
      cannot know them, and with O(state=absent).
  returned: when O(images) is not used
  type: list
  elements: str
  sample:
    - oci-layer-sha256:c6e5b1e8f4b0a3a34e2e37a0f5ae6a4dbf1f9fa3a2a1eb4f7a56b3ef40e49f65
    - oci-config-sha256:0f4e7c4bb4b0a4aa6e1d5a1a6e86a41d20c6a1ba5ce0f1a1b5b9b8f6d4e5a6b7
    - oci-manifest-sha256:9d78ad0da0e88ca15da5735b9f70064d3099ac0a8cd9dc839795789400a38e42
stats:
  description:
    - Figures of the run. In check mode RV(stats.bytes_fetched) is what would be fetched, and what cannot be known of
      layers that are not there yet is V(null).
  returned: when O(images) is not used
  type: dict
  contains:
    layers:
      description: The layers of the image.
      type: int
    layers_already_present:
      description: The different layers that were there already.
      type: int
    objects_copied:
      description: The objects that were written for new layers.
      type: int
    objects_already_present:
      description: The objects of new layers that were there already.
      type: int
    bytes_copied:
      description: The bytes of the objects that were written.
      type: int
    bytes_inlined:
      description: The uncompressed bytes of new layers that are kept within their splitstreams.
      type: int
    bytes_fetched:
      description: The bytes of blobs that were fetched.
      type: int
    peers:
      description:
        - What each of O(peers) did for the whole task, with C(url), the C(layers), C(objects) and C(bytes) that came
          from it, and the C(error) for which it was left out (V(null) if it was not).
      type: list
      elements: dict
    retries:
      description: How often something had to be tried again.
      type: int
    seconds:
      description: The seconds that each phase took, and all of them.
      type: dict
  sample:
    layers: 1
    layers_already_present: 0
    objects_copied: 3120
    objects_already_present: 11
    bytes_copied: 71303168
    bytes_inlined: 2936320
    bytes_fetched: 29125228
    peers: []
    retries: 0
    seconds: {resolve: 0.11, fetch: 1.2, register: 0.1, total: 1.41}
policy:
  description:
    - How the policy for signatures was applied. V(enforced) if it asks for more than accepting anything and C(skopeo)
      checked the image against it; V(ignored) if it asks for more and nobody checked, with O(unenforced_policy=ignore);
      V(accept_anything) if it asks for nothing.
    - With O(pull=missing) an image that is there is not checked against the policy again; this is what was remembered
      when it was pulled. V(null) if that is not known.
  returned: when O(images) is not used
  type: str
  sample: accept_anything
images:
  description: What is described above, for every image of O(images).
  returned: when O(images) is used
  type: list
  elements: dict
verity:
  description: Whether fs-verity protects every object of the repository. V(null) in check mode where there is none yet.
  returned: success
  type: bool
  version_added: 0.2.0
  sample: true
free_bytes:
  description: The bytes that are free on the file system of the repository at the end of the task.
  returned: success
  type: int
  version_added: 0.2.0
  sample: 52613349376
skopeo_version:
  description: The version of C(skopeo). V(null) if it was not needed.
  returned: success
  type: str
  sample: 1.9.3
protocol_version:
  description: The version of the protocol that C(skopeo) speaks. V(null) if it was not needed.
  returned: success
  type: str
  sample: 0.2.3
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

import dataclasses
import json
import os
from collections.abc import Callable

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.common.text.formatters import human_to_bytes

from ansible_collections.composefs.oci.plugins.module_utils.pull import foretelling, pull
from ansible_collections.composefs.oci.plugins.module_utils.errors import (
    EngineError,
    InvalidOption,
    InvalidReference,
    MissingLibrary,
    SkopeoMissing,
    SkopeoTooOld,
)
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    foretells,
    guarded,
    opened_repository,
    close_progress,
    progress_files,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.host import mountinfo, watch
from ansible_collections.composefs.oci.plugins.module_utils.operations import listing
from ansible_collections.composefs.oci.plugins.module_utils.formats.digests import is_digest
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import Reference, parse_reference
from ansible_collections.composefs.oci.plugins.module_utils.formats.reference import default_name, other_names
from ansible_collections.composefs.oci.plugins.module_utils.progress import Progress
from ansible_collections.composefs.oci.plugins.module_utils.pull.plan import Standing
from ansible_collections.composefs.oci.plugins.module_utils.pull.publish import Images
from ansible_collections.composefs.oci.plugins.module_utils.pull.results import Report
from ansible_collections.composefs.oci.plugins.module_utils.store import namerecords
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Foreseen, Repository
from ansible_collections.composefs.oci.plugins.module_utils.source.options import at_least
from ansible_collections.composefs.oci.plugins.module_utils.source.options import options_of as proxy_options


def place_of(reference: Reference, params: dict, places: dict[str, str]) -> str:
    """The reference of the copy of an archive that lies on the controller; empty if it lies on the host."""
    if params.get("remote_src", True) or reference.transport not in ("oci-archive", "docker-archive"):
        return ""
    if reference.path not in places:
        raise InvalidOption(
            f"The archive {reference.path} was not copied to the host.", "Set remote_src to true if it lies there."
        )
    return f"{reference.transport}:{places[reference.path]}{reference.name[len(reference.path) :]}"


def requests_of(params: dict, places: dict[str, str] | None = None) -> list[pull.Request]:
    """The images that the task is about. ``places`` says where copies of archives lie on the host."""
    asked = params["images"]
    if asked is None:
        asked = [{key: params[key] for key in IMAGE}]
    requests = []
    for image in asked:
        leaving = image["rename_from"] or ""
        ref = image["ref"] or leaving
        name = image["name"] or image["ref"]
        former: tuple[str, ...] = ()
        if not name or (params["state"] == "present" and not ref):
            raise InvalidReference(
                f"The image {name!r} has no reference." if name else "An image has neither a reference nor a name.",
                "Set 'ref' to say which image it is.",
            )
        digest = image.get("digest") or ""
        if digest and not is_digest(digest):
            raise InvalidReference(
                f"{digest!r} is not a digest.", "Write 'digest' as sha256: and 64 hexadecimal digits."
            )
        local = params["state"] == "present" and is_local(ref, bool(leaving) and not image["ref"])
        place = ""
        if params["state"] == "present" and not local:
            place = place_of(parse_reference(ref), params, places or {})
        if not image["name"]:
            if local and is_digest(ref):
                raise InvalidReference(f"The image {ref} is to get no name.", "Set 'name'.")
            if local:
                parse_reference(ref)  # what is no reference is refused
            name = default_name(ref)
            former = tuple(form for form in dict.fromkeys((ref, *other_names(name))) if form != name)
        username, password = image.get("username"), image.get("password")
        if params["images"] is None:
            username = password = None  # those of the task
        requests.append(
            pull.Request(
                ref,
                name,
                digest,
                image.get("platform") or "",
                former,
                username,
                password,
                tags=tuple(image["tags"] or ()),
                gives_up=leaving if leaving != name else "",
                local=local,
                place=place,
                erofs=image.get("erofs") if params["images"] is not None else None,
                bootable=image.get("bootable") if params["images"] is not None else None,
                auth_file=image.get("auth_file") if params["images"] is not None else None,
            )
        )
    return requests


def is_local(ref: str, renaming: bool) -> bool:
    """Whether ``ref`` may be a digest or a name in the repository rather than a reference. Raises InvalidReference for
    what can be neither.
    """
    if renaming or is_digest(ref):
        return True
    try:
        parse_reference(ref)
    except InvalidReference:
        if "@" in ref or ":" in ref.partition("/")[0]:
            raise  # what stands before an at sign may be a password
        return True
    return False


def size_of(text: str | None) -> int | None:
    """The bytes that ``text`` means."""
    if text is None:
        return None
    try:
        size = int(human_to_bytes(text))
    except ValueError as error:
        raise InvalidOption(f"The option max_size is {text!r}.", "Write bytes, or a size such as 10 GB.") from error
    if size < 1:
        raise InvalidOption(f"The option max_size is {text!r}.", "It must be at least 1.")
    return size


def headers_of(asked: dict) -> dict[str, str]:
    """The headers for peers. What is no text or number has no form in a header, and its value may be secret."""
    for name, value in asked.items():
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise InvalidOption(f"The header {name!r:.120} has no text as its value.", "Look at 'peer_headers'.")
    return {str(name): str(value) for name, value in asked.items()}


def options_of(params: dict, check: bool) -> pull.Options:
    """How to pull."""
    proxy = proxy_options(params)
    at_least(params, parallel=1, min_rate=0, deadline=1)
    return pull.Options(
        max_size=size_of(params["max_size"]),
        min_rate=params["min_rate"],
        deadline=params["deadline"],
        policy=params["pull"],
        parallel=params["parallel"] or 0,
        timeout=params["timeout"],
        retries=params["retries"],
        images=Images(plain=params["erofs"], bootable=params["bootable"]),
        check=check,
        proxy=proxy,
        deltas=tuple(params["deltas"]),
        peers=tuple(params["peers"]),
        peer_ca_file=params["peer_ca_file"],
        peer_headers=headers_of(params["peer_headers"] or {}),
    )


def present(
    module: AnsibleModule, repository: Repository, requests: list[pull.Request], options: pull.Options, life: watch.Life
) -> list[Report]:
    """Pull; one report for each image."""
    will_be = {request.name: comes(module, repository, request) for request in requests} if module.check_mode else {}
    if any(come is not None for come in will_be.values()):
        # These images are not here yet. The others are looked up as in a task of their own.
        others = [request for request in requests if will_be[request.name] is None]
        if any(will_be[one.name] is not None and not one.local for one in requests):
            repository.foreseen = repository.foreseen._replace(complete=False)
        reports = iter(present(module, repository, others, options, life)) if others else iter(())
        return [
            next(reports)
            if will_be[one.name] is None
            else foretelling.foretell(repository, one, will_be[one.name] or None)
            for one in requests
        ]
    progress = Progress(watch.Announcer(life), *progress_files(module, life.progress_file))
    try:
        return pulled(module, repository, requests, options, progress, life.permit)
    except LACKING as error:
        if not foretells(module):
            raise
        return pulled_in_part(module, repository, requests, options, progress, error)
    finally:
        close_progress(module, progress)


def pulled(
    module: AnsibleModule,
    repository: Repository,
    requests: list[pull.Request],
    options: pull.Options,
    progress: Progress,
    permit: Callable[[], None] = lambda: None,
) -> list[Report]:
    """Pull, and tell of it; one report for each image."""
    outcomes = pull.pull_images(repository, requests, options, progress, permit)
    for warning in dict.fromkeys(warning for outcome in outcomes for warning in outcome.plan.warnings):
        module.warn(warning)
    return [pull.describe(repository, outcome) for outcome in outcomes]


def pulled_in_part(
    module: AnsibleModule,
    repository: Repository,
    requests: list[pull.Request],
    options: pull.Options,
    progress: Progress,
    error: EngineError,
) -> list[Report]:
    """What check mode says where the host lacks what pulling needs (``error``): the task that installs it was only
    foretold, too. Images that can be looked up all the same are, each alone. Of the others only names are known.
    """
    reports, standing, new = [], [], False
    # What these images have in common cannot be known.
    repository.foreseen = repository.foreseen._replace(complete=False)
    for request in requests:
        # A digest that is here already means the same image whoever would be asked.
        settled = isinstance(error, SkopeoMissing) and is_pinned(request)
        here = dataclasses.replace(options, policy=pull.MISSING, same_reference=False) if settled else options
        try:
            reports += pulled(module, repository, [request], here, progress)
        except LACKING as lacking:
            report = foretelling.foretell(repository, request)
            if report.result.previous_digest is None:
                new = True
            elif isinstance(lacking, SkopeoTooOld):
                raise  # what installs skopeo where there is none does not replace an old one
            else:
                standing.append(request.name)
            reports.append(report)
    if new:
        module.warn(f"{error} So check mode cannot tell what the images are, only that they would be pulled.")
    if standing:
        module.warn(
            f"{error} So check mode cannot tell whether {', '.join(standing)} would be another image than now, and "
            "takes it that they would."
        )
    return reports


def is_pinned(request: pull.Request) -> bool:
    """Whether the request names a digest."""
    return bool(request.digest) or (not request.local and bool(parse_reference(request.place or request.ref).digest))


def comes(module: AnsibleModule, repository: Repository, request: pull.Request) -> str | None:
    """The manifest of an image that an earlier task of a run in check mode would fetch into this repository, or into
    another one on the host that it comes from; empty if it is not known, None for every other image.
    """
    if request.local:
        return foretelling.comes(repository, request)
    reference = parse_reference(request.ref)
    if reference.transport != "composefs":
        return None
    known = told(module, reference.path)
    name = known.names.get(reference.tag)
    if name is not None:
        return None if name.absent else name.digest or ""
    return reference.digest if reference.digest in {one.digest for one in known.names.values()} else None


def sides(report: Report) -> dict:
    """What ``--diff`` shows for one image."""
    result = report.result

    def side(name: str | None, digest: str | None, layers: list[str]) -> dict:
        return {"name": name, "digest": digest, "layers": layers} if digest else {}

    return {
        "before_header": result.name,
        "after_header": result.name,
        "before": side(report.previous_name, result.previous_digest, report.previous_layers),
        "after": side(result.name, result.digest, [layer.digest for layer in result.layers or ()]),
    }


def known_before(repository: Repository, request: pull.Request) -> dict:
    """What a failure still tells of an image."""
    standing = Standing.of(repository, request)
    found = {"name": request.name, "ref": request.ref, "previous_digest": Foreseen.known(standing.digest)}
    return {key: value for key, value in found.items() if value}


def run(module: AnsibleModule, base: dict, life: watch.Life) -> dict:
    """Do what the task says; its result. ``base`` gets what is known if it fails."""
    params = module.params
    several = params["images"] is not None
    path = repository_path(module)
    base.update(repository=path)
    requests = requests_of(params, json.loads(os.environ.pop(watch.PLACES, "") or "{}"))

    # Only now, when the references proved to hold no password, they may be shown.
    def remember(facts: list[dict]) -> None:
        base.update({"images": facts} if several else facts[0])

    remember([{"name": request.name, "ref": request.ref} for request in requests])
    options = options_of(params, module.check_mode)
    with opened_repository(module, path, foreseen=True) as repository:
        remember([known_before(repository, request) for request in requests])
        if params["state"] == "present":
            reports = present(module, repository, requests, options, life)
        else:
            # "docker://x" and "x" are one default name; the one that is there goes.
            there = [dataclasses.replace(one, name=namerecords.spelled(repository, one.name)) for one in requests]
            reports = [pull.forget(repository, request, module.check_mode) for request in there]
            warn_of_mounts(module, repository, reports)
        # The empty repository that stands in for one to come says nothing about that one.
        verity = None if repository.place else repository.secure
        free, _inodes = repository.free_space()
    changed = any(report.changed for report in reports)
    images = [{**report.result.values(), "repository": path} for report in reports]
    result = {"changed": changed, "repository": path, "verity": verity, "free_bytes": free}
    for key in ("skopeo_version", "protocol_version"):
        result[key] = next((image[key] for image in images if image[key]), None)
    if changed:
        differences = [sides(report) for report in reports]
        result["diff"] = differences if len(differences) > 1 else differences[0]
        for image in images:
            if image["digest"] != image["previous_digest"] and not module.check_mode:
                module.log(f"{image['name']} in {path} is now {image['digest']} (was {image['previous_digest']})")
    if several:
        result["images"] = images
    else:
        result.update({**images[0], **result})
    return result


def warn_of_mounts(module: AnsibleModule, repository: Repository, reports: list[Report]) -> None:
    """Say of each image whose name goes where it is mounted: it stays there, and its bytes stay, too."""
    for image in [report.result for report in reports]:
        try:
            described = listing.describe_image(repository, image.previous_digest or "")
        except EngineError:
            continue
        paths = mountinfo.showing(described["image_ids"].values())
        if paths:
            module.warn(
                f"The image of the name {image.name} is mounted at {', '.join(paths)}. It stays there, and is kept "
                f"in {repository.path} until it is unmounted."
            )


# What the roles of the collection install, or would replace.
LACKING = (SkopeoMissing, SkopeoTooOld, MissingLibrary)
IMAGE = {
    "ref": {"type": "str"},
    "name": {"type": "str"},
    "tags": {"type": "list", "elements": "str"},
    "rename_from": {"type": "str"},
    "digest": {"type": "str"},
    "platform": {"type": "str"},
}
# Options that an image may have of its own; otherwise those of the task hold.
OWN = {"erofs": {"type": "bool"}, "bootable": {"type": "bool"}, "auth_file": {"type": "path"}}
LOGIN = {"username": {"type": "str"}, "password": {"type": "str", "no_log": True}}
ARGUMENT_SPEC = {
    **IMAGE,
    "images": {
        "type": "list",
        "elements": "dict",
        "options": {**IMAGE, **OWN, **LOGIN},
        "mutually_exclusive": [("auth_file", "username")],
        "required_together": [("username", "password")],
    },
    "repository": {"type": "path"},
    "unsafe_repository": {"type": "str", "choices": ["refuse", "accept"], "default": "refuse"},
    "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    "pull": {"type": "str", "choices": ["always", "missing", "newer"], "default": "always"},
    "auth_file": {"type": "path"},
    **LOGIN,
    "validate_certs": {"type": "bool"},
    "ca_cert_dir": {"type": "path"},
    "signature_policy": {"type": "path"},
    "unenforced_policy": {"type": "str", "choices": ["refuse", "ignore"], "default": "refuse"},
    "executable": {"type": "path", "default": "skopeo"},
    "tmpdir": {"type": "path"},
    "erofs": {"type": "bool", "default": True},
    "bootable": {"type": "bool", "default": False},
    "parallel": {"type": "int"},
    "timeout": {"type": "int", "default": 60},
    "retries": {"type": "int", "default": 3},
    "deltas": {"type": "list", "elements": "str", "default": ["auto"]},
    "max_size": {"type": "str"},
    "min_rate": {"type": "int", "default": 1024},
    "deadline": {"type": "int"},
    "peers": {"type": "list", "elements": "str", "default": []},
    "peer_ca_file": {"type": "path"},
    "peer_headers": {"type": "dict", "no_log": True},
    "progress_file": {"type": "path"},
    "remote_src": {"type": "bool", "default": True},
}


def written_out(images: object) -> object:
    """The images, those that are given as a bare reference as dictionaries."""
    if not isinstance(images, list):
        return images
    return [{"ref": item} if is_reference(item) else item for item in images]


def is_reference(item: object) -> bool:
    """Whether an item of the images is a text that can be shown: whatever else it holds may be a secret."""
    try:
        parse_reference(item if isinstance(item, str) else "")
    except InvalidReference:
        return False
    return True


def complaint_about(images: object) -> str:
    """What is wrong with the shape of ``images``, without a word of its content."""
    known = {**IMAGE, **OWN, **LOGIN}
    if images is None:
        return ""
    if not isinstance(images, list):
        return "It is not a list."
    for number, image in enumerate(images):
        if not isinstance(image, dict):
            return f"Item {number} is neither a dictionary nor a reference with its transport or registry."
        if any(key not in known for key in image):
            return f"Item {number} has keys other than {', '.join(known)}."
        if any(isinstance(value, (list, dict)) for key, value in image.items() if key != "tags"):
            return f"Item {number} has a value that is no text."
    return ""


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule, ("ref",), "images", written_out, complaint_about)(
        argument_spec=ARGUMENT_SPEC,
        mutually_exclusive=[
            ("ref", "images"),
            ("name", "images"),
            ("digest", "images"),
            ("platform", "images"),
            ("tags", "images"),
            ("rename_from", "images"),
            ("auth_file", "username"),
        ],
        required_one_of=[("ref", "name", "images")],
        required_together=[("username", "password")],
        supports_check_mode=True,
    )
    if module.complaint:
        module.fail_json(module.complaint, error=InvalidOption.code)
    base: dict = {"changed": False}
    # The action plugin passes through the environment what concerns only itself and this module.
    job, token = os.environ.pop(watch.COLLECT, ""), os.environ.pop(watch.WATCH, "")
    if job:
        run_module(module, lambda module: watch.collect(job))
        return
    watch.run(token, lambda life: run_module(module, lambda module: run(module, base, life), base, effort=True))


if __name__ == "__main__":
    main()
