"""What trains the dense arch in a phase: AdamW, or Muon for its hidden matrices beside AdamW for the rest."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from recsys.config import ConfigError, DenseOptimizerConfig
from recsys.model.experts import expert_layers, parameter_groups, up_projections

UP_PROJECTIONS = "up_projections"
"""Key of an optimizer's group of parameters: whether these are the experts' up-projections."""


def build_dense_optimizer(
    dense_arch: nn.Module, settings: DenseOptimizerConfig, *, apart: bool = False
) -> CombinedOptimizer:
    """The optimizer of what is free in a dense arch, at rates of 0.

    Its state has the names of the parameters, whichever of the two optimizers trains them.

    Args:
        dense_arch: whose parameters that require a gradient are trained.
        settings: of the config.
        apart: whether the experts' up-projections have a rate of their own, and so groups of their own, in which
            `UP_PROJECTIONS` is True.

    Raises:
        ConfigError: Muon is asked for, and nothing is there that it may train.
    """
    of_muon = _matrices(dense_arch, settings) if settings.type == "muon" else set()
    up = set(map(id, up_projections(dense_arch))) if apart else set()
    trained = {name: parameter for name, parameter in dense_arch.named_parameters() if parameter.requires_grad}
    by_adamw = {name: parameter for name, parameter in trained.items() if id(parameter) not in of_muon}
    by_muon = {name: parameter for name, parameter in trained.items() if id(parameter) in of_muon}
    optimizers = []
    if by_adamw:
        adamw = torch.optim.AdamW(
            _groups(by_adamw, up),
            lr=0.0,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=settings.fused or None,  # None leaves torch's own choice, False would take it away
        )
        optimizers.append(KeyedOptimizerWrapper(by_adamw, lambda _: adamw))
    if by_muon:
        muon = torch.optim.Muon(
            _groups(by_muon, up),
            lr=0.0,
            weight_decay=settings.weight_decay,
            momentum=settings.muon.momentum,
            adjust_lr_fn="match_rms_adamw",  # so that AdamW's rate serves both
        )
        optimizers.append(KeyedOptimizerWrapper(by_muon, lambda _: muon))
    return CombinedOptimizer([("", optimizer) for optimizer in optimizers])


def check_dense_optimizer(dense_arch: nn.Module, settings: DenseOptimizerConfig) -> None:
    """Refuse, before a run begins, what `build_dense_optimizer` would.

    Raises:
        ConfigError: as there.
    """
    if settings.type == "muon":
        _matrices(dense_arch, settings)


def _groups(parameters: Mapping[str, nn.Parameter], up: set[int]) -> list[dict[str, Any]]:
    """The groups of an optimizer's parameters, none of which is empty; `up` are ids of those that are apart."""
    groups = [
        {"params": [one for one in parameters.values() if (id(one) in up) is is_up], UP_PROJECTIONS: is_up}
        for is_up in (False, True)
    ]
    return [group for group in groups if group["params"]]


def _matrices(dense_arch: nn.Module, settings: DenseOptimizerConfig) -> set[int]:
    """Ids of the parameters that Muon trains."""
    of_linears = set(map(id, _hidden_matrices(dense_arch)))
    if not of_linears:
        raise ConfigError("optimizers.dense.type is muon, but the model has no hidden matrix for it; set it to adamw")
    if not settings.muon.experts:
        return of_linears
    of_experts = set(map(id, _expert_matrices(dense_arch)))
    if not of_experts:
        raise ConfigError(
            "optimizers.dense.muon.experts: no hidden linear has two experts or more, which make a matrix; set it to "
            "false, or model.hilomoe.experts_in to linears of the tower"
        )
    return of_linears | of_experts


def _hidden_linears(dense_arch: nn.Module) -> Iterator[nn.Linear]:
    """Those between the input, which the projection of dense features is, and outputs of a single number."""
    for name, module in dense_arch.named_modules():
        if (
            isinstance(module, nn.Linear)
            and name != "dense_projection"
            and min(module.weight.shape) > 1  # of a single row or column, Muon would make a normalised gradient
        ):
            yield module


def _hidden_matrices(dense_arch: nn.Module) -> list[Tensor]:
    """The weights of hidden linears, without those that experts have of their own."""
    backbone = set(map(id, parameter_groups(dense_arch)["backbone"]))
    return [linear.weight for linear in _hidden_linears(dense_arch) if id(linear.weight) in backbone]


def _expert_matrices(dense_arch: nn.Module) -> list[nn.Parameter]:
    """What experts on hidden linears have of matrices, all experts of a linear in one."""
    hidden = set(map(id, _hidden_linears(dense_arch)))
    return [
        parameter
        for layer in expert_layers(dense_arch).values()
        if id(layer) in hidden
        for parameters in layer.parameter_groups().values()
        for parameter in parameters
        if parameter.ndim == 2 and min(parameter.shape) > 1
    ]
