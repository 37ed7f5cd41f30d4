"""Candidates of one request: rows some of whose columns are the same in all, which are kept, and computed with, once.

`SharedRows` is a tensor to whoever computes with it, so that towers and experts know nothing of it. The functions below
that carry `@_divides` are computed on its two parts; every other gets the rows as they are with the context copied into
each, so that whatever a tower does is right. A tower is fast without more where it begins with linears, splits its
input into tokens, or scales it.

Shapes: N rows, W columns, C of them shared.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only


class Sharing:
    """Which of W columns all rows share.

    Keeps the parts of the parameters that it divided, so it is for parameters that do not change any more. Those that
    functions lead to are kept as well, so that a request finds what an earlier one of its kind needed.

    Args:
        shared: of each, whether it is.
        family: those that led to each other, by `shared`.

    Attributes:
        shared: of each, whether it is.
        context: numbers of those that are, (C,).
        items: those of the others, (W - C,).
        all: whether every one is.
        runs: neighbours of one kind, as (where among all, whether they are shared, where among those of their kind).
    """

    def __init__(self, shared: Iterable[bool], family: "dict[tuple[bool, ...], Sharing] | None" = None) -> None:
        self.shared = tuple(shared)
        self.context = torch.tensor([n for n, one in enumerate(self.shared) if one], dtype=torch.int64)
        self.items = torch.tensor([n for n, one in enumerate(self.shared) if not one], dtype=torch.int64)
        self.all = all(self.shared)
        self._before = (0, *accumulate(self.shared))
        ends = [n for n in range(1, len(self.shared)) if self.shared[n] is not self.shared[n - 1]]
        bounds = [0, *ends, len(self.shared)] if self.shared else []
        self.runs = [(slice(*run), self.shared[run[0]], self._places(*run)) for run in pairwise(bounds)]
        self._family = {} if family is None else family
        self._parts: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}

    def relative(self, shared: tuple[bool, ...]) -> "Sharing":
        """Of other columns that were made of these."""
        found = self._family.get(shared)
        if found is None:
            found = self._family[shared] = Sharing(shared, self._family)
        return found

    def divide(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What of a weight (M, W) meets the shared columns, (M, C), and what the others, (M, W - C)."""
        parts = self._parts.get(weight) if isinstance(weight, nn.Parameter) else None
        if parts is None:
            parts = weight.index_select(1, self.context), weight.index_select(1, self.items)
            if isinstance(weight, nn.Parameter):
                self._parts[weight] = parts
        return parts

    def piece(self, start: int, stop: int) -> "tuple[slice, slice, Sharing]":
        """Of the columns from `start` on, before `stop`: where among the shared they are, where among the others."""
        before, after = self._before[start], self._before[stop]
        return slice(before, after), slice(start - before, stop - after), self.relative(self.shared[start:stop])

    def _places(self, start: int, stop: int) -> slice:
        before = self._before[start]
        return slice(before, self._before[stop]) if self.shared[start] else slice(start - before, stop - before)


class SharedRows(Tensor):
    """Rows (N, W) of which some columns are the same in all.

    Args:
        context: those that are, (1, C), in order.
        items: the others, (N, W - C), in order.
        sharing: which are which.
    """

    context: Tensor
    items: Tensor
    sharing: Sharing
    _whole: Tensor | None

    @staticmethod
    def __new__(cls, context: Tensor, items: Tensor, sharing: Sharing) -> "SharedRows":
        """A tensor of the rows' shape that holds no numbers of its own."""
        shape = (len(items), len(sharing.shared))
        new: SharedRows = Tensor._make_wrapper_subclass(cls, shape, dtype=items.dtype, device=items.device)
        new.context, new.items, new.sharing, new._whole = context, items, sharing, None
        return new

    def whole(self) -> Tensor:
        """The rows as any other tensor, the same at each call; from the first on, all is computed on it.

        So nothing is lost that a function writes there.
        """
        if self._whole is None:
            self._whole = self.items.new_empty((len(self.items), len(self.sharing.shared)))
            for columns, shared, places in self.sharing.runs:
                self._whole[:, columns] = (self.context if shared else self.items)[:, places]
        return self._whole

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """On the parts where a rule for the function takes the arguments, else on whole rows."""
        kwargs = kwargs or {}
        if rule := _RULES.get(func):
            found = rule(*args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(SharedRows, SharedRows.whole, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # whose function torch's stub leaves out
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """As above, of what is called from within torch."""
        args, kwargs = tree_map_only(SharedRows, SharedRows.whole, (args, kwargs or {}))
        return func(*args, **kwargs)


_RULES: dict[Any, Callable[..., Any]] = {}


def _divides(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Have functions of torch computed by the one below, which may leave arguments to them by `NotImplemented`."""

    def register(rule: Callable[..., Any]) -> Callable[..., Any]:
        _RULES.update(dict.fromkeys(functions, rule))
        return rule

    return register


def _divided(x: Any) -> bool:
    """Whether an argument is rows in two parts."""
    return isinstance(x, SharedRows) and x._whole is None


def shared_rows(context: Tensor, items: Tensor, sharing: Sharing) -> Tensor:
    """`SharedRows`, or the items themselves where nothing is shared; the context is not read then."""
    return SharedRows(context, items, sharing) if len(sharing.context) else items


def _is_context(x: Any) -> bool:
    """Whether all columns of rows are shared."""
    return _divided(x) and x.sharing.all


@_divides(F.linear)
def _linear(x: Any = None, weight: Any = None, bias: Tensor | None = None, **others: Any) -> Any:
    """W x + b = W_c x_c + b + W_i x_i of rows x; or, of rows in the place of the weight, what x makes of them."""
    if others or weight is None:
        return NotImplemented
    if _divided(x) and not isinstance(weight, SharedRows):
        of_context, of_items = x.sharing.divide(weight)
        context = F.linear(x.context, of_context, bias)
        if _is_context(x):
            return SharedRows(context, x.items, x.sharing.relative((True,) * len(weight)))
        return torch.addmm(context, x.items, of_items.t())
    if _divided(weight) and isinstance(x, Tensor) and not isinstance(x, SharedRows) and bias is None and x.ndim == 2:
        of_context, of_items = weight.sharing.divide(x)
        return torch.addmm(F.linear(of_context, weight.context), of_items, weight.items.t())
    return NotImplemented


def _described(attribute: Callable[[Tensor], Any], x: Tensor) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return attribute(x)


_DESCRIBING = [getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "device")]
_RULES.update({attribute: partial(_described, attribute) for attribute in _DESCRIBING})


@_divides(Tensor.reshape)
def _reshape(x: Any, *shape: Any, **others: Any) -> Any:
    """To the shape that they have, as experts bring theirs to rows.

    What experts make of a context alone would be in two parts as well, which their autograd function cannot write to.
    """
    same = _divided(x) and not x.sharing.all and shape == (-1, len(x.sharing.shared)) and not others
    return x if same else NotImplemented


@_divides(torch.linalg.vector_norm)
def _norm(x: Any, ord: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **others: Any) -> Any:
    if not _divided(x) or ord != 2 or dim != 1 or keepdim or others:
        return NotImplemented
    return torch.hypot(*(torch.linalg.vector_norm(part, dim=1, dtype=dtype) for part in (x.context, x.items)))


@_divides(torch.cat)
def _cat(tensors: Any, dim: int = 0, **others: Any) -> Any:
    if others or dim != 1 or not all(_divided(x) or (not isinstance(x, SharedRows) and x.ndim == 2) for x in tensors):
        return NotImplemented
    of_context = [x for x in tensors if isinstance(x, SharedRows)]
    items = [x.items if isinstance(x, SharedRows) else x for x in tensors]
    shared = [x.sharing.shared if isinstance(x, SharedRows) else (False,) * x.shape[1] for x in tensors]
    return SharedRows(
        torch.cat([x.context for x in of_context], 1),
        torch.cat(items, 1),
        of_context[0].sharing.relative(sum(shared, ())),
    )


@_divides(Tensor.split)
def _split(x: Any, sizes: Any = 0, dim: int = 0, **others: Any) -> Any:
    if others or not _divided(x) or dim not in (1, -1) or isinstance(sizes, int):
        return NotImplemented
    stops = list(accumulate(sizes))
    return tuple(_piece(x, stop - size, stop) for size, stop in zip(sizes, stops, strict=True))


@_divides(Tensor.__getitem__)
def _getitem(x: Any, index: Any) -> Any:
    match index:
        case (slice(start=None, stop=None, step=None), slice(step=None) as columns) if _divided(x):
            start, stop, _ = columns.indices(len(x.sharing.shared))
            return _piece(x, start, max(start, stop))
    return NotImplemented


def _piece(x: SharedRows, start: int, stop: int) -> Tensor:
    of_context, of_items, sharing = x.sharing.piece(start, stop)
    return shared_rows(x.context[:, of_context], x.items[:, of_items], sharing)


def _pointwise(function: Callable[[Tensor], Tensor], x: Any = None, **options: Any) -> Any:
    if not _divided(x) or any(value is not False for value in options.values()):
        return NotImplemented
    return SharedRows(function(x.context), function(x.items), x.sharing)


_RULES.update({function: partial(_pointwise, function) for function in (F.relu, torch.sigmoid)})


@_divides(F.dropout)
def _dropout(x: Any = None, p: float = 0.5, training: bool = True, inplace: bool = False, **others: Any) -> Any:
    return NotImplemented if training or others else x


@_divides(Tensor.mul, torch.mul)
def _mul(x: Any = None, y: Any = None, **others: Any) -> Any:
    """By a number, or a row for all."""
    if not isinstance(x, SharedRows):
        x, y = y, x
    if others or not _divided(x):
        return NotImplemented
    if isinstance(y, int | float):
        return SharedRows(x.context * y, x.items * y, x.sharing)
    row = y.context if _is_context(y) else y
    if (
        not isinstance(row, Tensor)
        or isinstance(row, SharedRows)
        or row.ndim != 2
        or len(row) != 1
        or row.shape[1] != len(x.sharing.shared)
    ):
        return NotImplemented
    of_context, of_items = x.sharing.divide(row)
    return SharedRows(x.context * of_context, x.items * of_items, x.sharing)
