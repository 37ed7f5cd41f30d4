"""Several towers over one embedding: the logit of their mean, what trains them, their names, what is refused."""

import json
from fnmatch import fnmatchcase
from itertools import combinations
from math import exp, log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import write_tiny_config
from torch import Tensor, nn

from recsys.config import Config, ConfigError, load_config
from recsys.model.cost import PARTS, cost_report, model_name
from recsys.model.dense_arch import logit_of_mean
from recsys.model.experts import expert_layers
from recsys.model.losses import TotalLoss
from recsys.model.ranker import build_ranker

PATHS = [{"type": "mlp", "hidden": [16, 8]}, {"type": "dcn_v2", "num_cross_layers": 2, "hidden": [10]}]


@pytest.fixture
def load(tmp_path: Path) -> Any:
    """The tiny config with paths, and more overrides."""

    def load(*overrides: str, paths: Any = PATHS) -> Config:
        given = ["model.tower=null", f"model.paths={json.dumps(paths)}", *overrides]
        return load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path), given)

    return load


def draw(num_paths: int, rows: int = 9) -> tuple[Tensor, SimpleNamespace]:
    """Logits of paths (P, B) in double precision, and what of a batch the losses read."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(num_paths, rows, generator=generator, dtype=torch.float64)
    labels = (torch.rand(rows, generator=generator) < 0.4).double()
    weight = torch.rand(rows, generator=generator, dtype=torch.float64)
    return logits, SimpleNamespace(labels=labels, weight=weight, loss_scale=0.25)


@pytest.mark.parametrize("num_paths", [2, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_probability_and_losses_are_those_of_the_formulas(num_paths: int, weighted: bool) -> None:
    paths, batch = draw(num_paths)
    batch.weight = batch.weight if weighted else None
    logits = logit_of_mean(paths)
    told = {"bce": 0.0, "bce_paths": 0.0, "agreement": 0.0}
    for row, label in enumerate(batch.labels.tolist()):
        each = [1 / (1 + exp(-logit)) for logit in paths[:, row].tolist()]
        mean = sum(each) / num_paths
        assert torch.sigmoid(logits[row]).item() == pytest.approx(mean, rel=1e-12)
        factor = 0.25 * (batch.weight[row].item() if weighted else 1.0)
        told["bce"] -= factor * log(mean if label else 1 - mean)
        told["bce_paths"] -= factor * sum(log(p if label else 1 - p) for p in each) / num_paths
        pairs = list(combinations(each, 2))
        told["agreement"] += factor * sum((p - q) ** 2 for p, q in pairs) / len(pairs)
    balance = torch.tensor(2.0)
    total, losses = TotalLoss()(logits, {"balance": balance}, batch, {"agreement": 0.7, "balance": 0.1}, paths)
    assert list(losses) == ["bce", "bce_paths", "agreement", "balance"]
    assert {name: losses[name].item() for name in told} == {
        name: pytest.approx(value, rel=1e-10) for name, value in told.items()
    }
    assert total.item() == pytest.approx(told["bce_paths"] + 0.7 * told["agreement"] + 0.2, rel=1e-7)
    assert losses["bce"] < losses["bce_paths"]


@pytest.mark.parametrize("num_paths", [2, 3])
@pytest.mark.parametrize("weighted", [True, False])
def test_the_gradient_is_that_of_the_total(num_paths: int, weighted: bool) -> None:
    paths, batch = draw(num_paths)
    batch.weight = batch.weight if weighted else None

    def total(paths: Tensor, weight: float) -> Tensor:
        return TotalLoss()(logit_of_mean(paths), {}, batch, {"agreement": weight}, paths)[0]

    paths.requires_grad_()
    assert torch.autograd.gradcheck(lambda paths: total(paths, 0.7), paths)
    (without,) = torch.autograd.grad(total(paths, 0.0), paths)
    factor = 0.25 * (batch.weight if weighted else 1.0)
    torch.testing.assert_close(without, factor * (paths.sigmoid() - batch.labels) / num_paths)
    (disagreement,) = torch.autograd.grad(total(paths, 1.0) - total(paths, 0.0), paths)
    assert disagreement.abs().max() > 0.01


@pytest.mark.parametrize("size", [80.0, 1e4])
def test_extreme_logits_stay_finite(size: float) -> None:
    """Of all combinations of signs; where both paths agree it is their logit, else the mean of 0 and 1."""
    paths = torch.tensor([[size, size, -size, -size], [size, -size, size, -size]], requires_grad=True)
    logits = logit_of_mean(paths)
    torch.testing.assert_close(logits, torch.tensor([size, 0.0, 0.0, -size]))
    batch = SimpleNamespace(labels=torch.tensor([0.0, 1.0, 1.0, 1.0]), weight=None, loss_scale=0.25)
    total, losses = TotalLoss()(logits, {}, batch, {"agreement": 1.0}, paths)
    assert losses["bce"].item() == pytest.approx((2 * size + 2 * log(2)) / 4)
    assert losses["agreement"].item() == pytest.approx(0.5)
    for value in (total, logits.sum()):
        (gradient,) = torch.autograd.grad(value, paths, retain_graph=True)
        assert gradient.isfinite().all()
    one_apart = torch.tensor([[size, -size], [2.0, 2.0]], dtype=torch.float64)
    probability = (torch.sigmoid(one_apart)).mean(0)
    torch.testing.assert_close(logit_of_mean(one_apart), torch.logit(probability))


@pytest.mark.parametrize(
    ("experts_in", "wanted"),
    [
        (None, ["paths.0.linears.0", "paths.0.linears.1", "paths.1.mlp.linears.0"]),
        (["paths.1.cross.*"], ["paths.1.cross.0", "paths.1.cross.1"]),
        (["paths.*", "heads.1"], ["paths.0.*", "paths.1.*", "heads.1"]),
    ],
)
def test_experts_go_into_any_path_and_base_weights_do_not_change(
    load: Any, experts_in: list[str] | None, wanted: list[str]
) -> None:
    dense = build_ranker(load("model.hilomoe=null", "stages.experts=null"), seed=3).dense_arch
    arch = build_ranker(load(f"model.hilomoe.experts_in={json.dumps(experts_in)}"), seed=3).dense_arch
    linears = [name for name, child in dense.named_modules() if type(child) is nn.Linear]
    assert {name for name in linears if "." not in name} == {"dense_projection"}
    assert {name for name in linears if name.startswith("heads")} == {"heads.0", "heads.1"}
    assert list(expert_layers(arch)) == [name for name in linears if any(fnmatchcase(name, one) for one in wanted)]
    state = arch.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in dense.state_dict().items())


def test_equal_paths_begin_at_different_weights_and_one_tower_has_the_names_it_had(load: Any) -> None:
    arch = build_ranker(load(paths=PATHS[:1] * 2), seed=3).dense_arch
    one, other = (arch.get_submodule(f"paths.{place}").linears[0].weight for place in (0, 1))
    assert one.shape == other.shape and not torch.equal(one, other)
    alone = build_ranker(load("model.paths=null", "model.tower={type: mlp, hidden: [4]}"), seed=3).dense_arch
    assert {name.partition(".")[0] for name in alone.state_dict()} == {"dense_projection", "tower", "head"}


def test_the_cost_is_that_of_all_paths_beside_one_tower(load: Any) -> None:
    paths = cost_report(load("model.replaces={type: mlp, hidden: [32, 16]}"))
    each = [
        cost_report(load("model.paths=null", f"model.tower={json.dumps(path)}", f"model.hilomoe={{experts_in: {of}}}"))
        for path, of in zip(PATHS, ("[tower.linears.*]", "[tower.mlp.*]"), strict=True)
    ]
    with_same_experts = cost_report(load("model.hilomoe={}")).cost
    for part in PARTS:
        shared = part in ("embedding", "projection")
        for found in ("flops", "parameters"):
            one, other = (getattr(report.cost, found)[part] for report in each)
            assert getattr(with_same_experts, found)[part] == (one if shared else one + other), (part, found)
    assert paths.against is not None and paths.against.model == "mlp 32x16"
    assert paths.against.flops["tower"] == 2 * (24 * 32 + 32 * 16) and paths.against.flops["head"] == 2 * 16
    name = "mlp 16x8 + dcn_v2 num_cross_layers=2 10"
    assert model_name(load("model.hilomoe=null", "stages.experts=null").model) == name
    assert paths.cost.model == f"hilomoe {name} L2 K3"
    dense = cost_report(load("model.hilomoe=null", "stages.experts=null"))
    assert dense.against is None and cost_report(load()).against == dense.cost


WIDE, PLAIN = {"type": "wdl", "hidden": [4]}, {"type": "mlp", "hidden": [4]}


@pytest.mark.parametrize(
    ("paths", "more", "message"),
    [
        (PATHS, ["model.tower={type: mlp}"], "model: has a tower and paths; set one of them to null"),
        (None, [], "model: has neither tower nor paths; give it a tower, or two"),
        (PATHS[:1], [], "model.paths: Tuple should have at least 2 items"),
        (PATHS[:1] * 17, [], "model.paths: Tuple should have at most 16 items"),
        ([PLAIN, {"type": "cnn"}], [], r"model\.paths\.1\.type: must be one of autoint, .*, found 'cnn'"),
        ([{"type": "mlp", "hiden": [4]}, PLAIN], [], r"model\.paths\.0\.hiden: unknown key; did you mean 'hidden'"),
        ([PLAIN, {"type": "mlp", "hidden": [4, 0]}], [], r"model\.paths\.1\.hidden\.1: .*greater than 0, found 0"),
        ([PLAIN, {"type": "pnn"}], [], r"model\.paths\.1\.type: pnn needs one width"),
        ([PLAIN, WIDE], [], r"model\.paths\.1\.wide: the first-order weight takes 4 numbers"),
        (
            [PLAIN, WIDE],
            ["tables.tag.embedding_dim=8", "model.dense_dim=8"],
            r"model\.paths\.1\.wide: the last four numbers .* model\.paths\.0 \(mlp\); take towers with wide in all",
        ),
        (
            None,
            ["model.tower={type: mlp}", "stages.joint.agreement_weight=0.1"],
            r"stages\.joint\.agreement_weight: weighs what model\.paths differ by, .* 0, or give model\.paths",
        ),
    ],
)
def test_what_means_nothing_is_refused_by_its_path(load: Any, paths: Any, more: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(*more, paths=paths)


def test_paths_that_are_all_wide_are_taken(load: Any) -> None:
    equal = "tables.tag.embedding_dim=8", "model.dense_dim=8"
    assert load(*equal, paths=[WIDE, {"type": "deepfm"}]).model.padding == 3
    assert load(*equal, paths=[PLAIN, {"type": "deepfm", "wide": False}]).model.padding == 0
