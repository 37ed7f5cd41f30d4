"""Every tower is the same function with dense linears and with HiLoMoE linears whose experts are still zero."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from recsys.model.hilomoe import HiLoMoELinear, hilomoe_layers
from recsys.model.towers import MLP, DCNv2, LinearFactory, Transformer, TransformerBlock

ROWS, TOKENS = 6, [4, 8, 4]
WIDTH = sum(TOKENS)


def hilomoe(in_features: int, out_features: int) -> HiLoMoELinear:
    return HiLoMoELinear(in_features, out_features, 2, 3)


TOWERS: dict[str, tuple[Callable[[LinearFactory], MLP | DCNv2 | Transformer], int, int]] = {
    "mlp": (lambda linear: MLP(WIDTH, [10, 5], linear), 5, 2),
    "mlp without hidden": (lambda linear: MLP(WIDTH, [], linear), WIDTH, 0),
    "dcn_v2": (lambda linear: DCNv2(WIDTH, 3, [10], linear), 10, 4),
    "dcn_v2 without hidden": (lambda linear: DCNv2(WIDTH, 2, [], linear), WIDTH, 2),
    "transformer": (lambda linear: Transformer(TOKENS, 8, 2, 4, 12, linear), 24, 12),
    "transformer of one head": (lambda linear: Transformer(TOKENS, 6, 1, 1, 5, linear), 18, 6),
}
"""The tower by its linears' factory, its output width, and how many linears come from the factory."""


@pytest.fixture
def x() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", TOWERS)
def test_zero_experts_leave_the_dense_tower_bit_for_bit(name: str, x: Tensor) -> None:
    build, _, num_linears = TOWERS[name]
    dense, expert = build(nn.Linear), build(hilomoe)
    assert len(hilomoe_layers(expert)) == num_linears
    result = expert.load_state_dict(dense.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert len(result.missing_keys) == 2 * num_linears
    assert torch.equal(expert(x), dense(x))
    for layer in hilomoe_layers(expert).values():
        nn.init.normal_(layer.lora_B)
    assert torch.equal(expert(x), dense(x)) == (num_linears == 0)


@pytest.mark.parametrize("factory", [nn.Linear, hilomoe])
@pytest.mark.parametrize("name", TOWERS)
def test_output_has_the_width_that_is_told(name: str, factory: LinearFactory, x: Tensor) -> None:
    build, width, _ = TOWERS[name]
    tower = build(factory)
    assert tower.out_features == width
    assert tower(x).shape == (ROWS, width)
    assert tower(x[:0]).shape == (0, width)


@pytest.mark.parametrize("factory", [nn.Linear, hilomoe])
@pytest.mark.parametrize("name", TOWERS)
def test_gradients_reach_every_parameter_and_the_input(name: str, factory: LinearFactory, x: Tensor) -> None:
    torch.manual_seed(1)
    tower = TOWERS[name][0](factory)
    for layer in hilomoe_layers(tower).values():
        nn.init.normal_(layer.lora_B)
    x.requires_grad_()
    (tower(x) ** 3).sum().backward()
    for parameter_name, parameter in [*tower.named_parameters(), ("input", x)]:
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.any(), parameter_name


@pytest.mark.parametrize("name", TOWERS)
def test_rows_do_not_see_one_another(name: str, x: Tensor) -> None:
    tower = TOWERS[name][0](hilomoe)
    changed = x.clone()
    changed[1:] = 0
    torch.testing.assert_close(tower(changed)[0], tower(x)[0])


@pytest.mark.parametrize(
    "build",
    [
        lambda p: MLP(WIDTH, [9], nn.Linear, dropout=p),
        lambda p: DCNv2(WIDTH, 1, [9], nn.Linear, dropout=p),
        lambda p: Transformer(TOKENS, 8, 1, 2, 9, nn.Linear, dropout=p),
    ],
)
def test_dropout_acts_in_training_only(build: Callable[[float], nn.Module], x: Tensor) -> None:
    tower = build(0.5)
    assert not torch.equal(tower(x), tower(x))
    tower.eval()
    assert torch.equal(tower(x), tower(x))


def test_mlp_without_hidden_layers_is_the_identity(x: Tensor) -> None:
    assert torch.equal(MLP(WIDTH, [], nn.Linear)(x), x)


def test_cross_layers_follow_their_formula(x: Tensor) -> None:
    tower = DCNv2(WIDTH, 2, [], nn.Linear)
    first, second = tower.cross
    one = x * first(x) + x
    torch.testing.assert_close(tower(x), x * second(one) + one)


def test_attention_equals_that_of_torch() -> None:
    dim, heads, tokens = 12, 3, 5
    block = TransformerBlock(dim, heads, 7, nn.Linear)
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
    tower = Transformer([4, 4], 8, 1, 2, 9, nn.Linear)
    one, other = x[:, :4], x[:, 4:8]
    straight = tower(torch.cat([one, other], 1)).unflatten(1, (2, 8))
    swapped = tower(torch.cat([other, one], 1)).unflatten(1, (2, 8))
    assert not torch.allclose(straight, swapped.flip(1), atol=1e-3)
