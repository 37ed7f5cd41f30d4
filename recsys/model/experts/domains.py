"""Linears that adapt to domains: MLoRA (arXiv 2408.08913) and MoE-MLoRA (arXiv 2506.07563). Plain torch.

Shapes: B rows, n domains, E experts of rank r, D_in and D_out widths.

Each expert is a LoRA with a bias, and a linear with experts computes, where a row's experts have weights g,

    y = dropout(W x + b) + sum_e g_e (B_e A_e x + b_e)

B_e and b_e begin at 0, so that adapting a linear does not change what it computes. The weights are those of one
`DomainAdaptation` for all linears of a tower, and are told for each call:

* MLoRA: n experts; the expert of the row's domain has weight 1.
* MoE-MLoRA: E >= n experts. Expert e learns, with weight 1, from rows of domain e mod n alone; then a gate weighs all.
  Until it does, a row's own experts, those with e mod n its domain, share its weight alike. Under
  published code no phase takes effect: all experts learn jointly, and share every row's weight alike
  (`shared_by="all"`).

Rows of one domain need not be together: each row has its own weights. Where every row has one expert, and rows are
sorted by it, a linear multiplies them group by group, so that its cost does not grow with n; else all experts are
computed as one product of width E r. Nothing of size B x D_in x D_out is ever made. A frozen model that weighs experts
by the domain alone can be folded (`DomainAdaptation.fold`): each domain's whole weight is kept, no expert computed.

    adaptation = DomainAdaptation(num_domains=3)
    adapt(tower[0], adaptation, rank=8)
    adapt(tower[2], adaptation, rank=4)
    with adaptation.call(domains) as order:
        y = tower(x[order])[order.argsort()]
"""

import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MAX_FOLDED_BYTES = 256 << 20
"""Of all folded weights of a model; each process that serves it holds its own."""


class _OneExpert(NamedTuple):
    """All rows of the call under way have this one, with weight 1."""

    expert: int


class _Groups(NamedTuple):
    """Rows of the call under way are sorted by domain, and each has the expert of its number.

    Attributes:
        ends: (n,) int32, where the rows of each domain end; (n + 1,), with those of none, where there may be such.
        numbers: (B,) rising.
    """

    ends: Tensor
    numbers: Tensor


class _Mixture(NamedTuple):
    """Rows of the call under way have experts of these weights, (B, E)."""

    weights: Tensor


class _Folded(NamedTuple):
    """Rows of the call under way are sorted by domain, and each meets the folded weight of its own.

    Attributes:
        domains: that there are, rising.
        counts: of their rows.
    """

    domains: list[int]
    counts: list[int]


_Rows = _OneExpert | _Groups | _Mixture | _Folded


class _Call:
    """What the linears of a tower read of the call under way; no module, as it is nothing that a model holds.

    Each thread has a call of its own.
    """

    def __init__(self, *, with_others: bool) -> None:
        self.with_others = with_others
        self._thread = threading.local()

    @property
    def rows(self) -> _Rows | None:
        """Of this thread's call; None without one, or where no row has experts."""
        return getattr(self._thread, "rows", None)

    @rows.setter
    def rows(self, rows: _Rows | None) -> None:
        self._thread.rows = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Call":
        """That of a copy, for which no call is under way."""
        return _Call(with_others=self.with_others)

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(_Call, with_others=self.with_others), ()


def rank_of(out_features: int, reduction: int) -> int:
    """max(floor(D_out / reduction), 1): the parent's rule, whose README calls `reduction` the temperature alpha."""
    return max(out_features // reduction, 1)


class DomainGate(nn.Module):
    """Weights of all experts for each row, the same for all linears.

    g = softmax(C [embedding of the domain, features]): by the domain alone, as published code has it, or by features
    as well, as the abstract of 2506.07563 describes.

    Args:
        num_domains: n.
        num_experts: E.
        num_features: width of what it reads beside the domain, 0 for the domain alone.
        embedding_dim: of the domains.
    """

    def __init__(self, num_domains: int, num_experts: int, num_features: int = 0, embedding_dim: int = 4) -> None:
        super().__init__()
        self.num_features = num_features
        self.embedding = nn.Embedding(num_domains, embedding_dim)
        self.linear = nn.Linear(embedding_dim + num_features, num_experts)
        nn.init.uniform_(self.embedding.weight, -0.05, 0.05)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, domains: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,) domains and (B, num_features) -> (B, E), not negative, rows sum to 1."""
        inputs = self.embedding(domains)
        if self.num_features:
            assert features is not None
            inputs = torch.cat([inputs, features], 1)
        weights: Tensor = self.linear(inputs).softmax(1)
        return weights


class DomainAdaptation(nn.Module):
    """Which experts adapt which rows, told once for all linears of a tower.

    Args:
        num_domains: n.
        num_experts: E, None for one of each domain.
        gate: of a mixture; None where experts share a row's weight alike.
        shared_by: without a gate, or as long as it is not used: `own`, the experts of a row's domain, or `all`.
        with_others: whether rows may be of no domain, which number n stands for: they have no expert.

    Raises:
        ValueError: fewer experts than domains, or a gate of other numbers.

    Attributes:
        active: False has all linears compute their base alone.
        expert: the only one that all rows have, with weight 1, while it is learning; None else.
        gated: whether the gate weighs experts, (); a buffer, for it is part of what a model computes.
        grouped: False computes all experts of a linear even where each row has one.
        folded: whether calls without gradients meet folded weights.
    """

    gated: Tensor

    def __init__(
        self,
        num_domains: int,
        num_experts: int | None = None,
        gate: DomainGate | None = None,
        *,
        shared_by: Literal["own", "all"] = "own",
        with_others: bool = False,
    ) -> None:
        super().__init__()
        self.num_domains, self.num_experts = num_domains, num_domains if num_experts is None else num_experts
        if self.num_experts < num_domains:
            raise ValueError(f"num_experts {num_experts} must be at least num_domains {num_domains}: each has its own")
        if gate is not None:
            sizes = gate.embedding.num_embeddings, gate.linear.out_features
            if sizes != (self.num_domains, self.num_experts):
                raise ValueError(f"the gate is of {sizes[0]} domains and {sizes[1]} experts, not of these")
            self.register_buffer("gated", torch.tensor(False))
        self.gate, self.shared_by = gate, shared_by
        self.active, self.grouped, self.folded = True, True, False
        self.expert: int | None = None
        self._call = _Call(with_others=with_others)

    @property
    def is_of_one(self) -> bool:
        """Whether each row has one expert, that of its domain."""
        return self.gate is None and self.shared_by == "own" and self.num_experts == self.num_domains

    def use_gate(self) -> None:
        """Have the gate weigh experts from now on."""
        self.gated.fill_(True)

    @torch.no_grad()
    def fold(self, linears: "Collection[DomainLinear]") -> bool:
        """Have linears keep each domain's whole weight W + sum_e g_e B_e A_e, which calls without gradients then meet.

        It is for models whose parameters change no more: these weights, made in float64 and rounded once, would not
        follow. Under `torch.compile` and `torch.export` experts are computed as ever.

        Args:
            linears: all that adapt by this.

        Returns:
            Whether they do. Nothing is changed where the gate reads features, a linear has routed experts besides, or
            the weights would take more than `MAX_FOLDED_BYTES`.
        """
        numbers = self.num_domains + self._call.with_others
        reads_features = self.gate is not None and self.gate.num_features > 0
        is_plain = all(linear._is_plain for linear in linears)
        if reads_features or not is_plain or numbers * sum(of.weight.nbytes for of in linears) > MAX_FOLDED_BYTES:
            return False
        for linear in linears:
            weights = self.weights(torch.arange(numbers, device=linear.weight.device)).double()
            linear._folded = list(zip(*(of.unbind() for of in linear.written_out(weights)), strict=True))
        self.folded = True
        return True

    def weights(self, domains: Tensor, features: Tensor | None = None) -> Tensor:
        """(B,) domains and (B, F) features, which the gate may read, -> (B, E)."""
        experts = torch.arange(self.num_experts, device=domains.device)
        if self.shared_by == "all":
            # By `len` instead, exports would have the rows of their example as a constant.
            shared = experts.new_ones(domains.shape[0], self.num_experts).float()
        else:
            shared = (experts % self.num_domains == domains[:, None]).float()
        if not self._call.with_others:
            return self._gated(domains, features, shared / shared.sum(1, keepdim=True))
        shared = shared / shared.sum(1, keepdim=True).clamp(min=1)
        is_known = domains < self.num_domains
        return self._gated(domains.clamp(max=self.num_domains - 1), features, shared) * is_known[:, None]

    def _gated(self, domains: Tensor, features: Tensor | None, shared: Tensor) -> Tensor:
        return shared if self.gate is None else torch.where(self.gated, self.gate(domains, features), shared)

    @contextmanager
    def call(self, domains: Tensor, features: Tensor | None = None) -> Iterator[Tensor | None]:
        """Have all linears adapt the rows of the calls within.

        Args:
            domains: of the rows, (B,) of 0 .. n - 1, and n for those of none.
            features: that the gate reads, (B, F); None where it reads none.

        Yields:
            The order in which the linears must be given the rows, (B,); None for as they are.
        """
        order = None
        if not self.active:
            self._call.rows = None
        elif self.expert is not None:
            self._call.rows = _OneExpert(self.expert)
        elif self.folded and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            order = domains.argsort(stable=True)
            present, counts = domains.index_select(0, order).unique_consecutive(return_counts=True)
            self._call.rows = _Folded(present.tolist(), counts.tolist())
            order = order if len(present) > 1 else None  # so that rows of one domain are not copied
        elif self._is_grouped(domains.device):
            order = domains.argsort(stable=True)
            numbers = self.num_domains + self._call.with_others
            ends = torch.bincount(domains, minlength=numbers).cumsum(0).to(torch.int32)
            self._call.rows = _Groups(ends, domains.index_select(0, order))
        else:
            self._call.rows = _Mixture(self.weights(domains, features))
        try:
            yield order
        finally:
            self._call.rows = None

    def _is_grouped(self, device: torch.device) -> bool:
        # On a GPU the product by groups is one kernel in bfloat16 alone, and waits for the groups' sizes else. Those of
        # torch.compile and torch.export are not at hand.
        is_at_hand = device.type == "cpu" and not torch.compiler.is_compiling()
        return self.grouped and self.is_of_one and is_at_hand


class DomainExpert(nn.Module):
    """A LoRA with a bias: what one expert adds to the output of one linear.

    Args:
        in_features: D_in.
        out_features: D_out.
        rank: r.
        like: whose device and type its parameters have.

    Attributes:
        lora_A: (r, D_in), Glorot-uniform.
        lora_B: (D_out, r), zeros.
        bias: (D_out,), zeros.
    """

    def __init__(self, in_features: int, out_features: int, rank: int, like: Tensor) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(like.new_empty(rank, in_features))
        self.lora_B = nn.Parameter(like.new_zeros(out_features, rank))
        self.bias = nn.Parameter(like.new_zeros(out_features))
        nn.init.xavier_uniform_(self.lora_A)


class DomainLinear(nn.Linear):
    """A linear that experts of its `DomainAdaptation` adapt; `adapt` makes one of a linear.

    A state dict of the linear is a subset of this layer's.

    Attributes:
        domain_experts: E of them.
        domain_dropout: of the base's output, before experts add to it, in training only.
    """

    domain_experts: nn.ModuleList
    domain_dropout: float
    _call: _Call
    _is_of_one: bool
    _is_plain: bool
    _folded: Sequence[tuple[Tensor, Tensor]] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(B, ..., D_in) -> (B, ..., D_out), of the rows whose domains the adaptation was told."""
        rows = self._call.rows
        if isinstance(rows, _Folded):
            return self._by_domain(x, rows)
        if isinstance(rows, _Groups) and self._merges(x):
            return self._merged(x, rows)
        base = super().forward(x)
        if self.domain_dropout:
            base = F.dropout(base, self.domain_dropout, self.training)
        if rows is None:
            return base
        # What a plain linear gives is nobody else's, so that it can be added to in its place.
        add = Tensor.add_ if self._is_plain else Tensor.add
        if isinstance(rows, _OneExpert):
            expert = self.domain_experts[rows.expert]
            assert isinstance(expert, DomainExpert)
            return add(base, F.linear(F.linear(x, expert.lora_A), expert.lora_B, expert.bias))
        each = x.shape[1:-1].numel()  # vectors that a row has
        flat = x.reshape(-1, self.in_features)
        if isinstance(rows, _Groups):
            if flat.dtype != torch.float64:  # which the product by groups does not know
                return add(base, self._grouped(flat, rows.ends * each).view(base.shape))
            rows = _Mixture(F.one_hot(rows.numbers, len(rows.ends))[:, : len(self.domain_experts)])
        weights = rows.weights.repeat_interleave(each, 0) if each > 1 else rows.weights
        return self._mixture(base.reshape(-1, self.out_features), flat, weights.to(flat.dtype)).view(base.shape)

    def domain_parameters(self, expert: int) -> list[nn.Parameter]:
        """Those of one expert."""
        return list(self.domain_experts[expert].parameters())

    @property
    def domain_multiply_adds(self) -> int:
        """Of the experts' products for one vector: one expert's where each row has its own, else all experts'."""
        first = self.domain_experts[0]
        assert isinstance(first, DomainExpert)
        each = len(first.lora_A) * (self.in_features + self.out_features) + self.out_features
        return each if self._is_of_one else len(self.domain_experts) * each

    def domain_up_projections(self) -> list[nn.Parameter]:
        """B of all experts."""
        return [expert.lora_B for expert in self.domain_experts if isinstance(expert, DomainExpert)]

    def written_out(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Weight (n, D_out, D_in) and bias (n, D_out) that rows with expert weights (n, E) meet in evaluation.

        Computed in the precision of the expert weights, and given in that of the linear.
        """
        down, up, bias = (torch.stack(tensors).to(weights.dtype) for tensors in self._experts())
        base = self.weight.to(weights.dtype)
        each = []
        for shares in weights:  # one by one, so that no more than one is there in a higher precision
            own = shares.nonzero().squeeze(1)
            ups = (up[own] * shares[own, None, None]).transpose(0, 1).flatten(1)
            each.append(torch.addmm(base, ups, down[own].flatten(0, 1)).to(self.weight.dtype))
        shift = weights @ bias
        if self.bias is not None:
            shift = shift + self.bias
        return torch.stack(each), shift.to(self.weight.dtype)

    def _experts(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """All experts' A (r, D_in), B (D_out, r) and b (D_out,)."""
        experts = list(self.domain_experts)
        return tuple([getattr(expert, name) for expert in experts] for name in ("lora_A", "lora_B", "bias"))  # type: ignore[return-value]

    def _by_domain(self, x: Tensor, rows: _Folded) -> Tensor:
        """The layer for x (B, ..., D_in) by folded weights."""
        if len(rows.domains) == 1:
            return F.linear(x, *self._folded[rows.domains[0]])
        each = x.shape[1:-1].numel()
        sizes = [count * each for count in rows.counts]
        flat = x.reshape(-1, self.in_features)
        y = flat.new_empty(len(flat), self.out_features)
        # A loop, whose every product is a dense linear's: `F.grouped_mm` takes longer on a CPU, of few rows as of many.
        for domain, part, of_part in zip(rows.domains, flat.split(sizes), y.split(sizes), strict=True):
            weight, bias = self._folded[domain]
            torch.addmm(bias, part, weight.t(), out=of_part)
        return y.view(*x.shape[:-1], self.out_features)

    def _merges(self, x: Tensor) -> bool:
        """Whether x is better multiplied by each domain's whole weight than by the base and an expert.

        Making W + B_e A_e takes as long as some rows do for each domain, and it pays with the backward pass alone
        (benchmarks/results/domains_cpu.md).
        """
        first = self.domain_experts[0]
        assert isinstance(first, DomainExpert)
        rank, narrowest = len(first.lora_A), min(self.in_features, self.out_features)
        spared = x.shape[:-1].numel() * (2 * rank / narrowest + 0.25)
        is_possible = (
            torch.is_grad_enabled()
            and self._is_plain
            and x.dtype != torch.float64
            and not (self.domain_dropout and self.training)
        )
        return is_possible and len(self.domain_experts) * (rank + 24) <= spared

    def _merged(self, x: Tensor, rows: _Groups) -> Tensor:
        """The layer for x (B, ..., D_in)."""
        down, up, bias = self._by_numbers()
        weights = torch.baddbmm(self.weight.expand(len(down), -1, -1), up, down)
        if self.bias is not None:
            bias = bias + self.bias
        each = x.shape[1:-1].numel()
        shifts = bias.index_select(0, rows.numbers if each == 1 else rows.numbers.repeat_interleave(each))
        y = multiply_by_groups(x.reshape(-1, self.in_features), weights, rows.ends * each)
        return y.add_(shifts).view(*x.shape[:-1], self.out_features)

    def _by_numbers(self) -> list[Tensor]:
        """A (E, r, D_in), B (E, D_out, r) and b (E, D_out) of all experts; last, where rows may be of none, zeros."""
        experts = self._experts()
        if self._call.with_others:
            experts = tuple([*tensors, torch.zeros_like(tensors[0])] for tensors in experts)  # type: ignore[assignment]
        return [torch.stack(tensors) for tensors in experts]

    def _mixture(self, base: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """(N, D_out) and what experts of weights (N, E) add to it for x (N, D_in)."""
        down, up, bias = self._experts()
        hidden = F.linear(x, torch.cat(down)).unflatten(1, (len(down), -1)) * weights[:, :, None]
        return torch.addmm(
            base, torch.cat([hidden.flatten(1), weights], 1), torch.cat([*up, torch.stack(bias, 1)], 1).t()
        )

    def _grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """What experts add to x (N, D_in), whose vectors up to ends (E,) are those of each in turn."""
        down, up, bias = self._by_numbers()
        hidden = multiply_by_groups(x, down, ends)
        hidden = torch.cat([hidden, hidden.new_ones(len(x), 1)], 1)  # which the biases are for
        return multiply_by_groups(hidden, torch.cat([up, bias[:, :, None]], 2), ends)


def adapt(linear: nn.Linear, adaptation: DomainAdaptation, rank: int, *, dropout: float = 0.0) -> DomainLinear:
    """Have a linear adapt to domains, in place: it computes what it did, and keeps its parameters under their names.

    Args:
        linear: of a class that `ADAPTED` has.
        adaptation: of all linears of the tower.
        rank: r.
        dropout: of the linear's own output, before experts add to it, as MLoRA's code has it.

    Raises:
        ValueError: another class of linears, a rank below 1.
    """
    kind = ADAPTED.get(type(linear))
    if kind is None:
        raise ValueError(
            f"a {type(linear).__name__} cannot be adapted; take one of {', '.join(of.__name__ for of in ADAPTED)}"
        )
    if rank < 1:
        raise ValueError(f"rank {rank} must be at least 1")
    linear.__class__ = kind  # as torch.nn.utils.parametrize does; a copy would have to know what each class holds
    assert isinstance(linear, DomainLinear)
    linear.domain_experts = nn.ModuleList(
        DomainExpert(linear.in_features, linear.out_features, rank, linear.weight)
        for _ in range(adaptation.num_experts)
    )
    linear.domain_dropout = dropout
    linear._call, linear._is_of_one, linear._is_plain = adaptation._call, adaptation.is_of_one, kind is DomainLinear
    return linear


ADAPTED: dict[type[nn.Linear], type[DomainLinear]] = {nn.Linear: DomainLinear}
"""What becomes of a linear of each class that can be adapted."""


def multiply_by_groups(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Vectors (N, I) up to each of ends (E,) times the matrix of their group, of (E, O, I), giving (N, O)."""
    if torch.is_autocast_enabled(x.device.type):  # which does not know the product
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weights = x.to(dtype), weights.to(dtype)
    # The kernel and its backward pass ask for rows of sixteen bytes, and zeros fill them up.
    unit = 16 // x.element_size()
    outputs, inputs = (-size % unit for size in weights.shape[1:])
    x = F.pad(x, (0, inputs)) if inputs else x.contiguous()  # as a slice of columns may begin between two of sixteen
    if outputs or inputs:
        weights = F.pad(weights, (0, inputs, 0, outputs))
    result = F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
    if result.requires_grad:
        result.register_hook(Tensor.contiguous)  # of a gradient, too
    return result[:, :-outputs] if outputs else result
