"""Local time in a zone of the time zone database, for any year from 1 to 9999.

Arrow knows the rules of summer time only as far as a zone's file lists each change, which is up to 2037; Python's
`zoneinfo` also follows the rule that the file states for all later years. Offsets are therefore asked of `zoneinfo`,
once for each year, and looked up for whole arrays.
"""

from datetime import UTC, datetime, timedelta
from functools import cache, lru_cache
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

FIRST_SECOND = -62_135_596_800
"""0001-01-01 in UTC."""

PAST_SECOND = 253_402_300_800
"""10000-01-01 in UTC."""

_DAY = 86_400
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_FIRST_YEAR = 1700  # no zone's file has a change before
_CYCLE_YEAR = 2100  # no zone's file lists changes from here on, only a rule
_CYCLE_YEARS = 400  # after which the calendar repeats, weekdays included
_CYCLE_SECONDS = 146_097 * _DAY


def local_seconds(seconds: NDArray[np.int64], zone: str) -> NDArray[np.int64]:
    """What clocks in a zone show, in seconds since they showed the start of 1970.

    Args:
        seconds: (N,) since 1970 in UTC, from `FIRST_SECOND` to before `PAST_SECOND`.
        zone: a name of the time zone database.
    """
    if not len(seconds):
        return seconds
    starts, offsets = _offsets(zone, _year(int(seconds.min())), _year(int(seconds.max())))
    found: NDArray[np.int64]
    if len(starts) == 1:
        found = seconds + offsets[0]
    else:
        found = seconds + offsets[np.searchsorted(starts, seconds, side="right") - 1]
    return found


def _year(second: int) -> int:
    return int(np.datetime64(second, "s").astype("datetime64[Y]").astype(np.int64)) + 1970


def _start(year: int) -> int:
    return int(np.datetime64(year - 1970, "Y").astype("datetime64[s]").astype(np.int64))


@lru_cache(maxsize=256)
def _offsets(zone: str, first: int, last: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Seconds at which the offset from UTC may change in some years, in order, and the offset from each on."""
    changes = [change for year in range(first, last + 1) for change in _changes(zone, year)]
    starts, offsets = np.array(changes, np.int64).T
    changed = np.append(True, offsets[1:] != offsets[:-1])
    return starts[changed], offsets[changed]


@cache
def _changes(zone: str, year: int) -> tuple[tuple[int, int], ...]:
    """The start of a year with its offset, and each change within the year with that from it on."""
    if year < _FIRST_YEAR:
        return ((_start(year), _changes(zone, _FIRST_YEAR)[0][1]),)
    if cycles := max(0, year - _CYCLE_YEAR) // _CYCLE_YEARS:
        same = _changes(zone, year - cycles * _CYCLE_YEARS)
        return tuple((start + cycles * _CYCLE_SECONDS, offset) for start, offset in same)
    known = ZoneInfo(zone)

    def offset(second: int) -> int:
        there = (_EPOCH + timedelta(seconds=second)).astimezone(known).utcoffset()
        assert there is not None
        return there // timedelta(seconds=1)

    start, stop = _start(year), _start(year + 1)
    changes = [(start, offset(start))]
    for day in range(start, stop, _DAY):
        next_day = day + _DAY
        while changes[-1][1] != offset(next_day):
            low, high = max(day, changes[-1][0]), next_day  # the change is after low, and at high at the latest
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if offset(middle) == changes[-1][1] else (low, middle)
            changes.append((high, offset(high)))
    return tuple(changes)
