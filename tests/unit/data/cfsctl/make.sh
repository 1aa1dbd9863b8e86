#!/bin/sh
# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Make the *.splitstream files beside this script with the real program: needs cfsctl 0.9.4, skopeo and python3 on the PATH.
#
# layer-1 comes from "oci import-layer", the rest from "oci pull" of the same image. Layers and config come out the same every time;
# cfsctl writes the refs of a manifest in random order.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

cfsctl --version
python3 "$here/make_image.py" "$work/image"

# The digests of the manifest, the config and the two layers, one a line.
digests=$(python3 - "$work/image" <<'PYTHON'
import json, sys

def load(name):
    with open(sys.argv[1] + "/" + name.replace("sha256:", "blobs/sha256/")) as file:
        return json.load(file)

manifest = load("index.json")["manifests"][0]["digest"]
document = load(manifest)
print(manifest, document["config"]["digest"], *[layer["digest"] for layer in document["layers"]], sep="\n")
PYTHON
)
# shellcheck disable=SC2086 # four words on purpose
set -- $digests

for hash in sha256 sha512; do
    repo=$work/$hash
    cfsctl --repo "$repo" init --insecure --algorithm "fsverity-$hash-12"
    cfsctl --repo "$repo" oci import-layer "$3" < "$work/image/blobs/sha256/${3#sha256:}"
    cfsctl --repo "$repo" oci pull "oci:$work/image:golden" golden
    cp "$repo/streams/oci-manifest-$1" "$here/$hash-manifest.splitstream"
    cp "$repo/streams/oci-config-$2" "$here/$hash-config.splitstream"
    cp "$repo/streams/oci-layer-$3" "$here/$hash-layer-1.splitstream"
    cp "$repo/streams/oci-layer-$4" "$here/$hash-layer-2.splitstream"
done
chmod 644 "$here"/*.splitstream
for file in "$here"/*.splitstream; do
    cat > "$file.license" <<'LICENSE'
SPDX-FileCopyrightText: composefs.oci contributors
SPDX-License-Identifier: GPL-3.0-or-later
LICENSE
done
