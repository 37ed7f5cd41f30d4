"""Footers of Parquet files, whole or a row group at a time.

Parsed, a footer takes some ten times its bytes in the file. Those that there is no room for are left in the file: what
stays in memory is where each row group begins in them, so that reading a row group parses its own part alone.
"""

from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

_MAGIC = b"PAR1"
_END_BYTES = 1 << 16  # asked for at once, as most footers are no longer

# Types of the compact protocol of Thrift, by which footers are written.
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_ROW_GROUPS = 4  # the field of a footer that is a list of them


class RawFooter(NamedTuple):
    """A footer as its file has it.

    Attributes:
        content: its bytes.
        start: where they begin in the file.
    """

    content: bytes
    start: int

    def parsed(self) -> pq.FileMetaData:
        """What it says."""
        return _parsed(self.content)


class SplitFooter(NamedTuple):
    """Where in a file the row groups of its footer are.

    Attributes:
        head: of the footer, before the first.
        tail: after the last.
        bounds: (G + 1,) places in the file.
    """

    head: bytes
    tail: bytes
    bounds: NDArray[np.int64]

    def read(self, file: pa.NativeFile, group: int) -> pq.FileMetaData:
        """A footer of one row group alone, which is 0 in it."""
        start, stop = int(self.bounds[group]), int(self.bounds[group + 1])
        return _parsed(self.head + bytes([1 << 4 | _STRUCT]) + file.read_at(stop - start, start) + self.tail)


class FileEnd(NamedTuple):
    """The end of a file, in which most footers are whole.

    Attributes:
        content: the last bytes.
        size: of the file.
    """

    content: bytes
    size: int

    @classmethod
    def read(cls, file: pa.NativeFile) -> Self:
        """Read it, with one request."""
        size = file.size()
        return cls(file.read_at(min(size, _END_BYTES), max(0, size - _END_BYTES)), size)

    @property
    def footer_bytes(self) -> int:
        """How long the footer is; 0 if there is none as it should be."""
        length = int.from_bytes(self.content[-8:-4], "little")
        return length if self.content[-4:] == _MAGIC and length <= self.size - 12 else 0

    def footer(self, file: pa.NativeFile) -> RawFooter:
        """The footer, which must be there."""
        length = self.footer_bytes
        start = self.size - 8 - length
        is_whole = length + 8 <= len(self.content)
        return RawFooter(self.content[-8 - length : -8] if is_whole else file.read_at(length, start), start)


def split_footer(raw: RawFooter, parsed: pq.FileMetaData) -> SplitFooter | None:
    """Find the row groups in a footer; None if they are written in some other way than all known programs write them.

    Walking through millions of fields in Python would take long. What ends a row group, its numbers of bytes and rows,
    is known from the parsed footer, and is looked for instead.
    """
    content = raw.content
    with suppress(IndexError, ValueError):
        head = _row_groups_of(content)
        count, begin = _list_size(content, head)
        if count != parsed.num_row_groups:
            return None
        bounds = np.empty(count + 1, np.int64)
        place = begin
        for group in range(count):
            bounds[group] = place
            found = parsed.row_group(group)
            end = bytes([1 << 4 | _I64])  # of the field after the one before
            end = end + _zigzag(found.total_byte_size) + end + _zigzag(found.num_rows)
            place = next(_ends(content, place, end, last=group == count - 1))
        bounds[count] = place
        return SplitFooter(content[:head], content[place:], bounds + raw.start)
    return None


def _ends(content: bytes, place: int, end: bytes, *, last: bool) -> Iterator[int]:
    """Where a row group may end that has such numbers near its end."""
    while True:
        place = content.index(end, place) + len(end)
        stop = _skip_fields(content, place)
        # The next begins with its columns, a list.
        if last or content[stop] == 1 << 4 | _LIST:
            yield stop


def _parsed(content: bytes) -> pq.FileMetaData:
    whole = b"".join((_MAGIC, content, len(content).to_bytes(4, "little"), _MAGIC))
    return pq.read_metadata(pa.BufferReader(whole))


def _row_groups_of(content: bytes) -> int:
    """Where the list of row groups is."""
    place = field = 0
    while content[place]:
        kind, delta = content[place] & 15, content[place] >> 4
        place += 1
        if delta:
            field += delta
        else:
            number, place = _varint(content, place)
            field = number >> 1
        if field == _ROW_GROUPS and kind == _LIST:
            return place
        place = _skip(content, place, kind)
    raise ValueError("there are no row groups")


def _list_size(content: bytes, place: int) -> tuple[int, int]:
    """How many items a list has, and where the first is."""
    size = content[place] >> 4
    return (size, place + 1) if size < 15 else _varint(content, place + 1)


def _skip_fields(content: bytes, place: int) -> int:
    """Where a struct ends."""
    while kind := content[place]:
        place += 1
        if not kind >> 4:
            _, place = _varint(content, place)
        place = _skip(content, place, kind & 15)
    return place + 1


def _skip(content: bytes, place: int, kind: int, *, in_list: bool = False) -> int:
    """Where a value ends."""
    if kind in (_TRUE, _FALSE):  # which a field has in its type
        return place + in_list
    if kind == _BYTE:
        return place + 1
    if kind in (_I16, _I32, _I64):
        return _varint(content, place)[1]
    if kind == _DOUBLE:
        return place + 8
    if kind == _BINARY:
        length, place = _varint(content, place)
        return place + length
    if kind in (_LIST, _SET):
        of, (size, place) = content[place] & 15, _list_size(content, place)
        for _ in range(size):
            place = _skip(content, place, of, in_list=True)
        return place
    if kind == _STRUCT:
        return _skip_fields(content, place)
    raise ValueError(f"type {kind} is in no footer")


def _varint(content: bytes, place: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = content[place]
        place += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, place
        shift += 7


def _zigzag(number: int) -> bytes:
    number, found = (number << 1) ^ (number >> 63), bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
