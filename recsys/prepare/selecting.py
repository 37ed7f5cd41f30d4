"""Which rows of files become rows of a data set: those that a condition keeps, and of rows with equal keys the last."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.data.arrow import is_string, whole
from recsys.data.hashing import hash_ids
from recsys.data.storage import DataError
from recsys.prepare.blocks import Block, Files

_MERGED_ROWS = 1 << 16
_GROUPED_BYTES = 1 << 30  # of keys: Arrow groups by 32-bit offsets, which overflow unseen
_MOST_HALVED = 16
_PLACE = "its place"  # which no column is called, as names have no blanks


@dataclass
class Selection:
    """The rows of files that are kept, read as often as needed.

    The last rows of keys take a pass over the files of their own. It holds each different key, of its bytes and 8
    more, up to four times that while keys are merged; from then on there is one byte for each row.

    Attributes:
        files: that have the rows.
        condition: the column that is null in rows to be left out; None where none is.
        keys: columns of which, of rows with equal values, the last is kept; none where all are. Nulls are equal.
        max_keys: different keys that are held.
        left_out: rows that the condition and the keys left out in the latest pass.
    """

    files: Files
    condition: str | None = None
    keys: Sequence[str] = ()
    max_keys: int = 50_000_000
    left_out: dict[str, int] = field(default_factory=dict)

    @property
    def keeps_all(self) -> bool:
        """Whether no row is left out that is not malformed."""
        return self.condition is None and not self.keys

    def blocks(self, what: str) -> Iterator[Block]:
        """Read the rows that are kept. Blocks may be empty. `what` and errors are those of the files.

        Raises:
            DataError: there are more different keys than `max_keys`.
        """
        last = self._last if self.keys else None
        begin = 0
        self.left_out = {}
        for block in self._by_condition(what):
            if last is not None:
                chosen = last[begin : begin + len(block.table)]
                begin += len(chosen)
                block = self._chosen(block, chosen, "keep_last_of")
            yield block

    def count(self) -> int:
        """Rows that are kept."""
        if self.keys:
            return int(np.count_nonzero(self._last))
        return sum(len(block.table) for block in self.blocks("counting rows"))

    def _by_condition(self, what: str) -> Iterator[Block]:
        for block in self.files.blocks(what):
            if self.condition is not None:
                chosen = whole(block.table, self.condition).is_valid().to_numpy(zero_copy_only=False)
                block = self._chosen(block, chosen, "where")
            yield block

    def _chosen(self, block: Block, chosen: NDArray[np.bool_], by: str) -> Block:
        self.left_out[by] = self.left_out.get(by, 0) + len(chosen) - int(np.count_nonzero(chosen))
        if chosen.all():
            return block
        return replace(block, lines=block.lines[chosen], table=block.table.filter(pa.array(chosen)))

    @cached_property
    def _last(self) -> NDArray[np.bool_]:
        """Of all rows that the condition keeps, whether each is the last of its key."""
        parts: list[pa.Table] = []
        rows = merged = 0
        for block in self._by_condition("finding last rows"):
            places = pa.array(np.arange(rows, rows + len(block.table)))
            parts.append(self._latest(block.table.select(list(self.keys)).append_column(_PLACE, places)))
            rows += len(block.table)
            # Merging when as much is waiting as is merged already keeps the whole work linear in the keys.
            if sum(map(len, parts)) - merged > max(_MERGED_ROWS, merged):
                parts = [self._latest(pa.concat_tables(parts))]
                merged = len(parts[0])
        last = np.zeros(rows, np.bool_)
        if parts:
            last[self._latest(pa.concat_tables(parts))[_PLACE].to_numpy()] = True
        return last

    def _latest(self, table: pa.Table, halved: int = 0) -> pa.Table:
        """Each key with the largest of its places; `halved` is how often the rows were divided by their keys."""
        if halved < _MOST_HALVED and sum(table[name].nbytes for name in self.keys) > _GROUPED_BYTES:
            one = _halves(table.select(list(self.keys)), halved)
            halves = (table.filter(chosen) for chosen in (one, pc.invert(one)))
            found = pa.concat_tables([self._latest(half, halved + 1) for half in halves])
        else:
            found = (
                table.group_by(list(self.keys)).aggregate([(_PLACE, "max")]).rename_columns({f"{_PLACE}_max": _PLACE})
            )
        if len(found) > self.max_keys:
            raise DataError(
                f"more than {self.max_keys:,} different keys of keep_last_of ({len(found):,} so far); raise "
                "--max-values as memory allows, or keep the last rows where the files are written"
            )
        return found


def _halves(keys: pa.Table, halved: int) -> pa.Array:
    """(rows,) booleans by the hash of each row's key, which is another one for each `halved`."""
    found = np.zeros(len(keys), np.int64)
    for column in keys.columns:
        chunks = (it if is_string(it.type) else it.cast(pa.int64()) for it in column.iterchunks())
        found ^= np.concatenate([hash_ids(chunk, 2, halved) & 1 for chunk in chunks])  # nulls, -1, become 1
    return pa.array(found == 0)


def no_rows(selection: Selection, kept: int) -> DataError:
    """What to say where no row is left to train on, of `kept` in all splits."""
    files = selection.files
    if not sum(files.rows) and not any(files.skipped):
        return DataError(f"{', '.join(map(str, files.paths))}: no rows")
    told = "".join(f"; {by} left out {count}" for by, count in selection.left_out.items())
    return DataError(f"no row is in the train split, of {kept} in all{told}")
