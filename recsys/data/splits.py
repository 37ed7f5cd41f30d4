"""The splits of a config, opened and checked."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch.distributed as dist

from recsys.config import Config, ConfigError
from recsys.data.columns import Columns, DenseColumn, DomainColumn, SparseColumn
from recsys.data.loader import Loader
from recsys.data.parquet import ParquetShards
from recsys.data.stream import Epoch
from recsys.data.synthetic import write_synthetic
from recsys.runtime import Ranks


def open_splits(config: Config, ranks: Ranks, names: Sequence[str]) -> dict[str, ParquetShards]:
    """The shards of the named splits, the embedded synthetic log written first if the config asks for it.

    A collective call.

    Raises:
        ConfigError: the config lacks one of the splits.
        DataError: as `ParquetShards`.
    """
    spec = config.data.synthetic
    if spec is not None:
        if ranks.local_rank == 0:
            arguments = spec.model_dump(exclude={"directory"})
            try:
                write_synthetic(Path(spec.directory), **arguments)
            except (ValueError, OSError) as error:
                raise ConfigError(f"data.synthetic: {error}") from None
        dist.barrier()
    columns = build_columns(config)
    return {name: ParquetShards(config.data.patterns(name), columns, source=f"data.{name}") for name in names}


def build_columns(config: Config) -> Columns:
    """What a config reads of each row."""
    domain = config.data.domain
    return Columns(
        label=config.data.label,
        reference=config.data.reference,
        dense={name: DenseColumn(f.column or name, f.fill, f.log1p) for name, f in config.features.dense.items()},
        sparse={
            name: SparseColumn(f.column or name, config.tables[f.table].num_embeddings)
            for name, f in config.features.sparse.items()
        },
        domain=DomainColumn(domain.column, domain.num_domains) if domain else None,
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
