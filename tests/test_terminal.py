"""Tables for consoles and in Markdown, drawn in one place."""

import ast
import io
from pathlib import Path

import pytest
from rich.console import Console

from recsys.terminal import markdown, say, table, without_empty

ROWS = [{"name": "a [b]", "cut": "-", "rows": "1,000"}, {"name": "c", "cut": "-", "rows": "5"}]
ROOT = Path(__file__).parents[1]


def drawn(what: object) -> str:
    console = Console(file=io.StringIO(), width=60)
    console.print(what)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_table_has_its_title_its_columns_and_every_cell_as_it_is() -> None:
    lines = drawn(table(ROWS, "Figures")).splitlines()
    assert lines[0].strip() == "Figures"
    assert "a [b]" in lines[4] and lines[4].rstrip(" │|").endswith("1,000")
    assert lines[5].rstrip(" │|").endswith("    5")  # numbers are flush right


def test_columns_that_say_nothing_can_go() -> None:
    assert without_empty(ROWS) == [{"name": "a [b]", "rows": "1,000"}, {"name": "c", "rows": "5"}]
    assert without_empty([]) == []


def test_no_word_or_number_is_cut_in_two_where_the_terminal_is_narrow() -> None:
    rows = [{"name of the thing": "a", **{f"figure{number}": f"{number}.123456789" for number in range(9)}}]
    console = Console(file=io.StringIO(), width=40)
    say(console, table(rows, "Narrow"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(word in text for cell in (*rows[0], *rows[0].values()) for word in cell.split())


def test_markdown_has_a_line_for_each_row() -> None:
    assert markdown(ROWS[1:]) == "| name | cut | rows |\n| --- | ---: | ---: |\n| c | - | 5 |"


def test_only_terminal_draws_tables() -> None:
    for path in (ROOT / "recsys").rglob("*.py"):
        names = {
            f"{node.module}.{alias.name}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert ("rich.table.Table" in names) <= (path.name == "terminal.py"), path
        tensorboard = any("tensorboard" in name for name in names)
        assert tensorboard <= (path.name == "monitor.py"), path


@pytest.mark.slow
def test_plan_and_prepare_need_no_tensorboard() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import recsys.plan, recsys.prepare.__main__, recsys.prepare.validation, recsys.model.cost, "
        "recsys.sharding.plan; sys.exit('tensorboard' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_markdown_keeps_its_cells_apart_whatever_they_say() -> None:
    rows = [{"name": "a|b", "kind": "x\ny", "rows": "5"}]
    assert markdown(rows, left=["kind"]) == "| name | kind | rows |\n| --- | :--- | ---: |\n| a\\|b | x y | 5 |"
