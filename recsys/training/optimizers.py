"""What the phases of a stage train, with which optimizers and learning rates."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer

from recsys.config import Config, ConfigError, MoEMLoRAConfig, StageConfig
from recsys.model.experts import DOMAIN_EXPERTS, GATE, domain_adaptation, expert_layers, parameter_groups
from recsys.sharding.rows import Rows
from recsys.sharding.shard import ShardedRanker
from recsys.training.compute import as_computed
from recsys.training.dense_optimizer import UP_PROJECTIONS, build_dense_optimizer
from recsys.training.schedules import schedule_factor

TABLES = "tables"
"""The group of parameters that are the embedding tables; those of the dense arch are named by its experts."""

_TRAINED: Mapping[str, tuple[frozenset[str], ...]] = {
    "backbone": (frozenset({TABLES, "backbone"}),),
    "experts": (frozenset({"experts"}),),
    "gate": (frozenset({GATE}),),
    "all": (frozenset({TABLES, "backbone", "experts", GATE}),),
}
"""By what a stage's `trains` says, the groups of parameters that each of its phases trains, domain experts aside."""


class Phase(NamedTuple):
    """A part of a stage in which the same parameters train.

    Attributes:
        number: within its stage, from 0.
        trains: names of groups of parameters, `TABLES` or those of `recsys.model.experts.parameter_groups`.
        expert: the only domain expert that there is; None for all rows.
        domain: whose rows alone are read then.
    """

    number: int
    trains: frozenset[str]
    expert: int | None = None
    domain: int | None = None


def phases(config: Config, stage: str) -> tuple[Phase, ...]:
    """The phases of a stage in order; each lasts as long as the stage's settings say.

    A mixture's experts are trained one after another. Those of MLoRA, each of which has rows of its own, are trained
    together, in one phase with routed ones.
    """
    trains, model = config.stages[stage].trains, config.model
    found: list[tuple[frozenset[str], int | None]] = [(groups, None) for groups in _TRAINED[trains]]
    of_domains = [f"{DOMAIN_EXPERTS}{expert}" for expert in range(config.num_domain_experts)]
    if trains == "experts" and isinstance(model.domain_experts, MoEMLoRAConfig):
        found = found if model.hilomoe is not None else []
        found += [(frozenset({group}), expert) for expert, group in enumerate(of_domains)]
    elif trains in ("experts", "all"):
        found[-1] = found[-1][0].union(of_domains), None
    return tuple(
        Phase(number, groups, expert, None if expert is None else expert % config.num_domains)
        for number, (groups, expert) in enumerate(found)
    )


def phase_lengths(config: Config, steps_per_epoch: Callable[[Phase], int]) -> dict[str, int]:
    """Optimizer steps that the longest phase of a stage lasts at most, by stage.

    Args:
        config: the run.
        steps_per_epoch: of a phase.

    Raises:
        ConfigError: a warm-up is longer than a phase.
    """
    lengths = {}
    for name, stage in config.stages.items():
        of_phases = [stage.steps or (stage.epochs or 0) * steps_per_epoch(phase) for phase in phases(config, name)]
        lengths[name] = max(of_phases)
        if stage.warmup_steps > min(of_phases):
            which = "the stage" if len(of_phases) == 1 else "a phase of the stage"
            raise ConfigError(
                f"stages.{name}.warmup_steps is {stage.warmup_steps}, but {which} has {min(of_phases)} steps"
            )
    return lengths


class Clipping:
    """Scales gradients down to a norm before each step of their optimizer.

    Args:
        parameters: whose gradients are clipped together.
        max_norm: the largest L2 norm that is left to them.

    Attributes:
        norm: of the gradients of the last step before they were clipped, (), the same on all ranks.
    """

    def __init__(self, parameters: list[Tensor], max_norm: float) -> None:
        self._parameters, self._max_norm = parameters, max_norm
        self.norm: Tensor | None = None

    def __call__(self, *_: object) -> None:
        """As a hook before an optimizer's step."""
        self.norm = clip_grad_norm_(self._parameters, self._max_norm, error_if_nonfinite=False, foreach=True)


@dataclass
class PhaseOptimizers:
    """The optimizers of a phase under way.

    Attributes:
        all: everything that a step updates.
        dense: AdamW, and Muon where the config has it, of what the phase trains in the dense arch; made anew with it.
        stage: settings.
        num_steps: optimizer steps the phase lasts at most.
        clipping: of the dense optimizer's gradients, None where they are not clipped.
        rows: of the sharded tables.
    """

    all: CombinedOptimizer
    dense: CombinedOptimizer
    stage: StageConfig
    num_steps: int
    _rates: dict[str, tuple[Collection[Any], float]]
    clipping: Clipping | None
    rows: Rows

    @property
    def norm_before_clipping(self) -> Tensor | None:
        """Of the dense gradients of the last step, (); None where they are as they were."""
        return None if self.clipping is None else self.clipping.norm

    def begin_anew(self) -> None:
        """Have the dense optimizer be as it was made, without state and at rates of 0."""
        for _, optimizer in self.dense.optimizers:
            state: Any = optimizer.state
            state.clear()
        for group in self.dense.param_groups:
            group["lr"] = 0.0

    def set_learning_rates(self, step: int, plateau_share: float = 1.0) -> dict[str, float]:
        """Set every learning rate as `schedule_factor` has it for a step of the phase, and tell them by name.

        Rows of the sharded tables go by that of theirs, so this is called once before each step.
        """
        factor = schedule_factor(self.stage, step, self.num_steps, plateau_share)
        for groups, peak in self._rates.values():
            for group in groups:
                group["lr"] = peak * factor
        rates = {name: peak * factor for name, (_, peak) in self._rates.items()}
        if "sparse" in rates:
            self.rows.begin_step(rates["sparse"])
        return rates


def begin_phase(
    sharded: ShardedRanker, dense_arch: nn.Module, config: Config, stage: str, number: int = 0, *, num_steps: int
) -> PhaseOptimizers:
    """Freeze and free parameters for a phase of a stage, wrap the dense arch in a fresh DDP, make the optimizers.

    Experts are computed from the first phase on that trains them. Attaching them does not change the model: their
    up-projections start at zero.
    """
    settings, ranker = config.stages[stage], sharded.ranker
    phase = phases(config, stage)[number]
    names = list(config.stages)
    before = [phase for name in names[: names.index(stage)] for phase in phases(config, name)]
    so_far = frozenset[str]().union(*(phase.trains for phase in (*before, *phases(config, stage)[: number + 1])))
    for layer in expert_layers(dense_arch).values():
        layer.experts_active = not so_far.isdisjoint(layer.parameter_groups())
        layer.forget_routing()
    if (adaptation := domain_adaptation(dense_arch)) is not None:
        adaptation.active = any(group.startswith(DOMAIN_EXPERTS) for group in so_far)
        adaptation.expert = phase.expert
    settle_gate(dense_arch, phase)
    for group, parameters in parameter_groups(dense_arch).items():
        for parameter in parameters:
            parameter.requires_grad_(group in phase.trains)
            parameter.grad = None
    ranker.embeddings_frozen = TABLES not in phase.trains
    ranker.loss_weights = settings.loss_weights
    computed = as_computed(dense_arch, config.compute, config.data.batch_size)
    ranker.dense_arch = DistributedDataParallel(computed, gradient_as_bucket_view=True)
    # They are statistics that all ranks work out alike. As an argument, torch 2.13 warns of it; 2.11 has no other.
    ranker.dense_arch.broadcast_buffers = False
    _settle_buckets(ranker.dense_arch, config, settings, pools_with_graph=not ranker.embeddings_frozen)
    return _optimizers(sharded, dense_arch, config, settings, num_steps)


def settle_gate(dense_arch: nn.Module, phase: Phase) -> None:
    """Have the gate weigh domain experts where a phase trains it, and not where one is trained that it does not know.

    Whatever a state of before the phase says, which may be another run's.
    """
    adaptation = domain_adaptation(dense_arch)
    if adaptation is None or adaptation.gate is None:
        return
    if GATE in phase.trains:
        adaptation.use_gate()
    elif phase.expert is not None:
        adaptation.gated.fill_(False)


def _settle_buckets(
    dense_arch: DistributedDataParallel, config: Config, stage: StageConfig, *, pools_with_graph: bool
) -> None:
    """Have DDP order its buckets now, as it does after its first backward.

    The order decides in which order gradients are summed over three ranks or more. A run that is resumed has a new DDP,
    whose next step must sum as that of the run which was not interrupted.
    """
    device = next(dense_arch.parameters()).device
    width = sum(config.embedding_dims.values())
    buffers = [(buffer, buffer.clone()) for buffer in dense_arch.buffers()]  # which zeros must not move
    # As a step's, where they are compiled: here they are compiled for it.
    rows = config.data.batch_size if config.compute.compile else 2
    pooled = torch.zeros(rows, width, device=device, requires_grad=config.compute.compile and pools_with_graph)
    inputs = (pooled, torch.zeros(rows, len(config.features.dense), device=device))
    domain = torch.zeros(rows if config.data.domain else 0, dtype=torch.int64, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):  # of which dropout draws
        logits, losses, paths, _ = dense_arch(*inputs, domain, stage.loss_weights)
        ((logits if paths is None else paths).sum() + sum(losses.values())).backward()
    for buffer, before in buffers:
        buffer.copy_(before)
    for parameter in dense_arch.parameters():
        parameter.grad = None
    for layer in expert_layers(dense_arch.module).values():
        layer.forget_routing()


def _optimizers(
    sharded: ShardedRanker, dense_arch: nn.Module, config: Config, stage: StageConfig, num_steps: int
) -> PhaseOptimizers:
    settings, of_experts = config.optimizers.dense, stage.expert_learning_rate
    dense = build_dense_optimizer(dense_arch, settings, apart=of_experts is not None)
    clipping = None
    if settings.max_grad_norm is not None:
        clipping = Clipping([p for p in dense_arch.parameters() if p.requires_grad], settings.max_grad_norm)
        dense.register_step_pre_hook(clipping)
    optimizers: list[tuple[str, KeyedOptimizer]] = [("dense", dense)]
    rates: dict[str, tuple[Collection[Any], float]] = {
        "dense": ([group for group in dense.param_groups if not group[UP_PROJECTIONS]], stage.learning_rate)
    }
    if of_experts is not None:
        rates["expert"] = [group for group in dense.param_groups if group[UP_PROJECTIONS]], of_experts
    if not sharded.ranker.embeddings_frozen:
        if stage.sparse_learning_rate is not None:  # else there are no sharded tables: the config sees to it
            optimizers.append(("sparse", sharded.sparse_optimizer))
            rates["sparse"] = sharded.sparse_optimizer.param_groups, stage.sparse_learning_rate
        if sharded.data_parallel_optimizer is not None:
            optimizers.append(("data_parallel", sharded.data_parallel_optimizer))
            rate = stage.data_parallel_learning_rate or stage.learning_rate
            rates["data_parallel"] = sharded.data_parallel_optimizer.param_groups, rate
    return PhaseOptimizers(CombinedOptimizer(optimizers), dense, stage, num_steps, rates, clipping, sharded.rows)
