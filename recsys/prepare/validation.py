"""Reading the splits of a config before training does: what they hold, what would corrupt training, what drifts.

Every row group is decoded by the code that training decodes it with, feature by feature, so that what is refused here
is what would be refused there. The figures are gathered in one pass, in memory that does not grow with the rows.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from recsys.config import Config, DenseFeatureConfig
from recsys.data.arrow import usual_table
from recsys.data.features import Columns, SparseColumn, build_columns
from recsys.data.hashing import hash_values
from recsys.data.kinds import Kinds
from recsys.data.parquet import ColumnError, Found, ShardTables, find
from recsys.data.rows import Rows
from recsys.data.splits import path_types
from recsys.data.storage import DataError
from recsys.prepare.sketches import HyperLogLog, RowSample
from recsys.prepare.synthetic import write_embedded

SHOWN = 3
"""Faults of one feature in one split that are listed; the rest are counted."""

PSI_THRESHOLD = 0.1
"""The customary border of a moderate shift (Siddiqi, "Credit Risk Scorecards", 2006)."""

LABEL_RATIO = 1.25
"""Of label rates: a model that is calibrated on one is off by as much on the other, which PSI of a rare label hides."""

CHANCE = 1e-3
"""That sampling alone makes any one of all comparisons a finding."""

UNSEEN_SHARE, DRAWS_A_ROW = 0.5, 10
"""A table is too large if so many of its rows never occur, though there were so many ids for each."""

OOV_SHARE = 0.2
DUPLICATE_SHARE = 1e-3

_SAMPLED_ROW_GROUPS = 64  # at least, if there are as many
_BOUND_ROW_GROUPS = 16  # that deciles are taken from
_FILE_GROUPS = 512  # that histograms are kept of
_BUCKETS_LOG2 = 6


class Finding(NamedTuple):
    """Something wrong with a split.

    Attributes:
        split: of the config.
        of: config path of the feature or column; of the split itself where it is about files.
        message: one line: file, row group, value and count where there are, and the way out.
    """

    split: str
    of: str
    message: str


class Drift(NamedTuple):
    """How far one distribution is from that of all of train.

    Attributes:
        of: config path of the label or feature.
        measure: what is distributed: the label's `rate`, `nulls` (share of rows without), `values` by train's deciles
            or `ids` by hashed buckets.
        data: another split of the config, or a file of train (the first of several neighbours where there are many).
        rows: of `data`, that have any.
        psi: population stability index.
        noise: what sampling alone does not exceed.
        share: of `data`, where the measure is a share.
        train_share: of train likewise.
    """

    of: str
    measure: str
    data: str
    rows: int
    psi: float
    noise: float
    share: float | None
    train_share: float | None

    @property
    def warns(self) -> bool:
        """Whether it is more than noise, and large enough to matter."""
        if self.psi <= self.noise:
            return False
        if self.measure == "rate" and self.share is not None and self.train_share is not None:
            low, high = sorted((self.share, self.train_share))
            return high >= LABEL_RATIO * low or self.psi > PSI_THRESHOLD
        return self.psi > PSI_THRESHOLD


@dataclass(frozen=True)
class SparseFigures:
    """A sparse feature in a split.

    Attributes:
        table: whose rows its ids are.
        null_rate: share of the rows without any id, by a null or an empty list.
        least: id.
        greatest: id.
        values: how many ids there are.
        distinct: estimate of how many different ones.
        mean_length: ids of a row, before lists are cut.
        longest: list, before it is cut.
        cut_rate: share of the rows whose list is cut.
        counted: share of the ids, by kind, that were `hashed`, `clipped` or `out_of_vocabulary`.
    """

    table: str
    null_rate: float
    least: int | None
    greatest: int | None
    values: int
    distinct: int
    mean_length: float
    longest: int
    cut_rate: float
    counted: Mapping[str, float]


@dataclass(frozen=True)
class DenseFigures:
    """A dense feature in a split; mean, deviation and extremes are of what the model sees.

    Attributes:
        null_rate: share of the rows with a null, which was filled.
        not_finite_rate: share with a NaN or infinity that was filled.
        clipped_rate: share beyond `clip`.
        mean: of all rows.
        std: of all rows.
        least: value.
        greatest: value.
    """

    null_rate: float
    not_finite_rate: float
    clipped_rate: float
    mean: float
    std: float
    least: float
    greatest: float


@dataclass(frozen=True)
class SplitFigures:
    """A split.

    Attributes:
        files: how many.
        row_groups: of all files.
        rows: of all files.
        rows_read: less, where it was sampled.
        label_rate: share of 1 among the labels; None where there is none.
        skipped: rows read that have no label.
        sparse: by feature, of those that could be read.
        dense: by feature likewise.
    """

    files: int
    row_groups: int
    rows: int
    rows_read: int
    label_rate: float | None
    skipped: int
    sparse: Mapping[str, SparseFigures]
    dense: Mapping[str, DenseFigures]


@dataclass(frozen=True)
class TableFigures:
    """A table: its rows, and an estimate of how many of them occur in what was read of train."""

    rows: int
    seen: int


@dataclass(frozen=True)
class Duplicates:
    """Rows of a split that are in another as well, value for value, among those that are sampled by their hash.

    Attributes:
        split: whose rows are looked up.
        other: in which; of train in itself, rows that are there more than once.
        shared: rows that were found.
        compared: rows that were looked up.
    """

    split: str
    other: str
    shared: int
    compared: int


@dataclass(frozen=True)
class Report:
    """What a scan found.

    Attributes:
        splits: by name, of those that could be opened.
        tables: by name.
        drift: of all other splits, and of the files of train that differ by more than noise; the largest first.
        duplicates: of each pair of splits, and within train.
        errors: what ends training, or spoils it.
        warnings: what may.
    """

    splits: Mapping[str, SplitFigures]
    tables: Mapping[str, TableFigures]
    drift: Sequence[Drift]
    duplicates: Sequence[Duplicates]
    errors: Sequence[Finding]
    warnings: Sequence[Finding]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        findings = {"errors": [it._asdict() for it in self.errors], "warnings": [it._asdict() for it in self.warnings]}
        drift = [{**it._asdict(), "warns": it.warns} for it in self.drift]
        error = {"distinct_standard_error": HyperLogLog.STANDARD_ERROR}
        return {"version": 1, **asdict(self), "drift": drift, **error, **findings}


def validate(
    config: Config,
    sample: int | None = None,
    *,
    on_row_group: Callable[[str, int, int], None] = lambda split, done, total: None,
) -> Report:
    """Scan all splits of a config, the embedded log written first if the config asks for it.

    Args:
        config: names splits, features and tables.
        sample: about how many rows to read of each split, spread evenly over row groups of all files; None reads all.
        on_row_group: told after each row group the split, how many are done, and of how many.

    Raises:
        ConfigError: the label is no expression, or a table has fewer rows than its ids need.
        DataError: a vocabulary cannot be read.
    """
    write_embedded(config)
    columns = build_columns(config)
    findings = _Findings([], [])
    scans: dict[str, _Scan] = {}
    splits: dict[str, _Split] = {}
    bounds: Mapping[str, NDArray[np.float32]] | None = None
    kinds = Kinds()
    found = _found(config, findings)
    types = path_types(config, columns.names, found)
    for name in found:
        split = _opened(config, name, columns, findings, found[name], types, kinds)
        if split is None:
            continue
        splits[name] = split
        bounds = split.deciles() if bounds is None else bounds
        scans[name] = split.scan(sample, bounds, config.data.reader_threads, on_row_group)
        findings.look_at(split, scans[name])
    seen = _seen(config, scans.get("train"))
    drift = list(_drifts(scans, splits))
    duplicates = list(_duplicates(scans))
    if "train" in scans:
        findings.look_at_tables(config, splits["train"], scans["train"], seen)
    findings.look_at_drift(drift)
    findings.look_at_duplicates(duplicates)
    return Report(
        {name: splits[name].figures(scan, config) for name, scan in scans.items()},
        {name: TableFigures(table.num_embeddings, seen.get(name, 0)) for name, table in config.tables.items()},
        sorted(drift, key=lambda it: -it.psi),
        duplicates,
        findings.errors,
        findings.warnings,
    )


def stability_index(counts: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Population stability index: sum of (p - q) log(p / q) over (B,) buckets.

    It is Jeffreys' divergence of p and q (Siddiqi, 2006); half a count is added to each bucket that either has, or a
    bucket that only one has would make it infinite.
    """
    either = counts + reference > 0
    p, q = counts[either] + 0.5, reference[either] + 0.5
    p, q = p / p.sum(), q / q.sum()
    return float(((p - q) * np.log(p / q)).sum())


def stability_noise(rows: int, reference_rows: int, buckets: int, chance: float) -> float:
    """What the index of two samples of one distribution exceeds only with a given chance.

    Under no drift the index over (1 / n + 1 / m) is distributed as chi squared of B - 1 degrees of freedom (Yurdakul,
    "Statistical properties of population stability index", 2018), whose quantile is Wilson and Hilferty's (1931).
    """
    freedom = max(1, buckets - 1)
    part = 2 / (9 * freedom)
    quantile: float = freedom * (1 - part + NormalDist().inv_cdf(1 - chance) * part**0.5) ** 3
    return (1 / rows + 1 / reference_rows) * quantile


def _found(config: Config, findings: "_Findings") -> dict[str, Found]:
    """The files of each split that can be listed."""
    found = {}
    for name in config.data.splits:
        try:
            found[name] = find(config.data.patterns(name), source=f"data.{name}")
        except DataError as error:
            findings.errors.append(Finding(name, f"data.{name}", str(error)))
        else:
            findings.warnings += [Finding(name, f"data.{name}", warning) for warning in found[name].warnings]
    return found


def _opened(
    config: Config,
    name: str,
    columns: Columns,
    findings: "_Findings",
    found: Found,
    types: Mapping[str, pa.DataType],
    kinds: Kinds,
) -> "_Split | None":
    """A split with those of its files that can be opened; None if there are none, or no rows in them."""
    opened, source = _Scan(), f"data.{name}"
    try:
        tables = ShardTables(
            config.data.patterns(name),
            columns.names,
            source=source,
            found=found,
            path_types=types,
            on_unreadable=lambda error: opened.fault(source, [str(error)]),
        )
    except DataError as error:
        # Of files that cannot be read, nobody knows whether they hold rows.
        if not opened.faults:
            opened.fault(source, [str(error)])
        findings.look_at_faults(name, opened)
        return None
    return _Split(name, tables, columns, opened, kinds)


@dataclass
class _Scan:
    """Figures of some row groups, which can be merged.

    Attributes:
        rows: that were read.
        counts: by config path and what is counted.
        extremes: least and greatest, by config path and of what.
        moments: number, mean and sum of squared deviations, by config path.
        distinct: ids by config path.
        histograms: by the group of files that the rows are in, and by config path and measure.
        sample: of the rows.
        faults: by config path: the first few, and how many in all.
    """

    rows: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    extremes: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    moments: dict[str, tuple[int, float, float]] = field(default_factory=dict)
    distinct: dict[str, HyperLogLog] = field(default_factory=dict)
    histograms: dict[int, dict[tuple[str, str], NDArray[np.float64]]] = field(default_factory=dict)
    sample: RowSample = field(default_factory=RowSample)
    faults: dict[str, tuple[list[str], int]] = field(default_factory=dict)

    def merge(self, other: "_Scan") -> None:
        self.rows += other.rows
        self.counts.update(other.counts)
        for key, extremes in other.extremes.items():
            low, high = self.extremes.get(key, extremes)
            self.extremes[key] = min(low, extremes[0]), max(high, extremes[1])
        for path, moments in other.moments.items():
            self.moments[path] = _merged(self.moments[path], moments) if path in self.moments else moments
        for path, distinct in other.distinct.items():
            self.distinct.setdefault(path, HyperLogLog()).merge(distinct)
        for group, histograms in other.histograms.items():
            ours = self.histograms.setdefault(group, {})
            for measured, counts in histograms.items():
                ours[measured] = ours[measured] + counts if measured in ours else counts
        self.sample.merge(other.sample)
        for path, (messages, number) in other.faults.items():
            self.fault(path, messages, number)

    def fault(self, path: str, messages: Sequence[str], number: int = 1) -> None:
        known, before = self.faults.get(path, ([], 0))
        self.faults[path] = [*known, *messages][:SHOWN], before + number

    def take_label(self, path: str, labels: NDArray[np.float32], group: dict[tuple[str, str], Any]) -> None:
        positive, negative = int((labels == 1).sum()), int((labels == 0).sum())
        group[path, "rate"] = np.array([negative, positive], np.float64)
        self.counts[path, "skipped"] += len(labels) - positive - negative

    def take_sparse(
        self, path: str, name: str, spec: SparseColumn, rows: Rows, group: dict[tuple[str, str], Any]
    ) -> None:
        if rows.lists:
            ids, lengths = rows.lists[0].values, rows.lists[0].lengths()
        else:
            ids, lengths = rows.single[0], (rows.single[0] >= 0).astype(np.int64)
            ids = ids[ids >= 0] if rows.has_empty else ids
        counted: NDArray[np.int64] | None = None
        distinct: NDArray[Any] = ids
        if spec.ids.num_rows <= 4 * len(ids):  # hashing each once is less work
            counted = np.bincount(ids)
            distinct = np.flatnonzero(counted)
            counted = counted[distinct]
        hashes = hash_values(pa.array(distinct))
        self.distinct[path] = HyperLogLog()
        self.distinct[path].add(hashes)
        buckets = (hashes >> np.uint64(64 - _BUCKETS_LOG2)).astype(np.int64)
        empty = int((lengths == 0).sum())
        group[path, "ids"] = np.bincount(buckets, counted, 1 << _BUCKETS_LOG2).astype(np.float64)
        group[path, "nulls"] = np.array([len(lengths) - empty, empty], np.float64)
        cut = rows.counts.get(("cut", name))
        if cut is not None:
            lengths = lengths + cut
            self.counts[path, "cut"] += int((cut > 0).sum())
        if len(distinct):
            self.extremes[path, "value"] = int(distinct.min()), int(distinct.max())
        self.extremes[path, "length"] = int(lengths.min()), int(lengths.max())
        self.counts[path, "length"] += int(lengths.sum())
        self.counts[path, "values"] += len(ids)
        for kind in spec.ids.kinds:
            self.counts[path, kind] += int(rows.counts.get((kind, name), np.zeros(1)).sum())

    def take_dense(
        self,
        path: str,
        name: str,
        spec: DenseFeatureConfig,
        rows: Rows,
        column: pa.ChunkedArray,
        bounds: NDArray[np.float32] | None,
        group: dict[tuple[str, str], Any],
    ) -> None:
        values = rows.dense[0]
        wide = values.astype(np.float64)
        mean = float(wide.mean())
        self.moments[path] = len(values), mean, float(np.square(wide - mean).sum())
        self.extremes[path, "value"] = float(values.min()), float(values.max())
        nulls = column.null_count
        group[path, "nulls"] = np.array([len(values) - nulls, nulls], np.float64)
        if bounds is not None:
            present = _present(values, column)
            # Nine comparisons of whole arrays take a tenth of the time of a search for each value.
            at_least = [len(present), *(int(np.count_nonzero(present >= bound)) for bound in bounds), 0]
            group[path, "values"] = -np.diff(np.array(at_least, np.float64))
        self.counts[path, "not_finite"] += int(rows.counts.get(("not_finite", name), np.zeros(1)).sum())
        if spec.clip is not None:
            given = column.drop_null().cast(pa.float64(), safe=False).to_numpy()
            beyond = np.isfinite(given) & ((given < spec.clip[0]) | (given > spec.clip[1]))
            self.counts[path, "clipped"] += int(beyond.sum())

    def whole(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Histograms of all files together."""
        total: dict[tuple[str, str], NDArray[np.float64]] = {}
        for histograms in self.histograms.values():
            for measured, counts in histograms.items():
                total[measured] = total[measured] + counts if measured in total else counts
        return total


class _Split:
    """A split that is open, and which of its files can be read as what."""

    def __init__(self, name: str, tables: ShardTables, columns: Columns, opened: _Scan, kinds: Kinds) -> None:
        self.name = name
        self.tables = tables
        self.parts = columns.parts
        self._opened = opened
        self._readable: list[frozenset[str]] = []
        lists: set[str] = set()
        for file, schema in zip(tables.files, tables.schemas, strict=True):
            readable = set()
            for path, part in self.parts.items():
                try:
                    lists |= part.check_schema(schema, file)
                    kinds.check(part, schema, file)
                    readable.add(path)
                except DataError as error:
                    self._opened.fault(path, [str(error)])
            self._readable.append(frozenset(readable))
        self._layouts = {path: part.layout(frozenset(part.sparse) & lists) for path, part in self.parts.items()}
        self._per_group = -(-len(tables.files) // _FILE_GROUPS)

    def files(self, group: int) -> str:
        """The file of a group of histograms, or the first and the number of all."""
        first = group * self._per_group
        number = min(self._per_group, len(self.tables.files) - first)
        return self.tables.files[first] + (f" and the {number - 1} after it" if number > 1 else "")

    def deciles(self) -> dict[str, NDArray[np.float32]]:
        """Those of the values of dense features, nulls aside, as some row groups have them."""
        found: dict[str, list[NDArray[np.float32]]] = {}
        names = [path for path, part in self.parts.items() if part.dense]
        for row_group in _spread(len(self.tables.row_counts), _BOUND_ROW_GROUPS):
            if not self.tables.row_counts[row_group]:
                continue
            for path, rows, table in self._decoded(row_group, None, names, _Scan()):
                ((name, spec),) = self.parts[path].dense.items()
                found.setdefault(path, []).append(_present(rows.dense[0], table.column(spec.column or name)))
        joined = {path: np.concatenate(values) for path, values in found.items()}
        return {
            path: np.unique(np.quantile(values, np.arange(1, 10) / 10)).astype(np.float32)
            for path, values in joined.items()
            if len(values)
        }

    def scan(
        self,
        sample: int | None,
        bounds: Mapping[str, NDArray[np.float32]],
        threads: int,
        on_row_group: Callable[[str, int, int], None],
    ) -> _Scan:
        """Figures of all rows, or of about as many as `sample` says."""
        counts = self.tables.row_counts
        row_groups: Sequence[int] = [number for number, rows in enumerate(counts) if rows]
        taken: int | None = None
        if sample is not None and sample < sum(counts):
            wanted = max(_SAMPLED_ROW_GROUPS, -(-sample * len(row_groups) // sum(counts)))
            row_groups = [row_groups[place] for place in _spread(len(row_groups), min(wanted, sample))]
            taken = -(-sample // len(row_groups))
        total = self._opened
        with ThreadPoolExecutor(threads) as pool:
            pending: deque[Future[_Scan]] = deque()
            left = iter(row_groups)
            for done in range(len(row_groups)):
                # No more at a time, or memory would grow with the row groups that wait to be merged.
                while len(pending) < 2 * threads and (row_group := next(left, None)) is not None:
                    pending.append(pool.submit(self._scan, row_group, taken, bounds))
                total.merge(pending.popleft().result())
                on_row_group(self.name, done + 1, len(row_groups))
        return total

    def _scan(self, row_group: int, taken: int | None, bounds: Mapping[str, NDArray[np.float32]]) -> _Scan:
        scan = _Scan()
        group = scan.histograms.setdefault(self.tables.file_of(row_group) // self._per_group, {})
        hashes: NDArray[np.uint64] = np.zeros(1, np.uint64)
        decoded = 0
        for path, rows, table in self._decoded(row_group, taken, self.parts, scan):
            decoded += 1
            part = self.parts[path]
            scan.rows = len(rows)
            scan.counts[path, "rows"] += len(rows)
            if part.label:
                scan.take_label(path, rows.labels, group)
            for name, spec in part.sparse.items():
                scan.take_sparse(path, name, spec, rows, group)
            for name, dense in part.dense.items():
                scan.take_dense(path, name, dense, rows, table.column(dense.column or name), bounds.get(path), group)
            hashes = _mixed(hashes, _bits(rows))
        if decoded == len(self.parts):
            scan.sample.add(hash_values(pa.array(hashes.view(np.int64))))
        return scan

    def _decoded(
        self, row_group: int, taken: int | None, paths: Iterable[str], scan: _Scan
    ) -> Iterator[tuple[str, Rows, pa.Table]]:
        """The rows of each part that can be decoded; what cannot becomes a fault."""
        readable = [path for path in paths if path in self._readable[self.tables.file_of(row_group)]]
        while True:
            names = list(dict.fromkeys(name for path in readable for name in self.parts[path].names))
            dictionaries = {name for path in readable for name in self.parts[path].dictionary_names}
            try:
                table = self.tables.table(row_group, names, dictionaries)
                break
            except ColumnError as error:  # the others may be sound
                for path in [path for path in readable if error.column in self.parts[path].names]:
                    scan.fault(path, [str(error)])
                    readable.remove(path)
            except DataError as error:
                scan.fault(f"data.{self.name}", [str(error)])
                return
        if not readable:
            return
        if taken is not None and taken < len(table):
            table = usual_table(table).take(pa.array(_spread(len(table), taken)))
        table = table.combine_chunks()
        for path in readable:
            try:
                part = self.parts[path]
                rows = part.decode(table.select(part.names), self._layouts[path], self.tables.where(row_group))
            except DataError as error:
                scan.fault(path, [str(error)])
            else:
                yield path, rows, table

    def figures(self, scan: _Scan, config: Config) -> SplitFigures:
        """The figures of a split."""
        histograms = scan.whole()
        negative, positive = histograms.get(("data.label", "rate"), np.zeros(2))
        counts = self.tables.row_counts
        return SplitFigures(
            files=len(self.tables.files),
            row_groups=len(counts),
            rows=sum(counts),
            rows_read=scan.rows,
            label_rate=float(positive / (negative + positive)) if negative + positive else None,
            skipped=scan.counts["data.label", "skipped"],
            sparse={
                name: _sparse_figures(scan, histograms[path, "nulls"], path, spec, config.features.sparse[name].table)
                for path, part in self.parts.items()
                for name, spec in part.sparse.items()
                if scan.counts[path, "rows"]
            },
            dense={
                name: _dense_figures(scan, histograms[path, "nulls"], path)
                for path, part in self.parts.items()
                for name in part.dense
                if scan.counts[path, "rows"]
            },
        )


@dataclass
class _Findings:
    """What is wrong, as it is found."""

    errors: list[Finding]
    warnings: list[Finding]

    def look_at_faults(self, split: str, scan: _Scan) -> None:
        """Note what could not be read, the first few and how many there are."""
        for path, (messages, number) in scan.faults.items():
            self.errors += [Finding(split, path, message) for message in messages]
            if number > len(messages):
                where = path if path == f"data.{split}" else f"data.{split}: {path}"
                rest = f"{where}: {number - len(messages)} more files or row groups like these"
                self.errors.append(Finding(split, path, rest))

    def look_at(self, split: _Split, scan: _Scan) -> None:
        """Note what a split has that training would refuse, or should."""
        name, tables = split.name, split.tables
        self.look_at_faults(name, scan)
        filled = {tables.file_of(number) for number, rows in enumerate(tables.row_counts) if rows}
        empty = [file for number, file in enumerate(tables.files) if number not in filled]
        if empty:
            more = f" and {len(empty) - 1} more files have" if len(empty) > 1 else " has"
            self.warnings.append(
                Finding(name, f"data.{name}", f"{empty[0]}{more} no rows; delete them or write them again")
            )
        read = f"data.{name}: in the {scan.rows:,} rows that were read, "
        # What is missing from a sample may be in the rest.
        absences = self.errors if scan.rows == sum(tables.row_counts) else self.warnings
        histograms = scan.whole()
        labels = histograms.get(("data.label", "rate"))
        if labels is not None and np.count_nonzero(labels) < 2:
            what = f"the label is always {int(labels[1] > 0)}" if labels.any() else "no row has a label"
            way_out = "; correct data.label, or join the labels again when the shards are written"
            absences.append(Finding(name, "data.label", f"{read}{what}{way_out}"))
        for path, part in split.parts.items():
            rows = scan.counts[path, "rows"]
            for kind in [kind for spec in part.sparse.values() for kind in spec.ids.kinds]:
                share = scan.counts[path, kind] / max(1, scan.counts[path, "values"])
                if share > OOV_SHARE:
                    self.warnings.append(
                        Finding(name, path, f"{read}{path}: {share:.1%} of the ids are {_KINDS[kind]}")
                    )
            if name != "train" or not rows or not (part.sparse or part.dense):
                continue
            present, nulls = histograms[path, "nulls"]
            low, high = scan.extremes.get((path, "value"), (0, 0))
            shortest, longest = scan.extremes.get((path, "length"), (0, 0))
            if not present:
                absences.append(
                    Finding(name, path, f"{read}{path} is null in every one; mend the join, or remove the feature")
                )
            elif low == high and shortest == longest and (part.dense or not nulls):
                self.warnings.append(
                    Finding(name, path, f"{read}{path} is always {low}, so it teaches nothing; remove the feature")
                )

    def look_at_tables(self, config: Config, split: _Split, scan: _Scan, seen: Mapping[str, int]) -> None:
        """Note tables that are far larger than need be, if enough was read to tell."""
        if scan.rows < sum(split.tables.row_counts):
            return
        for name, table in config.tables.items():
            features = [key for key, feature in config.features.sparse.items() if feature.table == name]
            drawn = sum(scan.counts[f"features.sparse.{key}", "values"] for key in features)
            rows = table.num_embeddings
            if drawn >= DRAWS_A_ROW * rows and seen[name] < (1 - UNSEEN_SHARE) * rows:
                way_out = "lower its num_embeddings, or correct the ids"
                if any((ids := config.features.sparse[key].ids) is not None and ids.applied for key in features):
                    way_out = "its ids were mapped at conversion: convert with fewer buckets"
                found = f"some {seen[name]:,} of its {rows:,} rows occur, among {drawn:,} ids"
                message = f"data.train: tables.{name}: {found}; {way_out}"
                self.warnings.append(Finding("train", f"tables.{name}", message))

    def look_at_drift(self, drift: Iterable[Drift]) -> None:
        """Note what drifts, the worst data of each feature's and measure's."""
        worst: dict[tuple[str, str, bool], list[Drift]] = {}
        for it in sorted(drift, key=lambda it: -it.psi):
            if it.warns:
                worst.setdefault((it.of, it.measure, it.data.startswith("data.")), []).append(it)
        for (of, measure, is_split), (first, *others) in worst.items():
            shares = f"{first.share:.2%} beside {first.train_share:.2%}, " if first.share is not None else ""
            more = f"; {len(others)} more {'splits' if is_split else 'files'} drift" if others else ""
            message = (
                f"{first.data}: {of}: its {_MEASURES[measure]} differ from those of all of data.train: {shares}PSI "
                f"{first.psi:.3f} over {first.rows:,} rows, where sampling gives up to {first.noise:.3f}{more}; see "
                "how the shards were written, or train on newer rows"
            )
            self.warnings.append(Finding(first.data.removeprefix("data.") if is_split else "train", of, message))

    def look_at_duplicates(self, duplicates: Sequence[Duplicates]) -> None:
        """Note splits that share rows, unless about as many rows of train are like another of train."""
        shares = {(it.split, it.other): it.shared / max(1, it.compared) for it in duplicates}
        by_chance = shares.get(("train", "train"), 0.0)
        for it in duplicates:
            share = shares[it.split, it.other]
            if it.split != it.other and share > max(DUPLICATE_SHARE, 1.5 * by_chance):
                message = (
                    f"data.{it.split}: {share:.2%} of its rows are in data.{it.other} too, value for value "
                    f"({it.shared:,} of {it.compared:,} compared); split the log again, so that each row is in one"
                )
                self.warnings.append(Finding(it.split, f"data.{it.split}", message))


_KINDS = {
    "hashed": "beyond the table and hashed into it; raise its num_embeddings, or give the feature ids of type hash",
    "clipped": "beyond the table and became row 0; raise its num_embeddings",
    "out_of_vocabulary": "not in its vocabulary; build it anew, with a lower --min-count",
}
_MEASURES = {"rate": "labels", "nulls": "nulls", "values": "values", "ids": "ids"}


def _seen(config: Config, scan: _Scan | None) -> dict[str, int]:
    """Estimates of how many rows of each table occur, in any of its features."""
    union = {name: HyperLogLog() for name in config.tables}
    for name, feature in config.features.sparse.items():
        if scan is not None and (path := f"features.sparse.{name}") in scan.distinct:
            union[feature.table].merge(scan.distinct[path])
    return {
        name: min(config.tables[name].num_embeddings, round(distinct.estimate())) for name, distinct in union.items()
    }


def _drifts(scans: Mapping[str, _Scan], splits: Mapping[str, _Split]) -> Iterator[Drift]:
    """All splits beside train, and the files of train beside all of it that differ by more than noise."""
    if "train" not in scans:
        return
    train, files = scans["train"].whole(), scans["train"].histograms
    whole = [(f"data.{name}", scan.whole()) for name, scan in scans.items() if name != "train"]
    parts = [(splits["train"].files(group), files[group]) for group in sorted(files) if len(files) > 1]
    chance = CHANCE / max(1, len(train) * (len(whole) + len(parts)))
    for data, histograms in whole + parts:
        for (of, measure), counts in histograms.items():
            if not (counts.sum() and train.get((of, measure), np.zeros(1)).sum()):
                continue
            reference = train[of, measure]
            # The ids of one row are no independent draws.
            rows, reference_rows = (
                int(one[of, "nulls"][0] if measure == "ids" else one[of, measure].sum()) for one in (histograms, train)
            )
            buckets = int(np.count_nonzero(counts + reference))
            noise = stability_noise(rows, reference_rows, buckets, chance)
            is_share = measure in ("rate", "nulls")
            share, train_share = (float(one[1] / one.sum()) if is_share else None for one in (counts, reference))
            drift = Drift(of, measure, data, rows, stability_index(counts, reference), noise, share, train_share)
            if data.startswith("data.") or drift.psi > noise:
                yield drift


def _duplicates(scans: Mapping[str, _Scan]) -> Iterator[Duplicates]:
    if "train" in scans:
        yield Duplicates("train", "train", *scans["train"].sample.repeated())
    for earlier, later in combinations(scans, 2):
        yield Duplicates(later, earlier, *scans[later].sample.shared(scans[earlier].sample))


def _sparse_figures(
    scan: _Scan, nullness: NDArray[np.float64], path: str, spec: SparseColumn, table: str
) -> SparseFigures:
    present, nulls = nullness
    rows, values = present + nulls, scan.counts[path, "values"]
    low, high = scan.extremes.get((path, "value"), (None, None))
    return SparseFigures(
        table=table,
        null_rate=float(nulls / rows),
        least=None if low is None else int(low),
        greatest=None if high is None else int(high),
        values=values,
        distinct=min(spec.ids.num_rows, round(scan.distinct[path].estimate())),
        mean_length=float(scan.counts[path, "length"] / rows),
        longest=int(scan.extremes[path, "length"][1]),
        cut_rate=float(scan.counts[path, "cut"] / rows),
        counted={kind: scan.counts[path, kind] / max(1, values) for kind in spec.ids.kinds},
    )


def _dense_figures(scan: _Scan, nullness: NDArray[np.float64], path: str) -> DenseFigures:
    present, nulls = nullness
    rows, mean, squares = scan.moments[path]
    least, greatest = scan.extremes[path, "value"]
    return DenseFigures(
        null_rate=float(nulls / (present + nulls)),
        not_finite_rate=scan.counts[path, "not_finite"] / rows,
        clipped_rate=scan.counts[path, "clipped"] / rows,
        mean=mean,
        std=(squares / rows) ** 0.5,
        least=least,
        greatest=greatest,
    )


def _spread(number: int, taken: int) -> list[int]:
    """So many of 0 .. number - 1 as evenly as can be; all if there are no more."""
    taken = min(number, taken)
    return [(2 * place + 1) * number // (2 * taken) for place in range(taken)]


def _present(values: NDArray[np.float32], column: pa.ChunkedArray) -> NDArray[np.float32]:
    """Values of the rows where a column is not null."""
    return values[pc.is_valid(column).to_numpy()] if column.null_count else values


def _merged(one: tuple[int, float, float], other: tuple[int, float, float]) -> tuple[int, float, float]:
    """Number, mean and squared deviations of two parts together (Chan, Golub and LeVeque, 1979)."""
    number, apart = one[0] + other[0], other[1] - one[1]
    share = other[0] / number
    return number, one[1] + apart * share, one[2] + other[2] + apart * apart * one[0] * share


_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio


def _mixed(hashes: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hashes of what they were of and then the values: no cryptography, only spread."""
    mixed = (hashes ^ values) * _ODD
    mixed ^= mixed >> np.uint64(32)
    return mixed


def _bits(rows: Rows) -> NDArray[np.uint64]:
    """A number for the one thing that rows of a part have, the same only where that is (nearly) the same."""
    for values in (rows.labels, rows.reference, rows.domain, rows.weight, *rows.dense, *rows.single):
        if len(values):
            bits: NDArray[np.uint64] = values.view(f"u{values.itemsize}").astype(np.uint64)
            return bits
    (jagged,) = rows.lists
    lengths = jagged.lengths()
    places = (np.arange(len(jagged.values)) - np.repeat(jagged.offsets[:-1], lengths)).view(np.uint64)
    of_values = _mixed((places + np.uint64(1)) * _ODD, jagged.values.astype(np.uint64))
    if jagged.weights is not None:
        of_values = _mixed(of_values, jagged.weights.view(np.uint32).astype(np.uint64))
    sums = np.zeros(len(of_values) + 1, np.uint64)
    np.cumsum(of_values, out=sums[1:])
    of_lists: NDArray[np.uint64] = sums[jagged.offsets[1:]] - sums[jagged.offsets[:-1]]
    return of_lists
