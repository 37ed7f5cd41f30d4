"""The model card says what config, checkpoint and comparison say, and nothing else."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from every_kind import export
from runs import reseal

from recsys.config import load_checkpoint_config
from recsys.model.cost import cost_report
from recsys.serving import Artifact


def sections(artifact: Path) -> dict[str, str]:
    """Text by heading."""
    first, *others = re.split(r"^#+ ", (artifact / "README.md").read_text(), flags=re.MULTILINE)[1:]
    return {
        title.split(":")[-1].strip(): text.strip() for title, text in (of.split("\n", 1) for of in (first, *others))
    }


def cells(text: str) -> list[list[str]]:
    """Rows of the tables in a text, without headings."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for number, row in enumerate(rows) if not row[0].startswith("---")]


@pytest.fixture(scope="module")
def checkpoint(every_kind: Path) -> Path:
    return every_kind.parent / "out/checkpoints/step-8"


def test_the_card_has_the_figures_of_its_sources(every_kind: Path, checkpoint: Path) -> None:
    card, artifact = sections(every_kind), Artifact.open(every_kind)
    meta = json.loads((checkpoint / "meta.json").read_text())
    summary = json.loads((every_kind.parent / "out/summary.json").read_text())
    parity: Any = artifact.manifest.parity
    figures = {row[0]: row[1:] for row in cells(card["Figures"])}
    shown = ("examples", "positives", "auc", "log_loss", "ne", "calibration")
    for name, told in {
        "valid, at the checkpoint": meta["valid"],
        "test, at the run's end": summary["test"],
        "90 rows of test, the trainer's model": parity["model"],
        "90 rows of test, this artefact": parity["artifact"],
    }.items():
        assert figures[name] == [f"{told[key]:,}" if key in shown[:2] else f"{told[key]:.6f}" for key in shown]
    assert f"{parity['max_difference']:.1e}" in card["Beside the trainer's model"]
    assert f"{parity['artifact']['calibration']:.4f}" in card["Calibration"]
    assert dict(cells(card["Versions"])[1:]) == {name: str(told) for name, told in meta["versions"].items()}
    plan = json.loads((checkpoint / "plan.json").read_text())
    assert {row[0]: row[3] for row in cells(card["Embedding plan"])[1:]} == {
        name: told["sharding"] for name, told in plan.items()
    }
    costs = cost_report(artifact.config).rows()
    assert cells(card["Cost"])[1:] == [list(row.values()) for row in costs]


def test_the_card_has_the_data_and_its_limits(every_kind: Path, checkpoint: Path) -> None:
    card, config = sections(every_kind), load_checkpoint_config(checkpoint)
    data = card["Data"]
    assert ["test", f"`{config.data.test}`", "90"] in cells(data)
    assert "- Label: `label`" in data
    assert ["only", "all", "8", "1", "256"] in cells(data)
    features = [row[0] for row in cells(card["Columns"])[1:]]
    assert features == [*config.features.sparse, *config.features.dense]
    known = pq.read_metadata(every_kind / "vocabularies/brand.parquet").num_rows
    limits = card["Known limits"]
    assert f"- brand: {known} values are known, all others share row 0" in limits
    assert "- site: two given values meet in one of 20 rows with probability 5.0e-02" in limits
    assert "- user: ids beyond 0 .. 19 are refused" in limits
    assert "- A null is refused in price" in limits
    counts = json.loads((checkpoint / "progress.json").read_text())["progress"]["counts"]["train"]
    cut = counts["cut"]
    assert f"- Values that were cut in the rows read of train: words {cut['words']}, bag {cut['bag']}" in limits


def test_what_a_checkpoint_does_not_tell_is_not_said(checkpoint: Path, tmp_path: Path) -> None:
    """One that was copied away from its run, of before plans and progress were kept."""
    copy = shutil.copytree(checkpoint, tmp_path / "other" / "step-8")
    for name in ("plan.json", "progress.json"):
        (copy / name).unlink()
    reseal(copy)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps({**meta, "valid": None, "versions": {}}))
    card = sections(export(copy, tmp_path / "artifact"))
    assert [row[0] for row in cells(card["Figures"])[1:]] == [
        "90 rows of test, the trainer's model",
        "90 rows of test, this artefact",
    ]
    assert "Trained in stages" not in card["Data"] and "in the rows read" not in card["Known limits"]
    assert {row[3] for row in cells(card["Embedding plan"])[1:]} == {"-"}
    assert card["Versions"] == "The checkpoint does not say."


def test_an_int8_card_says_what_its_tables_lose(converted: Path) -> None:
    card = sections(converted)
    assert "Embeddings are rounded to int8" in card["Known limits"]
    assert "kept in int8" in card["model card"]
    types = {row[0]: row[2] for row in cells(card["Columns"])[1:]}
    assert types["site"] == "string or int64" and types["brand"] == "string" and types["at"].endswith("or int64")
