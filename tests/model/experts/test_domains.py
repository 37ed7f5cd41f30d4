"""MLoRA and MoE-MLoRA on linears: the properties of `DomainLinear` against formulas written out row by row."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recsys.model.experts import attach_domain_experts, attach_experts
from recsys.model.experts.domains import DomainAdaptation, DomainGate, DomainLinear, adapt, rank_of

N = 3
SIZES = [N, 2 * N, 4 * N, N + 1]


def tower_of(
    num_experts: int | None = None, *, num_features: int | None = None, drawn: bool = True, **options: Any
) -> tuple[nn.Sequential, DomainAdaptation]:
    """Two linears of odd sizes; experts drawn at random, or as they begin. `num_features` gives it a gate."""
    torch.manual_seed(5)
    gate = None if num_features is None else DomainGate(N, num_experts or N, num_features)
    adaptation = DomainAdaptation(N, num_experts, gate)
    tower = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
    for place, rank in ((0, 3), (2, 2)):
        layer = adapt(tower[place], adaptation, rank, **options)  # type: ignore[arg-type]
        if drawn:
            for parameter in layer.domain_experts.parameters():
                nn.init.normal_(parameter)
    return tower, adaptation


def linears(tower: nn.Sequential) -> list[DomainLinear]:
    return [layer for layer in tower if isinstance(layer, DomainLinear)]


def rows(seed: int = 1, count: int = 23) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator), torch.randint(0, N, (count,), generator=generator)


def applied(tower: nn.Sequential, adaptation: DomainAdaptation, x: Tensor, domains: Tensor, *more: Tensor) -> Tensor:
    with adaptation.call(domains, *more) as order:
        if order is None:
            return tower(x)
        return tower(x[order])[order.argsort()]


def literal(tower: nn.Sequential, x: Tensor, weights: Tensor) -> Tensor:
    """Row by row, layer by layer: W x + b + sum_e g_e (B_e A_e x + b_e)."""
    outputs = []
    for row, of_experts in zip(x, weights, strict=True):
        for layer in tower:
            if isinstance(layer, DomainLinear):
                y = layer.weight @ row + layer.bias
                for weight, expert in zip(of_experts, layer.domain_experts, strict=True):
                    y = y + weight * (expert.lora_B @ (expert.lora_A @ row) + expert.bias)
                row = y
            else:
                row = layer(row)
        outputs.append(row)
    return torch.stack(outputs)


def gradients(tower: nn.Module, of: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    of.square().mean().backward()
    return {name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in tower.named_parameters()}


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("mode", ["off", "expert", "own", "gate"])
def test_it_begins_as_the_tower_that_it_adapts(num_experts: int, mode: str) -> None:
    tower, adaptation = tower_of(num_experts, num_features=0, drawn=False)
    plain = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
    plain.load_state_dict(tower.state_dict(), strict=False)
    assert set(plain.state_dict()) < set(tower.state_dict())
    adaptation.active, adaptation.expert = mode != "off", 1 if mode == "expert" else None
    if mode == "gate":
        adaptation.use_gate()
    x, domains = rows()
    with adaptation.call(domains) as order:
        given = x if order is None else x[order]
        assert torch.equal(tower(given), plain(given))


@pytest.mark.parametrize("num_experts", SIZES)
def test_a_mixture_is_its_formula_with_gradients(num_experts: int) -> None:
    tower, adaptation = tower_of(num_experts, num_features=6)
    tower.double()
    adaptation.double().use_gate()
    x, domains = rows()
    x = x.double().requires_grad_()
    assert adaptation.gate is not None
    y = applied(tower, adaptation, x, domains, x)
    expected = literal(tower, x, adaptation.gate(domains, x))
    torch.testing.assert_close(y, expected)
    both = nn.ModuleList([tower, adaptation])
    (of_x,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
    torch.testing.assert_close(of_x, torch.autograd.grad(expected.square().sum(), x, retain_graph=True)[0])
    torch.testing.assert_close(gradients(both, y), gradients(both, expected))


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("num_features", [None, 0])
def test_rows_share_their_own_experts_alike_until_a_gate_is_used(num_experts: int, num_features: int | None) -> None:
    tower, adaptation = tower_of(num_experts, num_features=num_features)
    adaptation.grouped = False
    x, domains = rows()
    weights = torch.zeros(len(x), num_experts)
    for row, domain in enumerate(domains.tolist()):
        own = [expert for expert in range(num_experts) if expert % N == domain]
        weights[row, own] = 1 / len(own)
    torch.testing.assert_close(applied(tower, adaptation, x, domains), literal(tower, x, weights))


@pytest.mark.parametrize("present", [range(N), [1], [0, 2]])
def test_products_by_groups_are_those_of_all_experts_with_gradients(present: Any) -> None:
    """Of domains that have no row, too: their experts have gradients, of 0."""
    tower, adaptation = tower_of()
    x, domains = rows()
    domains = torch.tensor(list(present))[domains % len(present)]
    found = []
    for adaptation.grouped in (True, False):
        y = applied(tower, adaptation, x, domains)
        assert adaptation._call.rows is None
        found.append((y.detach(), gradients(tower, y)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    for expert in set(range(N)) - set(present):
        assert all(not p.grad.any() for layer in linears(tower) for p in layer.domain_parameters(expert))  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("sizes", [(8, 4), (6, 5), (4, 4)])
def test_products_by_groups_take_any_size_and_any_gradient(rank: int, sizes: tuple[int, int]) -> None:
    """Columns of a wider tensor, and a gradient that is one number for all."""
    torch.manual_seed(5)
    adaptation = DomainAdaptation(N)
    layer = adapt(nn.Linear(*sizes), adaptation, rank)
    for parameter in layer.domain_experts.parameters():
        nn.init.normal_(parameter)
    found = []
    for adaptation.grouped in (True, False):
        wide = torch.linspace(-1, 1, 9 * (sizes[0] + 2)).view(9, -1).requires_grad_()
        domains = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
        with adaptation.call(domains):
            y = layer(wide[:, 1:-1])
        found.append((y.detach(), torch.autograd.grad(y.sum(), [wide, *layer.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_whole_weights_of_domains_compute_what_their_parts_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several vectors in a row too; and only where dropout of the base alone is off."""
    merged = []
    compute = DomainLinear._merged

    def counted(self: DomainLinear, *arguments: Any) -> Tensor:
        merged.append(self)
        return compute(self, *arguments)

    monkeypatch.setattr(DomainLinear, "_merged", counted)
    torch.manual_seed(5)
    adaptation = DomainAdaptation(N)
    layer = adapt(nn.Linear(6, 7), adaptation, 2, dropout=0.3).eval()
    for parameter in layer.domain_experts.parameters():
        nn.init.normal_(parameter)
    x, domains = rows(count=300)
    tokens = torch.stack([x, -x], 1)
    domains = domains.sort().values
    found = []
    for adaptation.grouped in (True, False):
        with adaptation.call(domains):
            y = layer(tokens)
        found.append((y.detach(), gradients(layer, y)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
    assert merged == [layer]
    adaptation.grouped = True
    with adaptation.call(domains):
        layer.train()(tokens)
        with torch.no_grad():
            layer.eval()(tokens)
    assert merged == [layer]


@pytest.mark.parametrize("grouped", [True, False])
def test_rows_of_many_domains_are_as_in_batches_of_one(grouped: bool) -> None:
    tower, adaptation = tower_of()
    adaptation.grouped = grouped
    x, domains = rows()
    together = applied(tower, adaptation, x, domains)
    for domain in range(N):
        alone = applied(tower, adaptation, x[domains == domain], domains[domains == domain])
        torch.testing.assert_close(together[domains == domain], alone, rtol=1e-5, atol=1e-5)
    for of in (tower, adaptation):
        of.double()
    torch.testing.assert_close(applied(tower, adaptation, x.double(), domains).float(), together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["grouped", "merged", "all", "double", "gate"])
def test_rows_of_no_domain_have_the_tower_alone(kind: str) -> None:
    """And those of domains what they have without such rows."""
    torch.manual_seed(5)
    gate = DomainGate(N, 2 * N) if kind == "gate" else None
    adaptation = DomainAdaptation(N, 2 * N if gate else None, gate, with_others=True)
    tower = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
    plain = copy.deepcopy(tower)
    for place in (0, 2):
        layer = adapt(tower[place], adaptation, 2, dropout=0.1 if kind == "grouped" else 0)  # type: ignore[arg-type]
        for parameter in layer.domain_experts.parameters():
            nn.init.normal_(parameter)
    if gate is not None:
        adaptation.use_gate()
    adaptation.grouped = kind != "all"
    x, domains = rows(count=300)
    domains = torch.where(torch.arange(300) % 5 == 0, N, domains)
    if kind == "grouped":
        tower.eval()
    if kind == "double":
        for module in (tower, plain, adaptation):
            module.double()
        x = x.double()
    with torch.set_grad_enabled(kind != "grouped"):
        y = applied(tower, adaptation, x, domains)
        torch.testing.assert_close(y[domains == N], plain(x[domains == N]), rtol=1e-5, atol=1e-5)
        known = domains < N
        torch.testing.assert_close(y[known], applied(tower, adaptation, x[known], domains[known]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(y[known], plain(x[known]), atol=1e-2)


def test_mlora_is_a_mixture_whose_gate_picks_the_domain() -> None:
    """With dropout of the base's output alone."""
    tower, adaptation = tower_of(num_features=0, dropout=0.3)
    x, domains = rows()

    def drawn() -> Tensor:
        torch.manual_seed(3)
        return applied(tower, adaptation, x, domains)

    own = drawn()
    assert adaptation.gate is not None
    with torch.no_grad():
        adaptation.gate.embedding.weight.copy_(torch.eye(N, 4))
        adaptation.gate.linear.weight.copy_(1e4 * torch.eye(N, 4))
    adaptation.use_gate()
    torch.testing.assert_close(drawn(), own)
    tower.eval()
    assert not torch.allclose(drawn(), own)


def test_dropout_leaves_experts_alone() -> None:
    tower, adaptation = tower_of(dropout=1.0)
    first = linears(tower)[0]
    x, domains = rows()
    adaptation.expert = 1
    with adaptation.call(domains):
        y = first(x)
    expert = first.domain_experts[1]
    torch.testing.assert_close(y, x @ expert.lora_A.T @ expert.lora_B.T + expert.bias)


@pytest.mark.parametrize(("num_features", "alike"), [(0, True), (6, False)])
def test_the_gate_weighs_by_the_domain_alone_or_by_features_too(num_features: int, alike: bool) -> None:
    _, adaptation = tower_of(2 * N, num_features=num_features)
    assert adaptation.gate is not None
    x, domains = rows()
    weights = adaptation.gate(domains, x if num_features else None)
    assert bool((weights >= 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(len(x)))
    for domain in range(N):
        of_domain = weights[domains == domain]
        assert torch.equal(of_domain, of_domain[:1].expand_as(of_domain)) is alike
    assert not torch.equal(weights[domains == 0][0], weights[domains == 1][0])


def test_only_the_expert_that_all_rows_have_learns() -> None:
    tower, adaptation = tower_of(2 * N)
    adaptation.expert = 4
    x, domains = rows()
    weights = torch.zeros(len(x), 2 * N)
    weights[:, 4] = 1
    y = applied(tower, adaptation, x, domains)
    torch.testing.assert_close(y, literal(tower, x, weights))
    y.square().sum().backward()
    for layer in linears(tower):
        for number in range(2 * N):
            assert all((p.grad is not None) is (number == 4) for p in layer.domain_parameters(number))


def test_linears_of_several_vectors_a_row_adapt_each() -> None:
    tower, adaptation = tower_of()
    x, domains = rows()
    tokens = torch.stack([x, x.flip(1), -x], 1)
    for adaptation.grouped in (True, False):
        together = applied(tower, adaptation, tokens, domains)
        for place in range(3):
            alone = applied(tower, adaptation, tokens[:, place], domains)
            torch.testing.assert_close(together[:, place], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_experts", SIZES)
def test_a_domains_linear_can_be_written_out(num_experts: int) -> None:
    tower, adaptation = tower_of(num_experts)
    x, domains = rows()
    layer = linears(tower)[0]
    weight, bias = layer.written_out(adaptation.weights(torch.arange(N)))
    with adaptation.call(domains) as order:
        y = layer(x if order is None else x[order])
    y = y if order is None else y[order.argsort()]
    torch.testing.assert_close(y, torch.einsum("boi,bi->bo", weight[domains], x) + bias[domains])


@pytest.mark.parametrize("num_experts", SIZES)
@pytest.mark.parametrize("kind", ["own", "gate", "all"])
def test_folded_linears_compute_the_formula(num_experts: int, kind: str) -> None:
    """As in float64, of domains in any order, one domain, one row, none, and of no domain; no expert is looked at."""
    gate = DomainGate(N, num_experts) if kind == "gate" else None
    shared_by: Any = "all" if kind == "all" else "own"
    adaptation = DomainAdaptation(N, num_experts, gate, shared_by=shared_by, with_others=True)
    tower = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 5))
    torch.manual_seed(5)
    attach_domain_experts(tower, ["*"], adaptation, lambda linear: linear.out_features // 2)
    experts = [parameter for layer in linears(tower) for parameter in layer.domain_experts.parameters()]
    for parameter in [*experts, *([gate.embedding.weight] if gate else [])]:
        nn.init.normal_(parameter)
    if gate is not None:
        adaptation.use_gate()
    exact, exactly = (of.double() for of in copy.deepcopy((tower, adaptation)))
    assert adaptation.fold(linears(tower)) and adaptation.folded
    mixed = torch.randint(0, N + 1, (23,))
    with torch.no_grad():
        for parameter in experts:
            parameter.fill_(torch.nan)
        for domains in (mixed, *(torch.full((5,), number) for number in range(N + 1)), mixed[:1], mixed[:0]):
            tokens = torch.randn(len(domains), 2, 6)
            weights = exactly.weights(domains).double()
            expected = [literal(exact, x.double(), weights).float() for x in tokens.unbind(1) if len(x)]
            of_rows = torch.stack(expected, 1) if expected else torch.empty(0, 2, 5)
            torch.testing.assert_close(applied(tower, adaptation, tokens, domains), of_rows, rtol=1e-5, atol=1e-5)
            alone = applied(tower, adaptation, tokens[:, 0], domains)
            torch.testing.assert_close(alone, of_rows[:, 0], rtol=1e-5, atol=1e-5)
    assert applied(tower, adaptation, *rows()).isnan().all()  # with gradients, and so by experts


def test_folded_weights_are_rounded_once() -> None:
    """From float64: right even where an expert cancels the linear, of which float32 would have left nothing."""
    tower, adaptation = tower_of()
    with torch.no_grad():
        for layer in linears(tower):
            layer.weight.copy_(-(layer.domain_experts[1].lora_B @ layer.domain_experts[1].lora_A))  # type: ignore[operator]
    assert adaptation.fold(linears(tower))
    for layer in linears(tower):
        for (weight, bias), expert in zip(layer._folded, layer.domain_experts, strict=True):
            up, down = expert.lora_B.double(), expert.lora_A.double()  # type: ignore[operator]
            torch.testing.assert_close(weight, (layer.weight + up @ down).float(), rtol=1e-6, atol=0)
            torch.testing.assert_close(bias, (layer.bias.double() + expert.bias).float(), rtol=1e-6, atol=0)


def test_what_cannot_be_folded_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of features, routed experts, and weights beyond the bound, which is for all linears together."""
    tower, adaptation = tower_of(num_features=6)
    assert not adaptation.fold(linears(tower))
    routed, of_routed = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), DomainAdaptation(N)
    attach_experts(routed, ["1"], 1, 2)
    attach_domain_experts(routed, ["*"], of_routed, lambda _: 2)
    assert not of_routed.fold(linears(routed))
    tower, plain = tower_of()
    monkeypatch.setattr("recsys.model.experts.domains.MAX_FOLDED_BYTES", 4 * N * (6 * 7 + 7 * 5) - 1)
    assert not plain.fold(linears(tower))
    assert not any(of.folded for of in (adaptation, of_routed, plain))
    assert not any(layer._folded for layer in (*linears(routed), *linears(tower)))
    monkeypatch.undo()
    assert plain.fold(linears(tower))


def test_experts_have_the_parameters_of_their_formula() -> None:
    assert [rank_of(width, 4) for width in (256, 128, 64)] == [64, 32, 16]
    assert [rank_of(width, 256) for width in (256, 128, 64)] == [1, 1, 1]
    tower, adaptation = tower_of()
    for expert in range(N):
        count = sum(p.numel() for layer in linears(tower) for p in layer.domain_parameters(expert))
        assert count == (6 * 3 + 3 * 7 + 7) + (7 * 2 + 2 * 5 + 5)
    gate = DomainGate(N, 8)
    assert sum(p.numel() for p in gate.parameters()) == 4 * N + 4 * 8 + 8
    assert not list(adaptation.parameters())


def test_a_deep_copy_listens_to_its_own_adaptation() -> None:
    model = nn.ModuleList(tower_of())
    twin = copy.deepcopy(model)
    assert twin[0][0]._call is twin[0][2]._call is twin[1]._call  # type: ignore[index]
    assert pickle.loads(pickle.dumps(twin))[0][0]._call.rows is None
    x, domains = rows()
    with model[1].call(domains):  # type: ignore[operator]
        assert twin[0][0]._call.rows is None  # type: ignore[index]
    torch.testing.assert_close(applied(*twin, x, domains), applied(*model, x, domains))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: DomainAdaptation(4, 3), "num_experts 3 must be at least num_domains 4"),
        (lambda: DomainAdaptation(3, 6, DomainGate(3, 5)), "3 domains and 5 experts"),
        (lambda: adapt(nn.Linear(2, 2), DomainAdaptation(2), 0), "rank 0"),
        (lambda: adapt(nn.Bilinear(2, 2, 2), DomainAdaptation(2), 1), "a Bilinear cannot be adapted"),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_is_refused(wrong: Callable[[], object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        wrong()


def test_experts_of_published_code_share_every_row_alike() -> None:
    torch.manual_seed(5)
    adaptation = DomainAdaptation(N, N, shared_by="all")
    tower = nn.Sequential(adapt(nn.Linear(6, 7), adaptation, 3))
    for parameter in linears(tower)[0].domain_experts.parameters():
        nn.init.normal_(parameter)
    x, domains = rows()
    weights = torch.full((len(x), N), 1 / N)
    torch.testing.assert_close(applied(tower, adaptation, x, domains), literal(tower, x, weights))


def test_whether_the_gate_is_used_is_part_of_the_model() -> None:
    _, adaptation = tower_of(num_features=0)
    _, other = tower_of(num_features=0)
    adaptation.use_gate()
    other.load_state_dict(adaptation.state_dict())
    _, domains = rows()
    assert other.gate is not None
    assert torch.equal(other.weights(domains), other.gate(domains))
