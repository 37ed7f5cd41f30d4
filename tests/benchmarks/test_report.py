"""Results on a page and in JSON lines, those of the repository included."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import RESULTS, environment, read, shown_path, write
from recsys.config import ConfigError


def test_a_result_is_written_as_a_page_and_as_a_line_per_run(tmp_path: Path) -> None:
    about: dict[str, Any] = {"command": "python -m benchmarks.try", **environment()}
    runs = [{"kind": "run", "seed": seed, "figures": {"test AUC": 0.8}} for seed in (17, 18)]
    write(tmp_path / "new" / "try_1", "A try", ["One.", [], [{"case": "a", "AUC": "0.8"}]], about, runs, quiet=True)
    page = (tmp_path / "new" / "try_1.md").read_text()
    assert page.startswith("# A try\n\nOne.\n\n| case | AUC |\n| --- | ---: |\n| a | 0.8 |\n\n- command: `python -m ")
    assert len((tmp_path / "new" / "try_1.jsonl").read_text().splitlines()) == 3
    assert read(tmp_path / "new" / "try_1.jsonl") == {"about": [{"kind": "about", **about}], "run": runs}


def test_results_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read results .*absent\.jsonl"):
        read(tmp_path / "absent.jsonl")
    for text in ("[1]", '{"a": 1}', '{"kind": 1}', "{", "", '{"kind": "run", "figures": {"test AUC": NaN}}'):
        (tmp_path / "wrong.jsonl").write_text(f'{{"kind": "about"}}\n{text}\n')
        with pytest.raises(ConfigError, match=r"wrong\.jsonl, line 2: "):
            read(tmp_path / "wrong.jsonl")


def test_a_text_may_hold_what_other_programs_take_for_the_end_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"kind": "model", "name": "a\u2028b\x85"}\n', encoding="utf-8")
    assert read(tmp_path / "a.jsonl") == {"model": [{"kind": "model", "name": "a\u2028b\x85"}]}


def test_every_result_of_the_repository_has_a_page_and_says_how_it_came_about() -> None:
    stems = {path.with_suffix("") for path in RESULTS.iterdir()}
    assert {path.name for path in RESULTS.iterdir()} == {
        f"{stem.name}{end}" for stem in stems for end in (".md", ".jsonl")
    }
    for stem in stems:
        (about,) = read(stem.with_suffix(".jsonl"))["about"]
        page = stem.with_suffix(".md").read_text()
        assert about["command"] in page and about["date"] in page and about["commit"] in page, stem


def test_paths_elsewhere_are_not_told(tmp_path: Path) -> None:
    assert shown_path(RESULTS / "a.md") == "benchmarks/results/a.md"
    assert shown_path(tmp_path / "a.md") == "a.md"
