"""Towers of first-order terms and products, against their papers' formulas, number by number in float64."""

import math
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from torch import Tensor, nn

from recsys.config import ModelConfig
from recsys.model.dense_arch import DenseArch, build_dense_arch
from recsys.model.towers.dcn import DCN
from recsys.model.towers.deepfm import DeepFM
from recsys.model.towers.dlrm import DLRM
from recsys.model.towers.mlp import MLP
from recsys.model.towers.nfm import NFM
from recsys.model.towers.pnn import PNN
from recsys.model.towers.wdl import WDL

Vector = list[float]


@pytest.fixture
def draw() -> Callable[[int, int], list[Vector]]:
    """Rows that are drawn anew in each test."""
    generator = torch.Generator().manual_seed(3)
    return lambda rows, width: torch.randn(rows, width, generator=generator, dtype=torch.float64).tolist()


def perceptron(mlp: MLP | None, x: Vector) -> Vector:
    """Each layer's max(0, W x + b)."""
    for linear in mlp.linears if mlp is not None else ():
        weight, bias = linear.weight.tolist(), linear.bias.tolist()
        x = [max(0.0, dot(row, x) + b) for row, b in zip(weight, bias, strict=True)]
    return x


def dot(one: Iterable[float], other: Iterable[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def parts(row: Vector, dims: Sequence[int]) -> list[Vector]:
    rest = iter(row)
    return [[next(rest) for _ in range(dim)] for dim in dims]


def pairs(tokens: list[Vector]) -> list[tuple[Vector, Vector]]:
    return [(tokens[i], tokens[j]) for i in range(len(tokens)) for j in range(i + 1, len(tokens))]


def flat(tokens: Iterable[Vector]) -> Vector:
    return [number for token in tokens for number in token]


def wdl(tower: WDL, row: Vector) -> Vector:
    tokens = parts(row, [6, 9, 5])
    return [*perceptron(tower.mlp, flat(token[:-4] for token in tokens)), sum(token[-4] for token in tokens)]


def deepfm(tower: DeepFM, row: Vector) -> Vector:
    tokens = [token[:-4] for token in parts(row, [7, 7, 7])]
    weights = [token[-4] for token in parts(row, [7, 7, 7])]
    fm = sum(dot(one, other) for one, other in pairs(tokens))
    return [*perceptron(tower.mlp, flat(tokens)), fm, sum(weights)]


def deepfm_without_weights(tower: DeepFM, row: Vector) -> Vector:
    tokens = parts(row, [5, 5, 5])
    return [*perceptron(tower.mlp, row), sum(dot(one, other) for one, other in pairs(tokens))]


def nfm(tower: NFM, row: Vector) -> Vector:
    tokens = [token[:-4] for token in parts(row, [7, 7, 7])]
    pooled = [sum(one[d] * other[d] for one, other in pairs(tokens)) for d in range(3)]
    return [*perceptron(tower.mlp, pooled), sum(token[-4] for token in parts(row, [7, 7, 7]))]


def pnn(tower: PNN, row: Vector) -> Vector:
    products = [dot(one, other) for one, other in pairs(parts(row, [3, 3, 3, 3]))]
    return perceptron(tower.mlp, [*row, *products])


def dcn(tower: DCN, row: Vector) -> Vector:
    x = row
    for linear, bias in zip(tower.cross, tower.cross_biases, strict=True):
        factor = dot(linear.weight.tolist()[0], x)
        x = [x_0 * factor + b + x_l for x_0, b, x_l in zip(row, bias.tolist(), x, strict=True)]
    return [*x, *(perceptron(tower.mlp, row) if tower.mlp is not None else [])]


def dlrm(tower: DLRM, row: Vector) -> Vector:
    *tokens, dense = parts(row, [3, 3, 3, 6])
    z = perceptron(tower.bottom, dense)
    return perceptron(tower.top, [*z, *(dot(one, other) for one, other in pairs([*tokens, z]))])


def dlrm_without_dense_features(tower: DLRM, row: Vector) -> Vector:
    return perceptron(tower.top, [dot(one, other) for one, other in pairs(parts(row, [4, 4, 4]))])


CASES: list[tuple[Callable[[], nn.Module], Callable[..., Vector], int]] = [
    (lambda: WDL([6, 9, 5], [8, 4]), wdl, 20),
    (lambda: DeepFM([7] * 3, [8, 4]), deepfm, 21),
    (lambda: DeepFM([5] * 3, [8, 4], wide=False), deepfm_without_weights, 15),
    (lambda: NFM([7] * 3, [8, 4]), nfm, 21),
    (lambda: NFM([7] * 3, []), nfm, 21),
    (lambda: PNN([3] * 4, [8, 4]), pnn, 12),
    (lambda: DCN(12, 3, [8, 4]), dcn, 12),
    (lambda: DCN(12, 2, []), dcn, 12),
    (lambda: DLRM([3, 3, 3, 6], [8], [8, 4]), dlrm, 15),
    (lambda: DLRM([4] * 3, None, [8, 4]), dlrm_without_dense_features, 12),
]


@pytest.mark.parametrize(("build", "formula", "width"), CASES, ids=[f"{case[1].__name__}-{case[2]}" for case in CASES])
def test_towers_follow_their_formulas(
    build: Callable[[], nn.Module],
    formula: Callable[..., Vector],
    width: int,
    draw: Callable[[int, int], list[Vector]],
) -> None:
    torch.manual_seed(2)
    tower = build().double()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.5)  # biases, too, which begin at zero in cross layers
    rows = draw(40, width)
    found = tower(torch.tensor(rows, dtype=torch.float64))
    expected = torch.tensor([formula(tower, row) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def arch_of(tower: str, dims: dict[str, int], **settings: object) -> DenseArch:
    config = ModelConfig.model_validate({"tower": {"type": tower, **settings}, "dense_dim": 8})
    return build_dense_arch(config, dims, num_dense_features=2)


@pytest.mark.parametrize(("tower", "sums"), [("wdl", 1), ("deepfm", 2), ("nfm", 1)])
def test_the_head_begins_with_the_published_sum(tower: str, sums: int) -> None:
    """Summands of the logit have the factor 1, and what a perceptron gives has factors of its own."""
    arch = arch_of(tower, {"user": 8, "item": 8}, hidden=(5,))
    pooled, dense = torch.randn(6, 16), torch.randn(6, 2)
    given = arch.tower(torch.cat([pooled, arch.dense_projection(dense)], 1))
    deep, summands = given.split([5, sums], 1)
    expected = deep @ arch.head.weight[0, :5] + summands.sum(1) + arch.head.bias
    torch.testing.assert_close(arch(pooled, dense)[0], expected)
    assert (arch.head.weight[0, :5] != 1).all()


def test_first_order_weights_are_read_and_padding_is_not() -> None:
    """Of the tables as of the dense features' projection, whose row is a linear model of them."""
    arch = arch_of("wdl", {"user": 8, "item": 12}, hidden=(5,))
    pooled = torch.randn(4, 20, requires_grad=True)
    arch(pooled, torch.randn(4, 2))[0].sum().backward()
    gradients: list[Tensor | None] = [pooled.grad, arch.dense_projection.weight.grad.t()]
    read = [bool(column.any()) for gradient in gradients for column in gradient.t()]
    weight, padding = [True], [False] * 3
    assert read == [True] * 4 + weight + padding + [True] * 8 + weight + padding + [True] * 4 + weight + padding
    assert (pooled.grad[:, [4, 16]] == 1).all()
