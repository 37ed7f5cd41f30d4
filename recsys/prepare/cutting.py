"""Where rows of text end, seen as Arrow's parser sees it, and which JSON lines are no object.

A quote opens a field only where a field starts; anywhere else it is a character like others. Within such a field two
quotes are one character, and the next single one closes it, whatever follows.
"""

import json
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

QUOTED_LINES = 1000
"""Line breaks that one quoted field may hold; more of them are taken for a quote that was never closed."""

_WINDOW = 1 << 17  # bytes that are looked at together: what NumPy makes of them stays in the processor's cache
_LF, _CR = ord("\n"), ord("\r")
_AFTER_BRACE = np.isin(np.arange(256), np.frombuffer(b",}]\r\n", np.uint8))
_BLANK = np.isin(np.arange(256), np.frombuffer(b" \t", np.uint8))
_BLANKS = 8
_LINE_END = re.compile(rb"\r\n?|\n")


class TooManyLines(ValueError):
    """A quoted field holds more than `QUOTED_LINES` line breaks.

    Attributes:
        opened: where in the text its quote is.
    """

    def __init__(self, opened: int) -> None:
        super().__init__(f"the quoted field at byte {opened} has more than {QUOTED_LINES} line breaks")
        self.opened = opened


class Cut(NamedTuple):
    """Where a text is cut.

    Attributes:
        end: of its last whole row; 0 if there is none.
        opened: where the quoted field opens in which the text ends; -1 if it ends in none.
    """

    end: int
    opened: int


class _Window(NamedTuple):
    """Bytes `start` to `stop` of a text.

    Attributes:
        inside: whether a quoted field is open at its start.
        marks: places at which quoted fields open or close.
        states: whether one is open after each.
    """

    start: int
    stop: int
    inside: bool
    marks: NDArray[np.int64]
    states: NDArray[np.bool_]


class Cutter:
    """Finds the ends of rows in texts that begin with a row.

    Args:
        quote: of CSV fields; None if nothing encloses them, as in JSON Lines.
        delimiter: between CSV fields.
    """

    def __init__(self, quote: str | None, delimiter: str = ",") -> None:
        self._quote = quote.encode() if quote else b""
        self._opens = np.isin(np.arange(256), np.frombuffer(f"{delimiter}\r\n".encode(), np.uint8))

    def last(self, text: bytes, final: bool) -> Cut:
        """The end of the last row that is whole; if `final`, nothing follows the text, and its end is a row's end."""
        if not self._quoted(text):
            end = max(text.rfind(b"\n"), text.rfind(b"\r", 0, max(0, len(text) - 1))) + 1
            return Cut(len(text) if final else end, -1)
        windows, opened = [], -1
        for window in self._windows(text):
            windows.append((window.start, window.stop, window.inside))
            if len(window.states):
                opened = int(window.marks[-1]) if window.states[-1] else -1
        if final and opened < 0:
            return Cut(len(text), -1)
        for start, stop, inside in reversed(windows):
            if len(ends := self._ends(text, self._window(text, start, stop, inside))[0]):
                return Cut(int(ends[-1]), opened)
        return Cut(0, opened)

    def first(self, text: bytes) -> int:
        """The end of the first row of a text of whole rows.

        Raises:
            TooManyLines: a quote in it is not closed for long.
        """
        return next((int(ends[0]) for ends in self.ends(text) if len(ends)), len(text))

    def rows(self, text: bytes) -> tuple[int, int]:
        """How many rows a text of whole rows has, and how many lines of nothing are among them.

        Raises:
            TooManyLines: a quote is not closed for long.
        """
        rows = blank = previous = 0
        for ends in self.ends(text):
            sizes = np.diff(ends, prepend=previous)
            blank += int((sizes == 1).sum())
            pairs = ends[sizes == 2]
            blank += sum(text[end - 2 : end] == b"\r\n" for end in pairs.tolist())
            rows += len(ends)
            previous = int(ends[-1]) if len(ends) else previous
        # The last row may lack a line end, or have a lone carriage return, which counts as an end only before others.
        rest = text[previous:]
        return rows + bool(rest), blank + (rest == b"\r")

    def middle(self, text: bytes) -> int:
        """Where the row begins that is nearest to the middle of a text of whole rows; 0 if it has one row only.

        Raises:
            TooManyLines: a quote is not closed for long.
        """
        half = len(text) // 2
        if not self._quoted(text) and b"\r" not in text:
            near: tuple[int, ...] = (text.rfind(b"\n", 0, half) + 1, text.find(b"\n", half) + 1)
        else:
            near = tuple(int(ends[np.abs(ends - half).argmin()]) for ends in self.ends(text) if len(ends))
        inner = [end for end in near if 0 < end < len(text)]
        return min(inner, key=lambda end: abs(end - half), default=0)

    def ends(self, text: bytes) -> Iterator[NDArray[np.int64]]:
        """The ends of all rows, in order, some at a time; that of a last row without a line break is not among them.

        Raises:
            TooManyLines: a quote is not closed for long.
        """
        if not self._quoted(text):
            for start in range(0, len(text), _WINDOW):
                yield _line_ends(text, start, min(start + _WINDOW, len(text)))
            return
        opened, breaks = -1, 0
        for window in self._windows(text):
            ends, within = self._ends(text, window)
            # `within` has for each line break in a field how many marks of this window are before it, so that equal
            # numbers belong to one field; 0 belongs to the field that was open at the window's start.
            fields, counts = np.unique(within, return_counts=True)
            if len(fields) and fields[0] == 0:
                counts[0] += breaks
            if (counts > QUOTED_LINES).any():
                field = int(fields[counts > QUOTED_LINES][0])
                position = opened if field == 0 else int(window.marks[field - 1])
                yield ends[ends <= position]
                raise TooManyLines(position)
            if len(window.states):
                opened, breaks = (int(window.marks[-1]), 0) if window.states[-1] else (-1, 0)
            if opened >= 0 and len(fields) and fields[-1] == len(window.marks):
                breaks = int(counts[-1])
            yield ends

    def _quoted(self, text: bytes) -> bool:
        return bool(self._quote) and self._quote in text

    def _windows(self, text: bytes) -> Iterator[_Window]:
        start, inside = 0, False
        while start < len(text):
            stop = min(start + _WINDOW, len(text))
            while following := text[stop : stop + _WINDOW]:  # a run of quotes stays in one window
                stop += len(following) - len(following.lstrip(self._quote))
                if text[stop : stop + 1] != self._quote:
                    break
            window = self._window(text, start, stop, inside)
            yield window
            inside = bool(window.states[-1]) if len(window.states) else inside
            start = stop

    def _window(self, text: bytes, start: int, stop: int, inside: bool) -> _Window:
        characters = np.frombuffer(text, np.uint8)
        quotes = np.flatnonzero(characters[start:stop] == self._quote[0])
        first = np.ones(len(quotes), np.bool_)
        np.not_equal(quotes[1:], quotes[:-1] + 1, out=first[1:])
        runs = np.flatnonzero(first)
        # Of an even run nothing remains: pairs within a field, an empty field, or characters outside of fields.
        marks = quotes[runs[np.diff(runs, append=len(quotes)) % 2 == 1]] + start

        def opens(places: NDArray[np.int64]) -> NDArray[np.bool_]:
            starts: NDArray[np.bool_] = self._opens[characters[places - 1]]
            if len(places) and places[0] == 0:
                starts[0] = True
            return starts

        states = np.arange(1 + inside, 1 + inside + len(marks)) % 2 == 1
        if not opens(marks[int(inside) :: 2]).all():
            # Some stray quotes. One at a field's start opens or closes; any other closes, or is a character.
            opening = opens(marks)
            changes = np.cumsum(opening) + inside
            states = (changes - np.maximum.accumulate(np.where(opening, 0, changes))) % 2 == 1
        return _Window(start, stop, inside, marks, states)

    def _ends(self, text: bytes, window: _Window) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ends of rows, and for each line break in a quoted field how many marks of the window are before it."""
        lines = _line_ends(text, window.start, window.stop)
        before = np.searchsorted(window.marks, lines - 1)
        inside = np.concatenate([[window.inside], window.states])[before]
        return lines[~inside], before[inside]


def line_count(text: bytes) -> int:
    r"""The lines of a text; each ends in "\n", "\r\n" or "\r", but for the last one, which need not."""
    lines = text.count(b"\n")
    if b"\r" in text:
        lines += text.count(b"\r") - text.count(b"\r\n")
    return lines + (not text.endswith((b"\n", b"\r")))


def check_objects(text: bytes) -> None:
    """Refuse lines that are not one JSON object each.

    Arrow's reader must not see those: a `null` between objects becomes a row, and one before them ends the process.

    Raises:
        ValueError: a line is something else; the message says what.
    """
    start = 0
    while start < len(text):
        found = _LINE_END.search(text, start + _WINDOW)
        stop = found.end() if found else len(text)
        for line in _suspects(text[start:stop]):
            _check_object(line)
        start = stop


def _suspects(text: bytes) -> list[bytes]:
    """Lines that may be something else than one object.

    Objects begin with a brace and end with one. If more than one is in a line, or something else beside it, then some
    closing brace is followed by what does not follow one within an object. Within a string it may be: hence may.
    """
    ends = _line_ends(text, 0, len(text))
    if not len(ends) or ends[-1] < len(text):
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1]])
    characters = np.frombuffer(text + b"\n" * (_BLANKS + 2), np.uint8)
    last = ends - 1
    for end in (_LF, _CR):
        last = last - (characters[last] == end)
    wrong = (characters[starts] != ord("{")) | (characters[last] != ord("}"))
    after = np.flatnonzero(characters == ord("}")) + 1
    for _ in range(_BLANKS):
        if not (blank := _BLANK[characters[after]]).any():
            break
        after += blank
    odd = after[~_AFTER_BRACE[characters[after]]]
    wrong[np.searchsorted(starts, odd - 1, side="right") - 1] = True
    return [text[start:stop] for start, stop in zip(starts[wrong].tolist(), (last[wrong] + 1).tolist(), strict=True)]


def _check_object(line: bytes) -> None:
    if not line.strip(b" \t"):
        raise ValueError("the line is blank, not one JSON object")
    try:
        value = json.loads(line.decode(), parse_int=str, parse_float=str)  # numbers of any size; their value is unused
    except json.JSONDecodeError as error:
        raise ValueError(f"not one JSON object a line: {error.msg} at character {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not one JSON object a line: no UTF8 at byte {error.start + 1}") from None
    except RecursionError:
        raise ValueError("not one JSON object a line: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"not one JSON object a line: {line.decode()[:40].strip()}")


def _line_ends(text: bytes, start: int, stop: int) -> NDArray[np.int64]:
    r"""Where lines end whose last character is at `start` up to `stop`; a "\r" that ends the text is passed over."""
    characters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(characters[start:stop] == _LF) + (start + 1)
    if text.find(b"\r", start, stop) >= 0:
        returns = np.flatnonzero(characters[start:stop] == _CR) + (start + 1)
        returns = returns[returns < len(text)]
        ends = np.sort(np.concatenate([ends, returns[characters[returns] != _LF]]))
    return ends
