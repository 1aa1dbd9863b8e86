# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names of files are UTF-8 in every locale, and nothing that is shown can steer a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import pytest
from ansible_collections.composefs.oci.plugins.module_utils import progress, text
from ansible_collections.composefs.oci.plugins.module_utils import module as threshold
from ansible_collections.composefs.oci.plugins.module_utils.errors import ImageNotFound

# --- what is shown
# --------------------------------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;owned\x07 \x9b31m\u202eexe\u200b \x00 line\nline\r\tend \udc80"


def test_ordinary_text_is_not_touched() -> None:
    for ordinary in ("", "An image.", "büro 日本 …", "a" * 4096):
        assert text.printable(ordinary) is ordinary


def test_nothing_that_steers_a_terminal_passes() -> None:
    shown = text.printable(EVIL)
    assert shown.isprintable()
    assert shown == r"\x1b[2J\x1b]0;owned\x07 \x9b31m\u202eexe\u200b \x00 line line end \x80"


@pytest.mark.parametrize("limit", [text.LINE_LIMIT, text.MESSAGE_LIMIT])
@pytest.mark.parametrize("char", ["a", "ü", "日", "😀", "\x1b", "\n", "\u202e"])
def test_messages_are_bounded_and_keep_their_end(char: str, limit: int) -> None:
    shown = text.printable(f"begin {char * 1_000_000} Do this.", limit)
    assert shown.isprintable() and len(shown.encode()) <= limit
    assert shown.startswith("begin") and shown.endswith("Do this.")


def test_every_text_of_a_result_passes_but_data() -> None:
    found = text.printable_values({"os": EVIL, "n": 1, "layers": [{"a": EVIL}, (EVIL,)], "labels": {"x": EVIL}})
    assert found["labels"] == {"x": EVIL}
    assert found["os"].isprintable() and found["layers"][0]["a"].isprintable() and found["layers"][1][0].isprintable()
    assert found["n"] == 1


class Module:
    params: dict[str, Any] = {}
    check_mode = False

    def __init__(self) -> None:
        self.said: list[Any] = []

    def warn(self, warning: str) -> None:
        self.said.append(warning)

    def exit_json(self, **values: Any) -> None:
        self.said.append(values)

    def fail_json(self, msg: str, **values: Any) -> None:
        self.said += [msg, values]


def test_modules_warn_fail_and_end_through_the_gate() -> None:
    def warns(module: Any) -> dict[str, Any]:
        module.warn(EVIL * 1000)
        return {"images": [{"os": EVIL, "architecture": EVIL}]}

    def fails(module: Any) -> dict[str, Any]:
        raise ImageNotFound(EVIL * 1000, "Hint.")

    for main in (warns, fails):
        module = Module()
        threshold.run_module(module, main)
        shown = module.said[0]
        assert shown.isprintable() and len(shown.encode()) <= text.MESSAGE_LIMIT
        assert "\x1b" not in str(module.said) and r"\x1b" in str(module.said)


def test_a_state_of_a_host_makes_one_printable_line() -> None:
    state = {"done": 0, "total": 0, "rate": 0, "layers": [], "message": EVIL * 100}
    assert progress.summary(state).isprintable() and len(progress.summary(state)) <= text.LINE_LIMIT
    state.update(done=5, total=5)
    assert progress.summary(state).isprintable() and len(progress.summary(state)) <= text.LINE_LIMIT
    board = progress.Board()
    board.take(progress.Event(progress.MESSAGE, text=EVIL * 100))
    assert board.text.isprintable() and len(board.text) <= text.LINE_LIMIT


@pytest.mark.parametrize(
    "change",
    [
        {"rate": float("inf"), "total": 1e400},
        {"total": float("nan")},
        {"layers": 3},
        {"done": "x", "total": 1},
        {"total": {}},
    ],
)
def test_a_state_that_is_none_raises_what_is_caught(change: dict[str, Any]) -> None:
    state = {"done": 0, "total": 10, "rate": 1e-320, "layers": [], "message": "", **change}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        assert progress.summary(state).isprintable()


def test_paths_within_a_document_are_written_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "iso8859-1")
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("latin-1"))
    monkeypatch.setattr(os, "fsdecode", lambda name: name.decode("latin-1"))
    values = {"path": "/b\xfcro", "name": "b\xfcro", "mount": {"upperdir": "/\u65e5", "opts": ["x"]}, "pending": None}
    used = text.named_files(values, text.file_name)
    assert used["path"] == "/b\xc3\xbcro" and used["name"] == "b\xfcro" and used["mount"]["upperdir"].isascii() is False
    assert text.named_files(used, text.from_file_name) == values


# --- names of files
# --------------------------------------------------------------------------------------------------------------------

NAME = "büro/日本"
MAKE = """
import json, os, sys
from ansible_collections.composefs.oci.plugins.module_utils import module, text
from ansible_collections.composefs.oci.plugins.module_utils.formats import fsverity
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount
from ansible_collections.composefs.oci.plugins.module_utils.store import create
from ansible_collections.composefs.oci.plugins.module_utils.store.repository import Repository

asked = json.loads(sys.argv[1])


class Module:
    check_mode = False
    params = asked["params"]

    def warn(self, text):
        pass

    def exit_json(self, **values):
        print(json.dumps({"encoding": sys.getfilesystemencoding(), **values}))

    def fail_json(self, **values):
        self.exit_json(**values)


def main(module_):
    path = module.repository_path(module_)
    create.create(path, fsverity.SHA256, create.DISABLED).close()
    with Repository.open(path, write=True) as repository:
        repository._symlink("streams/refs/oci/" + __import__(
            "ansible_collections.composefs.oci.plugins.module_utils.formats.repolayout", fromlist=["x"]
        ).encode_tag(asked["name"]), "../../oci-manifest-sha256:" + "0" * 64)
        tags = list(repository.tags())
        found = repository.tag_digest(asked["name"])
    return {"repository": path, "tags": tags, "found": found, "unit": bootmount.unit_name(path)}


module.run_module(Module(), main)
"""


def locales(tmp_path: pathlib.Path) -> dict[str, dict[str, str]]:
    """An environment for each locale that this machine can make."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    collection = tmp_path / "ansible_collections" / "composefs" / "oci"
    collection.parent.mkdir(parents=True)
    collection.symlink_to(pathlib.Path(text.__file__).resolve().parents[2])
    plain["PYTHONPATH"] = os.pathsep.join([str(tmp_path), *(path for path in sys.path if path)])
    found = {
        "utf-8": {**plain, "PYTHONUTF8": "1"},
        "ascii": {**plain, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    }
    if shutil.which("localedef"):
        made = ["localedef", "-f", "ISO-8859-1", "-i", "de_DE", str(tmp_path / "de_DE.ISO-8859-1")]
        if not subprocess.run(made, capture_output=True, check=False).returncode:
            found["iso8859-1"] = {**plain, "LOCPATH": str(tmp_path), "LC_ALL": "de_DE.ISO-8859-1", "PYTHONUTF8": "0"}
    return found


@pytest.mark.slow
def test_names_are_utf8_on_the_disk_and_the_same_text_in_every_locale(tmp_path: pathlib.Path) -> None:
    (tmp_path / "locales").mkdir()
    answers = {}
    for locale, environment in locales(tmp_path / "locales").items():
        base = tmp_path / locale
        base.mkdir()
        asked = {"params": {"repository": f"{base}/wörter"}, "name": NAME}
        answer = subprocess.run(
            [sys.executable, "-c", MAKE, json.dumps(asked)], env=environment, capture_output=True, check=False
        )
        assert answer.returncode == 0, answer.stderr.decode()
        values = json.loads(answer.stdout)
        assert values.pop("encoding") == locale, values
        assert values["repository"] == f"{base}/wörter"
        assert os.listdir(os.fsencode(base)) == ["wörter".encode()]
        tags = os.fsencode(base) + "/wörter/streams/refs/oci".encode()
        assert os.listdir(tags) == [NAME.replace("/", "%2F").encode()]
        answers[locale] = {**values, "repository": "", "unit": values["unit"].replace(locale.replace("-", r"\x2d"), "")}
    assert len({json.dumps(answer) for answer in answers.values()}) == 1
    assert answers["utf-8"]["tags"] == [NAME] and r"w\xc3\xb6rter" in answers["utf-8"]["unit"]


SAY = """
import contextlib, json, os, sys
from ansible_collections.composefs.oci.plugins.module_utils import module, text
from ansible_collections.composefs.oci.plugins.module_utils.operations import bootmount, maintenance, mounting, prune

path = json.loads(sys.argv[1])
answers = {}


class Module:
    check_mode = False
    params = {"path": path}

    def warn(self, text):
        pass

    def log(self, message):
        answers["logged"] = message

    def exit_json(self, **values):
        pass


def main(module_):
    target = mounting.Target("0" * 64, module_.params["path"], False)
    unit = bootmount.unit_text(target, module_.params["path"], interpreter="/usr/bin/python3")
    answers["unit"] = os.fsencode(unit).decode()
    module_.log(module_.params["path"] + " is mounted")
    return {}


def maintain(repository, wish, progress):
    answers["keep"] = wish.prune.keep
    return {"error": None, "findings": {}}


module.run_module(Module(), main)
words = maintenance.words(maintenance.Wish(prune=prune.Wish(keep=["b\\u00fcro*"])), "/srv")
answers["words"] = os.fsencode(" ".join(words)).decode()
maintenance.maintain = maintain
with contextlib.redirect_stdout(sys.stderr):
    maintenance.main(words, opened=lambda *_arguments, **_options: contextlib.nullcontext())
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_units_programs_and_logs_hold_the_same_text_in_every_locale(tmp_path: pathlib.Path) -> None:
    """A name that a timer shall keep must be kept whatever locale systemd runs it in, and no task may fail after it is
    done because a log cannot hold a name.
    """
    answers = {}
    for locale, environment in locales(tmp_path).items():
        words = [sys.executable, "-c", SAY, json.dumps("/srv/büro/日本")]
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, f"{locale}: {done.stderr.decode()}"
        answers[locale] = json.loads(done.stdout)
    expected = answers["utf-8"]
    assert all(answer == expected for answer in answers.values()), answers
    assert expected["logged"] == "/srv/büro/日本 is mounted" and expected["keep"] == ["büro*"]
    assert "Path=/srv/büro/日本\n" in expected["unit"] and "--keep=büro*" in expected["words"]
