"""Batch norm over ranks is torch's on the rows of all of them, and its statistics stay where they must."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from recsys.model.experts import attach_experts
from recsys.model.towers.mlp import MLP
from recsys.model.towers.normalization import BatchNorm
from recsys.model.towers.transformer import Transformer
from recsys.runtime import Ranks

tensor = partial(torch.tensor, dtype=torch.float64)
WIDTH, HIDDEN = 6, (5, 4)
STEPS = ((4, 3, 0), (2, 0, 0), (5, 5, 5), (0, 1, 8))
"""Rows of each rank."""


def perceptron() -> MLP:
    torch.manual_seed(0)
    tower = MLP(WIDTH, HIDDEN, normalization="batch", activation="silu").double()
    for parameter in tower.norms.parameters():
        nn.init.normal_(parameter)
    return tower


def rows_of(step: int) -> tuple[Tensor, Tensor]:
    """Input and labels of all ranks' rows of a step."""
    generator = torch.Generator().manual_seed(step)
    x = 3 + 2 * torch.randn(sum(STEPS[step]), WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(2, (len(x), HIDDEN[-1]), generator=generator).double()


def torchs(tower: MLP) -> tuple[nn.Sequential, list[nn.Parameter]]:
    """The same of torch's modules, and its parameters in the order of the tower's."""
    linears, norms = deepcopy(tower.linears), []
    for norm, width in zip(tower.norms, HIDDEN, strict=True):
        norms.append(nn.BatchNorm1d(width).double())
        norms[-1].load_state_dict({**norm.state_dict(), "num_batches_tracked": torch.tensor(0)})
    modules = [module for layer in zip(linears, norms, strict=True) for module in (*layer, nn.SiLU())]
    return nn.Sequential(*modules), [*linears.parameters(), *nn.ModuleList(norms).parameters()]


def train(ranks: Ranks) -> tuple[list[list[Any]], list[Any]]:
    """Of each step this rank's outputs, their gradient by the input, and by parameters; statistics in the end."""
    tower = perceptron()
    wrapped = DistributedDataParallel(tower, gradient_as_bucket_view=True)
    wrapped.broadcast_buffers = False
    told = []
    for step, sizes in enumerate(STEPS):
        x, labels = (of.split(sizes)[ranks.rank] for of in rows_of(step))
        x = x.clone().requires_grad_()
        tower.zero_grad()
        y = wrapped(x)
        loss = F.binary_cross_entropy_with_logits(y, labels, reduction="sum") * (ranks.world_size / sum(sizes))
        loss.backward()
        gradients = [value.grad for value in (x, *tower.parameters()) if value.grad is not None]
        told.append([value.tolist() for value in (y, *gradients)])
    tower.requires_grad_(False)
    if ranks.is_first:  # a collective call would wait for the others
        tower(x.detach())
    return told, [buffer.tolist() for buffer in tower.buffers()]


def test_over_ranks_it_is_torchs_on_the_rows_of_all() -> None:
    tower = perceptron()
    reference, parameters = torchs(tower)
    (told, buffers), *others = run_ranks(3, train)
    for step in range(len(STEPS)):
        x, labels = rows_of(step)
        x.requires_grad_()
        reference.zero_grad()
        y = reference(x)
        (F.binary_cross_entropy_with_logits(y, labels, reduction="sum") / len(x)).backward()
        of_ranks = [told[step], *(of_rank[step] for of_rank, _ in others)]
        outputs, of_input = (tensor([row for of_rank in of_ranks for row in of_rank[n]]) for n in (0, 1))
        torch.testing.assert_close(outputs, y.detach())
        torch.testing.assert_close(of_input / len(of_ranks), x.grad)
        assert all(of_rank[2:] == told[step][2:] for of_rank in of_ranks)
        for found, parameter in zip(told[step][2:], parameters, strict=True):
            torch.testing.assert_close(tensor(found), parameter.grad, rtol=1e-7, atol=1e-12)
    assert all(of_rank == buffers for _, of_rank in others)
    expected = [buffer for buffer in reference.buffers() if buffer.ndim]
    for found, buffer in zip(buffers, expected, strict=True):
        torch.testing.assert_close(tensor(found), buffer)


def test_one_process_needs_no_group_and_gradients_are_those_of_differences() -> None:
    norm = BatchNorm(3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), (x, norm.weight, norm.bias))


def test_one_row_in_all_becomes_the_bias_and_tells_no_statistics() -> None:
    norm = BatchNorm(3)
    nn.init.normal_(norm.bias)
    before = deepcopy(norm.state_dict())
    for rows in (1, 0):
        x = torch.randn(rows, 3, requires_grad=True)
        y = norm(x)
        torch.testing.assert_close(y, norm.bias.expand(rows, 3))
        (y**2).sum().backward()
        assert x.grad is not None and not x.grad.any()
        assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_means_far_beyond_the_deviations_do_not_swallow_these() -> None:
    x = 1e4 + torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    norm = BatchNorm(2)
    norm(x)
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * x.double().var(0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("freeze", [lambda norm: norm.requires_grad_(False), lambda norm: norm.eval()])
def test_frozen_or_in_evaluation_running_statistics_are_used_and_stay(freeze: Callable[[BatchNorm], object]) -> None:
    norm = BatchNorm(3)
    norm(3 * torch.randn(9, 3))
    freeze(norm)
    before, x = deepcopy(norm.state_dict()), torch.randn(4, 3, requires_grad=True)
    expected = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    torch.testing.assert_close(norm(x), expected)
    for rows in (x, x[:0]):  # a rank's batch may be empty
        norm(rows).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())


def test_autocast_leaves_statistics_in_the_parameters_precision() -> None:
    torch.manual_seed(0)
    linear, norm, x = nn.Linear(8, 4), BatchNorm(4), 2 + torch.randn(64, 8)
    with torch.autocast("cpu", torch.bfloat16):
        z = linear(x)
        y = norm(z)
    assert z.dtype == torch.bfloat16 and y.dtype == torch.float32
    torch.testing.assert_close(norm.running_mean, 0.1 * z.float().mean(0))
    torch.testing.assert_close(y.var(0, correction=0), torch.ones(4), rtol=0, atol=1e-3)
    (y**3).sum().backward()
    assert linear.weight.grad is not None and linear.weight.grad.any() and linear.weight.grad.isfinite().all()


def worn(tower: nn.Module) -> nn.Module:
    """A tower in evaluation whose statistics are those of no fresh one."""
    for norm in (module for module in tower.modules() if isinstance(module, BatchNorm)):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.01, 4)
    return tower.eval()


@pytest.mark.parametrize("experts", [False, True])
def test_folded_into_linears_it_computes_the_same(experts: bool) -> None:
    torch.manual_seed(0)
    tower = MLP(WIDTH, [32, 16], normalization="batch")
    if experts:
        attach_experts(tower, ["linears.1"], 2, 3)
    x = torch.randn(200, WIDTH)
    expected = worn(tower).requires_grad_(False)(x)
    tower.fold_norms()
    assert [type(norm) for norm in tower.norms] == [nn.Identity, BatchNorm if experts else nn.Identity]
    torch.testing.assert_close(tower(x), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_tokens_count_as_rows_and_a_program_takes_any_number_of_rows() -> None:
    tower = worn(Transformer([4, 2], 4, 1, 2, 8, normalization="batch", activation="gelu"))
    rows = torch.export.Dim("rows", min=0)
    program = torch.export.export(tower, (torch.zeros(3, 6),), dynamic_shapes=({0: rows},)).module()
    for count in (0, 1, 7):
        x = torch.randn(count, 6)
        torch.testing.assert_close(program(x), tower(x))
    norm = BatchNorm(4)
    tokens = torch.randn(5, 3, 4)
    torch.testing.assert_close(
        norm(tokens), F.batch_norm(tokens.flatten(0, 1), None, None, training=True).view(5, 3, 4)
    )
