"""The benchmark of whole cases on sizes so small that its figures mean nothing but must be there."""

import json
import math
from pathlib import Path

import pytest
import torch
from calling import run

from benchmarks.cost import _model, _pooled, _served
from benchmarks.layer import Device
from benchmarks.quality.grid import cases_of, load_grid
from benchmarks.report import ROOT, read

GRID = "benchmarks/grids/domains_movielens_1m.yaml"
CASES = ("feature_gender", "moe_mlora_gender", "moe_mlora_features_gender", "hilomoe_mlora_gender")


@pytest.mark.slow
def test_every_case_is_timed_and_folded_where_it_can_be(tmp_path: Path) -> None:
    done = run("cost", ROOT, GRID, "--cases", *CASES, "--batch", "24", "--turns", "1", "--output", str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    result = read(tmp_path / "cost_domains_movielens_1m_cpu.jsonl")
    assert str(tmp_path) not in json.dumps(result)
    assert [(line["case"], line["folded"]) for line in result["case"]] == list(zip(CASES, (0, 1, 0, 0), strict=True))
    for line in result["case"]:
        figures = [*line["milliseconds"].values(), *line["ratios to the first"].values(), *line["MiB"].values()]
        assert all(math.isfinite(value) and value > 0 for value in figures)


def test_what_serves_gives_what_was_trained() -> None:
    configs = {case.name: case.runs[0].config for case in cases_of(load_grid(GRID), Path("outputs"))}
    for case in CASES:
        model, x = _model(configs[case], 24, Device("cpu")), _pooled(configs[case], 24, Device("cpu"))
        served = _served(model)
        with torch.no_grad():
            torch.testing.assert_close(served(x), model.eval()(x), rtol=1e-5, atol=1e-6)
