"""Towers of explicit interactions against their papers' formulas, computed row by row and product by product."""

import math
from collections.abc import Callable
from itertools import combinations, product
from pathlib import Path

import pytest
import torch
from tiny import write_tiny_config
from torch import Tensor, nn

from recsys.config import ConfigError, load_config
from recsys.config.towers import Normalization
from recsys.model.cost import cost_report
from recsys.model.experts import attach_experts
from recsys.model.towers import Tower
from recsys.model.towers.autoint import AutoInt, InteractingLayer
from recsys.model.towers.fibinet import BilinearInteraction, FiBiNET
from recsys.model.towers.gdcn import GDCN
from recsys.model.towers.masknet import MaskNet
from recsys.model.towers.mlp import MLP
from recsys.model.towers.qnn import QNN, QNNAlpha
from recsys.model.towers.xdeepfm import CompressedInteractionNetwork, XDeepFM

ROWS, FIELDS, DIM = 5, 4, 3


def follows(tower: Tower, width: int, literal: Callable[[Tensor], list[Tensor]]) -> None:
    """Hold a tower against the parts of its output for one row."""
    tower.double()
    x = torch.randn(ROWS, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.stack([torch.cat([torch.atleast_1d(part) for part in literal(row)]) for row in x])
    assert (expected.abs().amax(0) > 1e-6).sum() > expected.shape[1] // 4
    torch.testing.assert_close(tower(x), expected, rtol=1e-10, atol=1e-12)


def fields_of(row: Tensor, *, wide: bool) -> tuple[list[Tensor], Tensor]:
    """Embeddings of a row, and the sum of its first-order terms."""
    tokens = list(row.split(DIM + (4 if wide else 0)))
    return [token[:DIM] for token in tokens], sum((token[DIM] for token in tokens if wide), torch.zeros(()))


def perceptron(mlp: MLP, x: Tensor) -> Tensor:
    for linear in mlp.linears:
        x = (linear.weight @ x + linear.bias).clamp(min=0)
    return x


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    mean = sum(x) / len(x)
    variance = sum((x - mean) ** 2) / len(x)
    return (x - mean) / math.sqrt(variance + 1e-5) * norm.weight + norm.bias


def shake(tower: nn.Module) -> None:
    """Give norms weights and biases that show."""
    torch.manual_seed(0)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.5)


def cin(network: CompressedInteractionNetwork, fields: list[Tensor]) -> list[Tensor]:
    maps, pooled = fields, []
    for layer in network.layers:
        weights = layer.weight.unflatten(1, (len(fields), -1))  # (maps, i, j)
        maps = [
            layer.bias[h]
            + sum(weights[h, i, j] * (x * y) for (i, x), (j, y) in product(enumerate(fields), enumerate(maps)))
            for h in range(len(weights))
        ]
        pooled += [sum(x) for x in maps]
    return pooled


@pytest.mark.parametrize("wide", [True, False])
def test_xdeepfm_follows_its_formula(wide: bool) -> None:
    width = DIM + (4 if wide else 0)
    tower = XDeepFM([width] * FIELDS, [5, 3, 2], [7], wide=wide)

    def literal(row: Tensor) -> list[Tensor]:
        fields, linear = fields_of(row, wide=wide)
        return [perceptron(tower.mlp, torch.cat(fields)), *cin(tower.cin, fields), *([linear] if wide else [])]

    follows(tower, width * FIELDS, literal)


def bilinear(interaction: BilinearInteraction, fields: list[Tensor], kind: str) -> list[Tensor]:
    pairs = []
    for i, j in combinations(range(FIELDS), 2):
        matrix = interaction.linears[0 if kind == "all" else i].weight
        if kind == "interaction":
            matrix = matrix.unflatten(0, (-1, DIM))[j - i - 1]
        pairs.append((matrix @ fields[i]) * fields[j])
    return pairs


@pytest.mark.parametrize(("kind", "sigmoid"), [("all", False), ("each", True), ("interaction", False)])
def test_fibinet_follows_its_formula(kind: str, sigmoid: bool) -> None:
    tower = FiBiNET([DIM + 4] * FIELDS, kind, 2, [], sigmoid=sigmoid, wide=True)
    shake(tower)

    def literal(row: Tensor) -> list[Tensor]:
        fields, linear = fields_of(row, wide=True)
        means = torch.stack([sum(field) / DIM for field in fields])
        excited = tower.senet.excite.weight @ (tower.senet.squeeze.weight @ means).clamp(min=0)
        weights = 1 / (1 + torch.exp(-excited)) if sigmoid else excited.clamp(min=0)
        reweighted = [weight * field for weight, field in zip(weights, fields, strict=True)]
        return [*bilinear(tower.plain, fields, kind), *bilinear(tower.reweighted, reweighted, kind), linear]

    follows(tower, (DIM + 4) * FIELDS, literal)
    matrices = {"all": 1, "each": FIELDS - 1, "interaction": FIELDS * (FIELDS - 1) // 2}[kind]
    assert sum(p.numel() for p in tower.plain.parameters()) == matrices * DIM**2


def interact(layer: InteractingLayer, fields: list[Tensor]) -> list[Tensor]:
    outputs = []
    for field in fields:
        heads = []
        for query, key, value in zip(
            *(linear.weight.chunk(layer.num_heads) for linear in (layer.query, layer.key, layer.value)), strict=True
        ):
            scores = [math.exp((query @ field) @ (key @ other)) for other in fields]
            heads.append(
                sum(score / sum(scores) * (value @ other) for score, other in zip(scores, fields, strict=True))
            )
        residual = field if isinstance(layer.residual, nn.Identity) else layer.residual.weight @ field
        outputs.append((torch.cat(heads) + residual).clamp(min=0))
    return outputs


@pytest.mark.parametrize("wide", [True, False])
def test_autoint_follows_its_formula(wide: bool) -> None:
    width = DIM + (4 if wide else 0)
    tower = AutoInt([width] * FIELDS, 2, 6, 2, [5], wide=wide)
    assert isinstance(tower.layers[1].residual, nn.Identity)

    def literal(row: Tensor) -> list[Tensor]:
        fields, linear = fields_of(row, wide=wide)
        attended = fields
        for layer in tower.layers:
            attended = interact(layer, attended)
        return [perceptron(tower.mlp, torch.cat(fields)), *attended, *([linear] if wide else [])]

    follows(tower, width * FIELDS, literal)


def test_masknet_follows_its_formula() -> None:
    token_dims = [3, 5, 2]
    tower = MaskNet(token_dims, 2, 4, 2, [6])
    shake(tower)

    def literal(row: Tensor) -> list[Tensor]:
        normed = torch.cat([layer_norm(norm, x) for norm, x in zip(tower.norms, row.split(token_dims), strict=True)])
        blocks = []
        for block in tower.blocks:
            hidden = (block.aggregation.weight @ row + block.aggregation.bias).clamp(min=0)
            mask = block.projection.weight @ hidden + block.projection.bias
            blocks.append(layer_norm(block.norm, block.linear.weight @ (mask * normed)).clamp(min=0))
        return [perceptron(tower.mlp, torch.cat(blocks))]

    follows(tower, sum(token_dims), literal)
    assert tower.blocks[0].aggregation.out_features == 2 * sum(token_dims)


@pytest.mark.parametrize("parallel", [True, False])
def test_gdcn_follows_its_formula(parallel: bool) -> None:
    tower = GDCN(6, 3, [5], parallel=parallel)

    def literal(row: Tensor) -> list[Tensor]:
        x = row
        for layer in tower.layers:
            gate = 1 / (1 + torch.exp(-(layer.gate.weight @ x)))
            x = row * (layer.cross.weight @ x + layer.cross.bias) * gate + x
        return [perceptron(tower.mlp, row), x] if parallel else [perceptron(tower.mlp, x)]

    follows(tower, 6, literal)


@pytest.mark.parametrize("norm", [True, False])
def test_qnn_follows_its_formula(norm: bool) -> None:
    tower = QNN(6, 3, [5], norm=norm)
    shake(tower)

    def literal(row: Tensor) -> list[Tensor]:
        x = row
        for layer in tower.layers:
            quadratic = (layer.left.weight @ x + layer.left.bias) * (layer.right.weight @ x + layer.right.bias)
            x = x + (layer_norm(layer.norm, quadratic) if norm else quadratic)
        return [perceptron(tower.mlp, row), x]

    follows(tower, 6, literal)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("normalization", ["none", "layer"])
def test_qnn_alpha_follows_its_formula(heads: int, normalization: Normalization) -> None:
    tokens, dim, rows = 3, 4, 2
    tower = QNNAlpha(tokens * dim, 2, [5], num_rows=rows, token_dim=dim, num_heads=heads, normalization=normalization)
    shake(tower)
    width = dim // heads

    def literal(row: Tensor) -> list[Tensor]:
        x = row
        for layer in tower.layers:
            z = layer.linear.weight @ x + layer.linear.bias
            factors = (z if normalization == "none" else layer_norm(layer.norm, z)).clamp(min=0)
            out = x.clone()
            place = 0  # in the order of slices
            for head in range(heads):
                for token in range(tokens):
                    for number in range(width):
                        within = token * width + number
                        first = head * rows * tokens * width
                        of_rows = [factors[first + r * tokens * width + within] for r in range(rows)]
                        out[place] = x[place] + x[token * dim + head * width + number] * sum(of_rows)
                        place += 1
            x = out
        deep = perceptron(tower.mlp, row) if normalization == "none" else tower.mlp(row[None])[0]
        return [deep, x]

    follows(tower, tokens * dim, literal)


@pytest.mark.parametrize(
    ("build", "width"),
    [
        (lambda hidden: XDeepFM([DIM] * FIELDS, [5, 2], hidden), 7),
        (lambda hidden: AutoInt([DIM] * FIELDS, 1, 6, 2, hidden), 6 * FIELDS),
        (lambda hidden: GDCN(DIM * FIELDS, 1, hidden), DIM * FIELDS),
        (lambda hidden: GDCN(DIM * FIELDS, 1, hidden, parallel=True), DIM * FIELDS),
        (lambda hidden: QNN(DIM * FIELDS, 1, hidden), DIM * FIELDS),
        (lambda hidden: QNNAlpha(DIM * FIELDS, 1, hidden, num_rows=2, token_dim=DIM), DIM * FIELDS),
    ],
)
def test_without_hidden_layers_the_interactions_stand_alone(build: Callable[[list[int]], Tower], width: int) -> None:
    assert build([]).out_features == width
    assert not [name for name, _ in build([]).named_modules() if "mlp" in name]


@pytest.mark.parametrize("kind", ["all", "each"])
def test_every_kind_of_fibinet_is_a_program_for_any_number_of_rows(kind: str) -> None:
    """With experts that are not zero on all of its linears."""
    tower = FiBiNET([8] * 3, kind, 3, [6], wide=True).eval()
    for layer in attach_experts(tower, ["*"], 2, 3).values():
        nn.init.normal_(layer.lora_B, std=0.1)
    program = torch.export.export(tower, (torch.randn(3, 24),), dynamic_shapes=({0: torch.export.Dim("rows")},))
    x = torch.randn(17, 24)
    torch.testing.assert_close(program.module()(x), tower(x))


@pytest.mark.parametrize(
    ("tower", "told"),
    [
        (
            "{type: xdeepfm, wide: false}",
            "model.tower.type: xdeepfm needs one width, and tables.tag.embedding_dim is 4",
        ),
        (
            "{type: fibinet, wide: false}",
            "model.tower.type: fibinet needs one width, and tables.tag.embedding_dim is 4",
        ),
        ("{type: autoint}", "model.tower.type: autoint needs one width, and tables.tag.embedding_dim is 4"),
        ("{type: xdeepfm}", "model.tower.wide: the first-order weight takes 4 numbers of each token"),
        ("{type: qnn_alpha, num_heads: 2}", "model.tower.num_heads: 2 heads need tokens of one width that they divide"),
        (
            "{type: qnn_alpha, num_heads: 3}",
            "divide, and tables.user.embedding_dim is 8; change one of them, or set num_heads to 1",
        ),
        ("{type: autoint, num_heads: 3}", "num_heads 3 does not divide attention_dim 32"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_path(tmp_path: Path, tower: str, told: str) -> None:
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match=told):
        load_config(config, [f"model.tower={tower}"])


W, F, D, MLP_FLOPS = 32, 4, 4, 2 * 10
"""Of tokens of width 8 in the tiny config, of which 4 are a first-order weight and padding where there is a wide part;
and what a perceptron of one layer of 10 costs for each of its inputs."""


@pytest.mark.parametrize(
    ("tower", "linears", "rest"),
    [
        ("xdeepfm, cin_hidden: [5, 3]", D * 2 * (F * F * 5 + F * 5 * 3) + F * D * MLP_FLOPS, 0),
        ("fibinet, bilinear: all", 2 * (F - 1) * 2 * D**2 + 2 * 2 * F + 2 * 6 * D * MLP_FLOPS, 0),
        ("fibinet, bilinear: each", 2 * (F - 1) * 2 * D**2 + 2 * 2 * F + 2 * 6 * D * MLP_FLOPS, 0),
        ("fibinet, reduction_ratio: 2", 2 * 6 * 2 * D**2 + 2 * 2 * 2 * F + 2 * 6 * D * MLP_FLOPS, 0),
        # In the second layer queries, keys and values of the first's width, and no residual's matrix.
        (
            "autoint, wide: true, attention_dim: 6",
            F * 2 * (4 * D * 6 + 3 * 6 * 6) + F * D * MLP_FLOPS,
            2 * 2 * 2 * F**2 * 6,
        ),
        ("masknet, num_blocks: 2, block_dim: 7", 2 * 2 * (2 * W * W + W * 7) + 2 * 7 * MLP_FLOPS, 0),
        ("gdcn, num_cross_layers: 2", 2 * 2 * 2 * W**2 + W * MLP_FLOPS, 0),
        ("qnn, num_layers: 2", 2 * 2 * 2 * W**2 + W * MLP_FLOPS, 0),
        ("qnn_alpha, num_layers: 2, num_rows: 3", 2 * 3 * 2 * W**2 + W * MLP_FLOPS, 0),
    ],
)
def test_towers_cost_what_the_formulas_say(tmp_path: Path, tower: str, linears: int, rest: int) -> None:
    widths = ("model.dense_dim=8", *(f"tables.{table}.embedding_dim=8" for table in ("user", "item", "tag")))
    config = load_config(
        write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out"),
        [f"model.tower={{type: {tower}, hidden: [10]}}", *widths],
    )
    flops = cost_report(config).cost.flops
    assert (flops["tower"], flops["interaction"]) == (linears, rest)
    assert flops["experts"] > 0
