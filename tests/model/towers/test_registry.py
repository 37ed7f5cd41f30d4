"""A new tower is one file and its settings class, named nowhere else."""

import inspect
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import pytest
import torch
from tiny import write_tiny_config, write_tiny_log
from torch import nn

from recsys.config import TowerSettings
from recsys.model.towers import registry
from recsys.model.towers.mlp import PReLU
from recsys.model.towers.normalization import BatchNorm

ROOT = Path(__file__).parents[3]

SETTINGS = """

class ScaledTowerConfig(TowerSettings):
    \"\"\"A linear map of the tokens, scaled.\"\"\"

    expert_linears = ("tower.only",)

    type: Literal["scaled"]
    width: Width = 6
"""
TOWER = """
from torch import Tensor, nn

from recsys.config.towers import ScaledTowerConfig
from recsys.model.towers.registry import Tokens, Tower, builds


class Scaled(Tower):
    def __init__(self, in_features: int, width: int) -> None:
        super().__init__()
        self.only, self.out_features = nn.Linear(in_features, width), width

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x) / 2


@builds(ScaledTowerConfig)
def build_scaled(settings: ScaledTowerConfig, tokens: Tokens) -> Scaled:
    return Scaled(tokens.width, settings.width)
"""


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with a tower more."""
    folder = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "recsys", folder / "recsys", ignore=shutil.ignore_patterns("__pycache__"))
    with (folder / "recsys/config/towers.py").open("a") as file:
        file.write(SETTINGS)
    (folder / "recsys/model/towers/scaled.py").write_text(TOWER)
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, cwd=folder
    )


def test_a_tower_of_one_file_and_one_settings_class_trains_with_experts(extended: Path, tmp_path: Path) -> None:
    write_tiny_log(tmp_path)
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    done = run(extended, "recsys.train", "--config", str(config), "model.tower={type: scaled, width: 8}")
    assert done.returncode == 0, done.stderr
    assert "hilomoe scaled width=8 L2 K3 against scaled width=8" in done.stdout
    assert "width: 8" in (tmp_path / "out/config.yaml").read_text()


def test_its_settings_are_checked_as_those_of_others(extended: Path, tmp_path: Path) -> None:
    config = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path / "out")
    done = run(extended, "recsys.plan", "--config", str(config), "model.tower={type: scaled, width: 0, wide: 1}")
    assert done.returncode == 2
    assert "model.tower.width: Input should be greater than 0" in done.stderr
    assert "model.tower.wide: unknown key" in done.stderr
    done = run(extended, "recsys.plan", "--config", str(config), "model.tower={type: none}")
    assert "model.tower.type: must be one of " in done.stderr and ", scaled, " in done.stderr


def test_every_settings_class_has_a_builder_and_every_builder_one() -> None:
    assert set(registry._BUILDERS) == set(TowerSettings.__subclasses__())


@pytest.mark.parametrize("settings", registry._BUILDERS, ids=lambda settings: settings.__name__)
def test_every_tower_has_the_options_of_perceptrons(settings: type[TowerSettings]) -> None:
    (name,) = get_args(settings.model_fields["type"].annotation)

    def kinds(**options: object) -> Counter[type]:
        tower = registry.build_tower(settings(type=name, **options), registry.Tokens(["one", "other"], [20, 20, 20]))
        assert {module.p for module in tower.modules() if isinstance(module, nn.Dropout)} == {options.get("dropout", 0)}
        assert tower(torch.randn(4, 60)).shape == (4, tower.out_features)
        return Counter(map(type, tower.modules()))

    plain = kinds(activation="none", normalization="none")  # but for norms that belong to the family
    batch, layer = kinds(activation="prelu", dropout=0.5, normalization="batch"), kinds(normalization="layer")
    assert batch[BatchNorm] == layer[nn.LayerNorm] - plain[nn.LayerNorm] > plain[BatchNorm] == 0
    assert batch[nn.LayerNorm] == plain[nn.LayerNorm]
    assert batch[PReLU] == layer[nn.ReLU] - plain[nn.ReLU] > plain[PReLU] == 0


def test_no_other_file_names_a_tower() -> None:
    own = {Path(inspect.getfile(builder)) for builder in registry._BUILDERS.values()}
    assert {path.parent for path in own} == {ROOT / "recsys/model/towers"}
    own.add(ROOT / "recsys/config/towers.py")
    settings = {cls.__name__ for cls in registry._BUILDERS}
    for path in (ROOT / "recsys").rglob("*.py"):
        if path not in own:
            assert not [name for name in settings if name in path.read_text()], path
