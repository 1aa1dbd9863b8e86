# Copyright (c) composefs.oci contributors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import re
import sys
import signal
import threading
import time
from collections.abc import Sequence

import pytest
from ansible_collections.composefs.oci.plugins.module_utils.rootfs import lastmatch
from ansible_collections.composefs.oci.plugins.module_utils.rootfs.lastmatch import LastMatch, Pattern
from ansible_collections.composefs.oci.plugins.module_utils.errors import InvalidLayer
from hypothesis import given, settings
from hypothesis import strategies as st


def last(patterns: Sequence[bytes | Pattern], path: bytes, kind: bytes = b"-") -> int:
    machine = LastMatch([pattern if isinstance(pattern, Pattern) else Pattern(pattern) for pattern in patterns])
    return machine.best(machine.feed(machine.start, path), kind, path)


def takes(regex: bytes, path: bytes) -> bool:
    return last([regex], path) == 0


# What composefs-rs 0.9.4 (Rust regex, then PCRE2) does with each of them.
CASES: list[tuple[bytes, list[bytes], list[bytes]]] = [
    (rb"/x.*", [b"/x", b"/xy", b"/x\ny", b"/x\xff"], [b"/", b"/y", b"y/x"]),
    (rb"/xa+?b", [b"/xaab"], [b"/xb"]),
    (rb"/xa*+ab", [b"/xaab", b"/xab"], [b"/xb"]),
    (rb"/xa++", [b"/xa", b"/xaa"], [b"/x"]),
    (rb"/x[[:digit:]]+", [b"/x11"], [b"/x", b"/xa"]),
    (rb"/x[^[:digit:]]", [b"/xa"], [b"/x1"]),
    (rb"/x[[:^digit:]]", [b"/xa"], [b"/x1"]),
    (rb"/x\d\w\s\D\W\S", [b"/x1_ a-b"], [b"/x1- a-b", b"/x1_ 1-b"]),
    (rb"/x\.\-\/\x41\x{42}\n", [b"/x.-/AB\n"], [b"/xa-/AB\n"]),
    (rb"/x\056\0", [b"/x.\0"], [b"/x\0"]),
    (rb"/x{", [b"/x{"], [b"/x"]),
    (rb"/x{,2}", [b"/", b"/x", b"/xx"], [b"/xxx", b"/x{,2}"]),
    (rb"/x{2}y{1,}z{0,1}", [b"/xxy", b"/xxyyz"], [b"/xy", b"/xx", b"/xxyzz"]),
    (rb"/x{0}y", [b"/y"], [b"/xy"]),
    (rb"/x(a|b)(c|d)?{2}", [b"/xa", b"/xbcd", b"/xac"], [b"/xc", b"/xaccc"]),
    (rb"/x$", [], [b"/x"]),
    (rb"/x\z|/y\Z|/w", [b"/w"], [b"/x", b"/y"]),
    (rb"/x($)?", [b"/x"], [b"/x$"]),
    (rb"^/x", [b"/x"], [b"/xy"]),
    (rb"/x|/xy", [b"/x", b"/xy"], [b"/xyy"]),
    (rb"/a|/b/c|d", [b"/a", b"/b/c", b"d"], [b"/b", b"/ad"]),
    (rb"/x(|a)b()c(d|)", [b"/xbc", b"/xabcd"], [b"/xab"]),
    (rb"/(?i)xY", [b"/xy", b"/XY"], [b"/zy"]),
    (rb"/(?i:X)y", [b"/xy", b"/Xy"], [b"/xY"]),
    (rb"/(?i:[a-c\d])", [b"/B", b"/b", b"/1"], [b"/D"]),
    (rb"/(?P<n>x)(?<m>y)(?:z)", [b"/xyz"], [b"/xy"]),
    (rb"/x(?#c)y", [b"/xy"], [b"/x"]),
    (rb"/x(?-s).", [b"/xa"], [b"/x\n"]),
    (rb"/x[]a]+[^]a]", [b"/x]b", b"/xa]b"], [b"/x]a", b"/xb"]),
    (rb"/x[a-]c", [b"/x-c", b"/xac"], [b"/xbc"]),
    (rb"/x[\w-]d", [b"/x-d", b"/x_d"], [b"/x d"]),
    (rb"/x[\x41-\x43\]]", [b"/xB", b"/x]"], [b"/xD"]),
    (rb"/x]y}", [b"/x]y}"], [b"/x"]),
    ("/é+".encode(), ["/é".encode(), "/éé".encode()], [b"/\xc3\xa9\xa9"]),
    ("/[é]".encode(), [b"/\xc3"], ["/é".encode()]),
    (rb"/(ab?)*c", [b"/c", b"/ababc", b"/aac"], [b"/abbc"]),
    (rb"/(a*b*)*c", [b"/c", b"/bbaac"], [b"/d"]),
    (rb"/((a|b)?c){2,3}", [b"/cc", b"/acbcc"], [b"/c", b"/cccc", b"/ab"]),
    (rb"/usr/(.*/)?s?bin(/.*)?", [b"/usr/bin", b"/usr/sbin/x", b"/usr/local/bin/y"], [b"/usr/xbin", b"/usr/bing"]),
    (rb"", [b""], [b"/"]),
    # These are matched by Python's engine.
    (rb"/x(?!b)[^/]*", [b"/xa", b"/x"], [b"/xb"]),
    (rb"/x[^/]*(?<=b)", [b"/xb"], [b"/xa"]),
    (rb"/x[^/]*(?=-)", [b"/xa"], []),
    (rb"/x\.\by", [b"/x.y"], [b"/x.\by"]),
    (rb"/x(?=[[:digit:]])..(\z|)", [b"/x1a"], [b"/xa1"]),
    (rb"/(?<n>x)(?!z)y", [b"/xy"], [b"/xz"]),
    (rb"/x(a)\2", [b"/xaa"], [b"/xa"]),
]


@pytest.mark.parametrize(("regex", "good", "bad"), CASES, ids=[repr(case[0])[2:-1] for case in CASES])
def test_expressions_mean_what_they_mean_to_composefs(regex: bytes, good: list[bytes], bad: list[bytes]) -> None:
    assert [takes(regex, path) for path in good] == [True] * len(good)
    assert [takes(regex, path) for path in bad] == [False] * len(bad)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python before 3.11 has no atomic groups")
def test_atomic_groups() -> None:
    assert takes(rb"/(?>xa*)b", b"/xaab") and not takes(rb"/(?>xa*)ab", b"/xaab")


@pytest.mark.parametrize(
    "regex",
    [
        *(
            rb"/x(",
            rb"/x)",
            rb"*/x",
            rb"/x(*y)",
            rb"/x|*",
            rb"/(?i)*",
            rb"/x{2,1}",
            rb"/[z-a]",
            rb"/[a",
            rb"/[",
            rb"/x\q",
            b"/x\\",
            rb"/x(?#y",
            rb"/[a\q]",
        ),
        *(
            rb"/[a-c&&[^b]]",
            rb"/[a--b]",
            rb"/[a~~b]",
            rb"/[[a]]",
            rb"/[a-\d]",
            rb"/[\z]",
            rb"/(?!x",
            rb"/(?z)x",
            rb"/x{100000}",
            b"(" * 300 + b")" * 300,
        ),
        *(rb"/(.x)\1", rb"/(?!a)(x*)*", rb"/(?!a)((x|y+)z){3}"),
    ],
)
def test_what_no_engine_takes_is_refused(regex: bytes) -> None:
    with pytest.raises(InvalidLayer, match="cannot be used"):
        LastMatch([Pattern(regex)])


def test_the_last_of_all_that_match_wins() -> None:
    patterns = [rb"/.*", rb"/usr/.*", rb"/usr/bin/.*", rb"/usr/bin/x", rb"/usr/.*"]
    assert [last(patterns, path) for path in (b"/usr/bin/x", b"/etc", b"etc")] == [4, 0, -1]
    assert last(patterns[:4], b"/usr/bin/x") == 3


def test_patterns_of_one_type_only_see_that_type() -> None:
    patterns = [Pattern(b"/.*"), Pattern(b"/x", b"d"), Pattern(b"/x", b"-"), Pattern(b"/x(?!y)", b"l")]
    assert [last(patterns, b"/x", kind) for kind in (b"d", b"-", b"l", b"c")] == [1, 2, 3, 0]


def test_look_around_keeps_its_place_in_the_order() -> None:
    assert last([rb"/x(?!y).*", rb"/x.*"], b"/xz") == 1
    assert last([rb"/x.*", rb"/x(?!y).*", rb"/q"], b"/xz") == 1
    assert last([rb"/x.*", rb"/x(?!y).*", rb"/q"], b"/xy") == 0


def test_states_of_a_directory_serve_its_children() -> None:
    machine = LastMatch([Pattern(rb"/usr(/.*)?"), Pattern(rb"/usr/lib/.*\.so")])
    base = machine.feed(machine.start, b"/usr/lib/")
    assert [machine.best(machine.feed(base, name), b"-", b"") for name in (b"a.so", b"a.so.1", b"b")] == [1, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "regex",
    [
        rb"/(?=a)(a|a)*b",
        rb"/(aa|a)*\2x",
        rb"/(?!z)(?:a|a|aa)*c",
        rb"/(a?)" + rb"(aa|a)?" * 60 + rb"\2\3b(?!x)",
        rb"/(?:(?=a)a|a|(?<=a)a)*y",
    ],
)
def test_no_expression_with_look_around_or_back_references_runs_away(
    regex: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lastmatch, "_MAX_SECONDS", 0.5)
    before = signal.getsignal(signal.SIGVTALRM)
    started = time.process_time()
    with pytest.raises(InvalidLayer, match="seconds of the processor"):
        machine = LastMatch([Pattern(regex)])
        path = b"/" + b"a" * 200
        machine.best(machine.feed(machine.start, path), b"-", path)
    assert time.process_time() - started < 3
    assert signal.getsignal(signal.SIGVTALRM) == before and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)


def test_the_processor_time_is_that_of_all_paths_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lastmatch, "_MAX_SECONDS", 0.3)
    machine = LastMatch([Pattern(rb"/(?=a)(a|a)*b")])
    with pytest.raises(InvalidLayer, match="seconds of the processor"):
        for _path in range(100_000):
            machine.best(machine.start, b"-", b"/" + b"a" * 14)


def test_outside_of_the_main_thread_such_expressions_are_refused() -> None:
    machine = LastMatch([Pattern(rb"/x(?!y).*")])
    caught: list[BaseException] = []

    def work() -> None:
        try:
            machine.best(machine.start, b"-", b"/xa")
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(caught[0], InvalidLayer)


def test_no_expression_of_the_automaton_runs_away() -> None:
    started = time.process_time()
    for regex in (rb"/(a+)+b", rb"/(a|aa)*b", rb"/(a*)*(a*)*b", rb"/(.*a){20}b", rb"/a?{30}a{30}c"):
        assert not takes(regex, b"/" + b"a" * 3000)
    assert time.process_time() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "regex",
    [
        rb"/((a{1000}){1000}){1000}",
        rb"/(a?{1000}){1000}",
        b"/" + b"(a|b|c)*" * 5000 + b"d",
        rb"/((((.{1,99}){1,99}){1,99}){1,99})",
    ],
)
def test_expressions_that_need_much_room_are_refused_in_time(regex: bytes) -> None:
    started = time.process_time()
    with pytest.raises(InvalidLayer, match="too"):
        LastMatch([Pattern(regex)])
    assert time.process_time() - started < 5


def test_work_and_memory_of_matching_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = [Pattern(b"/.*%d.*%d.*" % (number, number * 7)) for number in range(50)]
    path = b"/" + b"".join(b"%d" % number for number in range(500))
    expected = LastMatch(patterns)
    found = expected.best(expected.feed(expected.start, path), b"-", path)
    monkeypatch.setattr(lastmatch, "_MAX_KEPT", 500)
    machine = LastMatch(patterns)
    assert machine.best(machine.feed(machine.start, path), b"-", path) == found
    assert sum(len(items) for items in machine._states) < 1500
    monkeypatch.setattr(lastmatch, "_MAX_WORK", 5000)
    machine = LastMatch(patterns)
    with pytest.raises(InvalidLayer, match="too complex"):
        machine.feed(machine.start, path)


# --- against one expression after the other
# -----------------------------------------------------------------------------------------------------------

ATOMS = [
    b"a",
    b"b",
    b"/",
    b"ab",
    rb"\.",
    b".",
    b"[^/]",
    b"[ab]",
    rb"[^a]",
    b"(a|b/)",
    b"((/.*)?)",
    b"(?:ab)",
    b"(a|)",
    b"(b(a)?)",
]
QUANTIFIERS = [b""] * 6 + [b"*", b"+", b"?", b"*?", b"{2}", b"{0,2}", b"{1,}"]
SEQUENCES = st.lists(st.tuples(st.sampled_from(ATOMS), st.sampled_from(QUANTIFIERS)), max_size=6).map(
    lambda parts: b"".join(map(b"".join, parts))
)
# A quantifier behind a sequence of two would belong to the second alone, for both engines; groups make longer ones.
EXPRESSIONS = st.one_of(
    SEQUENCES,
    SEQUENCES,
    st.tuples(SEQUENCES, SEQUENCES).map(b"|".join),
    st.tuples(SEQUENCES, SEQUENCES, st.sampled_from(QUANTIFIERS)).map(
        lambda parts: b"/(" + parts[0] + b"|" + parts[1] + b")" + parts[2]
    ),
    SEQUENCES.map(lambda sequence: sequence + b"(?!x)"),
)
STRINGS = st.lists(st.sampled_from([b"a", b"b", b"/", b"ab", b".", b"\n", b"/a"]), max_size=7).map(b"".join)


@pytest.mark.slow
@given(
    st.lists(
        st.tuples(
            EXPRESSIONS.map(lambda regex: b"/" + regex if b"|" not in regex else regex),
            st.sampled_from([b"", b"", b"-", b"d"]),
        ),
        max_size=12,
    ),
    st.lists(STRINGS.map(lambda path: b"/" + path), min_size=1, max_size=6),
    st.sampled_from([b"-", b"d"]),
)
@settings(max_examples=150, deadline=None)
def test_any_patterns_match_as_one_after_the_other_would(
    lines: list[tuple[bytes, bytes]], paths: list[bytes], kind: bytes
) -> None:
    patterns = [Pattern(*line) for line in lines]
    try:
        machine = LastMatch(patterns)
    except InvalidLayer as error:
        assert "nested repetition" in str(error)
        return
    compiled = [re.compile(rb"\A(?:" + regex + b")" + (only or b".") + rb"\Z", re.DOTALL) for regex, only in lines]
    for path in paths:
        expected = max((number for number, one in enumerate(compiled) if one.match(path + kind)), default=-1)
        assert machine.best(machine.feed(machine.start, path), kind, path) == expected
