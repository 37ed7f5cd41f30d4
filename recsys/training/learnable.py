"""Whether the splits hold the labels that a run needs, asked before it trains."""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist

from recsys.config import Config
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError
from recsys.runtime import Ranks


def check_labels(config: Config, splits: Mapping[str, ParquetShards], ranks: Ranks) -> None:
    """Refuse splits that leave nothing to learn from or to choose the best state by; a collective call.

    Of each split only what the label is made of is read, by each rank of its share of the row groups, up to the first
    that has what is looked for: mostly one.

    Args:
        config: whose stages say what is needed.
        splits: opened shards, `train` at least.
        ranks: this process among all.

    Raises:
        DataError: `data.label_null: skip` leaves no row of the train split, or none of the valid split where a stage
            ends with its best state by it; such a stage monitors `auc` and the valid split's labels are all the same;
            or a label that is read is refused.
    """
    skips = config.data.label_null == "skip"
    if skips and not any(_classes(splits["train"], ranks, needed=1)):
        raise DataError(
            "data.train: no row has a label and data.label_null is skip, so there is nothing to learn from; correct "
            "data.label, or join the labels again when the shards are written"
        )
    chosen = [name for name, stage in config.stages.items() if stage.chosen_by is not None]
    by_auc = [name for name in chosen if config.stages[name].monitor != "log_loss"]
    if not (by_auc or (skips and chosen)):
        return
    classes = _classes(splits["valid"], ranks, needed=2 if by_auc else 1)
    if not any(classes):
        key = config.stages[chosen[0]].chosen_by
        raise DataError(
            f"data.valid: no row has a label and data.label_null is skip, so stages.{chosen[0]}.{key} has nothing "
            f"to go by; join the labels again when the shards are written, or leave {key} out"
        )
    if by_auc and not all(classes):
        raise DataError(
            f"data.valid: all labels are {classes.index(True)}, so there is no AUC, which stages.{by_auc[0]}.monitor "
            "goes by; set it to log_loss, or write a valid split that has both classes"
        )


def _classes(shards: ParquetShards, ranks: Ranks, *, needed: int) -> tuple[bool, bool]:
    """Whether a split has rows of label 0 and of label 1, over all ranks, each looking until it has found `needed`."""
    label = shards.columns.parts["data.label"]
    found: set[float] = set()
    for group in range(ranks.rank, len(shards.row_counts), ranks.world_size):
        if len(found) >= needed:
            break
        table = shards.table(group, label.names)
        labels = label.decode(table, label.layout(frozenset()), shards.where(group)).labels
        found.update(np.unique(labels[~np.isnan(labels)]).tolist())
    there = torch.tensor([0.0 in found, 1.0 in found], dtype=torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX)
    negative, positive = there.tolist()
    return bool(negative), bool(positive)
