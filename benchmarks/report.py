"""What the benchmarks report alike: what was measured, where and how, for a person (Markdown) and a program (JSON)."""

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys.versions import git_commit, nvidia_driver, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

Rows = Sequence[Mapping[str, str]]


def shown_path(path: str | Path) -> str:
    """A path as a report may name it: from the checkout's root, or the bare name of what lies elsewhere."""
    path = Path(path).resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def environment() -> dict[str, Any]:
    """Commit, hardware, versions and date."""
    return {
        "commit": git_commit(),
        "hardware": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "gpus": _gpus(),
        },
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def number(value: float | None) -> str:
    """A figure with as many digits as one reads."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.4f}"


def show(title: str, rows: Rows) -> None:
    """Print rows as a table; their first column names them."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(rows[0]):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def write(
    stem: Path, title: str, parts: Sequence[str | Rows], result: Mapping[str, Any], *, quiet: bool = False
) -> None:
    """Write `<stem>.md` of paragraphs and tables and `<stem>.json`, and say so unless `quiet`.

    `result` holds what `environment` tells and the `command`; both end the page, so that a figure never stands without
    how it came about.
    """
    hardware = result["hardware"]
    facts = {
        "command": f"`{result['command']}`",
        "commit": result["commit"],
        "hardware": f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['memory_gib']} GiB"
        + "".join(f", {gpu}" for gpu in hardware["gpus"]),
        "versions": ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "date": result["date"],
    }
    page = [f"# {title}", *(part if isinstance(part, str) else _markdown(part) for part in parts)]
    page.append("\n".join(f"- {name}: {value}" for name, value in facts.items()))
    stem.parent.mkdir(parents=True, exist_ok=True)
    stem.with_name(f"{stem.name}.md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    stem.with_name(f"{stem.name}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if not quiet:
        print(f"Written: {shown_path(stem)}.md and .json", flush=True)


def _markdown(rows: Rows) -> str:
    columns = list(rows[0])
    aligned = " | ".join(["---", *["---:"] * (len(columns) - 1)])
    lines = [f"| {' | '.join(columns)} |", f"| {aligned} |", *(f"| {' | '.join(row.values())} |" for row in rows)]
    return "\n".join(lines)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found.group(1) if found else platform.machine()


def _gpus() -> list[str]:
    if not nvidia_driver():
        return []
    import torch  # two seconds that a machine without a GPU saves

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
