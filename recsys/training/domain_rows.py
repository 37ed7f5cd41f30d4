"""Which rows a phase reads: all, or those of the domain whose expert it trains."""

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from recsys.config import Config
from recsys.data.domains import DomainCounts, count_domains
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError
from recsys.runtime import Ranks
from recsys.training.optimizers import Phase, phases


class DomainRows:
    """The rows of each domain, where a phase reads those of one alone; made by a collective call.

    Columns of domain and label of the splits are read once, each row group by one rank.

    Args:
        config: the run.
        splits: opened shards, `train` at least.
        ranks: this process among all.
        say: told what the counting took.

    Raises:
        DataError: an expert's domain has no row to train on; or none to choose its best state by, or of one label alone
            where that goes by AUC.
    """

    def __init__(
        self, config: Config, splits: Mapping[str, ParquetShards], ranks: Ranks, say: Callable[[str], None]
    ) -> None:
        self._splits = splits
        self._counts: dict[str, DomainCounts] = {}
        by_domain = [name for name in config.stages if any(phase.expert is not None for phase in phases(config, name))]
        if not by_domain:
            return
        began = time.perf_counter()
        for split in ("train", "valid"):
            if split in splits:
                self._counts[split] = _over_ranks(splits[split], config, ranks)
        assert config.data.domain is not None
        labels = config.data.domain.labels
        took = f"{time.perf_counter() - began:.1f} s"
        say(f"Rows of {config.num_domains} domains counted in {took}, for stage {', '.join(by_domain)}")
        _check(config, self._counts, by_domain, labels)

    def of(self, phase: Phase, split: str) -> ParquetShards:
        """What a phase reads of a split."""
        shards = self._splits[split]
        if phase.domain is None:
            return shards
        return shards.of_domain(phase.domain, self._counts[split].rows[:, phase.domain].tolist())


def _over_ranks(shards: ParquetShards, config: Config, ranks: Ranks) -> DomainCounts:
    mine = range(ranks.rank, len(shards.row_counts), ranks.world_size)
    counts = count_domains(shards, mine, threads=config.data.reader_threads)
    return DomainCounts(*map(_summed, counts))


def _summed(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    summed = torch.from_numpy(counts)
    dist.all_reduce(summed)
    return summed.numpy()


def _check(config: Config, counts: Mapping[str, DomainCounts], stages: list[str], labels: tuple[str, ...]) -> None:
    domain = config.data.domain
    assert domain is not None
    way_out = (
        f"an expert of it cannot be trained in stages.{stages[0]}; leave it out of data.domain.values and set "
        "data.domain.unseen to backbone, or train all experts together (trains: all)"
    )
    for number in np.flatnonzero(counts["train"].rows.sum(0)[: domain.num_domains] == 0)[:1].tolist():
        raise DataError(f"data.train: no row of domain {number} ({labels[number]}), so {way_out}")
    for name in stages:
        stage = config.stages[name]
        if stage.chosen_by is None:
            continue
        valid = counts["valid"].labels[:, : domain.num_domains]
        for number in np.flatnonzero(valid.sum(0) == 0)[:1].tolist():
            raise DataError(
                f"data.valid: no row of domain {number} ({labels[number]}), so stages.{name}.{stage.chosen_by} has "
                f"nothing to choose its expert by; {way_out}"
            )
        for number in np.flatnonzero((valid == 0).any(0))[:1].tolist() if stage.monitor != "log_loss" else ():
            only = int(valid[0, number] == 0)
            raise DataError(
                f"data.valid: all rows of domain {number} ({labels[number]}) are of label {only}, "
                f"so there is no AUC, which stages.{name}.monitor goes by; set it to log_loss, or {way_out}"
            )
