"""From raw values of a sparse feature to rows of its table: every way that there is.

Converters, training, evaluation and serving all map by these. A mapping knows which types it takes, how many rows of a
table it needs, and what it had to put aside: each kind of that is a mask over the values, which the reader counts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.config import (
    BucketizeIdsConfig,
    DatetimeIdsConfig,
    HashIdsConfig,
    ListTextConfig,
    SparseFeatureConfig,
    VocabularyIdsConfig,
)
from recsys.data.arrow import (
    filled,
    floats,
    integers,
    is_countable,
    is_integer,
    is_list,
    is_number,
    is_string,
    plain,
    split_texts,
    value_type,
)
from recsys.data.hashing import hash_ids
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary
from recsys.data.zones import FIRST_SECOND, PAST_SECOND, local_seconds

OutOfRange = Literal["error", "hash", "clip_to_oov"]
DatetimePart = Literal["hour", "weekday", "day", "month"]


class Mapped(NamedTuple):
    """Rows of a table.

    Attributes:
        ids: (N,) integers below `num_rows`, -1 for nulls.
        counted: masks, (N,) each, of what is counted, by kind; only those that are true somewhere.
    """

    ids: NDArray[np.int32 | np.int64]
    counted: Mapping[str, NDArray[np.bool_]]


class IdMapping(Protocol):
    """How values become rows of a table."""

    @property
    def wanted(self) -> str:
        """Types that are taken, for messages."""

    @property
    def kinds(self) -> tuple[str, ...]:
        """All that may be counted."""

    @property
    def num_rows(self) -> int:
        """Rows that a table must have; all ids are below it."""

    def accepts(self, kind: pa.DataType) -> bool:
        """Whether values of a type (of a dictionary's values) are taken."""

    def map(self, values: pa.Array, what: str) -> Mapped:
        """The rows of (N,) values.

        Args:
            values: of a type that is accepted, or a dictionary of it.
            what: feature, column, file and row group, for messages.

        Raises:
            DataError: a value that the mapping refuses.
        """


@dataclass(frozen=True)
class PlainIds:
    """Integers that are rows already.

    Attributes:
        num_rows: of the table.
        out_of_range: what becomes of the others: `error`; `hash`, into all rows; `clip_to_oov`, row 0.
    """

    num_rows: int
    out_of_range: OutOfRange = "error"
    wanted: ClassVar = "integers or lists of integers"

    @property
    def kinds(self) -> tuple[str, ...]:
        """As `IdMapping`."""
        return {"error": (), "hash": ("hashed",), "clip_to_oov": ("clipped",)}[self.out_of_range]

    def accepts(self, kind: pa.DataType) -> bool:
        """As `IdMapping`."""
        return is_countable(kind)

    def map(self, values: pa.Array, what: str) -> Mapped:
        """As `IdMapping`."""
        values, num_rows = plain(integers(values)), self.num_rows
        given = filled(values, 0)
        if given.min(initial=0) >= 0 and given.max(initial=0) < num_rows:
            if values.null_count:
                signed = values.cast(pa.int64()) if pa.types.is_unsigned_integer(values.type) else values
                given = filled(signed, -1)
            return Mapped(given, {})
        wrong = (given < 0) | (given >= num_rows)
        if self.out_of_range == "error":
            raise DataError(
                f"{what} has {count(wrong)} out of range, such as {given[wrong][0]}; "
                f"its table takes ids 0..{num_rows - 1}: raise num_embeddings, set the feature's out_of_range to hash "
                "or clip_to_oov, or map the ids when the shards are written"
            )
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        ids = np.where(valid, given.astype(np.int64), -1)
        ids[wrong] = hash_ids(pa.array(given[wrong]), num_rows) if self.out_of_range == "hash" else 0
        return Mapped(ids, {self.kinds[0]: wrong})


@dataclass(frozen=True)
class HashedIds:
    """Strings or integers by their hash, see `recsys.data.hashing`; nothing is out of vocabulary, some values meet.

    Attributes:
        num_rows: buckets.
        salt: two salts give independent buckets.
    """

    num_rows: int
    salt: int = 0
    wanted: ClassVar = "integers, strings or lists of them"
    kinds: ClassVar[tuple[str, ...]] = ()

    def accepts(self, kind: pa.DataType) -> bool:
        """As `IdMapping`."""
        return is_string(kind) or is_countable(kind)

    def map(self, values: pa.Array, what: str) -> Mapped:
        """As `IdMapping`."""
        return Mapped(hash_ids(integers(values), self.num_rows, self.salt), {})


@dataclass(frozen=True)
class VocabularyIds:
    """Strings or integers by a vocabulary.

    Attributes:
        vocabulary: its values in the order of their rows.
        unknown_is_row_0: whether row 0 is for values that it does not hold, and its own begin at 1; if not, unknown
            values become -1, as nulls do, and its own begin at 0.
    """

    vocabulary: Vocabulary
    unknown_is_row_0: bool = True
    kinds: ClassVar = ("out_of_vocabulary",)

    @property
    def wanted(self) -> str:
        """As `IdMapping`."""
        of = "strings" if is_string(self.vocabulary.values.type) else "integers"
        return f"{of} or lists of {of}, as in {self.vocabulary.source},"

    @property
    def num_rows(self) -> int:
        """As `IdMapping`."""
        return max(1, len(self.vocabulary) + self.unknown_is_row_0)

    def accepts(self, kind: pa.DataType) -> bool:
        """As `IdMapping`."""
        return is_string(kind) if is_string(self.vocabulary.values.type) else is_countable(kind)

    def map(self, values: pa.Array, what: str) -> Mapped:
        """As `IdMapping`."""
        ids = self.vocabulary.lookup(integers(values))
        unknown = ids == 0
        if not self.unknown_is_row_0:
            ids = np.where(ids < 0, ids, ids - 1)
        return Mapped(ids, {"out_of_vocabulary": unknown} if unknown.any() else {})


@dataclass(frozen=True)
class BucketizedIds:
    """Numbers by the interval they fall in: row n has `boundaries[n - 1]` <= value < `boundaries[n]`."""

    boundaries: tuple[float, ...]
    wanted: ClassVar = "numbers or lists of numbers"
    kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def num_rows(self) -> int:
        """As `IdMapping`."""
        return len(self.boundaries) + 1

    def accepts(self, kind: pa.DataType) -> bool:
        """As `IdMapping`."""
        return is_number(kind)

    def map(self, values: pa.Array, what: str) -> Mapped:
        """As `IdMapping`."""
        values = floats(integers(plain(values)))
        valid = values.is_valid().to_numpy(zero_copy_only=False)
        if is_integer(values.type):
            # As integers, for float64 does not tell all of them apart.
            limits = np.iinfo(values.type.to_pandas_dtype())
            least = [max(limits.min, math.ceil(boundary)) for boundary in self.boundaries if boundary <= limits.max]
            found = np.searchsorted(np.array(least, limits.dtype), filled(values, 0), side="right")
            return Mapped(np.where(valid, found, -1), {})
        given = filled(values.cast(pa.float64()), 0.0)
        if (wrong := np.isnan(given)).any():
            raise DataError(f"{what} has {count(wrong)} NaN, which is in no bucket; write nulls, which are empty bags")
        return Mapped(np.where(valid, np.searchsorted(self.boundaries, given, side="right"), -1), {})


_PARTS: Mapping[DatetimePart, tuple[str, int, int]] = {
    "hour": ("hour", 0, 24),
    "weekday": ("day_of_week", 0, 7),
    "day": ("day", 1, 31),
    "month": ("month", 1, 12),
}
"""Arrow's function, the number of the first, and how many there are."""

LAST_SECOND = 2**35  # in the year 3058; the same moment in milliseconds is far beyond
_DAY = 86_400
_MISSING = -(2**63)  # what pandas and numpy write for no moment

_IN_A_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


@dataclass(frozen=True)
class DatetimeIds:
    """Timestamps, or seconds since 1970 in UTC, by a part of their date and time in a time zone; or dates.

    Attributes:
        part: `hour` 0..23, `weekday` from Monday 0..6, `day` of the month 0..30, `month` 0..11.
        timezone: `UTC`, or a name of the time zone database; a timestamp without a zone is in UTC. A date is the same
            in every zone.
    """

    part: DatetimePart
    timezone: str = "UTC"
    kinds: ClassVar[tuple[str, ...]] = ()

    @property
    def wanted(self) -> str:
        """As `IdMapping`."""
        dates = "" if self.part == "hour" else ", dates"
        return f"timestamps{dates} or integers (seconds since 1970), or lists of them,"

    @property
    def num_rows(self) -> int:
        """As `IdMapping`."""
        return _PARTS[self.part][2]

    def accepts(self, kind: pa.DataType) -> bool:
        """As `IdMapping`."""
        return bool(
            pa.types.is_timestamp(kind) or is_integer(kind) or (pa.types.is_date32(kind) and self.part != "hour")
        )

    def map(self, values: pa.Array, what: str) -> Mapped:
        """As `IdMapping`."""
        values = plain(values)
        moments = self._checked(values, what)
        function, first, _ = _PARTS[self.part]
        found = filled(pc.call_function(function, [moments]), first - 1)
        return Mapped(found - first, {})

    def _checked(self, values: pa.Array, what: str) -> pa.Array:
        """What Arrow can take apart: dates, or timestamps of local time, of moments that can be meant."""
        if pa.types.is_date32(values.type):
            days = filled(values.view(pa.int32()), 0)
            _check_years(days, FIRST_SECOND // _DAY, PAST_SECOND // _DAY, values.type, what)
            return values
        if is_integer(values.type):
            seconds = filled(values, 0)
            if seconds.min(initial=0) < -LAST_SECOND or seconds.max(initial=0) > LAST_SECOND:
                wrong = (seconds < -LAST_SECOND) | (seconds > LAST_SECOND)
                raise DataError(
                    f"{what} has {count(wrong)} that cannot be seconds since 1970, such as {seconds[wrong][0]}; "
                    "write timestamps, and nulls for moments that are not known"
                )
            unit = "s"
        else:
            unit = values.type.unit
        moments = values.cast(pa.int64())
        given, per = filled(moments, 0), _IN_A_SECOND[unit]
        _check_years(given, max(FIRST_SECOND * per, _MISSING + 1), PAST_SECOND * per, values.type, what)
        if self.timezone == "UTC":
            return moments.cast(pa.timestamp(unit))  # without naming it, so that no time zone database is needed
        local = pa.array(local_seconds(given // per, self.timezone)).cast(pa.timestamp("s"))
        return pc.if_else(moments.is_valid(), local, None) if moments.null_count else local


def _check_years(given: NDArray[Any], least: int, past: int, kind: pa.DataType, what: str) -> None:
    """Refuse moments before the year 1 and after 9999: of another unit than their type says, or missing."""
    if given.min(initial=0) < least or given.max(initial=0) >= past:
        wrong = (given < least) | (given >= past)
        raise DataError(
            f"{what} has {count(wrong)} outside the years 1..9999, such as {given[wrong][0]} of type {kind}; write the "
            "unit that the numbers have, and nulls for moments that are not known"
        )


def build_ids(feature: SparseFeatureConfig, num_embeddings: int, vocabulary: Vocabulary | None) -> IdMapping:
    """The mapping that a feature's settings describe.

    Args:
        feature: `stored` of it for what shards hold, itself for raw values.
        num_embeddings: rows of its table.
        vocabulary: where its ids are by one.
    """
    match feature.ids:
        case None:
            return PlainIds(num_embeddings, feature.out_of_range)
        case HashIdsConfig(salt=salt, buckets=buckets):
            return HashedIds(buckets or num_embeddings, salt)
        case BucketizeIdsConfig(boundaries=boundaries):
            return BucketizedIds(boundaries)
        case DatetimeIdsConfig(part=part, timezone=timezone):
            return DatetimeIds(part, timezone)
        case VocabularyIdsConfig(out_of_vocabulary=unknown):
            assert vocabulary is not None
            return VocabularyIds(vocabulary, unknown_is_row_0=unknown == "row_0")


def check_rows(ids: NDArray[np.int32 | np.int64], mapping: IdMapping, what: str) -> bool:
    """Whether some of (N,) ids are -1, where no others are beside the rows that the mapping needs.

    Raises:
        DataError: there is an id that no table of so many rows has.
    """
    unsigned = ids.view(f"u{ids.itemsize}")  # in which negative ids are large, so that one pass finds both ends
    if unsigned.max(initial=0) < min(mapping.num_rows, 1 << (8 * ids.itemsize - 1)):
        return False
    least, greatest = int(ids.min(initial=0)), int(ids.max(initial=0))
    if least < -1 or greatest >= max(1, mapping.num_rows):
        wrong = least if least < -1 else greatest
        raise DataError(
            f"{what} was mapped to row {wrong}, but {type(mapping).__name__} has rows 0..{mapping.num_rows - 1}: this "
            "is a fault of HiloRec's, please report it with the value; until it is mended, map the column when the "
            "shards are written"
        )
    return least < 0


def listed(values: pa.Array, settings: ListTextConfig | None, what: str) -> pa.Array:
    """The lists that texts hold; what is no text, or holds no lists, as it is.

    Args:
        values: of a column, of a type that `recsys.data.arrow.usual` gives.
        settings: how texts hold lists; None if they do not.
        what: feature or column, and file, for messages.

    Raises:
        DataError: a text holds something else.
    """
    if settings is None or is_list(values.type) or not is_string(value_type(values.type)):
        return values
    lists = split_texts(plain(values), settings.separator)
    if settings.items == "strings":
        return lists
    try:
        return lists.cast(pa.list_(pa.int64()))
    except pa.ArrowInvalid as error:
        cause = str(error).splitlines()[0]
        raise DataError(f"{what} has a text that holds no list of integers: {cause}") from None


def count(mask: NDArray[np.bool_]) -> str:
    """How many are true, in words."""
    found = int(mask.sum())
    return f"{found} value{'s' * (found > 1)}"
