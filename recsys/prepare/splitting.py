"""Which rows of a source are train, valid and test: what a schema may say of that, and the split of each row."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from typing import Annotated, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, model_validator

from recsys.config import Int64, Name, Section, Seed, shortened
from recsys.data.arrow import whole
from recsys.data.storage import DataError
from recsys.prepare.blocks import Block, Files
from recsys.prepare.selecting import Selection, no_rows
from recsys.prepare.sources import split_at_random

SPLITS = ("train", "valid", "test")
_SAMPLE_ROWS = 1 << 20

Share = Annotated[float, Field(ge=0.0, lt=1.0)]


class ChoiceSection(Section):
    """A section of which one key says which of the others have a meaning."""

    def refuse_idle(self, choice: str, taken: set[str]) -> None:
        """Refuse settings that mean nothing with what `choice` says."""
        if idle := self.model_fields_set - taken - {choice}:
            raise ValueError(f"{min(idle)} has no meaning with {choice} {getattr(self, choice)}; remove it")


def all_of(values: Sequence[str | int], kind: str) -> bool:
    """Whether there are values and all are of a type of column, `int` or `string`."""
    held = {"int": int, "string": str}.get(kind)
    return bool(values) and held is not None and all(isinstance(value, held) for value in values)


class SplitSchema(ChoiceSection):
    """Which rows are train, valid and test.

    `by`: `random` draws each row under `seed`; `permutation` takes the first rows of
    `numpy.random.default_rng(seed).permutation(rows)` for train, the next ones for valid, and the last for test;
    `order` takes the last rows of all files, in the order in which they are given; `time` the rows of the last times of
    `column`, or those from `boundaries` on: the first moment of valid and that of test. `valid` and `test` are shares.
    `file` goes by the files' names, as the patterns `valid_files` and `test_files` have them; of a file that both name,
    the first half is valid. `column` goes by the values of `column` that `values` names for each split.
    """

    by: Literal["random", "permutation", "order", "time", "file", "column"] = "random"
    valid: Share = 0.1
    test: Share = 0.1
    seed: Seed = 17
    column: Name | None = None
    boundaries: tuple[str | Int64, str | Int64] | None = None
    valid_files: tuple[str, ...] = ()
    test_files: tuple[str, ...] = ()
    values: dict[Literal["train", "valid", "test"], tuple[str | Int64, ...]] = Field(default_factory=dict)

    @property
    def split_of(self) -> dict[str | int, int]:
        """The split of each value that `values` names, as its place in SPLITS."""
        return {value: SPLITS.index(split) for split, values in self.values.items() for value in values}

    @model_validator(mode="after")
    def _settings_matter(self) -> Self:
        shares = {"valid", "test"}
        taken = {
            "random": {*shares, "seed"},
            "permutation": {*shares, "seed"},
            "order": shares,
            "time": {"column", "boundaries"} if self.boundaries else {"column", "boundaries", *shares},
            "file": {"valid_files", "test_files"},
            "column": {"column", "values"},
        }
        self.refuse_idle("by", taken[self.by])
        if self.valid + self.test >= 1:
            raise ValueError(f"valid {self.valid} and test {self.test} leave nothing to train on")
        if self.by == "time" and self.column is None:
            raise ValueError("a split by time needs the column that says the time")
        if self.by == "file" and not (self.valid_files or self.test_files):
            raise ValueError("a split by file needs valid_files or test_files")
        if self.by == "column":
            if self.column is None or not self.values.get("train"):
                raise ValueError("a split by column needs the column, and values with those of train at least")
            if len(self.split_of) != sum(map(len, self.values.values())):
                raise ValueError("values name one for two splits, or twice")
        return self


Assign = Callable[[Block], NDArray[np.int64]]
"""The split of each row of a block, as its place in SPLITS."""


def split_rule(split: SplitSchema, boundaries: tuple[int, int] | None, selection: Selection) -> Callable[[], Assign]:
    """What begins a pass over the rows, in which the same rows get the same splits each time.

    Args:
        split: how rows are divided.
        boundaries: the first time of valid and that of test, in the unit of their column, where the schema says them.
        selection: the rows, which are read here for the shares of times and of places.

    Raises:
        DataError: a pattern names no file, or there are no rows; a rule: a value is given to no split.
    """
    if split.by == "random":
        edges = np.array([1 - split.valid - split.test, 1 - split.test])

        def draw() -> Assign:
            rng = np.random.default_rng(split.seed)
            return lambda block: np.searchsorted(edges, rng.random(len(block.table)), side="right")

        return draw
    if split.by == "permutation" or (split.by == "order" and not selection.keeps_all):
        places = _places(split, selection.count())
        return lambda: _in_turn(places)
    if split.by == "time":
        assert split.column is not None
        column, moments = split.column, boundaries or _quantiles(split, split.column, selection)
        return lambda: lambda block: np.searchsorted(moments, _times(block, column), side="right")
    if split.by == "column":
        return lambda: lambda block: _by_value(block, split, selection.files)
    ends = (_ends_by_order if split.by == "order" else _ends_by_file)(split, selection.files)
    return lambda: lambda block: np.searchsorted(ends[block.file], block.lines, side="left")


def _places(split: SplitSchema, rows: int) -> NDArray[np.int8]:
    """The split of each row of a selection, by its place."""
    places = np.zeros(rows, np.int8)
    if split.by == "permutation":
        for number, name in enumerate(SPLITS):
            places[split_at_random(rows, seed=split.seed, valid=split.valid, test=split.test)[name]] = number
        return places
    test = rows - round(rows * split.test)
    places[test - round(rows * split.valid) : test], places[test:] = 1, 2
    return places


def _in_turn(places: NDArray[np.int8]) -> Assign:
    begin = 0

    def assign(block: Block) -> NDArray[np.int64]:
        nonlocal begin
        taken = places[begin : begin + len(block.table)]
        begin += len(taken)
        return taken.astype(np.int64)

    return assign


def _by_value(block: Block, split: SplitSchema, files: Files) -> NDArray[np.int64]:
    """The split of each row of a block by the value of its column."""
    assert split.column is not None
    values = whole(block.table, split.column)
    found = pc.index_in(values, pa.array(list(split.split_of), values.type))
    if found.null_count:
        row = int(np.argmax(found.is_null().to_numpy(zero_copy_only=False)))
        raise DataError(
            f"{files.paths[block.file]}: column {split.column!r} holds {shortened(str(values[row].as_py()))!r}, which "
            "split.values gives to no split; name it there, or leave such rows out with where"
        )
    splits: NDArray[np.int64] = np.array(list(split.split_of.values()))[found.to_numpy()]
    return splits


def _ends_by_order(split: SplitSchema, files: Files) -> list[tuple[float, float]]:
    """The last line of train and that of valid, for each file and counted in it."""
    lines = files.row_lines("counting rows")
    rows = sum(last - first + 1 for first, last in lines)
    test, valid = round(rows * split.test), round(rows * split.valid)
    ends: list[tuple[float, float]] = []
    before = 0
    for first, last in lines:
        end = rows - test - before + first - 1
        ends.append((end - valid, end))
        before += last - first + 1
    return ends


def _ends_by_file(split: SplitSchema, files: Files) -> list[tuple[float, float]]:
    """As `_ends_by_order`."""
    held_out = []
    for key, patterns in (("valid_files", split.valid_files), ("test_files", split.test_files)):
        for pattern in patterns:
            if not any(fnmatch(path.name, pattern) for path in files.paths):
                raise DataError(f"split.{key}: no source is named {pattern!r}")
        held_out.append([any(fnmatch(path.name, pattern) for pattern in patterns) for path in files.paths])
    ends = []
    for path, valid, test in zip(files.paths, *held_out, strict=True):
        if valid and test:
            (span,) = replace(files, paths=[path]).row_lines(f"counting rows of {path.name}")
            ends.append((0.0, sum(span) / 2))
        else:
            ends.append((0.0, np.inf) if valid else (0.0, 0.0) if test else (np.inf, np.inf))
    return ends


def _times(block: Block, column: str) -> NDArray[np.int64]:
    times: NDArray[np.int64] = block.table[column].cast(pa.int64()).to_numpy()
    return times


def _quantiles(split: SplitSchema, column: str, selection: Selection) -> tuple[int, int]:
    """The first time of valid and that of test, so that the splits have their shares of the rows."""
    # Every row's time up to a million rows, then every second one's, every fourth one's and so on.
    sample, stride, seen = np.empty(0, np.int64), 1, 0
    for block in selection.blocks("reading times"):
        times = _times(block, column)
        sample = np.concatenate([sample, times[-seen % stride :: stride]])
        seen += len(times)
        while len(sample) > _SAMPLE_ROWS:
            sample, stride = sample[::2], stride * 2
    if not len(sample):
        raise no_rows(selection, 0)
    sample.sort()
    sample = np.append(sample, sample[-1] + 1)  # where a share of 0 begins
    valid, test = (round((len(sample) - 1) * share) for share in (1 - split.valid - split.test, 1 - split.test))
    return int(sample[valid]), int(sample[test])
