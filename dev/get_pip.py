# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stands in for the bootstrap script that ansible-test fetches where its server cannot be reached: the pip that comes
with Python installs the wanted one from the configured index.
"""

import ensurepip
import glob
import os
import runpy
import sys

places = (os.path.join(os.path.dirname(ensurepip.__file__), "_bundled"), "/usr/share/python-wheels")
sys.path.insert(0, [wheel for place in places for wheel in sorted(glob.glob(place + "/pip-*.whl"))][0])
wanted = [word for word in sys.argv[1:] if word not in ("--no-setuptools", "--no-wheel")]
sys.argv = ["pip", "install", "--upgrade", "--force-reinstall", *wanted]
runpy.run_module("pip", run_name="__main__")
