"""What sparse features hold, the same in all files of all splits, in training as in whatever comes after it.

A value finds its row by what it is: the text "7" and the number 7 are hashed to different rows. So a column that is
text here and a number there would train rows that are never asked for.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from recsys.data.applied import kind_before
from recsys.data.arrow import KINDS_OF_VALUES, is_list, is_string, kind_of_values
from recsys.data.features import Columns, SparseColumn
from recsys.data.rows import SparseLayout
from recsys.data.storage import DataError
from recsys.files import FileError, read_json

KINDS = "kinds.json"
"""File of a checkpoint, beside its config."""
_MAX_BYTES = 16 << 20


class Kinds:
    """What each sparse feature holds, as the first file says, or whoever knew before.

    Args:
        known: by feature, `numbers`, `strings`, `dates` or `others`.
        source: who knew, for messages.
    """

    def __init__(self, known: Mapping[str, str] | None = None, source: str = "") -> None:
        self._known = {name: (kind, source) for name, kind in (known or {}).items()}

    def check(self, columns: Columns, schema: pa.Schema, file: str, *, learn: bool = True) -> None:
        """Refuse a file in which a feature holds something else than in those before.

        Args:
            columns: what is read of the file.
            schema: of the file.
            file: for messages.
            learn: whether those after it are held against it, as one file of a data set is against another; what is
                asked of a model says nothing of what is asked next.

        Raises:
            DataError: it does.
        """
        for name, sparse in columns.sparse.items():
            column = sparse.settings.column or name
            kind = _kind_of(sparse, schema.field(column))
            if kind is None:
                continue
            told = (kind, file)
            known, where = self._known.setdefault(name, told) if learn else self._known.get(name, told)
            if kind != known:
                raise DataError(
                    f"{file}: column {column!r} (sparse feature {name}) holds {kind}, but {known} in {where}, so that "
                    "one value would have two rows; write the column alike in all files of all splits"
                )

    def check_raw(self, columns: Columns, schema: pa.Schema, where: str) -> SparseLayout:
        """Refuse a table of rows to score whose features a model cannot read, and tell which have lists.

        Args:
            columns: what the model reads.
            schema: of the table.
            where: what the table is, for messages.

        Raises:
            DataError: a column is missing, twice there, or of another type than in training.
        """
        lists = columns.check_features(schema, where)
        self.check(columns, schema, where, learn=False)
        return columns.layout(lists)

    def as_dict(self) -> dict[str, str]:
        """By feature, of those that were seen."""
        return {name: kind for name, (kind, _) in self._known.items()}

    def of_columns(self, columns: Columns) -> dict[str, str]:
        """What columns hold, as far as features say it, which read them as they stand."""
        known = {}
        for name, sparse in columns.sparse.items():
            if name in self._known and sparse.settings.list_text is None and sparse.applied is None:
                known[sparse.settings.column or name] = self._known[name][0]
        return known


def write_kinds(kinds: Mapping[str, str], directory: Path) -> None:
    """Leave in a checkpoint what its features hold."""
    (directory / KINDS).write_text(json.dumps(dict(kinds), indent=2) + "\n", encoding="utf-8")


def read_kinds(directory: Path) -> Kinds:
    """What the features of a checkpoint hold; nothing is known of one that was written before this was kept.

    Raises:
        DataError: the file cannot be read.
    """
    file = directory / KINDS
    if not os.path.lexists(file):
        return Kinds()
    try:
        known = read_json(file, _MAX_BYTES)
    except FileError as error:
        raise DataError(f"{file} cannot be read: {error.reason}; restore it") from None
    if not (
        isinstance(known, dict) and all(isinstance(kind, str) and kind in KINDS_OF_VALUES for kind in known.values())
    ):
        raise DataError(f"{file} does not say what features hold; restore it")
    return Kinds(known, f"the rows that {directory} was trained on")


def _kind_of(sparse: SparseColumn, field: pa.Field) -> str | None:
    """What a feature holds; None if that is nothing but nulls, or rows of a table that do not say what they were."""
    if sparse.applied is not None:
        return kind_before(field)
    text = sparse.settings.list_text
    if text is not None and is_string(_plain(field.type)) and not is_list(field.type):
        return "strings" if text.items == "strings" else "numbers"
    return kind_of_values(field.type)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind
