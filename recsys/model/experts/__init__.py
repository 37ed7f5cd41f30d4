"""Experts: layers that perturb a linear of any module, behind one protocol; HiLoMoE is the first kind."""

from recsys.model.experts.attach import attach_experts, expert_layers, merge_experts, parameter_groups, up_projections
from recsys.model.experts.hilomoe import HiLoMoELinear
from recsys.model.experts.protocol import ExpertLayer, ExpertRouting

__all__ = [
    "ExpertLayer",
    "ExpertRouting",
    "HiLoMoELinear",
    "attach_experts",
    "expert_layers",
    "merge_experts",
    "parameter_groups",
    "up_projections",
]
