"""Whatever is in a file, reading it ends with its rows or with an error that names it; nothing hangs, nothing dies."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

READER = Path(__file__).with_name("read_each.py")
ROWS = 300
SECONDS_FOR_ALL = 240

Outcome = dict[str, Any]


def good() -> dict[str, Any]:
    rng = np.random.default_rng(11)
    lists = [None if n == 5 else rng.integers(0, 50, n).tolist() for n in rng.integers(0, 6, ROWS)]
    return {
        "label": pa.array(rng.integers(0, 2, ROWS).astype(np.int8)),
        "truth": pa.array(rng.random(ROWS)),
        "domain": pa.array(rng.integers(0, 3, ROWS).astype(np.int32)),
        "x": pa.array(rng.normal(size=ROWS).astype(np.float32), mask=rng.random(ROWS) < 0.1),
        "user": pa.array(rng.integers(0, 1000, ROWS), mask=rng.random(ROWS) < 0.1),
        "tags": pa.array(lists, pa.list_(pa.int32())),
    }


def rows_of(columns: dict[str, Any]) -> list[list[object]]:
    """The rows as the loader should yield them."""
    rows = pa.table(columns).to_pylist()
    return [
        [
            row["label"],
            row["truth"],
            row["domain"],
            0.5 if row["x"] is None else row["x"],
            [] if row["user"] is None else [row["user"]],
            row["tags"] or [],
        ]
        for row in rows
    ]


WRITERS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none", "use_dictionary": False},
    "snappy": {"compression": "snappy"},
    "zstd": {"compression": "zstd", "data_page_version": "2.0"},
    "delta": {"compression": "gzip", "use_dictionary": False, "column_encoding": {"user": "DELTA_BINARY_PACKED"}},
}


def write(path: Path, columns: dict[str, Any] | pa.Table, **options: Any) -> None:
    table = columns if isinstance(columns, pa.Table) else pa.table(columns)
    pq.write_table(table, path, **{"row_group_size": 100, "write_page_checksum": True, **options})


def damaged(content: bytes, rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """A file cut short, with bytes changed in its pages, in its footer and anywhere, lengthened and shuffled."""
    footer = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    for cut in sorted({0, 1, 3, 4, 7, 8, len(content) - 1, len(content) - 4, footer, footer + 1}):
        yield f"cut-{cut}", content[:cut]
    for number, cut in enumerate(rng.integers(8, len(content), 8)):
        yield f"cut-at-random-{number}", content[:cut]
    for area, low, high in (("page", 4, footer), ("footer", footer, len(content) - 8), ("any", 0, len(content))):
        for number in range(14):
            changed = bytearray(content)
            for place in rng.integers(low, high, int(rng.integers(1, 4))):
                changed[place] ^= int(rng.integers(1, 256))
            yield f"{area}-{number}", bytes(changed)
    for name, size in (("zero", 0), ("one", 1), ("huge", 2**31 - 1), ("negative", 2**32 - 1)):
        yield f"footer-length-{name}", content[:-8] + size.to_bytes(4, "little") + b"PAR1"
    yield "encrypted-magic", content[:-4] + b"PARE"
    yield "another-magic", b"ORC1" + content[4:-4] + b"ORC1"
    yield "tail", content + b"\0" * 32
    yield "twice", content + content
    yield "no-pages", content[:4] + bytes(footer - 4) + content[footer:]
    yield "noise", rng.bytes(len(content))


def odd() -> dict[str, Callable[[Path], None]]:
    """Whole files that say what they should not, by what is odd in them."""
    columns = good()

    def with_column(name: str, column: Any, **options: Any) -> Callable[[Path], None]:
        return lambda path: write(path, {**columns, name: column}, **options)

    def only(name: str, values: list[Any], kind: pa.DataType) -> Callable[[Path], None]:
        return with_column(name, pa.array([*values, *[None] * (ROWS - len(values))], kind))

    kinds = {
        "string": (["a"], pa.string()),
        "binary": ([b"\xff"], pa.binary()),
        "double": ([0.5], pa.float64()),
        "bool": ([True], pa.bool_()),
        "decimal": ([1], pa.decimal128(9, 2)),
        "timestamp": ([1], pa.timestamp("us")),
        "date": ([1], pa.date32()),
        "struct": ([{"id": 1}], pa.struct([("id", pa.int64())])),
        "map": ([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "null": ([], pa.null()),
        "list_of_string": ([["a"]], pa.list_(pa.string())),
        "list_of_list": ([[[1]]], pa.list_(pa.list_(pa.int64()))),
        "list_of_struct": ([[{"id": 1}]], pa.list_(pa.struct([("id", pa.int64())]))),
        "list_of_null": ([[None]], pa.list_(pa.null())),
        "fixed_list": ([[1, 2]], pa.list_(pa.int64(), 2)),
    }
    files = {f"{name}-{kind}": only(name, *of_kind) for name in columns for kind, of_kind in kinds.items()}
    for name in columns:
        files[f"{name}-missing"] = lambda path, name=name: write(path, pa.table(columns).drop([name]))
        files[f"{name}-all-null"] = with_column(name, pa.nulls(ROWS, columns[name].type))
    integers = [-(2**63), -1, 1000, 2**31, 2**32, 2**63 - 1]
    files |= {f"user-{value}": with_column("user", pa.array([value] * ROWS)) for value in integers}
    files |= {
        "user-uint64": with_column("user", pa.array([2**64 - 1] * ROWS, pa.uint64())),
        "tags-null-inside": with_column("tags", pa.array([[1, None]] * ROWS)),
        "tags-out-of-range": with_column("tags", pa.array([[1], [50]] * (ROWS // 2))),
        "tags-long": with_column("tags", pa.array([list(range(50)) * 2000, *[[]] * (ROWS - 1)], pa.list_(pa.int32()))),
        "x-infinite": with_column("x", pa.array([float("inf")] * ROWS)),
        "x-nan": with_column("x", pa.array([float("nan")] * ROWS)),
        "x-beyond-float32": with_column("x", pa.array([1e300] * ROWS)),
        "label-two": with_column("label", pa.array([2] * ROWS)),
        "label-nan": with_column("label", pa.array([float("nan")] * ROWS)),
        "truth-above-one": with_column("truth", pa.array([1.5] * ROWS)),
        "domain-negative": with_column("domain", pa.array([-1] * ROWS)),
        "huge-string-beside": with_column("note", pa.array(["x" * 20_000_000, *[None] * (ROWS - 1)])),
        "huge-string-as-id": with_column("user", pa.array(["x" * 20_000_000, *[None] * (ROWS - 1)])),
        "many-columns": lambda path: write(path, {**columns, **{f"c{n}": columns["x"] for n in range(500)}}),
        "one-row-groups": with_column("x", columns["x"], row_group_size=1),
        "one-page-a-row": with_column("x", columns["x"], data_page_size=1),
        "no-rows": lambda path: write(path, pa.table(columns).slice(0, 0)),
        "no-columns": lambda path: write(path, pa.table({})),
        "no-row-groups": lambda path: pq.ParquetWriter(path, pa.table(columns).schema).close(),
        "twice-the-same-column": lambda path: write(path, pa.table(columns).append_column("user", columns["user"])),
        "strange-name": lambda path: write(path, pa.table({**columns, "a.b\n\0c": columns["x"]})),
        "a-folder": lambda path: path.mkdir(),
        "a-link-to-nowhere": lambda path: path.symlink_to("nowhere"),
    }
    return files


def outcomes(directory: Path) -> dict[str, Outcome]:
    """How reading each file of a folder ended, by its name; in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, str(READER), str(directory)], capture_output=True, text=True, timeout=SECONDS_FOR_ALL
        )
        lines, code = done.stdout.splitlines(), done.returncode
    except subprocess.TimeoutExpired as error:
        lines, code = (error.stdout or b"").decode().splitlines(), None
    last = json.loads(lines[-1]).get("begin") if lines else "the first file"
    assert code == 0, f"reading {last} {'hangs' if code is None else f'ends the process with {code}'}"
    told = [json.loads(line) for line in lines]
    return {begun["begin"]: ended for begun, ended in zip(told[::2], told[1::2], strict=True)}


def check_errors_name_the_file(found: dict[str, Outcome]) -> None:
    for name, outcome in found.items():
        assert "unnamed" not in outcome, (name, outcome)
        assert "rows" in outcome or name in outcome["error"], (name, outcome)


@pytest.fixture(scope="module")
def damaged_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    directory = tmp_path_factory.mktemp("damaged")
    for number, (writer, options) in enumerate(WRITERS.items()):
        whole = directory / f"{writer}-whole.parquet"
        write(whole, good(), **options)
        for name, content in damaged(whole.read_bytes(), np.random.default_rng((23, number))):
            (directory / f"{writer}-{name}.parquet").write_bytes(content)
    return outcomes(directory)


def test_a_damaged_file_is_named_or_read_as_it_was_written(damaged_files: dict[str, Outcome]) -> None:
    assert len(damaged_files) >= 250
    check_errors_name_the_file(damaged_files)
    rows = json.loads(json.dumps(rows_of(good())))
    wrong = [name for name, outcome in damaged_files.items() if outcome.get("rows", rows) != rows]
    assert not wrong, [damaged_files[name] for name in wrong]
    refused = [name for name, outcome in damaged_files.items() if "error" in outcome]
    assert {f"{writer}-whole.parquet" for writer in WRITERS} <= damaged_files.keys() - set(refused)
    assert len(refused) >= len(damaged_files) // 2  # the damage is real
    # Checksums find whatever changes in a page.
    assert {name for name in damaged_files if "-page-" in name} <= set(refused)


def test_an_odd_file_is_refused_by_name_or_read_right(tmp_path: Path) -> None:
    files = odd()
    for name, make in files.items():
        make(tmp_path / f"{name}.parquet")
    found = outcomes(tmp_path)
    check_errors_name_the_file(found)
    read = {name.removesuffix(".parquet"): outcome["rows"] for name, outcome in found.items() if "rows" in outcome}
    rows = json.loads(json.dumps(rows_of(good())))
    same = {"huge-string-beside", "many-columns", "one-row-groups", "one-page-a-row", "strange-name"}
    assert {name for name, of_file in read.items() if of_file == rows} == same
    odd_values = {f"{name}-{kind}" for name in ("user", "tags") for kind in ("bool", "fixed_list", "null", "all-null")}
    odd_values |= {"x-double", "x-bool", "x-decimal", "x-null", "x-all-null", "tags-long"}
    assert read.keys() - same == odd_values
    assert read["x-double"] == read["x-all-null"] == read["x-null"]
    for name in ("x-bool", "x-decimal"):
        assert [row[3] for row in read[name]] == [1.0, *[0.5] * (ROWS - 1)]
    for kind, first in (("null", []), ("all-null", []), ("bool", [1]), ("fixed_list", [1, 2])):
        values = [first, *[[]] * (ROWS - 1)]
        assert read[f"user-{kind}"] == [[*row[:4], ids, row[5]] for row, ids in zip(rows, values, strict=True)]
        assert read[f"tags-{kind}"] == [[*row[:5], ids] for row, ids in zip(rows, values, strict=True)]
    assert read["x-all-null"] == [[*row[:3], 0.5, *row[4:]] for row in rows]
    assert read["tags-long"][0][5] == list(range(50)) * 2000
