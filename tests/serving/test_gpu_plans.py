"""A model trained with what only GPUs have is exported where there are none."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml
from ranks import run_module
from runs import reseal
from test_scorer import export, predicted

from recsys.training.parity import BOUNDS


def test_what_only_gpus_have_is_no_part_of_the_model(
    trained: tuple[Path, Path], tiny_log: Path, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(trained[0], tmp_path / "checkpoint")
    expected = predicted(checkpoint, tmp_path / "predictions")
    raw = yaml.safe_load((checkpoint / "config.yaml").read_text())
    raw["device"] = "cuda"
    raw["tables"]["user"]["compute_kernel"] = "fused_uvm_caching"
    raw["tables"]["item"]["sharding"] = ["grid_shard"]
    raw["optimizers"]["sparse"] = {"type": "adam", "weight_decay": 0.01}
    (checkpoint / "config.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    reseal(checkpoint)
    told = export(checkpoint, tmp_path / "artifact")
    assert told["rows"] == 251 and told["max_difference"] <= BOUNDS["float32"]
    arguments = ("--checkpoint", str(checkpoint), "device=cpu")
    for module, options in (
        ("evaluate", ("--predictions", str(tmp_path / "evaluated"))),
        ("predict", ("--input", str(tiny_log / "test"), "--output", str(tmp_path / "predicted"))),
    ):
        (done,) = run_module(1, f"recsys.{module}", *options, *arguments)
        assert done.code == 0, done.stderr
        found = pq.read_table(tmp_path / f"{module.removesuffix('e')}ed")["probability"].to_numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
