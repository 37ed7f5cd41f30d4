"""An export, held against the model that it comes from before it gets its name."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from recsys.checkpoint.layout import VOCABULARIES
from recsys.config import Config, ConfigError, load_checkpoint_config
from recsys.data.batch import Part, build_batch
from recsys.data.kinds import read_kinds
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.splits import open_splits
from recsys.model.ranker import Ranker, build_ranker
from recsys.prepare.synthetic import require_embedded
from recsys.runtime import once_on_each_machine, process_group
from recsys.serving.artifact import ArtifactError, publish, write_artifact
from recsys.serving.scorer import Scorer
from recsys.serving.tables import Precision
from recsys.sharding.shard import shard
from recsys.training.checkpoint import load_model
from recsys.training.metrics import BinaryMetrics, Metrics

BOUNDS: dict[Precision, float] = {"float32": 1e-6, "float16": 1e-3, "int8": 2e-2}
"""By precision of the tables, by how much a probability may differ at most."""


class Parity(NamedTuple):
    """An artefact beside the model that it comes from, on the same rows.

    Attributes:
        split: whose rows.
        rows: how many.
        max_difference: largest difference of a probability.
        mean_difference: their mean.
        model: figures of the model, None without labels.
        artifact: figures of the artefact.
    """

    split: str
    rows: int
    max_difference: float
    mean_difference: float
    model: Metrics | None
    artifact: Metrics | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {"model": self.model, "artifact": self.artifact}
        told = {name: metrics.as_dict() if metrics else None for name, metrics in figures.items()}
        return {**self._asdict(), **told}


def export(
    checkpoint: Path, output: Path, *, tables: Precision, split: str | None, max_rows: int, bound: float | None
) -> Parity:
    """Write an artefact, and give it its name if it says what the checkpoint's model says.

    Args:
        checkpoint: of any number of ranks and any plan.
        output: the artefact's directory; nothing may be there.
        tables: precision in which the tables are kept.
        split: of the checkpoint's config, on whose rows the two are compared; None is `test`, or else `valid`.
        max_rows: how many rows are compared at least, if the split has as many: whole row groups are.
        bound: by how much a probability may differ; None is that of `BOUNDS`.

    Raises:
        ArtifactError: something is there, the disk refuses, or a probability differs by more than the bound.
        CheckpointError: the checkpoint is damaged.
        ConfigError: the config has no such split.
        DataError: as `recsys.data.parquet.ParquetShards`.
    """
    bound = BOUNDS[tables] if bound is None else bound
    config = _on_cpu(load_checkpoint_config(checkpoint))
    split = split or ("test" if config.data.test else "valid")
    if split not in config.data.splits:
        raise ConfigError(f"data.{split} is not set; the artefact is compared with the model on rows that are held out")
    if max_rows < 1:
        raise ConfigError(f"--max-rows: {max_rows} rows compare nothing; give 1 or more")
    written = write_artifact(checkpoint, output, tables=tables)
    try:
        with process_group("cpu") as ranks:
            once_on_each_machine(ranks, partial(require_embedded, config))
            shards = open_splits(config, [split], checkpoint / VOCABULARIES, read_kinds(checkpoint))[split]
            ranker = build_ranker(config, seed=0)
            dense_arch = ranker.dense_arch
            load_model(checkpoint, shard(ranker, config, ranks, seed=0), dense_arch)
            parity = _compare(ranker, Scorer(written), shards, split, max_rows)
        if not parity.max_difference <= bound:  # NaN is beyond any bound
            raise ArtifactError(
                f"the export differs from its model by {parity.max_difference:.2e} in a probability of {parity.rows:,} "
                f"{split} rows, by more than {bound:.0e}; keep the tables in a higher precision, or raise --bound"
            )
        publish(written, output, parity.as_dict())
    finally:
        if os.path.lexists(written):
            shutil.rmtree(written, ignore_errors=True)
    return parity


def _on_cpu(config: Config) -> Config:
    """The config with tables and an optimizer that any CPU has: where a model was trained is nothing that it says."""
    anywhere = {"sharding": None, "compute_kernel": None}
    tables = {
        name: table if table.data_parallel else table.model_copy(update=anywhere)
        for name, table in config.tables.items()
    }
    sparse = config.optimizers.sparse.model_copy(update={"type": "sgd", "weight_decay": 0.0})
    optimizers = config.optimizers.model_copy(update={"sparse": sparse})
    return config.model_copy(update={"tables": tables, "optimizers": optimizers})


@torch.no_grad()  # not inference_mode: fbgemm has kernels of this name for a CPU under autograd alone
def _compare(ranker: Ranker, scorer: Scorer, shards: ParquetShards, split: str, max_rows: int) -> Parity:
    """Both on whole row groups, in the order of the files."""
    ranker.eval()
    figures = BinaryMetrics(), BinaryMetrics()
    rows, most, total = 0, 0.0, 0.0
    for group, count in enumerate(shards.row_counts):
        if rows >= max_rows:
            break
        decoded = shards.read(RowSlice(group, 0, count))
        batch = build_batch(
            [Part(decoded, 0, count)], shards.layout, len(shards.columns.dense), loss_scale=1.0, pin_memory=False
        )
        expected = ranker(batch)[1].logits
        found = scorer.logits(decoded, shards.layout)
        if len(decoded.labels):
            found = found[torch.from_numpy(~np.isnan(decoded.labels))]
            for metrics, logits in zip(figures, (expected, found), strict=True):
                metrics.update(logits, batch.labels)
        differences = (expected.double().sigmoid() - found.double().sigmoid()).abs()
        rows += len(differences)
        total += float(differences.sum())
        most = float(np.maximum(most, float(differences.max()))) if len(differences) else most  # NaN stays
    if not rows:
        raise ArtifactError(f"data.{split} has no row to compare the artefact with its model on; name another --split")
    has_labels = shards.columns.label is not None
    model, artifact = (metrics.compute() if has_labels else None for metrics in figures)
    return Parity(split, rows, most, total / rows, model, artifact)
