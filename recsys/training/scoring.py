"""A checkpoint's model scores raw rows, its tables sharded over any number of ranks."""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from recsys.checkpoint.layout import VOCABULARIES, CheckpointMeta, read_meta
from recsys.config import Config, load_checkpoint_config
from recsys.data.batch import Part, build_batch
from recsys.data.features import build_columns
from recsys.data.kinds import read_kinds
from recsys.data.rows import Rows, SparseLayout
from recsys.errors import UserError
from recsys.runtime import Ranks, process_group
from recsys.serving.predicting import predict
from recsys.training.checkpoint import load_ranker, together, verified

_ASKED_EVERY = 32
"""Batches after which ranks ask one another whether one has failed: at most so many are scored in vain."""


class _PeerFailedError(Exception):
    """Another rank has failed, and will tell of it."""


class ShardedScorer:
    """A checkpoint's model on this rank, a `recsys.serving.predicting.Model`.

    Every batch is a forward that all ranks take part in, those that have no more rows with a batch of none. How many
    there are is settled before the first, as footers tell it.

    Args:
        directory: of a checkpoint whose files were verified.
        meta: what it says of itself.
        config: that it holds, with overrides.
        ranks: this process among all; making the object is a collective call.

    Raises:
        CheckpointError: a tensor is missing or has another shape than the config's model.
        ConfigError: the model does not fit these ranks.
        DataError: a vocabulary cannot be read.
    """

    def __init__(self, directory: Path, meta: CheckpointMeta, config: Config, ranks: Ranks) -> None:
        self._columns = build_columns(config, directory / VOCABULARIES, raw=True)
        self._kinds = read_kinds(directory)
        # Read where the model adapts to it alone: rows to predict need not have what figures would be by.
        self._domain = self._columns.parts["data.domain"] if config.model.domain_experts is not None else None
        self.columns, self.dictionaries = self._columns.feature_names, self._columns.dictionary_names
        if self._domain is not None:
            self.columns = tuple(dict.fromkeys((*self.columns, *self._domain.names)))
        self.batch_rows = config.data.eval_batch_size or config.data.batch_size
        self.reader_threads = config.data.reader_threads
        self.origin = f"checkpoint {_digest(meta, config)}"
        self._ranks = ranks
        self._ranker = load_ranker(directory, config, ranks).eval()
        self._done = 0
        self._batches: int | None = None

    def check_schema(self, schema: pa.Schema, where: str) -> SparseLayout:
        """As `Model`."""
        if self._domain is not None:
            self._domain.check_schema(schema, where)
        return self._kinds.check_raw(self._columns, schema, where)

    def decode(self, table: pa.Table, layout: SparseLayout, where: str) -> Rows:
        """As `Model`."""
        rows = self._columns.decode_features(table, layout, where)
        if self._domain is None:
            return rows
        domain = self._domain.decode(table.select(self._domain.names), self._domain.layout(frozenset()), where).domain
        return replace(rows, domain=domain)

    def logits(self, rows: Rows, layout: SparseLayout) -> Tensor:
        """As `Model`; a collective call."""
        return self._scored([Part(rows, 0, len(rows))], layout)

    def predict(self, patterns: Sequence[str], output: str, *, keep: Sequence[str] = (), logit: bool = False) -> int:
        """As `recsys.serving.predicting.predict`, and tell how many rows all ranks have predicted; a collective call.

        Ranks share the files out. One that fails still takes part in batches until the others have heard of it.

        Raises:
            CheckpointError: on all ranks alike, with what `predict` says on the one that failed.
        """
        failure: Exception | None = None
        self._batches = None  # of a call before
        rows, share = 0, (self._ranks.rank, self._ranks.world_size)
        try:
            rows = predict(self, patterns, output, keep=keep, logit=logit, share=share, begin=self._begin)
        except (UserError, OSError, _PeerFailedError) as error:
            failure = error
        with suppress(_PeerFailedError):
            if self._batches is None:
                self._begin(0, failed=failure is not None)
            while self._done < (self._batches or 0):
                self._scored([], self._columns.layout(frozenset()), failed=failure is not None)

        def outcome() -> int:
            if failure is not None and not isinstance(failure, _PeerFailedError):
                raise failure
            return rows

        return sum(together(self._ranks, f"{output} cannot be written", outcome))

    def _begin(self, batches: int, *, failed: bool = False) -> None:
        """Settle how many batches all ranks score: as many as the one with most; a collective call."""
        most, any_failed = self._most(batches, failed)
        self._done, self._batches = 0, 0 if any_failed else most
        if any_failed:
            raise _PeerFailedError

    @staticmethod
    def _most(*values: int) -> list[int]:
        """The largest of each value on any rank; a collective call."""
        told = torch.tensor(values)
        dist.all_reduce(told, dist.ReduceOp.MAX)
        largest: list[int] = told.tolist()
        return largest

    @torch.no_grad()  # not inference_mode: fbgemm has kernels of this name for a CPU under autograd alone
    def _scored(self, parts: Sequence[Part], layout: SparseLayout, *, failed: bool = False) -> Tensor:
        num_dense, pin_memory = len(self._columns.dense), self._ranks.device.type == "cuda"
        batch = build_batch(parts, layout, num_dense, loss_scale=1.0, pin_memory=pin_memory)
        # The ranker wants a label for each row, though no figure is made of it.
        batch = replace(batch, labels=torch.full((batch.sparse_features.stride(),), torch.nan))
        _, output = self._ranker(batch.to(self._ranks.device, non_blocking=True))
        self._done += 1
        if self._done % _ASKED_EVERY == 0 and any(self._most(failed)):
            self._batches = self._done
            raise _PeerFailedError
        logits: Tensor = output.logits.float().cpu()
        return logits


def predict_by_checkpoint(
    directory: str,
    patterns: Sequence[str],
    output: str,
    overrides: Sequence[str] = (),
    *,
    keep: Sequence[str] = (),
    logit: bool = False,
) -> int:
    """As `recsys.serving.predicting.predict`, by a checkpoint, over all ranks, which share the files out.

    Args:
        directory: of the checkpoint.
        patterns: files of raw rows.
        output: path or URL of a folder.
        overrides: of the config that the checkpoint holds.
        keep: columns that are written as well.
        logit: whether the logit is written too.

    Returns:
        How many rows all ranks have predicted together; the first prints it.

    Raises:
        CheckpointError: no checkpoint is there, it is damaged or does not fit; or, on all ranks alike, one of them
            failed as `predict` does.
        ConfigError: an override is wrong.
        DataError: a vocabulary cannot be read.
    """
    path = Path(os.path.expanduser(directory))
    meta = read_meta(path)
    config = load_checkpoint_config(path, overrides)
    with process_group(config.device, config.rank_timeout_seconds) as ranks:
        verified(path, ranks)
        total = ShardedScorer(path, meta, config, ranks).predict(patterns, output, keep=keep, logit=logit)
        if ranks.is_first:
            print(f"{total:,} rows predicted")
        return total


def _digest(meta: CheckpointMeta, config: Config) -> str:
    """Of all that decides a prediction: what the checkpoint is, and what overrides may make of it."""
    domain = config.data.domain if config.model.domain_experts is not None else None
    about = {
        "checkpoint": meta.to_json(),
        **({"domain": domain.model_dump(mode="json")} if domain else {}),
        "features": config.features.model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "pooling": {name: table.pooling for name, table in config.tables.items()},
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
