"""Vocabularies: which values a table knows, counted in the train split, each with a row of its own.

A vocabulary is a Parquet file of two columns, `value` (strings or integers) and `count`, the most frequent first. The
value in place n has row n + 1 of the table; row 0 is for all that the vocabulary does not hold.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys.config import Config, VocabularyIdsConfig, shortened
from recsys.data.arrow import is_integer, is_string
from recsys.data.hashing import hash_values, map_values
from recsys.data.storage import DataError
from recsys.files import FileError, open_regular, read_json

_DIGESTS = "digests.json"
_MAX_BYTES = 16 << 20
_REMEDY = "build it with python -m recsys.prepare vocabulary, or convert anew what a converter wrote"


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Values in the order of their rows.

    Attributes:
        values: (V,) large strings or int64, distinct, without nulls.
        counts: (V,) int64, how often each was found.
        source: where it was read from, for messages.
    """

    values: pa.Array
    counts: pa.Array
    source: str

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a vocabulary.

        Raises:
            DataError: there is none, or it is not one.
        """
        try:
            if not stat.S_ISREG(mode := file.stat().st_mode) and not stat.S_ISDIR(mode):
                raise OSError("it is no regular file")  # reading a pipe or a device need not end
            table = pq.read_table(file)
            names = table.schema.names  # which need not be text
            for column in table.columns:
                column.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: of a path with a NUL
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"vocabulary {file} cannot be read: {reason}; {_REMEDY}") from None
        if names != ["value", "count"] or not is_value(table.schema.field("value").type):
            raise DataError(f"{file} is no vocabulary: it has columns {table.schema.to_string()!r}; {_REMEDY}")
        values = canonical(table["value"].combine_chunks())
        if values.null_count or pc.count_distinct(values).as_py() != len(values):
            raise DataError(f"vocabulary {file} holds a null, or a value twice; {_REMEDY}")
        kind = table.schema.field("count").type
        try:
            if not (is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
                raise pa.ArrowInvalid(f"they are {kind}")
            counts = table["count"].combine_chunks().cast(pa.int64())
        except pa.ArrowException as error:
            reason = shortened(str(error).splitlines()[0], 200)
            raise DataError(
                f"vocabulary {file}: its counts are no whole numbers of 64 bits: {reason}; {_REMEDY}"
            ) from None
        vocabulary = cls(values, counts, str(file))
        _ = vocabulary._sorted  # now, and not by each of the threads that look values up
        return vocabulary

    def write(self, file: Path) -> None:
        """Write a file that `read` reads back; it appears whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
        try:
            pq.write_table(pa.table({"value": self.values, "count": self.counts}), partial, compression="zstd")
            partial.rename(file)
        finally:
            partial.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of which value has which row, however the file stores it."""
        found = hashlib.sha256(str(self.values.type).encode())
        if is_string(self.values.type):
            found.update(pc.binary_length(self.values).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes())
            for value in self.values.cast(pa.large_binary()).to_numpy(zero_copy_only=False):
                found.update(value)
        else:
            found.update(self.values.to_numpy().tobytes())
        return found.hexdigest()

    def lookup(self, values: pa.Array) -> NDArray[np.int64]:
        """The row of each of (N,) values, or of a dictionary of them: 0 for one it does not hold, -1 for nulls."""
        return map_values(values, self._find)

    def _find(self, values: pa.Array) -> NDArray[np.int64]:
        keys, places = self._sorted
        if not len(keys):
            return np.zeros(len(values), np.int64)
        values = canonical(values)
        wanted = _keys(values)
        near = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        found, place = keys[near] == wanted, places[near]
        if is_string(values.type):  # hashes that are equal need not be of equal strings
            found &= pc.equal(self.values.take(pa.array(place)), values).to_numpy(zero_copy_only=False)
        return np.where(found, place + 1, 0)

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.int64 | np.uint64], NDArray[np.int64]]:
        """Keys in rising order, and the place of each: 16 bytes a value, where a dict takes over 100."""
        keys = _keys(self.values)
        places = np.argsort(keys)
        keys = keys[places]
        if (same := np.flatnonzero(keys[1:] == keys[:-1])).size:
            one, other = self.values[int(places[same[0]])], self.values[int(places[same[0] + 1])]
            raise DataError(f"vocabulary {self.source}: {one} and {other} have one hash; leave one of them out")
        return keys, places


def load_vocabularies(config: Config, saved: Path | None = None) -> dict[str, Vocabulary]:
    """The vocabulary of each sparse feature that has one.

    Args:
        config: names their files.
        saved: a folder that `save_vocabularies` wrote, which is read instead; None reads the files.

    Raises:
        DataError: one cannot be read, or is not the one that was saved.
    """
    files = {
        name: Path(feature.ids.file)
        for name, feature in config.features.sparse.items()
        if isinstance(feature.ids, VocabularyIdsConfig)
    }
    if saved is None:
        read = {file: Vocabulary.read(file) for file in set(files.values())}
        return {name: read[file] for name, file in files.items()}
    digests = _read_digests(saved / _DIGESTS) if files else {}
    vocabularies = {
        name: _read_saved(saved / f"{name}.parquet", config.tables[config.features.sparse[name].table].num_embeddings)
        for name in files
    }
    for name, vocabulary in vocabularies.items():
        if vocabulary.digest != digests.get(name):
            raise DataError(f"{vocabulary.source} is not the vocabulary that was saved: its digest differs; restore it")
    return vocabularies


def save_vocabularies(vocabularies: Mapping[str, Vocabulary], directory: Path) -> None:
    """Write the vocabulary of each feature, and the digests of all, where there is any."""
    for name, vocabulary in vocabularies.items():
        vocabulary.write(directory / f"{name}.parquet")
    if vocabularies:
        digests = {name: vocabulary.digest for name, vocabulary in vocabularies.items()}
        (directory / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")


def _read_saved(file: Path, num_embeddings: int) -> Vocabulary:
    """A vocabulary of a checkpoint, which anyone may have written: a file of its own, of no more values than rows."""
    try:
        open_regular(file).close()
        found = pq.read_metadata(file).num_rows
    except FileError as error:
        raise DataError(f"vocabulary {file} cannot be read: {error.reason}; restore it") from None
    except (pa.ArrowException, OSError, ValueError):
        found = 0  # reading it tells what is wrong
    if found > num_embeddings:
        raise DataError(f"vocabulary {file} has {found:,} values for a table of {num_embeddings:,} rows; restore it")
    return Vocabulary.read(file)


def _read_digests(file: Path) -> dict[str, str]:
    try:
        digests = read_json(file, _MAX_BYTES)
    except FileError as error:
        raise DataError(f"{file} cannot be read: {error.reason}; restore it") from None
    return digests if isinstance(digests, dict) else {}


def is_value(kind: pa.DataType) -> bool:
    """Whether a vocabulary can hold values of this type: strings or integers."""
    return is_string(kind) or is_integer(kind)


def canonical(values: pa.Array) -> pa.Array:
    """Values as a vocabulary holds them: large strings or int64."""
    return values.cast(pa.large_string()) if is_string(values.type) else values.cast(pa.int64(), safe=False)


def _keys(values: pa.Array) -> NDArray[np.int64 | np.uint64]:
    return hash_values(values) if is_string(values.type) else values.to_numpy()
