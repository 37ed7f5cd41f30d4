"""Every way of reading that the benchmark compares reads the same rows, and the small run writes its report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import reading

ROOT = Path(__file__).parents[2]
ROWS = 3000


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setattr(reading, "FILE_ROWS", 1000)
    monkeypatch.setattr(reading, "ROW_GROUP_ROWS", 300)
    return {name: reading.write_data(tmp_path / name, table, ROWS) for name, table in reading.DATA_SETS.items()}


def test_every_way_reads_all_rows(configs: dict[str, str]) -> None:
    for config in configs.values():
        for name, way in reading.WAYS.items():
            if name == "start":
                assert len(list(way(config, 1))) == 3
            elif name == "torch DataLoader, rows":  # of one file, a part of each block
                assert 0 < sum(way(config, 1)) <= 1000
            else:
                assert sum(way(config, 1)) == ROWS, name


@pytest.mark.parametrize("way", ["HiloRec, shuffled", "raw, shuffled"])
def test_a_way_is_measured_in_a_process_of_its_own(configs: dict[str, str], way: str) -> None:
    command = [sys.executable, "-m", "benchmarks.reading", "--way", way, configs["multi_valued"], "1", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(done.stdout)
    assert measured["rows"] == ROWS
    assert measured["rows/s"] > 0 and measured["cpu ns/row"] > 0 and measured["peak MiB"] > 0


def test_shares_are_of_the_faster_raw_way() -> None:
    rates = {"raw, all threads on one": 5.0, "raw, row groups": 10.0, "HiloRec, shuffled": 6.0}
    turns = {("1 / 1", way): [{"rows/s": rate}, {"rows/s": rate}, {"rows/s": 100.0}] for way, rate in rates.items()}
    found = reading._medians(turns)
    assert found == {
        "1 / 1": {"raw pyarrow": {"rows/s": 10.0, "of raw": 1.0}, "HiloRec, shuffled": {"rows/s": 6.0, "of raw": 0.6}}
    }


def test_data_sets_have_the_shapes_they_claim() -> None:
    rng = np.random.default_rng(3)
    criteo, multi_valued = (table(100, rng).schema for table in reading.DATA_SETS.values())
    assert [sum(name[0] == kind and name != "label" for name in criteo.names) for kind in "ci"] == [26, 13]
    assert sum(pa.types.is_list(field.type) for field in multi_valued) == 4
