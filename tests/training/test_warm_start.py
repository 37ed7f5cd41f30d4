"""A run that begins with another's weights: row by row by the definition, on any number of ranks and under any plan."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from numpy.typing import NDArray
from ranks import Finished, run_module, run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tiny import tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.pending import PendingRows
from recsys.checkpoint.tensors import TensorReader
from recsys.config import Config, ConfigError
from recsys.data.splits import open_splits
from recsys.data.vocabulary import Vocabulary, canonical
from recsys.runtime import Ranks
from recsys.sharding.shard import local_parts
from recsys.training import warm_start as module
from recsys.training.checkpoint import model_state, table_optimizer_state
from recsys.training.monitor import Monitor
from recsys.training.output import MARKER, OutputDirectory
from recsys.training.run import Trainer

KINDS: dict[str, dict[str, Any]] = {
    "table": {"sharding": ["table_wise"]},
    "column": {"sharding": ["column_wise"], "min_partition": 4},
    "replicated": {"sharding": ["data_parallel"]},
}
OLD = [*range(29, 9, -1)]
NEW = [11, 2, *range(20, 30), 3, 12, 13, 4]
"""Some in another order, some of the old ones gone, some new."""
WEIGHT = "model.embedding_bag_collection.embedding_bags.{}.weight"

Part = tuple[str, int, int, NDArray[np.float32]]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    for name, values in {"old": OLD, "new": NEW, "texts": list("abc")}.items():
        counts = pa.array(range(len(values), 0, -1), pa.int64())
        Vocabulary(canonical(pa.array(values)), counts, "").write(directory / f"{name}.parquet")
    return directory


def raw_config(log: Path, folder: Path, kind: str, vocabulary: str = "old", rows: int = 30) -> dict[str, Any]:
    """One short stage; the table of items has a vocabulary, that of users is plain, that of tags is hashed."""
    raw = tiny_config(log, folder / "out")
    raw["tables"]["item"] = {"num_embeddings": rows, "embedding_dim": 8, **KINDS[kind]}
    raw["features"]["sparse"]["item"]["ids"] = ids_of(log, vocabulary)
    raw["features"]["sparse"]["tags"]["ids"] = {"type": "hash"}
    raw["model"]["tower"]["normalization"] = "batch"  # whose statistics go with the weights
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 6}}
    return raw


def ids_of(log: Path, vocabulary: str, **more: str) -> dict[str, str]:
    return {"type": "vocabulary", "file": str(log / f"{vocabulary}.parquet"), **more}


def config_of(raw: dict[str, Any], folder: Path) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    return as_config(raw, folder)


def trained(log: Path, folder: Path, world_size: int, kind: str) -> Path:
    """The checkpoint of a run on the old vocabulary."""
    run_ranks(world_size, train_on, config_of(raw_config(log, folder, kind), folder))
    return folder / "out" / "checkpoints" / "step-6"


@pytest.fixture(scope="module")
def source(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks."""
    return trained(log, tmp_path_factory.mktemp("source"), 2, "column")


class _Listener(Monitor):
    def __init__(self, output_dir: Path) -> None:
        super().__init__(output_dir, enabled=False)
        self.told: list[str] = []

    def say(self, what: Any) -> None:
        self.told.append(what)


def _parts(trainer: Trainer) -> list[Part]:
    state = model_state(trainer.sharded, trainer.dense_arch)
    return [
        (name, *(place if value.dim() == 2 else (0, 0)), local.detach().numpy().copy())
        for name, value in state.items()
        for local, *place in (local_parts(value) if ".embedding_bags." in name else [(value, 0, 0)])
    ]


def _begin(ranks: Ranks, config: Config) -> tuple[list[str], list[Part], list[Part], float]:
    """What is said, this rank's parts of weights before and after, and the sum of the tables' optimizer state."""
    module._BLOCK_ROWS = 7  # so that tables take several
    monitor = _Listener(Path(config.output_dir))
    trainer = Trainer(config, ranks, open_splits(config, config.data.splits), monitor)
    before = _parts(trainer)
    assert config.warm_start is not None
    trainer.warm_start(config.warm_start)
    state = table_optimizer_state(trainer.sharded)
    parts = [local for name, value in state.items() if "steps" not in name for local, *_ in _local(value)]
    return monitor.told, before, _parts(trainer), sum(float(part.abs().sum()) for part in parts)


def _local(value: Any) -> list[tuple[Tensor]]:
    return [(shard.tensor,) for shard in value.local_shards()] if hasattr(value, "local_shards") else [(value,)]


def whole(by_rank: list[list[Part]]) -> dict[str, Tensor]:
    """Tensors put together from the parts of all ranks; where several ranks have a part, all have the same."""
    sizes: dict[str, list[int]] = {}
    for name, row, column, part in (part for parts in by_rank for part in parts):
        if part.ndim == 2:
            rows, columns = sizes.get(name, [0, 0])
            sizes[name] = [max(rows, row + part.shape[0]), max(columns, column + part.shape[1])]
        else:
            sizes[name] = list(part.shape)
    found = {name: torch.full(size, torch.nan) for name, size in sizes.items()}
    for name, row, column, part in (part for parts in by_rank for part in parts):
        place = found[name][row : row + len(part), column : column + part.shape[1]] if part.ndim == 2 else found[name]
        assert bool((place.isnan() | (place == torch.from_numpy(part))).all())
        place.copy_(torch.from_numpy(part))
    assert not any(bool(value.isnan().any()) for value in found.values())
    return found


def begun(
    raw: dict[str, Any], folder: Path, world_size: int = 1
) -> tuple[list[str], dict[str, Tensor], dict[str, Tensor]]:
    """What is said, and all weights before and after."""
    told, before, after, state = zip(*run_ranks(world_size, _begin, config_of(raw, folder)), strict=True)
    assert set(state) == {0.0}, "optimizer state was taken"
    return told[0], whole(list(before)), whole(list(after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "table"), (2, "column")),
        pytest.param((2, "column"), (3, "replicated"), marks=pytest.mark.slow),
        pytest.param((3, "replicated"), (1, "table"), marks=pytest.mark.slow),
        pytest.param((2, "table"), (3, "column"), marks=pytest.mark.slow),
        pytest.param((2, "column"), (2, "table"), marks=pytest.mark.slow),
    ],
    ids=lambda plan: f"{plan[1]}-on-{plan[0]}",
)
def test_each_row_is_that_of_its_value(
    log: Path, tmp_path: Path, before: tuple[int, str], after: tuple[int, str]
) -> None:
    directory = trained(log, tmp_path / "source", *before)
    saved = checkpoint_tensors(directory, tmp_path)
    raw = raw_config(log, tmp_path / "run", after[1], "new", rows=20)
    raw["warm_start"] = {"checkpoint": str(directory)}
    raw["seed"] = 5
    told, initial, found = begun(raw, tmp_path / "run", after[0])
    item = WEIGHT.format("item")
    expected = initial[item].clone()
    expected[0] = saved[item][0]
    for row, value in enumerate(NEW, start=1):
        if value in OLD:
            expected[row] = saved[item][OLD.index(value) + 1]
    assert torch.equal(found[item], expected) and not torch.equal(found[item], initial[item])
    for name, value in found.items():
        if name != item:
            assert torch.equal(value, saved[name]), name
    known = len(set(NEW) & set(OLD))
    assert told[1:] == [
        "  table user: 40 of 40 rows by number",
        f"  table item: {known + 1} of {len(NEW) + 1} rows by value, {len(NEW) - known} new; "
        f"{len(OLD) - known} values of the checkpoint's are not known here",
        "  table tag: 12 of 12 rows by number",
        *told[4:],
    ]
    number = sum(name.startswith("model.dense_arch.") for name in found)
    assert told[0] == f"Warm start from {directory}, step 6:" and told[4:] == [f"  dense: {number} of {number} tensors"]


@pytest.mark.parametrize("by_value", [False, True])
def test_a_piece_from_the_middle_of_a_table_takes_its_own_rows_and_columns(
    source: Path, tmp_path: Path, by_value: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tables that are sharded by rows have, which a CPU does not."""
    monkeypatch.setattr(module, "_BLOCK_ROWS", 4)
    name = WEIGHT.format("item")
    saved = checkpoint_tensors(source, tmp_path)[name]
    pairs = dict(enumerate([17, 2, 29, 0, 5, 11, 12, 28, 1]))
    rows = module._Rows("", 9)
    if by_value:
        there, here = zip(*sorted((source, target) for target, source in pairs.items()), strict=True)
        rows = module._Rows("", 9, np.array(here), np.array(there))
    part = torch.full((3, 4), -1.0)
    module._fill_part(part, 5, 3, PendingRows(TensorReader(source)), name, rows)
    expected = torch.full((3, 4), -1.0)
    for row in range(5, 8):
        expected[row - 5] = saved[pairs[row] if by_value else row, 3:7]
    assert torch.equal(part, expected)


def _purged(ranks: Ranks, config: Config) -> set[str]:
    """What the tables' lookups are told."""
    trainer = Trainer(config, ranks, open_splits(config, config.data.splits), _Listener(Path(config.output_dir)))
    told: set[str] = set()
    for collection in trainer.sharded.ranker.collections.values():
        for lookup in collection._lookups:  # type: ignore[union-attr]
            getattr(lookup, "module", lookup).purge = lambda: told.add("purge")
    assert config.warm_start is not None
    trainer.warm_start(config.warm_start)
    return told


def test_the_tables_caches_are_emptied(source: Path, log: Path, tmp_path: Path) -> None:
    assert run_ranks(1, _purged, config_of(warm(source, log, tmp_path), tmp_path)) == [{"purge"}]


def warm(source: Path, log: Path, folder: Path, **settings: Any) -> dict[str, Any]:
    """The config of the source with other initial weights, to be changed."""
    raw = raw_config(log, folder, "table")
    return {**raw, "seed": 5, "warm_start": {"checkpoint": str(source), **settings}}


def line_of(told: list[str], table: str) -> str:
    (line,) = [line for line in told if line.startswith(f"  table {table}")]
    return line.partition(": ")[2]


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"tables": ["item"], "dense": False}, {"item"}),
        ({"tables": [], "dense": True}, {"dense"}),
        ({"dense": False}, {"user", "item", "tag"}),
    ],
)
def test_only_what_is_asked_for_is_taken(
    source: Path, log: Path, tmp_path: Path, settings: dict[str, Any], taken: set[str]
) -> None:
    saved = checkpoint_tensors(source, tmp_path)
    told, initial, found = begun(warm(source, log, tmp_path, **settings), tmp_path)
    for name, value in found.items():
        of = name.split(".")[-2] if ".embedding_bags." in name else "dense"
        assert torch.equal(value, saved[name] if of in taken else initial[name]), name
    assert len(told) == 1 + len(taken)


def test_what_does_not_fit_stays_as_it_was_and_is_said(source: Path, log: Path, tmp_path: Path) -> None:
    raw = warm(source, log, tmp_path)
    raw["tables"]["user"]["num_embeddings"] = 50
    raw["features"]["sparse"]["tags"]["ids"]["salt"] = 3
    raw["tables"]["more"] = {"num_embeddings": 12, "embedding_dim": 4}
    raw["features"]["sparse"]["more"] = {"table": "more", "column": "tags"}
    del raw["tables"]["item"], raw["features"]["sparse"]["item"]
    raw["model"]["tower"]["hidden"] = [16, 12]
    raw["model"]["hilomoe"] = None
    raw["stages"]["joint"] |= {"balance_weight": 0.0, "z_weight": 0.0}
    saved = checkpoint_tensors(source, tmp_path)
    told, initial, found = begun(raw, tmp_path)
    same = [name for name in found if name in saved and saved[name].shape == found[name].shape]
    dense = [name for name in same if name.startswith("model.dense_arch.")]
    assert len(dense) == 8  # the projection, a norm, and two biases whose widths are still the same
    for name, value in found.items():
        assert torch.equal(value, saved[name] if name in dense else initial[name]), name
    assert line_of(told, "user") == "50 rows instead of 40, and no vocabulary; left as initialised"
    assert line_of(told, "tag") == "its features' ids become rows in another way; left as initialised"
    assert line_of(told, "more") == "the checkpoint has none; left as initialised"
    assert line_of(told, "item of the checkpoint") == "there is none here"
    assert "  dense: 8 of 16 tensors" in told
    assert (
        "  tensor head.weight: has another shape, (1, 12) here, (1, 8) in the checkpoint; left as initialised" in told
    )
    assert "  tensor tower.linears.0.lora_A of the checkpoint: there is none here" in told


@pytest.mark.slow
def test_experts_of_other_domains_are_not_taken_for_those(log: Path, tmp_path: Path) -> None:
    """Nor is a gate over other experts, which is used no more than any that is yet to be trained."""
    raw = raw_config(log, tmp_path / "then", "table")
    raw["model"] |= {"hilomoe": None, "domain_experts": {"type": "moe_mlora", "rank": 2}}
    raw["data"]["domain"] = {"column": "domain", "values": [0, 1, 2]}
    raw["stages"]["joint"] |= {"balance_weight": 0.0, "z_weight": 0.0}
    run_ranks(1, train_on, config_of(raw, tmp_path / "then"))
    source = tmp_path / "then" / "out" / "checkpoints" / "step-6"
    raw |= {"warm_start": {"checkpoint": str(source)}, "seed": 5, "output_dir": str(tmp_path / "out")}
    saved, dense = checkpoint_tensors(source, tmp_path), "model.dense_arch."
    assert bool(saved[f"{dense}domain_adaptation.gated"])
    one_by_one = raw | {"stages": {"experts": {"trains": "experts", "steps": 1, "learning_rate": 1e-3}}}
    run_ranks(1, train_on, config_of(one_by_one, tmp_path))
    trained = checkpoint_tensors(tmp_path / "out/checkpoints/step-3", tmp_path)
    assert not bool(trained[f"{dense}domain_adaptation.gated"])  # which would weigh experts that it does not know
    for values, others in (
        ([0, 1, 2], ()),
        ([0, 2, 1], ("domain_adaptation.", "domain_experts.1", "domain_experts.2")),
    ):
        raw["data"]["domain"]["values"] = values
        told, initial, found = begun(raw, tmp_path)
        for name, value in found.items():
            is_other = any(of in name for of in others)
            assert torch.equal(value, (initial if is_other else saved)[name]), name
            is_told = any(f"tensor {name.removeprefix(dense)}: is of " in line for line in told)
            assert is_told is is_other, name


@pytest.mark.parametrize(("before", "now"), [("row_0", "empty"), ("empty", "row_0")])
def test_the_row_of_unknown_values_is_taken_where_both_have_one(
    log: Path, tmp_path: Path, before: str, now: str
) -> None:
    raw = raw_config(log, tmp_path, "table")
    raw["features"]["sparse"]["item"]["ids"] = ids_of(log, "old", out_of_vocabulary=before)
    run_ranks(1, train_on, config_of(raw, tmp_path))
    source = tmp_path / "out" / "checkpoints" / "step-6"
    raw = warm(source, log, tmp_path / "run")
    raw["features"]["sparse"]["item"]["ids"] = ids_of(log, "old", out_of_vocabulary=now)
    told, initial, found = begun(raw, tmp_path / "run")
    saved = checkpoint_tensors(source, tmp_path)
    item = WEIGHT.format("item")
    expected = initial[item].clone()
    for place in range(len(OLD)):
        expected[place + (now == "row_0")] = saved[item][place + (before == "row_0")]
    assert torch.equal(found[item], expected)
    total = len(OLD) + (now == "row_0")
    assert line_of(told, "item") == f"{len(OLD)} of {total} rows by value, {total - len(OLD)} new"


def test_a_table_of_the_same_vocabulary_or_buckets_may_have_more_rows(source: Path, log: Path, tmp_path: Path) -> None:
    raw = warm(source, log, tmp_path)
    raw["tables"]["item"]["num_embeddings"] = 64
    raw["tables"]["tag"]["num_embeddings"] = 20
    raw["features"]["sparse"]["tags"]["ids"]["buckets"] = 12
    saved = checkpoint_tensors(source, tmp_path)
    told, initial, found = begun(raw, tmp_path)
    for table, rows in (("item", 30), ("tag", 12)):
        name = WEIGHT.format(table)
        assert torch.equal(found[name], torch.cat([saved[name], initial[name][rows:]]))
        assert line_of(told, table) == f"{rows} of {len(initial[name])} rows by number"


def test_features_that_share_a_table_must_agree(source: Path, log: Path, tmp_path: Path) -> None:
    raw = warm(source, log, tmp_path)
    raw["features"]["sparse"]["same"] = {"table": "item", "column": "item", "ids": ids_of(log, "old")}
    assert line_of(begun(raw, tmp_path)[0], "item") == "30 of 30 rows by number"
    raw["features"]["sparse"]["other"] = {"table": "item", "column": "item", "ids": ids_of(log, "new")}
    assert "in another way" in line_of(begun(raw, tmp_path)[0], "item")


def test_values_of_another_kind_are_not_taken_for_those(source: Path, log: Path, tmp_path: Path) -> None:
    other = shutil.copytree(log, tmp_path / "log")
    for path in other.glob("*/*.parquet"):
        table = pq.read_table(path)
        for name, kind in (("tags", pa.list_(pa.string())), ("item", pa.string())):
            column = table[name].cast(kind)
            table = table.set_column(table.schema.get_field_index(name), name, column)
        pq.write_table(table, path, row_group_size=70)
    raw = warm(source, other, tmp_path)
    raw["features"]["sparse"]["item"]["ids"] = ids_of(log, "texts")
    told, initial, found = begun(raw, tmp_path)
    assert line_of(told, "tag") == (
        "tags held numbers and holds strings, which hash to other rows; left as initialised"
    )
    assert line_of(told, "item") == "its vocabulary holds large_strings instead of int64s; left as initialised"
    for table in ("item", "tag"):
        assert torch.equal(found[WEIGHT.format(table)], initial[WEIGHT.format(table)])


def run_train(raw: dict[str, Any], folder: Path, *overrides: str, world_size: int = 2) -> list[Finished]:
    path = folder / "warm.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return run_module(world_size, "recsys.train", "--config", str(path), *overrides)


def error_of(finished: list[Finished]) -> str:
    assert all(one.code for one in finished)
    (told,) = [one.stderr for one in finished if one.stderr]
    assert told.startswith("error: ") and told.count("\n") == 1, told
    return told


@pytest.mark.parametrize(
    "fault",
    [
        "a flipped bit",
        "embedding_dim",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("missing", "a vocabulary", "wide")),
    ],
)
@pytest.mark.parametrize("is_format_1", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_cannot_be_taken_ends_the_run_before_anything_is_moved(
    source: Path, log: Path, tmp_path: Path, fault: str, is_format_1: bool
) -> None:
    checkpoint = shutil.copytree(source, tmp_path / "step-6")
    raw = warm(checkpoint, log, tmp_path)
    if is_format_1:
        meta = json.loads((checkpoint / "meta.json").read_text())
        del meta["files"]
        (checkpoint / "meta.json").write_text(json.dumps({**meta, "format": 1}))
    if fault == "missing":
        shutil.rmtree(checkpoint)
        wanted = f"{checkpoint} is no complete checkpoint"
    elif fault == "a flipped bit":
        wanted = ".distcp"
        value = checkpoint_tensors(checkpoint, tmp_path)[WEIGHT.format("user")].numpy().tobytes()
        (path,) = [path for path in checkpoint.glob("*.distcp") if value in path.read_bytes()]
        content = bytearray(path.read_bytes())
        content[content.index(value) + 100] ^= 1
        path.write_bytes(content)
    elif fault == "a vocabulary":
        wanted = f"{checkpoint}/vocabularies/item.parquet"
        shutil.copyfile(log / "new.parquet", checkpoint / "vocabularies" / "item.parquet")
    elif fault == "wide":
        raw["model"]["tower"] = {"type": "wdl", "hidden": [16, 8]}
        raw["tables"]["tag"]["embedding_dim"] = raw["model"]["dense_dim"] = 8
        raw["warm_start"]["tables"] = ["user"]
        wanted = "has no first-order weights"
    else:
        raw["tables"]["user"]["embedding_dim"] = 12
        wanted = f"warm_start: table user has embedding_dim 8 in {checkpoint}, but 12 here"
    with OutputDirectory(tmp_path / "out") as earlier:
        earlier.begin("earlier", anew=True)
        earlier.finish()
    left = (tmp_path / "out" / MARKER).read_text()
    assert wanted in error_of(run_train(raw, tmp_path))
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]
    assert (tmp_path / "out" / MARKER).read_text() == left


def as_cut_off(output_dir: Path) -> None:
    """A run as it would be, had it been killed before its end."""
    (output_dir / "summary.json").unlink()
    marker = json.loads((output_dir / MARKER).read_text())
    (output_dir / MARKER).write_text(json.dumps({**marker, "state": "running", "finished": None}))


@pytest.mark.slow
def test_a_run_that_is_resumed_goes_on_from_its_own_weights(source: Path, log: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(source, tmp_path / "step-6")
    raw = warm(checkpoint, log, tmp_path)
    raw["checkpoints"] = {"every_steps": 2, "keep_every_steps": 1}
    (first, *_) = run_train(raw, tmp_path)
    assert first.code == 0, first.stderr
    assert f"Warm start from {checkpoint}, step 6:" in first.stdout
    expected = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-6", tmp_path)
    cold = run_train({**raw, "warm_start": None, "output_dir": str(tmp_path / "cold")}, tmp_path)[0]
    assert cold.code == 0 and "Warm start" not in cold.stdout
    without = checkpoint_tensors(tmp_path / "cold" / "checkpoints" / "step-6", tmp_path)
    assert not torch.equal(without[WEIGHT.format("user")], expected[WEIGHT.format("user")])
    as_cut_off(tmp_path / "out")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / f"step-{step}")
    shutil.rmtree(checkpoint)
    assert f"{checkpoint} is no complete checkpoint" in error_of(run_train(raw, tmp_path, "resume=never"))
    (again, *_) = run_train(raw, tmp_path)
    assert again.code == 0, again.stderr
    assert "step-2" in again.stdout and "Warm start" not in again.stdout
    found = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-6", tmp_path)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_another_warm_start_is_another_run(source: Path, log: Path, tmp_path: Path) -> None:
    raw = warm(source, log, tmp_path)
    assert run_train(raw, tmp_path, world_size=1)[0].code == 0
    as_cut_off(tmp_path / "out")
    told = error_of(run_train(raw, tmp_path, "warm_start.dense=false", world_size=1))
    assert "warm_start.dense: True -> False" in told


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "x", "tables": ["users"]}, "warm_start.tables: no table 'users'; there are item, tag, user"),
        ({"checkpoint": "x", "tables": [], "dense": False}, "warm_start: tables is .* and dense is false, so nothing"),
        ({"tables": []}, "warm_start.checkpoint: missing"),
        ({"checkpoint": "x", "tables": "all"}, "warm_start.tables: "),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    log: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of({**raw_config(log, tmp_path, "table"), "warm_start": settings}, tmp_path)


def test_the_home_directory_may_be_written_as_usual(log: Path, tmp_path: Path) -> None:
    raw = {**raw_config(log, tmp_path, "table"), "warm_start": {"checkpoint": "~/step-6"}}
    settings = config_of(raw, tmp_path).warm_start
    assert settings is not None and settings.checkpoint == str(Path.home() / "step-6")
