# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Run the engine from a shell, without Ansible: what a module would do, as JSON on standard output.

    dev/engine --repository /srv/images init
    dev/engine --repository /srv/images pull docker://registry.example.com/app:1.4 app
    dev/engine --repository /srv/images list

The interpreter is that of .venv, or the one that ENGINE_PYTHON names. ``--profile FILE`` writes a cProfile of this
process, and its children are not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

ROOT = pathlib.Path(__file__).resolve().parents[1]
COLLECTION = "ansible_collections.composefs.oci"


def provide_engine() -> None:
    """Make the engine importable from this checkout, as AnsiballZ would from its archive."""
    for name, path in (("ansible_collections", []), ("ansible_collections.composefs", []), (COLLECTION, [str(ROOT)])):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        if not hasattr(module, "__path__"):
            module.__path__ = path


provide_engine()

from ansible_collections.composefs.oci.plugins.module_utils import errors, progress

if TYPE_CHECKING:
    from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository


class TerminalSink:
    """One line a layer on a terminal: bar, bytes, rate, time left; redrawn in place at most ten times a second."""

    WIDTH = 24

    def __init__(self, stream: TextIO, interval: float = 0.1) -> None:
        self._stream = stream
        self._interval = interval
        self._board = progress.Board()
        self._last = float("-inf")
        self._drawn = 0

    def event(self, event: progress.Event) -> None:
        self._board.take(event)
        now = self._board.clock()
        if event.kind == progress.BYTES and now - self._last < self._interval:
            return
        self._last = now
        self._draw()

    def close(self) -> None:
        self._draw()

    def line(self, name: str) -> str:
        """The text of one layer's line."""
        layer = self._board.layers[name]
        short = name.partition(":")[2][:12] or name[:12]
        if layer.state == progress.SKIPPED:
            return f"{short}  already present"
        part = layer.done / layer.total if layer.total else 1.0
        full = int(part * self.WIDTH)
        rate = layer.done / max(self._board.clock() - layer.started, 0.001)
        eta = (
            f"  {int((layer.total - layer.done) / rate)} s left"
            if rate > 0 and layer.state == progress.BYTES and part < 1
            else ""
        )
        ending = "  done" if layer.state == progress.DONE else eta
        return (
            f"{short}  [{'#' * full}{'.' * (self.WIDTH - full)}] {progress.human(layer.done)} "
            f"of {progress.human(layer.total)}  {progress.human(rate)}/s{ending}"
        )

    def _draw(self) -> None:
        lines = [self.line(name) for name in self._board.layers]
        if self._board.text:
            lines.append(self._board.text)
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._stream.write(up + "".join(f"\x1b[2K{text}\n" for text in lines))
        self._stream.flush()
        self._drawn = len(lines)


# --- the verbs: each is one function, whose docstring is its help ---


def init(options: argparse.Namespace) -> object:
    """Make a repository without fs-verity, or with it (--verity)."""
    from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
    from ansible_collections.composefs.oci.plugins.module_utils.store import create

    verity = create.REQUIRED if options.verity else create.DISABLED
    made = create.prepare(options.repository, fsverity.ALGORITHMS[options.algorithm], verity)
    return {"created": made.created, "verity": made.secure, "algorithm": made.metadata.algorithm.meta_name}


def pull(options: argparse.Namespace) -> object:
    """Pull one image under a name."""
    from ansible_collections.composefs.oci.plugins.module_utils.pull import plan, pull
    from ansible_collections.composefs.oci.plugins.module_utils.source.options import ProxyOptions

    listener = progress.Progress(TerminalSink(sys.stderr) if options.progress else None)
    proxy = ProxyOptions(executable=tuple(options.skopeo.split()), tls_verify=False if options.no_tls else None)
    settings = pull.Options(proxy=proxy, parallel=options.parallel, check=options.check)
    request = plan.Request(ref=options.reference, name=options.name or options.reference)
    with opened(options, write=not options.check) as repository:
        try:
            outcomes = pull.pull_images(repository, [request], settings, listener)
        finally:
            listener.close()
        return [
            {"changed": outcome.changed, **pull.describe(repository, outcome).result.values()} for outcome in outcomes
        ]


def list_images(options: argparse.Namespace) -> object:
    """The images and what is known of each, or complaints about those that cannot be read."""
    from ansible_collections.composefs.oci.plugins.module_utils.operations import listing

    with opened(options) as repository:
        images, complaints = listing.list_images(repository, options.name or "")
        return {"images": images, "complaints": complaints}


def inspect(options: argparse.Namespace) -> object:
    """The documents of an image as they are stored, and the stream and object of each."""
    from ansible_collections.composefs.oci.plugins.module_utils.store import imagestreams

    with opened(options) as repository:
        manifest = manifest_of(repository, options.image)
        found = imagestreams.read(repository, imagestreams.MANIFEST, manifest)
        if found is None:
            raise errors.ImageNotFound(f"There is no manifest {manifest}.", "Pull the image again.")
        document = json.loads(found.raw)
        configuration = document["config"]["digest"]
        config = imagestreams.read(repository, imagestreams.CONFIG, configuration)
        return {
            "manifest": {"digest": manifest, "refs": hexadecimal(found.refs), "document": document},
            "config": config
            and {"digest": configuration, "refs": hexadecimal(config.refs), "document": json.loads(config.raw)},
        }


def dump(options: argparse.Namespace) -> object:
    """The tree of an image as composefs-dump(5)."""
    from ansible_collections.composefs.oci.plugins.module_utils.operations import dump

    with opened(options) as repository:
        return dump.dump(repository, options.image)


def graph(options: argparse.Namespace) -> object:
    """What keeps what alive: every root with the number of streams, EROFS images and objects that it reaches."""
    from ansible_collections.composefs.oci.plugins.module_utils.store.graph import Graph

    with opened(options) as repository:
        whole = Graph.read(repository)
        return {
            "streams": len(whole.streams),
            "images": len(whole.images),
            "problems": [problem._asdict() for problem in whole.problems],
            "roots": [
                {"kind": root.kind, "name": root.name, "leads_to": root.node.hex(), "reaches": len(whole.nodes(root))}
                for root in whole.roots
            ],
        }


def check(options: argparse.Namespace) -> object:
    """Look for damage: quick, objects or full."""
    from ansible_collections.composefs.oci.plugins.module_utils.operations import check

    with opened(options) as repository:
        report = check.check(repository, check.Wish(level=options.level), progress.Progress(), remember=False)
        return dataclasses.asdict(report)


def prune(options: argparse.Namespace) -> object:
    """Free the space of what nothing keeps any more; with --check only tell what would go."""
    from ansible_collections.composefs.oci.plugins.module_utils.operations import prune

    with opened(options, write=not options.check) as repository:
        pruned = prune.prune(repository, prune.Wish(), progress.Progress(), check=options.check)
        return dataclasses.asdict(pruned)


def opened(options: argparse.Namespace, write: bool = False) -> Repository:
    from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository, default_path

    return Repository.open(options.repository or default_path(), write=write)


def manifest_of(repository: Repository, image: str) -> str:
    """The manifest digest that a name or a digest means."""
    digest = image if image.startswith("sha256:") else repository.tag_digest(image)
    if digest is None:
        raise errors.ImageNotFound(f"The repository has no image {image!r}.", "Look at what dev/engine list shows.")
    return str(digest)


def hexadecimal(refs: Any) -> dict[str, str]:
    return {name: digest.hex() for name, digest in refs.items()}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="dev/engine", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--repository", "-r", help="the repository; default: that of the user")
    result.add_argument("--profile", metavar="FILE", help="write a cProfile")
    verbs = result.add_subparsers(dest="verb", required=True, metavar="VERB")

    def add(name: str, function: Callable[[argparse.Namespace], object]) -> argparse.ArgumentParser:
        text = str(function.__doc__)
        verb = verbs.add_parser(name, help=text, description=text)
        verb.set_defaults(function=function)
        return verb

    verb = add("init", init)
    verb.add_argument("--algorithm", default="sha512", choices=("sha256", "sha512"))
    verb.add_argument("--verity", action="store_true")
    verb = add("pull", pull)
    verb.add_argument("reference")
    verb.add_argument("name", nargs="?")
    verb.add_argument("--parallel", type=int, default=0)
    verb.add_argument("--skopeo", default="skopeo")
    verb.add_argument("--no-tls", action="store_true", help="do not ask for a certificate")
    verb.add_argument("--progress", action="store_true", help="draw a line for each layer")
    verb.add_argument("--check", action="store_true", help="only say what would be pulled")
    add("list", list_images).add_argument("name", nargs="?")
    add("inspect", inspect).add_argument("image", metavar="NAME|DIGEST")
    add("dump", dump).add_argument("image", metavar="NAME|DIGEST|IMAGE_ID")
    add("graph", graph)
    add("check", check).add_argument("level", nargs="?", default="quick", choices=("quick", "objects", "full"))
    add("prune", prune).add_argument("--check", action="store_true", help="only say what would go")
    return result


def plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else str(value)


def main() -> int:
    options = parser().parse_args()
    profile = None
    if options.profile:
        import cProfile

        profile = cProfile.Profile()
    try:
        result = profile.runcall(options.function, options) if profile else options.function(options)
    except errors.EngineError as error:
        print(f"{error.code}: {error}", file=sys.stderr)
        return 1
    finally:
        if profile:
            profile.dump_stats(options.profile)
    if isinstance(result, bytes):
        sys.stdout.buffer.write(result)
    else:
        json.dump(result, sys.stdout, indent=1, default=plain)
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
