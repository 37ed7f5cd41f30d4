"""docs/models.md shows each tower with a config line that works, and what it costs."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.report import read
from recsys.config import Config, load_config
from recsys.model.cost import cost_report
from recsys.model.dense_arch import build_dense_arch
from recsys.model.towers import registry

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/models.md").read_text()
LINES = re.findall(r"^\| `(\{type: \w+.*?\})`.* \| ([\d,]+) \| \.\d+ \|$", PAGE, re.MULTILINE)
RESULTS = ROOT / "benchmarks/results/quality_movielens_1m_published.jsonl"


def test_every_tower_has_a_line() -> None:
    shown = [match[1] for tower, _ in LINES if (match := re.match(r"\{type: (\w+)", tower))]
    assert sorted(shown) == sorted(builder.__name__.removeprefix("build_") for builder in registry._BUILDERS.values())


def test_a_tower_has_the_auc_that_was_measured() -> None:
    told = dict(re.findall(r"^\| `\{type: (\w+).* (\.\d+) \|$", PAGE, re.MULTILINE))
    assert len(told) == len(LINES)
    measured = {line["case"]: line["statistics"]["test AUC"]["mean"] for line in read(RESULTS)["case"]}
    assert told == {tower: f"{measured[tower]:.4f}".lstrip("0") for tower in told}


@pytest.mark.parametrize(
    ("tower", "flops"),
    [pytest.param(*line, marks=[pytest.mark.slow] if n % 4 else []) for n, line in enumerate(LINES)],
    ids=[tower for tower, _ in LINES],
)
def test_a_line_makes_a_model_that_learns_at_the_cost_that_is_told(tower: str, flops: str) -> None:
    config = load_config(ROOT / "configs/default.yaml", [f"model.tower={tower}"])
    count, _ = cost_report(config).cost.over(("tower", "interaction"))
    assert f"{count:,}" == flops
    assert_learns(config)


def test_the_paths_shown_make_a_model_that_learns_at_the_cost_of_the_tower_beside_them() -> None:
    section = PAGE.partition("## Several paths")[2].partition("\n## ")[0]
    command = re.search(r"```bash\n(.*?)```", section, re.DOTALL)
    told = re.search(r"cost ([\d,]+) FLOPs an example, .* one `(\{.*?\})`", section)
    assert command is not None and told is not None
    _, _, _, path, *overrides = shlex.split(command[1].replace("\\\n", ""))
    config = load_config(ROOT / path, [*overrides, f"model.replaces={told[2]}"])
    report = cost_report(config)
    assert report.against is not None
    counts = {f"{cost.over(('tower', 'interaction'))[0]:,}" for cost in (report.cost, report.against)}
    assert counts == {told[1]}
    assert_learns(config)


def assert_learns(config: Config) -> None:
    dims, num_dense = config.embedding_dims, len(config.features.dense)
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
