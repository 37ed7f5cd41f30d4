"""The benchmark of predictions runs and reports what it measured."""

from pathlib import Path

import pytest

from benchmarks import predict
from benchmarks.report import read


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "FOLDER", tmp_path / "work")
    arguments = ["--turns", "1", "--rows", "3000", "--output", str(tmp_path), "--note", "A test."]
    monkeypatch.setattr("sys.argv", ["predict", *arguments])
    with pytest.raises(SystemExit) as ended:
        predict.main()
    assert not ended.value.code
    turns = read(tmp_path / "predict_cpu.jsonl")["turn"]
    assert [(turn["way"], turn["batch"]) for turn in turns] == [
        *((way, batch) for way in list(predict.WAYS)[:3] for batch in (512, 8192)),
        ("predict --artifact", None),
    ]
    assert all(turn["seconds"] > 0 for turn in turns)
    page = (tmp_path / "predict_cpu.md").read_text()
    assert "A test." in page and page.count("| predict --artifact | ") == 2
