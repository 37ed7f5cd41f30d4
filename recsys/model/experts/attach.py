"""Putting experts on the linears of a model, and finding them there."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.experts.protocol import ExpertLayer

EXPERT_LAYERS: tuple[type[ExpertLayer], ...] = (HiLoMoELinear,)
"""Every kind of layer with experts; a new one is entered here."""


def expert_layers(module: nn.Module) -> dict[str, ExpertLayer]:
    """All layers of a module that have experts by name, in order of registration."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, EXPERT_LAYERS)}
    return cast("dict[str, ExpertLayer]", found)


def parameter_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a module by the name under which a stage trains them: `backbone`, and those that experts have.

    Every parameter is in one group. `backbone` is all that belongs to no expert, and always there.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": []}
    for layer in expert_layers(module).values():
        for name, parameters in layer.parameter_groups().items():
            groups.setdefault(name, []).extend(parameters)
    of_experts = {id(parameter) for parameters in groups.values() for parameter in parameters}
    groups["backbone"] = [parameter for parameter in module.parameters() if id(parameter) not in of_experts]
    return groups


def up_projections(module: nn.Module) -> list[nn.Parameter]:
    """The up-projections of all experts of a module, which may be trained at a rate of their own."""
    return [parameter for layer in expert_layers(module).values() for parameter in layer.up_projections()]


def attach_experts(
    module: nn.Module, patterns: Sequence[str], num_layers: int, num_experts: int, **options: Any
) -> dict[str, HiLoMoELinear]:
    """Put HiLoMoE experts on the `nn.Linear`s of a module whose names match a pattern; the module computes what it did.

    Args:
        module: changed in place.
        patterns: of dotted names, as `fnmatch` reads them: `tower.*`, `tower.linears.0`.
        num_layers: L.
        num_experts: K.
        options: of `HiLoMoELinear.from_linear`.

    Returns:
        The new layers by name.

    Raises:
        ValueError: a pattern matches no linear.
    """
    linears = {name: child for name, child in module.named_modules() if type(child) is nn.Linear}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"{pattern!r} matches no linear; there are {', '.join(linears) or 'none'}")
    attached: dict[str, HiLoMoELinear] = {}
    for name, linear in linears.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            attached[name] = HiLoMoELinear.from_linear(linear, num_layers, num_experts, **options)
            _put(module, name, attached[name])
    return attached


def merge_experts(module: nn.Module) -> list[str]:
    """Put in the place of layers with experts the linears that compute the same in evaluation, where there are such.

    Args:
        module: changed in place.

    Returns:
        The names of the layers that were replaced.
    """
    merged = {name: layer.merge() for name, layer in expert_layers(module).items() if layer.merges}
    for name, linear in merged.items():
        _put(module, name, linear)
    return list(merged)


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)
