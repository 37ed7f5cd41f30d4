"""The first step that was not finite is found, named and dumped; weights that are not finite are refused."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from runs import as_config
from tiny import tiny_config, write_tiny_log
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor

from recsys.config import Config
from recsys.data.splits import open_splits, train_order
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.shard import shard
from recsys.training.finite import FirstNotFinite, Moment, NotFinite, NotFiniteError, check_weights, end_not_finite

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))
NAN, INF = float("nan"), float("inf")
NOW = Moment(7, "joint", lambda: None)


def arch(device: str = "cpu") -> nn.Module:
    """Two parameters that train, and one that does not."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1, bias=False)).to(device)
    for parameter in module[0].parameters():
        parameter.grad = torch.ones_like(parameter)
    return module


def losses(click: float = 0.5, balance: float = 1.0, device: str = "cpu") -> dict[str, Tensor]:
    return {"bce": torch.tensor(click, device=device), "balance": torch.tensor(balance, device=device)}


@pytest.mark.usefixtures("process_group")
def test_what_is_finite_is_not_found_however_large() -> None:
    first = FirstNotFinite(arch(), ALONE)
    assert first.read() is None
    for step in (1, 2):
        first.observe(step, losses(3e38), torch.full((4, 3), 3e38))
    first.observe(3, losses(), torch.empty(0, 3))
    first.observe(4, losses(), torch.empty(4, 0))
    assert first.read() is None


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("place", "what", "is_shared"),
    [
        ("dense", "a dense feature", False),
        ("bce", "the loss bce", False),
        ("balance", "the loss balance", False),
        ("gradient", "the norm of the dense gradients", True),
    ],
)
def test_the_first_step_and_what_it_was_are_kept(value: float, place: str, what: str, is_shared: bool) -> None:
    module, dense = arch(), torch.ones(4, 3)
    first = FirstNotFinite(module, ALONE)
    first.observe(1, losses(), dense)
    spoilt = dense.clone()
    bias = module[0].bias.grad
    if place == "dense":
        spoilt[2, 1] = value
    if place == "gradient":
        bias[1] = value
    first.observe(2, losses(value if place == "bce" else 0.5, value if place == "balance" else 1.0), spoilt)
    bias.fill_(1.0)
    first.observe(3, losses(NAN, NAN), torch.full((4, 3), NAN))
    first.observe(4, losses(), dense)
    assert first.read() == first.read() == NotFinite(2, 0, what, is_shared)


@pytest.mark.usefixtures("process_group")
def test_of_one_step_what_leads_to_the_rest_is_named() -> None:
    for dense, click, what in ((NAN, NAN, "a dense feature"), (1.0, NAN, "the loss bce")):
        module = arch()
        module[0].weight.grad.fill_(NAN)
        first = FirstNotFinite(module, ALONE)
        first.observe(9, losses(click), torch.full((2, 3), dense))
        assert first.read() == NotFinite(9, 0, what, False)


@pytest.mark.usefixtures("process_group")
def test_a_gradient_whose_norm_overflows_is_found() -> None:
    """Its square, which AdamW keeps, is infinite, and the parameter would never move again."""
    module = arch()
    module[0].weight.grad.fill_(3e19)
    first = FirstNotFinite(module, ALONE)
    first.observe(1, losses(), torch.ones(2, 3))
    assert first.read() == NotFinite(1, 0, "the norm of the dense gradients", True)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("at", [1, 63, 64, 65, 128, 150, 200])
def test_a_step_is_kept_over_any_number_of_others(at: int) -> None:
    first = FirstNotFinite(arch(), ALONE)
    for step in [*range(1, 101), *range(121, 221)]:  # as where a part of the steps was taken elsewhere
        first.observe(step, losses(NAN if step >= at else 0.5), torch.ones(2, 3))
    assert first.read() == NotFinite(at, 0, "the loss bce", False)


@pytest.mark.usefixtures("process_group")
def test_the_gradients_of_now_are_watched_whatever_memory_they_are_in() -> None:
    module, bucket = arch(), torch.ones(11)
    first = FirstNotFinite(module, ALONE)
    places = {"weight": bucket[:6].view(2, 3), "bias": bucket[6:8]}  # in a bucket that holds another's as well
    full = torch.ones(8)
    fills = {"weight": full[2:].view(2, 3), "bias": full[:2]}
    for step, gradients in enumerate((places, fills, fills), start=1):
        for name, gradient in gradients.items():
            getattr(module[0], name).grad = gradient
        bucket[8:] = NAN  # no gradient of these parameters
        first.observe(step, losses(), torch.ones(2, 3))
    assert first.read() is None
    full[4] = NAN
    first.observe(4, losses(), torch.ones(2, 3))
    module[0].bias.grad = torch.ones(2)
    module[0].weight.grad = torch.ones(2, 3)
    first.observe(5, losses(), torch.ones(2, 3))
    assert first.read() == NotFinite(4, 0, "the norm of the dense gradients", True)


def test_observing_never_asks_the_device_for_a_value() -> None:
    """A tensor on the meta device has none, so that whoever asked for one would fail."""
    first = FirstNotFinite(arch("meta"), Ranks(0, 1, 0, 1, torch.device("meta")))
    for step in (1, 2):
        first.observe(step, losses(device="meta"), torch.ones(4, 3, device="meta"))
    with pytest.raises(RuntimeError):
        int(first._values[0, 0])


def _first_of(ranks: Ranks, spoilt: dict[int, tuple[int, str]]) -> NotFinite | None:
    module = arch()
    first = FirstNotFinite(module, ranks)
    at, what = spoilt[ranks.rank]
    for step in range(1, 7):
        module[0].weight.grad.fill_(INF if step >= at else 1.0)
        first.observe(step, losses(NAN if what == "loss" and step >= at else 0.5), torch.ones(2, 3))
    return first.read()


@pytest.mark.parametrize(
    ("spoilt", "expected"),
    [
        ({0: (4, "gradient"), 1: (4, "loss")}, NotFinite(4, 1, "the loss bce", False)),
        ({0: (5, "loss"), 1: (3, "gradient")}, NotFinite(3, 1, "the norm of the dense gradients", True)),
        ({0: (4, "loss"), 1: (4, "loss")}, NotFinite(4, 0, "the loss bce", False)),
        ({0: (9, "loss"), 1: (9, "loss")}, None),
    ],
)
def test_all_ranks_learn_the_first_of_all(spoilt: dict[int, tuple[int, str]], expected: NotFinite | None) -> None:
    assert run_ranks(2, _first_of, spoilt) == [expected, expected]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def _ended(ranks: Ranks, config: Config, found: NotFinite, epoch_step: int, last_good: Path | None) -> str:
    shards = open_splits(config, ["train"])["train"]
    order = train_order(shards, config, ranks.world_size, 1)
    directory = Path(config.output_dir)
    with pytest.raises(NotFiniteError) as caught:
        end_not_finite(
            found, shards, order, epoch_step, ranks, directory, Moment(found.step, "joint", lambda: last_good)
        )
    return str(caught.value)


def test_the_end_names_step_rank_files_rows_and_the_way_out(log: Path, tmp_path: Path) -> None:
    config = as_config(tiny_config(log, tmp_path / "out"), tmp_path)
    last_good = tmp_path / "out/checkpoints/step-30"
    found = NotFinite(38, 1, "the loss bce", False)
    told, again = run_ranks(2, _ended, config, found, 7, last_good)
    assert told == again
    dump = tmp_path / "out/not-finite-rank1-step38.parquet"
    assert [path.name for path in (tmp_path / "out").iterdir()] == [dump.name]
    rows = pq.read_table(dump)
    assert len(rows) == 32
    named = {(row["file"], row["row_group"]) for row in rows.select(["file", "row_group"]).to_pylist()}
    for file, group in named:
        assert str(group) in told.split(f"{file} (row group", 1)[1].split(")")[0]
    assert told.startswith(f"step 38, rank 1: the loss bce is not finite; its batch is of {log}/train/part-")
    largest = max(rows["dense/x"].to_pylist() + rows["dense/scale"].to_pylist(), key=abs)
    assert f"; its rows are in {dump} (largest dense value: {largest:.3g}, of " in told
    assert f"; the last good checkpoint is {last_good}; lower the learning rates of stages.joint, or mend rows" in told
    assert "\n" not in told


def test_a_gradient_is_of_the_batches_of_all_ranks(log: Path, tmp_path: Path) -> None:
    config = as_config(tiny_config(log, tmp_path / "out"), tmp_path)
    found = NotFinite(3, 0, "the norm of the dense gradients", True)
    told, again = run_ranks(2, _ended, config, found, 2, None)
    assert told == again
    assert "the batches of all ranks are of " in told and "; no checkpoint had been saved before; " in told
    dumped = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert dumped == ["not-finite-rank0-step3.parquet", "not-finite-rank1-step3.parquet"]


def test_a_dump_that_cannot_be_written_is_said_and_all_the_rest_as_well(log: Path, tmp_path: Path) -> None:
    config = as_config(tiny_config(log, tmp_path / "out"), tmp_path)
    (tmp_path / "out").write_text("a file")
    told, again = run_ranks(2, _ended, config, NotFinite(3, 1, "the loss bce", False), 2, None)
    assert told == again
    assert told.startswith("step 3, rank 1: the loss bce is not finite; its batch is of ")
    assert "could not be kept in" in told and "File exists" in told


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_weight_that_is_not_finite_is_named(value: float) -> None:
    weights = {"a": torch.ones(3, 4), "none": torch.empty(0, 4), "number": torch.tensor(3), "b": torch.ones(5)}
    check_weights(weights, ALONE, NOW)
    for spoilt in ("a", "b"):
        bad = weights[spoilt].clone()
        bad.view(-1)[2] = value
        with pytest.raises(NotFiniteError, match=f"step 7, rank 0: the weights {spoilt} are not all finite"):
            check_weights({**weights, spoilt: bad}, ALONE, NOW)


@pytest.mark.usefixtures("process_group")
def test_looking_at_weights_takes_no_memory_that_grows_with_them() -> None:
    table = torch.ones(1 << 20, 8)
    for weights in (table, table[:, 2:6]):  # the second would be copied as a whole by whoever looked at it at once
        with torch.profiler.profile(profile_memory=True) as profile:
            check_weights({"table": weights}, ALONE, NOW)
        allocated = [event.self_cpu_memory_usage for event in profile.events()]
        assert max(allocated) <= weights[: 1 << 16].numel() * 4
        assert sum(filter(lambda bytes_: bytes_ > 0, allocated)) > 0  # it was watched


def _spoil_a_table(ranks: Ranks, config: Config, table: str) -> str:
    sharded = shard(build_ranker(config, seed=0), config, ranks, seed=0)
    (collection,) = sharded.ranker.collections.values()
    weights: dict[str, Any] = collection.state_dict()
    check_weights(weights, ranks, NOW)
    value = weights[f"embedding_bags.{table}.weight"]
    parts = [part.tensor for part in value.local_shards()] if isinstance(value, ShardedTensor) else [value]
    if ranks.rank == ranks.world_size - 1 or table != "item":  # of its columns, those of the last rank
        for part in parts:
            part.data[-1, -1] = NAN
    with pytest.raises(NotFiniteError) as caught:
        check_weights(weights, ranks, NOW)
    return str(caught.value)


@pytest.mark.parametrize("table", ["user", "item", "tag"])
def test_a_table_is_looked_at_on_every_rank_that_has_a_part_of_it(log: Path, tmp_path: Path, table: str) -> None:
    config = as_config(tiny_config(log, tmp_path / "out"), tmp_path)
    told, again = run_ranks(2, _spoil_a_table, config, table)
    assert told == again
    assert f"the weights embedding_bags.{table}.weight are not all finite" in told
    assert table != "item" or "rank 1: " in told
