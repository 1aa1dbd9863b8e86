# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The names that images get by default."""

from __future__ import annotations

import pytest

from ansible_collections.composefs.oci.plugins.module_utils.formats import reference


@pytest.mark.parametrize(
    ("text", "name", "others"),
    [
        ("r.test/app:1", "docker://r.test/app:1", ("r.test/app:1",)),
        ("docker://r.test/app:1", "docker://r.test/app:1", ("r.test/app:1",)),
        ("registry:r.test/app", "docker://r.test/app", ("r.test/app",)),
        ("registry:5000/app", "docker://registry:5000/app", ("registry:5000/app",)),
        (
            f"r.test/app:1@sha256:{'a' * 64}",
            f"docker://r.test/app:1@sha256:{'a' * 64}",
            (f"r.test/app:1@sha256:{'a' * 64}",),
        ),
        ("docker://debian", "docker://debian", ("debian",)),
        ("oci:/srv/layout:1", "oci:/srv/layout:1", ()),
    ],
)
def test_the_default_name_has_the_transport(text: str, name: str, others: tuple[str, ...]) -> None:
    assert reference.default_name(text) == name
    assert reference.other_names(name) == others
    assert all(reference.other_names(other) == (name,) for other in others if other != "debian")


def test_a_name_that_is_no_reference_has_no_other_form() -> None:
    assert reference.other_names("app") == reference.other_names("team/app") == reference.other_names("") == ()
