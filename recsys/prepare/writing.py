"""Writing data sets: Parquet shards and what describes them, which appear in their place all at once or not at all.

A data set is a folder:

    dataset.yaml                the data, tables and features of a config, which includes it
    dataset.json                what the columns mean, their sizes, rows and label rate of each split
    vocabularies/item.parquet   the values behind the rows of a table, where they are counted
    train/part-00000.parquet    several files a split, several row groups a file
    valid/part-00000.parquet
    test/part-00000.parquet
"""

import errno
import itertools
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from recsys.config import DenseFeatureConfig, Section, SparseFeatureConfig
from recsys.data.storage import DataError
from recsys.files import read_regular

SUMMARY_FILE = "dataset.json"
_MAX_SUMMARY = 64 << 20
CONFIG_FILE = "dataset.yaml"
EMBEDDING_DIM = 16


def part_path(directory: Path, split: str, part: int) -> Path:
    """Return where file number `part` of a split lies inside the data set at `directory`."""
    return directory / split / f"part-{part:05d}.parquet"


def part_bounds(rows: int, files: int) -> list[tuple[int, int]]:
    """Divide `rows` rows into `files` runs whose lengths differ by one at most.

    Returns:
        `files` pairs of first row and end row, in order; fewer where there are fewer rows than files, so that
        no file is empty.
    """
    files = max(1, min(files, rows))
    edges = [rows * part // files for part in range(files + 1)]
    return list(itertools.pairwise(edges))


def write_part(table: pa.Table, directory: Path, split: str, part: int, *, row_group_rows: int) -> None:
    """Write one Parquet file of a split; the same table gives the same bytes."""
    path = part_path(directory, split, part)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_rows, compression="zstd", write_page_checksum=True)


class SplitWriter:
    """Write a split of any length, a row group at a time; to be entered.

    Args:
        directory: the data set.
        split: its name.
        label: the column of 0 and 1.
        row_group_rows: rows of a row group.
        file_row_groups: row groups of a file.
    """

    def __init__(
        self, directory: Path, split: str, label: str, *, row_group_rows: int = 16_384, file_row_groups: int = 64
    ) -> None:
        self._directory, self._split, self._label = directory, split, label
        self._row_group_rows, self._file_row_groups = row_group_rows, file_row_groups
        self._waiting: list[pa.Table] = []
        self._writer: pq.ParquetWriter | None = None
        self._row_groups = self._files = self._rows = self._positives = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._waiting:
            self._write_group(pa.concat_tables(self._waiting))
        if self._writer is not None:
            self._writer.close()

    @property
    def told(self) -> dict[str, Any]:
        """What `dataset.json` says of the split."""
        rate = self._positives / self._rows if self._rows else None
        return {"rows": self._rows, "files": self._files, "label_rate": rate}

    def write(self, table: pa.Table) -> None:
        """Append rows; the last of them wait until a row group is full."""
        if not len(table):
            return
        self._rows += len(table)
        self._positives += pc.sum(table[self._label]).as_py() or 0
        self._waiting.append(table)
        if sum(map(len, self._waiting)) < self._row_group_rows:
            return
        waiting = pa.concat_tables(self._waiting)
        whole = len(waiting) - len(waiting) % self._row_group_rows
        for start in range(0, whole, self._row_group_rows):
            self._write_group(waiting.slice(start, self._row_group_rows))
        # A copy: a slice would keep the memory of all rows.
        rest = waiting.take(pa.array(range(whole, len(waiting)), pa.int64()))
        self._waiting = [rest] if len(rest) else []

    def _write_group(self, table: pa.Table) -> None:
        if self._writer is None:
            path = part_path(self._directory, self._split, self._files)
            path.parent.mkdir(exist_ok=True)
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd", write_page_checksum=True)
            self._files, self._row_groups = self._files + 1, 0
        self._writer.write_table(table, row_group_size=self._row_group_rows)
        self._row_groups += 1
        if self._row_groups == self._file_row_groups:
            self._writer.close()
            self._writer = None


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Write `dataset.json`."""
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (directory / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Return what `dataset.json` says, or None where there is none that can be read."""
    try:
        summary = json.loads(read_regular(directory / SUMMARY_FILE, _MAX_SUMMARY, follow=True))
    except (ValueError, RecursionError):  # FileError is a ValueError
        return None
    return summary if isinstance(summary, dict) else None


def write_config(
    directory: Path,
    summary: Mapping[str, Any],
    *,
    sparse: Mapping[str, SparseFeatureConfig],
    dense: Mapping[str, DenseFeatureConfig],
    data: Mapping[str, Any],
    embedding_dim: int = EMBEDDING_DIM,
) -> None:
    """Write `dataset.yaml`: with `model`, `stages` and `data.batch_size` beside it, a config is whole.

    Its globs and the files of its vocabularies start with `${here}`, so that the data set can be moved.

    Args:
        directory: the data set.
        summary: as `write_summary` writes it; a table is as large as the `size` of the largest of its columns, and a
            split without rows is left out.
        sparse: the feature of each column of ids, with the mapping that was applied to its raw values.
        dense: the feature of each column of numbers.
        data: what else the section `data` says.
        embedding_dim: of every table.
    """
    sizes: dict[str, int] = {}
    for column, feature in sparse.items():
        sizes[feature.table] = max(sizes.get(feature.table, 0), summary["columns"][column]["size"])
    config = {
        "data": {
            **{split: f"${{here}}/{split}/*.parquet" for split, told in summary["splits"].items() if told["rows"]},
            "label": "label",
            **data,
        },
        "tables": {table: {"num_embeddings": size, "embedding_dim": embedding_dim} for table, size in sizes.items()},
        "features": {
            "sparse": {column: _as_set(feature) for column, feature in sparse.items()},
            "dense": {column: _as_set(feature) for column, feature in dense.items()},
        },
    }
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (directory / CONFIG_FILE).write_text(text, encoding="utf-8")


def _as_set(section: Section) -> dict[str, Any]:
    """The keys that a section was made with."""
    return section.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def is_complete(directory: Path, summary: dict[str, Any]) -> bool:
    """Tell whether `dataset.yaml` and every file that `summary` counts are there, each with all its rows.

    Parquet keeps its footer at the end, so a file that was cut short cannot be read: this looks at footers
    only.
    """
    try:
        for split, told in summary["splits"].items():
            rows = 0
            for part in range(told["files"]):
                path = part_path(directory, split, part)
                if not path.is_file():  # a pipe would be waited for
                    return False
                rows += pq.read_metadata(path).num_rows
            if rows != told["rows"]:
                return False
        return (directory / CONFIG_FILE).is_file()
    except (KeyError, TypeError, AttributeError, OSError, pa.ArrowInvalid):
        return False


@contextmanager
def staged(directory: Path, *, keep: Callable[[], bool], replace: Callable[[], bool]) -> Iterator[Path]:
    """Yield an empty folder beside `directory` that takes its place when the block ends without an error.

    Renaming a folder is one step of the file system, so nobody ever sees half a data set under `directory`,
    and of several processes that write the same one, each reader finds some whole copy. A process that is
    killed leaves its hidden folder behind, never a data set.

    Args:
        directory: where the data set belongs; missing parents are made.
        keep: asked when `directory` is already taken at the end; True leaves it and drops what was written.
        replace: asked next; True removes what is there first.

    Raises:
        FileExistsError: `directory` is taken, and neither `keep` nor `replace` says what to do about it.
        DataError: `directory` is a mount point, which nothing can be renamed to.
    """
    place = directory.resolve()
    if place.is_mount():
        raise DataError(f"{directory} is a mount point; name a folder inside it")
    place.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{place.name}.{os.getpid()}-{secrets.token_hex(4)}"
    new, old = place.with_name(f"{mark}.new"), place.with_name(f"{mark}.old")
    new.mkdir()
    try:
        yield new
        while not _took(new, place):
            if keep():
                break
            if not replace():
                raise FileExistsError(f"{directory} is taken; name another folder")
            with suppress(FileNotFoundError):  # another process has just moved it away
                place.rename(old)
                shutil.rmtree(old)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _took(new: Path, place: Path) -> bool:
    """Rename `new` to `place`; False where a folder that is not empty is in the way."""
    try:
        new.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
