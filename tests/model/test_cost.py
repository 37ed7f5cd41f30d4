"""What a model costs, against the closed formulas and against torch's counter on the real forward pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import tiny_config
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import Config, ConfigError, load_config
from recsys.model.cost import PARTS, CostReport, cost_report, count_flops, count_parameters, model_name
from recsys.model.dense_arch import DenseArch
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.ranker import build_ranker
from recsys.model.towers import Tower
from recsys.model.towers.mlp import MLP

EMBEDDINGS = {"user": 8, "item": 8, "tags": 4}
DENSE, DENSE_DIM = 2, 4
WIDTH = sum(EMBEDDINGS.values()) + DENSE_DIM
L, K = 3, 4
TOWERS = {
    "mlp": "{type: mlp, hidden: [16, 8]}",
    "mlp without hidden layers": "{type: mlp, hidden: []}",
    "dcn_v2": "{type: dcn_v2, num_cross_layers: 2, hidden: [10]}",
    "transformer": "{type: transformer, model_dim: 8, num_blocks: 2, num_heads: 2, feedforward_dim: 12}",
    "wdl": "{type: wdl, hidden: [16, 8]}",
    "deepfm": "{type: deepfm, hidden: [16]}",
    "nfm": "{type: nfm, hidden: [16]}",
    "pnn": "{type: pnn, hidden: [16]}",
    "dcn": "{type: dcn, num_cross_layers: 2, hidden: [10]}",
    "dlrm": "{type: dlrm, bottom_hidden: [6], hidden: [16]}",
    "final_mlp": "{type: final_mlp, first_hidden: [12, 8], second_hidden: [6], num_heads: 2, first_context: [user]}",
}
EXPERTS = {
    "none": "null",
    "everywhere": f"{{num_layers: {L}, num_experts: {K}, experts_in: [tower.*, head]}}",
    "in the head": f"{{num_layers: {L}, num_experts: {K}, top_k: 1, experts_in: [head]}}",
}


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def load(*overrides: str, dense_features: bool = True) -> Config:
        raw = tiny_config(tmp_path, tmp_path / "out")
        raw["stages"] = {"joint": {"trains": "all", "epochs": 1, "learning_rate": 0.1, "sparse_learning_rate": 0.1}}
        raw["model"]["hilomoe"] = {"num_layers": L, "num_experts": K}
        if any(name in override for override in overrides for name in ("wdl", "deepfm", "nfm", "pnn", "dlrm")):
            raw["tables"]["tag"]["embedding_dim"] = raw["model"]["dense_dim"] = 8
        if not dense_features:
            del raw["features"]["dense"]
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
        return load_config(tmp_path / "tiny.yaml", overrides)

    return load


def flops_of(call: Any) -> int:
    """As torch counts them; on a CPU it knows only the plain kernel of attention."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    total: int = counter.get_total_flops()
    return total


def of_experts(d_in: int, d_out: int) -> tuple[int, int]:
    """The formulas of a linear's experts and routing, FLOPs a row."""
    return 2 * L * K * (d_in + d_out), L * (L - 1) * K**2


@pytest.mark.parametrize(
    ("tower", "experts", "dense_features"),
    [
        ("mlp", "everywhere", True),
        ("mlp", "none", True),
        ("mlp without hidden layers", "in the head", False),
        ("dcn_v2", "everywhere", False),
        ("transformer", "everywhere", True),
        ("final_mlp", "everywhere", True),
        ("wdl", "everywhere", True),
        ("deepfm", "none", False),
        ("nfm", "everywhere", True),
        ("pnn", "none", True),
        ("dcn", "everywhere", True),
        ("dlrm", "everywhere", True),
    ],
)
def test_the_parts_add_up_to_the_real_model(load: Any, tower: str, experts: str, dense_features: bool) -> None:
    overrides = f"model.tower={TOWERS[tower]}", f"model.hilomoe={EXPERTS[experts]}"
    config = load(*overrides, dense_features=dense_features)
    cost = cost_report(config).cost
    ranker = build_ranker(config, seed=0, device=torch.device("cpu"))
    width = sum(config.embedding_dims.values())
    pooled, dense = torch.randn(7, width), torch.randn(7, DENSE if dense_features else 0)
    an_example = sum(cost.flops[part] for part in PARTS if part != "embedding")
    assert flops_of(lambda: ranker.dense_arch(pooled, dense)) == 7 * an_example + cost.flops_per_call
    parameters = sum(parameter.numel() for parameter in ranker.parameters())
    assert sum(cost.parameters.values()) + cost.padding == parameters
    assert (cost.flops["experts"] > 0) == (experts != "none")
    assert (cost.flops["projection"] > 0) == dense_features
    assert min(cost.flops.values()) >= 0


def test_an_mlp_costs_what_the_formulas_say(load: Any) -> None:
    cost = cost_report(load("model.tower.hidden=[16, 8]")).cost
    first, second = of_experts(WIDTH, 16), of_experts(16, 8)
    assert cost.flops == {
        "embedding": 8 + 8 + 4,
        "projection": 2 * DENSE * DENSE_DIM,
        "tower": 2 * (WIDTH * 16 + 16 * 8),
        "interaction": 0,
        "experts": first[0] + second[0],
        "routing": first[1] + second[1],
        "head": 2 * 8,
    }
    assert cost.flops_per_call == 2 * (L * K) ** 2 * (WIDTH + 16)
    assert cost.parameters == {
        "embedding": 40 * 8 + 30 * 8 + 12 * 4,
        "projection": (DENSE + 1) * DENSE_DIM,
        "tower": (WIDTH + 1) * 16 + (16 + 1) * 8,
        "interaction": 0,
        "experts": L * K * (WIDTH + 16 + 16 + 8),
        "routing": 0,
        "head": 8 + 1,
    }


def test_a_transformer_costs_what_the_formulas_say(load: Any) -> None:
    cost = cost_report(load(f"model.tower={TOWERS['transformer']}")).cost
    tokens, dim, blocks, hidden = len(EMBEDDINGS) + 1, 8, 2, 12
    linears = [(dim, dim)] * 4 + [(dim, hidden), (hidden, dim)]
    assert cost.flops["interaction"] == blocks * 2 * 2 * tokens**2 * dim  # Q K' and its product with V
    assert cost.flops["tower"] == 2 * WIDTH * dim + blocks * tokens * sum(2 * a * b for a, b in linears)
    assert cost.flops["experts"] == blocks * tokens * sum(of_experts(*linear)[0] for linear in linears)
    assert cost.flops["routing"] == blocks * tokens * sum(of_experts(*linear)[1] for linear in linears)
    assert cost.parameters["interaction"] == (2 * blocks + 1) * 2 * dim  # of the norms


def test_parameters_that_only_fill_tokens_stand_apart(load: Any) -> None:
    """Of each token of 8 numbers, 4 are its embedding, one its first-order weight, and 3 nothing."""
    report = cost_report(load(f"model.tower={TOWERS['wdl']}", "model.hilomoe=null"))
    cost = report.cost
    assert cost.padding == 3 * (40 + 30 + 12) + 3 * (DENSE + 1)
    assert cost.parameters["embedding"] == (4 + 1) * (40 + 30 + 12)
    assert cost.parameters["projection"] == (4 + 1) * (DENSE + 1)
    assert cost.parameters["tower"] == (4 * 4 + 1) * 16 + (16 + 1) * 8
    assert cost.parameters["head"] == 8 + 1 + 1
    assert cost.embedding_bytes == 4 * 3 * 8
    assert "not among the parameters: 255 that fill first-order weights" in report.assumptions()[-1]
    without = cost_report(load("model.tower={type: deepfm, hidden: [16], wide: false}"))
    assert without.cost.padding == 0 and "first-order" not in " ".join(without.assumptions())


def test_products_of_tokens_are_counted_as_interaction(load: Any) -> None:
    cost = cost_report(load(f"model.tower={TOWERS['pnn']}")).cost
    assert (cost.flops["interaction"], cost.parameters["interaction"]) == (2 * 4 * 4 * 8, 0)


def test_routing_in_expert_space_costs_less_than_the_papers_formulas(load: Any) -> None:
    d = WIDTH
    layer = HiLoMoELinear(d, d, L, K)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, d)
    found = []

    def literal() -> None:
        """y = W x + b + sum_l U_l (s_l * V_l x), s_l = softmax(V_l q_l / sqrt d), q_{l+1} = q_l + V_l' s_l."""
        y, query = x @ layer.weight.t() + layer.bias, x
        for number, (up, down) in enumerate(zip(layer.lora_B.split(K, 1), layer.lora_A.split(K), strict=True)):
            image = x @ down.t()
            logits = query @ down.t() if number else image  # the first query is x
            scores = (logits / d**0.5).softmax(-1)
            if number < L - 1:
                query = query + scores @ down
            y = y + (scores * image) @ up.t()
        found.append(y)

    assert flops_of(literal) == 5 * 2 * (d**2 + (4 * L - 2) * K * d)
    torch.testing.assert_close(found[0], layer(x), rtol=1e-4, atol=1e-4)
    cost = cost_report(load(f"model.tower.hidden=[{d}]")).cost
    ours = sum(cost.flops[part] for part in ("tower", "experts", "routing"))
    assert flops_of(lambda: layer(x)) == 5 * ours + cost.flops_per_call
    assert ours == 2 * (d**2 + 2 * L * K * d) + L * (L - 1) * K**2
    assert 2 * (d**2 + (4 * L - 2) * K * d) - ours == 4 * (L - 1) * K * d - cost.flops["routing"]


class Bilinear(Tower):
    """A tower of what no config has: one linear used twice, a product of its own, a product of parameters alone."""

    out_features = 1

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.again = linear
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.again(self.linear(x))
        return torch.einsum("bi,ij,bj->b", y, self.weight @ self.weight, y)[:, None]


class ProjectedQuery(HiLoMoELinear):
    """Routes by a projection of its own."""

    def __init__(self) -> None:
        super().__init__(4, 4, L, K)
        self.projection = nn.Linear(4, L * K, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.projection(x).softmax(-1).sum(-1, keepdim=True)


def test_any_module_is_counted(load: Any) -> None:
    arch = DenseArch(0, 0, Bilinear(nn.Linear(4, 4)))
    counts = count_flops(arch, torch.randn(3, 4), torch.empty(3, 0))
    assert counts["tower"] == 3 * 2 * 2 * 16
    assert counts["interaction"] == flops_of(lambda: arch(torch.randn(3, 4), torch.empty(3, 0))) - 3 * (2 * 2 * 16 + 2)
    assert counts["interaction"] >= 2 * 4**3 + 3 * 2 * 16
    parameters = count_parameters(arch)
    assert (parameters["tower"], parameters["interaction"], parameters["head"]) == (16 + 4, 16, 2)


def test_whatever_else_an_expert_layer_does_is_routing(load: Any) -> None:
    tower = MLP(4, (4,))
    tower.linears[0] = ProjectedQuery()
    arch = DenseArch(0, 0, tower)
    counts = count_flops(arch, torch.randn(3, 4), torch.empty(3, 0))
    experts, routing = of_experts(4, 4)
    assert counts["experts"] == 3 * experts
    assert counts["routing"] == 3 * (routing + 2 * 4 * L * K) + 2 * (L * K) ** 2 * 4
    assert count_parameters(arch)["routing"] == 4 * L * K
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in arch.modules())


def test_counting_neither_draws_nor_allocates(load: Any) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    hidden = [2**16] * 40  # 640 GiB
    cost = cost_report(load("tables.user.num_embeddings=10000000000", f"model.tower.hidden={hidden}")).cost
    assert torch.equal(torch.random.get_rng_state(), before)
    assert cost.parameters["embedding"] == 8 * 10**10 + 30 * 8 + 12 * 4
    assert cost.flops["tower"] == 2 * (WIDTH * 2**16 + 39 * 2**32)


def test_lookups_count_by_their_ids(load: Any) -> None:
    config = load()
    cost = cost_report(config, {"tags": 2.5}).cost
    assert cost.flops["embedding"] == 8 + 8 + 2.5 * 4
    assert cost.embedding_bytes == 4 * (8 + 8 + 2.5 * 4)
    assert cost.ids_per_example == {"user": 1, "item": 1, "tags": 2.5}
    half = cost_report(load("tables.user.data_type=fp16"), {"tags": 2.5}).cost
    assert half.embedding_bytes == 2 * 8 + 4 * (8 + 2.5 * 4)
    assert any("2.5 of tags, 1 id for each other" in text for text in cost_report(config, {"tags": 2.5}).assumptions())
    with pytest.raises(ConfigError, match="'tag' is no sparse feature; there are item, tags, user"):
        cost_report(config, {"tag": 2.5})


def dense_arch(report: CostReport) -> tuple[int, int]:
    return report.cost.over([part for part in PARTS if part != "embedding"])


def test_a_model_is_compared_with_what_it_replaces(load: Any) -> None:
    config = load("model.tower.hidden=[24]", "model.replaces={type: mlp, hidden: [24, 24, 24]}")
    report = cost_report(config)
    assert report.against is not None
    assert (report.cost.model, report.against.model) == ("hilomoe mlp 24 L3 K4", "mlp 24x24x24")
    stack = cost_report(load("model.tower.hidden=[24, 24, 24]", "model.hilomoe=null"))
    assert report.against == stack.cost
    (flops, parameters), (of_stack, parameters_of_stack) = dense_arch(report), dense_arch(stack)
    told = report.as_dict()
    assert told["difference_percent"]["dense_arch"] == pytest.approx(
        {"flops": 100 * (flops / of_stack - 1), "parameters": 100 * (parameters / parameters_of_stack - 1)}
    )
    # 2 [d^2 + 2 L K d] + L (L-1) K^2 FLOPs in place of 2 * 3 d^2, and d^2 + d + 2 L K d parameters for 3 (d^2 + d).
    assert told["difference_percent"]["tower_and_experts"] == pytest.approx(
        {"flops": 100 * ((2 * (24**2 + 24 * 24) + 96) / (6 * 24**2) - 1), "parameters": 100 * (1176 / 1800 - 1)}
    )
    line = report.lines()[1]
    for text in (
        "hilomoe mlp 24 L3 K4 against mlp 24x24x24",
        "experts -30.6 %",
        f"arch {100 * (flops / of_stack - 1):.1f}",
    ):
        assert text in line


def test_without_a_stack_to_replace_experts_are_compared_with_none(load: Any) -> None:
    report = cost_report(load())
    assert report.against is not None
    assert report.against.model == "mlp 16x8"
    assert (report.against.flops["experts"], report.against.flops_per_call) == (0, 0)
    assert report.cost.flops["tower"] == report.against.flops["tower"]
    assert report.as_dict()["difference_percent"]["tower_and_experts"]["flops"] > 0


def test_a_dense_model_is_compared_only_with_what_it_names(load: Any) -> None:
    alone = cost_report(load("model.hilomoe=null"))
    assert alone.as_dict()["against"] is None
    assert "difference_percent" not in alone.as_dict()
    assert len(alone.lines()) == 1
    assert "against" not in alone.title()
    other = cost_report(load("model.hilomoe=null", f"model.replaces={TOWERS['dcn_v2']}"))
    assert other.title() == "Cost of mlp 16x8 against dcn_v2 num_cross_layers=2 10"


def test_a_difference_from_nothing_is_none(load: Any) -> None:
    report = cost_report(load("model.replaces={type: mlp, hidden: []}"))
    assert report.as_dict()["difference_percent"]["tower_and_experts"] == {"flops": None, "parameters": None}
    assert "FLOPs of tower and experts -, of the dense arch +" in report.lines()[1]


def test_rows_are_the_parts_that_there_are_and_their_sums(load: Any) -> None:
    rows = {row[""]: row for row in cost_report(load(dense_features=False)).rows()}
    assert list(rows) == ["embedding", "tower", "experts", "routing", "head", "tower and experts", "dense arch", "all"]
    number = {name: int(row["FLOPs"].replace(",", "")) for name, row in rows.items()}
    assert number["tower and experts"] == number["tower"] + number["experts"] + number["routing"]
    assert number["dense arch"] == number["tower and experts"] + number["head"]
    assert number["all"] == number["dense arch"] + number["embedding"]
    assert rows["experts"]["FLOPs change"] == "-"
    assert rows["tower"]["FLOPs change"] == "+0.0 %"


@pytest.mark.parametrize(
    ("tower", "hilomoe", "name"),
    [
        ("{type: mlp, hidden: [400], dropout: 0.2}", "{num_layers: 3, num_experts: 8}", "hilomoe mlp 400 L3 K8"),
        ("{type: mlp, hidden: []}", "null", "mlp without hidden layers"),
        (
            "{type: mlp, activation: relu, normalization: batch, hidden: [8]}",
            "{num_layers: 3, num_experts: 8}",
            "hilomoe mlp 8 normalization=batch L3 K8",
        ),
        (
            TOWERS["dcn_v2"],
            "{num_layers: 1, num_experts: 4, top_k: 2, experts_in: [tower.cross.*, head]}",
            "hilomoe dcn_v2 num_cross_layers=2 10 L1 K4 top_k=2 experts_in=tower.cross.*,head",
        ),
        (
            TOWERS["final_mlp"],
            "null",
            "final_mlp first_hidden=12x8 second_hidden=6 num_heads=2 first_context=user gate_hidden=64",
        ),
    ],
)
def test_a_model_is_named_by_its_sizes(load: Any, tower: str, hilomoe: str, name: str) -> None:
    model = load(f"model.tower={tower}", f"model.hilomoe={hilomoe}").model
    assert model_name(model) == name
