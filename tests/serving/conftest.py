from pathlib import Path

import pytest
from every_kind import exported


@pytest.fixture(scope="session")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact of features of every kind, trained on raw rows."""
    return exported(tmp_path_factory.mktemp("every-kind"))


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One trained on rows of tables that a converter wrote, tables in int8, calibrated by domain."""
    options = ("--tables", "int8", "--calibration", "isotonic", "--calibration-rows", "20")
    return exported(tmp_path_factory.mktemp("converted"), *options, converted=True)
