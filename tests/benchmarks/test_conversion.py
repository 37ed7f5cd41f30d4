"""The benchmark of the conversion runs and reports what it measured."""

from pathlib import Path

import pytest

from benchmarks import conversion
from benchmarks.report import read


def test_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["conversion", "--rows", "300", "--output", str(tmp_path), "--note", "A test."])
    with pytest.raises(SystemExit) as ended:
        conversion.main()
    assert not ended.value.code
    runs = read(tmp_path / "conversion_cpu.jsonl")["run"]
    assert [run["ids"] for run in runs] == ["vocabulary", "hash"]
    for run in runs:
        figures = run["figures"]
        assert figures["rows_written"] == 300
        assert figures["cpu_seconds"] > 0 and 30 < figures["peak_bytes"] / 2**20 < 2000
    assert "A test." in (tmp_path / "conversion_cpu.md").read_text()


def test_generated_files_depend_on_the_seed_alone_and_are_skewed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        conversion.generate(tmp_path / name, 500, seed)
    first, again, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert first == again != other
    rows = [line.split(b"\t") for line in first.splitlines()]
    assert {len(row) for row in rows} == {40}
    for column, size in enumerate(conversion.SIZES, start=14):
        values = [row[column] for row in rows if row[column]]
        assert {len(value) for value in values} == {8} and len(set(values)) < size
        assert 380 < len(values) < 480  # a seventh is blank
    assert len({row[16] for row in rows}) > 200 and len({row[22] for row in rows}) == 3  # two and the blank
