"""Imports point one way: read from the source, so that what no test runs is held to it as well."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BASE = {"recsys.errors", "recsys.files", "recsys.config", "recsys.host_memory", "recsys.runtime"}

ALLOWED: dict[str, set[str]] = {
    "recsys": set(),
    "recsys.errors": set(),
    "recsys.terminal": set(),
    "recsys.files": {"recsys.errors"},
    "recsys.config": {"recsys.errors", "recsys.files", "recsys.config"},
    "recsys.versions": set(),
    "recsys.host_memory": set(),
    "recsys.lifetime": {"recsys.errors"},
    "recsys.watch": {"recsys.errors"},
    "recsys.meeting": {"recsys.errors", "recsys.config"},
    "recsys.cli": {"recsys.errors", "recsys.config", "recsys.lifetime", "recsys.versions", "recsys.watch"},
    "recsys.runtime": {"recsys.config", "recsys.host_memory", "recsys.lifetime", "recsys.meeting", "recsys.watch"},
    "recsys.data": BASE | {"recsys.data"},
    "recsys.prepare": BASE | {"recsys.data", "recsys.terminal", "recsys.cli", "recsys.prepare"},
    "recsys.checkpoint": {"recsys.errors", "recsys.files", "recsys.config", "recsys.data", "recsys.checkpoint"},
    "recsys.checkpoint.tools": {"recsys.config", "recsys.terminal", "recsys.checkpoint"},
    "recsys.checkpoint.__main__": {"recsys.cli", "recsys.checkpoint.tools"},
    "recsys.model": {"recsys.config", "recsys.host_memory", "recsys.data.batch", "recsys.model"},
    "recsys.model.experts": {"recsys.model.experts"},
    "recsys.model.experts.hilomoe": set(),
    "recsys.model.experts.domains": set(),
    "recsys.model.towers": {"recsys.config", "recsys.model.towers"},
    "recsys.sharding": BASE | {"recsys.checkpoint.pending", "recsys.model", "recsys.sharding"},
    "recsys.training": BASE
    | {
        "recsys.versions",
        "recsys.watch",
        "recsys.terminal",
        "recsys.data",
        "recsys.prepare.synthetic",
        "recsys.model",
        "recsys.checkpoint",
        "recsys.serving",
        "recsys.sharding",
        "recsys.training",
    },
    "recsys.serving": BASE | {"recsys.versions", "recsys.data", "recsys.checkpoint", "recsys.model", "recsys.serving"},
}
"""What a package or module may import of ours; the longest name that matches counts. All else is an entry."""

LIBRARY = {name for name in ALLOWED if name.count(".") == 1}


def modules(package: str) -> dict[str, Path]:
    """Modules of a top-level package by dotted name."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(source: str, ours: set[str]) -> Iterator[str]:
    """Everything that a module imports, wherever the statement stands; `from a import b` is a.b where that is ours."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            assert node.module is not None
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in ours else node.module


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


RECSYS = modules("recsys")


@pytest.mark.parametrize("module", RECSYS)
def test_imports_point_one_way(module: str) -> None:
    ours = {name for name in imports(RECSYS[module].read_text(), set(RECSYS)) if within(name, {"recsys"})}
    owners = [name for name in ALLOWED if name != "recsys" and within(module, {name})]
    if module == "recsys":
        allowed = ALLOWED["recsys"]
    elif owners:
        allowed = ALLOWED[max(owners, key=len)]
    else:
        allowed = LIBRARY
    assert not {name for name in ours if not within(name, allowed)}


def test_every_module_that_is_imported_exists() -> None:
    for path in RECSYS.values():
        ours = {name for name in imports(path.read_text(), set(RECSYS)) if within(name, {"recsys"})}
        assert ours <= set(RECSYS), path


def test_config_and_cli_start_without_torch() -> None:
    light = {f"recsys.{name}" for name in ("config", "errors", "files", "versions", "cli", "lifetime", "watch")}
    started = [name for name in RECSYS if within(name, light)]
    for module in ["recsys", "recsys.terminal", *started]:
        tree = ast.parse(RECSYS[module].read_text())
        top = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
        assert not [name for name in imports(top, set()) if within(name, {"torch", "torchrec", "fbgemm_gpu"})], module


def test_launch_imports_neither_torch_nor_recsys() -> None:
    for path in modules("launch").values():
        assert not [name for name in imports(path.read_text(), set()) if within(name, {"torch", "torchrec", "recsys"})]


def test_what_is_installed_does_not_need_the_benchmarks() -> None:
    for path in [*RECSYS.values(), *modules("launch").values()]:
        assert not [name for name in imports(path.read_text(), set()) if within(name, {"benchmarks"})], path


def test_benchmarks_leave_the_drawing_of_tables_to_the_terminal() -> None:
    for path in modules("benchmarks").values():
        assert not [name for name in imports(path.read_text(), set()) if within(name, {"rich"})], path


def test_scipy_is_imported_where_calibrators_are_fitted_alone() -> None:
    users = [
        name for name, path in RECSYS.items() if any(within(it, {"scipy"}) for it in imports(path.read_text(), set()))
    ]
    assert users == ["recsys.training.calibrating"]


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    # A script's own folder is on sys.path, so recsys/profile.py would be the `profile` that torch imports.
    names = {path.stem for path in (ROOT / "recsys").iterdir()} | {path.stem for path in (ROOT / "launch").glob("*.py")}
    assert not names & set(sys.stdlib_module_names)


def test_no_module_is_a_drawer_of_odds_and_ends() -> None:
    for name in RECSYS:
        assert name.rpartition(".")[2] not in {"utils", "util", "helpers", "common", "misc"}


def test_the_reader_of_imports_sees_them_wherever_they_stand() -> None:
    source = "import a.b\nfrom recsys import data\ndef f():\n    from recsys.x import y\n    import torch as t\n"
    assert set(imports(source, {"recsys.data"})) == {"a.b", "recsys.data", "recsys.x", "torch"}


def test_features_are_decoded_without_torch() -> None:
    """As whoever serves a model will, from a config and raw values."""
    code = """
import sys
import pyarrow as pa
from recsys.config import load_config
from recsys.data.features import build_columns
columns = build_columns(load_config("configs/small.yaml"), raw=True)
rows = pa.table({"user_id": [1, 2], "item_id": [3, None], "category_id": [0, 0], "recent_categories": [[1, 2], []],
    "tag_ids": [[], [5]], "domain": [0, 1], "time_of_day": [0.5, 0.1], "discount": [None, 1.0], "price": [3.0, 4.0]})
found = columns.decode_features(rows, columns.layout(columns.check_features(rows.schema, "rows")), "rows")
assert found.single.tolist()[1] == [3, -1] and found.lists[0].values.tolist() == [1, 2]
loaded = {"torch", "torchrec", "fbgemm_gpu", "tensorboard"} & set(sys.modules)
sys.exit(f"{loaded} is loaded" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_dense_arch_and_features_need_no_torchrec() -> None:
    program = (
        "import sys, recsys.model.dense_arch, recsys.data.features, recsys.checkpoint.tensors; "
        "print([name for name in sys.modules if name.startswith(('torchrec', 'fbgemm'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
