"""The ranker: pooled embeddings -> tower -> click logit -> loss.

Shapes: B rows of this rank's batch, F_d dense features, W the tower's input width, M HiLoMoE linears, L expert layers.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedTensor, PoolingType

from recsys.config import (
    Config,
    ConfigError,
    DCNv2TowerConfig,
    FinalMLPTowerConfig,
    HiLoMoEConfig,
    MLPTowerConfig,
    ModelConfig,
    TransformerTowerConfig,
)
from recsys.data.batch import Batch
from recsys.model.hilomoe import attach_experts, hilomoe_layers
from recsys.model.towers import MLP, DCNv2, FinalMLP, Transformer


class RankerOutput(NamedTuple):
    """What a step tells, detached and on the model's device.

    Attributes:
        logits: (B,) click logits.
        labels: (B,) as in the batch.
        domain: (B,) or (0,) as in the batch.
        bce: scalar, this rank's share of the step's mean binary cross entropy (the mean over ranks is the step's), each
            row's multiplied by its weight.
        balance: scalar, mean balance loss over this rank's expert layers; 0 when no expert is active.
        z: scalar, mean router z-loss likewise.
        diversity: scalar, mean diversity loss over the expert layers; 0 also while its weight is 0.
    """

    logits: Tensor
    labels: Tensor
    domain: Tensor
    bce: Tensor
    balance: Tensor
    z: Tensor
    diversity: Tensor


class DenseArch(nn.Module):
    """Everything that is replicated and trained by the dense optimizer: dense projection, tower and head.

    Args:
        num_dense_features: F_d, may be 0.
        dense_dim: width to which the dense features are projected.
        tower: module from (B, W) to (B, `out_features`).
        out_features: the tower's output width.
    """

    def __init__(self, num_dense_features: int, dense_dim: int, tower: nn.Module, out_features: int) -> None:
        super().__init__()
        self.dense_projection = nn.Linear(num_dense_features, dense_dim) if num_dense_features else None
        self.tower = tower
        self.head = nn.Linear(out_features, 1)

    def forward(
        self, pooled: Tensor, dense_features: Tensor, *, with_diversity: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pooled embeddings (B, sum of dims) and dense features (B, F_d) to logits (B,) and three auxiliary losses.

        These are scalars: balance, z and diversity loss, means over all expert layers of this rank's batch, 0 when no
        expert is active. The last depends on parameters alone; it is 0 unless `with_diversity` asks for it.
        """
        parts = [pooled]
        if self.dense_projection is not None:
            parts.append(self.dense_projection(dense_features))
        logits: Tensor = self.head(self.tower(torch.cat(parts, 1))).squeeze(-1)
        layers = [layer for layer in hilomoe_layers(self).values() if layer.experts_active]
        routings = [layer.routing for layer in layers if layer.routing is not None]
        none = logits.new_zeros(())
        if not routings:
            return logits, none, none, none
        balance = torch.stack([routing.balance_loss() for routing in routings]).mean()
        z = torch.stack([routing.z_loss() for routing in routings]).mean()
        diversity = torch.stack([layer.diversity_loss() for layer in layers]).mean() if with_diversity else none
        return logits, balance, z, diversity


class Ranker(nn.Module):
    """Embedding tables and dense arch; `forward(batch)` is what TorchRec's pipelines expect.

    Args:
        embedding_bag_collection: the tables, unsharded or sharded.
        dense_arch: the replicated part; training wraps it in DDP.
        feature_names: order in which pooled features enter the tower. A sharded collection yields them in the order of
            the sharding plan, so they are regrouped by name on every call.

    Attributes:
        embeddings_frozen: True pools without a graph: no backward, no gradient communication, and neither weights nor
            optimizer state of any table change.
        balance_weight: factor of the balance loss in the total.
        z_weight: factor of the router z-loss in the total.
        diversity_weight: factor of the diversity loss in the total, which is computed only if this is positive.
    """

    def __init__(
        self, embedding_bag_collection: nn.Module, dense_arch: nn.Module, feature_names: Sequence[str]
    ) -> None:
        super().__init__()
        self.embedding_bag_collection = embedding_bag_collection
        self.dense_arch = dense_arch
        self.feature_names = list(feature_names)
        self.embeddings_frozen = False
        self.balance_weight = 0.0
        self.z_weight = 0.0
        self.diversity_weight = 0.0

    def forward(self, batch: Batch) -> tuple[Tensor, RankerOutput]:
        """Total loss (scalar, with graph) and what to log of it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.embeddings_frozen):
            pooled = self.embedding_bag_collection(batch.sparse_features)
            (features,) = KeyedTensor.regroup([pooled], [self.feature_names])
        logits, balance, z, diversity = self.dense_arch(
            features, batch.dense_features, with_diversity=self.diversity_weight > 0
        )
        bce = F.binary_cross_entropy_with_logits(logits, batch.labels, weight=batch.weight, reduction="sum")
        bce = bce * batch.loss_scale
        loss = bce + self.balance_weight * balance + self.z_weight * z + self.diversity_weight * diversity
        losses = (value.detach() for value in (bce, balance, z, diversity))
        return loss, RankerOutput(logits.detach(), batch.labels, batch.domain, *losses)


def build_ranker(config: Config, *, seed: int, device: torch.device | None = None) -> Ranker:
    """The ranker of a config: tables on `device` (meta by default, for sharding), dense arch on the CPU.

    The dense arch's initial weights depend on `seed` alone, the base weights not even on whether there are experts; the
    tables' are set when they are sharded.

    Raises:
        ConfigError: experts are asked for in a linear that is not there.
    """
    tables = [
        EmbeddingBagConfig(
            name=name,
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[feature for feature, f in config.features.sparse.items() if f.table == name],
            pooling=PoolingType.SUM if table.pooling == "sum" else PoolingType.MEAN,
        )
        for name, table in config.tables.items()
    ]
    weighted = any(feature.weights is not None for feature in config.features.sparse.values())
    collection = EmbeddingBagCollection(tables=tables, device=device or torch.device("meta"), is_weighted=weighted)
    dims = {name: config.tables[feature.table].embedding_dim for name, feature in config.features.sparse.items()}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        dense_arch = build_dense_arch(config.model, dims, num_dense_features=len(config.features.dense))
    return Ranker(collection, dense_arch, list(dims))


def build_dense_arch(config: ModelConfig, embedding_dims: Mapping[str, int], *, num_dense_features: int) -> DenseArch:
    """The replicated part: tokens are the sparse features' pooled embeddings and the projected dense features.

    Args:
        config: tower and experts.
        embedding_dims: width of each sparse feature's pooled embedding, in the order in which they enter the tower.
        num_dense_features: F_d, may be 0.

    Raises:
        ConfigError: experts are asked for in a linear that is not there.
    """
    tokens = [*embedding_dims.values(), *([config.dense_dim] if num_dense_features else [])]
    tower: MLP | DCNv2 | Transformer | FinalMLP
    match config.tower:
        case MLPTowerConfig() as t:
            tower = MLP(sum(tokens), t.hidden, dropout=t.dropout)
        case DCNv2TowerConfig() as t:
            tower = DCNv2(sum(tokens), t.num_cross_layers, t.hidden, dropout=t.dropout)
        case TransformerTowerConfig() as t:
            tower = Transformer(tokens, t.model_dim, t.num_blocks, t.num_heads, t.feedforward_dim, dropout=t.dropout)
        case FinalMLPTowerConfig() as t:
            features = list(embedding_dims)
            tower = FinalMLP(
                tokens,
                t.first_hidden,
                t.second_hidden,
                t.num_heads,
                first_context=[features.index(name) for name in t.first_context],
                second_context=[features.index(name) for name in t.second_context],
                gate_hidden=t.gate_hidden,
                dropout=t.dropout,
            )
    dense_arch = DenseArch(num_dense_features, config.dense_dim, tower, tower.out_features)
    if config.hilomoe is not None:
        _attach(dense_arch, config.hilomoe, config.hilomoe.experts_in or config.tower.expert_linears)
    return dense_arch


def _attach(dense_arch: DenseArch, config: HiLoMoEConfig, patterns: Sequence[str]) -> None:
    try:
        attached = attach_experts(dense_arch, patterns, **config.model_dump(exclude={"experts_in"}))
    except ValueError as error:
        raise ConfigError(f"model.hilomoe.experts_in: {error}") from None
    for layer in attached.values():
        layer.record_routing = True
