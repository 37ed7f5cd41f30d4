"""Seeded damage to checkpoints, and how reading each ends; run as a program, it prints one JSON list a mutation."""

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile import _peak_mebibytes
from test_dcp import HOSTILE
from test_files import ODD

from recsys.checkpoint import layout
from recsys.checkpoint.index import UnreadableError
from recsys.checkpoint.layout import read_meta
from recsys.checkpoint.tensors import TensorReader
from recsys.config import load_checkpoint_config
from recsys.data.kinds import read_kinds
from recsys.errors import UserError
from recsys.files import read_json


def verify(directory: Path) -> None:
    """Hold every file of a checkpoint against the digest that was kept of it."""
    if wrong := layout.verify(directory, read_meta(directory).files):
        raise UnreadableError(wrong)


def contents(directory: Path, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """All that a checkpoint says, its tensors by name."""
    verify(directory)
    reader = TensorReader(directory)
    if missing := set(names or ()) - set(reader.names):
        raise UnreadableError(f"{min(missing)} is missing")
    return {
        "meta.json": read_json(directory / "meta.json", 1 << 20),
        "config.yaml": load_checkpoint_config(directory).model_dump(mode="json"),
        "kinds.json": read_kinds(directory).as_dict(),
        **{name: reader.read(name) for name in names or reader.names},
    }


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """What one checkpoint says otherwise than another."""
    return [
        name
        for name, value in expected.items()
        if not (
            found[name].dtype == value.dtype and torch.equal(found[name], value)
            if isinstance(value, torch.Tensor)
            else found[name] == value
        )
    ]


Mutation = Callable[[Path, Path, random.Random], object]


def _any_file(directory: Path, drawn: random.Random, pattern: str = "*") -> Path:
    return drawn.choice(sorted(path for path in directory.glob(pattern) if path.is_file()))


def _flip(pattern: str) -> Mutation:
    def mutate(directory: Path, other: Path, drawn: random.Random) -> None:
        path = _any_file(directory, drawn, pattern)
        content = bytearray(path.read_bytes())
        for _ in range(drawn.choice((1, 1, 1, 2, 8))):
            content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)

    return mutate


def _zero(directory: Path, other: Path, drawn: random.Random) -> None:
    path = _any_file(directory, drawn, "*.distcp")
    content = bytearray(path.read_bytes())
    start = drawn.randrange(len(content))
    end = min(len(content), start + drawn.choice((64, 512, 4096)))
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def _truncate(directory: Path, other: Path, drawn: random.Random) -> None:
    path = _any_file(directory, drawn)
    os.truncate(path, drawn.randrange(path.stat().st_size))


def _extend(directory: Path, other: Path, drawn: random.Random) -> None:
    with _any_file(directory, drawn).open("ab") as file:
        file.write(drawn.randbytes(drawn.choice((1, 100, 5000))))


def _replace(make: Callable[[Path], object]) -> Mutation:
    def mutate(directory: Path, other: Path, drawn: random.Random) -> None:
        path = _any_file(directory, drawn)
        path.unlink()
        make(path)

    return mutate


def _swap(directory: Path, other: Path, drawn: random.Random) -> None:
    first, second = drawn.sample(sorted(directory.glob("*.distcp")), 2)
    first.rename(directory / "aside")
    second.rename(first)
    (directory / "aside").rename(second)


def _take(pattern: str) -> Mutation:
    """A file of another checkpoint of the same config but for the seed."""
    return lambda directory, other, drawn: shutil.copy(_any_file(other, drawn, pattern), directory)


def _forge(directory: Path, other: Path, drawn: random.Random) -> None:
    """Another number in the index: of a part's offsets and sizes, or of where its bytes are."""
    index = pickle.loads((directory / ".metadata").read_bytes())
    if drawn.random() < 0.5:
        info = drawn.choice(list(index.storage_data.values()))
        vars(info)[drawn.choice(("offset", "length"))] = drawn.choice((0, 1, 1577, 1641, 2**20, 2**63 - 1, -1))
    else:
        entry = drawn.choice([entry for entry in index.state_dict_metadata.values() if len(entry.size)])
        of = drawn.choice([entry, *entry.chunks])
        field = drawn.choice([field for field in ("size", "offsets", "sizes") if hasattr(of, field)])
        sizes = list(getattr(of, field))
        sizes[drawn.randrange(len(sizes))] = drawn.choice((0, 1, 4, 30, 2**20, 2**62))
        setattr(of, field, torch.Size(sizes))
    (directory / ".metadata").write_bytes(pickle.dumps(index))


def _odd_meta(directory: Path, other: Path, drawn: random.Random) -> None:
    (directory / "meta.json").write_bytes(drawn.choice([content for content, _ in ODD.values()]))


def _hostile_index(directory: Path, other: Path, drawn: random.Random) -> None:
    (directory / ".metadata").write_bytes(drawn.choice([content for content, _ in HOSTILE.values()]))


MUTATIONS: dict[str, Mutation] = {
    "bits of the index": _flip(".metadata"),
    "bits of the tensors": _flip("*.distcp"),
    "bits of what is text": _flip("*.[jy]*"),
    "zeros in the tensors": _zero,
    "a file cut off": _truncate,
    "a file with more": _extend,
    "a file less": _replace(lambda path: None),
    "a pipe": _replace(os.mkfifo),
    "a folder": _replace(Path.mkdir),
    "a link": _replace(lambda path: path.symlink_to("/dev/zero")),
    "shards swapped": _swap,
    "another's shard": _take("*.distcp"),
    "another's index": _take(".metadata"),
    "a forged index": _forge,
    "an odd meta.json": _odd_meta,
    "a hostile index": _hostile_index,
}


def main(original: Path, other: Path, folder: Path, number: int) -> None:
    """Mutate copies in turn, and print mutation, refusal, what differs, and the MiB taken at most so far."""
    expected = contents(original)
    names = tuple(name for name, value in expected.items() if isinstance(value, torch.Tensor))
    for seed in range(number):
        kind = list(MUTATIONS)[seed % len(MUTATIONS)]
        directory = shutil.copytree(original, folder / f"{seed}" / original.name)
        MUTATIONS[kind](directory, other, random.Random(seed))
        refusal, differs = None, []
        try:
            differs = differing(contents(directory, names), expected)
        except (UserError, UnreadableError) as error:
            refusal = str(error)
        print(json.dumps([kind, refusal, differs, _peak_mebibytes()]), flush=True)
        shutil.rmtree(directory)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
