"""Predictions come out in the order in which they went in, whole or not at all."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from recsys.data.storage import DataError
from recsys.model.ranker import RankerOutput
from recsys.runtime import Ranks
from recsys.training import predictions
from recsys.training.predictions import writing_predictions

pytestmark = pytest.mark.usefixtures("process_group")

ALONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


def output(logits: list[float], labels: list[float], domain: list[int]) -> RankerOutput:
    features = torch.empty(len(logits), 0)
    return RankerOutput(torch.tensor(logits), torch.tensor(labels), torch.tensor(domain), {}, features)


def test_a_file_of_each_rank_has_its_batches_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictions, "ROW_GROUP_ROWS", 3)
    directory = tmp_path / "new" / "test"
    with writing_predictions(str(directory), ALONE, with_label=True, with_domain=True) as write:
        write(output([0.0, 2.0], [0, 1], [5, 6]))
        write(output([-2.0], [1], [7]))
        write(output([], [], []))
        write(output([1.0], [0], [8]))
        assert not list(directory.glob("*.parquet"))
    (file,) = directory.iterdir()
    assert file.name == "part-00000-of-00001.parquet"
    table = pq.read_table(file)
    assert table.schema.names == ["label", "probability", "domain"]
    assert table["label"].to_pylist() == [0, 1, 1, 0]
    assert table["domain"].to_pylist() == [5, 6, 7, 8]
    assert table["probability"].to_pylist() == torch.tensor([0.0, 2.0, -2.0, 1.0]).sigmoid().tolist()
    assert pq.read_metadata(file).num_row_groups == 2


def test_without_rows_or_domains_the_file_has_its_columns(tmp_path: Path) -> None:
    with writing_predictions(str(tmp_path), ALONE, with_label=True, with_domain=False):
        pass
    table = pq.read_table(tmp_path / "part-00000-of-00001.parquet")
    assert (table.schema.names, len(table)) == (["label", "probability"], 0)


def fail_midway(directory: Path) -> None:
    with writing_predictions(str(directory), ALONE, with_label=True, with_domain=False) as write:
        write(output([0.0], [1], []))
        raise ValueError("in the middle")


def test_an_error_leaves_nothing_and_is_not_taken_for_one_of_the_storage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^in the middle$"):
        fail_midway(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_holds_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "part-00001-of-00002.parquet").touch()
    with (
        pytest.raises(DataError, match=f"--predictions: {tmp_path} holds files, such as .*part-00001"),
        writing_predictions(str(tmp_path), ALONE, with_label=True, with_domain=False),
    ):
        pytest.fail("it was written to")


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(DataError, match="file/deeper"),
        writing_predictions(str(tmp_path / "file" / "deeper"), ALONE, with_label=True, with_domain=False),
    ):
        pytest.fail("it was written to")
