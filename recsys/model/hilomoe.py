"""HiLoMoE: a linear layer with a hierarchical mixture of rank-1 LoRA experts (arXiv 2510.10432).

Shapes: N rows (all leading dimensions of the input), D_in and D_out widths, L layers of experts, K experts a layer.

For an input row x the layer computes, with one query q and one simplex of scores s a layer of experts,

    s_l = softmax(V_l q_l / sqrt(D_in)),   q_1 = x,   q_{l+1} = q_l + V_l' s_l
    y   = W x + b + sum_l U_l (s_l * V_l x)

V_l is router key and down-projection in one, so routing has no parameters of its own; a layer's scores depend on the
scores of the layers before it, never on their outputs. Two exact identities make this nearly free:

* All layers act on the same x, so with V and U stacked over layers there is one GEMM h = V x and one GEMM U (s * h),
  for any L.
* V_l q_l = h_l + sum_{m<l} (V_l V_m') s_m: routing stays in expert space, given the Gram matrix V V' (LK x LK), which
  is computed once a call. Routing a row costs O(L^2 K^2) instead of O(L K D_in).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Routing:
    """How one call routed its rows. Both tensors are (N, L, K), float64 if the parameters are and else float32.

    Attributes:
        logits: router logits before any top-k mask, 1/sqrt(D_in) included.
        scores: the experts' weights; non-negative, each (row, layer) sums to 1.
    """

    logits: Tensor
    scores: Tensor

    def load(self) -> Tensor:
        """Share of a layer's routed mass that each expert got, (L, K); rows sum to 1, or are 0 without any input."""
        return self.scores.sum(0) / max(self.scores.shape[0], 1)

    def balance_loss(self) -> Tensor:
        """K * sum_i load_i^2 for each layer, (L,): 1 at uniform load, K when one expert takes everything.

        The Switch loss K * sum_i f_i P_i with f = P: under dense softmax routing the mass an expert gets is its mean
        score, and this form, unlike the argmax one, has its strict minimum at uniform load.
        """
        return self.load().square().sum(-1) * self.scores.shape[-1]

    def z_loss(self) -> Tensor:
        """Mean over rows of logsumexp(logits)^2 for each layer, (L,); keeps the router's logits small."""
        return self.logits.logsumexp(-1).square().sum(0) / max(self.logits.shape[0], 1)

    def entropy(self) -> Tensor:
        """Mean over rows of the scores' entropy in nats for each layer, (L,): log K is uniform, 0 one expert a row."""
        total: Tensor = torch.special.entr(self.scores).sum((0, -1))
        return total / max(self.scores.shape[0], 1)


class HiLoMoELinear(nn.Linear):
    """A drop-in for `nn.Linear` whose weight is perturbed, per row, by L layers of K rank-1 experts.

    A state dict of `nn.Linear` is a subset of this layer's, and since `lora_B` starts at zero the layer starts as
    exactly that linear. Names follow LoRA: `lora_A` is V stacked, `lora_B` is U stacked.

    Args:
        in_features: D_in.
        out_features: D_out.
        num_layers: L; 0 leaves the plain linear.
        num_experts: K; 0 leaves the plain linear.
        top_k: keep only the k largest logits of each layer and row (softmax over the survivors); None routes densely,
            as the paper's formulas do.
        bias: whether there is b.
        device: of the parameters.
        dtype: of the parameters; routing is float32 at least.

    Attributes:
        experts_active: False computes the plain linear only. With `lora_B` zero the output is the same bit for bit.
        record_routing: True keeps the last call's `Routing` in `routing`, with its graph, for auxiliary losses.
        routing: the last recorded routing.

    Raises:
        ValueError: a negative size, or top_k outside 1..num_experts.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_layers: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_layers < 0 or num_experts < 0:
            raise ValueError(f"num_layers {num_layers} and num_experts {num_experts} must not be negative")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must lie in 1..num_experts = {num_experts}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        experts = num_layers * num_experts
        self.lora_A = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, experts, device=device, dtype=dtype))
        self.experts_active = experts > 0
        self.record_routing = False
        self.routing: Routing | None = None
        self.reset_experts()

    def reset_experts(self) -> None:
        """Give every layer of experts fresh Xavier-uniform keys V (K x D_in) and U = 0."""
        for keys in self.lora_A.detach().split(self.num_experts) if self.experts_active else ():
            nn.init.xavier_uniform_(keys)
        nn.init.zeros_(self.lora_B)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_layers: int, num_experts: int, *, top_k: int | None = None) -> Self:
        """Attach experts to a trained linear; weight and bias are copied, the output is unchanged bit for bit."""
        layer = cls(
            linear.in_features,
            linear.out_features,
            num_layers,
            num_experts,
            top_k=top_k,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.load_state_dict(linear.state_dict(), strict=False)
        return layer

    def expert_parameters(self) -> list[nn.Parameter]:
        """U and V: (D_in + D_out) L K numbers, all the parameters that the experts and their routing have."""
        return [self.lora_A, self.lora_B]

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., D_in), giving (..., D_out)."""
        base = F.linear(x, self.weight, self.bias)
        if not self.experts_active:
            return base
        rows = x.reshape(-1, self.in_features)
        down = F.linear(rows, self.lora_A)
        routing = self.route(down)
        if self.record_routing:
            self.routing = routing
        weighted = down * routing.scores.flatten(1).to(down.dtype)
        return torch.addmm(base.reshape(-1, self.out_features), weighted, self.lora_B.t().to(down.dtype)).view_as(base)

    def route(self, down: Tensor) -> Routing:
        """Scores of every layer from the down-projection h = V x, (N, L K)."""
        return _route(down, self.lora_A, self.num_layers, self.num_experts, self.top_k)

    def extra_repr(self) -> str:
        """Sizes as nn.Linear shows them, and the experts."""
        return (
            f"{super().extra_repr()}, num_layers={self.num_layers}, num_experts={self.num_experts}, top_k={self.top_k}"
        )


@torch.fx.wrap  # autocast's switch is nothing that symbolic tracing can record
def _route(down: Tensor, keys: Tensor, num_layers: int, num_experts: int, top_k: int | None) -> Routing:
    """Float32 at least, autocast or not: the scores of a layer feed the next one's logits."""
    with torch.autocast(down.device.type, enabled=False):
        precision = torch.promote_types(keys.dtype, torch.float32)
        scale = keys.shape[1] ** -0.5
        keys = keys.to(precision)
        gram = keys @ keys.t()
        first = down.to(precision)
        logits: list[Tensor] = []
        scores: list[Tensor] = []
        for layer in range(num_layers):
            here = slice(layer * num_experts, (layer + 1) * num_experts)
            query = first[:, here]
            if layer:
                query = torch.addmm(query, torch.cat(scores, 1), gram[: here.start, here])
            logits.append(query * scale)
            scores.append(_normalise(logits[-1], top_k))
        return Routing(torch.stack(logits, 1), torch.stack(scores, 1))


def _normalise(logits: Tensor, top_k: int | None) -> Tensor:
    if top_k is None or top_k == logits.shape[-1]:
        return logits.softmax(-1)
    kept, experts = logits.topk(top_k, -1)
    return torch.zeros_like(logits).scatter(-1, experts, kept.softmax(-1))


def hilomoe_layers(module: nn.Module) -> dict[str, HiLoMoELinear]:
    """All HiLoMoE linears of a module by name, in order of registration."""
    return {name: child for name, child in module.named_modules() if isinstance(child, HiLoMoELinear)}


def attach_experts(
    module: nn.Module, patterns: Sequence[str], num_layers: int, num_experts: int, **options: Any
) -> dict[str, HiLoMoELinear]:
    """Put experts on the `nn.Linear`s of a module whose names match a pattern; the module computes what it did.

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
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, attached[name])
    return attached
