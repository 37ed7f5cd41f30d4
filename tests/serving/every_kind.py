"""A log and a config in which every way from a raw value to a row occurs, every transform, and no experts."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ranks import run_module, run_ranks
from runs import as_config, train_on

from recsys.data.arrow import is_list, usual
from recsys.data.features import build_columns
from recsys.data.ids import listed
from recsys.data.vocabulary import Vocabulary
from recsys.prepare.mapping import mapped


def table(rows: int, seed: int) -> pa.Table:
    """Rows with nulls wherever they may be."""
    random = np.random.default_rng(seed)

    def sometimes(values: Any, kind: pa.DataType | None = None) -> pa.Array:
        return pa.array(
            [None if random.random() < 0.1 else value for value in values], kind or pa.infer_type(list(values))
        )

    def lists(values: Any) -> list[Any]:
        return [list(random.choice(values, random.integers(0, 5))) for _ in range(rows)]

    words = ["red", "blue", "grün", "", "a|b"]
    moments = [
        datetime(2024, 3, 30, tzinfo=UTC) + timedelta(seconds=int(s)) for s in random.integers(0, 9 * 10**5, rows)
    ]
    weighted = lists(np.arange(9))
    prices = random.exponential(20, rows)
    return pa.table(
        {
            "user": sometimes(random.integers(0, 20, rows)),
            "page": sometimes(random.integers(-5, 90, rows)),
            "site": sometimes(random.choice(words, rows)),
            "device": sometimes(random.integers(-(2**62), 2**62, rows)),
            "brand": sometimes(random.choice([*words, "other"], rows)),
            "shop": sometimes(random.integers(0, 12, rows)),
            "age": sometimes(random.normal(40, 20, rows)),
            "at": sometimes(moments, pa.timestamp("ms", "UTC")),
            "born": sometimes([date(1960, 1, 31) + timedelta(days=int(n)) for n in random.integers(0, 9999, rows)]),
            "second": sometimes([int(moment.timestamp()) for moment in moments]),
            "words": sometimes([",".join(random.choice(["x", "y", "zz"], random.integers(0, 4))) for _ in range(rows)]),
            "codes": sometimes(["|".join(map(str, random.integers(0, 25, n))) for n in random.integers(0, 6, rows)]),
            "bag": weighted,
            "bag_weights": [list(random.normal(size=len(ids))) for ids in weighted],
            "likes": sometimes(lists(["cats", "dogs", "owls"]), pa.list_(pa.string())),
            "mobile": sometimes([bool(bit) for bit in random.integers(0, 2, rows)]),
            "x": sometimes(random.normal(size=rows).astype(np.float32), pa.float32()),
            "count": sometimes(random.integers(-3, 5000, rows)),
            "price": pa.array(prices),
            "label": ((prices > 14) ^ (random.random(rows) < 0.2)).astype(np.int8),
            "place": random.integers(0, 3, rows),
        }
    )


def config(folder: Path) -> dict[str, Any]:
    """A config of one short stage on `folder`/log."""
    vocabularies = {
        "brand": pa.array(["red", "other", "grün", "blue"], pa.large_string()),
        "shop": pa.array([5, 3, 11, 0, 2]),
    }
    for name, values in vocabularies.items():
        counts = pa.array(np.arange(len(values), 0, -1))
        Vocabulary(values, counts, name).write(folder / f"{name}.parquet")
    hashed = {"type": "hash", "salt": 9, "buckets": 15}
    sparse: dict[str, dict[str, Any]] = {
        "user": {"table": "t20"},
        "page": {"table": "t20", "minimum": 0, "out_of_range": "hash"},
        "page_or_0": {"table": "t20", "column": "page", "out_of_range": "clip_to_oov"},
        "site": {"table": "t20", "ids": {"type": "hash"}},
        "device": {"table": "t20", "ids": hashed},
        "brand": {"table": "t20", "ids": {"type": "vocabulary", "file": str(folder / "brand.parquet")}},
        "shop": {
            "table": "t20",
            "ids": {
                "type": "vocabulary",
                "file": str(folder / "shop.parquet"),
                "out_of_vocabulary": "empty",
            },
        },
        "age": {"table": "t20", "ids": {"type": "bucketize", "boundaries": [0.5, 18, 30.25, 65]}},
        "at": {"table": "t40", "ids": {"type": "datetime", "part": "hour", "timezone": "Europe/Berlin"}},
        "born": {"table": "t40", "ids": {"type": "datetime", "part": "day"}},
        "second": {"table": "t40", "ids": {"type": "datetime", "part": "weekday", "timezone": "America/New_York"}},
        "words": {"table": "t20", "ids": hashed, "list_text": {"separator": ","}, "max_length": 2, "keep": "last"},
        "codes": {"table": "t40", "list_text": {"separator": "|", "items": "ints"}},
        "bag": {"table": "t9", "weights": "bag_weights", "max_length": 3},
        "likes": {"table": "t20", "ids": {"type": "hash", "salt": 2**64 - 1, "buckets": 7}},
        "mobile": {"table": "t9"},
    }
    return {
        "name": "every kind",
        "output_dir": str(folder / "out"),
        "data": {
            **{split: f"{folder}/log/{split}.parquet" for split in ("train", "valid", "test")},
            "batch_size": 32,
            "domain": {"column": "place", "num_domains": 3},
        },
        "tables": {
            "t20": {"num_embeddings": 20, "embedding_dim": 4},
            "t40": {"num_embeddings": 40, "embedding_dim": 8},
            "t9": {"num_embeddings": 9, "embedding_dim": 4, "pooling": "sum"},
        },
        "features": {
            "sparse": sparse,
            "dense": {
                "x": {"fill": -1.0},
                "count": {
                    "minimum": -0.5,
                    "fill": 2,
                    "log1p": True,
                    "standardize": {"mean": 3.0, "std": 2.0},
                    "not_finite": "fill",
                },
                "price": {"clip": [1, 50], "log1p": True},
                "old": {"column": "age", "fill": 40.5},
            },
        },
        "model": {"tower": {"type": "mlp", "hidden": [16, 8]}, "dense_dim": 4},
        "stages": {"only": {"trains": "all", "steps": 8, "learning_rate": 0.02, "sparse_learning_rate": 0.3}},
    }


def applied(raw: dict[str, Any]) -> dict[str, Any]:
    """The config of shards whose ids a converter mapped."""
    sparse = {
        name: {**feature, "ids": {"buckets": 20, **feature["ids"], "applied": True}}
        if feature.get("ids", {}).get("type") == "hash"
        else {**feature, "ids": {**feature["ids"], "applied": True}}
        if "ids" in feature
        else feature
        for name, feature in raw["features"]["sparse"].items()
    }
    dense = {name: feature for name, feature in raw["features"]["dense"].items() if name != "old"}  # reads raw ages
    return {**raw, "features": {"sparse": sparse, "dense": dense}}


def exported(folder: Path, *options: str, converted: bool = False) -> Path:
    """An artefact of a model that was trained on such a log, or on shards that a converter made of it."""
    raw = applied(config(folder)) if converted else config(folder)
    settings = as_config(raw, folder)
    (folder / "log").mkdir()
    for seed, (split, rows) in enumerate({"train": 400, "valid": 240, "test": 90}.items()):
        shard = table(rows, seed)
        if converted:
            for name, sparse in build_columns(settings, raw=True).sparse.items():
                if sparse.settings.ids is not None:
                    values = listed(usual(shard[name].combine_chunks()), sparse.settings.list_text, name)
                    column = pa.field(name, pa.list_(pa.int64()) if is_list(values.type) else pa.int64())
                    place = shard.column_names.index(name)
                    shard = shard.set_column(place, column, mapped(values, sparse.ids, name))
        pq.write_table(shard, folder / "log" / f"{split}.parquet", row_group_size=50)
    run_ranks(1, train_on, settings)
    return export(folder / "out/checkpoints/step-8", folder / "artifact", *options)


def export(checkpoint: Path, output: Path, *options: str) -> Path:
    (done,) = run_module(1, "recsys.export", "--checkpoint", str(checkpoint), "--output", str(output), *options)
    assert done.code == 0, done.stderr
    return output
