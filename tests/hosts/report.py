# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a scenario's tests found and what they ran on, as JSON in the file that COMPOSEFS_OCI_REPORT names. A plugin of
pytest.
"""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any


def write(**facts: Any) -> None:
    """Add ``facts`` to the report, if one is wanted."""
    name = os.environ.get("COMPOSEFS_OCI_REPORT")
    if name:
        path = pathlib.Path(name)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, **facts}, indent=1) + "\n")


def pytest_sessionfinish(session: Any) -> None:
    def name(report: Any) -> str:
        return str(report.nodeid).partition("::")[2] or str(report.nodeid)

    stats = session.config.pluginmanager.get_plugin("terminalreporter").stats
    write(
        passed=len(stats.get("passed", [])),
        failed=[name(report) for kind in ("failed", "error") for report in stats.get(kind, [])],
        skipped=[
            [name(report), str(report.longrepr[2]).replace("Skipped: ", "", 1)] for report in stats.get("skipped", [])
        ],
    )
