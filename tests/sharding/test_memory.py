"""What the planner knows of machines and data: their memory, what tables take of it, and how long lists are."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_ranks
from runs import as_config
from tiny import tiny_config, write_tiny_log
from torchrec.distributed.planner.types import Storage

from recsys.config import Config
from recsys.data.splits import open_splits
from recsys.host_memory import host_memory
from recsys.runtime import Ranks
from recsys.sharding.machine import RESERVED, Machine, this_machine
from recsys.sharding.memory import Beside
from recsys.sharding.plan import Plan, plan_as_dict
from recsys.training.monitor import Monitor
from recsys.training.run import Trainer

GIB = 1 << 30


def _shares(ranks: Ranks) -> list[int]:
    return [device.storage.ddr for device in this_machine(ranks).topology(ranks).devices]


def test_ranks_share_the_memory_of_their_machine() -> None:
    share = int((1 - RESERVED) * host_memory()) // 2
    assert run_ranks(2, _shares) == [[share, share]] * 2


def test_bandwidths_reach_the_planner_in_its_unit() -> None:
    ranks = Ranks(0, 4, 0, 2, torch.device("cuda"))
    told, known = Machine(80 * GIB, 64 * GIB, 300e9, 50e9).topology(ranks), Machine(80 * GIB, 64 * GIB).topology(ranks)
    assert (told.intra_host_bw, told.inter_host_bw) == (300e6, 50e6)  # bytes a millisecond
    assert (known.intra_host_bw, known.inter_host_bw) == (600 * GIB / 1000, 12.5 * GIB / 1000)
    assert [device.storage.hbm for device in told.devices] == [int((1 - RESERVED) * 80 * GIB)] * 4


def _planned(ranks: Ranks, config: Config) -> dict[str, Any]:
    splits = open_splits(config, config.data.splits)
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        sharded = Trainer(config, ranks, splits, monitor).sharded
    return {name: of["ranks"] for name, of in plan_as_dict(sharded.plan, config.tables).items()}


@pytest.mark.parametrize(
    ("device", "kernel", "hbm", "ddr"),
    [("cuda", "fused", 5 * 4 * 4 + 5 * 8, 0), ("cuda", "fused_uvm", 5 * 8, 5 * 4 * 4), ("cpu", "fused", 0, 5 * 24)],
)
def test_what_each_row_has_is_on_the_gpu_wherever_the_rows_are(device: str, kernel: str, hbm: int, ddr: int) -> None:
    """As fbgemm has the sum of rowwise Adagrad, and `recsys.sharding.rows` the steps that rows have had."""
    shard = SimpleNamespace(size=[5, 4], storage=None)
    option: Any = SimpleNamespace(shards=[shard], compute_kernel=kernel)
    Beside(kept=1, row_bytes=8, gradients=0, is_copied=False).add_to(option, device)
    assert shard.storage == Storage(hbm=hbm, ddr=ddr)


def test_a_table_of_long_lists_has_a_rank_for_itself(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    for file in (tmp_path / "log").glob("*/*"):
        table = pq.read_table(file)
        lists = pa.array([[row % 12] * 60 for row in range(len(table))])
        table = table.set_column(table.schema.get_field_index("tags"), "tags", lists)
        pq.write_table(table.append_column("other", table["user"]), file)
    raw = tiny_config(tmp_path / "log", tmp_path / "out")
    raw["tables"] = {name: {"num_embeddings": 40, "embedding_dim": 8} for name in ("user", "item", "tag", "other")}
    raw["features"]["sparse"]["other"] = {"table": "other"}
    first, second = run_ranks(2, _planned, as_config(raw, tmp_path))
    assert first == second
    others = {rank for name, ranks in first.items() for rank in ranks if name != "tag"}
    assert len(others) == 1 and not others & set(first["tag"])


def _grown(ranks: Ranks, config: Config) -> tuple[int, int]:
    """By how many bytes a run grew beyond what it had before there were tables, and by how many by the plan."""
    splits = open_splits(config, config.data.splits)
    before = _resident("VmRSS")
    with Monitor(Path(config.output_dir), enabled=False) as monitor:
        trainer = Trainer(config, ranks, splits, monitor)
        trainer.run()
    assert isinstance(trainer.sharded.plan, Plan)
    return _resident("VmHWM") - before, trainer.sharded.plan.memory[ranks.rank].ddr


def _resident(key: str) -> int:
    fields = Path("/proc/self/status").read_text().split()
    return 1024 * int(fields[fields.index(f"{key}:") + 1])


def test_a_run_takes_the_memory_that_its_plan_estimates(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    (tmp_path / "out").mkdir()
    raw = tiny_config(tmp_path / "log", tmp_path / "out")
    raw["stages"] = {"backbone": {**raw["stages"]["backbone"], "epochs": 1}}
    del raw["model"]["hilomoe"]
    found = {}
    for optimizer, rows in (("sgd", 40), ("rowwise_adagrad", 1 << 19), ("adagrad", 1 << 19)):
        raw["tables"]["user"] |= {"num_embeddings": rows, "embedding_dim": 64}  # 128 MiB
        raw["optimizers"] = {"sparse": {"type": optimizer}}
        (found[optimizer],) = run_ranks(1, _grown, as_config(raw, tmp_path))
    rest, without = found.pop("sgd")  # what any run allocates
    assert {name: estimated >> 20 for name, (_, estimated) in found.items()} == {"rowwise_adagrad": 260, "adagrad": 512}
    for name, (grown, estimated) in found.items():
        print(f"{name}: {(grown - rest) / 2**20:.1f} MiB, estimated {(estimated - without) / 2**20:.1f} MiB")
        more, least = grown - rest, estimated - without
        assert 0.95 * least < more < 1.05 * least + (64 << 20)  # weights are drawn in blocks, which a process keeps
