"""Damage to artefacts, done in a process of its own in which nothing can hang or eat the memory."""

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hostile import _peak_mebibytes

from recsys.checkpoint.layout import digest_of
from recsys.errors import UserError
from recsys.serving import Scorer

Mutation = Callable[[Path, Path, random.Random], str]
"""Spoils an artefact, with another of the same model in float16 beside it; the file that it spoilt."""

MANIFEST = "manifest.json"
TENSORS = ("dense.safetensors", "tables.safetensors")
WRONG: tuple[Any, ...] = (None, 0, -1, 2**63, 1.5, "", "x", [], {}, [[]], {"a": 1}, True)


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def _drawn(directory: Path, drawn: random.Random) -> str:
    return drawn.choice(files(directory))


def _bytes(change: Callable[[bytearray, random.Random], object]) -> Mutation:
    def mutate(directory: Path, other: Path, drawn: random.Random) -> str:
        name = drawn.choice((_drawn(directory, drawn), *TENSORS))
        content = bytearray((directory / name).read_bytes())
        change(content, drawn)
        (directory / name).write_bytes(content)
        return name

    return mutate


def _flip(content: bytearray, drawn: random.Random) -> None:
    for _ in range(drawn.choice((1, 1, 8))):
        content[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)


def _zero(content: bytearray, drawn: random.Random) -> None:
    start = drawn.randrange(len(content))
    end = min(len(content), start + drawn.choice((16, 64, 512)))
    content[start:end] = bytes(end - start)


def _cut(content: bytearray, drawn: random.Random) -> None:
    del content[drawn.randrange(len(content)) :]


def _extend(content: bytearray, drawn: random.Random) -> None:
    content += drawn.randbytes(drawn.choice((1, 100)))


def _in_place(make: Callable[[Path], object]) -> Mutation:
    """Something else where a file was."""

    def mutate(directory: Path, other: Path, drawn: random.Random) -> str:
        name = _drawn(directory, drawn)
        (directory / name).unlink()
        make(directory / name)
        return name

    return mutate


def _link(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _link_to_itself(directory: Path, other: Path, drawn: random.Random) -> str:
    name = _drawn(directory, drawn)
    shutil.move(directory / name, directory.parent / "moved")
    (directory / name).symlink_to(directory.parent / "moved")
    return name


def _swap(directory: Path, other: Path, drawn: random.Random) -> str:
    first, second = drawn.sample([name for name in files(directory) if name != MANIFEST], 2)
    (directory / first).rename(directory / "aside")
    (directory / second).rename(directory / first)
    (directory / "aside").rename(directory / second)
    return first


def _take(directory: Path, other: Path, drawn: random.Random) -> str:
    name = _drawn(other, drawn)
    shutil.copy(other / name, directory / name)
    return name


def _extra(make: Callable[[Path], object]) -> Mutation:
    def mutate(directory: Path, other: Path, drawn: random.Random) -> str:
        name = drawn.choice(("extra", "kinds.json.bak", "vocabularies/extra.parquet", "evil.pkl", "model.py"))
        make(directory / name)
        return name

    return mutate


def _keys(directory: Path, other: Path, drawn: random.Random) -> str:
    """A key removed, or of another type, in a file of JSON or YAML."""
    name = drawn.choice([name for name in files(directory) if name.endswith((".json", ".yaml"))])
    read, write = (json.loads, json.dumps) if name.endswith(".json") else (yaml.safe_load, yaml.safe_dump)
    told = read((directory / name).read_text())
    _spoil(told, drawn)
    (directory / name).write_text(write(told))
    return name


def _spoil(told: Any, drawn: random.Random) -> None:
    """Remove or change one value, at any depth."""
    while True:
        key = drawn.choice(list(told)) if isinstance(told, dict) else drawn.randrange(len(told))
        if isinstance(told[key], dict | list) and told[key] and drawn.random() < 0.75:
            told = told[key]
            continue
        if drawn.random() < 0.4:
            del told[key]
        else:
            told[key] = drawn.choice(WRONG)
        return


def _header(directory: Path, other: Path, drawn: random.Random) -> str:
    """The header of a file of tensors."""
    name = drawn.choice(TENSORS)
    content = (directory / name).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    _spoil(header, drawn)
    text = json.dumps(header).encode()
    (directory / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return name


MUTATIONS: dict[str, Mutation] = {
    "bits": _bytes(_flip),
    "zeros": _bytes(_zero),
    "cut off": _bytes(_cut),
    "more": _bytes(_extend),
    "removed": _in_place(lambda path: None),
    "a pipe": _in_place(os.mkfifo),
    "a folder": _in_place(Path.mkdir),
    "a device": _in_place(_link),
    "a link": _link_to_itself,
    "swapped": _swap,
    "another's": _take,
    "an extra file": _extra(lambda path: path.write_bytes(b"x")),
    "an extra pipe": _extra(os.mkfifo),
    "an extra link": _extra(_link),
    "keys": _keys,
    "a header": _header,
}


def reseal(directory: Path) -> None:
    """Have the manifest tell the digests of what there is, as far as it still can be told."""
    path = directory / MANIFEST
    try:
        told = json.loads(path.read_text())
        named = [name for name in files(directory) if name != MANIFEST and not (directory / name).is_symlink()]
        told["files"] = {name: digest_of(directory / name)._asdict() for name in named}
        path.write_text(json.dumps(told))
    except (OSError, ValueError, TypeError):
        return


def main(original: Path, other: Path, folder: Path, number: int) -> None:
    """Spoil copies in turn, each with and without new digests; print how opening and scoring ended."""
    rows = [row["row"] for row in json.loads((original / "vectors.json").read_text())["rows"]]
    expected = Scorer(original).score(rows)
    for seed in range(number):
        drawn = random.Random(seed)
        kind = list(MUTATIONS)[seed // 2 % len(MUTATIONS)]
        directory = shutil.copytree(original, folder / str(seed) / "artifact")
        name = MUTATIONS[kind](directory, other, drawn)
        if sealed := bool(seed % 2):
            reseal(directory)
        refusal, same = None, False
        try:
            found = Scorer(directory).score(rows)
            assert found.dtype == np.float32 and found.shape == (len(rows),)
            same = bool(np.array_equal(found, expected))
        except UserError as error:
            refusal = str(error)
        print(json.dumps([kind, name, sealed, refusal, same, _peak_mebibytes()]), flush=True)
        shutil.rmtree(directory.parent)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), int(sys.argv[4]))
