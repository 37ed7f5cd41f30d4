"""Indexes of checkpoints, whoever wrote them: none runs code, hangs or outgrows its file, and all say the truth."""

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tensors_as_dcp_reads_them
from hostile import run_bounded
from numpy.typing import NDArray
from ranks import run_ranks
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from recsys.checkpoint.dcp import load_tensors
from recsys.checkpoint.index import _NAMES, INDEX, MAX_BYTES, UnreadableError, read_index
from recsys.checkpoint.pickles import Made, Name, read_pickle
from recsys.runtime import Ranks

WEIGHT = "model.dense_arch.tower.linears.0.weight"
TABLE = "model.embedding_bag_collection.embedding_bags.item.weight"


def refusal(checkpoint: Path) -> str:
    with pytest.raises(UnreadableError) as error:
        read_index(checkpoint)
    message = str(error.value)
    assert message and "\n" not in message and len(message) < 1000
    return message


class Trap:
    """Leaves a file behind if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return (Path.touch, (self.path,))


def test_an_index_that_would_run_code_is_refused_without_running_it(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / INDEX).write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    assert "no checkpoint of ours" in refusal(checkpoint)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("torch.distributed.checkpoint.filesystem", "FileSystemWriter"),
        ("torch.distributed.checkpoint.metadata", "os.system"),
        ("torch", "load"),
        ("builtins", "eval"),
    ],
)
def test_an_index_reaches_nothing_through_a_module_it_may_name(
    checkpoint: Path, module: str, name: str, tmp_path: Path
) -> None:
    (checkpoint / INDEX).write_bytes(
        PROTO + text(module) + text(name) + b"\x93" + text(f"touch {tmp_path / 'sprung'}") + b"\x85R."
    )
    assert f"{module}.{name}, which no checkpoint of ours has" in refusal(checkpoint)
    assert not (tmp_path / "sprung").exists()


def test_what_an_index_may_name_is_described_and_not_called(checkpoint: Path, tmp_path: Path) -> None:
    """As the class of an enum and `getattr`, by which Python before 3.11.4 pickles a member."""
    made = read_pickle(
        PROTO + text("builtins") + text("getattr") + b"\x93" + text("__class__") + text("mro") + b"\x86R.", _NAMES
    )
    assert type(made) is Made and made.of == Name("builtins", "getattr") and made.arguments == ("__class__", "mro")


PROTO = b"\x80\x04"


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"\x8c" + bytes([len(encoded)]) + encoded


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def made(name: str) -> bytes:
    return named("torch.distributed.checkpoint.metadata", name) + b")\x81"


# A tuple of itself twice, sixty times over: 2^60 values as whoever hashes, compares or prints it sees it.
BOMB = text("boom") + b"".join(b"q\x07h\x07\x86" for _ in range(60))

HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "damaged at byte"),
    "no end": (PROTO + b"}" * 100, "damaged at byte"),
    "an end alone": (b".", "damaged at byte"),
    "no pickle": (b"PK\x03\x04 is a zip", "instruction 0x50"),
    "a later protocol": (b"\x80\x09N.", "it is of protocol 9"),
    "a tuple that doubles as a key": (PROTO + b"}" + BOMB + b"Ns.", "it has a tuple for a key"),
    "a tuple that doubles as keys": (PROTO + b"}(" + BOMB + b"Nu.", "it has a tuple for a key"),
    "a tuple that doubles as a set": (PROTO + b"\x8f(" + BOMB + b"\x90.", "instruction 0x8f"),
    "a tuple that doubles as a name of a key": (
        PROTO + b"}" + made("MetadataIndex") + b"}(" + text("fqn") + BOMB + text("offset") + b"NubNs.",
        "something else where Metadata should be",
    ),
    "a tuple that doubles as a path": (
        PROTO + named("pathlib", "PosixPath") + BOMB + b"R.",
        "where Metadata should be",
    ),
    "a tuple that doubles as a size": (PROTO + named("torch", "Size") + BOMB + b"\x85R.", "where Metadata should be"),
    "a tuple that doubles as all": (PROTO + BOMB + b".", "where Metadata should be"),
    "a tuple that doubles as an argument": (
        PROTO + named("torch.distributed.checkpoint.metadata", "Metadata") + BOMB + b"\x81.",
        "where Metadata should be",
    ),
    "a list in itself": (PROTO + b"]q\x00h\x00a.", "where Metadata should be"),
    "200,000 tuples deep": (PROTO + b")" + b"\x85" * 200_000 + b".", "where Metadata should be"),
    "100,000 lists deep": (PROTO + b"]q\x00" + b"]q\x01h\x00ah\x01q\x00" * 100_000 + b".", "more than 65,536"),
    "200,000 calls deep": (
        PROTO + named("torch", "Size") + b"q\x00)R" + b"\x85q\x01h\x00h\x01R" * 200_000 + b".",
        "where Metadata should be",
    ),
    "an integer of 2^31 bytes": (
        PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\xff.",
        "instruction 0x8b",
    ),
    "an integer of 255 bytes": (PROTO + b"\x8a\xff" + b"\xff" * 255 + b".", "an integer of 255 bytes"),
    "an integer in decimals": (PROTO + b"I" + b"9" * 100_000 + b"\n.", "instruction 0x49"),
    "a text of 2^62 bytes": (PROTO + b"\x8d" + struct.pack("<Q", 2**62) + b"abc.", "instruction 0x8d"),
    "bytes of 2^62 bytes": (PROTO + b"\x96" + struct.pack("<Q", 2**62) + b"abc.", "instruction 0x96"),
    "a text of 4 GiB": (PROTO + b"X\xff\xff\xff\xffabc.", "a text of 4,294,967,295 bytes"),
    "a text beyond the end": (PROTO + b"X\xff\xff\x00\x00abc.", "damaged at byte"),
    "a text of no UTF-8": (PROTO + b"\x8c\x02\xff\xfe.", "damaged at byte"),
    "half a surrogate pair": (PROTO + b"\x8c\x03\xed\xa0\x80.", "damaged at byte"),
    "a frame of 2^63 bytes": (PROTO + b"\x95" + b"\xff" * 8 + b"N.", "where Metadata should be"),
    "a place of 2^32 in the memo": (PROTO + b"Nr\xff\xff\xff\xff.", "where Metadata should be"),
    "what is not in the memo": (PROTO + b"h\x05.", "damaged at byte"),
    "a mark that is not there": (PROTO + b"t.", "damaged at byte"),
    "a key without a value": (PROTO + b"}(Nu.", "damaged at byte"),
    "items of no dictionary": (PROTO + b"N(" + text("a") + b"Nu.", "it takes a NoneType for a dict"),
    "an item of no list": (PROTO + b")Na.", "it takes a tuple for a list"),
    "state of a dictionary": (PROTO + b"}Nb.", "it takes a dict for a Made"),
    "a call of a text": (PROTO + text("os") + b")R.", "it takes a str for a Name"),
    "a call with a list": (PROTO + named("torch", "Size") + b"]R.", "it takes a list for a tuple"),
    "a name that is no text": (PROTO + b"NN\x93.", "by no text"),
    "a name of two lines": (PROTO + text("a\nb") + text("\x1b[31m") + b"\x93.", r"a\nb.\x1b[31m, which no checkpoint"),
    "state twice": (PROTO + made("Metadata") + b"}b}b.", "its state twice"),
    "no state": (PROTO + made("Metadata") + b".", "where Metadata should be"),
    "state that is none": (PROTO + made("Metadata") + b")b.", "where Metadata should be"),
    "state without fields": (PROTO + made("Metadata") + b"}b.", "does not say where tensors are"),
    "a million dictionaries": (PROTO + b"}" * 1_000_000, "more than 65,536"),
    "dictionaries in the memo": (PROTO + b"}\x94q\x00" * 1_000_000, "more than 65,536"),
}
"""Indexes by what is wrong with them, and what the error says."""

READ_ALL = """
import json, sys, time
from pathlib import Path
from hostile import _peak_mebibytes
from recsys.checkpoint.index import UnreadableError, read_index
for folder in sorted(Path(sys.argv[1]).iterdir()):
    start = time.perf_counter()
    try:
        read_index(folder)
        error = None
    except UnreadableError as told:
        error = str(told)
    print(json.dumps([folder.name, error, time.perf_counter() - start, _peak_mebibytes()]), flush=True)
"""


def test_hostile_indexes_end_in_one_line_soon_and_in_little_memory(tmp_path: Path) -> None:
    for name, (content, _) in HOSTILE.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / INDEX).write_bytes(content)
    done = run_bounded("-c", READ_ALL, str(tmp_path), memory=8 << 30)
    assert done.code == 0, done.stderr
    ended = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(name for name, *_ in ended) == sorted(HOSTILE)
    for name, error, seconds, mebibytes in ended:
        assert error is not None and HOSTILE[name][1] in error, (name, error)
        assert "\n" not in error and len(error) < 1000 and seconds < 30 and mebibytes < 1500, (name, seconds, mebibytes)


@pytest.mark.slow
def test_an_index_of_too_many_instructions_is_refused(checkpoint: Path) -> None:
    (checkpoint / INDEX).write_bytes(PROTO + b"(" * 60_000_000)
    assert "more than 33,554,432 instructions" in refusal(checkpoint)


def _no_file(path: Path) -> None:
    pass


def _beyond_the_bound(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_no_file, "No such file or directory"),
        (Path.mkdir, "it is no regular file"),
        (os.mkfifo, "it is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a link"),
        (lambda path: path.symlink_to("/etc/passwd"), "it is a link"),
        (lambda path: path.symlink_to(path), "it is a link"),
        (_beyond_the_bound, "it has more than 268,435,456 bytes"),
    ],
    ids=["nothing", "a folder", "a pipe", "a link to a device", "a link out", "a circle", "too large"],
)
def test_what_is_no_index_is_not_read(checkpoint: Path, make: Callable[[Path], None], message: str) -> None:
    (checkpoint / INDEX).unlink()
    make(checkpoint / INDEX)
    assert refusal(checkpoint) == f"{checkpoint / INDEX}: {message}"


def _drop_chunks(index: Metadata) -> None:
    index.state_dict_metadata[TABLE].chunks.clear()


def _drop_a_chunk(index: Metadata) -> None:
    index.state_dict_metadata[TABLE].chunks.pop()


def _one_chunk_twice(index: Metadata) -> None:
    chunks = index.state_dict_metadata[TABLE].chunks
    chunks[1] = chunks[0]


def _chunk(**fields: Any) -> Callable[[Metadata], None]:
    return lambda index: vars(index.state_dict_metadata[TABLE].chunks[1]).update(fields)


def _place(**fields: Any) -> Callable[[Metadata], None]:
    def spoil(index: Metadata) -> None:
        (info,) = (info for key, info in index.storage_data.items() if key.fqn == WEIGHT)
        vars(info).update(fields)

    return spoil


def _entry(value: object) -> Callable[[Metadata], None]:
    return lambda index: index.state_dict_metadata.update({WEIGHT: value})


def _tensor(**fields: Any) -> Callable[[Metadata], None]:
    return lambda index: vars(index.state_dict_metadata[WEIGHT]).update(fields)


def _forget_places(index: Metadata) -> None:
    index.storage_data = {key: info for key, info in index.storage_data.items() if key.fqn != WEIGHT}


def _share_bytes(index: Metadata) -> None:
    name, other = "model.dense_arch.tower.linears.1.bias", "model.dense_arch.dense_projection.bias"
    places = {key.fqn: info for key, info in index.storage_data.items()}
    vars(places[name]).update(vars(places[other]))


def _bytes_of_no_tensor(index: Metadata) -> None:
    index.storage_data[MetadataIndex("rng")] = _StorageInfo("__0_0.distcp", 0, 10)


def _keyed_by_numbers(index: Metadata) -> None:
    index.storage_data = dict(enumerate(index.storage_data.values()))


SIZE = torch.Size
STRUCTURES: dict[str, tuple[Callable[[Metadata], None], str]] = {
    "a table without parts": (_drop_chunks, f"{TABLE} has no parts"),
    "a part less": (_drop_a_chunk, f"{TABLE} is not made up of its parts"),
    "a part twice": (_one_chunk_twice, f"{TABLE} is not made up of its parts"),
    "a part beyond the end": (_chunk(sizes=SIZE([30, 5])), f"{TABLE} has a part beyond its end"),
    "a part that is smaller": (_chunk(sizes=SIZE([30, 3])), f"{TABLE} is not made up of its parts"),
    "a part without rows": (_chunk(sizes=SIZE([0, 4])), f"{TABLE} is not made up of its parts"),
    "a part elsewhere": (_chunk(offsets=SIZE([0, 3])), f"{TABLE} has a part of which no file is said"),
    "a part of other dimensions": (
        _chunk(offsets=SIZE([0]), sizes=SIZE([30])),
        "a part of other dimensions",
    ),
    "a negative offset": (_chunk(offsets=SIZE([0, -4])), "a size or an offset that is none"),
    "an offset that is a list": (_chunk(offsets=[0, 4]), "a size or an offset that is none"),
    "an offset that is none": (_chunk(offsets=None), "a size or an offset that is none"),
    "no file": (_forget_places, f"{WEIGHT} has a part of which no file is said"),
    "a file elsewhere": (_place(relative_path="../__0_0.distcp"), f"{WEIGHT} is said to be in a file that is none"),
    "a file anywhere": (_place(relative_path="/etc/passwd"), f"{WEIGHT} is said to be in a file that is none"),
    "a file of several lines": (
        _place(relative_path="__0_0.distcp\n"),
        f"{WEIGHT} is said to be in a file that is none",
    ),
    "a file of another name": (_place(relative_path="meta.json"), f"{WEIGHT} is said to be in a file that is none"),
    "a file that is no text": (_place(relative_path=7), f"{WEIGHT} is said to be in a file that is none"),
    "a file that is not there": (_place(relative_path="__9_0.distcp"), "__9_0.distcp: No such file or directory"),
    "a negative start": (_place(offset=-1), f"{WEIGHT} is said to be at no place"),
    "a start that is true": (_place(offset=True), f"{WEIGHT} is said to be at no place"),
    "a start beyond the end": (_place(offset=2**40), "is cut off: it has"),
    "a length of nothing": (_place(length=0), f"{WEIGHT} has a part of (16, 24) in 0 bytes"),
    "a length of all": (_place(length=2**40), f"{WEIGHT} has a part of (16, 24) in 1,099,511,627,776 bytes"),
    "bytes of another": (_share_bytes, "is said to share bytes of __"),
    "compressed": (
        _place(transform_descriptors=["zstd"]),
        f"{WEIGHT} is stored in a way that no",
    ),
    "bytes": (_entry(BytesStorageMetadata()), f"{WEIGHT} is not a tensor; checkpoints hold nothing else"),
    "bytes that are somewhere": (_bytes_of_no_tensor, "rng is not a tensor; checkpoints hold nothing else"),
    "no entry": (_entry(None), "something else where TensorStorageMetadata should be"),
    "a larger tensor": (_tensor(size=SIZE([2**40, 24])), f"{WEIGHT} is not made up of its parts"),
    "a tensor of 2^126 elements": (_tensor(size=SIZE([2**62, 2**62])), f"{WEIGHT} is not made up of its parts"),
    "no properties": (_tensor(properties=None), f"{WEIGHT} is no dense tensor of a type"),
    "complex numbers": (_tensor(properties=TensorProperties(torch.complex64)), "torch.complex64, which no checkpoint"),
    "a sparse tensor": (_tensor(properties=TensorProperties(torch.float32, torch.sparse_coo)), "is no dense tensor"),
    "no places": (lambda index: vars(index).update(storage_data=None), "does not say where tensors are"),
    "places by number": (_keyed_by_numbers, "it has a int for a key"),
    "no tensors": (lambda index: vars(index).update(state_dict_metadata=[]), "has no tensors by name"),
}
"""What is done to an index, and what the error says."""


@pytest.mark.parametrize("name", STRUCTURES)
def test_an_index_that_contradicts_itself_or_the_files_is_refused(checkpoint: Path, name: str) -> None:
    spoil, message = STRUCTURES[name]
    index = pickle.loads((checkpoint / INDEX).read_bytes())
    spoil(index)
    (checkpoint / INDEX).write_bytes(pickle.dumps(index))
    assert message in refusal(checkpoint)


def test_a_name_is_shown_in_one_line_however_it_is_written(checkpoint: Path) -> None:
    index = pickle.loads((checkpoint / INDEX).read_bytes())
    index.state_dict_metadata["a\nb\x1b[31m" + "c" * 1000] = BytesStorageMetadata()
    (checkpoint / INDEX).write_bytes(pickle.dumps(index))
    assert r"a\nb\x1b[31mccc" in refusal(checkpoint)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_an_index_of_any_protocol_of_today_is_read(checkpoint: Path, protocol: int) -> None:
    """Python 3.14 writes protocol 5, and pathlib's private module in 3.13."""
    tensors = read_index(checkpoint).tensors
    index = pickle.loads((checkpoint / INDEX).read_bytes())
    written = pickle.dumps(index, protocol).replace(b"\x8c\x07pathlib", b"\x8c\x0epathlib._local")
    (checkpoint / INDEX).write_bytes(written)
    assert read_index(checkpoint).tensors == tensors


def _large_index(folder: Path, tables: int, parts: int) -> None:
    """An index of tables that are cut into parts, with files that have as many bytes as they should."""
    length, index = 65_300, Metadata({}, {}, {})
    for table in range(tables):
        name = f"model.embedding_bag_collection.embedding_bags.table_{table}.weight"
        chunks = [ChunkStorageMetadata(SIZE([1000 * part, 0]), SIZE([1000, 16])) for part in range(parts)]
        index.state_dict_metadata[name] = TensorStorageMetadata(
            TensorProperties(torch.float32), SIZE([1000 * parts, 16]), chunks
        )
        for part, chunk in enumerate(chunks):
            info = _StorageInfo(f"__{part}_0.distcp", table * length, length)
            index.storage_data[MetadataIndex(name, chunk.offsets, part)] = info
    (folder / INDEX).write_bytes(pickle.dumps(index))
    for part in range(parts):
        with (folder / f"__{part}_0.distcp").open("wb") as file:
            file.truncate(tables * length)


@pytest.mark.slow
def test_an_index_of_a_hundred_thousand_parts_is_read(tmp_path: Path) -> None:
    _large_index(tmp_path, 1000, 100)
    assert sum(len(entry.chunks) for entry in read_index(tmp_path).tensors.values()) == 100_000


def _load(ranks: Ranks, directory: str, like: dict[str, torch.Tensor]) -> tuple[dict[str, NDArray[Any]], str]:
    """What is loaded into tensors of shapes and types, as arrays, which travel by themselves, or the error."""
    try:
        load_tensors(Path(directory), like)
    except UnreadableError as error:
        return {}, str(error)
    return {name: tensor.numpy() for name, tensor in like.items()}, ""


def test_dcp_loads_what_it_saved(original: Path) -> None:
    expected = tensors_as_dcp_reads_them(original)
    empty = {name: torch.full_like(tensor, -1) for name, tensor in expected.items()}
    for loaded, error in run_ranks(2, _load, str(original), empty):
        assert error == ""
        assert loaded.keys() == expected.keys()
        assert all(np.array_equal(loaded[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"model.no_such": torch.zeros(3)}, "model.no_such"),
        ({WEIGHT: torch.zeros(3)}, WEIGHT),
        ({WEIGHT: torch.zeros(16, 24, dtype=torch.int32)}, f"{WEIGHT} is of torch.float32, the model's of torch.int32"),
    ],
    ids=["missing", "another shape", "another type"],
)
def test_a_tensor_that_does_not_fit_is_named(original: Path, like: dict[str, torch.Tensor], message: str) -> None:
    ((_, error),) = run_ranks(1, _load, str(original), like)
    assert message in error and "\n" not in error


def test_damage_is_named_by_dcp_too(checkpoint: Path) -> None:
    (chunk,) = read_index(checkpoint).tensors[WEIGHT].chunks
    content = bytearray((checkpoint / chunk.file).read_bytes())
    content[chunk.start + 900] ^= 1
    (checkpoint / chunk.file).write_bytes(content)
    ((_, error),) = run_ranks(1, _load, str(checkpoint), {WEIGHT: torch.zeros(16, 24)})
    assert f"{WEIGHT} in {checkpoint / chunk.file}: its bytes are not those that were written" in error
