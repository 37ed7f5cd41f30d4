"""Rows of files as Arrow tables, some at a time, each row's place known: what is alike whatever the format is."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Progress = Callable[[str, int, int, int], None]
"""Called as (what is being done, rows so far, bytes so far, bytes in all); compressed bytes where files are."""


def quietly(what: str, rows: int, done: int, total: int) -> None:
    """The progress that nobody watches."""


class Malformed(ValueError):
    """Some row of a block does not say what it should."""


@dataclass(frozen=True)
class Block:
    """Some rows of one file, in its order.

    Attributes:
        file: which of the files, from 0.
        lines: each row's line in it, from 1, of shape (rows,). Exact where every row is a line; where quoted values
            hold line breaks, spread evenly over the block's lines.
        table: the rows.
    """

    file: int
    lines: NDArray[np.int64]
    table: pa.Table


@dataclass
class Files(ABC):
    """Files that are read in one order, as often as needed.

    Attributes:
        paths: the files.
        convert: makes of a table, whose columns are named as in the files, the one that is handed out; raises
            `Malformed` for a row that is wrong.
        skip_malformed: count rows that are wrong instead of refusing them.
        progress: told after each block.
        rows: rows of each file in the latest pass.
        skipped: rows left out of each file in the latest pass.
    """

    paths: Sequence[Path]
    _: KW_ONLY
    convert: Callable[[pa.Table], pa.Table] = lambda table: table
    skip_malformed: bool = False
    progress: Progress = quietly
    rows: list[int] = field(default_factory=list)
    skipped: list[int] = field(default_factory=list)

    @abstractmethod
    def blocks(self, what: str) -> Iterator[Block]:
        """Read all rows; `what` the pass is for, as `progress` is told.

        Raises:
            DataError: a file is damaged, lacks a column, or has a row that is wrong and not to be skipped; the message
                names file, row and column.
            OSError: a file cannot be read.
        """

    @abstractmethod
    def row_lines(self, what: str) -> list[tuple[int, int]]:
        """The lines of each file's first and last row, from 1; (1, 0) if it has none. `what` as for `blocks`.

        Raises:
            DataError: a file is damaged, or lacks a column.
            OSError: a file cannot be read.
        """
