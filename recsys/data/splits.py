"""The splits of a config, opened and checked."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from recsys.config import (
    BucketizeIdsConfig,
    Config,
    ConfigError,
    DatetimeIdsConfig,
    HashIdsConfig,
    SparseFeatureConfig,
    VocabularyIdsConfig,
)
from recsys.data.features import Columns, DenseColumn, DomainColumn, SparseColumn
from recsys.data.ids import BucketizedIds, DatetimeIds, HashedIds, IdMapping, PlainIds, VocabularyIds
from recsys.data.loader import Loader
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.vocabulary import Vocabulary, load_vocabularies
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


def build_columns(config: Config, vocabularies: Path | None = None) -> Columns:
    """What a config reads of each row.

    Args:
        config: the run's.
        vocabularies: a folder that `save_vocabularies` wrote, such as that of a checkpoint; None takes the files that
            the config names.

    Raises:
        ConfigError: the label is no expression, or a table has fewer rows than its ids need.
        DataError: a vocabulary cannot be read, or is not the one that was saved.
    """
    read = load_vocabularies(config, vocabularies)
    sparse = {}
    for name, feature in config.features.sparse.items():
        ids, num_rows = _id_mapping(feature, read.get(name)), config.tables[feature.table].num_embeddings
        if num_rows < ids.least_rows:
            raise ConfigError(
                f"tables.{feature.table}.num_embeddings: {num_rows} rows are too few for the ids of "
                f"features.sparse.{name}, which need {ids.least_rows}"
            )
        column = feature.column or name
        sparse[name] = SparseColumn(column, num_rows, ids, feature.weights, feature.max_length, feature.keep)
    dense = {
        name: DenseColumn(
            feature.column or name,
            feature.fill,
            feature.log1p,
            feature.clip,
            (feature.standardize.mean, feature.standardize.std) if feature.standardize else None,
            feature.not_finite,
        )
        for name, feature in config.features.dense.items()
    }
    data = config.data
    return Columns(
        label=data.label,
        reference=data.reference,
        dense=dense,
        sparse=sparse,
        domain=DomainColumn(data.domain.column, data.domain.num_domains) if data.domain else None,
        label_null=data.label_null,
        weight=data.weight,
    )


def _id_mapping(feature: SparseFeatureConfig, vocabulary: Vocabulary | None) -> IdMapping:
    match feature.ids:
        case None:
            return PlainIds(feature.out_of_range)
        case HashIdsConfig(salt=salt):
            return HashedIds(salt)
        case BucketizeIdsConfig(boundaries=boundaries):
            return BucketizedIds(boundaries)
        case DatetimeIdsConfig(part=part, timezone=timezone):
            return DatetimeIds(part, timezone)
        case VocabularyIdsConfig():
            assert vocabulary is not None
            return VocabularyIds(vocabulary)


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
