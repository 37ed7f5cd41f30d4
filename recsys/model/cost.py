"""What one example costs: FLOPs and parameters of a config's ranker by part, beside the dense stack it stands in for.

FLOPs are those of one example's forward pass (a step of training takes about three times as many): two for each
multiply-add of a matrix product, counted by `torch.utils.flop_counter` while the real dense arch runs on fake tensors,
so that every module made of matrix products is counted as it computes, whatever its type. Elementwise work (softmax,
activations, norms, biases, the experts' scaling) is left out, as is usual; pooling is the one exception, with an
addition for each number looked up.

For a linear from D_in to D_out with L layers of K experts the count is, in FLOPs for each row that it is applied to,

    tower    2 D_in D_out                      experts   2 L K (D_in + D_out)
    routing  2 K (K + 2 K + ... + (L-1) K) = L (L-1) K^2

and once a call 2 (L K)^2 D_in for the Gram matrix of the keys: it depends on the parameters alone, so it is no part of
an example's FLOPs and stands apart as `flops_per_call`. The paper's formulas (arXiv 2510.10432) taken literally, with
the query updated in R^d, cost 2 [d^2 + (4L-2) K d] for d = D_in = D_out, of which routing is 4 (L-1) K d.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from recsys.config import Config, ConfigError, ModelConfig, TowerConfig
from recsys.config.towers import PerceptronSettings
from recsys.model.dense_arch import DenseArch, build_dense_arch
from recsys.model.experts import DomainLinear, domain_adaptation, domain_linears, expert_layers

PARTS = ("embedding", "projection", "tower", "interaction", "experts", "routing", "head")
"""`projection` is that of the dense features. `tower` are the linears of the tower, or of all paths,
without their experts, `interaction` the rest of these: matrix products that no linear makes (attention, bilinear
fusion) and parameters that no linear holds (of norms, of a fusion)."""
_STACK = ("tower", "interaction", "experts", "routing")
_DENSE_ARCH = ("projection", *_STACK, "head")


@dataclass(frozen=True)
class Cost:
    """Cost of one model.

    Attributes:
        model: its name, such as `hilomoe mlp 400 L3 K8`.
        flops: of one example's forward pass, by part.
        parameters: by part, but for those of `padding`.
        padding: parameters of tables and projection that nothing reads: those of first-order weights, which take four
            numbers of a token (recsys.model.towers.wide). FLOPs and bytes are of all numbers, as they are read.
        flops_per_call: what each call of the dense arch costs whatever the number of its rows.
        embedding_bytes: read from the tables for one example; what bounds a lookup, rather than its FLOPs.
        ids_per_example: mean number of ids that is assumed of each sparse feature.
    """

    model: str
    flops: dict[str, int]
    parameters: dict[str, int]
    padding: int
    flops_per_call: int
    embedding_bytes: int
    ids_per_example: dict[str, float]

    def over(self, parts: Sequence[str]) -> tuple[int, int]:
        """FLOPs and parameters of some parts together."""
        return sum(self.flops[part] for part in parts), sum(self.parameters[part] for part in parts)


@dataclass(frozen=True)
class CostReport:
    """A model's cost beside that of a dense one.

    Attributes:
        cost: of the model.
        against: of the dense model it is compared with; None for a dense model that replaces nothing.
        batch_size: rows of a call.
    """

    cost: Cost
    against: Cost | None
    batch_size: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON: both costs with totals, and the differences in per cent of the dense model's figure."""
        if self.against is None:
            return {**_with_totals(self.cost), "against": None}
        differences = {
            name: dict(zip(("flops", "parameters"), self._differences(parts), strict=True))
            for name, parts in (("tower_and_experts", _STACK), ("dense_arch", _DENSE_ARCH))
        }
        return {**_with_totals(self.cost), "against": _with_totals(self.against), "difference_percent": differences}

    def lines(self) -> list[str]:
        """The cost in one line, the comparison in a second."""
        total, _ = self.cost.over(PARTS)
        parts = ", ".join(f"{part} {flops:,}" for part, flops in self.cost.flops.items() if flops)
        lines = [f"An example costs {total:,} FLOPs ({parts})"]
        if self.against is not None:
            (stack, _), (arch, parameters) = self._differences(_STACK), self._differences(_DENSE_ARCH)
            lines.append(
                f"{self.cost.model} against {self.against.model}: FLOPs of tower and experts {_percent(stack)}, "
                f"of the dense arch {_percent(arch)}; its parameters {_percent(parameters)}"
            )
        return lines

    def title(self) -> str:
        """What `rows` are about: both models by name."""
        return f"Cost of {self.cost.model}" + (f" against {self.against.model}" if self.against else "")

    def rows(self) -> list[dict[str, str]]:
        """One mapping a part and a sum of parts; those that neither model has are left out."""
        sums = {"tower and experts": _STACK, "dense arch": _DENSE_ARCH, "all": PARTS}
        rows = []
        for name, parts in {**{part: (part,) for part in PARTS}, **sums}.items():
            flops, parameters = self.cost.over(parts)
            row = {"": name, "FLOPs": f"{flops:,}", "parameters": f"{parameters:,}"}
            dense = (0, 0)
            if self.against is not None:
                dense = self.against.over(parts)
                by_flops, by_parameters = self._differences(parts)
                row |= {
                    "dense FLOPs": f"{dense[0]:,}",
                    "dense parameters": f"{dense[1]:,}",
                    "FLOPs change": _percent(by_flops),
                    "parameters change": _percent(by_parameters),
                }
            if any((flops, parameters, *dense)):
                rows.append(row)
        return rows

    def assumptions(self) -> list[str]:
        """What the figures stand on, one text each."""
        cost = self.cost
        counted = {name: count for name, count in cost.ids_per_example.items() if count != 1}
        ids = ", ".join(f"{count:g} of {name}" for name, count in counted.items())
        texts = [
            "FLOPs are of one example's forward pass, two for a multiply-add; training takes about three times as many",
            f"{'1 id' if not ids else f'{ids}, 1 id'} for each {'other ' if ids else ''}sparse feature: "
            f"{cost.embedding_bytes:,} bytes read from the tables",
        ]
        if cost.flops_per_call:
            texts.append(
                f"once a call, and not in the table: {cost.flops_per_call:,} FLOPs that depend on parameters alone "
                f"(the keys' Gram matrices, for one); {cost.flops_per_call / self.batch_size:,.0f} an example at "
                f"batch_size {self.batch_size:,}"
            )
        if cost.padding:
            texts.append(
                f"not among the parameters: {cost.padding:,} that fill first-order weights up to four numbers a row"
            )
        return texts

    def _differences(self, parts: Sequence[str]) -> tuple[float | None, float | None]:
        """Of FLOPs and of parameters in per cent; None where the dense model has none."""
        assert self.against is not None
        by_flops, by_parameters = (
            100 * (mine - dense) / dense if dense else None
            for mine, dense in zip(self.cost.over(parts), self.against.over(parts), strict=True)
        )
        return by_flops, by_parameters


def cost_report(config: Config, ids_per_example: Mapping[str, float] | None = None) -> CostReport:
    """Count a config's ranker and the dense one it is compared with: `model.replaces`, or its towers without experts.

    Args:
        config: the run. Nothing of it is allocated.
        ids_per_example: mean number of ids of sparse features, where it is known; 1 is assumed of all others.

    Raises:
        ConfigError: `ids_per_example` names no sparse feature.
    """
    model = config.model
    cost = _cost(config, model, ids_per_example or {})
    if not model.has_experts and model.replaces is None:
        return CostReport(cost, None, config.data.batch_size)
    towers = {"tower": model.replaces, "paths": None} if model.replaces else {}
    dense = model.model_copy(update={**towers, "hilomoe": None, "domain_experts": None})
    return CostReport(cost, _cost(config, dense, ids_per_example or {}), config.data.batch_size)


def _cost(config: Config, model: ModelConfig, ids_per_example: Mapping[str, float]) -> Cost:
    features = config.features.sparse
    if unknown := set(ids_per_example) - set(features):
        raise ConfigError(
            f"ids per example: {min(unknown)!r} is no sparse feature; there are {', '.join(sorted(features))}"
        )
    ids = {name: ids_per_example.get(name, 1.0) for name in features}
    dims = config.embedding_dims
    looked_up = round(sum(ids[name] * dim for name, dim in dims.items()))
    itemsizes = {name: config.tables[of.table].itemsize for name, of in features.items()}
    width, num_dense = sum(dims.values()), len(config.features.dense)
    # Fake tensors have shapes and no content; of attention's kernels, the counter knows only the plain one on a CPU.
    with FakeTensorMode(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        dense_arch = build_dense_arch(model, dims, num_dense_features=num_dense, num_domains=config.num_domains).eval()
        two, four = (count_flops(dense_arch, torch.empty(rows, width), torch.empty(rows, num_dense)) for rows in (2, 4))
        parameters = count_parameters(dense_arch)
    # What grows with the rows is an example's, what does not is the call's.
    flops = {part: (four[part] - two[part]) // 2 for part in PARTS}
    unread = model.padding
    parameters["embedding"] = sum(table.num_embeddings * table.embedding_dim for table in config.tables.values())
    padding = {
        "embedding": unread * sum(table.num_embeddings for table in config.tables.values()),
        "projection": unread * (num_dense + 1) if num_dense else 0,
    }
    parameters.subtract(padding)
    return Cost(
        model=model_name(model),
        flops={**flops, "embedding": looked_up},
        parameters={part: parameters[part] for part in PARTS},
        padding=sum(padding.values()),
        flops_per_call=two.total() - 2 * sum(flops.values()),
        embedding_bytes=round(sum(ids[name] * dim * itemsizes[name] for name, dim in dims.items())),
        ids_per_example=ids,
    )


def count_flops(dense_arch: DenseArch, pooled: Tensor, dense_features: Tensor) -> Counter[str]:
    """FLOPs by part of one call, (B, sum of dims) and (B, F_d) as `DenseArch.forward` takes them.

    Routing is what a linear with experts does beyond its base and its experts' two projections, so that it includes all
    that routing may do.
    """
    rows: defaultdict[nn.Linear, int] = defaultdict(int)
    spent: defaultdict[nn.Linear, int] = defaultdict(int)
    with FlopCounterMode(display=False) as counter:

        def enter(linear: nn.Linear, inputs: tuple[Tensor, ...]) -> None:
            rows[linear] += inputs[0].shape[:-1].numel()
            spent[linear] -= counter.get_total_flops()

        def leave(linear: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            spent[linear] += counter.get_total_flops()

        parts = _parts_of_linears(dense_arch)
        hooks = [linear.register_forward_pre_hook(enter) for linear in parts]
        hooks += [linear.register_forward_hook(leave) for linear in parts]
        try:
            with _without_domains(dense_arch):
                dense_arch(pooled, dense_features, domain=torch.zeros(len(pooled), dtype=torch.int64))
        finally:
            for hook in hooks:
                hook.remove()
    found: Counter[str] = Counter(interaction=counter.get_total_flops() - sum(spent.values()))
    of_experts = {id(layer): layer.expert_multiply_adds for layer in expert_layers(dense_arch).values()}
    for linear, part in parts.items():
        base = 2 * rows[linear] * linear.in_features * linear.out_features
        experts = 2 * rows[linear] * of_experts.get(id(linear), 0)
        found.update({part: base, "experts": experts, "routing": spent[linear] - base - experts})
    if (adaptation := domain_adaptation(dense_arch)) is not None:
        of_rows = [rows[linear] * linear.domain_multiply_adds for linear in domain_linears(dense_arch).values()]
        found["experts"] += 2 * sum(of_rows)
        found["routing"] += 2 * len(pooled) * (adaptation.gate.linear.weight.numel() if adaptation.gate else 0)
    return found


@contextmanager
def _without_domains(dense_arch: DenseArch) -> Iterator[None]:
    """What domain experts cost is told by their formula, as some of it depends on the rows."""
    adaptation = domain_adaptation(dense_arch)
    if adaptation is None:
        yield
        return
    was_active, adaptation.active = adaptation.active, False
    try:
        yield
    finally:
        adaptation.active = was_active


def count_parameters(dense_arch: DenseArch) -> Counter[str]:
    """Parameters by part; those of routing are what a linear with experts has beyond base and experts."""
    found: Counter[str] = Counter()
    of_experts = {id(layer): layer.num_expert_parameters for layer in expert_layers(dense_arch).values()}
    for linear, part in _parts_of_linears(dense_arch).items():
        base = linear.weight.numel() + (0 if linear.bias is None else linear.bias.numel())
        experts = of_experts.get(id(linear), 0)
        if isinstance(linear, DomainLinear):
            experts += _size(linear.domain_experts)
        found.update({part: base, "experts": experts, "routing": _size(linear) - base - experts})
    if (adaptation := domain_adaptation(dense_arch)) is not None:
        found["routing"] += _size(adaptation)
    found["interaction"] = _size(dense_arch) - found.total()
    return found


def model_name(model: ModelConfig) -> str:
    """A model by its sizes, such as `mlp 400x400`, with experts `hilomoe mlp 400x400 L3 K8`; paths are joined by `+`.

    Rates are left out, and choices such as the activation where they are the default.
    """
    words = [" + ".join(map(_tower_name, model.towers.values()))]
    if (hilomoe := model.hilomoe) is not None:
        words = ["hilomoe", *words, f"L{hilomoe.num_layers}", f"K{hilomoe.num_experts}"]
        for field, value in hilomoe:
            default = type(hilomoe).model_fields[field].default
            if field not in ("num_layers", "num_experts") and value != default:
                words.append(f"{field}={_shown(value)}")
    if (domains := model.domain_experts) is not None:
        words.append(f"+ {domains.type}")
        for field, value in domains:
            if field != "type" and value != type(domains).model_fields[field].default:
                words.append(f"{field}={_shown(value)}")
    return " ".join(words)


def _tower_name(tower: TowerConfig) -> str:
    words = [tower.type]
    for field, value in sorted(tower, key=lambda one: one[0] in PerceptronSettings.model_fields):  # sizes first
        if field == "hidden":
            words.append(_shown(value) or "without hidden layers")
        elif isinstance(value, str) and value == type(tower).model_fields[field].default:
            continue
        elif field != "type" and value not in (None, ()) and not isinstance(value, float):
            words.append(f"{field}={_shown(value)}")
    return " ".join(words)


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    return ("x" if all(isinstance(part, int) for part in value) else ",").join(map(str, value))


def _parts_of_linears(dense_arch: DenseArch) -> dict[nn.Linear, str]:
    """The part to which the base of each linear counts; a linear within another one is that one's."""
    found: dict[nn.Linear, str] = {}

    def visit(module: nn.Module, part: str) -> None:
        if isinstance(module, nn.Linear):
            found[module] = part
        else:
            for child in module.children():
                visit(child, part)

    for name, child in dense_arch.named_children():
        if name == "domain_adaptation":
            continue
        visit(child, {"head": "head", "heads": "head", "dense_projection": "projection"}.get(name, "tower"))
    return found


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _with_totals(cost: Cost) -> dict[str, Any]:
    flops, parameters = cost.over(PARTS)
    return {
        **asdict(cost),
        "flops": {"total": flops, **cost.flops},
        "parameters": {"total": parameters, **cost.parameters},
    }


def _percent(difference: float | None) -> str:
    return "-" if difference is None else f"{difference:+.1f} %"
