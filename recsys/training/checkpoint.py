"""Checkpoints: what they hold, when one is complete, and reading them without running code.

A checkpoint is a directory `step-<n>` with the tensors in PyTorch's distributed format (DCP), the resolved
`config.yaml`, the features' vocabularies with their digests in `vocabularies/`, what the features hold in `kinds.json`,
and `meta.json`. It is written beside its final name and renamed when complete, so a directory with a final name is
whole. Only tensors go into DCP: everything else is JSON, YAML or Parquet.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import KeyedOptimizer

from recsys.checkpoint.dcp import load_tensors
from recsys.checkpoint.index import UnreadableError
from recsys.config import Config
from recsys.data.kinds import write_kinds
from recsys.data.storage import THREADS, Place, naming
from recsys.data.vocabulary import Vocabulary, save_vocabularies
from recsys.errors import UserError
from recsys.sharding.shard import ShardedRanker, forget_cached_rows

FORMAT = 1
VOCABULARIES = "vocabularies"


class CheckpointError(UserError):
    """A checkpoint cannot be read or does not fit; the message names the path and the way out."""


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint says of itself.

    Attributes:
        stage: last stage that had begun.
        step: optimizer steps done, over all stages.
        stage_step: those of the stage.
        world_size: number of ranks that wrote it; any number can read the model.
        format: version of this layout.
    """

    stage: str
    step: int
    stage_step: int
    world_size: int
    format: int = FORMAT


def save_checkpoint(
    directory: Path,
    config: Config,
    meta: CheckpointMeta,
    sharded: ShardedRanker,
    dense_arch: nn.Module,
    dense_optimizer: KeyedOptimizer,
    vocabularies: Mapping[str, Vocabulary],
    kinds: Mapping[str, str],
) -> None:
    """Write model, features' values and kinds, and all optimizers, replacing `directory`; a collective call."""
    partial = directory.with_name(directory.name + ".partial")
    if dist.get_rank() == 0:
        delete_checkpoint(partial)
        partial.mkdir(parents=True)
    dist.barrier()
    state = {
        **_model_state(sharded, dense_arch),
        **_table_optimizer_state(sharded),
        **_optimizer_state("dense", dense_optimizer),
    }
    dcp.save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        (partial / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
        save_vocabularies(vocabularies, partial / VOCABULARIES)
        write_kinds(kinds, partial)
        (partial / "meta.json").write_text(json.dumps(vars(meta), indent=2) + "\n", encoding="utf-8")
        delete_checkpoint(directory)
        partial.rename(directory)
    dist.barrier()


def delete_checkpoint(directory: Path) -> None:
    """Delete a checkpoint that another replaces, or that nobody will go back to; nothing happens where none is."""
    shutil.rmtree(directory, ignore_errors=True)


def copy_checkpoint(directory: Path, to: Place) -> None:
    """Copy a complete checkpoint to `to`, replacing what is there; a collective call, and each rank copies its share.

    `meta.json` comes last, and an older one is deleted first, so a copy that was cut off is no checkpoint.

    Raises:
        DataError: the storage refuses, fails or does not answer; the message names the copy.
    """
    meta = to / "meta.json"
    with naming(f"copy of {directory} to {to}"):
        if dist.get_rank() == 0 and meta.exists():
            meta.filesystem.delete_file(meta.path)
        dist.barrier()
        files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / "meta.json")
        with ThreadPoolExecutor(THREADS) as pool:
            mine = files[dist.get_rank() :: dist.get_world_size()]
            list(pool.map(lambda file: (to / str(file.relative_to(directory))).put(file), mine))
        dist.barrier()
        if dist.get_rank() == 0:
            with meta.writing() as path:
                shutil.copyfile(directory / "meta.json", path)
        dist.barrier()


def read_meta(directory: Path) -> CheckpointMeta:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: no complete checkpoint is there, or it was written by another version.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        found = sorted(str(path.parent) for path in directory.glob("**/meta.json"))
        hint = (
            f"; there are {', '.join(found)}"
            if found
            else "; name a directory such as outputs/default/checkpoints/step-100"
        )
        raise CheckpointError(
            f"{directory} is no complete checkpoint ({type(error).__name__}: {error}){hint}"
        ) from None
    if meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory} has checkpoint format {meta.get('format')}, this version reads {FORMAT}; "
            "use the version that wrote it"
        )
    return CheckpointMeta(**meta)


def load_model(directory: Path, sharded: ShardedRanker, dense_arch: nn.Module) -> None:
    """Read the model's weights, on any number of ranks; a collective call.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config's model.
    """
    _load(directory, sharded, _model_state(sharded, dense_arch))


def load_model_and_tables_optimizers(directory: Path, sharded: ShardedRanker, dense_arch: nn.Module) -> None:
    """As `load_model`, with the state of the tables' optimizers, on as many ranks as wrote them."""
    _load(directory, sharded, {**_model_state(sharded, dense_arch), **_table_optimizer_state(sharded)})


def _load(directory: Path, sharded: ShardedRanker, state: dict[str, Any]) -> None:
    """Fill the tensors of `state`, which share memory with the model, in place."""
    try:
        load_tensors(directory, state)
        forget_cached_rows(sharded)
    except UnreadableError as error:
        raise CheckpointError(f"{directory}: cannot be loaded into the model of its config: {error}") from error


def _model_state(sharded: ShardedRanker, dense_arch: nn.Module) -> dict[str, Any]:
    state = dense_arch.state_dict(prefix="model.dense_arch.")
    for name, collection in sharded.ranker.collections.items():
        state.update(collection.state_dict(prefix=f"model.{name}."))
    return state


def _table_optimizer_state(sharded: ShardedRanker) -> dict[str, Any]:
    state = _optimizer_state("sparse", sharded.sparse_optimizer)
    if sharded.data_parallel_optimizer is not None:
        state.update(_optimizer_state("data_parallel", sharded.data_parallel_optimizer))
    return state


def _optimizer_state(name: str, optimizer: KeyedOptimizer) -> dict[str, Tensor | ShardedTensor]:
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
