"""Tables in fewer bits, and embeddings that are sent in fewer: what is stored and sent, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ranks import run_module, run_ranks
from runs import as_config, checkpoint_tensors
from safetensors.torch import load_file
from tiny import tiny_config, write_tiny_log
from torchrec import KeyedJaggedTensor

from recsys.config import Config, ConfigError
from recsys.model.names import POOLED
from recsys.model.ranker import build_ranker
from recsys.runtime import Ranks
from recsys.sharding.memory import Beside
from recsys.sharding.shard import local_parts, shard

HALVES = {"tables.user.data_type": "fp16", "tables.item.data_type": "fp16"}


def config_of(tmp_path: Path, tables: dict[str, Any], **compute: Any) -> Config:
    raw = tiny_config(tmp_path, tmp_path / "out")
    for name, keys in tables.items():
        raw["tables"][name] |= keys
    raw["compute"] = compute
    return as_config(raw, tmp_path)


def looked_up(ranks: Ranks, config: Config) -> tuple[dict[str, torch.dtype], np.ndarray, np.ndarray]:
    """By table what it is stored in, the pooled embeddings of rows of three ids, and how the weights then moved."""
    ranker = build_ranker(config, seed=3)
    sharded = shard(ranker, config, ranks, seed=3)
    collection = ranker.collections[POOLED]
    types = {
        name.split(".")[1]: part.dtype
        for name, value in collection.state_dict().items()
        for part, _, _ in local_parts(value)
    }
    for group in sharded.sparse_optimizer.param_groups:
        group["lr"] = 0.1
    ids = torch.arange(12) % 7 + ranks.rank
    pooled = collection(
        KeyedJaggedTensor(keys=["user", "item", "tags"], values=ids, lengths=torch.tensor([2, 3, 1, 1, 2, 3]))
    ).wait()
    values = torch.cat([pooled[name] for name in ("user", "item")], 1)
    before = [part.clone() for value in collection.state_dict().values() for part, _, _ in local_parts(value)]
    values.square().sum().backward()
    after = [part for value in collection.state_dict().values() for part, _, _ in local_parts(value)]
    moved = torch.stack([(one.float() - two.float()).abs().max() for one, two in zip(before, after, strict=True)])
    return types, values.detach().numpy(), moved.numpy()  # tensors would be gone with their process


def test_ranks_send_pooled_embeddings_in_the_format_that_is_asked_for(tmp_path: Path) -> None:
    plain = run_ranks(2, looked_up, config_of(tmp_path, {}))
    settings = {"forward_precision": "fp16", "backward_precision": "fp16", "backward_loss_scale": 1024.0}
    for (_, wanted, moves), (_, found, moved) in zip(
        plain, run_ranks(2, looked_up, config_of(tmp_path, {}, qcomms=settings)), strict=True
    ):
        assert found.dtype == np.float32
        assert (found == wanted.astype(np.float16)).all() and (found != wanted).any()
        np.testing.assert_allclose(moved, moves, rtol=1e-2, atol=1e-4)


def test_tables_are_stored_in_fewer_bits_and_trained(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"user": {"data_type": "fp16"}})
    ((types, found, moved),) = run_ranks(1, looked_up, config)
    ((_, wanted, moves),) = run_ranks(1, looked_up, config_of(tmp_path, {}))
    assert types == {"user": torch.float16, "item": torch.float32, "tag": torch.float32}
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    assert (found != wanted).any()
    np.testing.assert_allclose(moved, moves, rtol=1e-2, atol=1e-3)
    assert [Beside.of(config.tables[name], config).itemsize for name in ("user", "item")] == [2, 4]


def test_what_does_not_go_with_fewer_bits_is_refused(tmp_path: Path) -> None:
    def refused(match: str, tables: dict[str, Any], **sections: Any) -> None:
        raw = tiny_config(tmp_path, tmp_path / "out")
        for name, keys in tables.items():
            raw["tables"][name] |= keys
        with pytest.raises(ConfigError, match=match):
            as_config(raw | sections, tmp_path)

    half = {"user": {"data_type": "fp16"}}
    refused(r"tables\.tag: data_type fp16 is for tables with a fused optimizer", {"tag": {"data_type": "fp16"}})
    refused(r"tables\.user: max_norm does not go with data_type fp16", {"user": {"data_type": "fp16", "max_norm": 1.0}})
    for optimizers, changes in (
        ({"average": {"tables": "sweep"}}, "optimizers.average.tables sweep"),
        ({"average": {"tables": "touched"}}, "optimizers.average.tables touched"),
        ({"sparse": {"weight_decay": 0.1, "weight_decay_mode": "decoupled"}}, "weight_decay_mode decoupled"),
    ):
        refused(rf"tables\.user\.data_type: fp16 would lose what {changes} adds", half, optimizers=optimizers)
    refused(
        "backward_loss_scale is for backward_precision fp16, and it is fp32",
        {},
        compute={"qcomms": {"backward_loss_scale": 8.0}},
    )


def _refusals(ranks: Ranks, configs: list[Config]) -> list[str]:
    told = []
    for config in configs:
        with pytest.raises(ConfigError) as refused:
            shard(build_ranker(config, seed=0), config, ranks, seed=0)
        told.append(str(refused.value))
    return told


def test_tables_in_bfloat16_are_refused_and_sending_in_it_is_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(?s)data_type.*'fp32' or 'fp16'"):
        config_of(tmp_path, {"user": {"data_type": "bf16"}})
    sent = config_of(tmp_path, {}, qcomms={"forward_precision": "bf16"})
    assert run_ranks(1, _refusals, [sent]) == [
        ["compute.qcomms: gloo sends no bf16, and this run is on a CPU; take fp16 or fp32"]
    ]


@pytest.mark.slow
def test_a_model_of_tables_in_fp16_is_resumed_evaluated_and_served(tmp_path: Path) -> None:
    write_tiny_log(tmp_path)

    def run(name: str, module: str, *arguments: str) -> str:
        (done,) = run_module(1, module, *arguments)
        assert done.code == 0, (name, done.stderr)
        return done.stdout

    keys = [f"{path}={value}" for path, value in HALVES.items()]
    for name, more in (("whole", ["checkpoints.keep_every_steps=29", "checkpoints.every_steps=29"]), ("again", [])):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tmp_path, tmp_path / name), sort_keys=False))
        start = [f"resume={tmp_path / 'whole/checkpoints/step-29'}"] if name == "again" else []
        run(name, "recsys.train", "--config", str(path), *keys, *more, *start)
    whole, again = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "again"))
    assert again["test"] == whole["test"]
    tensors = checkpoint_tensors(Path(whole["checkpoint"]), tmp_path)
    assert tensors["model.embedding_bag_collection.embedding_bags.user.weight"].dtype == torch.float16
    told = json.loads(run("evaluate", "recsys.evaluate", "--checkpoint", whole["checkpoint"], "--json"))
    assert told["model"] == whole["test"]
    artifact = tmp_path / "artifact"
    run("export", "recsys.export", "--checkpoint", whole["checkpoint"], "--output", str(artifact))
    tables = load_file(next(artifact.glob("tables*")))
    assert {of.dtype for of in tables.values()} == {torch.float32}
