"""A run's checkpoints: what they hold of it, writing them in the background, and reading them into a model.

Beside the tensors, in PyTorch's distributed format (DCP), a checkpoint has `config.yaml`, the features' vocabularies
with their digests in `vocabularies/`, what the features hold in `kinds.json`, the run's `progress.json` and the tables'
`plan.json`; `recsys.checkpoint.layout` says how it lies on a disk. Only tensors go into DCP: everything else is JSON,
YAML or Parquet.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharding_spec import ShardMetadata
from torch.distributed.checkpoint.staging import AsyncStager
from torchrec.optim.keyed import KeyedOptimizer

from recsys.checkpoint import layout
from recsys.checkpoint.dcp import load_tensors
from recsys.checkpoint.index import AVERAGE, UnreadableError
from recsys.checkpoint.layout import CheckpointError, CheckpointMeta, Digest
from recsys.checkpoint.pending import PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.config import CheckpointsConfig, Config, TableConfig
from recsys.data.storage import THREADS, Place, naming
from recsys.errors import UserError
from recsys.model.names import table_name
from recsys.model.ranker import Ranker, build_ranker
from recsys.runtime import Ranks
from recsys.sharding.plan import plan_as_dict
from recsys.sharding.shard import (
    ShardedRanker,
    forget_cached_rows,
    local_parts,
    set_steps_counted,
    shard,
    steps_counted,
    to_read,
)
from recsys.training import reshard

State = dict[str, Tensor | ShardedTensor]
"""Tensors by the name that they have in a checkpoint."""

_INDEX = ".metadata"
_STEPS = "optimizer.sparse_steps"
_WRITING_SECONDS = 1800.0  # for which ranks wait for one that writes; one that is gone is noticed otherwise

_T = TypeVar("_T")


class Checkpoints:
    """Writes a run's checkpoints, one at a time, and deletes those that the config does not have kept.

    Where the config has it `asynchronous`, `save` returns as soon as the tensors are copied from where training changes
    them; the rest is done in the background, over a process group of its own. All methods are collective calls.

    Args:
        folder: where checkpoints lie.
        config: how they are written, and which are kept.
        ranks: this process among all.
        write_files: writes what is the same throughout a run into a checkpoint's directory; the first rank calls it.

    Attributes:
        waited: seconds that training has waited for checkpoints.
        begun: the last that `save` was told of, or that the run began from if it lies in the folder.
    """

    def __init__(
        self, folder: Path, config: CheckpointsConfig, ranks: Ranks, write_files: Callable[[Path], None]
    ) -> None:
        self.folder = folder
        self.waited = 0.0
        self.begun: Path | None = None
        self._begun_at, self._has_asked = time.monotonic(), False
        self._same: tuple[Path, dict[str, Digest]] | None = None
        self._newest: Path | None = None
        self._config, self._ranks, self._write_files = config, ranks, write_files
        self._group = ranks.new_host_group(max(ranks.timeout, _WRITING_SECONDS))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, state: State, progress: bytes, meta: CheckpointMeta) -> Path:
        """Begin to write a checkpoint, once the one before it is whole, and tell where it will be.

        Args:
            state: what this rank has of the tensors.
            progress: contents of `progress.json`.
            meta: without the files' digests.

        Raises:
            CheckpointError: this one, or the one before it, cannot be written.
        """
        self.wait()
        began = time.perf_counter()
        directory = self.folder / f"step-{meta.step}"
        cannot = f"checkpoint {directory} cannot be written"
        together(self._ranks, cannot, partial(self._make, layout.partial(directory)), self._group)
        save: Any = dcp.save
        if self._config.asynchronous:
            # Nothing of what is written is on a GPU, where DCP's thread would look: each rank's at the first one.
            writer = dcp.FileSystemWriter(layout.partial(directory), per_thread_copy_ahead=0)
            save = partial(dcp.async_save, async_stager=_Stager(), storage_writer=writer)
        with _naming(cannot):
            saving = save(state, checkpoint_id=layout.partial(directory), process_group=self._group)
        self.begun, self._begun_at, self._has_asked = directory, time.monotonic(), False
        self._pending = self._pool.submit(self._finish, saving, directory, progress, meta)
        self.waited += time.perf_counter() - began
        if not self._config.asynchronous:
            self.wait()
        return directory

    def falls_due(self) -> bool:
        """Whether another is due by the clock since the last began, or the run; true once until it begins.

        On the first rank alone: by several clocks, ranks would ask one after another.
        """
        minutes = self._config.every_minutes
        if not self._ranks.is_first or minutes is None or self._has_asked:
            return False
        self._has_asked = time.monotonic() - self._begun_at > 60 * minutes
        return self._has_asked

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is whole.

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._pending is None:
            return
        began = time.perf_counter()
        pending, self._pending = self._pending, None
        pending.result()
        self.waited += time.perf_counter() - began

    def begin_from(self, directory: Path, best_step: int | None) -> None:
        """The run goes on from a checkpoint, in this folder or another.

        Args:
            directory: the checkpoint.
            best_step: of the one beside it that has the best state of the phase under way, if one is chosen; this
                folder gets a copy of it, as the run may have to go back to it.

        Raises:
            CheckpointError: that one is not there, or damaged, or cannot be copied.
        """
        self._newest = directory
        if directory.parent == self.folder:
            self.begun = directory
            cannot = f"what is newer than {directory} cannot be set aside"
            together(self._ranks, cannot, partial(self._set_aside_after, directory))
        elif best_step is not None:
            best = directory.parent / f"step-{best_step}"
            verified(best, self._ranks)
            together(self._ranks, f"{best} cannot be copied to {self.folder}", partial(self._adopt, best))

    def _set_aside_after(self, directory: Path) -> None:
        if self._ranks.is_first:
            layout.set_aside_after(directory)

    def _adopt(self, directory: Path) -> None:
        if self._ranks.is_first:
            self.folder.mkdir(parents=True, exist_ok=True)
            layout.adopt(directory, self.folder)

    def last_good(self) -> Path | None:
        """Wait, and tell the newest checkpoint that this run has written or begun from."""
        self.wait()
        return self._newest

    def close(self) -> None:
        """When the run is over: wait, delete what was kept to go on from, and end what works in the background."""
        self.wait()
        self._pool.shutdown()
        if self._ranks.is_first:
            layout.prune(self.folder, self._config, is_over=True)

    def _make(self, written: Path) -> None:
        if self._ranks.is_first:
            layout.delete(written)
            written.mkdir(parents=True)

    def _finish(self, saving: Any, directory: Path, progress: bytes, meta: CheckpointMeta) -> None:
        cannot = f"checkpoint {directory} cannot be written"
        written = layout.partial(directory)
        try:
            with _naming(cannot):
                if isinstance(saving, Future):
                    saving.result()
            own = sorted(written.glob(f"__{self._ranks.rank}_*"))
            digests = together(
                self._ranks, cannot, lambda: {file.name: layout.digest_of(file) for file in own}, self._group
            )
            files = {name: digest for of_rank in digests for name, digest in of_rank.items()}
            commit = partial(self._commit, directory, progress, replace(meta, files=files))
            together(self._ranks, cannot, commit, self._group)
            self._newest = directory
        except CheckpointError:
            if self._ranks.is_first:
                layout.delete(written)  # which may be what fills the disk
            raise

    def _commit(self, directory: Path, progress: bytes, meta: CheckpointMeta) -> None:
        if not self._ranks.is_first:
            return
        written = layout.partial(directory)
        linked = self._linked(written)
        if linked is None:
            self._write_files(written)
        (written / layout.PROGRESS).write_bytes(progress)
        names = {str(path.relative_to(written)): path for path in written.rglob("*") if path.is_file()}
        known = {**meta.files, **(linked or {})}
        new = {name: path for name, path in names.items() if name not in known}
        digests = {name: layout.digest_of(path) for name, path in new.items()}
        layout.commit(directory, new.values(), replace(meta, files={**known, **digests}))
        same = {name: digest for name, digest in digests.items() if name not in (layout.PROGRESS, _INDEX)}
        self._same = directory, linked or same
        layout.prune(self.folder, self._config)

    def _linked(self, written: Path) -> dict[str, Digest] | None:
        """Link what is the same throughout a run from the checkpoint before, and tell its digests; None if that fails.

        Vocabularies may be large, and are on the disk already.
        """
        if self._same is None:
            return None
        before, digests = self._same
        try:
            for name in digests:
                (written / name).parent.mkdir(parents=True, exist_ok=True)
                os.link(before / name, written / name)
        except OSError:  # the one before was taken away, or the file system has no such links
            for name in digests:
                (written / name).unlink(missing_ok=True)
            return None
        return digests


class _Stager(AsyncStager):
    """Copies tensors to the host before training goes on.

    DCP's own copies the shards of tables byte by byte, and twice, which takes ten times as long.
    """

    _synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        """A copy of a flat state dict, on the CPU."""
        return {
            name: _sharded_copy(value) if isinstance(value, ShardedTensor) else _copy(value)
            for name, value in state_dict.items()
        }

    def synchronize_staging(self) -> None:
        """Nothing is under way when `stage` has returned."""

    def close(self) -> None:
        """Nothing is held."""


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _sharded_copy(tensor: ShardedTensor) -> ShardedTensor:
    shards = [Shard(_copy(shard.tensor), _on_cpu(shard.metadata)) for shard in tensor.local_shards()]
    metadata = tensor.metadata()
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards,
        replace(metadata, shards_metadata=[_on_cpu(shard) for shard in metadata.shards_metadata]),
        process_group=tensor._process_group,
    )


def _on_cpu(shard: ShardMetadata) -> ShardMetadata:
    assert shard.placement is not None
    placement = f"rank:{shard.placement.rank()}/cpu"
    return ShardMetadata(shard.shard_offsets, shard.shard_sizes, placement)


def together(ranks: Ranks, cannot: str, action: Callable[[], _T], group: dist.ProcessGroup | None = None) -> list[_T]:
    """What an action gives on each rank; a collective call that ends on all ranks alike.

    Args:
        ranks: this process among all.
        cannot: what could not be done, for an error.
        action: of this rank alone.
        group: over which the ranks meet.

    Raises:
        CheckpointError: on every rank, if the storage refused or an error was raised on any. One that the user cannot
            put right is raised as it is on the rank that it came from.
    """
    mine: tuple[Any, str | None]
    bug: Exception | None = None
    try:
        mine = action(), None
    except UserError as error:
        mine = None, str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        mine = None, f"{cannot}: {error.strerror or error}{where}"
    except Exception as error:
        mine, bug = (None, f"{cannot}: rank {ranks.rank} failed"), error
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, mine, group=group)
    if bug is not None:
        raise bug
    for _, told in found:
        if told is not None:
            raise CheckpointError(told)
    return [result for result, _ in found]


def copy_checkpoint(directory: Path, to: Place) -> None:
    """Copy a complete checkpoint to `to`, replacing what is there; a collective call, and each rank copies its share.

    `meta.json` comes last, and an older one is deleted first, so a copy that was cut off is no checkpoint.

    Raises:
        DataError: the storage refuses, fails or does not answer; the message names the copy.
    """
    meta = to / layout.META
    with naming(f"copy of {directory} to {to}"):
        if dist.get_rank() == 0 and meta.exists():
            meta.filesystem.delete_file(meta.path)
        dist.barrier()
        files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / layout.META)
        with ThreadPoolExecutor(THREADS) as pool:
            mine = files[dist.get_rank() :: dist.get_world_size()]
            list(pool.map(lambda file: (to / str(file.relative_to(directory))).put(file), mine))
        dist.barrier()
        if dist.get_rank() == 0:
            with meta.writing() as path:
                shutil.copyfile(directory / layout.META, path)
        dist.barrier()


def verified(directory: Path, ranks: Ranks) -> CheckpointMeta:
    """What a checkpoint says of itself, once its files are seen to be what was written; a collective call.

    Each rank looks at its share of the files.

    Raises:
        CheckpointError: none is there, or a file is missing, cut off or altered; the message names it.
    """
    check = partial(layout.verified, directory, share=(ranks.rank, ranks.world_size))
    return together(ranks, f"{directory} cannot be read", check)[0]


def load_model(directory: Path, sharded: ShardedRanker, dense_arch: nn.Module) -> None:
    """Read the model's weights, averages where there are any, on any number of ranks; a collective call.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config's model.
    """
    state = model_state(sharded, dense_arch)
    _load(directory, state, averaged=True)
    _settle(directory, state)
    forget_cached_rows(sharded)


def load_ranker(directory: Path, config: Config, ranks: Ranks) -> Ranker:
    """The model of a checkpoint, whose weights are read and not trained; a collective call.

    Args:
        directory: of the checkpoint.
        config: of the model.
        ranks: this process among all, over which the tables are sharded.

    Raises:
        CheckpointError: as `load_model`.
        ConfigError: the model does not fit these ranks.
    """
    config = to_read(config, ranks.device)
    ranker = build_ranker(config, seed=0)
    dense_arch = ranker.dense_arch
    load_model(directory, shard(ranker, config, ranks, seed=0), dense_arch)
    return ranker


def load_model_and_tables_optimizers(
    directory: Path, sharded: ShardedRanker, dense_arch: nn.Module, tables: Mapping[str, TableConfig]
) -> list[str]:
    """Read weights as training goes on with them, never averages, and the state of the tables' optimizers.

    A collective call, on any number of ranks and for any plan.

    Args:
        directory: of the checkpoint.
        sharded: filled.
        dense_arch: filled.
        tables: of the config.

    Returns:
        Tensors of the optimizers' state that begin anew, as the checkpoint holds nothing of the kind.

    Raises:
        CheckpointError: as `load_model`.
    """
    saved = _open(directory)
    state = table_optimizer_state(sharded)
    as_they_are = {
        name: value for name, value in state.items() if name in saved.names and saved.shape(name) == value.size()
    }
    model = model_state(sharded, dense_arch)
    _load(directory, {**model, **as_they_are})
    with _refusing(directory):
        pending = PendingRows(saved)
        sharded.rows.load(pending)
        for name, value in model.items():
            if not (sharded.rows.keeps_last and isinstance(value, ShardedTensor)):
                for part, row, _ in local_parts(value):
                    pending.decay_(name, part, row)
    forget_cached_rows(sharded)
    if _STEPS in as_they_are:
        set_steps_counted(sharded, as_they_are[_STEPS])
    others = {name: value for name, value in state.items() if name not in as_they_are}
    return _reshard(saved, others, plan_as_dict(sharded.plan, tables), tables)


def _reshard(saved: TensorReader, state: State, plan: reshard.Plan, tables: Mapping[str, TableConfig]) -> list[str]:
    """Fill what depends on the plan from what a checkpoint of another one has; the names of what it has nothing for."""
    there = {of.table: of.name for of in map(reshard.sum_of_squares, saved.names) if of is not None}
    directory = saved.index.directory
    missing = []
    for name, value in state.items():
        of = reshard.sum_of_squares(name)
        if of is None or of.table not in there:
            missing.append(name)
            continue
        with _refusing(directory):
            squares = saved.read(there[of.table])
        dim = tables[table_name(of.table)].embedding_dim
        saved_plan = json.loads((directory / layout.PLAN).read_text(encoding="utf-8"))
        before, now = (reshard.columns_of(one, table_name(of.table), dim) for one in (saved_plan, plan))
        reshard.fill(value, squares, before, now)
    return missing


def load_dense_optimizer(directory: Path, optimizer: KeyedOptimizer) -> None:
    """Read the state of a phase's dense optimizer, which has taken no step yet; a collective call.

    A checkpoint from a phase's very beginning has none, and nothing happens.
    """
    if any(name.startswith("optimizer.dense.") for name in _open(directory).names):
        optimizer.init_state()
        for parameter in optimizer.params.values():
            parameter.grad = None
        _load(directory, dense_optimizer_state(optimizer))


def saved_names(directory: Path) -> frozenset[str]:
    """The names of all tensors of a checkpoint.

    Raises:
        CheckpointError: they cannot be read.
    """
    return frozenset(_open(directory).names)


def load_averages(directory: Path, averages: State, *, settled: bool) -> None:
    """Read averages of weights, all of which a checkpoint has; a collective call.

    Args:
        directory: of the checkpoint.
        averages: filled; by their names in a checkpoint.
        settled: whether they are to have had all steps, or what is pending goes on.

    Raises:
        CheckpointError: one has another shape than its weight, or cannot be read.
    """
    _load(directory, averages)
    if settled:
        _settle(directory, {f"model.{name.removeprefix(AVERAGE)}": value for name, value in averages.items()})


def load_own(directory: Path, prefix: str) -> dict[str, Tensor]:
    """The plain tensors whose name has the prefix, by what follows it, on the CPU; not a collective call.

    Raises:
        CheckpointError: they cannot be read.
    """
    saved = _open(directory)
    with _refusing(directory):
        return {name.removeprefix(prefix): saved.read(name) for name in saved.names if name.startswith(prefix)}


def model_state(sharded: ShardedRanker, dense_arch: nn.Module) -> State:
    """The model's weights, as views."""
    state: State = dense_arch.state_dict(prefix="model.dense_arch.")
    for name, collection in sharded.ranker.collections.items():
        state.update(collection.state_dict(prefix=f"model.{name}."))
    return state


def table_optimizer_state(sharded: ShardedRanker) -> State:
    """State of the tables' optimizers, as views; how many steps fused ones have counted is among it."""
    state = _optimizer_state("sparse", sharded.sparse_optimizer)
    if (steps := steps_counted(sharded)) is not None:
        state[_STEPS] = steps
    if sharded.data_parallel_optimizer is not None:
        state.update(_optimizer_state("data_parallel", sharded.data_parallel_optimizer))
    return state


def pending_state(sharded: ShardedRanker) -> State:
    """What rows of sharded tables have not had yet; nothing where all are settled."""
    weights = {
        name.split(".")[-2]: value
        for collection in sharded.ranker.collections.values()
        for name, value in collection.state_dict().items()
    }
    return sharded.rows.state(weights)


def dense_optimizer_state(optimizer: KeyedOptimizer) -> State:
    """State of a phase's dense optimizer, as views."""
    return _optimizer_state("dense", optimizer)


def _optimizer_state(name: str, optimizer: KeyedOptimizer) -> State:
    """Every tensor of an optimizer's state under a flat name; learning rates are the config's, not state."""
    return dict(_flatten(f"optimizer.{name}", optimizer.state_dict()["state"]))


def _flatten(path: str, value: Any) -> Iterator[tuple[str, Tensor | ShardedTensor]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flatten(f"{path}.{key}", item)
    elif isinstance(value, Tensor | ShardedTensor):
        yield path, value
    else:
        raise TypeError(f"{path}: optimizer state of type {type(value).__name__} cannot be checkpointed")


def _load(directory: Path, state: Mapping[str, Any], *, averaged: bool = False) -> None:
    """Fill the tensors of `state`, which share memory with the model, in place."""
    with _refusing(directory):
        load_tensors(directory, dict(state), averaged=averaged)


def _settle(directory: Path, state: State) -> None:
    """Have what was read of weights, or of their averages where there are any, by the weights' names, had all steps."""
    with _refusing(directory):
        pending = PendingRows(TensorReader(directory, averaged=True))
        for name, value in state.items():
            for part, row, column in local_parts(value):
                pending.settle_(name, part, row, column)


def _open(directory: Path) -> TensorReader:
    with _refusing(directory):
        return TensorReader(directory)


@contextmanager
def _refusing(directory: Path) -> Iterator[None]:
    """Name the checkpoint whose tensors cannot be read."""
    try:
        yield
    except UnreadableError as error:
        raise CheckpointError(f"{directory}: cannot be loaded into the model of its config: {error}") from error


@contextmanager
def _naming(cannot: str) -> Iterator[None]:
    """Have an error of DCP's or of the disk's say what could not be written, in one line."""
    try:
        yield
    except (dcp.CheckpointException, OSError, RuntimeError) as error:
        failures = error.failures.values() if isinstance(error, dcp.CheckpointException) else ()
        cause = next((failure[0] for failure in failures), error)
        raise CheckpointError(f"{cannot}: {(str(cause).strip() or type(cause).__name__).splitlines()[0]}") from error
