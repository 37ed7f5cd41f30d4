"""Experts behind one protocol: what is found, how parameters are grouped, and an alien kind in the place of HiLoMoE."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from tiny import write_tiny_config, write_tiny_log
from torch import Tensor, nn
from torch.nn import functional as F

from recsys.config import Config, load_config
from recsys.model.cost import count_flops, count_parameters
from recsys.model.dense_arch import DenseArch, build_dense_arch
from recsys.model.experts import HiLoMoELinear, attach, expert_layers, parameter_groups, up_projections
from recsys.model.experts.hilomoe import Routing
from recsys.model.losses import auxiliary_losses
from recsys.runtime import Ranks
from recsys.training import optimizers
from recsys.training.routing import RoutingStatistics


class Adapters(nn.Linear):
    """Adapters of rank 1 of two experts and a gate that sees the input: no HiLoMoE, but all that the protocol asks."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.load_state_dict(linear.state_dict())
        self.num_layers, self.num_experts = 1, 2
        self.down, self.up = (
            nn.Parameter(torch.randn(2, self.in_features)),
            nn.Parameter(torch.zeros(self.out_features, 2)),
        )
        self.gate = nn.Linear(self.in_features, 2)
        self.experts_active, self.record_routing = True, True
        self.routing: Routing | None = None

    def forget_routing(self) -> None:
        self.routing = None

    def parameter_groups(self) -> Mapping[str, list[nn.Parameter]]:
        return {"experts": [self.down, self.up], "gate": list(self.gate.parameters())}

    def up_projections(self) -> list[nn.Parameter]:
        return [self.up]

    @property
    def expert_multiply_adds(self) -> int:
        return 2 * (self.in_features + self.out_features)

    @property
    def num_expert_parameters(self) -> int:
        return self.down.numel() + self.up.numel()

    def diversity_loss(self) -> Tensor:
        return F.cosine_similarity(self.down[0], self.down[1], dim=0).square()[None]

    def forward(self, x: Tensor) -> Tensor:
        base = F.linear(x, self.weight, self.bias)
        if not self.experts_active:
            return base
        logits = self.gate(x)
        scores = logits.softmax(-1)
        self.routing = Routing(logits[:, None], scores[:, None])
        return base + (scores * (x @ self.down.t())) @ self.up.t()


@pytest.fixture
def alien(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach, "EXPERT_LAYERS", (HiLoMoELinear, Adapters))


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out"))


def with_adapters(config: Config) -> DenseArch:
    model = config.model.model_copy(update={"hilomoe": None})
    arch = build_dense_arch(model, {"user": 8, "item": 8, "tags": 4}, num_dense_features=2)
    arch.tower.linears[0] = Adapters(arch.tower.linears[0])  # type: ignore[operator,index]
    return arch


def test_every_parameter_is_in_one_group(config: Config) -> None:
    arch = build_dense_arch(config.model, {"user": 8, "item": 8, "tags": 4}, num_dense_features=2)
    groups = parameter_groups(arch)
    assert list(groups) == ["backbone", "experts"]
    listed = [id(parameter) for parameters in groups.values() for parameter in parameters]
    assert sorted(listed) == sorted(id(parameter) for parameter in arch.parameters())
    names = {id(parameter): name for name, parameter in arch.named_parameters()}
    assert all(names[id(one)].endswith(("lora_A", "lora_B")) for one in groups["experts"])
    assert not any("lora" in names[id(one)] for one in groups["backbone"])


def test_without_experts_all_is_backbone() -> None:
    groups = parameter_groups(nn.Linear(3, 2))
    assert {name: len(of) for name, of in groups.items()} == {"backbone": 2}


def test_an_alien_kind_of_expert_is_found_grouped_and_counted(alien: None, config: Config) -> None:
    arch = with_adapters(config)
    (layer,) = expert_layers(arch).values()
    assert isinstance(layer, Adapters)
    assert set(parameter_groups(arch)) == {"backbone", "experts", "gate"}
    assert up_projections(arch) == [layer.up]
    with torch.no_grad():
        flops = count_flops(arch, torch.zeros(3, 20), torch.zeros(3, 2))
    d_in, d_out = layer.in_features, layer.out_features
    assert flops["experts"] == 3 * 2 * 2 * (d_in + d_out)
    assert flops["routing"] == 3 * 2 * 2 * d_in  # its gate
    assert count_parameters(arch)["routing"] == 2 * d_in + 2


def test_an_alien_kind_of_expert_has_losses_and_statistics(alien: None, config: Config, process_group: None) -> None:
    arch = with_adapters(config)
    statistics = RoutingStatistics(arch, num_domains=3)
    logits, losses, *_ = arch(torch.randn(6, 20), torch.randn(6, 2), loss_weights={"diversity": 1.0})
    assert set(losses) == {"balance", "z", "diversity"} and all(loss > 0 for loss in losses.values())
    statistics.update(torch.tensor([0, 1, 2, 0, 1, 2]))
    (summary,) = statistics.epoch().values()
    assert summary.scores.shape == (3, 1, 2)
    torch.testing.assert_close(summary.scores.sum(), torch.tensor(6.0, dtype=torch.float64))
    assert auxiliary_losses([], {}, logits) == {"balance": 0, "z": 0}


def _phases_of_aliens(ranks: Ranks, config: Config) -> list[set[str]]:
    """The parameters that are free in each phase of a stage of two phases, experts and then their gate."""
    from recsys.model.ranker import build_ranker
    from recsys.sharding.shard import shard

    attach.EXPERT_LAYERS = (HiLoMoELinear, Adapters)
    optimizers._TRAINED = {**optimizers._TRAINED, "experts": (frozenset({"experts"}), frozenset({"gate"}))}
    ranker = build_ranker(config, seed=1)
    arch = ranker.dense_arch = with_adapters(config)
    sharded = shard(ranker, config, ranks, seed=1)
    free = []
    for number in range(len(optimizers.phases(config, "experts"))):
        optimizers.begin_phase(sharded, arch, config, "experts", number, num_steps=5)
        free.append({name for name, parameter in arch.named_parameters() if parameter.requires_grad})
    return free


def test_a_phase_frees_the_groups_that_it_names(config: Config, tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    (free,) = run_ranks(1, _phases_of_aliens, config)
    layer = "tower.linears.0"
    assert free == [{f"{layer}.down", f"{layer}.up"}, {f"{layer}.gate.weight", f"{layer}.gate.bias"}]
