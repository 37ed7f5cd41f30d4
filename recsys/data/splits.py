"""The splits of a config, opened and checked."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from recsys.config import Config, ConfigError
from recsys.data.features import Columns, SparseColumn
from recsys.data.ids import build_ids
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.vocabulary import load_vocabularies
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


def build_columns(config: Config, vocabularies: Path | None = None, *, raw: bool = False) -> Columns:
    """What a config reads of each row.

    Args:
        config: the run's.
        vocabularies: a folder that `save_vocabularies` wrote, such as that of a checkpoint; None takes the files that
            the config names.
        raw: whether rows hold raw values, as those that a model is asked about do, even where the shards hold rows of
            tables already (`ids.applied`).

    Raises:
        ConfigError: the label is no expression, or a table has fewer rows than its ids need.
        DataError: a vocabulary cannot be read, or is not the one that was saved.
    """
    read = load_vocabularies(config, vocabularies)
    sparse = {}
    for name, feature in config.features.sparse.items():
        num_embeddings = config.tables[feature.table].num_embeddings
        of_raw = build_ids(feature, num_embeddings, read.get(name))
        if num_embeddings < of_raw.num_rows:
            raise ConfigError(
                f"tables.{feature.table}.num_embeddings: {num_embeddings} rows are too few for the ids of "
                f"features.sparse.{name}, which need {of_raw.num_rows}"
            )
        settings = feature if raw else feature.stored
        ids = of_raw if settings is feature else build_ids(settings, num_embeddings, None)
        sparse[name] = SparseColumn(settings, ids)
    data = config.data
    return Columns(
        label=data.label,
        reference=data.reference,
        dense=config.features.dense,
        sparse=sparse,
        domain=data.domain,
        label_null=data.label_null,
        weight=data.weight,
        vocabularies=read,
    )


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
