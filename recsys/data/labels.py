"""A label from an expression over columns: `rating >= 4`, `clicked and not (dwell < 3 or source in ('bot', 'test'))`.

Comparisons of a column with a number, a text, a truth value or another column; `in` and `not in` a list of such
values; `and`, `or`, `not`, and columns of booleans as they stand. It is read with Python's grammar, and nothing in it
can run. Null and NaN are unknown, as in SQL: what depends on them is null.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import pyarrow as pa
import pyarrow.compute as pc

from recsys.config import ConfigError, shortened
from recsys.data.arrow import plain, usual
from recsys.data.comparing import Comparison, Value, among, compare

_COMPARISONS: dict[type[ast.cmpop], Comparison] = {
    ast.Lt: "<",
    ast.LtE: "<=",
    ast.Gt: ">",
    ast.GtE: ">=",
    ast.Eq: "==",
    ast.NotEq: "!=",
}
_SURROGATE = re.compile("[\ud800-\udfff]")  # which no file can hold

_SIGNS = re.compile(r"[<>=!]|\b(and|or|not|in)\b")
_MAX_LENGTH = 1 << 16
_MAX_DEPTH = 50
_MAX_BITS = 8192
"""Of an integer: far more than any type of column has, and no more than Python prints in a message."""


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

    def evaluate(self, columns: Mapping[str, pa.Array]) -> pa.Array:
        """The column as it stands, or (N,) booleans, null where unknown.

        Args:
            columns: (N,) values by name.

        Raises:
            pa.ArrowException: columns of types that cannot be compared so.
        """
        return columns[self.text] if self.tree is None else _truth(self.tree, columns)


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


def _value(node: ast.expr) -> Value:
    """A constant, which may have a sign."""
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return value
        case ast.Constant(value=str() as text) if text.isascii() or not _SURROGATE.search(text):
            return text
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
    raise _Unknown(node)


def _truth(node: ast.expr, columns: Mapping[str, pa.Array]) -> pa.Array | pa.Scalar:
    """(N,) booleans of a node that `_check_truth` has passed, or one where it reads no column."""
    match node:
        case ast.UnaryOp(operand=operand):
            return pc.invert(_truth(operand, columns))
        case ast.BoolOp(op=operator, values=values):
            join = pc.and_kleene if isinstance(operator, ast.And) else pc.or_kleene
            return reduce(join, [_truth(value, columns) for value in values])
        case ast.Compare(left=left, ops=operators, comparators=others):
            lefts = [left, *others[:-1]]
            pairs = [_compared(*pair, columns) for pair in zip(lefts, operators, others, strict=True)]
            return reduce(pc.and_kleene, pairs)
    assert isinstance(node, ast.Name)
    column = _column(node.id, columns)
    if pa.types.is_null(column.type):
        return column.cast(pa.bool_())
    if not pa.types.is_boolean(column.type):
        raise pa.ArrowTypeError(f"column {node.id!r} has type {column.type}, which is no truth value; compare it")
    return column


def _compared(
    left: ast.expr, operator: ast.cmpop, right: ast.expr, columns: Mapping[str, pa.Array]
) -> pa.Array | pa.Scalar:
    names = [f"column {node.id!r}" for node in (left, right) if isinstance(node, ast.Name)]
    try:
        if isinstance(right, ast.Tuple | ast.List | ast.Set):
            found = among(_operand(left, columns), [_value(element) for element in right.elts])
            return pc.invert(found) if isinstance(operator, ast.NotIn) else found
        return compare(_COMPARISONS[type(operator)], _operand(left, columns), _operand(right, columns))
    except pa.ArrowException as error:
        raise pa.ArrowTypeError(f"{' and '.join(names) or 'two values'}: {error}") from None


def _operand(node: ast.expr, columns: Mapping[str, pa.Array]) -> pa.Array | Value:
    return _column(node.id, columns) if isinstance(node, ast.Name) else _value(node)


def _column(name: str, columns: Mapping[str, pa.Array]) -> pa.Array:
    """A column of a type that `usual` gives, NaN made null."""
    column = plain(usual(columns[name]))
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column.cast(pa.float64())), None, column)
    return column
