"""The splits of a config, opened and checked."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from recsys.config import Config
from recsys.data.features import build_columns
from recsys.data.kinds import Kinds
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import Found, ParquetShards, find, partition_types
from recsys.data.storage import DataError
from recsys.runtime import Ranks, derive_seed


def open_splits(
    config: Config,
    names: Sequence[str],
    vocabularies: Path | None = None,
    kinds: Kinds | None = None,
    *,
    also: Sequence[str] = (),
) -> dict[str, ParquetShards]:
    """The shards of the named splits, opened and checked.

    Args:
        config: the run's.
        names: splits of the config.
        vocabularies: as for `build_columns`.
        kinds: what features hold, as a checkpoint has it; None where that is still to be decided.
        also: columns that will be asked of tables besides, which may be on the files' paths.

    Raises:
        ConfigError: the config lacks one of the splits, or as `build_columns`.
        DataError: as `ParquetShards` and `build_columns`; or a feature holds one thing in one split and another in
            another.
    """
    columns = build_columns(config, vocabularies)
    kinds = Kinds() if kinds is None else kinds
    found = {name: find(config.data.patterns(name), source=f"data.{name}") for name in names}
    types = path_types(config, (*columns.names, *also), found, kinds.of_columns(columns))
    return {
        name: ParquetShards(
            config.data.patterns(name),
            columns,
            source=f"data.{name}",
            kinds=kinds,
            found=found[name],
            path_types=types,
        )
        for name in names
    }


def path_types(
    config: Config, names: Collection[str], found: Mapping[str, Found], known: Mapping[str, str] | None = None
) -> dict[str, pa.DataType]:
    """The type of each column that is read from paths, decided over all splits of a config.

    Splits that are not asked for have a say too, if their files can be listed.

    Args:
        config: names the splits.
        names: columns that will be read.
        found: files of the splits that are asked for.
        known: what columns hold, as a checkpoint has it, which is not decided anew.
    """
    places = [place for of_split in found.values() for place in of_split.places]
    types = partition_types(places, names)
    decided = {name: pa.int64() if (known or {}).get(name) == "numbers" else pa.string() for name in known or {}}
    if types.keys() - decided.keys():
        for name in config.data.splits:
            if name not in found:
                with suppress(DataError):
                    places += find(config.data.patterns(name), source=f"data.{name}").places
        types = partition_types(places, names)
    return types | {name: kind for name, kind in decided.items() if name in types}


def open_loader(shards: ParquetShards, epochs: Iterable[Epoch], config: Config, ranks: Ranks) -> Loader:
    """A loader of this rank's batches, as the config has it read; to be entered."""
    return Loader(
        shards,
        epochs,
        ranks.rank,
        reader_threads=config.data.reader_threads,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=ranks.device.type == "cuda",
    )


def train_order(shards: ParquetShards, config: Config, world_size: int, number: int) -> Epoch:
    """The reading order of a run's epoch, numbered over all stages, for so many ranks."""
    data = config.data
    return Epoch(
        shards.row_counts,
        world_size,
        data.batch_size,
        seed=derive_seed(config.seed, "order"),
        epoch=number,
        shuffle=data.shuffle,
        window_row_groups=data.window_row_groups,
        of=shards.of,
    )


def eval_order(shards: ParquetShards, config: Config, world_size: int) -> Epoch:
    """The order in which a split is evaluated: that of the files."""
    return Epoch(shards.row_counts, world_size, config.data.eval_batch_size or config.data.batch_size, shuffle=False)
