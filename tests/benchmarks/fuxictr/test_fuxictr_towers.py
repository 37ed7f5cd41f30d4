"""Our towers beside FuxiCTR's models, where a checkout is named, and what the command says if they differ."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fuxictr import towers
from benchmarks.report import ROOT, read
from recsys.errors import UserError


@pytest.mark.skipif("HILOREC_FUXICTR" not in os.environ, reason="HILOREC_FUXICTR names no checkout of FuxiCTR")
def test_towers_compute_what_fuxictrs_models_do(tmp_path: Path) -> None:
    command = [os.environ["HILOREC_FUXICTR_PYTHON"], "-m", "benchmarks.fuxictr.towers"]
    command += ["--checkout", os.environ["HILOREC_FUXICTR"], "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {line["name"]: line["figures"] for line in read(tmp_path / "fuxictr_towers.jsonl")["tower"]}
    assert found.keys() == {case.name for case in towers.CASES}
    for figures in found.values():
        assert figures["largest difference"] < 1e-12 and figures["control"] > 1e-8


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in, imported as FuxiCTR and forgotten after the test."""
    (tmp_path / "fuxictr").mkdir()
    (tmp_path / "fuxictr" / "version.py").touch()
    (tmp_path / "fuxictr" / "__init__.py").write_text("__version__ = 'stand-in'\n")
    (tmp_path / "model_zoo").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    return tmp_path


FEATURES = """
class FeatureMap:
    def __init__(self, *_):
        self.features = {}

    def get_num_fields(self):
        return len(self.features)
"""
DNN = """
from torch import cat, nn


class DNN(nn.Module):
    def __init__(self, feature_map, embedding_dim, hidden_units, **_):
        super().__init__()
        tables = {name: nn.Embedding(of["vocab_size"], embedding_dim) for name, of in feature_map.features.items()}
        layers = nn.ModuleDict({"embedding_layers": nn.ModuleDict(tables)})
        self.embedding_layer = nn.ModuleDict({"embedding_layer": layers})
        widths = [len(tables) * embedding_dim, *hidden_units]
        hidden = [layer for of in zip(widths, hidden_units) for layer in (nn.Linear(*of), nn.ReLU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(widths[-1], 1))

    def forward(self, features):
        tables = self.embedding_layer.embedding_layer.embedding_layers
        x = cat([tables[name](ids) for name, ids in features.items()], 1)
        return {"y_pred": self.mlp(x).sigmoid()}
"""


def test_weights_are_copied_and_both_are_compared(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a perceptron written as FuxiCTR's are, where there is no checkout of it."""
    (checkout / "fuxictr" / "features.py").write_text(FEATURES)
    (checkout / "model_zoo" / "DNN" / "src").mkdir(parents=True)
    (checkout / "model_zoo" / "DNN" / "src" / "DNN.py").write_text(DNN)
    monkeypatch.syspath_prepend(checkout)
    (case,) = (case for case in towers.CASES if case.name == "MLP")
    figures = towers.compare(case, checkout, 17)
    assert figures["largest difference"] < towers.ALIKE and figures["control"] > 1e-8


@pytest.mark.parametrize(("difference", "code"), [(9e-13, 0), (1e-12, 1), (float("nan"), 1)])
def test_a_tower_that_differs_is_named_and_fails_the_command(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, difference: float, code: int
) -> None:
    figures = {"largest difference": 0.0, "control": 0.1, "lowest": 0.1, "highest": 0.9}
    monkeypatch.setattr(
        towers,
        "compare",
        lambda case, *_: figures | ({"largest difference": difference} if case.name == "GDCN, parallel" else {}),
    )
    arguments = towers.parse(["--checkout", str(checkout), "--output", str(checkout / "results")])
    assert towers.benchmark(arguments) == code
    page = (checkout / "results" / "fuxictr_towers.md").read_text()
    assert ("NOT ALIKE, by 1e-12 or more: GDCN, parallel." in page) == bool(code)


def test_what_the_environment_lacks_is_named(checkout: Path) -> None:
    (checkout / "fuxictr" / "__init__.py").write_text("import package_that_is_missing\n")
    with pytest.raises(UserError, match=r"lacks what FuxiCTR needs .*package_that_is_missing.*; see docs/benchmarks"):
        towers.benchmark(towers.parse(["--checkout", str(checkout)]))
    (checkout / "model_zoo").rmdir()
    with pytest.raises(UserError, match=r"--checkout: no .*model_zoo"):
        towers.benchmark(towers.parse(["--checkout", str(checkout)]))
