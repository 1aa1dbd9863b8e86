# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What Ansible sends to a host for a task of each module: bytes, those of ``ping``, and those of another commit.

    payload.py [--against COMMIT] [MODULE …]

Runs each module without arguments on this machine and keeps what Ansible put there: the module and all that it may
import, compressed and wrapped as for any host. Needs ``ansible`` on the path.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]


def laid_out(commit: str, work: pathlib.Path) -> pathlib.Path:
    """A directory of collections that holds what the working tree, or a commit, would install."""
    place = work / (commit or "now") / "ansible_collections" / "composefs" / "oci"
    place.mkdir(parents=True)
    if commit:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", str(place)], input=packed.stdout, check=True)
    else:
        for name in ("plugins", "meta"):
            shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "galaxy.yml", place)
    return work / (commit or "now")


def payload(module: str, collections: pathlib.Path, work: pathlib.Path) -> int | None:
    """The bytes that one task sends; None if nothing was sent: there is no such module, or the controller does it."""
    kept = work / "kept"
    settings = {
        "ANSIBLE_COLLECTIONS_PATH": str(collections),
        "ANSIBLE_KEEP_REMOTE_FILES": "true",
        "ANSIBLE_REMOTE_TMP": str(kept),
        "ANSIBLE_LOCAL_TEMP": str(work / "local"),
        "ANSIBLE_LOCALHOST_WARNING": "false",
    }
    # Without arguments most of them fail, but not before they were sent.
    subprocess.run(
        ["ansible", "-i", "localhost,", "-c", "local", "all", "-m", module],
        env={**os.environ, **settings},
        capture_output=True,
        check=False,
        cwd=work,
    )
    sizes = [sent.stat().st_size for sent in kept.glob(f"*/AnsiballZ_{module.rsplit('.', 1)[-1]}.py")]
    shutil.rmtree(kept, ignore_errors=True)
    return sizes[0] if sizes else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="all of them if none is named")
    parser.add_argument("--against", default="", metavar="COMMIT")
    options = parser.parse_args()
    modules = options.modules or sorted(path.stem for path in (ROOT / "plugins/modules").glob("*.py"))
    with tempfile.TemporaryDirectory() as directory:
        work = pathlib.Path(directory)
        places = [laid_out(commit, work) for commit in ([options.against] if options.against else []) + [""]]
        print("| module | " + " | ".join(f"bytes, {place.name}" for place in places) + " |")
        print("|---|" + "---|" * len(places))
        for module in ("ansible.builtin.ping", *(f"composefs.oci.{name}" for name in modules)):
            sizes = [payload(module, place, work) for place in places]
            print(
                f"| {module} | " + " | ".join("" if size is None else f"{size:,}" for size in sizes) + " |", flush=True
            )


if __name__ == "__main__":
    main()
