"""Stages: what trains in each, with which optimizers and learning rates (papers' schedule: arXiv 2510.10432)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from recsys.config import Config, ConfigError, StageConfig
from recsys.model.hilomoe import hilomoe_layers
from recsys.sharding.shard import ShardedRanker


def schedule_factor(stage: StageConfig, step: int, num_steps: int) -> float:
    """Factor of all learning rates at a step of the stage: linear warm-up, then constant or cosine to 0 at its end."""
    if step < stage.warmup_steps:
        return (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return 1.0
    after = num_steps - stage.warmup_steps
    return 0.5 * (1 + cos(pi * (step - stage.warmup_steps) / max(after, 1)))


def stage_lengths(stages: Mapping[str, StageConfig], steps_per_epoch: int) -> dict[str, int]:
    """Optimizer steps that each stage lasts at most.

    Raises:
        ConfigError: a warm-up is longer than its stage.
    """
    lengths = {name: stage.steps or (stage.epochs or 0) * steps_per_epoch for name, stage in stages.items()}
    for name, stage in stages.items():
        if stage.warmup_steps > lengths[name]:
            raise ConfigError(
                f"stages.{name}.warmup_steps is {stage.warmup_steps}, but the stage has {lengths[name]} steps"
            )
    return lengths


@dataclass
class Stage:
    """A stage under way.

    Attributes:
        name: as in the config.
        config: its settings.
        num_steps: optimizer steps it lasts at most.
        optimizer: everything that a step of this stage updates.
        dense_optimizer: AdamW of what this stage trains in the dense arch; made anew with the stage.
    """

    name: str
    config: StageConfig
    num_steps: int
    optimizer: CombinedOptimizer
    dense_optimizer: KeyedOptimizer
    _rates: dict[str, tuple[Optimizer, float]]

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set every learning rate for a step of the stage (from 0), and tell them by optimizer."""
        factor = schedule_factor(self.config, step, self.num_steps)
        for optimizer, peak in self._rates.values():
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        return {name: peak * factor for name, (_, peak) in self._rates.items()}


def begin_stage(sharded: ShardedRanker, dense_arch: nn.Module, config: Config, name: str, *, num_steps: int) -> Stage:
    """Freeze and free parameters for a stage, wrap the dense arch in a fresh DDP, and make the stage's optimizers.

    Experts are computed from the first stage on that trains them. Attaching them does not change the model: their
    up-projections start at zero.
    """
    stage = config.stages[name]
    names = list(config.stages)
    attached = any(config.stages[n].trains != "backbone" for n in names[: names.index(name) + 1])
    experts: set[nn.Parameter] = set()
    for layer in hilomoe_layers(dense_arch).values():
        layer.experts_active = attached
        layer.routing = None
        experts.update(layer.expert_parameters())
    for parameter in dense_arch.parameters():
        parameter.requires_grad_(stage.trains == "all" or (parameter in experts) == (stage.trains == "experts"))
        parameter.grad = None
    ranker = sharded.ranker
    ranker.embeddings_frozen = stage.trains == "experts"
    ranker.balance_weight, ranker.z_weight = stage.balance_weight, stage.z_weight
    ranker.diversity_weight = stage.diversity_weight
    ranker.dense_arch = DistributedDataParallel(dense_arch, gradient_as_bucket_view=True)

    trained = {name: parameter for name, parameter in dense_arch.named_parameters() if parameter.requires_grad}
    adamw = config.optimizers.dense
    dense = KeyedOptimizerWrapper(
        trained,
        lambda parameters: torch.optim.AdamW(
            parameters, lr=0.0, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
        ),
    )
    optimizers: list[tuple[str, KeyedOptimizer]] = [("dense", dense)]
    rates: dict[str, tuple[Optimizer, float]] = {"dense": (dense, stage.learning_rate)}
    if not ranker.embeddings_frozen:
        if stage.sparse_learning_rate is not None:  # else there are no sharded tables: the config sees to it
            optimizers.append(("sparse", sharded.sparse_optimizer))
            rates["sparse"] = (sharded.sparse_optimizer, stage.sparse_learning_rate)
        if sharded.data_parallel_optimizer is not None:
            optimizers.append(("data_parallel", sharded.data_parallel_optimizer))
            rate = stage.data_parallel_learning_rate or stage.learning_rate
            rates["data_parallel"] = (sharded.data_parallel_optimizer, rate)
    return Stage(name, stage, num_steps, CombinedOptimizer(optimizers), dense, rates)
