"""Building vocabularies: which values the train split has, and how often."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import Config, ConfigError, VocabularyIdsConfig
from recsys.data.arrow import flat, is_list, plain, value_type, whole
from recsys.data.parquet import ShardTables
from recsys.data.storage import DataError
from recsys.data.vocabulary import Vocabulary, canonical, is_value


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
        ConfigError: a feature that has no vocabulary, or there is none at all.
        DataError: a file is there already; a shard cannot be read, lacks a column or has one of another type; no value
            was found often enough.
    """
    files = {
        name: Path(feature.ids.file)
        for name, feature in config.features.sparse.items()
        if isinstance(feature.ids, VocabularyIdsConfig)
    }
    if not files:
        raise ConfigError("no feature takes its ids from a vocabulary; set ids to {type: vocabulary, file: PATH}")
    if unknown := [name for name in features if name not in files]:
        raise ConfigError(
            f"features.sparse.{unknown[0]} takes no ids from a vocabulary; those that do are {', '.join(files)}"
        )
    wanted = {files[name] for name in features or files}
    if taken := [file for file in wanted if file.exists() and not overwrite]:
        raise DataError(f"{min(taken)} is there already; pass --overwrite to build it anew")
    readers = {file: tuple(name for name in files if files[name] == file) for file in sorted(wanted)}
    columns = {name: config.features.sparse[name].column or name for name in files if files[name] in wanted}
    tallies = {file: _Tally() for file in readers}
    for where, table in _row_groups(config, sorted(set(columns.values())), on_row_group):
        for file, names in readers.items():
            for column in dict.fromkeys(columns[name] for name in names):
                tallies[file].add(whole(table, column), f"{where}: column {column!r}")
    built = []
    for file, tally in tallies.items():
        counted = tally.counted()
        kept = counted.filter(pc.greater_equal(counted["count"], min_count))
        if not len(kept):
            raise DataError(f"{file}: no value was found {min_count} times in data.train; lower --min-count")
        kept = kept.sort_by([("count", "descending"), ("value", "ascending")])
        Vocabulary(kept["value"].combine_chunks(), kept["count"].combine_chunks(), str(file)).write(file)
        coverage = pc.sum(kept["count"]).as_py() / pc.sum(counted["count"]).as_py()
        built.append(Built(file, readers[file], len(counted), len(kept), coverage))
    return built


def _row_groups(
    config: Config, columns: list[str], on_row_group: Callable[[int, int], None]
) -> Iterator[tuple[str, pa.Table]]:
    """Place and columns of each row group of the train split."""
    shards = ShardTables(config.data.patterns("train"), columns, source="data.train")
    for file, schema in zip(shards.files, shards.schemas, strict=True):
        for column in columns:
            if column not in schema.names:
                raise DataError(f"{file}: no column {column!r}; the file has {', '.join(schema.names)}")
    total = len(shards.row_counts)
    for row_group in range(total):
        yield shards.where(row_group), shards.table(row_group, columns)
        on_row_group(row_group + 1, total)


class _Tally:
    """Counts values, of which it holds each distinct one at most three times."""

    def __init__(self) -> None:
        self._parts: list[pa.Table] = []
        self._rows = 0
        self._merged = 1 << 16

    def add(self, array: pa.Array, what: str) -> None:
        kind = value_type(array.type)
        if not is_value(kind):
            raise DataError(f"{what} has type {array.type}; strings, integers or lists of them are needed")
        values = canonical(plain(flat(array)[1] if is_list(array.type) else array).drop_null())
        if self._parts and self._parts[0]["value"].type != values.type:
            raise DataError(
                f"{what} has type {array.type}, but others of its vocabulary have not; part them or cast them"
            )
        found = pc.value_counts(values)
        self._parts.append(pa.table({"value": found.field("values"), "count": found.field("counts")}))
        self._rows += len(found)
        if self._rows > 2 * self._merged:
            self._parts = [self.counted()]
            self._rows = len(self._parts[0])
            self._merged = max(self._merged, self._rows)

    def counted(self) -> pa.Table:
        """Each distinct value with its count, in no order."""
        summed = pa.concat_tables(self._parts).group_by("value").aggregate([("count", "sum")])
        return pa.table({"value": summed["value"], "count": summed["count_sum"]})
