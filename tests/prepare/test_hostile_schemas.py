"""Schemas of converters are read within the bounds of configs."""

import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import TEXTS, run_bounded

from recsys.config import ConfigError
from recsys.prepare.tabular import load_schema

SCHEMA: dict[str, Any] = {
    "label": "clicked",
    "tables": {"user": {"ids": "hash", "buckets": 50}},
    "columns": {
        "clicked": {"type": "int"},
        "user": {"type": "string", "table": "user"},
        "at": {"type": "int"},
    },
}
OF_CONFIGS = {"many wrong values", "an integer of 300 digits", "NUL in a path", "NUL in a label"}
"""Texts whose error is of a key that schemas have not."""


@pytest.mark.parametrize("name", sorted({name for name in TEXTS if "include" not in name} - OF_CONFIGS))
def test_a_hostile_schema_ends_in_one_error(tmp_path: Path, name: str) -> None:
    text, message = TEXTS[name]
    (tmp_path / "schema.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        load_schema(tmp_path / "schema.yaml")
    # Halves of pairs are told of all texts alike; a schema has other keys for them.
    assert "half of a surrogate pair" in str(error.value) if "half a pair" in name else message in str(error.value)
    assert len(str(error.value)) < 20_000


def test_a_pipe_is_no_schema(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    arguments = ("--source", "none", "--schema", str(tmp_path / "pipe"), "--output", str(tmp_path / "out"))
    done = run_bounded("-m", "recsys.prepare", "csv", *arguments, memory=8 << 30)
    assert done.code == 2
    assert done.stderr == f"error: cannot read schema {tmp_path}/pipe: it is no regular file; give one with --schema\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tables": {"user": {"ids": "hash", "buckets": 2**63}}},
            "tables.user.buckets: Input should be less than or eq",
        ),
        ({"embedding_dim": 2**63}, "embedding_dim: Input should be less than or equal to 65536"),
        ({"split": {"by": "random", "seed": 2**64}}, "split.seed: Input should be less than"),
        (
            {"split": {"by": "time", "column": "at", "boundaries": [2**63, 2**63]}},
            "split.boundaries.0: Input should be",
        ),
        (
            {"split": {"by": "time", "column": "at", "boundaries": [2**80, 2**80]}},
            "split.boundaries.0: Input should be",
        ),
        ({"columns": {**SCHEMA["columns"], "at": {"type": "int", "source": "a\0b"}}}, "columns.at.source: holds a NUL"),
        ({"name": "a\0b"}, "name: holds a NUL"),
    ],
)
def test_what_counts_has_a_bound(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA))
    load_schema(tmp_path / "schema.yaml")
    (tmp_path / "schema.yaml").write_text(yaml.safe_dump(SCHEMA | changes))
    with pytest.raises(ConfigError) as error:
        load_schema(tmp_path / "schema.yaml")
    assert f"\n  {message}" in str(error.value)
