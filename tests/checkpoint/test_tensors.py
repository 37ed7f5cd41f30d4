"""Tensors of a checkpoint on one process: what torch's own reader gives, and nothing that an index does not say."""

import io
import pickle
import resource
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoints import tensors_as_dcp_reads_them
from hostile import run_bounded
from torch import Tensor

from recsys.checkpoint.index import DTYPES, INDEX, Chunk, UnreadableError, _disjoint, read_index
from recsys.checkpoint.tensors import TensorReader

TABLE = "model.embedding_bag_collection.embedding_bags.item.weight"


def save(directory: Path, **tensors: Tensor) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving without a process group
        dcp.save(tensors, checkpoint_id=directory, no_dist=True)
    return directory


def test_every_tensor_is_what_torch_reads(original: Path) -> None:
    expected = tensors_as_dcp_reads_them(original)
    reader = TensorReader(original)
    assert set(reader.names) == set(expected)
    assert len(reader.index.tensors[TABLE].chunks) == 2, "nothing is put together of parts"
    for name, tensor in expected.items():
        assert reader.shape(name) == tensor.shape and reader.dtype(name) == tensor.dtype
        assert torch.equal(reader.read(name), tensor)


@pytest.mark.parametrize(
    "rows", [slice(0, 7), slice(5, None), slice(-3, None), slice(4, 4), slice(9, 3), slice(2, 1000), slice(None)]
)
def test_rows_are_read_as_they_stand(original: Path, rows: slice) -> None:
    reader = TensorReader(original)
    for name, tensor in tensors_as_dcp_reads_them(original).items():
        if tensor.dim():
            assert torch.equal(reader.read(name, rows), tensor[rows])


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_is_read(tmp_path: Path, name: str) -> None:
    tensor = (torch.randn(7, 3) * 50).to(DTYPES[name])
    scalar = torch.tensor(1).to(DTYPES[name])
    reader = TensorReader(save(tmp_path / "it", tensor=tensor, scalar=scalar))
    assert torch.equal(reader.read("tensor"), tensor) and torch.equal(reader.read("scalar"), scalar)
    assert reader.dtype("tensor") == tensor.dtype


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(120.0).reshape(2, 3, 4, 5).permute(2, 0, 3, 1),
        torch.arange(120.0).reshape(4, 30)[1:3, 5:20],
        torch.arange(12.0)[::2],
        torch.arange(3.0).expand(4, 3),
        torch.arange(6.0).reshape(1, 6, 1).transpose(0, 2),
        torch.empty(0, 8),
        torch.empty(8, 0),
    ],
    ids=["transposed", "permuted", "a view", "stepped", "expanded", "ones", "no rows", "no columns"],
)
def test_tensors_are_read_however_they_lie_in_memory(tmp_path: Path, tensor: Tensor) -> None:
    reader = TensorReader(save(tmp_path / "it", it=tensor))
    assert torch.equal(reader.read("it"), tensor)
    assert torch.equal(reader.read("it", slice(1, 3)), tensor[1:3])
    into = torch.full((*tensor.shape, 2), -1.0, dtype=torch.float64)[..., 0]
    reader.read_into("it", into)
    assert torch.equal(into, tensor.double())


def test_a_parameter_is_filled(original: Path) -> None:
    reader = TensorReader(original)
    reader.read_into(TABLE, parameter := torch.nn.Parameter(torch.zeros(30, 8)))
    assert torch.equal(parameter, reader.read(TABLE)) and parameter.requires_grad


def test_a_tensor_that_no_memory_holds_is_named(checkpoint: Path) -> None:
    """Files with holes in them have as many bytes as they say."""
    index, (rows, columns) = pickle.loads((checkpoint / INDEX).read_bytes()), (1 << 41, 1)
    entry = index.state_dict_metadata[TABLE]
    entry.size, entry.chunks[1:] = torch.Size([rows, columns]), []
    entry.chunks[0].sizes = entry.size
    for key, info in index.storage_data.items():
        if key.fqn == TABLE and key.offset == entry.chunks[0].offsets:
            info.relative_path, info.offset, info.length = "__7_0.distcp", 0, 4 * rows + 1000
    (checkpoint / INDEX).write_bytes(pickle.dumps(index))
    with (checkpoint / "__7_0.distcp").open("wb") as file:
        file.truncate(4 * rows + 1000)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2 * rows, limits[1]))  # as some systems promise memory that is not there
    try:
        with pytest.raises(UnreadableError, match=rf"{TABLE} of shape \({rows}, 1\) does not fit in memory"):
            TensorReader(checkpoint).read(TABLE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_reading_into_another_shape_is_a_mistake(original: Path) -> None:
    with pytest.raises(ValueError, match="out \\(3, 3\\)"):
        TensorReader(original).read_into(TABLE, torch.empty(3, 3))
    with pytest.raises(ValueError, match="in steps of 2"):
        TensorReader(original).read(TABLE, slice(0, 10, 2))
    with pytest.raises(KeyError):
        TensorReader(original).read("model.no_such")


READ_LARGE = """
import sys, torch
from pathlib import Path
from recsys.checkpoint.tensors import TensorReader
def resident(key):
    return int(Path("/proc/self/status").read_text().partition(key)[2].split()[0]) << 10
reader = TensorReader(Path(sys.argv[1]))
reader.read("small")
before = resident("VmRSS:")
tensor = reader.read(sys.argv[2])
print(resident("VmHWM:") - before, tensor.nbytes)
"""


@pytest.mark.parametrize("name", ["plain", "transposed"])
def test_reading_takes_little_more_memory_than_the_tensor(tmp_path: Path, name: str) -> None:
    large = torch.zeros(1 << 20, 16)
    save(tmp_path / "it", small=torch.zeros(3), plain=large, transposed=torch.zeros(16, 1 << 20).t())
    done = run_bounded("-c", READ_LARGE, str(tmp_path / "it"), name, memory=8 << 30)
    assert done.code == 0, done.stderr
    grown, size = map(int, done.stdout.split())
    assert size == large.nbytes
    assert grown < 1.1 * size + (8 << 20)


def flipped(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_a_tensor_is_found(checkpoint: Path) -> None:
    reader = TensorReader(checkpoint)
    chunk = reader.index.tensors[TABLE].chunks[1]
    flipped(checkpoint / chunk.file, chunk.start + 900)
    with pytest.raises(UnreadableError, match=rf"^{TABLE} in {checkpoint}/{chunk.file}: its bytes are not those that"):
        reader.read(TABLE)


def replaced(checkpoint: Path, name: str, make: Callable[[Tensor], bytes]) -> None:
    """Put other bytes where a tensor of one part is, as long as its own."""
    reader = TensorReader(checkpoint)
    (chunk,) = reader.index.tensors[name].chunks
    written = make(reader.read(name))
    assert len(written) <= chunk.length, (len(written), chunk.length)
    comment = chunk.length - len(written)  # the end of a zip may hold one
    written = written[:-2] + comment.to_bytes(2, "little") + bytes(comment)
    content = bytearray((checkpoint / chunk.file).read_bytes())
    content[chunk.start : chunk.start + chunk.length] = written
    (checkpoint / chunk.file).write_bytes(content)


def saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def rezipped(tensor: Tensor, method: int, **other: bytes) -> bytes:
    """What `torch.save` writes, with other contents of entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(tensor))) as old, zipfile.ZipFile(buffer, "w", method) as new:
        for name in ("data.pkl", "byteorder", "data/0"):
            new.writestr(
                f"archive/{name}", other.get(name.partition(".")[0].replace("/", ""), old.read(f"archive/{name}"))
            )
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda old: saved(old[:5].clone()), "of another shape than the index says"),
        (lambda old: saved(old.reshape(2, -1)), "of another shape than the index says"),
        (lambda old: saved(old.int()), "of another type than the index says, torch.float32"),
        (lambda old: saved(old.half()), "of another type than the index says, torch.float32"),
        (lambda old: saved([1, 2, 3]), "no tensor that torch.save wrote"),
        (lambda old: saved({"a": torch.zeros(2)}), "something else than a tensor"),
        (lambda old: saved(torch.zeros(2).to_sparse()), "which no checkpoint of ours has"),
        (lambda old: saved(torch.zeros(1).expand(old.shape)), "not stored densely"),
        (lambda old: rezipped(old, zipfile.ZIP_DEFLATED), "it is compressed"),
        (lambda old: rezipped(old, zipfile.ZIP_STORED, data0=b"abc"), "it holds 3 bytes, which is not the size"),
        (
            lambda old: rezipped(old, zipfile.ZIP_STORED, data=b"cos\nsystem\n."),
            "os.system, which no checkpoint of ours",
        ),
        (lambda old: rezipped(old, zipfile.ZIP_STORED, byteorder=b"big"), "of another byte order"),
        (lambda old: b"no zip at all" + bytes(30), "it is no zip"),
    ],
)
def test_a_tensor_that_is_not_what_the_index_says_is_refused(
    checkpoint: Path, make: Callable[[Tensor], bytes], message: str
) -> None:
    name = "model.dense_arch.tower.linears.0.weight"
    replaced(checkpoint, name, make)
    with pytest.raises(UnreadableError, match=message) as error:
        TensorReader(checkpoint).read(name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_type_that_the_bytes_are_not_is_refused(checkpoint: Path) -> None:
    name = "model.dense_arch.tower.linears.0.weight"
    index = pickle.loads((checkpoint / INDEX).read_bytes())
    index.state_dict_metadata[name].properties.dtype = torch.float64
    (checkpoint / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(UnreadableError, match=r"of another type than the index says, torch\.float64"):
        TensorReader(checkpoint).read(name)


def test_parts_overlap_or_do_not() -> None:
    def chunks(*boxes: tuple[int, int, int, int]) -> list[Chunk]:
        return [Chunk((row, column), (rows, columns), "", 0, 0) for row, column, rows, columns in boxes]

    assert _disjoint(chunks()) and _disjoint(chunks((0, 0, 3, 3)))
    assert _disjoint(chunks(*[(row, 0, 1, 8) for row in range(50)]))
    assert _disjoint(chunks(*[(row, column, 5, 2) for row in range(0, 50, 5) for column in range(0, 8, 2)]))
    # column shards whose rows are cut at places of their own
    assert _disjoint(chunks((0, 0, 3, 4), (3, 0, 5, 4), (0, 4, 5, 4), (5, 4, 3, 4)))
    assert not _disjoint(chunks((0, 0, 3, 4), (2, 0, 6, 4)))
    assert not _disjoint(chunks((0, 0, 3, 4), (0, 3, 3, 4)))
    assert not _disjoint(chunks((0, 0, 3, 4), (0, 0, 3, 4)))


def test_reading_an_index_looks_at_its_files(checkpoint: Path) -> None:
    read_index(checkpoint)
    (data, *_) = sorted(checkpoint.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UnreadableError, match=rf"{data} is cut off: it has"):
        read_index(checkpoint)
    data.unlink()
    with pytest.raises(UnreadableError, match=rf"{data}: No such file"):
        read_index(checkpoint)
    data.symlink_to("/dev/zero")
    with pytest.raises(UnreadableError, match=rf"{data}: it is a link"):
        read_index(checkpoint)
