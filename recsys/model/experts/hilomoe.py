"""HiLoMoE: a linear layer with a hierarchical mixture of rank-1 LoRA experts (arXiv 2510.10432).

Shapes: N rows (all leading dimensions of the input), D_in and D_out widths, L layers of K experts.

For an input row x the layer computes, with one query q and one simplex of scores s a layer of experts,

    s_l = softmax(V_l q_l / sqrt(D_in)),   q_1 = x,   q_{l+1} = q_l + V_l' s_l
    y   = W x + b + sum_l U_l (s_l * V_l x)

V_l is router key and down-projection in one, so routing has no parameters of its own; a layer's scores depend on the
scores of the layers before it, never on their outputs. Two exact identities make this nearly free:

* All layers act on the same x, so with V and U stacked over layers there is one GEMM h = V x and one GEMM U (s * h),
  for any L.
* V_l q_l = h_l + sum_{m<l} (V_l V_m') s_m: routing stays in expert space, given the Gram matrix V V' (LK x LK), which
  is computed once a call. Routing a row costs O(L^2 K^2) instead of O(L K D_in).

Within the layer, what lives in expert space is (L K, N), rows last: a softmax over few experts then runs along
neighbouring rows, and all layers before the l-th are one contiguous block.
"""

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MEAN_SQUARE_EPS = 1e-6
"""Added to the mean square of a query before it is normalised, so that the gradient at x = 0 is bounded."""


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

    def balance_loss(self, form: Literal["mean_score", "argmax"] = "mean_score") -> Tensor:
        """K * sum_i f_i P_i for each layer, (L,), with P the load: 1 at uniform load, K when one expert takes all.

        Args:
            form: what f is, which the paper's public text leaves open. `mean_score`: P itself; under dense softmax
                routing the mass that an expert gets is its mean score, and this form alone has its strict minimum at
                uniform load. `argmax`: share of the rows whose largest score is the expert's, the Switch loss
                (arXiv 2101.03961, eq. 4).
        """
        load = self.load()
        if form == "argmax":
            first = self.scores.argmax(-1, keepdim=True)
            chosen = torch.zeros_like(self.scores).scatter(-1, first, 1.0).sum(0) / max(self.scores.shape[0], 1)
        else:
            chosen = load
        return (chosen * load).sum(-1) * self.scores.shape[-1]

    def z_loss(self) -> Tensor:
        """Mean over rows of logsumexp(logits)^2 for each layer, (L,); keeps the router's logits small."""
        return self.logits.logsumexp(-1).square().sum(0) / max(self.logits.shape[0], 1)

    def entropy(self) -> Tensor:
        """Mean over rows of the scores' entropy in nats per layer, (L,): log K is uniform, 0 one expert per row."""
        total: Tensor = torch.special.entr(self.scores).sum((0, -1))
        return total / max(self.scores.shape[0], 1)


class HiLoMoELinear(nn.Linear):
    """A drop-in for `nn.Linear` whose weight is perturbed, per row, by L layers of K rank-1 experts.

    A state dict of `nn.Linear` is a subset of this layer's, and since `lora_B` starts at zero the layer starts as
    exactly that linear. Names follow LoRA: `lora_A` is V stacked (L K, D_in), `lora_B` is U stacked (D_out, L K).

    Every input vector is routed on its own: a sample in an MLP, a token in a transformer. That and the options below
    are where the paper's public text leaves a choice; each default is the plainest reading of its formulas.

    Args:
        in_features: D_in.
        out_features: D_out.
        num_layers: L; 0 leaves the plain linear.
        num_experts: K; 0 leaves the plain linear.
        top_k: keep only the k largest logits of each layer and row (softmax over the survivors); None routes densely,
            as the paper's formulas do.
        hierarchical: False leaves every query at q_1, so that layers route independently: the flat control.
        normalize_query: q_1 is divided by its root mean square, so that the scale of the embeddings, which grows in
            training, does not sharpen the routing. Combine it with `key_init="normal"`.
        key_init: `xavier_uniform`, by layer; or `normal` of unit variance, which gives queries of root mean square 1
            logits of unit variance at any width, where Xavier's shrink as 1/sqrt(D_in).
        up_init: `zeros`, which makes attaching experts exact; or `normal` of variance 1/(L K), their fan-in, under
            which U neither amplifies nor damps what it maps: the ablation.
        bias: whether there is b.
        device: of the parameters.
        dtype: of the parameters; routing is float32 at least.

    Attributes:
        experts_active: False computes the plain linear only. With `lora_B` zero the output is the same bit for bit.
        record_routing: True keeps the last call's `Routing` in `routing`, with its graph, for auxiliary losses; an
            exported program records nothing.
        routing: the last recorded routing.
        fused: True runs routing and experts as one autograd function with a backward pass of its own. False leaves the
            backward pass to autograd, which `torch.func` transforms and forward-mode need; `torch.compile` and
            `torch.export` always do so.

    Raises:
        ValueError: a negative size, top_k outside 1..num_experts, an unknown init.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_layers: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        hierarchical: bool = True,
        normalize_query: bool = False,
        key_init: Literal["xavier_uniform", "normal"] = "xavier_uniform",
        up_init: Literal["zeros", "normal"] = "zeros",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_layers < 0 or num_experts < 0:
            raise ValueError(f"num_layers {num_layers} and num_experts {num_experts} must not be negative")
        if top_k is not None and not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k {top_k} must lie in 1..num_experts = {num_experts}")
        for name, value, known in (
            ("key_init", key_init, ("xavier_uniform", "normal")),
            ("up_init", up_init, ("zeros", "normal")),
        ):
            if value not in known:
                raise ValueError(f"{name} {value!r} must be one of {', '.join(known)}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.hierarchical, self.normalize_query = hierarchical, normalize_query
        self.key_init, self.up_init = key_init, up_init
        self._num_all_experts = experts = num_layers * num_experts
        self.lora_A = nn.Parameter(torch.empty(experts, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, experts, device=device, dtype=dtype))
        self.experts_active = experts > 0
        self.record_routing = False
        self.routing: Routing | None = None
        self.fused = True
        self.reset_experts()

    def reset_experts(self) -> None:
        """Give the experts and their routing fresh parameters, as `key_init`, `up_init` and the options say."""
        if self._num_all_experts:
            for keys in self.lora_A.detach().split(self.num_experts):
                (nn.init.normal_ if self.key_init == "normal" else nn.init.xavier_uniform_)(keys)
        if self.up_init == "normal" and self._num_all_experts:
            nn.init.normal_(self.lora_B, std=self._num_all_experts**-0.5)
        else:
            nn.init.zeros_(self.lora_B)

    @classmethod
    def from_linear(cls, linear: nn.Linear, num_layers: int, num_experts: int, **options: Any) -> Self:
        """Attach experts to a trained linear; weight and bias are copied.

        With `up_init="zeros"` the output is unchanged bit for bit.

        Args:
            linear: left as it is.
            num_layers: L.
            num_experts: K.
            options: keyword arguments of the constructor but `bias`, `device` and `dtype`, which are the linear's.
        """
        layer = cls(
            linear.in_features,
            linear.out_features,
            num_layers,
            num_experts,
            **options,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        layer.load_state_dict(linear.state_dict(), strict=False)
        return layer.train(linear.training)

    @property
    def merges(self) -> bool:
        """Whether `merge` has a linear to give: but for active layers of more than one expert."""
        return not self.experts_active or self._num_all_experts == 0 or self.num_experts == 1

    def merge(self) -> nn.Linear:
        """The `nn.Linear` that computes the same in evaluation, a copy, where there is one.

        Raises:
            ValueError: active layers of more than one expert: their scores, and so the weight, depend on the input.
        """
        active = self.experts_active and self._num_all_experts > 0
        if not self.merges:
            raise ValueError(
                f"{self.num_layers} layers of {self.num_experts} experts do not merge into one linear: the scores that "
                "weigh them depend on each input row; only layers of a single expert merge"
            )
        linear = nn.Linear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            device=self.weight.device,
            dtype=self.weight.dtype,
        )
        with torch.no_grad():
            linear.weight.copy_(self.weight + self.lora_B @ self.lora_A if active else self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.train(self.training)

    def expert_parameters(self) -> list[nn.Parameter]:
        """All the parameters of experts and routing, U and V: (D_in + D_out) L K numbers."""
        return [self.lora_A, self.lora_B]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What a stage may train by name: `experts`."""
        return {"experts": self.expert_parameters()}

    def up_projections(self) -> list[nn.Parameter]:
        """U, which a stage may train at a rate of its own."""
        return [self.lora_B]

    @property
    def expert_multiply_adds(self) -> int:
        """Of the experts' two projections for a row, routing left out: (D_in + D_out) L K."""
        return self.num_expert_parameters

    @property
    def num_expert_parameters(self) -> int:
        """Numbers in U and V: (D_in + D_out) L K. Routing has none of its own."""
        return self._num_all_experts * (self.in_features + self.out_features)

    def forget_routing(self) -> None:
        """Drop the last recorded routing, and its graph."""
        self.routing = None

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x (..., D_in), giving (..., D_out)."""
        if not (self.experts_active and self._num_all_experts):
            return F.linear(x, self.weight, self.bias)
        rows = x.reshape(-1, self.in_features)
        base, down = _project(rows, self.weight, self.bias, self.lora_A, self.fused)
        first, gram = self._router(rows, down)
        output, logits, scores = _apply_experts(
            base, down, self.lora_B, first, gram, self.num_experts, self.top_k, self.fused
        )
        # The flag itself, for under torch.compile `is_exporting()` of torch 2.11 is true as well.
        if self.record_routing and not torch.compiler._is_exporting_flag:
            self.routing = self._routing(logits, scores)
        return output.reshape(x.shape[:-1] + (self.out_features,))  # noqa: RUF005  symbolic tracing cannot unpack

    def route(self, x: Tensor) -> Routing:
        """How x (..., D_in) is routed, with its graph; records nothing."""
        rows = x.reshape(-1, self.in_features)
        first, gram = self._router(rows, torch.mm(self.lora_A, rows.t()))
        return self._routing(*_route(first, gram, self.num_experts, self.top_k))

    def materialize(self, x: Tensor) -> Tensor:
        """The weight W + sum_l U_l diag(s_l) V_l that each vector of x (..., D_in) meets, (..., D_out, D_in).

        For inspection of few rows: the layer itself never makes it.
        """
        shape = (*x.shape[:-1], self.out_features, self.in_features)
        if not (self.experts_active and self._num_all_experts):
            return self.weight.expand(shape)
        scores = self.route(x).scores.flatten(1).to(self.weight.dtype)
        return (self.weight + torch.einsum("oe,ne,ei->noi", self.lora_B, scores, self.lora_A)).reshape(shape)

    def diversity_loss(self) -> Tensor:
        """Mean over pairs of experts of one layer of cos^2(v_i, v_j), (L,): 0 if orthogonal, 1 if all are alike.

        Keys alone decide whether experts differ: those of the same v get the same score on every row, and u_i v' and
        u_j v' add up to one expert of u_i + u_j, whatever the u are. Nor are the u defined in direction where training
        begins, at U = 0, whereas this is smooth there. K > D_in keys cannot all be orthogonal; the least mean is then
        (K / D_in - 1) / (K - 1), the Welch bound.
        """
        precision = torch.promote_types(self.lora_A.dtype, torch.float32)
        keys = F.normalize(self.lora_A.to(precision).unflatten(0, (self.num_layers, self.num_experts)), dim=-1)
        pairs = (keys @ keys.transpose(1, 2)).square().triu(1).sum((1, 2))
        return pairs / max(self.num_experts * (self.num_experts - 1) / 2, 1)

    def extra_repr(self) -> str:
        """Sizes as nn.Linear shows them, the experts, and what is not at its default."""
        options = {
            "hierarchical": self.hierarchical,
            "normalize_query": self.normalize_query,
        }
        plain = {"hierarchical": True}
        told = [f"{name}={value}" for name, value in options.items() if value != plain.get(name, False)]
        sizes = f"num_layers={self.num_layers}, num_experts={self.num_experts}, top_k={self.top_k}"
        return ", ".join([super().extra_repr(), sizes, *told])

    def _router(self, rows: Tensor, down: Tensor) -> tuple[Tensor, Tensor | None]:
        """From rows (N, D_in) and h = V x (L K, N): all layers' logits for the query q_1, (L K, N); the Gram matrix.

        Both are scaled, so that layer l's logits are first_l + sum_{m<l} gram_{l,m} s_m. No Gram matrix is
        flat routing.
        """
        precision = torch.promote_types(self.lora_A.dtype, torch.float32)
        scale = self.in_features**-0.5
        keys = self.lora_A.to(precision)
        first = down.to(precision) * scale
        if self.normalize_query:
            norm = torch.linalg.vector_norm(rows, dim=1, dtype=precision)
            first = first * (norm.square() / self.in_features + _MEAN_SQUARE_EPS).rsqrt()
        if not self.hierarchical or self.num_layers == 1:
            return first, None
        return first, _matmul(keys * scale, keys.t())

    def _routing(self, logits: Tensor, scores: Tensor) -> Routing:
        shape = (self.num_layers, self.num_experts, -1)
        return Routing(logits.view(shape).permute(2, 0, 1), scores.view(shape).permute(2, 0, 1))


@torch.fx.wrap  # autocast's switch is nothing that symbolic tracing can record
def _matmul(left: Tensor, right: Tensor) -> Tensor:
    """In the operands' precision, autocast or not."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


@torch.fx.wrap
def _project(rows: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """W x + b (N, D_out) and h = V x (L K, N) of rows (N, D_in)."""
    if not fused or torch.compiler.is_compiling():
        return F.linear(rows, weight, bias), F.linear(keys, rows)
    device = rows.device.type
    operands = [rows, weight, bias, keys]
    if torch.is_autocast_enabled(device):  # which does not reach into an autograd function
        dtype = torch.get_autocast_dtype(device)
        operands = [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in operands]
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = _FusedProjections.apply(*operands)  # type: ignore[no-untyped-call]
        return result


@torch.fx.wrap
def _apply_experts(
    base: Tensor,
    down: Tensor,
    up: Tensor,
    first: Tensor,
    gram: Tensor | None,
    num_experts: int,
    top_k: int | None,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Base output + U (s * h), (N, D_out), and all logits and scores, (L K, N); `base` is spent.

    The scores are in the precision of `first`, float32 at least, autocast or not: those of a layer feed the next one's
    logits.
    """
    with torch.autocast(down.device.type, enabled=False):
        up = up.to(down.dtype)
        if fused and not torch.compiler.is_compiling():
            result: tuple[Tensor, Tensor, Tensor] = _FusedExperts.apply(  # type: ignore[no-untyped-call]
                base, down, up, first, gram, num_experts, top_k
            )
            return result
        logits, scores = _route(first, gram, num_experts, top_k)
        return torch.addmm(base, (down * scores.to(down.dtype)).t(), up.t()), logits, scores


def _route(first: Tensor, gram: Tensor | None, num_experts: int, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Logits and scores of all layers, (L K, N). Each layer's scores are added to all later logits at once."""
    logits: list[Tensor] = []
    scores: list[Tensor] = []
    later = first
    for end in range(num_experts, len(first) + 1, num_experts):
        here, later = later.split([num_experts, len(later) - num_experts])
        logits.append(here)
        scores.append(_normalise(here, top_k))
        if gram is not None and len(later):
            later = torch.addmm(later, gram[end:, end - num_experts : end], scores[-1])
    return torch.cat(logits), torch.cat(scores)


def _normalise(logits: Tensor, top_k: int | None, out: Tensor | None = None) -> Tensor:
    """Softmax over the experts, the first dimension, or over the largest few."""
    if top_k is None or top_k == len(logits):
        return torch.softmax(logits, 0, out=out)
    kept, experts = logits.topk(top_k, 0)
    zeros = torch.zeros_like(logits) if out is None else out.zero_()
    return zeros.scatter_(0, experts, kept.softmax(0))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The sum total + left @ right, in the place of `total` unless autograd watches."""
    # `addmm_` would do the same without torch's FLOP counter seeing it.
    return torch.addmm(total, left, right, out=None if torch.is_grad_enabled() else total)


class _FusedProjections(torch.autograd.Function):
    """The two projections of one input, whose gradient is summed where it is made instead of in two tensors."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, keys: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows, weight, keys)
        return F.linear(rows, weight, bias), F.linear(keys, rows)

    @staticmethod
    def backward(ctx: Any, d_base: Tensor, d_down: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, keys = ctx.saved_tensors
        of_rows, of_weight, of_bias, of_keys = ctx.needs_input_grad
        with torch.autocast(rows.device.type, enabled=False):
            return (
                _add_product(d_base @ weight, d_down.t(), keys) if of_rows else None,
                d_base.t() @ rows if of_weight else None,
                d_base.sum(0) if of_bias else None,
                d_down @ rows if of_keys else None,
            )


class _FusedExperts(torch.autograd.Function):
    """`_route` and the experts' sum, with a backward pass that stays in expert space and writes in place.

    Autograd's own pays for each layer's slices and for slower GEMMs; benchmarks/results/layer_*.md tell how much.
    """

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        down: Tensor,
        up: Tensor,
        first: Tensor,
        gram: Tensor | None,
        num_experts: int,
        top_k: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores = torch.empty_like(first), torch.empty_like(first)
        for begin in range(0, len(first), num_experts):
            here = slice(begin, begin + num_experts)
            if gram is not None and begin:
                torch.addmm(first[here], gram[here, :begin], scores[:begin], out=logits[here])
            else:
                logits[here] = first[here]
            _normalise(logits[here], top_k, out=scores[here])
        ctx.mark_dirty(base)
        ctx.save_for_backward(down, up, first, gram, scores)
        ctx.routing = num_experts, top_k
        ctx.set_materialize_grads(False)
        return _add_product(base, (down * scores.to(down.dtype)).t(), up.t()), logits, scores

    @staticmethod
    def backward(
        ctx: Any, d_output: Tensor | None, d_logits: Tensor | None, d_scores: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        down, up, first, gram, scores = ctx.saved_tensors
        num_experts, _ = ctx.routing
        if torch.is_grad_enabled():  # create_graph: what is differentiated again is the plain form
            return _plain_backward(ctx, d_output, d_logits, d_scores)
        with torch.autocast(down.device.type, enabled=False):
            d_down = d_up = d_gram = None
            d_scores = torch.zeros_like(scores) if d_scores is None else d_scores.clone()
            if d_output is not None:
                weights = scores.to(down.dtype)
                d_weighted = up.t() @ d_output.t()
                d_down = d_weighted * weights
                # d_output' (h * s)' would take twice as long. The view gives a single row the strides that DDP expects.
                d_up = ((down * weights) @ d_output).t().view(up.shape)
                d_scores += d_weighted * down
            d_first = torch.zeros_like(scores) if d_logits is None else d_logits.clone()
            if gram is not None:
                d_gram = torch.zeros_like(gram)
            for begin in reversed(range(0, len(first), num_experts)):
                here = slice(begin, begin + num_experts)
                d_first[here] += torch.ops.aten._softmax_backward_data(d_scores[here], scores[here], 0, scores.dtype)
                if gram is not None and d_gram is not None and begin:
                    d_gram[here, :begin] = d_first[here] @ scores[:begin].t()
                    _add_product(d_scores[:begin], gram[here, :begin].t(), d_first[here])
        return d_output, d_down, d_up, d_first, d_gram, None, None


def _plain_backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """The fused form's backward pass by autograd through the plain form, with a graph."""
    # Views, because `first` is computed from `down`, and gradients towards both would count that way twice.
    down, up, first, gram = (None if tensor is None else tensor.view_as(tensor) for tensor in ctx.saved_tensors[:4])
    assert down is not None and up is not None and first is not None
    base = down.new_zeros(down.shape[1], len(up))
    num_experts, top_k = ctx.routing
    outputs = _apply_experts(base, down, up, first, gram, num_experts, top_k, fused=False)
    given = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    inputs = {
        name: tensor
        for name, tensor in (("down", down), ("up", up), ("first", first), ("gram", gram))
        if tensor is not None and tensor.requires_grad
    }
    found = torch.autograd.grad(
        [output for output, _ in given],
        list(inputs.values()),
        [grad for _, grad in given],
        create_graph=True,
        allow_unused=True,
    )
    by_name = dict(zip(inputs, found, strict=True))
    return grads[0], *(by_name.get(name) for name in ("down", "up", "first", "gram")), None, None
