"""Putting experts on the linears of a model, and finding them there."""

from collections.abc import Callable, Collection, Sequence
from fnmatch import fnmatchcase
from typing import Any, cast

from torch import nn

from recsys.model.experts.domains import ADAPTED, DomainAdaptation, DomainLinear, adapt
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.experts.protocol import ExpertLayer

EXPERT_LAYERS: tuple[type[ExpertLayer], ...] = (HiLoMoELinear,)
"""Every kind of layer with experts; a new one is entered here."""


class DomainHiLoMoELinear(DomainLinear, HiLoMoELinear):
    """A linear with routed experts that adapts to domains besides: both add to what the linear computes."""

    @property
    def merges(self) -> bool:
        """No single linear computes the same."""
        return False


ADAPTED[HiLoMoELinear] = DomainHiLoMoELinear

DOMAIN_EXPERTS = "domain_experts."
"""What the name of the group of a domain expert's parameters, over all linears, begins with; its number follows."""

GATE = "gate"
"""The group of parameters of the gate over domain experts."""


def expert_layers(module: nn.Module) -> dict[str, ExpertLayer]:
    """All layers of a module that have routed experts by name, in order of registration."""
    found = {name: child for name, child in module.named_modules() if isinstance(child, EXPERT_LAYERS)}
    return cast("dict[str, ExpertLayer]", found)


def domain_linears(module: nn.Module) -> dict[str, DomainLinear]:
    """All linears of a module that adapt to domains by name, in order of registration."""
    return {name: child for name, child in module.named_modules() if isinstance(child, DomainLinear)}


def domain_adaptation(module: nn.Module) -> DomainAdaptation | None:
    """What linears of a module adapt to domains by, if any do."""
    return next((child for child in module.modules() if isinstance(child, DomainAdaptation)), None)


def parameter_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of a module by the name under which a stage trains them.

    Every parameter is in one group: `backbone`, which is all that belongs to no expert and always there; those that
    layers of experts name; and of domain experts, `DOMAIN_EXPERTS` with the number of each, and `GATE`.
    """
    groups: dict[str, list[nn.Parameter]] = {"backbone": []}
    for layer in expert_layers(module).values():
        for name, parameters in layer.parameter_groups().items():
            groups.setdefault(name, []).extend(parameters)
    for linear in domain_linears(module).values():
        for expert in range(len(linear.domain_experts)):
            groups.setdefault(f"{DOMAIN_EXPERTS}{expert}", []).extend(linear.domain_parameters(expert))
    if (adaptation := domain_adaptation(module)) is not None and adaptation.gate is not None:
        groups[GATE] = list(adaptation.gate.parameters())
    of_experts = {id(parameter) for parameters in groups.values() for parameter in parameters}
    groups["backbone"] = [parameter for parameter in module.parameters() if id(parameter) not in of_experts]
    return groups


def up_projections(module: nn.Module) -> list[nn.Parameter]:
    """The up-projections of all experts of a module, which may be trained at a rate of their own."""
    routed = [parameter for layer in expert_layers(module).values() for parameter in layer.up_projections()]
    return routed + [up for linear in domain_linears(module).values() for up in linear.domain_up_projections()]


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
    attached: dict[str, HiLoMoELinear] = {}
    for name, linear in _matching(module, patterns, {nn.Linear}).items():
        attached[name] = HiLoMoELinear.from_linear(linear, num_layers, num_experts, **options)
        _put(module, name, attached[name])
    return attached


def attach_domain_experts(
    module: nn.Module,
    patterns: Sequence[str],
    adaptation: DomainAdaptation,
    rank: Callable[[nn.Linear], int],
    **options: Any,
) -> dict[str, DomainLinear]:
    """Have linears of a module whose names match a pattern adapt to domains; the module computes what it did.

    Args:
        module: changed in place; some of its linears may have routed experts.
        patterns: as of `attach_experts`.
        adaptation: of all these linears; it must be put into the module by who calls.
        rank: of the experts of a linear.
        options: of `adapt`.

    Returns:
        These linears by name.

    Raises:
        ValueError: a pattern matches no linear.
    """
    matching = _matching(module, patterns, ADAPTED)
    return {name: adapt(linear, adaptation, rank(linear), **options) for name, linear in matching.items()}


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


def _matching(module: nn.Module, patterns: Sequence[str], kinds: Collection[type[nn.Linear]]) -> dict[str, nn.Linear]:
    """Linears of a module that are of these very kinds, and whose names match a pattern, by name."""
    linears = {name: child for name, child in module.named_modules() if type(child) in kinds}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise ValueError(f"{pattern!r} matches no linear; there are {', '.join(linears) or 'none'}")
    return {name: linear for name, linear in linears.items() if any(fnmatchcase(name, of) for of in patterns)}


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(module.get_submodule(parent), last, child)
