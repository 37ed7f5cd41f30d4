"""Figures of the rows of each value of a column, such as a user's or a device's, in one pass over a split.

The column need be nothing that the model reads. All is exact: what each rank has found is gathered on the first one,
16 bytes for each row of the split.

Shapes: N rows, G groups.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.arrow import usual_table, usual_type, value_type
from recsys.data.features import check_names
from recsys.data.order import Epoch
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError
from recsys.runtime import Ranks
from recsys.training.by_domain import largest_and_worst
from recsys.training.metrics import aucs_by_group, on_first_rank

MOST_TOLD = 1000
"""Groups that JSON has, those of the most rows; of more, the figures over all are told alone."""

_SUCH = "make it such when the shards are written"


@dataclass(frozen=True)
class GroupFigures:
    """Figures of groups, those of the most rows first; NaN where there is none, as of rows of one class.

    Attributes:
        names: G values of the column; None is null.
        rows: (G,).
        positives: (G,).
        auc: (G,).
        log_loss: (G,).
        calibration: (G,) sum of predictions over number of positives.
    """

    names: list[str | None]
    rows: NDArray[np.int64]
    positives: NDArray[np.int64]
    auc: NDArray[np.float64]
    log_loss: NDArray[np.float64]
    calibration: NDArray[np.float64]

    @property
    def gauc(self) -> float:
        """Mean AUC of the groups that have one, weighted by their rows (Zhu et al., KDD 2017); NaN without any."""
        has = ~np.isnan(self.auc)
        return float(self.auc[has] @ self.rows[has] / self.rows[has].sum()) if has.any() else float("nan")

    @property
    def mean_auc(self) -> float:
        """Unweighted."""
        has = ~np.isnan(self.auc)
        return float(self.auc[has].mean()) if has.any() else float("nan")

    @property
    def one_class(self) -> int:
        """Groups whose rows are all of one class."""
        return int(np.isnan(self.auc).sum())

    def line(self, column: str) -> str:
        """In words."""
        left_out = f"; {self.one_class:,} of one class are left out" if self.one_class else ""
        if np.isnan(self.gauc):
            return f"{column}: {len(self.names):,} values, none with rows of both classes"
        return f"{column}: {len(self.names):,} values: gauc {self.gauc:.4f}  mean auc {self.mean_auc:.4f}{left_out}"

    def table(self) -> tuple[list[dict[str, str]], str]:
        """Rows of a table of the largest groups and the worst of the others, and which these are, in words."""
        shown, which = largest_and_worst(self.auc)
        return [
            {
                "": "null" if (name := self.names[group]) is None else name,
                "examples": f"{self.rows[group]:,}",
                "positives": f"{self.positives[group]:,}",
                **{
                    figure.replace("_", " "): "-" if np.isnan(value := getattr(self, figure)[group]) else f"{value:.4f}"
                    for figure in ("auc", "log_loss", "calibration")
                },
            }
            for group in shown
        ], which

    def over_groups(self) -> dict[str, Any]:
        """For JSON: over all groups."""
        over = {"gauc": _told(self.gauc), "mean_auc": _told(self.mean_auc), "one_class": self.one_class}
        return {"values": len(self.names), **over}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: over all groups, and of the `MOST_TOLD` largest."""
        figures = ("rows", "positives", "auc", "log_loss", "calibration")
        told = range(min(len(self.names), MOST_TOLD))
        groups = [{"value": self.names[n], **{of: _told(getattr(self, of)[n]) for of in figures}} for n in told]
        return {**self.over_groups(), "groups": groups}


class ByColumns:
    """Takes the outputs of an evaluation, and then tells the figures by columns; the latter is a collective call.

    Args:
        columns: of the files of the split, different ones, which `check_columns` takes.
        shards: the split, whose rows have labels.
        epoch: the order of the evaluation.
        ranks: this process among all.
    """

    def __init__(self, columns: Sequence[str], shards: ParquetShards, epoch: Epoch, ranks: Ranks) -> None:
        self._columns, self._shards, self._epoch, self._ranks = tuple(columns), shards, epoch, ranks
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """A batch's (N,), in order."""
        self._logits.append(logits.float().cpu())
        self._labels.append(labels.float().cpu())

    def compute(self) -> dict[str, GroupFigures]:
        """By column; on all ranks but the first, of no groups.

        Raises:
            DataError: a column has texts that are no UTF-8.
        """
        logits, labels = (torch.cat([torch.empty(0), *parts]) for parts in (self._logits, self._labels))
        values = self._values()
        found = {}
        for name in self._columns:
            codes, dictionary = _encoded(values[name])
            if len(codes) != len(logits):
                raise DataError(f"{len(codes)} values of {name!r}, but {len(logits)} rows were evaluated")
            gathered = _on_first(codes, dictionary, logits.numpy(), labels.numpy())
            found[name] = group_figures(*gathered)
        return found

    def _values(self) -> dict[str, pa.ChunkedArray]:
        """The columns in the order of this rank's rows, without those that batches leave out."""
        shards, label = self._shards, self._shards.columns.parts["data.label"]
        skips = shards.columns.label_null == "skip"
        names = tuple(dict.fromkeys((*(label.names if skips else ()), *self._columns)))
        parts: dict[str, list[pa.Array]] = {name: [] for name in self._columns}
        for window, *_ in self._epoch.pieces(self._ranks.rank):
            for part in window.slices:
                table = usual_table(shards.table(part.row_group, names)).slice(part.start, part.num_rows)
                if skips:
                    rows = label.decode(
                        table.select(label.names), label.layout(frozenset()), shards.where(part.row_group)
                    )
                    table = table.filter(pa.array(~np.isnan(rows.labels)))
                for name in self._columns:
                    texts = pc.cast(table.column(name), pa.large_string())
                    try:
                        texts.validate(full=True)
                    except pa.ArrowInvalid as error:
                        where = shards.where(part.row_group)
                        raise DataError(f"{where}: column {name!r} has texts that are no UTF-8 ({error})") from None
                    parts[name] += texts.chunks
        return {name: pa.chunked_array(arrays, pa.large_string()) for name, arrays in parts.items()}


def check_columns(columns: Sequence[str], shards: ParquetShards) -> None:
    """Refuse columns by which there can be no figures.

    Raises:
        DataError: a file of the split has no such column or two, or one that holds no single values, or times in a
            zone that is not known.
    """
    for file, schema in zip(shards.files, shards.schemas, strict=True):
        for name in columns:
            if name not in schema.names:
                raise DataError(
                    f"{file}: no column {name!r}, by which there are to be figures (metrics.by or --by); "
                    f"it has {', '.join(schema.names)}"
                )
            check_names(schema, (name,), str(file), "file")
            if pa.types.is_nested(kind := schema.field(name).type) or _is_binary(kind):
                raise DataError(
                    f"{file}: column {name!r} is of {kind}; metrics.by and --by take numbers, strings, dates and "
                    f"times: {_SUCH}"
                )
            try:
                pc.cast(pa.nulls(1, usual_type(kind)), pa.large_string())  # of no values, no zone is looked for
            except pa.ArrowException as error:
                raise DataError(f"{file}: column {name!r} is of {kind}: {error}; {_SUCH}") from None


def group_figures(
    groups: NDArray[np.int64],
    names: Sequence[str | None],
    logits: NDArray[np.float32],
    labels: NDArray[np.float32],
) -> GroupFigures:
    """Figures of each group of rows.

    Args:
        groups: (N,) of 0 .. G - 1.
        names: of the G groups, each of which has rows.
        logits: (N,).
        labels: (N,) of 0 and 1.
    """
    count = len(names)
    rows = np.bincount(groups, minlength=count)
    positives = np.bincount(groups, labels == 1, count).astype(np.int64)
    wide = logits.astype(np.float64)
    loss = np.bincount(groups, np.logaddexp(0, wide) - labels * wide, count)
    predicted = np.bincount(groups, 1 / (1 + np.exp(-wide)), count)
    with np.errstate(divide="ignore", invalid="ignore"):
        calibration = np.where(positives, predicted / positives, np.nan)
        log_loss = loss / rows
    auc = aucs_by_group(groups, count, logits, labels == 1)
    largest = np.argsort(-rows, kind="stable")
    return GroupFigures(
        names=[names[number] for number in largest.tolist()],
        rows=rows[largest],
        positives=positives[largest],
        auc=auc[largest],
        log_loss=log_loss[largest],
        calibration=calibration[largest],
    )


def _is_binary(kind: pa.DataType) -> bool:
    """Whether values are bytes, which need be no text."""
    types, kind = pa.types, value_type(kind)
    kinds = types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view
    return any(is_of(kind) for is_of in kinds)


def _encoded(values: pa.ChunkedArray) -> tuple[NDArray[np.int64], list[str | None]]:
    """Numbers of values (N,), and the values by them."""
    chunks = values.dictionary_encode(null_encoding="encode").chunks  # all by the same dictionary
    codes = [chunk.indices.to_numpy() for chunk in chunks]
    return np.concatenate([np.empty(0, np.int64), *codes]), chunks[0].dictionary.to_pylist() if chunks else []


def _on_first(
    codes: NDArray[np.int64], dictionary: list[str | None], logits: NDArray[np.float32], labels: NDArray[np.float32]
) -> tuple[NDArray[np.int64], list[str | None], NDArray[np.float32], NDArray[np.float32]]:
    """Those of all ranks, under common numbers, on the first; none on the others. A collective call."""
    gathered = [
        on_first_rank(torch.from_numpy(values))
        for values in (np.frombuffer(bytearray(json.dumps(dictionary).encode()), np.uint8), codes, logits, labels)
    ]
    if gathered[0] is None:
        return codes[:0], [], logits[:0], labels[:0]
    texts, all_codes, all_logits, all_labels = ([part.numpy() for part in of or ()] for of in gathered)
    numbers: dict[str | None, int] = {}
    renumbered = [
        np.array([numbers.setdefault(value, len(numbers)) for value in json.loads(text.tobytes())], np.int64)[own]
        for text, own in zip(texts, all_codes, strict=True)
    ]
    return np.concatenate(renumbered), list(numbers), np.concatenate(all_logits), np.concatenate(all_labels)


def _told(value: Any) -> Any:
    """A number for JSON, None for NaN."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and np.isnan(value) else value


def told_by_column(found: Mapping[str, GroupFigures]) -> dict[str, Any]:
    """For JSON, under their key; empty without any."""
    return {"by": {name: figures.as_dict() for name, figures in found.items()}} if found else {}
