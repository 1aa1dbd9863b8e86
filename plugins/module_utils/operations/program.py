# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause

"""Programs for hosts that outlive the task that brought them: the engine's own sources in one file."""

from __future__ import annotations

import ast
import io
import sys
import zipfile
from typing import Any

from .. import errors
from ..errors import IOFailed

_PACKAGE = "composefs_oci"


def made(main: str, *late: str) -> bytes:
    """A zip application that runs ``main()`` of the loaded engine module ``main`` (dotted name): the same bytes for the
    same sources. ``late``: modules that functions of others import, and that the program needs.
    """
    head = "".join(line for line in _source(errors.__name__).splitlines(keepends=True)[:3])
    root = errors.__name__.rpartition(".")[0]
    sources = _reached([main, *late], root)
    files = {f"{_PACKAGE}/{name.replace('.', '/')}.py": text for name, text in sources.items()}
    wings = {name.rpartition(".")[0] for name in sources}
    files.update({f"{_PACKAGE}/{wing}/__init__.py" if wing else f"{_PACKAGE}/__init__.py": head for wing in wings})
    files["__main__.py"] = (
        f"{head}\nimport sys\n\nfrom {_PACKAGE}.{main[len(root) + 1 :]} import main\n\nsys.exit(main(sys.argv[1:]))\n"
    )
    out = io.BytesIO()
    # Stored, not compressed: versions of zlib differ in what they write.
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1 January 1980
            entry.create_system = 3
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name].encode())
    return out.getvalue()


def _reached(start: list[str], root: str) -> dict[str, str]:
    """The sources that importing the engine modules ``start`` loads, by dotted name below ``root``.

    What a function imports late is not among them.
    """
    found: dict[str, str] = {}
    left = list(start)
    while left:
        name = left.pop()
        if name[len(root) + 1 :] in found:
            continue
        text = found[name[len(root) + 1 :]] = _source(name)
        package = name.split(".")[:-1]
        for node in ast.parse(text).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
                modules = [f"{base}.{alias.name}" for alias in node.names]
                left += [module for module in (base, *modules) if _is_module(module)]
    return found


def _is_module(name: str) -> bool:
    """Whether ``name``, which is loaded if it is a module at all, is a module with a source of its own and not a
    package.
    """
    module = sys.modules.get(name)
    return module is not None and not hasattr(module, "__path__")


def _source(name: str) -> str:
    """The source of a loaded engine module, from wherever it was imported: a file, or the zip in which a task's code
    travels.
    """
    spec = sys.modules[name].__spec__
    loader: Any = spec.loader if spec else None
    text = loader.get_source(name) if loader is not None and hasattr(loader, "get_source") else None
    if not isinstance(text, str):
        raise IOFailed(f"The source of {name} cannot be found.", "Report this as a bug.")
    return text
