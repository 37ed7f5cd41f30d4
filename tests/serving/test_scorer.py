"""What is served is what was trained: exports of every tower, over ranks and plans, beside the model they come from."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, train_on
from tiny import take_tower, tiny_config

from recsys.config import Config, ConfigError, HashIdsConfig, load_checkpoint_config
from recsys.data.storage import DataError
from recsys.model.towers import registry
from recsys.serving import Artifact, ArtifactError, Scorer
from recsys.serving.scorer import RequestError
from recsys.serving.tables import Table, stored
from recsys.training import parity
from recsys.training.metrics import BinaryMetrics
from recsys.training.parity import BOUNDS

COLUMNS = ("user", "item", "tags", "x", "z")
TOWERS: dict[str, dict[str, Any]] = {
    "mlp": {"type": "mlp", "hidden": [16, 8], "normalization": "batch"},
    "dcn_v2": {
        "type": "dcn_v2",
        "hidden": [16],
        "num_cross_layers": 2,
        "normalization": "batch",
        "activation": "prelu",
    },
    "transformer": {"type": "transformer", "model_dim": 8, "num_blocks": 1, "num_heads": 2, "feedforward_dim": 16},
    "final_mlp": {
        "type": "final_mlp",
        "first_hidden": [16],
        "second_hidden": [16],
        "num_heads": 2,
        "normalization": "layer",
        "activation": "silu",
    },
    "wdl": {"type": "wdl", "hidden": [16]},
    "deepfm": {"type": "deepfm", "hidden": [16]},
    "nfm": {"type": "nfm", "hidden": [16]},
    "pnn": {"type": "pnn", "hidden": [16]},
    "dcn": {"type": "dcn", "hidden": [16], "num_cross_layers": 2},
    "dlrm": {"type": "dlrm", "bottom_hidden": [8], "hidden": [16]},
    "xdeepfm": {"type": "xdeepfm", "cin_hidden": [4, 3], "hidden": [16]},
    "fibinet": {"type": "fibinet", "hidden": [16]},
    "autoint": {"type": "autoint", "attention_dim": 8, "hidden": [16], "wide": True},
    "masknet": {"type": "masknet", "num_blocks": 2, "block_dim": 8, "hidden": [16]},
    "gdcn": {"type": "gdcn", "structure": "parallel", "num_cross_layers": 2, "hidden": [16]},
    "qnn": {"type": "qnn", "num_layers": 2, "hidden": [16]},
    "qnn_alpha": {"type": "qnn_alpha", "num_rows": 2, "num_heads": 2, "normalization": "batch", "hidden": [16]},
}
PLANS: dict[str, dict[str, Any]] = {
    "table": {"sharding": ["table_wise"]},
    "column": {"sharding": ["column_wise"], "min_partition": 4},
    "replicated": {"sharding": ["data_parallel"]},
}


ROUTING: dict[str, dict[str, Any]] = {
    "hierarchical": {},
    "top_k": {"top_k": 2},
    "flat": {"hierarchical": False},
    "raw_query": {"normalize_query": False},
}
REGISTERED = [name for settings in registry._BUILDERS for name in get_args(settings.model_fields["type"].annotation)]
# A tower that nobody named here is tried with what its settings are by themselves.
TOWERS |= {name: {"type": name} for name in REGISTERED if name not in TOWERS}
PATHS = {"paths": ("transformer", "mlp"), "wide_paths": ("deepfm", "autoint")}
"""Several towers over one embedding, by a name that stands where that of a tower may."""
MODELS = {
    **{name: (tower,) for name, tower in TOWERS.items()},
    **{name: tuple(TOWERS[tower] for tower in towers) for name, towers in PATHS.items()},
}


def test_the_towers_that_are_tried_are_those_of_the_registry() -> None:
    assert sorted(TOWERS) == sorted(REGISTERED)
    assert all(settings["type"] == name for name, settings in TOWERS.items())


def train(
    log: Path, folder: Path, world_size: int, plan: str, tower: str, *, experts: bool, routing: str = "hierarchical"
) -> Path:
    """The last checkpoint of a short run whose experts are no longer zero."""
    raw = tiny_config(log, folder / "out")
    raw["tables"]["item"] = {"num_embeddings": 30, "embedding_dim": 8, **PLANS[plan]}
    take_tower(raw, *MODELS[tower])
    raw["model"]["hilomoe"] = {**raw["model"]["hilomoe"], **ROUTING[routing]} if experts else None
    raw["stages"] = {"joint": {"trains": "all", "steps": 12, "learning_rate": 0.02, "sparse_learning_rate": 0.2}}
    run_ranks(world_size, train_on, as_config(raw, folder))
    return folder / "out" / "checkpoints" / "step-12"


def export(checkpoint: Path, output: Path, *options: str) -> dict[str, Any]:
    arguments = ("--checkpoint", str(checkpoint), "--output", str(output), "--json", *options)
    (done,) = run_module(1, "recsys.export", *arguments)
    assert done.code == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def predicted(checkpoint: Path, folder: Path) -> np.ndarray[Any, Any]:
    """Probabilities of the test split as evaluation gives them."""
    (done,) = run_module(1, "recsys.evaluate", "--checkpoint", str(checkpoint), "--predictions", str(folder))
    assert done.code == 0, done.stderr
    probabilities: np.ndarray[Any, Any] = pq.read_table(folder)["probability"].to_numpy()
    return probabilities


# Nine towers have each number of ranks with each plan.
CASES = [
    (1 + (n + dense) % 3, list(PLANS)[(n + n // 3) % 3], tower, None if dense else list(ROUTING)[n % len(ROUTING)])
    for n, tower in enumerate(TOWERS)
    for dense in (0, 1)
]


@pytest.mark.parametrize(
    ("world_size", "plan", "tower", "routing"),
    [
        (2, "column", "deepfm", "hierarchical"),  # first-order weights in other shards than their embeddings
        pytest.param(2, "table", "paths", "hierarchical", marks=pytest.mark.slow),
        pytest.param(3, "column", "wide_paths", None, marks=pytest.mark.slow),
        *(pytest.param(*case, marks=[] if n == 0 else [pytest.mark.slow]) for n, case in enumerate(CASES)),
    ],
)
def test_raw_rows_have_the_probabilities_of_the_model(
    tiny_log: Path, tmp_path: Path, world_size: int, plan: str, tower: str, routing: str | None
) -> None:
    """Without routing there are no experts."""
    routed = {"experts": True, "routing": routing} if routing else {"experts": False}
    checkpoint = train(tiny_log, tmp_path, world_size, plan, tower, **routed)
    expected = predicted(checkpoint, tmp_path / "predictions")
    rows = pa.concat_tables([pq.read_table(file) for file in sorted((tiny_log / "test").iterdir())])
    for precision, bound in BOUNDS.items():
        told = export(checkpoint, tmp_path / precision, "--tables", precision)
        assert told["rows"] == 251 and told["max_difference"] <= bound
        scorer = Scorer(tmp_path / precision)
        found = scorer.score(rows)
        assert found.dtype == np.float32 and found.shape == (251,)
        assert np.abs(found - expected).max() <= bound
        assert np.ptp(found) > 0.05
        listed = rows.select(COLUMNS).to_pylist()
        np.testing.assert_array_equal(scorer.score(listed), found)
        np.testing.assert_array_equal(scorer.score(rows.select(COLUMNS).to_pydict()), found)
        np.testing.assert_allclose(scorer.score(listed[:1]), found[:1], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def exported(trained: tuple[Path, Path]) -> tuple[Path, Path]:
    """A checkpoint and its artefact."""
    return trained


ROW = {"user": 3, "item": 5, "tags": [1, 2], "x": 0.5, "z": 0.1}


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([ROW, {**ROW, "colour": 1}], "row 1: 'colour' is none of the model's columns, which are"),
        ([{key: value for key, value in ROW.items() if key != "x"}], "row 0: 'x' is missing; give null"),
        ([ROW, {**ROW, "user": "seven"}], "column 'user': row 1 is of type str: values of one type are needed"),
        ({key: [value] for key, value in ROW.items() if key != "tags"}, "column 'tags' is missing"),
        ({**{key: [value] for key, value in ROW.items()}, "x": [1.0, 2.0]}, "columns are of different lengths"),
        ([ROW, {**ROW, "user": 2**70}], "column 'user': row 1 is of type int"),
        ([ROW, ROW, {**ROW, "user": 2.5}], "column 'user': row 2 is 2.5; integers .below 2.53. are needed"),
        ([ROW, {**ROW, "tags": [1, 2.5]}], "column 'tags': row 1 is .1.0, 2.5.; integers"),
        ([ROW, {**ROW, "tags": [[1]]}], "column 'tags': row 1 is of type list: .* lists hold no lists"),
    ],
)
def test_requests_of_another_shape_are_refused_by_row_and_column(
    exported: tuple[Path, Path], rows: Any, told: str
) -> None:
    with pytest.raises(RequestError, match=told):
        Scorer(exported[1]).score(rows)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"user": "seven"}, "'user' .sparse feature user. has type string"),
        ({"x": "high"}, "'x' .dense feature x. has type string"),
    ],
)
def test_columns_of_a_type_that_training_would_refuse_are_refused(
    exported: tuple[Path, Path], change: dict[str, Any], told: str
) -> None:
    with pytest.raises(DataError, match=told):
        Scorer(exported[1]).score([{**ROW, **change}])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"user": 40}, "sparse feature user .column 'user'. has 1 value out of range, such as 40"),
        ({"user": -1}, "sparse feature user .column 'user'. has 1 value out of range, such as -1"),
        ({"tags": [1, 12]}, "sparse feature tags .column 'tags'. has 1 value out of range, such as 12"),
        ({"tags": [None]}, "sparse feature tags .column 'tags'. has 1 nulls inside lists"),
        ({"z": None}, "column 'z' has 1 nulls; give a dense feature a fill"),
        ({"z": float("nan")}, "dense feature scale .column 'z'. has 1 value NaN or infinite"),
        ({"x": 1e39}, "dense feature x .column 'x'. has 1 value NaN or infinite in float32"),
    ],
)
@pytest.mark.parametrize("place", [0, 3, 4])
def test_the_first_row_that_training_would_refuse_is_named(
    exported: tuple[Path, Path], change: dict[str, Any], told: str, place: int
) -> None:
    scorer = Scorer(exported[1])
    rows = [{**ROW, **(change if row in (place, 4) else {})} for row in range(5)]
    columns = {name: [row[name] for row in rows] for name in ROW}
    for form in (rows, columns, pa.table(columns), pa.RecordBatch.from_pylist(rows)):
        with pytest.raises(DataError, match=f"^rows to score, row {place}: {told}"):
            scorer.score(form)


def test_nulls_are_what_the_config_says_that_they_are(exported: tuple[Path, Path]) -> None:
    scorer = Scorer(exported[1])
    nothing = {**ROW, "item": None, "tags": None, "x": None}
    np.testing.assert_array_equal(scorer.score([nothing]), scorer.score([{**nothing, "tags": [], "x": 0.0}]))


def test_threads_score_at_once(exported: tuple[Path, Path]) -> None:
    """Requests of several Arrow schemas, forms and contexts, some of which are refused."""
    rows = [{**ROW, "user": user % 40, "tags": [user % 12] * (user % 4)} for user in range(300)]
    table = pa.Table.from_pylist(rows)
    narrow = table.set_column(0, "user", table["user"].cast(pa.int8())).append_column("more", table["z"])
    single = table.set_column(2, "tags", table["item"])
    asked: list[Callable[[Scorer], Any]] = [
        *(partial(Scorer.score, rows=one) for one in (rows, table, narrow, single, table.select(COLUMNS).to_pydict())),
        partial(Scorer.score, rows=narrow.set_column(0, "user", pa.array([40] * 300))),
        *(
            partial(Scorer.score_candidates, context={name: ROW[name] for name in of}, candidates=table.drop(list(of)))
            for of in (("user",), ("x", "z"), ("item", "tags"))
        ),
    ]

    def answer(scorer: Scorer, ask: Callable[[Scorer], Any]) -> bytes | str:
        try:
            return bytes(ask(scorer).tobytes())
        except DataError as error:
            return str(error)

    expected = [answer(Scorer(exported[1]), ask) for ask in asked]
    assert len({*expected}) == 6  # four forms of the same rows have the same bits
    assert sum(isinstance(one, str) for one in expected) == 1
    scorer = Scorer(exported[1])
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(answer, scorer), asked * 30)) == expected * 30


def test_a_flipped_bit_in_any_file_is_found(exported: tuple[Path, Path], tmp_path: Path) -> None:
    names = sorted(path.relative_to(exported[1]) for path in exported[1].rglob("*") if path.is_file())
    assert len(names) >= 5
    for name in names:
        spoilt = shutil.copytree(exported[1], tmp_path / "spoilt", dirs_exist_ok=True)
        data = bytearray((spoilt / name).read_bytes())
        data[len(data) // 2] ^= 1
        (spoilt / name).write_bytes(data)
        if name.name == "manifest.json":
            continue  # nothing holds its digest: what it says is checked
        with pytest.raises(ArtifactError, match="is not what was written: its SHA-256 is another") as caught:
            Artifact.open(spoilt)
        assert str(spoilt / name) in str(caught.value)


def test_an_export_beyond_its_bound_is_refused_and_leaves_nothing(exported: tuple[Path, Path], tmp_path: Path) -> None:
    arguments = ("--checkpoint", str(exported[0]), "--output", str(tmp_path / "new"), "--tables", "int8")
    (done,) = run_module(1, "recsys.export", *arguments, "--bound", "1e-12")
    assert done.code == 2 and "the export differs from its model by" in done.stderr
    assert done.stderr.startswith("error: ") and list(tmp_path.iterdir()) == []
    (done,) = run_module(1, "recsys.export", "--checkpoint", str(exported[0]), "--output", str(exported[1]))
    assert done.code == 2 and "is there already" in done.stderr


BY_ITSELF = """
import json, multiprocessing, os, sys
import torch
from recsys.serving import Scorer
scorer, row = Scorer("current"), json.loads(sys.argv[1])
os.remove("current")
torch.set_num_threads(1)  # OpenMP's threads are not there after a fork
ask = lambda _: float(scorer.score([row])[0])
found = [ask(0), float(scorer.score_candidates({}, [row])[0])]
loaded = list(sys.modules)
def of_child(n): return ask(n)
with multiprocessing.get_context("fork").Pool(2) as pool:
    found += [*pool.map(of_child, range(2)), *(float(one[0]) for one in pool.map(scorer.score, [[row]] * 2))]
os.chdir("/")
print(json.dumps([found, loaded, scorer.schema.names]))
"""


def test_a_scorer_by_itself_needs_little_and_serves_forks_and_other_processes(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    """Found by a relative link, which may lead elsewhere later."""
    (tmp_path / "current").symlink_to(exported[1])
    command = [sys.executable, "-c", BY_ITSELF, json.dumps(ROW)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found, loaded, names = json.loads(done.stdout)
    np.testing.assert_allclose(found, Scorer(exported[1]).score([ROW] * 6), rtol=0, atol=1e-6)
    assert set(names) == set(COLUMNS)
    others = ("torchrec", "fbgemm_gpu", "torchx", "scipy", "tensorboard", "rich", "torch._dynamo", "torch._inductor")
    assert [name for name in loaded if name in (*others, "torch.distributed.checkpoint")] == []


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (None, "rows to score are of type NoneType; give an Arrow table"),
        ("user", "row 0 is of type str; give an Arrow table"),
        ([ROW, [ROW]], "row 1 is of type list; give an Arrow table"),
        ({**{key: [value] for key, value in ROW.items()}, "user": 3}, "column 'user' is of type int; give a list"),
        ({**{key: [value] for key, value in ROW.items()}, "user": b"\3"}, "column 'user' is of type bytes"),
        ({**{key: [value] for key, value in ROW.items()}, "user": {3}}, "column 'user' is of type set"),
        ({**{key: [value] for key, value in ROW.items()}, "user": np.array(3)}, "column 'user': values of one type"),
        ([ROW, {**ROW, "tags": 1}], "column 'tags': row 1 is of type int: values of one type"),
        (
            [{**ROW, "user": date(2020, 1, 1)}, {**ROW, "user": datetime(2020, 1, 1, 5)}],
            "row 1 is of type datetime",
        ),
    ],
)
def test_what_holds_no_rows_is_refused(exported: tuple[Path, Path], rows: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Scorer(exported[1]).score(rows)


@pytest.mark.parametrize(
    ("column", "values", "told"),
    [
        ("tags", [[1], np.ma.array([1, 2], mask=[False, True])], "row 1 is of type MaskedArray: .* masked array"),
        ("user", [1, np.ma.masked], "row 1 is of type MaskedConstant"),
        ("user", np.array([1, 2], "datetime64[7D]"), r"times are of datetime64\[7D\], in multiples of a unit"),
        ("user", [None, np.array(1, "timedelta64[10s]")[()]], r"row 1 is of type timedelta64: .* timedelta64\[10s\]"),
        ("tags", [[], np.array([1], "datetime64[10s]")], "row 1 is of type ndarray: .* in multiples of a unit"),
        ("tags", [[], [np.array(1, "datetime64[10s]")[()]]], "row 1 is of type list: .* in multiples of a unit"),
    ],
)
def test_values_that_arrow_would_take_for_others_are_refused(
    exported: tuple[Path, Path], column: str, values: Any, told: str
) -> None:
    """Of lists in masked arrays it leaves out the mask, and of times in weeks the 7 days."""
    columns = {name: [value] * 2 for name, value in ROW.items()}
    with pytest.raises(RequestError, match=told):
        Scorer(exported[1]).score({**columns, column: values})


def test_the_masks_of_columns_are_nulls(exported: tuple[Path, Path]) -> None:
    scorer = Scorer(exported[1])
    columns = {name: [value] * 2 for name, value in ROW.items()}
    expected = scorer.score({**columns, "item": [5, None]})
    items = np.ma.array([5, 7], mask=[False, True])
    for form in (items, items.astype(object)):
        np.testing.assert_array_equal(scorer.score({**columns, "item": form}), expected)


def test_rows_that_can_be_looked_at_once_are_scored(exported: tuple[Path, Path]) -> None:
    scorer, rows = Scorer(exported[1]), [ROW, {**ROW, "user": 4}]
    expected = scorer.score(rows)
    np.testing.assert_array_equal(scorer.score(iter(rows)), expected)
    np.testing.assert_array_equal(scorer.score({name: iter([row[name] for row in rows]) for name in ROW}), expected)
    assert scorer.score([]).shape == scorer.score(pa.Table.from_pylist(rows).slice(0, 0)).shape == (0,)


def test_integers_beyond_a_sign_are_integers(exported: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match=f"out of range, such as {2**63};"):
        Scorer(exported[1]).score([{**ROW, "user": 2**63}])


def test_a_request_says_nothing_of_the_next(exported: tuple[Path, Path], tmp_path: Path) -> None:
    artifact = Artifact.open(exported[1])
    hashed = artifact.config.features.sparse["user"].model_copy(update={"ids": HashIdsConfig(type="hash", buckets=40)})
    sparse = {**artifact.config.features.sparse, "user": hashed}
    features = artifact.config.features.model_copy(update={"sparse": sparse})
    config = artifact.config.model_copy(update={"features": features})
    scorer = Scorer(replace(artifact, config=config, directory=tmp_path))  # where nothing tells what features hold
    expected = scorer.score([{**ROW, "user": "seven"}])
    scorer.score([{**ROW, "user": 7}])
    np.testing.assert_array_equal(scorer.score([{**ROW, "user": "seven"}]), expected)


@pytest.mark.parametrize("name", ["config.yaml", "dense.safetensors", "kinds.json", "tables.safetensors"])
def test_a_file_that_no_digest_is_told_of_is_refused(exported: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    spoilt = shutil.copytree(exported[1], tmp_path / "spoilt")
    told = json.loads((spoilt / "manifest.json").read_text())
    del told["files"][name]
    (spoilt / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match=rf"manifest\.json lists no {name}"):
        Artifact.open(spoilt)


def test_a_dense_arch_of_another_type_is_refused(exported: tuple[Path, Path]) -> None:
    artifact = Artifact.open(exported[1])
    halved = replace(artifact, dense={name: value.half() for name, value in artifact.dense.items()})
    with pytest.raises(ArtifactError, match=r"of the dense arch is not of torch\.float32"):
        Scorer(halved)


@pytest.mark.parametrize(
    ("precision", "row"),
    [
        ("float16", [1e5, 0.0]),
        ("int8", [3e38, -3e38]),
        ("int8", [float("nan"), 0.0]),
        ("float32", [float("inf"), 0.0]),
    ],
)
def test_a_row_that_no_precision_holds_is_refused(precision: Any, row: list[float]) -> None:
    with pytest.raises(OverflowError, match=f"a row that {precision} cannot hold"):
        stored(torch.tensor([[0.0, 1.0], row]), precision)


@pytest.mark.parametrize("row", [[0.0] * 4, [5.0] * 4, [3e38] * 4, [1e-30, 0.0, 0.0, 0.0], [-1.0, 2.0, 0.5, 0.0]])
def test_odd_rows_are_kept_within_a_half_of_a_step(row: list[float]) -> None:
    rows = torch.tensor([row])
    found = Table(stored(rows, "int8"), "int8").rows(torch.tensor([0]))
    assert float((found - rows).abs().max()) <= (max(row) - min(row)) / 510 * (1 + 1e-5)


def test_probabilities_that_are_not_finite_are_beyond_any_bound(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where no label is there, whose figures would say so, and where later rows are as they should be."""
    factors = iter([torch.nan])
    scored = Scorer.logits
    monkeypatch.setattr(Scorer, "logits", lambda *of: scored(*of) * next(factors, 1.0))
    monkeypatch.setattr(BinaryMetrics, "update", lambda *_: None)
    options: dict[str, Any] = {"tables": "float32", "split": "test", "max_rows": 251, "bound": None}
    with pytest.raises(ArtifactError, match="differs from its model by nan"):
        parity.export(exported[0], tmp_path / "new", **options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--output", "s3://bucket/new"), "--output is a URL"),
        (("--output", "new", "--max-rows", "0"), "--max-rows: 0 rows compare nothing"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    exported: tuple[Path, Path], tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    (done,) = run_module(1, "recsys.export", "--checkpoint", str(exported[0]), *options)
    assert done.code == 2 and told in done.stderr and done.stderr.count("\n") == 1


def test_a_run_that_held_no_rows_out_is_compared_on_what_is_asked_for(
    exported: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained_alone(checkpoint: Path) -> Config:
        config = load_checkpoint_config(checkpoint)
        return config.model_copy(update={"data": config.data.model_copy(update={"valid": None, "test": None})})

    monkeypatch.setattr(parity, "load_checkpoint_config", trained_alone)
    options: dict[str, Any] = {"tables": "float32", "max_rows": 1, "bound": None}
    with pytest.raises(ConfigError, match=r"^data\.valid is not set, .*; give --split \(train\)$"):
        parity.export(exported[0], tmp_path / "new", split=None, **options)
    assert parity.export(exported[0], tmp_path / "new", split="train", **options).split == "train"


def test_an_export_is_no_work_for_two_processes(exported: tuple[Path, Path], tmp_path: Path) -> None:
    finished = run_module(2, "recsys.export", "--checkpoint", str(exported[0]), "--output", f"{tmp_path}/new")
    told = "error: recsys.export runs in one process; start it without torchrun\n"
    assert (finished[0].code, finished[0].stderr) == (2, told)  # the other is ended, or says the same
    assert list(tmp_path.iterdir()) == []
