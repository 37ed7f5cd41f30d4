"""Building vocabularies: which values the train split has, and how often."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import Config, ConfigError, SparseFeatureConfig, VocabularyIdsConfig
from recsys.data.arrow import flat, integers, is_countable, is_list, plain, raised, usual, value_type, whole
from recsys.data.features import check_names
from recsys.data.ids import listed
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary, canonical, is_value

_COMPACT_ROWS = 1 << 16


class ValueCounts:
    """Count the values of several vocabularies, strings as large strings and integers as int64.

    Memory grows with the number of different values alone, which `limit` bounds: each takes its bytes and 16 more,
    twice that while counts wait to be merged and four times while they are.

    Args:
        names: of the vocabularies.
        limit: different values of all vocabularies together; None for any number.
    """

    def __init__(self, names: Iterable[str], limit: int | None = None) -> None:
        self._parts: dict[str, list[pa.Table]] = {name: [] for name in names}
        self._merged = dict.fromkeys(self._parts, 0)
        self._limit = limit

    def __len__(self) -> int:
        return sum(len(part) for parts in self._parts.values() for part in parts)

    def add(self, name: str, array: pa.Array, what: str) -> None:
        """Count values, nulls aside.

        Args:
            name: of the vocabulary.
            array: strings or integers, or lists or a dictionary of them.
            what: where the values come from, for messages.

        Raises:
            DataError: values of another type than others of the vocabulary or than any may have, or more different
                values than the limit.
        """
        array = usual(array)
        if pa.types.is_null(value_type(array.type)):
            return
        if not is_value(value_type(array.type)):
            raise DataError(f"{what} has type {array.type}; strings, integers or lists of them are needed")
        values = canonical(plain(flat(array)[1] if is_list(array.type) else array).drop_null())
        parts = self._parts[name]
        if parts and parts[0]["value"].type != values.type:
            raise DataError(
                f"{what} has type {array.type}, but others of its vocabulary have not; give it a vocabulary of its "
                "own, or cast them"
            )
        found = pc.value_counts(values)
        parts.append(pa.table({"value": found.field("values"), "count": found.field("counts")}))
        # Merging when as much is waiting as is merged already keeps the whole work linear in the values.
        if sum(map(len, parts)) - self._merged[name] > max(_COMPACT_ROWS, self._merged[name]):
            self.counted(name)

    def counted(self, name: str) -> pa.Table:
        """Each different value of a vocabulary with its count, in no order.

        Raises:
            DataError: there are more different values than the limit.
        """
        parts = self._parts[name]
        if len(parts) == 1 and self._merged[name] == len(parts[0]):
            return parts[0]
        if not parts:
            return pa.table({"value": pa.array([], pa.large_string()), "count": pa.array([], pa.int64())})
        summed = pa.concat_tables(parts).group_by("value").aggregate([("count", "sum")])
        merged = pa.table({"value": summed["value"], "count": summed["count_sum"]})
        self._parts[name], self._merged[name] = [merged], len(merged)
        found = sum(self._merged.values())
        if self._limit is not None and found > self._limit:
            largest = max(self._merged, key=lambda one: self._merged[one])
            raise DataError(
                f"more than {self._limit:,} different values to count ({found:,} so far, {self._merged[largest]:,} of "
                f"them in table {largest!r}); hash that table's ids, or raise --max-values as memory allows"
            )
        return merged

    def vocabulary(self, name: str, min_count: int, source: str) -> Vocabulary:
        """Make a vocabulary of the values found `min_count` times, by descending count, ties by value.

        Args:
            name: of the vocabulary.
            min_count: how often a value must be found to be kept.
            source: where the vocabulary belongs, for messages.

        Raises:
            DataError: as `counted`.
        """
        counted = self.counted(name)
        kept = counted.filter(pc.greater_equal(counted["count"], min_count))
        kept = kept.sort_by([("count", "descending"), ("value", "ascending")])
        return Vocabulary(kept["value"].combine_chunks(), kept["count"].combine_chunks(), source)


def vocabulary_of(values: Sequence[str] | Sequence[int], found: pa.Array, source: str) -> Vocabulary:
    """Make a vocabulary of values in an order that is known beforehand, and count those that were found.

    Args:
        values: different strings or integers.
        found: values, or lists of them, of the same kind.
        source: where the vocabulary belongs, for messages.
    """
    counts = ValueCounts([source])
    counts.add(source, found, source)
    counted, listed = counts.counted(source), canonical(pa.array(values))
    places = pc.index_in(listed, counted["value"].combine_chunks())
    return Vocabulary(listed, pc.fill_null(counted["count"].combine_chunks().take(places), 0), source)


@dataclass(frozen=True)
class Built:
    """What became of a vocabulary.

    Attributes:
        file: where it was written.
        features: those that take their ids from it.
        found: distinct values in the train split.
        kept: those that were found often enough.
        coverage: share of all values, each time that it occurs, that are kept.
    """

    file: Path
    features: tuple[str, ...]
    found: int
    kept: int
    coverage: float


def build_vocabularies(
    config: Config,
    features: Sequence[str] = (),
    *,
    min_count: int = 1,
    overwrite: bool = False,
    on_row_group: Callable[[int, int], None] = lambda done, total: None,
) -> list[Built]:
    """Count values in the train split and write vocabularies, one for each file that features name.

    Features that name one file have one vocabulary, of the values of all. In memory are one row group's columns, and
    about three times the distinct values of all features that are counted.

    Args:
        config: names features, files and the train split.
        features: whose vocabularies; none are all that the config has.
        min_count: how often a value must be found to be kept.
        overwrite: replace files that are there.
        on_row_group: told after each row group how many are done, and of how many.

    Raises:
        ConfigError: a feature that has no vocabulary or whose shards hold rows by one already, or there is none at all.
        DataError: a file is there already; a shard cannot be read, lacks a column or has one of another type; no value
            was found often enough.
    """
    files, wanted = _files_to_build(config, features)
    if taken := [file for file in wanted if file.exists() and not overwrite]:
        raise DataError(f"{min(taken)} is there already; pass --overwrite to build it anew")
    readers = {file: tuple(name for name in files if files[name] == file) for file in sorted(wanted)}
    columns = {name: config.features.sparse[name].column or name for name in files if files[name] in wanted}
    counts = ValueCounts(map(str, readers))
    for where, table in _row_groups(config, sorted(set(columns.values())), on_row_group):
        for file, names in readers.items():
            counted_as = {}  # what two features read alike counts once
            for name in names:
                feature = config.features.sparse[name]
                counted_as[columns[name], feature.list_text, feature.minimum] = feature
            for (column, *_), feature in counted_as.items():
                what = f"{where}: column {column!r}"
                counts.add(str(file), _raw_values(whole(table, column), feature, what), what)
    built = []
    for file, names in readers.items():
        counted, vocabulary = counts.counted(str(file)), counts.vocabulary(str(file), min_count, str(file))
        if not len(vocabulary):
            raise DataError(f"{file}: no value was found {min_count} times in data.train; lower --min-count")
        vocabulary.write(file)
        coverage = pc.sum(vocabulary.counts).as_py() / pc.sum(counted["count"]).as_py()
        built.append(Built(file, names, len(counted), len(vocabulary), coverage))
    return built


def _files_to_build(config: Config, features: Sequence[str]) -> tuple[dict[str, Path], set[Path]]:
    """The vocabulary's file of each feature whose shards hold raw values, and the files that are asked for."""
    files: dict[str, Path] = {}
    applied: dict[str, Path] = {}
    for name, feature in config.features.sparse.items():
        if isinstance(feature.ids, VocabularyIdsConfig):
            (applied if feature.ids.applied else files)[name] = Path(feature.ids.file)
    if not (files or applied):
        raise ConfigError("no feature takes its ids from a vocabulary; set ids to {type: vocabulary, file: PATH}")
    if of_shards := [name for name in features or ([] if files else applied) if name in applied]:
        raise _is_applied(of_shards[0])
    if unknown := [name for name in features if name not in files]:
        raise ConfigError(
            f"features.sparse.{unknown[0]} takes no ids from a vocabulary; those that do are {', '.join(files)}"
        )
    wanted = {files[name] for name in features or files}
    if shared := [name for name, file in applied.items() if file in wanted]:
        raise _is_applied(shared[0])
    return files, wanted


def _raw_values(array: pa.Array, feature: SparseFeatureConfig, what: str) -> pa.Array:
    """What is counted of a column: the values that the feature's ids would be asked for."""
    array = listed(usual(array), feature.list_text, what)
    if is_countable(value_type(array.type)):
        array = integers(flat(array)[1] if is_list(array.type) else array)
        array = array if feature.minimum is None else raised(plain(array), feature.minimum)
    return array


def _is_applied(feature: str) -> ConfigError:
    return ConfigError(
        f"features.sparse.{feature}.ids.applied: its shards hold rows of the table by the vocabulary of their "
        "conversion; convert anew for another, or set applied to false where shards hold raw values"
    )


def _row_groups(
    config: Config, columns: list[str], on_row_group: Callable[[int, int], None]
) -> Iterator[tuple[str, pa.Table]]:
    """Place and columns of each row group of the train split."""
    from recsys.data.parquet import ShardTables, find  # which imports torch; converters count without
    from recsys.data.splits import path_types

    patterns, source = config.data.patterns("train"), "data.train"
    found = find(patterns, source=source)
    # As training has them: numbers on the paths of train alone may be text over all splits.
    types = path_types(config, columns, {"train": found})
    shards = ShardTables(patterns, columns, source=source, found=found, path_types=types)
    for file, schema in zip(shards.files, shards.schemas, strict=True):
        check_names(schema, columns, file, "file")
    total = len(shards.row_counts)
    for row_group in range(total):
        yield shards.where(row_group), shards.table(row_group, columns)
        on_row_group(row_group + 1, total)
