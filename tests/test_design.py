"""docs/design.md lists every module once and says where to change what: both are true of the tree."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/design.md").read_text()


def section(title: str) -> str:
    """The text below a heading, up to the next of its rank."""
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def listed() -> Counter[str]:
    """Modules of the drawing of the house, by their paths."""
    (drawing,) = re.findall(r"```\n(.*?)```", section("The house"), re.DOTALL)
    found: Counter[str] = Counter()
    folder = ""
    for line in drawing.splitlines():
        if line and not line.startswith(" "):
            folder = line.split()[0]
        else:
            names = re.match(r"(?: +[a-z0-9_]+\.py)+", line)
            found.update(f"{folder}{name}" for name in (names[0].split() if names else ()))
    return found


def definitions(file: str) -> set[str]:
    """Names that a file defines at its top level."""
    found = set()
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return found


CHANGES = [
    [re.findall(r"`([^`]+)`", cell) if cell.count("`") else cell.strip() for cell in line.strip("|").split(" | ")]
    for line in section("Where do I change ...?").splitlines()
    if line.startswith("| ") and "|---" not in line
][1:]


def test_every_module_is_listed_once_and_nothing_else() -> None:
    tree = {
        str(path.relative_to(ROOT))
        for package in ("recsys", "launch")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert listed() == Counter(tree)


def test_the_list_is_read_as_it_stands() -> None:
    assert {"recsys/train.py", "recsys/model/towers/final_mlp.py", "recsys/prepare/__main__.py"} <= set(listed())


def test_there_are_many_places_to_change() -> None:
    assert len(CHANGES) >= 25


@pytest.mark.parametrize(("files", "names"), [row[-2:] for row in CHANGES], ids=[str(row[0]) for row in CHANGES])
def test_each_place_to_change_exists(files: list[str], names: list[str]) -> None:
    assert files and names
    there = [definitions(file) for file in files]
    assert set(names) <= set().union(*there)
    assert all(set(names) & of_file for of_file in there), "a file that none of the definitions stands in"


def test_test_modules_have_names_of_their_own() -> None:
    """Pytest imports those in folders without `__init__.py` by name alone, and collects nothing where two are alike."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
