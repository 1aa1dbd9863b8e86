# Copyright (c) composefs.oci contributors
# SPDX-License-Identifier: BSD-2-Clause
"""Find the last of thousands of regular expressions that matches a whole path.

An SELinux policy has some 6,000 of them and an image 100,000 paths: one after the other would take hours. Here all
become one automaton whose states are made when a path first needs them. A path then costs one look-up per byte, a
directory's state is the start for all its children, and no expression can run away: time is linear in the path whatever
the expression.

Positions, not characters, are the states of the underlying machine (Glushkov's construction): each has the bytes it
takes and the positions that may follow. Expressions share the positions of their literal beginnings.

The dialect is that of file_contexts as composefs-rs 0.9 reads it (Rust regex on bytes, dot takes a newline too, PCRE2
where Rust cannot): literals, classes, groups, alternation, greedy and lazy repetition; two quantifiers in a row repeat
the repetition. What needs more (look-around, word boundaries, back references, atomic groups) goes to Python's ``re``,
one by one. That engine backtracks, and some expressions would keep it busy for years. So a timer of the process
interrupts it; this works in the main thread only.
"""

from __future__ import annotations

import contextlib
import re
import signal
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..errors import InvalidLayer

_MAX_NESTING = 250
_MAX_REPEAT = 1000
#: Positions and edges of all expressions together: a policy of Fedora needs 200,000.
_MAX_SIZE = 1_500_000
#: Positions in all states that are kept; beyond that they are made anew when needed.
_MAX_KEPT = 3_000_000
#: Positions in all states that are ever made; an image with Fedora's policy needs a few million.
_MAX_WORK = 100_000_000
#: Seconds of the processor that all expressions with look-around may use together; those of real policies need less
#: than one.
_MAX_SECONDS = 60.0

_QUANTIFIER = re.compile(rb"\{(?=[0-9]|,[0-9])([0-9]{0,6})(,?)([0-9]{0,6})\}")
_PLAIN = re.compile(rb"(?:[^\\.^$|?*+()\[\]{}\x80-\xff]|\\[^0-9A-Za-z\x80-\xff])*")
_GROUP_NAME = re.compile(rb"\?P?<[A-Za-z_][A-Za-z0-9_]*>")
_FLAGS = re.compile(rb"\?([is]*)(?:-([is]+))?([:)])")
_POSIX_CLASS = re.compile(rb"\[:(\^?)([a-z]+):\]")


def _members(test: str) -> frozenset[int]:
    return frozenset(byte for byte in range(256) if re.match(test.encode(), bytes((byte,)), re.DOTALL))


_ALL = frozenset(range(256))
_NOT_NEWLINE = _ALL - {10}
_ESCAPED = {ord("d"): _members("[0-9]"), ord("w"): _members("[0-9A-Za-z_]"), ord("s"): _members("[ \t\n\r\f\v]")}
_ESCAPED.update({char - 32: _ALL - members for char, members in list(_ESCAPED.items())})
_CONTROL = {ord("n"): 10, ord("t"): 9, ord("r"): 13, ord("f"): 12, ord("v"): 11, ord("a"): 7, ord("e"): 27}
_POSIX_RANGES = {
    b"alnum": b"0-9A-Za-z",
    b"alpha": b"A-Za-z",
    b"ascii": rb"\x00-\x7f",
    b"blank": rb"\x20\t",
    b"cntrl": rb"\x00-\x1f\x7f",
    b"digit": b"0-9",
    b"graph": b"!-~",
    b"lower": b"a-z",
    b"print": rb"\x20-~",
    b"punct": rb"!-/:-@\[-`{-~",
    b"space": rb"\t\n\v\f\r\x20",
    b"upper": b"A-Z",
    b"word": b"0-9A-Za-z_",
    b"xdigit": b"0-9A-Fa-f",
}
_POSIX = {name: _members(f"[{ranges.decode()}]") for name, ranges in _POSIX_RANGES.items()}


class Pattern(NamedTuple):
    """One expression that has to match a whole path; ``kind`` is the type character it is limited to, or empty."""

    regex: bytes
    kind: bytes = b""


class _Unsupported(Exception):
    """The automaton cannot express this; Python's engine may."""


class _Malformed(Exception):
    """No engine can express this."""


class _TooLong(Exception):
    """The processor time is used up."""


class _Fragment(NamedTuple):
    """A piece of an expression: its positions are low..high, and all edges so far stay within."""

    low: int
    high: int
    nullable: bool
    first: list[int]
    last: list[int]


class State:
    """What may follow after the bytes so far: positions, and (negative) the expressions that match if the path ends
    here.
    """

    __slots__ = ("items", "next", "literals", "classes", "best")

    def __init__(self, items: frozenset[int]) -> None:
        self.items = items
        self.next: dict[int, State] = {}
        self.literals: dict[int, set[int]] | None = None
        self.classes: dict[bytes, set[int]] = {}
        self.best: dict[bytes, int] = {}


class LastMatch:
    """The automaton of many patterns. Raises InvalidLayer for a pattern that is malformed or too complex."""

    def __init__(self, patterns: Sequence[Pattern]) -> None:
        self._patterns = patterns
        # Position 0 is the start and takes nothing.
        self._takes: list[int | bytes] = [-1]
        self._follow: list[list[int]] = [[]]
        self._edges = 0
        self._prefixes: dict[tuple[int, int], int] = {}
        self._tables: dict[frozenset[int], bytes] = {}
        # (index, type character, compiled), the last first
        self._slow: list[tuple[int, bytes, re.Pattern[bytes]]] = []
        self._slow_seconds = 0.0
        for index, pattern in enumerate(patterns):
            self._compile(index, pattern)
        self._slow.reverse()
        self._prefixes.clear()
        self._states: dict[frozenset[int], State] = {}
        self._kept = 0
        self._work = 0
        self._dead = State(frozenset())
        self.start = self._state(frozenset(self._follow[0]))

    # -- matching -----------------------------------------------------------------------------------------------------

    @property
    def needs_path(self) -> bool:
        """Whether best() looks at the path, too."""
        return bool(self._slow)

    def feed(self, state: State, data: bytes) -> State:
        """The state after ``data``."""
        for byte in data:
            following = state.next.get(byte)
            if following is None:
                if not state.items:
                    return state
                following = self._step(state, byte)
            state = following
        return state

    def best(self, state: State, kind: bytes, path: bytes) -> int:
        """The index of the last pattern that matches ``path`` of the type ``kind``, -1 for none; ``state`` is the one
        after the whole path.
        """
        found = state.best.get(kind)
        if found is None:
            found = max(
                (~item for item in state.items if item < 0 and self._patterns[~item].kind in (b"", kind)), default=-1
            )
            state.best[kind] = found
        if self._slow:
            found = self._best_slow(found, kind, path)
        return found

    def _best_slow(self, found: int, kind: bytes, path: bytes) -> int:
        subject = path + kind
        with self._bounded():
            for index, only, pattern in self._slow:
                if index < found:
                    break
                if only in (b"", kind) and pattern.match(subject):
                    return index
        return found

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Let Python's engine work as long as there is processor time left for it. Raises InvalidLayer."""
        started = time.process_time()
        try:
            with _timer(_MAX_SECONDS - self._slow_seconds):
                yield
        except _TooLong:
            raise InvalidLayer(
                f"The SELinux policy of the image has expressions with look-around or back references that take more "
                f"than {_MAX_SECONDS:g} seconds of the processor.",
                "Have the policy of the image built without them.",
            ) from None
        finally:
            self._slow_seconds += time.process_time() - started

    def _state(self, items: frozenset[int]) -> State:
        state = self._states.get(items)
        if state is None:
            if not items:
                return self._dead
            size = len(items)
            self._work += size
            if self._work > _MAX_WORK:
                raise InvalidLayer("The SELinux policy of the image is too complex to be matched with its paths.")
            if self._kept + size > _MAX_KEPT:
                # States in use by the caller live on and find their successors anew.
                for old in self._states.values():
                    old.next = {}
                self._states.clear()
                self._kept = 0
            self._kept += size
            state = self._states[items] = State(items)
        return state

    def _step(self, state: State, byte: int) -> State:
        if state.literals is None:
            # What follows is the same for all positions that take the same: joined once, it serves every byte.
            literals: dict[int, set[int]] = {}
            for position in state.items:
                if position >= 0:
                    takes = self._takes[position]
                    if takes.__class__ is int:
                        literals.setdefault(takes, set()).update(self._follow[position])
                    else:
                        state.classes.setdefault(takes, set()).update(self._follow[position])  # type: ignore[arg-type]
            state.literals = literals
        sets = [following for table, following in state.classes.items() if table[byte]]
        if byte in state.literals:
            sets.append(state.literals[byte])
        following = state.next[byte] = self._state(frozenset().union(*sets) if sets else frozenset())
        return following

    # -- compiling ----------------------------------------------------------------------------------------------------

    def _compile(self, index: int, pattern: Pattern) -> None:
        start, offset = self._prefix(pattern.regex)
        positions = len(self._takes)
        try:
            fragment = self._parse(pattern.regex, offset)
        except _Unsupported:
            # No edge leads to the new positions yet, so they can be dropped.
            del self._takes[positions:]
            del self._follow[positions:]
            with self._bounded():
                self._slow.append((index, pattern.kind, _translate(pattern)))
            return
        except _Malformed as error:
            raise _refusal(pattern.regex, str(error)) from None
        self._follow[start].extend(fragment.first)
        for position in fragment.last:
            self._follow[position].append(~index)
        if fragment.nullable:
            self._follow[start].append(~index)
        self._grow(len(fragment.first) + len(fragment.last))

    def _grow(self, edges: int) -> None:
        self._edges += edges
        if self._edges + len(self._takes) > _MAX_SIZE:
            raise InvalidLayer("The SELinux policy of the image has too many or too large expressions.")

    def _prefix(self, regex: bytes) -> tuple[int, int]:
        """Follow the literal beginning along positions shared with other patterns. Returns the last of these positions,
        and where the rest of the expression begins.
        """
        found = _PLAIN.match(regex)
        end = found.end() if found else 0
        if end < len(regex):
            if _top_level_alternation(regex):
                return 0, 0
            if regex[end] in b"?*+{" and end:
                # The quantifier belongs to the last character only.
                end -= 2 if end > 1 and regex[end - 2] == 0x5C and not _escaped(regex, end - 2) else 1
        position = 0
        skip = False
        for at in range(end):
            byte = regex[at]
            if byte == 0x5C and not skip:
                skip = True
                continue
            skip = False
            following = self._prefixes.get((position, byte))
            if following is None:
                following = self._position(byte)
                self._prefixes[position, byte] = following
                self._follow[position].append(following)
            position = following
        return position, end

    def _position(self, takes: int | bytes) -> int:
        self._takes.append(takes)
        self._follow.append([])
        self._grow(0)
        return len(self._takes) - 1

    def _single(self, members: frozenset[int], fold: bool) -> _Fragment:
        if fold:
            members = members | {byte ^ 32 for byte in members if 65 <= byte & ~32 <= 90}
        takes: int | bytes
        if len(members) == 1:
            (takes,) = members
        else:
            table = self._tables.get(members)
            if table is None:
                table = self._tables[members] = bytes(byte in members for byte in range(256))
            takes = table
        position = self._position(takes)
        return _Fragment(position, position + 1, False, [position], [position])

    def _nothing(self, nullable: bool) -> _Fragment:
        """Matches the empty string, or never."""
        position = len(self._takes)
        return _Fragment(position, position, nullable, [], [])

    def _join(self, parts: list[_Fragment]) -> _Fragment:
        if not parts:
            return self._nothing(True)
        result = parts[0]
        for part in parts[1:]:
            self._grow(len(result.last) * len(part.first))
            for position in result.last:
                self._follow[position].extend(part.first)
            first = result.first + part.first if result.nullable else result.first
            last = part.last + result.last if part.nullable else part.last
            self._grow(len(first) + len(last) if result.nullable or part.nullable else 0)
            result = _Fragment(result.low, part.high, result.nullable and part.nullable, first, last)
        return result

    def _copy(self, fragment: _Fragment) -> _Fragment:
        shift = len(self._takes) - fragment.low
        if fragment.high > fragment.low:
            self._takes.extend(self._takes[fragment.low : fragment.high])
            copies = [
                [position + shift for position in follow] for follow in self._follow[fragment.low : fragment.high]
            ]
            self._follow.extend(copies)
            self._grow(sum(map(len, copies)))
        move = [position + shift for position in fragment.first]
        return _Fragment(
            fragment.low + shift,
            fragment.high + shift,
            fragment.nullable,
            move,
            [position + shift for position in fragment.last],
        )

    def _loop(self, fragment: _Fragment) -> _Fragment:
        self._grow(len(fragment.first) * len(fragment.last))
        for position in fragment.last:
            follow = self._follow[position]
            follow.extend(set(fragment.first).difference(follow))
        return fragment

    def _repeat(self, fragment: _Fragment, least: int, most: int | None) -> _Fragment:
        if most == 0:
            return self._nothing(True)
        total = max(least, 1) if most is None else most
        # The copies are made while the original has no loop yet.
        parts = [fragment] + [self._copy(fragment) for _unused in range(total - 1)]
        if most is None:
            parts[-1] = self._loop(parts[-1])
        parts = [part if number < least else part._replace(nullable=True) for number, part in enumerate(parts)]
        joined = self._join(parts)
        return joined._replace(low=fragment.low, high=len(self._takes))

    def _parse(self, regex: bytes, at: int) -> _Fragment:
        end = len(regex)
        # Per open group: its finished alternatives, the parts of the current one, and the flags outside it.
        outer: list[tuple[list[_Fragment], list[_Fragment], bool, bool]] = []
        alternatives: list[_Fragment] = []
        parts: list[_Fragment] = []
        fold, newline = False, True
        quantifiable = False
        while at < end:
            byte = regex[at]
            at += 1
            if byte == 0x28:  # (
                if len(outer) >= _MAX_NESTING:
                    raise _Malformed("it nests too deeply")
                if regex.startswith(b"*", at):
                    raise _Malformed("verbs are not possible")
                if regex.startswith(b"?#", at):
                    at = regex.find(b")", at) + 1
                    if not at:
                        raise _Malformed("a comment has no end")
                    continue
                at, inner_fold, inner_newline, alone = _parse_flags(regex, at, fold, newline)
                if alone:
                    fold, newline = inner_fold, inner_newline
                    quantifiable = False
                    continue
                outer.append((alternatives, parts, fold, newline))
                alternatives, parts, fold, newline = [], [], inner_fold, inner_newline
                quantifiable = False
                continue
            if byte == 0x7C:  # |
                alternatives.append(self._join(parts))
                parts = []
                quantifiable = False
                continue
            if byte == 0x29:  # )
                if not outer:
                    raise _Malformed("a parenthesis is closed that was not opened")
                alternatives.append(self._join(parts))
                group = self._either(alternatives)
                alternatives, parts, fold, newline = outer.pop()
                parts.append(group)
                quantifiable = True
                continue
            bounds = self._quantifier(regex, at - 1)
            if bounds is not None:
                if not quantifiable:
                    raise _Malformed("there is nothing to repeat")
                least, most, at = bounds
                if regex.startswith(b"?", at):
                    # Lazy or greedy: whole paths match either way.
                    at += 1
                parts[-1] = self._repeat(parts[-1], least, most)
                continue
            if byte == 0x5E:  # ^
                if outer or parts:
                    raise _Unsupported
                quantifiable = False
                continue
            quantifiable = True
            part, at = self._atom(regex, at - 1, fold, newline)
            parts.append(part)
        if outer:
            raise _Malformed("a parenthesis is not closed")
        alternatives.append(self._join(parts))
        return self._either(alternatives)

    def _atom(self, regex: bytes, at: int, fold: bool, newline: bool) -> tuple[_Fragment, int]:
        """What matches one character, or the end of the text, at ``at``; and where it ends."""
        byte = regex[at]
        at += 1
        if byte == 0x2E:  # .
            return self._single(_ALL if newline else _NOT_NEWLINE, False), at
        if byte == 0x5B:  # [
            members, at = _parse_class(regex, at)
            return self._single(members, fold), at
        if byte == 0x5C:  # a backslash
            escaped, at = _parse_escape(regex, at)
            # End of text: after a path there always comes its type.
            return self._nothing(False) if escaped is None else self._single(escaped, fold), at
        if byte == 0x24:  # $
            return self._nothing(False), at
        if byte >= 0xC0:
            # A character of several bytes is repeated as a whole.
            stop = at
            while stop < len(regex) and 0x80 <= regex[stop] < 0xC0:
                stop += 1
            return self._join([self._single(frozenset((one,)), False) for one in regex[at - 1 : stop]]), stop
        return self._single(frozenset((byte,)), fold), at

    def _either(self, alternatives: list[_Fragment]) -> _Fragment:
        if len(alternatives) == 1:
            return alternatives[0]
        first = [position for part in alternatives for position in part.first]
        last = [position for part in alternatives for position in part.last]
        self._grow(len(first) + len(last))
        return _Fragment(
            alternatives[0].low, alternatives[-1].high, any(part.nullable for part in alternatives), first, last
        )

    @staticmethod
    def _quantifier(regex: bytes, at: int) -> tuple[int, int | None, int] | None:
        byte = regex[at]
        if byte == 0x2A:
            return 0, None, at + 1
        if byte == 0x2B:
            return 1, None, at + 1
        if byte == 0x3F:
            return 0, 1, at + 1
        found = _QUANTIFIER.match(regex, at) if byte == 0x7B else None
        if not found:
            return None
        least = int(found.group(1) or 0)
        most = least if not found.group(2) else int(found.group(3)) if found.group(3) else None
        if most is not None and most < least:
            raise _Malformed("the numbers of a repetition are out of order")
        if max(least, most or 0) > _MAX_REPEAT:
            raise _Malformed("it repeats too often")
        return least, most, found.end()


def _escaped(regex: bytes, at: int) -> bool:
    """Whether the byte at ``at`` follows an odd number of backslashes."""
    count = 0
    while at > count and regex[at - 1 - count] == 0x5C:
        count += 1
    return count % 2 == 1


def _top_level_alternation(regex: bytes) -> bool:
    if b"|" not in regex:
        return False
    depth, at = 0, 0
    while at < len(regex):
        byte = regex[at]
        if byte == 0x5C:
            at += 1
        elif byte == 0x5B:
            try:
                at = _parse_class(regex, at + 1)[1] - 1
            except (_Unsupported, _Malformed):
                return True
        elif byte == 0x28:
            depth += 1
        elif byte == 0x29:
            depth -= 1
        elif byte == 0x7C and depth <= 0:
            return True
        at += 1
    return False


def _parse_escape(regex: bytes, at: int) -> tuple[frozenset[int] | None, int]:
    """What the escape whose backslash stands before ``at`` takes; None for the end of the text."""
    if at >= len(regex):
        raise _Malformed("it ends with a backslash")
    byte = regex[at]
    at += 1
    if byte in _ESCAPED:
        return _ESCAPED[byte], at
    if byte in _CONTROL:
        return frozenset((_CONTROL[byte],)), at
    if byte == 0x78:
        found = re.compile(rb"([0-9A-Fa-f]{2})|\{0*([0-9A-Fa-f]{1,2})\}").match(regex, at)
        if not found:
            raise _Unsupported
        return frozenset((int(found.group(1) or found.group(2), 16),)), found.end()
    if byte == 0x30:
        octal = re.compile(rb"[0-7]{0,2}").match(regex, at)
        digits = octal.group() if octal else b""
        return frozenset((int(b"0" + digits, 8),)), at + len(digits)
    if byte in b"zZ":
        return None, at
    if chr(byte).isalnum() or byte >= 0x80:
        raise _Unsupported
    return frozenset((byte,)), at


def _parse_flags(regex: bytes, at: int, fold: bool, newline: bool) -> tuple[int, bool, bool, bool]:
    """What follows the parenthesis that was opened before ``at``: where its content begins, whether case is ignored and
    a dot matches a newline there, and whether these flags stand alone and hold for what follows.
    """
    if not regex.startswith(b"?", at):
        return at, fold, newline, False
    name = _GROUP_NAME.match(regex, at)
    if name:
        return name.end(), fold, newline, False
    flags = _FLAGS.match(regex, at)
    if not flags:
        raise _Unsupported
    on, off = flags.group(1), flags.group(2) or b""
    fold = (fold or b"i" in on) and b"i" not in off
    newline = (newline or b"s" in on) and b"s" not in off
    return flags.end(), fold, newline, flags.group(3) == b")"


def _parse_class(regex: bytes, at: int) -> tuple[frozenset[int], int]:
    """The members of the class whose bracket stands before ``at``, and where it ends."""
    negated = regex.startswith(b"^", at)
    at += negated
    members: set[int] = set()
    # A bracket right at the beginning is a member.
    beginning = True
    while True:
        if at >= len(regex):
            raise _Malformed("a character class is not closed")
        byte = regex[at]
        if byte == 0x5D and not beginning:
            at += 1
            break
        beginning = False
        if byte == 0x5B:
            posix = _POSIX_CLASS.match(regex, at)
            if not posix or posix.group(2) not in _POSIX:
                # One engine reads this as a nested class, the other as a bracket.
                raise _Malformed("a bracket within a character class must be escaped")
            named = _POSIX[posix.group(2)]
            members |= _ALL - named if posix.group(1) else named
            at = posix.end()
            continue
        if regex[at : at + 2] in (b"&&", b"~~", b"--"):
            raise _Malformed("operations on character classes are not supported")
        at += 1
        single: frozenset[int] | None = frozenset((byte,))
        if byte == 0x5C:
            if regex.startswith(b"b", at):
                single, at = frozenset((8,)), at + 1
            else:
                single, at = _parse_escape(regex, at)
            if single is None:
                raise _Malformed("a character class has an unknown escape")
        if (
            len(single or ()) == 1
            and regex.startswith(b"-", at)
            and not regex.startswith(b"-]", at)
            and at + 1 < len(regex)
        ):
            at += 1
            last = regex[at]
            at += 1
            if last == 0x5B or (last == 0x2D and regex.startswith(b"-", at)):
                raise _Malformed("operations on character classes are not supported")
            if last == 0x5C:
                top, at = _parse_escape(regex, at)
                if top is None or len(top) != 1:
                    raise _Malformed("a range of a character class has no end")
                (last,) = top
            (low,) = single or frozenset((0,))
            if last < low:
                raise _Malformed("a range of a character class is out of order")
            members.update(range(low, last + 1))
        else:
            members |= single or frozenset()
    return frozenset(_ALL - members if negated else members), at


@contextlib.contextmanager
def _timer(seconds: float) -> Iterator[None]:
    """Raise _TooLong within the block after so many seconds of processor time (Python's engine for expressions looks
    for signals every few thousand steps).
    """

    def ring(_number: int, _frame: object) -> None:
        raise _TooLong

    if seconds <= 0:
        raise _TooLong
    try:
        before = signal.signal(signal.SIGVTALRM, ring)
    except ValueError:
        raise InvalidLayer(
            "The SELinux policy of the image has expressions with look-around or back references, which can be bounded "
            "in the main thread only."
        ) from None
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def _refusal(regex: bytes, why: str) -> InvalidLayer:
    shown = regex[:200].decode("utf-8", "backslashreplace")
    return InvalidLayer(f"The SELinux policy of the image has the expression {shown!r} that cannot be used: {why}.")


def _translate(pattern: Pattern) -> re.Pattern[bytes]:
    """The same for Python's engine, which is matched against path and type character."""
    regex = pattern.regex
    if _runs_away(regex):
        raise _refusal(regex, "it combines look-around with nested repetition")
    text = re.sub(rb"\(\?<(?![=!])", b"(?P<", regex)
    text = _POSIX_CLASS.sub(
        lambda found: _POSIX_RANGES.get(found.group(2), found.group()) if not found.group(1) else found.group(), text
    )
    text = re.sub(rb"((?<!\\)(?:\\\\)*)\\z", rb"\1\\Z", text)
    kind = re.escape(pattern.kind) if pattern.kind else b"."
    try:
        return re.compile(rb"\A(" + text + b")" + kind + rb"\Z", re.DOTALL)
    except (re.error, RecursionError, OverflowError) as error:
        raise _refusal(regex, str(error)) from None


def _runs_away(regex: bytes) -> bool:
    """Whether a repeated group repeats something itself: a backtracking engine may then need exponential time."""
    repeats = [False]
    at = 0
    while at < len(regex):
        byte = regex[at]
        if byte == 0x5C:
            at += 1
        elif byte == 0x28:
            repeats.append(False)
        elif byte == 0x29 and len(repeats) > 1:
            inner = repeats.pop()
            if inner and regex[at + 1 : at + 2] in (b"*", b"+", b"{"):
                return True
            repeats[-1] = repeats[-1] or inner
        elif byte in b"*+{":
            repeats[-1] = True
        at += 1
    return False
