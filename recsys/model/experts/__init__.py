"""Experts: layers that perturb a linear of any module, routed ones behind one protocol, and those of domains."""

from recsys.model.experts.attach import (
    DOMAIN_EXPERTS,
    GATE,
    attach_domain_experts,
    attach_experts,
    domain_adaptation,
    domain_linears,
    expert_layers,
    merge_experts,
    parameter_groups,
    up_projections,
)
from recsys.model.experts.domains import DomainAdaptation, DomainGate, DomainLinear, rank_of
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.experts.protocol import ExpertLayer, ExpertRouting

__all__ = [
    "DOMAIN_EXPERTS",
    "GATE",
    "DomainAdaptation",
    "DomainGate",
    "DomainLinear",
    "ExpertLayer",
    "ExpertRouting",
    "HiLoMoELinear",
    "attach_domain_experts",
    "attach_experts",
    "domain_adaptation",
    "domain_linears",
    "expert_layers",
    "merge_experts",
    "parameter_groups",
    "rank_of",
    "up_projections",
]
