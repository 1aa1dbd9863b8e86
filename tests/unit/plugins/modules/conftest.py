# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Modules run here as on a managed host, whatever else this process has imported."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def managed_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since ansible-core 2.19 a module warns in its result only if no plugin of the controller was imported before, and
    which tests share a process is a matter of chance when they are spread.
    """
    try:
        from ansible.module_utils import _internal
    except ImportError:
        return
    monkeypatch.setattr(_internal, "is_controller", False, raising=False)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the module warns of; Ansible itself adds up the warnings of one process."""
    from ansible.module_utils import basic

    found: list[str] = []
    monkeypatch.setattr(basic.AnsibleModule, "warn", lambda _module, text: found.append(text))
    return found
