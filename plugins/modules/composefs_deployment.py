#!/usr/bin/python
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: composefs_deployment
short_description: Try an image at a mount point, and keep it or go back
version_added: 0.2.0
author:
  - composefs.oci contributors (@composefs)
description:
  - Puts an image in the place of another one on trial. Unless it is confirmed in time the host takes it back by itself,
    also if the controller died, the network is gone, or the host rebooted.
  - While an image is on trial nothing has changed that survives a reboot. Confirming is one atomic write of a small
    journal on the host, C(/var/lib/composefs-oci/deployments/), one file for each O(path).
  - Nothing is fetched. M(composefs.oci.composefs_image) does that before, best under the name C(NAME@DIGEST), a pin,
    which no later pull moves and which this module takes over.
  - A mount of M(composefs.oci.composefs_mount) is a deployment that is confirmed at once. Both modules may be used for
    the same O(path), one after the other.
extends_documentation_fragment:
  - composefs.oci.attributes
  - composefs.oci.attributes.actiongroup_composefs
attributes:
  check_mode:
    support: full
    details:
      - The image is looked up and measured in check mode, too. What only the kernel, a timer or O(reload) can tell is
        not foreseen.
      - An image that an earlier task of the same run in check mode would have fetched counts as there.
      - Where the library that reads images is still to be installed, which an earlier task may only foretell, a change
        is foretold with V(null) for what is not known, with a warning.
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  path:
    description:
      - Where the image is mounted. The directory is made with the mode V(0755) if it does not exist.
    type: path
    required: true
  name:
    description:
      - The name of the image, without a digest. When it is confirmed this name is made to mean it.
      - The default is the name that the journal of O(path) has.
    type: str
  digest:
    description:
      - The digest of the image, V(sha256:) and 64 hexadecimal digits, of its manifest or of the index that was pulled
        under the pin C(NAME@DIGEST).
      - With O(state=activated) the default is what O(name) means now. With O(state=confirmed) it says which image is
        meant; another one is not confirmed.
    type: str
  repository:
    description:
      - The directory of the composefs repository.
      - The default is the one that the journal of O(path) has, and without a journal that of C(cfsctl),
        V(/sysroot/composefs) for root.
    type: path
  state:
    description:
      - V(activated) mounts the image in the place of what is mounted, without a gap, after a timer was set that takes
        it back. Nothing changes if it is current, or on trial for the same O(rollout).
      - V(confirmed) makes the image on trial the current one. It fails with RV(error=reverted) if it was taken back.
      - V(reverted) takes back what is on trial. Nothing changes if nothing is, or if it is on trial for another
        O(rollout).
      - V(absent) unmounts, and removes unit, journal, timer, and the names that keep images for O(path).
    type: str
    choices: [activated, confirmed, reverted, absent]
    default: activated
  confirm_within:
    description:
      - After how many seconds an image that is not confirmed is taken back.
      - V(0) confirms it at once, without a timer, also if it is on trial for the same O(rollout) already.
    type: int
    default: 300
  reload:
    description:
      - A command, as a list of words, that the host runs after every change of what is mounted, in both directions.
      - If it fails after an activation, or takes longer than five minutes, the image is taken back, and the task fails
        with RV(error=reverted).
    type: list
    elements: str
    default: []
  rollout:
    description:
      - Whose trial this is. While one has an image on trial, others fail with RV(error=busy).
    type: str
  who:
    description:
      - Who does this, for the journal and for messages. The default is the user on the host.
    type: str
  reason:
    description:
      - Why an image is taken back, for the journal.
    type: str
  keep_previous:
    description:
      - How many of the images that were current before are kept for going back.
    type: int
    default: 1
  verity:
    description:
      - As in M(composefs.oci.composefs_mount). The default is how O(path) is mounted now.
    type: str
    choices: [required, preferred, disabled]
  opts:
    description:
      - Mount options as in M(composefs.oci.composefs_mount). The default is how O(path) is mounted now.
    type: list
    elements: str
  persistent:
    description:
      - Whether the mount shall come back when the host boots. Set it with O(state=activated). The unit of systemd is
        written when the image is confirmed. The default is to leave it as it is.
    type: bool
notes:
  - Mounting needs root, more exactly the capability C(CAP_SYS_ADMIN) in the initial user namespace.
  - Where systemd runs the timer is one of systemd, elsewhere a detached process. Neither survives a reboot, and
    neither has to; a boot ends every trial.
seealso:
  - module: composefs.oci.composefs_deployment_info
  - module: composefs.oci.composefs_image
  - module: composefs.oci.composefs_mount
"""

EXAMPLES = r"""
- name: Fetch the new version ahead, under a name that nothing moves
  composefs.oci.composefs_image:
    ref: docker://registry.example.com/app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
    name: app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd

- name: Try it, keep it if it answers, go back if it does not
  vars:
    new: sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
  block:
    - name: Activate
      composefs.oci.composefs_deployment:
        path: /srv/app
        name: app
        digest: "{{ new }}"
        confirm_within: 120
        reload: [systemctl, try-restart, app.service]
        persistent: true

    - name: See whether it works
      ansible.builtin.uri:
        url: http://localhost:8080/health
      register: healthy
      retries: 10
      delay: 2
      until: healthy is success

    - name: Confirm
      composefs.oci.composefs_deployment:
        path: /srv/app
        digest: "{{ new }}"
        state: confirmed
  rescue:
    - name: Go back at once instead of after 120 seconds
      composefs.oci.composefs_deployment:
        path: /srv/app
        state: reverted
        reason: health

- name: Take it away
  composefs.oci.composefs_deployment:
    path: /srv/app
    state: absent
"""

RETURN = r"""
path:
  description: The absolute path of the mount.
  returned: success, and on failure as far as it is known
  type: str
  sample: /srv/app
repository:
  description: The path of the repository. V(null) if neither a journal nor the task names one that is needed.
  returned: success, and on failure as far as it is known
  type: str
  sample: /sysroot/composefs
name:
  description: The name of the image.
  returned: success, and on failure as far as it is known
  type: str
  sample: app
digest:
  description: The digest of the manifest of what is mounted at the end of the task, or in check mode would be.
  returned: success, and on failure as far as it is known
  type: str
  sample: sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd
image_id:
  description: The id of what is mounted at the end of the task, or in check mode would be. V(null) if nothing is.
  returned: success, and on failure as far as it is known
  type: str
  sample: 14a26c957c84f6eb774b91205476adc13196c7c33b9dd97d08d43725ecb90b63
previous_digest:
  description: The digest of the manifest that was current at the beginning of the task. V(null) if it is not known.
  returned: success, and on failure as far as it is known
  type: str
  sample: sha256:96b3e33df0bda22bdc9e4efcf4ec7c0a1e9aa0b1a3a3f8d3bd4d3c8c5f0e2ab4
previous_image_id:
  description: The image that was mounted at the beginning of the task. V(null) if none was.
  returned: success, and on failure as far as it is known
  type: str
  sample: d420e43bad636447d75750346d609a28b041a776d8232a701f5a238fefc747f4
state:
  description:
    - What became of it, V(activated), V(confirmed), V(reverted) or V(absent). After O(state=reverted) it is
      V(confirmed) if nothing was on trial.
  returned: success, and on failure as far as it is known
  type: str
  sample: activated
deadline:
  description: Until when the image has to be confirmed, in UTC. V(null) if none is on trial.
  returned: success, and on failure as far as it is known
  type: str
  sample: "2026-11-27T14:45:07Z"
rollout:
  description: The rollout whose image is on trial or current.
  returned: success, and on failure as far as it is known
  type: str
  sample: app-20261127-1437
reason:
  description: Why an image was taken back.
  returned: success, and on failure as far as it is known
  type: str
  sample: health
seconds:
  description: How long the image was on trial. V(null) unless this task ended a trial.
  returned: success, and on failure as far as it is known
  type: float
  sample: 4.9
time:
  description: When this task changed what is mounted or what is kept, in UTC. V(null) if it changed nothing.
  returned: success, and on failure as far as it is known
  type: str
  version_added: 0.2.0
  sample: "2026-11-27T14:40:07Z"
took:
  description: How long the task took on the host, in seconds.
  returned: success
  type: float
  version_added: 0.2.0
  sample: 0.31
unit:
  description: The unit of systemd that brings the mount back at boot. V(null) if there is none.
  returned: success, and on failure as far as it is known
  type: str
  sample: composefs-oci-srv-app.service
pins:
  description: The names in the repository that keep images for this mount.
  returned: success, and on failure as far as it is known
  type: list
  elements: str
  sample: ["app@sha256:130e7e26bd3b8ae9ba3ea4a3ad5b7e8f5b9f0d1a5d6c1c3c0c8c2f37c9c0a7fd"]
error:
  description:
    - What went wrong, as a stable code for conditions in playbooks. The collection's documentation lists all codes.
    - For example V(busy), V(image_not_found), V(reverted), V(incompatible_journal), V(mount_failed) or
      V(permission_denied).
  returned: on failure
  type: str
  sample: busy
"""

import os
import time
from typing import Any

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidOption, MissingLibrary, doing
from ansible_collections.composefs.oci.plugins.module_utils.host import beneath, commands, mountinfo
from ansible_collections.composefs.oci.plugins.module_utils.operations import (
    activation,
    bootmount,
    deployment,
    journal,
    lastingmount,
    mounting,
)
from ansible_collections.composefs.oci.plugins.module_utils.module import (
    foretells,
    guarded,
    Foretold,
    mount_point,
    opened_repository,
    operator,
    repository_path,
    run_module,
    told,
)
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

ARGUMENT_SPEC = {
    "path": {"type": "path", "required": True},
    "name": {"type": "str"},
    "digest": {"type": "str"},
    "repository": {"type": "path"},
    "state": {
        "type": "str",
        "choices": ["activated", "confirmed", "reverted", "absent"],
        "default": "activated",
    },
    "confirm_within": {"type": "int", "default": 300},
    "reload": {"type": "list", "elements": "str", "default": []},
    "rollout": {"type": "str"},
    "who": {"type": "str"},
    "reason": {"type": "str"},
    "keep_previous": {"type": "int", "default": 1},
    "verity": {"type": "str", "choices": ["required", "preferred", "disabled"]},
    "opts": {"type": "list", "elements": "str"},
    "persistent": {"type": "bool"},
}


def tell(base: dict[str, Any], found: journal.Journal | None, real: str, places: journal.Places) -> None:
    """Note in ``base`` what the journal says and what is mounted, so that also a failure tells it."""
    there = deployment.shown(real)
    trial = found.pending if found else None
    current = found.current if found else None
    base["image_id"] = there.image_id if there else None
    for one in (trial, current):
        if one is not None and one.image_id == base["image_id"]:
            base["digest"] = one.digest
            break
    else:
        base["digest"] = None
    base.update(
        name=(trial and trial.name) or (found.name if found else None),
        deadline=trial.deadline if trial else None,
        rollout=trial.rollout if trial else current.rollout if current else None,
        pins=list(found.pins) if found else [],
        unit=bootmount.unit_name(real) if bootmount.current(real, places) is not None else None,
        state=activation.ACTIVATED if trial else activation.CONFIRMED if current else activation.ABSENT,
    )


def check_options(params: dict[str, Any]) -> None:
    """InvalidOption for numbers that mean nothing."""
    for option in ("confirm_within", "keep_previous"):
        if params[option] < 0:
            raise InvalidOption(f"{option} is {params[option]}, and cannot be less than 0.", "Correct it.")


def run(module: AnsibleModule, base: dict[str, Any]) -> dict[str, Any]:
    """Do what the task says; ``base`` gets what a failure should still tell."""
    params = module.params
    check = module.check_mode
    begun = time.monotonic()
    path = base["path"] = mount_point(params["path"])
    with doing(f"Looking for the mount point {path}"):
        # Resolved once, here; whoever could put a link in its place must be root or the user that runs this.
        beneath.check_way(path)
    real = os.path.realpath(path)
    places = bootmount.HOST
    check_options(params)

    host = deployment.Host(places, commands.run, module.warn)
    before = journal.read(real, places)
    # The repository of the deployment before, unless the task names one.
    staying = before.repository if before is not None and params["repository"] is None else ""
    base["repository"] = staying or repository_path(module)
    tell(base, before, real, places)
    old = dict(base)
    base.update(previous_image_id=base["image_id"], previous_digest=None)
    if before is not None and before.current is not None:
        base["previous_digest"] = before.current.digest
    who = params["who"] or operator()
    state = params["state"]
    known = told(module, base["repository"]).names
    by_then = next((one for one in told(module).mounts if one["path"] == real), None)
    if by_then is not None:
        base["previous_image_id"] = None if by_then["absent"] else by_then["image_id"]
        if by_then["state"] != activation.ACTIVATED:
            base["previous_digest"] = None if by_then["absent"] else by_then["digest"]
    if by_then is not None and after_others(params, base, before, by_then, known):
        return {}
    if state == activation.ACTIVATED:
        settled = activated(module, base, real, host, who, before, known)
        if settled is None:
            return {}
        result = settled
    elif state == activation.CONFIRMED:
        result = activation.confirm(
            real, host, params["digest"], params["rollout"], params["keep_previous"], who, check
        )
    elif state == activation.REVERTED:
        reason = params["reason"] or "asked for"
        result = activation.take_back(real, host, params["rollout"], reason, who, check)
    else:
        result = lastingmount.have_unmounted(real, host, check, params["rollout"])
    base["changed"] = result.changed
    if check:
        at_once = state == activation.ACTIVATED and not params["confirm_within"]
        foretell(base, result, activation.CONFIRMED if at_once else state)
    else:
        tell(base, result.found, real, places)
    if state == activation.REVERTED and result.changed:
        base["state"] = activation.REVERTED
        base["reason"] = params["reason"] or "asked for"
    if result.event is not None:
        base["seconds"] = result.event.seconds
    base["took"] = round(time.monotonic() - begun, 2)
    if result.changed and not check:
        base["time"] = journal.stamp()
        module.log(f"At {path} the image {base['image_id']} is {base['state']} (was {base['previous_image_id']})")
    keys = ("image_id", "digest", "state", "rollout", "unit")
    diff = {"before": {key: old[key] for key in keys}, "after": {key: base[key] for key in keys}}
    return {"diff": diff} if module._diff else {}


def activated(
    module: AnsibleModule,
    base: dict[str, Any],
    real: str,
    host: deployment.Host,
    who: str,
    before: journal.Journal | None,
    known: dict[str, Foretold],
) -> lastingmount.Result | None:
    """Activate what the task names; None, with ``base`` complete, if an earlier task of a run in check mode would bring
    it first, or a library to read it.
    """
    params = module.params
    check = module.check_mode
    wanted = activation.Deployment(
        real,
        params["name"],
        params["digest"],
        params["confirm_within"],
        tuple(params["reload"]),
        params["rollout"],
        who,
        params["keep_previous"],
        params["verity"],
        None if params["opts"] is None else tuple(params["opts"]),
        params["persistent"],
    )
    name = wanted.name or (before.name if before else None)
    with opened_repository(module, base["repository"], foreseen=True) as repository:
        exists = repository.path == base["repository"]
        if not check or not will_be_there(repository, known, name, wanted.digest, exists):
            try:
                return activation.activate(repository, wanted, host, check)
            except MissingLibrary as error:
                if not foretells(module):
                    raise
                module.warn(f"{error} So check mode cannot tell whether the image is another one than now.")
        real = os.path.realpath(base["path"])
        mounting.require_place(base["repository"], real, None, None, mountinfo.at(real))
        if wanted.persistent:
            bootmount.require_systemd(bootmount.HOST)
        then = known.get(name or "")
        base.update(
            changed=True,
            image_id=None,
            name=name,
            digest=wanted.digest or (then.digest if then else None),
            state=activation.ACTIVATED if wanted.confirm_within else activation.CONFIRMED,
            rollout=wanted.rollout,
            pins=None,
        )
        return None


def after_others(
    params: dict[str, Any],
    base: dict[str, Any],
    before: journal.Journal | None,
    by_then: dict[str, Any],
    known: dict[str, Foretold],
) -> bool:
    """Foretell what comes after what earlier tasks of a run in check mode would mount at the path; False if that makes
    no difference.
    """
    state, digest = params["state"], by_then["digest"]
    on_trial = by_then["state"] == activation.ACTIVATED
    image = {key: by_then[key] for key in ("name", "digest", "image_id")}
    if state == activation.ABSENT:
        base.update(gone(), changed=not by_then["absent"])
        return True
    if by_then["absent"]:
        return False
    if state == activation.CONFIRMED:
        if params["digest"] is not None and digest is not None and params["digest"] not in (digest, by_then["asked"]):
            return False
        base.update(changed=on_trial, state=state, deadline=None, pins=None, **image)
    elif state == activation.REVERTED:
        current = before.current if before is not None else None
        base.update(changed=on_trial, deadline=None, pins=None, image_id=current.image_id if current else None)
        base.update(digest=current.digest if current else None, state=activation.REVERTED if on_trial else state)
    else:
        then = known.get(params["name"] or by_then["name"] or "")
        wanted = params["digest"] or (then.digest if then is not None else None)
        if digest is None or wanted != digest:
            return False
        base.update(changed=False, state=by_then["state"] or activation.CONFIRMED, deadline=None, pins=None, **image)
    return True


def will_be_there(
    repository: Repository, known: dict[str, Foretold], name: str | None, digest: str | None, exists: bool
) -> bool:
    """Whether the image is one that only an earlier task of this run in check mode would have fetched."""
    if not exists:
        return True  # opened_repository() has warned already
    if digest is None:
        then = known.get(name or "")
        if then is None or then.absent:
            return False
        return then.digest is None or repository.stream(f"oci-manifest-{then.digest}") is None
    pinned_manifest = repository.tag_digest(f"{name}@{digest}") or digest
    if repository.stream(f"oci-manifest-{pinned_manifest}") is not None:
        return False
    pinned = known.get(f"{name}@{digest}")
    return (pinned is not None and not pinned.absent) or repository.foreseen.brings(digest)


def gone() -> dict[str, Any]:
    """What check mode tells of a mount point where nothing will be."""
    nothing = dict.fromkeys(("name", "image_id", "digest", "rollout", "unit", "deadline"))
    return {"state": activation.ABSENT, **nothing, "pins": []}


def foretell(base: dict[str, Any], result: lastingmount.Result, state: str) -> None:
    """What the task would leave, in check mode; what only the run can tell is null."""
    found = result.found
    trial = found.pending if found else None
    if not result.changed or found is None:
        if state == activation.ABSENT:
            base.update(gone())
        return
    base.update(state=state, deadline=None)
    if trial is not None and state in (activation.ACTIVATED, activation.CONFIRMED):
        base.update(image_id=trial.image_id, digest=trial.digest, rollout=trial.rollout, name=trial.name)
    if trial is not None and state == activation.REVERTED:
        current = found.current
        base.update(image_id=trial.origin, digest=current.digest if current else None)


def main() -> None:
    """Entry point of the module."""
    module = guarded(AnsibleModule)(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    keys = ("path", "repository", "name", "digest", "image_id", "previous_digest", "previous_image_id", "state")
    more = ("deadline", "rollout", "reason", "seconds", "time", "took", "unit")
    base: dict[str, Any] = {"changed": False, "pins": [], **dict.fromkeys((*keys, *more))}
    run_module(module, lambda module: run(module, base), base)


if __name__ == "__main__":
    main()
