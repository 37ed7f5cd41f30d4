"""The schema of a config: everything that a run depends on, in one `Config`.

It is read from YAML, overridden by `path=value` pairs and validated as a whole before any process group starts, so that
a mistake costs seconds and names its path.
"""

import itertools
import json
import os
import re
import zoneinfo
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypedDict, Union

import yaml
from pydantic import (
    Field,
    NonNegativeFloat,
    PositiveFloat,
    field_validator,
    model_validator,
)

from recsys.config.dialect import StrictDumper
from recsys.config.faults import ConfigError
from recsys.config.section import (
    Count,
    Int64,
    Layers,
    Name,
    Number,
    Probability,
    Rows,
    Section,
    Seed,
    Text,
    Threads,
    Width,
    listed,
)
from recsys.config.towers import DENSE_DIM, TowerSettings

if TYPE_CHECKING:
    TowerConfig = TowerSettings
else:  # whichever settings there are, told apart by their type
    TowerConfig = Annotated[Union[tuple(TowerSettings.__subclasses__())], Field(discriminator="type")]  # noqa: UP007

_MAX_PATHS = 2**4
ShardingType = Literal[
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]
WHOLE_ROWS = ("table_wise", "row_wise", "table_row_wise")
"""Sharding types that keep the columns of a row together, on one rank."""
Salt = Seed
ComputeKernel = Literal["dense", "fused", "fused_uvm", "fused_uvm_caching"]
DataType = Literal["fp32", "fp16"]
"""What fbgemm trains on a CPU and on GPUs alike: it has no kernels for weights in bfloat16."""
SentType = Literal["fp32", "fp16", "bf16"]


MAX_NUM_EMBEDDINGS = 2**40
"""Rows of one table: far more than machines hold, so that no number overflows on its way."""


class UniformInitConfig(Section):
    """Uniform within +-sqrt(1 / rows)."""

    type: Literal["uniform"] = "uniform"


class NormalInitConfig(Section):
    """Normal, of mean 0 and deviation `std`, far from what float32 makes zero or infinite."""

    type: Literal["normal"]
    std: Annotated[float, Field(ge=1e-9, le=1e3)]


class TableConfig(Section):
    """One embedding table.

    `embedding_dim` must divide by 4 (fbgemm's kernels read vectors of four floats). `sharding` and `compute_kernel`
    restrict the planner, null leaves it free; `min_partition` is the least width of a column-wise shard. `init` is how
    weights are drawn at the beginning. `max_norm` is the largest L2 norm with which training looks a row up; a row of a
    larger one is scaled down to it, as torch's `nn.Embedding` does, for which all its columns lie together. `data_type`
    is what weights are stored in; their optimizer's state, pooling and gradients are float32.
    """

    num_embeddings: Annotated[int, Field(gt=0, le=MAX_NUM_EMBEDDINGS)]
    embedding_dim: Annotated[int, Field(gt=0, le=2**16, multiple_of=4)]
    pooling: Literal["sum", "mean"] = "mean"
    init: Annotated[UniformInitConfig | NormalInitConfig, Field(discriminator="type")] = UniformInitConfig()
    sharding: Annotated[tuple[ShardingType, ...], Field(min_length=1)] | None = None
    compute_kernel: ComputeKernel | None = None
    min_partition: Annotated[int, Field(gt=0, le=2**16, multiple_of=4)] | None = None
    max_norm: PositiveFloat | None = None
    data_type: DataType = "fp32"

    @property
    def itemsize(self) -> int:
        """Bytes of a stored weight."""
        return {"fp32": 4, "fp16": 2}[self.data_type]

    @property
    def data_parallel(self) -> bool:
        """Whether every rank holds a replica, trained by the data-parallel optimizer instead of a fused one."""
        return self.sharding == ("data_parallel",)

    @model_validator(mode="after")
    def _replicated_or_sharded(self) -> Self:
        if self.sharding and "data_parallel" in self.sharding and not self.data_parallel:
            raise ValueError(
                "sharding mixes data_parallel with sharded types, which have different optimizers; "
                "write [data_parallel] alone or leave it out"
            )
        if self.data_parallel and self.data_type != "fp32":
            raise ValueError(
                f"data_type {self.data_type} is for tables with a fused optimizer, and sharding is [data_parallel]; "
                "set it to fp32, or change sharding"
            )
        if (self.compute_kernel == "dense") != self.data_parallel and self.compute_kernel is not None:
            raise ValueError("compute_kernel dense goes with sharding [data_parallel], and only with it")
        return self

    @model_validator(mode="after")
    def _rows_have_a_norm(self) -> Self:
        if self.max_norm is None:
            return self
        if lacking := sorted(set(self.sharding or ()) - set(WHOLE_ROWS)):
            raise ValueError(
                f"max_norm needs whole rows and a fused optimizer, which sharding {', '.join(lacking)} does not have; "
                f"take {', '.join(WHOLE_ROWS)}, or leave max_norm out"
            )
        if self.data_type != "fp32":
            raise ValueError(f"max_norm does not go with data_type {self.data_type}; leave one of them out")
        if self.compute_kernel == "fused_uvm_caching":
            raise ValueError("max_norm does not go with compute_kernel fused_uvm_caching; take fused or fused_uvm")
        return self


class _Ids(Section):
    """How values become rows of a table.

    `applied` says that the shards hold the rows already, as a converter that maps with these settings leaves them:
    training reads them as they are, and whatever meets raw values maps them.
    """

    applied: bool = False


class HashIdsConfig(_Ids):
    """Strings or integers by their hash, XXH3-64 seeded with `salt`, modulo `buckets`, null being the table's rows."""

    type: Literal["hash"]
    salt: Salt = 0
    buckets: Count | None = None

    @model_validator(mode="after")
    def _known_where_applied(self) -> Self:
        if self.applied and self.buckets is None:
            raise ValueError("applied needs buckets: how many values were hashed into when the shards were written")
        return self


class VocabularyIdsConfig(_Ids):
    """Strings or integers by the vocabulary in `file` (recsys.data.vocabulary).

    With `out_of_vocabulary` `row_0` that row is for values that it does not hold, and its own have rows from 1; with
    `empty` they count as none, and its own have rows from 0.
    """

    type: Literal["vocabulary"]
    file: Text
    out_of_vocabulary: Literal["row_0", "empty"] = "row_0"


class BucketizeIdsConfig(_Ids):
    """Numbers by the interval between `boundaries` that they fall in; a boundary belongs to the interval above it."""

    type: Literal["bucketize"]
    boundaries: Annotated[tuple[float, ...], Field(min_length=1)]

    @field_validator("boundaries")
    @classmethod
    def _rising(cls, boundaries: tuple[float, ...]) -> tuple[float, ...]:
        if any(low >= high for low, high in itertools.pairwise(boundaries)):
            raise ValueError("must rise from each to the next")
        return boundaries


class DatetimeIdsConfig(_Ids):
    """Timestamps, or seconds since 1970 in UTC, by a part of date or time in `timezone`."""

    type: Literal["datetime"]
    part: Literal["hour", "weekday", "day", "month"]
    timezone: Text = "UTC"

    @field_validator("timezone")
    @classmethod
    def _known(cls, timezone: str) -> str:
        try:
            zoneinfo.ZoneInfo(timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError(f"this machine knows no time zone {timezone!r}; name one such as Europe/Berlin") from None
        return timezone


IdsConfig = Annotated[
    HashIdsConfig | VocabularyIdsConfig | BucketizeIdsConfig | DatetimeIdsConfig, Field(discriminator="type")
]


class ListTextConfig(Section):
    """A text that holds a list of `items`, strings or integers, between `separator`s; an empty one holds none."""

    separator: Annotated[str, Field(min_length=1)]
    items: Literal["strings", "ints"] = "strings"


class SparseFeatureConfig(Section):
    """Values or lists of values of `column` (the feature's own name if null), looked up in `table`.

    `ids` says how values become rows of the table; null takes integers as they are, and `out_of_range` says what
    becomes of those that the table does not have: `error`, `hash` (into all its rows) or `clip_to_oov` (row 0).
    Before that, a text becomes the list that `list_text` says it holds, and integers below `minimum` are raised to it.
    `weights` is a column of a weight for each value of a list. Lists longer than `max_length` are cut, and `keep` says
    which end remains.
    """

    table: Name
    column: Text | None = None
    list_text: ListTextConfig | None = None
    minimum: Int64 | None = None
    ids: IdsConfig | None = None
    out_of_range: Literal["error", "hash", "clip_to_oov"] = "error"
    weights: Text | None = None
    max_length: Rows | None = None
    keep: Literal["first", "last"] = "first"

    @property
    def stored(self) -> Self:
        """The feature as shards hold it: where its ids are applied already, integers that are rows of the table."""
        if self.ids is None or not self.ids.applied:
            return self
        return self.model_copy(update={"ids": None, "list_text": None, "minimum": None})

    @model_validator(mode="after")
    def _only_plain_ids_leave_the_range(self) -> Self:
        if self.ids is not None and self.out_of_range != "error":
            raise ValueError(f"out_of_range is for ids as they are; ids of type {self.ids.type} are never out of range")
        return self


class StandardizeConfig(Section):
    """Subtract `mean` and divide by `std`, both of the values as they are by then."""

    mean: float
    std: PositiveFloat


class DenseFeatureConfig(Section):
    """A numeric feature; what is set happens in this order: `minimum`, `fill`, `clip`, `log1p`, `standardize`.

    Values below `minimum` are raised to it, nulls aside. `fill` replaces nulls, null `fill` refuses them. `not_finite`
    says whether NaN and infinities are refused or become
    `fill` as well. `clip` is the least and greatest value, `log1p` takes log(1 + value).
    """

    column: Text | None = None
    minimum: float | None = None
    fill: float | None = None
    clip: tuple[float, float] | None = None
    log1p: bool = False
    standardize: StandardizeConfig | None = None
    not_finite: Literal["error", "fill"] = "error"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.not_finite == "fill" and self.fill is None:
            raise ValueError("not_finite is fill, but no fill is set")
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip must rise, found {list(self.clip)}")
        return self


class FeaturesConfig(Section):
    """The model's inputs by feature name; their order is that of the config and part of the model."""

    sparse: Annotated[dict[Name, SparseFeatureConfig], Field(min_length=1)]
    dense: dict[Name, DenseFeatureConfig] = Field(default_factory=dict)


class SyntheticConfig(Section):
    """The embedded synthetic click log (recsys.prepare.synthetic), written to `directory` before training if absent."""

    directory: Text
    seed: Seed = 1
    train_rows: Count
    valid_rows: Count
    test_rows: Count
    files: Annotated[int, Field(gt=0, le=2**20)] = 8
    row_group_rows: Rows = 8192
    num_users: Rows = 2_000
    num_items: Rows = 1_000
    hierarchy: bool = True
    num_domains: Annotated[int, Field(gt=0, le=2**20)] = 4
    conflict: Annotated[float, Field(ge=0, le=1)] = 0.0


class DomainConfig(Section):
    """What divides the rows, in reports and for `model.domain_experts`: by `column`, numbers 0 .. `num_domains` - 1.

    The column has these numbers; or strings or integers, of which `values` has the domain's by its number; or any of
    them, `hashed` into as many domains. A row of another value, or of none, is an error, or it is one of the
    `backbone`: it has a number of its own behind those of the domains, and no expert of theirs. `names` are the
    domains' in reports, `values` if null.
    """

    column: Text
    num_domains: Annotated[int, Field(gt=0, le=2**20)]
    values: Annotated[tuple[Text, ...] | tuple[Int64, ...], Field(min_length=1)] | None = None
    hashed: bool = False
    names: tuple[Text, ...] | None = None
    unseen: Literal["error", "backbone"] = "error"

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each number that a row can have."""
        named = self.names or tuple(map(str, range(self.num_domains) if self.values is None else self.values))
        return (*named, "(other)") if self.unseen == "backbone" else named

    @property
    def meanings(self) -> tuple[object, ...]:
        """What each domain is of, by its number: two configs mean the same domains by what is equal."""
        if self.hashed:
            return tuple((self.num_domains, number) for number in range(self.num_domains))
        return tuple(range(self.num_domains)) if self.values is None else self.values

    @property
    def is_of_integers(self) -> bool:
        """Whether the column must have integers, and no strings."""
        return not self.hashed and not (self.values and isinstance(self.values[0], str))

    @model_validator(mode="before")
    @classmethod
    def _as_many_as_values(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        # What comes by JSON is no JSON any more to whoever checks it next.
        lists = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        return {"num_domains": len(lists["values"]), **lists} if isinstance(lists.get("values"), tuple) else lists

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        if self.names is not None and not len(self.names) == len(set(self.names)) == self.num_domains:
            raise ValueError(f"names must be {self.num_domains} different ones, one for each of num_domains")
        if self.values is not None and not len(self.values) == len(set(self.values)) == self.num_domains:
            raise ValueError(f"values must be {self.num_domains} different ones, one for each of num_domains")
        if self.values is not None and self.hashed:
            raise ValueError("values and hashed are two ways to number domains; leave one of them out")
        if len(self.labels) != len(set(self.labels)):
            raise ValueError(
                f"unseen: backbone has {self.labels[-1]} for the name of other rows; give that domain another in names"
            )
        return self


class DataConfig(Section):
    """Where the shards are and how they are read.

    `train`, `valid` and `test` are patterns, as in `recsys.data.storage.find_files`. `label` names a 0/1 column, or is
    an expression over columns such as `rating >= 4`; `label_null` says whether a row without one is an error or left
    out. `weight` names a column that multiplies each row's loss. `reference` is a column of probabilities whose metrics
    are reported beside the model's (the model in production, or the true probability of a synthetic log); `domain` what
    divides the rows in reports. `batch_size` is per rank. Rows are shuffled within windows of `window_row_groups` row
    groups, which are themselves in random order; two windows are in memory at a time. `reader_threads` decode, on each
    rank; their number changes nothing that is read.
    """

    train: Text | tuple[Text, ...]
    valid: Text | tuple[Text, ...] | None = None
    test: Text | tuple[Text, ...] | None = None
    label: Text | None = "label"
    label_null: Literal["error", "skip"] = "error"
    weight: Text | None = None
    reference: Text | None = None
    domain: DomainConfig | None = None
    batch_size: Rows
    eval_batch_size: Rows | None = None
    shuffle: bool = True
    window_row_groups: Rows = 8
    reader_threads: Threads = 2
    prefetch_batches: Threads = 4
    synthetic: SyntheticConfig | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that are set."""
        return tuple(split for split in ("train", "valid", "test") if getattr(self, split) is not None)

    def patterns(self, split: str) -> tuple[str, ...]:
        """The patterns of a split.

        Raises:
            ConfigError: the config has no such split.
        """
        if split not in self.splits:
            raise ConfigError(f"data.{split} is not set; the config has {', '.join(self.splits)}")
        found = getattr(self, split)
        return (found,) if isinstance(found, str) else found


class HiLoMoEConfig(Section):
    """Experts attached to linears of the dense arch (arXiv 2510.10432): L layers of K rank-1 experts each.

    The options are those of `HiLoMoELinear`. Two defaults differ from its own, the paper's plainest reading: queries
    are normalised and keys start with unit variance, without which routing stays uniform (docs/hilomoe.md).
    `experts_in` are patterns of the linears' names (`tower.linears.0`, `tower.cross.*`, `head`, with paths `paths.0.*`,
    `heads.0`); each must match one. Null takes each tower's own choice, its `expert_linears`.
    """

    retired: ClassVar = {
        "query_projection": False,
        "learned_temperature": False,
        "detach_query": False,
        "expert_dropout": 0.0,
    }

    num_layers: Layers = 3
    num_experts: Width = 8
    top_k: Width | None = None
    hierarchical: bool = True
    normalize_query: bool = True
    key_init: Literal["xavier_uniform", "normal"] = "normal"
    up_init: Literal["zeros", "normal"] = "zeros"
    experts_in: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        return self


class _DomainExperts(Section):
    """What both kinds of domain experts have.

    Those of a linear of D_out outputs have rank `rank`, or max(D_out / rank_reduction, 1), rounded down. `dropout` is
    of the linear's own output, before experts add to it. `experts_in` is as HiLoMoE's.
    """

    rank: Width | None = None
    rank_reduction: Width | None = None
    dropout: Probability = 0.0
    experts_in: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_rank(self) -> Self:
        if self.rank is not None and self.rank_reduction is not None:
            raise ValueError("give either rank or rank_reduction")
        return self


class MLoRAConfig(_DomainExperts):
    """MLoRA (arXiv 2408.08913): a LoRA with a bias for each domain of `data.domain`, which its rows alone have."""

    type: Literal["mlora"]


class MoEMLoRAConfig(_DomainExperts):
    """MoE-MLoRA (arXiv 2506.07563): `num_experts` of them, one for each domain if null, under one gate for all linears.

    The gate reads the `domain` alone, or what the towers read as well (`features`); `uniform` has none, and every row
    has all experts alike, as published code turns out to train them.
    """

    type: Literal["moe_mlora"]
    num_experts: Width | None = None
    gate: Literal["domain", "features", "uniform"] = "domain"


DomainExpertsConfig = Annotated[MLoRAConfig | MoEMLoRAConfig, Field(discriminator="type")]


class ModelConfig(Section):
    """The replicated part of the ranker; dense features are projected to `dense_dim`, null `hilomoe` is a baseline.

    `domain_experts` adapt linears to the domains of `data.domain`, beside routed experts or without.

    There is either one `tower`, or two at least on the same tokens, `paths`, the mean of whose probabilities is the
    model's. `replaces` is the dense tower that these stand in for, with whose cost theirs is compared; null is the same
    without experts. It is never trained. `embedding_dropout` is the probability with which, in training, a number of a
    pooled embedding is 0 where it enters the towers. `linear_init` is what linears begin with: what PyTorch gives them,
    or normal weights of variance 2 / (D_in + D_out) (Glorot and Bengio, 2010) and biases of 0.
    """

    tower: TowerConfig | None = None
    paths: Annotated[tuple[TowerConfig, ...], Field(min_length=2, max_length=_MAX_PATHS)] | None = None
    hilomoe: HiLoMoEConfig | None = None
    domain_experts: DomainExpertsConfig | None = None
    replaces: TowerConfig | None = None
    dense_dim: Width = 16
    embedding_dropout: Probability = 0.0
    linear_init: Literal["default", "xavier_normal"] = "default"

    @property
    def towers(self) -> dict[str, TowerConfig]:
        """The tower, or each of the paths, by its key here, which is also the name of its module in the dense arch."""
        if self.tower is not None:
            return {"tower": self.tower}
        return {f"paths.{place}": tower for place, tower in enumerate(self.paths or ())}

    @property
    def padding(self) -> int:
        """Of the towers, which all have first-order weights or none (`TowerSettings.padding`)."""
        return next(iter(self.towers.values())).padding

    @property
    def has_experts(self) -> bool:
        """Of either kind."""
        return self.hilomoe is not None or self.domain_experts is not None

    @property
    def has_gate(self) -> bool:
        """Over domain experts."""
        return isinstance(self.domain_experts, MoEMLoRAConfig) and self.domain_experts.gate != "uniform"

    @model_validator(mode="after")
    def _tower_or_paths(self) -> Self:
        if self.tower is None and self.paths is None:
            raise ValueError("has neither tower nor paths; give it a tower, or two at least as paths")
        if self.tower is not None and self.paths is not None:
            raise ValueError("has a tower and paths; set one of them to null, such as model.tower=null")
        return self

    def check_inputs(self, sparse: Sequence[str], tokens: Sequence[tuple[str, int]]) -> None:
        """Refuse towers that cannot read the tokens, or that would read them in different ways.

        Args:
            sparse: names of the sparse features.
            tokens: width of each token, behind the path of the config that sets it.

        Raises:
            ValueError: one cannot; the message begins with its key.
        """
        for key, tower in {**self.towers, "replaces": self.replaces}.items():
            if tower is not None:
                try:
                    tower.check_features(sparse)
                    tower.check_tokens(tokens)
                except ValueError as error:
                    raise ValueError(f"{key}.{error}") from None
        wide, plain = ([key for key, t in self.towers.items() if bool(t.padding) is has] for has in (True, False))
        if wide and plain:
            raise ValueError(
                f"{wide[0]}.wide: the last four numbers of each token are a first-order weight to this tower, and part "
                f"of the embedding to model.{plain[0]} ({self.towers[plain[0]].type}); take towers with wide in all "
                "paths or in none"
            )


class SparseOptimizerConfig(Section):
    """The optimizer fused into the backward pass of the sharded tables; a CPU has no adam.

    By `weight_decay_mode`, `weight_decay` is `fused`, fbgemm's own, which a CPU lacks and which moves only the rows
    that a step looks up, for rowwise_adagrad as an L2 term; `decoupled`, by which every step multiplies every row by
    1 - rate x decay; or `coupled`, an L2 term of every row's gradient, taken every `coupled_every` steps (32 if null).
    `max_gradient` is the largest magnitude of a number in the gradient by what a feature of a row looks up, pooled.
    """

    type: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    weight_decay: NonNegativeFloat = 0.0
    weight_decay_mode: Literal["fused", "decoupled", "coupled"] = "fused"
    coupled_every: Count | None = None
    max_gradient: PositiveFloat | None = None
    eps: PositiveFloat = 1e-8
    betas: tuple[Probability, Probability] = (0.9, 0.999)

    @model_validator(mode="after")
    def _decay_is_not_ignored(self) -> Self:
        if self.coupled_every is not None and self.weight_decay_mode != "coupled":
            raise ValueError(
                f"coupled_every is for weight_decay_mode coupled, and it is {self.weight_decay_mode}; "
                "leave one of them out"
            )
        if not self.weight_decay:
            return self
        if self.weight_decay_mode == "fused" and self.type in ("adagrad", "sgd"):
            raise ValueError(
                f"fbgemm's fused {self.type} ignores weight_decay; set it to 0 or take rowwise_adagrad or adam, "
                "or weight_decay_mode decoupled or coupled"
            )
        if self.weight_decay_mode == "coupled" and self.type == "adam":
            raise ValueError(
                "weight_decay_mode coupled is not for adam, whose averages are of gradients alone; take decoupled, "
                "or another type"
            )
        return self

    def decay_of(self, rate: float) -> float:
        """The share of a row that the decay takes at once at a learning rate; 0 where that depends on the gradient."""
        if self.weight_decay_mode == "decoupled":
            return rate * self.weight_decay
        if self.weight_decay_mode == "coupled" and self.type == "sgd":
            return rate * self.weight_decay * self.sweep_steps
        return 0.0

    @property
    def sweep_steps(self) -> int:
        """Steps between two sweeps of a coupled decay."""
        return self.coupled_every or 32


class DataParallelOptimizerConfig(Section):
    """The optimizer of the data-parallel tables, which have dense gradients.

    `weight_decay` is an L2 term of the gradient, so it moves every row at every step.
    """

    type: Literal["adam", "adagrad", "sgd"] = "adam"
    weight_decay: NonNegativeFloat = 0.0


class MuonConfig(Section):
    """Muon's `momentum`, and whether it trains the matrices of `experts` too, which AdamW does else."""

    momentum: Probability = 0.95
    experts: bool = False


class DenseOptimizerConfig(Section):
    """AdamW for everything replicated but the tables, or Muon for its hidden matrices beside AdamW for the rest.

    Both have `weight_decay`, which is decoupled; `eps` and `betas` are AdamW's. `max_grad_norm` is the largest L2 norm
    of all gradients together, over which they are scaled down to it. `fused` has AdamW take its step in one kernel.
    """

    type: Literal["adamw", "muon"] = "adamw"
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = None
    eps: PositiveFloat = 1e-8
    betas: tuple[Probability, Probability] = (0.9, 0.999)
    fused: bool = False
    muon: MuonConfig = MuonConfig()

    @model_validator(mode="after")
    def _muon_is_not_ignored(self) -> Self:
        if self.type != "muon" and self.muon != MuonConfig():
            raise ValueError(f"muon is for type muon, and type is {self.type}; leave one of them out")
        return self


class AverageConfig(Section):
    """Exponential averages of what a stage trains, which are evaluated, served and what the stage ends with.

    Averaging begins after `start` steps. With `warmup` the n-th step after them has min(decay, (1 + n) / (10 + n)) for
    `decay`. `tables` is how sharded tables are averaged: not at all, by a sweep over all rows every `every` steps, or
    exactly, a row when it is looked up (`touched`).
    """

    decay: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.999
    start: Number = 0
    warmup: bool = True
    tables: Literal["none", "sweep", "touched"] = "none"
    every: Count = 10


class OptimizersConfig(Section):
    """The three optimizers, whose learning rates belong to the stages, and averages of what they train."""

    sparse: SparseOptimizerConfig = SparseOptimizerConfig()
    data_parallel: DataParallelOptimizerConfig = DataParallelOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()
    average: AverageConfig | None = None

    @property
    def changes_rows(self) -> str | None:
        """The setting by which rows of sharded tables are read or changed beside their lookups; None without."""
        if self.sparse.weight_decay and self.sparse.weight_decay_mode != "fused":
            return f"weight_decay_mode {self.sparse.weight_decay_mode}"
        return "optimizers.average.tables touched" if self.average and self.average.tables == "touched" else None


class PlateauConfig(Section):
    """A stage's rates times `factor` after each `patience` evaluations without a better one.

    With `restore_best` training goes on from the best state at each cut, optimizers included.
    """

    factor: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    patience: Count = 1
    restore_best: bool = False


class StageConfig(Section):
    """One stage of training.

    `trains` is `backbone` (embeddings and base weights; experts that no earlier stage trained are not even computed),
    `experts` (backbone frozen), `gate` (of a mixture of domain experts, all else frozen) or `all`. Experts of such a
    mixture are trained one after another, each from rows of its domain alone, in a phase that lasts as the stage says.
    A stage lasts `epochs` or `steps`. With `patience` or the schedule `plateau`
    it is evaluated on the valid split after each epoch and ends with its best state by `monitor`, the one it started
    from included; `patience` stops it after that many epochs without a better one. `schedule_minimum` is the share of
    the rates that a schedule falls to, and `plateau` says when that of this name falls, null being its defaults. The
    `_weight`s are factors of auxiliary losses. `sparse_learning_rate` is for the sharded tables,
    `data_parallel_learning_rate` (`learning_rate` if null) for the data-parallel ones, `expert_learning_rate`
    (`learning_rate` if null) for the up-projections of experts.
    """

    trains: Literal["backbone", "experts", "gate", "all"]
    epochs: Count | None = None
    steps: Count | None = None
    learning_rate: PositiveFloat
    sparse_learning_rate: PositiveFloat | None = None
    data_parallel_learning_rate: PositiveFloat | None = None
    expert_learning_rate: PositiveFloat | None = None
    schedule: Literal["constant", "linear", "cosine", "plateau"] = "constant"
    schedule_minimum: Probability = 0.0
    plateau: PlateauConfig | None = None
    warmup_steps: Number = 0
    balance_weight: NonNegativeFloat = 0.0
    z_weight: NonNegativeFloat = 0.0
    diversity_weight: NonNegativeFloat = 0.0
    agreement_weight: NonNegativeFloat = 0.0
    patience: Count | None = None
    monitor: Literal["log_loss", "auc", "wauc", "mean_auc"] = "log_loss"

    @property
    def loss_weights(self) -> dict[str, float]:
        """The factor of each auxiliary loss of `recsys.model.losses`, by its name."""
        fields = [name for name in type(self).model_fields if name.endswith("_weight")]
        return {name.removesuffix("_weight"): getattr(self, name) for name in fields}

    @property
    def chosen_by(self) -> str | None:
        """The key for which the stage is evaluated after each epoch and ends with its best state; None if it is not."""
        if self.patience is not None:
            return "patience"
        return "schedule" if self.schedule == "plateau" else None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.patience is not None and self.epochs is None:
            raise ValueError("patience counts epochs, so the stage's length must be given in epochs")
        if self.schedule == "plateau" and self.epochs is None:
            raise ValueError("schedule plateau goes by epochs, so the stage's length must be given in epochs")
        if self.schedule != "plateau" and self.plateau is not None:
            raise ValueError(f"plateau is for schedule plateau, and schedule is {self.schedule}; leave one of them out")
        if self.schedule == "constant" and self.schedule_minimum:
            raise ValueError("schedule_minimum is for schedules that fall; set schedule to linear, cosine or plateau")
        if self.trains in ("backbone", "gate") and self.expert_learning_rate is not None:
            raise ValueError(f"expert_learning_rate is for stages that train experts, and trains is {self.trains}")
        return self


class QCommsConfig(Section):
    """Formats in which ranks send one another pooled embeddings (`forward`) and their gradients (`backward`).

    `backward_loss_scale` is what gradients are multiplied by on the way, for those too small for fp16.
    """

    forward_precision: SentType = "fp32"
    backward_precision: SentType = "fp32"
    backward_loss_scale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _scales_what_needs_it(self) -> Self:
        if self.backward_loss_scale is not None and self.backward_precision != "fp16":
            raise ValueError(
                "backward_loss_scale is for backward_precision fp16, and it is "
                f"{self.backward_precision}; leave one of them out"
            )
        return self


class ComputeConfig(Section):
    """How training steps compute the dense arch and send embeddings; evaluation and serving compute in float32.

    `compile` has `torch.compile` make one graph of it, for each phase anew, by which batches of `data.batch_size` rows
    go. `autocast` has towers multiply in `bfloat16`, parameters, heads, routing and losses staying float32. `tf32` has
    GPUs round the operands of float32 products to TF32. `qcomms` is what sharded tables send pooled embeddings and
    gradients in, null being float32.
    """

    compile: bool = False
    autocast: Literal["bfloat16"] | None = None
    tf32: bool = False
    qcomms: QCommsConfig | None = None


class MetricLimits(TypedDict):
    """Of a metric's memory, as `recsys.training.metrics` takes them."""

    exact_examples: int
    num_bins: int


class MetricsConfig(Section):
    """AUC is exact up to `exact_examples` (over all ranks), beyond that binned with a bound on its error reported.

    With `train_auc` `binned` that of the log's windows always is. `by` names columns of the valid and test files whose
    values' rows have figures of their own.
    """

    exact_examples: Count = 1 << 22
    num_bins: Annotated[int, Field(ge=2, le=2**26)] = 1 << 16
    train_auc: Literal["exact", "binned"] = "exact"
    by: tuple[Text, ...] = ()

    @property
    def limits(self) -> MetricLimits:
        """Of a metric's memory."""
        return {"exact_examples": self.exact_examples, "num_bins": self.num_bins}

    @field_validator("by")
    @classmethod
    def _once(cls, by: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for place, name in enumerate(by) if name in by[:place]]:
            raise ValueError(f"{twice[0]!r} is named twice")
        return by


class LoggingConfig(Section):
    """Steps between two lines of the log, which are also the points of TensorBoard and the train windows' length."""

    every_steps: Count = 50
    eval_every_steps: Count | None = None


class CheckpointsConfig(Section):
    """When checkpoints are written beside the ends of stages, and which are kept beside those.

    One is due every `every_steps` steps of a phase, and when `every_minutes` have passed since the last. Kept are the
    `keep_last` newest, until the run is over, the `keep_best` with the best `keep_best_by` on the valid split, and
    those of every step that `keep_every_steps` divides. `asynchronous` writes them in the background. `grace_seconds`
    is how long a run that is told to stop may take to write one. `copy_to` is a directory or URL to copy the
    checkpoints of stages' ends below.
    """

    every_steps: Count | None = None
    every_minutes: PositiveFloat | None = 10.0
    keep_last: Count = 2
    keep_best: Number = 0
    keep_best_by: Literal["log_loss", "auc"] = "log_loss"
    keep_every_steps: Count | None = None
    asynchronous: bool = True
    grace_seconds: PositiveFloat = 25.0
    copy_to: Text | None = None


class WarmStartConfig(Section):
    """Weights of another run that this one begins with; the state of optimizers is not among them.

    `checkpoint` is a directory `step-<n>`, of any number of ranks and any plan. `tables` are those that are taken, null
    being all and [] none; a table's rows are found by their values where its features have vocabularies. `dense` takes
    what is replicated, by name, as far as shapes are equal. A run that is resumed goes on from its own weights.
    """

    checkpoint: Text
    tables: tuple[Name, ...] | None = None
    dense: bool = True

    @model_validator(mode="after")
    def _takes_something(self) -> Self:
        if self.tables == () and not self.dense:
            raise ValueError("tables is [] and dense is false, so nothing is taken; set one of them, or leave it out")
        return self


class Config(Section):
    """A whole run. See docs/config.md for every key."""

    name: Text
    output_dir: Text
    seed: Seed = 17
    device: Literal["auto", "cpu", "cuda"] = "auto"
    resume: Text = "auto"
    rank_timeout_seconds: Annotated[float, Field(ge=1, le=7 * 24 * 3600)] = 300.0
    warm_start: WarmStartConfig | None = None
    data: DataConfig
    tables: Annotated[dict[Name, TableConfig], Field(min_length=1)]
    features: FeaturesConfig
    model: ModelConfig
    optimizers: OptimizersConfig = OptimizersConfig()
    compute: ComputeConfig = ComputeConfig()
    stages: Annotated[dict[Name, StageConfig], Field(min_length=1)]
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    @property
    def num_domains(self) -> int:
        """Of `data.domain`; 0 where the config has none."""
        return 0 if self.data.domain is None else self.data.domain.num_domains

    @property
    def has_other_domains(self) -> bool:
        """Whether rows may be of none of the domains."""
        return self.data.domain is not None and self.data.domain.unseen == "backbone"

    @property
    def num_domain_experts(self) -> int:
        """Of each linear that adapts to domains; 0 where none does."""
        experts = self.model.domain_experts
        if experts is None:
            return 0
        return (isinstance(experts, MoEMLoRAConfig) and experts.num_experts) or self.num_domains

    @property
    def embedding_dims(self) -> dict[str, int]:
        """Width of the pooled embedding of each sparse feature, in their order."""
        return {name: self.tables[feature.table].embedding_dim for name, feature in self.features.sparse.items()}

    @field_validator("name", "output_dir")
    @classmethod
    def _on_one_line(cls, text: str) -> str:
        if text.splitlines() not in ([], [text]):
            raise ValueError("holds a line break; remove it")
        return text

    @field_validator("name")
    @classmethod
    def _stays_in_its_folder(cls, name: str) -> str:
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(
                "names the directory below outputs/ and must stay there: it is not empty, . or .., and holds no /"
            )
        return name

    @field_validator("output_dir")
    @classmethod
    def _is_a_directory_of_its_own(cls, output_dir: str) -> str:
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", output_dir):
            raise ValueError("is a URL, and a run writes to a disk; checkpoints.copy_to copies to object storage")
        if not output_dir or os.path.normpath(output_dir) == ".":
            raise ValueError("is the working directory; name a directory of the run's own, such as outputs/default")
        return output_dir

    @model_validator(mode="after")
    def _decay_leaves_something(self) -> Self:
        sparse = self.optimizers.sparse
        for name, stage in self.stages.items():
            share = sparse.decay_of(stage.sparse_learning_rate or 0.0)
            if share >= 1:
                raise ValueError(
                    f"optimizers.sparse.weight_decay: {sparse.weight_decay:g} at "
                    f"stages.{name}.sparse_learning_rate {stage.sparse_learning_rate:g} takes {share:g} of each row at "
                    "once, which must be below 1; lower one of them"
                    + (", or coupled_every" if sparse.weight_decay_mode == "coupled" else "")
                )
        return self

    @model_validator(mode="after")
    def _rows_that_change_are_float32(self) -> Self:
        average = self.optimizers.average
        swept = "optimizers.average.tables sweep" if average and average.tables == "sweep" else None
        if changes := self.optimizers.changes_rows or swept:
            for name, table in self.tables.items():
                if table.data_type != "fp32":
                    raise ValueError(
                        f"tables.{name}.data_type: {table.data_type} would lose what {changes} adds at a step; set it "
                        "to fp32, or leave that out"
                    )
        return self

    @model_validator(mode="after")
    def _batches_are_of_one_size_where_compiled(self) -> Self:
        if self.compute.compile and self.data.label_null == "skip":
            raise ValueError(
                "compute.compile: a graph is of batches of one size, and data.label_null skip leaves each as many rows "
                "as have a label; set one of them to its default"
            )
        return self

    @model_validator(mode="after")
    def _domain_experts_have_domains(self) -> Self:
        if self.model.domain_experts is None:
            return self
        if self.data.domain is None:
            raise ValueError(
                "model.domain_experts adapt to the domains of data.domain, which is not set; name a column"
            )
        if self.num_domain_experts < self.num_domains:
            raise ValueError(
                f"model.domain_experts.num_experts: {self.num_domain_experts} are fewer than the {self.num_domains} of "
                "data.domain.num_domains, each of which has its own; raise it, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _no_cache_has_rows_that_change(self) -> Self:
        if changes := self.optimizers.changes_rows:
            for name, table in self.tables.items():
                if table.compute_kernel == "fused_uvm_caching":
                    raise ValueError(
                        f"tables.{name}.compute_kernel: fused_uvm_caching does not go with {changes}, which goes to "
                        "rows beside the cache; take fused or fused_uvm"
                    )
        return self

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        used = {feature.table for feature in self.features.sparse.values()}
        for name, feature in self.features.sparse.items():
            if feature.table not in self.tables:
                raise ValueError(
                    f"features.sparse.{name}.table: no table {feature.table!r}; there are {listed(self.tables)}"
                )
            table = self.tables[feature.table]
            if feature.weights is not None and table.pooling != "sum":
                raise ValueError(
                    f"features.sparse.{name}.weights: table {feature.table} pools by {table.pooling}, which no weights "
                    f"go with; set tables.{feature.table}.pooling to sum"
                )
        if unused := set(self.tables) - used:
            raise ValueError(f"tables.{min(unused)}: no feature in features.sparse uses this table; remove it")
        taken = (self.warm_start and self.warm_start.tables) or ()
        if unknown := set(taken) - set(self.tables):
            raise ValueError(f"warm_start.tables: no table {min(unknown)!r}; there are {listed(self.tables)}")
        tokens = [
            (f"tables.{feature.table}.embedding_dim", self.tables[feature.table].embedding_dim)
            for feature in self.features.sparse.values()
        ]
        if self.features.dense:
            tokens.append((DENSE_DIM, self.model.dense_dim))
        try:
            self.model.check_inputs(list(self.features.sparse), tokens)
        except ValueError as error:
            raise ValueError(f"model.{error}") from None
        if both := set(self.features.sparse) & set(self.features.dense):
            raise ValueError(f"features: {min(both)!r} is both a sparse and a dense feature; rename one")
        any_sharded = not all(table.data_parallel for table in self.tables.values())
        for name, stage in self.stages.items():
            if stage.trains in ("backbone", "all") and stage.sparse_learning_rate is None and any_sharded:
                raise ValueError(
                    f"stages.{name}.sparse_learning_rate: a stage that trains {stage.trains} needs it, for its tables"
                )
            if stage.trains == "experts" and not self.model.has_experts:
                raise ValueError(
                    f"stages.{name} trains experts but model.hilomoe and model.domain_experts are null; "
                    f"leave the stage out with stages.{name}=null"
                )
            if stage.trains == "gate" and not self.model.has_gate:
                raise ValueError(
                    f"stages.{name} trains the gate, which model.domain_experts of type moe_mlora have, if theirs is "
                    f"domain or features; leave the stage out with stages.{name}=null"
                )
            if stage.agreement_weight and self.model.paths is None:
                raise ValueError(
                    f"stages.{name}.agreement_weight: weighs what model.paths differ by, and the model has one tower; "
                    "set it to 0, or give model.paths"
                )
            if stage.expert_learning_rate is not None and not self.model.has_experts:
                raise ValueError(
                    f"stages.{name}.expert_learning_rate is for experts, and model.hilomoe and model.domain_experts "
                    "are null; set it to null"
                )
            if stage.monitor in ("wauc", "mean_auc") and self.data.domain is None:
                raise ValueError(
                    f"stages.{name}.monitor: {stage.monitor} is over domains, and data.domain is not set; name a "
                    "column, or take auc or log_loss"
                )
            if stage.chosen_by is not None and self.data.valid is None:
                raise ValueError(f"stages.{name}.{stage.chosen_by} needs a valid split; set data.valid")
        if self.optimizers.dense.muon.experts and self.model.hilomoe is None:
            raise ValueError("optimizers.dense.muon.experts is for experts, and model.hilomoe is null; set it to false")
        if self.logging.eval_every_steps is not None and self.data.valid is None:
            raise ValueError("logging.eval_every_steps needs a valid split; set data.valid")
        return self

    def to_yaml(self) -> str:
        """The resolved config as YAML which `load_config` reads back to an equal config."""
        content = json.loads(self.model_dump_json())
        return yaml.dump(content, Dumper=StrictDumper, sort_keys=False, allow_unicode=True)
