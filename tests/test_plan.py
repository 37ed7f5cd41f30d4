"""The planning command: what it prints is what a run on so many ranks does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks
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


def test_a_run_on_gpus_can_be_planned_without_any() -> None:
    done = run("--config", "configs/production.yaml", "--nnodes", "2", "--nproc", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert "table_row_wise" in done.stdout
    assert "8 9 10 11 12 13 14 15" in done.stdout
    for text in ("against dcn_v2 num_cross_layers=3 1024x512x256", "experts", "training takes about three times"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ids", "tag=2"), "error: ids per example: 'tag' is no sparse feature; there are item, tags, user\n"),
        (("--ids", "tags"), "'tags' is not of the form feature=mean\n"),
        (("--ids", "tags=nan"), "'tags=nan' is not of the form feature=mean\n"),
        (("--nproc", "0"), "'0' is no number of at least 1\n"),
        ((f"model.tower.hidden=[{'65536,' * 64}]",), "error: model: its dense part takes "),
        (
            ("optimizers.dense.type=muon", "model.tower.hidden=[]", "model.hilomoe.experts_in=[head]"),
            "error: optimizers.dense.type is muon, but the model has no hidden matrix",
        ),
        ((f"tables.user.num_embeddings={2**40}",), "the planner found no placement on 1 ranks"),
        (("tables.user.sharding=[row_wise]", "device=cpu"), "on a CPU there are table_wise, column_wise"),
    ],
)
def test_what_cannot_be_planned_is_one_error(config: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run("--config", str(config), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
