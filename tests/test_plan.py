"""The planning command: what it prints is what a run on so many ranks does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import Finished, run_module, run_ranks
from tiny import write_tiny_config

from recsys.config import Config, load_config
from recsys.model.cost import cost_report
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.plan import plan_rows
from recsys.sharding.shard import shard

ROOT = Path(__file__).parents[1]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Of a log that does not exist."""
    return write_tiny_config(tmp_path / "tiny.yaml", tmp_path / "log", tmp_path / "out")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recsys.plan", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def _rows(ranks: Ranks, config: Config) -> list[dict[str, str]]:
    return plan_rows(shard(build_ranker(config, seed=0), config, ranks, seed=0).plan, config.tables)


def test_the_plan_is_that_of_a_run_on_as_many_ranks(config: Path) -> None:
    done = run("--config", str(config), "--nproc", "2", "--json", "--ids", "tags=1.5", "device=cpu")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout)
    loaded = load_config(config)
    assert (told["name"], told["world_size"], told["device"]) == ("tiny", 2, "cpu")
    first, second = run_ranks(2, _rows, loaded)
    assert told["plan"] == first == second
    assert {rank for row in first for rank in row["ranks"].split()} == {"0", "1"}
    assert told["cost"] == cost_report(loaded, {"tags": 1.5}).as_dict()
    assert not Path(loaded.output_dir).exists()


@pytest.mark.slow
def test_a_run_on_gpus_can_be_planned_without_any() -> None:
    done = run("--config", "configs/production.yaml", "--nodes", "2", "--gpus-per-node", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "table_row_wise" in done.stdout
    assert "8 9 10 11 12 13 14 15" in done.stdout
    assert "1,024.0 GiB (assumed) of host memory for its 8 ranks, and GPUs of 80.0 GiB (assumed)" in done.stdout
    for text in ("against dcn_v2 num_cross_layers=3 1024x512x256", "experts", "training takes about three times"):
        assert text in done.stdout


def plan(config: Path, *arguments: str) -> Finished:
    """As `run`, without the seconds that imports take."""
    return run_module(1, "recsys.plan", "--config", str(config), *arguments)[0]


LARGE = "tables.user.num_embeddings=3825205248"  # of 8 columns: 114 GiB
WHOLE = (
    "256.50 GiB of host memory on one rank (table_wise, fused)"  # with a sum for each row, and the checkpoint's copy
)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((LARGE, "--ddr", "24"), f"tables.user needs {WHOLE}, and each has 20.40 for tables; make it smaller, or take"),
        ((LARGE, "--ddr", "200"), "has 170.00 for tables; set checkpoints.asynchronous to false, or"),
        ((LARGE, "--ddr", "400", "--nproc", "2"), "; set tables.user.min_partition to 4, or"),
        (
            (LARGE, "--ddr", "400", "--nproc", "2", "tables.user.sharding=[table_wise]"),
            "; set tables.user.min_partition to 4 and have column_wise in tables.user.sharding, or",
        ),
        (
            (LARGE, "--ddr", "512", "--gpus-per-node", "1", "--hbm", "80", "tables.user.compute_kernel=fused"),
            "128.25 GiB of GPU memory on one rank (table_wise, fused), and each has 68.00 for tables; "
            "set tables.user.compute_kernel to null, or",
        ),
        (
            (LARGE, "--ddr", "500", "tables.item.num_embeddings=3825205248"),
            "each table would fit alone, but together they need 541.50 GiB in 4 shards, which do not go into the "
            "425.00 that all ranks have for tables; the largest is tables.item (285.00, column_wise)",
        ),
    ],
)
def test_what_has_no_place_is_named_with_its_size_and_what_would_help(
    config: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = plan(config, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: tables: the planner found no placement on ") and done.stderr.count("\n") == 1
    assert message in done.stderr


def test_rows_that_lie_on_one_gpu_are_not_divided(config: Path) -> None:
    kinds = {
        row["table"]: row["sharding"]
        for row in json.loads(plan(config, "--gpus-per-node", "1", "--json").stdout)["plan"]
    }
    assert kinds["user"] == "table_wise" and not any("row_wise" in kind for kind in kinds.values())


@pytest.mark.parametrize(
    ("keys", "width"),
    [
        (("embedding_dim=2048",), 1024),
        (("embedding_dim=2084", "sharding=[column_wise]"), 4),
        (("embedding_dim=1028", "sharding=[table_column_wise]"), 4),
        (("embedding_dim=3000", "sharding=[column_wise]", "min_partition=1024"), 1000),
        (("embedding_dim=2048", "max_norm=1.0"), None),
    ],
)
def test_no_shard_is_wider_than_a_gpu_can_look_up(config: Path, keys: tuple[str, ...], width: int | None) -> None:
    given = ["--gpus-per-node", "1", "--json", *(f"tables.user.{key}" for key in keys)]
    refused = plan(config, *given).stderr
    assert refused.startswith("error: tables.user.embedding_dim: a GPU would have ") and refused.count("\n") == 1
    if width is None:
        assert refused.endswith("at most rightly; make it smaller\n")
        return
    assert refused.endswith(f", or set tables.user.sharding to [column_wise] and min_partition to {width}\n")
    way_out = ("tables.user.sharding=[column_wise]", f"tables.user.min_partition={width}")
    (user,) = (row for row in json.loads(plan(config, *given, *way_out).stdout)["plan"] if row["table"] == "user")
    assert {int(shard.split("x")[1]) for shard in user["shards"].split()} == {width}


def test_a_table_is_kept_on_the_gpu_that_has_room_for_it(config: Path) -> None:
    table = "tables.user.num_embeddings=1275068416"  # 38 GiB, and 4.75 of the sum for each row
    kernels = []
    for hbm in ("80", "40"):
        done = plan(config, table, "--gpus-per-node", "1", "--hbm", hbm, "--ddr", "128", "--json", "--ids", "tags=0")
        assert (done.code, done.stderr) == (0, "")
        told = json.loads(done.stdout)
        kernels.append(told["plan"][0]["kernel"])
        assert told["machine"] == {"hbm": int(hbm) << 30, "ddr": 128 << 30, "intra_bw": None, "inter_bw": None}
        (memory,) = told["memory"]
        # A fifth of the rows, where each of them is, and the optimizer's sum of each row.
        in_cache = 0.2 * 38 + 1.1875 * (4 + 0.2 * 16) + 1.1875 * 4
        assert memory["hbm"] / 2**30 == pytest.approx(42.75 if hbm == "80" else in_cache, rel=0.001)
    assert kernels == ["fused", "fused_uvm_caching"]


def test_slow_links_keep_a_table_in_one_piece(config: Path) -> None:
    shardings = []
    for options in ((), ("--intra-bw", "0.001")):
        done = plan(config, "--nodes", "2", "--gpus-per-node", "2", "--json", *options)
        shardings.append(json.loads(done.stdout)["plan"][0]["sharding"])
    assert shardings == ["table_row_wise", "table_wise"]


def test_what_moved_since_another_plan_is_told(config: Path, tmp_path: Path) -> None:
    before = plan(config, "--json", "--nproc", "2", "device=cpu")
    other = tmp_path / "other.json"
    other.write_text(before.stdout)
    change = ("tables.item.min_partition=8",)
    told = json.loads(plan(config, "--json", "--nproc", "2", "device=cpu", "--diff", str(other), *change).stdout)
    moved = {row["table"]: (row["from"], row["to"]) for row in told["moves"]}
    assert moved["item"] == ("column_wise fused on 0 1: 30x4 30x4", "column_wise fused on 1: 30x8")
    assert moved.keys() <= {"item", "user"}
    same = plan(config, "--nproc", "2", "device=cpu", "--diff", str(other))
    assert f"No table moved since {other}" in same.stdout
    other.write_text('{"plan": [{"table": "item"}]}')
    refused = plan(config, "--diff", str(other))
    assert (refused.code, refused.stdout) == (2, "")
    assert refused.stderr == f"error: {other}: it is no plan; --diff takes what recsys.plan --json printed\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hbm", "80", "device=cpu"), "error: device: --hbm is the memory of GPUs, and the plan is for CPUs"),
        (("--gpus-per-node", "2", "device=cpu"), "error: device: --gpus-per-node plans for GPUs, and device is cpu"),
        (("--intra-bw", "1e-300"), "'1e-300' is no number from 1e-6 to 1e9\n"),
        (("--ddr", "0"), "'0' is no number from 1e-6 to 1e9\n"),
        (("--ids", "tag=2"), "error: ids per example: 'tag' is no sparse feature; there are item, tags, user\n"),
        (("--ids", "tags"), "'tags' is not of the form feature=mean\n"),
        (("--ids", "tags=nan"), "'tags=nan' is not of the form feature=mean\n"),
        (("--ids", "tags=1e308"), "'tags=1e308' is not of the form feature=mean\n"),
        (("--nodes", "100000000"), "error: 100,000,000 ranks are more than the 16,384 that can be planned\n"),
        (("--nproc", "0"), "'0' is no number of at least 1\n"),
        ((f"model.tower.hidden=[{'65536,' * 64}]",), "error: model: its dense part takes "),
        (
            ("optimizers.dense.type=muon", "model.tower.hidden=[]", "model.hilomoe.experts_in=[head]"),
            "error: optimizers.dense.type is muon, but the model has no hidden matrix",
        ),
        (("tables.user.sharding=[row_wise]", "device=cpu"), "on a CPU there are table_wise, column_wise"),
    ],
)
def test_what_cannot_be_planned_is_one_error(config: Path, arguments: tuple[str, ...], message: str) -> None:
    done = plan(config, *arguments)
    assert (done.code, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
