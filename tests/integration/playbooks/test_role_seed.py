# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role seed against real registries: what it writes starts, is filled once, serves alone, and is pruned."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from aptroot import Unavailable
from ociimage import Layout
from ports import free_port
from registry import Registry, bcrypt, find_registry, make_certificates
from tarbytes import DIRECTORY, member, tar
from trixie_skopeo import trixie_skopeo

if TYPE_CHECKING:  # pytest gives the fixture
    from conftest import Site

SECRET = "se:cret w0rd"
ROLE = """
- name: Run the role
  ansible.builtin.include_role:
    name: composefs.oci.seed
    tasks_from: {entry}
"""
PULL = """
- name: Make the repository
  composefs.oci.composefs_repository:
    path: "{{ repository }}"
    verity: preferred
- name: Pull by digest, as a rollout does
  composefs.oci.composefs_image:
    ref: "docker://{{ seed_image }}"
    name: "app@{{ seed_image.split('@')[1] }}"
    repository: "{{ repository }}"
    executable: "{{ skopeo }}"
    auth_file: "{{ seed_auth_file }}"
    signature_policy: "{{ signature_policy | default(omit) }}"
    retries: 0
"""


class Seed:
    """A seed whose registry runs with what the role wrote, beside an origin."""

    def __init__(self, site: Site, origin: Registry, skopeo: str = "skopeo") -> None:
        self.site, self.origin = site, origin
        self.directory = site.directory / "seed"
        self.containers = site.directory / "containers"
        make_certificates(self.directory / "tls")
        (self.directory / "htpasswd").write_text(f"user:{bcrypt(SECRET)}\n")
        self.registry = Registry(self.directory, tls=True, user="user", password=SECRET, port=free_port())
        self.registry.ca_directory.mkdir()
        shutil.copyfile(self.directory / "tls/ca.crt", self.registry.ca_directory / "ca.crt")
        # skopeo as on a host whose configuration lies in the directory of this test.
        self.skopeo = site.directory / "bin" / "skopeo"
        self.skopeo.parent.mkdir()
        mirror = self.containers / "registries.conf.d/50-composefs-oci-site.conf"
        self.skopeo.write_text(
            f'#!/bin/sh\n[ ! -e {mirror} ] || set -- --registries-conf {mirror} "$@"\n'
            f'exec {shutil.which(skopeo)} --registries.d {self.containers}/registries.d "$@"\n'
        )
        self.skopeo.chmod(0o755)
        (self.containers / "registries.d").mkdir(parents=True)
        self.process: subprocess.Popen[bytes] | None = None

    def variables(self, image: str = "") -> dict[str, Any]:
        return {
            "seed_install": False,
            "seed_service": False,
            "seed_directory": str(self.directory / "etc"),
            "seed_storage": str(self.directory / "storage"),
            "seed_containers": str(self.containers),
            "seed_address": "127.0.0.1",
            "seed_port": self.registry.port,
            "seed_certificate": str(self.directory / "tls/server.crt"),
            "seed_key": str(self.directory / "tls/server.key"),
            "seed_htpasswd": str(self.directory / "htpasswd"),
            "seed_auth_file": str(self.registry.auth_file()),
            "seed_tls": True,
            "seed_origin": self.origin.address,
            "seed_origin_tls": False,
            "seed_mirror": self.registry.address,
            "seed_image": image,
            "skopeo": str(self.skopeo),
        }

    def run(self, tasks: str, image: str = "", **more: Any) -> subprocess.CompletedProcess[str]:
        env = {
            "PATH": f"{self.skopeo.parent}:{os.environ['PATH']}",
            # What trusts the certificate of a seed is the business of the role registry; here it is the environment.
            "SSL_CERT_FILE": str(self.registry.ca_directory / "ca.crt"),
        }
        return self.site.run(tasks, env=env, **{**self.variables(image), **more})

    def changed(self, entry: str, image: str = "", **more: Any) -> int:
        done = self.run(ROLE.format(entry=entry), image, **more)
        assert done.returncode == 0, done.stdout + done.stderr
        assert SECRET not in done.stdout + done.stderr
        return int(done.stdout.rpartition("changed=")[2].split()[0])

    def pull(self, image: str, number: int, **more: Any) -> subprocess.CompletedProcess[str]:
        """Pull into a new repository."""
        return self.run(PULL, image, repository=str(self.site.directory / f"repository-{number}"), **more)

    def start(self) -> None:
        log = open(self.directory / "log", "ab")  # noqa: SIM115 - the registry's own
        command = [find_registry(), "serve", str(self.directory / "etc/seed.yml")]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.registry.process = self.process
        assert self.registry._wait(), (self.directory / "log").read_text()[-2000:]

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = self.registry.process = None

    def has(self, name: str, reference: str) -> bool:
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"}
        return self.registry.request("GET", f"/v2/{name}/manifests/{reference}", accept)[0] == 200


@pytest.fixture
def origin(site: Site) -> Iterator[Registry]:
    if not shutil.which("skopeo"):
        pytest.skip("skopeo is not installed")
    with contextlib.ExitStack() as stack:
        try:
            running = stack.enter_context(Registry(site.directory / "origin", access_log=True))
        except Unavailable as error:
            pytest.skip(str(error))
        yield running


@pytest.fixture
def seed(site: Site, origin: Registry) -> Iterator[Seed]:
    made = Seed(site, origin)
    try:
        yield made
    finally:
        made.stop()


def version(layout: Layout, number: int) -> str:
    return layout.image(
        [tar(member("usr/", type=DIRECTORY), member("usr/version", b"%d" % number * 5000))], f"v{number}"
    )


def test_a_seed_with_tls_and_a_password_is_filled_once_and_each_of_both_goes_on_alone(
    site: Site, origin: Registry, seed: Seed
) -> None:
    layout = Layout(site.directory / "layout")
    digest = version(layout, 1)
    origin.push(f"{layout.path}:v1", "team/app:1")
    image = f"{origin.address}/team/app@{digest}"
    assert seed.changed("main") > 0 and seed.changed("main") == 0
    seed.start()
    assert seed.registry.request("GET", "/v2/")[0] == 200
    seed.registry.user, user = "", seed.registry.user
    assert seed.registry.request("GET", "/v2/")[0] == 401, "nobody else gets anything"
    seed.registry.user = user
    assert seed.changed("fill", image) == 1 and seed.changed("fill", image) == 0
    assert seed.changed("client", image) > 0 and seed.changed("client", image) == 0
    log = origin.directory / "log"
    layer = layout.read(digest)
    (blob,) = [one["digest"] for one in json.loads(layer)["layers"]]
    done = seed.pull(image, 1)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text().count(f"GET /v2/team/app/blobs/{blob}") == 1, "it left the origin once"
    origin.stop()
    done = seed.pull(image, 2)
    assert done.returncode == 0, done.stdout + done.stderr
    origin.start()
    seed.stop()
    done = seed.pull(image, 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert seed.changed("client", image, seed_state="absent") > 0
    assert not list(seed.containers.rglob("50-*"))


def test_a_seed_that_is_pruned_keeps_what_deployments_need(site: Site, origin: Registry, seed: Seed) -> None:
    layout = Layout(site.directory / "layout")
    first, second = version(layout, 1), version(layout, 2)
    platforms = {
        name: [tar(member(f"usr-{number}", b"%d" % number * 4000))]
        for number, name in enumerate(("linux/amd64", "linux/arm64"))
    }
    old_index, old_children = layout.multi_platform(platforms, "old")
    platforms["linux/arm64"] = [tar(member("usr-new", b"new" * 4000))]
    new_index, new_children = layout.multi_platform(platforms, "new")
    assert old_children["linux/amd64"] == new_children["linux/amd64"]
    seed.changed("main")
    seed.start()
    for name, digest in (("v1", first), ("v2", second), ("old", old_index), ("new", new_index)):
        origin.push(f"{layout.path}:{name}", f"app:{name}", "--all")
        assert seed.changed("fill", f"{origin.address}/app@{digest}") == 1
    # A signature and a delta of an image go with it, whatever they are.
    for target in (first, second):
        raw = layout.read(target)
        seed.registry.put_manifest(
            "app", f"{target.replace(':', '-')}.delta-1234", raw, "application/vnd.oci.image.manifest.v1+json"
        )
    image = f"{origin.address}/app@{new_index}"
    assert seed.changed("prune", image, seed_keep=[second]) == 1
    kept = [second, new_index, *new_children.values()]
    gone = [first, old_index, old_children["linux/arm64"]]
    assert [seed.has("app", digest) for digest in kept] == [True] * len(kept)
    assert [seed.has("app", digest) for digest in gone] == [False] * len(gone)
    tags = json.loads(seed.registry.request("GET", "/v2/app/tags/list")[2])["tags"]
    assert sorted(tags) == sorted(
        [second.replace(":", "-"), f"{second.replace(':', '-')}.delta-1234", new_index.replace(":", "-")]
    )
    assert seed.changed("prune", image, seed_keep=[second]) == 0
    # What the role lets a service do: the blobs go, and all that is kept can still be pulled.
    seed.stop()
    command = [find_registry(), "garbage-collect", str(seed.directory / "etc/seed.yml")]
    subprocess.run(command, check=True, capture_output=True)
    seed.start()
    origin.stop()
    seed.changed("client", image)
    for number, digest in enumerate((second, new_index)):
        done = seed.pull(f"{origin.address}/app@{digest}", number)
        assert done.returncode == 0, done.stdout + done.stderr
    assert seed.pull(f"{origin.address}/app@{first}", 9).returncode != 0


def test_signatures_travel_to_the_seed_and_are_looked_for_there(site: Site, origin: Registry) -> None:
    try:
        real = str(trixie_skopeo())
    except Unavailable as error:
        pytest.skip(str(error))
    seed = Seed(site, origin, real)
    keys = site.directory / "keys"
    keys.mkdir()
    (keys / "phrase").write_text("phrase\n")
    generate = [real, "generate-sigstore-key", "--output-prefix", "key", "--passphrase-file", "phrase"]
    subprocess.run(generate, cwd=keys, check=True, capture_output=True)
    layout = Layout(site.directory / "layout")
    digest = version(layout, 1)
    origin.push(f"{layout.path}:v1", "app:1")
    image = f"{origin.address}/app@{digest}"
    # As the role registry writes it where the policy asks for signatures.
    said = seed.containers / "registries.d/origin.yaml"
    said.write_text(f"docker:\n  {origin.address}/app:\n    use-sigstore-attachments: true\n")
    try:
        seed.changed("main")
        seed.start()
        assert seed.changed("fill", image) >= 1 and seed.changed("fill", image) == 0
        tag = f"{digest.replace(':', '-')}.sig"
        assert not seed.has("app", tag)
        sign = [str(seed.skopeo), "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-tls-verify=false"]
        sign += ["--preserve-digests", "--sign-by-sigstore-private-key", str(keys / "key.private")]
        sign += [
            "--sign-passphrase-file",
            str(keys / "phrase"),
            f"docker://{image}",
            f"docker://{origin.address}/app:1",
        ]
        subprocess.run(sign, check=True, capture_output=True)
        assert seed.changed("fill", image) == 1 and seed.has("app", tag), "what was signed later is taken along"
        assert seed.changed("fill", image) == 0
        assert seed.changed("client", image) > 0
        written = (seed.containers / "registries.d/50-composefs-oci-site.yaml").read_text()
        assert f"{seed.registry.address}/app:" in written and "use-sigstore-attachments: true" in written
        policy = site.directory / "policy.json"
        # The signature names the tag that was signed.
        identity = {"type": "exactReference", "dockerReference": f"{origin.address}/app:1"}
        wanted = {"type": "sigstoreSigned", "keyPath": str(keys / "key.pub"), "signedIdentity": identity}
        scopes = {"docker": {origin.address: [wanted], seed.registry.address: [wanted]}}
        policy.write_text(json.dumps({"default": [{"type": "reject"}], "transports": scopes}))
        origin.stop()
        done = seed.pull(image, 0, signature_policy=str(policy))
        assert done.returncode == 0, done.stdout + done.stderr
        # Without what the role wrote for the mirror the same pull is refused.
        (seed.containers / "registries.d/50-composefs-oci-site.yaml").unlink()
        assert seed.pull(image, 1, signature_policy=str(policy)).returncode != 0
    finally:
        seed.stop()


def test_the_web_server_of_a_seed_gives_peers_objects_and_streams_and_nothing_else(
    site: Site, origin: Registry, seed: Seed
) -> None:
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if not nginx or os.geteuid() != 0:
        pytest.skip("nginx is not installed, or this is not root")
    layout = Layout(site.directory / "layout")
    digest = version(layout, 1)
    origin.push(f"{layout.path}:v1", "app:1")
    image = f"{origin.address}/app@{digest}"
    seed.changed("client", image)
    done = seed.pull(image, 0)
    assert done.returncode == 0, done.stdout + done.stderr
    repository = site.directory / "repository-0"
    port = free_port()
    (site.directory / "nginx").mkdir()
    variables: dict[str, Any] = {
        "seed_files": True,
        "seed_files_port": port,
        "seed_repository": str(repository),
        "seed_nginx": str(site.directory / "nginx"),
        "seed_certificate": "",
    }
    assert seed.changed("files", **variables) == 1 and seed.changed("files", **variables) == 0
    configuration = site.directory / "nginx.conf"
    configuration.write_text(
        f"daemon off; pid {site.directory}/nginx.pid; user root; error_log stderr; events {{}}\n"
        f"http {{ access_log off; include {site.directory}/nginx/*.conf; }}\n"
    )
    # As the drop-in of systemd shows it to the server, and to nobody else.
    show = " && ".join(
        [
            "mkdir -p /run/composefs-seed/objects /run/composefs-seed/streams",
            *(f"mount --bind {repository}/{part} /run/composefs-seed/{part}" for part in ("objects", "streams")),
            f"exec {nginx} -c {configuration}",
        ]
    )
    words = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs tmpfs /run && {show}"]
    log = site.directory / "nginx.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    try:
        url = f"http://127.0.0.1:{port}"
        end = time.monotonic() + 20
        while True:
            try:
                urllib.request.urlopen(f"{url}/nothing", timeout=5)
            except urllib.error.HTTPError as answer:
                assert answer.code == 404
                break
            except OSError:
                assert time.monotonic() < end and process.poll() is None, log.read_text()
                time.sleep(0.1)
        for path in ("meta.json", "images/", "objects/", "objects/../meta.json"):
            with pytest.raises(urllib.error.HTTPError):
                urllib.request.urlopen(f"{url}/{path}", timeout=5)
        by_peer = PULL.replace("retries: 0", f'retries: 0\n    peers: ["{url}"]')
        done = seed.run(
            by_peer + "  register: pulled\n- ansible.builtin.debug:\n    var: pulled.stats.peers\n",
            image,
            repository=str(site.directory / "by-peer"),
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert '"error": null' in done.stdout and '"layers": 1' in done.stdout, done.stdout
    finally:
        process.terminate()
        process.wait()


def test_programs_that_are_missing_are_told_or_foretold(site: Site, origin: Registry) -> None:
    seed = Seed(site, origin)
    lacking = {"seed_programs": ["no-such-program", "sh"], "seed_brought_by": {"no-such-program": "its-package"}}
    done = seed.run(ROLE.format(entry="main"), **lacking)
    assert done.returncode != 0 and "The host lacks no-such-program. Install it" in done.stdout
    values = {**seed.variables(), **lacking, "seed_install": True}
    done = site.run(ROLE.format(entry="main"), "--check", **values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Would install its-package" in done.stdout and "The host lacks" not in done.stdout
    assert not (seed.directory / "etc").exists()


def test_the_units_of_a_seed_are_units(site: Site, tmp_path: pathlib.Path) -> None:
    """Nothing else but systemd itself can tell; where it is not there nobody can."""
    analyze = shutil.which("systemd-analyze")
    if not analyze:
        pytest.skip("systemd-analyze is not installed")
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    templates = pathlib.Path(__file__).resolve().parents[3] / "roles/seed/templates"
    values = {"ansible_managed": "", "seed_directory": "/etc/x", "seed_storage": "/var/x"}
    text = environment.from_string((templates / "registry.service.j2").read_text()).render(values)
    unit = tmp_path / "composefs-oci-seed.service"
    unit.write_text(text.replace("/usr/bin/docker-registry", sys.executable))
    done = subprocess.run([analyze, "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert "composefs-oci-seed" not in done.stderr, done.stderr
