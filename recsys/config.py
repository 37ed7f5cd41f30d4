"""The configuration: frozen schema, YAML loading, command-line overrides.

Everything a run depends on stands in one `Config`. It is read from YAML, overridden by `path=value` pairs and validated
as a whole before any process group starts, so that a mistake costs seconds and names its path.
"""

import difflib
import itertools
import json
import os
import re
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

ShardingType = Literal[
    "table_wise",
    "column_wise",
    "row_wise",
    "table_row_wise",
    "table_column_wise",
    "grid_shard",
    "data_parallel",
]
ComputeKernel = Literal["dense", "fused", "fused_uvm", "fused_uvm_caching"]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]
"""Tables, features and stages are named by a path on the command line and in state dicts, where a dot separates."""

DEFAULT_CONFIG = "configs/default.yaml"


class UserError(ValueError):
    """Something that the user can put right; the message names the thing and the way out, and is all that is shown."""


class ConfigError(UserError):
    """The configuration is wrong; the message names the path, what was found and what is allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class TableConfig(_Section):
    """One embedding table.

    `embedding_dim` must divide by 4 (fbgemm's kernels read vectors of four floats). `sharding` and `compute_kernel`
    restrict the planner, null leaves it free; `min_partition` is the least width of a column-wise shard.
    """

    num_embeddings: PositiveInt
    embedding_dim: Annotated[int, Field(gt=0, multiple_of=4)]
    pooling: Literal["sum", "mean"] = "mean"
    sharding: Annotated[tuple[ShardingType, ...], Field(min_length=1)] | None = None
    compute_kernel: ComputeKernel | None = None
    min_partition: Annotated[int, Field(gt=0, multiple_of=4)] | None = None

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
        if (self.compute_kernel == "dense") != self.data_parallel and self.compute_kernel is not None:
            raise ValueError("compute_kernel dense goes with sharding [data_parallel], and only with it")
        return self


class HashIdsConfig(_Section):
    """Strings or integers by their hash, XXH3-64 seeded with `salt`, modulo the table's rows."""

    type: Literal["hash"]
    salt: Annotated[int, Field(ge=0, lt=2**64)] = 0


class VocabularyIdsConfig(_Section):
    """Strings or integers by the vocabulary in `file` (recsys.data.vocabulary); row 0 is for those it does not hold."""

    type: Literal["vocabulary"]
    file: str


class BucketizeIdsConfig(_Section):
    """Numbers by the interval between `boundaries` that they fall in; a boundary belongs to the interval above it."""

    type: Literal["bucketize"]
    boundaries: Annotated[tuple[float, ...], Field(min_length=1)]

    @field_validator("boundaries")
    @classmethod
    def _rising(cls, boundaries: tuple[float, ...]) -> tuple[float, ...]:
        if any(low >= high for low, high in itertools.pairwise(boundaries)):
            raise ValueError("must rise from each to the next")
        return boundaries


class DatetimeIdsConfig(_Section):
    """Timestamps, or seconds since 1970 in UTC, by a part of date or time in `timezone`."""

    type: Literal["datetime"]
    part: Literal["hour", "weekday", "day", "month"]
    timezone: str = "UTC"

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


class SparseFeatureConfig(_Section):
    """Values or lists of values of `column` (the feature's own name if null), looked up in `table`.

    `ids` says how values become rows of the table; null takes integers as they are, and `out_of_range` says what
    becomes of those that the table does not have: `error`, `hash` (into all its rows) or `clip_to_oov` (row 0).
    `weights` is a column of a weight for each value of a list. Lists longer than `max_length` are cut, and `keep` says
    which end remains.
    """

    table: Name
    column: str | None = None
    ids: IdsConfig | None = None
    out_of_range: Literal["error", "hash", "clip_to_oov"] = "error"
    weights: str | None = None
    max_length: PositiveInt | None = None
    keep: Literal["first", "last"] = "first"

    @model_validator(mode="after")
    def _only_plain_ids_leave_the_range(self) -> Self:
        if self.ids is not None and self.out_of_range != "error":
            raise ValueError(f"out_of_range is for ids as they are; ids of type {self.ids.type} are never out of range")
        return self


class StandardizeConfig(_Section):
    """Subtract `mean` and divide by `std`, both of the values as they are by then."""

    mean: float
    std: PositiveFloat


class DenseFeatureConfig(_Section):
    """A numeric feature; what is set happens in this order: `fill`, `clip`, `log1p`, `standardize`.

    `fill` replaces nulls, null `fill` refuses them. `not_finite` says whether NaN and infinities are refused or become
    `fill` as well. `clip` is the least and greatest value, `log1p` takes log(1 + value).
    """

    column: str | None = None
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


class FeaturesConfig(_Section):
    """The model's inputs by feature name; their order is that of the config and part of the model."""

    sparse: Annotated[dict[Name, SparseFeatureConfig], Field(min_length=1)]
    dense: dict[Name, DenseFeatureConfig] = {}


class SyntheticConfig(_Section):
    """The embedded synthetic click log (recsys.data.synthetic), written to `directory` before training if absent."""

    directory: str
    seed: NonNegativeInt = 1
    train_rows: PositiveInt
    valid_rows: PositiveInt
    test_rows: PositiveInt
    files: PositiveInt = 8
    row_group_rows: PositiveInt = 8192
    num_users: PositiveInt = 2_000
    num_items: PositiveInt = 1_000
    hierarchy: bool = True


class DomainConfig(_Section):
    """What parts the rows: integer column `column` of 0 .. `num_domains` - 1, and how reports call each."""

    column: str
    num_domains: PositiveInt
    names: tuple[str, ...] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """A name for each domain, its number if it has no other."""
        return self.names or tuple(map(str, range(self.num_domains)))

    @model_validator(mode="after")
    def _one_name_each(self) -> Self:
        if self.names is not None and not len(self.names) == len(set(self.names)) == self.num_domains:
            raise ValueError(f"names must be {self.num_domains} different ones, one for each of num_domains")
        return self


class DataConfig(_Section):
    """Where the shards are and how they are read.

    `train`, `valid` and `test` are patterns, as in `recsys.data.location.find_files`. `label` names a 0/1 column, or is
    an expression over columns such as `rating >= 4`; `label_null` says whether a row without one is an error or left
    out. `weight` names a column that multiplies each row's loss. `reference` is a column of probabilities whose metrics
    are reported beside the model's (the model in production, or the true probability of a synthetic log); `domain` what
    parts the rows in reports. `batch_size` is per rank. Rows are shuffled within windows of `window_row_groups` row
    groups, which are themselves in random order; two windows are in memory at a time. `reader_threads` decode, on each
    rank; their number changes nothing that is read.
    """

    train: str | tuple[str, ...]
    valid: str | tuple[str, ...] | None = None
    test: str | tuple[str, ...] | None = None
    label: str = "label"
    label_null: Literal["error", "skip"] = "error"
    weight: str | None = None
    reference: str | None = None
    domain: DomainConfig | None = None
    batch_size: PositiveInt
    eval_batch_size: PositiveInt | None = None
    shuffle: bool = True
    window_row_groups: PositiveInt = 8
    reader_threads: PositiveInt = 2
    prefetch_batches: PositiveInt = 4
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


class HiLoMoEConfig(_Section):
    """Experts attached to linears of the dense arch (arXiv 2510.10432): L layers of K rank-1 experts each.

    The options are those of `HiLoMoELinear`. Two defaults differ from its own, the paper's plainest reading: queries
    are normalised and keys start with unit variance, without which routing stays uniform (docs/hilomoe.md).
    `experts_in` are patterns of the linears' names (`tower.linears.0`, `tower.cross.*`, `head`); each must match one.
    Null takes the tower's own choice, its `expert_linears`.
    """

    num_layers: PositiveInt = 3
    num_experts: PositiveInt = 8
    top_k: PositiveInt | None = None
    hierarchical: bool = True
    query_projection: bool = False
    normalize_query: bool = True
    learned_temperature: bool = False
    detach_query: bool = False
    key_init: Literal["xavier_uniform", "normal"] = "normal"
    up_init: Literal["zeros", "normal"] = "zeros"
    expert_dropout: Probability = 0.0
    experts_in: Annotated[tuple[str, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _top_k_fits(self) -> Self:
        if self.top_k is not None and self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} exceeds num_experts {self.num_experts}")
        return self


class MLPTowerConfig(_Section):
    """A multi-layer perceptron; no hidden layers make the ranker a logistic regression on its embeddings."""

    expert_linears: ClassVar = ("tower.linears.*",)

    type: Literal["mlp"]
    hidden: tuple[PositiveInt, ...] = (256, 128, 64)
    dropout: Probability = 0.0


class DCNv2TowerConfig(_Section):
    """Cross layers in front of a perceptron (arXiv 2008.13535, stacked)."""

    expert_linears: ClassVar = ("tower.mlp.*",)
    """In the cross layers experts cost FLOPs and gain nothing (docs/hilomoe.md)."""

    type: Literal["dcn_v2"]
    num_cross_layers: PositiveInt = 3
    hidden: tuple[PositiveInt, ...] = (256, 128)
    dropout: Probability = 0.0


class TransformerTowerConfig(_Section):
    """Pre-norm encoder blocks over one token per feature (plus one for the dense features)."""

    expert_linears: ClassVar = ("tower.blocks.*",)

    type: Literal["transformer"]
    model_dim: PositiveInt = 32
    num_blocks: PositiveInt = 2
    num_heads: PositiveInt = 4
    feedforward_dim: PositiveInt = 64
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.model_dim % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide model_dim {self.model_dim}")
        return self


class FinalMLPTowerConfig(_Section):
    """Two perceptrons on differently gated features, fused bilinearly (arXiv 2304.00902).

    `first_context` and `second_context` name the sparse features that gate each stream; none gates by a learned vector.
    Null `gate_hidden` leaves the gates out.
    """

    expert_linears: ClassVar = ("tower.first.*", "tower.second.*")

    type: Literal["final_mlp"]
    first_hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256, 128)
    second_hidden: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (256, 128)
    num_heads: PositiveInt = 4
    first_context: tuple[Name, ...] = ()
    second_context: tuple[Name, ...] = ()
    gate_hidden: PositiveInt | None = 64
    dropout: Probability = 0.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for stream, hidden in (("first_hidden", self.first_hidden), ("second_hidden", self.second_hidden)):
            if hidden[-1] % self.num_heads:
                raise ValueError(f"num_heads {self.num_heads} does not divide {stream}'s last width {hidden[-1]}")
        return self


TowerConfig = Annotated[
    MLPTowerConfig | DCNv2TowerConfig | TransformerTowerConfig | FinalMLPTowerConfig, Field(discriminator="type")
]


class ModelConfig(_Section):
    """The replicated part of the ranker; dense features are projected to `dense_dim`, null `hilomoe` is a baseline.

    `replaces` is the dense tower that this one stands in for, with whose cost its own is compared; null is the same
    tower without experts. It is never trained.
    """

    tower: TowerConfig
    hilomoe: HiLoMoEConfig | None = None
    replaces: TowerConfig | None = None
    dense_dim: PositiveInt = 16


class SparseOptimizerConfig(_Section):
    """The optimizer fused into the backward pass of the sharded tables; a CPU has neither adam nor weight decay.

    `weight_decay` moves only the rows that a step looks up; for rowwise_adagrad it is an L2 term of the gradient.
    """

    type: Literal["rowwise_adagrad", "adagrad", "sgd", "adam"] = "rowwise_adagrad"
    weight_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-8
    betas: tuple[Probability, Probability] = (0.9, 0.999)

    @model_validator(mode="after")
    def _decay_is_not_ignored(self) -> Self:
        if self.weight_decay and self.type in ("adagrad", "sgd"):
            raise ValueError(
                f"fbgemm's fused {self.type} ignores weight_decay; set it to 0 or take rowwise_adagrad or adam"
            )
        return self


class DataParallelOptimizerConfig(_Section):
    """The optimizer of the data-parallel tables, which have dense gradients.

    `weight_decay` is an L2 term of the gradient, so it moves every row at every step.
    """

    type: Literal["adam", "adagrad", "sgd"] = "adam"
    weight_decay: NonNegativeFloat = 0.0


class DenseOptimizerConfig(_Section):
    """AdamW for everything replicated but the tables."""

    weight_decay: NonNegativeFloat = 0.0
    eps: PositiveFloat = 1e-8
    betas: tuple[Probability, Probability] = (0.9, 0.999)


class OptimizersConfig(_Section):
    """The three optimizers; their learning rates belong to the stages."""

    sparse: SparseOptimizerConfig = SparseOptimizerConfig()
    data_parallel: DataParallelOptimizerConfig = DataParallelOptimizerConfig()
    dense: DenseOptimizerConfig = DenseOptimizerConfig()


class StageConfig(_Section):
    """One stage of training.

    `trains` is `backbone` (embeddings and base weights; experts that no earlier stage trained are not even computed),
    `experts` (backbone frozen) or `all`. The stage lasts `epochs` or `steps`. With `patience` it is evaluated on the
    valid split after each epoch, stops after that many epochs without a better `monitor`, and goes back to its best
    state, the one it started from included. The `_weight`s are factors of auxiliary losses. `sparse_learning_rate` is
    for the sharded tables, `data_parallel_learning_rate` (`learning_rate` if null) for the data-parallel ones.
    """

    trains: Literal["backbone", "experts", "all"]
    epochs: PositiveInt | None = None
    steps: PositiveInt | None = None
    learning_rate: PositiveFloat
    sparse_learning_rate: PositiveFloat | None = None
    data_parallel_learning_rate: PositiveFloat | None = None
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegativeInt = 0
    balance_weight: NonNegativeFloat = 0.0
    z_weight: NonNegativeFloat = 0.0
    diversity_weight: NonNegativeFloat = 0.0
    patience: PositiveInt | None = None
    monitor: Literal["log_loss", "auc"] = "log_loss"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        if self.patience is not None and self.epochs is None:
            raise ValueError("patience counts epochs, so the stage's length must be given in epochs")
        return self


class MetricsConfig(_Section):
    """AUC is exact up to `exact_examples` (over all ranks), beyond that binned with a bound on its error reported."""

    exact_examples: PositiveInt = 1 << 22
    num_bins: Annotated[int, Field(ge=2)] = 1 << 16


class LoggingConfig(_Section):
    """Steps between two lines of the log, which are also the points of TensorBoard and the train windows' length."""

    every_steps: PositiveInt = 50
    eval_every_steps: PositiveInt | None = None


class CheckpointsConfig(_Section):
    """What happens to a stage's checkpoint beside being written: `copy_to` is a directory or URL to copy it below."""

    copy_to: str | None = None


class Config(_Section):
    """A whole run. See docs/config.md for every key."""

    name: str
    output_dir: str
    seed: NonNegativeInt = 17
    device: Literal["auto", "cpu", "cuda"] = "auto"
    data: DataConfig
    tables: Annotated[dict[Name, TableConfig], Field(min_length=1)]
    features: FeaturesConfig
    model: ModelConfig
    optimizers: OptimizersConfig = OptimizersConfig()
    stages: Annotated[dict[Name, StageConfig], Field(min_length=1)]
    metrics: MetricsConfig = MetricsConfig()
    logging: LoggingConfig = LoggingConfig()
    checkpoints: CheckpointsConfig = CheckpointsConfig()

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        used = {feature.table for feature in self.features.sparse.values()}
        for name, feature in self.features.sparse.items():
            if feature.table not in self.tables:
                raise ValueError(
                    f"features.sparse.{name}.table: no table {feature.table!r}; there are {_listed(self.tables)}"
                )
            table = self.tables[feature.table]
            if feature.weights is not None and table.pooling != "sum":
                raise ValueError(
                    f"features.sparse.{name}.weights: table {feature.table} pools by {table.pooling}, which no weights "
                    f"go with; set tables.{feature.table}.pooling to sum"
                )
        if unused := set(self.tables) - used:
            raise ValueError(f"tables.{min(unused)}: no feature in features.sparse uses this table; remove it")
        for key, tower in (("tower", self.model.tower), ("replaces", self.model.replaces)):
            if not isinstance(tower, FinalMLPTowerConfig):
                continue
            for context in ("first_context", "second_context"):
                if unknown := set(getattr(tower, context)) - set(self.features.sparse):
                    raise ValueError(
                        f"model.{key}.{context}: no sparse feature {min(unknown)!r}; "
                        f"there are {_listed(self.features.sparse)}"
                    )
        if both := set(self.features.sparse) & set(self.features.dense):
            raise ValueError(f"features: {min(both)!r} is both a sparse and a dense feature; rename one")
        any_sharded = not all(table.data_parallel for table in self.tables.values())
        for name, stage in self.stages.items():
            if stage.trains != "experts" and stage.sparse_learning_rate is None and any_sharded:
                raise ValueError(
                    f"stages.{name}.sparse_learning_rate: a stage that trains {stage.trains} needs it, for its tables"
                )
            if stage.trains == "experts" and self.model.hilomoe is None:
                raise ValueError(
                    f"stages.{name} trains experts but model.hilomoe is null; "
                    f"leave the stage out with stages.{name}=null"
                )
            if stage.patience is not None and self.data.valid is None:
                raise ValueError(f"stages.{name}.patience needs a valid split; set data.valid")
        if self.logging.eval_every_steps is not None and self.data.valid is None:
            raise ValueError("logging.eval_every_steps needs a valid split; set data.valid")
        return self

    def to_yaml(self) -> str:
        """The resolved config as YAML which `load_config` reads back to an equal config."""
        content = json.loads(self.model_dump_json())
        return yaml.dump(content, Dumper=_StrictDumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config and apply `dotted.path=value` overrides; values are YAML too.

    What `include` names, one file or a list, relative to the file that names it, is merged beneath that file's own
    keys, section by section; of a list, a later file lies above an earlier one. `${here}` in a glob of `data` is the
    folder of the file that it stands in. A table, a feature or a stage that is null in the end is left out. `name`
    defaults to the file's stem and `output_dir` to `outputs/<name>`.

    Raises:
        ConfigError: a file cannot be read or includes itself, an override is no `path=value`, or a value is not
            allowed; every fault of the config is listed, one a line.
    """
    path = Path(path)
    raw = _read_including(path, ())
    for override in overrides:
        _apply(raw, override)
    features = raw.get("features")
    for section, key in ((raw, "tables"), (raw, "stages"), (features, "sparse"), (features, "dense")):
        _leave_out_nulls(section, key)
    raw.setdefault("name", path.stem)
    raw.setdefault("output_dir", f"outputs/{raw['name']}")
    return validate(Config, raw, source=str(path))


def read_yaml(path: Path, kind: str, *, remedy: str) -> dict[str, Any]:
    """Read a mapping from YAML, refusing duplicate keys and taking `1e-4` for a number.

    Args:
        path: the file.
        kind: what the file is, for messages.
        remedy: what helps where it cannot be read.

    Raises:
        ConfigError: the file cannot be read, or is no YAML mapping.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise ConfigError(f"cannot read {kind} {path}: {error.strerror or error}; {remedy}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{kind} {path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{kind} {path} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{kind} {path} must be a mapping of sections, found {type(raw).__name__}")
    return raw


_Model = TypeVar("_Model", bound=BaseModel)


def validate(schema: type[_Model], raw: Mapping[str, Any], *, source: str) -> _Model:
    """Make a model of what was read from `source`.

    Raises:
        ConfigError: a value is not allowed; every fault is listed with its path, one a line.
    """
    # Through JSON, because pydantic's strict mode takes a JSON array for a tuple but not a Python list.
    try:
        text = json.dumps(raw, default=str)
    except ValueError:
        raise ConfigError(f"{source}: a YAML alias stands inside what it refers to") from None
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        faults = "\n".join(f"  {fault}" for fault in dict.fromkeys(_explain(error, schema)))
        raise ConfigError(f"{source}:\n{faults}") from None


def _read_including(path: Path, includers: tuple[Path, ...]) -> dict[str, Any]:
    """Read a config and, beneath its own keys, what it includes; `includers` led here, the outermost first."""
    includers = (*includers, path)
    remedy = f"{includers[-2]} includes it" if len(includers) > 1 else "give one with --config"
    raw = read_yaml(path, "config", remedy=remedy)
    _fill_in_folder(raw.get("data"), os.path.normpath(path.parent))
    names = raw.pop("include", [])
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include must be a path or a list of paths, found {json.dumps(names, default=str)}")
    merged: dict[str, Any] = {}
    for name in names:
        # The plain way to the file, for the paths that it gives by ${here} and for messages.
        included = Path(os.path.normpath(path.parent / name))
        if included.resolve() in {includer.resolve() for includer in includers}:
            chain = " includes ".join(map(str, (*includers, included)))
            raise ConfigError(f"configs include each other in a circle: {chain}; remove one include")
        merged = _merge(merged, _read_including(included, includers))
    return _merge(merged, raw)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Both mappings in one: sections are merged in turn, of any other value the one above counts."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _leave_out_nulls(section: Any, key: str) -> None:
    """Drop the entries that are null from a mapping by name, as far as it is one."""
    if isinstance(section, dict) and isinstance(section.get(key), dict):
        section[key] = {name: entry for name, entry in section[key].items() if entry is not None}


def _fill_in_folder(data: Any, folder: str) -> None:
    """Put `folder` in the place of `${here}` in the globs of a config's `data`, as far as they are texts."""
    for split in {"train", "valid", "test"} & set(data if isinstance(data, dict) else ()):
        globs = data[split]
        if isinstance(globs, str):
            data[split] = globs.replace("${here}", folder)
        elif isinstance(globs, list):
            data[split] = [glob.replace("${here}", folder) if isinstance(glob, str) else glob for glob in globs]


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and reads `1e-4` as a number (YAML 1.1 asks for `1.0e-4`)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *anchor`, whose keys the mapping's own replace
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"the key {key!r} is not a text; quote it or name it otherwise"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class _StrictDumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_StrictLoader` would read as a number, such as '1e5'."""


for _reader_or_writer in (_StrictLoader, _StrictDumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def _apply(raw: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    keys = dotted.split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {override!r} is not of the form path.to.key=value")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {_one_line(str(error))}") from None
    section: Any = raw
    for depth, key in enumerate(keys[:-1]):
        if section.get(key) is None:
            section[key] = {}
        section = section[key]
        if not isinstance(section, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is a value, not a section")
    section[keys[-1]] = value


def _explain(error: ValidationError, schema: type[BaseModel]) -> Iterator[str]:
    for fault in error.errors():
        # Tags of discriminated unions ('mlp') and of `str | tuple` alternatives are not part of the user's path.
        path, model, annotation = _user_path(fault["loc"], schema)
        kind, found = fault["type"], fault["input"]
        if kind == "extra_forbidden":
            *section, key = path
            allowed = list(model.model_fields) if model else []
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            where = ".".join(section) or "the top level"
            yield f"{'.'.join(path)}: unknown key; {hint}{where} takes {_listed(allowed)}"
        elif kind == "missing":
            yield f"{'.'.join(path)}: missing, and has no default"
        elif kind == "value_error":
            message = str(fault["ctx"]["error"])
            yield f"{'.'.join(path)}: {message}" if path else message
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            allowed = [tag for member in _models(annotation) if (tag := _tag(member))]
            given = f"found {found['type']!r}" if "type" in found else "and is missing"
            yield f"{'.'.join(path)}.type: must be one of {_listed(allowed)}, {given}"
        else:
            shown = json.dumps(found, default=str)
            yield f"{'.'.join(path)}: {fault['msg']}, found {shown if len(shown) < 80 else type(found).__name__}"


def _user_path(
    location: tuple[int | str, ...], schema: type[BaseModel]
) -> tuple[list[str], type[BaseModel] | None, Any]:
    """Path as the user writes it, the model of its last section and the annotation of what it leads to.

    They are found by walking the schema along the way.
    """
    path: list[str] = []
    annotation: Any = schema
    model: type[BaseModel] | None = None
    for part in location:
        candidates = list(_models(annotation))
        if part in {_tag(candidate) for candidate in candidates}:
            annotation = next(m for m in candidates if _tag(m) == part)
            continue
        # In a mapping every part but '[key]' is a name of the user's, who may call a table `str` or `street`.
        tag = r"\[key\]" if getattr(annotation, "__origin__", None) is dict else r"str|tuple\[.*|function-.*|\[key\]"
        if isinstance(part, str) and re.fullmatch(tag, part):
            continue
        path.append(str(part))
        model = candidates[0] if len(candidates) == 1 else None
        if model is not None and part in model.model_fields:
            annotation = model.model_fields[str(part)].annotation
        elif model is None:
            arguments = get_args(annotation)
            annotation = arguments[-1] if arguments else None
    return path, model, annotation


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Models of a section's annotation: itself, or the members of a union; none for a mapping."""
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, BaseModel):
            yield annotation
    elif getattr(annotation, "__origin__", None) is not dict:
        for argument in get_args(annotation):
            yield from _models(argument)


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("type")
    values = get_args(field.annotation) if field else ()
    return values[0] if len(values) == 1 else None


def _listed(names: Sequence[str] | Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _one_line(text: str) -> str:
    return " ".join(text.split())
