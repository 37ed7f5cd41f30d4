"""A click log and a config small enough that a test can train on them in seconds."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recsys.config import TowerSettings


def tiny_table(rows: int, seed: int) -> pa.Table:
    """Rows whose label depends on the user's and the item's parity and on x; nulls, empty and null lists occur."""
    random = np.random.default_rng(seed)
    user, item = random.integers(0, 40, rows), random.integers(0, 30, rows)
    x = random.normal(size=rows).astype(np.float32)
    logit = 1.6 * ((user + item) % 2) - 1.2 + 0.8 * x
    probability = 1 / (1 + np.exp(-logit))
    tags = [None if random.random() < 0.1 else random.integers(0, 12, random.integers(0, 4)) for _ in range(rows)]
    return pa.table(
        {
            "user": user,
            "item": pa.array(item, mask=random.random(rows) < 0.05),
            "tags": pa.array(tags, pa.list_(pa.int32())),
            "x": pa.array(x, mask=random.random(rows) < 0.1),
            "z": random.normal(size=rows),
            "label": (random.random(rows) < probability).astype(np.int8),
            "truth": probability,
            "domain": (user % 3).astype(np.int8),
        }
    )


def write_tiny_log(
    directory: Path, rows: dict[str, int] | None = None, files: int = 3, row_group_rows: int = 70
) -> None:
    """Splits under `directory`, each in several files of several row groups."""
    for seed, (split, count) in enumerate((rows or {"train": 900, "valid": 200, "test": 251}).items()):
        (directory / split).mkdir(parents=True, exist_ok=True)
        table = tiny_table(count, seed)
        for part in range(files):
            piece = table.slice(count * part // files, count * (part + 1) // files - count * part // files)
            pq.write_table(piece, directory / split / f"part-{part}.parquet", row_group_size=row_group_rows)


def tiny_config(directory: Path, output_dir: Path) -> dict[str, Any]:
    """A config in three stages on the log in `directory`; all kinds of table and feature occur."""
    return {
        "name": "tiny",
        "output_dir": str(output_dir),
        "data": {
            **{split: f"{directory}/{split}/*.parquet" for split in ("train", "valid", "test")},
            "reference": "truth",
            "domain": {"column": "domain", "num_domains": 3, "names": ["home", "search", "cart"]},
            "batch_size": 32,
            "window_row_groups": 3,
        },
        "tables": {
            "user": {"num_embeddings": 40, "embedding_dim": 8},
            "item": {"num_embeddings": 30, "embedding_dim": 8, "sharding": ["column_wise"], "min_partition": 4},
            "tag": {"num_embeddings": 12, "embedding_dim": 4, "sharding": ["data_parallel"], "pooling": "sum"},
        },
        "features": {
            "sparse": {"user": {"table": "user"}, "item": {"table": "item"}, "tags": {"table": "tag"}},
            "dense": {"x": {"fill": 0.0}, "scale": {"column": "z"}},
        },
        "model": {
            "tower": {"type": "mlp", "hidden": [16, 8]},
            "hilomoe": {"num_layers": 2, "num_experts": 3},
            "dense_dim": 4,
        },
        "stages": {
            "backbone": {"trains": "backbone", "epochs": 2, "learning_rate": 0.01, "sparse_learning_rate": 0.1},
            "experts": {
                "trains": "experts",
                "epochs": 1,
                "learning_rate": 0.01,
                "balance_weight": 0.01,
                "z_weight": 0.001,
            },
            "joint": {
                "trains": "all",
                "steps": 20,
                "learning_rate": 0.003,
                "sparse_learning_rate": 0.05,
                "schedule": "cosine",
                "warmup_steps": 5,
                "balance_weight": 0.01,
                "z_weight": 0.001,
            },
        },
        "logging": {"every_steps": 5},
    }


def take_tower(config: dict[str, Any], *towers: dict[str, Any]) -> None:
    """Give a tiny config a tower, or paths, and one width to all tokens if one multiplies, cuts or reads wide terms."""
    del config["model"]["tower"]
    config["model"] |= {"paths": list(towers)} if len(towers) > 1 else {"tower": towers[0]}
    classes = {get_args(cls.model_fields["type"].annotation): cls for cls in TowerSettings.__subclasses__()}
    for tower in towers:
        settings = classes[(tower["type"],)]
        cut = tower.get("num_heads", 1) > 1 and tower["type"] == "qnn_alpha"
        if settings.pairwise or cut or "wide" in settings.model_fields:
            config["model"]["dense_dim"] = 8
            for table in config["tables"].values():
                table["embedding_dim"] = 8


def write_tiny_config(path: Path, directory: Path, output_dir: Path) -> Path:
    """The tiny config as a file."""
    path.write_text(yaml.safe_dump(tiny_config(directory, output_dir), sort_keys=False))
    return path
