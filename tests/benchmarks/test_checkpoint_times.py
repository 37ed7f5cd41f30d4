"""The benchmark of checkpoints runs and reports what it measured."""

from pathlib import Path

import pytest

from benchmarks import checkpoint
from benchmarks.report import read


@pytest.mark.slow
def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--turns", "1", "--steps", "101", "--table-mib", "4", "--output", str(tmp_path), "--note", "A test."]
    monkeypatch.setattr("sys.argv", ["checkpoint", *arguments])
    with pytest.raises(SystemExit) as ended:
        checkpoint.main()
    assert not ended.value.code
    turns = {turn["case"]: turn for turn in read(tmp_path / "checkpoint_cpu.jsonl")["turn"]}
    assert len(turns) == 7
    assert turns["table, waiting"]["mib"] > 4
    assert all(turn["waited_ms"] > 0 for case, turn in turns.items() if not case.startswith("start"))
    assert "A test." in (tmp_path / "checkpoint_cpu.md").read_text()
