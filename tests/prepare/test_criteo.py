"""Criteo's lines as they are converted: each value, the vocabularies, the splits, and a model that trains on them."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import xxhash

from benchmarks.conversion import generate
from recsys.config import load_config
from recsys.data.storage import DataError
from recsys.prepare import writing
from recsys.prepare.__main__ import main
from recsys.prepare.criteo import CATEGORIES, INTEGERS, by_day, criteo_schema
from recsys.prepare.tabular import convert_text

ROOT = Path(__file__).parents[2]
REAL = Path(os.environ.get("HILOREC_DATA", "")) / "criteo_10k/train_examples.txt"

Row = dict[str, Any]


def status(arguments: list[str]) -> int:
    """The exit code of the command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("criteo") / "train.txt"
    generate(path, 3000)
    return path


def parsed(path: Path) -> list[Row]:
    """The lines of a file, read by plain Python; None for a blank."""
    rows = []
    for line in path.read_text().splitlines():
        label, *fields = line.split("\t")
        values: Row = dict(zip((*INTEGERS, *CATEGORIES), (field or None for field in fields), strict=True))
        integers = {name: None if values[name] is None else max(int(values[name]), 0) for name in INTEGERS}
        rows.append({"label": int(label), **values, **integers})
    return rows


def convert(folder: Path, *sources: Path, block_bytes: int = 1 << 25, **options: Any) -> dict[str, Any]:
    convert_text(sources, folder, criteo_schema(sources, **options), block_bytes=block_bytes, overwrite=True)
    summary = writing.read_summary(folder)
    assert summary is not None and writing.is_complete(folder, summary)
    return summary


def read(folder: Path) -> dict[str, list[Row]]:
    return {split: pq.read_table(folder / split).to_pylist() for split in ("train", "valid", "test")}


def check_vocabularies(folder: Path, rows: list[Row], summary: dict[str, Any], min_count: int) -> None:
    """Compares a data set split 80 / 10 / 10 by order with the lines that it was made of."""
    ends = [round(len(rows) * 0.8), round(len(rows) * 0.9)]
    splits = {"train": rows[: ends[0]], "valid": rows[ends[0] : ends[1]], "test": rows[ends[1] :]}
    places: dict[str, dict[str, int]] = {}
    for name in CATEGORIES:
        counts = Counter(row[name] for row in splits["train"] if row[name])
        kept = sorted((one for one in counts if counts[one] >= min_count), key=lambda one: (-counts[one], one))
        places[name] = {value: number for number, value in enumerate(kept, start=1)}
        assert pq.read_table(folder / f"vocabularies/{name}.parquet")["value"].to_pylist() == kept
        told = summary["columns"][name]
        assert told["size"] == len(kept) + 1
        assert told["out_of_vocabulary"] == {
            split: sum(row[name] not in (None, *kept) for row in part) for split, part in splits.items()
        }
    found = read(folder)
    for split, part in splits.items():
        ids = [
            {**row, **{name: None if row[name] is None else places[name].get(row[name], 0) for name in CATEGORIES}}
            for row in part
        ]
        assert found[split] == ids


@pytest.mark.parametrize("block_bytes", [20_000, 1 << 25])
def test_every_value_by_vocabulary(source: Path, tmp_path: Path, block_bytes: int) -> None:
    summary = convert(tmp_path / "out", source, block_bytes=block_bytes, min_count=3)
    assert {split: told["rows"] for split, told in summary["splits"].items()} == {
        "train": 2400,
        "valid": 300,
        "test": 300,
    }
    check_vocabularies(tmp_path / "out", parsed(source), summary, 3)


def test_every_value_by_hash(source: Path, tmp_path: Path) -> None:
    summary = convert(tmp_path / "out", source, block_bytes=20_000, ids="hash", buckets=1009)
    assert summary["columns"]["C3"]["size"] == 1009 and summary["vocabularies"] == {}
    rows = parsed(source)
    for row in rows:
        for name in CATEGORIES:
            if row[name] is not None:
                row[name] = xxhash.xxh3_64_intdigest(row[name].encode(), 0) % 1009
    assert [row for part in read(tmp_path / "out").values() for row in part] == rows


def test_the_last_day_is_held_out_and_days_are_in_order(source: Path, tmp_path: Path) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    days = [tmp_path / "day_10.gz", tmp_path / "day_9.gz", tmp_path / "day_2.gz"]
    for path, part in zip(days, (lines[2000:], lines[1000:2000], lines[:1000]), strict=True):
        path.write_bytes(gzip.compress(b"".join(part)))
    assert by_day(days) == days[::-1]
    convert(tmp_path / "out", *by_day(days), split="last-file", min_count=1)
    rows = parsed(source)
    for split, part in {"train": rows[:2000], "valid": rows[2000:2500], "test": rows[2500:]}.items():
        assert [[row[name] for name in INTEGERS] for row in read(tmp_path / "out")[split]] == [
            [row[name] for name in INTEGERS] for row in part
        ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0\t1\t2", "Expected 40 columns, got 3: 0 1 2"),
        ("2" + "\t" * 39, "column 'label': the label is neither 0 nor 1"),
        ("\t" * 39, "column 'label': no value"),
        ("0" + "\t1.5" + "\t" * 38, "column 'I1': invalid value '1.5' for int64"),
        ("", "the line is blank"),
    ],
)
def test_malformed_lines(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    lines = source.read_text().splitlines()
    broken = tmp_path / "train.txt"
    broken.write_text("\n".join([*lines[:700], line, *lines[700:]]) + "\n")
    with pytest.raises(DataError, match=rf"train\.txt, line 701: {message}"):
        convert(tmp_path / "out", broken)
    assert not (tmp_path / "out").exists()
    assert status(["criteo", "--source", str(broken), "--output", str(tmp_path / "out"), "--skip-malformed"]) == 0
    told = capsys.readouterr().out
    assert "writing shards: 100 %, 3,000 rows" in told
    assert "train.txt: 1 malformed rows left out\ncriteo written to" in told
    summary = json.loads((tmp_path / "out/dataset.json").read_text())
    assert sum(one["rows"] for one in summary["splits"].values()) == 3000


def test_a_terminal_shows_a_bar_for_each_pass(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # which makes rich take the output for a terminal
    assert status(["criteo", "--source", str(source), "--output", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    for what in ("counting rows", "counting values", "writing shards"):
        assert re.search(rf"{what} .*\u2501.*3,000.* rows", told), what
    assert "100 %" not in told


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--ids", "hash", "--min-count", "3"), "error: min_count has no meaning with ids hash; remove it"),
        (("--buckets", "3"), "error: ids hash needs buckets, and nothing else takes them"),
        (("--min-count", "0"), "error: --min-count: Input should be greater than 0"),
        (("--ids", "hash", "--buckets", "-1"), "error: --buckets: Input should be greater than 0"),
        (("--valid", "1.5"), "error: --valid: Input should be less than 1"),
        (("--valid", "0.6", "--test", "0.6"), "error: valid 0.6 and test 0.6 leave nothing to train on"),
        (("--embedding-dim", "6"), "error: --embedding-dim: Input should be a multiple of 4"),
    ],
)
def test_options_out_of_range(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], message: str
) -> None:
    assert status(["criteo", "--source", str(source), "--output", str(tmp_path / "out"), *option]) == 2
    assert capsys.readouterr().err == f"{message}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_config_trains_on_what_is_converted(source: Path, tmp_path: Path) -> None:
    convert(tmp_path / "data/criteo", source, min_count=5)
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs/criteo.yaml", tmp_path / "configs")
    config = load_config(tmp_path / "configs/criteo.yaml")
    assert config.name == "criteo" and config.data.splits == ("train", "valid", "test")
    assert list(config.features.sparse) == list(CATEGORIES) and list(config.features.dense) == list(INTEGERS)
    overrides = ["data.batch_size=512", "stages.joint.warmup_steps=1", "tables.C22=null", "features.sparse.C22=null"]
    # From the working directory above both, as from a checkout.
    command = [sys.executable, "-m", "recsys.train", "--config", "configs/criteo.yaml", *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    summary = json.loads((tmp_path / "outputs/criteo/summary.json").read_text())
    assert summary["steps"] == 5
    written = load_config(tmp_path / "outputs/criteo/config.yaml")
    assert written.data.train == "data/criteo/train/*.parquet"
    assert "include" not in (tmp_path / "outputs/criteo/config.yaml").read_text()


@pytest.mark.skipif("HILOREC_DATA" not in os.environ, reason="HILOREC_DATA names no folder with criteo_10k/")
def test_the_real_rows(tmp_path: Path) -> None:
    summary = convert(tmp_path / "out", REAL, min_count=2, block_bytes=300_000)
    assert {split: told["rows"] for split, told in summary["splits"].items()} == {
        "train": 8_000,
        "valid": 1_000,
        "test": 1_000,
    }
    rates = [told["rows"] * told["label_rate"] for told in summary["splits"].values()]
    assert sum(rates) == pytest.approx(2182)
    check_vocabularies(tmp_path / "out", parsed(REAL), summary, 2)
