"""The ranker: features by name, freezing without a graph, losses that add up over ranks and batches."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
from tiny import write_tiny_config
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor

from recsys.config import Config, ConfigError, load_config
from recsys.data.batch import Batch
from recsys.model.dense_arch import EmbeddingDropout, build_dense_arch
from recsys.model.experts import expert_layers
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.names import POOLED
from recsys.model.ranker import MeanPooling, Ranker, RankerOutput, build_ranker

CPU = torch.device("cpu")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path))


@pytest.fixture
def ranker(config: Config) -> Ranker:
    """With tables on the CPU and experts that do something."""
    torch.manual_seed(0)
    ranker = build_ranker(config, seed=1, device=CPU)
    for layer in expert_layers(ranker).values():
        nn.init.normal_(layer.lora_B)
    return ranker


def make_batch(rows: Sequence[int], *, loss_scale: float) -> Batch:
    """Rows of a fixed set of 12 examples; row r has r % 3 tags."""
    dense = torch.randn(12, 2, generator=torch.Generator().manual_seed(2))
    ids = [[[row] for row in rows], [[2 * row] if row % 4 else [] for row in rows], [[row] * (row % 3) for row in rows]]
    return Batch(
        dense_features=dense[list(rows)],
        sparse_features=KeyedJaggedTensor(
            keys=["user", "item", "tags"],
            values=torch.tensor([i for feature in ids for bag in feature for i in bag], dtype=torch.int64),
            lengths=torch.tensor([len(bag) for feature in ids for bag in feature], dtype=torch.int32),
            stride=len(rows),
        ),
        labels=torch.tensor([row % 2 for row in rows], dtype=torch.float32),
        reference=torch.empty(0, dtype=torch.float64),
        domain=torch.tensor([row % 3 for row in rows], dtype=torch.int64),
        loss_scale=loss_scale,
    )


def gradients(ranker: Ranker, batch: Batch) -> tuple[RankerOutput, dict[str, Tensor]]:
    ranker.zero_grad(set_to_none=True)
    loss, output = ranker(batch)
    loss.backward()
    return output, {name: p.grad for name, p in ranker.named_parameters() if p.grad is not None}


class PlannedCollection(nn.Module):
    """Yields the pooled features of a collection in another order, as a sharded one does."""

    def __init__(self, collection: EmbeddingBagCollection, order: Sequence[str]) -> None:
        super().__init__()
        self.collection, self.order = collection, order

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        pooled = self.collection(features).to_dict()
        return KeyedTensor(
            list(self.order),
            [pooled[key].shape[1] for key in self.order],
            torch.cat([pooled[k] for k in self.order], 1),
        )


class BagSizes(nn.Module):
    """Pools the number of ids of each bag; takes no rows at all too, which TorchRec's does only when sharded."""

    def __init__(self, dims: dict[str, int]) -> None:
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.ones(len(dims), sum(dims.values())))

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        sizes = features.lengths().view(len(self.dims), -1).t().float()
        return KeyedTensor(list(self.dims), list(self.dims.values()), sizes @ self.weight)


@pytest.mark.parametrize("order", [["tags", "user", "item"], ["item", "tags", "user"]])
def test_logits_do_not_depend_on_the_order_in_which_features_are_pooled(ranker: Ranker, order: list[str]) -> None:
    batch = make_batch(range(12), loss_scale=1 / 12)
    _, wanted = ranker(batch)
    collection = PlannedCollection(ranker.collections[POOLED], order)
    planned = Ranker({POOLED: collection}, ranker.dense_arch, ranker.feature_names)
    _, found = planned(batch)
    assert torch.equal(found.logits, wanted.logits)
    planned.feature_names = order
    with pytest.raises(AssertionError):
        torch.testing.assert_close(planned(batch)[1].logits, wanted.logits)


@pytest.mark.parametrize("weighted", [False, True])
def test_means_and_their_gradients_are_those_of_the_formula(weighted: bool) -> None:
    """With ids that have weights as well, where fbgemm's own means have undivided gradients."""
    lengths = torch.tensor([3, 0, 1, 2, 1, 4], dtype=torch.int32)
    values = torch.randint(0, 9, (11,))
    features = KeyedJaggedTensor(["a", "b"], values, torch.rand(11) if weighted else None, lengths=lengths, stride=3)
    tables = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    weights = features.weights_or_none()
    bags, at = [], 0
    for feature in (0, 1):
        for length in lengths[3 * feature : 3 * feature + 3].tolist():
            of = tables[feature][values[at : at + length]]
            bags.append((of if weights is None else of * weights[at : at + length, None]).sum(0))
            at += length
    sums = torch.cat([torch.stack(bags[:3]), torch.stack(bags[3:])], 1)
    found = MeanPooling([4, 4], [True, False])(sums, features)
    means = torch.cat([sums[:, :4] / lengths[:3].clamp(min=1)[:, None], sums[:, 4:]], 1)
    torch.testing.assert_close(found, means)
    gradient = torch.randn_like(found)
    torch.testing.assert_close(
        *(torch.autograd.grad(of, tables, gradient, retain_graph=True)[0] for of in (found, means))
    )


def test_frozen_embeddings_have_no_graph_and_the_same_logits(ranker: Ranker) -> None:
    batch = make_batch(range(12), loss_scale=1 / 12)
    free, free_gradients = gradients(ranker, batch)
    seen = []
    ranker.dense_arch.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    ranker.embeddings_frozen = True
    frozen, frozen_gradients = gradients(ranker, batch)
    (pooled,) = seen
    assert not pooled.requires_grad
    assert torch.equal(frozen.logits, free.logits)
    tables = {name for name in free_gradients if name.startswith("embedding_bag_collection.")}
    assert len(tables) == 3
    assert set(frozen_gradients) == set(free_gradients) - tables
    for name, gradient in frozen_gradients.items():
        torch.testing.assert_close(gradient, free_gradients[name])


def test_gradients_reach_every_parameter(ranker: Ranker) -> None:
    _, found = gradients(ranker, make_batch(range(12), loss_scale=1 / 12))
    assert set(found) == {name for name, _ in ranker.named_parameters()}
    assert all(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("cut", [6, 2, 11])
def test_mean_over_ranks_of_scaled_losses_is_that_of_the_whole_batch(ranker: Ranker, cut: int) -> None:
    whole, whole_gradients = gradients(ranker, make_batch(range(12), loss_scale=1 / 12))
    halves = [gradients(ranker, make_batch(rows, loss_scale=2 / 12)) for rows in (range(cut), range(cut, 12))]
    torch.testing.assert_close(sum(output.losses["bce"] for output, _ in halves) / 2, whole.losses["bce"])
    for name, gradient in whole_gradients.items():
        mean = sum(part[name] for _, part in halves) / 2
        torch.testing.assert_close(mean, gradient, rtol=1e-4, atol=1e-6)


def test_total_loss_is_the_weighted_sum_of_its_parts(ranker: Ranker) -> None:
    ranker.loss_weights = {"balance": 0.3, "z": 0.7, "diversity": 1.1}
    loss, output = ranker(make_batch(range(12), loss_scale=1 / 12))
    assert output.losses["balance"] > 0 and output.losses["z"] > 0 and output.losses["diversity"] > 0
    wanted = (
        output.losses["bce"]
        + 0.3 * output.losses["balance"]
        + 0.7 * output.losses["z"]
        + 1.1 * output.losses["diversity"]
    )
    torch.testing.assert_close(loss.detach(), wanted)
    assert not any(tensor.requires_grad for tensor in (output.logits, output.labels, output.domain))
    assert not any(loss.requires_grad for loss in output.losses.values())
    wanted = nn.functional.binary_cross_entropy_with_logits(output.logits, output.labels)
    torch.testing.assert_close(output.losses["bce"], wanted)


def test_auxiliary_losses_are_means_over_all_expert_layers(ranker: Ranker) -> None:
    _, output = ranker(make_batch(range(12), loss_scale=1 / 12))
    routings = [layer.routing for layer in expert_layers(ranker).values()]
    losses = torch.cat([routing.balance_loss() for routing in routings if routing is not None])
    assert len(losses) == 4
    torch.testing.assert_close(output.losses["balance"], losses.mean())


def test_diversity_is_computed_only_where_it_has_a_weight(ranker: Ranker, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, calls = make_batch(range(12), loss_scale=1 / 12), []
    loss = HiLoMoELinear.diversity_loss
    monkeypatch.setattr(HiLoMoELinear, "diversity_loss", lambda layer: calls.append(layer) or loss(layer))
    assert "diversity" not in ranker(batch)[1].losses
    assert not calls
    ranker.loss_weights = {"diversity": 0.5}
    diversity = ranker(batch)[1].losses["diversity"]
    assert len(calls) == 2
    torch.testing.assert_close(diversity, torch.cat([loss(layer) for layer in calls]).mean().detach())


def test_output_tells_each_rows_domain(ranker: Ranker) -> None:
    assert ranker(make_batch(range(5), loss_scale=1 / 5))[1].domain.tolist() == [0, 1, 2, 0, 1]


def test_auxiliary_losses_are_zero_while_no_expert_is_active(ranker: Ranker) -> None:
    ranker.loss_weights = dict.fromkeys(("balance", "z", "diversity"), 1.0)
    batch = make_batch(range(12), loss_scale=1 / 12)
    ranker(batch)  # leaves routings behind, which must not count any more
    for layer in expert_layers(ranker).values():
        layer.experts_active = False
    loss, output = ranker(batch)
    assert output.losses["balance"] == output.losses["z"] == output.losses["diversity"] == 0
    assert torch.equal(loss, output.losses["bce"])


def test_empty_batch_gives_zero_loss_and_zero_gradients(ranker: Ranker) -> None:
    ranker = Ranker({POOLED: BagSizes({"user": 8, "item": 8, "tags": 4})}, ranker.dense_arch, ranker.feature_names)
    ranker.loss_weights = {"balance": 1.0, "z": 1.0}
    loss, output = ranker(make_batch([], loss_scale=2 / 12))
    loss.backward()
    assert loss == output.losses["bce"] == output.losses["balance"] == output.losses["z"] == 0
    assert output.logits.shape == output.labels.shape == (0,)
    for name, parameter in ranker.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_initial_weights_depend_on_the_seed_alone(config: Config) -> None:
    one = build_ranker(config, seed=1).dense_arch.state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = build_ranker(config, seed=1).dense_arch.state_dict(), build_ranker(config, seed=2).dense_arch
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again[name], weight) for name, weight in one.items())
    assert not torch.equal(other.state_dict()["tower.linears.0.weight"], one["tower.linears.0.weight"])


def test_tables_follow_the_config(config: Config) -> None:
    collection = build_ranker(config, seed=1).collections[POOLED]
    assert isinstance(collection, EmbeddingBagCollection)
    found = {table.name: table for table in collection.embedding_bag_configs()}
    assert all(isinstance(table, EmbeddingBagConfig) for table in found.values())
    assert {name: (t.num_embeddings, t.embedding_dim, t.feature_names) for name, t in found.items()} == {
        "user": (40, 8, ["user"]),
        "item": (30, 8, ["item"]),
        "tag": (12, 4, ["tags"]),
    }
    # Means are made of the sums that all tables pool.
    assert [found[name].pooling.value for name in ("user", "item", "tag")] == ["SUM", "SUM", "SUM"]
    mean_pooling = build_ranker(config, seed=1).mean_pooling
    assert mean_pooling is not None and mean_pooling._means.tolist() == [True, True, False]
    assert all(parameter.is_meta for parameter in collection.parameters())


@pytest.mark.parametrize(
    "tower",
    [
        "{type: mlp, hidden: [4]}",
        "{type: dcn_v2, hidden: [4]}",
        "{type: transformer}",
        "{type: final_mlp, first_hidden: [8], second_hidden: [4], first_context: [user]}",
        "{type: wdl, hidden: [4]}",
        "{type: deepfm, hidden: [4]}",
        "{type: nfm, hidden: [4]}",
        "{type: pnn, hidden: [4]}",
        "{type: dcn, hidden: [4]}",
        "{type: dlrm, bottom_hidden: [4], hidden: [4]}",
        "{type: xdeepfm, cin_hidden: [4], hidden: [4]}",
        "{type: fibinet, hidden: [4]}",
        "{type: autoint, hidden: [4]}",
        "{type: masknet, hidden: [4]}",
        "{type: gdcn, hidden: [4]}",
        "{type: qnn, hidden: [4]}",
        "{type: qnn_alpha, num_heads: 2}",
    ],
)
@pytest.mark.parametrize("num_dense_features", [0, 2])
@pytest.mark.parametrize("experts", [True, False])
def test_every_tower_gives_one_logit_a_row(tmp_path: Path, tower: str, num_dense_features: int, experts: bool) -> None:
    overrides = [f"model.tower={tower}", "model.dense_dim=8", "tables.tag.embedding_dim=8"]
    overrides += [] if experts else ["model.hilomoe=null", "stages.experts=null"]
    config = load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path), overrides)
    arch = build_dense_arch(config.model, {"user": 8, "item": 8}, num_dense_features=num_dense_features)
    logits, losses, *_ = arch(torch.randn(5, 16), torch.randn(5, num_dense_features), loss_weights={"diversity": 1.0})
    assert logits.shape == (5,)
    assert bool(expert_layers(arch)) == experts
    assert set(losses) == {"balance", "z", "diversity"}
    assert all((loss > 0) == experts for loss in losses.values())


@pytest.mark.parametrize("experts_in", [["head"], ["tower.linears.0"], ["tower.*", "dense_projection"]])
def test_experts_go_where_the_config_puts_them_and_base_weights_do_not_change(
    tmp_path: Path, experts_in: list[str]
) -> None:
    tiny = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path)
    dense = build_ranker(load_config(tiny, ["model.hilomoe=null", "stages.experts=null"]), seed=3).dense_arch
    arch = build_ranker(load_config(tiny, [f"model.hilomoe.experts_in={experts_in}"]), seed=3).dense_arch
    linears = [name for name, child in dense.named_modules() if type(child) is nn.Linear]
    wanted = [name for name in linears if any(fnmatchcase(name, pattern) for pattern in experts_in)]
    assert list(expert_layers(arch)) == wanted
    state = arch.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in dense.state_dict().items())


def test_experts_in_no_linear_are_refused_with_the_names_that_there_are(tmp_path: Path) -> None:
    tiny = write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path)
    with pytest.raises(ConfigError, match=r"experts_in: 'tower\.cross\.\*' matches no linear; there are .*, head"):
        build_ranker(load_config(tiny, ["model.hilomoe.experts_in=[tower.cross.*]"]), seed=3)


def test_a_dense_arch_beyond_the_memory_there_is_is_refused_before_it_is_built(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = config.model.tower.model_copy(update={"hidden": (1 << 16,) * 256})
    huge = config.model_copy(update={"model": config.model.model_copy(update={"tower": tower, "hilomoe": None})})
    with pytest.raises(
        ConfigError, match=r"^model: its dense part takes 4,\d+\.\d GiB, and .* are for this process; .*smaller$"
    ):
        build_ranker(huge, seed=1)
    monkeypatch.setattr("recsys.model.ranker.host_memory", lambda: 1 << 10)  # of its control group
    with pytest.raises(ConfigError, match=r"^model: its dense part takes 0\.0 GiB, and 0\.0 are for this process"):
        build_ranker(config, seed=1)


def test_embedding_dropout_is_of_pooled_embeddings_in_training_alone(config: Config) -> None:
    model = config.model.model_copy(update={"embedding_dropout": 0.4})
    plain, arch = (build_dense_arch(of, {"user": 8, "item": 12}, num_dense_features=2) for of in (config.model, model))
    assert plain.embedding_dropout is None
    plain.load_state_dict(arch.state_dict())
    pooled, dense = torch.randn(300, 20), torch.randn(300, 2)
    torch.manual_seed(6)
    kept = torch.empty(300, 20).bernoulli_(0.6)
    torch.manual_seed(6)
    torch.testing.assert_close(arch(pooled, dense)[0], plain(pooled * kept / 0.6, dense)[0])
    assert torch.equal(arch.eval()(pooled, dense)[0], plain(pooled, dense)[0])
    assert arch.embedding_dropout is not None and arch.embedding_dropout(pooled) is pooled  # so exports have none


def test_embedding_dropout_leaves_first_order_weights() -> None:
    pooled = torch.randn(300, 20)
    torch.manual_seed(6)
    kept = torch.empty(300, 12).bernoulli_(0.6) / 0.6
    torch.manual_seed(6)
    found = EmbeddingDropout(0.4, [8, 12], wide=True)(pooled)
    expected = pooled.clone()
    expected[:, :4] *= kept[:, :4]
    expected[:, 8:16] *= kept[:, 4:]
    torch.testing.assert_close(found, expected)


def test_linears_begin_by_xavier_where_the_config_says_so(tmp_path: Path) -> None:
    """With the deviation of its definition, and factors of a logit's summands that stay 1."""
    tower = "{type: deepfm, hidden: [200, 300]}"
    widths = [f"tables.{table}.embedding_dim=200" for table in ("user", "item", "tag")]
    overrides = [f"model.tower={tower}", "model.dense_dim=200", "model.linear_init=xavier_normal", *widths]
    overrides += ["model.hilomoe=null", "stages.experts=null"]
    config = load_config(write_tiny_config(tmp_path / "tiny.yaml", tmp_path, tmp_path), overrides)
    torch.manual_seed(3)
    arch = build_dense_arch(config.model, {"user": 200, "item": 200}, num_dense_features=2)
    for linear in arch.tower.mlp.linears:  # type: ignore[union-attr]
        assert not linear.bias.any()
        expected = (2 / sum(linear.weight.shape)) ** 0.5
        assert linear.weight.std().item() == pytest.approx(expected, rel=0.03)
    assert torch.equal(arch.head.weight[0, -arch.tower.num_logits :], torch.ones(arch.tower.num_logits))
