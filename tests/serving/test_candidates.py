"""Candidates of one request have the probabilities of rows with the context in each, whatever the tower does."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from runs import as_config
from test_scorer import MODELS, TOWERS
from tiny import take_tower, tiny_config, tiny_table
from torch import Tensor
from torch.nn import functional as F

from recsys.data.applied import AppliedIds, marked
from recsys.data.ids import HashedIds
from recsys.data.storage import DataError
from recsys.model.dense_arch import build_dense_arch
from recsys.model.experts import expert_layers
from recsys.model.towers.normalization import BatchNorm
from recsys.serving import Artifact, Scorer
from recsys.serving.artifact import Manifest
from recsys.serving.candidates import SharedRows, Sharing
from recsys.serving.scorer import RequestError
from recsys.serving.tables import Table

COLUMNS = ("user", "item", "tags", "x", "z")


def norms(module: torch.nn.Module) -> list[BatchNorm]:
    return [child for child in module.modules() if isinstance(child, BatchNorm)]


def make(
    folder: Path,
    tower: dict[str, Any] | Sequence[dict[str, Any]],
    experts: int = 3,
    *,
    dense: bool = True,
    **sparse: Any,
) -> Artifact:
    """An artefact of the tiny config, in memory, of random weights; several towers are paths."""
    raw = tiny_config(folder, folder)
    take_tower(raw, *([tower] if isinstance(tower, dict) else tower))
    raw["model"]["hilomoe"] = {"num_layers": 2, "num_experts": experts} if experts else None
    if not experts:
        del raw["stages"]["experts"]
    if not dense:
        del raw["features"]["dense"]
    for name, settings in sparse.items():
        raw["features"]["sparse"][name] |= settings
    config = as_config(raw, folder)
    torch.manual_seed(7)
    arch = build_dense_arch(config.model, config.embedding_dims, num_dense_features=len(config.features.dense))
    for layer in expert_layers(arch).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)  # type: ignore[attr-defined]
    for norm in norms(arch):
        torch.nn.init.normal_(norm.running_mean)
        torch.nn.init.uniform_(norm.running_var, 0.1, 1)
    tables = {
        name: Table(torch.randn(table.num_embeddings, table.embedding_dim), "float32")
        for name, table in config.tables.items()
    }
    return Artifact(folder, Manifest(config.name, "float32", 0, "joint"), config, arch.state_dict(), tables)


def request(rows: int, context: Sequence[str], columns: Sequence[str] = COLUMNS) -> tuple[dict[str, Any], pa.Table]:
    """A context, and rows that have it in each."""
    table = tiny_table(rows, 5).select(columns)
    shared = tiny_table(1, 11).select(list(context)).to_pylist()[0] if context else {}
    for name, value in shared.items():
        column = pa.array([value] * rows, table.schema.field(name).type)
        table = table.set_column(table.column_names.index(name), name, column)
    return shared, table


def difference(scorer: Scorer, context: dict[str, Any], table: pa.Table) -> tuple[float, NDArray[np.float32]]:
    """The largest between the two forms, and the probabilities."""
    found = scorer.score_candidates(
        context, [{k: v for k, v in r.items() if k not in context} for r in table.to_pylist()]
    )
    expected = scorer.score(table)
    assert found.shape == expected.shape == (len(table),) and found.dtype == np.float32
    return float(np.abs(found - expected).max(initial=0)), found


CONTEXTS = [(), ("user",), ("item", "x"), ("tags", "z"), ("user", "tags", "x", "z"), ("x", "z"), COLUMNS]
GATED = {**TOWERS["final_mlp"], "first_context": ["user"], "second_context": ["item", "tags"]}


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("tower", [*MODELS, "gated"])
def test_candidates_have_the_probabilities_of_rows(tmp_path: Path, tower: str, experts: int) -> None:
    scorer = Scorer(make(tmp_path, {**MODELS, "gated": (GATED,)}[tower], experts))
    for context in CONTEXTS:
        for rows in (0, 1, 1000):
            given, table = request(rows, context)
            most, found = difference(scorer, given, table)
            assert most <= 1e-6, (context, rows)
            if rows == 1000:
                assert bool(np.ptp(found) > 0.05) is (context != COLUMNS), context


@pytest.mark.parametrize("tower", TOWERS)
def test_models_without_dense_features_have_candidates(tmp_path: Path, tower: str) -> None:
    scorer = Scorer(make(tmp_path, TOWERS[tower], dense=False))
    for context in ((), ("item",), ("user", "tags"), COLUMNS[:3]):
        given, table = request(300, context, COLUMNS[:3])
        assert difference(scorer, given, table)[0] <= 1e-6, context


def test_candidates_come_in_any_form(tmp_path: Path) -> None:
    scorer = Scorer(make(tmp_path, TOWERS["mlp"]))
    context, table = request(50, ("user", "x"))
    items = table.drop(["user", "x"])
    expected = scorer.score_candidates(context, items)
    forms = (items.to_pylist(), items.to_pydict(), items.to_batches()[0], iter(items.to_pylist()))
    for form in forms:
        np.testing.assert_array_equal(scorer.score_candidates(context, form), expected)


@pytest.mark.parametrize("tower", ["mlp", "gated", "both"])
@pytest.mark.parametrize("experts", [0, 3])
def test_the_context_is_not_copied(tmp_path: Path, tower: str, experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked up once, and towers that begin with linears never see it in each row."""
    gated = {**GATED, "second_context": []}
    towers = {"mlp": [TOWERS["mlp"]], "gated": [gated], "both": [gated, TOWERS["mlp"]]}
    scorer = Scorer(make(tmp_path, towers[tower], experts))
    context, table = request(20, ("user", "x"))
    looked_up: list[int] = []
    rows = Table.rows
    monkeypatch.setattr(Table, "rows", lambda self, ids: looked_up.append(len(ids)) or rows(self, ids))
    monkeypatch.setattr(SharedRows, "whole", lambda self: pytest.fail("the context is copied into each row"))
    assert len(scorer.score_candidates(context, table.drop(["user", "x"]))) == 20
    assert sorted(looked_up)[0] == 1 and len(looked_up) == 3


def test_a_path_that_takes_whole_rows_leaves_the_others_their_context_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer(make(tmp_path, [TOWERS["transformer"], TOWERS["mlp"]]))
    context, table = request(20, ("user", "x"))
    divided: list[Tensor] = []
    divide = Sharing.divide
    monkeypatch.setattr(Sharing, "divide", lambda self, weight: divided.append(weight) or divide(self, weight))
    scorer.score_candidates(context, table.drop(["user", "x"]))
    first = scorer.dense_arch.get_parameter("paths.1.linears.0.weight")
    assert any(weight is first for weight in divided)


ROW = {"user": 3, "item": 5, "tags": [1, 2], "x": 0.5, "z": 0.1}
ITEM = {"item": 5, "tags": [1, 2], "z": 0.1}
CONTEXT = {"user": 3, "x": 0.5}


@pytest.mark.parametrize(
    ("context", "items", "told"),
    [
        (CONTEXT, [ITEM, {**ITEM, "user": 1}], "row 1: 'user' is in the context already; give it in one of the two"),
        (CONTEXT, {**{name: [value] for name, value in ITEM.items()}, "x": [1.0]}, "column 'x' is in the context"),
        (CONTEXT, pa.Table.from_pylist([{**ITEM, "x": 1.0}]), "column 'x' is in the context already"),
        (CONTEXT, [{"item": 5, "tags": []}], "row 0: 'z' is missing"),
        (CONTEXT, {"item": [5], "tags": [[]]}, "column 'z' is missing"),
        (CONTEXT, [{**ITEM, "colour": 1}], "row 0: 'colour' is none of the model's columns, which are x, z, user"),
        ({**CONTEXT, "colour": 1}, [ITEM], "context: 'colour' is none of the model's columns"),
        ([CONTEXT], [ITEM], "the context is of type list; give a mapping"),
        (CONTEXT, 7, "rows to score are of type int"),
        ({**CONTEXT, "x": [0.5, "a"]}, [ITEM], "column 'x'"),
        (ROW, {}, "all columns are in the context; give an empty mapping for each candidate"),
        (ROW, [{}, {"user": 3}], "row 1: 'user' is in the context already"),
    ],
)
def test_a_column_in_both_or_neither_is_named(tmp_path: Path, context: Any, items: Any, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Scorer(make(tmp_path, TOWERS["mlp"])).score_candidates(context, items)


@pytest.mark.parametrize(
    ("context", "items", "told"),
    [
        ({**CONTEXT, "user": 40}, [ITEM], "context: sparse feature user .* out of range, such as 40"),
        (CONTEXT, [ITEM, {**ITEM, "item": 30}], "candidates, row 1: sparse feature item .* out of range, such as 30"),
        (CONTEXT, pa.Table.from_pylist([{"item": 1, "tags": [1]}]), "candidates: no column 'z'"),
    ],
)
def test_a_wrong_value_is_told_of_where_it_is(tmp_path: Path, context: Any, items: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        Scorer(make(tmp_path, TOWERS["mlp"])).score_candidates(context, items)


def test_ids_and_their_weights_stay_together(tmp_path: Path) -> None:
    scorer = Scorer(make(tmp_path, TOWERS["mlp"], tags={"weights": "w"}))
    expected = scorer.score([{**ROW, "w": [0.5, 2.0]}])
    for context in ({**CONTEXT, "tags": [1, 2], "w": [0.5, 2.0]}, CONTEXT):
        item = {name: value for name, value in {**ROW, "w": [0.5, 2.0]}.items() if name not in context}
        np.testing.assert_allclose(scorer.score_candidates(context, [item]), expected, rtol=0, atol=1e-6)
    with pytest.raises(RequestError, match="feature tags reads 'tags' and 'w'; give both in the context, or neither"):
        scorer.score_candidates({**CONTEXT, "tags": [1, 2]}, [{"item": 5, "z": 0.1, "w": [0.5, 2.0]}])


def written(x: Tensor) -> Tensor:
    """Whose later functions see what an earlier one wrote."""
    x.mul_(2)
    x[:, 1] = 7.0
    x += 1
    return F.linear(x, torch.ones(3, 6))


WEIGHT = torch.linspace(-1, 1, 24).view(4, 6)
FUNCTIONS: dict[str, Callable[[Tensor], Any]] = {
    "written": written,
    "linear": lambda x: F.linear(x, WEIGHT, torch.ones(4)),
    "as a weight": lambda x: F.linear(WEIGHT, x),
    "by itself": lambda x: F.linear(x, x),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "other norm": lambda x: torch.linalg.vector_norm(x, 1, dim=1, keepdim=True),
    "norm of columns": lambda x: torch.linalg.vector_norm(x, dim=0),
    "split": lambda x: [part * 2 for part in x.split([1, 3, 2], -1)],
    "split rows": lambda x: x.split([2, 3]),
    "split evenly": lambda x: x.split(2, 1),
    "chunk": lambda x: x.chunk(3, 1),
    "piece": lambda x: F.linear(x[:, 1:5], WEIGHT[:, 1:5]),
    "steps": lambda x: x[:, ::2],
    "rows": lambda x: x[1:3],
    "column": lambda x: x[:, 0],
    "cat": lambda x: torch.cat([x, x[:, :2], torch.ones(len(x), 1), x[:, :0]], 1) * 1.0,
    "cat rows": lambda x: torch.cat([x, x]),
    "cat of lists": lambda x: torch.cat((x, x), dim=-1),
    "stack": lambda x: torch.stack(x.split([1] * 6, -1), 1),
    "mul": lambda x: x * 3 + (2 * x),
    "mul by a row": lambda x: x * torch.arange(6.0)[None],
    "mul by a vector": lambda x: torch.arange(6.0) * x,
    "mul by a column": lambda x: x * torch.arange(5.0)[:, None],
    "mul by itself": lambda x: x * x,
    "gate": lambda x: F.linear(x * (2 * torch.sigmoid(F.linear(x[:, :2], torch.ones(6, 2)))), WEIGHT),
    "by name": lambda x: F.linear(input=torch.mul(input=x, other=x), weight=WEIGHT, bias=torch.ones(4)),
    "into": lambda x: torch.sigmoid(x, out=torch.empty(5, 6)) + torch.mul(x, 2, out=torch.empty(5, 6)),
    "relu": lambda x: F.relu(x) + x.relu(),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "shape": lambda x: torch.ones(x.shape) + len(x) + x.size(1) + x.dim() + x.numel() + x.ndim,
    "transposed": lambda x: x.t() @ x,
    "batch": lambda x: x - x.mean(0) + x.cumsum(0).flip(1),
    "einsum": lambda x: torch.einsum("bi,bj->bij", x, x),
    "reshape": lambda x: x.reshape(-1, 6) * 1.0 + x.reshape(-1, 3).reshape(-1, 6),
    "unflatten": lambda x: F.layer_norm(x.unflatten(1, (2, 3)), [3]),
    "out": lambda x: torch.add(x, 1, out=torch.empty(5, 6)),
    "clone": lambda x: x.clone().add_(1) + x,
    "copy": lambda x: torch.empty(5, 6).copy_(x),
    "numpy": lambda x: torch.from_numpy(x.numpy() + 1),
}


@pytest.mark.parametrize("shared", ["110100", "000001", "111111"])
@pytest.mark.parametrize("name", FUNCTIONS)
@torch.inference_mode()
def test_shared_rows_are_a_tensor_to_any_function(name: str, shared: str) -> None:
    """Those that towers of tomorrow may call: the rules fit, or the rows are whole."""
    random = torch.Generator().manual_seed(3)
    whole = torch.randn(5, 6, generator=random)
    of_context = torch.tensor([one == "1" for one in shared])
    whole[:, of_context] = whole[:1, of_context].clone()
    divided = SharedRows(whole[:1, of_context].clone(), whole[:, ~of_context].clone(), Sharing(of_context.tolist()))
    found, expected = FUNCTIONS[name](divided), FUNCTIONS[name](whole.clone())
    for one, other in zip(*((x,) if isinstance(x, Tensor) else x for x in (found, expected)), strict=True):
        one = one.whole() if isinstance(one, SharedRows) else one
        assert type(one) is Tensor
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tower", MODELS)
def test_single_experts_and_batch_norms_are_merged_and_answer_as_before(
    tmp_path: Path, tower: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, table = make(tmp_path, MODELS[tower], experts=1), tiny_table(200, 5)
    merged = Scorer(artifact)
    assert not expert_layers(merged.dense_arch) and not norms(merged.dense_arch)
    assert expert_layers(Scorer(make(tmp_path, MODELS[tower], experts=2)).dense_arch)
    monkeypatch.setattr("recsys.serving.scorer.merge_experts", lambda module: [])
    apart = Scorer(artifact)
    assert expert_layers(apart.dense_arch)
    expected = {"mlp": 2, "dcn_v2": 1, "qnn_alpha": 1, "paths": 2}
    assert len(norms(apart.dense_arch)) == expected.get(tower, 0)
    np.testing.assert_allclose(merged.score(table), apart.score(table), rtol=0, atol=1e-6)


def test_a_schema_that_was_checked_is_not_taken_for_another(tmp_path: Path) -> None:
    """Marks are metadata, by which Arrow's schemas do not differ."""
    artifact = make(tmp_path, TOWERS["mlp"], user={"ids": {"type": "hash"}})
    scorer, table = Scorer(artifact), pa.Table.from_pylist([ROW])
    expected = scorer.score(table)
    np.testing.assert_array_equal(scorer.score(table), expected)
    mark = marked(table.schema.field("user"), AppliedIds(HashedIds(40)), pa.int64())
    with pytest.raises(DataError, match="holds rows of a table already"):
        scorer.score(table.set_column(0, mark, table["user"]))
    np.testing.assert_array_equal(scorer.score(table), expected)


@pytest.mark.slow
@pytest.mark.parametrize("tower", MODELS)
def test_a_compiled_dense_arch_answers_alike(tmp_path: Path, tower: str) -> None:
    artifact = make(tmp_path, MODELS[tower])
    plain, compiled = Scorer(artifact), Scorer(artifact, compile=True)
    for rows in (1, 2, 70, 300):
        table = tiny_table(rows, rows)
        np.testing.assert_allclose(compiled.score(table), plain.score(table), rtol=0, atol=1e-6)
    context, table = request(30, ("user",))
    assert difference(compiled, context, table)[0] <= 1e-6


def test_candidates_read_the_tables_of_their_artefact(tmp_path: Path) -> None:
    """As rows do, also where they are all zeros."""
    artifact = make(tmp_path, TOWERS["mlp"])
    tables = {
        name: Table(torch.zeros(table.num_embeddings, table.dim), "float32") for name, table in artifact.tables.items()
    }
    context, table = request(10, ("user",))
    zeros = Scorer(replace(artifact, tables=tables))
    assert difference(zeros, context, table)[0] <= 1e-6
    assert np.abs(zeros.score(table) - Scorer(artifact).score(table)).max() > 1e-3


def test_several_threads_may_ask_at_once(tmp_path: Path) -> None:
    """Of different sets of columns, which are divided while others are asked about."""
    artifact = make(tmp_path, TOWERS["mlp"])
    requests = [request(40, context) for context in CONTEXTS[:-1]] * 5

    def ask(scorer: Scorer, one: tuple[dict[str, Any], pa.Table]) -> bytes:
        return scorer.score_candidates(one[0], one[1].drop(list(one[0]))).tobytes()

    expected = [ask(Scorer(artifact), one) for one in requests[: len(CONTEXTS) - 1]] * 5
    shared = Scorer(artifact)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda one: ask(shared, one), requests)) == expected
