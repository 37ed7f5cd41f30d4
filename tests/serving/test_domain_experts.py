"""Models that adapt to domains, served: any row by its own, alone, among others, as a candidate, and by a program."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from ranks import run_module, run_ranks
from runs import as_config, train_on
from test_scorer import TOWERS, predicted
from tiny import take_tower, tiny_config, tiny_table, write_tiny_log

from recsys.data.storage import DataError
from recsys.model.dense_arch import build_dense_arch
from recsys.model.experts import domain_linears, expert_layers
from recsys.serving import Artifact, Scorer
from recsys.serving.artifact import Manifest
from recsys.serving.formats import load_program, write_program
from recsys.serving.scorer import RequestError
from recsys.serving.tables import Table
from recsys.training.parity import BOUNDS

COLUMNS = ("user", "item", "tags", "x", "z", "domain")
KINDS: dict[str, dict[str, Any]] = {
    "mlora": {"type": "mlora", "rank": 2},
    "domain_gate": {"type": "moe_mlora", "num_experts": 6},
    "feature_gate": {"type": "moe_mlora", "gate": "features"},
    "uniform": {"type": "moe_mlora", "gate": "uniform"},
}
OF_THE_PAPER = ("wdl", "nfm", "autoint", "deepfm", "pnn", "dcn", "xdeepfm", "fibinet")


def make(folder: Path, tower: str, kind: str, *, routed: bool = False, **domain: Any) -> Artifact:
    """An artefact of the tiny config, in memory, whose experts are drawn at random; `domain` is another one."""
    raw = tiny_config(folder, folder)
    raw["data"]["domain"] = {"column": "domain", **domain} if domain else raw["data"]["domain"]
    take_tower(raw, TOWERS[tower])
    raw["model"] |= {"domain_experts": KINDS[kind], "hilomoe": {"num_layers": 2, "num_experts": 2} if routed else None}
    config = as_config(raw, folder)
    torch.manual_seed(7)
    arch = build_dense_arch(
        config.model,
        config.embedding_dims,
        num_dense_features=2,
        num_domains=config.num_domains,
        with_others=config.has_other_domains,
    )
    for layer in expert_layers(arch).values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)  # type: ignore[attr-defined]
    for linear in domain_linears(arch).values():
        for parameter in linear.domain_experts.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    if arch.domain_adaptation is not None and arch.domain_adaptation.gate is not None:
        arch.domain_adaptation.use_gate()
    tables = {
        name: Table(torch.randn(table.num_embeddings, table.embedding_dim), "float32")
        for name, table in config.tables.items()
    }
    return Artifact(folder, Manifest(config.name, "float32", 0, "joint"), config, arch.state_dict(), tables)


@pytest.mark.parametrize("tower", OF_THE_PAPER)
def test_only_hidden_layers_of_the_deep_part_adapt(tmp_path: Path, tower: str) -> None:
    """Neither the other parts of the paper's towers nor the head."""
    arch = Scorer(make(tmp_path, tower, "mlora")).dense_arch
    deep = {name for name, child in arch.named_modules() if isinstance(child, torch.nn.Linear) and ".mlp." in name}
    assert set(domain_linears(arch)) == deep != set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("tower", "routed"),
    [("mlp", False), ("mlp", True), ("transformer", False), *((tower, False) for tower in OF_THE_PAPER[::3])],
)
def test_candidates_are_scored_as_rows_by_their_own_domains(
    tmp_path: Path, tower: str, kind: str, routed: bool
) -> None:
    scorer = Scorer(make(tmp_path, tower, kind, routed=routed))
    assert set(scorer.columns) == set(COLUMNS)
    assert scorer.dense_arch.domain_adaptation.folded is (kind != "feature_gate" and not routed)  # type: ignore[union-attr]
    rows = tiny_table(40, 5).select(COLUMNS).to_pylist()
    alone = np.concatenate([scorer.score([row]) for row in rows])
    np.testing.assert_allclose(scorer.score(rows), alone, atol=2e-6)
    for shared in (("user", "domain"), ("user",)):
        context = {name: rows[0][name] for name in shared}
        candidates = [{name: value for name, value in row.items() if name not in shared} for row in rows]
        expected = scorer.score([{**row, **context} for row in rows])
        np.testing.assert_allclose(scorer.score_candidates(context, candidates), expected, atol=2e-6)
    other = scorer.score([{**row, "domain": (row["domain"] + 1) % 3} for row in rows])
    assert bool(np.abs(other - alone).max() > 1e-5) is (kind != "uniform")


@pytest.mark.parametrize("kind", KINDS)
def test_requests_of_several_threads_do_not_meet(tmp_path: Path, kind: str) -> None:
    scorer = Scorer(make(tmp_path, "mlp", kind))
    rows = tiny_table(12, 5).select(COLUMNS[:-1]).to_pylist()
    requests = [[{**row, "domain": domain} for row in rows[: 3 + domain * 4]] for domain in range(3)] * 20
    expected = [scorer.score(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(scorer.score, requests), expected, strict=True):
            np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("kind", KINDS)
def test_programs_take_the_domain(tmp_path: Path, kind: str) -> None:
    scorer = Scorer(make(tmp_path, "mlp", kind))
    write_program(scorer.dense_arch, 20, 2, "torch-export", tmp_path / "dense.pt2")
    program = load_program("torch-export", tmp_path / "dense.pt2")
    for rows in (1, 2, 50):
        inputs = torch.randn(rows, 20), torch.randn(rows, 2), torch.arange(rows) % 3
        torch.testing.assert_close(program(*inputs), scorer.dense_arch(*inputs)[0])
        with torch.inference_mode():  # in which the scorer's is folded
            torch.testing.assert_close(program(*inputs), scorer.dense_arch(*inputs)[0])


@pytest.mark.parametrize("kind", ["mlora", "domain_gate"])
def test_rows_of_no_domain_are_scored_by_the_backbone(tmp_path: Path, kind: str) -> None:
    """Of a column of strings: an unknown one, and null, in rows and in the context of candidates."""
    artifact = make(tmp_path, "mlp", kind, values=["home", "search"], unseen="backbone")
    scorer = Scorer(artifact)
    row = tiny_table(1, 5).select(COLUMNS[:-1]).to_pylist()[0]
    home, search, unknown, null = scorer.score([{**row, "domain": name} for name in ("home", "search", "cart", None)])
    assert unknown == null and len({home, search, unknown}) == 3
    assert scorer.score_candidates({"domain": "cart"}, [row])[0] == pytest.approx(unknown, abs=1e-6)
    without = {name: 0 * value if ".domain_experts." in name else value for name, value in artifact.dense.items()}
    backbone = Scorer(replace(artifact, dense=without))
    assert backbone.score([{**row, "domain": "home"}])[0] == pytest.approx(unknown, abs=1e-6)
    with pytest.raises(DataError, match=r"column .domain. .* has type int64; strings are needed"):
        scorer.score([{**row, "domain": 1}])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "feature_gate"])
@pytest.mark.parametrize("unseen", [False, True])
def test_folded_models_answer_as_exports_are_held_to(tmp_path: Path, kind: str, unseen: bool) -> None:
    """Rows of several domains, of one, and one row, within the bound between an export and its checkpoint's model."""
    domain = {"column": "domain", "values": [0, 1], "unseen": "backbone"} if unseen else {}
    artifact = make(tmp_path, "deepfm", kind, **domain)
    folded, apart = Scorer(artifact), Scorer(artifact)
    apart.dense_arch.domain_adaptation.folded = False  # type: ignore[union-attr]
    table = tiny_table(60, 5).select(COLUMNS)
    of_one = [table.filter(pc.field("domain") == number) for number in range(3)]
    for rows in (table, *of_one, table.slice(0, 1), table.slice(0, 0)):
        np.testing.assert_allclose(folded.score(rows), apart.score(rows), rtol=0, atol=BOUNDS["float32"])


@contextmanager
def of_the_caller(setting: str) -> Iterator[None]:
    """What a program may have set for models of its own."""
    if setting == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
        return
    torch.set_default_dtype(torch.float64 if setting == "dtype" else torch.float32)
    torch.set_default_device("meta" if setting == "device" else None)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("setting", ["autocast", "dtype", "device"])
@pytest.mark.parametrize("kind", ["domain_gate", "feature_gate"])
def test_settings_of_the_caller_change_no_bit(tmp_path: Path, kind: str, setting: str) -> None:
    """Neither of a model that was opened before, nor of one that is opened, and folded, among them."""
    artifact = make(tmp_path, "deepfm", kind)
    table = tiny_table(40, 5).select(COLUMNS)

    def answers(scorer: Scorer) -> bytes:
        rows, candidates = scorer.score(table), scorer.score_candidates({"user": 3}, table.drop(["user"]))
        return np.concatenate([rows, candidates]).tobytes()

    before = Scorer(artifact)
    expected = answers(before)
    with of_the_caller(setting):
        assert answers(before) == expected
        among = Scorer(artifact)
    assert answers(among) == expected


def test_domains_that_no_row_may_have_are_named(tmp_path: Path) -> None:
    scorer = Scorer(make(tmp_path, "mlp", "mlora"))
    row = tiny_table(1, 5).select(COLUMNS).to_pylist()[0]
    with pytest.raises(DataError, match="row 0: domain column 'domain' has 1 value out of range, such as 3"):
        scorer.score([{**row, "domain": 3}])
    with pytest.raises(DataError, match="domain column 'domain' has 1 null"):
        scorer.score([{**row, "domain": None}])
    with pytest.raises(RequestError, match="'domain' is missing"):
        scorer.score([{name: value for name, value in row.items() if name != "domain"}])


def test_a_checkpoint_predicts_by_the_domain_that_rows_have(tmp_path: Path) -> None:
    """On two ranks, one of which has no file, what evaluation does."""
    log, output = tmp_path / "log", tmp_path / "out"
    write_tiny_log(log, {"train": 200, "valid": 40, "test": 90}, files=1)
    raw = tiny_config(log, output)
    raw["model"] |= {"domain_experts": KINDS["mlora"], "hilomoe": None}
    joint = {"trains": "all", "steps": 10, "learning_rate": 0.05, "sparse_learning_rate": 0.1}
    run_ranks(1, train_on, as_config({**raw, "stages": {"joint": joint}}, tmp_path))
    checkpoint = output / "checkpoints" / "step-10"
    rows = pq.read_table(log / "test" / "part-0.parquet").drop(["label", "truth"])
    for name, table in (("rows", rows), ("without", rows.drop(["domain"]))):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    options = ("recsys.predict", "--checkpoint", str(checkpoint), "--output", f"{tmp_path}/told", "--input")
    done = run_module(2, *options, f"{tmp_path}/rows.parquet")
    assert [one.code for one in done] == [0, 0], done
    found = pq.read_table(tmp_path / "told")["probability"].to_numpy()
    np.testing.assert_allclose(found, predicted(checkpoint, tmp_path / "evaluated"), rtol=0, atol=1e-6)
    (refused,) = run_module(1, *options, f"{tmp_path}/without.parquet")
    assert refused.code == 2 and "no column 'domain'" in refused.stderr and refused.stderr.count("\n") == 1
