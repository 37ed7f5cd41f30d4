"""A label from an expression over columns: `rating >= 4`, `clicked and not (dwell < 3 or source in ('bot', 'test'))`.

Comparisons of a column with a number, a text, a truth value or another column; `in` and `not in` a list of such
values; `and`, `or`, `not`, and columns of booleans as they stand. It is read with Python's grammar and computed by
Arrow: nothing in it can run. Null and NaN are unknown, as in SQL: what depends on them is null.
"""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import ConfigError, shortened

_COMPARISONS: dict[type[ast.cmpop], Callable[..., pa.ChunkedArray]] = {
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
}
_SIGNS = re.compile(r"[<>=!]|\b(and|or|not|in)\b")
_MAX_LENGTH = 1 << 16
_MAX_DEPTH = 50
_MAX_BITS = 1024
"""Of an integer: more than any type of column has, and no more than Python prints in a message."""


@dataclass(frozen=True)
class Expression:
    """An expression that has been read.

    Attributes:
        text: as the user wrote it.
        columns: what it reads.
        tree: None where the text is the name of a column and nothing more.
    """

    text: str
    columns: tuple[str, ...]
    tree: ast.expr | None

    def evaluate(self, table: pa.Table) -> pa.ChunkedArray:
        """The column as it stands, or (N,) booleans, null where unknown.

        Raises:
            pa.ArrowException: columns of types that cannot be compared so.
        """
        return table.column(self.text) if self.tree is None else _truth(self.tree, table)


def parse_expression(text: str, *, source: str) -> Expression:
    """Read the name of a column, or an expression.

    Args:
        text: an expression if it has a comparison, `and`, `or`, `not` or `in`; any other text is a name.
        source: config path, for messages.

    Raises:
        ConfigError: the text is no expression of the kinds that there are.
    """
    if len(text) > _MAX_LENGTH:
        raise ConfigError(
            f"{source}: {shortened(text)!r} is too long, an expression has up to {_MAX_LENGTH} characters; "
            "write the label as a column of its own"
        )
    if text.isidentifier() or not _SIGNS.search(text):
        return Expression(text, (text,), None)
    shown = repr(shortened(text, 200))
    too_deep = ConfigError(
        f"{source}: {shown} has more than {_MAX_DEPTH} parts within each other; write the label as a column of its own"
    )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (MemoryError, RecursionError):  # which is how the parser ends where its stack does
        raise too_deep from None
    except (SyntaxError, ValueError) as error:
        raise ConfigError(f"{source}: {shown} is neither a column nor an expression: {error}") from None
    if _is_deeper(tree, _MAX_DEPTH):
        raise too_deep
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    if any(isinstance(value, int) and value.bit_length() > _MAX_BITS for value in constants):
        raise ConfigError(f"{source}: {shown} holds an integer beyond any column's; correct it")
    try:
        _check_truth(tree)
    except _Unknown as error:
        raise ConfigError(
            f"{source}: {shown}: {error} is not understood; there are comparisons of columns with values or columns, "
            "in, not in, and, or, not"
        ) from None
    names = tuple(dict.fromkeys(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)))
    if not names:
        raise ConfigError(f"{source}: {shown} names no column")
    return Expression(text, names, tree)


def _is_deeper(tree: ast.AST, depth: int) -> bool:
    """Whether more nodes than `depth` stand within each other."""
    level: list[ast.AST] = [tree]
    for _ in range(depth):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return bool(level)


class _Unknown(Exception):
    """A part of an expression that is of no kind there is."""

    def __init__(self, node: ast.AST) -> None:
        super().__init__(repr(shortened(ast.unparse(node))))


def _check_truth(node: ast.expr) -> None:
    match node:
        case ast.Name():
            pass
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            _check_truth(operand)
        case ast.BoolOp(values=values):
            for value in values:
                _check_truth(value)
        case ast.Compare(left=left, ops=operators, comparators=others):
            _check_operand(left)
            for operator, other in zip(operators, others, strict=True):
                if type(operator) in _COMPARISONS:
                    _check_operand(other)
                elif isinstance(operator, ast.In | ast.NotIn) and isinstance(other, ast.Tuple | ast.List | ast.Set):
                    for element in other.elts:
                        _value(element)
                else:
                    raise _Unknown(node)
        case _:
            raise _Unknown(node)


def _check_operand(node: ast.expr) -> None:
    if not isinstance(node, ast.Name):
        _value(node)


def _value(node: ast.expr) -> bool | int | float | str:
    """A constant, which may have a sign."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise _Unknown(node)


def _truth(node: ast.expr, table: pa.Table) -> pa.ChunkedArray:
    """(N,) booleans of a node that `_check_truth` has passed."""
    match node:
        case ast.UnaryOp(operand=operand):
            return pc.invert(_truth(operand, table))
        case ast.BoolOp(op=operator, values=values):
            join = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
            return reduce(join, [_truth(value, table) for value in values])
        case ast.Compare(left=left, ops=operators, comparators=others):
            lefts = [left, *others[:-1]]
            pairs = [_compared(*pair, table) for pair in zip(lefts, operators, others, strict=True)]
            return reduce(pc.and_kleene, pairs)
    # A column: `and` refuses it if it is not of booleans, and so must the rest.
    return pc.and_kleene(_operand(node, table), True)


def _compared(left: ast.expr, operator: ast.cmpop, right: ast.expr, table: pa.Table) -> pa.ChunkedArray:
    compared = _operand(left, table)
    if isinstance(right, ast.Tuple | ast.List | ast.Set):
        among = pa.array([_value(element) for element in right.elts]).cast(compared.type)
        found = pc.if_else(pc.is_null(compared), None, pc.is_in(compared, value_set=among))
        return pc.invert(found) if isinstance(operator, ast.NotIn) else found
    return _COMPARISONS[type(operator)](compared, _operand(right, table))


def _operand(node: ast.expr, table: pa.Table) -> pa.ChunkedArray | pa.Scalar:
    """A column, NaN made null, or a constant."""
    if not isinstance(node, ast.Name):
        return pa.scalar(_value(node))
    column = table.column(node.id)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column
