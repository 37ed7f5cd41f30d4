"""The ranker: pooled embeddings -> tower -> click logit -> losses.

Shapes: B rows of this rank's batch, F_d dense features, W the tower's input width.
"""

import os
from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType

from recsys.config import Config, ConfigError, HiLoMoEConfig, ModelConfig
from recsys.data.batch import Batch
from recsys.model.experts import attach_experts, expert_layers
from recsys.model.losses import Losses, TotalLoss, auxiliary_losses
from recsys.model.towers import Tokens, build_tower

POOLED = "embedding_bag_collection"
"""The collection of tables that are pooled; its name begins those of its tables in a checkpoint."""

_RESERVED_PREFIX = "table-"
"""Holds a character that no name of a config's has, so that no other table can be called so."""


class RankerOutput(NamedTuple):
    """What a step tells, detached and on the model's device.

    Attributes:
        logits: (B,) click logits.
        labels: (B,) as in the batch.
        domain: (B,) or (0,) as in the batch.
        losses: scalars by name: this rank's share of the step's mean binary cross entropy (the mean over ranks is the
            step's), each row's multiplied by its weight, and auxiliary losses; see `recsys.model.losses`.
        dense_features: (B, F_d) as in the batch.
    """

    logits: Tensor
    labels: Tensor
    domain: Tensor
    losses: Losses
    dense_features: Tensor


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
        self, pooled: Tensor, dense_features: Tensor, loss_weights: Mapping[str, float] = MappingProxyType({})
    ) -> tuple[Tensor, Losses]:
        """From a batch to its logits, and what its experts' routing costs.

        Args:
            pooled: embeddings, (B, sum of dims).
            dense_features: (B, F_d).
            loss_weights: factors by name, which decide what auxiliary losses are computed.

        Returns:
            Logits (B,) and the auxiliary losses.
        """
        parts = [pooled]
        if self.dense_projection is not None:
            parts.append(self.dense_projection(dense_features))
        logits: Tensor = self.head(self.tower(torch.cat(parts, 1))).squeeze(-1)
        layers = [layer for layer in expert_layers(self).values() if layer.experts_active]
        return logits, auxiliary_losses(layers, loss_weights, logits)


class MeanPooling(nn.Module):
    """From sums of embeddings to means, for the features whose tables pool so.

    All tables are declared to pool by sum, because means are not safe: TorchRec 1.6 to 1.8 divides twice where one
    table is sharded by rows and another is not, and never under grid sharding; fbgemm 1.6 to 1.8 leaves gradients
    undivided where ids have weights. A module of its own, so that a pipeline's symbolic tracing does not look inside.

    Args:
        dims: width of each sparse feature's pooled embedding, in the order in which they enter the tower.
        means: which of them are means.
    """

    _feature_of_column: Tensor
    _means: Tensor

    def __init__(self, dims: Sequence[int], means: Sequence[bool]) -> None:
        super().__init__()
        features = torch.repeat_interleave(torch.arange(len(dims)), torch.tensor(dims))
        self.register_buffer("_feature_of_column", features, persistent=False)
        self.register_buffer("_means", torch.tensor(means), persistent=False)

    def forward(self, sums: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Sums (B, W) and the ids that they are of, keys in the same order, to pooled embeddings (B, W)."""
        counts = sparse_features.lengths().view(len(self._means), -1).clamp(min=1)
        # As fbgemm's kernels have it, times the reciprocal.
        factors = torch.where(self._means[:, None], counts.to(sums.dtype).reciprocal(), 1.0)
        return sums * factors.t().index_select(1, self._feature_of_column)


class Ranker(nn.Module):
    """Embedding tables and dense arch; `forward(batch)` is what TorchRec's pipelines expect.

    Args:
        collections: the tables, unsharded or sharded, by the name of their collection; `POOLED` is that of all that are
            pooled.
        dense_arch: the replicated part; training wraps it in DDP.
        feature_names: order in which pooled features enter the tower, that of the batch's keys. A sharded collection
            yields them in the order of the sharding plan, so they are regrouped by name on every call.
        mean_pooling: what makes means of the sums that the collection pools, None where all are sums.

    Attributes:
        embeddings_frozen: True pools without a graph: no backward, no gradient communication, and neither weights nor
            optimizer state of any table change.
        loss_weights: factor of each auxiliary loss in the total, by name.
    """

    def __init__(
        self,
        collections: Mapping[str, nn.Module],
        dense_arch: nn.Module,
        feature_names: Sequence[str],
        mean_pooling: MeanPooling | None = None,
    ) -> None:
        super().__init__()
        self._collections = tuple(collections)
        for name, collection in collections.items():
            self.add_module(name, collection)
        self.dense_arch = dense_arch
        self.feature_names = list(feature_names)
        self.mean_pooling = mean_pooling
        self.embeddings_frozen = False
        self.total_loss = TotalLoss()
        self.loss_weights: dict[str, float] = {}

    @property
    def collections(self) -> dict[str, nn.Module]:
        """The collections of tables by name, each a child of that name."""
        return {name: self.get_submodule(name) for name in self._collections}

    def forward(self, batch: Batch) -> tuple[Tensor, RankerOutput]:
        """Total loss (scalar, with graph) and what to log of it."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.embeddings_frozen):
            pooled = getattr(self, POOLED)(batch.sparse_features)
            (features,) = KeyedTensor.regroup([pooled], [self.feature_names])
            if self.mean_pooling is not None:
                features = self.mean_pooling(features, batch.sparse_features)
        logits, auxiliary = self.dense_arch(features, batch.dense_features, self.loss_weights)
        total, losses = self.total_loss(logits, auxiliary, batch, self.loss_weights)
        return total, RankerOutput(logits.detach(), batch.labels, batch.domain, losses, batch.dense_features)


@cache
def table_key(name: str) -> str:
    """What a table is called in its collection, in plans and in checkpoints: its name, unless torch reserves that.

    A module of torch's takes no child of the name of one of its own attributes, such as `items` or `type`.
    """
    try:
        nn.ModuleDict().add_module(name, nn.Module())
    except KeyError:
        return f"{_RESERVED_PREFIX}{name}"
    return name


def table_name(key: str) -> str:
    """The config's name of a table that its collection calls `key`."""
    return key.removeprefix(_RESERVED_PREFIX)


def build_ranker(config: Config, *, seed: int, device: torch.device | None = None) -> Ranker:
    """The ranker of a config: tables on `device` (meta by default, for sharding), dense arch on the CPU.

    The dense arch's initial weights depend on `seed` alone, the base weights not even on whether there are experts; the
    tables' are set when they are sharded.

    Raises:
        ConfigError: experts are asked for in a linear that is not there, or the dense arch does not fit this machine.
    """
    tables = [
        EmbeddingBagConfig(
            name=table_key(name),
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            feature_names=[feature for feature, f in config.features.sparse.items() if f.table == name],
            pooling=PoolingType.SUM,
        )
        for name, table in config.tables.items()
    ]
    weighted = any(feature.weights is not None for feature in config.features.sparse.values())
    collection = EmbeddingBagCollection(tables=tables, device=device or torch.device("meta"), is_weighted=weighted)
    dims = {name: config.tables[feature.table].embedding_dim for name, feature in config.features.sparse.items()}
    _check_memory(config.model, dims, num_dense_features=len(config.features.dense))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        dense_arch = build_dense_arch(config.model, dims, num_dense_features=len(config.features.dense))
    means = [config.tables[feature.table].pooling == "mean" for feature in config.features.sparse.values()]
    mean_pooling = MeanPooling(list(dims.values()), means) if any(means) else None
    return Ranker({POOLED: collection}, dense_arch, list(dims), mean_pooling)


def _check_memory(config: ModelConfig, embedding_dims: Mapping[str, int], *, num_dense_features: int) -> None:
    with torch.random.fork_rng(devices=()), FakeTensorMode():  # whose tensors have shapes and no content
        dense_arch = build_dense_arch(config, embedding_dims, num_dense_features=num_dense_features)
    needed = sum(parameter.numel() * parameter.element_size() for parameter in dense_arch.parameters())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ConfigError(
            f"model: its dense part takes {needed / 2**30:,.1f} GiB, and this machine has {there / 2**30:,.1f}; make "
            "the tower or model.hilomoe smaller"
        )


def build_dense_arch(config: ModelConfig, embedding_dims: Mapping[str, int], *, num_dense_features: int) -> DenseArch:
    """The replicated part: tokens are the sparse features' pooled embeddings and the projected dense features.

    Args:
        config: tower and experts.
        embedding_dims: width of each sparse feature's pooled embedding, in the order in which they enter the tower.
        num_dense_features: F_d, may be 0.

    Raises:
        ConfigError: experts are asked for in a linear that is not there.
    """
    tokens = Tokens(
        tuple(embedding_dims), (*embedding_dims.values(), *([config.dense_dim] if num_dense_features else []))
    )
    tower = build_tower(config.tower, tokens)
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
