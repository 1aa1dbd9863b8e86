# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Ways to break what the Molecule scenarios stand for, one promise at a time, and the test that has to notice each.

``dev/molecule --broken`` puts ``new`` in the place of ``old`` in a copy of the collection, runs the scenario to its
tests, whatever the steps before say, and wants ``noticed_by`` among the tests that fail.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

ENGINE = "plugins/module_utils/"
IMAGE = "plugins/modules/composefs_image.py"


class Breakage(NamedTuple):
    """One broken promise."""

    scenario: str
    promise: str
    file: str
    old: str
    new: str
    noticed_by: str

    def apply(self, collection: pathlib.Path) -> None:
        """Break a copy of the collection. ValueError if the code is not what it was when this was written."""
        path = collection / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.file} has {self.old!r} {text.count(self.old)} times; tests/hosts/broken.py has to follow it"
            )
        path.write_text(text.replace(self.old, self.new))


BREAKAGES = (
    Breakage(
        "upgrade",
        "a repository whose upgrade was only foretold is met as upgraded",
        ENGINE + "module.py",
        'if will_be is not None and will_be["upgraded"] else None',
        "if False else None",
        "test_check_mode_foretold_what_the_run_did",
    ),
    Breakage(
        "deltas",
        "a delta that is published is used",
        ENGINE + "pull/pull.py",
        "    if not options.deltas or not any(plan.missing() for plan in plans):\n",
        "    if True:\n",
        "test_an_update_costs_the_bytes_of_the_delta_as_foretold",
    ),
    Breakage(
        "peers",
        "a peer that failed is left out, and the next one is asked",
        ENGINE + "pull/fetch.py",
        "        *before, last = _ways(job)\n",
        "        before, last = [], _ways(job)[-1]\n",
        "test_a_first_image_comes_from_a_peer_alone",
    ),
    Breakage(
        "rollout",
        "a bad image reaches canaries only",
        "plugins/plugin_utils/rollout.py",
        'return keeps_it(host) and not result(host, "rollout_failure")',
        "return bool(host)",
        "test_a_bad_image_reaches_canaries_only_and_they_go_back",
    ),
    Breakage(
        "rollout",
        "sshd closed by the image is noticed",
        "roles/rollout/tasks/wave.yml",
        "ansible.builtin.meta: reset_connection",
        "ansible.builtin.meta: noop",
        "test_an_image_that_closes_sshd_is_noticed_and_the_hosts_open_it_again",
    ),
    Breakage(
        "rollout",
        "hosts go back by themselves when the controller dies",
        ENGINE + "operations/activation.py",
        "if wanted.confirm_within:\n            program",
        "if not wanted.path:\n            program",
        "test_hosts_settle_by_themselves_when_the_controller_dies",
    ),
    Breakage(
        "rollout",
        "each layer leaves the origin once for a site",
        "roles/rollout/tasks/prefetch.yml",
        "when: rollout_mirror | default('', true) != '' and rollout_at_registry",
        "when: false",
        "test_each_layer_left_the_origin_once_for_a_site",
    ),
    Breakage(
        "rollout",
        "hosts that cannot take part are refused before anything moves",
        "roles/rollout/tasks/write_plan.yml",
        "that: __rollout_refusals | length == 0",
        "that: __rollout_refusals is defined",
        "test_what_cannot_be_meant_is_refused_before_anything_moves",
    ),
    Breakage(
        "rollout",
        "hosts of a site take the delta that its seed made",
        "roles/rollout/tasks/prefetch.yml",
        'deltas: "{{ __rollout_deltas or omit }}"',
        "deltas: []",
        "test_hosts_of_a_site_take_the_delta_that_its_seed_made",
    ),
    Breakage(
        "default",
        "check mode foretells the change",
        IMAGE,
        '"changed": changed',
        '"changed": changed and not module.check_mode',
        "test_check_mode_on_a_fresh_host_foretells_what_changes",
    ),
    Breakage(
        "default",
        "a second run changes nothing",
        IMAGE,
        '"changed": changed',
        '"changed": True',
        "test_a_further_run_changes_nothing",
    ),
    Breakage(
        "default",
        "objects hold what their names say",
        ENGINE + "store/objects.py",
        "written = os.write(draft.fd, data)",
        'written = os.write(draft.fd, bytes(data[:-1]) + b"?")',
        "test_the_repository_holds_the_images_and_nothing_is_damaged",
    ),
    Breakage(
        "default", "pulls are in the system log", IMAGE, "module.log(f", "str(f", "test_the_pulls_are_in_the_system_log"
    ),
    Breakage(
        "registry",
        "the password is on no command line",
        ENGINE + "source/skopeo.py",
        'argv += [f"--{side}authfile", f"/proc/self/fd/{fd}"]',
        'argv += ["--creds", f"{options.username}:{options.password}"]',
        "test_no_process_showed_the_password",
    ),
    Breakage(
        "registry",
        "the password is in no result",
        IMAGE,
        '"password": {"type": "str", "no_log": True}',
        '"password": {"type": "str", "no_log": False}',
        "test_the_password_is_in_no_result_log_or_diff",
    ),
    Breakage(
        "registry",
        "every mistake has its code",
        ENGINE + "errors.py",
        'code = "tls_failed"',
        'code = "failed"',
        "test_what_goes_wrong_has_its_code",
    ),
    Breakage(
        "quickstart",
        "what README and quick start say works",
        "roles/host/tasks/main.yml",
        'repository_verity: "{{ host_verity }}"',
        "repository_verity: required",
        "test_the_readme_works_as_it_is_written",
    ),
    Breakage(
        "operator",
        "what is mounted is kept in the repository",
        ENGINE + "operations/keeping.py",
        "        name_like(repository, names.pin, split_pin(names.pin)[0], manifest)\n",
        "        pass\n",
        "test_the_first_version_is_mounted_and_services_know",
    ),
    Breakage(
        "life",
        "what is damaged is kept until the repository is pruned",
        ENGINE + "operations/repair.py",
        "                checks.keep_copy(repository, digest)\n",
        "                pass\n",
        "test_what_nobody_needs_goes_as_foretold_and_what_is_mounted_stays",
    ),
    Breakage(
        "transports",
        "what is there is not fetched again",
        ENGINE + "store/proofs.py",
        "    if stored is None or not repository.objects.contains(stored):\n",
        "    if True:\n",
        "test_a_docker_archive_has_the_same_layers",
    ),
    Breakage(
        "transports",
        "what cannot be reached is told as such",
        ENGINE + "errors.py",
        'code = "registry_unreachable"',
        'code = "failed"',
        "test_what_cannot_be_reached_has_its_code",
    ),
    Breakage(
        "hostile",
        "planted links are not followed",
        ENGINE + "host/beneath.py",
        "_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC",
        "_DIRECTORY = os.O_DIRECTORY | os.O_CLOEXEC",
        "test_planted_links_lead_root_nowhere",
    ),
    Breakage(
        "hostile",
        "a repository of somebody else is refused",
        ENGINE + "host/beneath.py",
        "if self.fault and not self.accept:",
        "if False:",
        "test_a_repository_of_somebody_else_is_refused",
    ),
    Breakage(
        "hostile",
        "mounts accept no repository that others can change",
        ENGINE + "module.py",
        'module.params.get("unsafe_repository", beneath.REFUSE)',
        'module.params.get("unsafe_repository", beneath.ACCEPT)',
        "test_nothing_is_mounted_from_a_repository_of_somebody_else",
    ),
    Breakage(
        "hostile",
        "nobody waits for a FIFO",
        ENGINE + "host/files.py",
        "    if not stat.S_ISREG(os.fstat(fd).st_mode):",
        "    if False:",
        "test_a_fifo_is_not_waited_for",
    ),
    Breakage(
        "hostile",
        "a link in the place of a file is replaced",
        ENGINE + "operations/dump.py",
        "if not stat.S_ISLNK(has.st_mode):",
        "if True:",
        "test_files_in_tmp_replace_planted_links",
    ),
    Breakage(
        "hostile",
        "others can neither read nor lock a repository",
        ENGINE + "store/create.py",
        "DIRECTORY_MODE = 0o700",
        "DIRECTORY_MODE = 0o755",
        "test_others_can_neither_read_nor_lock_the_repository_of_root",
    ),
    Breakage(
        "hostile",
        "changes are mounted only from where nobody else can make them",
        ENGINE + "host/mountcalls.py",
        'fault = safety.fault(path) if path else ""',
        'fault = ""',
        "test_no_changes_are_mounted_that_somebody_else_can_make",
    ),
    Breakage(
        "unprivileged",
        "nobody else gets into the repository",
        ENGINE + "store/create.py",
        "DIRECTORY_MODE = 0o700",
        "DIRECTORY_MODE = 0o755",
        "test_all_of_it_belongs_to_the_user_and_nobody_else_gets_in",
    ),
    Breakage(
        "unprivileged",
        "what is not allowed is said",
        ENGINE + "errors.py",
        'code = "permission_denied"',
        'code = "io_error"',
        "test_what_is_not_allowed_is_said",
    ),
    Breakage(
        "faults",
        "a job without a fresh sign of life gives nothing a name",
        ENGINE + "host/watch.py",
        "            if self.silence() < FRESH:\n",
        "            if self.silence() < 100 * FRESH:\n",
        "test_a_watched_pull_names_nothing_where_nobody_gives_a_sign_any_more",
    ),
    Breakage(
        "faults",
        "a job without a sign of life ends",
        ENGINE + "host/watch.py",
        "or self.silence() > PATIENCE\n",
        "or self.silence() > 100 * PATIENCE\n",
        "test_a_job_that_nobody_looks_after_ends_and_leaves_nothing",
    ),
    Breakage(
        "faults",
        "a watched pull outlives a connection that comes back",
        "plugins/action/composefs_image.py",
        "if time.monotonic() - heard >= PATIENCE:",
        "if time.monotonic() - heard >= 0:",
        "test_a_watched_pull_goes_on_when_its_connection_comes_back",
    ),
    Breakage(
        "faults",
        "a full disk is told as such",
        ENGINE + "errors.py",
        'code = "no_space"',
        'code = "io_error"',
        "test_a_full_disk_is_told_as_such",
    ),
    Breakage(
        "faults",
        "no temporary file is left",
        ENGINE + "store/objects.py",
        "self._tmpfile = True",
        "self._tmpfile = False",
        "test_no_temporary_file_and_no_process_is_left",
    ),
    Breakage(
        "faults",
        "the next run looks after what was left unfinished",
        ENGINE + "store/marks.py",
        "                    os.unlink(name, dir_fd=directory)\n            finally",
        "                    pass\n            finally",
        "test_everything_is_whole_in_the_end",
    ),
    Breakage(
        "upgrade",
        "streams in the older format are read",
        ENGINE + "formats/splitstream.py",
        "elif header[18:29] == _MAGIC:",
        "elif False:",
        "test_what_was_there_is_not_pulled_again",
    ),
    Breakage(
        "upgrade",
        "what is there is not written anew",
        ENGINE + "store/create.py",
        "_try_out(place.root.fd, place.path, algorithm, PREFERRED)",
        'os.chmod(f"{place.path}/objects/{_object_names(place.root)[0]}", 0o600)',
        "test_nothing_that_was_there_is_changed_or_gone",
    ),
    Breakage(
        "example",
        "a pull that is done is not marked as unfinished",
        ENGINE + "store/marks.py",
        "os.unlink(self._name, dir_fd=self._directory)",
        "pass",
        "test_every_image_is_there_and_whole",
    ),
    Breakage(
        "verity",
        "objects are sealed",
        ENGINE + "store/objects.py",
        "            if self._seal:\n                self._seal_draft(draft, digest)\n            there = self._place",
        "            there = self._place",
        "test_every_object_is_measured_by_the_kernel",
    ),
    Breakage(
        "verity",
        "mounts insist on fs-verity",
        ENGINE + "host/mountcalls.py",
        'context.string("verity", "require")',
        "pass",
        "test_the_image_is_mounted_and_the_kernel_insists_on_fs_verity",
    ),
    Breakage(
        "verity",
        "a file system without fs-verity is refused",
        ENGINE + "store/create.py",
        "if lack is not None and verity == REQUIRED:",
        "if False:",
        "test_a_file_system_without_fs_verity_is_refused_at_preparation",
    ),
    Breakage(
        "verity",
        "a persistent mount is back after a reboot",
        ENGINE + "operations/bootmount.py",
        'os.symlink(f"{places.units}/{name}", link)',
        "pass",
        "test_the_persistent_mount_comes_back_after_a_reboot",
    ),
    Breakage(
        "confirm",
        "what nobody confirms is taken back",
        ENGINE + "host/deadman.py",
        '[f"--on-active={seconds}"',
        '["--on-active=86400"',
        "test_what_nobody_confirms_is_taken_back_by_a_timer_of_systemd",
    ),
    Breakage(
        "confirm",
        "a boot takes what was confirmed",
        ENGINE + "operations/deployment.py",
        "wish_of(found.mount, found.current.image_id, path))",
        "wish_of(found.mount, (found.pending or found.current).image_id, path))",
        "test_a_power_cut_while_an_image_is_on_trial_ends_the_trial",
    ),
    Breakage(
        "power",
        "what has a name is on the disk",
        ENGINE + "host/filesystem.py",
        "if library.syncfs(fd):",
        "if False:",
        "test_nothing_that_has_a_name_is_damaged_by_a_power_cut",
    ),
)
