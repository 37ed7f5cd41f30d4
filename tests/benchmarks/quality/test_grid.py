"""What the YAML of a grid may say, and the runs that come of it."""

from pathlib import Path
from typing import Any

import pytest
from grids import write_grid

from benchmarks.quality.grid import CaseConfig, GridConfig, RivalsConfig, TableConfig, cases_of, load_grid
from recsys.config import ConfigError

ROOT = Path(__file__).parents[3]


def test_names_of_trials_keep_paths_apart_that_end_alike(folder: Path) -> None:
    rates = {
        "stages.backbone.learning_rate": [0.001],
        "stages.backbone.sparse_learning_rate": [0.1],
        "data.label": ["a"],
    }
    rates["optimizers.dense.weight_decay"] = rates["optimizers.sparse.weight_decay"] = [0.0]
    (case,) = cases_of(write_grid(folder, {"dense": {"search": rates}}), Path("runs"))
    assert case.name == (
        'dense[learning_rate=0.001, sparse_learning_rate=0.1, label="a", optimizers.dense.weight_decay=0.0, '
        "optimizers.sparse.weight_decay=0.0]"
    )


def test_no_two_trials_share_a_folder_and_each_can_be_made(folder: Path) -> None:
    """Also where values are paths, or longer than a file's name may be."""
    paths = {"data.valid": ["a/b/*.parquet", "a_b/*.parquet"]}
    long = {f"features.dense.number_{number}": [{"fill": 0.0}] for number in range(12)}
    both = {"paths": {"search": paths}, "long": {"search": {**long, "data.batch_size": [30, 31]}}}
    for case in cases_of(write_grid(folder, both), folder / "runs"):
        case.runs[0].directory.mkdir(parents=True)  # none is there yet


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"sede": 1}, r"sede: unknown key; did you mean 'seeds'\?"),
        ({"seeds": []}, "seeds: Tuple should have at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: one stands twice"),
        ({"overrides": ["seed=3"]}, "overrides: seed=3 is the grid's to set, by seeds and --runs"),
        ({"cases": {}}, "cases: Dictionary should have at least 1 item"),
        ({"logs": {"a": {"cases": {"b": []}}}}, r"logs\.a\.cases: no case 'b'; there are tiny"),
        ({"logs": {}}, "logs: Dictionary should have at least 1 item"),
        ({"logs": {"a": {}}, "cases": {"b": {"config": "tiny.yaml"}}}, r"cases\.b: config and rivals are of one log"),
        ({"logs": {"c": {}, "b_c": {}}, "cases": {"a": {}, "a_b": {}}}, "two cases on logs are called 'a_b_c'"),
        ({"cases": {"a.b": {}}}, "cases.a.b: String should match pattern"),
        ({"cases": {"a": {"overides": []}}}, "cases.a.overides: unknown key; did you mean 'overrides'"),
        ({"cases": {"a": {"seeds": [2, 2]}}}, "cases.a.seeds: one stands twice"),
        ({"cases": {"a": {"overrides": ["output_dir=x"]}}}, "cases.a.overrides: output_dir=x is the grid's to set"),
        ({"cases": {"a": {"search": {"seed": []}}}}, "cases.a.search.seed: Tuple should have at least 1 item"),
        (
            {"cases": {"a": {"rivals": {"file": "x", "model": "y"}, "seeds": [1]}}},
            "cases.a: rivals are trained elsewhere",
        ),
        ({"tables": [{"question": "?", "baseline": "tiny"}]}, "tables.0.cases: missing, and has no default"),
        ({"tables": [{"question": "?", "baseline": "b", "cases": ["tiny"]}]}, "tables.0: no case 'b'; there are tiny"),
        (
            {
                "cases": {"tiny": {"search": {"model.dense_dim": [4]}}, "other": {}},
                "tables": [{"question": "?", "baseline": "tiny", "cases": ["other"]}],
            },
            "tables.0: case 'tiny' is a search",
        ),
    ],
)
def test_what_is_wrong_with_a_grid_is_named(folder: Path, fault: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_grid(folder, **{"cases": {"tiny": {}}, **fault})


def test_every_case_is_trained_on_every_log(folder: Path) -> None:
    half = {"overrides": ["data.batch_size=30"], "cases": {"narrow": ["data.eval_batch_size=32"]}}
    logs = {"half": half, "whole": {"config": "other.yaml"}}
    (folder / "other.yaml").write_text((folder / "tiny.yaml").read_text())
    table = {"question": "Narrow?", "baseline": "dense", "cases": ["narrow"]}
    cases = {"dense": {}, "narrow": {"overrides": ["data.batch_size=31"], "seeds": [5]}}
    grid = write_grid(folder, cases, logs=logs, tables=[table])
    found = {case.name: case for case in cases_of(grid, Path("runs"))}
    assert list(found) == ["dense_half", "narrow_half", "dense_whole", "narrow_whole"]
    narrow = found["narrow_half"]
    last = ("data.batch_size=30", "data.batch_size=31", "data.eval_batch_size=32")
    assert narrow.overrides[-3:] == last and narrow.config == "tiny.yaml"
    assert [run.seed for run in narrow.runs] == [5] and narrow.runs[0].config.data.batch_size == 31
    assert (found["dense_whole"].config, found["dense_whole"].overrides) == ("other.yaml", grid.overrides)
    asked = [(table.question, table.baseline, table.cases) for table in grid.tables]
    assert asked == [(f"Narrow?, on {log}", f"dense_{log}", (f"narrow_{log}",)) for log in logs]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ({"overrides": ["model.hilomo=null"]}, r"cases\.bad: tiny\.yaml:\n  model\.hilomo: unknown key"),
        ({"config": "absent.yaml"}, r"cases\.bad: cannot read config absent\.yaml"),
        ({"overrides": ["data.test=null"]}, r"cases\.bad: data\.test is not set"),
        ({"search": {"model.dense_dim": [4, 0]}}, r"cases\.bad\[dense_dim=0\]: tiny\.yaml:\n  model\.dense_dim"),
    ],
)
def test_a_case_that_cannot_be_trained_is_named_before_anything_is(
    folder: Path, case: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cases_of(write_grid(folder, {"tiny": {}, "bad": case}), Path("runs"))


@pytest.mark.slow
def test_the_grids_of_the_repository_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    paths = sorted((ROOT / "benchmarks" / "grids").glob("*.yaml"))
    assert "small.yaml" in {path.name for path in paths}
    for path in paths:
        grid = load_grid(path)
        assert grid.name == path.stem
        assert cases_of(grid, Path("runs"))
        assert all(Path(case.rivals.file).exists() for case in grid.cases.values() if case.rivals is not None)


def test_docs_name_every_key_of_a_grid() -> None:
    text = (ROOT / "docs" / "benchmarks.md").read_text()
    keys = {key for schema in (GridConfig, CaseConfig, RivalsConfig, TableConfig) for key in schema.model_fields}
    assert [key for key in keys if f"`{key}`" not in text] == []
