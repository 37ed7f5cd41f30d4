"""MoE-MLoRA in training: what each phase reads and moves, and going on within one; MLoRA on several ranks."""

import itertools
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, train_on
from test_resume import run
from tiny import tiny_config, write_tiny_config, write_tiny_log
from torch import Tensor

from recsys.checkpoint.tensors import TensorReader
from recsys.config import Config, ConfigError, load_config
from recsys.data.domains import count_domains
from recsys.data.order import PositionError
from recsys.data.splits import open_loader, open_splits, train_order
from recsys.data.storage import DataError
from recsys.model.experts import parameter_groups
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.training.domain_rows import DomainRows
from recsys.training.optimizers import phases

DOMAINS = 3
STAGES = {
    "backbone": {"trains": "backbone", "epochs": 1, "learning_rate": 0.01, "sparse_learning_rate": 0.1},
    "experts": {"trains": "experts", "epochs": 2, "patience": 1, "monitor": "auc", "learning_rate": 0.02},
    "gate": {"trains": "gate", "epochs": 1, "learning_rate": 0.05},
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Row groups of which some lack a domain: within one of them, rows are nearly sorted by it."""
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    for path in sorted((directory / "train").glob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.take(pc.sort_indices(table, [("domain", "ascending")])), path, row_group_size=70)
    return directory


def config_of(log: Path, output_dir: Path, experts: dict[str, Any], **changes: Any) -> Config:
    output_dir.mkdir(parents=True, exist_ok=True)
    raw = tiny_config(log, output_dir)
    raw["data"]["reader_threads"] = 1
    raw["model"] = {"tower": {"type": "mlp", "hidden": [16, 8], "normalization": "batch"}, "dense_dim": 4}
    raw["model"]["domain_experts"] = {"rank": 2, **experts}
    raw["stages"] = STAGES
    return as_config({**raw, **changes}, output_dir.parent)


MIXTURE = {"type": "moe_mlora", "num_experts": 2 * DOMAINS}


@pytest.mark.parametrize("gate", ["domain", pytest.param("features", marks=pytest.mark.slow)])
def test_each_phase_moves_its_own_parameters_alone(log: Path, tmp_path: Path, gate: str) -> None:
    """Bit by bit, on the whole checkpoint, tables and running statistics included."""
    config = config_of(log, tmp_path / "out", {**MIXTURE, "gate": gate}, checkpoints={"keep_every_steps": 1})
    run_ranks(1, train_on, config)
    saved = sorted((tmp_path / "out" / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    ends = [path for path in saved if json.loads((path / "meta.json").read_text())["kept"] == "stage"]
    assert len(ends) == 1 + 2 * DOMAINS + 1
    arch = build_ranker(config, seed=1).dense_arch
    names = {id(parameter): name for name, parameter in arch.named_parameters()}
    groups = {group: {names[id(p)] for p in parameters} for group, parameters in parameter_groups(arch).items()}
    assert set(groups) == {"backbone", "gate", *(f"domain_experts.{number}" for number in range(2 * DOMAINS))}
    states = [model_of(path) for path in ends]
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        if number < 2 * DOMAINS:
            assert moved <= groups[f"domain_experts.{number}"]  # none, where the state it began with is the best
        else:
            assert moved == groups["gate"] | {"domain_adaptation.gated"}
    moved_experts = sum(
        not torch.equal(states[number][name], states[number + 1][name])
        for number in range(2 * DOMAINS)
        for name in groups[f"domain_experts.{number}"]
    )
    assert moved_experts


def model_of(directory: Path) -> dict[str, Tensor]:
    """What a model computes by, the dense arch under the names of its parameters."""
    reader = TensorReader(directory)
    names = [name for name in reader.names if name.startswith("model.")]
    return {name.removeprefix("model.dense_arch."): reader.read(name) for name in names}


def _read(ranks: Ranks, config: Config, expert: int) -> list[list[int]]:
    """Of each batch of an expert's epoch, the bits of `scale`, which no two rows share."""
    splits = open_splits(config, config.data.splits)
    rows = DomainRows(config, splits, ranks, lambda text: None)
    shards = rows.of(phases(config, "experts")[expert], "train")
    order = train_order(shards, config, ranks.world_size, 0)
    with open_loader(shards, [order], config, ranks) as loader:
        batches = list(loader)
    domains = torch.cat([batch.domain for batch in batches])
    assert bool((domains == expert % DOMAINS).all())
    return [batch.dense_features[:, 1].view(torch.int32).tolist() for batch in batches]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_expert_reads_each_row_of_its_domain_once(log: Path, tmp_path: Path, world_size: int) -> None:
    config = config_of(log, tmp_path / "out", MIXTURE)
    train = pa.concat_tables(pq.read_table(path) for path in sorted((log / "train").glob("*.parquet")))
    for expert in (1, 2 + DOMAINS):
        by_rank = run_ranks(world_size, _read, config, expert)
        assert len({len(batches) for batches in by_rank}) == 1
        read = sorted(row for batches in by_rank for batch in batches for row in batch)
        of_domain = train.filter(pc.equal(train["domain"], expert % DOMAINS))["z"].to_numpy().astype("float32")
        assert read == sorted(of_domain.view("int32").tolist())


def test_row_groups_without_the_domain_are_not_read(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(log, tmp_path / "out", MIXTURE)
    shards = open_splits(config, ["train"])["train"]
    counts = count_domains(shards, range(len(shards.row_counts)))
    only = shards.of_domain(1, counts.rows[:, 1].tolist())
    assert 0 in only.row_counts and 0 not in shards.row_counts
    assert counts.labels.sum() == counts.rows.sum() == sum(shards.row_counts)
    read = set()
    table = type(shards).table

    def recorded(self: Any, row_group: int, *arguments: Any) -> Any:
        read.add(row_group)
        return table(self, row_group, *arguments)

    monkeypatch.setattr(type(shards), "table", recorded)
    with open_loader(only, [train_order(only, config, 1, 0)], config, Ranks(0, 1, 0, 1, torch.device("cpu"))) as loader:
        assert sum(len(batch.labels) for batch in loader) == counts.rows[:, 1].sum()
    assert read == {group for group, rows in enumerate(only.row_counts) if rows}


def test_a_position_is_of_its_domain(log: Path, tmp_path: Path) -> None:
    """Even where two have as many rows in each row group."""
    config = config_of(log, tmp_path / "out", MIXTURE)
    shards = open_splits(config, ["train"])["train"]
    one, other = (train_order(shards.of_domain(domain, shards.row_counts), config, 1, 0) for domain in (0, 1))
    with pytest.raises(PositionError):
        other.resumed(one.position(1))
    assert train_order(shards, config, 1, 0).data not in (one.data, other.data)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["within the second expert's phase", "between the first's and the second's"])
def test_a_run_goes_on_within_phases_and_between_them(log: Path, tmp_path: Path, place: str) -> None:
    checkpoints = {"every_steps": 3, "keep_every_steps": 1}
    kinds = {"optimizers": {"average": {"decay": 0.9}}, "checkpoints": checkpoints}
    config = config_of(log, tmp_path / "whole" / "out", MIXTURE, **kinds)
    whole = run_ranks(2, run, config, None)
    saved = (tmp_path / "whole" / "out" / "checkpoints").glob("step-*")
    progress = {path: json.loads((path / "progress.json").read_text())["progress"] for path in saved}
    wanted = (0, True) if place.startswith("between") else (1, False)
    there = [
        path for path, of in progress.items() if of["stage"] == "experts" and (of["phase"], of["phase_over"]) == wanted
    ]
    start = min(there, key=lambda path: int(path.name[5:]))
    again = config_of(log, tmp_path / "again" / "out", MIXTURE, **kinds)
    found = run_ranks(2, run, again, start)
    for (_, summary, rows), (_, resumed, rest) in zip(whole, found, strict=True):
        assert rest == rows[-len(rest) :] and len(rest) < len(rows)
        assert resumed == summary
    last = f"checkpoints/step-{whole[0][1]['steps']}"
    ends = [model_of(tmp_path / name / "out" / last) for name in ("whole", "again")]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.slow
def test_a_checkpoint_between_phases_is_evaluated_as_its_stage_ended(log: Path, tmp_path: Path) -> None:
    config = config_of(log, tmp_path / "out", MIXTURE)
    (summary,) = run_ranks(1, train_on, config)
    for stage in ("experts", "gate"):
        of_stage = summary["stages"][stage]
        arguments = ("--checkpoint", of_stage["checkpoint"], "--split", "valid", "--json")
        (done,) = run_module(1, "recsys.evaluate", *arguments)
        assert json.loads(done.stdout)["model"] == pytest.approx(of_stage["valid"])


@pytest.mark.slow
def test_the_gate_learns_on_from_a_state_of_before_it(log: Path, tmp_path: Path) -> None:
    """Rates are cut, and the best state is restored: that in which the gate's stage began."""
    gate = {"trains": "gate", "epochs": 2, "monitor": "log_loss", "learning_rate": 1e3}
    gate |= {"schedule": "plateau", "plateau": {"restore_best": True}}
    stages = {**STAGES, "experts": {"trains": "experts", "epochs": 1, "learning_rate": 0.02}, "gate": gate}
    checkpoints = {"every_steps": 35, "keep_every_steps": 1}
    config = config_of(log, tmp_path / "out", {"type": "moe_mlora"}, stages=stages, checkpoints=checkpoints)
    (summary,) = run_ranks(1, train_on, config)
    assert summary["stages"]["gate"]["best_epoch"] == 0
    end, saved = summary["steps"], tmp_path / "out" / "checkpoints"
    began, after, ended = (model_of(saved / f"step-{step}") for step in (end - 58, end - 58 + 35, end))
    name = "domain_adaptation.gate.linear.weight"
    assert bool(after["domain_adaptation.gated"]) and not torch.equal(began[name], after[name])
    assert not bool(ended["domain_adaptation.gated"]) and torch.equal(began[name], ended[name])


@pytest.mark.slow
def test_mlora_on_two_ranks_is_that_on_one(log: Path, tmp_path: Path) -> None:
    """With routed experts on the same linears, whose statistics by domain are of the right rows."""
    joint = {"joint": {**STAGES["backbone"], "trains": "all", "epochs": 2}}
    found = []
    for world_size in (1, 2):
        config = config_of(log, tmp_path / f"{world_size}" / "out", {"type": "mlora"}, stages=joint)
        model = config.model.model_dump() | {"hilomoe": {"num_layers": 2, "num_experts": 2}}
        data = config.data.model_dump() | {"batch_size": 32 // world_size, "shuffle": False}
        raw = config.model_dump() | {"model": model, "data": data}
        summary = run_ranks(world_size, train_on, Config.model_validate(raw))[0]
        found.append(summary)
    one, two = found
    assert two["test"]["auc"] == pytest.approx(one["test"]["auc"], abs=0.02)
    assert two["test"]["log_loss"] == pytest.approx(one["test"]["log_loss"], abs=0.01)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["model.domain_experts={type: moe_mlora, num_experts: 2}"], "num_experts: 2 are fewer than the 3 of"),
        (["model.domain_experts={type: mlora}", "data.domain=null"], "data.domain, which is not set"),
        (["model.domain_experts={type: mlora, rank: 2, rank_reduction: 4}"], "either rank or rank_reduction"),
        (["model.domain_experts={type: mlora}", "stages.joint.trains=gate"], "stages.joint trains the gate"),
        (["model.domain_experts={type: moe_mlora, gate: uniform}", "stages.joint.trains=gate"], "trains the gate"),
    ],
)
def test_configs_that_do_not_fit_are_refused(tmp_path: Path, overrides: list[str], told: str) -> None:
    path = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=told):
        load_config(path, overrides)


def test_experts_in_no_linear_are_refused(log: Path, tmp_path: Path) -> None:
    config = config_of(log, tmp_path / "out", {**MIXTURE, "experts_in": ["tower.deep.*"]})
    with pytest.raises(ConfigError, match=r"model\.domain_experts\.experts_in: 'tower\.deep\.\*' matches no linear"):
        build_ranker(config, seed=1)


def _refused(ranks: Ranks, config: Config) -> str | None:
    try:
        DomainRows(config, open_splits(config, config.data.splits), ranks, lambda text: None)
    except DataError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("split", "keep", "told"),
    [
        ("train", lambda table: pc.not_equal(table["domain"], 1), "data.train: no row of domain 1 (search)"),
        ("valid", lambda table: pc.not_equal(table["domain"], 2), "data.valid: no row of domain 2 (cart)"),
        (
            "valid",
            lambda table: pc.or_(pc.not_equal(table["domain"], 0), pc.equal(table["label"], 0)),
            "data.valid: all rows of domain 0 (home) are of label 0, so there is no AUC",
        ),
        ("train", lambda table: pc.or_(pc.not_equal(table["domain"], 0), pc.equal(table["label"], 0)), None),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_domains_that_no_expert_can_learn_from_are_refused(
    tmp_path: Path, split: str, keep: Any, told: str | None, world_size: int
) -> None:
    write_tiny_log(tmp_path / "log")
    for path in sorted((tmp_path / "log" / split).glob("*.parquet")):
        table = pq.read_table(path)
        pq.write_table(table.filter(keep(table)), path, row_group_size=20)
    config = config_of(tmp_path / "log", tmp_path / "out", MIXTURE)
    found = set(run_ranks(world_size, _refused, config))
    assert len(found) == 1
    message = found.pop()
    assert message is None if told is None else message is not None and message.startswith(told)
