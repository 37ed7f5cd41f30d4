"""docs/models.md shows each tower with a config line that works, and what it costs."""

import re
from pathlib import Path

import pytest
import torch

from recsys.config import load_config
from recsys.model.cost import cost_report
from recsys.model.dense_arch import build_dense_arch
from recsys.model.towers import registry

ROOT = Path(__file__).parents[3]
LINES = re.findall(r"^\| `(\{type: \w+.*?\})`.* \| ([\d,]+) \|$", (ROOT / "docs/models.md").read_text(), re.MULTILINE)


def test_every_tower_has_a_line() -> None:
    shown = [match[1] for tower, _ in LINES if (match := re.match(r"\{type: (\w+)", tower))]
    assert sorted(shown) == sorted(builder.__name__.removeprefix("build_") for builder in registry._BUILDERS.values())


@pytest.mark.parametrize(("tower", "flops"), LINES, ids=[tower for tower, _ in LINES])
def test_a_line_makes_a_model_that_learns_at_the_cost_that_is_told(tower: str, flops: str) -> None:
    config = load_config(ROOT / "configs/default.yaml", [f"model.tower={tower}"])
    count, _ = cost_report(config).cost.over(("tower", "interaction"))
    assert f"{count:,}" == flops
    dims = {name: config.tables[feature.table].embedding_dim for name, feature in config.features.sparse.items()}
    num_dense = len(config.features.dense)
    torch.manual_seed(0)
    arch = build_dense_arch(config.model, dims, num_dense_features=num_dense)
    pooled, dense = torch.randn(64, sum(dims.values())), torch.randn(64, num_dense)
    labels = (pooled[:, 0] * pooled[:, 16] + dense[:, 0] > 0).float()
    optimizer = torch.optim.Adam(arch.parameters(), 0.01)
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(arch(pooled, dense)[0], labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
