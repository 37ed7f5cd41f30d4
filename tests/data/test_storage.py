"""Patterns find the files that they say, paths become columns, and a file that is not what it was is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from reading import dense_column, sparse_column

from recsys.data import parquet
from recsys.data.features import Columns
from recsys.data.order import RowSlice
from recsys.data.parquet import ParquetShards
from recsys.data.storage import DataError, find_files, locate

COLUMNS = Columns(label="label", reference=None, dense={"x": dense_column("x", None)}, sparse={})


def table(rows: int, first: int = 0) -> pa.Table:
    return pa.table({"label": [0, 1] * (rows // 2), "x": np.arange(first, first + rows, dtype=np.float64)})


def write(path: Path, rows: int = 4, first: int = 0, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows, first), path, **options)


def with_sparse(*names: str) -> Columns:
    return Columns("label", None, {}, {name: sparse_column(name, 50) for name in names})


def open_shards(*patterns: str | Path, columns: Columns = COLUMNS) -> ParquetShards:
    return ParquetShards([str(pattern) for pattern in patterns], columns, source="data.train")


def xs(shards: ParquetShards) -> list[float]:
    return [
        x
        for group, rows in enumerate(shards.row_counts)
        for x in shards.read(RowSlice(group, 0, rows)).dense[0].tolist()
    ]


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files in directories, with what other programs leave beside them; also the working directory."""
    for name in ("a.parquet", "b/c.parquet", "b/d/e.parquet", "b/_temporary/f.parquet", ".g.parquet", "b/_h.parquet"):
        write(tmp_path / "data" / name)
    (tmp_path / "data/b/_SUCCESS").touch()
    (tmp_path / "data/b/notes.txt").write_text("no shard")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["data/a.parquet"], ["a.parquet"]),
        (["data"], ["a.parquet", "b/c.parquet", "b/d/e.parquet"]),
        (["data/"], ["a.parquet", "b/c.parquet", "b/d/e.parquet"]),
        (["data/b"], ["b/c.parquet", "b/d/e.parquet"]),
        (["data/*.parquet"], ["a.parquet"]),
        (["data/*/*.parquet"], ["b/c.parquet"]),
        (["data/**/*.parquet"], ["a.parquet", "b/c.parquet", "b/d/e.parquet"]),
        (["data/b*"], ["b/c.parquet", "b/d/e.parquet"]),
        (["data/[ab]*"], ["a.parquet", "b/c.parquet", "b/d/e.parquet"]),
        (["data/b/_temporary/f.parquet"], ["b/_temporary/f.parquet"]),
        (["data/b/_temporary/*"], ["b/_temporary/f.parquet"]),
        (["data/b", "data/b/c.parquet", "data/*.parquet"], ["a.parquet", "b/c.parquet", "b/d/e.parquet"]),
    ],
)
def test_a_pattern_names_files_directories_or_a_glob_of_either(
    tree: Path, patterns: list[str], expected: list[str]
) -> None:
    assert [str(file) for file in find_files(patterns, source="data.train")] == [f"data/{name}" for name in expected]


def test_a_file_url_is_the_path(tree: Path) -> None:
    assert [str(file) for file in find_files([f"file://{tree}/data/b/*"], source="data.train")] == [
        f"{tree}/data/b/c.parquet",
        f"{tree}/data/b/d/e.parquet",
        f"{tree}/data/b/notes.txt",
    ]


def test_a_list_names_patterns_one_a_line(tree: Path) -> None:
    (tree / "shards.txt").write_text("# of the first day\ndata/a.parquet\n\n  data/b/d  # and all below\n")
    found = find_files(["@shards.txt", "data/a.parquet"], source="data.train")
    assert [str(file) for file in found] == ["data/a.parquet", "data/b/d/e.parquet"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("data/none-*", r"data.train: no file matches 'data/none-\*' \(paths are relative"),
        ("data/_none", "data.train: no file matches 'data/_none'"),
        ("@none.txt", "data.train: list of files none.txt: there is no such file"),
        ("bla://bucket/x", "data.train: bla://bucket/x: .*bla"),
        (
            "gs://anonymous@bucket/x/*?endpoint_override=127.0.0.1:1&scheme=http&retry_limit_seconds=1",
            r"data.train: gs://bucket/x/\*: the storage does not answer; check the network",
        ),
        ("s3:///x", "data.train: s3:///x: the URL names no bucket"),
        (
            "s3://bucket/x?endpoint=y",
            "data.train: s3://bucket/x: endpoint is not understood; S3 takes endpoint_override",
        ),
    ],
)
def test_what_names_no_file_is_said(tree: Path, pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        find_files([pattern], source="data.train")
    assert "\n" not in str(error.value)


def test_a_file_system_of_fsspec_is_read_by_url() -> None:
    memory = MemoryFileSystem()
    with memory.open("/shards/dt=1/a.parquet", "wb") as file:
        pq.write_table(table(4), file)
    try:
        shards = open_shards("fsspec+memory:///shards/*/*.parquet")
        assert shards.files == ["fsspec+memory:///shards/dt=1/a.parquet"]
        assert xs(shards) == [0, 1, 2, 3]
    finally:
        memory.rm("/shards", recursive=True)


def test_directories_become_columns_of_integers_where_all_are(tmp_path: Path) -> None:
    for hour in ("07", "12", "__HIVE_DEFAULT_PARTITION__"):
        write(tmp_path / f"dt=2026-11-01/hour={hour}" / "part.parquet")
    shards = open_shards(tmp_path, columns=with_sparse("hour"))
    assert shards.row_counts == (4, 4, 4)
    found = [shards.read(RowSlice(group, 1, 3)).single.tolist() for group in range(3)]
    assert found == [[[7, 7]], [[12, 12]], [[-1, -1]]]


def test_a_column_on_the_path_of_one_file_alone_is_missing_in_the_other(tmp_path: Path) -> None:
    write(tmp_path / "hour=7" / "part.parquet")
    write(tmp_path / "part.parquet")
    with pytest.raises(DataError, match=r"/part.parquet: no column 'hour'; the file has label, x"):
        open_shards(tmp_path, columns=with_sparse("hour"))


def test_directories_of_text_are_no_numbers(tmp_path: Path) -> None:
    for day in ("7", "seven%20th"):
        write(tmp_path / f"day={day}" / "part.parquet")
    assert [file.partitions for file in find_files([str(tmp_path)], source="")] == [{"day": "7"}, {"day": "seven th"}]
    with pytest.raises(DataError, match=r"column 'day' .* has type string"):
        open_shards(tmp_path, columns=Columns("label", None, {"day": dense_column("day", None)}, {}))


def test_a_column_in_the_file_and_on_its_path_is_refused_where_it_is_read(tmp_path: Path) -> None:
    write(tmp_path / "x=7" / "part.parquet")
    with pytest.raises(DataError, match=r"x=7/part.parquet: column 'x' is in the file and is on its path as well"):
        open_shards(tmp_path)
    shards = open_shards(tmp_path, columns=Columns("label", None, {"y": dense_column("label", None)}, {}))
    assert shards.row_counts == (4,)


def rewritten(path: Path) -> None:
    path.unlink()
    write(path, rows=6, first=100)


def one_byte_changed(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rewritten, r"part.parquet: changed since the run began; .* new shards under new names"),
        (one_byte_changed, r"part.parquet: changed since the run began"),
        (cut_off, r"part.parquet: changed since the run began"),
        (Path.unlink, r"part.parquet, row group 0: cannot be read: there is no such file"),
    ],
)
def test_a_file_that_is_not_what_it_was_is_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "part.parquet"
    write(path)
    shards = open_shards(path)
    assert xs(shards) == [0, 1, 2, 3]
    spoil(path)
    with pytest.raises(DataError, match=message):
        xs(shards)


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_a_corrupt_page_is_named_with_its_row_group(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "part.parquet"
    write(path, rows=400, row_group_size=200, compression=compression, write_page_checksum=True, use_dictionary=False)
    column = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    path.write_bytes(content)
    shards = open_shards(path)
    assert len(shards.read(RowSlice(0, 0, 200))) == 200
    with pytest.raises(DataError, match=r"part.parquet, row group 1: column '(x|label)' cannot be read: "):
        shards.read(RowSlice(1, 0, 200))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + bytes(100) + b"PAR1"])
def test_a_file_without_a_footer_is_named(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"b.parquet: not a readable Parquet file: "):
        open_shards(tmp_path)


def test_a_footer_is_parsed_once_unless_memory_for_footers_is_used_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(3):
        write(tmp_path / f"part-{part}.parquet", first=4 * part)
    size = pq.read_metadata(tmp_path / "part-0.parquet").serialized_size
    monkeypatch.setattr(parquet, "FOOTER_BYTES", 8 * 2 * size)
    shards = open_shards(tmp_path)
    read_metadata, parsed = pq.read_metadata, []

    def spy(file: Any) -> pq.FileMetaData:
        parsed.append(file)
        return read_metadata(file)

    monkeypatch.setattr(pq, "read_metadata", spy)
    assert xs(shards) == list(range(12))
    assert len(parsed) == 1


def names_of(*patterns: str | Path, told: list[str] | None = None) -> list[str]:
    on_repeated = (lambda message: None) if told is None else told.append
    return [
        str(file) for file in find_files([str(it) for it in patterns], source="data.train", on_repeated=on_repeated)
    ]


@pytest.mark.parametrize(
    ("patterns", "kept", "dropped"),
    [
        (["data/a.parquet", "data/./a.parquet"], "data/a.parquet", ["data/./a.parquet"]),
        (["data//a.parquet", "data/a*.parquet"], "data/a.parquet", ["data//a.parquet"]),
        (["data/b/../a.parquet", "./data/a.parquet"], "./data/a.parquet", ["data/b/../a.parquet"]),
        (["data/a.parquet", "{tree}/data/a.parquet"], "data/a.parquet", ["{tree}/data/a.parquet"]),
        (["file://{tree}/data/a.parquet", "{tree}/data/./a*"], "{tree}/data/a.parquet", ["{tree}/data/./a.parquet"]),
        (["data/a.parquet", "link.parquet", "up/a.parquet"], "data/a.parquet", ["link.parquet", "up/a.parquet"]),
        (["data/a.parquet", "hard.parquet"], "hard.parquet", ["data/a.parquet"]),
    ],
)
def test_a_file_that_has_several_names_is_read_once(
    tree: Path, patterns: list[str], kept: str, dropped: list[str]
) -> None:
    (tree / "link.parquet").symlink_to("data/a.parquet")
    (tree / "up").symlink_to("data")
    (tree / "hard.parquet").hardlink_to(tree / "data/a.parquet")
    told: list[str] = []
    kept = kept.format(tree=tree)
    assert names_of(*(it.format(tree=tree) for it in patterns), told=told) == [kept]
    left_out = ", ".join(f"{it.format(tree=tree)} (as {kept})" for it in dropped)
    assert told == [f"data.train: files that have several names are read once; left out: {left_out}"]


def test_a_name_that_two_patterns_have_is_nothing_to_tell(tree: Path) -> None:
    told: list[str] = []
    assert names_of("data/*.parquet", "data/a.parquet", told=told) == ["data/a.parquet"]
    assert told == []


def test_files_that_are_merely_alike_are_all_read(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / f"{name}.parquet")
    assert len(names_of(tmp_path)) == 2


def test_many_names_that_are_left_out_are_counted(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet")
    for number in range(9):
        (tmp_path / f"b{number}.parquet").symlink_to("a.parquet")
    told: list[str] = []
    assert len(names_of(tmp_path, told=told)) == 1
    assert told[0].endswith(f"{tmp_path}/b4.parquet (as {tmp_path}/a.parquet) and 4 more")
    assert open_shards(tmp_path).warnings == told


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("run [1]", ["a", "b"]),
        ("run [1]/*.parquet", ["a", "b"]),
        ("run [1]/[ac].parquet", ["a"]),
        ("run [1]/**/*.parquet", ["a", "b"]),
        ("run [1]/a.parquet", ["a"]),
        ("run [[]1]/b.*", ["b"]),
        ("*1]/b.parquet", ["b"]),
    ],
)
def test_a_name_with_brackets_that_is_there_is_no_wildcard(tmp_path: Path, pattern: str, expected: list[str]) -> None:
    for folder in ("run [1]", "run 1"):
        for name in ("a", "b") if "[" in folder else ("c",):
            write(tmp_path / folder / f"{name}.parquet")
    assert names_of(tmp_path / pattern) == [f"{tmp_path}/run [1]/{name}.parquet" for name in expected]


def test_a_file_with_wildcards_in_its_name_is_read(tmp_path: Path) -> None:
    for name in ("x[1]", "x1", "y?", "yy", "z*", "zz"):
        write(tmp_path / f"{name}.parquet")
    for name in ("x[1]", "y?", "z*"):
        assert names_of(tmp_path / f"{name}.parquet") == [f"{tmp_path}/{name}.parquet"]
    with pytest.raises(DataError, match=r"no file matches '.*a \[ that is part of a name beside wildcards is written"):
        names_of(tmp_path / "x[1]*.parqu")


def test_brackets_in_names_of_a_file_system_of_fsspec_are_no_wildcards() -> None:
    memory = MemoryFileSystem()
    for name in ("/run [1]/a.parquet", "/run [1]/b.parquet", "/run 1/c.parquet"):
        with memory.open(name, "wb") as file:
            pq.write_table(table(4), file)
    try:
        start = "fsspec+memory:///run"
        assert names_of(f"{start} [1]/*.parquet") == [f"{start} [1]/a.parquet", f"{start} [1]/b.parquet"]
        assert names_of(f"{start} [1]/[b].parquet") == [f"{start} [1]/b.parquet"]
        assert names_of(f"{start} [0-9]/*.parquet") == [f"{start} 1/c.parquet"]
    finally:
        memory.rm("/", recursive=True)


def test_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "log" / "a.parquet")
    (tmp_path / "shards.txt").write_text("~/log\n")
    for pattern in ("~/log", "~/log/*.parquet", "~/log/a.parquet", "@~/shards.txt"):
        assert names_of(pattern) == [f"{tmp_path}/log/a.parquet"]
    assert str(locate("~/run", source="")) == f"{tmp_path}/run"


def test_what_stands_above_the_data_is_no_partition(tmp_path: Path) -> None:
    log = tmp_path / "user=alice" / "log"
    write(log / "day=7" / "part.parquet")

    def partitions(pattern: str | Path) -> list[dict[str, str | None]]:
        return [file.partitions for file in find_files([str(pattern)], source="")]

    for pattern in (log, f"{log}/", log / "*", log / "**/*.parquet", log / "day=*/*", log / "day=7", log / "day=7/*"):
        assert partitions(pattern) == [{"day": "7"}], pattern
    assert partitions(log / "day=7" / "part.parquet") == [{"day": "7"}]
    assert partitions(f"{tmp_path}/user=*/log") == [{"user": "alice", "day": "7"}]


def test_a_column_of_the_file_is_taken_where_the_pattern_itself_names_such_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "x=7" / "part.parquet")
    for pattern in (tmp_path / "x=7", tmp_path / "x=7/*.parquet", tmp_path / "x=7/part.parquet"):
        assert xs(open_shards(pattern)) == [0, 1, 2, 3]
    with pytest.raises(DataError, match="is in the file and is on its path as well"):
        open_shards(tmp_path / "x=*/part.parquet")
