"""Weights that a run begins with, taken from a checkpoint of another: tables by name and row, the rest by name.

A row of a table stands for what its features' ids say. Where that is the same on both sides, rows are taken by number;
where both sides have a vocabulary, by value, so that a vocabulary may have grown, shrunk or been put in another order.
Whatever does not fit stays as it was initialised, and is said.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import VOCABULARIES, CheckpointError, CheckpointMeta
from recsys.checkpoint.pending import PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.config import Config, WarmStartConfig, load_checkpoint_config
from recsys.data.ids import HashedIds, IdMapping, PlainIds, VocabularyIds, build_ids
from recsys.data.kinds import read_kinds
from recsys.data.parquet import ParquetShards
from recsys.data.vocabulary import Vocabulary, load_vocabularies
from recsys.model.experts import domain_adaptation, domain_linears
from recsys.model.names import table_name
from recsys.runtime import Ranks
from recsys.sharding.shard import ShardedRanker, forget_cached_rows, local_parts
from recsys.training.checkpoint import together, verified

_BLOCK_ROWS = 1 << 16
"""Of a table that are in memory at a time."""
_DENSE = "model.dense_arch."

Numbers = NDArray[np.int64]


def warm_start(
    settings: WarmStartConfig,
    config: Config,
    sharded: ShardedRanker,
    dense_arch: nn.Module,
    train: ParquetShards,
    ranks: Ranks,
    say: Callable[[str], object],
) -> None:
    """Begin with weights of a checkpoint, of any number of ranks and any plan; a collective call.

    Args:
        settings: from where, and what.
        config: the run's.
        sharded: its tables are filled.
        dense_arch: filled.
        train: the train split, which knows its features' vocabularies and what they hold.
        ranks: this process among all.
        say: given a line for each table, and for whatever else differs.

    Raises:
        CheckpointError: there is none, it is damaged, or a table has another `embedding_dim` or
            first-order weights on one side alone.
        ConfigError: its config cannot be read.
        DataError: one of its vocabularies cannot.
    """
    directory = Path(settings.checkpoint)
    meta = verified(directory, ranks)
    then = _Side.of_checkpoint(directory)
    now = _Side(config, train.columns.vocabularies, train.kinds.as_dict())

    def fill() -> list[str]:
        with _naming(directory):
            reader = TensorReader(directory, averaged=True)
            _check(reader, meta, ranks)
            lines = list(_fill_tables(reader, settings, sharded, then, now))
            return lines + (list(_fill_dense(reader, dense_arch, then, now)) if settings.dense else [])

    lines = together(ranks, f"warm_start: {directory} cannot be read", fill)[0]
    forget_cached_rows(sharded)
    say(f"Warm start from {directory}, step {meta.step:,}:")
    for line in lines:
        say(f"  {line}")


@contextmanager
def _naming(directory: Path) -> Iterator[None]:
    """Name the checkpoint whose tensors cannot be read."""
    try:
        yield
    except UnreadableError as error:
        raise CheckpointError(f"warm_start: {directory} is damaged: {error}; take another checkpoint") from error


@dataclass(frozen=True)
class _Side:
    """What a model's tables are made for.

    Attributes:
        config: of its run.
        vocabularies: by feature.
        kinds: what features hold, as far as it is known.
    """

    config: Config
    vocabularies: Mapping[str, Vocabulary]
    kinds: Mapping[str, str]

    @classmethod
    def of_checkpoint(cls, directory: Path) -> "_Side":
        config = load_checkpoint_config(directory)
        return cls(config, load_vocabularies(config, directory / VOCABULARIES), read_kinds(directory).as_dict())

    def mappings(self, table: str) -> dict[str, IdMapping]:
        """How the values of each of a table's features become rows."""
        rows = self.config.tables[table].num_embeddings
        return {
            name: build_ids(feature, rows, self.vocabularies.get(name))
            for name, feature in self.config.features.sparse.items()
            if feature.table == table
        }


@dataclass(frozen=True)
class _Rows:
    """Which rows of a table are taken from which of the checkpoint's.

    Attributes:
        told: in words.
        count: rows that are taken.
        targets: (count,) their numbers here, in the order of those in the checkpoint; None where both are the first.
        sources: (count,) those in the checkpoint, rising.
    """

    told: str
    count: int = 0
    targets: Numbers | None = None
    sources: Numbers | None = None

    def between(self, first: int, last: int) -> tuple[Numbers, Numbers]:
        """Those whose numbers in the checkpoint are from `first` up to `last`: their numbers here and there."""
        if self.sources is None or self.targets is None:
            both = np.arange(first, max(first, min(last, self.count)))
            return both, both
        low, high = np.searchsorted(self.sources, [first, last])
        return self.targets[low:high], self.sources[low:high]


def _fill_tables(
    reader: TensorReader, settings: WarmStartConfig, sharded: ShardedRanker, then: _Side, now: _Side
) -> Iterator[str]:
    """Fill this rank's parts of tables; a line for each table."""
    pending = PendingRows(reader)
    for collection, module in sharded.ranker.collections.items():
        for name, value in module.state_dict(prefix=f"model.{collection}.").items():
            table = table_name(name.split(".")[-2])
            if settings.tables is not None and table not in settings.tables:
                continue
            if name not in reader.names or table not in then.config.tables:
                yield f"table {table}: the checkpoint has none; left as initialised"
                continue
            _check_shape(reader, name, table, then, now)
            rows = _rows(table, then, now)
            yield f"table {table}: {rows.told}"
            for local, row, column in local_parts(value):
                _fill_part(local, row, column, pending, name, rows)
    if settings.tables is None:
        others = [table for table in then.config.tables if table not in now.config.tables]
        yield from (f"table {table} of the checkpoint: there is none here" for table in others)


def _fill_part(local: Tensor, row: int, column: int, saved: PendingRows, name: str, rows: _Rows) -> None:
    """Fill a piece of a table that begins at a row and a column."""
    for start in range(0, saved.reader.shape(name)[0], _BLOCK_ROWS):
        targets, sources = rows.between(start, start + _BLOCK_ROWS)
        mine = (targets >= row) & (targets < row + len(local))
        if not mine.any():
            continue
        targets, sources = targets[mine], sources[mine]
        first = int(sources[0])
        block = saved.read(name, slice(first, int(sources[-1]) + 1))[:, column : column + local.shape[1]]
        taken = block[torch.from_numpy(sources - first)]
        local.index_copy_(0, torch.from_numpy(targets - row).to(local.device), taken.to(local.device, local.dtype))


def _check_shape(reader: TensorReader, name: str, table: str, then: _Side, now: _Side) -> None:
    """Refuse a table of another width, or one that is not what the checkpoint's config says."""
    was, dim = then.config.tables[table], now.config.tables[table].embedding_dim
    needed = max((mapping.num_rows for mapping in then.mappings(table).values()), default=0)
    if tuple(reader.shape(name)) != (was.num_embeddings, was.embedding_dim) or needed > was.num_embeddings:
        raise UnreadableError(f"table {table} is not what its config says")
    if was.embedding_dim != dim:
        raise CheckpointError(
            f"warm_start: table {table} has embedding_dim {was.embedding_dim} in {reader.index.directory}, but {dim} "
            f"here; set tables.{table}.embedding_dim to {was.embedding_dim}, or leave it out of warm_start.tables"
        )
    had, has = (bool(side.config.model.padding) for side in (then, now))
    if had is not has:
        told = ("has", "none") if had else ("has no", "some")
        raise CheckpointError(
            f"warm_start: table {table} {told[0]} first-order weights in {reader.index.directory}, and {told[1]} here, "
            "so that numbers would be taken for what they are not; take a tower that has them in both (wide) or in "
            "neither, or leave the table out of warm_start.tables"
        )


def _rows(table: str, then: _Side, now: _Side) -> _Rows:
    """Which rows a table takes, by what they stand for on both sides."""
    before, after = then.mappings(table), now.mappings(table)
    for name in before.keys() & after.keys():
        kinds = then.kinds.get(name), now.kinds.get(name)
        if isinstance(after[name], HashedIds) and None not in kinds and kinds[0] != kinds[1]:
            return _Rows(f"{name} held {kinds[0]} and holds {kinds[1]}, which hash to other rows; left as initialised")
    ways = [list({_meaning(mapping): mapping for mapping in of.values()}.items()) for of in (before, after)]
    if dict(ways[0]).keys() == dict(ways[1]).keys():
        here, there = (side.config.tables[table].num_embeddings for side in (now, then))
        return _Rows(f"{min(here, there):,} of {here:,} rows by number", min(here, there))
    if all(len(way) == 1 for way in ways):
        (_, was), (_, be) = ways[0][0], ways[1][0]
        if isinstance(was, VocabularyIds) and isinstance(be, VocabularyIds):
            return _by_value(was, be)
        if isinstance(was, PlainIds) and isinstance(be, PlainIds):
            return _Rows(f"{be.num_rows:,} rows instead of {was.num_rows:,}, and no vocabulary; left as initialised")
    return _Rows("its features' ids become rows in another way; left as initialised")


def _meaning(mapping: IdMapping) -> object:
    """What is equal where two mappings give one value the same row."""
    match mapping:
        case PlainIds(num_rows=rows):
            return rows
        case VocabularyIds(vocabulary=vocabulary, unknown_is_row_0=unknown_is_row_0):
            return vocabulary.digest, unknown_is_row_0
    return mapping


def _by_value(was: VocabularyIds, be: VocabularyIds) -> _Rows:
    """Rows of values that both know, and the row of unknown values if both have one."""
    kinds = [mapping.vocabulary.values.type for mapping in (was, be)]
    if kinds[0] != kinds[1]:
        return _Rows(f"its vocabulary holds {kinds[1]}s instead of {kinds[0]}s; left as initialised")
    found = was.vocabulary.lookup(be.vocabulary.values)
    places = np.flatnonzero(found > 0)
    targets, sources = places + be.unknown_is_row_0, found[places] - (not was.unknown_is_row_0)
    if was.unknown_is_row_0 and be.unknown_is_row_0:
        targets, sources = np.append(targets, 0), np.append(sources, 0)
    order = np.argsort(sources)
    count, total = len(order), len(be.vocabulary) + be.unknown_is_row_0
    told = f"{count:,} of {total:,} rows by value, {total - count:,} new"
    if lost := len(was.vocabulary) - len(places):
        told += f"; {lost:,} values of the checkpoint's are not known here"
    return _Rows(told, count, targets[order], sources[order])


def _fill_dense(reader: TensorReader, dense_arch: nn.Module, then: _Side, now: _Side) -> Iterator[str]:
    """Fill what is replicated, by name; a line in all, and one for each tensor that does not fit."""
    state, adaptation = dense_arch.state_dict(prefix=_DENSE), domain_adaptation(dense_arch)
    others = _of_other_domains(dense_arch, then, now)
    differing = {}
    for name, value in state.items():
        shown = name.removeprefix(_DENSE)
        if name not in reader.names:
            differing[shown] = "the checkpoint has none"
        elif reader.shape(name) != value.shape:
            shapes = f"{tuple(value.shape)} here, {tuple(reader.shape(name))} in the checkpoint"
            differing[shown] = f"has another shape, {shapes}"
        elif reader.dtype(name) != value.dtype:
            differing[shown] = f"is of {reader.dtype(name)} in the checkpoint"
        elif shown in others:
            differing[shown] = "is of other domains in the checkpoint"
        else:
            reader.read_into(name, value)
    if adaptation is not None and adaptation.gate is not None:
        gate = {shown for shown in differing if shown.startswith("domain_adaptation.gate.")}
        if gate and "domain_adaptation.gated" not in differing:
            adaptation.gated.fill_(False)  # until one is trained
            differing["domain_adaptation.gated"] = "is of another gate"
    yield f"dense: {len(state) - len(differing)} of {len(state)} tensors"
    yield from (f"tensor {shown}: {why}; left as initialised" for shown, why in differing.items())
    for name in reader.names:
        if name.startswith(_DENSE) and name not in state:
            yield f"tensor {name.removeprefix(_DENSE)} of the checkpoint: there is none here"


def _of_other_domains(dense_arch: nn.Module, then: _Side, now: _Side) -> set[str]:
    """Names of what is of a domain, or of all, by number, and would be of another here."""
    domains = [() if (of := side.config.data.domain) is None else of.meanings for side in (then, now)]
    if domains[0] == domains[1] or not all(domains):
        return set()
    names = {name for name, _ in dense_arch.named_parameters() if name.startswith("domain_adaptation.gate.")}
    for name, linear in domain_linears(dense_arch).items():
        for expert, module in enumerate(linear.domain_experts):
            was, be = (meanings[expert % len(meanings)] for meanings in domains)
            if was != be:
                names |= {f"{name}.domain_experts.{expert}.{of}" for of, _ in module.named_parameters()}
    return names


def _check(reader: TensorReader, meta: CheckpointMeta, ranks: Ranks) -> None:
    """Of format 1, which has no digests, hold this rank's share of the model against its checksums.

    Those of parts are not looked at where only some rows are read.
    """
    if not meta.files:
        for name in [name for name in reader.names if name.startswith("model.")][ranks.rank :: ranks.world_size]:
            reader.check(name)
