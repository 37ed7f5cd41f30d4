"""Tables of any name train: those of torch's own attributes have another key inside, all others keep theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tiny import tiny_config, write_tiny_log
from torch import nn

from recsys.config import Config, load_config
from recsys.model.names import POOLED, table_key, table_name
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.plan import plan_rows
from recsys.sharding.shard import shard

RENAMED = {"user": "items", "item": "type", "tag": "train"}
NAMES = [name for name in dir(nn.ModuleDict()) if table_key(name) != name]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def renamed(log: Path, out: Path, names: dict[str, str]) -> dict[str, Any]:
    """The tiny config of one short stage, its tables and the features that they are for called otherwise."""
    raw = tiny_config(log, out)
    raw["tables"] = {names.get(name, name): table for name, table in raw["tables"].items()}
    for feature in raw["features"]["sparse"].values():
        feature["table"] = names.get(feature["table"], feature["table"])
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 6}}
    return raw


def test_names_that_torch_takes_keep_their_key() -> None:
    for name in ("user", "item", "tag", "weight", "0", "embedding_bags", "items_", "table_items"):
        assert table_key(name) == table_name(name) == name


def test_names_that_torch_reserves_have_a_key_of_their_own() -> None:
    assert {"items", "type", "train", "to", "keys", "values", "pop", "training", "forward", "_modules"} <= set(NAMES)
    keys = nn.ModuleDict()
    for name in NAMES:
        keys.add_module(table_key(name), nn.Module())
        assert table_name(table_key(name)) == name
    assert len(keys) == len(NAMES) > 100


def _plan(ranks: Ranks, config: Config) -> list[dict[str, str]]:
    sharded = shard(build_ranker(config, seed=0), config, ranks, seed=0)
    state = sharded.ranker.collections[POOLED].state_dict()
    assert set(state) == {f"embedding_bags.{table_key(name)}.weight" for name in config.tables}
    return plan_rows(sharded.plan, config.tables)


def test_a_model_takes_tables_of_all_names_that_torch_reserves(log: Path, tmp_path: Path) -> None:
    raw = renamed(log, tmp_path / "out", RENAMED)
    for place, name in enumerate(NAMES):
        kind = {"sharding": ["data_parallel"]} if place % 3 == 0 else {}
        raw["tables"][name] = {"num_embeddings": 40, "embedding_dim": 4, **kind}
        raw["features"]["sparse"][name] = {"table": name, "column": "user"}
    for name in ("items", "type", "train"):
        raw["features"]["sparse"][name]["column"] = "user"
    (rows,) = run_ranks(1, _plan, as_config(raw, tmp_path))
    assert {row["table"] for row in rows} == set(NAMES)
    (finished,) = run_module(1, "recsys.train", "--config", str(tmp_path / "config-under-test.yaml"))
    assert finished.code == 0, finished.stderr


def test_reserved_names_train_evaluate_and_plan(log: Path, tmp_path: Path) -> None:
    raw = renamed(log, tmp_path / "out", RENAMED)
    config = as_config(raw, tmp_path)
    run_ranks(2, train_on, config)
    checkpoint = tmp_path / "out" / "checkpoints" / "step-6"
    tensors = checkpoint_tensors(checkpoint, tmp_path)
    shapes = {
        name.split(".")[-2]: tuple(it.shape) for name, it in tensors.items() if name.startswith(f"model.{POOLED}")
    }
    assert shapes == {"table-items": (40, 8), "table-type": (30, 8), "table-train": (12, 4)}
    assert all(tensor.isfinite().all() for tensor in tensors.values())

    (evaluated,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
    assert evaluated.code == 0, evaluated.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    auc = json.loads(evaluated.stdout)["model"]["auc"]
    assert auc == pytest.approx(summary["test"]["auc"], abs=1e-6)

    path = str(tmp_path / "config-under-test.yaml")
    (planned,) = run_module(1, "recsys.plan", "--config", path, "--json")
    assert planned.code == 0, planned.stderr
    assert [row["table"] for row in json.loads(planned.stdout)["plan"]] == ["items", "type", "train"]
    (refused,) = run_module(1, "recsys.plan", "--config", path, "tables.items.sharding=[row_wise]", "device=cpu")
    assert refused.code == 2 and "tables.items.sharding: row_wise needs GPUs" in refused.stderr


def test_a_stage_goes_back_to_tables_of_reserved_names(log: Path, tmp_path: Path) -> None:
    raw = renamed(log, tmp_path / "out", RENAMED)
    joint = {"trains": "all", "epochs": 4, "patience": 1, "learning_rate": 0.5, "sparse_learning_rate": 20.0}
    config = as_config({**raw, "stages": {"joint": joint}}, tmp_path)
    (summary,) = run_ranks(1, train_on, config)
    assert summary["stages"]["joint"]["steps"] < 4 * 29  # it got worse, and stopped
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    (evaluated,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
    assert evaluated.code == 0, evaluated.stderr
    assert json.loads(evaluated.stdout)["model"]["auc"] == pytest.approx(summary["test"]["auc"], abs=1e-6)


def test_a_reserved_name_is_planned_as_any_other(log: Path, tmp_path: Path) -> None:
    found = []
    for folder, names in (("plain", {"user": "items_"}), ("reserved", {"user": "items"})):
        (tmp_path / folder).mkdir()
        (rows,) = run_ranks(1, _plan, as_config(renamed(log, tmp_path / folder, names), tmp_path / folder))
        found.append([{**row, "table": row["table"].rstrip("_")} for row in rows])
    assert found[0] == found[1]


def test_a_converted_data_set_trains_with_tables_of_reserved_names(tmp_path: Path) -> None:
    lines = [f"{number % 2},u{number % 7},{number % 5}" for number in range(400)]
    (tmp_path / "log.csv").write_text("\n".join(["clicked,who,what", *lines]) + "\n")
    schema = {
        "label": "clicked",
        "tables": {"items": {"ids": "vocabulary"}, "type": {"ids": "hash", "buckets": 16}},
        "columns": {
            "clicked": {"type": "int"},
            "who": {"type": "string", "table": "items"},
            "what": {"type": "int", "table": "type"},
        },
    }
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(schema))
    paths = ("--source", str(tmp_path / "log.csv"), "--schema", str(tmp_path / "schema.yaml"))
    (converted,) = run_module(1, "recsys.prepare", "csv", *paths, "--output", str(tmp_path / "set"))
    assert converted.code == 0, converted.stderr
    raw = {
        "include": "set/dataset.yaml",
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "data": {"batch_size": 32},
        "model": {"tower": {"type": "mlp", "hidden": [8]}},
        "stages": {"joint": {"trains": "all", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1}},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    (trained,) = run_module(1, "recsys.train", "--config", str(tmp_path / "run.yaml"))
    assert trained.code == 0, trained.stderr
    (checkpoint,) = (tmp_path / "out" / "checkpoints").iterdir()
    (evaluated,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--json")
    assert evaluated.code == 0, evaluated.stderr
    assert set(load_config(checkpoint / "config.yaml").tables) == {"items", "type"}
