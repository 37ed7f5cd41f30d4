"""Any CSV, JSON Lines or Parquet to a data set: a schema says what the columns are, and files are read in blocks.

The files, of any size, are read up to four times: for the last rows of keys, for the borders of the splits, for the
vocabularies, and to write.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, model_validator

from recsys.config import (
    MAX_NUM_EMBEDDINGS,
    Count,
    DenseFeatureConfig,
    DomainConfig,
    HashIdsConfig,
    ListTextConfig,
    Name,
    Salt,
    SparseFeatureConfig,
    Text,
    VocabularyIdsConfig,
    read_yaml,
    validate,
)
from recsys.data.applied import AppliedIds, marked
from recsys.data.arrow import is_list, raised, split_texts, whole
from recsys.data.ids import IdMapping, PlainIds, VocabularyIds, build_ids
from recsys.data.labels import Expression, parse_expression
from recsys.data.vocabulary import Vocabulary
from recsys.prepare import writing
from recsys.prepare.blocks import Files, Malformed, Progress, quietly
from recsys.prepare.mapping import ANY_ROW, mapped, vocabulary_file
from recsys.prepare.parquet import ParquetFiles
from recsys.prepare.selecting import Selection, no_rows
from recsys.prepare.sources import check_free, new_data_set
from recsys.prepare.splitting import SPLITS, Assign, ChoiceSection, SplitSchema, all_of, split_rule
from recsys.prepare.text import BLOCK_BYTES, TextFiles, TextFormat
from recsys.prepare.vocabularies import ValueCounts

MAX_VALUES = 50_000_000
"""Different values that are counted for all vocabularies together, unless the caller says otherwise."""

_ROW_GROUP_ROWS = 16_384

_TYPES = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "timestamp": pa.timestamp("us"),
}


class TableSchema(ChoiceSection):
    """How values become rows of one embedding table.

    `ids`: `keep` (whole numbers from 0), `vocabulary` (from 1 by descending count in the train split, ties by value, of
    the values that occur `min_count` times; all others are row 0) or `hash` (XXH3-64 seeded with `salt`, modulo
    `buckets`). The last two are those of a config's `ids`: strings and integers are mapped as what they are.
    """

    ids: Literal["keep", "vocabulary", "hash"]
    min_count: Count = 1
    buckets: Annotated[int, Field(gt=0, le=MAX_NUM_EMBEDDINGS)] | None = None
    salt: Salt = 0

    @model_validator(mode="before")
    @classmethod
    def _seed_was_the_name_of_salt(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "seed" not in raw:
            return raw
        if "salt" in raw:
            raise ValueError("seed is the former name of salt; remove it")
        return {"salt" if key == "seed" else key: value for key, value in raw.items()}

    @model_validator(mode="after")
    def _settings_matter(self) -> Self:
        if (self.ids == "hash") != (self.buckets is not None):
            raise ValueError("ids hash needs buckets, and nothing else takes them")
        self.refuse_idle("ids", {"vocabulary": {"min_count"}, "hash": {"buckets", "salt"}}.get(self.ids, set()))
        return self

    def ids_of(self, name: str) -> HashIdsConfig | VocabularyIdsConfig | None:
        """The mapping as a config has it, applied to the shards; `name` is the table's."""
        if self.ids == "hash":
            return HashIdsConfig(type="hash", salt=self.salt, buckets=self.buckets, applied=True)
        if self.ids == "vocabulary":
            return VocabularyIdsConfig(type="vocabulary", file=f"${{here}}/{vocabulary_file(name)}", applied=True)
        return None


class ColumnSchema(ChoiceSection):
    """One column.

    `type`: `ints` and `strings` are lists, in CSV as a text with `separator` between the items, in JSON Lines an array,
    in Parquet a list. `source` is the name in the files, by default its own. A column with a `table` becomes ids and a
    sparse feature, one with `dense` a dense feature of these settings; one with neither is only carried along. Values
    below `minimum` are raised to it.
    """

    type: Literal["bool", "int", "float", "string", "timestamp", "ints", "strings"]
    source: Text | None = None
    separator: Annotated[str, Field(min_length=1)] = "|"
    table: Name | None = None
    dense: DenseFeatureConfig | None = None
    minimum: float | None = None

    @property
    def least_id(self) -> int | None:
        """The minimum of what a sparse feature reads."""
        return None if self.minimum is None else int(self.minimum)

    @property
    def items(self) -> Literal["strings", "ints"]:
        """What a column with a table has in each row, one or any number of."""
        return "ints" if self.type in ("int", "ints") else "strings"

    @property
    def is_list(self) -> bool:
        """Whether a row has any number of values."""
        return self.type in ("ints", "strings")

    @model_validator(mode="after")
    def _role_fits_type(self) -> Self:
        if self.table is not None and (self.dense is not None or self.type not in ("int", "string", "ints", "strings")):
            raise ValueError(f"a column of type {self.type}{' with dense' if self.dense else ''} cannot have a table")
        if self.is_list and self.table is None:
            raise ValueError("a list needs a table; only ids are lists")
        if self.dense is not None and (self.type not in ("bool", "int", "float") or self.dense.column is not None):
            raise ValueError("dense is for bool, int and float, and takes no column of its own; use source")
        if self.minimum is not None and self.type not in ("int", "float"):
            raise ValueError(f"minimum is for int and float, not for {self.type}")
        if self.type == "int" and self.minimum is not None:
            if not self.minimum.is_integer():
                raise ValueError(f"minimum of an int must be whole, not {self.minimum}")
            if not -(2.0**63) <= self.minimum < 2.0**63:
                raise ValueError(f"minimum of an int must fit 64 bits, unlike {self.minimum}")
        return self


class Schema(ChoiceSection):
    """What is in the files, and what becomes of it.

    `columns` are by the names they get. Without a `header` they stand in the files' order and `null` passes one over;
    with one, in JSON Lines and in Parquet, columns that are not named are passed over. `label` is a column, or an
    expression over columns (`recsys.data.labels`), which makes a column `label`. Rows are left out for which the
    expression `where` is false or unknown; then, of rows with equal values in the columns `keep_last_of`, all but the
    last in the order of the files.
    """

    name: Text
    format: Literal["csv", "jsonl", "parquet"] = "csv"
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    quote: Annotated[str, Field(min_length=1, max_length=1)] | None = '"'
    header: bool = True
    nulls: tuple[str, ...] = ("",)
    timestamp_format: str | None = None
    label: Text
    where: Text | None = None
    keep_last_of: tuple[Name, ...] = ()
    domain: DomainConfig | None = None
    tables: dict[Name, TableSchema] = Field(default_factory=dict)
    columns: Annotated[dict[Name, ColumnSchema | None], Field(min_length=1)]
    split: SplitSchema = SplitSchema()
    embedding_dim: Annotated[int, Field(gt=0, le=2**16, multiple_of=4)] = writing.EMBEDDING_DIM

    @property
    def read(self) -> dict[str, ColumnSchema]:
        """The columns that are not passed over."""
        return {name: column for name, column in self.columns.items() if column is not None}

    @property
    def label_column(self) -> str:
        """The column of the shards that has the label."""
        return self.label if self.label_expression.tree is None else "label"

    @property
    def label_expression(self) -> Expression:
        """The label as it is made of raw values.

        Raises:
            ConfigError: it is neither a name nor an expression.
        """
        return parse_expression(self.label, source="label")

    @property
    def condition(self) -> Expression | None:
        """What rows that are kept fulfil, if not all are.

        Raises:
            ConfigError: it is neither a name nor an expression.
        """
        return None if self.where is None else parse_expression(self.where, source="where")

    @property
    def sources(self) -> dict[str, pa.DataType]:
        """What each column that is read is parsed as, by its name in the files.

        Raises:
            ValueError: columns of one source have different types.
        """
        types: dict[str, pa.DataType] = {}
        for name, column in self.read.items():
            kind = _TYPES.get(column.type, pa.string())  # a list in CSV is a text until it is split
            if self.format != "csv" and column.is_list:
                kind = pa.list_(_TYPES[column.type.removesuffix("s")])
            if types.setdefault(column.source or name, kind) != kind:
                raise ValueError(f"columns.{name}: another column of the same source has another type")
        return types

    @property
    def sparse(self) -> dict[str, str]:
        """The table of each column of ids."""
        return {name: column.table for name, column in self.read.items() if column.table is not None}

    @property
    def sparse_features(self) -> dict[str, SparseFeatureConfig]:
        """Each column of ids as a config has it: how its raw values become rows of its table."""
        features = {}
        for name, table in self.sparse.items():
            column, as_text = self.read[name], self.read[name].is_list and self.format == "csv"
            features[name] = SparseFeatureConfig(
                table=table,
                list_text=ListTextConfig(separator=column.separator, items=column.items) if as_text else None,
                minimum=column.least_id,
                ids=self.tables[table].ids_of(table),
            )
        return features

    @property
    def dense_features(self) -> dict[str, DenseFeatureConfig]:
        """Each column of numbers as a config has it."""
        features = {}
        for name, column in self.read.items():
            if (dense := column.dense) is not None:
                bounds = [bound for bound in (column.minimum, dense.minimum) if bound is not None]
                features[name] = dense.model_copy(update={"minimum": max(bounds)}) if bounds else dense
        return features

    @property
    def boundaries(self) -> tuple[int, int] | None:
        """The first time of valid and that of test as numbers in the unit of their column.

        Raises:
            ValueError: one is not of the column's type.
        """
        if self.split.boundaries is None or self.split.column is None:
            return None
        kind = _TYPES[self.read[self.split.column].type]
        times = []
        for boundary in self.split.boundaries:
            if isinstance(boundary, int) != pa.types.is_integer(kind):
                raise ValueError(f"split.boundaries: {boundary!r} is not of the type of {self.split.column!r}")
            times.append(pa.scalar(boundary).cast(kind).cast(pa.int64()).as_py())
        return times[0], times[1]

    @model_validator(mode="after")
    def _text_can_be_parsed(self) -> Self:
        for path, character in (("delimiter", self.delimiter), ("quote", self.quote)):
            if character is not None and (not character.isascii() or character in "\r\n\0"):
                raise ValueError(f"{path}: must be one ASCII character and no line break, not {character!r}")
        if self.delimiter == self.quote:
            raise ValueError(f"quote: {self.quote!r} is the delimiter; quote: null if nothing encloses fields")
        return self

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        kinds = {name: column.type for name, column in self.read.items()}
        label = None if self.label_expression.tree is not None else self.label
        by_value = ("int", "string") if self.split.by == "column" else ("int", "timestamp")
        of_domain: tuple[str, ...] = ("int",)
        if self.domain is not None and not self.domain.is_of_integers:
            of_domain = ("int", "string") if self.domain.hashed else ("string",)
        for path, name, allowed in (
            ("label", label, ("bool", "int")),
            ("split.column", self.split.column, by_value),
            ("domain.column", self.domain.column if self.domain else None, of_domain),
        ):
            ids = self.tables.get(self.sparse.get(name or "", ""))
            if name is not None and (kinds.get(name) not in allowed or (ids is not None and ids.ids != "keep")):
                raise ValueError(f"{path}: {name!r} is no column of type {' or '.join(allowed)}, or its values change")
        if self.boundaries and self.boundaries[0] > self.boundaries[1]:
            raise ValueError("split.boundaries: test begins before valid")
        if self.split.by == "column" and not all_of(tuple(self.split.split_of), kinds[self.split.column or ""]):
            raise ValueError(f"split.values: they are not of the type of {self.split.column!r}")
        for name in self.keep_last_of:
            if kinds.get(name) not in ("bool", "int", "string", "timestamp"):
                raise ValueError(f"keep_last_of: {name!r} is no column of type bool, int, string or timestamp")
        if not self.sparse:
            raise ValueError("columns: none has a table, and a model needs one")
        kinds_of: dict[str, tuple[str, str]] = {}
        for name, table in self.sparse.items():
            if table not in self.tables:
                raise ValueError(f"columns.{name}.table: no table {table!r}; tables has {', '.join(self.tables)}")
            first, items = kinds_of.setdefault(table, (name, self.read[name].items))
            if self.tables[table].ids == "vocabulary" and items != self.read[name].items:
                raise ValueError(
                    f"columns.{name}: one vocabulary cannot hold {self.read[name].items} and the {items} of "
                    f"{first!r}; give it a table of its own, or read both as strings"
                )
            if self.tables[table].ids == "keep" and not kinds[name].startswith("int"):
                raise ValueError(f"columns.{name}: ids of {kinds[name]} cannot be kept; hash them or use a vocabulary")
        if unused := set(self.tables) - set(self.sparse.values()):
            raise ValueError(f"tables.{min(unused)}: no column uses this table; remove it")
        if self.format != "csv" and (
            idle := {"delimiter", "quote", "header", "nulls", "timestamp_format"} & (self.model_fields_set)
        ):
            have = {"jsonl": "JSON Lines have", "parquet": "Parquet has"}[self.format]
            raise ValueError(f"{min(idle)}: {have} none; remove it")
        if not self.header and any(column.source for column in self.read.values()):
            raise ValueError("columns: without a header, columns have no source; their order is that of the files")
        _ = self.sources
        return self

    @model_validator(mode="after")
    def _expressions_can_be_evaluated(self) -> Self:
        if self.label_expression.tree is not None and "label" in self.read:
            raise ValueError("label: the expression makes a column of this name; give columns.label another")
        for path, expression in (("label", self.label_expression), ("where", self.condition)):
            for name in expression.columns if expression else ():
                if name not in self.read or self.read[name].is_list:
                    raise ValueError(f"{path}: {name!r} is no column, or one of lists")
            if expression is None or (path == "label" and expression.tree is None):
                continue
            empty = {name: pa.array([], _TYPES[self.read[name].type]) for name in expression.columns}
            try:
                kind = expression.evaluate(empty).type
            except pa.ArrowException as error:
                raise ValueError(f"{path}: {error}") from None
            if not pa.types.is_boolean(kind):
                raise ValueError(f"{path}: {expression.text!r} has type {kind}, which is no truth value; compare it")
        return self


def load_schema(path: Path) -> Schema:
    """Read a schema from YAML; `name` defaults to the file's stem.

    Raises:
        ConfigError: the file cannot be read, or says something that is not allowed; every fault is listed.
    """
    raw = read_yaml(path, "schema", remedy="give one with --schema")
    return validate(Schema, {"name": path.stem, **raw}, source=str(path))


def convert_text(
    sources: Sequence[Path],
    output: Path,
    schema: Schema,
    *,
    skip_malformed: bool = False,
    overwrite: bool = False,
    max_values: int = MAX_VALUES,
    progress: Progress = quietly,
    block_bytes: int = BLOCK_BYTES,
) -> None:
    """Convert files to Parquet shards, in memory that does not grow with the rows.

    It grows with the vocabularies, and with the keys of `keep_last_of`, which `max_values` bounds each; beside these,
    such keys and a split by permutation take a byte of each row, and 8 more while rows are permuted.

    Args:
        sources: the files, in the order that a split by order goes by; text in `.gz`, `.bz2` and `.zst` is unpacked.
        output: becomes the data set. Each vocabulary is in `vocabularies/<table>.parquet`, from id 1.
        schema: what is in the files.
        skip_malformed: leave out rows that are wrong and count them in `dataset.json`, instead of refusing them.
        overwrite: replace the data set that is at `output`.
        max_values: different values to count for all vocabularies together, and different keys of `keep_last_of`.
        progress: told after each block.
        block_bytes: text that is parsed at once.

    Raises:
        FileNotFoundError: a file is missing.
        FileExistsError: `output` is not empty, and `overwrite` is not set or it holds no data set.
        DataError: a file, line or column does not say what it should, or there are more values than `max_values`.
    """
    check_free(output, overwrite)
    files = _files(sources, schema, skip_malformed=skip_malformed, block_bytes=block_bytes, progress=progress)
    selection = Selection(files, schema.label_column if schema.where else None, schema.keep_last_of, max_values)
    start = split_rule(schema.split, schema.boundaries, selection)
    vocabularies = _count(selection, schema, start, max_values)
    features = schema.sparse_features
    mappings = {name: build_ids(it, ANY_ROW, vocabularies.get(it.table)) for name, it in features.items()}
    with new_data_set(output, overwrite=overwrite) as stage:
        for name, vocabulary in vocabularies.items():
            vocabulary.write(stage / vocabulary_file(name))
        written = _write(selection, schema, mappings, start(), stage)
        if not written.splits["train"]["rows"]:
            raise no_rows(selection, sum(split["rows"] for split in written.splits.values()))
        summary = {
            "name": schema.name,
            "columns": _meanings(pq.read_schema(writing.part_path(stage, "train", 0)), schema, written),
            "vocabularies": {name: vocabulary_file(name) for name in vocabularies},
            "splits": written.splits,
            "left_out": {by: count for by, count in selection.left_out.items() if count},
            "skipped": {str(path): count for path, count in zip(sources, files.skipped, strict=True) if count},
            "empty": [
                str(path)
                for path, rows, skipped in zip(sources, files.rows, files.skipped, strict=True)
                if not rows and not skipped
            ],
        }
        writing.write_summary(stage, summary)
        writing.write_config(
            stage,
            summary,
            sparse=features,
            dense=schema.dense_features,
            data={
                "label": schema.label_column,
                **({"domain": schema.domain.model_dump(mode="json", exclude_none=True)} if schema.domain else {}),
            },
            embedding_dim=schema.embedding_dim,
        )


def _files(
    paths: Sequence[Path], schema: Schema, *, skip_malformed: bool, block_bytes: int, progress: Progress
) -> Files:
    def convert(table: pa.Table) -> pa.Table:
        return _typed(table, schema)

    if schema.format == "parquet":
        return ParquetFiles(paths, schema.sources, convert=convert, skip_malformed=skip_malformed, progress=progress)
    return TextFiles(
        paths,
        TextFormat(
            schema.sources,
            names=None if schema.header else list(schema.columns),
            json=schema.format == "jsonl",
            delimiter=schema.delimiter,
            quote=schema.quote,
            nulls=schema.nulls,
            timestamp_format=schema.timestamp_format,
        ),
        convert=convert,
        skip_malformed=skip_malformed,
        block_bytes=block_bytes,
        progress=progress,
    )


def _count(selection: Selection, schema: Schema, start: Callable[[], Assign], limit: int) -> dict[str, Vocabulary]:
    """The vocabulary of each table that has one, counted in the train split."""
    tables = {name: table for name, table in schema.tables.items() if table.ids == "vocabulary"}
    if not tables:
        return {}
    assign, counts = start(), ValueCounts(tables, limit)
    for block in selection.blocks("counting values"):
        train = _rows(block.table, assign(block) == 0)
        for name, table in schema.sparse.items():
            if table in tables:
                counts.add(table, whole(train, name), f"column {name!r}")
    return {name: counts.vocabulary(name, table.min_count, vocabulary_file(name)) for name, table in tables.items()}


class _Written(NamedTuple):
    """What became of the rows.

    Attributes:
        splits: what `dataset.json` says of each split.
        sizes: rows that a table needs for the ids of each column.
        unknown: values that are not in the vocabulary, of each column that has one, by split.
    """

    splits: dict[str, Any]
    sizes: dict[str, int]
    unknown: dict[str, dict[str, int]]


def _write(
    selection: Selection, schema: Schema, mappings: Mapping[str, IdMapping], assign: Assign, stage: Path
) -> _Written:
    """Write the shards."""
    kept = [name for name, mapping in mappings.items() if isinstance(mapping, PlainIds)]
    sizes = {name: 1 if name in kept else mapping.num_rows for name, mapping in mappings.items()}
    unknown = {
        name: dict.fromkeys(SPLITS, 0) for name, mapping in mappings.items() if isinstance(mapping, VocabularyIds)
    }
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(writing.SplitWriter(stage, split, schema.label_column)) for split in SPLITS
        }
        for block in selection.blocks("writing shards"):
            table, place = block.table, assign(block)
            for name, mapping in mappings.items():
                values = whole(table, name)
                ids = mapped(values, mapping, f"{selection.files.paths[block.file]}: column {name!r}")
                if name in kept:
                    sizes[name] = max(sizes[name], (pc.max(_items(ids)).as_py() or 0) + 1)
                field = marked(pa.field(name, ids.type), AppliedIds(mapping, schema.read[name].least_id), values.type)
                table = table.set_column(table.schema.get_field_index(name), field, ids)
            for number, split in enumerate(SPLITS):
                part = _rows(table, place == number)
                writers[split].write(part)
                for name, counts in unknown.items():
                    zeros = pc.sum(pc.equal(_items(whole(part, name)), 0)).as_py()
                    counts[split] += zeros or 0
    return _Written({split: writer.told for split, writer in writers.items()}, sizes, unknown)


def _rows(table: pa.Table, chosen: NDArray[np.bool_]) -> pa.Table:
    return table if chosen.all() else table.filter(pa.array(chosen))


def _items(values: pa.Array) -> pa.Array:
    """The values of all rows end to end."""
    return values.flatten() if is_list(values.type) else values


def _meanings(types: pa.Schema, schema: Schema, written: _Written) -> dict[str, dict[str, Any]]:
    """What `dataset.json` says of each column."""
    told: dict[str, dict[str, Any]] = {}
    for name, column in schema.read.items():
        told[name] = {"type": str(types.field(name).type)}
        if column.table is not None:
            table = schema.tables[column.table]
            how = {
                "keep": "as in the files",
                "hash": f"XXH3-64 with salt {table.salt}, modulo {table.buckets}",
                "vocabulary": f"place from 1 in {vocabulary_file(column.table)}; 0: not there",
            }
            told[name] |= {"size": written.sizes[name], "meaning": how[table.ids]}
        if name in written.unknown:
            told[name]["out_of_vocabulary"] = written.unknown[name]
    if schema.label_column not in told:
        told[schema.label_column] = {"type": str(types.field(schema.label_column).type), "meaning": schema.label}
    return told


def _typed(table: pa.Table, schema: Schema) -> pa.Table:
    """The columns of the schema, of its types and under its names; the label is null in rows that `where` leaves out.

    Raises:
        Malformed: a value is not what the schema says.
    """
    columns = {}
    for name, column in schema.read.items():
        values = table[column.source or name].combine_chunks()
        try:
            columns[name] = _checked(values, column, schema)
        except (pa.ArrowInvalid, Malformed) as error:
            raise Malformed(f"column {name!r}: {error}") from None
    expression, condition = schema.label_expression, schema.condition
    chosen = pc.fill_null(_evaluated(condition, columns, schema), False) if condition else pa.scalar(True)
    label = columns[schema.label] if expression.tree is None else _evaluated(expression, columns, schema)
    needed, domain = {schema.label_column: label}, schema.domain
    of_domain = domain.column if domain and domain.unseen == "error" else None
    needed |= {name: columns[name] for name in (schema.split.column, of_domain) if name is not None}
    for name, values in needed.items():
        if pc.any(pc.and_(chosen, values.is_null()), min_count=0).as_py():
            raise Malformed(f"column {name!r}: no value")
    label = pc.if_else(chosen, label, None)
    if not pc.all(pc.is_in(label.drop_null(), pa.array([0, 1]).cast(label.type)), min_count=0).as_py():
        raise Malformed(f"column {schema.label_column!r}: the label is neither 0 nor 1")
    return pa.table({**columns, schema.label_column: label.cast(pa.int8())})


def _evaluated(expression: Expression, columns: Mapping[str, pa.Array], schema: Schema) -> pa.Array:
    """(N,) booleans of an expression over columns, in which booleans are 0 and 1."""
    return expression.evaluate(
        {
            name: columns[name].cast(pa.bool_()) if schema.read[name].type == "bool" else columns[name]
            for name in expression.columns
        }
    )


def _checked(values: pa.Array, column: ColumnSchema, schema: Schema) -> pa.Array:
    """Raw values as their mapping takes them, and others as shards hold them."""
    if column.is_list and not is_list(values.type):
        values = split_texts(values, column.separator)
        if pc.any(pc.is_in(values.flatten(), pa.array(schema.nulls, pa.string()))).as_py():
            raise Malformed("an item of the list has no value")
        if column.type == "ints":
            if pc.any(pc.match_substring_regex(values.flatten(), r"^\s*0[xX]")).as_py():
                raise Malformed("an item of the list is hexadecimal; write decimal digits")
            values = values.cast(pa.list_(pa.int64()))
    if column.is_list and values.flatten().null_count:
        raise Malformed("an item of the list has no value")
    if column.type == "float" and not pc.all(pc.is_finite(values.cast(pa.float32())), min_count=0).as_py():
        raise Malformed("the value is not finite in float32")
    if column.type == "bool":
        values = values.cast(pa.int8())
    if column.minimum is not None:
        values = raised(values, column.minimum)
    if column.table is not None and schema.tables[column.table].ids == "keep":
        least = pc.min(_items(values)).as_py() or 0
        if least < 0:
            raise Malformed(f"the id {least} is negative; ids that are kept count from 0")
        if (greatest := pc.max(_items(values)).as_py() or 0) >= MAX_NUM_EMBEDDINGS:
            raise Malformed(f"the id {greatest} is beyond the rows of any table; set its ids to hash or vocabulary")
    return values
