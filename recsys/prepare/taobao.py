"""Taobao's clicks in themes, by Alibaba (Tianchi 9716): domains of clicked items and of items that could have been."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from recsys.config import SparseFeatureConfig
from recsys.data.storage import DataError
from recsys.prepare.blocks import Malformed, Progress, quietly
from recsys.prepare.mapping import by_vocabulary, vocabulary_file
from recsys.prepare.sources import Ints, check_free, write_data_set
from recsys.prepare.splitting import SPLITS
from recsys.prepare.text import TextFiles, TextFormat

CLICKS, USERS, ITEMS = "theme_click_log.csv", "user_embedding.csv", "item_embedding.csv"
SEED = 123
CLICK_RATIOS = (0.2, 0.5)
"""Least and greatest number of clicks to one item that was not clicked."""

_WHERE = "take it from https://tianchi.aliyun.com/dataset/9716"


def convert_taobao_themes(
    source: Path,
    output: Path,
    *,
    themes: int,
    seed: int = SEED,
    skip_malformed: bool = False,
    overwrite: bool = False,
    progress: Progress = quietly,
) -> None:
    """Convert the theme clicks to Parquet shards of positives and drawn negatives, a domain for each theme.

    A click counts if user and item both have a vector, once for each user, item and theme. The domains are the first
    `themes` themes in the order of the click log that have such clicks. A theme draws its ratio r from U(0.2, 0.5),
    rounded to two digits. A user of n clicks in it gets int(n / r) of the items that others clicked there, or all of
    them if there are not so many. Of the clicks of a theme 60 % are train, 20 % valid and 20 % test; so are the
    negatives of each of its users, rounded for each: train down, then valid down.

    The vectors themselves are not carried. Memory holds the ids that have one, the clicks, and the rows made of them.

    Args:
        source: folder with `theme_click_log.csv`, `user_embedding.csv` and `item_embedding.csv`.
        output: becomes the data set: `dataset.json` and a folder of Parquet files for each split.
        themes: how many, at least 1. What the first ones give does not depend on it, their order in the shards aside.
        seed: of all that is drawn, from 0.
        skip_malformed: leave out rows that are wrong and count them in `dataset.json`, instead of refusing them.
        overwrite: replace the data set that is at `output`.
        progress: told after each block of a file and each theme.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
        DataError: a line does not say what it should, named with file and column; there are fewer themes; a number is
            out of range.
    """
    for name, number, least in (("themes", themes, 1), ("seed", seed, 0)):
        if number < least:
            raise DataError(f"{name} must be at least {least}, not {number}")
    check_free(output, overwrite)
    reading = _Reading(source, skip_malformed, progress)
    clicks = _clicks(reading, themes)
    parts, told = [], []
    for number, theme in enumerate(clicks.themes):
        # A generator of its own: a theme has the same rows whatever themes are beside it. (seed, 0) would be `seed`.
        rng = np.random.default_rng((seed, number + 1))
        part, ratio = _theme_rows(clicks.user[clicks.theme == theme], clicks.item[clicks.theme == theme], rng)
        parts.append(part.append_column("theme", pa.array(np.full(len(part), number))))
        told.append({"theme": theme, "click_ratio": ratio, "rows": len(part)})
        progress("drawing", sum(map(len, parts)), number + 1, themes)
    rows = pa.concat_tables(parts)
    order, split = np.random.default_rng(seed).permutation(len(rows)), rows["split"].to_numpy()
    vocabularies = {name: np.unique(rows[name].to_numpy()) for name in ("user", "item")}
    write_data_set(
        output,
        rows.select(["user", "item", "theme", "label"]),
        {name: order[split[order] == place] for place, name in enumerate(SPLITS)},
        name="taobao-themes",
        columns=_columns({**{name: len(ids) for name, ids in vocabularies.items()}, "theme": themes}),
        vocabularies=vocabularies,
        sparse={
            "user": SparseFeatureConfig(table="user", ids=by_vocabulary("user")),
            "item": SparseFeatureConfig(table="item", ids=by_vocabulary("item")),
            "theme": SparseFeatureConfig(table="theme"),
        },
        mapped_as={},
        domain={"column": "theme", "num_domains": themes, "names": [str(theme) for theme in clicks.themes]},
        overwrite=overwrite,
        also={
            "vocabularies": {name: vocabulary_file(name) for name in vocabularies},  # too long to be told here
            "themes": told,
            "left_out": {why: count for why, count in clicks.left_out.items() if count},
            "skipped": {path: count for path, count in reading.skipped.items() if count},
        },
    )


@dataclass(frozen=True)
class _Reading:
    """How files are read, and how many rows of each were skipped."""

    source: Path
    skip_malformed: bool
    progress: Progress
    skipped: dict[str, int] = field(default_factory=dict)

    def files(self, name: str, columns: tuple[str, ...]) -> TextFiles:
        """One of the files, of which some columns of whole numbers are read, each with a value in every row."""
        path = self.source / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {_WHERE}")
        return TextFiles(
            [path],
            TextFormat(dict.fromkeys(columns, pa.int64())),
            convert=_without_nulls,
            skip_malformed=self.skip_malformed,
            progress=self.progress,
        )

    def known(self, name: str, column: str) -> Ints:
        """The different ids of a file of vectors, in ascending order."""
        files = self.files(name, (column,))
        ids = [np.unique(block.table[column].to_numpy()) for block in files.blocks(name)]
        self.skipped[str(files.paths[0])] = files.skipped[0]
        return np.unique(np.concatenate([np.empty(0, np.int64), *ids]))


def _without_nulls(table: pa.Table) -> pa.Table:
    for name in table.column_names:
        if table[name].null_count:
            raise Malformed(f"column {name!r}: no value")
    return table


class _Clicks(NamedTuple):
    """Different clicks in themes that are kept, by users on items that have a vector; by theme, user and item.

    Attributes:
        themes: raw ids in the order of the log.
        theme: (clicks,), of raw ids.
        user: (clicks,).
        item: (clicks,).
        left_out: rows of the log that make no positive, by reason.
    """

    themes: list[int]
    theme: Ints
    user: Ints
    item: Ints
    left_out: Mapping[str, int]


def _clicks(reading: _Reading, themes: int) -> _Clicks:
    users, items = reading.known(USERS, "user_id"), reading.known(ITEMS, "item_id")
    files = reading.files(CLICKS, ("theme_id", "user_id", "item_id"))
    seen: dict[int, None] = {}
    parts = [np.empty((3, 0), np.int64)]
    for block in files.blocks(CLICKS):
        rows = np.stack([column.to_numpy() for column in block.table.select(list(files.format.types)).columns])
        _, first = np.unique(rows[0], return_index=True)
        seen.update(dict.fromkeys(rows[0, np.sort(first)].tolist()))
        parts.append(rows[:, np.isin(rows[1], users) & np.isin(rows[2], items)])
    reading.skipped[str(files.paths[0])] = files.skipped[0]
    clicks = np.concatenate(parts, axis=1)
    found = set(np.unique(clicks[0]).tolist())
    kept = [theme for theme in seen if theme in found][:themes]
    if len(kept) < themes:
        raise DataError(
            f"{files.paths[0]} has {len(kept)} themes with clicks whose user and item are in {USERS} and {ITEMS}, not "
            f"{themes}; lower --themes"
        )
    of_kept = clicks[:, np.isin(clicks[0], kept)]
    theme, user, item = _once(of_kept)
    left_out = {
        "user or item without a vector": files.rows[0] - clicks.shape[1],
        "another theme": clicks.shape[1] - of_kept.shape[1],
        "clicked before": of_kept.shape[1] - len(theme),
    }
    return _Clicks(kept, theme, user, item, left_out)


def _once(rows: Ints) -> Ints:
    """The different columns of (3, rows), sorted by the first row, then by the second and the third."""
    ordered = rows[:, np.lexsort(rows[::-1])]
    different: Ints = ordered[:, np.append(True, (ordered[:, 1:] != ordered[:, :-1]).any(axis=0))]
    return different


def _theme_rows(user: Ints, item: Ints, rng: np.random.Generator) -> tuple[pa.Table, float]:
    """Positives and negatives of a theme, with their places in SPLITS, and the ratio that was drawn.

    Args:
        user: (clicks,) in ascending order.
        item: (clicks,), different ones of each user.
        rng: draws the ratio, then the split of the positives, then each user's negatives.
    """
    ratio = round(rng.uniform(*CLICK_RATIOS), 2)
    split = rng.permutation(_places(len(user)))
    pool, place = np.unique(item, return_inverse=True)
    starts = np.flatnonzero(np.append(True, user[1:] != user[:-1]))
    drawn = []
    for begin, end in pairwise([*starts.tolist(), len(user)]):
        others = np.delete(pool, place[begin:end])
        # In random order, so that the first ones are a random share of them.
        drawn.append(rng.choice(others, min(int((end - begin) / ratio), len(others)), replace=False))
    lengths = list(map(len, drawn))
    rows = pa.table(
        {
            "user": np.concatenate([user, np.repeat(user[starts], lengths)]),
            "item": np.concatenate([item, *drawn]),
            "label": np.repeat(np.array([1, 0], np.int8), [len(user), sum(lengths)]),
            "split": np.concatenate([split, *map(_places, lengths)]),
        }
    )
    return rows, ratio


def _places(rows: int) -> Ints:
    """(rows,) places in SPLITS, in ascending order: 60 % train, 20 % valid, both rounded down, and the rest test."""
    train = rows * 3 // 5
    valid = (rows - train) // 2
    return np.repeat(np.arange(3), [train, valid, rows - train - valid])


def _columns(sizes: Mapping[str, int]) -> dict[str, Any]:
    meanings = {
        "user": f"place in {vocabulary_file('user')}",
        "item": f"place in {vocabulary_file('item')}",
        "theme": "place in themes, by which the rows are divided",
    }
    columns = {name: {"type": "int64", "size": sizes[name], "meaning": told} for name, told in meanings.items()}
    return {**columns, "label": {"type": "int8", "meaning": "1 for a click, 0 for an item that was drawn"}}
