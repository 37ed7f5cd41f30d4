"""Shards, training, predictions and copies of checkpoints against an S3 server on this machine."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from pyarrow import fs
from ranks import run_module, run_ranks
from reading import dense_column, sparse_column
from tiny import tiny_config, tiny_table, write_tiny_log

pytest.importorskip("moto", reason="needs the dev extra")

from s3 import S3, FirstFail, Request

from recsys.checkpoint.layout import CheckpointError, read_meta
from recsys.data import storage as location
from recsys.data.features import Columns
from recsys.data.loader import Loader
from recsys.data.order import Epoch, RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError, find_files, locate
from recsys.runtime import Ranks
from recsys.training.checkpoint import copy_checkpoint

COLUMNS = Columns(
    "label",
    None,
    {"x": dense_column("x", 0.0)},
    {name: sparse_column(name, size) for name, size in {"user": 40, "item": 30, "tags": 12}.items()},
)


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A server with a bucket `log` of the tiny log."""
    directory = tmp_path_factory.mktemp("s3")
    write_tiny_log(directory)
    with S3() as server:
        server.upload(directory, "log")
        yield server


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections of each test's own, which know nothing of this machine's credentials."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    location._s3.cache_clear()
    yield
    location._s3.cache_clear()


@pytest.fixture
def two_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3 counts as failing soon."""
    monkeypatch.setattr(location, "S3_ATTEMPTS", 2)


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    """A new bucket."""
    name = "b" + "".join(filter(str.isalnum, request.node.name.lower()))[:50]
    s3.filesystem.create_dir(name)
    return name


def open_train(s3: S3, bucket: str = "log") -> ParquetShards:
    return ParquetShards([s3.url(f"{bucket}/train/*.parquet")], COLUMNS, source="data.train")


def put_table(s3: S3, table: pa.Table, path: str) -> None:
    pq.write_table(table, path, filesystem=s3.filesystem)


def labels(shards: ParquetShards) -> list[float]:
    groups = enumerate(shards.row_counts)
    return [label for group, rows in groups for label in shards.read(RowSlice(group, 0, rows)).labels.tolist()]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("log/train/part-1.parquet", ["train/part-1.parquet"]),
        ("log/train", [f"train/part-{part}.parquet" for part in range(3)]),
        ("log/train/", [f"train/part-{part}.parquet" for part in range(3)]),
        ("log/t*/part-[01].*", [f"{split}/part-{part}.parquet" for split in ("test", "train") for part in range(2)]),
        ("log/te*", [f"test/part-{part}.parquet" for part in range(3)]),
        ("log/**/part-2.parquet", [f"{split}/part-2.parquet" for split in ("test", "train", "valid")]),
    ],
)
def test_patterns_mean_on_s3_what_they_mean_on_disk(s3: S3, pattern: str, expected: list[str]) -> None:
    found = find_files([s3.url(pattern)], source="data.train")
    assert [str(file) for file in found] == [f"s3://log/{name}" for name in expected]


def test_names_that_other_programs_hide_are_left_out_and_paths_are_columns(s3: S3, bucket: str) -> None:
    for name in ("hour=07/part.parquet", "hour=07/_temporary/part.parquet", "hour=12/.part.parquet"):
        put_table(s3, tiny_table(10, 0), f"{bucket}/{name}")
    columns = Columns("label", None, {}, {"hour": sparse_column("hour", 24)})
    shards = ParquetShards([s3.url(f"{bucket}/**/*.parquet")], columns, source="data.train")
    assert shards.files == [f"s3://{bucket}/hour=07/part.parquet"]
    assert shards.read(RowSlice(0, 0, 10)).single.tolist() == [[7] * 10]


def test_endpoint_and_credentials_come_from_the_environment(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3.secret)
    shards = ParquetShards(["s3://log/train"], COLUMNS, source="data.train")
    assert labels(shards) == tiny_table(900, 0)["label"].to_pylist()


def test_the_loader_reads_every_row_once(s3: S3) -> None:
    shards = open_train(s3)
    epoch = Epoch(shards.row_counts, 2, 64, seed=1, window_row_groups=2)
    found: list[float] = []
    for rank in range(2):
        with Loader(shards, [epoch], rank) as loader:
            found += [x for batch in loader for x in batch.dense_features[:, 0].tolist()]
    expected = np.nan_to_num(tiny_table(900, 0)["x"].to_numpy())
    assert sorted(found) == sorted(expected.tolist())


def test_a_row_group_takes_one_request_beside_the_one_that_opens_the_file(s3: S3) -> None:
    shards = open_train(s3)
    del s3.requests[:]
    shards.read(RowSlice(1, 0, 10))
    assert s3.requests == [("HEAD", "/log/train/part-0.parquet"), ("GET", "/log/train/part-0.parquet")]


def test_reads_outlast_failures_of_the_server(s3: S3) -> None:
    fails = FirstFail(4, lambda request: request[1].startswith("/log/train/"))
    with s3.failing(fails):
        shards = open_train(s3)
        fails.left = 2
        assert labels(shards) == tiny_table(900, 0)["label"].to_pylist()
    assert not fails.left


@pytest.mark.usefixtures("two_attempts")
def test_a_server_that_goes_on_failing_is_named(s3: S3) -> None:
    shards = open_train(s3)
    with (
        s3.failing(lambda request: 500),
        pytest.raises(DataError, match=r"s3://log/train/part-0.parquet, row group 0: .* the storage failed") as error,
    ):
        labels(shards)
    assert "\n" not in str(error.value)
    assert s3.secret not in str(error.value)


def refused(url: str) -> str:
    """The message, which must be one line and come soon."""
    start = time.monotonic()
    with pytest.raises(DataError) as error:
        find_files([url], source="data.train")
    assert time.monotonic() - start < 30
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("path", ["train", "train/*.parquet", "train/part-0.parquet"])
def test_a_bucket_that_is_not_there_is_named(s3: S3, path: str) -> None:
    message = refused(s3.url(f"nowhere/{path}"))
    assert message.startswith(f"data.train: s3://nowhere/{path}: there is no such bucket; ")


def test_a_prefix_that_is_not_there_is_named(s3: S3) -> None:
    assert refused(s3.url("log/nothing/*.parquet")) == "data.train: no file matches 's3://log/nothing/*.parquet'"


@pytest.mark.parametrize("path", ["train", "train/*.parquet", "train/part-0.parquet"])
@pytest.mark.parametrize(("key", "secret"), [(None, "wrong"), ("AKIAWRONG", None)])
def test_wrong_credentials_are_named(s3: S3, path: str, key: str | None, secret: str | None) -> None:
    message = refused(s3.url(f"log/{path}", key, secret))
    assert message.startswith(f"data.train: s3://log/{path}: access is denied; ")
    assert "wrong" not in message.lower()


@pytest.mark.parametrize("path", ["train", "train/*.parquet"])
def test_missing_credentials_are_named(s3: S3, path: str) -> None:
    message = refused(f"s3://log/{path}?endpoint_override={s3.endpoint}&region=us-east-1")
    assert message.startswith(f"data.train: s3://log/{path}: access is denied; ")
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (not set here)" in message


@pytest.mark.usefixtures("two_attempts")
def test_an_endpoint_that_does_not_answer_is_named() -> None:
    message = refused("s3://log/train?endpoint_override=http://127.0.0.1:1&region=us-east-1")
    assert message.startswith("data.train: s3://log/train: the storage does not answer; ")


def test_an_object_that_is_replaced_or_deleted_during_the_run_is_named(s3: S3, bucket: str) -> None:
    put_table(s3, tiny_table(100, 0), f"{bucket}/train/part.parquet")
    shards = open_train(s3, bucket)
    assert labels(shards)
    put_table(s3, tiny_table(100, 1), f"{bucket}/train/part.parquet")  # within the second that S3 counts in
    with pytest.raises(DataError, match=f"s3://{bucket}/train/part.parquet: changed since the run began; "):
        labels(shards)
    s3.filesystem.delete_file(f"{bucket}/train/part.parquet")
    with pytest.raises(DataError, match=f"s3://{bucket}/train/part.parquet, row group 0: .* there is no such file"):
        labels(shards)


def s3_config(s3: S3, folder: Path, **stage: Any) -> dict[str, Any]:
    """The tiny config with its data on S3 and one short stage."""
    raw = tiny_config(folder, folder / "out")
    raw["data"].update({split: s3.url(f"log/{split}/*.parquet") for split in ("train", "valid", "test")})
    raw["stages"] = {"joint": {**raw["stages"]["joint"], "steps": 5, **stage}}
    return raw


def start(raw: dict[str, Any], folder: Path, world_size: int = 2) -> list[Any]:
    (folder / "s3.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return run_module(world_size, "recsys.train", "--config", str(folder / "s3.yaml"))


@pytest.fixture(scope="module")
def run(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks leave that trained on shards from S3 and copied their checkpoint there."""
    folder = tmp_path_factory.mktemp("run")
    s3.filesystem.create_dir("copies")
    raw = s3_config(s3, folder)
    raw["checkpoints"] = {"copy_to": s3.url("copies/of/run")}
    for finished in start(raw, folder):
        assert finished.code == 0, finished
    return folder / "out"


def test_two_ranks_train_on_shards_from_s3(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["test"]["examples"] == 251


def test_every_checkpoint_is_copied_whole(s3: S3, run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    copied = f"copies/of/run/{checkpoint.name}"
    assert s3.names(copied) == {path.name for path in checkpoint.iterdir()} >= {"meta.json", "config.yaml", ".metadata"}
    for name in s3.names(copied):
        with s3.filesystem.open_input_file(f"{copied}/{name}") as file:
            assert file.read() == (checkpoint / name).read_bytes(), name


@pytest.mark.parametrize("world_size", [1, 2])
def test_predictions_are_written_to_s3_in_the_order_of_the_split(
    s3: S3, bucket: str, run: Path, world_size: int
) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    arguments = ("--checkpoint", str(checkpoint), "--predictions", s3.url(f"{bucket}/test"), "--json")
    first, *others = run_module(world_size, "recsys.evaluate", *arguments)
    assert [first.code, *(other.code for other in others)] == [0] * world_size, (first, others)
    names = sorted(s3.names(f"{bucket}/test"))
    assert names == [f"part-{rank:05d}-of-{world_size:05d}.parquet" for rank in range(world_size)]
    found = pa.concat_tables(pq.read_table(f"{bucket}/test/{name}", filesystem=s3.filesystem) for name in names)
    expected = tiny_table(251, 2)
    assert found["label"].equals(expected["label"])
    assert found["domain"].to_pylist() == expected["domain"].to_pylist()
    label, probability = found["label"].to_numpy(), found["probability"].to_numpy().astype(np.float64)
    log_loss = -np.mean(np.log(np.where(label == 1, probability, 1 - probability)))
    assert log_loss == pytest.approx(json.loads(first.stdout)["model"]["log_loss"], abs=1e-6)
    again, *_ = run_module(world_size, "recsys.evaluate", *arguments)
    assert again.code == 2
    assert f"--predictions: s3://{bucket}/test holds files, such as s3://{bucket}/test/part-00000" in again.stderr


@pytest.mark.parametrize(("kind", "world_size"), [("checkpoint", 1), ("checkpoint", 2), ("artifact", 2)])
def test_files_on_s3_are_predicted_to_s3(
    s3: S3, bucket: str, run: Path, tmp_path: Path, kind: str, world_size: int
) -> None:
    (model,) = (run / "checkpoints").iterdir()
    (evaluated,) = run_module(
        1, "recsys.evaluate", "--checkpoint", str(model), "--predictions", str(tmp_path / "evaluated")
    )
    assert evaluated.code == 0, evaluated
    if kind == "artifact":
        exporting = ("--checkpoint", str(model), "--output", str(model := tmp_path / "artifact"))
        (exported,) = run_module(1, "recsys.export", *exporting)
        assert exported.code == 0, exported
    arguments = [f"--{kind}", str(model), "--keep", "label"]
    arguments += ["--input", s3.url("log/test/*.parquet"), "--output", s3.url(f"{bucket}/of/day")]
    finished = run_module(world_size, "recsys.predict", *arguments)
    assert [one.code for one in finished] == [0] * world_size, finished
    names = [f"part-{part}.parquet" for part in range(3)]
    assert s3.names(f"{bucket}/of/day") == set(names)
    tables = [pq.read_table(f"{bucket}/of/day/{name}", filesystem=s3.filesystem) for name in names]
    found, expected = pa.concat_tables(tables), pq.read_table(tmp_path / "evaluated")
    assert found["label"].equals(expected["label"])
    np.testing.assert_allclose(found["probability"], expected["probability"], rtol=0, atol=1e-6)
    s3.filesystem.delete_file(f"{bucket}/of/day/part-1.parquet")
    again = run_module(world_size, "recsys.predict", *arguments)
    assert sum(one.stdout.count("rows already") for one in again) == 2, again
    assert sum(one.stdout.count(f"s3://{bucket}/of/day/part-1.parquet: ") for one in again) == 1
    assert s3.names(f"{bucket}/of/day") == set(names)
    assert not any(s3.secret in one.stdout + one.stderr for one in [*finished, *again])


def test_predictions_that_s3_refuses_end_all_ranks(s3: S3, bucket: str, run: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    arguments = ("--checkpoint", str(checkpoint), "--input", s3.url("log/test/*.parquet"))
    with s3.failing(lambda request: 403 if request[0] in ("PUT", "POST") and "part-1" in request[1] else None):
        finished = run_module(2, "recsys.predict", *arguments, "--output", s3.url(f"{bucket}/day"))
    (told,) = [one for one in finished if one.stderr]
    assert told.code == 2 and told.stderr.startswith(f"error: s3://{bucket}/day/part-1.parquet: access is denied; ")
    assert told.stderr.count("\n") == 1 and "part-1.parquet" not in s3.names(f"{bucket}/day")


def test_a_shard_that_is_deleted_ends_all_ranks_with_its_name(s3: S3, bucket: str, tmp_path: Path) -> None:
    for part in range(4):
        put_table(s3, tiny_table(200, part), f"{bucket}/train/part-{part}.parquet")
    raw = s3_config(s3, tmp_path, steps=100)
    raw["data"]["train"] = s3.url(f"{bucket}/train")
    opened: list[Request] = []

    def delete_while_it_is_read(request: Request) -> None:
        if request == ("HEAD", f"/{bucket}/train/part-3.parquet"):
            opened.append(request)
            if len(opened) == 4:  # each rank has read the footer, and has read the file or is about to
                s3.filesystem.delete_file(f"{bucket}/train/part-3.parquet")

    with s3.failing(delete_while_it_is_read):
        finished = start(raw, tmp_path)
    told = [rank for rank in finished if rank.stderr]
    assert [rank.code for rank in told] == [2], finished
    assert f"error: s3://{bucket}/train/part-3.parquet, row group 0: cannot be read: there is no" in told[0].stderr


def _copy(ranks: Ranks, directory: Path, url: str) -> str:
    """Copies a checkpoint with few attempts; what failed on this rank."""
    location.S3_ATTEMPTS = 2
    try:
        copy_checkpoint(directory, locate(url, source="checkpoints.copy_to"))
    except DataError as error:
        return str(error)
    return ""


def test_a_copy_that_is_cut_off_is_no_checkpoint(s3: S3, bucket: str, run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").iterdir()
    url = s3.url(f"{bucket}/step")
    assert run_ranks(1, _copy, checkpoint, url) == [""]
    whole = s3.names(f"{bucket}/step")

    def fail_midway(request: Request) -> int | None:
        # Ranks copy in the order of names; the tensors come after the index and the config.
        return 500 if request[1].endswith(".distcp") and request[0] in ("PUT", "POST") else None

    with s3.failing(fail_midway):
        (message,) = run_ranks(1, _copy, checkpoint, url)
    assert message.startswith(f"copy of {checkpoint} to s3://{bucket}/step: the storage failed")
    assert s3.names(f"{bucket}/step") == whole - {"meta.json"}
    (tmp_path / "step").mkdir()
    fs.copy_files(f"{bucket}/step", str(tmp_path / "step"), s3.filesystem, fs.LocalFileSystem())
    with pytest.raises(CheckpointError, match="is no complete checkpoint"):
        read_meta(tmp_path / "step")
    assert run_ranks(1, _copy, checkpoint, url) == [""]
    fs.copy_files(f"{bucket}/step", str(tmp_path / "step"), s3.filesystem, fs.LocalFileSystem())
    assert read_meta(tmp_path / "step") == read_meta(checkpoint)


def test_a_bucket_to_copy_to_that_is_not_there_is_named_before_training(s3: S3, tmp_path: Path) -> None:
    raw = s3_config(s3, tmp_path)
    raw["checkpoints"] = {"copy_to": s3.url("nowhere/run")}
    (finished,) = start(raw, tmp_path, 1)
    assert finished.code == 2
    assert "error: checkpoints.copy_to: s3://nowhere/run: there is no such bucket; " in finished.stderr
    assert not (tmp_path / "out").exists()
