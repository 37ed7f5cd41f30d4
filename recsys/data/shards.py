"""Writing data sets: Parquet shards and a `dataset.json`, which appear in their place all at once or not at all.

A data set is a folder:

    dataset.json                what the columns mean, their sizes, rows and label rate of each split
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SUMMARY_FILE = "dataset.json"


def part_path(directory: Path, split: str, part: int) -> Path:
    """Returns where file number `part` of a split lies inside the data set at `directory`."""
    return directory / split / f"part-{part:05d}.parquet"


def part_bounds(rows: int, files: int) -> list[tuple[int, int]]:
    """Cuts `rows` rows into `files` runs whose lengths differ by one at most.

    Returns:
        `files` pairs of first row and end row, in order; fewer where there are fewer rows than files, so that
        no file is empty.
    """
    files = max(1, min(files, rows))
    edges = [rows * part // files for part in range(files + 1)]
    return list(itertools.pairwise(edges))


def write_part(table: pa.Table, directory: Path, split: str, part: int, *, row_group_rows: int) -> None:
    """Writes one Parquet file of a split; the same table gives the same bytes."""
    path = part_path(directory, split, part)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(table, path, row_group_size=row_group_rows, compression="zstd", write_page_checksum=True)


def write_summary(directory: Path, summary: dict[str, Any]) -> None:
    """Writes `dataset.json`."""
    text = json.dumps(summary, indent=2, ensure_ascii=False)
    (directory / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def read_summary(directory: Path) -> dict[str, Any] | None:
    """Returns what `dataset.json` says, or None where there is none that can be read."""
    try:
        summary = json.loads((directory / SUMMARY_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None


def is_complete(directory: Path, summary: dict[str, Any]) -> bool:
    """Tells whether every file that `summary` counts is there with all its rows.

    Parquet keeps its footer at the end, so a file that was cut short cannot be read: this looks at footers
    only.
    """
    try:
        for split, told in summary["splits"].items():
            paths = [part_path(directory, split, part) for part in range(told["files"])]
            if sum(pq.read_metadata(path).num_rows for path in paths) != told["rows"]:
                return False
    except (KeyError, TypeError, AttributeError, OSError, pa.ArrowInvalid):
        return False
    return True


@contextmanager
def staged(directory: Path, *, keep: Callable[[], bool], replace: Callable[[], bool]) -> Iterator[Path]:
    """Yields an empty folder beside `directory` that takes its place when the block ends without an error.

    Renaming a folder is one step of the file system, so nobody ever sees half a data set under `directory`,
    and of several processes that write the same one, each reader finds some whole copy. A process that is
    killed leaves its hidden folder behind, never a data set.

    Args:
        directory: where the data set belongs; missing parents are made.
        keep: asked when `directory` is already taken at the end; True leaves it and drops what was written.
        replace: asked next; True removes what is there first.

    Raises:
        FileExistsError: `directory` is taken, and neither `keep` nor `replace` says what to do about it.
        ValueError: `directory` is a mount point, which nothing can be renamed to.
    """
    place = directory.resolve()
    if place.is_mount():
        raise ValueError(f"{directory} is a mount point; name a folder inside it")
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
    """Renames `new` to `place`; False where a folder that is not empty is in the way."""
    try:
        new.rename(place)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True
