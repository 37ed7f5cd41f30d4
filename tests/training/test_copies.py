"""A copy of a checkpoint is complete when its `meta.json` is there, and not before."""

import json
import os
from pathlib import Path

import pytest

from recsys.data.storage import DataError, Place, locate
from recsys.training.checkpoint import copy_checkpoint

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "step-5"
    (directory / "deeper").mkdir(parents=True)
    for name in (".metadata", "config.yaml", "__0_0.distcp", "deeper/__1_0.distcp", "meta.json"):
        (directory / name).write_text(json.dumps(name))
    return directory


def files(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_a_copy_has_every_file_and_takes_the_place_of_an_older_one(checkpoint: Path, tmp_path: Path) -> None:
    to = locate(str(tmp_path / "far" / "step-5"), source="checkpoints.copy_to")
    copy_checkpoint(checkpoint, to)
    assert files(tmp_path / "far" / "step-5") == files(checkpoint)
    (checkpoint / "__0_0.distcp").write_text("newer")
    copy_checkpoint(checkpoint, to)
    assert files(tmp_path / "far" / "step-5") == files(checkpoint)


def test_a_copy_that_fails_leaves_no_meta_behind_not_even_an_older_one(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = locate(str(tmp_path / "far"), source="checkpoints.copy_to")
    copy_checkpoint(checkpoint, to)
    put = Place.put

    def full(self: Place, source: Path) -> None:
        if source.suffix == ".distcp":
            raise OSError(os.strerror(28))
        put(self, source)

    monkeypatch.setattr(Place, "put", full)
    with pytest.raises(DataError, match=f"copy of {checkpoint} to {tmp_path}/far: No space left on device"):
        copy_checkpoint(checkpoint, to)
    assert "meta.json" not in files(tmp_path / "far")
