"""What a faithful HiLoMoE layer must show (arXiv 2510.10432), against the paper's formulas written literally."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recsys.model.experts import expert_layers
from recsys.model.experts.hilomoe import HiLoMoELinear, Routing

ROWS, D_IN, D_OUT, L, K = 5, 12, 7, 3, 4


def make(
    d_in: int = D_IN,
    d_out: int = D_OUT,
    num_layers: int = L,
    num_experts: int = K,
    *,
    dtype: torch.dtype = torch.float64,
    zero_up: bool = False,
    **options: Any,
) -> HiLoMoELinear:
    """A recording layer with random U (zero with `zero_up`)."""
    torch.manual_seed(3)
    layer = HiLoMoELinear(d_in, d_out, num_layers, num_experts, dtype=dtype, **options)
    if not zero_up:
        nn.init.normal_(layer.lora_B)
    layer.record_routing = True
    return layer


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*(shape or (ROWS, D_IN)), generator=torch.Generator().manual_seed(5), dtype=dtype)


def factors(layer: HiLoMoELinear) -> list[tuple[Tensor, Tensor]]:
    """(U_l, V_l) of each layer of experts."""
    return list(zip(layer.lora_B.split(layer.num_experts, 1), layer.lora_A.split(layer.num_experts, 0), strict=True))


OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "top_k": {"top_k": 2},
    "flat": {"hierarchical": False},
    "normalized": {"normalize_query": True},
    "normal": {"key_init": "normal", "up_init": "normal"},
    "all": {
        "top_k": 3,
        "normalize_query": True,
        "key_init": "normal",
        "up_init": "normal",
    },
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def literal(layer: HiLoMoELinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The paper's formulas a row and a layer of experts at a time, W materialised: y (N, D_out), s (N, L, K)."""
    outputs, scores = [], []
    for row in x:
        query = row
        if layer.normalize_query:
            query = query / (query.square().mean() + 1e-6).sqrt()
        weight, of_row = layer.weight, []
        for up, down in factors(layer):
            logits = down @ query / layer.in_features**0.5
            if layer.top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(layer.top_k).values[-1], -torch.inf)
            score = logits.softmax(0)
            if layer.hierarchical:
                query = query + down.T @ score
            weight = weight + up @ score.diag() @ down
            of_row.append(score)
        outputs.append(weight @ row + (0 if layer.bias is None else layer.bias))
        scores.append(torch.stack(of_row))
    return torch.stack(outputs), torch.stack(scores)


def routing_of(layer: HiLoMoELinear, x: Tensor) -> Routing:
    layer(x)
    assert layer.routing is not None
    return layer.routing


@settings(max_examples=40, deadline=None, derandomize=True)  # rounding errors have no strict bound
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.data(),
)
def test_fused_form_equals_the_literal_formula(
    d_in: int, d_out: int, num_layers: int, num_experts: int, bias: bool, data: st.DataObject
) -> None:
    top_k = data.draw(st.none() | st.integers(1, num_experts))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        layer = make(d_in, d_out, num_layers, num_experts, top_k=top_k, bias=bias, dtype=dtype)
        x = inputs(ROWS, d_in, dtype=dtype)
        y, scores = literal(layer, x)
        torch.testing.assert_close(layer(x), y, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(routing_of(layer, x).scores, scores, rtol=tolerance, atol=tolerance)


@every_option
@pytest.mark.parametrize("fused", [True, False])
def test_outputs_and_gradients_equal_those_of_the_literal_formula(options: dict[str, Any], fused: bool) -> None:
    """Property 3. Of the loss and of the scores, since auxiliary losses reach the experts by those."""
    layer, x = make(**options), inputs().requires_grad_()
    layer.fused = fused
    leaves = [x, *layer.parameters()]
    y, scores = literal(layer, x)
    factor = inputs(ROWS, L, K)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing_of(layer, x).scores, scores, rtol=1e-12, atol=1e-12)
    losses: list[tuple[Callable[[], Tensor], Tensor]] = [
        (lambda: layer(x).square().sum(), y.square().sum()),
        (lambda: (routing_of(layer, x).scores * factor).sum(), (scores * factor).sum()),
        (
            lambda: layer(x).square().sum() + (routing_of(layer, x).scores * factor).sum(),
            y.square().sum() + (scores * factor).sum(),
        ),
    ]
    for loss, reference in losses:
        got = torch.autograd.grad(loss(), leaves, allow_unused=True, materialize_grads=True)
        wanted = torch.autograd.grad(reference, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@every_option
def test_fused_form_is_differentiable_once_and_twice(options: dict[str, Any]) -> None:
    layer = make(4, 3, 3, 3, **options)
    names = [name for name, _ in layer.named_parameters()]

    def of(x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        assert layer.routing is not None
        return y, layer.routing.scores, layer.routing.logits

    arguments = (
        inputs(3, 4).requires_grad_(),
        *(parameter.detach().requires_grad_() for parameter in layer.parameters()),
    )
    assert torch.autograd.gradcheck(of, arguments)
    assert torch.autograd.gradgradcheck(of, arguments)
    gradients = []
    for fused in (True, False):
        layer.fused = fused
        first = torch.autograd.grad(of(*arguments)[0].square().sum(), arguments, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(
            torch.stack([g.square().sum() for g in first if g is not None]).sum(), arguments, allow_unused=True
        )
        gradients.append([*first, *second])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("lora_A", "lora_B"), ("weight", "bias", "lora_A"), ()])
@pytest.mark.parametrize("of_input", [True, False])
def test_fused_form_gives_each_stage_the_gradients_that_it_trains_on(frozen: tuple[str, ...], of_input: bool) -> None:
    gradients = []
    for fused in (True, False):
        layer, x = make(), inputs().requires_grad_(of_input)
        layer.fused = fused
        for name in frozen:
            layer.get_parameter(name).requires_grad_(False)
        routing = routing_of(layer, x)
        (layer(x).square().sum() + (routing.z_loss().sum() if routing.logits.requires_grad else 0)).backward()
        gradients.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for one, other in zip(*gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert [g is not None for g in gradients[0]] == [of_input, *(n not in frozen for n, _ in layer.named_parameters())]


@pytest.mark.parametrize("fused", [True, False])
def test_gradients_of_a_head_have_the_strides_of_its_parameters(fused: bool) -> None:
    """Where they do not, DDP warns, and copies them."""
    head = HiLoMoELinear(D_IN, 1, num_layers=L, num_experts=K)
    head.fused = fused
    head(torch.randn(5, D_IN)).sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride(), name


def functions_in(y: Tensor) -> set[str]:
    """Names of all nodes of a tensor's graph."""
    found, open_nodes = set(), [y.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is not None:
            found.add(node.name())
            open_nodes += [next_node for next_node, _ in node.next_functions]
    return found


def test_fused_says_which_form_runs() -> None:
    layer, x = make(), inputs()
    ours = {"_FusedExpertsBackward", "_FusedProjectionsBackward"}
    assert ours <= functions_in(layer(x))
    layer.fused = False
    assert not ours & functions_in(layer(x))


def test_function_transforms_take_the_plain_form() -> None:
    layer, x = make(), inputs()
    layer.record_routing, layer.fused = False, False
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    forward = torch.func.vmap(torch.func.jacfwd(layer))(x)
    torch.testing.assert_close(jacobian, forward)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("top_k", [None, 1])
def test_zero_up_projections_leave_the_linear_bit_for_bit(dtype: torch.dtype, top_k: int | None) -> None:
    layer = make(dtype=dtype, top_k=top_k, zero_up=True)
    nn.init.normal_(layer.lora_A, std=9.0)
    x = inputs(dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_at_zero_up_projections_only_they_and_the_auxiliary_losses_move_the_experts() -> None:
    layer = make(zero_up=True)
    labels = torch.ones(ROWS, dtype=torch.float64)  # property 2
    F.binary_cross_entropy_with_logits(layer(inputs()).sum(1), labels).backward()
    assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
    assert torch.equal(layer.lora_A.grad, torch.zeros_like(layer.lora_A))
    assert layer.lora_B.grad.abs().min() > 0
    for auxiliary in ("balance_loss", "z_loss"):
        (gradient,) = torch.autograd.grad(getattr(routing_of(layer, inputs()), auxiliary)().sum(), [layer.lora_A])
        assert gradient.abs().max() > 0


@pytest.mark.parametrize(("d_in", "d_out"), [(12, 12), (12, 7), (3, 20)])
def test_experts_have_d_in_plus_d_out_parameters_each_and_the_router_none(d_in: int, d_out: int) -> None:
    layer, plain = make(d_in, d_out), nn.Linear(d_in, d_out)
    experts = sum(parameter.numel() for parameter in layer.expert_parameters())
    assert experts == (d_in + d_out) * L * K
    assert sum(p.numel() for p in layer.parameters()) == experts + sum(p.numel() for p in plain.parameters())
    assert layer.num_expert_parameters == layer.expert_multiply_adds == experts


def test_scores_lie_on_the_simplex_and_are_uniform_for_zero_keys() -> None:
    layer = make()
    scores = routing_of(layer, 50 * inputs()).scores
    assert scores.shape == (ROWS, L, K)
    assert scores.min() >= 0
    torch.testing.assert_close(scores.sum(-1), torch.ones(ROWS, L, dtype=torch.float64))
    nn.init.zeros_(layer.lora_A)
    assert torch.equal(routing_of(layer, inputs()).scores, torch.full((ROWS, L, K), 1 / K, dtype=torch.float64))


def test_logits_are_scaled_by_the_square_root_of_the_input_width() -> None:
    layer, x = make(), inputs()
    before = routing_of(layer, x).logits[:, 0]
    torch.testing.assert_close(before, x @ layer.lora_A[:K].T / D_IN**0.5)
    with torch.no_grad():
        layer.lora_A.mul_(3)
    torch.testing.assert_close(routing_of(layer, x).logits[:, 0], 3 * before)


def test_routing_reads_scores_of_earlier_layers_but_no_outputs() -> None:
    layer, x = make(), inputs()
    before = routing_of(layer, x).scores
    with torch.no_grad():
        layer.weight.normal_()
        layer.lora_B.normal_()
        assert layer.bias is not None
        layer.bias.normal_()
    assert torch.equal(routing_of(layer, x).scores, before)
    with torch.no_grad():
        layer.lora_A[:K].normal_()
    changed = routing_of(layer, x).scores
    assert not torch.isclose(changed[:, 1], before[:, 1]).any()
    with torch.no_grad():
        layer.lora_A[2 * K :].normal_()
    later = routing_of(layer, x).scores
    assert torch.equal(later[:, :2], changed[:, :2])
    assert not torch.isclose(later[:, 2], changed[:, 2]).any()


def output_for_scores(layer: HiLoMoELinear, x: Tensor, scores: Tensor, order: list[int]) -> Tensor:
    """W x + b + sum_l U_l (s_l * V_l x), the layers taken in the given order."""
    parts = factors(layer)
    experts = sum((scores[:, i] * (x @ parts[i][1].T)) @ parts[i][0].T for i in order)
    return F.linear(x, layer.weight, layer.bias) + experts


def test_all_layers_act_on_the_same_input() -> None:
    layer, x = make(), inputs()
    scores = routing_of(layer, x).scores
    for order in ([0, 1, 2], [2, 0, 1]):
        torch.testing.assert_close(layer(x), output_for_scores(layer, x, scores, order), rtol=1e-12, atol=1e-12)


def test_output_does_not_depend_on_the_order_of_experts_within_a_layer() -> None:
    layer, x = make(), inputs()
    before, scores = layer(x), routing_of(layer, x).scores
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        layer.lora_A[K : 2 * K] = layer.lora_A[K : 2 * K][order]
        layer.lora_B[:, K : 2 * K] = layer.lora_B[:, K : 2 * K][:, order]
    torch.testing.assert_close(layer(x), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(routing_of(layer, x).scores[:, 1], scores[:, 1][:, order])


@pytest.mark.parametrize(("num_layers", "num_experts"), [(0, K), (L, 0), (0, 0)])
def test_no_layers_or_no_experts_leave_the_plain_linear(num_layers: int, num_experts: int) -> None:
    layer, x = make(num_layers=num_layers, num_experts=num_experts), inputs()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.routing is None
    assert sum(parameter.numel() for parameter in layer.expert_parameters()) == 0


def test_one_expert_a_layer_is_a_plain_lora_of_rank_l() -> None:
    layer, x = make(num_experts=1), inputs()
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight + layer.lora_B @ layer.lora_A, layer.bias))
    assert torch.equal(routing_of(layer, x).scores, torch.ones(ROWS, L, 1, dtype=torch.float64))


@pytest.mark.parametrize(("d", "num_layers", "num_experts"), [(12, 2, 3), (4, 3, 4)])
def test_rank_of_the_perturbation_is_the_number_of_experts_at_most(d: int, num_layers: int, num_experts: int) -> None:
    layer = make(d, d, num_layers, num_experts)
    for scores in routing_of(layer, inputs(ROWS, d)).scores:
        delta = layer.lora_B @ scores.flatten().diag() @ layer.lora_A
        assert torch.linalg.matrix_rank(delta) == min(d, num_layers * num_experts)


class LargestOutput(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_no_weight_is_ever_materialised_for_each_row() -> None:
    rows, d = 64, 40
    for options in OPTIONS.values():
        layer, x = make(d, d, dtype=torch.float32, **options), inputs(rows, d, dtype=torch.float32).requires_grad_()
        for layer.fused in (True, False):
            with LargestOutput() as largest:
                y = layer(x)
                assert layer.routing is not None
                (y.sum() + layer.routing.z_loss().sum() + layer.routing.balance_loss().sum()).backward()
            assert largest.numel == rows * d  # which is less than rows x d x L
    with LargestOutput() as largest:
        literal(layer, x[:1])
    assert largest.numel >= d * d  # the recorder does see a materialised weight


@pytest.mark.parametrize(
    ("rows", "d_in", "d_out", "num_layers", "num_experts"), [(32, 16, 16, 3, 4), (9, 20, 6, 1, 5), (7, 8, 24, 5, 2)]
)
def test_flops_are_those_of_the_expert_space_form(
    rows: int, d_in: int, d_out: int, num_layers: int, num_experts: int
) -> None:
    layer = make(d_in, d_out, num_layers, num_experts, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(inputs(rows, d_in, dtype=torch.float32))
    experts = num_layers * num_experts
    routing = num_experts**2 * num_layers * (num_layers - 1) // 2
    a_row = d_in * d_out + experts * d_in + experts * d_out + routing
    gram = experts**2 * d_in if num_layers > 1 else 0
    assert counter.get_total_flops() == 2 * (rows * a_row + gram)
    x = inputs(rows, d_in, dtype=torch.float32).requires_grad_()
    y = layer(x).sum()
    with FlopCounterMode(display=False) as counter:
        y.backward()
    assert counter.get_total_flops() == 2 * (2 * rows * a_row + 2 * gram)  # a product has two operands
    layer.experts_active = False
    with FlopCounterMode(display=False) as counter:
        layer(inputs(rows, d_in, dtype=torch.float32))
    assert counter.get_total_flops() == 2 * rows * d_in * d_out


def test_routing_in_expert_space_needs_fewer_flops_than_the_formula() -> None:
    rows, d = 4096, 64
    layer = make(d, d, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        layer(inputs(rows, d, dtype=torch.float32))
    assert counter.get_total_flops() < 2 * rows * (d * d + (4 * L - 2) * K * d)


def routing_with(scores: Tensor) -> Routing:
    return Routing(logits=torch.zeros_like(scores), scores=scores)


def test_balance_loss_is_1_at_uniform_load_and_k_at_collapse() -> None:
    uniform = routing_with(torch.full((6, L, K), 1 / K))
    torch.testing.assert_close(uniform.balance_loss(), torch.ones(L))
    torch.testing.assert_close(uniform.entropy(), torch.full((L,), float(K)).log())
    spread = routing_with(torch.eye(K).unsqueeze(1).expand(K, L, K))  # each row another expert: the load is uniform
    torch.testing.assert_close(spread.balance_loss(), torch.ones(L))
    torch.testing.assert_close(spread.entropy(), torch.zeros(L))
    collapsed = routing_with(F.one_hot(torch.zeros(6, L, dtype=torch.int64), K).float())
    torch.testing.assert_close(collapsed.balance_loss(), torch.full((L,), float(K)))
    torch.testing.assert_close(collapsed.load(), F.one_hot(torch.zeros(L, dtype=torch.int64), K).float())
    torch.testing.assert_close(spread.balance_loss("argmax"), torch.ones(L))
    torch.testing.assert_close(collapsed.balance_loss("argmax"), torch.full((L,), float(K)))


def test_argmax_balance_loss_is_that_of_switch_transformers() -> None:
    routing = routing_of(make(), inputs(50, D_IN))
    first = routing.scores.argmax(-1)
    for number, loss in enumerate(routing.balance_loss("argmax")):
        shares = first[:, number].bincount(minlength=K) / 50
        torch.testing.assert_close(loss, K * (shares * routing.scores[:, number].mean(0)).sum())
    assert (routing.balance_loss("argmax") - routing.balance_loss()).abs().min() > 1e-6


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_balance_loss_lies_between_1_and_k_for_any_scores(rows: int, num_experts: int, seed: int) -> None:
    scores = torch.randn(rows, 2, num_experts, generator=torch.Generator().manual_seed(seed)).mul(5).softmax(-1)
    loss = routing_with(scores).balance_loss()
    assert (loss >= 1 - 1e-5).all() and (loss <= num_experts + 1e-5).all()


def test_z_loss_is_the_mean_squared_logsumexp_and_positive() -> None:
    routing = routing_of(make(), inputs())
    wanted = routing.logits.exp().sum(-1).log().square().mean(0)
    torch.testing.assert_close(routing.z_loss(), wanted)
    assert (routing.z_loss() > 0).all()


def with_keys(keys: Tensor, num_layers: int = 1) -> HiLoMoELinear:
    """A layer of the given keys (L K x D_in), at U = 0."""
    layer = make(keys.shape[1], D_OUT, num_layers, len(keys) // num_layers, zero_up=True)
    nn.init.zeros_(layer.lora_A)
    with torch.no_grad():
        layer.lora_A += keys
    return layer


def test_diversity_loss_is_0_for_orthogonal_experts_and_1_for_those_alike() -> None:
    axes, ones = torch.eye(D_IN, dtype=torch.float64), torch.ones(K, D_IN, dtype=torch.float64)
    scale = torch.tensor([[1.0], [-2.0], [3.0], [0.1]], dtype=torch.float64)
    layer = with_keys(torch.cat([axes[:K] * scale, ones * scale, torch.cat([axes[:3], axes[:1]])]), 3)
    wanted = torch.tensor([0.0, 1.0, 1 / 6], dtype=torch.float64)  # in the last layer one pair of the six is alike
    torch.testing.assert_close(layer.diversity_loss().detach(), wanted)


def test_diversity_loss_is_the_mean_squared_cosine_over_pairs() -> None:
    layer = make()
    for keys, loss in zip(layer.lora_A.split(K), layer.diversity_loss(), strict=True):
        pairs = [F.cosine_similarity(keys[i], keys[j], 0).square() for i in range(K) for j in range(i)]
        torch.testing.assert_close(loss, torch.stack(pairs).mean())


def test_diversity_loss_has_the_gradient_of_its_finite_differences() -> None:
    layer = make()

    def loss(keys: Tensor) -> Tensor:
        return torch.func.functional_call(_Diversity(layer), {"layer.lora_A": keys}, ())

    assert torch.autograd.gradcheck(loss, (layer.lora_A.detach().requires_grad_(),))


class _Diversity(nn.Module):
    def __init__(self, layer: HiLoMoELinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.diversity_loss()


def test_diversity_loss_is_finite_at_zero_keys_and_for_a_single_expert() -> None:
    for layer in (with_keys(torch.zeros(K, D_IN, dtype=torch.float64)), make(num_experts=1)):
        loss = layer.diversity_loss().sum()
        loss.backward()
        assert loss == 0
        assert layer.lora_A.grad is not None and not layer.lora_A.grad.any()


def test_training_on_the_diversity_loss_makes_experts_orthogonal_from_zero_up_projections_on() -> None:
    base = torch.ones(K, D_IN, dtype=torch.float64)
    layer = with_keys(base + 0.1 * inputs(K, D_IN))
    first = layer.diversity_loss().item()
    optimizer = torch.optim.SGD([layer.lora_A], lr=1.0)
    for _ in range(500):
        optimizer.zero_grad()
        layer.diversity_loss().sum().backward()
        optimizer.step()
    assert first > 0.9
    assert layer.diversity_loss().item() < 1e-3


def test_experts_of_the_same_key_are_one_expert_of_their_summed_up_projections() -> None:
    layer = make()
    with torch.no_grad():
        layer.lora_A[1] = layer.lora_A[0]
    before = layer(inputs())
    with torch.no_grad():
        layer.lora_B[:, 0] += layer.lora_B[:, 1]
        layer.lora_B[:, 1] = 0
    torch.testing.assert_close(layer(inputs()), before)


@pytest.mark.parametrize("top_k", [1, 2, K])
def test_top_k_keeps_the_largest_logits_and_renormalises_them(top_k: int) -> None:
    routing = routing_of(make(top_k=top_k), inputs())
    assert ((routing.scores > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(routing.scores.sum(-1), torch.ones(ROWS, L, dtype=torch.float64))
    kept, experts = routing.logits.topk(top_k, -1)
    torch.testing.assert_close(routing.scores.gather(-1, experts), kept.softmax(-1))
    assert (routing.logits != 0).all()  # the z-loss sees the logits before the mask


def test_top_k_of_all_experts_is_dense_routing() -> None:
    assert torch.equal(make(top_k=K)(inputs()), make()(inputs()))


@pytest.mark.parametrize("shape", [(D_IN,), (2, D_IN), (2, 3, D_IN), (2, 1, 3, D_IN), (0, D_IN), (2, 0, D_IN)])
def test_any_leading_shape_is_taken_as_by_a_linear(shape: tuple[int, ...]) -> None:
    layer, x = make(), inputs(*shape)
    y = layer(x)
    assert y.shape == F.linear(x, layer.weight).shape
    torch.testing.assert_close(y.reshape(-1, D_OUT), layer(x.reshape(-1, D_IN)))


def test_inputs_that_are_not_contiguous_are_taken() -> None:
    layer, x = make(), inputs(D_IN, 3, ROWS)
    torch.testing.assert_close(layer(x.permute(2, 1, 0)), layer(x.permute(2, 1, 0).contiguous()))


def test_no_rows_give_finite_auxiliary_losses_and_gradients() -> None:
    layer = make()
    y = layer(inputs(0, D_IN))
    routing = layer.routing
    assert routing is not None
    loss = y.sum() + routing.balance_loss().sum() + routing.z_loss().sum()
    loss.backward()
    assert loss.item() == 0
    for parameter in layer.parameters():
        assert parameter.grad is not None and not parameter.grad.any()
    assert routing.entropy().tolist() == [0] * L


def test_state_dict_extends_that_of_the_linear() -> None:
    linear, layer = nn.Linear(D_IN, D_OUT), make(dtype=torch.float32, zero_up=True)
    assert set(layer.state_dict()) - set(linear.state_dict()) == {"lora_A", "lora_B"}
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) == {"lora_A", "lora_B"}
    x = inputs(dtype=torch.float32)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("bias", [True, False])
def test_experts_attached_to_a_linear_change_nothing(bias: bool) -> None:
    linear, x = nn.Linear(D_IN, D_OUT, bias=bias, dtype=torch.float64), inputs()
    layer = HiLoMoELinear.from_linear(linear, L, K, top_k=2)
    assert torch.equal(layer(x), linear(x))
    assert layer.weight.data_ptr() != linear.weight.data_ptr()
    assert (layer.num_layers, layer.num_experts, layer.top_k) == (L, K, 2)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"normalize_query": True}])
def test_every_row_meets_the_materialised_weight(options: dict[str, Any]) -> None:
    layer, x = make(**options), inputs(2, 3, D_IN)
    weights = layer.materialize(x)
    assert weights.shape == (2, 3, D_OUT, D_IN)
    assert layer.routing is None
    torch.testing.assert_close(layer(x), torch.einsum("abod,abd->abo", weights, x) + layer.bias)
    layer.experts_active = False
    assert torch.equal(layer.materialize(x), layer.weight.expand(2, 3, D_OUT, D_IN))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("num_layers", "num_experts"), [(L, 1), (0, K), (L, 0)])
def test_layers_without_a_choice_merge_into_one_linear(num_layers: int, num_experts: int, bias: bool) -> None:
    layer, x = make(num_layers=num_layers, num_experts=num_experts, bias=bias), inputs()
    linear = layer.eval().merge()
    assert type(linear) is nn.Linear and not linear.training
    torch.testing.assert_close(linear(x), layer(x), rtol=1e-12, atol=1e-12)
    assert linear.weight.data_ptr() != layer.weight.data_ptr()


def test_layers_with_a_choice_do_not_merge() -> None:
    layer, x = make(), inputs()
    with pytest.raises(ValueError, match=r"3 layers of 4 experts do not merge.*depend on each input row"):
        layer.merge()
    layer.experts_active = False
    assert torch.equal(layer.merge()(x), layer(x))


def test_flat_routing_reads_nothing_of_earlier_layers() -> None:
    """The control to property 6."""
    layer, x = make(hierarchical=False), inputs()
    before = routing_of(layer, x).scores
    with torch.no_grad():
        layer.lora_A[:K].normal_()
    after = routing_of(layer, x).scores
    assert not torch.isclose(after[:, 0], before[:, 0]).any()
    assert torch.equal(after[:, 1:], before[:, 1:])
    torch.testing.assert_close(after[:, 1], (x @ layer.lora_A[K : 2 * K].T / D_IN**0.5).softmax(-1))


def test_normalised_queries_make_routing_independent_of_the_scale_of_the_input() -> None:
    layer, x = make(normalize_query=True), inputs()
    before = routing_of(layer, x)
    torch.testing.assert_close(routing_of(layer, 30 * x).scores, before.scores, rtol=1e-4, atol=1e-6)
    assert not torch.isclose(routing_of(make(), 30 * x).scores, before.scores).all()
    zero = torch.zeros(1, D_IN, dtype=torch.float64, requires_grad=True)
    layer(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()


@pytest.mark.parametrize("d_in", [16, 400])
def test_normal_keys_and_normalised_queries_give_logits_of_unit_scale(d_in: int) -> None:
    layer = HiLoMoELinear(d_in, 3, 1, 200, normalize_query=True, key_init="normal")
    logits = layer.route(7 * inputs(50, d_in, dtype=torch.float32)).logits
    assert 0.8 < logits.std() < 1.2


def test_random_up_projections_have_the_variance_of_their_fan_in() -> None:
    layer = HiLoMoELinear(D_IN, 500, L, K, up_init="normal")
    assert 0.9 < layer.lora_B.std() * (L * K) ** 0.5 < 1.1


def test_representation_names_what_is_not_default() -> None:
    assert repr(make()).endswith("bias=True, num_layers=3, num_experts=4, top_k=None)")
    told = repr(make(hierarchical=False, normalize_query=True))
    assert told.endswith("top_k=None, hierarchical=False, normalize_query=True)")


def test_inactive_experts_are_not_computed() -> None:
    layer, x = make(), inputs()
    layer.experts_active = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.routing is None


def test_layers_of_keys_start_with_their_own_xavier_bound() -> None:
    layer = make(100, 7, 2, 20)
    bound = (6 / (100 + 20)) ** 0.5
    for keys in layer.lora_A.split(20):
        assert 0.9 * bound < keys.abs().max() <= bound


@pytest.mark.parametrize(
    ("num_layers", "num_experts", "top_k"), [(-1, 2, None), (2, -1, None), (2, 3, 0), (2, 3, 4), (2, 0, 1)]
)
def test_impossible_sizes_are_refused(num_layers: int, num_experts: int, top_k: int | None) -> None:
    with pytest.raises(ValueError, match="must"):
        HiLoMoELinear(4, 4, num_layers, num_experts, top_k=top_k)


@pytest.mark.parametrize("options", [{"key_init": "xavier"}, {"up_init": "zero"}])
def test_impossible_options_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must"):
        HiLoMoELinear(4, 4, L, K, **options)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("options", [{}, OPTIONS["all"] | {"top_k": None}], ids=["paper", "options"])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
def test_bfloat16_routes_in_float32(parameters: torch.dtype, options: dict[str, Any], fused: bool) -> None:
    layer, x = make(dtype=torch.float32, **options), inputs(dtype=torch.float32)
    layer.fused = fused
    reference, scores = layer(x), routing_of(layer, x).scores
    layer.to(parameters)
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        y = layer(x.to(parameters))
    assert y.dtype == torch.bfloat16
    assert layer.routing is not None
    assert layer.routing.scores.dtype == layer.routing.logits.dtype == torch.float32
    torch.testing.assert_close(layer.routing.scores, scores, rtol=0.05, atol=0.02)
    torch.testing.assert_close(layer.routing.scores.sum(-1), torch.ones(ROWS, L))  # to float32's accuracy
    torch.testing.assert_close(y.float(), reference, rtol=0.05, atol=0.1)
    y.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in layer.parameters())
    assert all(
        parameter.grad.dtype == parameter.dtype for parameter in layer.parameters() if parameter.grad is not None
    )


def test_autocast_leaves_float64_alone() -> None:
    layer, x = make(), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-14, atol=1e-14)


@every_option
def test_symbolic_trace_computes_the_same(options: dict[str, Any]) -> None:
    layer = make(**options)
    traced = torch.fx.symbolic_trace(layer)
    for x in (inputs(), inputs(2, 3, D_IN)):
        torch.testing.assert_close(traced(x), layer(x))


@every_option
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_computes_the_same_for_any_number_of_rows(options: dict[str, Any]) -> None:
    layer = make(dtype=torch.float32, **options)  # a recording one
    program = torch.export.export(
        layer, (inputs(dtype=torch.float32),), dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    assert layer.routing is None  # nothing of the tracing stays behind
    for rows in (2, 11):
        x = inputs(rows, D_IN, dtype=torch.float32)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param("aot_eager", {}, id="aot_eager, paper"),
        pytest.param("aot_eager", OPTIONS["all"], id="aot_eager, all"),
        pytest.param(
            "inductor",
            {},
            id="inductor, paper",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="inductor compiles for a CPU with g++"),
            ],
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_layer_has_no_graph_break_and_computes_the_same(backend: str, options: dict[str, Any]) -> None:
    layer, x = make(dtype=torch.float32, **options), inputs(dtype=torch.float32)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    found: list[Tensor] = []
    wanted: list[Tensor] = []
    for call, results in ((compiled, found), (layer, wanted)):
        layer.routing = None
        y = call(x)
        assert layer.routing is not None
        loss = y.square().sum() + layer.routing.z_loss().sum() + layer.routing.balance_loss().sum()
        results += [y, layer.routing.scores, *torch.autograd.grad(loss, list(layer.parameters()))]
    for got, reference in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


def test_layers_are_listed_by_name_in_order() -> None:
    module = nn.Sequential(make(), nn.ReLU(), nn.Sequential(nn.Linear(2, 2), make()))
    assert list(expert_layers(module)) == ["0", "2.1"]
