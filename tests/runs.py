"""Whole runs on a config of a test's, and what their checkpoints hold."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from recsys.checkpoint.layout import META, digest_of
from recsys.config import Config, load_config
from recsys.data.splits import open_splits
from recsys.runtime import Ranks
from recsys.training.monitor import Monitor
from recsys.training.run import Trainer


def as_config(raw: dict[str, Any], directory: Path) -> Config:
    path = directory / "config-under-test.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return load_config(path)


def train_on(ranks: Ranks, config: Config) -> dict[str, Any]:
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    splits = open_splits(config, config.data.splits)
    with Monitor(output_dir, enabled=ranks.is_first) as monitor:
        return Trainer(config, ranks, splits, monitor).run()


def checkpoint_tensors(directory: Path, scratch: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, whole, by name."""
    dcp_to_torch_save(directory, scratch / "whole.pt")
    tensors: dict[str, Tensor] = torch.load(scratch / "whole.pt", weights_only=True)
    return tensors


def reseal(checkpoint: Path) -> None:
    """Have a checkpoint's `meta.json` say what its files are now, as if they had been written so."""
    path = checkpoint / META
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file != path]
    digests = {str(file.relative_to(checkpoint)): digest_of(file)._asdict() for file in files}
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": digests}))
