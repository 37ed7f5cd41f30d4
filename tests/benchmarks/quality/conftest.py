"""A place to train grids in."""

from pathlib import Path

import pytest
from tiny import write_tiny_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the tiny config, whose log is yet to be written."""
    write_tiny_config(tmp_path / "tiny.yaml", Path("log"), Path("out"))
    monkeypatch.chdir(tmp_path)
    return tmp_path
