"""Training over several ranks, end to end on a tiny log."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors, train_on
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray
from tiny import tiny_config, write_tiny_log

from recsys.config import Config, ConfigError, load_config
from recsys.data.splits import open_splits
from recsys.model.cost import cost_report
from recsys.model.experts import expert_layers
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks, derive_seed
from recsys.training.evaluation import evaluate
from recsys.training.metrics import Metrics
from recsys.training.monitor import Monitor
from recsys.training.optimizers import begin_phase
from recsys.training.run import Trainer, train

BACKBONE = {"trains": "backbone", "steps": 4, "learning_rate": 0.01, "sparse_learning_rate": 0.1}
EXPERTS = {"trains": "experts", "steps": 4, "learning_rate": 0.01, "balance_weight": 0.01, "diversity_weight": 0.1}
JOINT = {"trains": "all", "steps": 4, "learning_rate": 0.01, "sparse_learning_rate": 0.1, "z_weight": 0.001}

RATES = {"learning_rate": 1.0, "sparse_learning_rate": 1.0}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def normalized(log: Path, output_dir: Path) -> dict[str, Any]:
    """The tiny config, its perceptron with batch norms."""
    raw = tiny_config(log, output_dir)
    raw["model"]["tower"] |= {"normalization": "batch", "activation": "prelu"}
    return raw


@pytest.fixture(scope="module")
def run(log: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outputs of that on two ranks."""
    output_dir = tmp_path_factory.mktemp("run")
    run_ranks(2, train_on, as_config(normalized(log, output_dir), output_dir))
    return output_dir


def test_a_run_leaves_what_it_says(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert list(summary["stages"]) == ["backbone", "experts", "joint"]
    # 900 rows, 450 a rank, batches of 32: 15 steps an epoch.
    assert [stage["steps"] for stage in summary["stages"].values()] == [30, 15, 20]
    assert summary["steps"] == 65
    assert summary["stages"]["backbone"]["examples"] == 1800
    assert (summary["valid"]["examples"], summary["test"]["examples"]) == (200, 251)
    assert summary["reference"]["auc"] > 0.7
    assert list(summary["domains"]) == ["home", "search", "cart"]
    assert sum(metrics["examples"] for metrics in summary["domains"].values()) == 251
    told = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [(line["source"], line["split"], line["step"], line["epochs"]) for line in told] == [
        ("backbone", "valid", 30, 2),
        ("experts", "valid", 45, 3),
        ("joint", "valid", 65, 5),
        ("final", "test", 65, 5),
        ("reference", "test", 65, 5),
    ]
    assert summary["test"].items() <= told[3].items()
    assert summary["cost"] == cost_report(load_config(run / "config.yaml")).as_dict()
    assert load_config(run / "config.yaml").name == "tiny"
    assert "table_wise" in (run / "plan.txt").read_text()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-30", "step-45", "step-65"]


def test_the_expert_stage_leaves_backbone_and_tables_bit_identical(run: Path, tmp_path: Path) -> None:
    before = checkpoint_tensors(run / "checkpoints" / "step-30", tmp_path)
    after = checkpoint_tensors(run / "checkpoints" / "step-45", tmp_path)
    names = {name for name in before if not name.startswith("optimizer.dense.")}
    assert any(name.startswith("optimizer.sparse.") for name in names)
    assert any(name.startswith("optimizer.data_parallel.") for name in names)
    assert "model.dense_arch.tower.norms.1.running_var" in names
    changed = {name for name in names if not torch.equal(before[name], after[name])}
    assert changed == {name for name in names if name.endswith(("lora_A", "lora_B"))}


def test_the_joint_stage_changes_every_table_and_weight(run: Path, tmp_path: Path) -> None:
    before = checkpoint_tensors(run / "checkpoints" / "step-45", tmp_path)
    after = checkpoint_tensors(run / "checkpoints" / "step-65", tmp_path)
    model = {name for name in before if name.startswith("model.")}
    assert not {name for name in model if torch.equal(before[name], after[name])}


def test_the_same_seed_gives_the_same_bits(run: Path, log: Path, tmp_path: Path) -> None:
    run_ranks(2, train_on, as_config(normalized(log, tmp_path / "again"), tmp_path))
    first = checkpoint_tensors(run / "checkpoints" / "step-65", tmp_path)
    second = checkpoint_tensors(tmp_path / "again" / "checkpoints" / "step-65", tmp_path)
    assert first.keys() == second.keys()
    assert not {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluate_reproduces_the_runs_test_figures_on_any_world_size(run: Path, world_size: int) -> None:
    summary = json.loads((run / "summary.json").read_text())
    first, *others = run_module(world_size, "recsys.evaluate", "--checkpoint", summary["checkpoint"], "--json")
    assert first.code == 0, first.stderr
    assert not any(rank.stdout for rank in others)
    found = json.loads(first.stdout)
    assert found["model"] == pytest.approx(summary["test"], abs=1e-6)
    for name, figures in summary["domains"].items():
        assert found["domains"][name] == pytest.approx(figures, abs=1e-6)
    over, over_then = (it["reference"].pop("over_domains") for it in (found, summary))
    assert over["wauc"] == pytest.approx(over_then["wauc"], abs=1e-6) and over["domains"] == 3
    assert {"column": "truth", **found["reference"]} == pytest.approx(summary["reference"], abs=1e-6)
    assert (found["split"], found["step"]) == ("test", 65)


def test_rows_without_label_are_predicted_as_those_with_one(run: Path, log: Path, tmp_path: Path) -> None:
    checkpoint = json.loads((run / "summary.json").read_text())["checkpoint"]
    unlabelled = tmp_path / "unlabelled"
    unlabelled.mkdir()
    for file in sorted((log / "test").glob("*.parquet")):
        pq.write_table(pq.read_table(file).drop(["label", "truth"]), unlabelled / file.name)
    given = ("--checkpoint", checkpoint, "--predictions")
    (labelled,) = run_module(1, "recsys.evaluate", *given, str(tmp_path / "with"))
    assert labelled.code == 0, labelled.stderr
    overrides = ("data.label=null", "data.reference=null", f"data.test={unlabelled}/*.parquet")
    first, *_ = run_module(2, "recsys.evaluate", *given, str(tmp_path / "without"), "--json", *overrides)
    assert first.code == 0, first.stderr
    assert {"predictions", "rows"} <= (found := json.loads(first.stdout)).keys() and "model" not in found
    assert found["rows"] == 251
    expected, got = pq.read_table(tmp_path / "with"), pq.read_table(tmp_path / "without")
    assert got.schema.names == ["probability", "domain"] and got["domain"] == expected["domain"]
    assert got["probability"].to_pylist() == pytest.approx(expected["probability"].to_pylist(), abs=1e-6)
    (told,) = run_module(1, "recsys.evaluate", *given, str(tmp_path / "more"), *overrides)
    assert told.code == 0 and f"251 predictions in {tmp_path / 'more'} ({checkpoint}, test)" in told.stdout
    (refused,) = run_module(1, "recsys.evaluate", "--checkpoint", checkpoint, *overrides)
    assert refused.code == 2 and "data.label: null leaves nothing to measure" in refused.stderr


def test_training_needs_a_label(log: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.label: null is for evaluating"):
        train(
            as_config(
                {**tiny_config(log, tmp_path), "data": {**tiny_config(log, tmp_path)["data"], "label": None}}, tmp_path
            )
        )


def test_tensorboard_holds_what_one_watches(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {
        *(f"train/{name}" for name in ("bce", "balance", "z", "auc", "log_loss", "ne", "calibration")),
        *(f"{split}/{name}" for split in ("valid", "test") for name in ("auc", "log_loss", "ne", "calibration")),
        *(f"learning_rate/{name}" for name in ("dense", "sparse", "data_parallel")),
        "throughput/examples_per_second",
        "throughput/data_wait",
        "gradient_norm/dense",
        "routing_entropy/tower.linears.0/layer1",
        "routing_load/tower.linears.1/layer2/expert3",
        "routing_cv/tower.linears.0/layer2",
        "routing_dead/tower.linears.1/layer1",
        "routing_paths/tower.linears.1",
    } <= scalars
    assert "train/diversity" not in scalars  # it has no weight
    loads = [events.Scalars(f"routing_load/tower.linears.0/layer1/expert{k}")[-1].value for k in (1, 2, 3)]
    assert sum(loads) == pytest.approx(1.0, abs=1e-5)
    assert len(events.Scalars("valid/auc")) == 3
    texts = {f"{name}/text_summary" for name in ("config", "plan", "cost", "stages")}
    assert texts <= set(events.Tags()["tensors"])
    assert "_hparams_/experiment" in events.summary_metadata


def test_tensorboard_holds_the_cost_by_part(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    cost = json.loads((run / "summary.json").read_text())["cost"]
    for figure, tag in (("flops", "flops_per_example"), ("parameters", "parameters")):
        for part, value in cost[figure].items():
            assert [point.value for point in events.Scalars(f"cost/{tag}/{part}")] == [value]
    (text,) = events.Tensors("cost/text_summary")[0].tensor_proto.string_val
    for expected in (
        "Cost of hilomoe mlp 16x8 activation=prelu normalization=batch L2 K3 against mlp 16x8 activation=prelu ",
        "| experts | ",
        "- 1 id for each sparse feature",
    ):
        assert expected in text.decode()
    metrics = events.summary_metadata["_hparams_/experiment"].plugin_data.content
    assert b"cost/flops_per_example/total" in metrics


def test_the_summary_tells_how_the_experts_were_used(run: Path) -> None:
    stages = json.loads((run / "summary.json").read_text())["stages"]
    assert stages["backbone"]["routing"] == {}
    for stage in ("experts", "joint"):
        routing = stages[stage]["routing"]
        assert routing.keys() == {"tower.linears.0", "tower.linears.1"}
        for linear in routing.values():
            assert linear.keys() == {"layer1", "layer2", "paths"}
            assert 1 <= linear["paths"] <= 3**2
            for layer in (linear["layer1"], linear["layer2"]):
                assert 0 < layer["entropy"] <= math.log(3)
                assert 0 < layer["cv"] < math.sqrt(2)
                assert layer["dead"] == []


def test_figures_over_domains_are_shown_and_recorded(run: Path) -> None:
    """Those of every evaluation, of each stage's end, and of the test split."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0, "scalars": 0})
    events.Reload()
    summary = json.loads((run / "summary.json").read_text())
    over = summary["over_domains"]
    domains = summary["domains"]
    rows = sum(figures["examples"] for figures in domains.values())
    assert over["wauc"] == pytest.approx(sum(f["examples"] * f["auc"] for f in domains.values()) / rows)
    assert over["worst_auc"] == domains[over["worst"]]["auc"] == min(f["auc"] for f in domains.values())
    for figure in ("wauc", "mean_auc", "worst_auc"):
        (shown,) = events.Scalars(f"test/{figure}")
        assert shown.value == pytest.approx(over[figure])
    assert [event.step for event in events.Scalars("valid/wauc")] == [
        image.step for image in events.Images("valid_by_domain")
    ]
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["over_domains"]["domains"] for line in lines] == [3] * len(lines)
    assert lines[-2]["domains"] == {name: figures["auc"] for name, figures in domains.items()}
    assert all(line["domains"].keys() == domains.keys() for line in lines[:-1])
    assert summary["reference"]["over_domains"] == lines[-1]["over_domains"] != over
    assert summary["stages"]["joint"]["over_domains"]["wauc"] == lines[-3]["over_domains"]["wauc"]


def test_tensorboard_shows_which_experts_each_domain_used(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
    events.Reload()
    tags = {f"routing_by_domain/tower.linears.{number}" for number in (0, 1)}
    assert {tag for tag in events.Tags()["images"] if tag.startswith("routing")} == tags
    for tag in tags:
        # The one epoch of the expert stage, and the whole and the cut-off one of the joint stage.
        assert [image.step for image in events.Images(tag)] == [45, 60, 65]
        assert all(image.width > 300 and image.height > 100 for image in events.Images(tag))
        text = make_ndarray(events.Tensors(f"{tag}/text_summary")[-1].tensor_proto).item().decode()
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
        assert [row[0] for row in rows] == ["domain", "---", "home", "search", "cart"]
        assert rows[0][1::3] == ["layer 1, expert 1", "layer 2, expert 1"]
        for row in rows[2:]:
            assert sum(map(float, row[1:4])) == pytest.approx(3, abs=0.02)


def test_without_domains_there_is_no_heat_map(log: Path, tmp_path: Path) -> None:
    raw = tiny_config(log, tmp_path / "out")
    raw["stages"], raw["data"]["domain"] = {"joint": {**JOINT, "diversity_weight": 0.1}}, None
    raw["logging"]["every_steps"] = 2
    (summary,) = run_ranks(1, train_on, as_config(raw, tmp_path))
    assert summary["stages"]["joint"]["routing"].keys() == {"tower.linears.0", "tower.linears.1"}
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert not events.Tags()["images"]
    diversity = [event.value for event in events.Scalars("train/diversity")]
    assert len(diversity) == 2
    assert 0 < diversity[1] < diversity[0] < 1


class Listener(Monitor):
    """Keeps what is said."""

    said: list[str]

    def say(self, what: Any) -> None:
        self.said = [*getattr(self, "said", []), str(what)]


def _starve_an_expert(ranks: Ranks, config: Config) -> tuple[dict[str, Any], list[str]]:
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    splits = open_splits(config, config.data.splits)
    with Listener(Path(config.output_dir), enabled=ranks.is_first) as monitor:
        trainer = Trainer(config, ranks, splits, monitor)
        keys = expert_layers(trainer.dense_arch)["tower.linears.0"].lora_A.detach()
        # Of the first layer's logits a, -a and 0 the last is never the largest.
        keys[1], keys[2] = -keys[0], 0
        return trainer.run(), monitor.said


def test_an_expert_that_no_row_chose_in_an_epoch_is_a_warning(log: Path, tmp_path: Path) -> None:
    raw = tiny_config(log, tmp_path / "out")
    raw["model"]["hilomoe"]["top_k"] = 1
    raw["stages"] = {"experts": {"trains": "experts", "epochs": 2, "learning_rate": 1e-9}}
    results = run_ranks(2, _starve_an_expert, as_config(raw, tmp_path))
    said = results[0][1]
    warnings = [line for line in said if line.startswith("warning: ") and "linears.0 layer 1" in line]
    assert warnings == [
        f"warning: experts epoch {epoch}: tower.linears.0 layer 1: expert 3 is dead (below 1% of a uniform load over "
        "900 examples); raise balance_weight where experts train, or model.hilomoe.top_k if it is set"
        for epoch in (1, 2)
    ]
    for summary, _ in results:
        assert summary["stages"]["experts"]["routing"]["tower.linears.0"]["layer1"]["dead"] == [3]
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert {event.value for event in events.Scalars("routing_dead/tower.linears.0/layer1")} == {1.0}


@pytest.mark.parametrize(
    "order",
    [
        *(
            pytest.param(order, marks=pytest.mark.slow)
            for order in (["joint"], ["experts"], ["joint", "backbone", "experts"])
        ),
        ["experts", "backbone", "joint"],
        ["backbone", "experts", "backbone", "experts", "joint"],
    ],
    ids="-".join,
)
def test_stages_run_in_any_order_and_each_trains_what_it_says(log: Path, tmp_path: Path, order: list[str]) -> None:
    raw, kinds = tiny_config(log, tmp_path / "out"), {"backbone": BACKBONE, "experts": EXPERTS, "joint": JOINT}
    raw["stages"] = {f"{kind}{number}": kinds[kind] for number, kind in enumerate(order)}
    config = as_config(raw, tmp_path)
    (summary, _) = run_ranks(2, train_on, config)
    assert list(summary["stages"]) == list(raw["stages"])
    initial = build_ranker(config, seed=derive_seed(config.seed, "dense arch")).dense_arch.state_dict()
    before = {f"model.dense_arch.{name}": value for name, value in initial.items()}
    for number, kind in enumerate(order, start=1):
        after = checkpoint_tensors(tmp_path / "out" / "checkpoints" / f"step-{4 * number}", tmp_path)
        names = {name for name in before if name.startswith("model.")}  # at first without the tables
        experts = {name for name in names if name.endswith(("lora_A", "lora_B"))}
        wanted = {"backbone": names - experts, "experts": experts, "joint": names}[kind]
        assert {name for name in names if not torch.equal(before[name], after[name])} == wanted
        before = after


def _attach(ranks: Ranks, config: Config) -> tuple[Metrics, Metrics]:
    Path(config.output_dir).mkdir(exist_ok=True)
    splits = open_splits(config, config.data.splits)
    with Monitor(Path(config.output_dir), enabled=ranks.is_first) as monitor:
        trainer = Trainer(config, ranks, splits, monitor)
        trainer._run_stage("backbone")
        before, *_ = evaluate(trainer.sharded.ranker, splits["valid"], config, ranks)
        assert not any(layer.experts_active for layer in expert_layers(trainer.dense_arch).values())
        begin_phase(trainer.sharded, trainer.dense_arch, config, "experts", num_steps=15)
        assert all(layer.experts_active for layer in expert_layers(trainer.dense_arch).values())
        after, *_ = evaluate(trainer.sharded.ranker, splits["valid"], config, ranks)
        return before, after


def test_attaching_the_experts_does_not_change_the_valid_figures(log: Path, tmp_path: Path) -> None:
    for before, after in run_ranks(2, _attach, as_config(tiny_config(log, tmp_path / "out"), tmp_path)):
        assert before.log_loss is not None
        assert before == after


@pytest.mark.slow
def test_a_stage_that_only_gets_worse_goes_back_to_its_start(log: Path, tmp_path: Path) -> None:
    raw = tiny_config(log, tmp_path / "out")
    del raw["stages"]["experts"]
    raw["stages"]["joint"] = {
        "trains": "all",
        "epochs": 9,
        "patience": 2,
        "learning_rate": 10.0,
        "sparse_learning_rate": 10.0,
        "schedule": "plateau",
        "plateau": {"factor": 1e-30, "restore_best": True},  # so that what it goes back to stays as it is
    }
    raw["checkpoints"] = {"every_steps": 5, "keep_every_steps": 5}
    (summary, _) = run_ranks(2, train_on, as_config(raw, tmp_path))
    joint = summary["stages"]["joint"]
    assert (joint["epochs"], joint["best_epoch"]) == (2, 0)
    assert joint["valid"] == summary["stages"]["backbone"]["valid"]
    before = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-30", tmp_path)
    after = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-60", tmp_path)
    kept = {name for name in before if not name.startswith("optimizer.dense.")}
    assert not {name for name in kept if not torch.equal(before[name], after[name])}
    cut = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-50", tmp_path)
    weights = {name for name in before if name.startswith("model.")}
    assert not {name for name in weights if not torch.allclose(before[name], cut[name], rtol=0, atol=1e-20)}
    steps = {value.item() for name, value in cut.items() if re.fullmatch(r"optimizer\.dense\..*\.step", name)}
    assert steps == {5}  # since the cut
    assert not (tmp_path / "out" / "checkpoints" / "best").exists()


def test_the_first_stage_can_go_back_to_the_untrained_model(log: Path, tmp_path: Path) -> None:
    raw = tiny_config(log, tmp_path / "out")
    raw["stages"] = {"joint": {"trains": "all", "epochs": 3, "patience": 1, **RATES, "learning_rate": 50.0}}
    (summary, _) = run_ranks(2, train_on, as_config(raw, tmp_path))
    assert summary["stages"]["joint"]["best_epoch"] == 0
    tensors = checkpoint_tensors(Path(summary["checkpoint"]), tmp_path)
    state = {name: value for name, value in tensors.items() if name.startswith("optimizer.data_parallel.")}
    assert {name.rpartition(".")[2] for name in state} == {"step", "exp_avg", "exp_avg_sq"}
    assert not any(value.any() for value in state.values())
    experts = {name: value for name, value in tensors.items() if name.endswith("lora_B")}
    assert experts
    assert not any(value.any() for value in experts.values())


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 14])
def test_evaluating_before_a_batch_that_is_shorter_on_one_rank_does_not_disturb_training(
    tmp_path: Path, every: int
) -> None:
    """901 rows: at the epoch's last step one rank has a row more than the other."""
    write_tiny_log(tmp_path, rows={"train": 901, "valid": 50, "test": 50})
    tensors = []
    for name, eval_every_steps in (("plain", None), ("evaluating", every)):
        raw = tiny_config(tmp_path, tmp_path / name)
        raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 20}}
        raw["logging"]["eval_every_steps"] = eval_every_steps
        run_ranks(2, train_on, as_config(raw, tmp_path))
        tensors.append(checkpoint_tensors(tmp_path / name / "checkpoints" / "step-20", tmp_path))
    assert not {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}


@pytest.mark.slow
def test_evaluating_in_mid_epoch_does_not_disturb_training(run: Path, log: Path, tmp_path: Path) -> None:
    raw = normalized(log, tmp_path / "out")
    raw["logging"]["eval_every_steps"] = 4
    run_ranks(2, train_on, as_config(raw, tmp_path))
    first = checkpoint_tensors(run / "checkpoints" / "step-65", tmp_path)
    second = checkpoint_tensors(tmp_path / "out" / "checkpoints" / "step-65", tmp_path)
    assert not {name for name in first if not torch.equal(first[name], second[name])}
