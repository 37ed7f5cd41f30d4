"""Muon beside AdamW, and the rate of up-projections: torch's own optimizers, taken literally."""

from copy import deepcopy
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_module, run_ranks
from runs import as_config
from tiny import take_tower, tiny_config, write_tiny_config, write_tiny_log
from torch.nn import functional as F

from recsys.config import Config, ConfigError, DenseOptimizerConfig
from recsys.model.dense_arch import DenseArch, build_dense_arch
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.shard import shard
from recsys.training.checkpoint import dense_optimizer_state
from recsys.training.dense_optimizer import build_dense_optimizer
from recsys.training.optimizers import begin_phase

LINEARS = ["tower.linears.0.weight", "tower.linears.1.weight"]
LORA = [f"tower.linears.{n}.lora_{part}" for n in (0, 1) for part in "AB"]
STEPS = 6


def config_of(tmp_path: Path, dense: dict[str, Any], **model: Any) -> Config:
    raw = tiny_config(tmp_path, tmp_path / "out")
    raw["model"] |= model
    raw["optimizers"] = {"dense": dense}
    raw["stages"]["experts"]["expert_learning_rate"] = 0.16
    raw["stages"]["joint"] |= {"steps": STEPS, "warmup_steps": 2, "expert_learning_rate": 0.05}
    return as_config(raw, tmp_path)


def arch_of(config: Config) -> DenseArch:
    return build_dense_arch(config.model, config.embedding_dims, num_dense_features=2)


def _against_literal(
    ranks: Ranks, config: Config, stage: str, of_muon: list[str], frozen: bool
) -> tuple[dict[str, float], list[str], list[str]]:
    """After some steps: the last rates, the parameters that moved, those that differ from a literal loop's."""
    ranker = build_ranker(config, seed=3)
    arch = ranker.dense_arch
    torch.manual_seed(5)
    for name, parameter in arch.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    start, literal = deepcopy(arch).state_dict(), deepcopy(arch)
    phase = begin_phase(shard(ranker, config, ranks, seed=3), arch, config, stage, num_steps=STEPS)
    for layer in (literal.tower.linears[0], literal.tower.linears[1]):
        layer.experts_active = True
    free = {name: p for name, p in literal.named_parameters() if not frozen or "lora" in name}
    settings, rates = config.optimizers.dense, config.stages[stage]
    kinds = []
    for is_up, rate in ((False, rates.learning_rate), (True, rates.expert_learning_rate)):
        mine = {name: p for name, p in free.items() if name.endswith("lora_B") is is_up}
        decay = {"lr": rate, "weight_decay": settings.weight_decay}
        if by_muon := [p for name, p in mine.items() if name in of_muon]:
            kinds.append(torch.optim.Muon(by_muon, momentum=0.9, adjust_lr_fn="match_rms_adamw", **decay))
        if by_adamw := [p for name, p in mine.items() if name not in of_muon]:
            kinds.append(torch.optim.AdamW(by_adamw, betas=settings.betas, eps=settings.eps, **decay))
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in kinds]
    told: dict[str, float] = {}
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 * step + ranks.rank)
        pooled, dense, labels = (torch.rand(16, n, generator=generator) for n in (20, 2, 1))
        factor = 1.0
        if stage == "joint":
            factor = (step + 1) / 2 if step < 2 else 0.5 * (1 + cos(pi * (step - 2) / (STEPS - 2)))
        for optimizer, peak in zip(kinds, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(literal(pooled, dense)[0], labels.round().flatten()).backward()
        for parameter in free.values():
            assert parameter.grad is not None
            parameter.grad /= ranks.world_size
            dist.all_reduce(parameter.grad)
        if settings.max_grad_norm is not None:
            assert torch.nn.utils.clip_grad_norm_(free.values(), settings.max_grad_norm) > settings.max_grad_norm
        for optimizer in kinds:
            optimizer.step()

        told = phase.set_learning_rates(step)
        phase.dense.zero_grad()
        wrapped = ranker.dense_arch
        F.binary_cross_entropy_with_logits(wrapped(pooled, dense)[0], labels.round().flatten()).backward()
        phase.dense.step()
    phase.begin_anew()
    assert not phase.dense.state and all(group["lr"] == 0 for group in phase.dense.param_groups)
    moved = [name for name, value in arch.state_dict().items() if not torch.equal(value, start[name])]
    expected = literal.state_dict()
    return told, moved, [name for name, value in arch.state_dict().items() if not torch.equal(value, expected[name])]


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("stage", ["experts", "joint"])
def test_two_ranks_train_as_a_literal_loop_to_the_bit(tmp_path: Path, stage: str, experts: bool) -> None:
    dense = {"type": "muon", "weight_decay": 0.1, "max_grad_norm": 0.01, "muon": {"momentum": 0.9, "experts": experts}}
    config = config_of(tmp_path, dense)
    of_muon = LINEARS + LORA * experts
    frozen = stage == "experts"
    for told, moved, differing in run_ranks(2, _against_literal, config, stage, of_muon, frozen):
        names = [name for name, _ in arch_of(config).named_parameters()]
        assert moved == [name for name in names if not frozen or name in LORA]
        assert not differing
        assert told["expert"] == pytest.approx(told["dense"] * (16 if frozen else 0.05 / 0.003))


def names_of_state(arch: DenseArch, settings: DenseOptimizerConfig) -> set[str]:
    optimizer = build_dense_optimizer(arch, settings)
    optimizer.init_state()
    return set(dense_optimizer_state(optimizer))


def test_state_has_the_names_that_it_always_had(tmp_path: Path) -> None:
    arch = arch_of(config_of(tmp_path, {}))
    names = [name for name, _ in arch.named_parameters()]
    adamw = ("step", "exp_avg", "exp_avg_sq")
    expected = {f"optimizer.dense.{name}.{part}" for name in names for part in adamw}
    assert names_of_state(arch, DenseOptimizerConfig()) == expected
    arch.requires_grad_(False)
    arch.tower.linears[0].requires_grad_(True)  # type: ignore[operator,index]
    expected = {f"optimizer.dense.{name}.{part}" for name in names if "linears.0" in name for part in adamw}
    expected -= {f"optimizer.dense.{LINEARS[0]}.{part}" for part in adamw}
    assert names_of_state(arch, DenseOptimizerConfig(type="muon")) == {
        *expected,
        f"optimizer.dense.{LINEARS[0]}.momentum_buffer",
    }


CROSS = {f"tower.cross.{n}.{part}" for n in (0, 1, 2) for part in ("weight", "lora_A", "lora_B")}


@pytest.mark.parametrize(
    ("tower", "left_to_adamw"),
    [
        ({"type": "dcn", "hidden": [8]}, CROSS),  # of one row each
        (
            {"type": "final_mlp", "first_hidden": [8], "second_hidden": [8]},
            {"tower.interaction", "tower.gates.0.context", "tower.gates.1.context"},  # 3-D, and vectors
        ),
        ({"type": "transformer", "model_dim": 8}, set()),
    ],
)
def test_muon_trains_the_matrices_of_hidden_linears(
    tmp_path: Path, tower: dict[str, Any], left_to_adamw: set[str]
) -> None:
    raw = tiny_config(tmp_path, tmp_path / "out")
    raw["model"] |= {"hilomoe": {"experts_in": ["*"]}}
    take_tower(raw, tower)
    arch = arch_of(as_config(raw, tmp_path))
    settings = DenseOptimizerConfig(type="muon", muon={"experts": True})
    by_muon = {name for name in names_of_state(arch, settings) if name.endswith(".momentum_buffer")}
    outside = {f"{linear}.{part}" for linear in ("head", "dense_projection") for part in ("weight", "lora_A", "lora_B")}
    matrices = {name for name, parameter in arch.named_parameters() if parameter.ndim > 1}
    assert by_muon == {f"optimizer.dense.{name}.momentum_buffer" for name in matrices - outside - left_to_adamw}


@pytest.mark.parametrize(
    ("model", "muon", "message"),
    [
        ({"tower": {"type": "mlp", "hidden": []}, "hilomoe": {"experts_in": ["head"]}}, {}, "has no hidden matrix"),
        ({"hilomoe": {"experts_in": ["head"]}}, {"experts": True}, "muon.experts: no hidden linear"),
        ({"hilomoe": {"num_layers": 1, "num_experts": 1}}, {"experts": True}, "muon.experts: no hidden linear"),
    ],
)
def test_muon_without_matrices_is_refused(
    tmp_path: Path, model: dict[str, Any], muon: dict[str, Any], message: str
) -> None:
    config = config_of(tmp_path, {"type": "muon", "muon": muon}, **model)
    with pytest.raises(ConfigError, match=message):
        build_dense_optimizer(arch_of(config), config.optimizers.dense)


def test_it_is_refused_before_an_earlier_run_is_moved_aside(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    path = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    given = ("optimizers.dense.type=muon", "model.tower.hidden=[]", "model.hilomoe.experts_in=[head]")
    (done,) = run_module(1, "recsys.train", "--config", str(path), *given)
    assert done.code == 2 and "error: optimizers.dense.type is muon" in done.stderr
    assert not (tmp_path / "out").exists()  # as what is refused before a run begins leaves it


def test_a_fused_step_is_the_plain_one_and_goes_on_from_its_state(tmp_path: Path) -> None:
    arch = arch_of(config_of(tmp_path, {}))
    archs = {False: arch, True: deepcopy(arch)}
    optimizers = {
        fused: build_dense_optimizer(of, DenseOptimizerConfig(fused=fused, weight_decay=0.1), apart=True)
        for fused, of in archs.items()
    }

    def take_steps(numbers: range) -> None:
        for fused, of in archs.items():
            for number in numbers:
                generator = torch.Generator().manual_seed(number)
                for parameter in of.parameters():
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
                for group in optimizers[fused].param_groups:
                    group["lr"] = 0.01 / (1 + number)
                optimizers[fused].step()

    take_steps(range(4))
    states = {fused: dense_optimizer_state(of) for fused, of in optimizers.items()}
    assert states[True].keys() == states[False].keys()
    for name, value in states[False].items():
        torch.testing.assert_close(states[True][name], value, rtol=1e-5, atol=1e-6)
        held = value.clone()
        value.copy_(states[True][name])  # as a checkpoint is loaded
        states[True][name].copy_(held)
    take_steps(range(4, 8))
    for one, other in zip(archs[False].parameters(), archs[True].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        assert not one.equal(torch.zeros_like(one))
