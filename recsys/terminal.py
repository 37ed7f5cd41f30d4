"""What a person reads: consoles, tables on them and in Markdown. The only module that draws tables."""

from collections.abc import Collection, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

Rows = Sequence[Mapping[str, str]]
"""A table: one mapping for each row, all of the same columns in the same order."""

Drawn = Table
"""A table that is ready to be printed."""

PIPED_WIDTH = 120


def console(*, quiet: bool = False) -> Console:
    """The terminal; where output is piped, as by TorchX and torchrun, one wide enough to keep tables whole."""
    terminal = Console(quiet=quiet)
    return terminal if terminal.is_terminal else Console(quiet=quiet, width=PIPED_WIDTH)


def say(terminal: Console, what: str | Drawn) -> None:
    """Print a table, or a line that stays one line however narrow the terminal is."""
    if isinstance(what, str):
        terminal.print(what, highlight=False, markup=False, soft_wrap=True)
        return
    terminal.print(what, crop=False, highlight=False, markup=False)


def table(
    rows: Rows,
    title: str | None = None,
    *,
    left: Collection[str] | None = None,
    styles: Mapping[str, str] | None = None,
) -> Drawn:
    """Rows as a table for a console.

    Args:
        rows: at least one.
        title: above the table.
        left: columns that are set flush left, as texts are; by default the first.
        styles: of cells that say just this, such as `{"failed": "red"}`.
    """
    columns = list(rows[0])
    drawn = Table(title=title, title_justify="left")
    for column in columns:
        is_left = column in left if left is not None else column == columns[0]
        # Wide enough for its words: a line that runs over is ugly, but a number that is cut in two is misread.
        words = [word for cell in (column, *(row[column] for row in rows)) for word in cell.split()]
        drawn.add_column(
            column,
            justify="left" if is_left else "right",
            overflow="fold",
            min_width=max(map(cell_len, words), default=1),
        )
    for row in rows:
        drawn.add_row(*(Text(cell, (styles or {}).get(cell, "")) for cell in row.values()))
    return drawn


def without_empty(rows: Rows) -> list[dict[str, str]]:
    """Rows without the columns in which all say `-`; the first stays."""
    columns = [
        name for place, name in enumerate(rows[0] if rows else ()) if not place or any(r[name] != "-" for r in rows)
    ]
    return [{name: row[name] for name in columns} for row in rows]


def markdown(rows: Rows, *, left: Collection[str] = ()) -> str:
    """Rows, at least one, as a table in Markdown, whatever is in their cells; numbers flush right.

    Args:
        rows: of the table.
        left: columns that are set flush left, as texts are, beside the first.
    """
    _, *others = rows[0]
    aligned = [":---" if column in left else "---:" for column in others]
    lines = [list(rows[0]), ["---", *aligned], *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
