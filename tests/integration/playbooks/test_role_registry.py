# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The roles registry and host: what they write, what they refuse to write, and what skopeo makes of it."""

from __future__ import annotations

import base64
import json
import os
import pathlib
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
from aptroot import Unavailable
from ociimage import Layout
from registry import Registry
from trixie_skopeo import trixie_skopeo

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

SECRET = "se:cret w0rd"
ROLE = """
- name: Run the role
  ansible.builtin.include_role:
    name: composefs.oci.registry
"""


class Configured:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.directory = site.directory / "containers"
        self.auth_file = self.directory / "auth.json"

    def run(self, *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
        return self.site.run(
            ROLE,
            "--diff",
            *arguments,
            registry_directory=str(self.directory),
            registry_auth_file=str(self.auth_file),
            **variables,
        )

    def ok(self, *arguments: str, **variables: Any) -> str:
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def changed(self, *arguments: str, **variables: Any) -> int:
        return int(self.ok(*arguments, **variables).rpartition("changed=")[2].split()[0])


@pytest.fixture
def containers(site: Site) -> Configured:
    return Configured(site)


def test_without_a_variable_nothing_is_touched(containers: Configured) -> None:
    assert containers.changed() == 0 and not containers.directory.exists()


def test_credentials_are_merged_and_never_shown(containers: Configured) -> None:
    containers.directory.mkdir()
    others = {"auths": {"other.example.com": {"auth": "b3RoZXI="}, "old.example.com": {}}, "credHelpers": {"x": "y"}}
    containers.auth_file.write_text(json.dumps(others))
    variables: dict[str, Any] = {
        "registry_auths": {
            "registry.example.com/team": {"username": "reader", "password": SECRET},
            "registry.example.com": {"username": "all", "password": "x"},
        },
        "registry_auths_absent": ["old.example.com"],
    }
    encoded = base64.b64encode(f"reader:{SECRET}".encode()).decode()
    said = containers.ok("-vvv", **variables)
    # The command line of the test itself holds the variables.
    shown = "\n".join(line for line in said.splitlines() if "extra-vars" not in line)
    assert SECRET not in shown and encoded not in shown and "b3RoZXI=" not in shown
    written = json.loads(containers.auth_file.read_text())
    assert written["auths"]["registry.example.com/team"] == {"auth": encoded}
    assert written["auths"]["other.example.com"] == {"auth": "b3RoZXI="} and written["credHelpers"] == {"x": "y"}
    assert sorted(written["auths"]) == ["other.example.com", "registry.example.com", "registry.example.com/team"]
    assert containers.auth_file.stat().st_mode & 0o777 == 0o600
    assert containers.changed(**variables) == 0


def test_certificates_lie_where_skopeo_looks_and_keys_are_private(containers: Configured) -> None:
    variables = {
        "registry_certificates": {"r.example.com:5000": {"ca": "CA", "client_cert": "CERT", "client_key": "KEYKEYKEY"}}
    }
    assert "KEYKEYKEY" not in "\n".join(
        line for line in containers.ok(**variables).splitlines() if "extra-vars" not in line
    )
    place = containers.directory / "certs.d" / "r.example.com:5000"
    assert {path.name: path.read_text() for path in place.iterdir()} == {
        "ca.crt": "CA\n",
        "client.cert": "CERT\n",
        "client.key": "KEYKEYKEY\n",
    }
    assert (place / "client.key").stat().st_mode & 0o777 == 0o600
    assert containers.changed(**variables) == 0


REGISTRIES: dict[str, Any] = {
    "registry_search": ["registry.example.com"],
    "registry_aliases": {"app": "registry.example.com/team/app"},
    "registry_registries": [
        {"prefix": "docker.io", "mirrors": [{"location": "mirror.example.com/docker", "pull_from": "digest-only"}]},
        {"prefix": "bad.example.com", "blocked": True},
    ],
}


def test_registries_are_described_as_skopeo_reads_them(containers: Configured) -> None:
    containers.ok(**REGISTRIES)
    text = (containers.directory / "registries.conf.d/50-composefs-oci.conf").read_text()
    try:
        import tomllib
    except ImportError:
        pytest.skip("this Python cannot read TOML")
    assert tomllib.loads(text) == {
        "unqualified-search-registries": ["registry.example.com"],
        "aliases": {"app": "registry.example.com/team/app"},
        "registry": [
            {
                "prefix": "docker.io",
                "location": "docker.io",
                "mirror": [{"location": "mirror.example.com/docker", "pull-from-mirror": "digest-only"}],
            },
            {"prefix": "bad.example.com", "location": "bad.example.com", "blocked": True},
        ],
    }
    assert containers.changed(**REGISTRIES) == 0


def test_what_skopeo_cannot_read_does_not_replace_what_is_there(containers: Configured) -> None:
    containers.ok(**REGISTRIES)
    path = containers.directory / "registries.conf.d/50-composefs-oci.conf"
    before = path.read_text()
    failed = containers.run(registry_registries=[{"prefix": "a.example.com", "location": "https://not/a/location"}])
    assert failed.returncode != 0 and path.read_text() == before


def test_in_check_mode_on_a_fresh_host_nothing_is_written_and_a_change_foretold(containers: Configured) -> None:
    assert containers.changed("--check", registry_policy="reject", **REGISTRIES) > 0
    assert not containers.directory.exists()


def test_signatures_without_a_policy_or_a_key_are_refused(containers: Configured) -> None:
    assert containers.run(registry_signatures=[{"scope": "a.example.com", "key": "x"}]).returncode != 0
    assert (
        containers.run(
            registry_policy="reject", registry_signatures=[{"scope": "a.example.com", "type": "sigstore"}]
        ).returncode
        != 0
    )
    assert not containers.directory.exists()


def test_a_policy_keeps_a_backup_and_means_what_was_asked_for(containers: Configured) -> None:
    containers.directory.mkdir()
    (containers.directory / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    variables: dict[str, Any] = {
        "registry_policy": "reject",
        "registry_signatures": [
            {"scope": "r.example.com/team", "key": "PUBLIC"},
            {"scope": "simple.example.com", "type": "simple", "key": "GPG", "lookaside": "https://s.example.com"},
            {"scope": "mirror.example.com", "type": "accept"},
        ],
    }
    containers.ok(**variables)
    keys = containers.directory / "composefs-oci-keys"
    assert json.loads((containers.directory / "policy.json").read_text()) == {
        "default": [{"type": "reject"}],
        "transports": {
            "docker": {
                "r.example.com/team": [
                    {
                        "type": "sigstoreSigned",
                        "keyPath": f"{keys}/r.example.com_team.pub",
                        "signedIdentity": {"type": "matchRepository"},
                    }
                ],
                "simple.example.com": [
                    {"type": "signedBy", "keyType": "GPGKeys", "keyPath": f"{keys}/simple.example.com.pub"}
                ],
                "mirror.example.com": [{"type": "insecureAcceptAnything"}],
            }
        },
    }
    assert (keys / "r.example.com_team.pub").read_text() == "PUBLIC\n"
    assert list(containers.directory.glob("policy.json.*")), "the one before is kept"
    assert containers.changed(**variables) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a mount namespace")
def test_a_signed_image_is_pulled_and_an_unsigned_one_is_not(
    containers: Configured, registry: Registry, images: Layout, tmp_path: pathlib.Path
) -> None:
    try:
        skopeo = str(trixie_skopeo())
    except Unavailable as error:
        pytest.skip(f"no skopeo that enforces policies: {error}")
    site = containers.site
    (tmp_path / "phrase").write_text("phrase\n")
    subprocess.run(
        [skopeo, "generate-sigstore-key", "--output-prefix", "key", "--passphrase-file", "phrase"],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    tasks = """
- name: Make the repository
  composefs.oci.composefs_repository:
    path: "{{ repository }}"
    verity: disabled
- name: Run the role
  ansible.builtin.include_role:
    name: composefs.oci.registry
- name: Publish a signed image
  ansible.builtin.command:
    argv: [
      "{{ skopeo }}", "--insecure-policy", copy, --dest-tls-verify=false, "--sign-by-sigstore-private-key={{ keys }}/key.private",
      "--sign-passphrase-file={{ keys }}/phrase", "oci:{{ layout }}:app", "docker://{{ address }}/signed:1"]
- name: Pull the signed image
  composefs.oci.composefs_image:
    ref: docker://{{ address }}/signed:1
    name: signed
    repository: "{{ repository }}"
    validate_certs: false
    executable: "{{ skopeo }}"
  register: signed
- name: See that the signature counted
  ansible.builtin.assert:
    that: signed.policy == 'enforced'
- name: Pull the unsigned image
  composefs.oci.composefs_image:
    ref: docker://{{ address }}/app:1
    name: unsigned
    repository: "{{ repository }}"
    validate_certs: false
    executable: "{{ skopeo }}"
  register: unsigned
  failed_when: unsigned.error | default('') != 'policy_rejected'
"""
    (containers.directory).mkdir()
    command = site.command(
        tasks,
        skopeo=skopeo,
        keys=str(tmp_path),
        layout=str(images.path),
        address=registry.address,
        registry_policy="reject",
        registry_signatures=[{"scope": registry.address, "key": (tmp_path / "key.pub").read_text()}],
        registry_executable=skopeo,
    )
    script = f'mount --bind {containers.directory} /etc/containers && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh", *command],
        cwd=site.directory,
        env=site.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_role_host_prepares_a_host_with_one_set_of_variables(site: Site) -> None:
    tasks = """
- name: Prepare the host
  ansible.builtin.include_role:
    name: composefs.oci.host
- name: List images by the default of the action group
  composefs.oci.composefs_image_info:
  module_defaults:
    group/composefs.oci.composefs:
      repository: "{{ host_repository }}"
  register: listed
- name: See where it looked
  ansible.builtin.assert:
    that: listed.repository == host_repository
"""
    variables: dict[str, Any] = {
        "host_repository": str(site.repository),
        "host_verity": "disabled",
        "host_install": "never",
        "host_registry": True,
        "registry_directory": str(site.directory / "containers"),
        "registry_aliases": {"app": "registry.example.com/app"},
    }
    done = site.run(tasks, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (site.repository / "meta.json").exists()
    assert (site.directory / "containers/registries.conf.d/50-composefs-oci.conf").exists()
    again = site.run(tasks, **variables)
    assert "changed=0" in again.stdout
