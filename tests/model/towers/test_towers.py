"""Every tower is the same function with dense linears and with HiLoMoE linears whose experts are still zero."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from recsys.config.towers import Activation, Normalization
from recsys.model.experts import attach_experts, expert_layers
from recsys.model.towers.autoint import AutoInt
from recsys.model.towers.dcn import DCN
from recsys.model.towers.dcn_v2 import DCNv2
from recsys.model.towers.deepfm import DeepFM
from recsys.model.towers.dlrm import DLRM
from recsys.model.towers.fibinet import FiBiNET
from recsys.model.towers.final_mlp import FinalMLP
from recsys.model.towers.gdcn import GDCN
from recsys.model.towers.masknet import MaskNet
from recsys.model.towers.mlp import MLP, build_activation
from recsys.model.towers.nfm import NFM
from recsys.model.towers.pnn import PNN
from recsys.model.towers.qnn import QNN, QNNAlpha
from recsys.model.towers.registry import Tower
from recsys.model.towers.transformer import Transformer, TransformerBlock
from recsys.model.towers.wdl import WDL
from recsys.model.towers.xdeepfm import XDeepFM

ROWS, TOKENS = 6, [4, 8, 4]
WIDTH = sum(TOKENS)
WIDE_TOKENS, EQUAL_TOKENS = [5, 6, 5], [8, 8]

TOWERS: dict[str, tuple[Callable[[], Tower], int, int]] = {
    "mlp": (lambda: MLP(WIDTH, [10, 5]), 5, 2),
    "mlp without hidden": (lambda: MLP(WIDTH, []), WIDTH, 0),
    "dcn_v2": (lambda: DCNv2(WIDTH, 3, [10]), 10, 4),
    "dcn_v2 without hidden": (lambda: DCNv2(WIDTH, 2, []), WIDTH, 2),
    "xdeepfm": (lambda: XDeepFM([8] * 2, [5, 3], [10], wide=True), 19, 3),
    "xdeepfm of CIN alone": (lambda: XDeepFM([4] * 4, [5, 3], []), 8, 2),
    "fibinet": (lambda: FiBiNET([8] * 2, "interaction", 1, [10], wide=True), 11, 5),
    "fibinet with one matrix": (lambda: FiBiNET([4] * 4, "all", 1, []), 48, 4),
    "fibinet with a matrix for each token": (lambda: FiBiNET([4] * 4, "each", 1, [10], sigmoid=True), 10, 9),
    "autoint": (lambda: AutoInt([8] * 2, 2, 6, 2, [10], wide=True), 23, 8),
    "autoint without a perceptron": (lambda: AutoInt([4] * 4, 1, 4, 1, []), 16, 3),
    "masknet": (lambda: MaskNet(TOKENS, 2, 6, 2, [10]), 10, 7),
    "gdcn": (lambda: GDCN(WIDTH, 2, [10]), 10, 5),
    "gdcn in parallel": (lambda: GDCN(WIDTH, 2, [10], parallel=True), WIDTH + 10, 5),
    "qnn": (lambda: QNN(WIDTH, 2, [10]), WIDTH + 10, 5),
    "qnn without norms": (lambda: QNN(WIDTH, 2, [], norm=False), WIDTH, 4),
    "qnn_alpha": (lambda: QNNAlpha(WIDTH, 2, [10], num_rows=3, token_dim=8, num_heads=4), WIDTH + 10, 3),
    "qnn_alpha of one head": (lambda: QNNAlpha(WIDTH, 1, [], num_rows=2, token_dim=4), WIDTH, 1),
    "transformer": (lambda: Transformer(TOKENS, 8, 2, 4, 12), 24, 15),
    "transformer of one head": (lambda: Transformer(TOKENS, 6, 1, 1, 5), 18, 9),
    "final_mlp": (
        lambda: FinalMLP(TOKENS, [8, 6], [4], 2, first_context=[0, 2], second_context=[1], gate_hidden=5),
        12,
        7,
    ),
    "final_mlp with learned contexts": (lambda: FinalMLP(TOKENS, [8, 6], [4], 2, gate_hidden=32), 12, 7),
    "final_mlp without gates": (lambda: FinalMLP(TOKENS, [8], [4], 1), 13, 2),
    "wdl": (lambda: WDL(WIDE_TOKENS, [10, 5]), 6, 2),
    "deepfm": (lambda: DeepFM(EQUAL_TOKENS, [10, 5]), 7, 2),
    "deepfm without first-order terms": (lambda: DeepFM(EQUAL_TOKENS, [10], wide=False), 11, 1),
    "nfm": (lambda: NFM(EQUAL_TOKENS, [10, 5]), 6, 2),
    "nfm without hidden or first-order terms": (lambda: NFM(EQUAL_TOKENS, [], wide=False), 8, 0),
    "pnn": (lambda: PNN(EQUAL_TOKENS, [10, 5]), 5, 2),
    "dcn": (lambda: DCN(WIDTH, 3, [10, 5]), WIDTH + 5, 5),
    "dcn without hidden": (lambda: DCN(WIDTH, 2, []), WIDTH, 2),
    "dlrm": (lambda: DLRM([6, 6, 4], [7], [10, 5]), 5, 4),
    "dlrm without dense features": (lambda: DLRM(EQUAL_TOKENS, None, [10, 5]), 5, 2),
}
"""The dense tower, its output width, and how many linears it has."""


def with_experts(tower: Tower) -> Tower:
    if any(type(child) is nn.Linear for child in tower.modules()):
        attach_experts(tower, ["*"], 2, 3)
    return tower


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TOWERS)
def test_zero_experts_leave_the_dense_tower_bit_for_bit(name: str, x: Tensor) -> None:
    build, _, num_linears = TOWERS[name]
    dense = build()
    expert = with_experts(deepcopy(dense))
    assert len(expert_layers(expert)) == num_linears
    assert set(dense.state_dict()) <= set(expert.state_dict())
    assert torch.equal(expert(x), dense(x))
    for layer in expert_layers(expert).values():
        nn.init.normal_(layer.lora_B)
    assert torch.equal(expert(x), dense(x)) == (num_linears == 0)


@pytest.mark.parametrize("finish", [lambda tower: tower, with_experts], ids=["dense", "experts"])
@pytest.mark.parametrize("name", TOWERS)
def test_output_has_the_width_that_is_told(name: str, finish: Callable[[Tower], Tower], x: Tensor) -> None:
    build, width, _ = TOWERS[name]
    tower = finish(build())
    assert tower.out_features == width
    assert tower(x).shape == (ROWS, width)
    assert tower(x[:0]).shape == (0, width)


@pytest.mark.parametrize("finish", [lambda tower: tower, with_experts], ids=["dense", "experts"])
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_reach_every_parameter_and_the_input(name: str, finish: Callable[[Tower], Tower], x: Tensor) -> None:
    torch.manual_seed(1)
    tower = finish(TOWERS[name][0]())
    for layer in expert_layers(tower).values():
        nn.init.normal_(layer.lora_B)
    x.requires_grad_()
    (tower(x) ** 3).sum().backward()
    for parameter_name, parameter in [*tower.named_parameters(), ("input", x)]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", TOWERS)
def test_rows_do_not_see_one_another(name: str, x: Tensor) -> None:
    tower = with_experts(TOWERS[name][0]())
    changed = x.clone()
    changed[1:] = 0
    torch.testing.assert_close(tower(changed)[0], tower(x)[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda p: MLP(WIDTH, [9], dropout=p),
        lambda p: DCNv2(WIDTH, 1, [9], dropout=p),
        lambda p: Transformer(TOKENS, 8, 1, 2, 9, dropout=p),
        lambda p: FinalMLP(TOKENS, [9], [9], 1, dropout=p),
        lambda p: WDL(WIDE_TOKENS, [9], dropout=p),
        lambda p: DeepFM(EQUAL_TOKENS, [9], dropout=p),
        lambda p: NFM(EQUAL_TOKENS, [9], dropout=p),
        lambda p: PNN(EQUAL_TOKENS, [9], dropout=p),
        lambda p: DCN(WIDTH, 1, [9], dropout=p),
        lambda p: DLRM([6, 6, 4], [9], [9], dropout=p),
        lambda p: XDeepFM([4] * 4, [2], [9], dropout=p),
        lambda p: FiBiNET([4] * 4, "all", 3, [9], dropout=p),
        lambda p: AutoInt([4] * 4, 1, 4, 1, [], dropout=p),
        lambda p: MaskNet(TOKENS, 1, 9, 1, [], dropout=p),
        lambda p: GDCN(WIDTH, 1, [9], dropout=p),
        lambda p: QNN(WIDTH, 1, [], dropout=p),
        lambda p: QNNAlpha(WIDTH, 1, [], num_rows=2, token_dim=4, dropout=p),
    ],
)
def test_dropout_acts_in_training_only(build: Callable[[float], nn.Module], x: Tensor) -> None:
    tower = build(0.5)
    assert not torch.equal(tower(x), tower(x))
    tower.eval()
    assert torch.equal(tower(x), tower(x))


def test_mlp_without_hidden_layers_is_the_identity(x: Tensor) -> None:
    assert torch.equal(MLP(WIDTH, [])(x), x)


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: max(z, 0.0),
    "gelu": lambda z: z * (1 + math.erf(z / math.sqrt(2))) / 2,
    "silu": lambda z: z / (1 + math.exp(-z)),
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "prelu": lambda z: z if z > 0 else 0.25 * z,
    "none": lambda z: z,
}
NORMALIZATIONS: dict[str, int | None] = {"none": None, "batch": 0, "layer": 1}
"""The dimension along which each takes mean and variance."""


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("normalization", get_args(Normalization))
def test_perceptrons_follow_their_formula(activation: Activation, normalization: Normalization, x: Tensor) -> None:
    tower, x = MLP(WIDTH, [9, 5], activation=activation, normalization=normalization).double(), x.double()
    for parameter in tower.norms.parameters():
        nn.init.normal_(parameter)
    expected = x
    for linear, norm in zip(tower.linears, tower.norms, strict=True):
        z = torch.stack([linear.weight @ row + linear.bias for row in expected])
        if (along := NORMALIZATIONS[normalization]) is not None:
            mean = z.mean(along, keepdim=True)
            variance = ((z - mean) ** 2).mean(along, keepdim=True)
            z = (z - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
        expected = torch.tensor(
            [[ACTIVATIONS[activation](value) for value in row] for row in z.tolist()], dtype=z.dtype
        )
    torch.testing.assert_close(tower(x), expected)


@pytest.mark.parametrize("activation", get_args(Activation))
def test_activations_take_tokens_as_they_take_rows(activation: Activation) -> None:
    tokens, activate = torch.randn(ROWS, 4, 4), build_activation(activation, 4)  # as many as they are wide
    for slopes in activate.parameters():
        nn.init.normal_(slopes)
    expected = torch.stack([activate(token) for token in tokens.unbind(1)], 1)
    torch.testing.assert_close(activate(tokens), expected)


def test_cross_layers_follow_their_formula(x: Tensor) -> None:
    tower = DCNv2(WIDTH, 2, [])
    first, second = tower.cross
    one = x * first(x) + x
    torch.testing.assert_close(tower(x), x * second(one) + one)


def test_attention_equals_that_of_torch() -> None:
    dim, heads, tokens = 12, 3, 5
    block = TransformerBlock(dim, heads, 7)
    reference = nn.TransformerEncoderLayer(dim, heads, 7, dropout=0.0, batch_first=True, norm_first=True)
    with torch.no_grad():
        projections = (block.query, block.key, block.value)
        reference.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))
        reference.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))
    reference.self_attn.out_proj.load_state_dict(block.output.state_dict())
    reference.linear1.load_state_dict(block.up.state_dict())
    reference.linear2.load_state_dict(block.down.state_dict())
    x = torch.randn(ROWS, tokens, dim)
    torch.testing.assert_close(block(x), reference(x))


def test_transformer_tells_features_apart_without_positions(x: Tensor) -> None:
    tower = Transformer([4, 4], 8, 1, 2, 9)
    one, other = x[:, :4], x[:, 4:8]
    straight = tower(torch.cat([one, other], 1)).unflatten(1, (2, 8))
    swapped = tower(torch.cat([other, one], 1)).unflatten(1, (2, 8))
    assert not torch.allclose(straight, swapped.flip(1), atol=1e-3)


def test_final_mlp_follows_its_formula(x: Tensor) -> None:
    """The paper's fusion with one head: w_1' o_1 + w_2' o_2 + o_1' W o_2, on features gated by 2 sigmoid(...)."""
    tower = FinalMLP(TOKENS, [6], [4], 1, first_context=[1], gate_hidden=5)
    first_gate, second_gate = tower.gates
    for gate in tower.gates:
        nn.init.normal_(gate.output.weight)
    one = tower.first(x * 2 * torch.sigmoid(first_gate.output(first_gate.hidden(x[:, 4:12]).relu())))
    two = tower.second(x * 2 * torch.sigmoid(second_gate.output(second_gate.hidden(second_gate.context).relu())))
    interaction = torch.stack([o1 @ tower.interaction[0] @ o2 for o1, o2 in zip(one, two, strict=True)])
    torch.testing.assert_close(tower(x), torch.cat([one, two, interaction[:, None]], 1))


def test_final_mlp_interacts_head_by_head(x: Tensor) -> None:
    """Two heads are the block-diagonal case of one."""
    heads, whole = FinalMLP(TOKENS, [6], [4], 2), FinalMLP(TOKENS, [6], [4], 1)
    state = heads.state_dict()
    interaction = state.pop("interaction")
    whole.load_state_dict({**state, "interaction": torch.block_diag(*interaction)[None]})
    torch.testing.assert_close(heads(x)[:, 10:].sum(1), whole(x)[:, 10])
