"""Official files of public data sets, their customary splits, and the data set that a converter leaves."""

import io
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from recsys.config import SparseFeatureConfig, VocabularyIdsConfig
from recsys.data.applied import AppliedIds, marked
from recsys.data.arrow import whole
from recsys.data.ids import build_ids
from recsys.data.storage import DataError
from recsys.prepare import writing
from recsys.prepare.mapping import mapped, vocabulary_file
from recsys.prepare.vocabularies import vocabulary_of

Ints = npt.NDArray[np.int64]

_TRAIN_FILES, _HELD_OUT_FILES = 8, 2
_ROW_GROUP_ROWS = 16_384
_SPLIT_SEED = 2024


class Source:
    """The official files of a data set, in a folder or a zip file, at the top or under a folder of their own.

    Args:
        path: the folder or zip file.
        folder: what the official zip file unpacks to.
        where: the way to a good copy; every error ends with it.

    Raises:
        FileNotFoundError: `path` is missing.
        DataError: `path` is neither a folder nor a zip file.
    """

    def __init__(self, path: Path, folder: str, where: str) -> None:
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; {where}")
        if not path.is_dir() and not zipfile.is_zipfile(path):
            raise DataError(f"{path} is neither a folder nor a zip file; {where}")
        self._path, self._folder, self._where = path, folder, where

    def has(self, name: str) -> bool:
        """Tell whether a file is there."""
        return self._find(name) is not None

    def read(self, name: str, header: str | None = None) -> "SourceFile":
        """Read a file whole; `header` is what its first line must be, where it is not a line as any other.

        Raises:
            FileNotFoundError: the file is missing.
            DataError: it cannot be unpacked, or its header is another.
        """
        found = self._find(name)
        if found is None:
            raise FileNotFoundError(f"{self._path} has no {name}; {self._where}")
        path = f"{self._path}/{found}"
        if self._path.is_dir():
            content = Path(path).read_bytes()
        else:
            try:
                with zipfile.ZipFile(self._path) as archive:
                    content = archive.read(found)
            except zipfile.BadZipFile as error:
                raise DataError(f"{self._path}: {error}; {self._where}") from error
        file = SourceFile(name, path, content, 1 if header is None else 2, self._where)
        if header is not None:
            told = content.partition(b"\n")[0].decode("latin-1").strip()
            if told != header:
                raise file.wrong(1, f"the header is {told!r}, not {header!r}")
        return file

    def _find(self, name: str) -> str | None:
        paths = (name, f"{self._folder}/{name}")
        if self._path.is_dir():
            return next((path for path in paths if (self._path / path).is_file()), None)
        with zipfile.ZipFile(self._path) as archive:
            members = set(archive.namelist())
        return next((path for path in paths if path in members), None)


@dataclass(frozen=True)
class SourceFile:
    """One official file.

    Attributes:
        name: without folders.
        path: for messages, with the folder or zip file that it lies in.
        content: all of it, header included.
        first_line: the number of the line below the header.
        where: the way to a good copy.
    """

    name: str
    path: str
    content: bytes
    first_line: int
    where: str

    def wrong(self, line: int, what: str) -> DataError:
        """Return the error to raise for a line."""
        return DataError(f"{self.path}, line {line}: {what}; {self.where}")

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yield number, from 1, and text of each line below the header; only line feeds end one, as Arrow has it.

        The text is read as Latin-1, which is right for the official files and never fails.
        """
        text = self.content.decode("latin-1")
        lines = text.removesuffix("\n").split("\n") if text else []
        for number, line in enumerate(lines[self.first_line - 1 :], start=self.first_line):
            yield number, line.removesuffix("\r")

    def numbers(self, names: Sequence[str], separator: str) -> dict[str, Ints]:
        """Parse lines of whole numbers separated by `separator`, one character or the same one several times.

        Arrow separates fields by one character only. Of a separator of several, all but the first make empty columns
        between the real ones, which are read as nulls and dropped.

        Returns:
            Each column by name, of shape (lines,).

        Raises:
            DataError: a line says anything else, or there is none.
        """
        gaps = {name: [f"{name}/{gap}" for gap in range(1, len(separator))] for name in names[1:]}
        padded = [column for name in names for column in (*gaps.get(name, ()), name)]
        between = [column for columns in gaps.values() for column in columns]
        try:
            table = pa_csv.read_csv(
                io.BytesIO(self.content),
                read_options=pa_csv.ReadOptions(column_names=padded, skip_rows=self.first_line - 1),
                parse_options=pa_csv.ParseOptions(delimiter=separator[0], quote_char=False, ignore_empty_lines=False),
                convert_options=pa_csv.ConvertOptions(
                    column_types={**dict.fromkeys(names, pa.int64()), **dict.fromkeys(between, pa.null())},
                    null_values=[""],
                ),
            )
            clean = all(table[name].null_count == 0 for name in names)
        except pa.ArrowInvalid:
            clean = False
        if clean:
            return {name: table[name].to_numpy() for name in names}
        # Something is wrong: look for it slowly, to name the line.
        form = re.compile(re.escape(separator).join([r"\d+"] * len(names)))
        for line, text in self.lines():
            if not form.fullmatch(text):
                raise self.wrong(line, f"{text!r} is not {separator.join(names)}, each a whole number")
        raise DataError(f"{self.path} holds no rows that can be read; {self.where}")


def split_at_random(rows: int, *, seed: int = _SPLIT_SEED, valid: float = 0.1, test: float = 0.1) -> dict[str, Ints]:
    """Split rows by the permutation `numpy.random.default_rng(seed).permutation(rows)`; by default 80 / 10 / 10.

    Args:
        rows: how many there are.
        seed: of the permutation.
        valid: share of the rows, as the decimal number that it is written as.
        test: likewise; both together less than 1.

    Returns:
        The rows of each split, in the order of the permutation: the first ones are train, in number the share that is
        left to it, rounded down; valid has its share of the rest, rounded down, and test what is left.
    """
    order = np.random.default_rng(seed).permutation(rows)
    share, held_out = Fraction(str(valid)), Fraction(str(valid)) + Fraction(str(test))
    train = int(rows * (1 - held_out))
    end = train + (int((rows - train) * share / held_out) if held_out else 0)
    return {"train": order[:train], "valid": order[train:end], "test": order[end:]}


def split_by_time(user: Ints, timestamp: Ints) -> dict[str, Ints]:
    """Split each user's rows by time: of n rows, the last n // 10 are test, the n // 10 before them valid.

    Rows of one user and second keep the order they are given in. A user of fewer than 10 rows is in train only.

    Args:
        user: whose each row is, shape (rows,).
        timestamp: when each row was, shape (rows,).

    Returns:
        The rows of each split, in the order of `numpy.random.default_rng(2024).permutation(rows)`.
    """
    by_time = np.lexsort((timestamp, user))  # stable
    _, first, count = np.unique(user[by_time], return_index=True, return_counts=True)
    later = np.repeat(first + count, count) - np.arange(len(user)) - 1  # rows of the same user that come after
    tenth = np.repeat(count // 10, count)
    held_out = np.empty(len(user), np.int64)
    held_out[by_time] = np.where(later < tenth, 2, np.where(later < 2 * tenth, 1, 0))
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(user))
    return {split: order[held_out[order] == place] for place, split in enumerate(("train", "valid", "test"))}


def check_free(output: Path, overwrite: bool) -> None:
    """Refuse to go to work for an output that cannot be put in its place.

    Raises:
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{output} is not empty; name another folder, or pass --overwrite to replace it")
    if not _is_replaceable(output):
        raise FileExistsError(f"{output} holds no {writing.SUMMARY_FILE}, so it is not replaced; name another folder")


def write_data_set(
    output: Path,
    raw: pa.Table,
    splits: Mapping[str, Ints],
    *,
    name: str,
    columns: Mapping[str, Any],
    vocabularies: Mapping[str, Any],
    sparse: Mapping[str, SparseFeatureConfig],
    mapped_as: Mapping[str, str],
    domain: Mapping[str, Any] | None,
    overwrite: bool,
    also: Mapping[str, Any] | None = None,
) -> None:
    """Write the Parquet shards of each split, `dataset.json`, `dataset.yaml` and vocabularies, all at once.

    Args:
        output: becomes the data set.
        raw: all rows of raw values, with a column `label`.
        splits: the rows of `raw` in each split, in the order to write them in.
        name: of the data set.
        columns: what each column means.
        vocabularies: what the ids of a column stand for, in their order; those of features with a vocabulary are
            written, with how often each value is found in the train split.
        sparse: the columns of ids that are features, with the mappings that make rows of their raw values.
        mapped_as: other columns of raw values, each with the feature by whose mapping they become numbers.
        domain: what divides the rows, as the config has it, if anything does.
        overwrite: replace the data set that is at `output`.
        also: what else `dataset.json` says, or says in the place of the above.

    Raises:
        FileExistsError: `output` was taken in the meantime.
        DataError: a value that its mapping refuses.
    """
    held = {
        feature: vocabulary_of(
            vocabularies[feature], whole(raw, feature).take(pa.array(splits["train"])), vocabulary_file(feature)
        )
        for feature, settings in sparse.items()
        if isinstance(settings.ids, VocabularyIdsConfig)
    }
    mappings = {
        feature: build_ids(settings, columns[feature]["size"], held.get(feature))
        for feature, settings in sparse.items()
    }
    applied = {feature: AppliedIds(mapping, sparse[feature].minimum) for feature, mapping in mappings.items()}
    of_columns = {column: applied[feature] for column, feature in {**{it: it for it in sparse}, **mapped_as}.items()}
    table = _mapped(raw, of_columns, name)
    with new_data_set(output, overwrite=overwrite) as stage:
        told = {}
        for split, rows in splits.items():
            part = table.take(pa.array(rows))
            bounds = writing.part_bounds(len(rows), _TRAIN_FILES if split == "train" else _HELD_OUT_FILES)
            for number, (start, end) in enumerate(bounds):
                writing.write_part(part.slice(start, end - start), stage, split, number, row_group_rows=_ROW_GROUP_ROWS)
            told[split] = {"rows": len(rows), "files": len(bounds), "label_rate": pc.mean(part["label"]).as_py()}
        for feature, vocabulary in held.items():
            vocabulary.write(stage / vocabulary_file(feature))
        summary = {"name": name, "columns": columns, "vocabularies": vocabularies, "splits": told, **(also or {})}
        writing.write_summary(stage, summary)
        writing.write_config(stage, summary, sparse=sparse, dense={}, data={"domain": domain} if domain else {})


def _mapped(raw: pa.Table, applied: Mapping[str, AppliedIds], name: str) -> pa.Table:
    """Rows of tables in the place of some columns' raw values."""
    table = raw
    for column, how in applied.items():
        values = whole(raw, column)
        rows = mapped(values, how.mapping, f"{name}: column {column!r}")
        field = marked(pa.field(column, rows.type), how, values.type)
        table = table.set_column(table.schema.get_field_index(column), field, rows)
    return table


@contextmanager
def new_data_set(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes the data set `output` when the block ends without an error.

    Raises:
        FileExistsError: `output` was taken in the meantime.
    """
    with writing.staged(output, keep=lambda: False, replace=lambda: overwrite and _is_replaceable(output)) as stage:
        yield stage


def _is_replaceable(output: Path) -> bool:
    """Tell whether `output` is a data set: a slip of the hand must not remove any other folder."""
    return writing.read_summary(output) is not None
