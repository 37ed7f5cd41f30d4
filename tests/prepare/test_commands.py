"""The command line of the data sets, as a user meets it."""

import glob
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from tiny import tiny_config, write_tiny_log

from recsys.config import Config, FeaturesConfig, load_config

ROOT = Path(__file__).parents[2]
SMALL = ("--train-rows", "600", "--valid-rows", "70", "--test-rows", "80", "--files", "2")


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recsys.prepare", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "80"},
        check=False,
    )


REST = """
include: ../out/dataset.yaml
data: {batch_size: 8}
model: {tower: {type: mlp}}
stages: {joint: {trains: all, steps: 1, learning_rate: 1e-3, sparse_learning_rate: 0.1}}
"""


def as_stored(config: Config) -> FeaturesConfig:
    """The features as they are read from shards."""
    sparse = {name: feature.stored for name, feature in config.features.sparse.items()}
    return config.features.model_copy(update={"sparse": sparse})


def check_config(tmp_path: Path) -> Config:
    """The data set `out` with a model and a stage is a whole config, whose columns and ids are those of the shards."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/run.yaml").write_text(REST)
    config = load_config(tmp_path / "configs/run.yaml")
    assert config.data.splits == ("train", "valid", "test")
    dense, sparse = config.features.dense, config.features.sparse
    for split in config.data.splits:
        table = pq.read_table(sorted(glob.glob(*config.data.patterns(split))))
        for name in dense:
            assert dense[name].fill is not None or table[name].null_count == 0
        for name, feature in sparse.items():
            ids = table[name]
            ids = pc.list_flatten(ids) if pa.types.is_list(ids.type) else ids
            assert pc.min(ids).as_py() >= 0 and pc.max(ids).as_py() < config.tables[feature.table].num_embeddings
        if config.data.domain is not None:
            assert pc.max(table[config.data.domain.column]).as_py() < config.data.domain.num_domains
        assert set(pc.unique(table[config.data.label]).to_pylist()) <= {0, 1}
    return config


def test_synthetic_tells_what_it_wrote(tmp_path: Path) -> None:
    done = run("synthetic", "--output", "out", *SMALL, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for text in ("train", "600", "valid", "70", "test", "80", "%", "synthetic written to out"):
        assert text in done.stdout
    assert len(list((tmp_path / "out/train").iterdir())) == 2
    assert "+--" not in done.stdout and "Traceback" not in done.stdout
    # The default config writes the log by itself; what it says of its columns is what stands beside them.
    told, shipped = check_config(tmp_path), load_config(ROOT / "configs/default.yaml")
    assert (told.features, told.data.reference, told.data.domain) == (
        shipped.features,
        shipped.data.reference,
        shipped.data.domain,
    )
    assert list(told.tables) == list(shipped.tables)


def test_movielens_and_overwrite(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "users.dat").write_text("1::F::1::10::48067\n")
    (source / "movies.dat").write_text("1::Toy Story (1995)::Animation|Children's|Comedy\n")
    (source / "ratings.dat").write_text("1::1::5::978300760\n" * 30)
    arguments = ("movielens-1m", "--source", "source", "--output", "out")
    assert "movielens-1m written to out" in run(*arguments, cwd=tmp_path).stdout
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == "error: out is not empty; name another folder, or pass --overwrite to replace it\n"
    assert run(*arguments, "--overwrite", cwd=tmp_path).returncode == 0
    assert as_stored(check_config(tmp_path)) == load_config(ROOT / "configs/movielens_1m.yaml").features


def test_movielens_100k_splits_by_time(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "u.user").write_text("1|24|M|technician|85711\n")
    (source / "u.item").write_text("1|Toy Story (1995)|01-Jan-1995||" + "|0" * 18 + "|1\n")
    (source / "u.data").write_text("".join(f"1\t1\t{4 if second < 57 else 3}\t{second}\n" for second in range(60)))
    done = run("movielens-100k", "--source", "source", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0 and "movielens-100k written to out" in done.stdout
    for cells in (("train", "48", "8", "100.00%"), ("valid", "6", "2", "100.00%"), ("test", "6", "2", "50.00%")):
        assert re.search(r"\W+".join(map(re.escape, cells)), done.stdout), cells
    told, shipped = check_config(tmp_path), load_config(ROOT / "configs/movielens_100k.yaml")
    assert (as_stored(told), told.data.domain) == (shipped.features, shipped.data.domain)


def test_csv_by_a_schema(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("who,what,clicked\n" + "".join(f"u{i % 7},{i % 5},{i % 2}\n" for i in range(300)))
    (tmp_path / "log.yaml").write_text(
        """
        label: clicked
        tables: {who: {ids: vocabulary}, what: {ids: keep}}
        columns:
          who: {type: string, table: who}
          what: {type: int, table: what}
          clicked: {type: int}
        """
    )
    arguments = ("csv", "--source", "log.csv", "--schema", "log.yaml", "--output", "out")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0 and "log written to out" in done.stdout, done.stderr
    assert done.stdout.startswith("counting values: 100 %, 300 rows\nwriting shards: 100 %, 300 rows\n")
    sizes = {name: table.num_embeddings for name, table in check_config(tmp_path).tables.items()}
    assert sizes == {"who": 8, "what": 5}
    # A conversion that fails leaves what was there.
    before = (tmp_path / "out/dataset.json").read_bytes()
    (tmp_path / "log.csv").write_text("who,what,clicked\nu1,1,0\nu1,x,0\n")
    failed = run(*arguments, "--overwrite", cwd=tmp_path)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: log.csv, line 3: column 'what': invalid value 'x' for int64; mend it")
    assert (tmp_path / "out/dataset.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["configs", "log.csv", "log.yaml", "out"]


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        ("jsonl", "null\n", "line 1: not one JSON object a line: null; mend it, or leave such rows out"),
        ("jsonl", '{"who": "u", "clicked": 1}\n' * 20 + "17", "line 21: not one JSON object a line: 17; mend it"),
        ("csv", 'who,clicked\nu,1\n"v,0\nw,1\n', "line 3: the quoted field that opens here is open at the file's end"),
        (
            "csv",
            'who,clicked\n5" disk,1\nu,1\nv,x\n8" disk,1\n',
            "line 4: column 'clicked': invalid value 'x' for int64",
        ),
        ("csv", "who,clicked\n", "no rows"),
        ("csv", "", "line 1: the file is empty, without a header of columns; leave it out"),
    ],
)
def test_wrong_text_ends_in_one_line(tmp_path: Path, suffix: str, text: str, message: str) -> None:
    log = tmp_path / f"log.{suffix}"
    log.write_text(text)
    (tmp_path / "log.yaml").write_text(
        f"format: {suffix}\nlabel: clicked\ntables: {{who: {{ids: vocabulary}}}}\n"
        "columns: {who: {type: string, table: who}, clicked: {type: int}}\n"
    )
    done = run("csv", "--source", log.name, "--schema", "log.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: log.") and message in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("csv", "--source", "missing.csv", "--schema", "missing.yaml", "--output", "out"),
            "error: cannot read schema missing.yaml: No such file or directory; give one with --schema",
        ),
        (
            ("criteo", "--source", "missing.txt", "--output", "out"),
            "error: [Errno 2] No such file or directory: 'missing.txt'",
        ),
        (
            ("movielens-1m", "--source", "missing", "--output", "out"),
            "error: missing does not exist; take ml-1m.zip",
        ),
        (
            ("movielens-100k", "--source", "missing", "--output", "out"),
            "error: missing does not exist; take ml-100k.zip",
        ),
        (
            ("synthetic", "--output", "out", "--train-rows", "0"),
            "error: train_rows must be at least 1, not 0",
        ),
        (("synthetic", "--output", "file/out", *SMALL), "error: [Errno 17] File exists"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "file").write_text("")
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(message) and done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [(), ("criteo",), ("synthetic",), ("synthetic", "--outptu", "x")])
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2 and "usage: python -m recsys.prepare" in done.stderr


def test_torch_is_not_imported(tmp_path: Path) -> None:
    code = "import sys, recsys.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_vocabulary_tells_what_it_kept(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    config = tiny_config(tmp_path / "log", tmp_path / "out")
    file = tmp_path / "item.parquet"
    config["features"]["sparse"]["item"]["ids"] = {"type": "vocabulary", "file": str(file)}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    items = pq.read_table(tmp_path / "log" / "train")["item"].drop_null()
    arguments = ("vocabulary", "--config", "c.yaml", "--feature", "item", "--min-count", "25")
    done = run(*arguments, "tables.item.num_embeddings=64", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    kept = pq.read_table(file)
    assert 0 < len(kept) < 30 and min(kept["count"].to_pylist()) >= 25
    share = f"{sum(kept['count'].to_pylist()) / len(items):.2%}"
    for text in ("item", "30", str(len(kept)), share, "64", str(len(kept) + 1)):
        assert text in done.stdout
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 2
    assert again.stderr == f"error: {file} is there already; pass --overwrite to build it anew\n"
    assert run(*arguments, "--overwrite", cwd=tmp_path).returncode == 0
    unknown = run("vocabulary", "--config", "c.yaml", "--feature", "user", cwd=tmp_path)
    assert unknown.stderr.startswith(
        "error: features.sparse.user takes no ids from a vocabulary; those that do are item"
    )


@pytest.mark.slow
def test_validate_tells_and_fails_on_what_would_corrupt_training(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "log", tmp_path / "out")))
    clean = run("validate", "--config", "c.yaml", cwd=tmp_path)
    assert (clean.returncode, clean.stderr) == (0, "")
    for text in ("train", "900", "user", "0 .. 39", "scale", "No drift", "0 errors, 0 warnings"):
        assert text in clean.stdout
    warned = run("validate", "--config", "c.yaml", "tables.tag.num_embeddings=40", cwd=tmp_path)
    assert warned.returncode == 0 and "0 errors, 1 warnings" in warned.stdout
    assert "\nwarning: data.train: tables.tag: some 12 of its 40 rows occur" in warned.stdout
    failed = run("validate", "--config", "c.yaml", "tables.user.num_embeddings=30", cwd=tmp_path)
    assert failed.returncode == 2 and failed.stderr == ""
    assert f"\nerror: {tmp_path}/log/train/part-0.parquet, row group 0: sparse feature user" in failed.stdout


def test_validate_prints_json_alone(tmp_path: Path) -> None:
    write_tiny_log(tmp_path / "log")
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tiny_config(tmp_path / "log", tmp_path / "out")))
    arguments = ("validate", "--config", "c.yaml", "--json", "--sample", "120", "tables.user.num_embeddings=30")
    failed = run(*arguments, cwd=tmp_path)
    told = json.loads(failed.stdout)
    assert failed.returncode == 2 and failed.stderr == ""
    assert (told["name"], told["sample"], told["splits"]["train"]["rows_read"]) == ("tiny", 120, 120)
    assert {it["of"] for it in told["errors"]} == {"features.sparse.user"}
    refused = run("validate", "--config", "c.yaml", "--json", "data.batch_sise=1", cwd=tmp_path)
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.startswith("error: ")
    assert run("validate", "--sample", "0").returncode == 2
