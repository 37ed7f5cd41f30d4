"""Local time is what Python's `zoneinfo` says, in every year that there is."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys.data.ids import DatetimeIds, DatetimePart
from recsys.data.storage import DataError
from recsys.data.zones import FIRST_SECOND, PAST_SECOND, local_seconds

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
DAY = 86_400
NAMES = [
    "Europe/Berlin",
    "America/New_York",
    "America/Sao_Paulo",
    "Australia/Lord_Howe",  # half an hour of summer time
    "Africa/Casablanca",  # whose file lists changes up to 2087
    "Europe/Dublin",  # where winter is the exception
    "Asia/Kathmandu",
    "Pacific/Apia",  # a day left out
    "Asia/Manila",  # a day twice
    "Europe/Amsterdam",  # seconds in its offset
    "America/Nuuk",
    "Etc/GMT+5",
]


def second(year: int, *rest: int) -> int:
    return (datetime(year, *(rest or (1, 1)), tzinfo=UTC) - EPOCH) // timedelta(seconds=1)


def expected(seconds: int, zone: ZoneInfo) -> datetime:
    return (EPOCH + timedelta(seconds=seconds)).astimezone(zone)


def moments(seed: int) -> np.ndarray:
    """Of all years, more of those that logs are of, some at the ends of hours in which clocks change."""
    random = np.random.default_rng(seed)
    everywhere = random.integers(second(1900), PAST_SECOND - DAY, 1500)
    now = random.integers(second(1900), second(2150), 3000)
    years = [datetime(int(year), 1, 1, tzinfo=UTC) for year in random.integers(1900, 9998, 20)]
    hours = np.array([(it - EPOCH) // timedelta(seconds=1) for it in years])[:, None] + np.arange(
        0, 366 * DAY, 3 * 3600
    )
    early = random.integers(FIRST_SECOND + DAY, second(1900), 500)
    return np.concatenate([everywhere, now, random.choice(hours.ravel(), 2000), early])


@pytest.mark.parametrize("name", NAMES)
def test_clocks_show_what_zoneinfo_says_in_every_year(name: str) -> None:
    zone, seconds = ZoneInfo(name), moments(len(name))
    found = local_seconds(seconds, name)
    for at, local in zip(seconds.tolist(), found.tolist(), strict=True):
        assert timedelta(seconds=local - at) == expected(at, zone).utcoffset(), at


@pytest.mark.parametrize("name", ["Europe/Berlin", "America/New_York"])
def test_clocks_change_at_their_second(name: str) -> None:
    zone = ZoneInfo(name)
    for year in (1980, 2024, 2037, 2038, 2100, 2399, 2500, 9998):
        days = second(year) + np.arange(366) * DAY
        offsets = local_seconds(days, name) - days
        for day in days[1:][np.diff(offsets) != 0]:
            low, high = int(day) - DAY, int(day)
            while high - low > 1:
                middle = (low + high) // 2
                same = expected(middle, zone).utcoffset() == expected(low, zone).utcoffset()
                low, high = (middle, high) if same else (low, middle)
            around = np.array([high - 1, high])
            shown = [timedelta(seconds=int(it)) for it in local_seconds(around, name) - around]
            assert shown == [expected(int(it), zone).utcoffset() for it in around]
            assert shown[0] != shown[1]


def test_nothing_has_no_local_time() -> None:
    assert local_seconds(np.empty(0, np.int64), "Europe/Berlin").tolist() == []


def parts(at: datetime) -> dict[DatetimePart, int]:
    return {"hour": at.hour, "weekday": at.weekday(), "day": at.day - 1, "month": at.month - 1}


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("name", ["UTC", "Europe/Berlin", "America/New_York"])
def test_every_unit_has_right_parts_in_every_year(unit: str, name: str) -> None:
    per = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    seconds = [at for at in moments(7).tolist()[::5] if unit != "ns" or abs(at) < 2**63 // 10**9]
    odd = [at * per + (at % per if per > 1 else 0) for at in seconds]  # not all at the start of a second
    zone = ZoneInfo(name)
    wanted = [parts(expected(at, zone)) for at in seconds]
    for of in (None, "UTC", "Asia/Tokyo"):
        values = pa.array([*odd, None], pa.int64()).cast(pa.timestamp(unit, of))
        for part in wanted[0]:
            found = DatetimeIds(part, name).map(values, "here").ids
            assert found.tolist() == [*(it[part] for it in wanted), -1]


@pytest.mark.parametrize("name", ["Europe/Berlin", "Asia/Kathmandu", "America/Sao_Paulo"])
def test_parts_in_the_ordinary_range_are_those_that_arrow_gave(name: str) -> None:
    seconds = np.random.default_rng(3).integers(second(1905), second(2037), 20_000)
    values = pa.array(seconds).cast(pa.timestamp("s"))
    functions: dict[DatetimePart, tuple[str, int]] = {
        "hour": ("hour", 0),
        "weekday": ("day_of_week", 0),
        "day": ("day", 1),
        "month": ("month", 1),
    }
    for part, (function, first) in functions.items():
        arrow = pc.call_function(function, [values.cast(pa.timestamp("s", name))]).to_numpy() - first
        assert DatetimeIds(part, name).map(values, "here").ids.tolist() == arrow.tolist()


@pytest.mark.parametrize("kind", [pa.date32(), pa.dictionary(pa.int8(), pa.date32())], ids=str)
def test_dates_have_a_weekday_day_and_month_of_their_own(kind: pa.DataType) -> None:
    days = [datetime(1, 1, 1), datetime(1899, 12, 31), datetime(2024, 2, 29), datetime(9999, 12, 31)]
    values = pa.array([*(it.date() for it in days), None], pa.date32())
    values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values
    for name in ("UTC", "America/New_York", "Pacific/Kiritimati"):
        for part in ("weekday", "day", "month"):
            found = DatetimeIds(part, name).map(values, "here").ids  # type: ignore[arg-type]
            assert found.tolist() == [*(parts(it)[part] for it in days), -1]  # type: ignore[index]
    assert not DatetimeIds("hour").accepts(pa.date32())


NANOSECONDS = 1_704_067_200_123_456_789  # of 2024, as a column of milliseconds may hold them


@pytest.mark.parametrize("name", ["UTC", "Europe/Berlin"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pa.array([0, NANOSECONDS, None], pa.timestamp("ms")), "1 value outside the years 1..9999, such as 1704067200"),
        (pa.array([0, NANOSECONDS, None], pa.timestamp("s")), "1 value outside the years"),
        (pa.array([-(2**63), 2**63 - 1, None], pa.timestamp("ms")), "2 values outside the years"),
        (pa.array([-(2**63), 2**63 - 1, None], pa.timestamp("us")), "2 values outside the years"),
        (pa.array([-(2**63), 2**63 - 1, None], pa.timestamp("ns")), "1 value outside the years 1..9999, such as -9223"),
        (pa.array([PAST_SECOND, PAST_SECOND - 1, FIRST_SECOND - 1], pa.timestamp("s")), "2 values outside the years"),
        (pa.array([-(2**63), 0, None]), "1 value that cannot be seconds since 1970, such as -9223372036854775808"),
        (pa.array([2**63 - 1, 0, None]), "1 value that cannot be seconds since 1970, such as 9223372036854775807"),
        (pa.array([2**64 - 1, 0, None], pa.uint64()), "1 value that cannot be seconds since 1970, such as 184467440"),
        (pa.array([2**35 + 1, -(2**35) - 1, 2**35]), "2 values that cannot be seconds since 1970"),
        (pa.array([2**31 - 1, -(2**31), None], pa.int32()).view(pa.date32()), "2 values outside the years"),
    ],
)
def test_moments_that_cannot_be_meant_are_refused(name: str, values: pa.Array, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        DatetimeIds("day", name).map(values, "f.parquet, row group 0: sparse feature f (column 'c')")
    assert str(error.value).startswith("f.parquet, row group 0: sparse feature f (column 'c') has ")


def test_whatever_a_column_holds_its_ids_are_in_the_table() -> None:
    random = np.random.default_rng(5)
    for size in range(4, 64, 3):
        for kind in (*(pa.timestamp(unit) for unit in ("s", "ms", "us", "ns")), pa.int64(), pa.date32()):
            bits = random.integers(-(2**size), 2**size, 50)
            values = pa.array(bits.astype(np.int32)).view(kind) if kind == pa.date32() else pa.array(bits).view(kind)
            for part in ("hour", "weekday", "day", "month"):
                for name in ("UTC", "America/New_York"):
                    mapping = DatetimeIds(part, name)  # type: ignore[arg-type]
                    if mapping.accepts(kind):
                        for value in values:
                            try:
                                found = mapping.map(pa.array([value]), "here").ids
                            except DataError:
                                continue
                            assert 0 <= found[0] < mapping.num_rows
