"""The dense arch: pooled embeddings and dense features -> tower -> click logit. Plain torch, as serving needs it too.

Shapes: B rows, F_d dense features, W the towers' input width, P paths.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import ConfigError, DomainExpertsConfig, HiLoMoEConfig, ModelConfig, MoEMLoRAConfig
from recsys.config.towers import FIRST_ORDER_WIDTH
from recsys.model.experts import (
    DomainAdaptation,
    DomainGate,
    attach_domain_experts,
    attach_experts,
    expert_layers,
    rank_of,
)
from recsys.model.losses import Losses, auxiliary_losses
from recsys.model.towers import Tokens, Tower, build_tower

_RANK_REDUCTION = 16
"""Of domain experts where neither it nor their rank is said; MoE-MLoRA's code has it for most towers."""


class DenseOutput(NamedTuple):
    """What the dense arch makes of a batch.

    Attributes:
        logits: (B,) of the click; with paths, that of the mean of their probabilities.
        losses: the auxiliary losses of its experts.
        paths: (P, B) logits of each path; None with one tower.
        order: (B,) in which the towers had the rows, which routing is recorded in; None for as they were given.
    """

    logits: Tensor
    losses: Losses
    paths: Tensor | None
    order: Tensor | None = None


class EmbeddingDropout(nn.Module):
    """Dropout of the numbers of pooled embeddings, in training only; first-order weights stay as they are.

    These are a linear model's, and no embedding: each is a whole summand of the logit.

    Args:
        p: probability with which a number is 0; the others are divided by 1 - p.
        dims: width of each pooled embedding.
        wide: whether its last `FIRST_ORDER_WIDTH` numbers are its first-order weight and padding.
    """

    def __init__(self, p: float, dims: Sequence[int], wide: bool) -> None:
        super().__init__()
        self.p = p
        self._dims = [dim - FIRST_ORDER_WIDTH for dim in dims] if wide else []
        self._parts = [part for dim in self._dims for part in (dim, FIRST_ORDER_WIDTH)]

    def forward(self, pooled: Tensor) -> Tensor:
        """(B, sum of dims) -> (B, sum of dims)."""
        if not self.training:
            return pooled
        if not self._parts:
            return F.dropout(pooled, self.p)
        parts = pooled.split(self._parts, 1)
        embeddings = F.dropout(torch.cat(parts[::2], 1), self.p).split(self._dims, 1)
        return torch.cat([part for pair in zip(embeddings, parts[1::2], strict=True) for part in pair], 1)


class DenseArch(nn.Module):
    """Everything that is replicated and trained by the dense optimizer: dense projection, towers and their heads.

    One tower is the child `tower`, and its head `head`. Several are `paths.0`, `paths.1` and so on, with `heads.0`,
    `heads.1`: each has a logit of its own, and the mean of their probabilities is the model's.

    Args:
        num_dense_features: F_d, may be 0.
        dense_dim: width to which the dense features are projected.
        towers: one at least, each from (B, W).
        embedding_dropout: of what the tables give, None where it enters the towers as it is.

    Attributes:
        domain_adaptation: of the linears that adapt to domains, None where none does.
        autocast: what towers multiply in, in training only, parameters and heads being float32; None for float32, too.
    """

    tower: Tower
    head: nn.Linear
    domain_adaptation: DomainAdaptation | None
    autocast: torch.dtype | None

    def __init__(
        self,
        num_dense_features: int,
        dense_dim: int,
        *towers: Tower,
        embedding_dropout: EmbeddingDropout | None = None,
    ) -> None:
        super().__init__()
        self.embedding_dropout = embedding_dropout
        self.domain_adaptation, self.autocast = None, None
        self.dense_projection = nn.Linear(num_dense_features, dense_dim) if num_dense_features else None
        self._has_paths = len(towers) > 1
        if self._has_paths:
            self.paths = nn.ModuleList(towers)
            self.heads = nn.ModuleList(map(_head, towers))
        else:
            (self.tower,) = towers
            self.head = _head(self.tower)

    @property
    def towers_and_heads(self) -> list[tuple[Tower, nn.Linear]]:
        """Each tower with its head."""
        return list(zip(self.paths, self.heads, strict=True)) if self._has_paths else [(self.tower, self.head)]  # type: ignore[arg-type]

    def forward(
        self,
        pooled: Tensor,
        dense_features: Tensor,
        domain: Tensor | None = None,
        loss_weights: Mapping[str, float] = MappingProxyType({}),
    ) -> DenseOutput:
        """From a batch to its logits, and what its experts' routing costs.

        Args:
            pooled: embeddings, (B, sum of dims).
            dense_features: (B, F_d).
            domain: of the rows, (B,); read only where linears adapt to it.
            loss_weights: factors by name, which decide what auxiliary losses are computed.
        """
        parts = [pooled if self.embedding_dropout is None else self.embedding_dropout(pooled)]
        if self.dense_projection is not None:
            parts.append(self.dense_projection(dense_features))
        x, order = torch.cat(parts, 1), None
        if self.domain_adaptation is None:
            each = self._logits(x)
        else:
            if domain is None:
                raise ValueError("linears adapt to domains, and no domain of the rows is given")
            with self.domain_adaptation.call(domain, x) as order:
                each = self._logits(x if order is None else x.index_select(0, order))
            if order is not None:
                each = each.index_select(1, order.argsort())
        paths = each if self._has_paths else None
        logits = each.squeeze(0) if paths is None else logit_of_mean(paths)
        layers = [layer for layer in expert_layers(self).values() if layer.experts_active]
        return DenseOutput(logits, auxiliary_losses(layers, loss_weights, logits), paths, order)

    def _logits(self, x: Tensor) -> Tensor:
        """Of each tower, (P, B), from what all read, (B, W)."""
        if not self._has_paths:
            alone: Tensor = self.head(self._through(self.tower, x))
            return alone.t()
        # A view for each path: if one of them copies a request's context into all rows, the others need not.
        each = [
            head(self._through(path, x[:, :])).squeeze(-1) for path, head in zip(self.paths, self.heads, strict=True)
        ]
        return torch.stack(each)

    def _through(self, tower: nn.Module, x: Tensor) -> Tensor:
        """What a tower makes of (B, W), in the precision of x."""
        if self.autocast is None or not self.training:
            out: Tensor = tower(x)
            return out
        with torch.autocast(x.device.type, self.autocast):
            out = tower(x)
        return out.to(x.dtype)


def logit_of_mean(logits: Tensor) -> Tensor:
    """Logit (B,) of the mean of probabilities, whose own are (P, B); finite and exact where a probability is 0 or 1."""
    return torch.logsumexp(F.logsigmoid(logits), 0) - torch.logsumexp(F.logsigmoid(-logits), 0)


def _head(tower: Tower) -> nn.Linear:
    """From what a tower gives to its logit; what are summands of it already begin by being added as they are."""
    head = nn.Linear(tower.out_features, 1)
    _add_as_it_is(tower, head)
    return head


def _add_as_it_is(tower: Tower, head: nn.Linear) -> None:
    nn.init.ones_(head.weight[:, tower.out_features - tower.num_logits :])


def _begin_by_xavier(dense_arch: DenseArch) -> None:
    """Draw what linears begin with anew; factors of what a head adds as it is stay 1."""
    with torch.no_grad():
        for module in dense_arch.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for tower, head in dense_arch.towers_and_heads:
            _add_as_it_is(tower, head)


def build_dense_arch(
    config: ModelConfig,
    embedding_dims: Mapping[str, int],
    *,
    num_dense_features: int,
    num_domains: int = 0,
    with_others: bool = False,
) -> DenseArch:
    """The replicated part: tokens are the sparse features' pooled embeddings and the projected dense features.

    Args:
        config: towers and experts.
        embedding_dims: width of each sparse feature's pooled embedding, in the order in which they enter the tower.
        num_dense_features: F_d, may be 0.
        num_domains: to which linears may adapt.
        with_others: whether rows may be of none of them.

    Raises:
        ConfigError: experts are asked for in a linear that is not there.
    """
    tokens = Tokens(
        tuple(embedding_dims), (*embedding_dims.values(), *([config.dense_dim] if num_dense_features else []))
    )
    towers = [build_tower(tower, tokens) for tower in config.towers.values()]
    dropout = (
        EmbeddingDropout(config.embedding_dropout, list(embedding_dims.values()), bool(config.padding))
        if config.embedding_dropout
        else None
    )
    dense_arch = DenseArch(num_dense_features, config.dense_dim, *towers, embedding_dropout=dropout)
    if config.linear_init == "xavier_normal":
        _begin_by_xavier(dense_arch)
    if config.hilomoe is not None:
        own = _of_towers({name: tower.expert_linears for name, tower in config.towers.items()})
        _attach(dense_arch, config.hilomoe, config.hilomoe.experts_in or own)
    if config.domain_experts is not None:
        own = _of_towers({name: tower.deep_linears or tower.expert_linears for name, tower in config.towers.items()})
        patterns, domains = config.domain_experts.experts_in or own, (num_domains, with_others)
        _adapt(dense_arch, config.domain_experts, patterns, tokens.width, domains)
    return dense_arch


def _of_towers(patterns: Mapping[str, Sequence[str]]) -> list[str]:
    """Patterns of linears of each tower by the name that the tower has here."""
    return [f"{name}.{pattern.removeprefix('tower.')}" for name, own in patterns.items() for pattern in own]


def _attach(dense_arch: DenseArch, config: HiLoMoEConfig, patterns: Sequence[str]) -> None:
    try:
        attached = attach_experts(dense_arch, patterns, **config.model_dump(exclude={"experts_in"}))
    except ValueError as error:
        raise ConfigError(f"model.hilomoe.experts_in: {error}") from None
    for layer in attached.values():
        layer.record_routing = True


def _adapt(
    dense_arch: DenseArch, config: DomainExpertsConfig, patterns: Sequence[str], width: int, domains: tuple[int, bool]
) -> None:
    """Have linears adapt to so many domains, and perhaps others; a gate may read the width of the towers' input."""
    num_domains, with_others = domains
    gate, num_experts = None, num_domains
    shared_by: Literal["own", "all"] = "own"
    if isinstance(config, MoEMLoRAConfig):
        num_experts = config.num_experts or num_domains
        if config.gate == "uniform":
            shared_by = "all"
        else:
            gate = DomainGate(num_domains, num_experts, width if config.gate == "features" else 0)
    adaptation = DomainAdaptation(num_domains, num_experts, gate, shared_by=shared_by, with_others=with_others)

    def rank(linear: nn.Linear) -> int:
        return config.rank or rank_of(linear.out_features, config.rank_reduction or _RANK_REDUCTION)

    try:
        attach_domain_experts(dense_arch, patterns, adaptation, rank, dropout=config.dropout)
    except ValueError as error:
        raise ConfigError(f"model.domain_experts.experts_in: {error}") from None
    dense_arch.domain_adaptation = adaptation
