"""The splits of a config, opened and checked."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from recsys.config import Config
from recsys.data.features import build_columns
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.runtime import Ranks, derive_seed


def open_splits(config: Config, names: Sequence[str], vocabularies: Path | None = None) -> dict[str, ParquetShards]:
    """The shards of the named splits, opened and checked.

    Args:
        config: the run's.
        names: splits of the config.
        vocabularies: as for `build_columns`.

    Raises:
        ConfigError: the config lacks one of the splits, or as `build_columns`.
        DataError: as `ParquetShards` and `build_columns`.
    """
    columns = build_columns(config, vocabularies)
    return {name: ParquetShards(config.data.patterns(name), columns, source=f"data.{name}") for name in names}


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
    )


def eval_order(shards: ParquetShards, config: Config, world_size: int) -> Epoch:
    """The order in which a split is evaluated: that of the files."""
    return Epoch(shards.row_counts, world_size, config.data.eval_batch_size or config.data.batch_size, shuffle=False)
