"""The ranker: pooled embeddings -> dense arch -> click logit -> losses.

Shapes: B rows of this rank's batch, W the width of all pooled embeddings together.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor, PoolingType
from torchrec.modules.embedding_configs import DataType

from recsys.config import Config, ConfigError, ModelConfig
from recsys.data.batch import Batch
from recsys.host_memory import host_memory
from recsys.model.dense_arch import build_dense_arch
from recsys.model.losses import Losses, TotalLoss
from recsys.model.names import POOLED, table_key


class RankerOutput(NamedTuple):
    """What a step tells, detached and on the model's device.

    Attributes:
        logits: (B,) click logits.
        labels: (B,) as in the batch.
        domain: (B,) or (0,) as in the batch.
        losses: scalars by name: this rank's share of the step's mean binary cross entropy (the mean over ranks is the
            step's), each row's multiplied by its weight, of paths what they have beside it, and auxiliary losses; see
            `recsys.model.losses`.
        dense_features: (B, F_d) as in the batch.
        order: (B,) in which the towers had the rows; None for as they stand here.
    """

    logits: Tensor
    labels: Tensor
    domain: Tensor
    losses: Losses
    dense_features: Tensor
    order: Tensor | None = None

    @property
    def routed_domain(self) -> Tensor:
        """(B,) or (0,), of the rows as routing was recorded."""
        return self.domain if self.order is None else self.domain[self.order]


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
        logits, auxiliary, paths, order = self.dense_arch(
            features, batch.dense_features, batch.domain, self.loss_weights
        )
        total, losses = self.total_loss(logits, auxiliary, batch, self.loss_weights, paths)
        return total, RankerOutput(logits.detach(), batch.labels, batch.domain, losses, batch.dense_features, order)


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
            data_type=DataType[table.data_type.upper()],
        )
        for name, table in config.tables.items()
    ]
    weighted = any(feature.weights is not None for feature in config.features.sparse.values())
    collection = EmbeddingBagCollection(tables=tables, device=device or torch.device("meta"), is_weighted=weighted)
    dims = config.embedding_dims
    build = partial(
        build_dense_arch,
        config.model,
        dims,
        num_dense_features=len(config.features.dense),
        num_domains=config.num_domains,
        with_others=config.has_other_domains,
    )
    _check_memory(config.model, build)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        dense_arch = build()
    means = [config.tables[feature.table].pooling == "mean" for feature in config.features.sparse.values()]
    mean_pooling = MeanPooling(list(dims.values()), means) if any(means) else None
    return Ranker({POOLED: collection}, dense_arch, list(dims), mean_pooling)


def _check_memory(config: ModelConfig, build: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng(devices=()), FakeTensorMode():  # whose tensors have shapes and no content
        dense_arch = build()
    needed = sum(parameter.numel() * parameter.element_size() for parameter in dense_arch.parameters())
    there = host_memory()
    if needed > there:
        raise ConfigError(
            f"model: its dense part takes {needed / 2**30:,.1f} GiB, and {there / 2**30:,.1f} are for this process; "
            f"make the {'paths' if config.paths else 'tower'}, model.hilomoe or model.domain_experts smaller"
        )
