"""Files that others wrote, through the product's own path, beside what pyarrow, DuckDB and Python read of them.

    HILOREC_CORPUS=FOLDER python tests/data/corpus.py [--output STEM] [--before FILE.jsonl] [--note TEXT ...]

Each column of each Parquet file is tried as ids (plain, hashed, by a vocabulary of its own values), as a day, as a
dense feature and as a label; each CSV and JSON Lines file is cut into rows as texts. FOLDER has a folder
`OWNER_NAME@COMMIT` for each repository, of which is told how many ended in which way:

    equal      read, and as pyarrow or Python reads it
    refused    ended in one error that names the file
    differs    read, and otherwise than pyarrow, DuckDB or Python reads it: a fault
    exception  ended in any other exception: a fault
    died       ended the process, or took more than a minute: a fault

Faults are listed with file, column, role and what happened. Columns of more than 20,000 rows are compared in their
first 20,000. Each file is read in a process of its own, in 4 GiB of memory.

DuckDB is asked where the package `duckdb` is installed, in a process of its own, so that its faults are not taken for
the product's. How many were compared with what it reads, too, is told as well: it cannot read every column, and has for
some a type that means nothing in a role.
"""

import argparse
import csv
import json
import math
import os
import pickle
import resource
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from importlib import metadata
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

ROWS = 20_000
SECONDS = 60
MEMORY = 4 << 30
TABULAR = (".parquet", ".parq")
TEXTS = (".csv", ".tsv", ".jsonl", ".ndjson")
ENDS = ("equal", "refused", "differs", "exception", "died")
BY_DUCKDB = "by DuckDB, too"

Outcome = dict[str, Any]
Counts = dict[tuple[str, str], Mapping[str, int]]
"""Of a repository and a role: how often each end came about, and how often DuckDB had a say."""


def main() -> int:
    """Try all files, then print and write what became of them; 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="STEM", help="write STEM.md and STEM.jsonl")
    parser.add_argument("--before", type=Path, metavar="FILE.jsonl", help="another result, to show what became of it")
    parser.add_argument("--note", action="append", default=[], help="a paragraph to end the page with")
    for each, does in PARTS.items():
        parser.add_argument(each, dest="part", type=lambda file, does=does: (does, Path(file)), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        does, file = options.part
        does(file)
        return 0
    folder = Path(os.environ["HILOREC_CORPUS"])
    names = sorted(path for path in folder.rglob("*") if path.suffix in (*TABULAR, *TEXTS) and path.is_file())
    files = Counter(repository(file.relative_to(folder)) for file in names)
    counts: dict[tuple[str, str], Counter[str]] = {}
    faults = []
    for number, file in enumerate(names, start=1):
        print(f"\r{number}/{len(names)}", end="", file=sys.stderr, flush=True)
        place = file.relative_to(folder)
        for found in in_a_process(file):
            of = counts.setdefault((repository(place), found["role"]), Counter())
            of.update([found["end"], *([BY_DUCKDB] if found.pop(BY_DUCKDB, False) else [])])
            if found["end"] not in ("equal", "refused"):
                told = found["told"].replace(str(folder), folder.name)
                faults.append({"kind": "fault", "file": str(place), **found, "told": told})
    print(file=sys.stderr)
    report(files, counts, faults, options)
    return bool(faults)


def repository(place: Path) -> str:
    """The repository that a file is of, as it is usually written."""
    return str(place.parts[0]).replace("_", "/", 1)


def report(files: Counter[str], counts: Counts, faults: list[Outcome], options: argparse.Namespace) -> None:
    """Print a table for each repository and all faults, and write them where that is asked for."""
    from benchmarks.report import environment, read, show, shown_path, write

    given = read(options.before) if options.before else {}
    before: Counts = {(line["repository"], line["role"]): line["counts"] for line in given.get("counts", [])}
    tables = {f"{name}, {count} files": rows(name, counts, before) for name, count in files.items()}
    listed = [
        f"- {one['file']}, column {one['column']!r} as {one['role']}: {one['end']}: {one['told']}" for one in faults
    ]
    for title, table in tables.items():
        show(title, table)
    for line in listed:
        print(line)
    if not options.output:
        return
    parts: list[Any] = [
        f"{files.total():,} files of {len(files)} public repositories: each column in each role through the reader, "
        "and each text through the converters' own, beside what others read. *Equal* is as pyarrow (Python, of texts) "
        "reads it, and as DuckDB does where it has a say; *refused* is one error that names the file, as it should be "
        "for a text as a number; all else is a fault. `tests/data/corpus.py` says more.",
    ]
    if given:
        parts.append(f"A cell has before -> after where they differ; before is {given['about'][0]['commit']}.")
    for title, table in tables.items():
        parts += [f"{title}:", table]
    parts += ["\n".join(listed) or "No faults.", *options.note]
    command = "HILOREC_CORPUS=FOLDER python tests/data/corpus.py"
    about = {"command": command + (f" --before {shown_path(options.before)}" if given else ""), **environment()}
    about["files"] = files
    if find_spec("duckdb"):
        about["versions"]["duckdb"] = metadata.version("duckdb")
    lines = [{"kind": "counts", "repository": name, "role": role, "counts": of} for (name, role), of in counts.items()]
    write(options.output, "Foreign files", parts, about, [*lines, *faults])


def rows(name: str, counts: Counts, before: Counts) -> list[dict[str, str]]:
    """A repository's table."""

    def cell(key: str, role: str) -> str:
        now = counts.get((name, role), {}).get(key, 0)
        then = before.get((name, role), {}).get(key, 0) if before else now
        return f"{now:,}" if now == then else f"{then:,} -> {now:,}"

    roles = [role for role in (*ROLES, "CSV", "JSON Lines", "file") if (name, role) in {**before, **counts}]
    return [{"role": role, **{key: cell(key, role) for key in (*ENDS, BY_DUCKDB)}} for role in roles]


def in_a_process(file: Path) -> Iterator[Outcome]:
    """What became of a file's columns, and whether the process lived."""
    command = [sys.executable, __file__]
    with TemporaryFile() as others:
        if file.suffix in TABULAR and find_spec("duckdb"):
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*command, "--duckdb", str(file)],
                    stdout=others,
                    stderr=subprocess.DEVNULL,
                    timeout=SECONDS,
                    check=False,
                )
            others.seek(0)
        try:
            done = subprocess.run(
                [*command, "--file", str(file)],
                stdin=others,
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            output, told = done.stdout, f"exit status {done.returncode}: {done.stderr.strip()[-300:]}"
            alive = done.returncode == 0
        except subprocess.TimeoutExpired as error:
            output, told, alive = (error.stdout or b"").decode(), f"more than {SECONDS} s", False
    yield from (json.loads(line) for line in output.splitlines())
    if not alive:
        yield {"column": "", "role": "file", "end": "died", "told": told}


def by_the_product(file: Path) -> None:
    """Print what became of each column, a JSON object a line."""
    for found in (tabular if file.suffix in TABULAR else textual)(file):
        print(json.dumps(found), flush=True)


def by_duckdb(file: Path) -> None:
    """Write each column that DuckDB can read, its name and its values pickled."""
    import duckdb

    duckdb.execute(
        "SET enable_geoparquet_conversion = false"
    )  # what a file says of its geometry ends the reading of all
    table = duckdb.read_parquet(str(file), hive_partitioning=False)
    for name in table.columns:
        with suppress(Exception):
            found = table.select(duckdb.ColumnExpression(name)).limit(ROWS).fetchall()
            sys.stdout.buffer.write(pickle.dumps((name, [value for (value,) in found])))
            sys.stdout.buffer.flush()


def read_by_duckdb() -> dict[str, list[Any]]:
    """What `by_duckdb` wrote, as far as it came."""
    found = {}
    with suppress(EOFError, pickle.UnpicklingError):
        while True:
            name, values = pickle.load(sys.stdin.buffer)
            found[name] = values
    return found


class Role(NamedTuple):
    """What a column is tried as.

    Attributes:
        columns: that are read, given the column's name and its values as pyarrow has them.
        expected: of the values, None where the product is free to refuse only.
        found: what was read.
    """

    columns: Callable[[str, list[Any]], Any]
    expected: Callable[[list[Any]], list[Any] | None]
    found: Callable[[Any, Any], list[Any]]


def tabular(file: Path) -> Iterator[Outcome]:
    """Each column of a Parquet file in each role."""
    import pyarrow.parquet as pq

    try:
        opened = pq.ParquetFile(file, arrow_extensions_enabled=False, coerce_int96_timestamp_unit="us")
        names = list(dict.fromkeys(opened.schema_arrow.names))
    except Exception:
        names = []
    others = read_by_duckdb()
    for name in names or ["x"]:
        try:
            values = opened.read([name]).select([name]).slice(0, ROWS).column(0).to_pylist() if names else None
        except Exception:
            values = None
        for role, tried in ROLES.items():
            yield {"column": name, "role": role, **ended(file, name, tried, values, others.get(name))}


def ended(file: Path, name: str, role: Role, values: list[Any] | None, others: list[Any] | None) -> Outcome:
    """How one column in one role ended; its values are as pyarrow and as DuckDB have them, None where one cannot."""
    from recsys.data.order import RowSlice
    from recsys.data.parquet import ParquetShards
    from recsys.data.storage import DataError

    found: list[Any] = []
    try:
        shards = ParquetShards([str(file)], role.columns(name, values or []), source="data.train")
        for group, rows in enumerate(shards.row_counts):
            if len(found) >= ROWS:
                break
            found += role.found(shards, shards.read(RowSlice(group, 0, rows)))
    except DataError as error:
        return {"end": "refused" if str(file) in str(error) else "exception", "told": str(error)}
    except Exception as error:
        return {"end": "exception", "told": f"{type(error).__name__}: {error}"}
    expected = None if values is None else role.expected(values)
    if expected is None:
        return {"end": "differs", "told": "read, where pyarrow reads nothing that has a meaning here"}
    told = difference(expected, found[:ROWS])
    expected = None if others is None else role.expected(others)
    if not told and expected is not None and (told := difference(expected, found[:ROWS])):
        told = f"DuckDB: {told}"
    return {"end": "differs" if told else "equal", "told": told, BY_DUCKDB: expected is not None}


def difference(expected: list[Any], found: list[Any]) -> str:
    """The first difference, in words; empty if there is none."""
    for row, (one, other) in enumerate(zip(expected, found, strict=False)):
        if one != other:
            return f"row {row}: {str(other)[:80]}, not {str(one)[:80]}"
    return "" if len(expected) == len(found) else f"{len(found)} rows, not {len(expected)}"


def flat_values(values: list[Any]) -> list[Any]:
    """All values, those of lists included, without nulls."""
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return [value for value in flat if value is not None]


def rows_by(mapped: Callable[[Any], int | None]) -> Callable[[list[Any]], list[Any] | None]:
    """Rows of a table for each value, in lists: of a single value one or none."""

    def rows(values: list[Any]) -> list[Any] | None:
        try:
            return [
                [mapped(item) for item in value]
                if isinstance(value, list)
                else []
                if value is None
                else [mapped(value)]
                for value in values
            ]
        except (TypeError, ValueError, OverflowError):
            return None

    return rows


def ids_by(ids: Callable[[list[Any]], Any]) -> Callable[[str, list[Any]], Any]:
    """One sparse feature of the column."""

    def columns(name: str, values: list[Any]) -> Any:
        from reading import sparse_column

        from recsys.data.features import Columns

        return Columns(None, None, {}, {"f": sparse_column(name, 2**31 - 1, ids(values))})

    return columns


def found_ids(shards: Any, rows: Any) -> list[Any]:
    from reading import ids

    return ids(shards, rows)["f"]


def plain(_: list[Any]) -> Any:
    from recsys.data.ids import PlainIds

    return PlainIds(2**31 - 1)


def hashed(_: list[Any]) -> Any:
    from recsys.data.ids import HashedIds

    return HashedIds(1_000_003)


def hash_of(value: Any) -> int:
    """By the xxhash package, as docs/data.md has it."""
    from xxhash import xxh3_64_intdigest

    if isinstance(value, bool | int):
        return xxh3_64_intdigest(int(value).to_bytes(8, "little", signed=value < 0)) % 1_000_003
    if isinstance(value, str):
        return xxh3_64_intdigest(value.encode()) % 1_000_003
    raise TypeError


def is_text(values: list[Any]) -> bool:
    return any(isinstance(value, str) for value in flat_values(values))


def vocabulary(values: list[Any]) -> Any:
    """Of every second distinct value."""
    import pyarrow as pa

    from recsys.data.ids import VocabularyIds
    from recsys.data.vocabulary import Vocabulary

    known = known_values(values)
    kind = pa.large_string() if is_text(values) else pa.int64()
    return VocabularyIds(Vocabulary(pa.array(known, kind), pa.array([1] * len(known), pa.int64()), "of the column"))


def known_values(values: list[Any]) -> list[Any]:
    kind = str if is_text(values) else int
    values = [value for value in flat_values(values) if isinstance(value, kind)]
    return sorted({kind(value) for value in values if kind is str or -(2**63) <= value < 2**63})[::2]


def vocabulary_rows(values: list[Any]) -> list[Any] | None:
    places = {value: place for place, value in enumerate(known_values(values), start=1)}
    kind = str if is_text(values) else int

    def row(value: Any) -> int:
        if not isinstance(value, kind):
            raise TypeError
        return places.get(value, 0)

    return rows_by(row)(values)


def day(_: list[Any]) -> Any:
    from recsys.data.ids import DatetimeIds

    return DatetimeIds("day")


def day_of(value: Any) -> int:
    if isinstance(value, datetime):
        return (value.astimezone(UTC) if value.tzinfo else value).day - 1
    if isinstance(value, date):
        return value.day - 1
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return datetime.fromtimestamp(value, UTC).day - 1


def dense(name: str, _: list[Any]) -> Any:
    from reading import dense_column

    from recsys.data.features import Columns

    return Columns(None, None, {"x": dense_column(name, 0.5)}, {})


def floats(values: list[Any]) -> list[Any] | None:
    import numpy as np

    try:
        with np.errstate(over="ignore"):
            found = [0.5 if value is None else float(np.float32(float(number(value)))) for value in values]
    except (TypeError, ValueError, OverflowError):
        return None
    return found if all(map(math.isfinite, found)) else None


def number(value: Any) -> Any:
    if isinstance(value, str | bytes | list | dict):
        raise TypeError
    return value


def label(name: str, _: list[Any]) -> Any:
    from recsys.data.features import Columns

    return Columns(name, None, {}, {}, label_null="skip")


def labels(values: list[Any]) -> list[Any] | None:
    known = [value for value in values if value is not None and value == value]
    if not all(isinstance(value, str | bytes) is False and value in (0, 1) for value in known):
        return None
    return ["none" if value is None or value != value else float(value) for value in values]


ROLES = {
    "plain ids": Role(ids_by(plain), rows_by(lambda value: in_range(value)), found_ids),
    "hashed ids": Role(ids_by(hashed), rows_by(hash_of), found_ids),
    "vocabulary": Role(ids_by(vocabulary), vocabulary_rows, found_ids),
    "day": Role(ids_by(day), rows_by(day_of), found_ids),
    "dense": Role(dense, floats, lambda shards, rows: rows.dense[0].tolist()),
    "label": Role(label, labels, lambda shards, rows: ["none" if one != one else one for one in rows.labels.tolist()]),
}


def in_range(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 2**31 - 1:
        raise ValueError
    return int(value)


def textual(file: Path) -> Iterator[Outcome]:
    """The rows of a text file, of texts."""
    import pyarrow as pa

    from recsys.data.storage import DataError
    from recsys.prepare.text import TextFiles, TextFormat

    is_json = file.suffix in (".jsonl", ".ndjson")
    role = "JSON Lines" if is_json else "CSV"
    delimiter = "\t" if file.suffix == ".tsv" else ","
    try:
        if is_json:
            objects = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            names = [name for name in objects[0] if all(isinstance(one.get(name), str | None) for one in objects)]
            expected = [[one.get(name) for name in names] for one in objects]
        else:
            with file.open(encoding="utf-8-sig", newline="") as stream:
                names, *lines = list(islice(csv.reader(stream, delimiter=delimiter, strict=True), ROWS + 1))
            rows = [line for line in lines if line]
            expected = rows if all(len(line) == len(names) for line in rows) else None
    except (ValueError, KeyError, IndexError, AttributeError, csv.Error, OSError):
        names, expected = ["a"], None
    if not names or len(set(names)) < len(names):
        return
    form = TextFormat(dict.fromkeys(names, pa.string()), json=is_json, delimiter=delimiter, nulls=())
    try:
        blocks = TextFiles([file], form).blocks("reading")
        found = [list(row.values()) for block in blocks for row in block.table.select(names).to_pylist()][:ROWS]
    except DataError as error:
        yield {
            "column": "",
            "role": role,
            "end": "refused" if str(file) in str(error) else "exception",
            "told": str(error),
        }
        return
    except Exception as error:
        yield {"column": "", "role": role, "end": "exception", "told": f"{type(error).__name__}: {error}"}
        return
    same = expected is not None and found == expected
    told = "" if same else f"{len(found)} rows, {len(expected) if expected is not None else 'none'} by Python"
    yield {"column": "", "role": role, "end": "equal" if same else "differs", "told": told}


PARTS = {"--file": by_the_product, "--duckdb": by_duckdb}
"""What a process of its own does with a file."""


if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])
    sys.exit(main())
