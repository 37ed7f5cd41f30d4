"""Damaged checkpoints: each is refused in one line, or says what it said."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints import train_checkpoint
from hostile import ROOT, run_bounded
from mutations import MUTATIONS

FOUND_BY_DIGESTS = {
    "another's shard": "a tensor",
    "bits of what is text": "config.yaml, meta.json or kinds.json",
    "a file less": "kinds.json, which checkpoints of before did not have",
}
"""What only a digest of every file can tell from the original, and what it changes."""


class Ended(NamedTuple):
    kind: str
    refusal: str | None
    differs: list[str]
    mebibytes: int


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the same config, but for the seed."""
    return train_checkpoint(tmp_path_factory.mktemp("other"), 2, seed=5)


@pytest.fixture(scope="module", params=[64, pytest.param(320, marks=pytest.mark.slow)])
def ended(
    request: pytest.FixtureRequest, original: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Ended]:
    """How reading so many damaged copies ended."""
    program, folder = ROOT / "tests/checkpoint/mutations.py", tmp_path_factory.mktemp("mutations")
    done = run_bounded(str(program), str(original), str(other), str(folder), str(request.param), memory=8 << 30)
    assert done.code == 0, done.stderr
    ended = [Ended(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(ended) == request.param and {one.kind for one in ended} == set(MUTATIONS)
    return ended


def test_a_damaged_checkpoint_is_refused_in_one_line_or_says_what_it_said(ended: list[Ended]) -> None:
    for kind, refusal, differs, mebibytes in ended:
        assert not differs or kind in FOUND_BY_DIGESTS, (kind, differs)
        if refusal is not None:
            heading, *faults = refusal.split("\n")  # a config's faults are listed, each on a line
            assert heading and all(fault.startswith("  ") for fault in faults), refusal
        assert mebibytes < 1500, (kind, mebibytes)
    refused = sum(one.refusal is not None for one in ended)
    assert refused > len(ended) // 2, "damage does no harm: nothing is tried"


def test_no_damage_changes_what_a_checkpoint_says(ended: list[Ended]) -> None:
    assert not [one for one in ended if one.differs]
