"""Checkpoints that the tests of this folder read, and copies of them to spoil."""

import shutil
from pathlib import Path

import pytest
from checkpoints import train_checkpoint


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two ranks, so with tables in parts and files of two names."""
    return train_checkpoint(tmp_path_factory.mktemp("checkpoint"), 2)


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(original, tmp_path / "step-5")
