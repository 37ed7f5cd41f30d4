from pathlib import Path

import pytest
from every_kind import exported
from test_scorer import export, train
from tiny import write_tiny_log


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of features of every kind, trained on raw rows."""
    return exported(tmp_path_factory.mktemp("every-kind"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained on rows of tables that a converter wrote, tables in int8, calibrated by domain."""
    options = ("--tables", "int8", "--calibration", "isotonic", "--calibration-rows", "20")
    return exported(tmp_path_factory.mktemp("converted"), *options, converted=True)


@pytest.fixture(scope="session")
def tiny_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny log; not to be written to."""
    directory = tmp_path_factory.mktemp("tiny-log")
    write_tiny_log(directory)
    return directory


@pytest.fixture(scope="session")
def trained(tiny_log: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of an MLP with experts, trained on the tiny log, and its artefact; not to be written to."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = train(tiny_log, folder, 1, "table", "mlp", experts=True)
    export(checkpoint, folder / "artifact")
    return checkpoint, folder / "artifact"
