"""Dense archs compiled and in fewer bits: what they compute, what checkpoints hold of it, what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors
from tiny import take_tower, tiny_config, write_tiny_log
from torch import Tensor
from torch._dynamo.utils import counters

from recsys.config import ComputeConfig, Config, ConfigError, TowerSettings
from recsys.model.dense_arch import DenseArch, build_dense_arch
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks, full_precision, set_precision
from recsys.sharding.shard import shard
from recsys.training.compute import CompiledDenseArch, as_computed, begin_computing
from recsys.training.optimizers import begin_phase, phases

TOWERS = [get_args(cls.model_fields["type"].annotation)[0] for cls in TowerSettings.__subclasses__()]
EXPERTS: dict[str, dict[str, Any]] = {
    "none": {"hilomoe": None},
    "hilomoe": {},
    "mlora": {"hilomoe": None, "domain_experts": {"type": "mlora"}},
    "both": {"domain_experts": {"type": "mlora"}},
    "gate by domain": {"hilomoe": None, "domain_experts": {"type": "moe_mlora"}},
    "gate by features": {"hilomoe": None, "domain_experts": {"type": "moe_mlora", "gate": "features"}},
}
WEIGHTS = {"balance": 0.01, "z": 0.001, "diversity": 0.1}
ROWS = 8


def config_of(tmp_path: Path, *towers: dict[str, Any], **model: Any) -> Config:
    raw = tiny_config(tmp_path, tmp_path / "out")
    take_tower(raw, *towers)
    raw["model"] |= model
    if not raw["model"]["hilomoe"] and "domain_experts" not in model:
        del raw["stages"]["experts"]
    return as_config(raw, tmp_path)


def arch_of(config: Config, dtype: torch.dtype = torch.float64) -> DenseArch:
    """The dense arch of a config, every parameter of which has an effect."""
    torch.manual_seed(0)
    dense_arch = build_dense_arch(config.model, config.embedding_dims, num_dense_features=2, num_domains=3).to(dtype)
    for parameter in dense_arch.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return dense_arch


def inputs_of(config: Config, rows: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    pooled, dense = (
        torch.randn(rows, width, generator=generator, dtype=dtype) for width in (sum(config.embedding_dims.values()), 2)
    )
    return pooled.requires_grad_(), dense, torch.randint(0, 3, (rows,), generator=generator)


def step(call: Any, dense_arch: DenseArch, inputs: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Logits, losses, and the gradients of what is free, and of the pooled embeddings."""
    output = call(*inputs, WEIGHTS)
    loss = output.logits.square().sum() + sum(output.losses.values())
    wanted = [inputs[0], *(parameter for parameter in dense_arch.parameters() if parameter.requires_grad)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [output.logits, *output.losses.values(), *found]


def check_compiled(config: Config, backend: str = "aot_eager") -> None:
    """Steps are one graph that computes what the dense arch does; the last batch, of fewer rows, makes no other."""
    dense_arch = arch_of(config)
    frozen = [name for name, _ in dense_arch.named_parameters() if "linears" in name and "weight" in name][:1]
    for free in (True, False):  # as in two phases
        for name in frozen:
            dense_arch.get_parameter(name).requires_grad_(free)
        compiled = CompiledDenseArch(dense_arch, ROWS, backend)
        counters.clear()
        for seed, rows in enumerate((ROWS, ROWS, 3, 1, 0, ROWS)):
            inputs = inputs_of(config, rows)
            for name, buffer in dense_arch.named_buffers():
                if "running" in name:
                    buffer.fill_(0.5 + seed)
            wanted, found = (step(call, dense_arch, inputs) for call in (dense_arch, compiled))
            for one, other in zip(wanted, found, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
        assert counters["stats"]["unique_graphs"] == 1
        assert not counters["graph_break"]
    assert compiled.eval()(*inputs, WEIGHTS).logits.equal(dense_arch(*inputs, WEIGHTS).logits)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_is_one_graph_and_its_gradients_are_those_of_the_plain_one(tmp_path: Path) -> None:
    check_compiled(config_of(tmp_path, {"type": "mlp", "hidden": [8]}))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_paths_with_both_kinds_of_experts_and_batch_norms_are_compiled_whole(tmp_path: Path) -> None:
    tower = {"type": "mlp", "hidden": [16, 8], "normalization": "batch"}
    check_compiled(config_of(tmp_path, tower, {"type": "dcn_v2", "hidden": [8]}, **EXPERTS["both"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("tower", "experts"),
    # Each kind of experts has several towers; all pairs, which passed once, take ten minutes.
    [(tower, list(EXPERTS)[(n + k) % len(EXPERTS)]) for n, tower in enumerate(TOWERS) for k in (0, 3)],
)
def test_every_tower_is_compiled_whole(tmp_path: Path, tower: str, experts: str) -> None:
    sizes = {"model_dim": 8, "num_heads": 2} if tower == "transformer" else {}
    check_compiled(config_of(tmp_path, {"type": tower, **sizes}, **EXPERTS[experts]))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles for a CPU with g++")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_inductor_computes_the_same(tmp_path: Path) -> None:
    check_compiled(config_of(tmp_path, {"type": "dcn_v2", "hidden": [8]}), "inductor")


def _steps_under_ddp(ranks: Ranks, config: Config, compile: bool) -> tuple[list[np.ndarray], list[str]]:
    """Parameters after two steps of every phase of all stages, and the names under which the dense arch has them."""
    config = config.model_copy(update={"compute": ComputeConfig(compile=compile)})
    ranker = build_ranker(config, seed=3)
    dense_arch, sharded = ranker.dense_arch, shard(ranker, config, ranks, seed=3)
    for stage in config.stages:
        for phase in phases(config, stage):
            optimizers = begin_phase(sharded, dense_arch, config, stage, phase.number, num_steps=2)
            for number, rows in enumerate((config.data.batch_size, 5)):
                pooled, dense, domain = inputs_of(config, rows + ranks.rank * (rows == 5), torch.float32)
                pooled = pooled if not ranker.embeddings_frozen else pooled.detach()
                optimizers.set_learning_rates(number)
                optimizers.dense.zero_grad()
                output = ranker.dense_arch(pooled, dense, domain, config.stages[stage].loss_weights)
                (output.logits.square().mean() + 0.01 * sum(output.losses.values())).backward()
                optimizers.dense.step()
    state = dense_arch.state_dict()
    return [value.numpy() for value in state.values()], list(state)  # tensors would be gone with their process


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles for a CPU with g++")
def test_under_ddp_ranks_train_as_they_do_without(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"type": "mlp", "hidden": [16]}, **EXPERTS["both"])
    (plain, names), _ = run_ranks(2, _steps_under_ddp, config, False)
    (compiled, same), (other, _) = run_ranks(2, _steps_under_ddp, config, True, timeout=900.0)
    assert names == same and not any("_orig_mod" in name for name in names)
    for one, two, of_other_rank in zip(plain, compiled, other, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
        assert (two == of_other_rank).all()


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("log")
    write_tiny_log(directory)
    return directory


def train(log: Path, output_dir: Path, *overrides: str, timeout: float = 120.0) -> dict[str, Any]:
    path = output_dir.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tiny_config(log, output_dir), sort_keys=False))
    (done,) = run_module(1, "recsys.train", "--config", str(path), *overrides, timeout=timeout)
    assert done.code == 0, done.stderr
    summary: dict[str, Any] = json.loads((output_dir / "summary.json").read_text())
    return summary


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles for a CPU with g++")
def test_a_compiled_run_is_gone_on_with_by_a_plain_one(log: Path, tmp_path: Path) -> None:
    plain = train(log, tmp_path / "plain")
    compiled = train(
        log, tmp_path / "compiled", "compute.compile=true", "checkpoints.keep_every_steps=29", timeout=900.0
    )
    assert compiled["test"]["log_loss"] == pytest.approx(plain["test"]["log_loss"], abs=1e-5)
    tensors, like = (checkpoint_tensors(Path(of["checkpoint"]), tmp_path) for of in (compiled, plain))
    assert tensors.keys() == like.keys()
    start = f"resume={tmp_path / 'compiled' / 'checkpoints' / 'step-58'}"
    again = train(log, tmp_path / "again", start)
    assert again["steps"] == plain["steps"]
    assert again["test"]["log_loss"] == pytest.approx(plain["test"]["log_loss"], abs=1e-5)


@pytest.mark.parametrize("experts", EXPERTS)
def test_towers_multiply_in_bfloat16_in_training_alone(tmp_path: Path, experts: str) -> None:
    tower = {"type": "mlp", "hidden": [16, 8], "normalization": "layer"}
    config = config_of(tmp_path, tower, {"type": "dcn_v2", "hidden": [8]}, **EXPERTS[experts])
    dense_arch = arch_of(config, torch.float32)
    inputs = inputs_of(config, 200, torch.float32)
    plain = step(dense_arch, dense_arch, inputs)
    seen: list[torch.dtype] = []
    dense_arch.get_submodule("paths.0.linears.0").register_forward_hook(lambda *of: seen.append(of[2].dtype))
    assert as_computed(dense_arch, ComputeConfig(autocast="bfloat16"), 200) is dense_arch
    found = step(dense_arch, dense_arch, inputs)
    assert seen == [torch.bfloat16]
    assert {of.dtype for of in found} == {torch.float32}  # logits, losses, gradients: what is summed and what is stored
    assert not found[0].equal(plain[0])
    for one, other in zip(plain[:4], found[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert not set(found[0].tolist()) <= set(found[0].bfloat16().tolist())  # the head does not round
    dense_arch.eval()
    in_evaluation = dense_arch(*inputs, WEIGHTS).logits
    dense_arch.autocast = None
    assert in_evaluation.equal(dense_arch(*inputs, WEIGHTS).logits)


def test_a_run_with_all_that_a_cpu_has_is_close_to_a_plain_one(log: Path, tmp_path: Path) -> None:
    keys = ("compute.autocast=bfloat16", "optimizers.dense.fused=true", "metrics.train_auc=binned")
    tables = ("tables.user.data_type=fp16", "compute.qcomms={forward_precision: fp16}")
    summary = train(log, tmp_path / "out", *keys, *tables)
    assert summary["steps"] == 107
    assert summary["test"]["log_loss"] == pytest.approx(0.65, abs=0.02)
    assert summary["test"]["auc_error"] == 0.0  # that of evaluations is exact


def test_what_a_cpu_lacks_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^compute\.tf32: TF32 is a format of GPUs, .*; set it to false$"):
        begin_computing(ComputeConfig(tf32=True), cpu)
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent"))
    with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler \(apt install g\+\+\).*/nonexistent.*") as refused:
        begin_computing(ComputeConfig(compile=True), cpu)
    assert "\n" not in str(refused.value)


def test_batches_whose_size_the_labels_decide_are_not_compiled(tmp_path: Path) -> None:
    raw = tiny_config(tmp_path, tmp_path / "out")
    raw["data"]["label_null"] = "skip"
    raw["compute"] = {"compile": True}
    with pytest.raises(ConfigError, match=r"compute\.compile: a graph is of batches of one size, and data\.label_null"):
        as_config(raw, tmp_path)


def test_evaluation_does_not_round_to_tf32() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        set_precision(tf32=True)
        assert torch.get_float32_matmul_precision() == "high"
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
